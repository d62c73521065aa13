"""What the environments of wamrl share: their specs, what they refuse, and how rows are reset, stepped and kept.

Letters: B rows, R chosen rows, A action dims (or [K, A] where a chunk is the action), S numbers of one snapshot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from wamrl.interfaces import Layout, task_id
from wamrl.naming import unknown_name, whole_number

SPLITS = ("train", "dev", "test")
_STRIPS = {"train": (0.0, 0.4), "dev": (0.5, 0.6), "test": (0.7, 0.9)}  # of one period; the rest are guard bands
_GUARD = 0.1
_PERIODS = 10
_Number = TypeVar("_Number", int, NDArray[np.int64])
Shown = dict[str, Tensor]
"""What some rows show, key -> [R, ...]: plain, because a TensorDict costs more than all that the keys are made of."""


@dataclass(frozen=True)
class StartStates:
    """Start states of one task and split.

    rand_vec: [num, V] what each start is made from. min_distance: no start of another split is nearer; 0 promises
    nothing.
    """

    rand_vec: NDArray[np.float64]
    split: str
    task: str
    min_distance: float = 0.0

    def record(self) -> dict[str, Any]:
        """What a dataset stores about the start states it was collected from."""
        return {"task": self.task, "split": self.split, "min_distance": self.min_distance}


def start_seed(number: _Number, split: str) -> _Number:
    """The seed of start `number` where starts are seeds; no other split has it."""
    return number * len(SPLITS) + SPLITS.index(check_split(split))


def seed_start_states(task: str, split: str, num: int) -> StartStates:
    """The first `num` starts of a split, whose rand_vec [num, 1] are seeds; how far their states are apart is open."""
    if num < 0:
        raise ValueError(f"num is {num}, but a number of start states is at least 0")
    return StartStates(start_seed(np.arange(num), split)[:, None].astype(np.float64), split, task)


class RowsEnv(EnvBase):
    """B rows side by side, each an episode of its own; subclasses fill in `_begin` and `_advance`.

    Keys of a row: the subclass's observation keys; `task` int64 [] (`task_id` of its name); `success` bool [1] (the
    task's flag in this control step); `simulator_error` bool [1] (the simulator failed, the row is truncated and its
    last observation repeated); `reward` float32 [1]; TorchRL's `done`, `terminated`, `truncated` [1]; and `snapshot`
    float64 [S] where `snapshots=True`.

    `reset` reads three optional keys: `_reset` bool [B, 1]; `start` int64 [B], numbers of start states; `snapshot`
    [B, S] to restore. `start` wins where both are given; without both, a row takes the next start of its task, in an
    order that the env's seed decides. For a partial reset hand in the whole last TensorDict, as TorchRL asks: rows
    that are not reset keep what it holds, and the `snapshot` that it brings along is no request to go back to it
    (`asked_snapshot`). `step` honours TorchRL's `_step` mask: rows left out repeat what they
    showed. Actions are float32 in [-1, 1], on the env's device; what lies outside is clamped.

    tasks, row_tasks: the task names, and that of each row: row b runs tasks[b % len(tasks)]. instructions: a sentence
    per row. start_index: [B] starts in use, -1 after a restore. start_round: [B] how often the env had gone through all
    starts of the task when it took this one, 0 for a start that was asked for. max_steps: control steps until a row is
    truncated. control_dt_s, action_repeat: seconds and simulator steps per control step. layout: what its
    vectors hold where.
    """

    batch_locked = True
    control_dt_s: float
    action_repeat: int
    max_steps: int
    layout = Layout()
    snapshot_size: int | None = None
    # Whether a reset without `start` takes the next of numbered starts; False leaves the draw to `_begin`.
    numbered_starts = True
    # Whether what is given out shares memory with the simulator, so that it may not be changed in place.
    gives_views = False

    def __init__(self, tasks: Sequence[str], num_envs: int, *, device: torch.device | str, seed: int) -> None:
        whole_number("num_envs", num_envs, 1)
        if not tasks:
            raise ValueError("tasks is empty; name at least one")
        super().__init__(device=torch.device(device), batch_size=torch.Size([num_envs]))
        self.tasks = tuple(tasks)
        self.row_tasks = tuple(self.tasks[row % len(self.tasks)] for row in range(num_envs))
        self.instructions = tuple(instruction(task) for task in self.row_tasks)
        self.start_index = torch.full((num_envs,), -1)
        self.start_round = torch.zeros(num_envs, dtype=torch.int64)
        self._task_ids = torch.tensor([task_id(task) for task in self.row_tasks], device=self.device)
        self._every_row = torch.arange(num_envs)
        self._rows: Shown | None = None
        self.set_seed(seed)

    # -- what a subclass fills in

    def _begin(self, rows: Tensor, start: Tensor | None, snapshot: Tensor | None) -> Shown:
        """Reset `rows` [R] to `start` [R] or `snapshot` [R, S] (neither: as drawn here); what they show, [R]."""
        raise NotImplementedError

    def _advance(self, rows: Tensor, action: Tensor) -> Shown:
        """One control step of `rows` [R]; what they show, `reward`, `terminated` and `truncated`, [R]."""
        raise NotImplementedError

    def _start_count(self, task: str) -> int:
        """How many start states a reset without `start` chooses among."""
        raise NotImplementedError

    def _declare(
        self,
        observation: Mapping[str, tuple[int, ...] | TensorSpec],
        action_shape: tuple[int, ...],
        *,
        action_spec: TensorSpec | None = None,
    ) -> None:
        """Make the specs. observation: key -> shape of a row (float32), or its spec with the batch in front."""
        rows, device = self.batch_size[0], self.device

        def flag() -> Binary:
            return Binary(n=1, shape=(rows, 1), dtype=torch.bool, device=device)

        entries: dict[str, Any] = {
            key: Unbounded(shape=(rows, *of), dtype=torch.float32, device=device) if isinstance(of, tuple) else of
            for key, of in observation.items()
        }
        entries["task"] = Unbounded(shape=(rows,), dtype=torch.int64, device=device)
        entries["success"], entries["simulator_error"] = flag(), flag()
        if self.snapshot_size is not None:
            entries["snapshot"] = Unbounded(shape=(rows, self.snapshot_size), dtype=torch.float64, device=device)
        self.observation_spec = Composite(entries, shape=self.batch_size, device=device)
        self.action_spec = action_spec or Bounded(
            -1.0, 1.0, shape=(rows, *action_shape), dtype=torch.float32, device=device
        )
        self.reward_spec = Unbounded(shape=(rows, 1), dtype=torch.float32, device=device)
        self.full_done_spec = Composite(
            {"done": flag(), "terminated": flag(), "truncated": flag()}, shape=self.batch_size, device=device
        )
        self._action_shape = (rows, *action_shape)

    # -- TorchRL's methods

    def _set_seed(self, seed: int | None) -> None:
        self._seed = 0 if seed is None else int(seed)
        self._order: dict[str, list[int]] = {}
        self._round: dict[str, int] = {}

    def _next_start(self, task: str) -> tuple[int, int]:
        """A start of the task, and the round that it belongs to."""
        if not self._order.get(task):
            turn = self._round.get(task, -1) + 1
            rng = np.random.Generator(np.random.PCG64([self._seed & (2**63 - 1), task_id(task), turn]))
            self._order[task] = rng.permutation(self._start_count(task)).tolist()[::-1]
            self._round[task] = turn
        return self._order[task].pop(), self._round[task]

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        count = self.batch_size[0]
        given = tensordict if tensordict is not None else TensorDict({}, batch_size=self.batch_size)
        mask = given.get("_reset", None)
        chosen = torch.ones(count, dtype=torch.bool) if mask is None else mask.reshape(count).cpu()
        if self._rows is None and not chosen.all():
            raise RuntimeError("the first reset has to reset every row, but `_reset` leaves some out")
        start, snapshot = given.get("start", None), asked_snapshot(given, self._rows)
        rows = chosen.nonzero()[:, 0]
        self.start_round[rows] = 0
        if start is not None:
            start, snapshot = start.reshape(count).cpu()[rows], None
            if start.numel() and int(start.min()) < 0:
                raise ValueError(f"`start` holds {int(start.min())}, but numbers of start states begin at 0")
        elif snapshot is not None:
            if self.snapshot_size is None or snapshot.shape != (count, self.snapshot_size):
                takes = "cannot be restored" if self.snapshot_size is None else f"takes ({count}, {self.snapshot_size})"
                raise ValueError(f"`snapshot` has shape {tuple(snapshot.shape)}, but this env {takes}")
            snapshot = snapshot[rows.to(snapshot.device)]
            bad = (~torch.isfinite(snapshot)).any(1).cpu()
            if bad.any():
                which = rows[bad].tolist()
                raise ValueError(f"the snapshot of row(s) {which} holds NaN or infinity and cannot be restored")
        elif self.numbered_starts:
            drawn = torch.tensor([self._next_start(self.row_tasks[row]) for row in rows.tolist()], dtype=torch.int64)
            start, self.start_round[rows] = drawn.view(-1, 2).unbind(1)
        if rows.numel():
            self.start_index[rows] = -1 if start is None else start
            fresh = self._begin(rows, start, snapshot)
            no = torch.zeros(rows.numel(), 1, dtype=torch.bool, device=self.device)
            flags = ("success", "simulator_error", "terminated", "truncated")
            self._keep(rows, {key: no.clone() for key in flags} | fresh)
        return self._given_out()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        if self._rows is None:
            raise RuntimeError("step was called before reset; call env.reset() first")
        mask = tensordict.get("_step", None)
        chosen = None if mask is None else mask.reshape(-1).cpu()
        action = checked_action(tensordict["action"], self._action_shape, self.device, chosen)
        everyone = chosen is None or bool(chosen.all())
        rows = self._every_row
        if not everyone:
            assert chosen is not None
            rows = chosen.nonzero()[:, 0]
            action = action[rows.to(action.device)]
        after = self._advance(rows, action)
        reward = after.pop("reward").to(self.device, torch.float32)
        if not everyone:
            whole = torch.zeros(self.batch_size[0], 1, device=self.device)
            whole[rows.to(self.device)] = reward
            reward = whole
        self._keep(rows, after)
        return self._given_out(reward=reward)

    def _keep(self, rows: Tensor, shown: Shown) -> None:
        """Put what the chosen rows show into the whole batch."""
        shown["done"] = shown["terminated"] | shown["truncated"]
        if rows.numel() == self.batch_size[0]:
            self._rows = {key: value.to(self.device) for key, value in shown.items()} | {"task": self._task_ids}
            return
        assert self._rows is not None
        at = rows.to(self.device)
        for key, value in self._rows.items():
            if key != "task":
                whole = value.clone()
                whole[at] = shown[key].to(self.device)
                self._rows[key] = whole

    def _given_out(self, **more: Tensor) -> TensorDict:
        """What the rows show, and `more`, for the caller to keep."""
        assert self._rows is not None
        kept = self._rows if self.gives_views else {key: value.clone() for key, value in self._rows.items()}
        more["task"] = self._task_ids.clone()  # also where views are given: it tells what the rows run, for good
        return TensorDict({**kept, **more}, batch_size=self.batch_size, device=self.device)


def asked_snapshot(given: TensorDictBase, shown: Shown | None) -> Tensor | None:
    """The `snapshot` [B, S] that a reset is asked to restore, or None.

    None too where the request is what the env showed last, `done` and all: that holds a snapshot without asking for it.
    A request of `snapshot` without `done`, or with another snapshot in any row, is restored.

    Args:
        given: the TensorDict that came.
        shown: what the env showed last, None before the first reset.
    """
    snapshot = given.get("snapshot", None)
    if snapshot is None or shown is None or not {"done", "snapshot"} <= set(given.keys()) & set(shown.keys()):
        return snapshot
    return None if torch.equal(snapshot.to(shown["snapshot"]), shown["snapshot"]) else snapshot


def in_split(unit: NDArray[np.float64], split: str) -> bool:
    """Whether a reset vector, its components that matter scaled to [0, 1], lies in the strips of `split`.

    The reset space is cut into parallel strips across its diagonal, ten periods of train, guard, dev, guard, test,
    guard with shares .4 .1 .1 .1 .2 .1, by where along the diagonal a vector falls.
    """
    first, last = _STRIPS[split]
    return first <= (unit.sum() / len(unit)) * _PERIODS % 1.0 < last


def split_distance(components: int) -> float:
    """The least distance between vectors of different splits: one guard band, .01 * sqrt(components)."""
    return _GUARD * components**0.5 / _PERIODS


def checked_action(
    action: Tensor, shape: tuple[int, ...], device: torch.device | None, chosen: Tensor | None = None
) -> Tensor:
    """`action` clamped to [-1, 1].

    Args:
        action: what came, [B, ...].
        shape: what the environment takes.
        device: where the environment lives.
        chosen: [B] bool rows that will be stepped, None for all; only those have to be finite.

    Raises:
        ValueError: another shape, dtype or device, or a number that is not finite.
    """
    if tuple(action.shape) != shape:
        raise ValueError(
            f"action has shape {tuple(action.shape)}, but this env takes {shape}: a row per environment, "
            "then the numbers of one action"
        )
    if action.dtype != torch.float32:
        raise ValueError(f"action is {action.dtype}, but this env takes torch.float32; convert it with action.float()")
    if device is not None and action.device.type != device.type:
        raise ValueError(
            f"action is on {action.device}, but this env is on {device}; move it with action.to('{device}'), "
            "or make the env with that device"
        )
    action = action.detach()
    if not math.isfinite(float(action.sum())):  # one of them is not, or the sum is too large
        bad = ~torch.isfinite(action).flatten(1).all(1)
        if chosen is not None:
            bad = bad & chosen.to(bad.device)
        if bool(bad.any()):
            raise ValueError(
                f"action of row(s) {bad.nonzero()[:, 0].tolist()} holds NaN or infinity; "
                "a simulator may only receive finite numbers"
            )
    return action.clamp(-1.0, 1.0)


def instruction(task: str) -> str:
    """The words of a task's name, for models that read text: "metaworld/pick-place-v3" is "pick place"."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", task.rpartition("/")[2].replace("_", "-")).split("-")
    if len(words) > 1 and words[-1][:1] == "v" and words[-1][1:].isdigit():
        words.pop()
    return " ".join(words).lower()


def check_split(split: str) -> str:
    """`split` if it is one of train, dev and test; otherwise UnknownNameError."""
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    return split
