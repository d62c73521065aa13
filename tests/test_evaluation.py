"""Intervals against hand-worked cases and scipy; episodes that do not depend on how they are batched."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from wamrl.envs.layouts import METAWORLD
from wamrl.evaluation import (
    Episode,
    FailureTags,
    Recording,
    Start,
    compare,
    fidelity,
    gain,
    imagined_return,
    mcnemar,
    paired,
    paired_return,
    percentiles,
    protocol_hash,
    read_episodes,
    run_episodes,
    sooner,
    summarise,
    wilson,
    write_episodes,
)
from wamrl.interfaces import Layout
from wamrl.planners.toys import NoisyWAM, ToyWAM, observation

PUSH, REACH = "metaworld/push-v3", "metaworld/reach-v3"


def test_wilson_worked_by_hand():
    # n = 10, k = 5, z = 2: centre = (0.5 + 0.2) / 1.4 = 0.5, half = 2 / 1.4 * sqrt(0.025 + 0.01) = 0.267261.
    low, high = wilson(5, 10, z=2.0)
    assert low == pytest.approx(0.5 - 0.2672612, abs=1e-6)
    assert high == pytest.approx(0.5 + 0.2672612, abs=1e-6)
    # k = 0: low is 0 and high is z^2 / (n + z^2) = 4 / 14.
    assert wilson(0, 10, z=2.0) == (0.0, pytest.approx(4 / 14))
    assert wilson(10, 10, z=2.0) == (pytest.approx(10 / 14), 1.0)


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (7, 10), (49, 50), (297, 300)])
def test_wilson_agrees_with_scipy(successes, trials):
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson(successes, trials) == (pytest.approx(theirs.low, abs=1e-12), pytest.approx(theirs.high, abs=1e-12))


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_impossible_counts(successes, trials):
    with pytest.raises(ValueError, match="successes <= trials"):
        wilson(successes, trials)


def test_mcnemar_worked_by_hand_and_against_scipy():
    # Five starts differ, all in favour of the first: 2 * (1/2)^5 = 0.0625.
    assert mcnemar(5, 0) == pytest.approx(0.0625)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0
    stats = pytest.importorskip("scipy.stats")
    assert mcnemar(2, 9) == pytest.approx(stats.binomtest(2, 11).pvalue)


def test_paired_without_correlation_is_newcombes_square_and_add():
    # An empty diagonal has phi = 0 after the continuity correction, so the interval is the unpaired method 10:
    # p1 = p2 = 1/2, Wilson half-width w on each side, so the bounds are -+ sqrt(2) w.
    first, second = [True, True, False, False], [True, False, True, False]
    result = paired(first, second)
    half = wilson(2, 4)[1] - 0.5
    assert result.difference == 0.0
    assert (result.only_first, result.only_second) == (1, 1)
    assert result.high == pytest.approx(math.sqrt(2) * half)
    assert result.low == pytest.approx(-math.sqrt(2) * half)


def test_pairing_narrows_the_interval_when_methods_agree():
    agree = paired([True] * 8 + [False] * 8, [True] * 8 + [False] * 8)
    mixed = paired([True] * 8 + [False] * 8, [True, False] * 8)
    assert agree.high - agree.low < mixed.high - mixed.low
    assert agree.p_value == 1.0


def test_paired_is_antisymmetric():
    first, second = [True, True, True, False, True], [False, True, False, False, True]
    one, other = paired(first, second), paired(second, first)
    assert one.difference == -other.difference
    assert one.low == pytest.approx(-other.high)
    assert one.p_value == other.p_value


def test_how_much_sooner_is_counted_where_both_succeed():
    def episode(method: str, start: int, steps: int | None) -> Episode:
        return Episode("toy/a", start, "dev", 0, method, steps is not None, steps, 0.0, 100)

    shown = [(10, 14), (20, 21), (30, 37), (None, 5), (5, None)]
    episodes = [episode(m, i, steps) for i, both in enumerate(shown) for m, steps in zip("ab", both, strict=True)]
    found = sooner(episodes, "a", "b")
    assert found is not None and found.n == 3 and found.difference == pytest.approx(-4.0)
    # Gaps -4, -1, -7 have the standard deviation 3; Student's t with two degrees of freedom is 4.303.
    half = 4.3027 * 3.0 / 3.0**0.5
    assert (found.low, found.high) == pytest.approx((-4.0 - half, -4.0 + half), abs=1e-3)
    two = sooner(episodes[:4], "a", "b")
    assert two is not None and two.n == 2 and two.low is None and two.high is None
    assert sooner(episodes, "a", "c") is None


def test_paired_refuses_different_starts():
    with pytest.raises(ValueError, match="same starts"):
        paired([True], [True, False])


def test_percentiles():
    assert percentiles([1.0, 2.0, 3.0], (50,)) == {"p50": 2.0}
    assert percentiles([]) == {}


def _episode(method: str, start: int, success: bool, length: int = 10) -> Episode:
    return Episode(
        task=PUSH,
        start=start,
        split="test",
        seed=0,
        method=method,
        success=success,
        first_success_step=length if success else None,
        episode_return=1 / 3,
        length=length,
        tag="" if success else "slip",
    )


def test_episodes_survive_the_file_exactly(tmp_path: Path):
    episodes = [_episode("a", 0, True), _episode("a", 1, False)]
    write_episodes(tmp_path / "episodes.csv", episodes)
    assert read_episodes(tmp_path / "episodes.csv") == episodes


def test_a_malformed_episodes_file_is_named(tmp_path: Path):
    path = tmp_path / "episodes.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="lacks the columns"):
        read_episodes(path)


def test_summary_counts_and_steps():
    summary = summarise([_episode("a", 0, True, 10), _episode("a", 1, True, 20), _episode("a", 2, False, 30)])
    assert (summary.n, summary.successes, summary.steps) == (3, 2, 15.0)
    assert summary.reward == pytest.approx(1 / 60)
    assert summary.tags == {"slip": 1}


def test_compare_uses_the_common_starts_only():
    episodes = [_episode("a", 0, True), _episode("a", 1, True), _episode("b", 1, False)]
    result = compare(episodes, "a", "b")
    assert result is not None and result.n == 1 and result.difference == 1.0
    assert compare(episodes, "a", "c") is None


def test_compare_pairs_every_seed():
    again = [replace(_episode("a", 0, False), seed=1), replace(_episode("b", 0, True), seed=1)]
    result = compare([_episode("a", 0, True), _episode("b", 0, False), *again], "a", "b")
    assert result is not None and (result.n, result.only_first, result.only_second) == (2, 1, 1)


def test_the_imagined_return_of_an_episode_worked_by_hand() -> None:
    """The model: z' = z + a, which pays z'. The world went 0, 0.5, 1, 1.2 with the actions 1, 1, 0.5."""
    model = ToyWAM(
        lambda z, a: z + a, lambda z, a, n: n[..., 0], lambda z: z[..., 0], state_dim=1, action_dim=1, members=2
    )
    start, recording = Start("toy", 3), Recording()
    recording.observations[start] = [observation(torch.tensor([[z]]))[0] for z in (0.0, 0.5, 1.0, 1.2)]
    recording.actions[start] = [torch.tensor([a]) for a in (1.0, 1.0, 0.5)]
    # Two at a time: 1 + 2 from 0, then 1.5 from 1, where the episode ends.
    assert imagined_return(model, recording, start, 2) == pytest.approx(4.5)
    assert imagined_return(model, recording, start, 1) == pytest.approx(1.0 + 1.5 + 1.5)
    assert imagined_return(model, recording, start, 8) == pytest.approx(1.0 + 2.0 + 2.5)


def test_what_a_model_that_draws_says_of_an_episode_does_not_depend_on_those_before_it() -> None:
    model = NoisyWAM(dims=3)
    places = {"state": {"hand": (0, 3), "object": (0, 3)}}
    model.spec = replace(model.spec, layout=Layout.of({"places": places}, model.spec.observation))
    before, mine = Start("toy", 2), Start("toy", 3)
    found = []
    for starts in ([mine], [before, mine]):
        recording = Recording()
        for start in starts:
            recording.observations[start] = [observation(torch.zeros(1, 3))[0]] * 5
            recording.actions[start] = [torch.zeros(3)] * 4
        errors = fidelity(model, recording, 4)
        assert errors is not None
        found.append((imagined_return(model, recording, mine, 2), errors["hand_cm"]))
    del recording.observations[mine], recording.actions[mine]
    others = fidelity(model, recording, 4)
    assert others is not None
    assert found[0][0] == found[1][0]
    both = [(a + b) / 2 for a, b in zip(found[0][1], others["hand_cm"], strict=True)]
    assert found[1][1] == pytest.approx(both, rel=1e-5) and others["hand_cm"] != found[0][1]


def _promised(method: str, start: int, length: int, real: float, imagined: float | None) -> Episode:
    return replace(_episode(method, start, True, length), episode_return=real, imagined_return=imagined)


def test_the_gain_in_imagination_and_in_reality_worked_by_hand() -> None:
    """Per step: the planner was promised 3, 2, 4 and got 2, 2, 2; the policy 1, 1, 2 and got 1, 1, 1."""
    episodes = [
        _promised("planner", 0, 2, 4.0, 6.0), _promised("policy", 0, 4, 4.0, 4.0),
        _promised("planner", 1, 1, 2.0, 2.0), _promised("policy", 1, 1, 1.0, 1.0),
        _promised("planner", 2, 5, 10.0, 20.0), _promised("policy", 2, 10, 10.0, 20.0),
        _promised("planner", 3, 1, 9.0, 9.0), _promised("policy", 3, 1, 0.0, None), _promised("random", 3, 1, 0.0, 1.0),
    ]  # fmt: skip
    found = gain(episodes)
    assert found is not None and found.n == 3
    # Gains 2, 1, 2 in imagination and 1, 1, 1 in reality: the difference is 1, 0, 1.
    assert found.imagined == pytest.approx(5 / 3) and found.real == pytest.approx(1.0)
    assert found.difference == pytest.approx(2 / 3)
    # Standard deviation sqrt(1/3), standard error 1/3, t(2) = 4.303.
    assert found.high is not None and found.high - found.difference == pytest.approx(4.303 / 3, rel=0.03)
    assert found.low == pytest.approx(2 * found.difference - found.high)
    two = gain(episodes[:4])
    assert two is not None and (two.n, two.low, two.high) == (2, None, None) and two.difference == pytest.approx(0.5)
    assert gain([e for e in episodes if e.method != "policy"]) is None


def test_episodes_of_an_earlier_file_have_no_imagined_return(tmp_path: Path) -> None:
    write_episodes(tmp_path / "e.csv", [_promised("planner", 0, 2, 4.0, 6.0), _promised("policy", 0, 2, 4.0, None)])
    assert [e.imagined_return for e in read_episodes(tmp_path / "e.csv")] == [6.0, None]
    lines = (tmp_path / "e.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "e.csv").write_text("\n".join(line.rsplit(",", 1)[0] for line in lines) + "\n", encoding="utf-8")
    assert [e.imagined_return for e in read_episodes(tmp_path / "e.csv")] == [None, None]


def test_protocol_hash_sees_every_part():
    base = dict(
        starts={PUSH: {"split": "test", "indices": [0], "rand_vec": [[0.1, 0.2]]}},
        seeds=[0], max_steps=100, action_repeat=2, versions={"mujoco": "3.3.0"},
    )  # fmt: skip
    changed = [
        base | {"starts": {PUSH: {"split": "dev", "indices": [0], "rand_vec": [[0.1, 0.2]]}}},
        base | {"starts": {PUSH: {"split": "test", "indices": [0], "rand_vec": [[0.1, math.nextafter(0.2, 1)]]}}},
        base | {"seeds": [1]},
        base | {"max_steps": 99},
        base | {"action_repeat": 1},
        base | {"versions": {"mujoco": "3.3.1"}},
    ]
    hashes = {protocol_hash(**kwargs) for kwargs in [base, *changed]}
    assert len(hashes) == 1 + len(changed)
    assert protocol_hash(**base) == protocol_hash(**base)


def _state(hand, thing, goal) -> torch.Tensor:
    state = torch.zeros(39)
    state[0:3], state[4:7], state[36:39] = torch.tensor(hand), torch.tensor(thing), torch.tensor(goal)
    return state


def test_failure_tags_from_what_happened():
    goal, thing = [0.0, 0.8, 0.0], [0.0, 0.6, 0.0]
    tags = FailureTags(_state([0.3, 0.4, 0.3], thing, goal), PUSH, METAWORLD)
    assert tags.tag() == "no_approach"
    tags.see(_state([0.0, 0.6, 0.03], thing, goal))
    assert tags.tag() == "no_motion"
    tags.see(_state([0.0, 0.72, 0.03], [0.0, 0.72, 0.0], goal))
    assert tags.tag() == "wrong_place"
    tags.see(_state([0.0, 0.8, 0.03], [0.0, 0.62, 0.0], goal))
    assert tags.tag() == "slip"
    assert FailureTags(None, PUSH, METAWORLD).tag() == "timeout"


def test_contacts_tell_a_missed_grasp_and_a_premature_release():
    goal, thing = [0.0, 0.8, 0.0], [0.0, 0.6, 0.0]
    nothing, both, hand = torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 0.0])
    tags = FailureTags(_state([0.3, 0.4, 0.3], thing, goal), PUSH, METAWORLD)
    tags.see(_state([0.0, 0.6, 0.03], thing, goal), nothing)
    assert tags.tag() == "missed_grasp"
    tags.see(_state([0.0, 0.6, 0.03], thing, goal), hand)
    assert tags.tag() == "no_motion"  # touched, not moved
    for y in (0.6, 0.62, 0.64):
        tags.see(_state([0.0, y, 0.03], [0.0, y, 0.0], goal), both)
    assert tags.tag() == "wrong_place"  # still held
    tags.see(_state([0.0, 0.64, 0.1], [0.0, 0.64, 0.0], goal), nothing)
    assert tags.tag() == "premature_release"


class _Random:
    """Uniform actions whose numbers depend on the episode's identity and step alone."""

    def initial_state(self, rows: int) -> TensorDict:
        zeros = torch.zeros(rows, dtype=torch.int64)
        return TensorDict({"row": zeros, "step": zeros.clone()}, batch_size=[rows])

    def act(self, observation, policy_state, is_init):
        from wamrl.noise import NoiseKey

        step = torch.where(is_init, 0, policy_state["step"])
        action = NoiseKey(row=policy_state["row"], step=step).uniform(4) * 2 - 1
        policy_state["step"] = step + 1
        return action, policy_state


class _Nan(_Random):
    def act(self, observation, policy_state, is_init):
        action, policy_state = super().act(observation, policy_state, is_init)
        return action * math.nan, policy_state


def _run(num_envs: int, policy, starts: list[Start], max_steps: int = 60, **kwargs) -> list[Episode]:
    metaworld = pytest.importorskip("wamrl.envs.metaworld")
    env = metaworld.MetaWorldEnv([REACH, PUSH], num_envs=num_envs, split="dev", max_steps=max_steps)
    try:
        return run_episodes(env, policy, starts, method="m", split="dev", seed=0, max_steps=max_steps, **kwargs)
    finally:
        env.close()


def test_outcomes_do_not_depend_on_batching():
    metaworld = pytest.importorskip("wamrl.envs.metaworld")
    starts = [Start(REACH, 0), Start(PUSH, 0), Start(REACH, 1), Start(PUSH, 3), Start(REACH, 2)]
    for policy in (_Random(), metaworld.ExpertPolicy([REACH, PUSH])):
        one_at_a_time = _run(2, policy, starts)
        side_by_side = _run(5, policy, starts)
        assert one_at_a_time == side_by_side
        assert [(e.task, e.start) for e in side_by_side] == [(s.task, s.index) for s in starts]
    assert all(e.success for e in side_by_side)


def test_an_episode_is_the_same_alone():
    starts = [Start(REACH, 4), Start(REACH, 5), Start(PUSH, 1)]
    together = _run(3, _Random(), starts, max_steps=20)
    assert together == [_run(2, _Random(), [start], max_steps=20)[0] for start in starts]


def test_an_action_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite at step 0"):
        _run(2, _Nan(), [Start(REACH, 0)])


def test_a_task_without_a_row_is_refused():
    with pytest.raises(ValueError, match="no row of the environment runs"):
        _run(2, _Random(), [Start("metaworld/door-open-v3", 0)])


def test_the_interval_of_paired_returns_is_that_of_their_differences():
    second = [float(x) for x in range(40)]  # starts differ far more than the methods do
    found = paired_return([x + 1.0 + 0.1 * (-1) ** i for i, x in enumerate(second)], second, names=("a", "b"))
    assert (found.first, found.second, found.n) == ("a", "b", 40) and found.difference == pytest.approx(1.0)
    # The mean of 40 draws of 0.9 or 1.1: 1 +- 1.96 * 0.1 / sqrt(40).
    assert found.low == pytest.approx(1.0 - 0.031, abs=0.004) and found.high == pytest.approx(1.0 + 0.031, abs=0.004)
    assert found == paired_return([x + 1.0 + 0.1 * (-1) ** i for i, x in enumerate(second)], second, names=("a", "b"))
    few = paired_return([1.0, 2.0], [0.0, 0.0])
    assert few.difference == 1.5 and few.low is None and few.high is None
    for wrong in ([], [1.0, 2.0]):
        with pytest.raises(ValueError, match="needs the same starts"):
            paired_return(wrong, [0.0] * 3 if wrong else [])
