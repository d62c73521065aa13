"""Tree search: trees worked by hand, agreement with mctx, and promises beyond the conformance suite."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import shutil
from functools import partial
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from wamrl.interfaces import Budget, Imagined, Plan, Proposal
from wamrl.noise import NoiseKey
from wamrl.planners import (
    MCTSPlanner,
    NoiseProposer,
    NonFinitePlanError,
    PolicyProposer,
    ReturnScorer,
    SampleProposer,
    make_mcts,
)
from wamrl.planners.conformance import plan_once
from wamrl.planners.toys import BrokenWAM, TabularWAM, ToyWAM, quadratic
from wamrl.planners.tree import RULES, Statistics, Tree, considered_visits

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mctx.json").read_text(encoding="utf-8"))


def test_the_defaults_in_python_are_those_of_the_yaml() -> None:
    settings = yaml.safe_load((resources.files("wamrl.configs") / "planner" / "mcts.yaml").read_text(encoding="utf-8"))
    assert settings.pop("_target_") == f"{make_mcts.__module__}.{make_mcts.__name__}"
    settings.pop("defaults")
    defaults = {name: option.default for name, option in inspect.signature(make_mcts).parameters.items()}
    assert settings == {k: v for k, v in defaults.items() if k not in ("proposer", "scorer", "gate")}


# ---------------------------------------------------------------------------------------------------- golden trees


def watched(planner: MCTSPlanner) -> list[Tree]:
    """The trees that `planner` makes, as they are when it is done with them."""
    trees: list[Tree] = []
    make = planner._tree
    planner._tree = lambda *arguments: trees.append(make(*arguments)) or trees[-1]  # type: ignore[method-assign]
    return trees


@pytest.mark.parametrize(
    ("name", "problem"), [(name, i) for name, s in GOLDEN["settings"].items() for i in range(len(s["problems"]))]
)
def test_trees_are_those_of_mctx(name: str, problem: int) -> None:
    """Visits are equal, values to rounding, on the problems and noise of benchmarks/make_mctx_golden.py."""
    setting = GOLDEN["settings"][name]
    golden = setting["problems"][problem]
    tables = [torch.tensor(golden[key]) for key in ("transition", "reward", "value", "logits")]
    model = TabularWAM(*tables, discount=GOLDEN["discount"])
    planner = make_mcts(
        chunk=1,
        depth=GOLDEN["depth"],
        simulations=setting["simulations"],
        num_candidates=setting["considered"],
        search=setting["search"],
        gumbel_scale=setting["gumbel_scale"],
        backup="mean",
    )
    planner._gumbel = lambda noise, slots: torch.tensor(golden["gumbel"])  # type: ignore[method-assign]
    trees = watched(planner)
    rows = len(golden["action"])
    state = model.state(torch.arange(rows))
    plan, _ = planner.plan(model, state, planner.initial_state(model, rows), NoiseKey.for_rows(rows), Budget())
    tree = trees[0]
    assert tree.counts[tree.base].tolist() == golden["visits"]
    visited = torch.tensor(golden["visits"]) > 0
    torch.testing.assert_close(tree.q[tree.base][visited], torch.tensor(golden["q"])[visited], atol=2e-4, rtol=0)
    torch.testing.assert_close(tree.value[tree.base], torch.tensor(golden["root_value"]), atol=2e-4, rtol=0)
    torch.testing.assert_close(plan.weights, torch.tensor(golden["weights"]), atol=2e-4, rtol=0)
    if setting["search"] == "gumbel":  # mctx's PUCT draws its action from the visits
        assert plan.actions[:, 0].argmax(dim=1).tolist() == golden["action"]
    assert (plan.evaluations <= setting["simulations"]).all()


def bandit_tree() -> TabularWAM:
    """Action 0 pays 1 and leads to a poor state; action 1 pays nothing at first, and 4 by action 0 in the next step.

    States: 0 the root, 1 after action 0 (both actions pay 0), 2 after action 1 (pays 4, 0), 3 the end.
    """
    return TabularWAM(
        torch.tensor([[1, 2], [3, 3], [3, 3], [3, 3]]),
        torch.tensor([[1.0, 0.0], [0.0, 0.0], [4.0, 0.0], [0.0, 0.0]]),
        torch.tensor([0.5, 0.0, 1.0, 0.0]),
        torch.zeros(4, 2),
        discount=0.5,
    )


def test_a_bandit_tree_worked_by_hand() -> None:
    """Four simulations of PUCT with equal priors, mean back-ups, discount 1/2.

    1. All unvisited: the first action. r = 1, V(1) = 0, so q(0) = 1; the root's mean is (0.5 + 1) / 2 = 0.75.
    2. Root: known q = (1, 0.75 for the unvisited), own 0.75: scaled (1, 0). Prior part 1.25 * 0.5 * sqrt(2) / (1 + n)
       = 0.884 / 2 and 0.884: scores 1.442 and 0.884. Action 0 again, then state 1's first action: r = 0, V(3) = 0.
       State 1's mean stays 0, q(0) = 1, the root's mean is (0.5 + 1 + 1) / 3 = 0.8333.
    3. Scaled (1, 0); prior part 1.25 * 0.5 * sqrt(3) = 1.083, / 3 = 0.361, / 1: scores 1.361 and 1.083: action 0 again.
       State 1: q of its first action 0, all values 0, priors sqrt(2) * 0.625 / (2, 1): its second action. The root's
       mean is (0.5 + 1 + 1 + 1) / 4 = 0.875.
    4. Prior part 1.25 * 0.5 * 2 = 1.25, / 4 = 0.3125, / 1: scores 1.3125 and 1.25 (+ small log terms): action 0 again.
    5. Prior part 1.25 * 0.5 * sqrt(5) = 1.398, / 5 = 0.280, / 1: scores 1.280 and 1.398: action 1 at last. r = 0,
       V(2) = 1, so q(1) = 0.5; the root's mean is (0.5 + 4 * 1 + 0.5) / 6 = 0.8333.
    """
    model = bandit_tree()
    planner = make_mcts(chunk=1, depth=3, simulations=5, num_candidates=2, search="puct", backup="mean")
    trees = watched(planner)
    state = model.state(torch.tensor([0]))
    plan, _ = planner.plan(model, state, planner.initial_state(model, 1), NoiseKey.for_rows(1), Budget())
    tree = trees[0]
    assert tree.counts[0].tolist() == [4.0, 1.0] and tree.q[0].tolist() == pytest.approx([1.0, 0.5])
    assert tree.value[0].item() == pytest.approx(5.0 / 6.0) and tree.visits[0] == 6
    assert tree.child[0].tolist() == [1, 5] and tree.child[1].tolist() == [2, 3]
    assert plan.actions[0, 0].tolist() == [1.0, 0.0] and plan.weights[0].tolist() == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize("search", ["gumbel", "puct"])
@pytest.mark.parametrize("backup", ["mean", "max"])
def test_deeper_search_finds_what_pays_later(search: str, backup: str) -> None:
    """Worth 0.5 * 4 = 2 by action 1, 1 by action 0; the values at depth 1 say 0.5 and 1."""
    model = bandit_tree()
    state = model.state(torch.tensor([0, 0]))
    for depth, best in ((1, 0), (3, 1)):
        planner = make_mcts(
            chunk=1, depth=depth, simulations=60, num_candidates=2, search=search, backup=backup, reuse=False
        )
        plan, _ = planner.plan(model, state, planner.initial_state(model, 2), NoiseKey.for_rows(2), Budget())
        assert plan.actions[:, 0].argmax(dim=1).tolist() == [best, best]
    if backup == "max":
        torch.testing.assert_close(plan.value, torch.tensor([2.0, 2.0]))


def test_sequential_halving_visits_as_in_the_paper() -> None:
    """16 simulations, 4 considered: 2 rounds, 2 each for four, then 4 each for two (Danihelka et al., 2022)."""
    assert considered_visits(4, 16) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert considered_visits(1, 3) == [0, 1, 2]
    assert considered_visits(8, 4) == [0, 0, 0, 0]


@pytest.mark.parametrize(("pays", "best"), [(0.0, 0), (0.75, 0), (1.5, 1)])
def test_the_step_that_ends_an_episode_pays_and_nothing_after_it(pays: float, best: int) -> None:
    """Action 1 would lead to a state that is worth 1 and pays 4, but ends the episode; action 0 pays 1."""
    ends = torch.zeros(4, 2, dtype=torch.bool)
    ends[0, 1] = True
    model = bandit_tree()
    model.reward_of[0, 1] = pays
    dying = TabularWAM(model.transition, model.reward_of, model.value_of, model.logits, discount=0.5, ends=ends)
    state = dying.state(torch.tensor([0]))
    imagined = dying.imagine(state, torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])[None, None])
    assert imagined.alive is not None and imagined.alive.flatten().tolist() == [1.0, 0.0, 0.0]
    for depth in (1, 3):
        planner = make_mcts(chunk=1, depth=depth, simulations=40, num_candidates=2)
        plan, _ = planner.plan(dying, state, planner.initial_state(dying, 1), NoiseKey.for_rows(1), Budget())
        assert plan.actions[0, 0].argmax() == best and plan.scores[0].tolist() == pytest.approx([1.0, pays])


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")  # torch's own, on import
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("backup", "depth"), [("max", 8), *(pytest.param("mean", depth, marks=pytest.mark.slow) for depth in (2, 8))]
)
def test_compiled_simulations_grow_the_same_trees(backup: str, depth: int) -> None:
    """Single edges break the model, and both behind state 4, where row 2 starts; paths end at `depth`; two plans."""
    model = TabularWAM(
        torch.tensor([[1, 2], [3, 3], [3, 4], [3, 3], [4, 4]]),
        torch.tensor([[1.0, 0.0], [0.5, math.inf], [4.0, 5.0], [0.0, math.nan], [math.nan, math.nan]]),
        torch.tensor([0.5, 0.0, 1.0, 0.0, 0.0]),
        torch.zeros(5, 2),
        discount=0.5,
    )
    state = model.state(torch.tensor([0, 2, 4, 1]))  # a power of two, so that no row is added
    trees: list[list[Tree]] = []
    for compile in (False, True):
        planner = make_mcts(
            chunk=1, depth=depth, simulations=24, num_candidates=2, backup=backup, compile=compile, on_failure="hold"
        )
        trees.append(watched(planner))
        for step in range(2):
            with pytest.warns(RuntimeWarning, match="zero actions in 1 row"):
                planner.plan(model, state, planner.initial_state(model, 4), NoiseKey.for_rows(4, step=step), Budget())
    for eager, compiled in zip(*trees, strict=True):
        inside = torch.ones_like(eager.parent, dtype=torch.bool)
        inside[eager.trash] = False
        for name in ("parent", "child", "visits", "counts", "dead"):
            assert torch.equal(getattr(eager, name)[inside], getattr(compiled, name)[inside]), name
        for name in ("value", "q"):
            torch.testing.assert_close(getattr(eager, name)[inside], getattr(compiled, name)[inside])
        ends = eager.of_row(0, torch.zeros(4, dtype=torch.int64))["parent"]
        deep = torch.zeros_like(ends)
        for node in range(1, ends.numel()):
            deep[node] = deep[ends[node]] + 1
        # Beyond half of a deep tree's levels, on which its first simulations are compiled to work.
        assert deep.max() == depth


# ------------------------------------------------------------------------------------------------ sampled edges


def test_sampled_edges_widen_with_the_visits_and_the_first_is_the_policys() -> None:
    model = quadratic(torch.tensor([0.3, -0.6]), gain=torch.tensor([[0.2], [0.1]]), discount=0.9)
    planner = make_mcts(chunk=2, depth=4, simulations=200, num_candidates=8, sigma=0.4, widening_power=0.5)
    trees = watched(planner)
    plan_once(planner, model, torch.ones(2, 1))
    tree = trees[0]
    inner = torch.ones(tree.counts.shape[0], dtype=torch.bool)
    inner[tree.base], inner[tree.trash] = False, False
    children, visits = (tree.child >= 0).sum(dim=1)[inner], tree.visits[inner]
    assert (children <= visits.sqrt().floor().clamp(1, 8)).all() and children.max() >= 4
    assert ((tree.child >= 0).sum(dim=1)[tree.base] == 8).all()
    # Slots fill in order, slot 0 with the policy's own chunk (0.2, 0.1 everywhere here).
    policy = torch.tensor([0.2, 0.1]).expand(2, 2)
    for parent in inner.nonzero()[:, 0].tolist() + tree.base.tolist():
        filled = tree.child[parent] >= 0
        assert filled.sum() == filled.long().cumprod(dim=0).sum()
        if filled[0]:
            base = parent // (tree.num_nodes + 1) * (tree.num_nodes + 1)
            torch.testing.assert_close(tree.action[base + tree.child[parent, 0]], policy)


def test_counts_of_a_tree_add_up() -> None:
    model = quadratic(torch.tensor([0.3, -0.6]), discount=0.9)
    planner = make_mcts(chunk=2, depth=3, simulations=100, num_candidates=8, sigma=0.4, backup="mean")
    trees = watched(planner)
    found, _ = plan_once(planner, model, torch.zeros(3, 1))
    tree = trees[0]
    assert (tree.visits[tree.base] == 101).all() and (tree.counts[tree.base].sum(dim=1) == 100).all()
    nodes = torch.cat([base + torch.arange(int(size)) for base, size in zip(tree.base, tree.size, strict=True)])
    leaf = tree.counts[nodes].sum(dim=1) == 0
    depth_of = torch.zeros(tree.parent.shape[0], dtype=torch.int64)
    for node in nodes.tolist():
        base = node // (tree.num_nodes + 1) * (tree.num_nodes + 1)
        if node != base:
            depth_of[node] = depth_of[base + tree.parent[node]] + 1
    assert depth_of.max() == 3
    # A node is visited once when it is made and once per visit of its children; the deepest ones by revisits.
    inner = depth_of[nodes] < 3
    assert torch.equal(tree.visits[nodes][inner], 1 + tree.counts[nodes][inner].sum(dim=1))
    assert (leaf | inner).all() and torch.equal(found.evaluations, (tree.size - 1) * 2)


def test_a_subtree_goes_on_in_the_next_plan_as_if_the_search_had_not_stopped() -> None:
    """The kept nodes have the same actions, visits and values where all went as imagined."""
    model = ToyWAM(
        lambda z, a: z + 0.2 * a,
        lambda z, a, new: -(new - 0.5).square().sum(dim=-1),
        lambda z: -3.0 * (z - 0.5).square().sum(dim=-1),
        state_dim=2,
        action_dim=2,
    )
    planner = make_mcts(chunk=2, depth=4, simulations=64, num_candidates=8, sigma=0.5, reuse=True)
    trees = watched(planner)
    z = torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.2, 0.9]])
    first, after = plan_once(planner, model, z)
    chosen = first.actions
    for step in range(2):
        z = model.transition(z, chosen[:, step])
    after["shift"] = torch.tensor([2, 2, 1])
    second, _ = planner.plan(model, model.state(z), after, NoiseKey.for_rows(3, step=2), Budget())
    old, new = trees[-2], trees[-1]
    assert (second.evaluations <= 64 * 2).all()  # what was kept is not imagined anew, nor paid for
    for row, kept in enumerate((True, True, False)):
        number = int(after["tree", "number"][row]) if kept else 1
        assert not kept or number > 2
        for n in range(1, number):
            node = int(new.base[row]) + n
            mother = int(new.base[row] + new.parent[node])
            assert 0 <= int(new.parent[node]) < n
            assert int((new.child[mother] == n).sum()) == 1
            # Its latent is what its action leads to from its mother's, as if imagined just now.
            state = new.states["z"][mother]
            for step in range(2):
                state = model.transition(state, new.action[node, step])
            torch.testing.assert_close(state, new.states["z"][node], atol=1e-5, rtol=1e-5)
            assert new.visits[node] >= after["tree", "node"][row, n, 0]
        root_visits = float(new.visits[new.base[row]])
        assert root_visits > 65 if kept else root_visits == 65
    cold, _ = planner.plan(
        model, model.state(z), planner.initial_state(model, 3), NoiseKey.for_rows(3, step=2), Budget()
    )
    assert torch.equal(cold.actions[2], second.actions[2])
    assert old.num_nodes == new.num_nodes == 64 * 2 + 1


def test_a_subtree_is_dropped_where_the_world_went_another_way() -> None:
    """Row 0 went as imagined, row 1 nearly so, row 2 was pushed: its plan is that of a search without a past."""
    model = ToyWAM(
        lambda z, a: z + 0.2 * a,
        lambda z, a, new: -(new - 0.5).square().sum(dim=-1),
        lambda z: -3.0 * (z - 0.5).square().sum(dim=-1),
        state_dim=2,
        action_dim=2,
    )
    planner = make_mcts(chunk=2, depth=3, simulations=32, num_candidates=8, sigma=0.5, reuse=True, reuse_tolerance=0.1)
    trees = watched(planner)
    z = torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.2, 0.9]])
    first, after = plan_once(planner, model, z)
    z = model.transition(model.transition(z, first.actions[:, 0]), first.actions[:, 1])
    after["shift"] = torch.full((3,), 2)
    # Root mean squares of 0, 0.05 and 0.3.
    z = z + torch.tensor([[0.0, 0.0], [0.05, -0.05], [0.3, 0.3]])
    noise = NoiseKey.for_rows(3, step=2)
    second, _ = planner.plan(model, model.state(z), after, noise, Budget())
    kept = trees[-1].visits[trees[-1].base].tolist()
    assert kept[0] > 33 and kept[1] > 33 and kept[2] == 33
    cold, _ = planner.plan(model, model.state(z), planner.initial_state(model, 3), noise, Budget())
    assert torch.equal(cold.actions[2], second.actions[2]) and torch.equal(cold.value[2], second.value[2])
    with pytest.raises(ValueError, match="reuse_tolerance is -1"):
        make_mcts(reuse_tolerance=-1.0)


def test_a_subtree_over_discrete_states_is_kept_only_where_the_state_is_the_same() -> None:
    model = bandit_tree()
    planner = make_mcts(chunk=1, depth=2, simulations=12, num_candidates=2, reuse=True, backup="mean")
    trees = watched(planner)
    state, fresh = model.state(torch.zeros(2, dtype=torch.int64)), planner.initial_state(model, 2)
    first, after = planner.plan(model, state, fresh, NoiseKey.for_rows(2), Budget())
    there = model.transition[0, first.actions[0, 0].argmax()]
    elsewhere = (there + 1) % model.reward_of.shape[0]
    planner.plan(model, model.state(torch.stack([there, elsewhere])), after, NoiseKey.for_rows(2, step=1), Budget())
    kept = trees[-1].visits[trees[-1].base].tolist()
    assert kept[0] > 13 and kept[1] == 13


def test_a_subtree_that_does_not_fit_is_cut_from_its_young_end() -> None:
    model = quadratic(torch.tensor([0.3]), discount=0.9)
    planner = make_mcts(chunk=1, depth=8, simulations=16, num_candidates=2, sigma=0.5, reuse=True)
    trees = watched(planner)
    state, plan_state = model.state(torch.zeros(2, 1)), planner.initial_state(model, 2)
    for step in range(12):
        plan, plan_state = planner.plan(model, state, plan_state, NoiseKey.for_rows(2, step=step), Budget())
        assert plan.actions.isfinite().all() and (plan_state["tree", "number"] <= 16).all()
        tree = trees[-1]
        assert (tree.size <= tree.num_nodes).all()
        counted = tree.counts > 0
        counted[tree.trash] = False
        assert (tree.child[counted] >= 0).all() and not tree.dead.any()


def test_a_deadline_leaves_time_for_keeping_the_subtree(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: a call of the model takes 1 s, to keep the subtrees 5 s, and there are 20 s."""
    now = [0.0]

    class Slow(ToyWAM):
        def roll(self, *arguments):  # type: ignore[no-untyped-def]
            now[0] += 1.0
            return super().roll(*arguments)

    def below(tree: Tree, *arguments):  # type: ignore[no-untyped-def]
        now[0] += 5.0
        return keep(tree, *arguments)

    keep = Tree.below
    monkeypatch.setattr(Tree, "below", below)
    monkeypatch.setattr("wamrl.planners.mcts.time", SimpleNamespace(perf_counter=lambda: now[0]))
    model = quadratic(torch.tensor([0.3]), discount=0.9)
    model.__class__ = Slow
    planner = make_mcts(chunk=1, depth=8, simulations=64, num_candidates=4, sigma=0.5, reuse=True)
    state, plan_state = model.state(torch.zeros(2, 1)), planner.initial_state(model, 2)
    for step in range(3):  # the first plan also tries what keeping takes
        begun = now[0]
        noise = NoiseKey.for_rows(2, step=step)
        plan, plan_state = planner.plan(model, state, plan_state, noise, Budget(deadline_s=20.0))
        assert 16.0 <= now[0] - begun <= 20.0, step
        assert (plan.evaluations >= (8 if step == 0 else 12)).all()


# ------------------------------------------------------------------------------------------------ plan and refusals


def test_rows_that_the_gate_skips_follow_the_policy() -> None:
    model = quadratic(torch.tensor([0.3, -0.6]), gain=torch.tensor([[0.2], [0.1]]), discount=0.9)

    def gate(model, state, plan_state, noise):
        return torch.tensor([True, False, True])

    options = dict(chunk=2, depth=2, simulations=32, num_candidates=8, sigma=0.4)
    plan, after = plan_once(make_mcts(**options, gate=gate), model, torch.ones(3, 1))  # type: ignore[arg-type]
    alone, _ = plan_once(make_mcts(**options), model, torch.ones(3, 1))  # type: ignore[arg-type]
    assert plan.searched.tolist() == [True, False, True] and plan.value[1].isnan()
    torch.testing.assert_close(plan.actions[1], torch.tensor([0.2, 0.1]).expand(2, 2))
    torch.testing.assert_close(plan.actions[[0, 2]], alone.actions[[0, 2]])
    assert after["grown"].tolist() == [True, False, True]


def test_a_plan_tells_the_tree_of_each_row_that_was_searched() -> None:
    """Rows 0 and 2 are searched; their trees have the plan's value at the chosen node, and no row else has one."""

    class Some:
        needs = frozenset({"policy"})

        def __call__(self, model, state, plan_state, noise):  # type: ignore[no-untyped-def]
            return torch.tensor([True, False, True])

    model = quadratic(torch.tensor([0.3]), discount=0.9)
    planner = make_mcts(chunk=1, depth=3, simulations=12, num_candidates=4, sigma=0.5, gate=Some())
    plan, _ = plan_once(planner, model, torch.tensor([[0.1], [0.2], [0.3]]))
    assert plan.tree is not None and plan.tree(1) is None
    for row in (0, 2):
        tree = plan.tree(row)
        assert tree is not None
        nodes = tree.batch_size[0]
        assert tree["parent"][0] == -1 and (tree["parent"][1:] < torch.arange(1, nodes)).all()
        assert tree["visits"][0] == 13 and tree["state"]["z"][0] == (0.1 if row == 0 else 0.3)
        (chosen,) = tree["chosen"].nonzero()[:, 0].tolist()
        assert tree["parent"][chosen] == 0
        for node in range(nodes):  # a node was visited once itself, and then through its children
            through = tree["visits"][tree["parent"] == node].sum()
            assert tree["visits"][node] >= 1 + through


def test_a_model_that_breaks_everywhere_holds_where_that_is_asked_for() -> None:
    model = BrokenWAM(torch.tensor([0.3, -0.6]), lambda z, a: z[..., 0] > 0, math.nan)
    planner = make_mcts(chunk=1, depth=2, simulations=8, num_candidates=4, on_failure="hold")
    with pytest.warns(RuntimeWarning, match=r"zero actions in 1 row"):
        plan, _ = plan_once(planner, model, torch.tensor([[0.0], [1.0]]))
    assert (plan.actions[1] == 0).all() and plan.value[1].isnan() and plan.value[0].isfinite()
    with pytest.raises(NonFinitePlanError, match=r"row\(s\) \[1\]"):
        plan_once(make_mcts(chunk=1, depth=2, simulations=8, num_candidates=4), model, torch.tensor([[0.0], [1.0]]))


def test_shuffled_choices_lose() -> None:
    model, z = quadratic(torch.tensor([0.3, -0.6]), discount=0.9), torch.zeros(32, 1)
    options = dict(chunk=1, depth=1, simulations=64, num_candidates=64, sigma=0.5)
    regrets: list[torch.Tensor] = []
    plans: list[Plan] = []
    for shuffle in (False, True):
        plan, _ = plan_once(make_mcts(**options, shuffle_scores=shuffle), model, z)  # type: ignore[arg-type]
        regrets.append((plan.actions - torch.tensor([0.3, -0.6])).square().mean())
        plans.append(plan)
    assert regrets[0] * 5 < regrets[1] and torch.equal(plans[0].evaluations, plans[1].evaluations)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk is 0"),
        ({"depth": 0}, "depth is 0"),
        ({"simulations": 0}, "simulations is 0"),
        ({"num_candidates": 0}, "num_candidates is 0"),
        ({"search": "gumble"}, "did you mean 'gumbel'"),
        ({"backup": "maximum"}, "backup"),
        ({"gumbel_scale": -1.0}, "gumbel_scale is -1"),
        ({"widening": 0.0}, "widening is 0"),
        ({"widening_power": 2.0}, "widening_power is 2"),
        ({"sigma": 0.0}, "sigma is 0"),
        ({"sigma": None}, "sigma is null.*proposer@planner.proposer=samples"),
        ({"proposer": "noise"}, "proposer is 'noise', but must be an object"),
        ({"proposer": partial(PolicyProposer, warm_share=0.5)}, "warm_share is 0.5, but a tree carries no chunk"),
        (
            {"scorer": ReturnScorer(risk="improvement")},
            "risk is improvement, which weighs each set of candidates by itself",
        ),
        ({"scorer": ReturnScorer(risk="majority")}, "risk is majority.*use mean, lower_bound, worst or cvar"),
        ({"scorer": ReturnScorer(success_value_weight=2.0)}, "success_value_weight is 2.0, but a tree"),
        ({"scorer": ReturnScorer(value_weight=0, reward_weight=0, success_weight=0)}, "are all 0: no candidate"),
        ({"on_failure": "ignore"}, "Known: hold, raise"),
        ({"gumbel_scale": "1"}, "gumbel_scale is '1', but must be a number from 0"),
        ({"reuse_tolerance": True}, "reuse_tolerance is True, but must be a number from 0"),
        ({"widening": "1"}, "widening is '1', but must be a number above 0"),
        ({"widening_power": "0.5"}, "widening_power is '0.5', but must be in"),
        ({"reuse": "no"}, "planner.reuse is 'no', but must be true or false"),
        ({"shuffle_scores": "no"}, "planner.shuffle_scores is 'no', but must be true or false"),
        ({"stop_change": -0.1}, "stop_change is -0.1, but must be a finite number from 0"),
        ({"stop_change": 0.1, "compile": True}, "stop_change drops rows.*planner.compile=true would compile anew"),
    ],
)
def test_values_out_of_range_are_refused_at_construction(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mcts(**options)


def test_models_that_it_cannot_serve_are_refused() -> None:
    model = quadratic(torch.tensor([0.3]))
    with pytest.raises(ValueError, match=r"3 \* 11 steps.*imagine 32; set planner.depth=10"):
        make_mcts(chunk=3, depth=11).initial_state(model, 1)
    with pytest.raises(ValueError, match=r"chunk is 33 steps.*imagine 32; set planner.chunk=32 or less"):
        make_mcts(chunk=33, depth=1).initial_state(model, 1)
    with pytest.raises(ValueError, match="chunk is 5, but the model proposes 4"):
        make_mcts(chunk=5, depth=1).initial_state(model, 1)
    with pytest.raises(ValueError, match="sigma has 2 entries"):
        make_mcts(sigma=[0.1, 0.2]).initial_state(model, 1)
    with pytest.raises(ValueError, match="discrete actions are searched one by one: set 1"):
        make_mcts(chunk=2).initial_state(bandit_tree(), 1)


@pytest.mark.parametrize("search", RULES)
def test_a_rule_reads_each_node_alone_and_ignores_the_scale_of_values(search: str) -> None:
    rule = RULES[search]
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 4, (5, 6), generator=draw).float()
    now = Statistics(
        visits=1.0 + counts.sum(dim=0),
        value=torch.randn(6, generator=draw),
        raw_value=torch.randn(6, generator=draw),
        counts=counts,
        q=torch.randn(5, 6, generator=draw) * (counts > 0),
        logits=torch.randn(5, 6, generator=draw).log_softmax(dim=0),
    )
    whole = rule.choose(now, rule.prefer(now))
    for i in range(6):
        one = Statistics(*(part[..., i : i + 1] for part in now))
        torch.testing.assert_close(rule.choose(one, rule.prefer(one)), whole[:, i : i + 1])
    scaled = now._replace(value=now.value * 64, raw_value=now.raw_value * 64, q=now.q * 64)
    torch.testing.assert_close(rule.choose(scaled, rule.prefer(scaled)), whole)
    assert whole.shape == (5, 6)


def test_a_branch_that_is_broken_stays_out_of_the_search_also_in_the_next_plan() -> None:
    """The model breaks for a[0] > 0.5 in every state; no node lies behind such an edge, and none is tried twice."""
    target = torch.tensor([0.3, -0.6])
    model = BrokenWAM(target, lambda z, a: a[..., 0] > 0.5, math.nan)
    planner = make_mcts(chunk=1, depth=4, simulations=60, num_candidates=12, sigma=0.6, reuse=True)
    trees = watched(planner)
    state, plan_state = model.state(torch.zeros(3, 1)), planner.initial_state(model, 3)
    for step in range(4):
        plan, plan_state = planner.plan(model, state, plan_state, NoiseKey.for_rows(3, step=step), Budget())
        tree = trees[-1]
        assert tree.dead.any() and (tree.action[..., 0] <= 0.5).all()
        dead = tree.dead.clone()
        dead[tree.trash] = False
        assert (tree.counts[dead] == 0).all() and (tree.child[dead] < 0).all()
        assert (plan.actions[..., 0] <= 0.5).all() and plan.value.isfinite().all()


def test_a_dead_first_slot_opens_the_next_one() -> None:
    """Behind z = 0.5 the policy's own chunk (zeros) breaks the model, and nothing else does."""
    model = ToyWAM(
        lambda z, a: z + 0.5 * a,
        lambda z, a, new: torch.where((z > 0.5).all(dim=-1) & (a == 0).all(dim=-1), math.nan, new[..., 0]),
        lambda z: z[..., 0],
        state_dim=1,
        action_dim=1,
    )
    planner = make_mcts(chunk=1, depth=4, simulations=60, num_candidates=8, sigma=0.6)
    trees = watched(planner)
    plan, _ = plan_once(planner, model, torch.tensor([[1.0], [0.0], [2.0]]))
    tree = trees[0]
    wide = tree.dead[:, 0].clone()
    assert wide.sum() > 5 and not tree.dead[:, 1:].any()
    assert (tree.child[wide, 0] < 0).all() and (tree.child[wide, 1] >= 0).float().mean() > 0.5
    died = tree.dead.sum(dim=1).view(3, -1).sum(dim=1)
    assert torch.equal(plan.evaluations, tree.size - 1 + died), "an edge was imagined twice"
    assert torch.equal(tree.visits[tree.base], 61.0 - died)  # one that ends in nothing does not count
    assert (plan.actions > 0).all()


@pytest.mark.parametrize("backup", ["mean", "max"])
@pytest.mark.parametrize("search", ["gumbel", "puct"])
def test_a_node_without_a_living_child_is_dead(search: str, backup: str) -> None:
    """State 1 promises 9, but both of its actions break the model; state 2 goes on to the end, state 3."""
    model = TabularWAM(
        torch.tensor([[1, 2], [3, 3], [3, 3], [3, 3]]),
        torch.tensor([[1.0, 0.0], [math.nan, math.inf], [4.0, 0.0], [0.0, 0.0]]),
        torch.tensor([0.5, 9.0, 1.0, 0.0]),
        torch.zeros(4, 2),
        discount=0.5,
    )
    planner = make_mcts(chunk=1, depth=3, simulations=40, num_candidates=2, search=search, backup=backup)
    trees = watched(planner)
    state = model.state(torch.tensor([0, 2]))
    plan, _ = planner.plan(model, state, planner.initial_state(model, 2), NoiseKey.for_rows(2), Budget())
    tree = trees[0]
    assert tree.dead[tree.base].tolist() == [[True, False], [False, False]] and tree.dead.sum() == 3
    assert plan.actions[:, 0].argmax(dim=1).tolist() == [1, 0] and plan.value.isfinite().all()
    assert tree.visits[tree.base].tolist() == [39.0, 41.0]  # two simulations ended in nothing
    if backup == "max":
        assert plan.value[0] == 2.0


def test_nothing_more_is_imagined_when_all_is_dead() -> None:
    nan = torch.full((1, 2), math.nan)
    model = TabularWAM(torch.zeros(1, 2, dtype=torch.int64), nan, torch.zeros(1), torch.zeros(1, 2))
    planner = make_mcts(chunk=1, depth=3, simulations=40, num_candidates=2, on_failure="hold")
    state = model.state(torch.tensor([0]))
    with pytest.warns(RuntimeWarning, match="zero actions in 1 row"):
        plan, _ = planner.plan(model, state, planner.initial_state(model, 1), NoiseKey.for_rows(1), Budget())
    assert plan.evaluations.tolist() == [2] and (plan.actions == 0).all()


def test_samples_of_the_policy_and_their_futures_draw_from_different_keys() -> None:
    keys: list[NoiseKey] = []

    class Watching(ToyWAM):
        def propose(self, state, num, *, noise=None, **options) -> Proposal:
            keys.append(noise)
            return Proposal(super().propose(state, num, **options).actions)

        def imagine(self, state, actions, *, noise=None, **options) -> Imagined:
            keys.append(noise)
            return super().imagine(state, actions, **options)

    model = quadratic(torch.tensor([0.3]))
    model.__class__ = Watching
    plan_once(make_mcts(simulations=8, num_candidates=4, proposer=SampleProposer), model, torch.zeros(1, 1))
    drawn = [
        (key.fold(i).normal(4) if fold else key.normal(4)).tolist() for key in keys for fold, i in ((0, 0), (1, 1))
    ]
    assert len(keys) == 11 and len({str(numbers) for numbers in drawn}) == len(drawn)


# ---------------------------------------------------------------------------------------------------- proposers


class Corners:
    """A proposer for trees alone: slot c of every node is the corner of [-1, 1]^2 with that number, held."""

    def __init__(self, *, horizon, sigma, basis):
        self.horizon, self.table = horizon, torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])

    def edges(self, model, state, slots, perturbation, noise):
        return Proposal(actions=self.table[slots][:, :, None].expand(-1, -1, self.horizon, -1))


def drifting(**options) -> ToyWAM:
    """A point that is moved by the actions towards (1, -1), where it is best; the policy brings it to 0."""
    goal = torch.tensor([1.0, -1.0])
    return ToyWAM(
        lambda z, a: z + 0.2 * a,
        lambda z, a, new: -(new - goal).square().sum(dim=-1),
        lambda z: -3.0 * (z - goal).square().sum(dim=-1),
        state_dim=2,
        action_dim=2,
        gain=-0.5 * torch.eye(2),
        **options,
    )


SMALL = dict(chunk=2, depth=3, simulations=24, num_candidates=4)


def test_a_proposer_of_ones_own_makes_every_edge_of_a_tree():
    """No policy is asked; the node behind slot c was reached by corner c, at the root as below."""
    planner = make_mcts(**SMALL, proposer=Corners)
    trees = watched(planner)
    plan, _ = plan_once(planner, drifting(leave_out=("policy",)), torch.zeros(2, 2))
    tree, table = trees[0], planner.proposer.table
    node, slot = (tree.child >= 0).nonzero().unbind(dim=1)
    reached = node // (tree.num_nodes + 1) * (tree.num_nodes + 1) + tree.child[node, slot]
    assert reached.numel() == int((tree.size - 1).sum()) and reached.numel() > 2 * 4 + 16
    assert torch.equal(tree.action[reached], table[slot][:, None].expand(-1, 2, -1))
    assert torch.equal(plan.actions, table[1].expand(2, 2, 2))


def test_a_proposer_that_cannot_make_edges_is_refused_at_construction():
    class Shooting:
        def __init__(self, **options):
            pass

        def __call__(self, *arguments):
            raise AssertionError("was asked")

    with pytest.raises(ValueError, match=r"Shooting, which proposes whole sets.*method `edges`.*policy_only"):
        make_mcts(proposer=Shooting)


def test_edges_around_zero_need_no_policy_and_may_be_longer_than_its_chunks():
    planner = make_mcts(**{**SMALL, "chunk": 5}, proposer=NoiseProposer, sigma=0.5)
    plan, _ = plan_once(planner, drifting(leave_out=("policy",)), torch.ones(2, 2))
    assert plan.actions.shape == (2, 5, 2) and (plan.candidates[:, 0] == 0).all()
    assert (plan.candidates[:, 1:] != 0).all() and (plan.candidates.abs() <= 1).all()
    with pytest.raises(ValueError, match="does not answer 'policy'"):
        make_mcts(**SMALL).initial_state(drifting(leave_out=("policy",)), 1)


@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (1, 4, 2, 2), (2, 4, 2, 1), (2, 4, 4), (2, 4, 3, 2)])
def test_edges_of_another_shape_than_was_asked_for_are_refused(shape):
    class Others(Corners):
        def edges(self, *arguments):
            return Proposal(actions=torch.zeros(shape))

    hint = "; set planner.chunk=3" if shape == (2, 4, 3, 2) else "action dims$"
    message = re.escape(f"Others proposes edges of shape {list(shape)}, but was asked for [2, 4, 2, 2]") + ".*" + hint
    with pytest.raises(ValueError, match=message):
        plan_once(make_mcts(**SMALL, proposer=Others), drifting(), torch.zeros(2, 2))


def test_samples_of_the_policy_are_edges_as_they_are():
    model, z = drifting(spread=0.3), torch.ones(2, 2)
    one, _ = plan_once(make_mcts(**SMALL, proposer=SampleProposer, sigma=0.5), model, z)
    other, _ = plan_once(make_mcts(**SMALL, proposer=SampleProposer, sigma=0.1), model, z)
    assert torch.equal(one.candidates, other.candidates)  # spread is the policy's own affair
    policy = model.propose(model.state(z), 1, mode="ode").actions[:, :, :2]
    assert torch.equal(one.candidates[:, :1], policy)  # the root's first edge is the deterministic chunk
    assert 0.05 < (one.candidates[:, 1:] - policy).std() < 0.6 and (one.candidates[:, 1:] != policy).all()


def test_part_of_a_roots_edges_follow_the_behaviour_prior_where_that_is_asked_for():
    """It is the opposite of the policy, and right here: the policy goes to 0, away from the goal."""
    model, z = drifting(behaviour=True), torch.tensor([[0.5, -0.5]])
    calm = {**SMALL, "num_candidates": 6, "sigma": 1e-4}
    default, _ = plan_once(make_mcts(**calm), model, z)
    mixed, _ = plan_once(make_mcts(**calm, proposer=PolicyProposer), model, z)
    assert default.candidates[..., 0].max() < 0 < default.candidates[..., 1].min()
    assert mixed.candidates[0, :, 0, 0].sign().tolist() == [-1.0] * 3 + [1.0] * 3
    assert mixed.candidates[0, 3, 0].tolist() == [0.25, -0.25]  # one of them without noise
    assert (mixed.actions[..., 0] > 0).all() and mixed.value > default.value


@pytest.mark.parametrize("proposer", [PolicyProposer, NoiseProposer, SampleProposer, Corners])
def test_edges_of_every_proposer_are_made_within_the_compiled_loop(proposer, monkeypatch):
    """One graph for two plans; its trees are those without."""
    graphs = []

    class Uncounted:
        """To count along would be a Python object that changes, which a compiled loop must not have."""

        def __getitem__(self, key):
            return 0

        def __setitem__(self, key, value):
            pass

    def compiled(function, **options):
        def compile_graph(graph, inputs):
            graphs.append(graph)
            return graph.forward

        return torch.compile(function, fullgraph=True, dynamic=False, backend=compile_graph)

    monkeypatch.setattr("wamrl.planners.mcts.compiled", compiled)
    monkeypatch.setattr("wamrl.planners.mcts.require_compiler", lambda: None)
    model, z = drifting(), torch.tensor([[0.5, -0.5], [0.0, 0.0]])
    model.counts = Uncounted()
    plans = []
    for compile in (False, True):
        planner = make_mcts(**{**SMALL, "chunk": 1}, proposer=proposer, sigma=0.3, compile=compile)
        fresh, keys = planner.initial_state(model, 2), [NoiseKey.for_rows(2, step=step) for step in (0, 1)]
        plans.append([planner.plan(model, model.state(z), fresh, key, Budget())[0] for key in keys])
    for eager, quick in zip(*plans, strict=True):
        torch.testing.assert_close(quick.candidates, eager.candidates)
        torch.testing.assert_close(quick.value, eager.value)
    assert len(graphs) == 1


# ---------------------------------------------------------------------------------------------------- early stop


def test_a_lead_that_cannot_be_made_up_ends_the_search():
    """The bandit tree above: four simulations of PUCT go to action 0, and only two are left for action 1."""
    model = bandit_tree()
    options = dict(chunk=1, depth=3, simulations=6, num_candidates=2, search="puct", backup="mean")
    planner = make_mcts(**options, stop_change=0.0)
    trees = watched(planner)
    plan, _ = planner.plan(
        model, model.state(torch.tensor([0])), planner.initial_state(model, 1), NoiseKey.for_rows(1), Budget()
    )
    assert plan.evaluations.tolist() == [4] and trees[0].counts[0].tolist() == [4.0, 0.0]
    assert plan.actions[0, 0].tolist() == [1.0, 0.0] and plan.weights[0].tolist() == [1.0, 0.0]


SPREAD = torch.linspace(-2.0, 2.0, 12).repeat(2, 1).t() * torch.tensor([1.0, -0.5])


@pytest.mark.parametrize("search", ["gumbel", "puct"])
@pytest.mark.parametrize("change", [0.0, 0.3])
def test_what_an_early_stop_leaves_out_moves_no_chunk_further_than_that(search: str, change: float):
    """Where nothing may change, the chunks are the same to the last bit; rows that go on have the same plan."""
    options = dict(chunk=2, depth=3, simulations=48, num_candidates=8, search=search, sigma=0.3)
    asked, plans, trees = [], [], []
    for stop_change in (None, change):
        model, planner = drifting(), make_mcts(**options, stop_change=stop_change)
        trees.append(watched(planner))
        plans.append(plan_once(planner, model, SPREAD)[0])
        asked.append(model.counts["transitions"])
    whole, stopped = plans
    assert (stopped.actions - whole.actions).abs().max() <= change + 1e-6
    assert [int(plan.evaluations.sum()) for plan in plans] == asked, "what was not imagined was not spent"
    assert (stopped.evaluations <= whole.evaluations).all()
    if search == "puct" or change:
        assert asked[1] < 0.95 * asked[0]
    for row, tree in enumerate(zip(*(t[0].visits[t[0].base].tolist() for t in trees), strict=True)):
        if tree[0] == tree[1]:
            torch.testing.assert_close(stopped.scores[row], whole.scores[row], atol=1e-5, rtol=0)
    assert plan_once(make_mcts(**options, stop_change=9.0), drifting(), SPREAD)[0].evaluations.tolist() == [16] * 12


@pytest.mark.parametrize("search", ["gumbel", "puct"])
def test_rows_stop_as_they_would_alone(search: str):
    """Also where single edges break the model, and where a subtree is kept; a stopped row keeps its subtree too."""
    target = torch.tensor([0.3, -0.6])
    model = BrokenWAM(target, lambda z, a: a[..., 0] > 0.5, math.nan)
    planner = make_mcts(
        chunk=1, depth=3, simulations=40, num_candidates=8, search=search, sigma=0.4, stop_change=0.2, reuse=True
    )
    rows, ended = torch.arange(6), []
    noise, plan_state = NoiseKey.for_rows(6), planner.initial_state(model, 6)
    alone = [planner.initial_state(model, 1) for _ in rows]
    for step in range(3):
        key = NoiseKey(noise.row, noise.step + step)
        plan, plan_state = planner.plan(model, model.state(torch.zeros(6, 1)), plan_state, key, Budget())
        ended += plan.evaluations.tolist()
        for i in rows.tolist():
            one, alone[i] = planner.plan(
                model, model.state(torch.zeros(1, 1)), alone[i], key[rows[i : i + 1]], Budget()
            )
            assert one.evaluations[0] == plan.evaluations[i]
            torch.testing.assert_close(one.actions[0], plan.actions[i])
            assert alone[i]["tree", "number"][0] == plan_state["tree", "number"][i]
    assert len(set(ended)) > 3


# -------------------------------------------------------------------------------------------------------- risks


class Split(ToyWAM):
    """Two futures, in which an action pays 4 times and -2 times itself: on average once, at worst never above 0."""

    def roll(self, state, num, act, horizon):
        actions, imagined = super().roll(state, num, act, horizon)
        reward = imagined.reward * torch.tensor([4.0, -2.0])[:, None]
        return actions, dataclasses.replace(imagined, reward=reward)


@pytest.mark.parametrize("risk", ["mean", "lower_bound", "worst", "cvar"])
def test_a_tree_avoids_what_futures_disagree_on_where_risk_says_so(risk):
    model = Split(
        lambda z, a: z, lambda z, a, new: a[..., 0], lambda z: 0.0 * z[..., 0], state_dim=1, action_dim=1, members=2
    )
    scorer = ReturnScorer(value_weight=0.0, risk=risk, risk_weight=1.0, risk_share=0.5)
    planner = make_mcts(chunk=1, depth=3, simulations=96, num_candidates=24, sigma=0.5, scorer=scorer)
    plan, _ = plan_once(planner, model, torch.zeros(4, 1))
    if risk == "mean":
        assert (plan.actions > 0.3).all()
    else:
        assert plan.actions.abs().max() < 0.2 and (plan.value < 1e-3).all()
