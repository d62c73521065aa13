"""What the benchmark of planners under budgets makes of its runs: pooled rates, pairs on common starts, shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import planner_budget
from wamrl.evaluation import Episode


def run(seed: int, solved: list[bool], evaluations: float, methods: tuple[str, ...] = ("planner",)) -> tuple:
    """The results and episodes of one run, of which every method solves the same starts."""
    results = {"methods": list(methods), "evaluations_per_plan": evaluations, "steps_per_plan": 2.0,
               "timing": {"single": {"total_ms": {"p50": 10.0}}}}  # fmt: skip
    episodes = [
        Episode("metaworld/push-v3", start, "test", seed, method, success, 3 if success else None, 1.0, 5)
        for method in methods for start, success in enumerate(solved)
    ]  # fmt: skip
    return results, episodes


def test_a_gated_planner_is_compared_on_the_starts_and_seeds_that_it_shares_with_the_one_that_always_searches() -> None:
    runs = {
        "gate/always": {0: run(0, [True, True, False, True], 4000.0, ("planner", "policy")),
                        1: run(1, [True, False, False, False], 4000.0, ("planner", "policy"))},
        "gate/gated": {0: run(0, [True, False], 1000.0), 1: run(1, [True, True], 2000.0)},
        "curve/mppi/512": {0: run(0, [True, False], 512.0)},
    }  # fmt: skip
    metrics = planner_budget.collect_metrics(runs)
    assert metrics["gate/always/planner/success"]["mean"] == 0.5 and metrics["gate/always/policy/success"]["n"] == 8
    gap = metrics["gate/gated/minus_always"]
    assert gap["n"] == 4 and gap["mean"] == 0.0 and gap["low"] < 0.0 < gap["high"]  # one start lost, one won
    assert metrics["gate/gated/share_of_evaluations"] == pytest.approx(750.0 / 2000.0)
    assert metrics["curve/mppi/512/evaluations_per_step"] == 256.0
    del runs["gate/gated"][1]  # not of all seeds yet
    assert "gate/gated/minus_always" not in planner_budget.collect_metrics(runs)


def test_every_run_is_of_test_starts_and_has_a_folder_of_its_own() -> None:
    runs = planner_budget.jobs(1, Path("weak"), ["gate", "curve"]).values()
    assert len({stage.name for stage in runs}) == len(runs) > 20
    assert all("first_start=700" in stage.overrides and "seed=1" in stage.overrides for stage in runs)
    assert not any(word.startswith("split=") for stage in runs for word in stage.overrides)  # plan's default is test
