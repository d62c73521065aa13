"""Whether a row is worth searching. Rows that are not use the policy's own chunk.

Shapes: B rows, M sampled futures, H steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wamrl.interfaces import WAM, Imagined, PlanState, Spec, State
from wamrl.planners.scorers import ReturnScorer


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

    threshold: float = 0.05

    needs = frozenset({"policy", "uncertainty"})
    candidates = 1

    def __post_init__(self) -> None:
        """Refuse a threshold that no uncertainty can be compared with."""
        if not math.isfinite(self.threshold) or self.threshold < 0:
            raise ValueError(f"gate threshold is {self.threshold}, but must be a finite number of at least 0")

    def __call__(self, model: WAM, state: State, plan_state: PlanState) -> Tensor:
        """[B] True where the mean disagreement is above the threshold, or is not a number."""
        imagined = own_chunk(model, state)
        if imagined.uncertainty is None:
            raise ValueError("the uncertainty gate needs Imagined.uncertainty, but this model left it out")
        return ~(imagined.uncertainty.mean(dim=(1, 2, 3)) <= self.threshold)


@dataclass(frozen=True)
class CriticalPhase:
    """Search a row where the policy's own chunk is imagined to fall short of what its value promises.

    The shortfall is V(now) - (discounted reward of the chunk + discounted V(its end)), means over futures and value
    heads: about 0 while all goes as the value expects, above it where the policy is about to lose something (after
    DreamAvoid, which imagines in critical phases only). threshold: in the units of the reward. Costs one imagined chunk
    per row, which counts as `candidates` against the budget.
    """

    threshold: float = 0.5

    needs = frozenset({"policy", "reward", "value"})
    candidates = 1

    def __post_init__(self) -> None:
        """Refuse a threshold that no shortfall can be compared with."""
        if not math.isfinite(self.threshold):
            raise ValueError(f"gate threshold is {self.threshold}, but must be a finite number")

    def needs_of(self, spec: Spec) -> frozenset[str]:
        """`needs`, and what the `success_bonus` of a model of this `spec` asks for."""
        return self.needs | ReturnScorer().needs_of(spec)

    def __call__(self, model: WAM, state: State, plan_state: PlanState) -> Tensor:
        """[B] True where the shortfall is above the threshold, or is not a number."""
        reward, discount, value = ReturnScorer().edge(model, own_chunk(model, state))
        shortfall = model.value(state).mean(dim=-1) - (reward + discount * value)[:, 0]
        return ~(shortfall <= self.threshold)


@dataclass(frozen=True)
class Periodic:
    """Search one plan in `every`, the first of each episode among them: a budget over plans.

    Reads `plans` [B] of the plan state, how many plans a row has had.
    """

    every: int = 2

    needs = frozenset({"policy"})
    candidates = 0

    def __post_init__(self) -> None:
        """Refuse a period that is none."""
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"gate.every is {self.every!r}, but must be a whole number of at least 1")

    def __call__(self, model: WAM, state: State, plan_state: PlanState) -> Tensor:
        """[B] True in every `every`-th plan of a row."""
        return (plan_state["plans"] % self.every == 0) | ~plan_state["warm"]


def surprise(seen: Tensor, foreseen: Tensor) -> Tensor:
    """[*batch] how far what is seen lies from what was foreseen: the root mean square difference over the last dim."""
    return (seen - foreseen).square().mean(dim=-1).sqrt()


def own_chunk(model: WAM, state: State) -> Imagined:
    """The futures of the policy's own chunk, N = 1."""
    proposal = model.propose(state, 1, mode="ode")
    return model.imagine(state, proposal.actions) if proposal.imagined is None else proposal.imagined
