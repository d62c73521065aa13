"""Stable-Baselines3's SAC with the same gradient steps in fewer operations.

Letters: N transitions of a batch, A action dims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from stable_baselines3 import SAC
from torch import Tensor
from torch.nn import functional
from torch.optim import Adam, Optimizer


class LeanSAC(SAC):
    """SB3's SAC (Haarnoja et al., 2018, arXiv:1812.05905), whose `train` computes nothing that it throws away.

    What one gradient step does to the weights is what SB3's does, up to rounding, out of the same random numbers.
    Observations are put together once per batch, not for every network; the actor's loss leaves out the gradients of
    the critics' weights, which SB3 sets to zero unread; Adam and the target update are one operation each. Where
    settings ask for what is not written here (gSDE, networks that encode images, batch norms, VecNormalize), SB3's own
    `train` runs.
    """

    actor: Any
    critic: Any
    critic_target: Any
    replay_buffer: Any
    log_ent_coef: Any
    ent_coef_optimizer: Any
    target_entropy: Any

    def __init__(self, policy: Any, env: Any, *, policy_kwargs: dict[str, Any] | None = None, **settings: Any) -> None:
        given = dict(policy_kwargs or {})
        if "optimizer_class" not in given:
            given["optimizer_kwargs"] = {"fused": True, **(given.get("optimizer_kwargs") or {})}
        super().__init__(policy, env, policy_kwargs=given, **settings)

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.ent_coef_optimizer is not None:
            self.ent_coef_optimizer = Adam([self.log_ent_coef], lr=self.lr_schedule(1), fused=True)

    @property
    def lean(self) -> bool:
        """Whether `train` is the one written here."""
        learned = any(True for _ in self.actor.features_extractor.parameters())
        return not (self.use_sde or learned or self.batch_norm_stats or self._vec_normalize_env is not None)

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """See `stable_baselines3.SAC.train`."""
        if not self.lean:
            return super().train(gradient_steps, batch_size)
        self.policy.set_training_mode(True)
        optimisers = [self.actor.optimizer, self.critic.optimizer]
        self._update_learning_rate(optimisers + ([self.ent_coef_optimizer] if self.ent_coef_optimizer else []))
        parts = (self.actor, self.critic, self.critic_target)
        actor, critic, target = (tuple[Tensor, ...](part.parameters()) for part in parts)
        losses_actor, losses_critic, entropies = [], [], []
        for step in range(gradient_steps):
            drawn: Any = self.replay_buffer.sample(batch_size)
            now, then = (self._features(shown) for shown in (drawn.observations, drawn.next_observations))
            action, log_prob = self._draw(now)
            if self.ent_coef_optimizer is not None and self.log_ent_coef is not None:
                alpha = self.log_ent_coef.detach().exp()
                # Of -(log_alpha * (log_prob + target)).mean(), whose second factor is a constant.
                self.log_ent_coef.grad = -(log_prob.detach() + self.target_entropy).mean().reshape(1)
                self.ent_coef_optimizer.step()
            else:
                alpha = self.ent_coef_tensor
            with torch.no_grad():
                action_then, log_prob_then = self._draw(then)
                value_then = self._lowest(self.critic_target, then, action_then) - alpha * log_prob_then
                aim = drawn.rewards + (1 - drawn.dones) * self.gamma * value_then
            values = self._values(self.critic, now, drawn.actions)
            loss_critic = 0.5 * torch.stack([functional.mse_loss(value, aim) for value in values]).sum()
            _minimise(loss_critic, critic, self.critic.optimizer)
            loss_actor = (alpha * log_prob - self._lowest(self.critic, now, action)).mean()
            _minimise(loss_actor, actor, self.actor.optimizer)
            if step % self.target_update_interval == 0:
                with torch.no_grad():
                    torch._foreach_lerp_(target, critic, self.tau)
            losses_actor.append(loss_actor.detach())
            losses_critic.append(loss_critic.detach())
            entropies.append(alpha.reshape(()))
        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, found in (("ent_coef", entropies), ("actor_loss", losses_actor), ("critic_loss", losses_critic)):
            self.logger.record(f"train/{name}", float(torch.stack(found).mean()))

    def _features(self, shown: Any) -> Tensor:
        """What all networks read; without weights in it, it is the same for each of them."""
        return self.actor.extract_features(shown, self.actor.features_extractor)

    def _draw(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [N, A] of the squashed Gaussian and their log-probs [N, 1]."""
        hidden = self.actor.latent_pi(features)
        mean, log_std = self.actor.mu(hidden), self.actor.log_std(hidden).clamp(-20, 2)
        noise = torch.randn_like(mean)
        action = torch.tanh(mean + noise * log_std.exp())
        gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        return action, (gaussian - torch.log(1 - action.square() + 1e-6)).sum(1, keepdim=True)

    def _values(self, critic: Any, features: Tensor, action: Tensor) -> list[Tensor]:
        both = torch.cat([features, action], dim=1)
        return [network(both) for network in critic.q_networks]

    def _lowest(self, critic: Any, features: Tensor, action: Tensor) -> Tensor:
        return torch.cat(self._values(critic, features, action), dim=1).min(dim=1, keepdim=True).values


def _minimise(loss: Tensor, parameters: Sequence[Tensor], optimiser: Optimizer) -> None:
    """One step on the gradients of these parameters alone."""
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimiser.step()
