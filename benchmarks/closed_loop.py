"""The closed loop (`python -m wamrl.loop`) from a deliberately weak model: real success against real control steps.

    python -m benchmarks.posttrain --variants                     # makes the weak models, in outputs/bench/posttrain
    python -m benchmarks.closed_loop                              # three seeds
    python -m benchmarks.closed_loop --report                     # store what is finished

The loop starts from the data and the model of `benchmarks.posttrain`, whose steps do not count. In every round the
planner acts from train starts, more often where it failed, and the model is trained anew on all data so far. Policy and
planner of every round's model are measured on the test starts of `benchmarks.posttrain`; settings were chosen on dev
starts with seed 0. The metrics go to benchmarks/results/closed_loop.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.planner_budget import read
from benchmarks.posttrain import ENV, EPISODES, FIRST_TEST_START
from benchmarks.stored import RESULTS, ROOT, Clock, difference, rate, run_told
from wamrl.evaluation import Episode, compare
from wamrl.report import short
from wamrl.stages import Stage, is_done

ROUNDS = 4  # the weak model is that of round 0
LOOP = (
    "environment=metaworld/six", f'environment_overrides=["env.tasks={ENV}"]', f"rounds={ROUNDS}", "budget=100000",
    "anew=true", "collect_by=[planner]", "by_failures=true", "episodes=60", "noisy_share=0.5",
    "learner=null", "evaluation_episodes=5", "first_episodes=45",
    'train=["steps=6000","compile=true","precision=bfloat16","tensorboard=false"]',
)  # fmt: skip
METHODS = ("planner", "policy")


def stages(seed: int, weak: Path, out: Path) -> list[Stage]:
    """The loop of one seed, and what measures its rounds, in order."""
    start, folder = weak / f"seed{seed}", out / f"seed{seed}"
    loop = [*LOOP, f"dataset={start / 'data'}", f"checkpoint={start / 'weak'}", f"first_start={1000 * seed}",
            f"seed={seed}", "threads=1"]  # fmt: skip
    found = [Stage("loop", "loop", tuple(loop))]
    for number in range(ROUNDS):
        model = start / "weak" if number == 0 else folder / "loop" / f"round{number}_train"
        words = (f"wam={model}", "env=metaworld/six", f"env.tasks={ENV}", f"episodes={EPISODES}",
                 f"first_start={FIRST_TEST_START}", f"methods=[{','.join(METHODS)}]", "video=false", "workers=1",
                 "latency_plans=0", f"seed={seed}", "threads=1")  # fmt: skip
        found.append(Stage(f"test{number}", "plan", words))
    return found


def collect_metrics(
    loops: Mapping[int, Mapping[str, Any]], tests: Mapping[int, Sequence[Sequence[Episode]]]
) -> dict[str, Any]:
    """Flat metrics of the results of loops by seed, and of the episodes of their rounds on test starts."""
    metrics: dict[str, Any] = {"seeds": len(loops)}
    for number in range(ROUNDS):
        steps = [loop["rounds"][number]["real_steps"] for loop in loops.values()]
        metrics[f"round{number}/real_steps"] = sum(steps) / len(steps)
        for method in METHODS:
            mine = [e for rounds in tests.values() for e in rounds[number] if e.method == method]
            for scope in ("mean", *sorted({e.task for e in mine})):
                successes = [e.success for e in mine if scope in ("mean", e.task)]
                metrics[f"round{number}/{short(scope)}/{method}/success"] = rate(sum(successes), len(successes))
            for seed, rounds in tests.items():
                successes = [e.success for e in rounds[number] if e.method == method]
                metrics[f"round{number}/seed{seed}/{method}/success"] = rate(sum(successes), len(successes))
    for method in METHODS:
        first = [replace(e, method="weak") for rounds in tests.values() for e in rounds[0] if e.method == "policy"]
        last = [e for rounds in tests.values() for e in rounds[-1] if e.method == method]
        gain = compare([*last, *first], method, "weak")
        assert gain is not None  # the starts are the same
        metrics[f"gain/{method}_minus_weak_policy"] = difference(asdict(gain))
    return metrics


def main() -> None:
    """Run what is missing and store the metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--weak", type=Path, default=Path("outputs/bench/posttrain"), help="of benchmarks.posttrain")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/closed_loop"))
    parser.add_argument("--report", action="store_true", help="run nothing; store the metrics of what is finished")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    clock = Clock()
    loops: dict[int, dict[str, Any]] = {}
    tests: dict[int, list[list[Episode]]] = {}
    hashes = set()
    for seed in arguments.seeds:
        directory = arguments.out / f"seed{seed}"
        todo = stages(seed, arguments.weak, arguments.out)
        for stage in todo if not arguments.report else ():
            run_told(stage, directory)
        if all(is_done(stage, directory) for stage in todo):
            loops[seed] = json.loads((directory / "loop" / "results.json").read_text())
            found = [read(directory / f"test{number}") for number in range(ROUNDS)]
            tests[seed] = [episodes for _, episodes in found]
            hashes |= {results["protocol_hash"] for results, _ in found}
    if not loops:
        parser.error(f"no loop is finished in {arguments.out}; run without --report first")
    metrics = collect_metrics(loops, tests)
    clock.store(
        RESULTS / "closed_loop.json",
        config={"split": "test", "first_start": FIRST_TEST_START, "episodes": EPISODES, "loop": LOOP},
        metrics=metrics, arguments=" ".join(sys.argv[1:]), seeds=sorted(loops), protocol_hash=sorted(hashes),
    )  # fmt: skip
    for name, value in metrics.items():
        print(f"{name:50s} {value}")


if __name__ == "__main__":
    main()
