"""PPO on the WAM's own policy head in our Isaac Lab task, from nothing, on one CPU core: return before and after.

    WARP_CACHE_PATH=.venv-isaac/warp-cache .venv-isaac/bin/python -m benchmarks.posttrain_isaac

One `python -m wamrl.posttrain` per seed; add `device=cuda` to the same command on a GPU. Test starts, the same ones
before and after, so that the gain's interval is a paired one; the pooled one takes the seeds' episodes together. The
metrics go to benchmarks/results/posttrain_isaac.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.stored import RESULTS, ROOT, Clock, difference, rate, run_told
from wamrl.stages import Stage

SETTINGS = ("env=isaaclab/balance", "agent=ppo", "wam=reference", "observation=[state]", "agent.world_weight=0",
            "agent.learning_rate=1e-3", "num_envs=128", "decisions=32", "iterations=60", "episodes=100",
            "evaluate=test", "final_report=true", "threads=1", "device=cpu")  # fmt: skip


def collect_metrics(runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Flat metrics of the seeds' results.json."""
    metrics: dict[str, Any] = {}
    for moment in ("before", "after"):
        real = [results[moment]["real"] for results in runs.values()]
        metrics[f"{moment}/success"] = rate(sum(one["successes"] for one in real), sum(one["n"] for one in real))
        metrics[f"{moment}/return"] = sum(one["episode_return"] for one in real) / len(real)
    for seed, results in runs.items():
        metrics[f"return_gain_seed{seed}"] = difference(results["return_gain"])
        metrics[f"wall_s_seed{seed}"] = round(results["seconds"], 1)
    metrics["real_steps"] = sum(results["real_steps"] for results in runs.values()) / len(runs)
    return metrics


def main() -> None:
    """Run the missing seeds and store the metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/posttrain_isaac"))
    arguments = parser.parse_args()
    os.chdir(ROOT)
    clock = Clock()
    runs = {}
    for seed in arguments.seeds:
        stage = Stage(f"seed{seed}", "posttrain", (*SETTINGS, f"seed={seed}"))
        run_told(stage, arguments.out)
        runs[seed] = json.loads((arguments.out / stage.name / "results.json").read_text())
    metrics = collect_metrics(runs)
    clock.store(
        RESULTS / "posttrain_isaac.json", config={"command": " ".join(["python -m wamrl.posttrain", *SETTINGS])},
        metrics=metrics, arguments=" ".join(sys.argv[1:]), seeds=arguments.seeds,
    )  # fmt: skip
    for name, value in metrics.items():
        print(f"{name:24s} {value}")


if __name__ == "__main__":
    main()
