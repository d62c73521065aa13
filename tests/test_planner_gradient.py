"""What gradient planning and best-of-N promise beyond the conformance suite."""

from __future__ import annotations

import inspect
import math
import time
from importlib import resources

import pytest
import torch
import yaml
from tensordict import TensorDict

from wamrl.control import PlannerPolicy
from wamrl.interfaces import Budget, Imagined, Proposal
from wamrl.noise import NoiseKey
from wamrl.planners import NonFinitePlanError, ReturnScorer, make_best_of_n, make_cem, make_gradient, make_mcts
from wamrl.planners.conformance import TARGET, plan_once, regret
from wamrl.planners.toys import BrokenWAM, ToyWAM, linear_quadratic, quadratic, riccati


@pytest.mark.parametrize("make", [make_best_of_n, make_gradient])
def test_the_defaults_in_python_are_those_of_the_yaml(make) -> None:
    name = make.__name__.removeprefix("make_")
    settings = yaml.safe_load((resources.files("wamrl.configs") / "planner" / f"{name}.yaml").read_text("utf-8"))
    assert settings.pop("_target_") == f"{make.__module__}.{make.__name__}"
    settings.pop("defaults")
    start = settings.pop("start", None)
    assert start in (None, {"iterations": make_gradient().start.iterations})
    defaults = {name: option.default for name, option in inspect.signature(make).parameters.items()}
    assert settings == {k: v for k, v in defaults.items() if k not in ("scorer", "gate", "start")}


def test_gradient_steps_improve_on_their_start_and_never_lose() -> None:
    model, z = quadratic(TARGET), torch.zeros(16, 1)
    start = make_cem(horizon=3, iterations=1, num_candidates=16, sigma=0.5)
    before, _ = plan_once(start, model, z)
    few, _ = plan_once(make_gradient(start=start, steps=3, learning_rate=0.05), model, z)
    many, _ = plan_once(make_gradient(start=start, steps=40, learning_rate=0.05), model, z)
    assert regret(before).mean() > 5 * regret(many).mean() and regret(many).mean() < 0.005
    assert (few.value >= before.value.min()).all() and (many.value >= few.value - 1e-4).float().mean() > 0.9
    wild, _ = plan_once(make_gradient(start=start, steps=3, learning_rate=1.9), model, z)
    fresh, _ = start.plan(
        model, model.state(z), start.initial_state(model, 16), NoiseKey.for_rows(16).fold(0), Budget()
    )
    assert (wild.value >= fresh.value).all()  # the best chunk seen counts, the start's among them


def test_the_gradient_goes_through_the_dynamics() -> None:
    """Alone, from a bad start, it comes near the optimum of a problem whose reward depends on earlier actions."""
    a, b = torch.tensor([[1.0, 0.2], [0.0, 1.0]]), torch.tensor([[0.0], [0.2]])
    q, r = torch.diag(torch.tensor([1.0, 0.1])), torch.tensor([[0.05]])
    model = linear_quadratic(a, b, q, r, torch.zeros(2, 2))
    z = torch.tensor([[0.2, 0.0]])  # near enough for the optimum to lie inside the bounds
    start = make_cem(horizon=6, iterations=1, num_candidates=4, num_elites=1, sigma=1e-3)
    slow, _ = plan_once(start, model, z)
    found, _ = plan_once(make_gradient(start=start, steps=200, num_starts=1, learning_rate=0.02), model, z)
    optimal = -float((z @ riccati(a, b, q, r, 6)[1][0] * z).sum())
    assert slow.value.item() < 1.02 * optimal  # values are negative costs
    assert found.value.item() == pytest.approx(optimal, rel=2e-3)


def test_a_step_counts_its_forward_and_its_backward_pass() -> None:
    start = make_cem(horizon=2, iterations=1, num_candidates=8)
    model = quadratic(TARGET, members=2)
    found, _ = plan_once(make_gradient(start=start, steps=3, num_starts=4), model, torch.zeros(2, 1))
    search, candidates = 8 * 2 * 2, 4 * 2 * 2
    assert found.evaluations.tolist() == [search + candidates * (3 * 2 + 1)] * 2


def test_a_budget_that_leaves_no_step_is_the_searchs_alone() -> None:
    """6 x starts x steps x members is the least for one step, as docs/planners.md says."""
    model, z, least = quadratic(TARGET, members=3), torch.zeros(1, 1), 6 * 2 * 4 * 3
    planner = make_gradient(start=make_cem(horizon=4), num_starts=2)
    for evaluations, steps in ((least - 1, 0), (least, 1)):
        assert planner._split(model, Budget(evaluations))[0] == steps
    alone, _ = planner.start.plan(
        model, model.state(z), planner.initial_state(model, 1), NoiseKey.for_rows(1).fold(0), Budget(least - 1)
    )
    plan, _ = plan_once(planner, model, z, budget=Budget(least - 1))
    assert torch.equal(plan.actions, alone.actions) and torch.equal(plan.evaluations, alone.evaluations)


def test_a_model_without_gradients_is_refused() -> None:
    class Detached(ToyWAM):
        def imagine(self, state, actions, **options):
            return super().imagine(state, actions.detach(), **options)

    model = quadratic(TARGET)
    model.__class__ = Detached
    with pytest.raises(ValueError, match="Detached gives none.*planner=cem"):
        plan_once(make_gradient(start=make_cem(horizon=2)), model, torch.zeros(1, 1))
    model.differentiable = False  # one that says so is refused before the first plan
    with pytest.raises(ValueError, match="Detached gives none.*planner=cem"):
        PlannerPolicy(model, make_gradient(start=make_cem(horizon=2)))


def test_shuffled_gradients_lose() -> None:
    model, z = quadratic(TARGET), torch.zeros(32, 1)
    start = make_cem(horizon=2, iterations=1, num_candidates=16, sigma=0.5)
    true, _ = plan_once(make_gradient(start=start, steps=10, learning_rate=0.05), model, z)
    null, _ = plan_once(make_gradient(start=start, steps=10, learning_rate=0.05, shuffle_scores=True), model, z)
    assert regret(true).mean() * 5 < regret(null).mean()
    assert torch.equal(true.evaluations, null.evaluations)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("steps", 0, "steps is 0"),
        ("num_starts", 0, "num_starts is 0"),
        ("num_starts", 65, "only 64 candidates"),
        ("learning_rate", 0.0, "learning_rate is 0"),
        ("learning_rate", "0.1", "learning_rate is '0.1', but must be a number"),
        ("stop_change", -1.0, "stop_change is -1"),
        ("shuffle_scores", "no", "planner.shuffle_scores is 'no', but must be true or false"),
        ("stop_change", math.inf, "stop_change is inf, but must be a finite number"),
        ("start", make_best_of_n(scorer=ReturnScorer(risk="improvement")), "compares its steps"),
        ("start", make_mcts(), "start is MCTSPlanner, but has to be a search that samples whole chunks"),
    ],
)
def test_values_out_of_range_are_refused_at_construction(option: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_gradient(**{option: value})


class Sampler(ToyWAM):
    """A policy that samples around its mean."""

    def propose(self, state, num, *, mode="sde", noise=None, horizon=None, **options) -> Proposal:
        if mode == "ode":
            return super().propose(state, num, horizon=horizon)
        draws = 0.5 * noise.normal(num, horizon or self.spec.chunk_length, self.spec.action_dim)
        return super().propose(state, num, perturbation=draws)


class BrokenSampler(Sampler, BrokenWAM):
    """And whose model breaks."""


class Sampling(Sampler):
    """And whose futures disagree by what the noise says."""

    def imagine(self, state, actions, *, futures=None, noise=None, **options) -> Imagined:
        imagined = super().imagine(state, actions)
        rows, num, horizon, _ = actions.shape
        spread = noise.normal(num, futures or 1, horizon)
        return Imagined(
            leaf=TensorDict({"z": imagined.leaf["z"].expand(-1, -1, futures or 1, -1)}, [rows, num, futures or 1]),
            evaluations=num * (futures or 1) * horizon,
            reward=imagined.reward + spread,
        )


def sampling(imagines: bool) -> Sampling:
    model = quadratic(TARGET)
    model.__class__ = Sampling
    if not imagines:
        plain = model.propose
        model.propose = lambda *a, **k: Proposal(plain(*a, **k).actions)
    return model


def test_best_of_n_takes_the_best_sample_and_counts_the_policys_own_chunk() -> None:
    model, z = sampling(True), torch.zeros(16, 1)
    found, _ = plan_once(make_best_of_n(horizon=3, num_candidates=64), model, z)
    assert (found.candidates[:, 0] == 0).all() and found.candidates[:, 1:].std() == pytest.approx(0.45, abs=0.05)
    assert torch.equal(found.value, found.scores.amax(dim=1)) and (found.value >= found.scores[:, 0]).all()
    assert regret(found).mean() < 0.15 < regret_of_policy()
    assert found.evaluations.tolist() == [64 * 3] * 16


def test_best_of_n_never_looks_further_than_the_model_proposes() -> None:
    with pytest.raises(ValueError, match="horizon is 5, but the model proposes chunks of 4 steps at most; set.*=4 "):
        make_best_of_n(horizon=5).initial_state(sampling(True), 1)

    class Stubborn(ToyWAM):
        def propose(self, state, num, *, horizon=None, **options) -> Proposal:
            return super().propose(state, num, **options)

    model = quadratic(TARGET)
    model.__class__ = Stubborn
    with pytest.raises(ValueError, match="horizon is 2, but the model proposes chunks of 4 steps; set.*=4"):
        plan_once(make_best_of_n(horizon=2), model, torch.zeros(1, 1), budget=Budget(evaluations=8))


def regret_of_policy() -> float:
    return float(TARGET.square().mean())


def test_more_futures_make_the_choice_of_best_of_n_surer() -> None:
    """Rewards are drowned in noise of the futures; their mean over many of them is not."""
    z = torch.zeros(48, 1)
    regrets = []
    for futures in (1, 16):
        found, _ = plan_once(make_best_of_n(horizon=2, num_candidates=32, futures=futures), sampling(False), z)
        assert found.evaluations.tolist() == [32 * 2 * futures] * 48
        regrets.append(float(regret(found).mean()))
    assert regrets[1] < 0.7 * regrets[0]


def test_futures_that_the_model_cannot_give_are_refused() -> None:
    with pytest.raises(ValueError, match="futures is 4, but this model imagines 1 futures.*planner.futures=null"):
        plan_once(make_best_of_n(horizon=2, futures=4), sampling(True), torch.zeros(1, 1))


def test_best_of_n_survives_broken_samples_and_says_when_all_are() -> None:
    for limit, ok in ((0.2, True), (-9.0, False)):
        model = BrokenSampler(TARGET, lambda z, a, limit=limit: a[..., 0] > limit, float("nan"))
        if ok:
            found, _ = plan_once(make_best_of_n(horizon=1, num_candidates=32), model, torch.zeros(4, 1))
            assert (found.actions[..., 0] <= 0.2).all() and found.value.isfinite().all()
        else:
            with pytest.raises(NonFinitePlanError, match="0, 1, 2, 3"):
                plan_once(make_best_of_n(horizon=1, num_candidates=32), model, torch.zeros(4, 1))


def test_a_gradient_step_draws_its_futures_and_its_null_control_from_different_keys(monkeypatch) -> None:
    keys: list[NoiseKey] = []

    class Watching(ToyWAM):
        def imagine(self, state, actions, *, noise=None, **options) -> Imagined:
            keys.append(noise)
            return super().imagine(state, actions, **options)

    def watched(key: NoiseKey, num: int) -> torch.Tensor:
        keys.append(key)
        return torch.arange(num).expand(key.row.shape[0], -1)

    model = quadratic(TARGET)
    model.__class__ = Watching
    monkeypatch.setattr("wamrl.planners.gradient.permutation", watched)
    start = make_cem(horizon=2, num_candidates=16, iterations=1)
    plan_once(make_gradient(start=start, steps=3, shuffle_scores=True), model, torch.zeros(1, 1))
    drawn = [tuple(key.normal(4).flatten().tolist()) for key in keys]
    assert len(drawn) == len(set(drawn)) >= 8


class DearWAM(ToyWAM):
    """A quadratic that takes 1 ms per transition of a candidate, and counts the passes that keep a gradient."""

    climbed = 0

    def roll(self, state, num, act, horizon):
        time.sleep(1e-3 * num * horizon)
        self.climbed += torch.is_grad_enabled()
        return super().roll(state, num, act, horizon)


@pytest.mark.parametrize(("deadline_s", "climbs"), [(0.2, False), (20.0, True)])
def test_no_gradient_step_starts_that_the_search_has_shown_to_be_too_slow(deadline_s: float, climbs: bool) -> None:
    model = quadratic(TARGET)
    model.__class__ = DearWAM
    start = make_cem(horizon=2, iterations=1, num_candidates=64, sigma=0.5)
    planner = make_gradient(start=start, steps=1, num_starts=64)  # a step: 128 ms forward alone
    plan_once(planner, model, torch.zeros(1, 1), budget=Budget(deadline_s=deadline_s))
    assert bool(model.climbed) == climbs


def test_a_step_that_was_slow_in_the_last_plan_is_not_begun_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search takes 1 s and a step 100 s, more than that tells; a plan without a step forgets a tenth of it."""
    now = [0.0]

    class SlowSteps(ToyWAM):
        def roll(self, state, num, act, horizon):
            now[0] += 100.0 if torch.is_grad_enabled() else 1.0
            return super().roll(state, num, act, horizon)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    model = quadratic(TARGET)
    model.__class__ = SlowSteps
    start = make_cem(horizon=2, iterations=1, num_candidates=64, sigma=0.5)
    planner = make_gradient(start=start, steps=1, num_starts=8)
    took = []
    for _ in range(4):
        begun = now[0]
        plan_once(planner, model, torch.zeros(1, 1), budget=Budget(deadline_s=110.0))
        took.append(now[0] - begun)
    # 1.25 times 100 s, and of the last 90 s, do not fit into 110 s, 1.25 times 81 s do.
    assert [seconds > 50.0 for seconds in took] == [True, False, False, True]


def test_the_name_of_a_gate_is_not_one() -> None:
    with pytest.raises(ValueError, match="planner.gate is 'always', but must be an object"):
        make_mcts(gate="always")
