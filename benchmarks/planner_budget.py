"""Success against model evaluations, for every planner: `python -m benchmarks.planner_budget`.

Each planner runs on the dev starts of the six tasks with a hard budget of model evaluations per plan
(`controller.evaluations`), beside the same planner with shuffled scores; random proposals at the same budgets and the
policy alone are in the same table. Gated planners spend less than their budget: the table has what was spent per plan.

The smallest budget gives every planner that iterates two iterations, and the gradient planner two steps. In a model
with a behaviour prior mppi, cem, icem and gradient have candidates that follow it (`behaviour_share`); best_of_n, mcts
and random proposals do not.

Dev starts only: its numbers are not test results. The metrics go to benchmarks/results/planner_budget.json.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.plan_ablation import measure
from benchmarks.stored import RESULTS, ROOT, Clock

# Evaluations per plan: one candidate of 8 steps costs 64 of the shipped model's, one for each member and step.
BUDGETS = (2560, 5120, 10240)
SINGLE = "planner.num_candidates=160"  # of planners with one iteration: what the greatest budget allows
PLANNERS: dict[str, tuple[str, ...]] = {
    "mppi": ("planner=mppi", SINGLE),
    "cem": ("planner=cem",),
    "icem": ("planner=icem",),
    "best_of_n": ("planner=best_of_n", SINGLE),
    "gradient": ("planner=gradient",),
    "mcts": ("planner=mcts", "planner.simulations=640", "planner.num_candidates=64"),
    "mcts with reuse": ("planner=mcts", "planner.simulations=640", "planner.num_candidates=64", "planner.reuse=true"),
    "cem, critical phase": ("planner=cem", "gate@planner.gate=critical_phase"),
    "cem, one plan in two": ("planner=cem", "gate@planner.gate=periodic"),
    "random proposals": (
        "planner=cem", "proposer@planner.proposer=noise", "planner.sigma=0.5", "planner.iterations=1", SINGLE,
    ),
}  # fmt: skip


def main() -> None:
    """Run every planner at every budget and store its success."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wam", default="six")
    parser.add_argument("--episodes", type=int, default=20, help="dev starts per task")
    parser.add_argument("--budgets", type=int, nargs="*", default=list(BUDGETS), help="evaluations per plan")
    parser.add_argument("--planners", nargs="*", default=list(PLANNERS), choices=list(PLANNERS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/planner_budget"))
    arguments = parser.parse_args()
    os.chdir(ROOT)
    clock = Clock()
    jobs: dict[str, tuple[tuple[str, ...], str]] = {"policy": ((), "policy")}
    for name in arguments.planners:
        for budget in arguments.budgets:
            overrides = (*PLANNERS[name], f"controller.evaluations={budget}")
            jobs[f"{name}/{budget}"] = (overrides, "planner,shuffled")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures = {
            name: pool.submit(measure, name, overrides, arguments.wam, arguments.episodes, arguments.out, methods)
            for name, (overrides, methods) in jobs.items()
        }
        runs = {name: future.result() for name, future in futures.items()}
    metrics: dict[str, Any] = {}
    for name, run in runs.items():
        for method, by_task in run["summary"].items():
            mean = by_task["mean"]
            metrics[f"{name}/{method}/success"] = {
                "mean": mean["success"],
                **{k: mean[k] for k in ("n", "low", "high")},
            }
            print(f"{name + '/' + method:45s} {mean['success']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]")
        if run["evaluations_per_plan"] is not None:
            metrics[f"{name}/evaluations_per_plan"] = run["evaluations_per_plan"]
            metrics[f"{name}/plan_p50_ms"] = run["timing"]["single"]["total_ms"]["p50"]
    clock.store(
        RESULTS / "planner_budget.json",
        config={"wam": arguments.wam, "split": "dev", "episodes": arguments.episodes, "planners": PLANNERS},
        metrics=metrics,
        arguments=shlex.join(sys.argv[1:]),
        protocol_hash=sorted({run["protocol_hash"] for run in runs.values()}),
    )


if __name__ == "__main__":
    main()
