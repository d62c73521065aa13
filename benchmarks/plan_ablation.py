"""What helps the planner: one choice changed at a time, on dev starts of the six tasks, one model of the scarce data.

    python -m benchmarks.plan_ablation                        # after benchmarks.plan_metaworld made the checkpoints

Dev starts only: this is where the planner's settings were chosen, so its numbers are not test results.
The metrics go to benchmarks/results/plan_ablation.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.stored import RESULTS, ROOT, Clock, folder_of

VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "scores shuffled across the candidates (null control)": ("planner.shuffle_scores=true",),
    "no candidates of the behaviour prior": ("planner.proposer.behaviour_share=0",),
    "success counts for nothing in the score": ("planner.scorer.success_weight=0",),
    "no terminal value": ("planner.scorer.value_weight=0",),
    "no imagined rewards": ("planner.scorer.reward_weight=0",),
    "score: mean over the ensemble": ("planner.scorer.risk=mean",),
    "act: weighted mean of the candidates": ("planner.choose=mean",),
    "sigma 0.1": ("planner.sigma=0.1",),
    "sigma 0.2": ("planner.sigma=0.2",),
    "16 candidates": ("planner.num_candidates=16",),
    "plan every 4 steps": ("controller.replan_every=4",),
    "no policy: noise around the last plan, 3 iterations": (
        "proposer@planner.proposer=noise", "planner.sigma=0.5", "planner.iterations=3", "planner.choose=mean",
        "planner.scorer.risk=mean",
    ),
}  # fmt: skip


def measure(
    name: str, overrides: tuple[str, ...], wam: str, episodes: int, out: Path, methods: str = "planner"
) -> dict[str, Any]:
    """The results of one variant on dev starts; a finished one is read, not run again. methods: joined by commas."""
    directory = out / folder_of(name)
    results = directory / "results.json"
    if not results.exists() or json.loads(results.read_text())["partial"]:
        shutil.rmtree(directory, ignore_errors=True)
        command = [
            sys.executable, "-m", "wamrl.plan", f"wam={wam}", "split=dev", f"episodes={episodes}", "workers=1",
            "video=false", f"methods=[{methods}]", "latency_plans=20", *overrides, f"run_dir={directory}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(results.read_text())


def main() -> None:
    """Run every variant and store its success."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wam", default="outputs/bench/plan_metaworld/scarce/seed0/train")
    parser.add_argument("--episodes", type=int, default=20, help="dev starts per task")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/plan_ablation"))
    arguments = parser.parse_args()
    os.chdir(ROOT)
    clock = Clock()
    chosen = {name: VARIANTS[name] for name in dict.fromkeys(["default", *arguments.variants])}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures = {
            name: pool.submit(
                measure,
                name,
                overrides,
                arguments.wam,
                arguments.episodes,
                arguments.out,
                "planner,policy" if name == "default" else "planner",
            )
            for name, overrides in chosen.items()
        }
        runs = {name: future.result() for name, future in futures.items()}
    metrics: dict[str, Any] = {}
    for name, run in runs.items():
        methods = ("planner", "policy") if name == "default" else ("planner",)
        for method in methods:
            mean = run["summary"][method]["mean"]
            key = f"{name}/mean/{method}/success"
            metrics[key] = {"mean": mean["success"], **{k: mean[k] for k in ("n", "low", "high")}}
            print(f"{key:70s} {mean['success']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]")
        metrics[f"{name}/mean/planner/plan_p50_ms"] = run["timing"]["single"]["total_ms"]["p50"]
    clock.store(
        RESULTS / "plan_ablation.json",
        config={"wam": arguments.wam, "split": "dev", "episodes": arguments.episodes, "variants": chosen},
        metrics=metrics,
        arguments=shlex.join(sys.argv[1:]),
        protocol_hash=sorted({run["protocol_hash"] for run in runs.values()}),
    )


if __name__ == "__main__":
    main()
