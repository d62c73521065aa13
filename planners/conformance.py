"""What every planner promises, as checks that any planner can be put through.

In a test of your own planner:

    import pytest
    from wamrl.planners.conformance import CHECKS, Subject

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_planner_conforms(check):
        check(Subject(make=lambda horizon: make_my_planner(horizon=horizon, ...)))

A check raises AssertionError with what was promised and what came, and `unittest.SkipTest`, which pytest shows as
skipped, where it does not apply to the subject. All use the exact models of `wamrl.planners.toys`,
whose best plans are known by hand, and take a fraction of a second for a quick planner.

Shapes: B rows, H steps, A action dims.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from unittest import SkipTest, mock

import torch
from torch import Tensor

from wamrl.interfaces import Budget, Imagined, Plan, Planner, PlanState
from wamrl.noise import NoiseKey
from wamrl.planners.toys import BrokenWAM, MortalWAM, NoisyWAM, ToyWAM, linear_quadratic, maze, quadratic, riccati

TARGET = torch.tensor([0.3, -0.6])


@dataclass(frozen=True)
class Subject:
    """A planner under test, and how near to the best plan it is expected to come.

    make: horizon -> a planner that looks that many steps ahead and searches all of [-1, 1], set to search well; its
    chunks may be shorter than its horizon (`Plan.actions` then has fewer steps).
    regret: mean squared distance from the peak of a quadratic that it may have, per action; None is 0.02.
    gap: share of the best cost that it may lose in a linear-quadratic problem; None is 0.1.
    scale_free: multiplying all rewards by a positive number changes no plan.
    exhaustive: its candidates are all actions that there are, so that no seed changes them.
    local: it searches near the policy only, so that a best plan far from it is approached but not found: the checks of
    known best plans then ask that it does better than the policy, or for `regret` and `gap` where they are given.
    whole_chunks: the checks that execute plans do not plan anew in every step, but once a chunk is used up; for
    planners that go on from a plan where exactly its chunk was executed.
    unstopped: of a planner whose rows stop early once their plan no longer changes, the same without that.
    """

    make: Callable[[int], Planner]
    regret: float | None = None
    gap: float | None = None
    scale_free: bool = True
    exhaustive: bool = False
    local: bool = False
    whole_chunks: bool = False
    unstopped: Callable[[int], Planner] | None = None


Check = Callable[[Subject], None]


def plan_once(
    planner: Planner, model: ToyWAM, z: Tensor, *, budget: Budget | None = None, seed: int = 0
) -> tuple[Plan, PlanState]:
    """One plan of `model` from latents `z` [B, D], with fresh plan state."""
    rows = z.shape[0]
    noise = NoiseKey.for_rows(rows, seed=seed)
    return planner.plan(model, model.state(z), planner.initial_state(model, rows), noise, budget or Budget())


def peak(**options: float) -> ToyWAM:
    """A quadratic around `TARGET` whose value is that of its idle policy."""
    return quadratic(TARGET, discount=0.9, **options)


def regret(plan: Plan, target: Tensor = TARGET) -> Tensor:
    """[B] mean squared distance of the plan's actions from the peak of a quadratic."""
    return (plan.actions - target).square().mean(dim=(1, 2))


def _allowed(subject: Subject) -> float:
    """The regret that a subject may have; of a local one a little less than that of the policy, which does nothing."""
    if subject.regret is not None:
        return subject.regret
    return 0.95 * float(TARGET.square().mean()) if subject.local else 0.02


def linear_system() -> tuple[ToyWAM, Tensor]:
    """A pushed mass, whose policy is a weak spring and whose value is that policy's own, and the best cost matrix P.

    The best cost to go of a state z is z P z, with P [2, 2] the fixed point of the Riccati equation.
    """
    a, b = torch.tensor([[1.0, 0.2], [0.0, 1.0]]), torch.tensor([[0.0], [0.2]])
    q, r = torch.diag(torch.tensor([1.0, 0.1])), torch.tensor([[0.05]])
    gain = torch.tensor([[-1.0, -1.0]])
    closed, own = a + b @ gain, torch.zeros(2, 2)
    for _ in range(500):
        own = closed.T @ (q + own) @ closed + gain.T @ r @ gain
    return linear_quadratic(a, b, q, r, own, gain=gain), riccati(a, b, q, r, 200)[1][0]


def execute(
    planner: Planner,
    model: ToyWAM,
    z: Tensor,
    steps: int,
    *,
    whole_chunks: bool = False,
    noise: NoiseKey | None = None,
) -> tuple[Tensor, Tensor]:
    """Receding horizon in the model itself: actions [B, steps, A] and rewards [B, steps].

    Plans anew in every step, or with `whole_chunks` when the chunk is used up.
    """
    rows = z.shape[0]
    noise = noise or NoiseKey.for_rows(rows)
    plan_state = planner.initial_state(model, rows)
    actions, rewards = [], []
    chunk, used = torch.empty(rows, 0), 0
    for step in range(steps):
        if used == chunk.shape[1] or not whole_chunks:
            now = NoiseKey(row=noise.row, step=noise.step + step, seed=noise.seed)
            if step:
                plan_state["shift"] = torch.full_like(plan_state["shift"], used)
            plan, plan_state = planner.plan(model, model.state(z), plan_state, now, Budget())
            chunk, used = plan.actions, 0
        action, used = chunk[:, used], used + 1
        new = model.transition(z, action)
        rewards.append(model.reward_of(z, action, new))
        actions.append(action)
        z = new
    return torch.stack(actions, dim=1), torch.stack(rewards, dim=1)


# ------------------------------------------------------------------------------------------------- known best plans


def a_plan_has_the_shapes_of_the_contract(subject: Subject) -> None:
    """Shapes of `Plan`, weights that sum to one, and the entries of the plan state that controllers write to."""
    planner, model = subject.make(2), peak()
    assert isinstance(planner, Planner)
    plan, state = plan_once(planner, model, torch.zeros(3, 1))
    rows, num, horizon, action_dim = plan.candidates.shape
    assert (rows, action_dim) == (3, 2), f"candidates has shape {list(plan.candidates.shape)}"
    assert plan.actions.shape == (3, horizon, 2) and 1 <= horizon <= 2
    assert plan.scores.shape == plan.weights.shape == (3, num)
    assert plan.value.shape == plan.evaluations.shape == plan.searched.shape == (3,)
    assert plan.evaluations.dtype == torch.int64 and plan.searched.dtype == torch.bool and bool(plan.searched.all())
    assert bool((plan.weights >= 0).all())
    torch.testing.assert_close(plan.weights.sum(dim=1), torch.ones(3))
    assert {"imagine", "search"} <= set(plan.seconds)
    assert state.batch_size == (3,) and bool(state["warm"].all()) and bool((state["shift"] == 1).all())
    fresh = planner.initial_state(model, 3)
    assert set(fresh.keys(True, True)) == set(state.keys(True, True)), "rows of plan states must be exchangeable"
    assert not bool(fresh["warm"].any())


def it_finds_the_peak_of_a_quadratic(subject: Subject) -> None:
    """Reward -|a - target|^2 in every step, whatever the state."""
    plan, _ = plan_once(subject.make(2), peak(), torch.zeros(8, 1))
    allowed = _allowed(subject)
    assert float(regret(plan).mean()) <= allowed, f"regret {float(regret(plan).mean()):.4f} > {allowed}"


def it_comes_near_the_riccati_solution(subject: Subject) -> None:
    """Executed for six steps, replanning in each; the cost from there on is the best that is left."""
    model, best = linear_system()
    z = torch.tensor([[0.25, 0.0], [-0.2, 0.2], [0.0, -0.3]])

    def cost(actions: Tensor) -> Tensor:
        imagined = model.imagine(model.state(z), actions[:, None])
        left = imagined.leaf["z"][:, 0, 0]
        return ((left @ best) * left).sum(dim=1) - _reward(imagined)[:, 0].sum(dim=1)

    optimal = ((z @ best) * z).sum(dim=1)
    policy = cost(model.propose(model.state(z), 1, mode="ode", horizon=6).actions[:, 0])
    reached = cost(execute(subject.make(6), model, z, 6, whole_chunks=subject.whole_chunks)[0])
    assert bool((reached >= optimal - 1e-5).all()), "no plan can cost less than the Riccati solution"
    lost, lost_by_policy = (float((c / optimal - 1.0).mean()) for c in (reached, policy))
    assert lost_by_policy > 0.2, "the policy is too good to tell planners from it"
    gap = subject.gap if subject.gap is not None else 0.95 * lost_by_policy if subject.local else 0.1
    assert lost <= gap, f"{lost:.1%} of the optimal cost was lost, {gap:.0%} are allowed"


def it_leaves_the_trap_that_catches_the_greedy(subject: Subject) -> None:
    """In `maze`, the best first step pays 1; the way to 20 per step pays nothing at first.

    A local planner, which gets nowhere near either, ends where it is worth more than where it began.
    """
    model, z = maze(), torch.zeros(4, 2)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 9)] * 2, indexing="ij"), dim=-1).view(1, -1, 1, 2)
    greedy = _reward(model.imagine(model.state(z[:1]), grid))[0, :, 0]
    assert bool((grid[0, greedy == greedy.max(), 0, 1] < 0).all()), "the trap is none"
    actions, rewards = execute(subject.make(5), model, z, 7, whole_chunks=subject.whole_chunks)
    if subject.local:  # the policy stays where it is, for nothing
        end = model.imagine(model.state(z), actions[:, None]).leaf["z"][:, 0, 0]
        gain = rewards.sum(dim=1) + model.value_of(end) - model.value_of(z)
        assert bool((gain > 1e-4).all()), f"return and value rose by {gain.tolist()}, the policy's stay as they are"
        return
    assert bool((rewards.amax(dim=1) == 20.0).all()), f"rewards reached: {rewards.amax(dim=1).tolist()}, best is 20"


def more_budget_is_never_worse_on_average(subject: Subject) -> None:
    """Mean regret over 48 rows falls as evaluations per plan rise, up to 10 % of noise from one step to the next."""
    planner, model = subject.make(2), peak()
    regrets = []
    for evaluations in (16, 64, 256, 1024):
        plan, _ = plan_once(planner, model, torch.zeros(48, 1), budget=Budget(evaluations=evaluations))
        regrets.append(float(regret(plan).mean()))
    assert all(b <= 1.1 * a + 1e-4 for a, b in zip(regrets, regrets[1:], strict=False)), f"regrets {regrets}"
    if not subject.exhaustive:  # a few actions may all be tried with the least budget
        assert regrets[-1] < (1.0 if subject.local else 0.7) * regrets[0], f"regrets {regrets}"


# ---------------------------------------------------------------------------------------------------- hard bounds


def actions_stay_inside_the_bounds(subject: Subject) -> None:
    """The best action lies far outside of [-1, 1]."""
    plan, _ = plan_once(subject.make(2), quadratic(torch.tensor([7.0, -7.0]), discount=0.9), torch.zeros(4, 1))
    for actions in (plan.actions, plan.candidates):
        assert float(actions.abs().max()) <= 1.0, f"an action of {float(actions.abs().max())} is outside of [-1, 1]"
    actions = plan.actions.mean(dim=1) if subject.local else plan.actions  # a local one leans that way on the whole
    assert bool((actions[..., 0] > 0).all() and (actions[..., 1] < 0).all()), f"{actions} points away from the best"


def the_evaluation_budget_is_hard(subject: Subject) -> None:
    """Never more evaluations than allowed, counted per ensemble member; too few for a plan is an error.

    The model counts along: what a plan says that it took is at least what it asked of the model.
    """
    planner = subject.make(2)
    for members in (1, 3):
        model = peak(members=members)
        for evaluations in (2 * members, 17, 50, 333):
            before = model.counts["transitions"]
            plan, _ = plan_once(planner, model, torch.zeros(2, 1), budget=Budget(evaluations=evaluations))
            asked = model.counts["transitions"] - before
            assert int(plan.evaluations.max()) <= evaluations, f"{int(plan.evaluations.max())} > {evaluations}"
            assert int(plan.evaluations.min()) > 0
            told = int(plan.evaluations.sum())
            assert asked <= told, f"the model was asked for {asked} transitions, but the plan tells of {told}"
    try:
        plan_once(planner, peak(members=3), torch.zeros(1, 1), budget=Budget(evaluations=2))
    except ValueError as error:
        assert "2" in str(error)
    else:
        raise AssertionError("a budget that is too small for one candidate has to be refused with a ValueError")


def a_deadline_is_met(subject: Subject) -> None:
    """A model so slow that a whole plan takes longer; it ends by its deadline all the same, and is a plan.

    Time is what the model takes, 20 s per query and one per transition of a row, and goes on in its queries alone:
    `perf_counter` of the module `time` is replaced meanwhile, so that nothing has to be forgiven however busy the
    machine is. The least that a planner does, when its deadline is over at once, has to be less than a whole plan;
    deadlines between the two have to be met.
    """
    model, now = peak(), [0.0]

    class Slow(ToyWAM):
        def roll(self, state, num, act, horizon):
            now[0] += 20.0 + num * horizon
            return super().roll(state, num, act, horizon)

    model.__class__ = Slow
    planner, z = subject.make(4), torch.zeros(2, 1)

    def timed(deadline_s: float | None) -> tuple[Plan, float]:
        begun = now[0]
        with mock.patch("time.perf_counter", lambda: now[0]):
            plan, _ = plan_once(planner, model, z, budget=Budget(deadline_s=deadline_s))
        return plan, now[0] - begun

    (whole, most), (tight, least) = timed(None), timed(1e-9)
    assert least <= 0.9 * most, f"{least:g} s of the {most:g} s of a whole plan came after the deadline"
    spent = int(tight.evaluations.max())
    for share in (0.1, 0.5, 0.9):
        deadline = least + share * (most - least)
        plan, taken = timed(deadline)
        assert taken <= deadline, f"a deadline of {deadline:g} s was met after {taken:g} s only"
        fewest = int(plan.evaluations[plan.searched].min())
        assert bool(plan.actions.isfinite().all()) and fewest > 0
        assert spent <= fewest and int(plan.evaluations.max()) <= int(whole.evaluations.max())
    assert bool(tight.actions.isfinite().all()) and int(tight.evaluations[tight.searched].min()) > 0
    for deadline_s in (0.0, -1.0):
        try:
            plan_once(planner, model, z, budget=Budget(deadline_s=deadline_s))
        except ValueError:
            continue
        raise AssertionError(f"deadline_s={deadline_s} has to be refused with a ValueError")


def nan_and_infinity_never_reach_an_action(subject: Subject) -> None:
    """The model breaks for a quarter of the actions, or half of the policy's chunks do; plans avoid that, and are good.

    Broken are rewards; the values of where such actions lead; the latents themselves, and so their values; proposals.
    """
    allowed = _allowed(subject) if subject.local else 2 * _allowed(subject)
    for part in ("reward", "value", "latent", "proposal"):
        for broken in (math.nan, math.inf, -math.inf):
            model, told = BrokenWAM(TARGET, lambda z, a: a[..., 0] > 0.5, broken, part=part), f"{part} of {broken}"
            plan, _ = plan_once(subject.make(2), model, torch.zeros(8, 1))
            assert bool(plan.actions.isfinite().all()), f"a {told} made an action that is not finite"
            assert float(plan.actions.abs().max()) <= 1.0, f"a {told} made an action that is out of bounds"
            if part == "reward":
                assert bool((plan.actions[..., 0] <= 0.5).all()), f"an action with a {told} was chosen"
            assert float(regret(plan).mean()) <= allowed, f"with a {told} about: {float(regret(plan).mean())}"
            assert bool(plan.value.isfinite().all()), f"a {told} became the plan's value"


def a_model_that_is_broken_everywhere_is_an_error(subject: Subject) -> None:
    """No candidate has a finite score: the planner says so, or holds (actions of zero, a value of NaN)."""
    model = BrokenWAM(TARGET, lambda z, a: a[..., 0] < 9.0, math.nan)
    try:
        plan, _ = plan_once(subject.make(2), model, torch.zeros(2, 1))
    except ValueError as error:
        assert "0, 1" in str(error), "the error has to name the rows"
    else:
        assert bool((plan.actions == 0).all() and plan.value.isnan().all())


def steps_after_an_episodes_end_do_not_count(subject: Subject) -> None:
    """Going fast ends the episode, after which the model dreams of 100s that nobody can have."""
    _, rewards = execute(subject.make(3), MortalWAM(), torch.zeros(4, 1), 3, whole_chunks=subject.whole_chunks)
    assert float(rewards.max()) <= 1.0, "the planner ran into the end of the episode for what the model said lay behind"


# ----------------------------------------------------------------------------------------------------- invariances


def the_scale_of_the_rewards_does_not_matter(subject: Subject) -> None:
    """Powers of two, so that nothing is rounded."""
    plain, _ = plan_once(subject.make(2), peak(), torch.zeros(4, 1))
    for scale in (2.0**12, 2.0**-12):
        scaled, _ = plan_once(subject.make(2), peak(scale=scale), torch.zeros(4, 1))
        if subject.scale_free:
            torch.testing.assert_close(scaled.actions, plain.actions, atol=1e-3, rtol=0.0)
        assert bool(scaled.actions.isfinite().all()) and bool(scaled.weights.isfinite().all())


def the_zero_of_the_rewards_does_not_matter(subject: Subject) -> None:
    """A constant on top of every reward leaves the plan as good as it was."""
    for shift in (64.0, -64.0):
        plan, _ = plan_once(subject.make(2), peak(shift=shift), torch.zeros(8, 1))
        assert float(regret(plan).mean()) <= _allowed(subject), f"shift {shift}: {float(regret(plan).mean()):.4f}"


def the_same_key_gives_the_same_plan(subject: Subject) -> None:
    """And nothing is read from, or written to, the global generator or the arguments."""
    planner, model = subject.make(2), peak()
    state, plan_state, noise = model.state(torch.zeros(2, 1)), planner.initial_state(model, 2), NoiseKey.for_rows(2)
    before, latents, random = plan_state.clone(), state.clone(), torch.get_rng_state()
    first, _ = planner.plan(model, state, plan_state, noise, Budget())
    assert torch.equal(random, torch.get_rng_state()), "the global generator was used"
    assert bool((before == plan_state).all()) and bool((latents == state).all()), "the arguments were changed"
    torch.manual_seed(123)
    again, _ = planner.plan(model, state, plan_state, noise, Budget())
    torch.set_rng_state(random)
    assert torch.equal(first.actions, again.actions) and torch.equal(first.value, again.value)
    other, _ = plan_once(planner, model, torch.zeros(2, 1), seed=1)
    if not subject.exhaustive:
        assert not torch.equal(first.candidates, other.candidates), "another seed gave the same candidates"
        assert not torch.equal(first.candidates[0], first.candidates[1]), "two rows share their noise"


def batched_equals_looped(subject: Subject) -> None:
    """Control steps of five episodes at once and one by one, warm starts included; also where the model draws."""
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)) * 0.5
    noise = NoiseKey(row=torch.tensor([4, 9, 2, 7, 11]), step=torch.tensor([0, 3, 8, 1, 0]))
    steps, whole = 6 if subject.whole_chunks else 3, subject.whole_chunks
    for model in (linear_system()[0], NoisyWAM()):
        together, _ = execute(subject.make(4), model, z, steps, whole_chunks=whole, noise=noise)
        for i in range(5):
            row = torch.tensor([i])
            alone, _ = execute(subject.make(4), model, z[row], steps, whole_chunks=whole, noise=noise[row])
            torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0.0)


def rows_do_not_influence_each_other(subject: Subject) -> None:
    """A row in which half of the futures are NaN leaves its neighbours' plans as they are, to the last bit.

    And in a model that draws, rows in another order get their plans in that order.
    """
    planner, noisy = subject.make(2), NoisyWAM()
    z = torch.tensor([[0.1, -0.2], [0.3, 0.0], [-0.2, 0.1], [0.0, 0.2], [0.2, 0.2], [-0.3, 0.1]])
    noise, order = NoiseKey.for_rows(6), torch.tensor([2, 5, 0, 1, 4, 3])
    plans = [
        planner.plan(noisy, noisy.state(z[rows]), planner.initial_state(noisy, 6), noise[rows], Budget())[0]
        for rows in (torch.arange(6), order)
    ]
    torch.testing.assert_close(plans[1].actions, plans[0].actions[order], atol=1e-5, rtol=0.0)
    assert torch.equal(plans[1].evaluations, plans[0].evaluations[order]), "what a row spends depends on its place"
    ours, _ = plan_once(subject.make(2), quadratic(TARGET), torch.zeros(3, 1))
    broken = BrokenWAM(TARGET, lambda z, a: (z[..., 0] > 0) & (a[..., 0] > 0), math.nan)
    theirs, _ = plan_once(subject.make(2), broken, torch.tensor([[0.0], [1.0], [0.0]]))
    assert torch.equal(ours.actions[[0, 2]], theirs.actions[[0, 2]])
    assert torch.equal(ours.evaluations[[0, 2]], theirs.evaluations[[0, 2]]), "what a row spends depends on others"


def what_an_early_stop_saves_is_not_spent(subject: Subject) -> None:
    """For subjects with `unstopped`: some rows take fewer evaluations, each as many as it would alone, and none more.

    The model counts along, as far as it does for the planner without the stop. A plan without the last evaluations is
    hardly worse, and that of a row that took all is the same.
    """
    if subject.unstopped is None:
        raise SkipTest("the subject has no `unstopped`: its rows do not stop early")
    z = 0.5 * torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    plans, asked = [], []
    for make in (subject.unstopped, subject.make):
        model = linear_system()[0]
        plans.append(plan_once(make(4), model, z)[0])
        asked.append(model.counts["transitions"])
    whole, stopped = plans
    told = [int(plan.evaluations.sum()) for plan in plans]
    assert bool((stopped.evaluations <= whole.evaluations).all()) and told[1] < told[0], "nothing was saved"
    assert asked[1] < asked[0], f"the model was asked for {asked[1]} transitions, as often as without the stop"
    if asked[0] == told[0]:
        assert asked[1] == told[1], f"the model was asked for {asked[1]} transitions, but the plan tells of {told[1]}"
    same = stopped.evaluations == whole.evaluations
    torch.testing.assert_close(stopped.actions[same], whole.actions[same], atol=1e-5, rtol=0.0)
    model, planner, noise = linear_system()[0], subject.make(4), NoiseKey.for_rows(12)
    for row in torch.arange(12).split(1):
        alone, _ = planner.plan(model, model.state(z[row]), planner.initial_state(model, 1), noise[row], Budget())
        assert torch.equal(alone.evaluations, stopped.evaluations[row]), "what a row spends depends on the others"
    worth = []
    for plan in plans:
        imagined = model.imagine(model.state(z), plan.actions[:, None])
        worth.append(_reward(imagined)[:, 0].sum(dim=1) + model.value_of(imagined.leaf["z"][:, 0, 0]))
    own = model.imagine(model.state(z), model.propose(model.state(z), 1, mode="ode", horizon=4).actions)
    policy = _reward(own)[:, 0].sum(dim=1) + model.value_of(own.leaf["z"][:, 0, 0])
    gain, kept = float((worth[0] - policy).mean()), float((worth[1] - policy).mean())
    assert kept >= 0.9 * gain, f"of a gain of {gain:.4f} over the policy, {kept:.4f} was left"


def a_plan_never_encodes(subject: Subject) -> None:
    """The state is encoded once, before the plan; a planner that encodes again pays for it in every iteration."""
    planner, model = subject.make(2), peak()
    plan_state = planner.initial_state(model, 2)
    encoded = model.counts["encode"]
    planner.plan(model, model.state(torch.zeros(2, 1)), plan_state, NoiseKey.for_rows(2), Budget())
    assert model.counts["encode"] == encoded


def _reward(imagined: Imagined) -> Tensor:
    """[R, N, H] of the only future."""
    assert imagined.reward is not None
    return imagined.reward[:, :, 0]


CHECKS: tuple[Check, ...] = (
    a_plan_has_the_shapes_of_the_contract,
    it_finds_the_peak_of_a_quadratic,
    it_comes_near_the_riccati_solution,
    it_leaves_the_trap_that_catches_the_greedy,
    more_budget_is_never_worse_on_average,
    actions_stay_inside_the_bounds,
    the_evaluation_budget_is_hard,
    a_deadline_is_met,
    nan_and_infinity_never_reach_an_action,
    a_model_that_is_broken_everywhere_is_an_error,
    steps_after_an_episodes_end_do_not_count,
    the_scale_of_the_rewards_does_not_matter,
    the_zero_of_the_rewards_does_not_matter,
    the_same_key_gives_the_same_plan,
    batched_equals_looped,
    rows_do_not_influence_each_other,
    what_an_early_stop_saves_is_not_spent,
    a_plan_never_encodes,
)
