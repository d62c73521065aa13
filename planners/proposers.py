"""Where candidates come from: around the policy, around the previous plan, or the policy's own samples.

Shapes: R rows, N candidates, M sampled futures, H steps, A action dims. Actions are normalised to [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from wamrl.interfaces import WAM, Imagined, PlanState, Proposal, Proposer, Spec, State, TreeProposer
from wamrl.naming import is_number
from wamrl.noise import NoiseKey


def noise_basis(horizon: int, correlation: float = 0.0) -> Tensor:
    """[H, H] matrix that colours white noise over time: row h gives step h; every step has unit variance.

    correlation is that of two neighbouring steps, in [0, 1): a stationary AR(1) process,
    x_0 = e_0 and x_h = c x_(h-1) + sqrt(1 - c^2) e_h; 0 leaves the noise white.
    """
    if not is_number(correlation) or not 0.0 <= correlation < 1.0:
        raise ValueError(f"planner.correlation is {correlation!r}, but must be in [0, 1): 0 is white noise")
    step = torch.arange(horizon, dtype=torch.float64)
    lag = step[:, None] - step[None, :]
    basis = torch.where(lag >= 0, torch.pow(torch.tensor(correlation, dtype=torch.float64), lag.clamp_min(0)), 0.0)
    basis[:, 1:] *= math.sqrt(1.0 - correlation**2)
    return basis.to(torch.float32)


def coloured_noise(
    noise: NoiseKey, basis: Tensor, *shape: int, action_dim: int, normal: Callable[..., Tensor] = NoiseKey.normal
) -> Tensor:
    """[R, *shape, H, A] noise of unit variance, coloured over time by `basis` [H, K], see `temporal_basis`.

    normal: what draws it, called as `NoiseKey.normal` with the key first.
    """
    horizon, knots = basis.shape
    if horizon == 1 or (knots == horizon and basis[1, 0] == 0):
        return normal(noise, *shape, horizon, action_dim)
    return (normal(noise, *shape, action_dim, knots) @ basis.T).transpose(-1, -2)


def check_sigma(sigma: float | Sequence[float], name: str = "sigma") -> Tensor:
    """[1] or [A] standard deviations in units of the action range's half; ValueError unless finite and > 0."""
    try:
        value = torch.as_tensor(sigma, dtype=torch.float32).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {sigma!r}, but must be a number above 0, or one for each action dim") from None
    if isinstance(sigma, bool) or value.numel() == 0 or not torch.isfinite(value).all() or not (value > 0).all():
        raise ValueError(f"{name} is {sigma}, but must be above 0 (actions span [-1, 1]); 0.1 is a small one")
    return value


def match_sigma(sigma: Tensor, action_dim: int, name: str = "planner.sigma") -> Tensor:
    """`sigma` [1] or [A], checked against the model's action dims."""
    if sigma.numel() not in (1, action_dim):
        raise ValueError(f"{name} has {sigma.numel()} entries, but the model's actions have {action_dim} dims")
    return sigma


def shifted(chunk: Tensor, steps: Tensor) -> Tensor:
    """`chunk` [R, H, A] moved forward by `steps` [R] executed steps; its last action fills the end."""
    horizon = chunk.shape[1]
    index = torch.arange(horizon, device=chunk.device) + steps[:, None]
    index = index.clamp(0, horizon - 1)
    return chunk.gather(1, index[:, :, None].expand(-1, -1, chunk.shape[2]))


def check_steps(proposal: Proposal, horizon: int) -> None:
    """ValueError when the chunks of `proposal` do not have `horizon` steps."""
    steps = proposal.actions.shape[2]
    if steps != horizon:
        raise ValueError(
            f"the planner's horizon is {horizon}, but the model proposes chunks of {steps} steps; "
            f"set planner.horizon={steps}"
        )


def join_imagined(first: Imagined, second: Imagined) -> Imagined:
    """The futures of two sets of candidates of the same rows, one after the other along N."""
    joined = {}
    for field in fields(Imagined):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if field.name == "evaluations":
            joined[field.name] = a + b
        elif a is None or b is None:
            joined[field.name] = None
        else:
            joined[field.name] = torch.cat([a, b], dim=1)
    return Imagined(**joined)


def first_rows(proposal: Proposal, rows: int) -> Proposal:
    """The actions, and their futures where there are some, of the first `rows` rows."""
    imagined = proposal.imagined
    if imagined is not None:
        parts = {field.name: getattr(imagined, field.name) for field in fields(Imagined) if field.name != "evaluations"}
        shown = {name: None if part is None else part[:rows] for name, part in parts.items()}
        imagined = Imagined(evaluations=imagined.evaluations, **shown)
    return Proposal(actions=proposal.actions[:rows], imagined=imagined)


class MakeProposer(Protocol):
    """What planners make their proposer with: the class of one, or a `functools.partial` of it with its settings."""

    def __call__(self, *, horizon: int, sigma: Tensor, basis: Tensor) -> Proposer:
        """The proposer of H steps, for noise of standard deviation `sigma` [1] or [A] and shape `basis` [H, K]."""
        ...


class MakeTreeProposer(Protocol):
    """What trees make their proposer with, as `MakeProposer`; H are the steps of an edge."""

    def __call__(self, *, horizon: int, sigma: Tensor, basis: Tensor) -> TreeProposer:
        """The proposer of H steps, for noise of standard deviation `sigma` [1] or [A] and shape `basis` [H, H]."""
        ...


def make_proposer(make: MakeProposer | None, *, horizon: int, sigma: Tensor, basis: Tensor) -> Proposer:
    """The proposer that `make` makes, a `PolicyProposer` where it is None."""
    if make is None:
        return PolicyProposer(horizon=horizon, sigma=sigma, basis=basis)
    check_part("proposer", make)
    return make(horizon=horizon, sigma=sigma, basis=basis)


def check_part(name: str, part: object) -> None:
    """ValueError when a planner's proposer, scorer or gate is none, as where only the name of one was given."""
    if not callable(part):
        raise ValueError(
            f"planner.{name} is {part!r}, but must be an object; among the settings, {name}@planner.{name}=<choice> "
            "makes one"
        )


@dataclass(frozen=True, eq=False)
class PolicyProposer:
    """Candidates that follow the policy inside the imagination, with small correlated perturbations.

    Candidate 0 is the unperturbed policy. The policy reacts to what each perturbation causes, so candidates
    stay near the data. The model imagines while it proposes, so the first iteration costs one pass.

    In a model with a behaviour prior, part of the candidates follow that instead, one of them unperturbed: a policy
    taught by demonstrations does not know what to do after a slip, and no small perturbation of it does either.

    horizon: H steps. sigma: [1] or [A] standard deviation of the perturbation. basis: [H, K] its shape over time, see
    `wamrl.planners.temporal.temporal_basis`.
    warm_share: share of the candidates drawn around the shifted previous plan instead (around the policy's chunk in
    rows that have none, in a later part of a search with a deadline the first chunk of that part), open loop.
    behaviour_share: share of the other candidates that follows the behaviour prior, in models that have one.
    """

    horizon: int
    sigma: Tensor
    basis: Tensor
    warm_share: float = 0.0
    behaviour_share: float = 0.5

    needs = frozenset({"policy", "rollout"})

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        for name in ("warm_share", "behaviour_share"):
            share = getattr(self, name)
            if not is_number(share) or not 0.0 <= share <= 1.0:
                raise ValueError(f"planner.proposer.{name} is {share!r}, but must be in [0, 1]")

    def needs_of(self, spec: Spec) -> frozenset[str]:
        """`needs`; ValueError where `sigma` is of another number of action dims than a model of this `spec` has."""
        match_sigma(self.sigma, spec.action_dim)
        return self.needs

    def __call__(
        self, model: WAM, state: State, plan_state: PlanState, num: int, noise: NoiseKey, first: int = 0
    ) -> Proposal:
        """`num` candidates [R, N, H, A], imagined when the model imagines while proposing."""
        action_dim = model.spec.action_dim
        sigma = match_sigma(self.sigma, action_dim).to(noise.row.device)
        perturbation = (
            coloured_noise(noise.fold(0), self.basis.to(noise.row.device), num, action_dim=action_dim) * sigma
        )
        num_warm = min(round(self.warm_share * num), num - 1)
        num_policy = num - num_warm
        followed = perturbation[:, :num_policy].clone()
        if first == 0:
            followed[:, 0] = 0.0
        behaviour = min(round(self.behaviour_share * num_policy), num_policy - 1)
        if behaviour and "behaviour" in model.spec.provides:
            if first == 0:
                followed[:, num_policy - behaviour] = 0.0
            options = {"behaviour": behaviour}
        else:
            options = {}
        proposal = model.propose(state, num_policy, mode="ode", noise=noise.fold(1), perturbation=followed, **options)
        check_steps(proposal, self.horizon)
        if num_warm == 0:
            return proposal
        centre = torch.where(
            plan_state["warm"][:, None, None],
            shifted(plan_state["mean"], plan_state["shift"]),
            proposal.actions[:, 0].nan_to_num(),
        )
        warm_noise = perturbation[:, num_policy:].clone()
        if first == 0:
            warm_noise[:, 0] = 0.0
        around = (centre[:, None] + warm_noise).clamp(-1.0, 1.0)
        actions = torch.cat([proposal.actions, around], dim=1)
        if proposal.imagined is None:
            return Proposal(actions=actions)
        imagined = join_imagined(proposal.imagined, model.imagine(state, around, noise=noise.fold(2)))
        return Proposal(actions=actions, imagined=imagined)

    def edges(self, model: WAM, state: State, slots: Tensor, perturbation: Tensor, noise: NoiseKey) -> Proposal:
        """Chunks [R, N, H, A] around the policy's, which itself is slot 0; see `wamrl.interfaces.TreeProposer`.

        Part of a root's edges follow the behaviour prior, as in `__call__`; those of the nodes below follow the policy.
        """
        num = slots.shape[1]
        calm = slots == 0
        behaviour = min(round(self.behaviour_share * num), num - 1)
        options = {}
        if behaviour and "behaviour" in model.spec.provides:
            calm = calm | (slots == num - behaviour)
            options = {"behaviour": behaviour}
        followed = perturbation.masked_fill(calm[:, :, None, None], 0.0)
        return model.propose(state, num, mode="ode", noise=noise, perturbation=followed, **options)


@dataclass(frozen=True, eq=False)
class NoiseProposer:
    """Candidates around the shifted previous plan, or around zero in rows that have none; candidate 0 is the centre.

    Knows nothing of the policy: plain MPPI. horizon, sigma, basis: as in `PolicyProposer`.
    """

    horizon: int
    sigma: Tensor
    basis: Tensor

    needs = frozenset({"rollout"})

    def needs_of(self, spec: Spec) -> frozenset[str]:
        """As in `PolicyProposer`."""
        match_sigma(self.sigma, spec.action_dim)
        return self.needs

    def __call__(
        self, model: WAM, state: State, plan_state: PlanState, num: int, noise: NoiseKey, first: int = 0
    ) -> Proposal:
        """`num` candidates [R, N, H, A], not yet imagined."""
        sigma = match_sigma(self.sigma, model.spec.action_dim).to(noise.row.device)
        basis = self.basis.to(noise.row.device)
        actions = coloured_noise(noise.fold(0), basis, num, action_dim=model.spec.action_dim).mul_(sigma)
        if first == 0:
            actions[:, 0] = 0.0
        centre = shifted(plan_state["mean"], plan_state["shift"]) * plan_state["warm"][:, None, None]
        return Proposal(actions=actions.add_(centre[:, None]).clamp_(-1.0, 1.0))

    def edges(self, model: WAM, state: State, slots: Tensor, perturbation: Tensor, noise: NoiseKey) -> Proposal:
        """Chunks [R, N, H, A] around zero, which itself is slot 0; see `wamrl.interfaces.TreeProposer`."""
        return Proposal(actions=perturbation.masked_fill((slots == 0)[:, :, None, None], 0.0).clamp(-1.0, 1.0))


@dataclass(frozen=True, eq=False)
class SampleProposer:
    """Candidate 0 is the policy's deterministic chunk, the others are samples of the policy.

    So it is at a tree's root, where that has several edges; all edges of the nodes below are samples.

    horizon: H steps, at most the model's chunk length. sigma, basis: not read, how far samples spread is the policy's
    own affair; they are there because planners make all proposers alike, see `MakeProposer`.
    """

    horizon: int
    sigma: Tensor | None = None
    basis: Tensor | None = None

    needs = frozenset({"policy", "rollout"})

    def needs_of(self, spec: Spec) -> frozenset[str]:
        """`needs`; ValueError where the chunks of a model of this `spec` are shorter than the horizon."""
        if self.horizon > spec.chunk_length:
            raise ValueError(
                f"the proposer's horizon is {self.horizon}, but the model proposes chunks of {spec.chunk_length} steps "
                f"at most; set planner.horizon={spec.chunk_length} (of a tree, planner.chunk) or less"
            )
        return self.needs

    def __call__(
        self, model: WAM, state: State, plan_state: PlanState, num: int, noise: NoiseKey, first: int = 0
    ) -> Proposal:
        """`num` candidates [R, N, H, A], imagined when the model imagines while proposing."""
        parts = []
        if first == 0:
            parts.append(model.propose(state, 1, mode="ode", noise=noise.fold(0), horizon=self.horizon))
        if num > len(parts):
            drawn = num - len(parts)
            parts.append(model.propose(state, drawn, mode="sde", noise=noise.fold(1), horizon=self.horizon))
        for part in parts:
            check_steps(part, self.horizon)
        if len(parts) == 1:
            return parts[0]
        return _joined(*parts)

    def edges(self, model: WAM, state: State, slots: Tensor, perturbation: Tensor, noise: NoiseKey) -> Proposal:
        """Chunks [R, N, H, A] as in `__call__`, but where there is one alone it is a sample, in slot 0 too.

        A policy answers either deterministically or by samples: which one a slot wants would take both, in every
        simulation. See `wamrl.interfaces.TreeProposer`.
        """
        num = slots.shape[1]
        if num == 1:
            return model.propose(state, 1, mode="sde", noise=noise, horizon=self.horizon)
        calm = model.propose(state, 1, mode="ode", noise=noise.fold(0), horizon=self.horizon)
        return _joined(calm, model.propose(state, num - 1, mode="sde", noise=noise, horizon=self.horizon))


def _joined(first: Proposal, second: Proposal) -> Proposal:
    """The candidates of two proposals for the same rows, one after the other; imagined where both are."""
    imagined = None
    if first.imagined is not None and second.imagined is not None:
        imagined = join_imagined(first.imagined, second.imagined)
    return Proposal(actions=torch.cat([first.actions, second.actions], dim=1), imagined=imagined)
