"""Any environment of wamrl as a Stable-Baselines3 `VecEnv` (SB3 takes no Gymnasium `VectorEnv`).

Use a policy for dict observations: `PPO("MultiInputPolicy", RowsSB3Env(env))`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensordict import TensorDict

from wamrl.envs.base import RowsEnv
from wamrl.envs.vector import as_actions, as_arrays, row_spaces, step_and_reset

try:
    from stable_baselines3.common.vec_env import VecEnv
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('Stable-Baselines3 is not installed; run: pip install "wamrl[sb3]"') from error


class RowsSB3Env(VecEnv):
    """A `RowsEnv` as an SB3 `VecEnv`: rows that are over are reset in the same step, as SB3 expects.

    `infos[b]` holds `success` and `simulator_error`, and at an end `terminal_observation` and `TimeLimit.truncated`.
    """

    def __init__(self, env: RowsEnv) -> None:
        self.env = env
        self._shown: TensorDict | None = None
        self._actions: NDArray[Any] | None = None
        observation, action = row_spaces(env)
        super().__init__(env.batch_size[0], observation, action)

    def reset(self) -> dict[str, NDArray[Any]]:
        """Reset every row; a seed given by `seed()` decides the order of the starts."""
        if self._seeds and self._seeds[0] is not None:
            self.env.set_seed(self._seeds[0])
        self._reset_seeds()
        self._shown = self.env.reset()
        return as_arrays(self.env, self._shown)

    def step_async(self, actions: NDArray[Any]) -> None:
        """Take the actions [B, ...] (whole numbers [B] where the env takes one-hot ones); `step_wait` executes them."""
        self._actions = actions

    def step_wait(self) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Observation, reward [B], done [B] and one dict per row."""
        if self._shown is None or self._actions is None:
            raise RuntimeError("step was called before reset or without actions")
        after, self._shown = step_and_reset(self.env, self._shown, as_actions(self.env, self._actions))
        flags = [after[key][:, 0].cpu().numpy() for key in ("done", "terminated", "success", "simulator_error")]
        done, terminated, success, failed = flags
        infos: list[dict[str, Any]] = [
            {"success": bool(s), "simulator_error": bool(f)} for s, f in zip(success, failed, strict=True)
        ]
        if done.any():
            final = as_arrays(self.env, after)
            for row in np.flatnonzero(done).tolist():
                infos[row]["terminal_observation"] = {key: value[row] for key, value in final.items()}
                infos[row]["TimeLimit.truncated"] = not bool(terminated[row])
        return as_arrays(self.env, self._shown), after["reward"][:, 0].cpu().numpy().copy(), done.copy(), infos

    def close(self) -> None:
        """Close the environment behind it."""
        if not self.env.is_closed:
            self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute of the environment, once per row asked for."""
        value = None if attr_name == "render_mode" else getattr(self.env, attr_name)
        return [value] * len(self._indices(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refused: the rows are one object, and a change would reach all of them."""
        raise NotImplementedError(f"rows share one environment, so '{attr_name}' cannot be set for some; make another")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Refused: the rows are one object."""
        raise NotImplementedError(f"rows share one environment; call {method_name} on `.env`")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """Nothing is wrapped."""
        return [False] * len(self._indices(indices))

    def _indices(self, indices: None | int | Sequence[int]) -> Sequence[int]:
        if indices is None:
            return range(self.num_envs)
        return [indices] if isinstance(indices, int) else list(indices)
