"""Proximal policy optimisation (Schulman et al., 2017, arXiv:1707.06347) of a WAM's Gaussian policy, critic included.

TorchRL's `GAE` and `ClipPPOLoss` do the work; the critic is the model's own value heads, so that it starts from what
the world model's training taught. The same code runs in a simulator and in imagination: that is the environment's
business. `wamrl.agents.flow_ppo` is the same with the chain of a flow-matching policy in place of the Gaussian.

Letters: B rows, T decisions of a batch, F = B * T, A action dims, K denoising steps (1 here).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

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
    reference_of,
    require_log_prob,
    require_number,
    shuffled_rewards,
    value_unit,
)
from wamrl.interfaces import WAM, State
from wamrl.naming import whole_number
from wamrl.noise import NoiseKey

_TICKS = 1 << 20  # decisions of one iteration, at most
_KEEP = 4096  # numbers of a state up to which those of a batch are kept for all of its epochs


class GaussianActor(TensorDictModuleBase):
    """The model's Gaussian policy as a TensorDict module: writes `chain` (unclamped), `action` and its log-prob.

    noise: least and greatest standard deviation of an action; those of the model are kept inside.
    """

    def __init__(self, model: WAM, *, noise: tuple[float, float], gradient: bool = False) -> None:
        super().__init__()
        self.in_keys = [*model.spec.observation, "task"]
        self.out_keys = ["action", "chain", "action_log_prob"]
        self.model, self.noise, self.gradient = model, noise, gradient
        self.seed, self.tick = 0, 0

    def begin(self, seed: int, iteration: int) -> None:
        """Noise of an iteration: of the row, the decision and `seed` alone."""
        self.seed, self.tick = seed, iteration * _TICKS

    def _key(self, rows: int, device: torch.device | None) -> NoiseKey:
        key = NoiseKey.for_rows(rows, seed=self.seed, step=self.tick, device=device or "cpu")
        self.tick += 1
        return key

    def get_dist(self, tensordict: TensorDictBase, model: WAM | None = None) -> Distribution:
        """The distribution of `chain` [F, A] at these observations [F]; of another `model` than the actor's own."""
        model = model or self.model
        mean, log_std = cast(Any, model).gaussian(state_of(model, tensordict, gradient=self.gradient))
        return Independent(Normal(mean, log_std.exp().clamp(*self.noise), validate_args=False), 1, validate_args=False)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Sample an action for observations [B]."""
        dist = self.get_dist(tensordict)
        key = self._key(len(tensordict), tensordict.device)
        chain = dist.mean + dist.stddev * key.normal(dist.mean.shape[-1])
        tensordict["chain"] = chain.detach()
        tensordict["action"] = chain.detach().clamp(-1.0, 1.0)
        tensordict["action_log_prob"] = dist.log_prob(chain).detach()
        return tensordict


class Critic(TensorDictModuleBase):
    """The mean of the model's value heads at observations [F], in their unit, as `state_value` [F, 1]."""

    def __init__(self, model: WAM, *, gradient: bool) -> None:
        super().__init__()
        self.in_keys = [*model.spec.observation, "task"]
        self.out_keys = ["state_value"]
        self.model, self.gradient, self.unit = model, gradient, value_unit(model)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add `state_value`."""
        state = state_of(self.model, tensordict, gradient=self.gradient)
        tensordict["state_value"] = self.model.value(state).mean(-1, keepdim=True) / self.unit
        return tensordict


def state_of(model: WAM, tensordict: TensorDictBase, *, gradient: bool) -> State:
    """The state kept in the TensorDict, or that of its observations."""
    kept = tensordict.get("state_kept", None)
    return encode(model, tensordict, gradient=gradient) if kept is None else kept


class _ClipLoss(ClipPPOLoss):
    """Keeps the log of the ratio of the last call, for its KL estimates."""

    @property
    def log_weight(self) -> Tensor:
        """[F, K, 1] logarithm of the present policy's density over that which collected."""
        return self.__dict__["_kept"]

    def _log_weight(self, tensordict: TensorDictBase, adv_shape: torch.Size) -> Any:
        found = super()._log_weight(tensordict, adv_shape)
        self.__dict__["_kept"] = found[0]  # the usual way walks through all modules and parameters, at every step
        return found


class PPO(CollectingLearner):
    """PPO on a model that answers "policy", "log_prob" and "value"; fulfils `wamrl.agents.base.Learner`.

    epochs, minibatch: passes over a batch, and decisions per optimiser step. gae_lambda: of the advantages.
    clip: of the ratio. kl_limit: mean KL to the policy that collected the batch, beyond which the epochs of that batch
    end; where that happens within the first epoch, the learning rate is halved from then on, because single steps
    overshoot. entropy: weight of the bonus. kl_reference: weight of the KL to the policy as it was at the start.
    noise: least and greatest standard deviation of an action, also while collecting. critic_warmup: iterations that
    train the critic alone. train_encoder: whether the policy's and the critic's gradients reach the model's encoder;
    otherwise the world model's loss alone moves it. shuffle_rewards: the null control, which deals out
    anew the rewards and then the advantages. The others: `Rates`.
    """

    name = "ppo"
    rates = Rates(learning_rate=3e-4, world_learning_rate=3e-5, world_weight=0.1, imitation_weight=0.0)

    def __init__(
        self,
        *,
        chunk: int = 1,
        epochs: int = 8,
        minibatch: int = 256,
        gae_lambda: float = 0.95,
        clip: float = 0.2,
        kl_limit: float = 0.03,
        entropy: float = 0.0,
        critic_weight: float = 1.0,
        critic_warmup: int = 1,
        kl_reference: float = 0.0,
        noise: tuple[float, float] = (0.05, 0.5),
        train_encoder: bool = False,
        shuffle_rewards: bool = False,
        **rates: Any,
    ) -> None:
        for label, value in (("chunk", chunk), ("epochs", epochs), ("minibatch", minibatch)):
            whole_number(label, value, 1)
        whole_number("critic_warmup", critic_warmup, 0)
        require_number("gae_lambda", gae_lambda, least=0.0, most=1.0)
        for label, number in (("clip", clip), ("kl_limit", kl_limit)):
            require_number(label, number, above=0.0)
        for label, number in (("entropy", entropy), ("critic_weight", critic_weight), ("kl_reference", kl_reference)):
            require_number(label, number, least=0.0)
        self.chunk, self.epochs, self.minibatch = chunk, epochs, minibatch
        self.gae_lambda, self.clip, self.kl_limit, self.entropy = gae_lambda, clip, kl_limit, entropy
        self.critic_weight, self.critic_warmup, self.kl_reference = critic_weight, critic_warmup, kl_reference
        self.noise = noise_bounds(noise)
        self.train_encoder, self.shuffle_rewards = train_encoder, shuffle_rewards
        self._rates = replace(self.rates, **rates)

    # -- what flow_ppo does otherwise

    def _actor(self, model: WAM) -> Any:
        if self.chunk != 1:
            raise ValueError(f"agent=ppo decides in every control step, but chunk is {self.chunk}; use agent=flow_ppo")
        if not hasattr(model, "gaussian"):
            raise ValueError(
                f"agent=ppo needs a Gaussian policy (`gaussian(state)`), which this model "
                f"({model.spec.anatomy.backbone}) has not; use agent=flow_ppo, which replays any policy's log-probs"
            )
        return GaussianActor(model, noise=self.noise, gradient=self.train_encoder)

    # -- Learner

    def bind(self, model: WAM, world: WorldBatch | None, *, rows: int, seed: int) -> None:
        """See `wamrl.agents.base.Learner`. Raises ValueError for a model without log-probs or a critic."""
        require_log_prob(model, self.name)
        self.model, self.seed = model, seed
        self._acting = self._actor(model)
        self.critic = Critic(model, gradient=self.train_encoder)
        self.gae = GAE(
            gamma=model.spec.discount**self.chunk,
            lmbda=self.gae_lambda,
            value_network=None,  # its vmap cannot go through a model's encoder; `learn` sets the values
            average_gae=False,
        )
        self.loss = _ClipLoss(
            self._acting,
            self.critic,
            clip_epsilon=self.clip,
            entropy_bonus=self.entropy > 0,
            entropy_coeff=self.entropy,
            critic_coeff=self.critic_weight,
            functional=False,
            log_explained_variance=False,
        )
        self.loss.set_keys(action="chain", sample_log_prob="action_log_prob")
        self.updater = Updater(model, world, self._rates, train_all=self.train_encoder)
        self.reference = reference_of(model) if self.kl_reference else None

    def learn(self, batch: TensorDict) -> dict[str, float]:
        """One iteration on batch [B, T] of the collector."""
        metrics = batch_metrics(batch)
        whole = finite_rewards(batch).all(1)
        if not bool(whole.all()):
            batch = batch[whole]  # an advantage reads all the rewards that follow it
        if not len(batch):
            self.updater.skip("a reward of every row")
            return {**metrics, "skipped": float(self.updater.skipped)}
        if self.shuffle_rewards:
            batch = shuffled_rewards(batch, self.updater.generator)
        kept = self._values(batch)
        if not bool(torch.isfinite(batch["advantage"]).all()):
            self.updater.skip("an advantage")
            return {**metrics, "skipped": float(self.updater.skipped)}
        flat = batch.reshape(-1).exclude("next", "collector")
        advantage = flat["advantage"]
        flat["advantage"] = (advantage - advantage.mean()) / advantage.std().clamp(min=1e-6)
        if self.shuffle_rewards:
            # A critic that knows the task, and where episodes end, would still tell which actions were good.
            order = torch.randperm(len(flat), generator=self.updater.generator)
            flat["advantage"] = flat["advantage"][order.to(flat["advantage"].device)]
        if self.reference is not None:
            with torch.no_grad():
                flat["reference_log_prob"] = self._acting.get_dist(flat, self.reference).log_prob(flat["chain"])
        if kept is not None:
            flat = flat.exclude(*self.model.spec.observation, "task").set("state_kept", kept)
        flat = flat.exclude(
            "action", "state_value", "done", "terminated", "truncated", "success", "executed", "task_reward"
        )
        metrics |= self._epochs(flat)
        error = batch["value_target"] - batch["state_value"]
        explained = 1.0 - float(error.var() / batch["value_target"].var().clamp(min=1e-12))
        return {**metrics, "value_explained": explained, "skipped": float(self.updater.skipped)}

    @torch.no_grad()
    def _values(self, batch: TensorDict) -> State | None:
        """Values and advantages of batch [B, T]; its states [F] where they are small and stay what they are."""
        keys = (*self.model.spec.observation, "task")

        def value_of(observation: TensorDict) -> tuple[Tensor, State]:
            state = encode(self.model, observation)
            found = self.critic(TensorDict({"state_kept": state}, batch_size=observation.batch_size))
            return found["state_value"], state

        value, states = value_of(batch.select(*keys).reshape(-1))
        batch["state_value"] = value = value.view(*batch.batch_size, 1)
        # What a step led to is what the next one began with, except where an episode or the batch ended.
        after, ends = batch["next"], batch["next", "done"][..., 0].clone()
        ends[:, -1] = True
        ahead = value.roll(-1, dims=1)
        ahead[ends] = value_of(after.select(*keys)[ends])[0]
        # The advantages fade it by a whole decision; one that was cut short lies fewer control steps away.
        short = (self.chunk - after["executed"]) * ~after["terminated"]
        after["state_value"] = ahead * self.model.spec.discount ** -short.to(ahead.dtype)
        self.gae(batch)
        size = sum(x[0].numel() for x in states.values(include_nested=True, leaves_only=True))
        return None if self.train_encoder or size > _KEEP else states

    def _epochs(self, flat: TensorDict) -> dict[str, float]:
        sums: dict[str, float] = {}
        steps, kl, stopped = 0, 0.0, 0.0
        warm = self.iteration >= self.critic_warmup
        for _ in range(self.epochs):
            order = torch.randperm(len(flat), generator=self.updater.generator)
            for chosen in flat[order].split(min(self.minibatch, len(flat)))[: max(1, len(flat) // self.minibatch)]:
                losses = self.loss(chosen)
                log_ratio = self.loss.log_weight.detach()
                # k3 of Schulman (2020), "Approximating KL divergence": never negative, of low variance.
                kl = float((log_ratio.exp() - 1.0 - log_ratio).flatten(1).sum(1).mean())
                if kl > self.kl_limit:
                    stopped = 1.0
                    break
                total = losses["loss_critic"]
                if warm:
                    total = total + losses["loss_objective"]
                    if self.entropy:
                        total = total + losses["loss_entropy"]
                    if self.reference is not None:
                        total = total + self.kl_reference * self._kl_reference(chosen)
                world = self.updater.world_loss()
                self.updater.step(total + world)
                steps += 1
                found = {"loss_policy": losses["loss_objective"], "loss_critic": losses["loss_critic"],
                         "clip_fraction": losses["clip_fraction"], "loss_world": world}  # fmt: skip
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + float(value.detach())
            if stopped:
                break
        if stopped and steps < len(flat) // self.minibatch:
            self.updater.slow_down()
        return {**{name: total / max(1, steps) for name, total in sums.items()},
                "kl": kl, "kl_stopped": stopped, "updates": float(steps),
                "learning_rate": self.updater.learning_rate}  # fmt: skip

    def _kl_reference(self, chosen: TensorDict) -> Tensor:
        """Half of the squared log-ratio: the k2 estimate, whose gradient is that of the KL to the reference."""
        now = self.loss.log_weight[..., 0] + chosen["action_log_prob"]
        gap = (now - chosen["reference_log_prob"]).reshape(len(chosen), -1).sum(1)
        return 0.5 * gap.square().mean()

    def state_dict(self) -> dict[str, Tensor]:
        found = self.updater.state_dict()
        if self.reference is not None:
            weights = self.reference.state_dict()
            found |= {f"reference.{name}": tensor for name, tensor in weights.items()}
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.updater.load_state_dict(state)
        if self.reference is not None:
            self.reference.load_state_dict(part_of(state, "reference."))
