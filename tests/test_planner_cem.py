"""What CEM and iCEM promise beyond the conformance suite (tests/test_planner_conformance.py)."""

from __future__ import annotations

import inspect
from functools import partial
from importlib import resources

import pytest
import torch
import yaml

from wamrl.interfaces import Budget
from wamrl.noise import NoiseKey
from wamrl.planners import NoiseProposer, PolicyProposer, ReturnScorer, make_cem, make_mppi
from wamrl.planners.cem import cem_refit
from wamrl.planners.conformance import plan_once
from wamrl.planners.toys import ToyWAM, quadratic

TARGET = torch.tensor([0.3, -0.6])


def test_the_defaults_in_python_are_those_of_the_yaml() -> None:
    settings = yaml.safe_load((resources.files("wamrl.configs") / "planner" / "cem.yaml").read_text(encoding="utf-8"))
    assert settings.pop("_target_") == f"{make_cem.__module__}.{make_cem.__name__}"
    settings.pop("defaults")
    defaults = {name: option.default for name, option in inspect.signature(make_cem).parameters.items()}
    assert settings == {k: v for k, v in defaults.items() if k not in ("proposer", "scorer", "gate")}


def test_the_refit_is_mean_and_spread_of_the_best_candidates() -> None:
    actions = torch.tensor([0.0, 0.4, 0.8, -1.0]).view(1, 4, 1, 1)
    scores = torch.tensor([[1.0, 3.0, 2.0, -torch.inf]])
    mean, sigma, weights = cem_refit(num_elites=2, min_sigma=0.0)(actions, scores, torch.tensor([0.5]))
    assert mean.item() == pytest.approx(0.6) and sigma.item() == pytest.approx(0.2)
    assert weights.tolist() == [[0.0, 0.5, 0.5, 0.0]]
    # Fewer finite scores than elites: the others have no weight.
    mean, _, weights = cem_refit(num_elites=4, min_sigma=0.0)(actions, scores, torch.tensor([0.5]))
    assert mean.item() == pytest.approx(0.4) and weights[0, 3] == 0
    # Half of the old mean (candidate 0) and of the old sigma stays.
    mean, sigma, _ = cem_refit(num_elites=2, momentum=0.5, min_sigma=0.0)(actions, scores, torch.tensor([0.5]))
    assert mean.item() == pytest.approx(0.3) and sigma.item() == pytest.approx(0.35)
    assert cem_refit(num_elites=1, min_sigma=0.1)(actions, scores, torch.tensor([0.5]))[1].item() == pytest.approx(0.1)


def test_elites_are_candidates_of_the_next_iteration_and_of_the_next_plan() -> None:
    model = quadratic(TARGET)
    planner = make_cem(horizon=3, num_candidates=32, iterations=1, keep_elites=2, proposer=NoiseProposer, sigma=0.5)
    state, noise = model.state(torch.zeros(2, 1)), NoiseKey.for_rows(2)
    first, after = planner.plan(model, state, planner.initial_state(model, 2), noise, Budget())
    best = first.scores.topk(2, dim=1).indices
    expected = first.candidates.gather(1, best[:, :, None, None].expand(-1, -1, 3, 2))
    torch.testing.assert_close(after["elites"], expected)
    after["shift"] = torch.tensor([1, 2])
    second, _ = planner.plan(model, state, after, noise.fold(9), Budget())
    torch.testing.assert_close(second.candidates[0, -2:, :2], expected[0, :, 1:])
    torch.testing.assert_close(second.candidates[0, -2:, 2], expected[0, :, 2])  # the last action fills the end
    torch.testing.assert_close(second.candidates[1, -2:, 0], expected[1, :, 2])
    two = make_cem(horizon=3, num_candidates=32, iterations=2, keep_elites=2, proposer=NoiseProposer, sigma=0.5)
    third, _ = two.plan(model, state, two.initial_state(model, 2), noise, Budget())
    torch.testing.assert_close(third.candidates[:, 1:3], expected)  # the first iteration is that of `first`
    assert (third.value >= first.value - 1e-6).all()


@pytest.mark.parametrize("behaviour_share", [0.0, 0.5])
def test_a_deadline_repeats_neither_elites_nor_the_policy_in_its_blocks(behaviour_share: float) -> None:
    """64 candidates in blocks of 16 and 48; what there is one of is in the first of them."""
    model = quadratic(TARGET, gain=torch.tensor([[0.2], [0.1]]), behaviour=True)
    proposer = partial(PolicyProposer, behaviour_share=behaviour_share, warm_share=0.25)
    planner = make_cem(horizon=3, num_candidates=64, iterations=1, keep_elites=2, proposer=proposer, choose="mean")
    state, noise, budget = model.state(torch.ones(2, 1)), NoiseKey.for_rows(2), Budget(deadline_s=60.0)
    _, plan_state = planner.plan(model, state, planner.initial_state(model, 2), noise, budget)
    plan, _ = planner.plan(model, state, plan_state, noise.fold(9), budget)
    assert plan.scores.isfinite().all()
    for row in range(2):
        assert plan.candidates[row].flatten(1).unique(dim=0).shape[0] == 64


def test_a_row_that_has_settled_is_not_searched_further() -> None:
    """The first row's rewards are flat, so its mean hardly moves; the second row's peak is far away."""
    model = ToyWAM(
        lambda z, a: z,
        lambda z, a, new: -z[..., 0] * (a[..., 0] - 0.9).square(),
        lambda z: torch.zeros(z.shape[:-1]),
        state_dim=1,
        action_dim=1,
    )
    options = dict(horizon=2, num_candidates=256, iterations=20, num_elites=256, proposer=NoiseProposer, sigma=0.2)
    z, noise = torch.tensor([[0.0], [1.0], [0.0]]), NoiseKey.for_rows(3)
    settling = make_cem(**{**options, "num_elites": 200, "stop_change": 0.05})
    found, after = settling.plan(model, model.state(z), settling.initial_state(model, 3), noise, Budget())
    spent = (found.evaluations / (256 * 2)).tolist()
    assert spent[0] <= 3 and spent[2] <= 3 and 3 < spent[1] < 20
    assert found.weights.shape == (3, 256) and after["mean"].shape == (3, 2, 1)
    for i in range(3):
        row = torch.tensor([i])
        alone, _ = settling.plan(model, model.state(z[row]), settling.initial_state(model, 1), noise[row], Budget())
        torch.testing.assert_close(alone.actions[0], found.actions[i])
        assert alone.evaluations[0] == found.evaluations[i]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_elites", 0, "num_elites is 0"),
        ("num_elites", 65, "num_elites is 65, but an iteration has only 64 candidates.*set planner.num_elites=16"),
        ("momentum", 1.0, r"momentum is 1.0.*\[0, 1\)"),
        ("min_sigma", -0.1, "min_sigma is -0.1"),
        ("keep_elites", 64, "keep_elites is 64.*below the 64 candidates"),
        ("keep_elites", 1.5, "keep_elites is 1.5, but must be a whole number"),
        ("momentum", "0.1", r"momentum is '0.1'.*\[0, 1\)"),
        ("stop_change", -1.0, "stop_change is -1"),
        ("stop_change", True, "stop_change is True, but must be a finite number"),
        ("stop_change", "0.1", "stop_change is '0.1', but must be a finite number"),
        ("compile", True, "compile anew as they become fewer"),
        ("futures", 0, "futures is 0"),
        ("horizon", 0, "horizon is 0"),
        ("knots", 20, "knots is 20"),
        ("proposer", "noise", "proposer is 'noise', but must be an object"),
        ("scorer", ReturnScorer(risk="improvement"), "compares its 4 iterations"),
    ],
)
def test_values_out_of_range_are_refused_at_construction(option: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cem(**{"stop_change": 0.1 if option == "compile" else None, option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("budget", "spent"), [(4096, 64 * 4), (1024, 64 * 4), (255, 63), (192, 48), (80, 20), (8, 2)])
def test_a_small_budget_takes_candidates_before_iterations(budget: int, spent: int) -> None:
    """64 x 4 candidates of 4 steps, of which 10 are elites: no iteration has fewer than 20 unless the only one does."""
    model = quadratic(TARGET)
    planner = make_cem(horizon=4, num_candidates=64, iterations=4, num_elites=10)
    num, iterations, _ = planner._fit(model, Budget(evaluations=budget))
    assert num * iterations == spent
    assert iterations == {256: 4, 63: 3, 48: 2, 20: 1, 2: 1}[spent]


@pytest.mark.parametrize("make", [make_cem, make_mppi])
def test_elites_are_cut_where_a_budget_leaves_fewer_candidates(make) -> None:
    plan, _ = plan_once(make(horizon=4, num_elites=10), quadratic(TARGET), torch.zeros(1, 1), budget=Budget(12))
    assert plan.weights.shape == (1, 3) and (plan.weights > 0).all()
    with pytest.raises(ValueError, match="num_elites is 10, but an iteration has only 9 candidates"):
        make(horizon=4, num_candidates=9, num_elites=10)


def test_a_model_with_a_behaviour_prior_gives_the_first_candidates_of_it() -> None:
    """The toy's policy does 0.2 and its prior -0.2; the later iterations follow neither."""
    model = quadratic(TARGET[:1], gain=torch.tensor([[0.2]]), behaviour=True)
    for share, priors in ((0.5, 4), (0.0, 0)):
        proposer = partial(PolicyProposer, behaviour_share=share)
        planner = make_cem(horizon=2, num_candidates=8, iterations=1, sigma=0.01, proposer=proposer)
        plan, _ = plan_once(planner, model, torch.ones(1, 1))
        assert int((plan.candidates[0, :, 0, 0] < 0).sum()) == priors
