"""Success against model evaluations for every planner, and what a gate or a verifying controller saves.

    python -m benchmarks.posttrain --variants                     # makes the weak models, in outputs/bench/posttrain
    python -m benchmarks.planner_budget                           # curve and gate, three models
    python -m benchmarks.planner_budget --names curve/mppi/512    # that run alone
    python -m benchmarks.planner_budget --report                  # store what is finished

What is stored of runs that are not finished here stays, where it was run with the same settings.

The models are those that `benchmarks.posttrain` starts from, one per seed: their policies fail more often than not,
so that there is room for planning. Each planner plans under a hard budget of model evaluations per plan
(`controller.evaluations`), at one of the budgets beside itself with shuffled scores; random proposals have the same
budgets. Each control step takes half a plan, because two actions of each are executed.

The gated planners (`GATED`) and the default one, which always searches, act from the same starts: their success is
compared in pairs. Settings were chosen on dev starts with seed 0; all that is stored is of test starts.
The metrics go to benchmarks/results/planner_budget.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.posttrain import ENV
from benchmarks.stored import RESULTS, ROOT, Clock, difference, folder_of, rate, run_told
from wamrl.evaluation import Episode, compare, read_episodes
from wamrl.stages import Stage, is_done

# Evaluations per plan: a candidate of 8 steps costs 64 of these models', one for each member and step.
BUDGETS = (512, 1536, 4608)
SINGLE = "planner.num_candidates=72"  # of planners with one iteration: what the greatest budget allows
RANDOM = ("proposer@planner.proposer=noise", "planner.sigma=0.5")
_TREE = ("planner=mcts", "planner.simulations=288", "planner.num_candidates=32")
PLANNERS: dict[str, tuple[str, ...]] = {
    "mppi": ("planner=mppi", SINGLE),
    "cem": ("planner=cem",),
    "icem": ("planner=icem",),
    "best_of_n": ("planner=best_of_n", SINGLE),
    "gradient": ("planner=gradient",),
    "mcts": _TREE,
    "mcts, behaviour prior": (*_TREE, "proposer@planner.proposer=policy"),
    "random proposals": ("planner=mppi", SINGLE, *RANDOM),
}
CURVE_EPISODES, FIRST_TEST_START = 6, 700  # starts per task and model; the first that was not read before
SHUFFLED_BUDGET = 1536  # where every planner has a shuffled twin
# The plan is followed for as long as the world looks as it was imagined, and searched for anew where it does not.
_GATED = ("controller=adaptive", "controller.threshold=0.2", "planner.num_candidates=48")
# Name -> starts per task and model, methods, settings.
GATED: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "always": (60, "planner,policy", ()),
    "gated": (60, "planner", _GATED),
    "gated, scores shuffled": (20, "planner", (*_GATED, "planner.shuffle_scores=true")),
    "gated, random proposals": (20, "planner", (*_GATED, *RANDOM)),
    "always, scores shuffled": (20, "planner", ("planner.shuffle_scores=true",)),
    "critical phase, otherwise the policy": (20, "planner", ("gate@planner.gate=critical_phase",)),
    "no gate, 48 candidates every 4 steps": (
        20, "planner", ("controller.replan_every=4", "planner.num_candidates=48")
    ),
}  # fmt: skip


def jobs(seed: int, weak: Path, only: Sequence[str]) -> dict[str, Stage]:
    """Every run of one seed's model, by the name of what it measures."""
    found: dict[str, tuple[int, str, tuple[str, ...]]] = {}
    if "gate" in only:
        found |= {f"gate/{name}": run for name, run in GATED.items()}
    if "curve" in only:
        for name, overrides in PLANNERS.items():
            # A tree's simulations come one after the other: slow.
            for budget in BUDGETS[:2] if _TREE[0] in overrides else BUDGETS:
                methods = "planner,shuffled" if budget == SHUFFLED_BUDGET else "planner"
                found[f"curve/{name}/{budget}"] = (
                    CURVE_EPISODES, methods, (*overrides, f"controller.evaluations={budget}")
                )  # fmt: skip
    return {
        name: Stage(folder_of(name), "plan", (
            f"wam={weak / f'seed{seed}' / 'weak'}", "env=metaworld/six",
            f"env.tasks={ENV}", f"episodes={episodes}", f"first_start={FIRST_TEST_START}", f"seed={seed}", "workers=1",
            "num_envs=30", "video=false", f"methods=[{methods}]", "latency_plans=20", *overrides,
        ))
        for name, (episodes, methods, overrides) in found.items()
    }  # fmt: skip


def read(directory: Path) -> tuple[dict[str, Any], list[Episode]]:
    """The results and the episodes of a run."""
    return json.loads((directory / "results.json").read_text()), read_episodes(directory / "episodes.csv")


def collect_metrics(runs: Mapping[str, Mapping[int, tuple[dict[str, Any], list[Episode]]]]) -> dict[str, Any]:
    """Flat metrics of the runs by name and seed."""
    metrics: dict[str, Any] = {}
    for name, by_seed in runs.items():
        for method in next(iter(by_seed.values()))[0]["methods"]:
            outcomes = [e.success for _, episodes in by_seed.values() for e in episodes if e.method == method]
            metrics[f"{name}/{method}/success"] = rate(sum(outcomes), len(outcomes))
        results = [result for result, _ in by_seed.values()]
        spent = [r["evaluations_per_plan"] / r["steps_per_plan"] for r in results]
        metrics[f"{name}/evaluations_per_step"] = sum(spent) / len(spent)
        metrics[f"{name}/plan_p50_ms"] = sum(r["timing"]["single"]["total_ms"]["p50"] for r in results) / len(results)
    always = runs.get("gate/always")
    for name in (f"gate/{name}" for name in GATED if name != "always"):
        if always and name in runs and set(runs[name]) == set(always):
            found = compare([*_planned(name, runs[name]), *_planned("always", always)], name, "always")
            assert found is not None  # they have starts in common
            metrics[f"{name}/minus_always"] = difference(asdict(found))
            share = metrics[f"{name}/evaluations_per_step"] / metrics["gate/always/evaluations_per_step"]
            metrics[f"{name}/share_of_evaluations"] = share
    return metrics


def _planned(name: str, by_seed: Mapping[int, tuple[dict[str, Any], list[Episode]]]) -> list[Episode]:
    """The planner's episodes of all seeds, as those of a method called `name`."""
    return [replace(e, method=name) for _, episodes in by_seed.values() for e in episodes if e.method == "planner"]


def with_stored(
    path: Path, config: Mapping[str, Any], metrics: Mapping[str, Any], hashes: set[str]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """`config`, `metrics` and protocol hashes, with what `path` holds of other runs with the settings of today."""
    if not path.exists():
        return dict(config), dict(metrics), sorted(hashes)
    stored = json.loads(path.read_text())
    before, today = stored["config"], json.loads(json.dumps(config))
    kept, names = [], list(jobs(0, Path(), ["gate", "curve"]))
    if all(before.get(key) == today[key] for key in ("split", "first_start", "curve_episodes", "tasks")):
        for name in names:
            part, of = name.split("/")[:2]
            settings = "gated" if part == "gate" else "planners"
            if name not in today["commits"] and before[settings].get(of) == today[settings][of]:
                kept.append(name)
    commit = stored["versions"]["commit"]
    of_kept = {key: value for key, value in stored["metrics"].items() if key.startswith(tuple(f"{n}/" for n in kept))}
    if "gate/always" not in kept:  # they were compared with another one
        of_kept = {
            key: value for key, value in of_kept.items() if not key.endswith(("/minus_always", "/share_of_evaluations"))
        }
    ran = {name: before.get("commits", {}).get(name, commit) for name in kept
           if any(key.startswith(f"{name}/") for key in of_kept)}  # fmt: skip
    return (
        {**config, "commits": {**ran, **config["commits"]}},
        {key: value for name in names for key, value in {**of_kept, **metrics}.items() if key.startswith(f"{name}/")},
        sorted(hashes | (set(stored["protocol_hash"]) if ran else set())),
    )


def main() -> None:
    """Run what is missing and store the metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=["gate", "curve"], default=["gate", "curve"])
    parser.add_argument("--names", nargs="+", choices=list(jobs(0, Path(), ["gate", "curve"])), metavar="RUN",
                        help="of these runs alone, as gate/always or curve/mppi/512")  # fmt: skip
    parser.add_argument("--weak", type=Path, default=Path("outputs/bench/posttrain"), help="of benchmarks.posttrain")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/planner_budget"))
    parser.add_argument("--report", action="store_true", help="run nothing; store the metrics of what is finished")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    clock = Clock()
    runs: dict[str, dict[int, tuple[dict[str, Any], list[Episode]]]] = {}
    commits: dict[str, str] = {}
    for seed in arguments.seeds:
        directory = arguments.out / f"seed{seed}"
        for name, stage in jobs(seed, arguments.weak, arguments.only).items():
            if arguments.names and name not in arguments.names:
                continue
            if not arguments.report:
                run_told(stage, directory)
            if is_done(stage, directory):
                runs.setdefault(name, {})[seed] = read(directory / stage.name)
                done = json.loads((directory / f"{stage.name}.done").read_text())
                commits.setdefault(name, done["versions"]["commit"])
    if not runs:
        parser.error(f"nothing is finished in {arguments.out}; run without --report first")
    metrics = collect_metrics(runs)
    path = RESULTS / "planner_budget.json"
    config, metrics, hashes = with_stored(
        path,
        {"split": "test", "first_start": FIRST_TEST_START, "curve_episodes": CURVE_EPISODES, "tasks": ENV,
         "budgets": BUDGETS, "planners": PLANNERS, "gated": GATED, "commits": commits},
        metrics,
        {result["protocol_hash"] for by_seed in runs.values() for result, _ in by_seed.values()},
    )  # fmt: skip
    clock.store(path, config=config, metrics=metrics, arguments=shlex.join(sys.argv[1:]), seeds=arguments.seeds,
                protocol_hash=hashes)  # fmt: skip
    for name, value in metrics.items():
        print(f"{name:50s} {value}")


if __name__ == "__main__":
    main()
