"""Shooting: imagine many action chunks, score them, fit a chunk to the scores, repeat.

A planner of this family fills four holes: `proposer` (where the first candidates come from), `scorer` (how good
their futures are), `refit` (which chunk the scores call for: MPPI, CEM, ...) and `gate` (which rows to search).

Shapes: B rows, R rows that are searched, N candidates, M sampled futures, H steps, A action dims.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from wamrl.interfaces import WAM, Budget, Gate, Imagined, Plan, PlanState, Proposal, Proposer, Scorer, State
from wamrl.naming import is_number, true_or_false, unknown_name, whole_number
from wamrl.noise import NoiseKey
from wamrl.planners.deadlines import KEPT_BACK, Pace, check_deadline, in_blocks
from wamrl.planners.gates import (
    LATER,
    SKIPPING,
    Always,
    ask,
    check_search_cost,
    device_of,
    foresight_steps,
    fresh_memory,
    gate_cost,
    memory_after,
)
from wamrl.planners.proposers import check_part, coloured_noise, first_rows, match_sigma
from wamrl.planners.running import (
    CompiledQueries,
    ModelClock,
    compiled,
    every_padding,
    padding,
    require_compiler,
    run_compiled,
)
from wamrl.planners.scorers import asked_of, permutation

CHOICES = ("mean", "best")
FAILURES = ("raise", "hold")
NOISE_BLOCK = 8
"""Iterations whose noise is drawn at once: fewer small calls, while a deadline can still stop a long search early."""


class Refit(Protocol):
    """Which distribution of chunks the scores call for."""

    def __call__(self, actions: Tensor, scores: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [R, H, A], sigma [R or 1, H or 1, A or 1] and weights [R, N] (summing to one).

        actions: [R, N, H, A], finite. scores: [R, N], -inf for a candidate that must have no weight; every row has
        at least one finite score. sigma: the standard deviation that the candidates were drawn with.
        """
        ...


class NonFinitePlanError(ValueError):
    """Every candidate of some row had a score or an action that is not finite. rows: their indices."""

    def __init__(self, rows: list[int], candidates: int) -> None:
        self.rows, self.candidates = rows, candidates
        super().__init__(
            f"all {candidates} candidates of row(s) {rows} have a score or action that is NaN or infinite: the model "
            "is broken for these observations (diverged training, or inputs far outside of its data?). "
            "Check the checkpoint; planner.on_failure=hold sends zero actions in such rows instead of stopping"
        )


@dataclass(eq=False)
class ShootingPlanner:
    """Sampling-based search over action chunks; the template behind `make_mppi`.

    The first iteration scores the proposer's candidates. Each further one draws `num_candidates` chunks around the
    refitted mean, open loop, candidate 0 being that mean; neighbouring steps are correlated through `basis`.

    horizon: H model steps. num_candidates: N. iterations: the most that a plan may take.
    min_candidates: the fewest that an iteration is worth; a small budget takes candidates down to that many before it
    takes iterations.
    sigma: [1] or [A] standard deviation of the refinement. choose: "mean" returns the last refitted mean chunk, "best"
    the best-scored candidate of all iterations.
    keep_elites: that many of the best candidates are candidates of the next iteration again, and travel in the plan
    state's `elites` [B, K, H, A] to the next plan (see `wamrl.planners.elites`).
    futures: M sampled futures per candidate; None is the model's own number.
    stop_change: a row is done once an iteration moves no number of its mean by more than this (in action units); None
    runs all iterations. shuffle_scores: the null control; scores are permuted across the candidates of a row before
    anything reads them. compile: a refinement iteration as a single compiled function, and what the proposer asks
    of the model as compiled functions (not in a first iteration that a deadline cuts into parts).
    on_failure: what happens to a row none of whose candidates is finite: "raise" NonFinitePlanError, or "hold":
    a chunk of zeros (for delta actions: stay), value NaN, a RuntimeWarning, and weights that stay uniform.
    """

    proposer: Proposer
    scorer: Scorer
    gate: Gate
    refit: Refit
    horizon: int
    num_candidates: int
    iterations: int
    sigma: Tensor
    basis: Tensor
    choose: str = "mean"
    min_candidates: int = 8
    keep_elites: int = 0
    futures: int | None = None
    stop_change: float | None = None
    shuffle_scores: bool = False
    compile: bool = False
    on_failure: str = "raise"
    _compiled: Any = field(default=None, init=False, repr=False)
    _queries: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse values that no plan could be made with."""
        for name in ("proposer", "scorer", "gate"):
            check_part(name, getattr(self, name))
        for name in ("horizon", "num_candidates", "iterations", "min_candidates"):
            whole_number(f"planner.{name}", getattr(self, name), 1)
        if self.futures is not None:
            whole_number("planner.futures", self.futures, 1)
        if whole_number("planner.keep_elites", self.keep_elites, 0) >= self.num_candidates:
            raise ValueError(
                f"planner.keep_elites is {self.keep_elites}, but must be below the {self.num_candidates} candidates"
            )
        for name in ("shuffle_scores", "compile"):
            true_or_false(f"planner.{name}", getattr(self, name))
        check_stop_change(self.stop_change, self.compile)
        if self.choose not in CHOICES:
            raise unknown_name("choose", str(self.choose), CHOICES)
        if self.on_failure not in FAILURES:
            raise unknown_name("on_failure", str(self.on_failure), FAILURES)
        if self.compile:
            require_compiler()

    def check(self, model: WAM) -> None:
        """ValueError when `model` does not answer what this planner asks, or not as far ahead."""
        needs = {"rollout"}.union(*(asked_of(model.spec, part) for part in (self.proposer, self.scorer, self.gate)))
        if not isinstance(self.gate, Always):
            needs.add("policy")
        model.spec.require(*sorted(needs))
        if self.horizon > model.spec.max_horizon:
            raise ValueError(
                f"planner.horizon is {self.horizon}, but the model is meant to imagine {model.spec.max_horizon} "
                f"steps; set planner.horizon={model.spec.max_horizon} or less"
            )
        if model.spec.action_kind != "continuous":
            raise ValueError(f"this planner searches continuous actions, but the model's are {model.spec.action_kind}")
        match_sigma(self.sigma, model.spec.action_dim, "the sigma of further iterations")

    def check_budget(self, model: WAM, budget: Budget, beside: int = 0) -> None:
        """ValueError when `budget` does not allow one candidate in `model`, as `plan` would raise it.

        Also when that of the gate never allows a search, with the `beside` evaluations of an outer planner.
        """
        num, iterations, _ = self._fit(model, budget)
        check_search_cost(self.gate, self._cost(model, num, iterations) + beside)

    def _cost(self, model: WAM, num: int, iterations: int) -> int:
        """Evaluations of a search, per row."""
        return num * iterations * (self.futures or model.spec.ensemble_size) * self.horizon

    def initial_state(self, model: WAM, rows: int) -> PlanState:
        """Fresh plan state: `mean` [B, H, A] of the last plan, `warm` [B], `shift` [B] executed steps, `plans` [B]."""
        self.check(model)
        device = device_of(model)
        chunk = (self.horizon, model.spec.action_dim)
        state: dict[str, Tensor | TensorDict] = {
            "mean": torch.zeros(rows, *chunk, device=device),
            "warm": torch.zeros(rows, dtype=torch.bool, device=device),
            "shift": torch.zeros(rows, dtype=torch.int64, device=device),
            "plans": torch.zeros(rows, dtype=torch.int64, device=device),
        }
        if self.keep_elites:
            state["elites"] = torch.zeros(rows, self.keep_elites, *chunk, device=device)
        state |= fresh_memory(self.gate, model, rows, self.horizon)
        return TensorDict(state, batch_size=[rows], device=device)

    @torch.no_grad()
    def plan(
        self, model: WAM, state: State, plan_state: PlanState, noise: NoiseKey, budget: Budget
    ) -> tuple[Plan, PlanState]:
        """Search every row of `state` [B] that the gate lets through; the others follow the policy.

        budget.evaluations is hard: candidates become fewer, down to `min_candidates`, then iterations, then candidates
        again; ValueError when not even one fits. budget.deadline_s: candidates are imagined in blocks, and none starts
        that would end after it (judged by those so far); the first `min_candidates`, the policy's own chunk among them,
        always are. The rest of an iteration that it stops repeat candidate 0, with a score of -inf and no weight. Each
        block draws noise of its own. Compiled iterations stay whole. The plan state returned has `shift` 1: one step is
        expected to be executed.
        `Plan.seconds`: "imagine" is the time inside the model, "search" the rest; a compiled iteration counts as
        the former as a whole. "remember" is what the gate's memory took of both.
        """
        started = time.perf_counter()
        self.check(model)
        num, iterations, gated = self._fit(model, budget)
        clock = ModelClock(model)
        rows = state.batch_size[0]
        limits = _Limits(num, iterations, started, budget.deadline_s, rows)
        if isinstance(self.gate, Always):
            searched = torch.ones(rows, dtype=torch.bool, device=noise.row.device)
            found = self._search(clock, state, plan_state, noise, limits)
        else:
            searched = ask(self.gate, cast(WAM, clock), state, plan_state, noise, self._cost(model, num, iterations))
            found = self._search_some(clock, state, plan_state, noise, limits, searched)
            found.evaluations += gated
        carried: dict[str, Tensor | TensorDict] = {
            "mean": found.mean,
            "warm": torch.ones_like(searched),
            "shift": torch.ones_like(found.evaluations),
            "plans": count_plans(plan_state),
        }
        if self.keep_elites:
            carried["elites"] = _elites(found.candidates, found.scores, self.keep_elites)
        plan = Plan(
            actions=found.actions,
            value=found.value,
            weights=found.weights,
            candidates=found.candidates,
            scores=found.scores,
            evaluations=found.evaluations,
            searched=searched,
        )
        begun = time.perf_counter()
        carried |= memory_after(self.gate, cast(WAM, clock), state, plan_state, plan, noise)
        ended = time.perf_counter()
        seconds = {"imagine": clock.seconds, "search": ended - started - clock.seconds, "remember": ended - begun}
        return replace(plan, seconds=seconds), TensorDict(carried, batch_size=[searched.shape[0]])

    @torch.no_grad()
    def warm_up(self, model: WAM, state: State, noise: NoiseKey, budget: Budget) -> None:
        """Compile what plans of as many rows as `state` [R], and of fewer, run under `budget`; see `Planner`.

        A first iteration that a deadline cuts into parts is not compiled, neither here nor there.
        """
        if not self.compile:
            return
        num, iterations, _ = self._fit(model, budget)
        if budget.deadline_s is not None and iterations == 1:
            return
        deadline_s = None if budget.deadline_s is None else math.inf  # in parts as well, but all of them
        for part, key in every_padding(state, noise):
            rows = key.row.shape[0]
            limits = _Limits(num, iterations, time.perf_counter(), deadline_s, rows)
            with failures_unreported():
                self._search(ModelClock(model), part, self.initial_state(model, rows), key, limits)

    def _fit(self, model: WAM, budget: Budget) -> tuple[int, int, int]:
        """Candidates and iterations that fit the budget, and the evaluations per row that the gate takes."""
        check_deadline(budget)
        members = model.spec.ensemble_size
        gated = gate_cost(self.gate, model, self.horizon)
        if budget.evaluations is None:
            return self.num_candidates, self.iterations, gated
        each = (self.futures or members) * self.horizon
        affordable = (budget.evaluations - gated) // each
        if affordable < 1:
            raise ValueError(
                f"budget.evaluations is {budget.evaluations} per row, but one candidate of {self.horizon} steps costs "
                f"{each}" + (f" and the gate {gated}" if gated else "") + f"; allow at least {each + gated}"
            )
        iterations = min(self.iterations, max(1, affordable // min(self.min_candidates, self.num_candidates)))
        return min(self.num_candidates, affordable // iterations), iterations, gated

    def _search(
        self,
        clock: ModelClock,
        state: State,
        plan_state: PlanState,
        noise: NoiseKey,
        limits: _Limits,
        at: Tensor | None = None,
    ) -> _Found:
        """Search every row of `state`; at: their numbers [R] within the plan, None where all are searched."""
        model, looked = cast(WAM, clock), limits.num_candidates
        pace = None
        if limits.deadline_s is not None:
            # The gate's look at the plans of all rows takes at most as long as as many candidates of those searched.
            least = noise.row.shape[0] * min(self.min_candidates, limits.num_candidates)
            after = max(1.0, limits.rows / least) if foresight_steps(self.gate, self.horizon) else 0.0
            pace = Pace(limits.started + (1.0 - KEPT_BACK) * limits.deadline_s, after)
        sigma = self.sigma.to(noise.row.device)
        order, key = self._order(noise, 0, limits.num_candidates), noise.fold(1).fold(0)
        evaluate = self._evaluator(clock)
        if pace is not None:
            propose = partial(self._propose_block, model, state, plan_state, noise)
            judge = partial(self._judge, model, state, sigma, order, looked)
            (now, failed), spent = in_blocks(propose, judge, looked, self.min_candidates, pace)
            looked = pace.looked
        else:
            proposal = self._propose(clock, state, plan_state, limits.num_candidates, noise.fold(0))
            actions, broken = _cleaned(proposal.actions)
            if proposal.imagined is None:
                now, failed, spent = evaluate(state, actions, broken, sigma, key, order)
            else:
                self._check_futures(proposal.imagined)
                scores = self.scorer(model, state, proposal.imagined)
                now, failed = self._refit(actions, scores, broken, sigma, order)
                spent = proposal.imagined.evaluations
        any_failed = bool(failed.any())
        if any_failed:
            report_failure(failed, looked, self.on_failure, at)
        best = _best(now) if self.choose == "best" else None
        settled: list[tuple[Tensor, _Found]] = []
        rows = None  # the rows that go on, once some have settled
        if limits.iterations > 1:
            basis, action_dim = self.basis.to(noise.row.device), now.actions.shape[-1]
            keep = min(self.keep_elites, limits.num_candidates - 1)
            broken = torch.zeros_like(now.scores, dtype=torch.bool)
            slowest = time.perf_counter() - limits.started
            for i in range(1, limits.iterations):
                begun = time.perf_counter()
                if pace is not None:
                    if looked < limits.num_candidates:
                        break  # the last iteration was stopped already
                    if self.compile and begun + slowest > pace.ends:
                        break
                    if not self.compile and not pace.more(0, min(self.min_candidates, looked)):
                        break
                block, within = divmod(i - 1, NOISE_BLOCK)
                if within == 0:
                    ahead = min(NOISE_BLOCK, limits.iterations - i)
                    draw = noise.fold(2).fold(block)
                    num, normal = limits.num_candidates, self._normal(clock)
                    offsets = coloured_noise(draw, basis, ahead, num, action_dim=action_dim, normal=normal)
                    offsets[:, :, 0] = 0.0  # candidate 0 is the mean
                order, key = self._order(noise, i, limits.num_candidates), noise.fold(1).fold(i)
                spread = now.sigma[:, None] if now.sigma.dim() == 3 else now.sigma
                actions = (offsets[:, within] * spread).add_(now.mean[:, None])
                if keep:
                    actions[:, 1 : 1 + keep] = _elites(now.actions, now.scores, keep)
                actions.clamp_(-1.0, 1.0)
                if pace is None or self.compile:
                    then, dead, cost = evaluate(state, actions, broken, now.sigma, key, order)
                else:
                    imagine = partial(self._imagine_block, model, state, actions, broken, key)
                    judge = partial(self._judge, model, state, now.sigma, order, looked)
                    (then, dead), cost = in_blocks(imagine, judge, looked, self.min_candidates, pace)
                    looked = pace.looked
                before, now = now.mean, _where(dead, now, then) if dead.any() else then
                spent += cost
                if best is not None:
                    score, chunk = _best(now)
                    better = score > best[0]
                    best = torch.where(better, score, best[0]), torch.where(better[:, None, None], chunk, best[1])
                slowest = max(slowest, time.perf_counter() - begun)
                if self.stop_change is not None and i + 1 < limits.iterations:
                    moving = (now.mean - before).abs().amax(dim=(1, 2)) > self.stop_change
                    if not moving.all():
                        rows = torch.arange(moving.shape[0], device=moving.device) if rows is None else rows
                        done = ~moving
                        settled.append((rows[done], self._found(_rows(now, done), _best_rows(best, done), spent)))
                        rows, now, best = rows[moving], _rows(now, moving), _best_rows(best, moving)
                        if rows.numel() == 0:
                            break
                        state, noise, broken, offsets = state[moving], noise[moving], broken[moving], offsets[moving]
        found = self._found(now, best, spent)
        if rows is not None:
            found = _joined([*settled, (rows, found)] if rows.numel() else settled)
        if any_failed:
            found.actions = found.actions.masked_fill(failed[:, None, None], 0.0)
            found.value = found.value.masked_fill(failed, math.nan)
            if self.choose == "best":
                found.mean = found.actions
        return found

    def _propose(self, clock: ModelClock, state: State, plan_state: PlanState, num: int, noise: NoiseKey) -> Proposal:
        """The proposer's candidates; where asked for, what it asks of the model are compiled functions."""
        if not self.compile:
            return self.proposer(cast(WAM, clock), state, plan_state, num, noise, 0)
        model, rows = cast(WAM, CompiledQueries(clock, self._queries)), noise.row.shape[0]
        at = padding(rows, noise.row.device)
        if at is None:
            return self.proposer(model, state, plan_state, num, noise, 0)
        return first_rows(self.proposer(model, state[at], plan_state[at], num, noise[at], 0), rows)

    def _propose_block(
        self, model: WAM, state: State, plan_state: PlanState, noise: NoiseKey, block: int, first: int, num: int
    ) -> tuple[Tensor, Tensor, Imagined]:
        """`num` candidates of the proposer [R, num, H, A], which of them [R, num] are broken, and their futures."""
        if block:
            noise = noise.fold(LATER).fold(block)
        drawn, key = noise.fold(0), noise.fold(1).fold(0)
        proposal = self.proposer(model, state, plan_state, num, drawn, first)
        actions, broken = _cleaned(proposal.actions)
        if proposal.imagined is None:
            imagined = model.imagine(state, actions, futures=self.futures, noise=key)
            self._check_futures(imagined)
            return actions, broken, imagined
        self._check_futures(proposal.imagined)
        return actions, broken, proposal.imagined

    def _imagine_block(
        self, model: WAM, state: State, actions: Tensor, broken: Tensor, key: NoiseKey, block: int, first: int, num: int
    ) -> tuple[Tensor, Tensor, Imagined]:
        """The candidates `first` to `first + num` of `actions`, which of them are broken, and their futures."""
        part = slice(first, first + num)
        key = key.fold(LATER).fold(block) if block else key
        imagined = model.imagine(state, actions[:, part], futures=self.futures, noise=key)
        return actions[:, part], broken[:, part], imagined

    def _judge(
        self,
        model: WAM,
        state: State,
        sigma: Tensor,
        order: Tensor | None,
        num: int,
        actions: Tensor,
        broken: Tensor,
        imagined: Imagined,
    ) -> tuple[_Iterate, Tensor]:
        """`_refit` of the candidates [R, L, H, A] that were looked at, filled up to `num`."""
        rows, looked = actions.shape[:2]
        if order is not None and looked < num:  # the null control permutes what there is: still one permutation per row
            order = order[order < looked].view(rows, looked)
        now, dead = self._refit(actions, self.scorer(model, state, imagined), broken, sigma, order)
        _wait(now.scores)
        if looked == num:
            return now, dead
        rest = now.scores.new_full((rows, num - looked), -math.inf)
        return now._replace(
            actions=torch.cat([actions, actions[:, :1].expand(-1, num - looked, -1, -1)], dim=1),
            scores=torch.cat([now.scores, rest], dim=1),
            weights=torch.cat([now.weights, torch.zeros_like(rest)], dim=1),
        ), dead

    def _found(self, now: _Iterate, best: tuple[Tensor, Tensor] | None, spent: int) -> _Found:
        """What the last iteration, and the best candidate where that is chosen, come to."""
        if best is not None:
            value, chosen = best
        else:
            value = (now.weights * now.scores.where(now.weights > 0, 0.0)).sum(dim=1)
            chosen = now.mean
        return _Found(
            actions=chosen,
            mean=chosen,
            value=value,
            weights=now.weights,
            candidates=now.actions,
            scores=now.scores,
            evaluations=torch.full((chosen.shape[0],), spent, dtype=torch.int64, device=chosen.device),
        )

    def _check_futures(self, imagined: Imagined) -> None:
        if self.futures is not None and imagined.leaf.batch_size[2] != self.futures:
            raise ValueError(
                f"planner.futures is {self.futures}, but this model imagines {imagined.leaf.batch_size[2]} futures of "
                "each candidate; set planner.futures=null"
            )

    def _search_some(
        self,
        clock: ModelClock,
        state: State,
        plan_state: PlanState,
        noise: NoiseKey,
        limits: _Limits,
        searched: Tensor,
    ) -> _Found:
        """Search the rows where `searched` [B]; the others get the policy's own chunk, and a value of NaN."""
        num = limits.num_candidates
        parts: list[tuple[Tensor, _Found]] = []
        chosen = searched.nonzero()[:, 0]
        skipped = (~searched).nonzero()[:, 0]
        if skipped.numel():
            chunk, spent, broken = policy_chunk(cast(WAM, clock), state[skipped], self.horizon, noise[skipped])
            if broken.any():
                report_failure(broken, 1, self.on_failure, skipped)
            ones = torch.ones(skipped.numel(), device=searched.device)
            policy = _Found(
                actions=chunk,
                mean=chunk,
                value=ones * math.nan,
                weights=ones[:, None].expand(-1, num) / num,
                candidates=chunk[:, None].expand(-1, num, -1, -1),
                scores=ones[:, None].expand(-1, num) * math.nan,
                evaluations=(ones * spent).to(torch.int64),
            )
            parts.append((skipped, policy))
        if chosen.numel():  # last, so that it has what is left of a deadline
            found = self._search(clock, state[chosen], plan_state[chosen], noise[chosen], limits, chosen)
            parts.append((chosen, found))
        return _joined(parts)

    def _evaluate(
        self,
        model: WAM,
        state: State,
        actions: Tensor,
        broken: Tensor,
        sigma: Tensor,
        key: NoiseKey,
        order: Tensor | None,
    ) -> tuple[_Iterate, Tensor, int]:
        """The hot path: imagine `actions`, score them, refit."""
        imagined = model.imagine(state, actions, futures=self.futures, noise=key)
        self._check_futures(imagined)
        iterate, dead = self._refit(actions, self.scorer(model, state, imagined), broken, sigma, order)
        return iterate, dead, imagined.evaluations

    def _refit(
        self, actions: Tensor, scores: Tensor, broken: Tensor, sigma: Tensor, order: Tensor | None
    ) -> tuple[_Iterate, Tensor]:
        """What the scores make of the candidates, and the rows [R] none of whose scores is finite.

        broken: [R, N] candidates with actions that are not finite.
        """
        scores = scores.nan_to_num(-math.inf, -math.inf, -math.inf).masked_fill(broken, -math.inf)
        if order is not None:
            scores = scores.gather(1, order)
        dead = scores.amax(dim=1) == -math.inf
        mean, sigma, weights = self.refit(actions, scores.masked_fill(dead[:, None], 0.0), sigma)
        return _Iterate(actions, scores, mean.clamp(-1.0, 1.0), sigma, weights), dead

    def _normal(self, clock: ModelClock) -> Callable[..., Tensor]:
        """`NoiseKey.normal`, compiled where asked for."""
        if not self.compile:
            return NoiseKey.normal
        if "normal" not in self._queries:
            self._queries["normal"] = compiled(_normal)
        return partial(self._normal_compiled, clock)

    def _normal_compiled(self, clock: ModelClock, noise: NoiseKey, *shape: int) -> Tensor:
        rows = noise.row.shape[0]
        at = padding(rows, noise.row.device)
        noise = _uncompiled(noise if at is None else noise[at])
        return cast(Tensor, run_compiled(self._queries["normal"], clock, noise, *shape))[:rows]

    def _evaluator(self, clock: ModelClock) -> Callable[..., tuple[_Iterate, Tensor, int]]:
        """`_evaluate` bound to the model, compiled where asked for."""
        if not self.compile:
            return partial(self._evaluate, cast(WAM, clock))
        if self._compiled is None:
            self._compiled = compiled(self._evaluate)
        return partial(self._evaluate_compiled, clock)

    def _evaluate_compiled(
        self,
        clock: ModelClock,
        state: State,
        actions: Tensor,
        broken: Tensor,
        sigma: Tensor,
        key: NoiseKey,
        order: Tensor | None,
    ) -> tuple[_Iterate, Tensor, int]:
        """`_evaluate` as a compiled function, on more rows where there is none of as many."""
        rows = actions.shape[0]
        # The first sigma has no rows, a refitted one may have one: each shape would be compiled by itself.
        sigma = sigma.expand_as(actions[:, 0]).contiguous()
        at = padding(rows, actions.device)
        if at is not None:
            state, actions, broken, sigma, key = state[at], actions[at], broken[at], sigma[at], key[at]
            order = None if order is None else order[at]
        iterate, dead, spent = run_compiled(
            self._compiled, clock, state, actions, broken, sigma, _uncompiled(key), order
        )
        if at is None:
            return iterate, dead, spent
        return _Iterate(*(part[:rows] for part in iterate)), dead[:rows], spent

    def _order(self, noise: NoiseKey, iteration: int, num: int) -> Tensor | None:
        return permutation(noise.fold(3).fold(iteration), num) if self.shuffle_scores else None


@dataclass(frozen=True)
class _Limits:
    num_candidates: int
    iterations: int
    started: float
    deadline_s: float | None
    rows: int  # of the plan, searched or not


class _Iterate(NamedTuple):
    """One iteration: candidates [R, N, H, A], scores [R, N], the refitted mean, sigma and weights."""

    actions: Tensor
    scores: Tensor
    mean: Tensor
    sigma: Tensor
    weights: Tensor


@dataclass
class _Found:
    """What a search brings back per row; the fields are those of `Plan`, and `mean` for the next warm start."""

    actions: Tensor
    mean: Tensor
    value: Tensor
    weights: Tensor
    candidates: Tensor
    scores: Tensor
    evaluations: Tensor


def _normal(model: WAM, noise: NoiseKey, *shape: int) -> Tensor:
    return noise.normal(*shape)


def _uncompiled(key: NoiseKey) -> NoiseKey:
    """The same keys, whose draw is a tensor: a number would be compiled into the function, anew for every iteration."""
    return NoiseKey(key.row, key.step, key.seed, torch.as_tensor(key.draw, device=key.row.device))


def policy_chunk(model: WAM, state: State, horizon: int, noise: NoiseKey) -> tuple[Tensor, int, Tensor]:
    """The policy's own chunk [R, H, A], the evaluations per row that it took, and the rows [R] where it is not finite.

    Those rows' chunks are zeros. noise: the keys [R] of the plan.
    """
    device = next(iter(state.values(True, True))).device
    calm = torch.zeros(state.batch_size[0], 1, horizon, model.spec.action_dim, device=device)
    proposal = model.propose(state, 1, mode="ode", noise=noise.fold(SKIPPING), perturbation=calm)
    chunk = proposal.actions[:, 0]
    broken = ~chunk.isfinite().all(dim=-1).all(dim=-1)
    chunk = chunk.nan_to_num().clamp_(-1.0, 1.0).masked_fill(broken[:, None, None], 0.0)
    return chunk, 0 if proposal.imagined is None else proposal.imagined.evaluations, broken


def report_failure(failed: Tensor, candidates: int, on_failure: str, at: Tensor | None = None) -> None:
    """Tell of the rows [R] in which no candidate is finite: an error, or a warning for `on_failure="hold"`.

    at: the numbers [R] that these rows have within the plan; None: 0 to R - 1.
    """
    rows = failed.nonzero()[:, 0]
    error = NonFinitePlanError((rows if at is None else at[rows]).tolist(), candidates)
    if on_failure == "raise":
        raise error
    warnings.warn(f"zero actions in {len(error.rows)} row(s): {error}", RuntimeWarning, stacklevel=3)


@contextlib.contextmanager
def failures_unreported() -> Iterator[None]:
    """Within it `report_failure` neither raises nor warns; for searches before a plan, which will tell of it itself."""
    with contextlib.suppress(NonFinitePlanError), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "zero actions in", RuntimeWarning)
        yield


def check_stop_change(stop_change: float | None, compile: bool) -> None:
    """ValueError for what is no `stop_change`, or goes with nothing compiled."""
    if stop_change is None:
        return
    if not is_number(stop_change) or stop_change < 0:
        raise ValueError(f"planner.stop_change is {stop_change!r}, but must be a finite number from 0, or null")
    if compile:
        raise ValueError(
            "planner.stop_change drops rows from the search as they settle, and planner.compile=true would compile "
            "anew as they become fewer; set one of them to null or false"
        )


def count_plans(plan_state: PlanState) -> Tensor:
    """[B] plans that each row has had in its episode, this one included."""
    return plan_state["plans"] * plan_state["warm"] + 1


def _cleaned(actions: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates [R, N, H, A] as finite actions inside the bounds, and which of them [R, N] were not finite."""
    # Actions are bounded, so a candidate's sum is finite exactly if all of its actions are.
    broken = ~actions.sum(dim=(2, 3)).isfinite()
    actions = actions.clamp(-1.0, 1.0)
    if broken.any():
        actions.nan_to_num_()
    return actions, broken


def _wait(result: Tensor) -> None:
    """Until `result` is there: a GPU computes behind its caller's back, which would make a fast clock."""
    if result.is_cuda:
        torch.cuda.synchronize(result.device)


def _joined(parts: list[tuple[Tensor, _Found]]) -> _Found:
    """The findings of disjoint rows (indices [R'], finding) as one, in the order of the rows."""
    rows = sum(index.numel() for index, _ in parts)
    joined = {}
    for name in (f.name for f in fields(_Found)):
        sample = getattr(parts[0][1], name)
        whole = sample.new_empty(rows, *sample.shape[1:])
        for index, part in parts:
            whole[index] = getattr(part, name)
        joined[name] = whole
    return _Found(**joined)


def _rows(iterate: _Iterate, rows: Tensor) -> _Iterate:
    """The rows [R] of an iterate that are True; what all rows share stays as it is."""
    return _Iterate(*(part[rows] if part.shape[0] == rows.shape[0] and part.dim() > 1 else part for part in iterate))


def _best_rows(best: tuple[Tensor, Tensor] | None, rows: Tensor) -> tuple[Tensor, Tensor] | None:
    return None if best is None else (best[0][rows], best[1][rows])


def _elites(actions: Tensor, scores: Tensor, num: int) -> Tensor:
    """[R, num, H, A] the best candidates, best first; where there are fewer than `num`, the last one repeats."""
    index = scores.nan_to_num(-math.inf).topk(min(num, scores.shape[1]), dim=1).indices
    if index.shape[1] < num:
        index = torch.cat([index, index[:, -1:].expand(-1, num - index.shape[1])], dim=1)
    return actions.gather(1, index[:, :, None, None].expand(-1, -1, *actions.shape[2:]))


def _best(iterate: _Iterate) -> tuple[Tensor, Tensor]:
    """Score [R] and chunk [R, H, A] of the best candidate."""
    score, index = iterate.scores.max(dim=1)
    return score, iterate.actions[torch.arange(index.shape[0], device=index.device), index]


def _where(rows: Tensor, first: _Iterate, second: _Iterate) -> _Iterate:
    """`first` in the rows [R] that are True, `second` elsewhere."""
    parts = []
    for a, b in zip(first, second, strict=True):
        a, b = (x.expand(rows.shape[0], *x.shape[1:]) if x.dim() > 1 else x for x in (a, b))
        parts.append(torch.where(rows.reshape(-1, *[1] * (b.dim() - 1)), a, b) if b.dim() > 1 else b)
    return _Iterate(*parts)
