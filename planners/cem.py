"""The cross-entropy method (Rubinstein, 1999), and with coloured noise and kept elites iCEM (arXiv:2008.06389).

The refit rule: mean and standard deviation of the best candidates. `configs/planner/icem.yaml` is `make_cem` with
iCEM's settings.

Shapes: R rows, N candidates, K elites, H steps, A action dims.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wamrl.interfaces import Gate, Scorer
from wamrl.naming import is_number, whole_number
from wamrl.planners.elites import EliteProposer, check_elites
from wamrl.planners.gates import Always
from wamrl.planners.proposers import MakeProposer, check_sigma, make_proposer
from wamrl.planners.scorers import ReturnScorer, check_comparable
from wamrl.planners.shooting import Refit, ShootingPlanner
from wamrl.planners.temporal import temporal_basis


def cem_refit(*, num_elites: int = 8, momentum: float = 0.0, min_sigma: float = 0.02) -> Refit:
    """The rule mean, sigma = mean and standard deviation of the `num_elites` best candidates, equally weighted.

    momentum: share of the old mean and sigma that stays, in [0, 1); the old mean is candidate 0. min_sigma: in action
    units; the search never becomes narrower. Where a budget leaves fewer candidates than `num_elites`, all are elites.
    """
    whole_number("planner.num_elites", num_elites, 1)
    if not is_number(momentum) or not 0.0 <= momentum < 1.0:
        raise ValueError(
            f"planner.momentum is {momentum!r}, but must be in [0, 1): the share of the old mean that stays"
        )
    if not is_number(min_sigma) or min_sigma < 0:
        raise ValueError(f"planner.min_sigma is {min_sigma!r}, but must be a finite number of at least 0")

    def refit(actions: Tensor, scores: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best = scores.topk(min(num_elites, scores.shape[1]), dim=1)
        share = best.values.isfinite().to(actions.dtype)
        share = share / share.sum(dim=1, keepdim=True)
        elites = actions.gather(1, best.indices[:, :, None, None].expand(-1, -1, *actions.shape[2:]))
        mean = torch.einsum("rk,rkha->rha", share, elites)
        spread = torch.einsum("rk,rkha->rha", share, (elites - mean[:, None]).square()).sqrt()
        if momentum:
            mean = torch.lerp(mean, actions[:, 0], momentum)
            spread = (1.0 - momentum) * spread + momentum * sigma
        return mean, spread.clamp_min(min_sigma), torch.zeros_like(scores).scatter(1, best.indices, share)

    return refit


def make_cem(
    *,
    horizon: int = 8,
    num_candidates: int = 64,
    iterations: int = 4,
    num_elites: int = 8,
    keep_elites: int = 0,
    momentum: float = 0.0,
    min_sigma: float = 0.02,
    proposer: MakeProposer | None = None,
    sigma: float | Sequence[float] = 0.1,
    correlation: float = 0.0,
    exponent: float | None = None,
    knots: int | None = None,
    spline: str = "cubic",
    scorer: Scorer | None = None,
    gate: Gate | None = None,
    futures: int | None = None,
    choose: str = "best",
    stop_change: float | None = None,
    shuffle_scores: bool = False,
    compile: bool = False,
    on_failure: str = "raise",
) -> ShootingPlanner:
    """CEM as `configs/planner/cem.yaml` builds it; the defaults are the same.

    horizon: H model steps. num_candidates: N per iteration. num_elites: at most as many, or ValueError; with momentum
    and min_sigma, see `cem_refit`.
    keep_elites: the best that many are candidates of the next iteration, and of the next plan (0 is plain CEM).
    proposer: of the first candidates, as in `wamrl.planners.mppi.make_mppi`.
    sigma: standard deviation of the first candidates, one number or one per action dim.
    correlation, exponent, knots, spline: how the noise hangs together over time, see `temporal_basis`.
    scorer: None is `ReturnScorer()`. gate: None searches always. The rest: see `ShootingPlanner`.
    """
    spread = check_sigma(sigma, "planner.sigma")
    basis = temporal_basis(horizon, correlation=correlation, exponent=exponent, knots=knots, spline=spline)
    refit = cem_refit(num_elites=num_elites, momentum=momentum, min_sigma=min_sigma)
    check_elites(num_elites, num_candidates)
    scorer = ReturnScorer() if scorer is None else scorer
    if iterations > 1 and choose == "best":
        check_comparable(scorer, f"planner.choose=best compares its {iterations} iterations")
    proposes = make_proposer(proposer, horizon=horizon, sigma=spread, basis=basis)
    if keep_elites:
        proposes = EliteProposer(inner=proposes, num_elites=keep_elites, sigma=spread, basis=basis)
    return ShootingPlanner(
        proposer=proposes,
        scorer=scorer,
        gate=Always() if gate is None else gate,
        refit=refit,
        horizon=horizon,
        num_candidates=num_candidates,
        iterations=iterations,
        sigma=spread,
        basis=basis,
        choose=choose,
        min_candidates=max(8, 2 * num_elites),  # of fewer, the elites would be no selection
        keep_elites=keep_elites,
        futures=futures,
        stop_change=stop_change,
        shuffle_scores=shuffle_scores,
        compile=compile,
        on_failure=on_failure,
    )
