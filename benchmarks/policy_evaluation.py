"""Judging policies of independent origin inside World Action Models, against the simulator.

    python -m benchmarks.policy_evaluation                         # 200 test starts per policy on four tasks together
    python -m benchmarks.policy_evaluation --split dev --tasks push-v3 reach-v3 --episodes 20 --policies 8 --wam six
    python -m benchmarks.policy_evaluation --wam judge other=outputs/train/latest   # two judges side by side

Three WAMs judge by default: `judge`, the reference WAM trained on data=judge, from states; `judge_pixels`, the same
from images beside the state, on the same episodes; and the shipped `six`, which was not made for judging.

Policies differ in algorithm, data and seed: behaviour cloning by networks, linear maps and nearest neighbours on few or
many demonstrations, the shipped model's own policy, WAMs trained on little data, planners, the scripted expert and
random actions. Noisy versions come on top and are reported apart. The judge's threshold is calibrated on imitators of
other demonstrations. Data sets and policies are made by the commands that users run, in directories below `--out`; what
is done is not done again, and the real episodes are run once for all judges. The metrics go to
benchmarks/results/policy_evaluation.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.stored import RESULTS, ROOT, Clock, folder_of, run_logged
from wamrl import checkpoint
from wamrl.data import EpisodeDataset
from wamrl.envs.layouts import METAWORLD
from wamrl.interfaces import PolicyState, keys_of_images, task_id
from wamrl.judging.worlds import nearest_keyframes
from wamrl.naming import unknown_name
from wamrl.report import short

TASKS = ("reach-v3", "push-v3", "pick-place-v3", "drawer-open-v3")
KEYFRAME_EVERY = 10  # what evaluate takes; a model whose stride does not divide it, the nearest below that it does
FIRST_TEST_START = 350  # earlier ones were read by other benchmarks
JUDGES = ("judge", "judge_pixels")
"""Judging WAMs that are made here."""


# ------------------------------------------------------------------------------------------------ simple learners


def demonstrations(data: str, per_task: int, tasks: Sequence[str], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """States [F, 39], executed actions [F, 4] and task ids [F] of `per_task` successful episodes of each task."""
    dataset = EpisodeDataset.open(data, keys=["state"], tasks=list(tasks))
    rng = np.random.default_rng(seed)
    states, actions, ids = [], [], []
    for task in tasks:
        of_task = [i for i, e in enumerate(dataset.episodes) if e["task"] == task and e["success"]]
        for i in rng.permutation(of_task)[:per_task].tolist():
            length, offset = int(dataset.lengths[i]), int(dataset.offsets[i])
            states.append(dataset.frames["observation"]["state"][offset : offset + length])
            actions.append(dataset.frames["action"][offset : offset + length])
            ids.append(torch.full((length,), task_id(task)))
    return torch.cat(states).float(), torch.cat(actions).float(), torch.cat(ids)


class _Cloned:
    """A policy without memory over states, one model per task."""

    def __init__(self, models: dict[int, Any]) -> None:
        self.models = models

    def initial_state(self, rows: int) -> PolicyState:
        return TensorDict({}, batch_size=[rows])

    @torch.no_grad()
    def act(self, observation: TensorDict, policy_state: PolicyState, is_init: Tensor) -> tuple[Tensor, PolicyState]:
        action = torch.zeros(observation.batch_size[0], 4)
        for number, model in self.models.items():
            rows = observation["task"] == number
            if rows.any():
                action[rows] = model(observation["state"][rows])
        return action.clamp(-1, 1), policy_state


def cloned(data: str, per_task: int, tasks: Sequence[str], seed: int, width: int = 128, steps: int = 1500) -> _Cloned:
    """Behaviour cloning: a network per task, mean squared error on executed actions."""
    state, action, ids = demonstrations(data, per_task, tasks, seed)
    models: dict[int, Any] = {}
    for task in tasks:
        mine = ids == task_id(task)
        x, y = state[mine], action[mine].clamp(-1, 1)
        mean, std = x.mean(0), x.std(0).clamp(min=1e-2)
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = nn.Sequential(
                nn.Linear(39, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4), nn.Tanh()
            )
        optimiser = torch.optim.Adam(network.parameters(), 1e-3)
        for _ in range(steps):
            some = torch.randint(len(x), (128,), generator=generator)
            loss = (network((x[some] - mean) / std) - y[some]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        models[task_id(task)] = lambda s, n=network, m=mean, d=std: n((s - m) / d)
    return _Cloned(models)


def nearest(data: str, per_task: int, tasks: Sequence[str], seed: int, neighbours: int = 3) -> _Cloned:
    """Nearest neighbours: the mean action of the closest states of the demonstrations (Pari et al., 2021)."""
    state, action, ids = demonstrations(data, per_task, tasks, seed)
    models: dict[int, Any] = {}
    for task in tasks:
        mine = ids == task_id(task)
        x, y = state[mine], action[mine]
        mean, std = x.mean(0), x.std(0).clamp(min=1e-2)

        def act(s: Tensor, x: Tensor = (x - mean) / std, y: Tensor = y, m: Tensor = mean, d: Tensor = std) -> Tensor:
            near = torch.cdist((s - m) / d, x).topk(neighbours, largest=False).indices
            return y[near].mean(1)

        models[task_id(task)] = act
    return _Cloned(models)


def linear(data: str, per_task: int, tasks: Sequence[str], seed: int, ridge: float = 1.0) -> _Cloned:
    """Ridge regression of actions on states and on where hand, object and goal lie to each other."""
    state, action, ids = demonstrations(data, per_task, tasks, seed)
    models: dict[int, Any] = {}

    def features(s: Tensor) -> Tensor:
        hand, thing, goal = (s[:, METAWORLD.place(name)] for name in ("hand", "object", "goal"))
        apart = torch.cat([hand - thing, hand - goal, thing - goal], dim=1) / 0.05  # metres to about one
        return torch.cat([s, torch.tanh(apart), torch.ones(len(s), 1)], dim=1)

    for task in tasks:
        mine = ids == task_id(task)
        x, y = features(state[mine]).double(), action[mine].double()
        weight = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y).float()
        models[task_id(task)] = lambda s, w=weight: features(s) @ w
    return _Cloned(models)


# ------------------------------------------------------------------------------------------------ the benchmark


@dataclass(frozen=True)
class Wam:
    """A WAM of its own data and seed, trained briefly, whose policy takes part. episodes: of noisy experts per task."""

    name: str
    episodes: int
    seed: int
    steps: int


WAMS = (Wam("wam_15", 15, 11, 1200), Wam("wam_40", 40, 12, 1500))


def run(command: Sequence[str], done: Path, log: Path) -> None:
    """Run a command of wamrl unless `done` exists; RuntimeError with the log's end when it fails."""
    if done.exists():
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    run_logged([sys.executable, "-m", *command], log)


def collect(out: Path, name: str, tasks: Sequence[str], seed: int, first: int, mixture: dict[str, int]) -> Path:
    """A data set of train starts for policies, apart from those that the judging WAM was trained on."""
    path = out / name
    none = {"expert": 0, "noisy_expert": 0, "failing": 0, "random": 0}
    words = ",".join(f"{k}:{v}" for k, v in {**none, **mixture}.items())
    run(
        ["wamrl.collect", "env=metaworld/six", f"env.tasks=[{','.join(tasks)}]", "data=rich",
         f"data.mixture={{{words}}}", f"path={path}", f"seed={seed}", f"first_start={first}", "snapshots=false",
         f"run_dir={out / f'{name}_run'}"],
        out / f"{name}_run" / "results.json", out / f"{name}.log",
    )  # fmt: skip
    return path


def judging_wam(name: str, out: Path, tasks: Sequence[str]) -> str:
    """The run directory of one of `JUDGES`, which is trained where it is missing."""
    data, tokenizer, folder = out / "judge_data", out / "judge_tokenizer", out / name
    common = [f"data={data}", "seed=41", "threads=1", "tensorboard=false"]
    model = Path("checkpoints") / "model.safetensors"
    run(
        ["wamrl.collect", "env=metaworld/six", f"env.tasks=[{','.join(tasks)}]", "data=judge", "env.pixels=true",
         f"path={data}", "seed=41", "first_start=3000", "snapshots=false", f"run_dir={out / 'judge_data_run'}"],
        out / "judge_data_run" / "results.json", out / "judge_data.log",
    )  # fmt: skip
    if name == "judge":
        words = ["observation=[state,proprioception]", "steps=8000"]
    else:
        run(
            ["wamrl.train", "wam=tokenizer", *common, "observation=[pixels]", "steps=1200", "batch_size=32", "length=1",
             "learning_rate=3e-3", "precision=bfloat16", f"run_dir={tokenizer}"],
            tokenizer / model, out / "judge_tokenizer.log",
        )  # fmt: skip
        words = ["observation=[pixels,state,proprioception]", f"tokenizer={tokenizer}", "steps=5000"]
    run(
        ["wamrl.train", "wam=reference", *common, *words, f"run_dir={folder}"], folder / model, out / f"{name}.log"
    )  # fmt: skip
    return str(folder)


def learner(function: str, name: str, data: Path, tasks: Sequence[str], per_task: int, seed: int) -> dict[str, Any]:
    """The description of a simple learner on `per_task` demonstrations of `data`."""
    arguments = {"data": str(data), "per_task": per_task, "tasks": list(tasks), "seed": seed}
    return {"kind": "callable", "target": f"benchmarks.policy_evaluation:{function}", "name": name,
            "arguments": arguments}  # fmt: skip


def calibrators(out: Path, tasks: Sequence[str]) -> list[Any]:
    """Descriptions of the policies on which the judge's threshold is set: of the judged ones' kind, of other data."""
    data = collect(out, "calibration_demonstrations", tasks, 23, 2300, {"expert": 12})
    return [
        "expert+0.4",
        "random",
        learner("cloned", "calibration_bc_4", data, tasks, 4, 31),
        learner("cloned", "calibration_bc_12", data, tasks, 12, 32),
        learner("nearest", "calibration_neighbours_8", data, tasks, 8, 33),
    ]


def policies(out: Path, tasks: Sequence[str], count: int | None) -> list[Any]:
    """Descriptions of the policies, as `wamrl.evaluate` takes them; independent ones first, in a fixed order."""
    clean = collect(out, "demonstrations", tasks, 21, 2000, {"expert": 40})
    noisy = collect(out, "noisy_demonstrations", tasks, 22, 2100, {"noisy_expert": 40})
    found: list[Any] = [
        "expert",
        "random",
        learner("cloned", "bc_2", clean, tasks, 2, 1),
        learner("cloned", "bc_10", clean, tasks, 10, 2),
        learner("cloned", "bc_40", clean, tasks, 40, 3),
        learner("nearest", "neighbours_5", clean, tasks, 5, 4),
        learner("cloned", "bc_noisy_8", noisy, tasks, 8, 5),
        learner("nearest", "neighbours_noisy_40", noisy, tasks, 40, 6),
        learner("cloned", "bc_noisy_40", noisy, tasks, 40, 7),
        learner("linear", "linear_20", clean, tasks, 20, 8),
        learner("linear", "linear_noisy_30", noisy, tasks, 30, 9),
        "six",
    ]
    if count is None or count > len(found):
        for wam in WAMS:
            data = collect(out, f"{wam.name}_data", tasks, wam.seed, 2200, {"noisy_expert": wam.episodes})
            folder = out / wam.name
            run(
                ["wamrl.train", f"data={data}", "wam=reference", f"steps={wam.steps}", f"seed={wam.seed}", "threads=1",
                 "device=cpu", "tensorboard=false", f"run_dir={folder}"],
                folder / "checkpoints" / "model.safetensors", out / f"{wam.name}.log",
            )  # fmt: skip
            found.append({"kind": "checkpoint", "checkpoint": str(folder), "name": wam.name})
            found.append(
                {"kind": "planner", "checkpoint": str(folder), "name": f"planner:{wam.name}",
                 "planner": {"num_candidates": 16}}
            )  # fmt: skip
    found = found[:count] if count else found
    return [*found, "expert+0.3", "expert+0.7"]


def _words(value: Any) -> str:
    """A value as Hydra's command line reads it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_words(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_words, value)) + "]"
    return f"'{value}'" if isinstance(value, str) else str(value)


def metrics_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored of the results.json of an evaluation, flat.

    Agreement over all policies, the independent ones and on each task, also without each policy
    (`<scope>/pearson_without/<policy>`); success of every policy on every task; the judges compared; horizons.
    """
    metrics: dict[str, Any] = {}
    independent = [name for name, entry in results["policies"].items() if entry["origin"] == "independent"]
    for scope, found in results["agreement"].items():
        for key in ("pearson", "mmrv", "gap", "kappa"):
            metrics[f"{short(scope)}/{key}"] = {k: found[key][k] for k in ("mean", "n", "low", "high")}
        metrics |= {f"{short(scope)}/{key}": found[key] for key in ("spearman", "permutation_p", "bias")}
        metrics[f"{short(scope)}/false_positive_rate"] = found["judge"]["false_positive_rate"]
        names = independent if scope == "independent" else list(results["policies"])
        for name, r in zip(names, found["leave_one_out"], strict=True):
            metrics[f"{short(scope)}/pearson_without/{name}"] = r
    for scope in ("mean", *results["tasks"]):
        for name, entry in results["policies"].items():
            for world in ("real", "imagined"):
                found = entry[scope][world]
                place = f"{short(scope)}/{name}/{world}_success"
                metrics[place] = {k: found[k] for k in ("mean", "n", "low", "high")}
    compared = results["agreement"][results["headline"]]["policies"]
    for name, variant in results["variants"].items():
        for key in ("pearson", "mmrv", "gap", "bias", "kappa", "recall", "false_positive_rate", "ece"):
            value, bounds = variant[key], variant["intervals"].get(key)
            if bounds:
                value = {"mean": value, "n": compared, "low": bounds[0], "high": bounds[1]}
            metrics[f"judges/{name}/{key}"] = value
    for name, found in results["drift"].items():
        for scope in ("mean", *results["tasks"]):
            metrics[f"{short(scope)}/{name}_sustained_steps"] = found[scope]["sustained"]
    cost = results["cost"]
    metrics["cost/imagined_share_of_real"] = cost["imagined_us_per_step"] / cost["real_us_per_step"]
    return metrics


@dataclass(frozen=True)
class Judge:
    """A WAM that judges. settings: of evaluate, for this one alone."""

    name: str
    checkpoint: str
    settings: tuple[str, ...] = ()


def judges(
    words: Sequence[str], further: Sequence[Sequence[str]], made: Callable[[str], str] | None = None
) -> list[Judge]:
    """The judges of `--wam`, each CHECKPOINT or NAME=CHECKPOINT, with what their observation and stride ask for.

    further: of `--judge`, a judge's name and settings of evaluate each. made: gives the checkpoint of one of `JUDGES`.

    Raises:
        ValueError: two of one name, or settings of none of them.
    """
    named: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        path = path if equals else word
        name = name if equals else Path(path).stem
        if name in named:
            raise ValueError(f"two WAMs are called '{name}'; name one of them, as in --wam {name} other={path}")
        named[name] = path
    own: dict[str, list[str]] = {}
    for name, *settings in further:
        if name not in named:
            raise unknown_name("WAM of --wam", name, named)
        own.setdefault(name, []).extend(settings)
    specs = {path: checkpoint.read_metadata(path).spec for path in named.values() if path not in JUDGES}
    found = []
    for name, path in named.items():
        if path in JUDGES and made is not None:  # after the others, of which none may be missing
            path = made(path)
        spec, given = specs.get(path) or checkpoint.read_metadata(path).spec, own.get(name, [])
        settings = ["env.pixels=true"] if keys_of_images(spec.observation) else []
        if KEYFRAME_EVERY % spec.frame_stride:
            settings.append(f"keyframe_every={nearest_keyframes(KEYFRAME_EVERY, spec.frame_stride)}")
        said = {word.partition("=")[0] for word in given}
        usual = [word for word in settings if word.partition("=")[0] not in said]
        found.append(Judge(name, path, (*usual, *given)))
    return found


def evaluate(judge: Judge, common: Sequence[str], out: Path, split: str) -> dict[str, Any]:
    """results.json of the evaluation by `judge`, which is run unless it is there.

    Raises:
        ValueError: what is there is of another command.
    """
    folder = out / f"evaluate_{split}_{folder_of(judge.name)}"
    words = [
        *common,
        "wam=checkpoint",
        f"wam.checkpoint={judge.checkpoint}",
        f"reality={out / 'reality'}",
        *judge.settings,
    ]

    def check(command: str) -> None:
        if sorted(shlex.split(command)[3:]) != sorted(words):
            raise ValueError(f"{folder} is of another command ({command}); remove it to evaluate anew")

    command, stopped = ["wamrl.evaluate", *words, f"run_dir={folder}"], folder / "cells" / "run.json"
    if stopped.is_file():
        check(json.loads(stopped.read_text())["settings"]["command"])
        command = ["wamrl.evaluate", f"resume={folder}"]
    run(command, folder / "report.html", out / f"evaluate_{folder_of(judge.name)}.log")
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    check(results["command"])
    return results


def side_by_side(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`metrics_of` every judge's results: the first one's as they are, the others' below `wam/<name>/`.

    Raises:
        ValueError: judges of other protocols, or who saw other real episodes, which are stored once.
    """
    (first, leading), *others = results.items()
    metrics = metrics_of(leading)
    for name, result in others:
        if result["protocol_hash"] != leading["protocol_hash"]:
            raise ValueError(f"{first} and {name} judge under different protocols; give them the same env and starts")
        for key, value in metrics_of(result).items():
            if not key.endswith("/real_success"):
                metrics[f"wam/{name}/{key}"] = value
            elif value != metrics[key]:
                raise ValueError(f"{key} is {value} beside {name}, but {metrics[key]} beside {first}")
    return metrics


def main() -> None:
    """Make what is missing, evaluate by every judge, and store the metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--episodes", type=int, default=50, help="start states per task and policy")
    parser.add_argument("--split", choices=("test", "dev"), default="test")
    parser.add_argument("--policies", type=int, default=None, help="only the first so many independent ones")
    parser.add_argument("--wam", nargs="+", default=[*JUDGES, "six"], metavar="[NAME=]CHECKPOINT",
                        help="the judges; the first is the headline, the others are stored beside it; "
                        f"{' and '.join(JUDGES)} are made here")  # fmt: skip
    parser.add_argument("--settings", nargs="*", default=[], help="more settings of evaluate, for all judges")
    parser.add_argument("--judge", nargs="+", action="append", default=[], metavar=("NAME", "SETTING"),
                        help="settings of evaluate for one judge, as in --judge pixels device=cuda")  # fmt: skip
    parser.add_argument("--calibration", type=int, default=40, help="dev starts per task for the judge's threshold")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/policy_evaluation"))
    parser.add_argument("--store", type=Path, default=RESULTS / "policy_evaluation.json")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    clock = Clock()
    tasks = [f"metaworld/{name}" for name in arguments.tasks]
    # A mistake in them costs no work.
    judging = judges(arguments.wam, arguments.judge, lambda name: judging_wam(name, arguments.out, tasks))
    described = policies(arguments.out, tasks, arguments.policies)
    first = FIRST_TEST_START if arguments.split == "test" else 0
    common = [
        "env=metaworld/six", f"env.tasks=[{','.join(tasks)}]", f"policies={_words(described)}",
        f"split={arguments.split}", f"episodes={arguments.episodes}", f"first_start={first}",
        f"calibration.episodes={arguments.calibration}",
        f"calibration.policies={_words(calibrators(arguments.out, tasks))}", *arguments.settings,
    ]  # fmt: skip
    results = {judge.name: evaluate(judge, common, arguments.out, arguments.split) for judge in judging}
    leading, metrics = results[judging[0].name], side_by_side(results)
    wams = {
        judge.name: {
            "checkpoint": judge.checkpoint, "settings": list(judge.settings),
            "observation": results[judge.name]["wam"]["observation"],
            "content_hash": results[judge.name]["wam"]["content_hash"],
            "thresholds": results[judge.name]["calibration"]["thresholds"],
            "warnings": results[judge.name]["warnings"],
        }
        for judge in judging
    }  # fmt: skip
    clock.store(
        arguments.store,
        config={"wam": judging[0].checkpoint, "tasks": tasks, "split": arguments.split, "episodes": arguments.episodes,
                "first_start": first, "calibration": arguments.calibration, "settings": arguments.settings,
                "content_hash": leading["wam"]["content_hash"], "thresholds": leading["calibration"]["thresholds"],
                "origins": {n: e["origin"] for n, e in leading["policies"].items()}, "warnings": leading["warnings"],
                "wams": wams},
        metrics=metrics,
        arguments=shlex.join(sys.argv[1:]),
        protocol_hash=leading["protocol_hash"],
    )  # fmt: skip
    for key, value in metrics.items():
        own = key.split("/", 2)[2] if key.startswith("wam/") else key
        if own.startswith(("all/", "independent/", "judges/")):
            print(key, value)


if __name__ == "__main__":
    main()
