"""A Gymnasium environment that fails on demand; worker processes import this module by its name."""

from __future__ import annotations

import os
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Faulty(gymnasium.Env[np.ndarray, np.ndarray]):
    """Counts steps from the seed. Action 1 kills the process, -1 makes the observation NaN, 0.5 the reward.

    Action -0.5 raises. Every observation is written into the same array.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-2.0, 2.0, (1,), np.float32)
    dt = 0.1

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.start, self.count = float(seed or 0), 0.0
        self.seen = np.array([self.start, 0.0], np.float32)
        return self.seen, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        normalised = float(action[0]) / 2.0
        if normalised == 1.0:
            os._exit(3)
        if normalised == -0.5:
            raise ZeroDivisionError("the simulator has a defect")
        self.count += 1.0
        self.seen[:] = self.start, np.nan if normalised == -1.0 else self.count
        return self.seen, np.nan if normalised == 0.5 else 1.0, False, False, {"is_success": self.count >= 3.0}


class Slower(Faulty):
    """Its steps last longer."""

    dt = 0.2


class Ragged(Faulty):
    """Its observation has no fixed size."""

    observation_space = spaces.Sequence(spaces.Discrete(3))  # type: ignore[assignment]


class Unbounded(Faulty):
    """Its actions have no bounds."""

    action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)


class Stateful(Faulty):
    """Its observation is a dict with an image."""

    observation_space = spaces.Dict(  # type: ignore[assignment]
        {"camera": spaces.Box(0, 255, (4, 6, 3), np.uint8), "place": spaces.Box(-1, 1, (2,), np.float64)}
    )

    def _observation(self) -> dict[str, np.ndarray]:
        return {"camera": np.full((4, 6, 3), int(self.count), np.uint8), "place": np.array([self.count / 10, -1.0])}

    def reset(self, **options: Any) -> Any:
        super().reset(**options)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> Any:
        return self._observation(), *super().step(action)[1:]


class Wide(Stateful):
    """Its images are wider."""

    observation_space = spaces.Dict(  # type: ignore[assignment]
        {"camera": spaces.Box(0, 255, (4, 8, 3), np.uint8), "place": spaces.Box(-1, 1, (2,), np.float64)}
    )

    def _observation(self) -> dict[str, np.ndarray]:
        return {**super()._observation(), "camera": np.zeros((4, 8, 3), np.uint8)}


for _name in ("Faulty", "Slower", "Ragged", "Unbounded", "Stateful", "Wide"):
    if f"wamrl-test/{_name}-v0" not in gymnasium.registry:
        gymnasium.register(f"wamrl-test/{_name}-v0", entry_point=f"faulty_envs:{_name}", max_episode_steps=10)
if "wamrl-test/Short-v0" not in gymnasium.registry:
    gymnasium.register("wamrl-test/Short-v0", entry_point="faulty_envs:Faulty", max_episode_steps=4)
