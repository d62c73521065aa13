"""Milliseconds of one plan in the shipped model: `python -m benchmarks.plan_latency`, on an otherwise idle machine.

One environment, one thread, encoding included, as `python -m wamrl.plan` measures it after its episodes. The metrics go
to benchmarks/results/plan_latency.json, with how busy the machine was.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

from benchmarks.stored import RESULTS, ROOT, Clock, run_logged


def main() -> None:
    """Plan one episode per task, time single plans at the states seen, and store the quantiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wam", default="six")
    parser.add_argument("--plans", type=int, default=500)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    clock = Clock()
    busy = os.getloadavg()[0]  # before this benchmark's own work
    words = ["env=metaworld/six", f"wam={arguments.wam}", "split=dev", "episodes=1", "methods=[planner]", "video=false",
             "workers=1", f"latency_plans={arguments.plans}"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "plan"
        command = [sys.executable, "-m", "wamrl.plan", *words, f"run_dir={run_dir}"]
        run_logged(command, Path(folder) / "log")
        results = json.loads((run_dir / "results.json").read_text())
    metrics = {
        f"plan/{part}_{quantile}_ms": results["timing"]["single"][f"{part}_ms"][quantile]
        for part in ("encode", "imagine", "search", "total")
        for quantile in ("p50", "p95", "p99")
    }
    metrics |= {"plan/evaluations": results["evaluations_per_plan"], "load_average_before": busy}
    clock.store(
        RESULTS / "plan_latency.json",
        config={"command": "python -m wamrl.plan " + shlex.join(words)},
        metrics=metrics,
        arguments=shlex.join(sys.argv[1:]),
        protocol_hash=results["protocol_hash"],
    )
    for name, value in metrics.items():
        print(f"{name:25s} {value:10.2f}")


if __name__ == "__main__":
    main()
