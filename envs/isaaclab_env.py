"""Any Isaac Lab task as a batched TorchRL environment, on Newton physics, on a CPU or a GPU; Isaac Sim is not needed.

Tasks are named "isaaclab/<id>", as in "isaaclab/Isaac-Cartpole-Direct". Two are our own and need no assets from
elsewhere: "isaaclab/Wamrl-Balance" and "isaaclab/Wamrl-Push" (`wamrl.envs.isaaclab_tasks`). Isaac Lab is imported
when an environment is made. It needs a virtual environment of its own (`make setup-isaac`).

Letters: B rows, R chosen rows, S numbers of a snapshot.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrl.data import Bounded, TensorSpec

from wamrl.envs.base import RowsEnv, Shown, check_split, seed_start_states, start_seed
from wamrl.naming import unknown_name, whole_number

PREFIX = "isaaclab/"
OURS = ("Wamrl-Balance", "Wamrl-Push")
_STARTS = 100_000
_ROOT = {
    "root_pose": ("write_root_pose_to_sim_index", "root_pose"),
    "root_velocity": ("write_root_velocity_to_sim_index", "root_velocity"),
}
_JOINTS = {
    "joint_position": ("write_joint_position_to_sim_index", "position"),
    "joint_velocity": ("write_joint_velocity_to_sim_index", "velocity"),
}
_WRITERS = {"articulation": _ROOT | _JOINTS, "rigid_object": _ROOT}  # field of a state -> method and its argument
_open: list[IsaacLabEnv] = []  # Isaac Lab has one simulation per process


start_states = seed_start_states


class IsaacLabEnv(RowsEnv):
    """B environments of one Isaac Lab task, all of them advanced by one call of the simulator.

    Keys of a row, beside those of `RowsEnv`: `state`, the observation group "policy"; and the task's other groups under
    their own names, the first of images as `pixels` [3, H, W]. `success` is the task's attribute `success` [B], False
    without it. Actions are given to the task as they are, in [-1, 1].

    The auto-reset of Isaac Lab is held back, so that the observation of a row that ended is its real last one; rows are
    reset when asked for. `start` is a seed of torch's generator during the reset of that row alone; resets without it
    are drawn from the env's seed, all rows at once. All rows are stepped together: those left out by `_step` repeat
    what they showed and have to be reset before they are stepped again.

    Only one can be open in a process.

    Args:
        tasks: one name, such as "isaaclab/Wamrl-Push".
        num_envs: rows B.
        asset_root: the folder (or address) that holds `Isaac/...`, for upstream's tasks; None is the environment
            variable ISAACSIM_ASSET_ROOT. Our own tasks need none.
        overrides: of the task's config, such as ["physics=newton_mjwarp"].
        max_steps: control steps until a row is truncated; None is the task's own.
        snapshots: whether rows carry their state (poses, joints and their velocities).
        split: which seeds `start` means: "train", "dev" or "test".
        seed: of what resets and steps draw.
        device: "cpu" or "cuda"; of simulation and observations.

    Raises:
        ModuleNotFoundError: Isaac Lab is missing; it says how to get it. UnknownNameError: an unknown task id.
        FileNotFoundError, ValueError: a missing asset root, more than one task, settings out of range.
        RuntimeError: another one is open in this process.
    """

    numbered_starts = False

    def __init__(
        self,
        tasks: str | Sequence[str],
        num_envs: int = 1,
        *,
        asset_root: str | None = None,
        overrides: Sequence[str] = (),
        max_steps: int | None = None,
        snapshots: bool = False,
        split: str = "train",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        tasks = (tasks,) if isinstance(tasks, str) else tuple(tasks)
        if len(tasks) != 1:
            raise ValueError(f"tasks names {len(tasks)}, but one simulation runs one task; make one env per task")
        whole_number("num_envs", num_envs, 1)
        if max_steps is not None:
            whole_number("max_steps", max_steps, 1)
        self.split = check_split(split)
        id = _check_id(tasks[0])
        if _open:
            raise RuntimeError("Isaac Lab has one simulation per process, and another env is open; close() it first")
        self._asset_root, self._overrides, self._snapshots = asset_root, tuple(overrides), snapshots
        _set_asset_root(id, asset_root)
        _import_tasks()
        import gymnasium
        from isaaclab.app.sim_launcher import launch_simulation
        from isaaclab_tasks.utils import parse_env_cfg

        if id not in gymnasium.registry:
            raise unknown_name("Isaac Lab task", tasks[0], [PREFIX + known for known in _ids(gymnasium.registry)])
        super().__init__(tasks, num_envs, device=device, seed=seed)
        with _overrides_explained(tasks[0], overrides):
            cfg = parse_env_cfg(id, device=str(self.device), num_envs=num_envs, overrides=list(overrides))
        cfg.seed = seed
        if max_steps is not None:
            # A little less: Isaac Lab rounds up, so that 250 steps of 1/60 s were 251.
            cfg.episode_length_s = (max_steps - 0.01) * cfg.sim.dt * cfg.decimation
        self._stack = contextlib.ExitStack()
        self.raw: Any = None
        _open.append(self)
        try:
            self._open_simulation(id, cfg, launch_simulation, max_steps)
        except BaseException:
            self.close()
            raise

    def _open_simulation(self, id: str, cfg: Any, launch: Any, max_steps: int | None) -> None:
        import gymnasium

        num_envs = self.batch_size[0]
        with _generators_kept():
            self._stack.enter_context(launch(cfg, {"device": str(self.device)}))
            made: Any = gymnasium.make(id, cfg=cfg)
        self.raw = made.unwrapped
        self._reset_rows = self.raw._reset_idx
        self.action_repeat = int(cfg.decimation)
        self.control_dt_s = float(self.raw.step_dt)
        self.max_steps = int(self.raw.max_episode_length) if max_steps is None else max_steps
        self._steps = torch.zeros(num_envs, 1, dtype=torch.int64, device=self.device)
        self._stale = torch.zeros(num_envs, dtype=torch.bool)
        space = self.raw.single_action_space
        if not isinstance(space, gymnasium.spaces.Box):
            raise ValueError(f"'{id}' takes actions in {space}; only Box is supported")
        with self._drawing():
            observation, _ = self.raw.reset()
        entries: dict[str, tuple[int, ...] | TensorSpec] = {}
        for key, value in self._named(observation).items():
            entries[key] = tuple(value.shape[1:])
            if value.dtype == torch.uint8:
                entries[key] = Bounded(0, 255, shape=value.shape, dtype=torch.uint8, device=self.device)
        if self._snapshots:
            self.snapshot_size = self._pack().shape[1]
        self._declare(entries, tuple(space.shape))

    @property
    def config(self) -> dict[str, Any]:
        """What makes an equal environment: `IsaacLabEnv(**config)`; plain values, fit for JSON."""
        return {
            "tasks": list(self.tasks),
            "num_envs": self.batch_size[0],
            "asset_root": self._asset_root,
            "overrides": list(self._overrides),
            "max_steps": self.max_steps,
            "snapshots": self._snapshots,
            "split": self.split,
        }

    def _start_count(self, task: str) -> int:
        return _STARTS

    def _set_seed(self, seed: int | None) -> None:
        super()._set_seed(seed)
        self._draws = 0

    @contextlib.contextmanager
    def _drawing(self, seed: int | None = None) -> Iterator[None]:
        """Isaac Lab draws from torch's global generator: inside from `seed`, or the env's; outside it is untouched."""
        if seed is None:
            self._draws += 1
            seed = (self._seed * 1_000_003 + self._draws) % (1 << 62)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield

    def _begin(self, rows: Tensor, start: Tensor | None, snapshot: Tensor | None) -> Shown:
        at = rows.to(self.device)
        if start is not None:
            for row, number in zip(at.int(), start.tolist(), strict=True):
                with self._drawing(start_seed(int(number), self.split)):
                    self._reset_rows(row[None])
        else:
            with self._drawing():
                self._reset_rows(at.int())
        self._steps[at] = 0
        self._stale[rows] = False
        if snapshot is not None:
            self._unpack(at, snapshot.to(self.device))
        self.raw.scene.write_data_to_sim()
        self.raw.sim.forward()
        with self._drawing():
            shown = self._named(self._observe())
        if self._snapshots:
            shown["snapshot"] = self._pack()
        return {key: value[at] for key, value in shown.items()}

    def _advance(self, rows: Tensor, action: Tensor) -> Shown:
        if bool(self._stale[rows].any()):
            bad = rows[self._stale[rows]].tolist()
            raise RuntimeError(f"row(s) {bad} were left out of an earlier step and moved on; reset them first")
        at, count = rows.to(self.device), self.batch_size[0]
        whole = action
        if rows.numel() < count:
            whole = torch.zeros(count, *action.shape[1:], device=self.device)
            whole[at] = action
            left = torch.ones(count, dtype=torch.bool)
            left[rows] = False
            self._stale |= left
        with self._drawing(), self._no_auto_reset():
            observation, reward, terminated, truncated, _ = self.raw.step(whole)
        shown = self._named(observation)
        reward = reward.reshape(count, 1).clone()
        failed = ~reward.isfinite()
        for value in shown.values():
            if value.is_floating_point():
                failed = failed | ~value.flatten(1).isfinite().all(1, keepdim=True)
        self._steps[at] += 1
        success = getattr(self.raw, "success", None)
        flags = {
            "reward": reward.masked_fill(failed, 0.0),
            "terminated": terminated.reshape(count, 1) & ~failed,
            "truncated": truncated.reshape(count, 1) | failed | (self._steps >= self.max_steps),
            "success": torch.zeros_like(failed) if success is None else success.reshape(count, 1) & ~failed,
            "simulator_error": failed,
        }
        if self._snapshots:
            shown["snapshot"] = self._pack()
        if bool(failed[at].any()):
            assert self._rows is not None
            for key, value in shown.items():
                broken = failed.reshape(count, *[1] * (value.dim() - 1))
                shown[key] = torch.where(broken, self._rows[key], value)
        everything = {**shown, **flags}
        return everything if rows.numel() == count else {key: value[at] for key, value in everything.items()}

    @contextlib.contextmanager
    def _no_auto_reset(self) -> Iterator[None]:
        self.raw._reset_idx = _do_nothing
        try:
            yield
        finally:
            del self.raw._reset_idx

    def _observe(self) -> Mapping[str, Any]:
        manager = getattr(self.raw, "observation_manager", None)
        return self.raw._get_observations() if manager is None else manager.compute()

    def _named(self, observation: Mapping[str, Any]) -> dict[str, Tensor]:
        """Observation groups under our names; tensors of their own, since Isaac Lab uses its buffers again."""
        found: dict[str, Tensor] = {}
        for group, value in observation.items():
            if not isinstance(value, Tensor):
                parts = ", ".join(map(str, value))
                raise ValueError(f"the observation group '{group}' is not one tensor but has parts ({parts})")
            if value.dim() == 4:
                channels_last = value.shape[-1] in (1, 3, 4)
                name = group if "pixels" in found else "pixels"
                found[name] = (value.permute(0, 3, 1, 2) if channels_last else value).contiguous().clone()
            else:
                found["state" if group == "policy" else group] = value.to(torch.float32, copy=True)
        return found

    # -- snapshots

    def _parts(self) -> list[tuple[str, Any, str, Tensor]]:
        """(kind, thing, field, value [B, ...]) of everything that moves; poses are relative to the row's origin."""
        state = self.raw.scene.get_state(is_relative=True)
        odd = [name for kind, things in state.items() if kind not in _WRITERS for name in things]
        if odd:
            raise ValueError(f"the state of {', '.join(odd)} cannot be saved: only articulations and rigid objects can")
        return [
            (kind, self.raw.scene[name], field, value)
            for kind, things in sorted(state.items())
            for name, fields in sorted(things.items())
            for field, value in sorted(fields.items())
        ]

    def _pack(self) -> Tensor:
        count = self.batch_size[0]
        parts = [value.reshape(count, -1).double() for *_, value in self._parts()]
        return torch.cat([self._steps.double(), *parts], dim=1)

    def _unpack(self, rows: Tensor, snapshot: Tensor) -> None:
        at, ids = 1, rows.int()
        for kind, thing, field, like in self._parts():
            size = like[0].numel()
            value = snapshot[:, at : at + size].to(like.dtype).reshape(len(rows), *like.shape[1:])
            at += size
            if field == "root_pose":
                value[:, :3] += self.raw.scene.env_origins[rows]
            # Not scene.reset_to: it also sets the drives' targets, which then act on later episodes.
            writer, argument = _WRITERS[kind][field]
            getattr(thing, writer)(**{argument: value, "env_ids": ids})
        self._steps[rows] = snapshot[:, :1].long()
        self.raw.episode_length_buf[rows] = snapshot[:, 0].to(self.raw.episode_length_buf.dtype)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """End the simulation, so that another one can be made in this process."""
        if self in _open:
            try:
                if self.raw is not None:
                    self.raw.close()
                self._stack.close()
            finally:
                _open.remove(self)
        super().close(raise_if_closed=raise_if_closed)


@contextlib.contextmanager
def _overrides_explained(task: str, overrides: Sequence[str]) -> Iterator[None]:
    """Isaac Lab reads overrides by Hydra, which prints a mistake in them and ends the process unless told not to."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except (Exception, SystemExit) as error:
        if not overrides:
            raise
        reason = str(error.__cause__ or error).strip()
        raise ValueError(f"the config of '{task}' does not take the overrides {list(overrides)}: {reason}") from error
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Isaac Lab seeds the global generators of random, numpy and torch when it makes a task: inside only."""
    ours, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(numpys)


def _do_nothing(*_: Any, **__: Any) -> None:
    pass


def _ids(registry: Mapping[str, Any]) -> list[str]:
    return [id for id, spec in registry.items() if "env_cfg_entry_point" in (spec.kwargs or {})]


def _check_id(task: str) -> str:
    if not task.startswith(PREFIX):
        raise unknown_name("Isaac Lab task", task, [PREFIX + task], hint="Names are 'isaaclab/<id>'.")
    return task.removeprefix(PREFIX)


def _set_asset_root(id: str, asset_root: str | None) -> None:
    """Tell Isaac Lab where its assets are before it is imported: without that it spends a minute asking a server.

    Raises:
        ValueError: an upstream task, and nobody said where. FileNotFoundError: a folder that is none.
    """
    root = asset_root or os.environ.get("ISAACSIM_ASSET_ROOT")
    if root is None:
        if id not in OURS:
            raise ValueError(
                f"'{id}' loads robots and grounds from Isaac Sim's assets; say where they are with asset_root=<folder "
                "that holds Isaac/> or the environment variable ISAACSIM_ASSET_ROOT (an address works too, online)"
            )
        root = str(Path(__file__).parent / "assets")
    elif "://" not in root and not (Path(root) / "Isaac").is_dir() and id not in OURS:
        raise FileNotFoundError(f"asset_root is {root}, but there is no folder {Path(root) / 'Isaac'}")
    if "isaaclab" in sys.modules and os.environ.get("ISAACSIM_ASSET_ROOT", root) != root:
        raise ValueError(
            f"Isaac Lab was imported with asset_root {os.environ['ISAACSIM_ASSET_ROOT']} and cannot change it to "
            f"{root}; use a new process"
        )
    os.environ["ISAACSIM_ASSET_ROOT"] = root


def _import_tasks() -> None:
    try:
        import isaaclab_tasks  # noqa: F401  # registers upstream's ids
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Isaac Lab is not installed; it needs a virtual environment of its own: make setup-isaac, or on a GPU with "
            'Python 3.12: pip install "wamrl[isaac]"',
            name=error.name,
        ) from error
    from wamrl.envs import isaaclab_tasks as ours  # noqa: F401
