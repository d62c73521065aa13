"""Best of N: sample chunks from the model's policy, imagine each, execute the best (as Cosmos Policy does).

Every candidate has M imagined futures and every future E values; the scorer's `risk` says how these M * E guesses
become one score (mean, lower bound, majority, ...).

Shapes: R rows, N candidates, M sampled futures, H steps, A action dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wamrl.interfaces import Gate, Scorer
from wamrl.planners.gates import Always
from wamrl.planners.proposers import SampleProposer
from wamrl.planners.scorers import ReturnScorer
from wamrl.planners.shooting import ShootingPlanner


def best_refit(actions: Tensor, scores: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rule of best-of-N: all weight on the best candidate. See `wamrl.planners.shooting.Refit`."""
    best = scores.argmax(dim=1)
    weights = torch.nn.functional.one_hot(best, scores.shape[1]).to(actions.dtype)
    return actions[torch.arange(best.shape[0], device=best.device), best], sigma, weights


def make_best_of_n(
    *,
    horizon: int = 8,
    num_candidates: int = 16,
    scorer: Scorer | None = None,
    gate: Gate | None = None,
    futures: int | None = None,
    shuffle_scores: bool = False,
    on_failure: str = "raise",
) -> ShootingPlanner:
    """Best of N as `configs/planner/best_of_n.yaml` builds it; the defaults are the same.

    horizon: H steps, at most the model's chunk length. num_candidates: N, the deterministic chunk among them.
    scorer: None is `ReturnScorer()`. gate: None searches always. The rest: see `ShootingPlanner`.
    """
    return ShootingPlanner(
        proposer=SampleProposer(horizon=horizon),
        scorer=ReturnScorer() if scorer is None else scorer,
        gate=Always() if gate is None else gate,
        refit=best_refit,
        horizon=horizon,
        num_candidates=num_candidates,
        iterations=1,
        sigma=torch.ones(1),  # of further iterations, of which there are none
        basis=torch.ones(1, 1),
        choose="best",
        futures=futures,
        shuffle_scores=shuffle_scores,
        on_failure=on_failure,
    )
