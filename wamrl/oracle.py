"""The true simulator behind the contract of a World Action Model: a reference for debugging planners and models.

`imagine` restores a saved simulator state and steps every candidate through the simulator. A planner that fails here
is wrong itself; one that succeeds here and fails in the model points at the model. Values and proposals come from
the model that is given along, because a simulator has neither.

Letters: R rows, N candidates, M = 1 future, H actions, A action dims, S numbers of a snapshot.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from wamrl.interfaces import WAM, Anatomy, Context, Imagined, Proposal, State
from wamrl.noise import NoiseKey

if TYPE_CHECKING:  # torchrl is slow to import
    from torchrl.envs import EnvBase


class OracleWAM(WAM):
    """A WAM whose imagination is the simulator itself.

    model: gives `propose` and `value`, and reads the same observation keys. simulator: an environment of one row,
    apart from the one being controlled, which restores with reset({"snapshot"}) and runs the same task. Contexts must
    hold the observation key `snapshot` [S] (float64) beside the model's own keys.
    """

    differentiable = False

    def __init__(self, model: WAM, simulator: EnvBase) -> None:
        super().__init__()
        if tuple(simulator.batch_size) != (1,):
            raise ValueError(f"the oracle's simulator has batch {list(simulator.batch_size)}, but needs one row")
        model.spec.require("policy", "value")
        self.model = model
        self._simulator = simulator
        self.spec = replace(
            model.spec,
            observation={**model.spec.observation, "snapshot": (int(simulator.snapshot_size),)},
            # What the simulator answers, and with the model's own candidates: both plan among the same ones.
            provides=frozenset({"rollout", "policy", "value", "observe", "reward", "success", "uncertainty", "decode"})
            | (model.spec.provides & {"behaviour", "success_value"}),
            anatomy=Anatomy("simulator state", "physics engine", "none", "planning"),
            ensemble_size=1,
        )

    def encode(self, context: Context) -> State:
        """The model's state beside the simulator's: {"model", "snapshot" [B, S], "task" [B], "observation"}."""
        plain = replace(context, observation=context.observation.exclude("snapshot"))
        return TensorDict(
            {
                "model": self.model.encode(plain),
                "snapshot": context.observation["snapshot"][:, -1].double(),
                "task": context.task,
                "observation": plain.observation[:, -1].select(*self.model.spec.observation),
            },
            batch_size=context.task.shape,
        )

    def observe(self, state: State, action: Tensor, observation: TensorDict, reset: Tensor) -> State:
        """The state of the measured snapshot: it holds all there is to know."""
        return self.encode(Context.from_observation(observation))

    def imagine(
        self,
        state: State,
        actions: Tensor | None,
        *,
        futures: int | None = None,
        noise: NoiseKey | None = None,
        with_frames: bool = False,
    ) -> Imagined:
        """Step every candidate [R, N, H, A] in the simulator from its row's snapshot; one true future, M = 1."""
        if actions is None:
            self.spec.require("video")
        assert actions is not None
        if futures not in (None, 1):
            raise ValueError(f"the simulator is deterministic and has one future per candidate, but futures={futures}")
        rows, num, horizon, _ = actions.shape
        reward = torch.zeros(rows, num, 1, horizon)
        success = torch.zeros(rows, num, 1, horizon)
        observations: list[TensorDict] = []
        snapshots: list[Tensor] = []
        for row in range(rows):
            for candidate in range(num):
                now = self._simulator.reset(TensorDict({"snapshot": state["snapshot"][row : row + 1]}, batch_size=[1]))
                for step in range(horizon):
                    now["action"] = actions[row, candidate, step].cpu()[None]
                    now = self._simulator.step(now)["next"]
                    reward[row, candidate, 0, step] = now["reward"]
                    success[row, candidate, 0, step] = now["success"].float()
                observations.append(now.select(*self.model.spec.observation))
                snapshots.append(now["snapshot"])
        device = state["task"].device
        observation = cast(TensorDict, torch.cat(observations)).to(device)
        task = state["task"].repeat_interleave(num)
        observation["task"] = task
        leaf = TensorDict(
            {
                "model": self.model.encode(Context.from_observation(observation)),
                "snapshot": torch.cat(snapshots).to(device),
                "task": task,
                "observation": observation.exclude("task"),
            },
            batch_size=[rows * num],
        )
        return Imagined(
            leaf=leaf.reshape(rows, num, 1),
            evaluations=num * horizon,
            reward=reward.to(device),
            success=success.to(device),
            # One simulator does not disagree with itself.
            uncertainty=torch.zeros(rows, num, 1, horizon, device=device),
        )

    def propose(
        self,
        state: State,
        num: int,
        *,
        mode: str = "sde",
        future: State | None = None,
        noise: NoiseKey | None = None,
        perturbation: Tensor | None = None,
        horizon: int | None = None,
        behaviour: int = 0,
    ) -> Proposal:
        """The model's proposals without the model's futures: what follows from them is asked of the simulator."""
        proposal = self.model.propose(
            state["model"],
            num,
            mode=mode,
            future=future,
            noise=noise,
            perturbation=perturbation,
            horizon=horizon,
            behaviour=behaviour,
        )
        return replace(proposal, imagined=None)

    def value(self, state: State) -> Tensor:
        """The model's values of the states that the simulator reached."""
        return self.model.value(state["model"])

    def success_value(self, state: State) -> Tensor:
        """The model's, of the states that the simulator reached."""
        return self.model.success_value(state["model"])

    def decode(self, state: State | Imagined, keys: tuple[str, ...] | None = None) -> TensorDict:
        """What the simulator showed in these states [R]; futures are decoded at their leaf only."""
        if isinstance(state, Imagined):
            raise ValueError("the oracle keeps no frames between; decode the state `leaf` of what it imagined")
        shown = cast(TensorDict, state["observation"])
        return shown if keys is None else shown.select(*keys)
