"""Proposers, scorers and gates: what they compute, by hand, and that planners take any of them from the config."""

from __future__ import annotations

import functools
import importlib
import math
from dataclasses import fields, replace
from importlib import resources
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import instantiate
from tensordict import TensorDict

from wamrl import cli
from wamrl.control import PlannerPolicy
from wamrl.interfaces import Budget, Context, Gate, Imagined, Scorer, State
from wamrl.noise import NoiseKey
from wamrl.planners import (
    Always,
    BudgetGate,
    ConsistencyScorer,
    CriticalPhase,
    GoalScorer,
    NoiseProposer,
    Periodic,
    PolicyProposer,
    ProgressScorer,
    ReturnScorer,
    SampleProposer,
    SuccessScorer,
    Uncertainty,
    Verifier,
    make_best_of_n,
    make_cem,
    make_gradient,
    make_mcts,
    make_mppi,
)
from wamrl.planners.conformance import plan_once
from wamrl.planners.scorers import asked_of, reduce_guesses
from wamrl.planners.toys import BrokenWAM, TabularWAM, ToyWAM, quadratic

TARGET = torch.tensor([0.3, -0.6])
CONFIGS = resources.files("wamrl.configs")


def futures(**heads: torch.Tensor) -> Imagined:
    """Imagined heads [N, M, H] of one row."""
    rows = {name: head[None] for name, head in heads.items()}
    shape = next(iter(rows.values())).shape
    leaf = TensorDict({"z": torch.zeros(*shape[:3], 1)}, batch_size=shape[:3])
    return Imagined(leaf=leaf, evaluations=math.prod(shape[1:]), **rows)


def test_success_is_that_of_any_step_while_the_episode_lives() -> None:
    success = torch.tensor([[[0.5, 0.5]], [[0.0, 0.8]], [[0.0, 0.8]]])
    alive = torch.tensor([[[1.0, 1.0]], [[1.0, 1.0]], [[1.0, 0.0]]])
    state = TensorDict({}, batch_size=[1])
    model = quadratic(TARGET)
    scores = SuccessScorer()(model, state, futures(success=success, alive=alive))
    torch.testing.assert_close(scores, torch.tensor([[0.75, 0.8, 0.0]]))
    two = torch.tensor([[[0.2], [0.6]]])
    assert SuccessScorer(risk="worst")(model, state, futures(success=two)).item() == pytest.approx(0.2)


def test_consistency_is_minus_the_mean_disagreement() -> None:
    uncertainty = torch.tensor([[[0.1, 0.3]], [[0.0, 0.0]]])
    scores = ConsistencyScorer()(quadratic(TARGET), TensorDict({}, batch_size=[1]), futures(uncertainty=uncertainty))
    torch.testing.assert_close(scores, torch.tensor([[-0.2, 0.0]]))


class GoalWAM(ToyWAM):
    """A point that moves by its action, told where it should be."""

    def __init__(self, leave_out: tuple[str, ...] = ("reward", "value")) -> None:
        super().__init__(
            lambda z, a: z + a,
            lambda z, a, new: torch.zeros(z.shape[:-1]),
            lambda z: torch.zeros(z.shape[:-1]),
            state_dim=2,
            action_dim=2,
            leave_out=leave_out,
        )
        self.spec = type(self.spec)(**{**self.spec.__dict__, "provides": self.spec.provides | {"goal"}})

    def encode(self, context: Context) -> TensorDict:
        state = super().encode(context)
        if context.goal is not None:
            state["goal"] = context.goal["state"]
        return state


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_planner_goes_to_a_goal_that_the_model_encodes(norm: str) -> None:
    model = GoalWAM()
    observation = TensorDict({"state": torch.zeros(2, 2), "task": torch.zeros(2, dtype=torch.int64)}, [2])
    goal = TensorDict({"state": torch.tensor([[0.9, -0.9], [-1.5, 0.2]])}, [2])
    context = Context.from_observation(observation)
    state = model.encode(Context(context.observation, context.past_actions, context.valid, context.task, goal))
    options = dict(horizon=3, iterations=8, num_candidates=256, num_elites=24, sigma=0.5, proposer=NoiseProposer)
    planner = make_cem(**options, scorer=GoalScorer(norm=norm))  # type: ignore[arg-type]

    plan, _ = planner.plan(model, state, planner.initial_state(model, 2), NoiseKey.for_rows(2), Budget())
    assert (plan.actions.sum(dim=1) - goal["state"]).abs().max() < 0.15
    assert (plan.value > -0.1).all()


def test_a_scorer_that_needs_what_the_model_lacks_is_refused_by_name() -> None:
    silent = quadratic(TARGET, leave_out=("success",))
    with pytest.raises(ValueError, match="does not answer 'success'"):
        make_cem(scorer=SuccessScorer()).initial_state(silent, 1)
    with pytest.raises(ValueError, match="does not answer 'goal'.*wam=mot_uwm"):
        make_best_of_n(horizon=4, scorer=GoalScorer()).initial_state(silent, 1)
    with pytest.raises(ValueError, match="the goal scorer reads 'x', but this model's state has z"):
        GoalScorer(latent="x")(
            silent, TensorDict({"goal": torch.zeros(1, 1)}, [1]), futures(reward=torch.zeros(1, 1, 1))
        )
    planner = make_cem(horizon=2, scorer=GoalScorer(latent="x"))
    with pytest.raises(ValueError, match="planner.scorer.latent is 'x', but this model's state has goal, z"):
        PlannerPolicy(GoalWAM(), planner, goal=lambda row: TensorDict({"state": torch.zeros(row.shape[0], 2)}))
    with pytest.raises(ValueError, match="SuccessScorer does not have; use scorer=return"):
        make_mcts(scorer=SuccessScorer())  # type: ignore[arg-type]


def test_what_a_scorer_needs_depends_on_the_models_success_bonus() -> None:
    """Refused before any plan, by the scorer and by a gate that reads returns, in every kind of planner."""
    silent, worthless = quadratic(TARGET, leave_out=("success",)), quadratic(TARGET)
    assert make_cem().initial_state(silent, 1) is not None
    silent.spec = replace(silent.spec, success_bonus=5.0)
    for planner in (make_cem(), make_mcts(), make_cem(scorer=ConsistencyScorer(), gate=CriticalPhase(0.5))):
        with pytest.raises(ValueError, match="count 5.0 per step of success.*does not answer 'success'.*weight=0"):
            planner.initial_state(silent, 1)
    assert make_cem(scorer=ReturnScorer(success_weight=0.0)).initial_state(silent, 1) is not None
    scorer = ReturnScorer(value_weight=0.0, reward_weight=0.0, uncertainty_penalty=1.0)
    for make in (make_cem, make_mcts):
        with pytest.raises(ValueError, match="success_bonus: no candidate could win"):
            make(scorer=scorer).initial_state(worthless, 1)
    worthless.spec = replace(worthless.spec, success_bonus=5.0)
    assert make_mcts(scorer=scorer).initial_state(worthless, 1) is not None
    assert scorer.needs_of(worthless.spec) == {"success", "uncertainty"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SuccessScorer(risk="cvra"), "did you mean 'cvar'"),
        (lambda: SuccessScorer(risk_share=0.0), "risk_share is 0"),
        (lambda: ReturnScorer(risk_weight=-1.0), "risk_weight is -1"),
        (lambda: ReturnScorer(risk="lower-bound"), "did you mean 'lower_bound'"),
        (lambda: ReturnScorer(uncertainty_penalty=-1.0), "uncertainty_penalty is -1"),
        (lambda: ReturnScorer(uncertainty_reduce="max"), "Known: mean, sum"),
        (lambda: ReturnScorer(discount=1.5), "discount is 1.5"),
        (lambda: Uncertainty(-0.1), "gate.threshold is -0.1"),
        (lambda: GoalScorer(norm="l3"), "norm"),
        (lambda: CriticalPhase(threshold=math.nan), "threshold is nan"),
        (lambda: Periodic(every=0), "every is 0"),
        *(
            (functools.partial(gate, threshold="0"), "gate.threshold is '0', but must be a finite number")
            for gate in (Uncertainty, CriticalPhase, Verifier)
        ),
        (lambda: BudgetGate(per_second="9"), "gate.per_second is '9', but must be a number"),
        (lambda: ReturnScorer(value_weight=None), "value_weight is None, but must be a finite number"),
        (lambda: ReturnScorer(discount="1"), r"discount is '1', but must be in \(0, 1\]"),
        (lambda: SuccessScorer(risk_weight="1"), "risk_weight is '1', but must be a finite number"),
        (lambda: GoalScorer(risk_share="1"), r"risk_share is '1', but must be in \(0, 1\]"),
    ],
)
def test_values_out_of_range_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("risk", ["mean", "lower_bound", "worst", "cvar", "majority", "improvement"])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_candidate_with_a_broken_guess_has_no_finite_score(risk: str, broken: float) -> None:
    guesses = torch.tensor([[[1.0, 2.0], [broken, 1.0], [0.5, 0.5]]])
    assert reduce_guesses(guesses, risk, 1.0, 0.5).isfinite().tolist() == [[True, False, True]]


@pytest.mark.parametrize("risk", ["mean", "lower_bound", "worst", "cvar"])
def test_the_edge_of_a_tree_is_the_score_taken_apart(risk: str) -> None:
    torch.manual_seed(0)
    alive = (torch.rand(5, 3, 4) > 0.2).float().cumprod(dim=-1)
    imagined = futures(reward=torch.randn(5, 3, 4), success=torch.rand(5, 3, 4), alive=alive, uncertainty=alive * 0.3)
    model = quadratic(TARGET, discount=0.9)
    scorer = ReturnScorer(value_weight=0.7, success_weight=2.0, uncertainty_penalty=0.4, risk=risk)
    state = TensorDict({}, batch_size=[1])
    reward, discount, value = scorer.edge(model, imagined)
    (_, *plain), cautious = ReturnScorer(value_weight=0.7).edge(model, imagined), (discount, value)
    for part, other in zip(plain, cautious, strict=True):
        torch.testing.assert_close(part, other)  # what a search goes on from is the same
    torch.testing.assert_close(reward + discount * value, scorer(model, state, imagined))


class OutcomeWAM(ToyWAM):
    """Its success value has two heads, which say 1 and 3 times the latent."""

    def success_value(self, state: State) -> torch.Tensor:
        return state["z"] * torch.tensor([1.0, 3.0])


def test_success_values_are_guesses_beside_the_returns() -> None:
    def still(z: torch.Tensor, a: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.zeros(z.shape[:-1])

    model = OutcomeWAM(
        lambda z, a: z, still, lambda z: torch.full(z.shape[:-1], 2.0), state_dim=1, action_dim=1, discount=0.5
    )
    state = TensorDict({}, batch_size=[1])
    imagined = futures(reward=torch.tensor([[[4.0]], [[0.0]]]), success=torch.zeros(2, 1, 1))
    imagined.leaf["z"] = torch.tensor([4.0, 8.0]).view(1, 2, 1, 1)
    returns = ReturnScorer()(model, state, imagined)
    torch.testing.assert_close(returns, torch.tensor([[5.0, 1.0]]))  # reward + 0.5 * 2; the model has no success value
    model.spec = replace(model.spec, provides=model.spec.provides | {"success_value"})
    assert "success_value" in ReturnScorer().needs_of(model.spec)
    # Guesses of candidate 0: twice 5 from returns, 2 and 6 from outcomes; of candidate 1: twice 1, 4 and 12.
    torch.testing.assert_close(ReturnScorer()(model, state, imagined), torch.tensor([[4.5, 4.5]]))
    alone = ReturnScorer(value_weight=0, reward_weight=0, success_weight=0, success_value_weight=1.0, risk="worst")
    torch.testing.assert_close(alone(model, state, imagined), torch.tensor([[2.0, 4.0]]))
    torch.testing.assert_close(ReturnScorer(success_value_weight=0)(model, state, imagined), returns)
    with pytest.raises(ValueError, match="does not answer 'success_value'"):
        make_cem(scorer=ReturnScorer(success_value_weight=1.0)).initial_state(quadratic(TARGET), 1)


def test_returns_without_a_value_weigh_as_much_as_the_outcomes() -> None:
    def still(z: torch.Tensor, a: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.zeros(z.shape[:-1])

    model = OutcomeWAM(lambda z, a: z, still, lambda z: z[..., 0], state_dim=1, action_dim=1, discount=0.5)
    model.spec = replace(model.spec, provides=model.spec.provides | {"success_value"})
    imagined = futures(reward=torch.tensor([[[8.0], [4.0]]]), success=torch.zeros(1, 2, 1))
    imagined.leaf["z"] = torch.tensor([2.0, 4.0]).view(1, 1, 2, 1)

    def score(**settings: object) -> float:
        scorer = ReturnScorer(value_weight=0.0, success_value_weight=1.0, **settings)  # type: ignore[arg-type]
        return scorer(model, TensorDict({}, batch_size=[1]), imagined).item()

    # Returns of the two futures: 8 and 4. Outcomes of two heads each: 1 and 3, 2 and 6.
    assert score() == pytest.approx((6.0 + 3.0) / 2)
    # The worst half of 8, 8, 4, 4, 1, 3, 2, 6.
    assert score(risk="cvar", risk_share=0.5) == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert score(risk="worst") == pytest.approx(1.0)
    assert score(reward_weight=0.0) == pytest.approx(3.0)


def cliff() -> ToyWAM:
    """Standing still pays 1 a step, but beyond z = 1 nothing; the value knows of no cliff."""
    return ToyWAM(
        lambda z, a: z + 0.5,
        lambda z, a, new: (new[..., 0] < 1.0).float(),
        lambda z: torch.full(z.shape[:-1], 10.0),
        state_dim=1,
        action_dim=1,
        discount=0.9,
        chunk_length=2,
    )


def test_the_critical_phase_is_where_the_policy_falls_short_of_its_value() -> None:
    """V = 10 everywhere; two steps far from the cliff give 1 + 0.9 + 0.81 * 10 = 10, at it 8.1 or 9.1."""
    model = cliff()
    z = torch.tensor([[-5.0], [0.4], [0.6]])
    plan_state = TensorDict({}, batch_size=[3])
    shortfalls = [0.0, 0.9, 1.9]
    for threshold in (-0.1, 0.5, 1.5, 2.5):
        searched = CriticalPhase(threshold)(model, model.state(z), plan_state, NoiseKey.for_rows(3))
        assert searched.tolist() == [s > threshold for s in shortfalls]
    planner = make_cem(horizon=2, num_candidates=8, iterations=1, gate=CriticalPhase(0.5))
    plan, _ = plan_once(planner, model, z)
    assert plan.searched.tolist() == [False, True, True]
    assert plan.evaluations.tolist() == [4, 18, 18]  # the gate's chunk of two steps counts


@pytest.mark.parametrize(
    "make", [lambda gate: make_cem(horizon=2, gate=gate), lambda gate: make_mcts(chunk=2, depth=1, gate=gate)]
)
def test_a_periodic_gate_searches_one_plan_in_a_few(make) -> None:
    planner, model = make(Periodic(every=3)), quadratic(TARGET)
    state, plan_state = model.state(torch.zeros(2, 1)), planner.initial_state(model, 2)

    searched = []
    for step in range(7):
        if step == 5:  # the second row's episode begins anew
            plan_state["warm"] = torch.tensor([True, False])
        plan, plan_state = planner.plan(model, state, plan_state, NoiseKey.for_rows(2, step=step), Budget())
        searched.append(plan.searched.tolist())
    assert [s[0] for s in searched] == [True, False, False, True, False, False, True]
    assert [s[1] for s in searched] == [True, False, False, True, False, True, False]


def test_a_choice_that_is_unknown_or_out_of_place_is_named() -> None:
    with pytest.raises(ValueError, match="unknown scorer 'succes'; did you mean 'success'"):
        cli.compose("plan", ["planner=cem", "scorer@planner.scorer=succes"])
    with pytest.raises(ValueError, match="unknown proposer 'policies'; did you mean 'policy'"):
        cli.compose("plan", ["proposer@planner.proposer=policies"])
    with pytest.raises(ValueError, match="the planner that was chosen has no choice of scorer at 'planner.scorer'"):
        cli.compose("plan", ["planner=gradient", "scorer@planner.scorer=success"])
    with pytest.raises(ValueError, match="the planner that was chosen has no choice of proposer at 'planner.proposer'"):
        cli.compose("plan", ["planner=best_of_n", "proposer@planner.proposer=noise"])


@pytest.mark.parametrize(
    ("planner", "word", "message"),
    [
        ("mppi", "value_weight=0", "'value_weight'; did you mean 'scorer.value_weight'"),
        ("mppi", "risk=mean", "'risk'; did you mean 'scorer.risk'"),
        ("cem", "behaviour_share=0", "'behaviour_share'; did you mean 'proposer.behaviour_share'"),
        ("gradient", "behaviour_share=0", "'behaviour_share'; did you mean 'start.proposer.behaviour_share'"),
        ("mcts", "behaviour_share=0.5", "'behaviour_share'; did you mean 'proposer.behaviour_share'"),
        ("mppi", "proposal=noise", "'proposal'; did you mean 'proposer'"),
        ("mppi", "gate_threshold=0.5", "'gate_threshold'. Known: .*gate,.*scorer"),
    ],
)
def test_a_setting_of_a_part_is_found_where_it_is(planner: str, word: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"unknown setting of 'planner': {message}"):
        cli.compose("plan", [f"planner={planner}", f"planner.{word}"])


@pytest.mark.parametrize(
    "path", [f"{g}/{p.name}" for g in ("proposer", "scorer", "gate") for p in (CONFIGS / g).iterdir()]
)
def test_the_defaults_of_proposers_scorers_and_gates_are_those_of_their_yaml(path: str) -> None:
    settings = yaml.safe_load((CONFIGS / path).read_text(encoding="utf-8"))
    if path == "scorer/improvement.yaml":
        assert settings == {"defaults": ["return", "_self_"], "risk": "improvement"}
        return
    if path == "proposer/policy_only.yaml":
        assert settings == {"defaults": ["policy", "_self_"], "behaviour_share": 0.0}
        return
    module, _, name = settings.pop("_target_").rpartition(".")
    options = fields(getattr(importlib.import_module(module), name))
    given = {"horizon", "sigma", "basis"} if settings.pop("_partial_", False) else set()
    assert settings == {option.name: option.default for option in options if option.init and option.name not in given}


@functools.cache
def composed(planner: str, *words: str) -> dict:
    return cli.plain(cli.compose("plan", [f"planner={planner}", *words]))["planner"]


def part(planner: str, group: str, choice: str) -> dict:
    """The settings that group@planner.group=choice makes of a planner's part, which change nothing else of it."""
    chosen = composed(planner, f"{group}@planner.{group}={choice}")
    assert {**composed(planner), group: chosen[group]} == chosen
    return chosen[group]


CHOICES = {group: cli.options(group) for group in ("proposer", "scorer", "gate")}


@pytest.mark.parametrize("planner", ["mppi", "cem", "best_of_n"])
@pytest.mark.parametrize("scorer", CHOICES["scorer"])
def test_every_proposer_goes_with_every_scorer_and_every_gate(planner: str, scorer: str) -> None:
    model = GoalWAM(leave_out=())
    state = TensorDict({"z": torch.zeros(2, 2), "goal": torch.ones(2, 2)}, batch_size=[2])
    options: dict[str, Any] = {"horizon": 2, "num_candidates": 8}
    if planner != "best_of_n":  # which keeps to samples of the policy
        options |= {"iterations": 2, "choose": "mean", "num_elites": 4}
    if planner == "cem":
        options["keep_elites"] = 2
    for proposer in CHOICES["proposer"] if planner != "best_of_n" else [None]:
        for gate in CHOICES["gate"]:
            chosen = {"proposer": proposer, "scorer": scorer, "gate": gate}
            parts = {group: part(planner, group, choice) for group, choice in chosen.items() if choice}
            built = instantiate({**composed(planner), **options, **parts})
            assert type(built.gate).__name__.lower().startswith(gate.replace("_", ""))
            named = "return" if scorer == "improvement" else scorer
            assert type(built.scorer).__name__.lower().startswith(named) and isinstance(built.scorer, Scorer)
            inner = getattr(built.proposer, "inner", built.proposer)
            assert type(inner).__name__.lower().startswith((proposer or "samples").split("_")[0].rstrip("s"))
            assert isinstance(built.gate, Gate)
            plan, _ = built.plan(model, state, built.initial_state(model, 2), NoiseKey.for_rows(2), Budget())
            assert plan.actions.shape == (2, 2, 2) and bool(plan.actions.isfinite().all())


@pytest.mark.parametrize("proposer", CHOICES["proposer"])
def test_trees_take_every_proposer_with_every_gate(proposer: str) -> None:
    model, z = quadratic(TARGET, behaviour=True), torch.zeros(2, 1)
    for gate in CHOICES["gate"]:
        parts = {group: part("mcts", group, choice) for group, choice in (("proposer", proposer), ("gate", gate))}
        options = {"chunk": 2, "depth": 2, "simulations": 8, "num_candidates": 4}
        built = instantiate({**composed("mcts"), **options, **parts})
        assert type(built.proposer).__name__.lower().startswith(proposer.split("_")[0].rstrip("s"))
        plan, _ = plan_once(built, model, z)
        assert plan.actions.shape == (2, 2, 2) and bool(plan.actions.isfinite().all())


def test_the_parts_are_chosen_together() -> None:
    words = [f"{group}@planner.{group}={choices[-1]}" for group, choices in CHOICES.items()]
    for planner in ("mppi", "cem"):
        together = composed(planner, *words)
        for group, choices in CHOICES.items():
            assert together[group] == part(planner, group, choices[-1])


@pytest.mark.parametrize("make", [make_mppi, make_cem, make_best_of_n, make_mcts], ids=lambda make: make.__name__)
def test_the_default_plan_is_that_of_the_config_and_of_its_parts_made_by_hand(make) -> None:
    model = quadratic(TARGET, members=3, behaviour=True, chunk_length=8, gain=torch.tensor([[0.2], [0.1]]))
    z = torch.tensor([[0.5], [1.0]])
    name = make.__name__.removeprefix("make_")
    parts = {"scorer": ReturnScorer(risk="improvement" if make is make_mppi else "mean"), "gate": Always()}
    if make is not make_best_of_n:
        share = 0.0 if make is make_mcts else 0.5
        parts["proposer"] = functools.partial(PolicyProposer, warm_share=0.0, behaviour_share=share)
    plans = [plan_once(planner, model, z)[0] for planner in (make(), make(**parts), instantiate(composed(name)))]
    for other in plans[1:]:
        assert torch.equal(other.actions, plans[0].actions) and torch.equal(other.weights, plans[0].weights)
        assert torch.equal(other.candidates, plans[0].candidates) and torch.equal(other.scores, plans[0].scores)


def test_policy_samples_are_first_candidates_of_a_search_too() -> None:
    """With one iteration the policy's samples are all candidates, as in best of N; the next is drawn by sigma."""
    model, z = quadratic(TARGET, spread=0.5), torch.zeros(2, 1)
    options: dict[str, Any] = {"horizon": 4, "num_candidates": 32}
    samples, _ = plan_once(make_best_of_n(**options), model, z)
    one, _ = plan_once(make_cem(**options, proposer=SampleProposer, iterations=1), model, z)
    assert torch.equal(one.candidates, samples.candidates) and torch.equal(one.actions, samples.actions)
    refined, _ = plan_once(make_cem(**options, proposer=SampleProposer, iterations=4), model, z)
    assert (refined.value > samples.value).all()
    with pytest.raises(ValueError, match="horizon is 5, but the model proposes chunks of 4 steps at most"):
        make_mppi(horizon=5, proposer=SampleProposer).initial_state(model, 1)


@pytest.mark.parametrize("discrete", [False, True])
def test_a_toy_without_a_behaviour_prior_refuses_to_be_asked_for_one(discrete: bool) -> None:
    table = torch.zeros(1, 2)
    model = TabularWAM(table.long(), table, torch.zeros(1), table) if discrete else quadratic(TARGET)
    state = model.state(torch.zeros(1, dtype=torch.int64) if discrete else torch.zeros(1, 1))
    assert model.propose(state, 2, mode="ode").actions.shape[1] == 2
    with pytest.raises(ValueError, match="does not answer 'behaviour'"):
        model.propose(state, 2, mode="ode", behaviour=1)


class Last:
    """A gate that lets the last `number` rows through."""

    needs, candidates, number = frozenset({"policy"}), 0, 0

    def __call__(self, model, state, plan_state, noise):  # type: ignore[no-untyped-def]
        rows = state.batch_size[0]
        return torch.arange(rows) >= rows - self.number


def rows_of(first) -> int:  # type: ignore[no-untyped-def]
    """Rows of what a compiled function is given first: a state, a key or the root of a tree."""
    if isinstance(first, NoiseKey):
        return first.row.numel()
    return first.batch_size[0] if isinstance(first, TensorDict) else first.tree.rows


@pytest.mark.parametrize("kind", ["shooting", "mcts"])
def test_whatever_number_of_rows_a_gate_lets_through_few_are_compiled(kind, monkeypatch) -> None:
    """Torch gives up after eight numbers of rows. Here the compiled function is the function itself."""
    module, sizes, shapes = importlib.import_module(f"wamrl.planners.{kind}"), [], set()

    def compiled(function, **options):  # type: ignore[no-untyped-def]
        def run(model, first, *rest):  # type: ignore[no-untyped-def]
            sizes.append(rows_of(first))
            shapes.add((function.__name__, sizes[-1], *(x.shape for x in rest if isinstance(x, torch.Tensor))))
            return function(model, first, *rest)

        return run

    monkeypatch.setattr(module, "compiled", compiled)
    monkeypatch.setattr(module, "require_compiler", lambda: None)
    gate = Last()
    usual = dict(horizon=2, num_candidates=8, iterations=3, num_elites=4, keep_elites=2, proposer=NoiseProposer)
    planners = [
        make_cem(**usual, gate=gate, compile=compile) if kind == "shooting"  # type: ignore[arg-type]
        else make_mcts(chunk=2, depth=2, simulations=8, num_candidates=4, gate=gate, reuse=True, compile=compile)
        for compile in (False, True)
    ]  # fmt: skip
    model = quadratic(TARGET, members=2)
    state, noise = model.state(torch.linspace(-0.5, 0.5, 9)[:, None]), NoiseKey.for_rows(9)
    for gate.number in range(10):
        (eager, after), (padded, then) = (
            planner.plan(model, state, planner.initial_state(model, 9), noise, Budget()) for planner in planners
        )
        for name in ("actions", "value", "weights", "candidates", "scores", "evaluations", "searched"):
            torch.testing.assert_close(getattr(padded, name), getattr(eager, name), equal_nan=True)
        assert after.batch_size == then.batch_size
        for key in after.keys(True, True):
            assert after[key].shape == then[key].shape
    functions = 2 if kind == "shooting" else 1  # an iteration, and the noise of those that follow the first
    assert set(sizes) == {1, 2, 4, 8, 16} and len(shapes) == 5 * functions, shapes


@pytest.mark.parametrize("kind", ["shooting", "mcts", "deep mcts"])
def test_what_a_plan_with_a_deadline_runs_is_compiled_before(kind, monkeypatch) -> None:
    """For all numbers of rows that a gate may let through; here the compiled function is the function itself.

    A deep tree has one for half of its levels, too.
    """
    module, shapes = importlib.import_module(f"wamrl.planners.{kind.removeprefix('deep ')}"), []

    def compiled(function, **options):  # type: ignore[no-untyped-def]
        def run(model, first, *rest):  # type: ignore[no-untyped-def]
            known = (x.shape if isinstance(x, torch.Tensor) else x for x in rest if isinstance(x, (torch.Tensor, int)))
            shapes.append((rows_of(first), function.__name__, *known))
            return function(model, first, *rest)

        return run

    monkeypatch.setattr(module, "compiled", compiled)
    monkeypatch.setattr(module, "require_compiler", lambda: None)
    gate, budget = Last(), Budget(evaluations=200, deadline_s=60.0)
    search = dict(horizon=2, num_candidates=24, iterations=3, num_elites=4, proposer=NoiseProposer)
    planner = (
        make_cem(**search, gate=gate, compile=True) if kind == "shooting"  # type: ignore[arg-type]
        else make_mcts(
            chunk=1, depth=8 if kind == "deep mcts" else 2, simulations=8, num_candidates=4, gate=gate, compile=True
        )
    )  # fmt: skip
    model = quadratic(TARGET, members=2)
    state, noise = model.state(torch.linspace(-0.5, 0.5, 5)[:, None]), NoiseKey.for_rows(5)
    planner.warm_up(model, state, noise, budget)
    before = set(shapes)
    assert {rows for rows, *_ in before} == {1, 2, 4, 8} and len(before) == 4 * (1 if kind == "mcts" else 2)
    shapes.clear()
    for gate.number in range(6):
        planner.plan(model, state, planner.initial_state(model, 5), noise, budget)
    assert shapes and set(shapes) <= before


def test_nothing_is_warmed_up_where_a_deadline_leaves_nothing_compiled(monkeypatch) -> None:
    monkeypatch.setattr("wamrl.planners.shooting.require_compiler", lambda: None)
    model, noise = quadratic(TARGET), NoiseKey.for_rows(5)
    make_mppi(compile=True).warm_up(model, model.state(torch.zeros(5, 1)), noise, Budget(deadline_s=60.0))
    assert not any(model.counts.values())


@pytest.mark.parametrize("kind", ["shooting", "mcts"])
def test_a_model_that_breaks_is_left_to_the_plan_to_tell_of(kind, monkeypatch) -> None:
    """Nothing is executed of what is compiled before; pytest makes errors of warnings."""
    monkeypatch.setattr(f"wamrl.planners.{kind}.compiled", lambda function, **options: function)
    monkeypatch.setattr(f"wamrl.planners.{kind}.require_compiler", lambda: None)
    model, noise, budget = BrokenWAM(TARGET, lambda z, a: a[..., 0] < 9.0, math.nan), NoiseKey.for_rows(1), Budget()
    for on_failure in ("hold", "raise"):
        planner = (
            make_cem(proposer=NoiseProposer, compile=True, on_failure=on_failure) if kind == "shooting"
            else make_mcts(simulations=8, num_candidates=4, compile=True, on_failure=on_failure)
        )  # fmt: skip
        planner.warm_up(model, model.state(torch.zeros(1, 1)), noise, budget)
    assert model.counts["transitions"] > 0


def test_more_graphs_are_compiled_than_torch_has_by_default(monkeypatch) -> None:
    def eager(function, *, fullgraph, dynamic, options):  # type: ignore[no-untyped-def]
        return plain(function, fullgraph=fullgraph, dynamic=dynamic, backend="eager")

    config = importlib.import_module("torch._dynamo").config
    with config.patch(recompile_limit=8):
        plain = torch.compile
        monkeypatch.setattr(torch, "compile", eager)
        double = importlib.import_module("wamrl.planners.running").compiled(lambda x: 2 * x)
        for rows in range(1, 12):
            assert torch.equal(double(torch.ones(rows)), torch.full((rows,), 2.0))


# ------------------------------------------------------------------------------------------- gates that remember


def moving(**options) -> ToyWAM:
    """Z' = z + 0.1 a, reward and value -z^2, policy a = -z."""
    return ToyWAM(
        lambda z, a: z + 0.1 * a,
        lambda z, a, new: -new.square().sum(dim=-1),
        lambda z: -z.square().sum(dim=-1),
        state_dim=1,
        action_dim=1,
        chunk_length=2,
        max_horizon=4,
        gain=torch.tensor([[-1.0]]),
        **options,
    )


def remembering(gate):
    """Planners of every kind, with two candidates' worth of steps per chunk."""
    shooting = make_cem(horizon=2, num_candidates=8, iterations=1, num_elites=4, gate=gate)
    return {
        "cem": shooting,
        "gradient": make_gradient(start=shooting, steps=2, num_starts=2),
        "mcts": make_mcts(chunk=2, depth=1, simulations=8, num_candidates=8, gate=gate),
    }


@pytest.mark.parametrize("kind", ["cem", "gradient", "mcts"])
def test_a_verifier_searches_where_the_last_imagination_was_off(kind: str) -> None:
    """Row 0 goes where the plan said, row 1 is pushed by 0.5, row 2 begins a new episode, row 3 has no number."""
    planner, model = remembering(Verifier(threshold=0.1))[kind], moving()
    z = torch.tensor([[0.1], [0.2], [0.3], [0.4]])
    fresh = planner.initial_state(model, 4)
    plan, plan_state = planner.plan(model, model.state(z), fresh, NoiseKey.for_rows(4), Budget())
    assert plan.searched.all()
    assert set(fresh.keys(True, True)) == set(plan_state.keys(True, True))
    for step in range(2):
        z = model.transition(z, plan.actions[:, step])
    plan_state["shift"] = torch.full((4,), 2)
    plan_state["warm"] = torch.tensor([True, True, False, True])
    pushed = z + torch.tensor([[0.0], [0.5], [0.0], [math.nan]])
    assert Verifier(0.1)(model, model.state(pushed), plan_state, NoiseKey.for_rows(4)).tolist() == [
        False,
        True,
        True,
        True,
    ]
    plan, plan_state = planner.plan(model, model.state(pushed[:3]), plan_state[:3], NoiseKey.for_rows(3), Budget())
    assert plan.searched.tolist() == [False, True, True]
    # One step of the chunk is executed: the second frame is not looked at yet, whatever it was.
    plan_state["shift"] = torch.ones(3, dtype=torch.int64)
    then = model.transition(pushed[:3], plan.actions[:, 0])
    assert not Verifier(0.1)(model, model.state(then), plan_state, NoiseKey.for_rows(3)).any()


@pytest.mark.parametrize("kind", ["cem", "gradient", "mcts"])
def test_what_a_verifier_imagines_counts(kind: str) -> None:
    """The chosen chunk once more: two steps; gradient plans have it twice, before and after the climb."""
    model, z = moving(), torch.zeros(2, 1)
    plain, _ = plan_once(remembering(Always())[kind], model, z)
    verified, _ = plan_once(remembering(Verifier())[kind], model, z)
    assert (verified.evaluations - plain.evaluations).tolist() == [4 if kind == "gradient" else 2] * 2
    for budget in (30, 50, 100):
        tight, _ = plan_once(remembering(Verifier())[kind], model, z, budget=Budget(evaluations=budget))
        assert int(tight.evaluations.max()) <= budget


def spending(gate, kind: str, plans: int, every: int = 2):
    """Whether each of the plans of an episode was searched, and what it took; a search takes 16 or 28 evaluations."""
    planner, model = remembering(gate)[kind], moving()
    plan_state, searched, spent = planner.initial_state(model, 1), [], []
    for step in range(plans):
        noise = NoiseKey.for_rows(1, step=step)
        plan, plan_state = planner.plan(model, model.state(torch.zeros(1, 1)), plan_state, noise, Budget())
        plan_state["shift"] = torch.full((1,), every)
        searched.append(bool(plan.searched))
        spent.append(int(plan.evaluations) * searched[-1])
    return searched, spent


@pytest.mark.parametrize("kind", ["cem", "gradient", "mcts"])
def test_a_budget_per_episode_is_spent_by_its_first_plans_and_never_exceeded(kind: str) -> None:
    _, (one, *_) = spending(BudgetGate(per_episode=10_000, per_second=None), kind, 1)
    assert one == {"cem": 16, "gradient": 16 + 2 * 2 * 5, "mcts": 16}[kind]
    searched, spent = spending(BudgetGate(per_episode=3 * one + 1, per_second=None), kind, 6)
    assert searched == [True] * 3 + [False] * 3 and sum(spent) == 3 * one
    with pytest.raises(ValueError, match=f"per_episode is {one - 1}, but one search takes up to {one} evaluations"):
        spending(BudgetGate(per_episode=one - 1, per_second=None), kind, 1)
    with pytest.raises(ValueError, match=f"per_episode is {one - 1}, but one search takes up to {one} evaluations"):
        PlannerPolicy(moving(), remembering(BudgetGate(per_episode=one - 1, per_second=None))[kind])
    PlannerPolicy(moving(), remembering(BudgetGate(per_episode=one, per_second=None))[kind])


@pytest.mark.parametrize("kind", ["cem", "gradient", "mcts"])
def test_a_budget_per_second_is_earned_by_control_time(kind: str) -> None:
    """Two steps of 0.1 s per plan: at one search per 0.5 s, plans at 0, 0.6, 1.0, 1.6 and 2.0 s are searches."""
    _, (one,) = spending(BudgetGate(), kind, 1)
    searched, spent = spending(BudgetGate(per_second=one / 0.5), kind, 11)
    assert [i * 2 / 10 for i, s in enumerate(searched) if s] == [0.0, 0.6, 1.0, 1.6, 2.0]
    assert all(sum(spent[: i + 1]) <= one + one / 0.5 * 0.2 * i + 1e-6 for i in range(11))


def test_a_new_episode_has_a_new_budget() -> None:
    planner, model = remembering(BudgetGate(per_episode=16, per_second=None))["cem"], moving()
    state, plan_state = model.state(torch.zeros(2, 1)), planner.initial_state(model, 2)
    seen = []
    for step in range(3):
        if step == 2:
            plan_state["warm"] = torch.tensor([True, False])
        plan, plan_state = planner.plan(model, state, plan_state, NoiseKey.for_rows(2, step=step), Budget())
        seen.append(plan.searched.tolist())
    assert seen == [[True, True], [False, False], [False, True]]


def test_gates_that_remember_refuse_what_they_cannot_do() -> None:
    model = moving(leave_out=("decode",))
    with pytest.raises(ValueError, match="does not answer 'decode'"):
        remembering(Verifier())["cem"].initial_state(model, 1)
    with pytest.raises(ValueError, match="gate.latent is 'h', but this model's state has z"):
        remembering(Verifier(latent="h"))["cem"].initial_state(moving(), 1)
    with pytest.raises(ValueError, match="gate.threshold is -1"):
        Verifier(threshold=-1)
    for options in ({"per_episode": 5}, {"per_second": None}):
        with pytest.raises(ValueError, match="exactly one of them has to be a number"):
            BudgetGate(**options)
    for options in ({"per_episode": 0, "per_second": None}, {"per_second": -1.0}, {"per_second": math.inf}):
        with pytest.raises(ValueError, match="must be a number of evaluations above 0"):
            BudgetGate(**options)


# --------------------------------------------------------------------------------------------------------- progress


def test_progress_is_what_the_value_gains_or_the_probability_of_success() -> None:
    """V = 2 z and 2 z + 5 (a head that overstates): going from 1 to 4 gains 6 by either; success goes from .2 to .5."""

    class TwoHeads(ToyWAM):
        def value(self, state):
            return torch.stack([2 * state["z"][..., 0], 2 * state["z"][..., 0] + 5], dim=-1)

    model = TwoHeads(lambda z, a: z + a, lambda z, a, n: n[..., 0], lambda z: z[..., 0], state_dim=1, action_dim=1)
    state = model.state(torch.tensor([[1.0]]))
    imagined = replace(
        futures(reward=torch.tensor([[[9.0, 9.0]], [[0.0, 0.0]]]), success=torch.tensor([[[0.2, 0.5]], [[0.6, 0.1]]])),
        leaf=TensorDict({"z": torch.tensor([[[[4.0]], [[0.0]]]])}, batch_size=[1, 2, 1]),
    )
    for scorer, expected in (
        (ProgressScorer(), [6.0, -2.0]),
        (ProgressScorer(of="value", risk="worst"), [6.0, -2.0]),
        (ProgressScorer(of="success"), [0.3, -0.5]),
    ):
        torch.testing.assert_close(scorer(model, state, imagined), torch.tensor([expected]))
    dead = replace(imagined, alive=torch.tensor([[[[1.0, 0.0]], [[1.0, 1.0]]]]))
    # Nothing is worth anything after the end: 0 - V(now), for the heads 0 - 2 and 0 - 7.
    torch.testing.assert_close(ProgressScorer()(model, state, dead), torch.tensor([[-4.5, -2.0]]))


def test_progress_asks_a_model_for_what_it_has_and_refuses_one_that_has_neither() -> None:
    assert asked_of(moving().spec, ProgressScorer()) == {"value"}
    assert asked_of(moving(leave_out=("value",)).spec, ProgressScorer()) == {"success"}
    with pytest.raises(ValueError, match="progress off a model's 'value' or 'success', but this model.*neither"):
        make_cem(scorer=ProgressScorer()).initial_state(moving(leave_out=("value", "success")), 1)
    with pytest.raises(ValueError, match="does not answer 'value'"):
        make_cem(scorer=ProgressScorer(of="value")).initial_state(moving(leave_out=("value",)), 1)
    with pytest.raises(ValueError, match="unknown of 'reward'"):
        ProgressScorer(of="reward")


def test_planning_by_progress_gets_there() -> None:
    plan, _ = plan_once(
        make_cem(horizon=4, proposer=NoiseProposer, sigma=0.5, scorer=ProgressScorer()), moving(), torch.ones(2, 1)
    )
    assert float(plan.actions.mean()) < -0.8
