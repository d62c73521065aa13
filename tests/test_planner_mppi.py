"""What MPPI promises, on toy models whose answers are known by hand."""

from __future__ import annotations

import inspect
import math
import random
import shutil
import time
from dataclasses import replace
from functools import partial
from importlib import resources

import pytest
import torch
import yaml
from tensordict import TensorDict

from wamrl.interfaces import WAM, Budget, Imagined, Plan, Planner, PlanState
from wamrl.noise import NoiseKey
from wamrl.planners import (
    MakeProposer,
    NoiseProposer,
    NonFinitePlanError,
    PolicyProposer,
    ReturnScorer,
    ShootingPlanner,
    Uncertainty,
    make_cem,
    make_mcts,
    make_mppi,
    running,
    shooting,
)
from wamrl.planners.deadlines import Pace
from wamrl.planners.mppi import mppi_weights
from wamrl.planners.toys import (
    BrokenWAM,
    MortalWAM,
    ToyWAM,
    UncertainWAM,
    linear_quadratic,
    quadratic,
    riccati,
)

TARGET = torch.tensor([0.3, -0.6])
PROPOSERS = (PolicyProposer, NoiseProposer)


def plan(
    planner: ShootingPlanner, model: ToyWAM, z: torch.Tensor, *, budget: Budget | None = None, seed: int = 0
) -> tuple[Plan, PlanState]:
    noise = NoiseKey.for_rows(z.shape[0], seed=seed)
    return planner.plan(model, model.state(z), planner.initial_state(model, z.shape[0]), noise, budget or Budget())


def searching(**options: object) -> ShootingPlanner:
    """MPPI tuned for the quadratic: wide noise, many iterations towards the weighted mean."""
    usual = dict(horizon=3, num_candidates=256, iterations=8, sigma=0.5, refine_sigma=0.15, temperature=0.1)
    usual |= dict(correlation=0.0, scorer=ReturnScorer(), choose="mean")
    return make_mppi(**{**usual, **options})  # type: ignore[arg-type]


def test_the_defaults_in_python_are_those_of_the_yaml() -> None:
    settings = yaml.safe_load((resources.files("wamrl.configs") / "planner" / "mppi.yaml").read_text(encoding="utf-8"))
    assert settings.pop("_target_") == f"{make_mppi.__module__}.{make_mppi.__name__}"
    settings.pop("defaults")
    defaults = {name: option.default for name, option in inspect.signature(make_mppi).parameters.items()}
    assert settings == {
        name: default for name, default in defaults.items() if name not in ("proposer", "scorer", "gate")
    }


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("choose", ["mean", "best"])
def test_mppi_finds_the_peak_of_a_quadratic(proposer: MakeProposer, choose: str) -> None:
    planner = searching(proposer=proposer, choose=choose)
    assert isinstance(planner, Planner)
    found, _ = plan(planner, quadratic(TARGET), torch.zeros(4, 1))
    assert (found.actions - TARGET).abs().max() < (0.1 if choose == "mean" else 0.25)
    assert found.actions.shape == (4, 3, 2)
    assert (found.value > (-0.06 if choose == "best" else -0.3)).all()


def test_mppi_comes_near_the_riccati_solution_of_a_linear_quadratic_problem() -> None:
    a = torch.tensor([[1.0, 0.2], [0.0, 1.0]])
    b = torch.tensor([[0.0], [0.2]])
    q, r = torch.diag(torch.tensor([1.0, 0.1])), torch.tensor([[0.05]])
    horizon = 8
    gains, costs = riccati(a, b, q, r, horizon)
    model = linear_quadratic(a, b, q, r, torch.zeros(2, 2))
    z = torch.tensor([[0.3, 0.0], [-0.2, 0.3]])
    planner = searching(horizon=horizon, num_candidates=512, iterations=30, proposer=NoiseProposer, refine_sigma=0.1)
    found, _ = plan(planner, model, z)
    reached = model.imagine(model.state(z), found.actions[:, None]).reward.sum(dim=-1)[:, 0, 0]
    optimal = -((z @ costs[0]) * z).sum(dim=1)
    first = -(z @ gains[0].T)
    assert (reached <= optimal + 1e-5).all()
    assert (optimal - reached < 0.03 * optimal.abs()).all()
    assert (found.actions[:, 0] - first).abs().max() < 0.12


def test_policy_candidates_start_from_a_policy_that_is_already_optimal() -> None:
    """With the Riccati gain as the policy, candidate 0 has the optimal cost, and no candidate beats it."""
    a, b = torch.tensor([[1.0, 0.2], [0.0, 1.0]]), torch.tensor([[0.0], [0.2]])
    q, r = torch.diag(torch.tensor([1.0, 0.1])), torch.tensor([[0.05]])
    gains, costs = riccati(a, b, q, r, 60)
    model = linear_quadratic(a, b, q, r, costs[0], gain=-gains[0])
    z = torch.tensor([[0.3, 0.0]])
    found, _ = plan(make_mppi(horizon=4, num_candidates=64, sigma=0.05, scorer=ReturnScorer()), model, z)
    assert found.value.item() == pytest.approx(-float(z[0] @ costs[0] @ z[0]), rel=1e-3)
    assert found.scores[0, 0] == found.scores[0].max()
    assert torch.allclose(found.actions[:, 0], -(z @ gains[0].T), atol=1e-6)


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("choose", ["mean", "best"])
def test_actions_stay_inside_the_bounds(proposer: MakeProposer, choose: str) -> None:
    planner = searching(proposer=proposer, choose=choose, sigma=5.0, refine_sigma=5.0)
    found, state = plan(planner, quadratic(torch.tensor([7.0, -7.0])), torch.zeros(2, 1))
    for actions in (found.actions, found.candidates, state["mean"]):
        assert actions.abs().max() <= 1.0
    assert torch.equal(found.actions.sign(), torch.tensor([1.0, -1.0]).expand(2, 3, 2))


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_standardised_scores_ignore_the_scale_and_zero_of_the_rewards(scale: float) -> None:
    reference, _ = plan(searching(), quadratic(TARGET), torch.zeros(2, 1))
    scaled, _ = plan(searching(), quadratic(TARGET, scale=scale, shift=scale), torch.zeros(2, 1))
    assert torch.allclose(reference.actions, scaled.actions, atol=2e-3)
    assert torch.allclose(reference.weights, scaled.weights, atol=1e-2)


def test_absolute_scores_sharpen_with_the_rewards_and_never_overflow() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    soft = mppi_weights(scores, 1.0, False, None)
    assert torch.allclose(soft, torch.softmax(scores, dim=1))
    hard = mppi_weights(scores * 1e30, 1.0, False, None)
    assert torch.equal(hard, torch.tensor([[0.0, 0.0, 1.0]]))


@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_higher_temperature_never_sharpens_the_weights(seed: int, standardise: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    size, factor = 10.0 ** float(torch.randint(-3, 4, (1,), generator=draw)), 1.01 + seed / 2
    temperature = 0.05 + float(torch.rand(1, generator=draw))
    scores = torch.randn(3, 12, generator=draw) * size
    cold = mppi_weights(scores, temperature, standardise, None)
    warm = mppi_weights(scores, temperature * factor, standardise, None)
    assert (warm.amax(dim=1) <= cold.amax(dim=1) + 1e-6).all()
    assert torch.allclose(warm.sum(dim=1), torch.ones(3))


def test_only_elites_have_weight_and_invalid_candidates_never() -> None:
    scores = torch.tensor([[3.0, -math.inf, 2.0, 1.0, 0.0], [-math.inf, -math.inf, -math.inf, 5.0, -math.inf]])
    for standardise in (False, True):
        weights = mppi_weights(scores, 0.5, standardise, 2)
        assert ((weights > 0) == torch.tensor([[True, False, True, False, False], [False] * 3 + [True, False]])).all()
        assert torch.allclose(weights.sum(dim=1), torch.ones(2))
    assert (mppi_weights(scores, 0.5, True, None)[0, 1]) == 0


def test_equal_scores_weigh_equally() -> None:
    assert torch.allclose(mppi_weights(torch.full((1, 8), 3.0), 0.1, True, None), torch.full((1, 8), 1 / 8))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("choose", ["mean", "best"])
def test_broken_futures_never_reach_an_action(broken: float, proposer: MakeProposer, choose: str) -> None:
    model = BrokenWAM(TARGET, lambda z, a: a[..., 0] > 0.25, broken)
    found, _ = plan(searching(proposer=proposer, choose=choose), model, torch.zeros(2, 1))
    assert found.actions.isfinite().all() and found.value.isfinite().all()
    assert (found.actions[..., 0] <= 0.26).all()
    assert (found.actions[..., 0] > 0.0).all()


class BrokenPolicyWAM(ToyWAM):
    """Its policy proposes NaN in every candidate but the first two."""

    def propose(self, *arguments, **options):  # type: ignore[no-untyped-def]
        proposal = super().propose(*arguments, **options)
        proposal.actions[:, 2:, 0, 0] = math.nan
        return proposal


def test_nan_actions_from_the_policy_have_no_weight() -> None:
    model = BrokenPolicyWAM(
        lambda z, a: z, lambda z, a, n: a[..., 0], lambda z: z[..., 0], state_dim=1, action_dim=2, chunk_length=3
    )
    found, _ = plan(make_mppi(horizon=3, num_candidates=8, sigma=0.3), model, torch.zeros(1, 1))
    assert found.actions.isfinite().all() and found.candidates.isfinite().all()
    assert (found.weights[:, 2:] == 0).all()


def test_a_row_without_a_finite_candidate_stops_the_plan_and_is_named() -> None:
    model = BrokenWAM(TARGET, lambda z, a: z[..., 0] > 0, math.nan)
    with pytest.raises(NonFinitePlanError, match=r"all 256 candidates of row\(s\) \[1\].*on_failure=hold") as caught:
        plan(searching(), model, torch.tensor([[0.0], [1.0], [0.0]]))
    assert caught.value.rows == [1]


def test_on_failure_hold_sends_zeros_in_that_row_only_and_warns() -> None:
    model = BrokenWAM(TARGET, lambda z, a: z[..., 0] > 0, math.nan)
    z = torch.tensor([[0.0], [1.0], [0.0]])
    with pytest.warns(RuntimeWarning, match="zero actions in 1 row"):
        found, _ = plan(searching(on_failure="hold"), model, z)
    good, _ = plan(searching(), quadratic(TARGET), z)
    assert (found.actions[1] == 0).all() and found.value[1].isnan()
    assert torch.allclose(found.actions[[0, 2]], good.actions[[0, 2]], atol=1e-6)


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_same_key_same_plan(proposer: MakeProposer) -> None:
    model = quadratic(TARGET)
    first, _ = plan(searching(proposer=proposer), model, torch.zeros(2, 1))
    torch.manual_seed(123)
    again, _ = plan(searching(proposer=proposer), model, torch.zeros(2, 1))
    other, _ = plan(searching(proposer=proposer), model, torch.zeros(2, 1), seed=1)
    assert torch.equal(first.actions, again.actions) and torch.equal(first.scores, again.scores)
    assert not torch.equal(first.actions, other.actions)


@pytest.mark.parametrize(
    "options",
    [{}, {"proposer": partial(PolicyProposer, warm_share=0.5)}, {"shuffle_scores": True}, {"proposer": NoiseProposer}],
)
def test_batched_equals_looped(options: dict[str, object]) -> None:
    a, b = torch.tensor([[1.0, 0.2], [0.0, 1.0]]), torch.tensor([[0.0], [0.2]])
    model = linear_quadratic(a, b, torch.eye(2), torch.eye(1), torch.eye(2), gain=torch.tensor([[-0.5, -0.5]]))
    usual = dict(horizon=5, num_candidates=32, iterations=3, sigma=0.3, scorer=ReturnScorer(), choose="mean")
    planner = make_mppi(**{**usual, **options})  # type: ignore[arg-type]
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    noise = NoiseKey(row=torch.tensor([4, 9, 2, 7, 11]), step=torch.tensor([0, 3, 8, 1, 0]))
    state = planner.initial_state(model, 5)
    state["mean"] = torch.rand(5, 5, 1, generator=torch.Generator().manual_seed(1)) - 0.5
    state["warm"] = torch.tensor([True, False, True, True, False])
    state["shift"] = torch.tensor([1, 2, 3, 4, 5])
    together, next_state = planner.plan(model, model.state(z), state, noise, Budget())
    for i in range(5):
        row = torch.tensor([i])
        alone, next_alone = planner.plan(model, model.state(z[row]), state[row], noise[row], Budget())
        assert torch.allclose(together.actions[i], alone.actions[0], atol=1e-6)
        assert torch.allclose(together.value[i], alone.value[0], atol=1e-5)
        assert torch.allclose(next_state["mean"][i], next_alone["mean"][0], atol=1e-6)


def test_rows_do_not_influence_each_other() -> None:
    model = quadratic(TARGET)
    ours, _ = plan(searching(), model, torch.zeros(3, 1))
    broken = BrokenWAM(TARGET, lambda z, a: (z[..., 0] > 0) & (a[..., 0] > 0), math.nan)
    theirs, _ = plan(searching(), broken, torch.tensor([[0.0], [1.0], [0.0]]))
    assert torch.equal(ours.actions[[0, 2]], theirs.actions[[0, 2]])


def test_planning_leaves_its_arguments_and_the_global_generator_alone() -> None:
    model, planner = quadratic(TARGET), searching()
    state, plan_state = model.state(torch.zeros(2, 1)), planner.initial_state(model, 2)
    before, global_before = plan_state.clone(), torch.get_rng_state()
    planner.plan(model, state, plan_state, NoiseKey.for_rows(2), Budget())
    assert (before == plan_state).all() and torch.equal(global_before, torch.get_rng_state())
    assert (state["z"] == 0).all()


def test_steps_after_the_end_of_an_episode_do_not_count() -> None:
    """Full speed ends the episode at step 2; the 100s and the leaf value after that are not for it."""
    model = MortalWAM()
    planner = make_mppi(horizon=4, num_candidates=2, sigma=0.1, scorer=ReturnScorer())
    state = model.state(torch.zeros(1, 1))
    actions = torch.tensor([1.0, 0.0, 0.1]).view(1, 3, 1, 1).expand(1, 3, 4, 1)
    score = planner.scorer(model, state, model.imagine(state, actions))
    assert score[0, 0].item() == pytest.approx(1.0 + 2.0)  # alive in steps 0 and 1 only, and no leaf value
    assert score[0, 1].item() == pytest.approx(0.0 + 10.0)
    assert score[0, 2].item() == pytest.approx(0.1 + 0.2 + 0.3 + 0.4 + 10.0)


def test_more_budget_is_never_worse_on_average() -> None:
    model = quadratic(TARGET)
    z = torch.zeros(64, 1)

    def regret(num: int, iterations: int) -> float:
        found, _ = plan(searching(num_candidates=num, iterations=iterations, choose="best"), model, z)
        return float((found.actions - TARGET).square().sum(dim=(1, 2)).mean())

    by_candidates = [regret(num, 1) for num in (4, 16, 64, 256)]
    by_iterations = [regret(32, iterations) for iterations in (1, 2, 4, 8)]
    assert by_candidates == sorted(by_candidates, reverse=True)
    assert by_iterations == sorted(by_iterations, reverse=True)


@pytest.mark.parametrize("members", [1, 4])
def test_evaluations_are_counted(members: int) -> None:
    model = quadratic(TARGET, members=members)
    found, _ = plan(searching(horizon=3, num_candidates=32, iterations=5), model, torch.zeros(2, 1))
    assert found.evaluations.tolist() == [32 * 3 * 5 * members] * 2


@pytest.mark.parametrize("warm_share", [0.0, 0.5])
@pytest.mark.parametrize(
    ("budget", "members", "num", "iterations"),
    [(1, 1, 4, 2), (2, 1, 4, 2), (7, 4, 4, 2), (8, 4, 4, 2), (100, 1, 40, 5), (79, 2, 10, 3), (81, 2, 10, 3)]
    + [(random.Random(i).randrange(1, 3000), 1 + i % 4, 1 + 7 * i % 40, 1 + i % 5) for i in range(20)],
)
def test_the_evaluation_budget_is_hard(budget: int, members: int, num: int, iterations: int, warm_share: float) -> None:
    model = quadratic(TARGET, members=members)
    planner = searching(
        horizon=2, num_candidates=num, iterations=iterations, proposer=partial(PolicyProposer, warm_share=warm_share)
    )
    if budget < 2 * members:
        with pytest.raises(ValueError, match=f"budget.evaluations is {budget}.*at least {2 * members}"):
            plan(planner, model, torch.zeros(1, 1), budget=Budget(evaluations=budget))
        return
    found, _ = plan(planner, model, torch.zeros(1, 1), budget=Budget(evaluations=budget))
    assert found.evaluations.item() <= budget
    assert found.evaluations.item() <= 2 * members * num * iterations
    # What is left over would not have given every iteration one candidate more.
    spare = min(budget, 2 * members * num * iterations) - found.evaluations.item()
    assert spare < 2 * members * iterations


@pytest.fixture
def slow(monkeypatch) -> ToyWAM:
    """A quadratic that takes 0.1 ms per transition of a candidate, on a clock that nothing else moves."""
    now = [0.0]

    class SlowWAM(ToyWAM):
        def roll(self, state, num, act, horizon):
            now[0] += 1e-4 * num * horizon
            return super().roll(state, num, act, horizon)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    model = quadratic(TARGET)
    model.__class__ = SlowWAM
    return model


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_deadline_stops_an_iteration_within(slow: ToyWAM, proposer: MakeProposer, shuffle: bool) -> None:
    planner = make_mppi(horizon=4, num_candidates=512, sigma=0.5, proposer=proposer, shuffle_scores=shuffle)
    found, state = plan(planner, slow, torch.zeros(2, 1), budget=Budget(deadline_s=0.05))  # all take 0.2 s
    looked = found.evaluations // 4
    assert 8 < int(looked[0]) == int(looked[1]) < 512 * 0.4
    assert found.candidates.shape == (2, 512, 4, 2) and found.scores.shape == found.weights.shape == (2, 512)
    assert found.scores.isfinite().sum(dim=1).tolist() == looked.tolist()
    assert bool((found.weights[:, int(looked[0]) :] == 0).all())
    torch.testing.assert_close(found.weights.sum(dim=1), torch.ones(2))
    assert bool((state["warm"]).all())
    if not shuffle:
        assert torch.equal(found.value, found.scores.amax(dim=1))
        assert bool((found.actions.clamp(-1, 1) - TARGET).square().mean(dim=(1, 2)).lt(TARGET.square().mean()).all())


def test_a_refinement_is_stopped_within_as_well(slow: ToyWAM) -> None:
    planner = searching(horizon=4, num_candidates=128, iterations=8)  # each takes 0.05 s
    found, _ = plan(planner, slow, torch.zeros(1, 1), budget=Budget(deadline_s=0.13))
    looked = int(found.evaluations) // 4
    assert 128 < looked < 8 * 128 and looked % 128
    assert int(found.scores.isfinite().sum()) == looked % 128


def test_a_deadline_that_allows_everything_stops_nothing() -> None:
    for planner in (searching(), make_mppi(horizon=3), make_cem(horizon=3, keep_elites=4)):
        found, _ = plan(planner, quadratic(TARGET), torch.zeros(2, 1), budget=Budget(deadline_s=100.0))
        whole, _ = plan(planner, quadratic(TARGET), torch.zeros(2, 1))
        assert torch.equal(found.evaluations, whole.evaluations) and bool(found.scores.isfinite().all())
        gap = [(p.actions - TARGET).square().mean() for p in (found, whole)]
        assert gap[0] < 2 * gap[1] + 0.01


def test_what_fits_before_a_deadline_is_judged_by_what_came_before() -> None:
    pace = Pace(time.perf_counter() + 1.0)
    assert pace.more(0, 8) == 0  # nothing is known yet
    pace.imagined(10, 0.01)
    assert pace.more(10, 5) == 5 and pace.more(10, 1000) == 40  # at most four times as many
    pace.imagined(40, 0.5)
    assert 30 <= pace.more(50, 1000) <= 89  # the rate of the latest, beyond the first ones' 10 ms
    pace.judged(10, 0.2)
    assert pace.more(50, 1000) == 0  # judging 60 would take 1.2 s


def test_a_deadline_stops_the_iterations_but_not_the_first() -> None:
    model = quadratic(TARGET)
    planner = searching(iterations=100_000, horizon=3, num_candidates=16)
    short, _ = plan(planner, model, torch.zeros(1, 1), budget=Budget(deadline_s=1e-9))
    assert short.evaluations.item() == 8 * 3  # planner.min_candidates
    some, _ = plan(planner, model, torch.zeros(1, 1), budget=Budget(deadline_s=0.3))
    assert 16 * 3 < some.evaluations.item() < 100_000 * 16 * 3
    assert sum(some.seconds.values()) < 1.0  # the slack is for a busy machine
    with pytest.raises(ValueError, match="deadline_s is 0"):
        plan(planner, model, torch.zeros(1, 1), budget=Budget(deadline_s=0.0))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("horizon", 0, "horizon is 0"),
        ("num_candidates", 0, "num_candidates is 0"),
        ("num_candidates", 2.5, "num_candidates is 2.5"),
        ("iterations", 0, "iterations is 0"),
        ("temperature", -1.0, "temperature is -1"),
        ("temperature", math.nan, "temperature is nan"),
        ("num_elites", 0, "num_elites is 0"),
        ("num_elites", 1.5, "num_elites is 1.5, but must be a whole number"),
        ("num_elites", True, "num_elites is True, but must be a whole number"),
        ("sigma", 0.0, "sigma is 0"),
        ("sigma", [0.1, -0.1], "sigma is"),
        ("sigma", "abc", "sigma is .abc.*a number above 0"),
        ("sigma", None, "sigma is None"),
        ("refine_sigma", math.inf, "refine_sigma is inf"),
        ("correlation", 1.0, r"correlation is 1.0.*\[0, 1\)"),
        ("correlation", "0.5", r"planner.correlation is '0.5', but must be in \[0, 1\)"),
        ("sigma", True, "sigma is True"),
        ("standardise", "no", "planner.standardise is 'no', but must be true or false"),
        ("shuffle_scores", "no", "planner.shuffle_scores is 'no', but must be true or false"),
        ("compile", 1, "planner.compile is 1, but must be true or false"),
        ("proposer", partial(PolicyProposer, warm_share="1"), r"proposer.warm_share is '1', but must be in \[0, 1\]"),
        ("choose", "bets", "did you mean 'best'"),
        ("proposer", partial(PolicyProposer, warm_share=1.5), "proposer.warm_share is 1.5"),
        ("proposer", partial(PolicyProposer, behaviour_share=-0.5), "proposer.behaviour_share is -0.5"),
        ("proposer", "noise", "proposer is 'noise', but must be an object.*proposer@planner.proposer=<choice>"),
        ("scorer", "success", "scorer is 'success', but must be an object.*scorer@planner.scorer=<choice>"),
        ("on_failure", "ignore", "Known: hold, raise"),
    ],
)
def test_values_out_of_range_are_refused_at_construction(option: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mppi(**{option: value})  # type: ignore[arg-type]


def test_a_model_that_does_not_answer_is_refused_with_its_answers() -> None:
    silent = quadratic(TARGET, leave_out=("uncertainty",))
    with pytest.raises(ValueError, match="does not answer 'uncertainty'"):
        make_mppi(scorer=ReturnScorer(uncertainty_penalty=1.0)).initial_state(silent, 1)
    make_mppi().initial_state(silent, 1)
    with pytest.raises(ValueError, match="meant to imagine 32 steps; set planner.horizon=32"):
        make_mppi(horizon=33).initial_state(silent, 1)
    with pytest.raises(ValueError, match="sigma has 3 entries, but the model's actions have 2"):
        make_mppi(sigma=[0.1, 0.1, 0.1]).initial_state(silent, 1)
    for proposer in (PolicyProposer, NoiseProposer):
        with pytest.raises(ValueError, match="planner.sigma has 3 entries, but the model's actions have 2"):
            make_mppi(sigma=[0.1, 0.1, 0.1], refine_sigma=0.1, proposer=proposer).initial_state(silent, 1)
    with pytest.raises(ValueError, match="the sigma of further iterations has 3 entries"):
        make_mppi(refine_sigma=[0.1, 0.1, 0.1]).initial_state(silent, 1)


def test_sigma_may_differ_between_action_dims() -> None:
    found, _ = plan(make_mppi(horizon=3, num_candidates=500, sigma=[0.2, 0.01]), quadratic(TARGET), torch.zeros(1, 1))
    assert found.candidates.std(dim=(0, 1, 2)).tolist() == pytest.approx([0.2, 0.01], rel=0.1)


@pytest.mark.parametrize("choose", ["mean", "best"])
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_shuffled_scores_lose_to_true_scores(choose: str, proposer: MakeProposer) -> None:
    """The control spends as much and is bound as tightly, but its scores say nothing about the candidates."""
    model, z = quadratic(TARGET), torch.zeros(32, 1)
    true, _ = plan(searching(choose=choose, proposer=proposer), model, z)
    null, null_state = plan(searching(choose=choose, proposer=proposer, shuffle_scores=True), model, z)
    regrets = [(p.actions - TARGET).square().sum(dim=(1, 2)) for p in (true, null)]
    assert (regrets[0] < regrets[1]).all()
    assert regrets[0].mean() * 5 < regrets[1].mean()
    assert torch.equal(true.evaluations, null.evaluations)
    if choose == "mean":
        assert torch.equal(null_state["mean"], null.actions)


def test_shuffling_permutes_the_scores_of_each_row() -> None:
    model, z = quadratic(TARGET), torch.zeros(2, 1)
    true, _ = plan(searching(iterations=1), model, z)
    null, _ = plan(searching(iterations=1, shuffle_scores=True), model, z)
    assert torch.equal(true.candidates, null.candidates)
    assert torch.equal(true.scores.sort(dim=1).values, null.scores.sort(dim=1).values)
    assert not torch.equal(true.scores, null.scores)
    assert torch.allclose(null.weights, mppi_weights(null.scores, 0.1, True, None))


def test_a_warm_start_is_the_last_plan_shifted_by_the_executed_steps() -> None:
    model = quadratic(torch.zeros(1), gain=torch.zeros(1, 1))
    planner = make_mppi(horizon=4, num_candidates=3, sigma=1e-6, proposer=NoiseProposer, choose="mean")
    state = planner.initial_state(model, 3)
    state["mean"] = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1).expand(3, 4, 1).clone()
    state["warm"] = torch.tensor([True, True, False])
    state["shift"] = torch.tensor([1, 9, 1])
    found, after = planner.plan(model, model.state(torch.zeros(3, 1)), state, NoiseKey.for_rows(3), Budget())
    expected = torch.tensor([[0.2, 0.3, 0.4, 0.4], [0.4, 0.4, 0.4, 0.4], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(found.actions[..., 0], expected, atol=1e-5)
    assert after["warm"].all() and (after["shift"] == 1).all()


def test_a_share_of_the_candidates_surrounds_the_last_plan() -> None:
    model = quadratic(torch.zeros(1))
    planner = make_mppi(horizon=4, num_candidates=40, sigma=0.01, proposer=partial(PolicyProposer, warm_share=0.25))
    state = planner.initial_state(model, 2)
    state["mean"] = torch.full((2, 4, 1), 0.8)
    state["warm"] = torch.tensor([True, False])
    found, _ = planner.plan(model, model.state(torch.zeros(2, 1)), state, NoiseKey.for_rows(2), Budget())
    assert (found.candidates[:, :30].abs() < 0.1).all()
    assert ((found.candidates[0, 30:] - 0.8).abs() < 0.1).all()
    assert (found.candidates[1, 30:].abs() < 0.1).all()
    assert found.evaluations.tolist() == [160, 160]


def test_a_share_of_the_candidates_follows_the_behaviour_prior_in_models_that_have_one() -> None:
    for behaviour in (True, False):
        model = ToyWAM(
            lambda z, a: z,
            lambda z, a, new: -(a + 0.2).square().sum(dim=-1),  # the opposite of the policy is right
            lambda z: torch.zeros(z.shape[:-1]),
            state_dim=1,
            action_dim=1,
            gain=torch.full((1, 1), 0.2),
            behaviour=behaviour,
        )
        found, _ = plan(make_mppi(horizon=2, num_candidates=8, sigma=0.01), model, torch.ones(3, 1))
        priors = found.candidates[:, 4:] if behaviour else -found.candidates[:, 4:]
        assert torch.equal(found.candidates[:, 0], torch.full((3, 2, 1), 0.2))
        assert (found.candidates[:, :4] - 0.2).abs().max() < 0.1 and (priors + 0.2).abs().max() < 0.1
        assert not behaviour or torch.equal(found.candidates[:, 4], torch.full((3, 2, 1), -0.2))
        assert (found.actions.sign() == (-1.0 if behaviour else 1.0)).all()


def test_success_counts_for_what_the_model_says_it_is_worth() -> None:
    model = quadratic(TARGET)
    model.spec = replace(model.spec, success_bonus=7.0)
    imagined = model.imagine(model.state(torch.zeros(1, 1)), TARGET.expand(1, 3, 2, 2))
    imagined = replace(imagined, success=torch.tensor([0.0, 0.5, 1.0])[None, :, None, None].expand(1, 3, 1, 2))
    assert ReturnScorer()(model, model.state(torch.zeros(1, 1)), imagined).tolist() == [[0.0, 7.0, 14.0]]
    assert ReturnScorer(success_weight=1.0)(model, model.state(torch.zeros(1, 1)), imagined)[0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="success_bonus: no candidate could win"):
        ReturnScorer(value_weight=0, reward_weight=0)(quadratic(TARGET), model.state(torch.zeros(1, 1)), imagined)


def test_policy_candidates_cost_one_pass_and_candidate_zero_is_the_policy() -> None:
    gain = torch.tensor([[0.4], [-0.2]])
    model = ToyWAM(
        lambda z, a: z + a[..., :1],
        lambda z, a, n: n[..., 0],
        lambda z: z[..., 0],
        state_dim=1,
        action_dim=2,
        gain=gain,
        chunk_length=5,
    )
    z = torch.tensor([[0.5], [-1.0]])
    found, _ = plan(make_mppi(horizon=5, num_candidates=16), model, z)
    assert model.counts == {"encode": 0, "imagine": 0, "propose": 1, "value": 1, "transitions": 160}
    assert torch.allclose(found.candidates[:, 0], model.propose(model.state(z), 1).actions[:, 0])


def test_the_gate_searches_only_uncertain_rows() -> None:
    model = UncertainWAM(
        lambda z, a: z,
        lambda z, a, n: -(a - TARGET).square().sum(dim=-1),
        lambda z: torch.zeros(z.shape[:-1]),
        state_dim=1,
        action_dim=2,
        gain=torch.tensor([[0.05], [0.05]]),
    )
    z = torch.tensor([[0.1], [1.0], [0.2], [2.0]])
    planner = searching(horizon=4, gate=Uncertainty(0.5))
    found, after = plan(planner, model, z)
    assert found.searched.tolist() == [False, True, False, True]
    policy = model.propose(model.state(z), 1).actions[:, 0]
    assert torch.allclose(found.actions[[0, 2]], policy[[0, 2]])
    assert (found.actions[[1, 3]] - TARGET).abs().max() < 0.1
    assert found.value[[0, 2]].isnan().all() and found.value[[1, 3]].isfinite().all()
    assert torch.allclose(found.weights.sum(dim=1), torch.ones(4))
    each = 4 * 256 * 8
    assert found.evaluations.tolist() == [8, each + 4, 8, each + 4]
    alone, _ = plan(searching(horizon=4), model, z)
    assert torch.allclose(found.actions[[1, 3]], alone.actions[[1, 3]], atol=1e-6)
    assert after["warm"].all()


def test_the_gate_counts_against_the_budget() -> None:
    model = UncertainWAM(
        lambda z, a: z, lambda z, a, n: a[..., 0], lambda z: z[..., 0], state_dim=1, action_dim=1, chunk_length=4
    )
    planner = make_mppi(horizon=4, num_candidates=32, gate=Uncertainty(0.0))
    found, _ = plan(planner, model, torch.tensor([[0.0], [1.0]]), budget=Budget(evaluations=40))
    assert found.evaluations.max() <= 40
    with pytest.raises(ValueError, match="and the gate 4; allow at least 8"):
        plan(planner, model, torch.zeros(1, 1), budget=Budget(evaluations=7))


def test_compile_without_a_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler.*planner.compile=false"):
        make_mppi(compile=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")  # torch's own, on import
def test_the_compiled_iteration_plans_the_same() -> None:
    model, z = quadratic(TARGET, members=2), torch.zeros(2, 1)
    options = dict(horizon=2, num_candidates=16, iterations=3, proposer=NoiseProposer)
    eager, _ = plan(searching(**options), model, z)
    compiled, _ = plan(searching(**options, compile=True), model, z)
    assert torch.allclose(eager.actions, compiled.actions, atol=1e-5)
    assert torch.equal(eager.evaluations, compiled.evaluations)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")  # torch's own, on import
def test_candidates_that_are_imagined_while_proposed_are_compiled_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default plan has no other iteration; three rows are padded to four."""
    compiled: list[str] = []
    made = running.compiled
    monkeypatch.setattr(running, "compiled", lambda query: (compiled.append(query.__name__), made(query))[1])
    model = quadratic(TARGET, members=2, behaviour=True, chunk_length=4, gain=torch.tensor([[0.2], [0.1]]))
    z = torch.tensor([[0.0], [0.5], [1.0]])
    eager, _ = plan(make_mppi(horizon=4, num_candidates=16), model, z)
    quick = make_mppi(horizon=4, num_candidates=16, compile=True)
    for rows in (3, 4):
        found, _ = plan(quick, model, z[:rows] if rows < 4 else torch.cat([z, z[:1]]))
        torch.testing.assert_close(found.actions[:3], eager.actions[:rows], atol=1e-5, rtol=0)
        torch.testing.assert_close(found.scores[:3], eager.scores[:rows], atol=1e-4, rtol=0)
        assert torch.equal(found.evaluations[:3], eager.evaluations[:rows])
    assert compiled == ["_propose"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_iterations_of_a_model_that_draws_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is folded into its key is no constant of the graph; the plan is that of the iterations as they are."""
    graphs: list[int] = []

    class Drawing(ToyWAM):
        """Its rewards are drawn; it does not count along, which would be a Python object that changes."""

        def imagine(self, state, actions, **options):  # type: ignore[no-untyped-def]
            reward = options["noise"].normal(*actions.shape[1:3]) - actions.square().sum(dim=-1)
            leaf = TensorDict({"z": state["z"][:, None, None].expand(-1, actions.shape[1], 1, -1)},
                              batch_size=[actions.shape[0], actions.shape[1], 1])  # fmt: skip
            return Imagined(leaf=leaf, evaluations=actions.shape[1] * actions.shape[2], reward=reward[:, :, None])

    def counted(function, **options):  # type: ignore[no-untyped-def]
        def compile_graph(graph, inputs):  # type: ignore[no-untyped-def]
            graphs.append(1)
            return graph.forward

        return torch.compile(function, fullgraph=True, dynamic=False, backend=compile_graph)

    monkeypatch.setattr(shooting, "compiled", counted)
    options = dict(
        horizon=2, num_candidates=16, iterations=5, proposer=NoiseProposer, scorer=ReturnScorer(value_weight=0.0)
    )
    model = Drawing(lambda z, a: z, lambda z, a, n: a[..., 0], lambda z: z[..., 0], state_dim=1, action_dim=2)
    eager, _ = plan(searching(**options), model, torch.zeros(2, 1))
    found, _ = plan(searching(**options, compile=True), model, torch.zeros(2, 1))
    torch.testing.assert_close(found.actions, eager.actions, atol=1e-5, rtol=0)
    assert len(graphs) == 2  # the other one draws the noise of the iterations after the first


@pytest.mark.parametrize("on_failure", ["raise", "hold"])
def test_the_rows_of_a_broken_model_are_named_as_the_plan_counts_them(on_failure: str) -> None:
    """Of four rows, the gate lets the last two through, and the last one breaks; another breaks where none searches."""

    class LastTwo:
        def __call__(self, model, state, plan_state, noise):  # type: ignore[no-untyped-def]
            return torch.arange(4) >= 2

    model = BrokenWAM(TARGET, lambda z, a: z[..., 0] > 0, math.nan)
    z = torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    for planner in (
        make_mppi(horizon=2, num_candidates=8, gate=LastTwo(), on_failure=on_failure),
        make_mcts(chunk=2, depth=1, simulations=8, num_candidates=8, gate=LastTwo(), on_failure=on_failure),
    ):
        told = pytest.raises(NonFinitePlanError) if on_failure == "raise" else pytest.warns(RuntimeWarning)
        with told as caught:
            plan(planner, model, z)
        words = str(caught.value) if on_failure == "raise" else str(caught[0].message)
        assert "row(s) [3]" in words


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_a_model_that_cannot_be_compiled_says_so() -> None:
    class NumpyWAM(ToyWAM):
        """Its imagination leaves the graph."""

        def imagine(self, state, actions, **options):  # type: ignore[no-untyped-def]
            if float(actions.sum()) > 1e6:
                raise AssertionError
            return super().imagine(state, actions, **options)

    model = NumpyWAM(lambda z, a: z, lambda z, a, n: a[..., 0], lambda z: z[..., 0], state_dim=1, action_dim=1)
    with pytest.raises(RuntimeError, match="planner.compile=true.*NumpyWAM.*planner.compile=false"):
        plan(searching(proposer=NoiseProposer, compile=True), model, torch.zeros(1, 1))


def test_a_model_that_proposes_chunks_of_another_length_is_refused() -> None:
    class FixedChunkWAM(ToyWAM):
        """Its policy always proposes chunks of its own length."""

        def propose(self, state, num, **options):  # type: ignore[no-untyped-def]
            options["perturbation"] = None
            return super().propose(state, num, **options)

    model: WAM = FixedChunkWAM(
        lambda z, a: z, lambda z, a, n: a[..., 0], lambda z: z[..., 0], state_dim=1, action_dim=1, chunk_length=6
    )
    planner = make_mppi(horizon=4, num_candidates=8)
    state = model.state(torch.zeros(1, 1))  # type: ignore[operator]
    with pytest.raises(ValueError, match="horizon is 4, but the model proposes chunks of 6 steps"):
        planner.plan(model, state, planner.initial_state(model, 1), NoiseKey.for_rows(1), Budget())


def test_gains_over_different_candidates_are_not_compared() -> None:
    with pytest.raises(ValueError, match="compares its 2 iterations"):
        make_mppi(iterations=2)


def test_a_gain_that_the_futures_disagree_on_counts_less() -> None:
    """Two candidates gain 1 on average over candidate 0; one in every future, the other in one of two only."""
    leaf = TensorDict({}, batch_size=[1, 3, 2])
    reward = torch.tensor([[[[5.0], [1.0]], [[6.0], [2.0]], [[7.0], [1.0]]]])
    imagined = Imagined(leaf=leaf, evaluations=6, reward=reward)
    scorer = ReturnScorer(value_weight=0.0, risk="improvement", risk_weight=0.5)
    scores = scorer(quadratic(TARGET), TensorDict({}, batch_size=[1]), imagined)
    torch.testing.assert_close(scores, torch.tensor([[0.0, 1.0, 0.5]]))


def test_a_gain_that_the_value_heads_disagree_on_counts_less() -> None:
    """Both candidates gain 1 on average over candidate 0; the heads agree about the first only."""
    leaf = TensorDict({"value": torch.tensor([[[[5.0, 1.0]], [[6.0, 2.0]], [[7.0, 1.0]]]])}, batch_size=[1, 3, 1])
    model = quadratic(TARGET)
    model.value = lambda state: state["value"]  # type: ignore[method-assign]
    imagined = Imagined(leaf=leaf, evaluations=3)
    scorer = ReturnScorer(reward_weight=0.0, discount=1.0, risk="improvement", risk_weight=0.5)
    scores = scorer(model, TensorDict({}, batch_size=[1]), imagined)
    torch.testing.assert_close(scores, torch.tensor([[0.0, 1.0, 0.5]]))


def test_gains_are_zero_for_candidate_0_also_with_one_future_and_survive_its_nan() -> None:
    leaf = TensorDict({}, batch_size=[2, 3, 1])
    nan = float("nan")
    reward = torch.tensor([[[[5.0]], [[6.0]], [[4.0]]], [[[nan]], [[6.0]], [[4.0]]]])
    scorer = ReturnScorer(value_weight=0.0, risk="improvement")
    scores = scorer(
        quadratic(TARGET), TensorDict({}, batch_size=[2]), Imagined(leaf=leaf, evaluations=3, reward=reward)
    )
    torch.testing.assert_close(scores, torch.tensor([[0.0, 1.0, -1.0], [nan, 6.0, 4.0]]), equal_nan=True)


@pytest.mark.parametrize(("risk", "expected"), [("cvar", [1.5, 4.0]), ("worst", [1.0, 0.0]), ("majority", [2.0, 8.0])])
def test_a_risk_reads_the_guesses_as_it_says(risk: str, expected: list[float]) -> None:
    """Five futures each; no majority believes the outlier of 10."""
    reward = torch.tensor([[[1.0, 2.0, 3.0, 2.0, 10.0], [0.0, 8.0, 8.0, 8.0, 8.0]]])[..., None]
    imagined = Imagined(leaf=TensorDict({}, batch_size=[1, 2, 5]), evaluations=10, reward=reward)
    scorer = ReturnScorer(value_weight=0.0, risk=risk, risk_share=0.4)
    scores = scorer(quadratic(TARGET), TensorDict({}, batch_size=[1]), imagined)
    torch.testing.assert_close(scores, torch.tensor([expected]))
    reward[0, 0, 0] = math.nan
    assert scorer(quadratic(TARGET), TensorDict({}, batch_size=[1]), imagined)[0, 0].isnan()
