"""What a learner is handed in an iteration: roll-outs of its actor, real start frames, or an environment of its own.

Letters: B rows, T decisions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict

from wamrl.agents.base import EpisodeEnv, Learner, value_unit
from wamrl.data import EpisodeDataset
from wamrl.envs.base import RowsEnv
from wamrl.envs.vector import observation_keys
from wamrl.interfaces import WAM, task_id

MakeEnv = Callable[[], RowsEnv]


class Frames:
    """Real start frames for a learner that imagines by itself."""

    def __init__(self, frames: TensorDict, rows: int) -> None:
        self.frames, self.rows = frames, rows

    def open(self) -> None: ...

    def close(self, *, for_good: bool = True) -> None: ...

    def batch(self, seed: int) -> TensorDict:
        """Start frames [B]."""
        draw = torch.Generator().manual_seed(seed)
        return self.frames[torch.randint(len(self.frames), (self.rows,), generator=draw)]


class Rollouts:
    """Batches [B, T] of the learner's actor by TorchRL's collector; the environment is open only while it is needed."""

    def __init__(
        self, env: RowsEnv | MakeEnv, model: WAM, learner: Learner, decisions: int, success_ends: bool | None
    ) -> None:
        self.made, self.model, self.learner, self.decisions = env, model, learner, decisions
        self.success_ends = model.spec.success_bonus > 0 if success_ends is None else success_ends
        self.env: EpisodeEnv | None = None
        self.collector: Any = None

    def open(self) -> None:
        from torchrl.collectors import Collector

        if self.env is not None:
            return
        spec = self.model.spec
        self.env = EpisodeEnv(
            self.made if isinstance(self.made, RowsEnv) else self.made(),
            keys=spec.observation,
            chunk=self.learner.chunk,
            discount=spec.discount,
            success_bonus=spec.success_bonus,
            value_unit=value_unit(self.model),
            success_ends=self.success_ends,
        )
        self.collector = Collector(
            self.env,
            self.learner.actor,
            frames_per_batch=self.env.batch_size[0] * self.decisions,
            total_frames=-1,
            reset_at_each_iter=True,  # so that an iteration depends on nothing but weights, seed and its number
            trust_policy=True,
            auto_register_policy_transforms=False,
        )

    def close(self, *, for_good: bool = True) -> None:
        """Not `for_good`: only an environment that can be made again as it was."""
        if self.env is None or (isinstance(self.made, RowsEnv) and not for_good):
            return
        self.collector.shutdown()
        self.env.close(raise_if_closed=False)
        self.env = self.collector = None

    def batch(self, seed: int) -> TensorDict:
        """What the actor did in one iteration, from fresh episodes."""
        assert self.env is not None
        self.env.set_seed(seed)
        return next(iter(self.collector)).clone()


class StableBaselines:
    """The environment of `agent=sb3`, which collects by itself; open only while it is needed."""

    def __init__(self, env: RowsEnv | MakeEnv, learner: Any, data: EpisodeDataset | None, decisions: int) -> None:
        if learner.demonstrations and data is None:
            raise ValueError("agent.demonstrations asks for data=<dataset>, and there is none")
        self.made, self.learner, self.data, self.decisions = env, learner, data, decisions
        self.env: RowsEnv | None = None

    def open(self) -> None:
        from wamrl.envs.sb3 import RowsSB3Env

        if self.env is not None:
            return
        self.env = env = self.made if isinstance(self.made, RowsEnv) else self.made()
        tasks, keys = tuple(task_id(task) for task in env.tasks), tuple(observation_keys(env))
        known = self.learner.algorithm is not None
        self.learner.attach(RowsSB3Env(env), decisions=self.decisions, keys=keys, tasks=tasks)
        if self.learner.demonstrations and not known:
            assert self.data is not None
            chosen = [n for n, episode in enumerate(self.data.episodes) if episode["task"] in env.tasks]
            self.learner.demonstrate(self.data.select(chosen).replay_buffer(1, 1)[:])

    def close(self, *, for_good: bool = True) -> None:
        """Not `for_good`: only an environment that can be made again as it was."""
        if self.env is None or (isinstance(self.made, RowsEnv) and not for_good):
            return
        self.env.close(raise_if_closed=False)
        self.env = None

    def batch(self, seed: int) -> TensorDict:
        return TensorDict({}, batch_size=[])


Experience = Rollouts | Frames | StableBaselines


def experience_of(
    learner: Learner,
    model: WAM,
    env: RowsEnv | MakeEnv | None,
    *,
    frames: TensorDict | None,
    data: EpisodeDataset | None,
    rows: int,
    decisions: int,
    success_ends: bool | None,
) -> Experience:
    """What a learner of this kind learns from; see `wamrl.posttraining.posttrain` for the arguments."""
    if learner.kind == "imagine":
        if frames is None:
            raise ValueError("this learner imagines from real start frames; hand them in as frames")
        return Frames(frames, rows)
    if env is None:
        raise ValueError("this learner collects in an environment; hand one in as env, or what makes it")
    if learner.kind == "sb3":
        return StableBaselines(env, learner, data, decisions)
    return Rollouts(env, model, learner, decisions, success_ends)
