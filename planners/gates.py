"""Whether a row is worth searching. Rows that are not use the policy's own chunk.

Shapes: B rows, M sampled futures, H steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wamrl.interfaces import WAM, PlanState, State


@dataclass(frozen=True)
class Always:
    """Search every row."""

    needs = frozenset[str]()
    candidates = 0

    def __call__(self, model: WAM, state: State, plan_state: PlanState) -> Tensor:
        """[B] all True."""
        return torch.ones(state.batch_size[0], dtype=torch.bool, device=plan_state["warm"].device)


@dataclass(frozen=True)
class Uncertainty:
    """Search a row where the model's futures of the policy's own chunk disagree by more than `threshold`.

    threshold: mean over the chunk of `Imagined.uncertainty`, in its units. Costs one imagined chunk per row,
    which counts as `candidates` against the budget.
    """

    threshold: float

    needs = frozenset({"policy", "uncertainty"})
    candidates = 1

    def __post_init__(self) -> None:
        """Refuse a threshold that no uncertainty can be compared with."""
        if not math.isfinite(self.threshold) or self.threshold < 0:
            raise ValueError(f"gate threshold is {self.threshold}, but must be a finite number of at least 0")

    def __call__(self, model: WAM, state: State, plan_state: PlanState) -> Tensor:
        """[B] True where the mean disagreement is above the threshold, or is not a number."""
        proposal = model.propose(state, 1, mode="ode")
        imagined = proposal.imagined
        if imagined is None:
            imagined = model.imagine(state, proposal.actions)
        if imagined.uncertainty is None:
            raise ValueError("the uncertainty gate needs Imagined.uncertainty, but this model left it out")
        return ~(imagined.uncertainty.mean(dim=(1, 2, 3)) <= self.threshold)
