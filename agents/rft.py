"""Reinforced fine-tuning: imitate what worked, or what a planner would have done.

Without a planner, the trajectories of the policy's own samples are kept and imitated up to their first success (in
imagination as in Ctrl-World, arXiv:2510.10125). With a planner that teaches, every visited state is planned from and
the policy is taught the plan: the planner's chosen chunk, its weighted mean (MPPI weights as targets), or, with a
best-of-N planner, the best of its samples. Where a planner acts, it collects in place of the policy and its successes
are imitated, while the world model learns from all that it did (expert iteration, Anthony et al., 2017,
arXiv:1705.08439); in the rows that are left to the policy the planner teaches (as in DAgger, Ross et al., 2011,
arXiv:1011.0686). All use the policy's part of the model's own `WAM.loss` on windows whose labels are those actions, so
any policy that learns by imitation will do, flow matching included. A policy that reads more than a window's first
frame is shown the frames that followed; a plan, which was not executed, has none.

Letters: B rows, T decisions of a batch, K kept frames, W windows of L control steps, H actions of a plan, N candidates,
A action dims.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from wamrl.agents.base import (
    CollectingLearner,
    Rates,
    Updater,
    WorldBatch,
    batch_metrics,
    check_horizon,
    encode,
    finite_rewards,
    loss_weights,
    noise_bounds,
    part_of,
    require_number,
    shuffled_rewards,
)
from wamrl.agents.flow_ppo import ChainActor
from wamrl.agents.ppo import GaussianActor
from wamrl.interfaces import WAM, Budget, Plan, Planner
from wamrl.naming import whole_number
from wamrl.noise import NoiseKey

TARGETS = ("plan", "mean")
_LEAST_RATE = 0.02  # of the learning rates, that an annealed iteration ends with
_ROWS = 16  # states per plan: more candidates at once leave the caches of a CPU


class Explorer(GaussianActor):
    """A Gaussian policy in most rows, and in a `share` of them, drawn anew for every iteration, the behaviour prior.

    The prior imitates what every successful episode of the data did, recoveries included, and so frees a policy that
    was taught by few demonstrations from where it sits still. Both get the policy's noise.
    """

    def __init__(self, model: WAM, *, noise: tuple[float, float], share: float) -> None:
        super().__init__(model, noise=noise)
        self.out_keys = ["action"]
        self.share = share
        self.prior: Tensor | None = None

    def begin(self, seed: int, iteration: int) -> None:
        """See `GaussianActor`."""
        super().begin(seed, iteration)
        self.prior = None

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Sample an action for observations [B]."""
        rows = len(tensordict)
        if self.prior is None:
            self.prior = self._key(rows, tensordict.device).uniform(1) < self.share  # [B, 1]
        with torch.no_grad():
            state = encode(self.model, tensordict)
            mean, log_std = cast(Any, self.model).gaussian(state)
            if self.share:
                prior = self.model.propose(state, 1, mode="ode", horizon=1, behaviour=1).actions[:, 0, 0]
                mean = torch.where(self.prior, prior, mean)
            noise = self._key(rows, tensordict.device).normal(mean.shape[-1])
            tensordict["action"] = (mean + log_std.exp().clamp(*self.noise) * noise).clamp(-1.0, 1.0)
        return tensordict


class Planning(Explorer):
    """The policy with its noise, and in a share of the rows a planner in the model, which plans in every control step.

    planned: [B] where the planner acts, drawn anew for every iteration.
    """

    def __init__(self, model: WAM, planner: Planner, *, noise: tuple[float, float], planner_acts: float) -> None:
        super().__init__(model, noise=noise, share=0.0)
        self.planner, self.planner_acts = planner, planner_acts
        self.planned: Tensor | None = None

    def begin(self, seed: int, iteration: int) -> None:
        """See `GaussianActor`."""
        super().begin(seed, iteration)
        self.planned = None

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Choose an action for observations [B]."""
        rows = len(tensordict)
        if self.planned is None:
            rank = self._key(rows, tensordict.device).uniform(1)[:, 0].argsort().argsort()
            self.planned = rank < round(self.planner_acts * rows)
        super().forward(tensordict)
        action = tensordict["action"].clone()
        for part in self.planned.nonzero()[:, 0].split(_ROWS):
            if len(part):
                plan = _plan(self.model, self.planner, tensordict[part], part, self.tick, self.seed)
                action[part] = torch.where(plan.searched[:, None], plan.actions[:, 0], action[part])
        tensordict["action"] = action
        return tensordict


@torch.no_grad()
def _plan(model: WAM, planner: Planner, observation: TensorDictBase, row: Tensor, step: int, seed: int) -> Plan:
    """A plan from observations [R], without memory of an earlier one."""
    key = NoiseKey(row=row, step=torch.full_like(row, step), seed=seed)
    state = encode(model, observation)
    return planner.plan(model, state, planner.initial_state(model, len(row)), key, Budget())[0]


class RFT(CollectingLearner):
    """Imitation of successes or of a planner; fulfils `wamrl.agents.base.Learner`.

    planner: None imitates the policy's successes; otherwise what teaches. planner_acts: the share of the rows in which
    the planner collects, and its successes are imitated. target: of teaching, "plan" is the chosen chunk, "mean" the
    candidates' mean by the planner's weights. noise: least and greatest standard deviation of an action while a
    Gaussian policy collects. behaviour_share: of the rows that collect by the behaviour prior instead, see `Explorer`.
    buffer: windows that are kept on the CPU, the newest. batch: windows per step. updates: steps per iteration. length:
    L; None is 1 for a policy that decides in every control step, otherwise the model's chunk. max_plans: states per
    iteration that the planner is asked to teach. anneal: whether the learning rates fall along half a cosine in every
    iteration, which then ends with settled weights. shuffle_rewards: the null control, which deals out at random which
    trajectories worked. The others: `wamrl.agents.base.Rates`.
    """

    name = "rft"
    chunk = 1
    rates = Rates(learning_rate=1e-4, world_learning_rate=1e-5, world_weight=0.1, imitation_weight=1.0)

    def __init__(
        self,
        *,
        planner: Planner | None = None,
        planner_acts: float = 0.0,
        target: str = "plan",
        noise: tuple[float, float] = (0.05, 0.5),
        behaviour_share: float = 0.0,
        buffer: int = 50_000,
        batch: int = 256,
        updates: int = 40,
        length: int | None = None,
        max_plans: int = 1024,
        anneal: bool = False,
        shuffle_rewards: bool = False,
        **rates: Any,
    ) -> None:
        if target not in TARGETS:
            raise ValueError(f"target is '{target}', but must be one of {', '.join(TARGETS)}")
        for label, share in (("planner_acts", planner_acts), ("behaviour_share", behaviour_share)):
            require_number(label, share, least=0.0, most=1.0)
        for label, value in (("buffer", buffer), ("batch", batch), ("updates", updates), ("max_plans", max_plans)):
            whole_number(label, value, 1)
        if length is not None:
            whole_number("length", length, 1)
        if planner_acts and planner is None:
            raise ValueError(
                f"planner_acts={planner_acts}, but there is no planner; choose one, as agent=expert_iteration does"
            )
        if planner is not None and shuffle_rewards or planner_acts and behaviour_share:
            raise ValueError(
                "shuffle_rewards has no meaning where a planner teaches, behaviour_share none where it acts: the null "
                "control is agent.planner.shuffle_scores=true, the prior's part agent.planner.proposer.behaviour_share"
            )
        self.planner, self.planner_acts, self.target = planner, planner_acts, target
        self.refreshes, self.anneal = planner_acts > 0.0, anneal
        self.noise, self.behaviour_share = noise_bounds(noise), behaviour_share
        self.capacity, self.batch, self.updates, self.length, self.max_plans = buffer, batch, updates, length, max_plans
        self.shuffle_rewards = shuffle_rewards
        self._rates = replace(self.rates, **rates)

    def bind(self, model: WAM, world: WorldBatch | None, *, rows: int, seed: int) -> None:
        """See `wamrl.agents.base.Learner`.

        Raises:
            ValueError: a model whose policy cannot be sampled or taught, or that does not answer what the planner asks.
        """
        model.spec.require("policy")
        if not getattr(model, "policy_denoises_actions_alone", True):
            raise ValueError(
                "this policy denoises its action together with a future, so that it cannot sample actions to collect "
                "by (mode='sde'); use a model that acts apart from its future: wam=reference, fast, idm, no_cotrain or "
                "mot_uwm"
            )
        self.model, self.seed = model, seed
        gaussian = hasattr(model, "gaussian")
        if self.length is None:
            self.length = 1 if gaussian else model.spec.chunk_length
        chunk = model.spec.chunk_length
        check_horizon(model, "agent.length", self.length, model.spec.max_horizon if gaussian else chunk)
        if not gaussian and self.length < chunk:
            raise ValueError(
                f"agent.length is {self.length}, but this policy learns by whole chunks of {chunk} actions; leave it "
                "null"
            )
        if self.behaviour_share:
            model.spec.require("behaviour")
        if self.planner is not None:
            self.planner.initial_state(model, 1)  # refuses a model that does not answer what the planner asks
        self._acting: Any
        if self.planner_acts:
            assert self.planner is not None
            if not gaussian:
                raise ValueError(
                    "agent=expert_iteration shares its rows between a planner and a Gaussian policy, which this model "
                    "does not have; use wam=reference, or agent=distil"
                )
            self._acting = Planning(model, self.planner, noise=self.noise, planner_acts=self.planner_acts)
        elif gaussian:
            self._acting = Explorer(model, noise=self.noise, share=self.behaviour_share)
        else:
            self._acting = ChainActor(model, chunk=1, horizon=1)
        self.followed = self._needs_later_frames(model)
        if self.planner is not None:
            _require_whole_labels(getattr(self.planner, "horizon", self.length), self.length)
        self.updater = Updater(model, world, self._rates, keep_values=True)
        self.kept: TensorDict | None = None

    def _needs_later_frames(self, model: WAM) -> bool:
        """Whether the policy's loss reads later frames than a window's first; ValueError where they are not known."""
        gaussian = hasattr(model, "gaussian")
        direct = hasattr(model, "imitation") and self.length == 1
        if not direct and "policy" not in getattr(model, "loss_weights", {}):
            raise ValueError(
                f"agent=rft trains the policy's part of WAM.loss alone, but {type(model).__name__} does not name it: "
                "give it loss_weights with an entry 'policy'"
            )
        followed = self.length != 1 if gaussian else not getattr(model, "policy_sees_present_alone", False)
        if followed and self.planner is not None:
            mend = "agent.length=1" if gaussian else "agent.planner=null, or a model such as wam=mot_uwm"
            raise ValueError(
                "this policy learns from the frames that follow the present one, and a plan, which was not executed, "
                f"has none; use {mend}"
            )
        return followed

    def learn(self, batch: TensorDict) -> dict[str, float]:
        """One iteration on batch [B, T] of the collector."""
        metrics = batch_metrics(batch)
        generator = self.updater.generator
        finite = finite_rewards(batch)
        if not bool(finite.any()):
            self.updater.skip("every reward")
            return {**metrics, "skipped": float(self.updater.skipped)}
        if self.shuffle_rewards:
            batch = shuffled_rewards(batch, generator)
        if self.planner is None:
            found = self._successes(batch)
        elif self.planner_acts:
            acted = self._acting.planned
            taught = finite & ~acted[:, None]
            parts = [self._successes(batch[acted]) if acted.any() else None,
                     self._planned(batch[taught]) if taught.any() else None]  # fmt: skip
            known = [part for part in parts if part is not None]
            found = torch.cat(known) if known else None
        else:
            found = self._planned(batch[finite])
        if found is not None:
            both = found if self.kept is None else torch.cat([self.kept, found])
            self.kept = both[int(_starts(both)[-self.capacity :][0]) :]
        starts = torch.zeros(0) if self.kept is None else _starts(self.kept)
        metrics["kept"] = float(len(starts))
        total = total_world = 0.0
        steps = self.updates if len(starts) else 0
        for number in range(steps):
            assert self.kept is not None
            if self.anneal:
                self.updater.scale(_LEAST_RATE + (1.0 - _LEAST_RATE) * 0.5 * (1.0 + math.cos(math.pi * number / steps)))
            at = starts[torch.randint(len(starts), (self._batch_size(),), generator=generator)]
            loss = self._imitation(self.kept, at, self.updater.noise)
            world = self.updater.world_loss()
            self.updater.step(loss + world)
            total, total_world = total + float(loss.detach()), total_world + float(world.detach())
        return {**metrics, "loss_policy": total / max(1, steps), "loss_world": total_world / max(1, steps),
                "skipped": float(self.updater.skipped)}  # fmt: skip

    def _imitation(self, kept: TensorDict, at: Tensor, generator: torch.Generator) -> Tensor:
        """Loss of the policy on the windows of what is taught, `kept` [K], that begin `at` [W]."""
        own = getattr(self.model, "imitation", None)
        if own is not None and self.length == 1:  # that part of `WAM.loss` alone; it moves no encoder
            device = self.updater.device
            shown, label = kept["observation"][at].to(device), kept["label"][at, 0].to(device)
            return own(encode(self.model, shown), label).mean()
        # What is imagined or repeated teaches nothing but the policy.
        alone = {name: float(name == "policy") for name in cast(Any, self.model).loss_weights}
        with loss_weights(self.model, **alone):
            return self.model.loss(self._windows(kept, at), noise=generator)["loss"]

    def _batch_size(self) -> int:
        members = max(1, self.model.spec.ensemble_size)  # WAM.loss shares windows among the members
        return max(1, self.batch // members) * members

    # -- what is taught

    def _successes(self, batch: TensorDict) -> TensorDict | None:
        """The trajectories in batch [B, T] up to their first success, by their steps [K]; see `_steps`.

        Those with a reward that is not finite are left out.
        """
        assert self.length is not None
        done, success = (batch["next", key][..., 0].tolist() for key in ("done", "success"))
        finite = finite_rewards(batch).cpu()

        def until(stop: list[list[bool]]) -> list[tuple[int, int, int]]:
            return [
                (row, first, last) for row, first, last in _until(stop, done) if finite[row, first : last + 1].all()
            ]

        chosen = until(success)
        if self.shuffle_rewards:
            # As many trajectories, no longer than those that worked, but any: what the batch cuts off as well.
            every = until([[*over[:-1], True] for over in done])
            order = torch.randperm(len(every), generator=self.updater.generator)[: len(chosen)].tolist()
            chosen = [
                (row, first, min(last, first + end - begin))
                for (row, first, last), (_, begin, end) in zip((every[n] for n in order), chosen, strict=False)
            ]
        parts = [_steps(batch[row, first : last + 1], self.length, self.followed) for row, first, last in chosen]
        return torch.cat(parts).cpu() if parts else None

    def _planned(self, flat: TensorDict) -> TensorDict | None:
        """States [K], at most `max_plans` of those in decisions [F], with the planner's chunk as the label.

        Those where no search was made, such as its gate held closed, are left out: the planner knows no better there.
        """
        assert self.planner is not None and self.length is not None
        if len(flat) > self.max_plans:
            flat = flat[torch.randperm(len(flat), generator=self.updater.generator)[: self.max_plans]]
        chunks, searched = [], []
        for first in range(0, len(flat), _ROWS):
            part = flat[first : first + _ROWS]
            row = torch.arange(first, first + len(part), device=part.device)
            plan = _plan(self.model, self.planner, part, row, self.iteration, self.seed)
            chunks.append(self._taught(plan))
            searched.append(plan.searched)
        found = torch.cat(searched)
        if not bool(found.any()):
            return None
        flat, label = flat[found].cpu(), torch.cat(chunks)[found, : self.length].cpu()
        _require_whole_labels(label.shape[1], self.length)
        keys = (*self.model.spec.observation, "task")
        return TensorDict(
            {"observation": flat.select(*keys), "label": label, "valid": torch.ones(label.shape[:2], dtype=torch.bool)},
            batch_size=[len(flat)],
        )

    def _taught(self, plan: Plan) -> Tensor:
        if self.target == "plan":
            return plan.actions
        return torch.einsum("bn,bnha->bha", plan.weights.to(plan.candidates.dtype), plan.candidates).clamp(-1.0, 1.0)

    def _windows(self, kept: TensorDict, at: Tensor) -> TensorDict:
        """Those that begin `at` [W], in the batch contract of `WAM.loss`, labelled with what is taught."""
        label, valid = kept["label"][at], kept["valid"][at]
        rows, length, _ = label.shape
        # Where the policy reads no later frame, the first one stands in for them: all other parts have the weight 0.
        last = valid.sum(1, keepdim=True) if self.followed else torch.zeros(rows, 1, dtype=torch.int64)
        frame = at[:, None] + torch.minimum(torch.arange(length + 1), last)
        observation = cast(TensorDict, kept["observation"])
        frames = {key: value[frame] for key, value in observation.items() if key != "task"}
        no, zero = torch.zeros(rows, length, dtype=torch.bool), torch.zeros(rows, length)
        return TensorDict(
            {
                "observation": TensorDict(frames, batch_size=[rows, length + 1]),
                "action": label,
                "label": label,
                "label_valid": valid,
                "reward": zero,
                "success": no,
                "terminated": no,
                "valid": valid,
                "steps_to_success": torch.full((rows, length + 1), torch.inf),
                "task": observation["task"][at],
                "episode_success": no[:, 0],
                "step": torch.zeros(rows, dtype=torch.int64),
                "imitate": no[:, 0],
            },
            batch_size=[rows],
        ).to(self.updater.device)

    def state_dict(self) -> dict[str, Tensor]:
        found = self.updater.state_dict()
        if self.kept is not None:
            flat = self.kept.flatten_keys(".")
            found |= {f"kept.{name}": tensor for name, tensor in flat.items()}
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.updater.load_state_dict(state)
        kept = part_of(state, "kept.")
        if kept:
            self.kept = TensorDict(kept, batch_size=[len(kept["label"])]).unflatten_keys(".")


def _require_whole_labels(planned: int, length: int) -> None:
    if planned < length:
        raise ValueError(
            f"the planner plans {planned} control steps, but the policy is taught chunks of {length}; raise "
            "agent.planner.horizon (agent.planner.chunk of mcts, agent.planner.start.horizon of gradient)"
        )


def _until(stop: list[list[bool]], done: list[list[bool]]) -> list[tuple[int, int, int]]:
    """Row, first and last step of every episode in [B, T] in which `stop` holds, up to where it first does."""
    found = []
    for row, flags in enumerate(zip(stop, done, strict=True)):
        first, stopped = 0, False
        for step, (here, over) in enumerate(zip(*flags, strict=True)):
            if here and not stopped:
                found.append((row, first, step))
                stopped = True
            if over:
                first, stopped = step + 1, False
    return found


def _steps(trajectory: TensorDict, length: int, followed: bool) -> TensorDict:
    """Every step of a trajectory [T] as an observation with the `length` actions executed from it on: [T].

    followed: then its last frame, from which no action is valid: [T+1]. What actions led to are the rows after theirs,
    so that a frame, which may be an image, is kept once and not in every window that reads it.
    """
    steps = len(trajectory)
    keys = [key for key in trajectory.keys() if key not in _NOT_OBSERVED]
    observation = trajectory.select(*keys)
    if followed:
        observation = torch.cat([observation, trajectory["next"][-1:].select(*keys)])
    at = torch.arange(len(observation))[:, None] + torch.arange(length)
    label = trajectory["action"][at.clamp(max=steps - 1)]
    valid = (at < steps).to(label.device)
    return TensorDict({"observation": observation, "label": label, "valid": valid}, batch_size=[len(at)])


def _starts(kept: TensorDict) -> Tensor:
    """[W] rows of `kept` [K] at which a window begins: all from which an action was taken."""
    return kept["valid"][:, 0].nonzero()[:, 0]


_NOT_OBSERVED = ("next", "collector", "action", "chain", "action_log_prob", "done", "terminated", "truncated",
                 "success", "executed", "task_reward", "reward", "simulator_error")  # fmt: skip
