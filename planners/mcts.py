"""Monte-Carlo tree search over action chunks, for all rows at once (`wamrl.planners.tree`).

An edge is a chunk of actions, a node the model's state after it. In continuous action spaces a proposer makes edges,
more of them the more often a node is visited (progressive widening, Coulom, 2007; they have equal priors, as the
samples of Sampled MuZero, Hubert et al., 2021, arXiv:2104.06303). In discrete ones the edges are all actions, with the
policy's log-probs as priors. The root is searched by sequential halving and the nodes below it by the improved
policy (Gumbel MuZero, Danihelka et al., 2022), or all of it by PUCT (MuZero, Schrittwieser et al., 2020).

Shapes: B rows, R rows that are searched, C slots for children, M sampled futures, H steps of a chunk, A action dims.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from wamrl.interfaces import WAM, Budget, Context, Gate, Imagined, Plan, PlanState, Proposal, State, TreeProposer
from wamrl.naming import is_number, true_or_false, unknown_name, whole_number
from wamrl.noise import NoiseKey
from wamrl.planners.deadlines import KEPT_BACK, check_deadline
from wamrl.planners.gates import Always, ask, check_search_cost, device_of, fresh_memory, gate_cost, memory_after
from wamrl.planners.proposers import (
    MakeTreeProposer,
    PolicyProposer,
    check_part,
    check_sigma,
    coloured_noise,
    match_sigma,
    noise_basis,
)
from wamrl.planners.running import ModelClock, compiled, every_padding, padding, require_compiler, run_compiled
from wamrl.planners.scorers import ReturnScorer, asked_of
from wamrl.planners.shooting import (
    FAILURES,
    check_stop_change,
    count_plans,
    failures_unreported,
    policy_chunk,
    report_failure,
)
from wamrl.planners.tree import BACKUPS, RULES, Statistics, Tree, considered_visits

SEARCHES = tuple(RULES)
BLOCK = 2
"""Simulations whose noise is drawn at once, and between which nothing looks at the clock of a deadline."""
HALVED_DEPTH = 8
"""From that `depth` on compiled searches work on half of the levels for as long as no path is longer."""


class _Root(NamedTuple):
    """What all simulations of a search share.

    tree: the trees. before: [C, R] visits that the roots' children had had before. gumbel: [C, R] noise on their prior
    logits. noise: the simulations', folded by their numbers. one_hot: [A, A] all actions, where they are discrete.
    """

    tree: Tree
    before: Tensor
    gumbel: Tensor
    noise: NoiseKey
    one_hot: Tensor

    def only(self, rows: Tensor) -> _Root:
        """The same of the `rows` [X] alone; see `Tree.only`."""
        return _Root(self.tree.only(rows), self.before[:, rows], self.gumbel[:, rows], self.noise[rows], self.one_hot)


@dataclass(eq=False)
class MCTSPlanner:
    """Tree search with a model that is asked for one chunk per simulation and row.

    proposer: makes the edges of continuous action spaces, from the noise of `sigma` and `basis` that it is given.
    scorer: what an edge pays and what its end is worth; of its risks not "improvement" and "majority",
    which weigh each set of candidates by itself.
    chunk: H steps of an edge. depth: the most edges that a path has. simulations: chunks that are imagined per plan.
    num_candidates: edges of the root that are considered, at most as many as simulations; those of a proposer are
    imagined in one call, which counts as that many simulations.
    search: "gumbel" or "puct". gumbel_scale: of the noise on the root's candidates; 0 plans, 1 explores.
    widening, widening_power: a node below the root that was visited n times has widening * n^widening_power proposed
    edges, rounded down (at least one, at most num_candidates).
    sigma: [1] or [A] standard deviation of the noise that the proposer is given. basis: [H, H] of that noise.
    backup: "mean" of a node's visits, or the "max" of its children: edges are tries, most of them poor, and the best
    will be executed; the mean is the safer one where the model is noisy.
    reuse: keep the subtree behind the executed chunk for the next plan, if exactly that chunk was executed and led to
    where it was imagined to: the measured state and the imagined one are at most `reuse_tolerance` apart (root mean
    square over all numbers of the model's state; whole numbers have to be equal). Kept nodes are not imagined anew, so
    that errors up to that size stay in them.
    stop_change: a row is done once the simulations that are left can move no number of its chosen chunk by more than
    this (in action units), unless the model breaks behind it; None takes all. In PUCT those children can still be
    chosen that they may bring to the most visits, in sequential halving those that are still in the running.
    shuffle_scores: the null control: the root's choice is drawn among the candidates that were searched.
    compile: all simulations as one compiled loop. It imagines a chunk for every row, also for those whose path has
    already ended; these count as evaluations too. The first plan of every power of two of rows compiles, which takes
    half a minute or more, whatever the deadline: `warm_up` before the clock counts, as controllers do.
    on_failure: as in `ShootingPlanner`.

    With several futures M, rewards and values are their means, and a node goes on from one future, drawn per node.
    """

    proposer: TreeProposer
    scorer: ReturnScorer
    gate: Gate
    chunk: int
    depth: int
    simulations: int
    num_candidates: int
    sigma: Tensor
    basis: Tensor
    search: str = "gumbel"
    gumbel_scale: float = 0.0
    backup: str = "max"
    widening: float = 1.0
    widening_power: float = 0.5
    reuse: bool = False
    reuse_tolerance: float = 0.05
    stop_change: float | None = None
    shuffle_scores: bool = False
    compile: bool = False
    on_failure: str = "raise"
    _compiled: Any = field(default=None, init=False, repr=False)
    _compiled_rows: set[int] = field(default_factory=set, init=False, repr=False)
    _keeping_s: dict[int, float] = field(default_factory=dict, init=False, repr=False)
    _remembering_s: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse values that no plan could be made with."""
        for name in ("chunk", "depth", "simulations", "num_candidates"):
            whole_number(f"planner.{name}", getattr(self, name), 1)
        if self.search not in SEARCHES:
            raise unknown_name("planner.search", str(self.search), SEARCHES)
        if self.backup not in BACKUPS:
            raise unknown_name("planner.backup", str(self.backup), BACKUPS)
        if self.on_failure not in FAILURES:
            raise unknown_name("on_failure", str(self.on_failure), FAILURES)
        if not is_number(self.gumbel_scale) or self.gumbel_scale < 0:
            raise ValueError(f"planner.gumbel_scale is {self.gumbel_scale!r}, but must be a number from 0; 1 explores")
        if not is_number(self.reuse_tolerance) or self.reuse_tolerance < 0:
            raise ValueError(f"planner.reuse_tolerance is {self.reuse_tolerance!r}, but must be a number from 0")
        if not is_number(self.widening) or self.widening <= 0:
            raise ValueError(f"planner.widening is {self.widening!r}, but must be a number above 0; 1 is usual")
        if not is_number(self.widening_power) or not 0.0 <= self.widening_power <= 1.0:
            raise ValueError(f"planner.widening_power is {self.widening_power!r}, but must be in [0, 1]; 0.5 is usual")
        for name in ("reuse", "shuffle_scores", "compile"):
            true_or_false(f"planner.{name}", getattr(self, name))
        check_stop_change(self.stop_change, self.compile)
        check_part("gate", self.gate)
        if not isinstance(self.proposer, TreeProposer):
            raise ValueError(
                f"planner.proposer is {type(self.proposer).__name__}, which proposes whole sets of candidates alone, "
                "but a tree asks for the edges of its nodes: it has to have the method `edges` of "
                "wamrl.interfaces.TreeProposer; use proposer@planner.proposer=policy_only, policy, noise or samples"
            )
        if isinstance(self.proposer, PolicyProposer) and self.proposer.warm_share:
            raise ValueError(
                f"planner.proposer.warm_share is {self.proposer.warm_share}, but a tree carries no chunk to the next "
                "plan; leave it 0, planner.reuse=true carries the subtree"
            )
        if self.compile:
            require_compiler()
        if not isinstance(self.scorer, ReturnScorer):
            raise ValueError(
                f"a tree needs the scorer's reward and value apart, which {type(self.scorer).__name__} does not have; "
                "use scorer=return"
            )
        if self.scorer.risk in ("improvement", "majority"):
            raise ValueError(
                f"planner.scorer.risk is {self.scorer.risk}, which weighs each set of candidates by itself, but a tree "
                "compares candidates of different nodes; use mean, lower_bound, worst or cvar"
            )
        if self.scorer.success_value_weight:
            raise ValueError(
                f"planner.scorer.success_value_weight is {self.scorer.success_value_weight}, but a tree backs up "
                "returns alone, beside which a success value is no further guess; leave it null or 0"
            )
        self.scorer = dataclasses.replace(self.scorer, success_value_weight=0.0)  # null would ask models that have it

    @property
    def horizon(self) -> int:
        """H steps of the chunk that is chosen, the most that can be executed before the next plan."""
        return self.chunk

    @property
    def whole_chunk(self) -> int | None:
        """Steps that have to be executed for the subtree to be kept; None where none is."""
        return self.chunk if self.reuse else None

    def check(self, model: WAM) -> None:
        """ValueError when `model` does not answer what this planner asks, or not as far ahead."""
        spec = model.spec
        discrete = spec.action_kind == "discrete"
        needs = {"rollout"} | asked_of(spec, self.scorer) | asked_of(spec, self.gate)
        if discrete:
            needs |= {"policy", "log_prob"}
        else:
            needs |= asked_of(spec, self.proposer)
        if not isinstance(self.gate, Always):
            needs.add("policy")
        spec.require(*sorted(needs))
        if self.chunk > spec.max_horizon:
            raise ValueError(
                f"planner.chunk is {self.chunk} steps, but the model is meant to imagine {spec.max_horizon}; "
                f"set planner.chunk={spec.max_horizon} or less"
            )
        if self.chunk * self.depth > spec.max_horizon:
            raise ValueError(
                f"planner.chunk * planner.depth is {self.chunk} * {self.depth} steps, but the model is meant to "
                f"imagine {spec.max_horizon}; set planner.depth={spec.max_horizon // self.chunk} or less"
            )
        if discrete and self.chunk != 1:
            raise ValueError(f"planner.chunk is {self.chunk}, but discrete actions are searched one by one: set 1")
        if "policy" in needs and self.chunk > spec.chunk_length:
            raise ValueError(f"planner.chunk is {self.chunk}, but the model proposes {spec.chunk_length} steps at most")
        if not discrete:
            match_sigma(self.sigma, spec.action_dim)

    def check_budget(self, model: WAM, budget: Budget) -> None:
        """ValueError when `budget` does not allow one simulation in `model`, or that of the gate never a search."""
        simulations, _ = self._fit(model, budget)
        check_search_cost(self.gate, simulations * model.spec.ensemble_size * self.chunk)

    def initial_state(self, model: WAM, rows: int) -> PlanState:
        """Fresh plan state: `warm` [B], `shift` [B] executed steps, `plans` [B], with `reuse` the subtree that is kept.

        `grown` [B] tells rows whose last plan was a search, and so left a subtree, from those that the gate skipped.
        """
        self.check(model)
        device = device_of(model)
        entries: dict[str, Tensor | TensorDict] = {
            "warm": torch.zeros(rows, dtype=torch.bool, device=device),
            "shift": torch.zeros(rows, dtype=torch.int64, device=device),
            "plans": torch.zeros(rows, dtype=torch.int64, device=device),
            "grown": torch.zeros(rows, dtype=torch.bool, device=device),
        }
        if self.reuse:
            # An observation of zeros shows what the model's state consists of; nothing of it is ever read.
            one = min(rows, 1)
            with torch.no_grad():
                state = model.encode(Context.blank(model.spec, one, device))
            tree = self._tree(model, state, torch.zeros(one, self._slots(model), device=device), self.simulations)
            kept = tree.below(torch.zeros(one, dtype=torch.int64, device=device), self.simulations)
            entries["tree"] = kept.expand(rows).clone() if rows else kept
        entries |= fresh_memory(self.gate, model, rows, self.chunk)
        return TensorDict(entries, batch_size=[rows], device=device)

    @torch.no_grad()
    def plan(
        self, model: WAM, state: State, plan_state: PlanState, noise: NoiseKey, budget: Budget
    ) -> tuple[Plan, PlanState]:
        """Search every row of `state` [B] that the gate lets through; the others follow the policy.

        budget.evaluations is hard: simulations shrink until they fit, and ValueError when not even one does.
        budget.deadline_s: no simulation starts that would end after it (judged by the slowest so far; of the time, what
        keeping the subtree took in the last plan is left); the first call, with all of the root's candidates, always
        runs. The plan state returned has `shift` 1.
        """
        started = time.perf_counter()
        self.check(model)
        simulations, gated = self._fit(model, budget)
        clock = ModelClock(model)
        rows, device = state.batch_size[0], noise.row.device
        if isinstance(self.gate, Always):
            searched = torch.ones(rows, dtype=torch.bool, device=device)
        else:
            cost = simulations * model.spec.ensemble_size * self.chunk
            searched = ask(self.gate, cast(WAM, clock), state, plan_state, noise, cost)
        at = searched.nonzero()[:, 0]
        plan, kept = self._outside(cast(WAM, clock), state, noise, searched, gated), plan_state.copy()
        if at.numel():
            fill = padding(at.numel(), device) if self.compile else None
            taken = at if fill is None else at[fill]
            everyone = taken.numel() == at.numel() == rows
            part = (state, plan_state, noise) if everyone else (state[taken], plan_state[taken], noise[taken])
            found, tree = self._search(clock, *part, at, simulations, started, budget.deadline_s)
            if everyone:
                plan = dataclasses.replace(found, evaluations=found.evaluations + gated) if gated else found
            else:
                plan = _placed(plan, found, at, gated)
            if tree is not None and everyone:
                kept["tree"] = tree
            elif tree is not None:
                whole = plan_state["tree"].clone()
                whole[at] = tree[: at.numel()]
                kept["tree"] = whole
        kept["warm"], kept["grown"] = torch.ones_like(searched), searched.clone()
        kept["plans"] = count_plans(plan_state)
        kept["shift"] = torch.ones(rows, dtype=torch.int64, device=device)
        plan = dataclasses.replace(plan, searched=searched)
        begun = time.perf_counter()
        for name, memory in memory_after(self.gate, cast(WAM, clock), state, plan_state, plan, noise).items():
            kept[name] = memory
        self._remembering_s = time.perf_counter() - begun
        seconds = {"imagine": clock.seconds, "search": time.perf_counter() - started - clock.seconds}
        return dataclasses.replace(plan, seconds=seconds), kept

    @torch.no_grad()
    def warm_up(self, model: WAM, state: State, noise: NoiseKey, budget: Budget) -> None:
        """Compile what plans of as many rows as `state` [R], and of fewer, run; see `wamrl.interfaces.Planner`."""
        if not self.compile:
            return
        simulations, _ = self._fit(model, budget)
        for part, key in every_padding(state, noise):
            rows = torch.arange(key.row.shape[0], device=key.row.device)
            fresh = self.initial_state(model, rows.numel())
            with failures_unreported():
                self._search(ModelClock(model), part, fresh, key, rows, simulations, time.perf_counter(), None)

    # ---- before the search -----------------------------------------------------------------------------------------

    def _fit(self, model: WAM, budget: Budget) -> tuple[int, int]:
        """Simulations that fit the budget, and the evaluations per row that the gate takes."""
        check_deadline(budget)
        gated = gate_cost(self.gate, model, self.chunk)
        if budget.evaluations is None:
            return self.simulations, gated
        each = model.spec.ensemble_size * self.chunk
        affordable = (budget.evaluations - gated) // each
        if affordable < 1:
            raise ValueError(
                f"budget.evaluations is {budget.evaluations} per row, but one chunk of {self.chunk} steps costs {each}"
                + (f" and the gate {gated}" if gated else "") + f"; allow at least {each + gated}"
            )  # fmt: skip
        return min(self.simulations, affordable), gated

    def _slots(self, model: WAM) -> int:
        if model.spec.action_kind == "discrete":
            return model.spec.action_dim
        return min(self.num_candidates, self.simulations)

    def _outside(self, model: WAM, state: State, noise: NoiseKey, searched: Tensor, gated: int) -> Plan:
        """The plan of rows that the gate keeps from the search: the policy's own chunk, and a value of NaN."""
        rows, slots = searched.shape[0], self._slots(model)
        device = searched.device
        chunk = torch.zeros(rows, self.chunk, model.spec.action_dim, device=device)
        evaluations = torch.zeros(rows, dtype=torch.int64, device=device)
        skipped = (~searched).nonzero()[:, 0]
        if skipped.numel():
            chunk[skipped], spent, broken = policy_chunk(model, state[skipped], self.chunk, noise[skipped])
            evaluations[skipped] = spent + gated
            if broken.any():
                report_failure(broken, 1, self.on_failure, skipped)
        return Plan(
            actions=chunk,
            value=torch.full((rows,), math.nan, device=device),
            weights=torch.full((rows, slots), 1.0 / slots, device=device),
            candidates=chunk[:, None].expand(-1, slots, -1, -1).clone(),
            scores=torch.full((rows, slots), math.nan, device=device),
            evaluations=evaluations,
            searched=searched,
        )

    def _tree(self, model: WAM, state: State, logits: Tensor, limit: int) -> Tree:
        value = torch.zeros(logits.shape[0], device=logits.device)
        if "value" in self.scorer.needs:
            value = model.value(state).mean(dim=-1).nan_to_num(0.0, 0.0, 0.0) * self.scorer.value_weight
        sampled = model.spec.action_kind != "discrete"
        return Tree(
            state,
            logits,
            value,
            num_nodes=limit + 1 + (self.simulations if self.reuse else 0),
            edge=(self.chunk, model.spec.action_dim),
            rule=RULES[self.search],
            backup=self.backup,
            open_slots=self._widened if sampled else None,
        )

    def _widened(self, visits: Tensor) -> Tensor:
        return (self.widening * visits**self.widening_power).floor().clamp(1.0, self.num_candidates)

    # ---- the search ------------------------------------------------------------------------------------------------

    def _search(
        self,
        clock: ModelClock,
        state: State,
        plan_state: PlanState,
        noise: NoiseKey,
        at: Tensor,
        simulations: int,
        started: float,
        deadline_s: float | None,
    ) -> tuple[Plan, TensorDict | None]:
        """Search every row of `state` [R]; the first ones have the numbers `at` within the plan, the others fill up."""
        model = cast(WAM, clock)
        rows, device = state.batch_size[0], noise.row.device
        discrete = model.spec.action_kind == "discrete"
        slots = self._slots(model)
        one_hot = torch.eye(model.spec.action_dim, device=device)
        logits = self._logits(model, state, one_hot) if discrete else torch.zeros(rows, slots, device=device)
        tree = self._tree(model, state, logits, self.simulations)
        deepest = 0 if discrete else 1  # edges to the deepest node
        if self.reuse:
            warm = (
                plan_state["warm"]
                & plan_state["grown"]
                & (plan_state["shift"] == self.chunk)
                & (plan_state["tree", "number"] > 0)
                & (_distance(state, plan_state["tree", "state"][:, 0]) <= self.reuse_tolerance)
            )
            if warm.any():
                tree.graft(plan_state["tree"], warm.nonzero()[:, 0])
                deepest = self.depth
        considered = min(self.num_candidates, slots, simulations)
        spent = torch.zeros(rows, dtype=torch.int64, device=device)
        before = tree.statistics(tree.base).counts
        done = 0
        if not discrete:
            spent += self._open_root(model, tree, state, considered, noise.fold(0))
            # What came from the last tree has been looked at as often as what has just been imagined: once.
            before = (before - 1.0).clamp_min(0.0)
            done = considered
        whole = root = _Root(tree, before, self._gumbel(noise.fold(2), slots).t(), noise.fold(1), one_hot)
        # As long as the most simulations, so that one function is compiled for all budgets.
        offsets = torch.zeros(rows, self.simulations, self.chunk, model.spec.action_dim, device=device)
        schedule = considered_visits(considered, simulations)
        visits = torch.zeros(self.simulations, dtype=torch.int64, device=device)
        visits[:simulations] = torch.tensor(schedule, device=device)
        left = torch.arange(rows, device=device)  # the rows that go on
        ends = math.inf if deadline_s is None else started + (1.0 - KEPT_BACK) * deadline_s - self._reserve_s(tree)
        slowest, i = time.perf_counter() - started, done
        while i < simulations:
            begun = time.perf_counter()
            if self.stop_change is not None and i > 0:
                going = ~self._settled(root, simulations - i, schedule[i])
                if not going.all():
                    tree.put_back(root.tree, left)
                    left, offsets = left[going], offsets[going]
                    root = whole.only(left)
                if left.numel() == 0:
                    break
            # A simulation takes less than the root, whose time is all that is known before the first one.
            if i > 0 and begun + slowest > ends:
                break
            if i == done:
                slowest = 0.0
            whole_run = deadline_s is None and self.stop_change is None
            stop = simulations if whole_run else min(i + BLOCK, simulations)
            if not discrete:
                for j in range(i, stop, BLOCK):
                    num = min(BLOCK, simulations - j)
                    offsets[:, j : j + num] = self._offsets(model, noise[left].fold(4).fold(j), num)
            if self.compile:
                taken, deepest = self._run_compiled(clock, root, visits, offsets, i, stop, deepest)
            else:
                taken = self._simulations(model, root, visits, offsets, i, stop)
            spent[left] += taken
            i = stop
            slowest = max(slowest, time.perf_counter() - begun)
        begun = time.perf_counter()
        tree.put_back(root.tree, left)
        found = self._finish(whole, spent, noise.fold(3), at)
        self._keeping_s[rows] = time.perf_counter() - begun
        return found

    def _reserve_s(self, tree: Tree) -> float:
        """Seconds of a deadline that are left for subtrees and the gate's memory, as in the last plan.

        Of a first plan with `reuse` the former are tried out.
        """
        if self.reuse and tree.rows not in self._keeping_s:
            begun = time.perf_counter()
            tree.below(torch.zeros_like(tree.base), self.simulations)
            self._keeping_s[tree.rows] = time.perf_counter() - begun
        return self._keeping_s.get(tree.rows, 0.0) + self._remembering_s

    def _simulations(self, model: WAM, root: _Root, visits: Tensor, offsets: Tensor, start: int, stop: int) -> Tensor:
        """The simulations `start` to `stop` - 1 per row; evaluations [R] that they took.

        visits: [S] of the root's child that each goes to. offsets: [R, S, H, A].
        """
        spent = torch.zeros_like(root.tree.base)
        for i, goal in enumerate(visits.tolist()[start:stop], start):
            spent += self._simulate(model, root, goal, offsets[:, i : i + 1], i, self.depth)[0]
        return spent

    def _run_compiled(
        self, clock: ModelClock, root: _Root, visits: Tensor, offsets: Tensor, start: int, stop: int, deepest: int
    ) -> tuple[Tensor, int]:
        """`_simulations`, compiled, of trees whose nodes are `deepest` edges from the root at most; and the new depth.

        All levels of a path are worked on, whether or not it has as many: so of deep trees the first simulations run in
        a function of half of the levels.
        """
        if self._compiled is None:
            # Numbers gathered from a tree are read often: kept, not gathered anew by each reader.
            self._compiled = compiled(self._compilable, realize_reads_threshold=1)
        rows, device = root.tree.rows, root.tree.base.device
        first = rows not in self._compiled_rows
        spent, number = torch.zeros_like(root.tree.base), torch.tensor(start)
        depth = torch.tensor(deepest, device=device)
        # Elsewhere than on a CPU, to look at the depth would stop the loop in every simulation.
        halved = [self.depth // 2] if self.depth >= HALVED_DEPTH and device.type == "cpu" else []
        for levels in (*halved, self.depth):
            # The first time all of them, so that none is compiled in the middle of a later plan.
            if first or (int(number) < stop and (int(depth) < levels or levels == self.depth)):
                # Numbers would be compiled into the function; only `levels` is.
                work = root, visits, offsets, number, torch.tensor(stop), depth, levels
                number, taken, depth = run_compiled(self._compiled, clock, *work)
                spent = spent + taken
        self._compiled_rows.add(rows)
        return spent, int(depth)

    def _compilable(
        self,
        model: WAM,
        root: _Root,
        visits: Tensor,
        offsets: Tensor,
        start: Tensor,
        stop: Tensor,
        deepest: Tensor,
        levels: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Simulations from `start` [] on, up to `stop` [] - 1, as long as no path has more than `levels` edges.

        Returns the number [] of the next one, evaluations [R], and how deep [] the trees are then. visits, offsets: as
        in `_simulations`.
        """

        def more(number: Tensor, spent: Tensor, deepest: Tensor) -> Tensor:
            return (number < stop) if levels == self.depth else (number < stop) & (deepest < levels)

        def simulate(number: Tensor, spent: Tensor, deepest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            at = number.view(1).to(visits.device)  # the counter stays on the CPU, where the loop asks for it
            goal, offset = visits.index_select(0, at), offsets.index_select(1, at)
            taken, edges = self._simulate(model, root, goal, offset, number, levels)
            return number + 1, spent + taken, torch.maximum(deepest, edges.max())

        carried = start, torch.zeros_like(root.tree.base), deepest
        if torch.compiler.is_compiling():
            from torch._higher_order_ops.while_loop import while_loop  # seconds to import, so only where it is needed

            return cast(tuple[Tensor, Tensor, Tensor], while_loop(more, simulate, carried))
        while more(*carried):
            carried = simulate(*carried)
        return carried

    def _offsets(self, model: WAM, noise: NoiseKey, num: int) -> Tensor:
        """[R, N, H, A] noise for the proposer."""
        drawn = coloured_noise(noise, self.basis.to(noise.row.device), num, action_dim=model.spec.action_dim)
        return drawn * self.sigma.to(noise.row.device)

    def _gumbel(self, noise: NoiseKey, slots: int) -> Tensor:
        """[R, C] noise on the prior logits of the root's children."""
        if self.gumbel_scale == 0.0:
            return torch.zeros(noise.row.shape[0], slots, device=noise.row.device)
        return -torch.log(-torch.log(noise.uniform(slots))) * self.gumbel_scale

    def _open_root(self, model: WAM, tree: Tree, state: State, num: int, noise: NoiseKey) -> int:
        """Imagine `num` proposed chunks from the roots in one call, as their first children; evaluations per row."""
        slot = torch.arange(num, device=noise.row.device)
        offsets = self._offsets(model, noise, num)
        proposal = self._propose(model, state, slot.expand(tree.rows, -1), offsets, noise)
        imagined = self._imagined(model, state, proposal, noise.fold(1))
        reward, discount, value = self.scorer.edge(model, imagined)
        leaf = _one_future(imagined, noise.fold(2))
        edges = tree.base[:, None] * tree.slots + slot
        free = tree.target[edges] == tree.trash[:, None]  # others are kept from the last plan
        nodes = tree.add(
            None,
            edges,
            state=leaf,
            action=proposal.actions.clamp(-1.0, 1.0),
            reward=reward,
            discount=discount,
            value=value,
            wanted=free,
        )
        tree.count_at_root(edges, nodes)
        return imagined.evaluations

    def _simulate(
        self, model: WAM, root: _Root, visits: int | Tensor, offset: Tensor, number: int | Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """The simulation of that number per row, with `offset` [R, 1, H, A]; evaluations and edges of its path, [R].

        visits: of the root's child that it goes to, by the schedule. depth: the most edges.
        """
        tree, noise = root.tree, root.noise.fold(number)
        path = tree.descend(self._first(root, visits), depth)
        # Nothing is imagined behind the deepest nodes, and where all of the root's children are dead.
        wanted = (path.leaf == tree.trash) & tree.is_open(path.end)
        leaf, end, rows = path.leaf, path.end, None
        if not torch.compiler.is_compiling() and not wanted.all():
            rows = wanted.nonzero()[:, 0]
            end, offset, noise = end[rows], offset[rows], noise[rows]
        spent = wanted.long()
        if end.numel():
            node = end // tree.slots
            slot, state = (end - node * tree.slots)[:, None], tree.state_of(node)
            discrete = model.spec.action_kind == "discrete"
            if discrete:
                proposal = Proposal(actions=root.one_hot[slot][:, :, None])
            else:
                proposal = self._propose(model, state, slot, offset, noise)
            imagined = self._imagined(model, state, proposal, noise.fold(1))
            reward, discount, value = self.scorer.edge(model, imagined)
            reached = _one_future(imagined, noise.fold(2))
            at = tree.add(
                rows,
                end[:, None],
                state=reached,
                action=None if discrete else proposal.actions.clamp(-1.0, 1.0),
                reward=reward,
                discount=discount,
                value=value,
                logits=self._logits(model, reached, root.one_hot)[:, None] if discrete else None,
                wanted=wanted[:, None] if rows is None else torch.ones_like(slot, dtype=torch.bool),
            )[:, 0]
            leaf = torch.where(wanted, at, leaf) if rows is None else leaf.index_copy(0, rows, at)
            spent = (torch.ones_like(spent) if rows is None else spent) * imagined.evaluations
        tree.back_up(path, leaf)
        return spent, path.last + 1

    def _propose(self, model: WAM, state: State, slots: Tensor, offsets: Tensor, noise: NoiseKey) -> Proposal:
        """The proposer's chunks [X, N, H, A] for the edges `slots` [X, N] of the states [X]; NaN where not finite."""
        proposal = self.proposer.edges(model, state, slots, offsets, noise.fold(0))
        shape, asked = [*proposal.actions.shape], [*slots.shape, self.chunk, model.spec.action_dim]
        if shape != asked:
            longer = len(shape) == 4 and shape[2] != self.chunk
            raise ValueError(
                f"{type(self.proposer).__name__} proposes edges of shape {shape}, but was asked for {asked}: rows, "
                "edges of each, steps of a chunk, action dims" + (f"; set planner.chunk={shape[2]}" if longer else "")
            )
        # Clamped, infinity would be an action like others; NaN stays, and closes the edge.
        finite = proposal.actions.where(proposal.actions.isfinite(), math.nan)
        return dataclasses.replace(proposal, actions=finite)

    def _imagined(self, model: WAM, state: State, proposal: Proposal, noise: NoiseKey) -> Imagined:
        if proposal.imagined is not None:
            return proposal.imagined
        return model.imagine(state, proposal.actions.nan_to_num().clamp(-1.0, 1.0), noise=noise)

    def _logits(self, model: WAM, state: State, one_hot: Tensor) -> Tensor:
        """[R, A] the policy's log-probs of all discrete actions in the R states [R] or [R, 1]."""
        if len(state.batch_size) == 2:
            state = _taken(state, (slice(None), 0))
        chain = one_hot[:, None, None].expand(state.batch_size[0], -1, 2, 1, -1)
        proposal = Proposal(actions=chain[:, :, 0], chain=chain, times=torch.arange(2.0, device=one_hot.device))
        return model.log_prob(state, proposal).sum(dim=-1).nan_to_num(-1e9, 1e9, -1e9).log_softmax(dim=1)

    def _first(self, root: _Root, visits: int | Tensor) -> Tensor:
        """[R] the root's slot that a simulation starts with; `visits` of it that the schedule wants to see."""
        tree = root.tree
        if self.search == "puct":
            return tree.preferred.max(dim=0).indices
        counts, wanted = self._wanted(root, visits)
        return (root.gumbel + tree.preferred).masked_fill(counts != wanted, -math.inf).max(dim=0).indices

    def _wanted(self, root: _Root, visits: int | Tensor) -> tuple[Tensor, Tensor]:
        """Visits [C, R] of the roots' children in this plan, inf of the dead, and [R] of the one that is gone to next.

        visits: of that one, by the schedule.
        """
        tree = root.tree
        counts = tree.counts[tree.base].t() - root.before
        counts = counts.masked_fill(tree.preferred == -math.inf, math.inf)
        # Fewer children may be left than the schedule thinks: then the least visited ones.
        return counts, torch.where((counts == visits).any(dim=0), visits, counts.amin(dim=0))

    def _ranked(self, root: _Root) -> tuple[Statistics, Tensor, Tensor]:
        """What is known of the roots, visits [C, R] of their children as far as they count, and ranks [C, R] of those.

        The highest is chosen; -inf is none.
        """
        tree = root.tree
        now = tree.statistics(tree.base)
        visited = now.counts > 0
        # Sequential halving counts what this plan has visited; PUCT goes by all visits, those of a kept subtree too.
        counts = (now.counts if self.search == "puct" else now.counts - root.before).masked_fill(~visited, -math.inf)
        ranking = root.gumbel + tree.preferred if self.search == "gumbel" else now.q
        return now, counts, ranking.masked_fill(~visited | (counts < counts.amax(dim=0)), -math.inf)

    def _candidates(self, root: _Root) -> Tensor:
        """[R, C, H, A] the chunks behind the roots' slots."""
        tree = root.tree
        if tree.open_slots is None:  # the actions are discrete
            return root.one_hot.expand(tree.rows, -1, -1)[:, :, None]
        return tree.action[tree.target.view(-1, tree.slots)[tree.base]]

    def _settled(self, root: _Root, left: int, goal: int) -> Tensor:
        """[R] bool, rows whose chunk the `left` simulations that remain can move by at most `stop_change`.

        goal: visits of the child that the next one goes to, by the schedule, which never falls.
        """
        assert self.stop_change is not None
        _, counts, ranking = self._ranked(root)
        if self.search == "puct":
            possible = counts.clamp_min(0.0) + left >= counts.amax(dim=0)
        else:
            visits, wanted = self._wanted(root, goal)
            possible = visits >= wanted
        possible = possible & (root.tree.preferred > -math.inf)
        candidates = self._candidates(root)
        each = torch.arange(root.tree.rows, device=counts.device)
        moved = (candidates - candidates[each, ranking.argmax(dim=0)][:, None]).abs().amax(dim=(2, 3))
        return ((moved <= self.stop_change) | ~possible.t()).all(dim=1)

    def _finish(self, root: _Root, spent: Tensor, noise: NoiseKey, at: Tensor) -> tuple[Plan, TensorDict | None]:
        """The root's choice, and the subtree behind it for the next plan."""
        tree, wanted = root.tree, at.numel()
        now, counts, ranking = self._ranked(root)
        visited = now.counts > 0
        failed = ~visited.any(dim=0)
        if failed[:wanted].any():
            report_failure(failed[:wanted], tree.slots, self.on_failure, at)
        if self.shuffle_scores:
            ranking = noise.uniform(tree.slots).t().masked_fill(~visited, -math.inf)
        chosen = ranking.argmax(dim=0)
        if self.search == "gumbel":
            weights = torch.softmax(tree.preferred, dim=0)
        else:
            weights = counts.clamp_min(0.0) / counts.clamp_min(0.0).sum(dim=0).clamp_min(1.0)
        weights = weights.t().where(~failed[:, None], 1.0 / tree.slots)
        candidates = self._candidates(root)
        each = torch.arange(tree.rows, device=chosen.device)
        plan = Plan(
            actions=candidates[each, chosen].masked_fill(failed[:, None, None], 0.0),
            value=now.q[chosen, each].masked_fill(failed, math.nan),
            weights=weights,
            candidates=candidates,
            scores=now.q.masked_fill(~visited, -math.inf).t(),
            evaluations=spent,
            searched=~failed,
            tree=lambda row: tree.of_row(row, chosen),
        )
        return plan, tree.below(chosen, self.simulations) if self.reuse else None


def _distance(state: State, other: State) -> Tensor:
    """[R] root mean square difference over all numbers of two states [R]; infinite where whole numbers differ."""
    total, count = torch.zeros(state.batch_size[0], device=next(iter(state.values(True, True))).device), 0
    for key in state.keys(True, True):
        gap = (state[key] != other[key]) if not state[key].is_floating_point() else state[key] - other[key]
        gap = gap.flatten(1) if gap.dim() > 1 else gap[:, None]
        if gap.dtype == torch.bool:
            total = total.masked_fill(gap.any(dim=1), math.inf)
        else:
            total, count = total + gap.square().sum(dim=1), count + gap.shape[1]
    return (total / max(count, 1)).sqrt()


def _one_future(imagined: Imagined, noise: NoiseKey) -> State:
    """[R, N] one of the M futures that each candidate ended in, drawn per candidate."""
    rows, num, futures = imagined.leaf.batch_size
    if futures == 1:
        return _taken(imagined.leaf, (slice(None), slice(None), 0))
    drawn = (noise.uniform(num) * futures).long().clamp_max(futures - 1)
    row = torch.arange(rows, device=drawn.device)[:, None]
    return imagined.leaf[row, torch.arange(num, device=drawn.device), drawn]


def _taken(state: State, index: tuple[Any, ...]) -> State:
    """`state[index]`, where a number follows slices: several times quicker than to index the TensorDict."""
    size = state.batch_size[: len(index) - 1]
    return TensorDict({key: entry[index] for key, entry in state.items()}, batch_size=size)


def _placed(whole: Plan, part: Plan, at: Tensor, gated: int) -> Plan:
    """`whole` with the rows `at` [R] replaced by the first R of `part`."""
    placed = {}
    for name in ("actions", "value", "weights", "candidates", "scores", "evaluations"):
        mine = getattr(whole, name).clone()
        mine[at] = getattr(part, name)[: at.numel()] + (gated if name == "evaluations" else 0)
        placed[name] = mine
    number = {row: i for i, row in enumerate(at.tolist())}
    grown = part.tree
    assert grown is not None
    return dataclasses.replace(whole, **placed, tree=lambda row: grown(number[row]) if row in number else None)


def make_mcts(
    *,
    chunk: int = 2,
    depth: int = 4,
    simulations: int = 48,
    num_candidates: int = 16,
    search: str = "gumbel",
    gumbel_scale: float = 0.0,
    backup: str = "max",
    widening: float = 1.0,
    widening_power: float = 0.5,
    proposer: MakeTreeProposer | None = None,
    sigma: float | Sequence[float] = 0.05,
    correlation: float = 0.7,
    scorer: ReturnScorer | None = None,
    gate: Gate | None = None,
    reuse: bool = False,
    reuse_tolerance: float = 0.05,
    stop_change: float | None = None,
    shuffle_scores: bool = False,
    compile: bool = False,
    on_failure: str = "raise",
) -> MCTSPlanner:
    """MCTS as `configs/planner/mcts.yaml` builds it; the defaults are the same.

    proposer: makes the proposer from H, sigma and basis: `PolicyProposer`, where edges follow the policy (None: with
    `behaviour_share=0`, no edge follows the behaviour prior), `NoiseProposer` or `SampleProposer`, or a
    `functools.partial` of one with settings of its own.
    sigma: one number, or one per action dim. correlation: of the noise of neighbouring steps, in [0, 1).
    scorer: None is `ReturnScorer()`. gate: None searches always. The rest: see `MCTSPlanner`.
    """
    whole_number("planner.chunk", chunk, 1)
    if sigma is None:
        raise ValueError("planner.sigma is null, but must be a number; proposer@planner.proposer=samples takes samples")
    spread, basis = check_sigma(sigma, "planner.sigma"), noise_basis(chunk, correlation)
    make = partial(PolicyProposer, behaviour_share=0.0) if proposer is None else proposer
    check_part("proposer", make)
    return MCTSPlanner(
        proposer=make(horizon=chunk, sigma=spread, basis=basis),
        scorer=ReturnScorer() if scorer is None else scorer,
        gate=Always() if gate is None else gate,
        chunk=chunk,
        depth=depth,
        simulations=simulations,
        num_candidates=num_candidates,
        search=search,
        gumbel_scale=gumbel_scale,
        backup=backup,
        widening=widening,
        widening_power=widening_power,
        sigma=spread,
        basis=basis,
        reuse=reuse,
        reuse_tolerance=reuse_tolerance,
        stop_change=stop_change,
        shuffle_scores=shuffle_scores,
        compile=compile,
        on_failure=on_failure,
    )
