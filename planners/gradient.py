"""Planning by gradients through the model: climb the score of action chunks, from the best candidates of a search.

Adam on the actions, as in model-based gradient planners (Bharadhwaj et al., 2020, arXiv:2004.08763, which starts from
CEM too). The best chunk seen counts, so that a plan is never worse in imagination than the search it started from.

Shapes: R rows, K starts, H steps, A action dims.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wamrl.interfaces import WAM, Budget, Plan, PlanState, State
from wamrl.naming import is_number, true_or_false, whole_number
from wamrl.noise import NoiseKey
from wamrl.planners.cem import make_cem
from wamrl.planners.deadlines import KEPT_BACK, check_deadline
from wamrl.planners.gates import foresight_steps, memory_after
from wamrl.planners.scorers import check_comparable, permutation
from wamrl.planners.shooting import ShootingPlanner, check_stop_change

_STEP = 3.0
"""A step forward and backward takes about that many times as long as the pass forward alone."""
_JITTER = 1.25
"""Under a deadline a step is given that many times as long as the slowest before it took."""
_FORGET = 0.9
"""What is left, after a plan without a step, of how long one took: so that one slow step does not end all climbing."""
_PER_ROW = ("actions", "value", "weights", "candidates", "scores", "evaluations", "searched")
"""What of a `Plan` has one entry per row."""


@dataclass(eq=False)
class GradientPlanner:
    """Gradient ascent on the score of the best candidates that `start` found.

    start: the search whose scorer, gate, horizon and null control (`shuffle_scores`) hold here too. steps: gradient
    steps. num_starts: K best candidates of its last iteration that are improved, the chosen chunk always among them.
    learning_rate: of Adam, in action units. stop_change: a row is done once a step moves none of its numbers by more;
    None takes all steps.
    A gradient that is NaN or infinite leaves its candidate where it is.
    """

    start: ShootingPlanner
    steps: int
    num_starts: int
    learning_rate: float
    stop_change: float | None = None
    _step_s: dict[int, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse values that no plan could be made with."""
        if not isinstance(self.start, ShootingPlanner):
            raise ValueError(
                f"planner.start is {type(self.start).__name__}, but has to be a search that samples whole chunks; "
                "use planner/cem@planner.start, or one of icem, mppi and best_of_n in its place"
            )
        for name in ("steps", "num_starts"):
            whole_number(f"planner.{name}", getattr(self, name), 1)
        if self.num_starts > self.start.num_candidates:
            raise ValueError(
                f"planner.num_starts is {self.num_starts}, but the search that gives the starts has only "
                f"{self.start.num_candidates} candidates"
            )
        if not is_number(self.learning_rate) or self.learning_rate <= 0:
            raise ValueError(
                f"planner.learning_rate is {self.learning_rate!r}, but must be a number above 0 (actions span [-1, 1])"
            )
        check_stop_change(self.stop_change, compile=False)
        check_comparable(self.start.scorer, "a gradient planner compares its steps")

    @property
    def horizon(self) -> int:
        """H model steps."""
        return self.start.horizon

    def initial_state(self, model: WAM, rows: int) -> PlanState:
        """That of the search; ValueError when `model` does not answer what it asks, or has no gradients to climb."""
        if not model.differentiable:
            raise _no_gradient(model)
        return self.start.initial_state(model, rows)

    def check_budget(self, model: WAM, budget: Budget) -> None:
        """ValueError when `budget` does not allow the search one candidate in `model`, or the gate's never a plan."""
        steps, first, climb = self._split(model, budget)
        self.start.check_budget(model, Budget(first, budget.deadline_s), beside=climb)

    def warm_up(self, model: WAM, state: State, noise: NoiseKey, budget: Budget) -> None:
        """That of the search, which is all that is compiled."""
        _, first, _ = self._split(model, budget)
        self.start.warm_up(model, state, noise.fold(0), Budget(first, budget.deadline_s))

    def plan(
        self, model: WAM, state: State, plan_state: PlanState, noise: NoiseKey, budget: Budget
    ) -> tuple[Plan, PlanState]:
        """Search, then climb; where the budget does not allow both, the climb gets at most half of it.

        budget: as in `ShootingPlanner.plan`. A gradient step counts two evaluations per transition, one forward and one
        backward; the last chunks are judged by one more forward pass.
        Raises ValueError when the score does not depend on the actions through differentiable operations.
        """
        started = time.perf_counter()
        forward, foreseen = self._forward(model), self._foreseen(model)
        steps, first, climb = self._split(model, budget)
        check_deadline(budget)
        deadline = None if budget.deadline_s is None else budget.deadline_s / 2
        asked = plan_state.copy()
        asked["search_cost"] = torch.full_like(asked["shift"], climb)
        plan, next_state = self.start.plan(model, state, asked, noise.fold(0), Budget(first, deadline))
        rows = (plan.searched & plan.value.isfinite()).nonzero()[:, 0]
        if rows.numel() == 0 or steps < 1:
            return plan, next_state
        begun = time.perf_counter()
        ends = None if budget.deadline_s is None else started + (1.0 - KEPT_BACK) * budget.deadline_s
        if ends is not None and foreseen:  # the gate looks at the climbed chunks once more
            ends -= plan.seconds["remember"]
        # Before the first step, what is known is how long an evaluation took in the search, of many candidates at once,
        # and how long the slowest step of the last plan took.
        each = plan.seconds["imagine"] / max(1, int(plan.evaluations.sum()))
        expected = max(_STEP * each * forward * rows.numel(), self._step_s.get(rows.numel(), 0.0))
        chosen, value, passes = self._climb(model, state[rows], plan, rows, noise[rows].fold(1), steps, ends, expected)
        actions, values, evaluations = plan.actions.clone(), plan.value.clone(), plan.evaluations.clone()
        actions[rows], values[rows] = chosen, value
        evaluations[rows] += passes * (forward // self.num_starts) * min(self.num_starts, plan.scores.shape[1])
        next_state = next_state.copy()
        next_state["mean"] = actions
        seconds = {**plan.seconds, "imagine": plan.seconds["imagine"] + time.perf_counter() - begun}
        evaluations[rows] += foreseen
        plan = dataclasses.replace(plan, actions=actions, value=values, evaluations=evaluations, seconds=seconds)
        # The gate's memory is of the climbed plan where there is one, not of the one that the search began with.
        climbed = dataclasses.replace(plan, **{name: getattr(plan, name)[rows] for name in _PER_ROW})
        remembered = memory_after(self.start.gate, model, state[rows], plan_state[rows], climbed, noise[rows])
        for name, memory in remembered.items():
            next_state[name] = next_state[name].clone()
            next_state[name][rows] = memory
        return plan, next_state

    def _forward(self, model: WAM) -> int:
        """Evaluations of one pass of all starts."""
        return self.num_starts * (self.start.futures or model.spec.ensemble_size) * self.horizon

    def _foreseen(self, model: WAM) -> int:
        """Evaluations of the gate's look at the climbed chunk."""
        return foresight_steps(self.start.gate, self.horizon) * model.spec.ensemble_size

    def _split(self, model: WAM, budget: Budget) -> tuple[int, int | None, int]:
        """Gradient steps that the budget allows, evaluations that are left for the search, and those of the climb."""
        forward, foreseen = self._forward(model), self._foreseen(model)
        steps = self.steps
        if budget.evaluations is not None:
            steps = min(steps, (budget.evaluations // 2 - forward - foreseen) // (2 * forward))
        if steps < 1:
            return steps, budget.evaluations, 0
        climb = forward * (2 * steps + 1)
        return steps, None if budget.evaluations is None else budget.evaluations - climb - foreseen, climb

    def _climb(
        self,
        model: WAM,
        state: State,
        plan: Plan,
        rows: Tensor,
        noise: NoiseKey,
        steps: int,
        ends: float | None,
        expected: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best chunks seen [R, H, A], their scores [R] and the passes through the model [R] that each row took.

        expected: seconds of the first step.
        """
        scores = plan.scores[rows].nan_to_num(-math.inf)
        num = min(self.num_starts, scores.shape[1])  # a small budget leaves fewer candidates
        index = scores.topk(num, dim=1).indices[:, :, None, None]
        actions = plan.candidates[rows].gather(1, index.expand(-1, -1, *plan.candidates.shape[2:])).clone()
        actions[:, 0] = plan.actions[rows]
        best, chosen = plan.value[rows].clone(), plan.actions[rows].clone()
        first, second = torch.zeros_like(actions), torch.zeros_like(actions)  # Adam's moments
        going = torch.ones(rows.numel(), dtype=torch.bool, device=actions.device)
        passes = torch.zeros(rows.numel(), dtype=torch.int64, device=actions.device)
        slowest = 0.0  # of this plan's steps
        for t in range(1, steps + 2):
            begun = time.perf_counter()
            if ends is not None and begun + _JITTER * (slowest or expected) > ends:
                break
            at = going.nonzero()[:, 0]
            if at.numel() == 0:
                break
            key = noise[at].fold(t)
            last = t > steps
            score, gradient = self._slope(model, state[at], actions[at], key.fold(0), last)
            passes[at] += 1 if last else 2
            if self.start.shuffle_scores:
                order = permutation(key.fold(1), num)
                score = score.gather(1, order)
                gradient = gradient.gather(1, order[:, :, None, None].expand_as(gradient))
            score, which = score.nan_to_num(-math.inf, posinf=-math.inf).max(dim=1)
            better = score > best[at]
            best[at] = torch.where(better, score, best[at])
            now = actions[at, which]
            chosen[at] = torch.where(better[:, None, None], now, chosen[at])
            if last:
                break
            first[at] = torch.lerp(gradient, first[at], 0.9)
            second[at] = torch.lerp(gradient.square(), second[at], 0.999)
            root = (second[at] / (1.0 - 0.999**t)).sqrt()
            move = self.learning_rate * (first[at] / (1.0 - 0.9**t)) / root.where(root > 0, 1.0)
            moved = (actions[at] + move).clamp(-1.0, 1.0)
            if self.stop_change is not None:
                going[at] = (moved - actions[at]).abs().amax(dim=(1, 2, 3)) > self.stop_change
            actions[at] = moved
            slowest = max(slowest, time.perf_counter() - begun)
        self._step_s[rows.numel()] = slowest or _FORGET * self._step_s.get(rows.numel(), 0.0)
        return chosen, best, passes

    def _slope(
        self, model: WAM, state: State, actions: Tensor, key: NoiseKey, score_only: bool
    ) -> tuple[Tensor, Tensor]:
        """Scores [R, K] and their gradient [R, K, H, A]; 0 where it is not finite, or not asked for."""
        with torch.set_grad_enabled(not score_only):
            leaf = actions.detach().requires_grad_(not score_only)
            imagined = model.imagine(state, leaf, futures=self.start.futures, noise=key)
            scores = self.start.scorer(model, state, imagined)
            if score_only:
                return scores, torch.zeros_like(actions)
            if not scores.requires_grad:
                raise _no_gradient(model)
            total = scores.where(scores.isfinite(), 0.0).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
        return scores.detach(), gradient.nan_to_num(0.0, 0.0, 0.0)


def _no_gradient(model: WAM) -> ValueError:
    return ValueError(
        f"planner=gradient climbs the gradient of the score, but {type(model).__name__} gives none "
        "(a simulator, or a model that detaches); use planner=cem there"
    )


def make_gradient(
    *,
    start: ShootingPlanner | None = None,
    steps: int = 5,
    num_starts: int = 4,
    learning_rate: float = 0.01,
    stop_change: float | None = None,
    shuffle_scores: bool = False,
) -> GradientPlanner:
    """The gradient planner as `configs/planner/gradient.yaml` builds it; the defaults are the same.

    start: None is `make_cem(iterations=2)`. The rest: see `GradientPlanner`.
    """
    start = make_cem(iterations=2) if start is None else start
    if true_or_false("planner.shuffle_scores", shuffle_scores) and isinstance(start, ShootingPlanner):
        start = dataclasses.replace(start, shuffle_scores=True)
    return GradientPlanner(start, steps, num_starts, learning_rate, stop_change)
