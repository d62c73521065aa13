"""Soft actor-critic (Haarnoja et al., 2018, arXiv:1812.05905) of a WAM's Gaussian policy, on its latents.

TorchRL's `SACLoss`, replay buffer and target updates do the work. Actions are drawn unclamped and executed clamped, as
everywhere in the library; the critics, two networks of the learner's own, read the clamped action.

Letters: B rows, T decisions of a batch, F = B * T transitions, A action dims, D latent dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.objectives import SACLoss, SoftUpdate

from wamrl.agents.base import (
    CollectingLearner,
    Rates,
    Updater,
    WorldBatch,
    batch_metrics,
    encode,
    finite_rewards,
    noise_bounds,
    part_of,
    require_number,
    value_unit,
)
from wamrl.agents.ppo import GaussianActor
from wamrl.interfaces import WAM
from wamrl.models.joint_embedding import JointEmbeddingWAM
from wamrl.models.parts import mlp
from wamrl.naming import whole_number


class _Actor(nn.Module):
    def __init__(self, model: JointEmbeddingWAM, noise: tuple[float, float]) -> None:
        super().__init__()
        self.policy, self.noise = model.policy, noise

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = JointEmbeddingWAM.gaussian_of(self.policy(latent))
        return mean, log_std.exp().clamp(*self.noise)


class _Critic(nn.Module):
    def __init__(self, inputs: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.network = mlp(inputs + action_dim, [width, width], 1)

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return self.network(torch.cat([latent, action.clamp(-1.0, 1.0)], dim=-1))


def _normal(loc: Tensor, scale: Tensor) -> Independent:
    return Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)


class SAC(CollectingLearner):
    """SAC on the reference WAM; fulfils `wamrl.agents.base.Learner`.

    buffer: transitions that are kept. batch: per step. updates: optimiser steps per iteration. warmup: transitions
    before the first. width: of the critics. alpha: first weight of the entropy, tuned to target_entropy (None: -A).
    tau: of the target critics. noise: bounds of an action's deviation. critic_only: iterations that train the critics
    alone. The others: `wamrl.agents.base.Rates`.
    """

    name = "sac"
    chunk = 1
    rates = Rates(learning_rate=3e-4, world_learning_rate=1e-5, world_weight=0.0, imitation_weight=0.0, clip_norm=10.0)

    def __init__(
        self,
        *,
        buffer: int = 200_000,
        batch: int = 256,
        updates: int = 256,
        warmup: int = 1000,
        width: int = 256,
        alpha: float = 0.01,
        target_entropy: float | None = None,
        tau: float = 0.01,
        noise: tuple[float, float] = (0.05, 0.5),
        critic_only: int = 1,
        **rates: Any,
    ) -> None:
        for label, value in (("buffer", buffer), ("batch", batch), ("updates", updates), ("width", width)):
            whole_number(label, value, 1)
        for label, value in (("warmup", warmup), ("critic_only", critic_only)):
            whole_number(label, value, 0)
        if warmup > buffer:
            raise ValueError(f"warmup is {warmup}, but the buffer never holds more than {buffer} transitions")
        require_number("alpha", alpha, above=0.0)
        require_number("tau", tau, above=0.0, most=1.0)
        if target_entropy is not None:
            require_number("target_entropy", target_entropy)
        self.capacity, self.batch, self.updates, self.warmup, self.width = buffer, batch, updates, warmup, width
        self.alpha, self.target_entropy, self.tau, self.critic_only = alpha, target_entropy, tau, critic_only
        self.noise = noise_bounds(noise)
        self._rates = replace(self.rates, **rates)

    def bind(self, model: WAM, world: WorldBatch | None, *, rows: int, seed: int) -> None:
        """See `wamrl.agents.base.Learner`. Raises ValueError for a model of another kind than the reference WAM."""
        if not isinstance(model, JointEmbeddingWAM):
            raise ValueError(
                f"agent=sac works on the latents of wam=reference, but this is a {type(model).__name__}; use "
                "agent=flow_ppo or agent=rft"
            )
        self.model, self.seed, self.unit = model, seed, value_unit(model)
        self._acting = GaussianActor(model, noise=self.noise)
        latent_dim = next(model.policy.parameters()).shape[1]
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            critic = _Critic(latent_dim, model.spec.action_dim, self.width).to(device)
            actor = ProbabilisticTensorDictSequential(
                TensorDictModule(_Actor(model, self.noise), in_keys=["latent"], out_keys=["loc", "scale"]),
                ProbabilisticTensorDictModule(
                    in_keys=["loc", "scale"], out_keys=["action"], distribution_class=_normal, return_log_prob=True
                ),
            )
            self.loss = SACLoss(
                actor,
                TensorDictModule(critic, in_keys=["latent", "action"], out_keys=["state_action_value"]),
                num_qvalue_nets=2,
                alpha_init=self.alpha,
                target_entropy=-float(model.spec.action_dim) if self.target_entropy is None else self.target_entropy,
                action_spec=None,
            )
        self.loss.make_value_estimator(gamma=model.spec.discount)
        self.targets = SoftUpdate(self.loss, tau=self.tau)
        self.updater = Updater(model, world, self._rates, modules=[self.loss])
        self.replay = TensorDictReplayBuffer(storage=LazyTensorStorage(self.capacity), batch_size=self.batch)

    def learn(self, batch: TensorDict) -> dict[str, float]:
        """One iteration on batch [B, T] of the collector."""
        metrics = batch_metrics(batch)
        finite = finite_rewards(batch)
        if not bool(finite.any()):
            self.updater.skip("every reward")
            return {**metrics, "skipped": float(self.updater.skipped)}
        keys = (*self.model.spec.observation, "task")
        flat = batch.reshape(-1) if bool(finite.all()) else batch[finite]
        kept = flat.select(*keys, "action")
        kept["next"] = flat["next"].select(*keys, "reward", "done", "terminated")
        self.replay.extend(kept.cpu())
        sums = {"loss_policy": 0.0, "loss_critic": 0.0, "loss_world": 0.0}
        updates = self.updates if len(self.replay) >= self.warmup else 0
        for _ in range(updates):
            at = torch.randint(len(self.replay), (self.batch,), generator=self.updater.generator)
            losses = self.loss(self._latents(self.replay[at]))
            total = losses["loss_qvalue"]
            if self.iteration >= self.critic_only:
                total = total + losses["loss_actor"] + losses["loss_alpha"]
            world = self.updater.world_loss()
            if self.updater.step(total + world):
                self.targets.step()
            found = {"loss_policy": losses["loss_actor"], "loss_critic": losses["loss_qvalue"], "loss_world": world}
            for name, value in found.items():
                sums[name] += float(value.detach()) / updates
        alpha = float(self.loss.log_alpha.detach().exp())
        return {**metrics, **sums, "alpha": alpha, "skipped": float(self.updater.skipped)}

    def _latents(self, drawn: TensorDict) -> TensorDict:
        device = next(self.model.parameters()).device
        drawn = drawn.to(device)

        def latent(observation: TensorDict) -> Tensor:
            return self.model.policy_input(encode(self.model, observation))

        after = drawn["next"]
        return TensorDict(
            {
                "latent": latent(drawn),
                "action": drawn["action"],
                "next": {**{key: after[key] for key in ("reward", "done", "terminated")}, "latent": latent(after)},
            },
            batch_size=drawn.batch_size,
        )

    def state_dict(self) -> dict[str, Tensor]:
        found = self.updater.state_dict()
        own = {name: x for name, x in self.loss.state_dict().items() if isinstance(x, Tensor) and x.numel()}
        found |= {f"loss.{name}": tensor for name, tensor in own.items()}
        if len(self.replay):
            stored = self.replay[: len(self.replay)].flatten_keys("/")
            found |= {f"replay.{name}": tensor for name, tensor in stored.items() if name != "index"}
            found["replay_place"] = torch.tensor(self.replay.writer.state_dict()["_cursor"])
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.updater.load_state_dict(state)
        self.loss.load_state_dict(part_of(state, "loss."), strict=False)
        stored = part_of(state, "replay.")
        if stored:
            rows = len(next(iter(stored.values())))
            self.replay.empty()
            self.replay.extend(TensorDict(stored, batch_size=[rows]).unflatten_keys("/"))
            # Where the next transition goes, which a full buffer does not tell; earlier versions did not keep it.
            place = int(state["replay_place"]) if "replay_place" in state else rows % self.capacity
            self.replay.writer.load_state_dict({"_cursor": place})
