"""Candidates that were good in the last plan are candidates again (iCEM, Pinneri et al., 2020, arXiv:2008.06389).

Shapes: R rows, N candidates, K elites, H steps, A action dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wamrl.interfaces import WAM, PlanState, Proposal, Proposer, Spec, State
from wamrl.noise import NoiseKey
from wamrl.planners.proposers import coloured_noise, join_imagined, match_sigma, shifted
from wamrl.planners.scorers import asked_of


@dataclass(frozen=True, eq=False)
class EliteProposer:
    """The candidates of `inner`, the last `num_elites` of them replaced by the elites of the last plan.

    Elites are shifted by the executed steps, their last action filling the end. Rows without a last plan get noise
    around candidate 0 instead, of shape `basis` and standard deviation `sigma`.
    """

    inner: Proposer
    num_elites: int
    sigma: Tensor
    basis: Tensor

    def needs_of(self, spec: Spec) -> frozenset[str]:
        """What `inner` asks of a model of this `spec`."""
        return asked_of(spec, self.inner)

    def __call__(
        self, model: WAM, state: State, plan_state: PlanState, num: int, noise: NoiseKey, first: int = 0
    ) -> Proposal:
        """`num` candidates [R, N, H, A], imagined when `inner` imagines while proposing."""
        keep = min(self.num_elites, num - 1) if first == 0 else 0
        proposal = self.inner(model, state, plan_state, num - keep, noise.fold(0), first)
        if keep == 0:
            return proposal
        elites = plan_state["elites"][:, :keep]
        rows, _, horizon, action_dim = elites.shape
        warm = shifted(elites.flatten(0, 1), plan_state["shift"].repeat_interleave(keep)).view_as(elites)
        device = noise.row.device
        offset = coloured_noise(noise.fold(1), self.basis.to(device), keep, action_dim=action_dim)
        cold = proposal.actions[:, :1].nan_to_num() + offset * match_sigma(self.sigma, action_dim).to(device)
        again = torch.where(plan_state["warm"][:, None, None, None], warm, cold).clamp(-1.0, 1.0)
        return joined(model, state, proposal, again, noise.fold(2))


def check_elites(num_elites: int, num_candidates: int) -> None:
    """ValueError where more elites are asked for than an iteration has candidates."""
    if num_elites > num_candidates:
        raise ValueError(
            f"planner.num_elites is {num_elites}, but an iteration has only {num_candidates} candidates, of which "
            f"elites are the best; set planner.num_elites={max(1, num_candidates // 4)}, say, or raise "
            "planner.num_candidates"
        )


def joined(model: WAM, state: State, proposal: Proposal, actions: Tensor, noise: NoiseKey) -> Proposal:
    """`proposal` followed by the chunks `actions` [R, N', H, A], imagined if the proposal is."""
    imagined = proposal.imagined
    if imagined is not None:
        imagined = join_imagined(imagined, model.imagine(state, actions, noise=noise))
    return Proposal(actions=torch.cat([proposal.actions, actions], dim=1), imagined=imagined)
