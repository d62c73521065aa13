"""What the benchmark of planners under budgets makes of its runs: pooled rates, pairs on common starts, shares."""

from __future__ import annotations

import json
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


def test_what_is_stored_of_other_runs_stays_where_their_settings_are_those_of_today(tmp_path: Path) -> None:
    path = tmp_path / "planner_budget.json"
    config = {"split": "test", "first_start": 700, "curve_episodes": 6, "tasks": "[reach]",
              "planners": planner_budget.PLANNERS, "gated": planner_budget.GATED}  # fmt: skip
    fresh = {"curve/mppi/512/planner/success": 3}
    new = {**config, "commits": {"curve/mppi/512": "new"}}
    assert planner_budget.with_stored(path, new, fresh, {"b"}) == (new, fresh, ["b"])
    stored = {**config, "planners": {**planner_budget.PLANNERS, "cem": ["planner=cem", "planner.elites=3"]}}
    metrics = {
        "curve/mppi/512/planner/success": 1, "curve/mppi/1536/planner/success": 2, "curve/cem/512/planner/success": 4,
        "gate/always/planner/success": 5, "gate/gated, scores shuffled/planner/success": 6,
    }  # fmt: skip
    path.write_text(
        json.dumps({"config": stored, "metrics": metrics, "protocol_hash": ["a"], "versions": {"commit": "old"}})
    )
    told, found, hashes = planner_budget.with_stored(path, new, fresh, {"b"})
    assert found == {"curve/mppi/512/planner/success": 3, "curve/mppi/1536/planner/success": 2,
                     "gate/always/planner/success": 5, "gate/gated, scores shuffled/planner/success": 6}  # fmt: skip
    assert hashes == ["a", "b"] and told["commits"] == {
        "curve/mppi/512": "new", "curve/mppi/1536": "old", "gate/always": "old", "gate/gated, scores shuffled": "old"
    }  # fmt: skip
    compared = ("gate/gated/minus_always", "gate/gated/share_of_evaluations")
    path.write_text(
        json.dumps({"config": config, "metrics": metrics | dict.fromkeys(compared, 0.5), "protocol_hash": ["a"],
                    "versions": {"commit": "old"}})
    )  # fmt: skip
    assert set(compared) <= set(planner_budget.with_stored(path, new, fresh, {"b"})[1])
    again = {**config, "commits": {"gate/always": "new"}}  # another run than the stored ones were compared with
    assert not set(compared) & set(planner_budget.with_stored(path, again, {}, {"b"})[1])
    other = {**new, "first_start": 800}
    assert planner_budget.with_stored(path, other, fresh, {"b"}) == (other, fresh, ["b"])
