"""Stable-Baselines3's PPO and SAC on the same environments: the baseline everybody knows. The WAM is not touched.

Letters: B rows, T control steps of a batch.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from wamrl.agents.base import LearningDiverged, WorldBatch, part_of
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

    algorithm: "ppo" or "sac". settings: keyword arguments of SB3's constructor, such as batch_size or learning_rate.
    demonstrations: whether SAC's buffer begins with the transitions of the data. Every iteration begins with fresh
    episodes and with random numbers of its own, as those of the other learners, so that a resumed run goes on bit for
    bit. SAC's replay buffer is part of the state: whatever it holds is written every `save_every` iterations.

    SB3's own loop cannot leave out a step, so the first reward, observation or weight that is not finite stops the run.
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
        """Build the algorithm on an SB3 `VecEnv` whose rows run the tasks of these ids, or go on in another one.

        Raises ValueError for settings whose state would not be kept.
        """
        import stable_baselines3

        if self.algorithm is not None:
            self.algorithm.set_env(vec_env)
            return
        if self.settings.get("replay_buffer_class") is not None:
            raise ValueError("agent.settings.replay_buffer_class: only SB3's own buffer can be saved; leave it out")
        self.keys, self.tasks, self.decisions = keys, tasks if len(tasks) > 1 else (), decisions
        settings = {"device": "cpu", "seed": self.seed, "verbose": 0, **self.settings}
        kind = stable_baselines3.SAC if self.algorithm_name == "sac" else stable_baselines3.PPO
        if self.algorithm_name == "ppo":
            settings.setdefault("n_steps", decisions)
        with _generators_kept():
            self.algorithm = kind("MultiInputPolicy", vec_env, **settings)

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
        """Fresh episodes, and a seed for all that SB3 draws from: its space's generator, NumPy's, its environment's.

        PyTorch's is the caller's, as for every learner.
        """
        self.iteration, self._draws = iteration, self.seed * 1_000_003 + iteration
        self.algorithm.action_space.seed(self._draws % 2**32)
        self.algorithm.env.seed(self._draws)
        self.algorithm._last_obs = None  # SB3 resets the environment where there is none
        if getattr(self.algorithm, "action_noise", None) is not None:
            self.algorithm.action_noise.reset()

    def learn(self, batch: TensorDict) -> dict[str, float]:
        """Let the algorithm run at least T control steps of every row, and say how many; `batch` is empty.

        Raises LearningDiverged where a reward, an observation or a weight of the policy is NaN or infinite.
        """
        before, steps = self.algorithm.num_timesteps, self.decisions * self.algorithm.n_envs
        with _generators_kept():
            np.random.seed(self._draws % 2**32)
            try:
                self.algorithm.learn(steps, _require_finite, reset_num_timesteps=False, log_interval=None)
            except ValueError:  # what PyTorch or the environment say of the actions of weights that are not finite
                self._require_finite_weights()
                raise
        self._require_finite_weights()
        return {"steps": float(self.algorithm.num_timesteps - before)}

    def _require_finite_weights(self) -> None:
        if not all(bool(torch.isfinite(weight).all()) for weight in self.algorithm.policy.parameters()):
            raise _diverged("a weight of the policy")

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, the optimisers' moments, SB3's counters and what SAC's replay buffer holds."""
        algorithm = self.algorithm
        counts = (algorithm.num_timesteps, algorithm._n_updates, algorithm._episode_num)
        found = {"counts": torch.tensor(counts)}
        found |= {f"policy.{name}": tensor for name, tensor in algorithm.policy.state_dict().items()}
        for owner, optimiser in self._optimisers().items():
            for index, values in optimiser.state_dict()["state"].items():
                found |= {f"{owner}.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
        if getattr(algorithm, "log_ent_coef", None) is not None:
            found["log_ent_coef"] = algorithm.log_ent_coef
        buffer = getattr(algorithm, "replay_buffer", None)
        if buffer is not None:
            found["replay_place"] = torch.tensor([buffer.pos, int(buffer.full)])
            found |= {f"replay.{name}": torch.from_numpy(x[: buffer.size()]) for name, x in _arrays(buffer).items()}
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What `state_dict` gave, once the environment is attached.

        Raises ValueError for the state of an earlier version, which held nothing of SB3.
        """
        if "counts" not in state:
            raise ValueError(
                "this run of agent=sb3 was begun by a version of wamrl that kept nothing of SB3, so it cannot be "
                "resumed; start it anew in another directory"
            )
        algorithm = self.algorithm
        algorithm.num_timesteps, algorithm._n_updates, algorithm._episode_num = state["counts"].tolist()
        algorithm.policy.load_state_dict(part_of(state, "policy."))
        for owner, optimiser in self._optimisers().items():
            whole = optimiser.state_dict()
            for name, tensor in part_of(state, f"{owner}.").items():
                index, key = name.split(".", 1)
                whole["state"].setdefault(int(index), {})[key] = tensor
            optimiser.load_state_dict(whole)
        if "log_ent_coef" in state:
            algorithm.log_ent_coef.data.copy_(state["log_ent_coef"])
        if "replay_place" in state:
            buffer = algorithm.replay_buffer
            buffer.pos, buffer.full = int(state["replay_place"][0]), bool(state["replay_place"][1])
            for name, array in _arrays(buffer).items():
                array[: buffer.size()] = state[f"replay.{name}"].numpy()

    def _optimisers(self) -> dict[str, torch.optim.Optimizer]:
        algorithm = self.algorithm
        if self.algorithm_name == "ppo":
            return {"optimiser": algorithm.policy.optimizer}
        found = {"optimiser_actor": algorithm.actor.optimizer, "optimiser_critic": algorithm.critic.optimizer}
        if algorithm.ent_coef_optimizer is not None:
            found["optimiser_entropy"] = algorithm.ent_coef_optimizer
        return found


def _require_finite(found: Mapping[str, Any], _: Mapping[str, Any]) -> bool:
    """SB3's callback: raises LearningDiverged for what came of a step, the local variables of its loop."""
    ends = [info["terminal_observation"] for info in found["infos"] if "terminal_observation" in info]
    if not np.isfinite(found["rewards"]).all():
        raise _diverged("a reward")
    if not all(np.isfinite(array).all() for shown in (found["new_obs"], *ends) for array in shown.values()):
        raise _diverged("an observation")
    return True


def _diverged(what: str) -> LearningDiverged:
    return LearningDiverged(
        f"{what} was NaN or infinite, and Stable-Baselines3 cannot leave out a step; stopped. The last good checkpoint "
        "is kept. Lower agent.settings.learning_rate, or look for extreme rewards in the environment"
    )


def _arrays(buffer: Any) -> dict[str, Any]:
    """The arrays of an SB3 replay buffer for dict observations, [places, B, ...], by the names they are kept under."""
    shown = {f"{name}.{key}": array for name in ("observations", "next_observations")
             for key, array in getattr(buffer, name).items()}  # fmt: skip
    return {**shown, **{name: getattr(buffer, name) for name in ("actions", "rewards", "dones", "timeouts")}}


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Python's and NumPy's global generators, which SB3 seeds and draws from, are afterwards as they were."""
    plain, numbers = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.set_state(numbers)
