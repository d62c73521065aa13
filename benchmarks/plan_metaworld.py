"""Planning in the reference WAM on six Meta-World tasks: collect, train, plan, again.

    python -m benchmarks.plan_metaworld                       # both settings, three seeds, test starts
    python -m benchmarks.plan_metaworld --settings scarce --seeds 0 --jobs 1

Every stage is one of the commands that users run, in a directory of its own under `--out`; a stage that is done is
not done again, so a stopped benchmark goes on. The metrics go to benchmarks/results/plan_metaworld.json; what that file
says of settings that are not asked for stays, with the commits at which they were measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stored import RESULTS, ROOT, Clock, run_told, told
from wamrl.evaluation import Episode, compare, read_episodes, sooner, summarise
from wamrl.stages import Stage

FIRST_TEST_START = 250  # starts 0 to 249 were read while earlier versions were made
METHODS = ("planner", "policy", "shuffled", "random", "expert")


@dataclass(frozen=True)
class Setting:
    """One data setting. planner_episodes: what the planner collects per task between the two trainings; 0: one only.

    The planner collects with twice its usual sigma, so that the second training sees what its search may try. With two
    trainings, the methods are compared after each.
    """

    name: str
    episodes: int
    steps: int
    planner_episodes: int = 0

    @property
    def comparisons(self) -> dict[str, str]:
        """Name in the metrics -> the stage that compared the methods, in order."""
        if not self.planner_episodes:
            return {self.name: "plan"}
        return {self.name: "plan_first", f"{self.name}_own_episodes": "plan"}


SETTINGS = {
    "rich": Setting("rich", episodes=100, steps=4000),
    "scarce": Setting("scarce", episodes=50, steps=4000, planner_episodes=50),
}


def stages(setting: Setting, seed: int, directory: Path) -> list[Stage]:
    """Those of one seed, in order."""
    first_start = 1000 * seed
    data = [directory / "data"]
    todo = []

    def add(name: str, command: str, *overrides: str) -> None:
        todo.append(Stage(name, command, overrides))

    def train(name: str) -> None:
        paths = ",".join(str(path) for path in data)
        add(
            name, "train", f"data=[{paths}]", "wam=reference", f"steps={setting.steps}", f"seed={seed}", "threads=1"
        )  # fmt: skip

    def plan(name: str, model: Path) -> None:
        add(
            name, "plan", "env=metaworld/six", f"wam={model}", "split=test", "episodes=50",
            f"first_start={FIRST_TEST_START}", f"seed={seed}", "workers=1", "video=false",
        )  # fmt: skip

    add(
        "collect", "collect", "env=metaworld/six", f"data={setting.name}", f"path={data[0]}", f"seed={seed}",
        f"first_start={first_start}", "snapshots=false",
    )  # fmt: skip
    train("train")
    model = directory / "train"
    if setting.planner_episodes:
        plan("plan_first", model)
        data.append(directory / "data_planner")
        add(
            "collect_planner", "collect", "env=metaworld/six", "data=planner",
            f"data.mixture.policy={setting.planner_episodes}", f"path={data[1]}", f"wam={model}", f"seed={seed}",
            f"first_start={first_start + setting.episodes}", "snapshots=false", "planner.sigma=0.1",
        )  # fmt: skip
        train("train_again")
        model = directory / "train_again"
    plan("plan", model)
    return todo


def run(setting: Setting, seed: int, out: Path, *, until: str = "plan") -> None:
    """Run the missing stages of one seed up to `until`; RuntimeError with the log's end when a stage fails."""
    directory = out / setting.name / f"seed{seed}"
    for stage in stages(setting, seed, directory):
        run_told(stage, directory, label=f"{setting.name} seed {seed}")
        if stage.name == until:
            break


def _episodes(out: Path, setting: str, seeds: Sequence[int], stage: str) -> list[Episode]:
    return [e for seed in seeds for e in read_episodes(out / setting / f"seed{seed}" / stage / "episodes.csv")]


def finished_seeds(out: Path, setting: Setting, seeds: Sequence[int]) -> list[int]:
    """Those of `seeds` whose last stage is done."""
    return [seed for seed in seeds if (out / setting.name / f"seed{seed}" / "plan.done").exists()]


def _commits(out: Path, setting: Setting, seeds: Sequence[int]) -> list[str]:
    """The commits at which the stages ran; more than one means that the code moved while they did."""
    done = [path for seed in seeds for path in (out / setting.name / f"seed{seed}").glob("*.done")]
    return sorted({str(json.loads(path.read_text())["versions"]["commit"]) for path in done})


def _training_seconds(directory: Path, names: str) -> float:
    """Of the trainings of one seed whose stages match `names`, together."""
    return sum(float(json.loads(path.read_text())["seconds"]) for path in directory.glob(f"{names}.done"))


def collect_metrics(out: Path, finished: Mapping[Setting, Sequence[int]]) -> tuple[dict[str, Any], list[str]]:
    """Flat metrics over the finished seeds of each setting, and the protocol hashes of the runs they came from."""
    metrics: dict[str, Any] = {}
    hashes = []
    compared = [(s, seeds, label, stage) for s, seeds in finished.items() for label, stage in s.comparisons.items()]
    for setting, seeds, label, stage in compared:
        runs = [json.loads((out / setting.name / f"seed{s}" / stage / "results.json").read_text()) for s in seeds]
        hashes += [r["protocol_hash"] for r in runs]
        episodes = _episodes(out, setting.name, seeds, stage)
        tasks = sorted({e.task for e in episodes})
        for method in METHODS:
            mine = [e for e in episodes if e.method == method]
            for task in (None, *tasks):
                chosen = [e for e in mine if task in (None, e.task)]
                name = "mean" if task is None else task.removeprefix("metaworld/")
                summary = summarise(chosen)
                prefix = f"{label}/{name}/{method}"
                metrics[f"{prefix}/success"] = {
                    "mean": summary.success, "n": summary.n, "low": summary.low, "high": summary.high
                }  # fmt: skip
            per_seed = [np.mean([e.success for e in mine if e.seed == seed]) for seed in seeds]
            for seed, success in zip(seeds, per_seed, strict=True):
                metrics[f"{label}/mean/{method}/success_seed{seed}"] = float(success)
        for other in ("policy", "shuffled"):
            pair = compare(episodes, "planner", other)
            assert pair is not None
            prefix = f"{label}/mean/planner_minus_{other}"
            metrics[f"{prefix}/success"] = {
                "mean": pair.difference, "n": pair.n, "low": pair.low, "high": pair.high
            }  # fmt: skip
            metrics[f"{prefix}/mcnemar_p"] = pair.p_value
            steps = sooner(episodes, "planner", other)
            assert steps is not None
            metrics[f"{prefix}/steps"] = {
                "mean": steps.difference, "n": steps.n, "low": steps.low, "high": steps.high
            }  # fmt: skip
        metrics[f"{label}/plan/evaluations"] = runs[0]["evaluations_per_plan"]
        trainings = "train*" if stage == "plan" else "train"
        totals = [_training_seconds(out / setting.name / f"seed{seed}", trainings) for seed in seeds]
        metrics[f"{label}/train_s"] = float(np.median(totals))
    return metrics, sorted(set(hashes))


def main() -> None:
    """Run what is missing and store the metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=sorted(SETTINGS), default=["scarce", "rich"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="seeds side by side, one thread each")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/plan_metaworld"))
    parser.add_argument("--report", action="store_true", help="run nothing; store the metrics of what is finished")
    arguments = parser.parse_args()
    os.chdir(ROOT)  # checkpoints record their data's path, so that it must not be one of this machine
    clock = Clock()
    chosen = [SETTINGS[name] for name in arguments.settings]
    if not arguments.report:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            futures = [pool.submit(run, s, seed, arguments.out) for s in chosen for seed in arguments.seeds]
            for future in futures:
                future.result()
    finished = {s: seeds for s in chosen if (seeds := finished_seeds(arguments.out, s, arguments.seeds))}
    if not finished:
        parser.error(f"no seed is finished in {arguments.out}; run without --report first")
    metrics, hashes = collect_metrics(arguments.out, finished)
    config = {
        s.name: {
            "seeds": seeds,
            "commits": _commits(arguments.out, s, seeds),
            "commands": [
                told(stage, folder).replace(str(arguments.out), "<out>")
                for folder in [arguments.out / s.name / "seed0"]
                for stage in stages(s, 0, folder)
            ],
        }
        for s, seeds in finished.items()
    }
    target = RESULTS / "plan_metaworld.json"
    if target.exists():
        earlier = json.loads(target.read_text())
        others = {name: SETTINGS[name] for name in earlier["config"] if name not in config}
        config |= {name: earlier["config"][name] for name in others}
        labels = tuple(f"{label}/" for setting in others.values() for label in setting.comparisons)
        metrics |= {key: value for key, value in earlier["metrics"].items() if key.startswith(labels)}
        if others:
            hashes = sorted({*hashes, *earlier["protocol_hash"]})
    clock.store(
        target,
        config=config,
        metrics=metrics,
        arguments=" ".join(sys.argv[1:]),
        protocol_hash=hashes,
        seeds=sorted({seed for setting in config.values() for seed in setting["seeds"]}),
    )
    for key, value in metrics.items():
        if "/mean/" in key and isinstance(value, dict):
            print(f"{key:50s} {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}] n={value['n']}")


if __name__ == "__main__":
    main()
