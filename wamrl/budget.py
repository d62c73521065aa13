"""Accuracy at budget: success, latency and memory from the results of `plan` and `evaluate` runs, and their table.

A row is one way of acting: WAM x planner x controller x agent (the method). Rows of different protocol hashes answer
different questions and never share a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wamrl.pages import Section, TableOf, pareto_figure, rate
from wamrl.report import PARTS

HEAD = ("configuration", "success", "p50 / p95 / p99 ms", "evaluations", "rate met", "memory MiB", "H*", "failures")
"""The columns of `cells`."""
_REFERENCES = ("shuffled", "random", "expert", "oracle")  # null controls, scripts, and the true simulator


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

    A row: name, hash, wam, planner, controller, agent, reference (whether it is there to compare with, not to be
    chosen: null controls, scripted experts, the true simulator), success (n, mean, low, high), ms (part of `PARTS` ->
    p50, p95, p99) or None where it was not timed, timed ("single" or "batched"), evaluations per plan, rate_met (p95
    within allowed_ms, the time that the executed actions last), memory_mib, sustained (H* of the WAM where a run of
    `evaluate` measured it), tags, device, dtype, threads.
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
    controller = r["config"]["controller"]
    single = r["timing"].get("single") or r["timing"].get("batched")
    # The same search at the same cost, only its scores are dealt out anew.
    timing = {**r["timing"], "planner": single, "shuffled": single}
    alone = [r["timing"].get("single"), r["timing"].get("policy")]
    found = []
    for method, by_task in r["summary"].items():
        s, t = by_task["mean"], timing.get(method)
        plans, uses_wam = method in ("planner", "shuffled", "oracle"), method not in ("random", "expert")
        found.append(
            {
                "name": f"{name} {method}".strip(),
                "hash": r["protocol_hash"],
                "wam": r["checkpoint"]["name"] if uses_wam else "",
                "planner": _planner(r["config"]["planner"]["_target_"]) if plans else "",
                "agent": method,
                "reference": method in _REFERENCES,
                "success": {"n": s["n"], "mean": s["success"], "low": s["low"], "high": s["high"]},
                # Runs of earlier versions do not say how many control steps their plans were for.
                **_latency(t, r["protocol"]["control_dt_s"], otherwise=controller["replan_every"]),
                "timed": None if t is None else "single" if t in alone else "batched",
                "evaluations": r["evaluations_per_plan"] if method in ("planner", "shuffled") else None,
                "memory_mib": max(r["peak_rss_mib"].values()),
                "sustained": sustained.get(r["checkpoint"]["content_hash"]) if uses_wam else None,
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
        s, t = entry["mean"]["real"], entry.get("latency")
        found.append(
            {
                "name": f"{name} {policy}".strip(),
                "hash": r["protocol_hash"],
                "wam": entry.get("wam", ""),
                "planner": _planner(entry.get("planner", "")),
                "agent": policy,
                "reference": entry["kind"] in _REFERENCES,
                "success": {k: s[k] for k in ("n", "mean", "low", "high")},
                **_latency(t, r["protocol"]["control_dt_s"]),
                "timed": None if t is None else "single",
                "evaluations": None if t is None else t.get("evaluations"),
                "memory_mib": r["cost"]["peak_rss_mib"],
                "sustained": sustained.get(entry["content_hash"] or ""),
                "tags": entry["tags"],
                "device": r["device"],
                "dtype": "float32",
                "threads": r["threads"],
            }
        )
    return found


def _planner(target: str) -> str:
    return target.rpartition(".")[2].removeprefix("make_")


def _latency(t: Mapping[str, Any] | None, control_dt_s: float, *, otherwise: int | None = None) -> dict[str, Any]:
    """The entries of a row that say how long a decision takes, and how long it may."""
    if t is None:
        return {"ms": None, "controller": "", "allowed_ms": None, "rate_met": None}
    ms, steps = {part: t[f"{part}_ms"] for part in PARTS if f"{part}_ms" in t}, t.get("replan_every") or otherwise
    allowed = None if steps is None else 1000 * control_dt_s * steps
    return {
        "ms": ms,
        "controller": "" if steps is None else f"{steps} step{'s' if steps > 1 else ''} per decision",
        "allowed_ms": allowed,
        "rate_met": None if allowed is None else bool(ms["total"]["p95"] <= allowed),
    }


def pareto(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether each row is on the front of success against median latency.

    On it: no other is at least as good in both and better in one. Rows without a latency, and references, neither are
    on it nor keep others off.
    """
    points = [(r["success"]["mean"], r["ms"]["total"]["p50"]) if r["ms"] and not r["reference"] else None for r in rows]

    def beaten(one: tuple[float, float]) -> bool:
        return any(p is not None and p != one and p[0] >= one[0] and p[1] <= one[1] for p in points)

    return [p is not None and not beaten(p) for p in points]


def by_hash(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by protocol hash, in the order in which the hashes come; each says whether it is on its group's `front`."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["hash"], []).append(row)
    return {
        digest: [{**row, "front": front} for row, front in zip(group, pareto(group), strict=True)]
        for digest, group in groups.items()
    }


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as a reader sees it, in the columns of `HEAD`."""
    ms = row["ms"]
    met = "" if row["rate_met"] is None else f"{'yes' if row['rate_met'] else 'no'} ({row['allowed_ms']:.0f} ms)"
    return [
        row["name"],
        rate(row["success"]),
        " / ".join(f"{ms['total'][q]:.1f}" for q in ("p50", "p95", "p99")) if ms else "not timed",
        f"{row['evaluations']:,.0f}" if row["evaluations"] else "",
        met,
        f"{row['memory_mib']:.0f}",
        "" if row["sustained"] is None else str(row["sustained"]),
        ", ".join(f"{k} {v}" for k, v in row["tags"].items()),
    ]


def section(heading: str, rows: Sequence[Mapping[str, Any]]) -> Section:
    """The table, the split of the latency and the plot of rows of one protocol, as `by_hash` gives them."""
    timed = [r for r in rows if r["ms"]]
    points = [{"name": r["name"], "ms": r["ms"]["total"]["p50"], "rate": r["success"], "front": r["front"]}
              for r in timed]  # fmt: skip
    parts = [part for part in PARTS if part != "total" and any(part in r["ms"] for r in timed)]
    head = ["configuration", "WAM", "planner", "controller", "timed", *(f"{part} ms" for part in parts), "device",
            "threads"]  # fmt: skip
    split = [
        [r["name"], r["wam"], r["planner"], r["controller"], r["timed"]]
        + [f"{r['ms'][part]['p50']:.2f}" if part in r["ms"] else "" for part in parts]
        + [r["device"], str(r["threads"])]
        for r in timed
    ]
    return Section(
        heading,
        ["Bold rows and blue dots are the Pareto front: nothing else here is as good and as fast. References (random, "
         "expert, shuffled, oracle) are there to compare with and stand off it."],
        [pareto_figure("success against latency", points)] if points else [],
        [TableOf(HEAD, [cells(r) for r in rows], [i for i, r in enumerate(rows) if r["front"]])]
        + ([TableOf(head, split)] if split else []),
        ["Success with its Wilson 95 % interval, pooled over tasks. Latency per decision: a plan, or a call of a "
         "policy. rate met: p95 within the time that the executed actions last. evaluations: of the model, per plan "
         "and environment. memory: peak of the process. H*: control steps for which imagination of this WAM is "
         "sustained, where a run of evaluate measured it. failures: tags from contacts and state."],
    )  # fmt: skip
