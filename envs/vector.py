"""Any environment of wamrl as a Gymnasium `VectorEnv`.

Auto-reset mode: SAME_STEP. A row whose episode is over is reset in the same call of `step`; the observation that it
ended with is in `info["final_obs"]`.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import OneHot

from wamrl.envs.base import RowsEnv

_ALWAYS = ("task", "success", "simulator_error", "snapshot", "success_probability", "uncertainty")


def row_spaces(env: RowsEnv) -> tuple[spaces.Dict, spaces.Box | spaces.Discrete]:
    """Observation and action space of one row: the observation keys, and `task` as a number if there are several.

    One-hot actions are numbers of a Discrete space.
    """
    entries: dict[str, spaces.Space[Any]] = {}
    for key in observation_keys(env):
        spec = env.observation_spec[key]
        shape = tuple(spec.shape[1:])
        if spec.dtype == torch.uint8:
            entries[key] = spaces.Box(0, 255, shape, np.uint8)
        else:
            entries[key] = spaces.Box(-np.inf, np.inf, shape, np.float32)
    if len(env.tasks) > 1:
        entries["task"] = spaces.Discrete(len(env.tasks))
    shape = tuple(env.action_spec.shape[1:])
    if isinstance(env.action_spec, OneHot):
        return spaces.Dict(entries), spaces.Discrete(shape[-1])
    return spaces.Dict(entries), spaces.Box(-1.0, 1.0, shape, np.float32)


def as_actions(env: RowsEnv, actions: NDArray[Any]) -> Tensor:
    """What the environment takes for actions out of the space of `row_spaces`, a row each.

    Raises:
        ValueError: a number that a Discrete space does not have.
    """
    given = torch.as_tensor(actions, device=env.device)
    if not isinstance(env.action_spec, OneHot):
        return given
    count, rows = env.action_spec.shape[-1], env.batch_size[0]
    if given.shape != (rows,) or given.is_floating_point() or not bool(((given >= 0) & (given < count)).all()):
        raise ValueError(f"actions are {given.tolist()}, but have to be {rows} whole numbers from 0 to {count - 1}")
    return torch.nn.functional.one_hot(given.long(), count).float()


def observation_keys(env: RowsEnv) -> list[str]:
    """The keys that a policy may see."""
    return [str(key) for key in env.observation_spec.keys() if key not in _ALWAYS]


def as_arrays(env: RowsEnv, shown: TensorDict) -> dict[str, NDArray[Any]]:
    """The observation of all rows in the form of `row_spaces`; arrays of their own."""
    found = {key: shown[key].cpu().numpy().copy() for key in observation_keys(env)}
    if len(env.tasks) > 1:
        found["task"] = np.arange(env.batch_size[0]) % len(env.tasks)
    return found


def step_and_reset(env: RowsEnv, shown: TensorDict, action: Tensor) -> tuple[TensorDict, TensorDict]:
    """What the step led to, and what the rows show after those that are done were reset."""
    after = env.step(TensorDict({"action": action}, batch_size=env.batch_size, device=env.device))["next"]
    done = after["done"]
    if not bool(done.any()):
        return after, after
    request = after.exclude("snapshot", "reward").set("_reset", done.clone())
    return after, env.reset(request).exclude("_reset")


class RowsVectorEnv(VectorEnv[dict[str, NDArray[Any]], NDArray[Any], NDArray[Any]]):
    """A `RowsEnv` as a Gymnasium `VectorEnv` of `num_envs` rows; auto-reset mode SAME_STEP.

    Observations are dicts of arrays [B, ...]; `info` holds `success`, `simulator_error` and, where the env has them,
    `success_probability` and `uncertainty`, each [B]. After an end, `info["final_obs"]` holds the observation of all
    rows before the reset, of which those in the mask `info["_final_obs"]` [B] ended, and `info["final_info"]` the same
    for `info`. Actions are [B, A] (or [B, K, A]), numbers beyond [-1, 1] are clamped; or [B] whole numbers where the
    env takes one-hot ones.

    `reset(seed=...)` decides the order of the starts; `options` may hold `start`, [B] numbers of start states.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}

    def __init__(self, env: RowsEnv) -> None:
        self.env = env
        self.num_envs = env.batch_size[0]
        self.single_observation_space, self.single_action_space = row_spaces(env)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._shown: TensorDict | None = None

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Reset every row. Raises ValueError for a list of seeds: the rows share one order of starts."""
        if isinstance(seed, list):
            raise ValueError("seed is a list, but the rows share one order of starts; give a single number")
        if seed is not None:
            self.env.set_seed(seed)
        request = TensorDict({}, batch_size=self.env.batch_size)
        unknown = set(options or {}) - {"start"}
        if unknown:
            raise ValueError(f"options holds {sorted(unknown)}, but only 'start' is known: numbers of start states [B]")
        if options and "start" in options:
            request["start"] = torch.as_tensor(options["start"], dtype=torch.int64)
        self._shown = self.env.reset(request)
        return as_arrays(self.env, self._shown), self._info(self._shown)

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[dict[str, NDArray[Any]], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """One step of every row; those that are over are reset at once."""
        if self._shown is None:
            raise gymnasium.error.ResetNeeded("step was called before reset")
        after, self._shown = step_and_reset(self.env, self._shown, as_actions(self.env, actions))
        info = self._info(self._shown)
        if self._shown is not after:
            info = {"final_obs": as_arrays(self.env, after), "final_info": self._info(after), **info}
            info["_final_obs"] = info["_final_info"] = _flat(after, "done")
        reward, terminated, truncated = (_flat(after, key) for key in ("reward", "terminated", "truncated"))
        return as_arrays(self.env, self._shown), reward, terminated, truncated, info

    def _info(self, shown: TensorDict) -> dict[str, Any]:
        keys = ("success", "simulator_error", "success_probability", "uncertainty")
        return {key: _flat(shown, key) for key in keys if key in shown.keys()}

    def close_extras(self, **_: Any) -> None:
        """Close the environment behind it."""
        if not self.env.is_closed:
            self.env.close()


def _flat(shown: TensorDict, key: str) -> NDArray[Any]:
    return shown[key][:, 0].cpu().numpy().copy()
