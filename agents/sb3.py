"""Stable-Baselines3's PPO and SAC on the same environments: the baseline everybody knows. The WAM is not touched.

Letters: B rows, T control steps of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from wamrl.agents.base import WorldBatch
from wamrl.interfaces import WAM, PolicyState

ALGORITHMS = ("ppo", "sac")


class SB3Policy:
    """An SB3 algorithm's deterministic policy as a `wamrl.interfaces.Policy`.

    keys: the observation keys that it reads. tasks: ids of the tasks in the order of its `task` number, or empty.
    """

    def __init__(self, algorithm: Any, keys: tuple[str, ...], tasks: tuple[int, ...]) -> None:
        self.algorithm, self.keys, self.tasks = algorithm, keys, tasks

    def initial_state(self, rows: int) -> PolicyState:
        """The row's identity; the policy itself carries nothing."""
        return TensorDict({"row": torch.arange(rows)}, batch_size=[rows])

    def act(self, observation: TensorDict, policy_state: PolicyState, is_init: Tensor) -> tuple[Tensor, PolicyState]:
        """Actions [B, A]."""
        shown: dict[str, Any] = {key: observation[key].cpu().numpy() for key in self.keys}
        if self.tasks:
            shown["task"] = np.array([self.tasks.index(int(number)) for number in observation["task"]])
        action, _ = self.algorithm.predict(shown, deterministic=True)
        return torch.as_tensor(action, dtype=torch.float32), policy_state


class SB3:
    """SB3's algorithm with a policy for dict observations; of kind "sb3", driven by `python -m wamrl.posttrain`.

    algorithm: "ppo" or "sac". policy: keyword arguments of SB3's constructor, such as batch_size or learning_rate.
    demonstrations: whether SAC's buffer begins with the transitions of the data. Its runs cannot be resumed: SB3 saves
    pickles, which this library does not read.
    """

    kind = "sb3"
    chunk = 1

    def __init__(
        self, *, algorithm: str = "ppo", demonstrations: bool = False, settings: Mapping[str, Any] | None = None
    ) -> None:
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm is '{algorithm}', but must be one of {', '.join(ALGORITHMS)}")
        if demonstrations and algorithm != "sac":
            raise ValueError("demonstrations fill a replay buffer, which only SAC has; leave them out for PPO")
        self.algorithm_name, self.demonstrations, self.settings = algorithm, demonstrations, dict(settings or {})

    def bind(self, model: WAM, world: WorldBatch | None, *, rows: int, seed: int) -> None:
        """Takes the seed; the model stays as it is."""
        self.seed = seed
        self.algorithm: Any = None

    def attach(self, vec_env: Any, *, decisions: int, keys: tuple[str, ...], tasks: tuple[int, ...]) -> None:
        """Build the algorithm on an SB3 `VecEnv` whose rows run the tasks of these ids."""
        import stable_baselines3

        from wamrl.agents.sb3_sac import LeanSAC

        self.keys, self.tasks, self.decisions = keys, tasks if len(tasks) > 1 else (), decisions
        settings = {"device": "cpu", "seed": self.seed, "verbose": 0, **self.settings}
        if self.algorithm_name == "ppo":
            settings.setdefault("n_steps", decisions)
            self.algorithm = stable_baselines3.PPO("MultiInputPolicy", vec_env, **settings)
        else:
            self.algorithm = LeanSAC("MultiInputPolicy", vec_env, **settings)

    def demonstrate(self, transitions: TensorDict) -> int:
        """Put transitions [X] in TorchRL's layout into SAC's buffer, whole rows of the VecEnv; how many."""
        rows = self.algorithm.n_envs
        count = len(transitions) // rows * rows
        ids = transitions["task"]
        for first in range(0, count, rows):
            part = transitions[first : first + rows]
            now, then = ({key: source[key].numpy() for key in self.keys} for source in (part, part["next"]))
            if self.tasks:
                number = np.array([self.tasks.index(int(i)) for i in ids[first : first + rows]])
                now["task"], then["task"] = number, number
            after = part["next"]
            self.algorithm.replay_buffer.add(
                now, then, part["action"].numpy(), after["reward"][:, 0].numpy(), after["terminated"][:, 0].numpy(),
                [{} for _ in range(rows)],
            )  # fmt: skip
        return count

    def policy(self) -> SB3Policy:
        """What it has learned."""
        return SB3Policy(self.algorithm, self.keys, self.tasks)

    @property
    def actor(self) -> Any:
        return None

    def begin(self, iteration: int) -> None:
        """Nothing: SB3 keeps its own generators."""

    def learn(self, batch: TensorDict) -> dict[str, float]:
        """Let the algorithm run T control steps of every row; `batch` is empty."""
        rows = self.algorithm.n_envs
        self.algorithm.learn(self.decisions * rows, reset_num_timesteps=False, log_interval=None)
        return {"steps": float(self.decisions * rows)}

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        raise ValueError("a run of agent=sb3 cannot be resumed; start it anew in another directory")
