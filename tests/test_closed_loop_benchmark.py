"""What the benchmark of the closed loop makes of its rounds, and that its commands are those of users."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import closed_loop
from wamrl import cli
from wamrl.evaluation import Episode


def episodes(planner: list[bool], policy: list[bool], seed: int) -> list[Episode]:
    return [
        Episode(task, start, "test", seed, method, success, 3 if success else None, 1.0, 5)
        for method, solved in (("planner", planner), ("policy", policy))
        for start, success in enumerate(solved)
        for task in ("metaworld/push-v3", "metaworld/reach-v3")
    ]


def test_rounds_are_pooled_over_seeds_and_compared_with_the_weak_policy_in_pairs() -> None:
    loops = {seed: {"rounds": [{"real_steps": n * 1000 * (seed + 1)} for n in range(4)]} for seed in (0, 1)}
    tests = {
        seed: [episodes([True, False], [False, False], seed), episodes([True, True], [True, False], seed),
               episodes([True, True], [seed == 1, True], seed), episodes([True, True], [True, True], seed)]
        for seed in (0, 1)
    }  # fmt: skip
    metrics = closed_loop.collect_metrics(loops, tests)
    assert [metrics[f"round{n}/real_steps"] for n in range(4)] == [0.0, 1500.0, 3000.0, 4500.0]
    assert metrics["round0/mean/planner/success"]["mean"] == 0.5 and metrics["round0/mean/planner/success"]["n"] == 8
    assert metrics["round2/mean/policy/success"]["mean"] == 0.75 and metrics["round2/push/policy/success"]["n"] == 4
    assert metrics["round2/seed0/policy/success"]["mean"] == 0.5
    assert metrics["gain/planner_minus_weak_policy"]["mean"] == pytest.approx(1.0)
    assert metrics["gain/policy_minus_weak_policy"]["mean"] == pytest.approx(1.0)
    assert metrics["gain/policy_minus_weak_policy"]["n"] == 8


def test_every_command_of_a_seed_composes(tmp_path: Path) -> None:
    loop, *measures = closed_loop.stages(1, tmp_path / "weak", tmp_path / "out")
    config = cli.compose(loop.command, list(loop.overrides))
    assert config.first_start == 1000 and config.rounds == closed_loop.ROUNDS and config.learner is None
    assert [stage.name for stage in measures] == ["test0", "test1", "test2", "test3"]
    for stage in measures:
        split = cli.compose(stage.command, [word for word in stage.overrides if not word.startswith("wam=")])
        assert split.split == "test" and split.first_start == 500
