"""Accuracy at budget: rows, the Pareto front, and runs that may not be compared."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wamrl import budget
from wamrl.bench import main


def _row(success: float, ms: float | None, reference: bool = False) -> dict[str, Any]:
    ms_ = None if ms is None else {"total": {"p50": ms}}
    return {"success": {"mean": success}, "ms": ms_, "reference": reference}


def test_the_front_of_a_case_worked_by_hand():
    rows = [_row(0.9, 20), _row(0.8, 5), _row(0.7, 10), _row(0.9, 30), _row(0.95, 40), _row(1.0, None), _row(0.8, 5)]
    # .7 at 10 ms is beaten by .8 at 5 ms, .9 at 30 ms by .9 at 20 ms; equals both stay; no latency, no place.
    assert budget.pareto(rows) == [True, True, False, False, True, False, True]
    # A script that reads the simulator is best and fastest: it is not on the front, and takes nobody off it.
    assert budget.pareto([*rows, _row(1.0, 0.1, reference=True)]) == [*budget.pareto(rows), False]


def _plan(folder: Path, digest: str, p95: float, **changes: Any) -> Path:
    quantiles = {"p50": 8.0, "p95": p95, "p99": p95 + 1}
    s = {"n": 10, "success": 0.5, "low": 0.24, "high": 0.76, "tags": {"slip": 5}}
    results = {
        "name": "plan", "partial": False, "protocol_hash": digest, "protocol": {"control_dt_s": 0.025},
        "config": {"planner": {"_target_": "wamrl.planners.mppi.make_mppi"}, "controller": {"replan_every": 2}},
        "checkpoint": {"name": "six", "content_hash": "abc"},
        "summary": {"planner": {"mean": s}, "policy": {"mean": s}, "expert": {"mean": s}},
        "timing": {"single": {f"{part}_ms": quantiles for part in ("encode", "imagine", "search", "total")}},
        "evaluations_per_plan": 4096, "peak_rss_mib": {"main": 100.0, "worker": 300.0}, "device": "cpu",
        "dtype": "float32", "threads": 1, "resume_command": "python -m wamrl.plan resume=x", **changes,
    }  # fmt: skip
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_row_holds_what_the_run_measured(tmp_path):
    run = budget.read_results(_plan(tmp_path / "a", "aaaa", 49.0))
    planner, policy, expert = budget.rows_of({"a": run})
    assert planner["rate_met"] and planner["allowed_ms"] == 50.0  # two control steps of 25 ms per plan
    assert planner["planner"] == "mppi" and planner["evaluations"] == 4096 and planner["memory_mib"] == 300.0
    assert policy["ms"] is None and policy["rate_met"] is None and policy["evaluations"] is None
    assert planner["wam"] == policy["wam"] == "six" and expert["wam"] == "" and expert["reference"]
    slow = budget.rows_of({"b": budget.read_results(_plan(tmp_path / "b", "aaaa", 51.0))})[0]
    assert slow["rate_met"] is False
    # An open-loop run of an earlier version does not say how long its chunk is.
    whole = budget.rows_of({"c": {**run, "config": {**run["config"], "controller": {"replan_every": None}}}})[0]
    assert whole["ms"] and whole["rate_met"] is None and whole["allowed_ms"] is None


def _times(p50: float, p95: float, *parts: str, **more: Any) -> dict[str, Any]:
    return {**{f"{part}_ms": {"p50": p50, "p95": p95, "p99": p95} for part in (*parts, "total")}, **more}


def test_a_policy_that_does_not_search_has_its_own_latency_and_place_on_the_front(tmp_path):
    search, act = ("encode", "imagine", "search"), ("encode", "propose")
    timing = {"single": _times(40.0, 101.0, *search, replan_every=4), "policy": _times(1.0, 24.0, *act, replan_every=1)}
    a = _plan(tmp_path / "a", "aaaa", 1.0, timing=timing)
    planner, policy, expert = budget.by_hash(budget.rows_of({"a": budget.read_results(a)}))["aaaa"]
    assert planner["allowed_ms"] == 100.0 and not planner["rate_met"]  # four steps of 25 ms, as the run itself says
    assert policy["allowed_ms"] == 25.0 and policy["rate_met"] and policy["ms"].keys() == {"encode", "propose", "total"}
    assert policy["front"] and not planner["front"]  # as good, and forty times as fast
    assert expert["ms"] is None and "not timed" in budget.cells(expert)
    main(["budget", f"runs=[{a}]", "run_dir=out"])
    results, page = json.loads(Path("out/results.json").read_text()), Path("out/report.html").read_text()
    assert results["metrics"]["budget/aaaa/a policy/propose_p50_ms"] == 1.0 and results["warnings"] == []
    assert "<th>propose ms</th>" in page and "<td>not timed</td>" in page


def test_policies_of_evaluate_are_rows_with_latency_horizon_and_tags():
    rate = {"n": 10, "mean": 0.5, "low": 0.24, "high": 0.76}
    entry = {"mean": {"real": rate}, "tags": {"slip": 5}}
    plans = _times(40.0, 49.0, "encode", "imagine", "search", replan_every=2, evaluations=64.0)
    results = {
        "name": "evaluate", "protocol_hash": "aaaa", "protocol": {"control_dt_s": 0.025}, "device": "cpu", "threads": 1,
        "wam": {"content_hash": "abc"}, "drift": {"open_loop": {"mean": {"sustained": 17}}},
        "cost": {"peak_rss_mib": 300.0},
        "policies": {
            "expert": {**entry, "kind": "expert", "content_hash": None, "latency": _times(0.1, 0.1, replan_every=1)},
            "planner:six": {**entry, "kind": "planner", "content_hash": "abc", "wam": "six", "latency": plans,
                            "planner": "wamrl.planners.mppi.make_mppi"},
            "net": {**entry, "kind": "callable", "content_hash": None, "latency": None},
        },
    }  # fmt: skip
    expert, planner, net = budget.by_hash(budget.rows_of({"": results}))["aaaa"]
    assert expert["name"] == "expert" and expert["reference"] and not expert["front"] and expert["allowed_ms"] == 25.0
    assert (planner["wam"], planner["planner"], planner["sustained"]) == ("six", "mppi", 17) and planner["front"]
    assert planner["rate_met"] and planner["allowed_ms"] == 50.0 and planner["evaluations"] == 64.0
    assert net["ms"] is None and net["sustained"] is None and budget.cells(net)[-1] == "slip 5"


def test_different_protocols_never_share_a_table_without_a_warning(tmp_path, capsys):
    a, b, c = (_plan(tmp_path / n, d, 20.0) for n, d in (("a", "aaaa"), ("b", "bbbb"), ("c", "aaaa")))
    main(["budget", f"runs=[{a},{c}]", "run_dir=same"])
    same = json.loads(Path("same/results.json").read_text())
    assert same["warnings"] == [] and {r["name"] for r in same["groups"]["aaaa"]} == {
        "a planner", "a policy", "a expert", "c planner", "c policy", "c expert"
    }  # fmt: skip
    capsys.readouterr()
    main(["budget", f"runs=[{a},{b}]", "run_dir=other"])
    other, printed = json.loads(Path("other/results.json").read_text()), capsys.readouterr().out
    assert set(other["groups"]) == {"aaaa", "bbbb"} and len(other["groups"]["aaaa"]) == 3
    assert "different protocol hashes" in printed and "different protocol hashes" in other["warnings"][0]
    page = Path("other/report.html").read_text()
    assert page.index("Protocol aaaa") < page.index("Protocol bbbb") and "different protocol hashes" in page


def test_latencies_of_different_machines_are_warned_of(tmp_path):
    a, b = _plan(tmp_path / "a", "aaaa", 20.0), _plan(tmp_path / "b", "aaaa", 20.0, threads=2)
    main(["budget", f"runs=[{a},{b}]", "run_dir=out"])
    assert "numbers of threads" in json.loads(Path("out/results.json").read_text())["warnings"][0]


@pytest.mark.parametrize(
    "words",
    ["budget seed=3 --cfg job", "seed=3 budget --cfg job", "--cfg job budget seed=3", "--cfg=job budget seed=3"],
)
def test_the_check_is_the_first_word_that_is_no_setting(words, capsys):
    main(words.split())
    printed = capsys.readouterr().out
    assert "check: budget" in printed and "seed: 3" in printed


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["budget"], "nothing to compare"),
        ([], "say what to measure"),
        (["bugdet"], "did you mean 'budget'"),
        (["budget", "runs=[absent]"], "there is no absent/results.json"),
        (["properties", "split=train"], "trained on these start states"),
        (["properties", "shifts=[colour]"], "unknown shift 'colour'"),
    ],
)
def test_mistakes_are_one_message(words, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2 and reason in capsys.readouterr().err


def test_a_stopped_run_or_one_of_another_command_is_refused(tmp_path):
    with pytest.raises(ValueError, match="was stopped; finish it"):
        budget.read_results(_plan(tmp_path / "a", "aaaa", 1.0, partial=True))
    with pytest.raises(ValueError, match="is of 'train'"):
        budget.read_results(_plan(tmp_path / "b", "aaaa", 1.0, name="train"))


@pytest.mark.parametrize(
    ("said", "why"),
    [("UserWarning: old driver\nerror: no such planner\n(--help explains)\n", "error: no such planner"),
     ("Traceback:\nKilled\n", "Killed"), ("\n", "it said nothing")],
)  # fmt: skip
def test_a_configuration_that_fails_says_why(said, why, capsys, monkeypatch):
    from wamrl import bench

    failed = SimpleNamespace(returncode=2, stdout="", stderr=said)
    monkeypatch.setattr(bench.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(SystemExit):
        main(["budget", "configurations={a:{planner:mppi}}", "run_dir=out"])
    assert f"configuration 'a' failed (exit status 2): {why}" in capsys.readouterr().err


@pytest.mark.timeout(900)  # two commands of their own, slow to start on a busy machine
@pytest.mark.parametrize("planners", [("mppi", "best_of_n")])
def test_configurations_are_run_and_compared(planners):
    pytest.importorskip("metaworld")
    asked = ",".join(f"{p}:{{planner:{p},planner.num_candidates:4,planner.horizon:3}}" for p in planners)
    common = "{env:metaworld/reach-v3,split:dev,episodes:1,workers:1,video:false,env.max_steps:4,latency_plans:2}"
    main(["budget", f"configurations={{{asked}}}", f"common={common}", "run_dir=out"])
    results = json.loads(Path("out/results.json").read_text())
    (rows,) = results["groups"].values()
    assert {r["planner"] for r in rows if r["planner"]} == set(planners)
    assert all(r["ms"]["total"]["p50"] > 0 and r["evaluations"] > 0 for r in rows if r["agent"] == "planner")
    assert all(r["ms"]["propose"]["p50"] > 0 for r in rows if r["agent"] == "policy")
    assert any(r["front"] for r in rows) and "Pareto" in Path("out/report.html").read_text()
