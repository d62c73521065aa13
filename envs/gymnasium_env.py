"""Any Gymnasium environment as a batched TorchRL one, its rows stepped in worker processes.

Tasks are named "gymnasium/<id>", as in "gymnasium/Pendulum-v1". configs/env/gymnasium/ holds presets.

A start state is a seed of the environment's reset. Splits have seeds of their own (train 0, 3, 6, ..., dev 1, 4, ...,
test 2, 5, ...), so no episode of one split is one of another; how far their states are apart nobody promises.

Letters: B rows, R chosen rows, D numbers of `state`, C contact flags, S numbers of a snapshot.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrl.data import Bounded, OneHot, TensorSpec

from wamrl.envs.base import RowsEnv, Shown, check_split, seed_start_states, start_seed
from wamrl.envs.gymnasium_rows import PREFIX, Arrays, Build, Group, Row, SharedMemory, Worker, WorkerDied
from wamrl.interfaces import Layout
from wamrl.naming import unknown_name, whole_number

_STARTS = 100_000  # seeds that resets without `start` choose among
_FLAGS = {
    "reward": "reward",
    "terminated": "terminated",
    "truncated": "truncated",
    "success": "success",
    "simulator_error": "failed",
}
"""Key -> name of the array, of what a step gives beside the observation."""


start_states = seed_start_states


@dataclass
class Faults:
    """What went wrong since the environment was made.

    worker_restarts: processes that died and were started again. episodes_dropped: episodes that ended with them.
    simulator_errors: episodes that ended because a simulator gave NaN, infinity or a diverging state.
    """

    worker_restarts: int = 0
    episodes_dropped: int = 0
    simulator_errors: int = 0


class GymnasiumEnv(RowsEnv):
    """Gymnasium environments side by side in worker processes; row b runs `tasks[b % len(tasks)]`.

    Keys of a row, beside those of `RowsEnv`: `state` float32 [D], all of the observation that is no image, flattened in
    the order of its space (a goal included); with `proprioception` `proprioception` float32, those numbers of `state`;
    with `contacts` `contact` float32 [C]; with `pixels=True` `pixels` uint8 [3, H, W], the image in the observation,
    or else the environment's rendering. `success` is `info["success"]` or `info["is_success"]`, False without them.
    Actions of a Discrete space are one-hot [B, n]; those of a Box are scaled from [-1, 1] to its bounds.

    A simulator that gives NaN or diverges, and a worker process that dies, truncate their rows with `simulator_error`;
    the process is started again and its rows wait for their next reset. `faults` counts both. `snapshot` holds MuJoCo's
    or classic control's state and the random generator.

    Args:
        tasks: one name or several, such as "gymnasium/Pendulum-v1"; several need spaces of one shape.
        num_envs: rows B.
        workers: processes; None is as many as cores and rows, 0 steps the rows in this process.
        imports: packages that register the ids, such as "gymnasium_robotics".
        kwargs: of `gymnasium.make`, such as the size of images.
        control_dt_s: seconds per step of the Gymnasium environment; None is its attribute `dt`.
        action_repeat: its steps per control step; rewards are summed.
        max_steps: control steps until a row is truncated; None is the own limit of the (first) id.
        pixels: whether rows carry images.
        proprioception: indices into `state`.
        contacts: flag -> two lists of MuJoCo body names; the flag says whether one of each touch.
        places: name -> [first, end] of its numbers in `state`: "hand", "object" and "goal", in metres (see `Layout`).
        snapshots: whether rows carry their full state.
        split: which seeds resets use: "train", "dev" or "test".
        seed: of the order of the starts. device: where observations are put; simulators run on the CPU.

    Raises:
        UnknownNameError: an unknown id, with the nearest. ModuleNotFoundError: with the line that installs it.
        ValueError: settings out of range, spaces that have no fixed size or no bounds.
    """

    def __init__(
        self,
        tasks: str | Sequence[str],
        num_envs: int = 1,
        *,
        workers: int | None = None,
        imports: Sequence[str] = (),
        kwargs: Mapping[str, Any] | None = None,
        control_dt_s: float | None = None,
        action_repeat: int = 1,
        max_steps: int | None = None,
        pixels: bool = False,
        proprioception: Sequence[int] = (),
        contacts: Mapping[str, Sequence[Sequence[str]]] | None = None,
        places: Mapping[str, Sequence[int]] | None = None,
        snapshots: bool = False,
        split: str = "train",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        tasks = (tasks,) if isinstance(tasks, str) else tuple(tasks)
        self.action_repeat = whole_number("action_repeat", action_repeat, 1)
        if workers is not None:
            whole_number("workers", workers, 0)
        if max_steps is not None:
            whole_number("max_steps", max_steps, 1)
        self.split = check_split(split)
        super().__init__(tasks, num_envs, device=device, seed=seed)
        for task in tasks:
            if not task.startswith(PREFIX):
                raise unknown_name("Gymnasium task", task, [PREFIX + task], hint="Names are 'gymnasium/<id>'.")
        sides = {name: (tuple(one), tuple(other)) for name, (one, other) in (contacts or {}).items()}
        build = Build(
            ids=tuple(task.removeprefix(PREFIX) for task in self.row_tasks),
            imports=tuple(imports),
            kwargs=dict(kwargs or {}),
            action_repeat=action_repeat,
            max_steps=max_steps,
            pixels=pixels,
            snapshots=snapshots,
            proprioception=tuple(int(i) for i in proprioception),
            contacts=sides,
        )
        first = Row(build, build.ids[0])
        limit = first.max_steps
        if limit is None:
            raise ValueError(f"'{tasks[0]}' has no time limit of its own; give max_steps")
        self.max_steps = int(limit)
        build = replace(build, max_steps=self.max_steps)  # every row's, whatever its own id says
        self._build, self._asked_dt, self._workers_asked = build, control_dt_s, workers
        self.control_dt_s = self._step_seconds(first, tasks[0]) * action_repeat
        if any(not 0 <= i < first.state_size for i in build.proprioception):
            raise ValueError(f"proprioception is {list(proprioception)}, but `state` has {first.state_size} numbers")
        self._proprioception = torch.tensor(build.proprioception, dtype=torch.int64)
        self.contact_names = tuple(sides)
        self.layout = Layout.of({"places": {"state": dict(places or {})}}, {"state": (first.state_size,)})
        layout = Arrays.of(first, num_envs)
        self._check_alike(first, tasks)
        self.faults = Faults()
        self._lost = np.zeros(num_envs, bool)  # rows of a process that died, until their next reset
        count = min(os.cpu_count() or 1, num_envs) if workers is None else min(workers, num_envs)
        self._layout = layout
        self._group: Group | None = None
        self._workers: list[Worker] = []
        if count == 0:
            self._memory: Any = bytearray(layout.bytes)
            self._views = layout.views(self._memory)
            self._group = Group(build, range(num_envs), self._views, first)
        else:
            first.env.close()
            self._memory = SharedMemory(layout.bytes)
            self._views = layout.views(self._memory.buffer)
            edges = np.linspace(0, num_envs, count + 1).astype(int).tolist()
            parts = [range(low, high) for low, high in zip(edges, edges[1:], strict=False)]
            self._workers = [Worker(build, part, layout, self._memory) for part in parts]
            for worker in self._workers:
                self._expect(worker)
        observation = self._observation(first)
        self._observed, self._one_hot = (*observation, *(["snapshot"] if snapshots else [])), first.discrete
        if snapshots:
            self.snapshot_size = layout.entries["snapshot"][0][1]
        self._declare(observation, (first.action_size,), action_spec=self._action_spec(first))

    def _step_seconds(self, row: Row, task: str) -> float:
        dt = getattr(row.env.unwrapped, "dt", None) if self._asked_dt is None else self._asked_dt
        if not isinstance(dt, int | float) or not dt > 0:
            raise ValueError(f"'{task}' does not say how long a step lasts; give control_dt_s, in seconds")
        return float(dt)

    def _check_alike(self, first: Row, tasks: Sequence[str]) -> None:
        for task in tasks[1:]:
            other = Row(self._build, task.removeprefix(PREFIX))
            mine, theirs = (first.state_size, first.action_size), (other.state_size, other.action_size)
            same_snapshot = first.saver is None or first.snapshot().size == other.snapshot().size
            images = (first.image_shape(), other.image_shape())
            dt, other_dt = self._step_seconds(first, tasks[0]), self._step_seconds(other, task)
            other.env.close()
            if images[0] != images[1]:
                raise ValueError(
                    f"'{task}' has images of {images[1]}, but '{tasks[0]}' of {images[0]}; rows of one environment "
                    "need equal ones, so make two environments"
                )
            if dt != other_dt:
                raise ValueError(
                    f"a step of '{task}' lasts {other_dt:g} s, but one of '{tasks[0]}' {dt:g} s; make two "
                    "environments, or give control_dt_s if that is wrong"
                )
            if mine != theirs or first.discrete != other.discrete or not same_snapshot:
                raise ValueError(
                    f"'{task}' has state and action sizes {theirs}, but '{tasks[0]}' {mine}; rows of one environment "
                    "need equal ones (and equal snapshots), so make two environments"
                )

    def _observation(self, first: Row) -> dict[str, tuple[int, ...] | TensorSpec]:
        entries: dict[str, tuple[int, ...] | TensorSpec] = {}
        if first.state_size:
            entries["state"] = (first.state_size,)
        if self._build.proprioception:
            entries["proprioception"] = (len(self._build.proprioception),)
        if self.contact_names:
            entries["contact"] = (len(self.contact_names),)
        if "pixels" in self._views:
            shape = self._views["pixels"].shape
            entries["pixels"] = Bounded(0, 255, shape=shape, dtype=torch.uint8, device=self.device)
        if not entries:
            raise ValueError(f"'{self.tasks[0]}' observes images only; make it with pixels=True")
        return entries

    def _action_spec(self, first: Row) -> TensorSpec | None:
        if not first.discrete:
            return None
        size = first.action_size
        return OneHot(size, shape=(self.batch_size[0], size), dtype=torch.float32, device=self.device)

    @property
    def config(self) -> dict[str, Any]:
        """What makes an equal environment: `GymnasiumEnv(**config)`; plain values, fit for JSON."""
        build = self._build
        return {
            "tasks": list(self.tasks),
            "num_envs": self.batch_size[0],
            "workers": self._workers_asked,
            "imports": list(build.imports),
            "kwargs": dict(build.kwargs),
            "control_dt_s": self._asked_dt,
            "action_repeat": self.action_repeat,
            "max_steps": self.max_steps,
            "pixels": build.pixels,
            "proprioception": list(build.proprioception),
            "contacts": {name: [list(side) for side in sides] for name, sides in build.contacts.items()},
            "places": self.layout.to_dict()["places"].get("state", {}),
            "snapshots": build.snapshots,
            "split": self.split,
        }

    def _start_count(self, task: str) -> int:
        return _STARTS

    # -- running

    def _begin(self, rows: Tensor, start: Tensor | None, snapshot: Tensor | None) -> Shown:
        at = rows.numpy()
        if start is not None:
            self._views["seed"][at] = start_seed(start.numpy(), self.split)
            command = "reset"
        else:
            assert snapshot is not None
            self._views["snapshot"][at] = snapshot.cpu().double().numpy()
            command = "restore"
        self._lost[at] = False
        dead = self._run(command, at)
        if dead:  # nothing was lost that a reset needs: the same again in a new process
            again = np.array(sorted(row for worker in dead for row in worker.rows if row in set(rows.tolist())))
            self._restart(dead, idle=at)
            self._lost[again] = False
            if start is None:
                assert snapshot is not None
                self._views["snapshot"][at] = snapshot.cpu().double().numpy()
            if self._run(command, again):
                raise RuntimeError(
                    f"a worker process died twice at a {command} of rows {again.tolist()}; see its output"
                )
        return self._shown(at)

    def _advance(self, rows: Tensor, action: Tensor) -> Shown:
        at = rows.numpy()
        if self._one_hot:
            odd = (action.sum(1) != 1) | (action.amax(1) != 1)
            if bool(odd.any()):
                bad = rows[odd.cpu()].tolist()
                raise ValueError(f"action of row(s) {bad} is not one-hot: one number has to be 1 and the others 0")
        self._views["action"][at] = action.cpu().numpy()
        gone = self._lost[at]
        dead = self._run("step", at[~gone] if gone.any() else at)
        if dead:
            self._restart(dead)
            gone = self._lost[at]
        after = self._shown(at)
        for key, name in _FLAGS.items():
            after[key] = self._taken(name, at)
        if after["simulator_error"].any():
            self.faults.simulator_errors += int(self._views["failed"][at[~gone]].sum())
        if gone.any():
            assert self._rows is not None
            lost = torch.from_numpy(gone)
            for key in self._observed:
                after[key][lost] = self._rows[key][rows[lost].to(self.device)].cpu()
            for key in _FLAGS:
                after[key][lost] = key in ("truncated", "simulator_error")
        return after

    def _shown(self, at: NDArray[np.int64]) -> Shown:
        """What the rows at `at` show."""
        shown = {key: self._taken(key, at) for key in self._observed if key != "proprioception"}
        if self._build.proprioception:
            shown["proprioception"] = shown["state"][:, self._proprioception]
        return shown

    def _taken(self, name: str, at: NDArray[np.int64]) -> Tensor:
        """A copy of what the workers wrote for the rows at `at`."""
        view = self._views[name]
        return torch.from_numpy(view.copy() if len(at) == len(view) else view[at])

    # -- processes

    def _run(self, command: str, at: NDArray[np.int64]) -> list[Worker]:
        """Let the workers do it for the rows at `at`; those that died meanwhile."""
        chosen = self._views["chosen"]
        chosen[:] = False
        chosen[at] = True
        if self._group is not None:
            self._group.run(command)
            return []
        asked, dead = [], []
        for worker in self._workers:
            if chosen[worker.rows.start : worker.rows.stop].any():
                try:
                    worker.send(command)
                    asked.append(worker)
                except WorkerDied:
                    dead.append(worker)
        error: Exception | None = None
        for worker in asked:  # every answer is taken, also after an error, so that none is left for the next command
            try:
                worker.wait()
            except WorkerDied:
                dead.append(worker)
            except Exception as raised:
                error = error or raised
        if error is not None:
            raise error
        return dead

    def _restart(self, dead: Sequence[Worker], *, idle: NDArray[np.int64] | None = None) -> None:
        """New processes for dead ones, whose rows wait for a reset. idle: rows that were in no episode."""
        running = ~self._lost
        if self._rows is not None:
            running &= ~self._rows["done"][:, 0].cpu().numpy()
        if idle is not None:
            running[idle] = False
        self.faults.worker_restarts += len(dead)
        for worker in dead:
            self.faults.episodes_dropped += int(running[worker.rows.start : worker.rows.stop].sum())
            worker.close()
            new = Worker(self._build, worker.rows, self._layout, self._memory)
            self._workers[self._workers.index(worker)] = new
            self._expect(new)
            self._lost[worker.rows.start : worker.rows.stop] = True

    def _expect(self, worker: Worker) -> None:
        try:
            worker.wait()
        except WorkerDied:
            code = worker.process.wait()
            raise RuntimeError(
                f"a worker process ended with exit code {code} while it made its environments; its own output says "
                "why, and workers=0 makes them in this process"
            ) from None

    def close(self, *, raise_if_closed: bool = True) -> None:
        """End the processes and close the environments."""
        if self._group is not None:
            self._group.close()
            self._group = None
        for worker in self._workers:
            worker.close()
        self._workers = []
        super().close(raise_if_closed=raise_if_closed)
