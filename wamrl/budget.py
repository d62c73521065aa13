"""Accuracy at budget: rows of success, latency and memory from the results of `plan` and `evaluate` runs.

A row is one way of acting: WAM x planner x controller x agent (the method). Rows of different protocol hashes answer
different questions and never share a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PARTS = ("encode", "imagine", "search", "total")


def read_results(directory: str | Path) -> dict[str, Any]:
    """results.json of a run of `plan` or `evaluate`.

    Raises:
        FileNotFoundError: there is none. ValueError: another command wrote it, or the run was stopped.
    """
    path = Path(directory) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}; runs= takes directories of python -m wamrl.plan and wamrl.evaluate"
        )
    results = json.loads(path.read_text(encoding="utf-8"))
    if results.get("name") not in ("plan", "evaluate"):
        raise ValueError(
            f"{path} is of '{results.get('name')}', but only runs of plan and evaluate have what this reads"
        )
    if results.get("partial"):
        raise ValueError(f"{path}: this run was stopped; finish it with {results['resume_command']}")
    return results


def rows_of(named: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per run and method; `named` maps a run's name to its results.

    A row: name, hash, wam, planner, controller, agent, success (n, mean, low, high), ms (part -> p50, p95, p99) or
    None, evaluations per plan, rate_met (p95 within the time that the executed actions last) or None, memory_mib,
    sustained (H* of the WAM where a run of `evaluate` measured it), tags, device, threads.
    """
    sustained = {
        r["wam"]["content_hash"]: r["drift"]["open_loop"]["mean"]["sustained"]
        for r in named.values()
        if r["name"] == "evaluate" and r.get("drift")
    }
    rows: list[dict[str, Any]] = []
    for name, results in named.items():
        rows += (_plan_rows if results["name"] == "plan" else _evaluate_rows)(name, results, sustained)
    return rows


def _plan_rows(name: str, r: Mapping[str, Any], sustained: Mapping[str, int]) -> list[dict[str, Any]]:
    config = r["config"]
    single = r["timing"].get("single") or r["timing"].get("batched")
    # The same search at the same cost, only its scores are dealt out anew.
    timing = {"planner": single, "shuffled": single, "oracle": r["timing"].get("oracle")}
    planner = str(config["planner"]["_target_"]).rpartition(".")[2].removeprefix("make_")
    every = int(config["controller"]["replan_every"])
    found = []
    for method, by_task in r["summary"].items():
        s, t = by_task["mean"], timing.get(method)
        plans = method in timing
        ms = {part: t[f"{part}_ms"] for part in PARTS} if t else None
        allowed = 1000 * r["protocol"]["control_dt_s"] * every
        found.append(
            {
                "name": f"{name} {method}",
                "hash": r["protocol_hash"],
                "wam": r["checkpoint"]["name"],
                "planner": planner if plans else "",
                "controller": f"{every} steps per plan" if plans else "",
                "agent": method,
                "success": {"n": s["n"], "mean": s["success"], "low": s["low"], "high": s["high"]},
                "ms": ms,
                "timed": None if ms is None else "single" if t is r["timing"].get("single") else "batched",
                "evaluations": r["evaluations_per_plan"] if method in ("planner", "shuffled") else None,
                "rate_met": None if ms is None else bool(ms["total"]["p95"] <= allowed),
                "allowed_ms": allowed if plans else None,
                "memory_mib": max(r["peak_rss_mib"].values()),
                "sustained": sustained.get(r["checkpoint"]["content_hash"]),
                "tags": s["tags"],
                "device": r["device"],
                "dtype": r["dtype"],
                "threads": r["threads"],
            }
        )
    return found


def _evaluate_rows(name: str, r: Mapping[str, Any], sustained: Mapping[str, int]) -> list[dict[str, Any]]:
    found = []
    for policy, entry in r["policies"].items():
        if "real" not in entry["mean"]:
            continue  # what nobody ran in a simulator has no accuracy
        s = entry["mean"]["real"]
        found.append(
            {
                "name": f"{name} {policy}",
                "hash": r["protocol_hash"],
                "wam": "",
                "planner": "",
                "controller": "",
                "agent": policy,
                "success": {k: s[k] for k in ("n", "mean", "low", "high")},
                "ms": None,
                "timed": None,
                "evaluations": None,
                "rate_met": None,
                "allowed_ms": None,
                "memory_mib": r["cost"]["peak_rss_mib"],
                "sustained": sustained.get(entry["content_hash"] or ""),
                "tags": entry["tags"],
                "device": r["device"],
                "dtype": "float32",
                "threads": r["threads"],
            }
        )
    return found


def pareto(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether each row is on the front of success against median latency.

    On it: no other is at least as good in both and better in one. Rows without a latency are not.
    """
    points = [(r["success"]["mean"], r["ms"]["total"]["p50"]) if r["ms"] else None for r in rows]

    def beaten(one: tuple[float, float]) -> bool:
        return any(p is not None and p != one and p[0] >= one[0] and p[1] <= one[1] for p in points)

    return [p is not None and not beaten(p) for p in points]


def by_hash(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows grouped by protocol hash, in the order in which the hashes come."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["hash"], []).append(row)
    return groups
