"""The policies of the closed loop: what they execute, what they refuse, and what they keep track of."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import math
import time
from importlib import resources
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from tensordict import TensorDict

from wamrl import cli
from wamrl.control import AdaptivePolicy, InteractivePolicy, ModelPolicy, PlannerPolicy, RandomPolicy
from wamrl.evaluation import Start, StepRecord
from wamrl.film import Film, _drawing
from wamrl.interfaces import Budget, Context, Layout, Plan, Policy, PolicyState, State
from wamrl.planners import (
    NoiseProposer,
    NonFinitePlanError,
    ReturnScorer,
    ShootingPlanner,
    make_gradient,
    make_mcts,
    make_mppi,
)
from wamrl.planners.toys import TASKS, NoisyWAM, ToyWAM, observation, quadratic
from wamrl.report import late_words
from wamrl.results import plan_times, time_decisions

CONFIGS = resources.files("wamrl.configs")
TARGET = torch.tensor([0.3, -0.6])


def integrator(**options: object) -> ToyWAM:
    """Z' = z + 0.1 a, reward -z'^2, policy a = -z."""
    return ToyWAM(
        lambda z, a: z + 0.1 * a,
        lambda z, a, new: -new.square().sum(dim=-1),
        lambda z: -z.square().sum(dim=-1),
        state_dim=1,
        action_dim=1,
        gain=torch.tensor([[-1.0]]),
        **options,  # type: ignore[arg-type]
    )


def small(**options: object) -> ShootingPlanner:
    usual = {"horizon": 4, "num_candidates": 16, "sigma": 0.2, "scorer": ReturnScorer(), "choose": "mean"}
    return make_mppi(**{**usual, **options})  # type: ignore[arg-type]


def flags(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


def drive(policy: Policy, zs: list[torch.Tensor]) -> tuple[torch.Tensor, PolicyState]:
    """Actions [T, B, A] for the observations `zs`, from fresh episodes."""
    state = policy.initial_state(zs[0].shape[0])
    actions = []
    for t, z in enumerate(zs):
        action, state = policy.act(observation(z), state, torch.full((z.shape[0],), t == 0))
        actions.append(action)
    return torch.stack(actions), state


class SpeedWAM(ToyWAM):
    """A mass on a line: pushes change the speed, and only the place is observed.

    The latent is (place, speed). A single frame shows no speed; `observe` takes it from how the place changed.
    """

    def __init__(self) -> None:
        super().__init__(
            lambda z, a: torch.stack([z[..., 0] + z[..., 1] + 0.1 * a[..., 0], z[..., 1] + 0.1 * a[..., 0]], dim=-1),
            lambda z, a, new: -new[..., 0].square() - new[..., 1].square(),
            lambda z: -z.square().sum(dim=-1),
            state_dim=2,
            action_dim=1,
        )
        provides = self.spec.provides | {"observe"}
        self.spec = dataclasses.replace(self.spec, observation={"state": (1,)}, provides=provides)

    def encode(self, context: Context) -> State:
        """The place, at rest."""
        place = context.observation["state"][:, -1]
        return self.state(torch.cat([place, torch.zeros_like(place)], dim=-1))

    def observe(self, state, action, observation, reset):  # type: ignore[no-untyped-def]
        """The measured place, and its change; a row that starts anew is at rest."""
        place = observation["state"]
        speed = (place - state["z"][:, :1]).masked_fill(reset[:, None], 0.0)
        return self.state(torch.cat([place, speed], dim=-1))


def policies() -> list[Policy]:
    model = integrator()
    return [
        ModelPolicy(model),
        ModelPolicy(model, replan_every=3),
        PlannerPolicy(model, small()),
        PlannerPolicy(model, small(), replan_every=3),
        PlannerPolicy(model, small(), replan_every=None),
        InteractivePolicy(SpeedWAM(), small(), replan_every=2),
        AdaptivePolicy(model, small()),
        AdaptivePolicy(model, small(), compare="observation", replan_every=3),
        RandomPolicy(1),
    ]


@pytest.mark.parametrize("policy", policies(), ids=lambda p: type(p).__name__)
def test_every_policy_acts_inside_the_bounds_and_the_same_again(policy: Policy) -> None:
    assert isinstance(policy, Policy)
    zs = [torch.full((3, 1), 5.0), torch.full((3, 1), -5.0), torch.zeros(3, 1), torch.ones(3, 1)]
    first, state = drive(policy, zs)
    again, _ = drive(policy, zs)
    assert first.shape == (4, 3, 1) and first.dtype == torch.float32
    assert first.abs().max() <= 1.0 and torch.equal(first, again)
    assert state["step"].tolist() == [4, 4, 4]


@pytest.mark.parametrize("policy", policies(), ids=lambda p: type(p).__name__)
def test_rows_can_be_dropped_and_are_known_by_their_row(policy: Policy) -> None:
    """A row acts the same in whatever company: noise is keyed by its `row`, not by its place in the batch."""
    z = torch.tensor([[0.5], [-0.5], [0.2]])
    state = policy.initial_state(3)
    state["row"] = torch.tensor([7, 3, 5])
    _, state = policy.act(observation(z), state, flags(1, 1, 1))
    together, _ = policy.act(observation(z), state, flags(0, 0, 0))
    keep = torch.tensor([2, 0])
    dropped, left = policy.act(observation(z[keep]), state[keep], flags(0, 0))
    assert torch.allclose(dropped, together[keep], atol=1e-6)
    assert left["row"].tolist() == [5, 7]


def test_the_model_policy_follows_the_models_policy() -> None:
    actions, _ = drive(ModelPolicy(integrator()), [torch.tensor([[0.5], [-0.3]]), torch.tensor([[0.4], [-0.2]])])
    assert torch.allclose(actions[..., 0], torch.tensor([[-0.5, 0.3], [-0.4, 0.2]]))


def test_chunks_are_executed_before_deciding_again() -> None:
    model = integrator()
    policy = ModelPolicy(model, replan_every=3)
    actions, _ = drive(policy, [torch.tensor([[1.0]])] * 4)
    chunk = model.propose(model.state(torch.tensor([[1.0]])), 1).actions[0, 0, :, 0]
    assert torch.allclose(actions[:, 0, 0], torch.cat([chunk[:3], chunk[:1]]))
    assert model.counts["encode"] == 2


def test_encode_is_called_once_per_plan_and_only_for_rows_that_need_one() -> None:
    class CountingWAM(ToyWAM):
        """Counts the rows that were encoded."""

        def encode(self, context: Context) -> State:
            rows.append(context.task.shape[0])
            return super().encode(context)

    rows: list[int] = []
    model = CountingWAM(
        lambda z, a: z, lambda z, a, n: a[..., 0], lambda z: z[..., 0], state_dim=1, action_dim=1, chunk_length=4
    )
    policy = PlannerPolicy(model, small(iterations=3), replan_every=2)
    state = policy.initial_state(3)
    z = torch.zeros(3, 1)
    for is_init in ((1, 1, 1), (0, 1, 0), (0, 0, 0), (0, 0, 0)):
        _, state = policy.act(observation(z), state, flags(*is_init))
    # t0: all; t1: row 1 starts anew; t2: rows 0 and 2 have used two actions; t3: row 1 has.
    assert rows == [3, 1, 2, 1]
    assert [entry["rows"] for entry in policy.log] == rows
    assert state["step"].tolist() == [4, 3, 4]


def test_a_chunked_controller_shifts_the_warm_start_by_what_it_executed() -> None:
    seen: list[torch.Tensor] = []

    class WatchedPlanner:
        """Notes the plan states it is given."""

        horizon = 4

        def __init__(self) -> None:
            self.inner = small()

        def initial_state(self, model, rows):  # type: ignore[no-untyped-def]
            return self.inner.initial_state(model, rows)

        def plan(self, model, state, plan_state, noise, budget):  # type: ignore[no-untyped-def]
            seen.append(torch.stack([plan_state["warm"].long(), plan_state["shift"], noise.step, noise.row]))
            return self.inner.plan(model, state, plan_state, noise, budget)

    policy = PlannerPolicy(integrator(), WatchedPlanner(), replan_every=3)
    state = policy.initial_state(2)
    state["row"] = torch.tensor([40, 50])
    for t in range(5):
        _, state = policy.act(observation(torch.zeros(2, 1)), state, flags(t in (0, 4), t == 0))
    assert seen[0].tolist() == [[0, 0], [0, 0], [0, 0], [40, 50]]
    assert seen[1].tolist() == [[1, 1], [3, 3], [3, 3], [40, 50]]
    assert seen[2][0].tolist() == [0] and seen[2][2:].tolist() == [[0], [40]]


def test_planning_improves_on_the_policy_it_starts_from() -> None:
    """The policy moves too slowly; the exact model shows that faster is better."""
    model = integrator()
    z = torch.linspace(-0.8, 0.8, 8)[:, None]

    def cost(policy: Policy) -> float:
        state, now, total = policy.initial_state(8), z, 0.0
        for t in range(12):
            action, state = policy.act(observation(now), state, torch.full((8,), t == 0))
            now = now + 0.1 * action
            total += float(now.square().sum())
        return total

    planner = small(num_candidates=64, iterations=4, sigma=0.3, temperature=0.1)
    planned, proposed = cost(PlannerPolicy(model, planner)), cost(ModelPolicy(model))
    assert planned < 0.8 * proposed


def test_the_log_splits_the_time_and_counts_evaluations() -> None:
    class SlowWAM(ToyWAM):
        """Encodes in 20 ms and imagines in 40 ms."""

        def encode(self, context: Context) -> State:
            time.sleep(0.02)
            return super().encode(context)

        def propose(self, *arguments, **options):  # type: ignore[no-untyped-def]
            time.sleep(0.04)
            return super().propose(*arguments, **options)

    model = SlowWAM(
        lambda z, a: z, lambda z, a, n: a[..., 0], lambda z: z[..., 0], state_dim=1, action_dim=1, members=3
    )
    policy = PlannerPolicy(model, small(iterations=2))
    drive(policy, [torch.zeros(2, 1)])
    (entry,) = policy.log
    assert entry["encode_s"] >= 0.02 and entry["imagine_s"] >= 0.04 and entry["search_s"] > 0
    assert entry["plan_s"] == pytest.approx(entry["encode_s"] + entry["imagine_s"] + entry["search_s"])
    assert entry["evaluations"] == 2 * (16 * 4 * 2 * 3) and entry["rows"] == 2 and entry["searched"] == 2
    acting = ModelPolicy(model, replan_every=2)
    shown = [{key: value.numpy() for key, value in observation(torch.zeros(1, 1))[0].items()}]
    times = plan_times(time_decisions(acting, shown, 3), 1)
    assert times["encode_ms"]["p50"] >= 20 and times["propose_ms"]["p50"] >= 40 and "search_ms" not in times
    assert times["total_ms"]["p50"] >= 60 and (times["plans"], times["replan_every"], times["mean_rows"]) == (3, 2, 1.0)


def test_of_a_policy_without_a_log_the_call_alone_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("wamrl.results.time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(RandomPolicy):
        """Takes a second to begin an episode and, call after call, 1, 2, 3 ... milliseconds to act."""

        calls = 0

        def initial_state(self, rows: int) -> PolicyState:
            now[0] += 1.0
            return super().initial_state(rows)

        def act(self, observation, policy_state, is_init):  # type: ignore[no-untyped-def]
            self.calls += 1
            now[0] += 0.001 * self.calls
            return super().act(observation, policy_state, is_init)

    log = time_decisions(Slow(2), [{"state": np.zeros(1)}, {"state": np.ones(1)}], 3)
    assert [entry["plan_s"] for entry in log] == pytest.approx([0.006, 0.007, 0.008])  # five calls to warm up
    assert plan_times(log, 1)["total_ms"]["p50"] == pytest.approx(7.0) and "encode_ms" not in plan_times(log, 1)


def test_the_last_plan_is_kept_and_announced() -> None:
    heard: list[tuple[list[int], Plan]] = []
    model = integrator()
    policy = PlannerPolicy(
        model, small(), replan_every=2, on_plan=lambda rows, state, plan: heard.append((rows.tolist(), plan))
    )
    drive(policy, [torch.zeros(2, 1)] * 3)
    assert [rows for rows, _ in heard] == [[0, 1], [0, 1]]
    assert policy.last_plan is heard[-1][1] and policy.last_plan.actions.shape == (2, 4, 1)
    assert policy.last_state is not None and policy.last_rows is not None
    imagined = model.imagine(policy.last_state, policy.last_plan.actions[:, None])
    assert imagined.frames.shape == (2, 1, 1, 4, 1)


def filmed(
    rows: list[int],
    film: int,
    names: tuple[str, ...] = ("hand", "object", "goal"),
    search: object = None,
    **toy: object,
) -> dict:
    """The trace of the episode whose start has the number `film`, run beside those of the other starts `rows`."""
    model = NoisyWAM(dims=3, **toy)  # type: ignore[arg-type]
    places = {"state": {name: (0, 3) for name in names}}
    model.spec = dataclasses.replace(model.spec, layout=Layout.of({"places": places}, model.spec.observation))
    starts = [Start(TASKS[0], row) for row in rows]
    policy = PlannerPolicy(model, search or small(), replan_every=2)  # type: ignore[arg-type]
    watched = Film(policy, None, Start(TASKS[0], film), pictures=False)
    policy_state = policy.initial_state(len(rows))
    policy_state["row"] = torch.tensor([start.row for start in starts])
    z, flags = torch.full((len(rows), 3), 0.3), torch.zeros(len(rows), 1)
    for step in range(4):
        before = observation(z)
        action, policy_state = watched.act(before, policy_state, torch.full((len(rows),), step == 0))
        z = model.transition(z, action)
        shown = {"reward": flags, "success": flags > 0, "done": flags > 0}
        after = observation(z).update(shown)
        watched.see(StepRecord(torch.arange(len(rows)), before, action, after, [step] * len(rows), starts))
    return watched.trace()


def test_what_a_film_shows_of_an_episode_does_not_depend_on_those_beside_it() -> None:
    alone, among = filmed([2], 2), filmed([5, 2, 7], 2)
    assert len(alone["plans"]) == 2 and among["plans"] == alone["plans"]
    first, second = (plan["uncertainty"] for plan in alone["plans"])
    assert first != second  # each plan is drawn anew


def test_a_film_of_a_hand_alone_has_its_paths_and_no_others() -> None:
    everything, trace = filmed([2], 2), filmed([2], 2, ("hand",))
    assert trace["axes"] is None and trace["goal"] == trace["object"] == []
    assert trace["path"] == everything["path"] and np.shape(trace["path"]) == (5, 3)
    for plan, whole in zip(trace["plans"], everything["plans"], strict=True):
        assert plan["candidates"] == whole["candidates"] and plan["path"] == whole["path"] and plan["object"] == []


@pytest.mark.parametrize(("toy", "name"), [({}, "state"), ({"leave_out": ("decode",)}, "latent")])
@pytest.mark.parametrize("tree", [False, True])
def test_without_a_hand_a_film_shows_two_components_of_the_state_or_else_of_the_latent(toy, name, tree) -> None:
    search = make_mcts(simulations=6, num_candidates=3, chunk=2, depth=2) if tree else None
    trace = filmed([2], 2, (), search, **toy)
    shares = [float(axis.rpartition("(")[2].removesuffix(" %)")) for axis in trace["axes"]]
    assert trace["axes"] == [f"principal component {k} of the {name} ({shares[k - 1]:.0f} %)" for k in (1, 2)]
    assert 100 >= shares[0] >= shares[1] > 0 and sum(shares) <= 101
    assert np.shape(trace["path"]) == (5, 2) and trace["goal"] == trace["object"] == []
    assert len(trace["plans"]) == 2
    for plan in trace["plans"]:
        assert plan["path"][0] == trace["path"][plan["step"]] and len(plan["path"]) == (3 if tree else 5)
        if tree:
            assert np.shape(plan["tree"]["path"]) == (plan["tree"]["nodes"], 2) and plan["tree"]["nodes"] > 3
            assert plan["tree"]["path"][0] == plan["path"][0]
        else:
            assert len(plan["candidates"]) == 16
            assert all(len(c["path"]) == 5 and c["path"][0] == plan["path"][0] for c in plan["candidates"])
            assert len({tuple(c["path"][-1]) for c in plan["candidates"]}) > 8


def test_the_plane_of_a_film_is_the_one_of_most_variance_and_its_signs_are_settled() -> None:
    """Two numbers go together, a third on its own and a fourth not at all; their units do not matter."""
    x, y = torch.tensor([-1.0, -1.0, 1.0, 1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    lived = torch.stack([x, -1000 * x, 0.01 * y, torch.full((4,), 0.7)], dim=1)
    broken = torch.full((1, 4), math.nan)
    draw, axes = _drawing(Layout(), "state", torch.cat([lived, broken]))
    assert axes == ["principal component 1 of the state (67 %)", "principal component 2 of the state (33 %)"]
    np.testing.assert_allclose(draw("path", lived), torch.stack([math.sqrt(2) * x, y], dim=1), atol=1e-4)
    assert draw("goal", lived) == []
    draw, axes = _drawing(Layout(), None, lived[:, 1:2])  # there is one component of one number
    assert axes is not None and axes[0].endswith("(100 %)") and axes[1].endswith("(0 %)")
    np.testing.assert_allclose(draw("path", lived[:, 1:2]), torch.stack([-x, 0 * x], dim=1), atol=1e-4)


def test_a_film_says_why_a_model_shows_nothing() -> None:
    class Silent(NoisyWAM):
        def imagine(self, *args, **options):  # type: ignore[no-untyped-def]
            return dataclasses.replace(super().imagine(*args, **options), frames=None)

    policy = PlannerPolicy(Silent(dims=3), small())
    watched = Film(policy, None, Start(TASKS[0], 0), pictures=False)
    assert "nothing was planned" in watched.trace()["note"]
    policy_state = policy.initial_state(1)
    policy_state["row"] = torch.tensor([Start(TASKS[0], 0).row])
    before = observation(torch.full((1, 3), 0.3))
    action, _ = watched.act(before, policy_state, flags(1))
    after = before.clone().update({name: torch.zeros(1, 1) for name in ("reward", "success", "done")})
    watched.see(StepRecord(torch.arange(1), before, action, after, [0], [Start(TASKS[0], 0)]))
    assert watched.trace()["note"].startswith("Silent shows nothing of what it imagines; let imagine(")


def test_the_budget_reaches_the_planner() -> None:
    policy = PlannerPolicy(integrator(), small(iterations=10), evaluations=100)
    drive(policy, [torch.zeros(1, 1)])
    assert 0 < policy.log[0]["evaluations"] <= 100


def test_an_open_loop_controller_executes_the_whole_chunk() -> None:
    policy = PlannerPolicy(integrator(), small(), replan_every=None)
    drive(policy, [torch.zeros(2, 1)] * 9)
    assert policy.replan_every == 4 and policy.plans == 3 and [entry["early"] for entry in policy.log] == [0, 0, 0]


def test_an_interactive_controller_knows_what_no_single_frame_shows() -> None:
    """A mass that already moves: only who remembers where it was brakes it."""

    def cost(kind: type[PlannerPolicy]) -> float:
        model = SpeedWAM()
        planner = small(num_candidates=64, iterations=4, sigma=0.4, temperature=0.1, proposer=NoiseProposer)
        policy, z, total = kind(model, planner), torch.tensor([[0.0, 0.3], [0.4, -0.2]]), 0.0
        state = policy.initial_state(2)
        for t in range(15):
            action, state = policy.act(observation(z[:, :1]), state, torch.full((2,), t == 0))
            z = model.transition(z, action)
            total += float(z.square().sum())
        return total

    assert cost(InteractivePolicy) < 0.5 * cost(PlannerPolicy)


def test_observe_gets_what_was_measured_and_executed_and_who_starts_anew() -> None:
    heard = []

    class Listening(SpeedWAM):
        def observe(self, state, action, observation, reset):  # type: ignore[no-untyped-def]
            heard.append((state["z"].clone(), action.clone(), observation["state"].clone(), reset.tolist()))
            return super().observe(state, action, observation, reset)

    policy = InteractivePolicy(Listening(), small(), replan_every=3)
    state, z = policy.initial_state(2), torch.tensor([[0.5], [0.1]])
    first, state = policy.act(observation(z), state, flags(1, 1))
    second, state = policy.act(observation(z + 0.2), state, flags(0, 1))
    assert [entry[3] for entry in heard] == [[True, True], [False, True]]
    assert torch.equal(heard[1][1], first) and torch.equal(heard[1][2], z + 0.2)
    assert torch.allclose(heard[1][0][:, :1], z)  # the measured place, not the imagined one
    assert torch.allclose(state["state", "z"], torch.tensor([[0.7, 0.2], [0.3, 0.0]]))
    assert torch.equal(state["action"], second)


def test_an_interactive_controllers_memory_stays_bounded_over_10000_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing grows: neither the policy state nor what the policy itself keeps."""
    monkeypatch.setattr("wamrl.control.LOG_LENGTH", 100)
    policy = InteractivePolicy(SpeedWAM(), small(num_candidates=2), replan_every=4)
    state = policy.initial_state(1)

    def held() -> int:
        assert policy.last_plan is not None and policy.last_state is not None
        tensors = [*state.values(True, True), *policy.last_state.values(True, True), policy.last_plan.candidates]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    sizes = {}
    for t in range(10_000):
        _, state = policy.act(observation(torch.full((1, 1), math.sin(t))), state, flags(t == 0))
        if t in (10, 9_999):
            sizes[t] = held()
    assert sizes[10] == sizes[9_999] and policy.plans == 2_500 and len(policy.log) == 100


def gusty(threshold: float, **options: object) -> tuple[list[list[int]], AdaptivePolicy]:
    """Rows that planned at each of 9 steps, where a gust takes row 1 by 0.5 with the third step."""
    model = integrator()
    policy = AdaptivePolicy(model, small(), threshold=threshold, **options)  # type: ignore[arg-type]
    planned: list[list[int]] = []
    policy.on_plan = lambda rows, state, plan: planned[-1].extend(rows.tolist())
    state, z = policy.initial_state(2), torch.tensor([[0.4], [0.4]])
    for t in range(9):
        planned.append([])
        action, state = policy.act(observation(z), state, torch.full((2,), t == 0))
        z = z + 0.1 * action
        if t == 2:
            z[1] += 0.5
    return planned, policy


@pytest.mark.parametrize("compare", ["latent", "observation"])
def test_an_adaptive_controller_plans_early_where_the_world_surprises_it(compare: str) -> None:
    """Chunks of 4; the gust of 0.5 shows at the fourth observation, before the first chunk is used up."""
    planned, policy = gusty(0.1, compare=compare)
    assert planned == [[0, 1], [], [], [1], [0], [], [], [1], [0]]
    assert [entry["early"] for entry in policy.log] == [0, 1, 0, 0, 0]
    planned, policy = gusty(0.6, compare=compare)
    assert planned == [[0, 1], [], [], [], [0, 1], [], [], [], [0, 1]]
    # 16 candidates of 4 steps, and the three steps that are verified.
    assert {entry["evaluations"] for entry in policy.log} == {2 * (16 * 4 + 3)}


def test_an_adaptive_controller_keeps_to_its_budget() -> None:
    planned, policy = gusty(0.1, evaluations=35)
    assert all(entry["evaluations"] <= 35 * entry["rows"] for entry in policy.log)
    # Three of the six are for imagining the chosen chunk once more; one candidate takes four.
    with pytest.raises(ValueError, match="evaluations is 6 per plan, of which .* takes 3, .*allow at least 4"):
        gusty(0.1, evaluations=6)

    class Own:  # without a check_budget
        horizon, initial_state, plan = 4, small().initial_state, small().plan

    with pytest.raises(ValueError, match="evaluations is 3 per plan, of which .* takes 3, .*must be at least 1"):
        AdaptivePolicy(integrator(), Own(), threshold=0.1, evaluations=3)


def test_controllers_refuse_models_and_settings_that_they_cannot_serve() -> None:
    with pytest.raises(ValueError, match="does not answer 'observe'.*Use .*wam=reference"):
        InteractivePolicy(integrator(), small())
    with pytest.raises(ValueError, match="does not answer 'decode'"):
        AdaptivePolicy(integrator(leave_out=("decode",)), small(), compare="observation")
    with pytest.raises(ValueError, match="replan_every is 1, so that every step has a plan of its own"):
        AdaptivePolicy(integrator(), small(), replan_every=1)
    for threshold in (-1.0, math.nan, math.inf, True, "0.1", None):
        with pytest.raises(ValueError, match="controller.threshold is"):
            AdaptivePolicy(integrator(), small(), threshold=threshold)
    with pytest.raises(ValueError, match="unknown compare 'latents'; did you mean 'latent'"):
        AdaptivePolicy(integrator(), small(), compare="latents")
    with pytest.raises(ValueError, match="controller.latent is 'h', but this model's state has z"):
        AdaptivePolicy(integrator(), small(), latent="h").initial_state(1)


@pytest.mark.parametrize("name", sorted(p.name.removesuffix(".yaml") for p in (CONFIGS / "controller").iterdir()))
def test_every_controller_is_a_choice_of_the_config(name: str) -> None:
    settings = cli.plain(cli.compose("plan", [f"controller={name}"]))["controller"]
    policy = instantiate(settings)(integrator() if name != "interactive" else SpeedWAM(), small())
    assert isinstance(policy, Policy)
    drive(policy, [torch.zeros(2, 1)] * 3)
    defaults = {n: o.default for n, o in inspect.signature(type(policy)).parameters.items()}
    own = {k: v for k, v in settings.items() if k in defaults}
    if name == "adaptive":
        assert own == {k: defaults[k] for k in own}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("make", [ModelPolicy, lambda model: PlannerPolicy(model, small())])
def test_broken_observations_are_refused_by_key_and_row(make, value: float) -> None:  # type: ignore[no-untyped-def]
    policy = make(integrator())
    z = torch.zeros(3, 1)
    z[1] = value
    with pytest.raises(ValueError, match=r"observation 'state' has NaN or infinite numbers in row\(s\) \[1\]"):
        drive(policy, [z])
    assert policy.model.counts["encode"] == 0


def test_a_large_but_finite_observation_is_accepted() -> None:
    drive(ModelPolicy(integrator()), [torch.full((3, 1), 3e38)])


def test_unknown_tasks_are_refused_with_the_known_ones() -> None:
    policy = ModelPolicy(integrator())
    wrong = observation(torch.zeros(2, 1))
    wrong["task"][1] = 5
    with pytest.raises(ValueError, match=rf"row\(s\) \[1\].*trained on {TASKS[0]}, {TASKS[1]}"):
        policy.act(wrong, policy.initial_state(2), flags(1, 1))
    with pytest.raises(ValueError, match="needs the key 'task'"):
        policy.act(wrong.exclude("task"), policy.initial_state(2), flags(1, 1))


def test_observations_of_another_size_are_refused() -> None:
    policy = ModelPolicy(integrator())
    with pytest.raises(ValueError, match=r"'state' has shape \[2\] per row, but the model was trained on \[1\]"):
        drive(policy, [torch.zeros(3, 2)])
    with pytest.raises(ValueError, match=r"reads the observation key 'state', but the observation has \['task'\]"):
        policy.act(observation(torch.zeros(1, 1)).exclude("state"), policy.initial_state(1), flags(1))
    with pytest.raises(ValueError, match=r"observation.unsqueeze\(0\)"):
        policy.act(observation(torch.zeros(1, 1))[0], policy.initial_state(1), flags(1))
    with pytest.raises(ValueError, match="policy_state has 2 rows, but the observation 1"):
        policy.act(observation(torch.zeros(1, 1)), policy.initial_state(2), flags(1))
    with pytest.raises(ValueError, match=r"is_init has shape \[2\], but must be \[1\]"):
        policy.act(observation(torch.zeros(1, 1)), policy.initial_state(1), flags(1, 1))


def test_other_keys_of_an_environment_are_ignored() -> None:
    policy = PlannerPolicy(integrator(), small())
    both = observation(torch.zeros(2, 1))
    both["pixels"] = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    both["contact"] = torch.full((2, 1), math.nan)
    action, _ = policy.act(both, policy.initial_state(2), torch.ones(2, 1, dtype=torch.bool))
    assert action.shape == (2, 1)


@pytest.mark.parametrize("every", [0, 5, 1.5, True])
def test_replan_every_must_fit_the_chunk(every: object) -> None:
    with pytest.raises(ValueError, match="whole number from 1 to 4"):
        PlannerPolicy(integrator(), small(), replan_every=every)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="whole number from 1 to 4"):
        ModelPolicy(integrator(), replan_every=every)  # type: ignore[arg-type]


def test_other_constructor_errors() -> None:
    with pytest.raises(ValueError, match="mode is 'fast'"):
        ModelPolicy(integrator(), "fast")
    with pytest.raises(ValueError, match="does not answer 'policy'"):
        ModelPolicy(integrator(leave_out=("policy",)))
    with pytest.raises(ValueError, match="action_dim is 0"):
        RandomPolicy(0)
    with pytest.raises(ValueError, match="does not answer 'value'"):
        PlannerPolicy(integrator(leave_out=("value",)), small())
    with pytest.raises(ValueError, match="evaluations is 0"):
        PlannerPolicy(integrator(), small(), evaluations=0)
    for deadline_s in (-1.0, 0, math.nan, math.inf, True, "0.1"):
        with pytest.raises(ValueError, match=f"deadline_s is {deadline_s!r}, but must be above 0 seconds"):
            PlannerPolicy(integrator(), small(), deadline_s=deadline_s)


def test_an_adaptive_controller_leaves_time_for_its_own_look(monkeypatch) -> None:
    """20 s per query and 1 s per transition; what the look at the first plan took is left of the second's deadline."""
    now = [0.0]

    class Slow(ToyWAM):
        def roll(self, state, num, act, horizon):
            now[0] += 20.0 + num * horizon
            return super().roll(state, num, act, horizon)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    model = integrator()
    model.__class__ = Slow
    for deadline_s in range(100, 200, 7):
        planner = make_mppi(horizon=4, num_candidates=64, sigma=0.5, proposer=NoiseProposer)
        policy = AdaptivePolicy(model, planner, threshold=0.0, deadline_s=float(deadline_s), replan_every=4)
        drive(policy, 3 * [torch.full((2, 1), 0.5)])
        assert len(policy.log) == 3 and [entry["late"] for entry in policy.log[1:]] == [0, 0]


def test_broken_rows_are_named_as_the_batch_counts_them() -> None:
    """The second of two rows is due for a plan alone, and breaks."""
    model = quadratic(torch.tensor([0.5]))
    policy = PlannerPolicy(model, make_mppi(horizon=2, num_candidates=8), replan_every=2)
    state = policy.initial_state(2)
    fresh = torch.tensor([True, True])
    _, state = policy.act(observation(torch.zeros(2, 1)), state, fresh)
    model.reward_of = lambda z, a, new: a[..., 0] * math.nan
    with pytest.raises(NonFinitePlanError, match=r"row\(s\) \[1\]"):
        policy.act(observation(torch.zeros(2, 1)), state, torch.tensor([False, True]))


def test_plans_that_miss_their_deadline_are_counted() -> None:
    policy = PlannerPolicy(integrator(), small(), deadline_s=1e-6)
    drive(policy, [torch.zeros(1, 1)] * 3)
    assert [entry["late"] for entry in policy.log] == [1, 1, 1]
    assert plan_times(policy.log, 1)["late"] == 3
    for deadline_s in (None, 100.0):
        policy = PlannerPolicy(integrator(), small(), deadline_s=deadline_s)
        drive(policy, [torch.zeros(1, 1)] * 3)
        assert plan_times(policy.log, 1)["late"] == 0
    results = {"timing": {"single": {"late": 1, "plans": 9}}, "config": {"controller": {"deadline_s": 0.02}}}
    assert late_words(results) == "1 of 9 single plans took longer than the deadline of 20 ms."
    assert late_words(results | {"config": {"controller": {"deadline_s": None}}}) == ""


def test_garbage_is_not_collected_in_a_plan_with_a_deadline() -> None:
    collects = []

    class Looks:
        inner, horizon = small(), 4

        def initial_state(self, model, rows):
            return self.inner.initial_state(model, rows)

        def plan(self, model, state, plan_state, noise, budget):
            collects.append(gc.isenabled())
            if budget.deadline_s == 7.0:
                raise RuntimeError("a plan that breaks")
            return self.inner.plan(model, state, plan_state, noise, budget)

    for deadline_s in (None, 100.0):
        drive(PlannerPolicy(integrator(), Looks(), deadline_s=deadline_s), [torch.zeros(1, 1)])
        assert gc.isenabled()
    with pytest.raises(RuntimeError, match="a plan that breaks"):
        drive(PlannerPolicy(integrator(), Looks(), deadline_s=7.0), [torch.zeros(1, 1)])
    assert gc.isenabled() and collects == [True, False, False]


def test_what_a_planner_compiles_before_its_first_plan_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: to compile takes 100 s per new row, a plan 1 s; it is asked with the key of the plan."""
    now, asked = [0.0], []

    class Compiles:
        inner, horizon, warm = small(), 4, 0

        def initial_state(self, model, rows):
            return self.inner.initial_state(model, rows)

        def warm_up(self, model, state, noise, budget):
            asked.append((noise.row.tolist(), noise.step.tolist(), noise.seed, budget.deadline_s))
            now[0] += 100.0 * max(0, len(noise.row) - self.warm)
            self.warm = max(self.warm, len(noise.row))

        def plan(self, model, state, plan_state, noise, budget):
            now[0] += 1.0 + 100.0 * max(0, len(noise.row) - self.warm)
            return self.inner.plan(model, state, plan_state, noise, Budget())

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    policy = PlannerPolicy(integrator(), Compiles(), deadline_s=2.0, seed=7)
    for rows in (1, 3, 2, 3):
        drive(policy, [torch.zeros(rows, 1)] * 2)
    assert [entry["late"] for entry in policy.log] == [0] * 8 and {entry["plan_s"] for entry in policy.log} == {1.0}
    assert asked == [([0], [0], 7, 2.0), ([0, 1, 2], [0, 0, 0], 7, 2.0)]
    drive(PlannerPolicy(integrator(), Compiles()), [torch.zeros(2, 1)])
    assert len(asked) == 2  # where there is no deadline, the first plan may take what it takes


@pytest.mark.parametrize(
    ("planner", "least"),
    [(small(), 4), (make_gradient(start=small(), steps=1), 4), (make_mcts(chunk=2, depth=1), 2)],
)
def test_a_budget_without_room_for_one_candidate_is_refused_before_the_first_plan(planner, least: int) -> None:
    with pytest.raises(ValueError, match=f"budget.evaluations is {least - 1} per row.*allow at least {least}"):
        PlannerPolicy(integrator(), planner, evaluations=least - 1)
    policy = PlannerPolicy(integrator(), planner, evaluations=least)
    drive(policy, [torch.zeros(1, 1)])
    assert policy.log[0]["evaluations"] == least


def test_a_tree_that_could_never_reuse_what_it_keeps_is_refused() -> None:
    planner = make_mcts(chunk=2, depth=1, reuse=True)
    for controller in (PlannerPolicy, AdaptivePolicy):
        assert controller(integrator(), planner, replan_every=None).replan_every == 2
    with pytest.raises(ValueError, match="of 2 steps, but replan_every is 1.*set controller.replan_every=2, or"):
        PlannerPolicy(integrator(), planner, replan_every=1)


def test_a_policy_that_proposes_nan_is_refused() -> None:
    model = quadratic(TARGET, gain=torch.full((2, 1), math.nan))
    with pytest.raises(ValueError, match=r"NaN or infinite actions in row\(s\) \[0, 1\].*numbers up to 0;"):
        drive(ModelPolicy(model), [torch.zeros(2, 1)])


def test_random_actions_are_uniform_and_independent() -> None:
    policy = RandomPolicy(2)
    empty = TensorDict({}, batch_size=[400])
    state, actions = policy.initial_state(400), []
    for t in range(10):
        action, state = policy.act(empty, state, torch.full((400,), t == 0))
        actions.append(action)
    sample = torch.stack(actions)
    assert sample.mean().abs() < 0.03 and sample.var().item() == pytest.approx(1 / 3, rel=0.05)
    assert torch.corrcoef(sample.permute(0, 2, 1).reshape(20, 400)).fill_diagonal_(0).abs().max() < 0.25
    other, _ = RandomPolicy(2, seed=1).act(empty, policy.initial_state(400), torch.ones(400, dtype=torch.bool))
    assert not torch.equal(other, sample[0])
