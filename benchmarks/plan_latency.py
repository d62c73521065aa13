"""Milliseconds of one plan in the shipped model: `python -m benchmarks.plan_latency`, on an otherwise idle machine.

One environment, one thread, encoding included, as `python -m wamrl.plan` measures it after its episodes: the default
plan, and what every planner makes of a deadline (`controller.deadline_s`) when its own settings would take far longer.
The metrics go to benchmarks/results/plan_latency.json, with how busy the machine was.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.stored import RESULTS, ROOT, Clock, run_logged

DEADLINES_MS = (20, 50)
ENDLESS = {
    "mppi": ("planner.num_candidates=4096",),
    "cem": ("planner.iterations=100",),
    "icem": ("planner.iterations=100",),
    "best_of_n": ("planner.num_candidates=4096",),
    "gradient": ("planner.steps=500",),
    "mcts": ("planner.simulations=1024",),
}
"""Settings with which no plan would be done within `DEADLINES_MS`."""


def measure(words: Sequence[str], wam: str, plans: int) -> tuple[dict[str, Any], str]:
    """results.json of a short run of `wamrl.plan` on dev starts that times `plans` single plans, and its command."""
    words = [*words, f"wam={wam}", "split=dev", "episodes=1", "methods=[planner]", "video=false", "workers=1",
             "threads=1", f"latency_plans={plans}"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "plan"
        run_logged([sys.executable, "-m", "wamrl.plan", *words, f"run_dir={run_dir}"], Path(folder) / "log")
        return json.loads((run_dir / "results.json").read_text()), "python -m wamrl.plan " + shlex.join(words)


def main() -> None:
    """Plan one episode per task, time single plans at the states seen, and store the quantiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wam", default="six")
    parser.add_argument("--plans", type=int, default=500)
    parser.add_argument("--planners", nargs="*", choices=list(ENDLESS), default=list(ENDLESS), help="with deadlines")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    clock = Clock()
    busy = os.getloadavg()[0]  # before this benchmark's own work
    results, command = measure(["env=metaworld/six"], arguments.wam, arguments.plans)
    metrics = {
        f"plan/{part}_{quantile}_ms": results["timing"]["single"][f"{part}_ms"][quantile]
        for part in ("encode", "imagine", "search", "total")
        for quantile in ("p50", "p95", "p99")
    }
    metrics |= {"plan/evaluations": results["evaluations_per_plan"], "load_average_before": busy}
    config = {"plan": command}
    for name in arguments.planners:
        for deadline in DEADLINES_MS:
            words = ["env=metaworld/push-v3", f"planner={name}", *ENDLESS[name], "seed=0",
                     f"controller.deadline_s={deadline / 1000}"]  # fmt: skip
            limited, config[f"{name}_{deadline}ms"] = measure(words, arguments.wam, arguments.plans)
            metrics |= deadline_metrics(f"deadline/{name}/{deadline}ms", limited["timing"]["single"])
    clock.store(
        RESULTS / "plan_latency.json",
        config=config,
        metrics=metrics,
        arguments=shlex.join(sys.argv[1:]),
        protocol_hash=results["protocol_hash"],
    )
    for name, value in metrics.items():
        print(f"{name:40s} {value:10.2f}")


def deadline_metrics(place: str, timing: Mapping[str, Any]) -> dict[str, float]:
    """What is stored of plans with a deadline; the deadline is that of planning, without encoding."""
    planning = {q: timing["total_ms"][q] - timing["encode_ms"]["p50"] for q in ("p50", "p99")}
    metrics = {f"{place}/planning_{q}_ms": value for q, value in planning.items()}
    return metrics | {f"{place}/late": timing["late"], f"{place}/plans": timing["plans"],
                      f"{place}/evaluations": timing["evaluations"]}  # fmt: skip


if __name__ == "__main__":
    main()
