"""Model-predictive path integral control (Williams et al., 2015, arXiv:1509.01149).

The refit rule: the mean of the candidates, weighted by the exponential of their scores. Unless another proposer is
chosen, the first candidates follow the model's policy with small correlated perturbations, so that the search stays
where the model has data.

Shapes: R rows, N candidates, H steps, A action dims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wamrl.interfaces import Gate, Scorer
from wamrl.naming import is_number, true_or_false, whole_number
from wamrl.planners.elites import check_elites
from wamrl.planners.gates import Always
from wamrl.planners.proposers import MakeProposer, check_sigma, make_proposer
from wamrl.planners.scorers import ReturnScorer, check_comparable
from wamrl.planners.shooting import Refit, ShootingPlanner
from wamrl.planners.temporal import temporal_basis


def mppi_refit(*, temperature: float = 0.5, standardise: bool = True, num_elites: int | None = None) -> Refit:
    """The rule mean = sum_n w_n u_n with w = softmax(score / temperature) over the elites; sigma stays as it is.

    temperature: above 0; higher averages more candidates. standardise: subtract the mean of a row's finite scores and
    divide by their standard deviation first, so that neither the rewards' scale nor their zero matters.
    num_elites: only that many best candidates have weight; None is all of them, as it is where a budget leaves fewer.
    """
    if not is_number(temperature) or temperature <= 0:
        raise ValueError(f"planner.temperature is {temperature!r}, but must be a number above 0; 0.5 is usual")
    true_or_false("planner.standardise", standardise)
    if num_elites is not None:
        whole_number("planner.num_elites", num_elites, 1)

    def refit(actions: Tensor, scores: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = mppi_weights(scores, temperature, standardise, num_elites)
        rows, num, horizon, action_dim = actions.shape
        mean = torch.bmm(weights[:, None], actions.reshape(rows, num, -1)).view(rows, horizon, action_dim)
        return mean, sigma, weights

    return refit


def mppi_weights(scores: Tensor, temperature: float, standardise: bool, num_elites: int | None) -> Tensor:
    """[R, N] weights that sum to one, for `scores` [R, N] where -inf means no weight."""
    # Subtract the max first: exp overflows once returns exceed about 88 in float32.
    gap = scores - scores.amax(dim=1, keepdim=True)
    if standardise:
        out = gap == -math.inf
        count = scores.shape[1] - out.sum(dim=1, keepdim=True)
        mean = gap.masked_fill(out, 0.0).sum(dim=1, keepdim=True) / count
        deviation = torch.linalg.vector_norm((gap - mean).masked_fill_(out, 0.0), dim=1, keepdim=True) / count.sqrt()
        gap = gap / deviation.masked_fill_(deviation == 0, 1.0)
    if num_elites is not None and num_elites < scores.shape[1]:
        elites = gap.topk(num_elites, dim=1).indices
        gap = torch.full_like(gap, -math.inf).scatter(1, elites, gap.gather(1, elites))
    return torch.softmax(gap / temperature, dim=1)


def make_mppi(
    *,
    horizon: int = 8,
    num_candidates: int = 64,
    iterations: int = 1,
    temperature: float = 0.5,
    standardise: bool = True,
    num_elites: int | None = None,
    proposer: MakeProposer | None = None,
    sigma: float | Sequence[float] = 0.05,
    correlation: float = 0.7,
    knots: int | None = None,
    spline: str = "cubic",
    refine_sigma: float | Sequence[float] | None = None,
    scorer: Scorer | None = None,
    gate: Gate | None = None,
    choose: str = "best",
    stop_change: float | None = None,
    shuffle_scores: bool = False,
    compile: bool = False,
    on_failure: str = "raise",
) -> ShootingPlanner:
    """MPPI as `configs/planner/mppi.yaml` builds it; the defaults are the same.

    horizon: H model steps. num_candidates: N per iteration. temperature, standardise, num_elites (at most N, or
    ValueError): see `mppi_refit`.
    proposer: makes the proposer from H, sigma and basis: `PolicyProposer` (None), where candidates follow the policy,
    `NoiseProposer` (plain MPPI) or `SampleProposer`, or a `functools.partial` of one with settings of its own.
    sigma: standard deviation of the noise on normalised actions, one number or one per action dim.
    correlation: of the noise of neighbouring steps, in [0, 1); of neighbouring knots where there are `knots`.
    knots, spline: draw the noise at that many steps and interpolate, see `temporal_basis`.
    refine_sigma: sigma of the iterations after the first; None is `sigma`.
    scorer: None is `ReturnScorer(risk="improvement")`. gate: None searches always.
    choose, stop_change, shuffle_scores, compile, on_failure: see `ShootingPlanner`.
    """
    spread = check_sigma(sigma, "planner.sigma")
    basis = temporal_basis(horizon, correlation=correlation, knots=knots, spline=spline)
    if num_elites is not None:
        check_elites(num_elites, num_candidates)
    scorer = ReturnScorer(risk="improvement") if scorer is None else scorer
    if iterations > 1 and choose == "best":
        check_comparable(scorer, f"planner.choose=best compares its {iterations} iterations")
    return ShootingPlanner(
        proposer=make_proposer(proposer, horizon=horizon, sigma=spread, basis=basis),
        scorer=scorer,
        gate=Always() if gate is None else gate,
        refit=mppi_refit(temperature=temperature, standardise=standardise, num_elites=num_elites),
        horizon=horizon,
        num_candidates=num_candidates,
        iterations=iterations,
        sigma=spread if refine_sigma is None else check_sigma(refine_sigma, "refine_sigma"),
        basis=basis,
        choose=choose,
        min_candidates=max(8, 2 * (num_elites or 0)),
        stop_change=stop_change,
        shuffle_scores=shuffle_scores,
        compile=compile,
        on_failure=on_failure,
    )
