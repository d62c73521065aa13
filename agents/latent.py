"""Latent actor-critic in pure imagination, after Dreamer (Hafner et al., 2020, arXiv:1912.01603).

From real start frames the policy acts H steps in every member of the model's ensemble; the policy follows the
gradient of the imagined return through the dynamics, the critic regresses that return, and what follows the last step
is valued by a copy of the model as it was at the start of the iteration. Four things keep a gain real:
the horizon is at most the one that the model is meant for, exploration noise has a fixed bound, what the members
disagree about is left out or subtracted, and a KL holds the policy near what it was.

Letters: R start frames, M members, H steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn import functional as F

from wamrl.agents.base import (
    Rates,
    Updater,
    WorldBatch,
    check_horizon,
    encode,
    part_of,
    reference_of,
    require_log_prob,
    require_number,
    value_unit,
)
from wamrl.interfaces import WAM
from wamrl.naming import whole_number
from wamrl.noise import NoiseKey


class Latent:
    """Policy gradients through the model; fulfils `wamrl.agents.base.Learner`, of kind "imagine".

    horizon: H. updates: optimiser steps per iteration. sigma: standard deviation of the exploration noise, in actions.
    risk: standard deviations over members that are subtracted from the return. uncertainty_limit: start frames whose
    futures disagree more than this at any step teach nothing; None keeps all. kl_reference: weight of the KL to the
    policy as it was at the start. critic_weight: of the critic's regression. shuffle_rewards: the null control, which
    gives every start frame's return a random sign (dealing returns out anew would leave their sum, and so its gradient,
    as they are). The others: `wamrl.agents.base.Rates`.
    """

    kind = "imagine"
    name = "latent"
    chunk = 1
    rates = Rates(learning_rate=3e-5, world_learning_rate=1e-5, world_weight=0.1, imitation_weight=0.0)

    def __init__(
        self,
        *,
        horizon: int = 8,
        updates: int = 20,
        minibatch: int = 256,
        sigma: float = 0.1,
        risk: float = 0.5,
        uncertainty_limit: float | None = None,
        kl_reference: float = 0.001,
        critic_weight: float = 1.0,
        shuffle_rewards: bool = False,
        **rates: Any,
    ) -> None:
        for label, value in (("updates", updates), ("minibatch", minibatch)):
            whole_number(label, value, 1)
        require_number("sigma", sigma, above=0.0, most=1.0)
        for label, number in (("risk", risk), ("kl_reference", kl_reference), ("critic_weight", critic_weight)):
            require_number(label, number, least=0.0)
        if uncertainty_limit is not None:
            require_number("uncertainty_limit", uncertainty_limit, least=0.0)
        self.horizon, self.updates, self.minibatch, self.sigma, self.risk = horizon, updates, minibatch, sigma, risk
        self.uncertainty_limit, self.kl_reference, self.critic_weight = uncertainty_limit, kl_reference, critic_weight
        self.shuffle_rewards = shuffle_rewards
        self._rates = replace(self.rates, **rates)

    def bind(self, model: WAM, world: WorldBatch | None, *, rows: int, seed: int) -> None:
        """See `wamrl.agents.base.Learner`. Raises ValueError for a model that lacks a query or a longer horizon."""
        require_log_prob(model, self.name)
        model.spec.require("rollout", "reward", *(() if self.uncertainty_limit is None else ("uncertainty",)))
        check_horizon(model, "agent.horizon", self.horizon, model.spec.chunk_length)
        self.model, self.seed, self.unit = model, seed, value_unit(model)
        self.reference = reference_of(model)
        self.world = reference_of(model)
        self.updater = Updater(model, world, self._rates)
        self.iteration = 0

    @property
    def actor(self) -> Any:
        return None

    def begin(self, iteration: int) -> None:
        self.iteration = iteration
        self.world.load_state_dict(self.model.state_dict())
        self.updater.begin(self.seed, iteration)

    def learn(self, batch: TensorDict) -> dict[str, float]:
        """One iteration on start frames [R]."""
        sums: dict[str, float] = {}
        for number in range(self.updates):
            at = torch.randint(len(batch), (min(self.minibatch, len(batch)),), generator=self.updater.generator)
            with _alone(self.model, self.updater):
                loss, found = self._loss(batch[at.to(batch.device or "cpu")], number)
            world = self.updater.world_loss()
            self.updater.step(loss + world)
            for name, value in {**found, "loss_world": float(world.detach())}.items():
                sums[name] = sums.get(name, 0.0) + value / self.updates
        return {**sums, "skipped": float(self.updater.skipped)}

    def _loss(self, frames: TensorDict, number: int) -> tuple[Tensor, dict[str, float]]:
        model, discount = self.model, self.model.spec.discount
        state = encode(model, frames)
        step = self.iteration * self.updates + number
        key = NoiseKey.for_rows(len(frames), seed=self.seed, step=step, device=frames.device or "cpu")
        noise = self.sigma * key.normal(1, self.horizon, model.spec.action_dim)
        proposal = model.propose(state, 1, mode="ode", perturbation=noise)
        imagined = proposal.imagined
        if imagined is None:
            imagined = self.world.imagine(state, proposal.actions, noise=key.fold(0))
        assert imagined.reward is not None
        gained = imagined.reward[:, 0]
        if imagined.success is not None:
            gained = gained + model.spec.success_bonus * imagined.success[:, 0]
        weight = discount ** torch.arange(self.horizon, device=gained.device)
        # The frozen copy's: weights of the present critic would follow this gradient, and promise ever more.
        leaf = self.world.value(imagined.leaf[:, 0]).mean(-1)
        returns = ((gained * weight).sum(-1) + discount**self.horizon * leaf) / self.unit  # [R, M]
        objective = returns.mean(1)
        if self.risk and returns.shape[1] > 1:  # of one member the deviation is 0, and its gradient NaN
            objective = objective - self.risk * returns.std(1, correction=0)
        if self.shuffle_rewards:
            sign = torch.randint(2, (len(objective),), generator=self.updater.generator) * 2.0 - 1.0
            objective = objective * sign.to(objective)
        trusted = torch.ones_like(objective)
        if self.uncertainty_limit is not None:
            assert imagined.uncertainty is not None
            trusted = (imagined.uncertainty[:, 0].amax((1, 2)) <= self.uncertainty_limit).float()
        count = trusted.sum().clamp(min=1.0)
        policy = -(objective * trusted).sum() / count
        # The KL of what is done, the mean plus a noise of fixed spread, up to a constant that makes it 0 at the start.
        # Its gradient goes through the actions, as the return's does: the policy's own spread is not used here.
        with torch.no_grad():
            own = model.log_prob(state, proposal)
        kl = (own - self.reference.log_prob(state, proposal)).sum(-1).mean() / self.horizon
        value = model.value(state).mean(-1) / self.unit
        critic = (F.smooth_l1_loss(value, returns.mean(1).detach(), reduction="none") * trusted).sum() / count
        found = {"loss_policy": policy, "loss_critic": critic, "kl": kl, "trusted": trusted.mean()}
        total = policy + self.kl_reference * kl + self.critic_weight * critic
        return total, {name: float(value.detach()) for name, value in found.items()}

    def state_dict(self) -> dict[str, Tensor]:
        found = self.updater.state_dict()
        return found | {f"reference.{name}": tensor for name, tensor in self.reference.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.updater.load_state_dict(state)
        self.reference.load_state_dict(part_of(state, "reference."))


@contextlib.contextmanager
def _alone(model: WAM, updater: Updater) -> Iterator[None]:
    """Gradients reach the policy and the critic, and not the world that they are imagined in."""
    held = {id(parameter) for parameter in updater.policy}
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in held]
    for parameter in rest:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in rest:
            parameter.requires_grad_(True)
