"""Do World Action Models need test-time imagination? Fast-WAM's four variants and mot_uwm on the same data.

    python -m benchmarks.fast_wam                                   # two tasks, three seeds, test starts
    python -m benchmarks.fast_wam --tasks drawer-open --seeds 0 --steps 200 --episodes 5 --out outputs/smoke
    python -m benchmarks.fast_wam --pixels                          # images and proprioception instead of the state

Per task and seed: demonstrations are collected once, every variant is trained on them by `python -m wamrl.train` with
the same optimiser steps, and runs closed loop from the same test starts, replanning every half chunk. mot_uwm runs in
all of its ways to act (policy, joint, future_first) and under a planner, and its imagination is measured with the
executed actions, with those of other windows, and against persistence. Latency is measured by turns in one run. A stage
that is done is not done again. The metrics go to benchmarks/results/fast_wam.json.

`--pixels` collects images, trains a tokenizer on them first, and lets all models read images through it.
`--data` names a mixture of configs/data, `--overrides` go to the training of every variant (`wam/backbone=dit`, ...).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.stored import RESULTS, ROOT, Clock, run_stage
from wamrl import checkpoint
from wamrl.control import ModelPolicy, PlannerPolicy
from wamrl.data import EpisodeDataset
from wamrl.envs.metaworld import MetaWorldEnv
from wamrl.evaluation import Episode, Start, read_episodes, run_episodes, summarise, write_episodes
from wamrl.interfaces import Context, Policy
from wamrl.models.flow import time_grid
from wamrl.models.flow_wam import FlowWAM
from wamrl.noise import NoiseKey
from wamrl.planners.mppi import make_mppi

FIRST_TEST_START = 100  # starts 0 to 99 were read while earlier versions were made
VARIANTS = ("fast", "joint", "idm", "no_cotrain", "mot_uwm")
WAYS = ("joint", "future_first", "planner")  # of mot_uwm, beside its policy
DEMONSTRATIONS = {"drawer-open": 60, "push": 300}
STEPS_SWEEP = (1, 2, 4, 10)
ROWS = 10
TOKENIZER = ["wam=tokenizer", "observation=[pixels]", "batch_size=32", "length=1", "learning_rate=3e-3"]
HELD_OUT, HELD_OUT_START = 10, 900  # episodes that nothing is trained on, and the first of their starts


def stages(arguments: argparse.Namespace, task: str, seed: int, directory: Path) -> list[tuple[str, list[str]]]:
    """(name, command) of what comes before the closed loop."""
    data, count = directory / "data", arguments.demonstrations or DEMONSTRATIONS.get(task, 100)
    todo = []
    for name, first, episodes, path in (
        ("collect", 0, count, data),
        ("collect_held", HELD_OUT_START, HELD_OUT, directory / "held"),
    ):
        mixture = [f"data.mixture.expert={episodes}"] if arguments.data == "demonstrations" else []
        todo.append((
            name,
            [sys.executable, "-m", "wamrl.collect", f"env=metaworld/{task}-v3", f"data={arguments.data}", *mixture,
             f"path={path}", f"seed={seed}", f"first_start={1000 * seed + first}", "snapshots=false",
             f"env.pixels={str(arguments.pixels).lower()}", f"run_dir={directory / name}"],
        ))  # fmt: skip
    common = ["tensorboard=false", "threads=1", "validation_fraction=0", f"seed={seed}"]
    reads: list[str] = []
    if arguments.pixels:
        tokenizer = directory / "tokenizer"
        todo.append((
            "tokenizer",
            [sys.executable, "-m", "wamrl.train", f"data={data}", *TOKENIZER, f"steps={arguments.tokenizer_steps}",
             *common, f"run_dir={tokenizer}"],
        ))  # fmt: skip
        reads = ["wam/substrate=pixels", "observation=[pixels,proprioception]", f"tokenizer={tokenizer}"]
    for variant in arguments.variants:
        todo.append((
            f"train_{variant}",
            [sys.executable, "-m", "wamrl.train", f"data={data}", f"wam={variant}", f"steps={arguments.steps}",
             "batch_size=64", "warmup_steps=50", "weight_decay=0.01", "clip_norm=1.0", *reads, *common,
             *arguments.overrides, f"run_dir={directory / f'train_{variant}'}"],
        ))  # fmt: skip
    return todo


def load(directory: Path, variant: str, *, policy: str | None = None, steps: int | None = None) -> FlowWAM:
    """A trained variant, set to act in one of its ways with a number of denoising steps."""
    model = checkpoint.load(directory / f"train_{variant}")
    assert isinstance(model, FlowWAM)
    model.policy_query = policy or model.policy_query
    model.action_steps = steps or model.action_steps
    return model


def closed_loop(
    arguments: argparse.Namespace, task: str, seed: int, directory: Path, variant: str, way: str, steps: int | None
) -> None:
    """Episodes of one way to act, stored as <directory>/<name>.csv; nothing when they are there."""
    name = f"{variant}_{way}" + (f"_k{steps}" if steps else "")
    path = directory / f"{name}.csv"
    if path.exists():
        return
    model = load(directory, variant, policy=None if way in ("policy", "planner") else way, steps=steps)
    replan = model.spec.chunk_length // 2
    policy: Policy = ModelPolicy(model, replan_every=replan, seed=seed)
    if way == "planner":
        planner = make_mppi(horizon=model.spec.chunk_length, num_candidates=16, sigma=0.1)
        policy = PlannerPolicy(model, planner, replan_every=replan, seed=seed)
    camera = json.loads((directory / "data" / "dataset.json").read_text())["env"]["camera"]
    env = MetaWorldEnv(
        [f"metaworld/{task}-v3"], num_envs=min(ROWS, arguments.episodes), split=arguments.split, camera=camera,
        pixels="pixels" in model.spec.observation,
    )  # fmt: skip
    first = FIRST_TEST_START if arguments.split == "test" else 0
    starts = [Start(f"metaworld/{task}-v3", first + i) for i in range(arguments.episodes)]
    started = time.perf_counter()
    episodes = run_episodes(env, policy, starts, method=name, split=arguments.split, seed=seed, max_steps=env.max_steps)
    env.close()
    write_episodes(path, episodes)
    success = sum(e.success for e in episodes)
    print(f"{directory.name}: {name} {success}/{len(episodes)} in {time.perf_counter() - started:.0f} s", flush=True)


def imagination(directory: Path, windows: int = 400) -> dict[str, list[float]]:
    """Root mean square errors of mot_uwm's frames per step, in standard deviations of what moves.

    On windows of held-out episodes: true actions, those of another window, no actions (video), and persistence.
    """
    model = load(directory, "mot_uwm")
    horizon = model.spec.chunk_length
    data = EpisodeDataset.open(directory / "held", keys=list(model.spec.observation))
    batch = data.sample(windows, horizon, torch.Generator().manual_seed(0))
    frames = [
        model.encode(Context.from_observation(TensorDict({**o.to_dict(), "task": batch["task"]}, [windows])))["z"]
        for o in batch["observation"].unbind(1)
    ]
    truth = torch.stack(frames[1:], dim=1)
    state = TensorDict({"z": frames[0], "task": torch.zeros_like(batch["task"])}, [windows])
    moving = model.moves.flatten()
    key = NoiseKey.for_rows(windows)

    def error(guess: Tensor) -> list[float]:
        square = (guess - truth)[..., moving].square().mean(-1)
        return [float(square[:, h][batch["valid"][:, h]].mean().sqrt()) for h in range(horizon)]

    with torch.no_grad():
        found = {}
        for name, actions in (
            ("true", batch["action"].unsqueeze(1)),
            ("shuffled", batch["action"].roll(1, 0).unsqueeze(1)),
            ("video", None),
        ):
            imagined = model.imagine(state, actions, futures=1, noise=key, with_frames=True)
            assert imagined.frames is not None
            found[name] = error(imagined.frames[:, 0, 0])
    return {**found, "persistence": error(frames[0].unsqueeze(1).expand_as(truth))}


def uncached(model: FlowWAM, observation: TensorDict, steps: int) -> Tensor:
    """A chunk of fast with the present frame run anew in every step: what the cache saves."""
    state = model.encode(Context.from_observation(observation))
    frame, action = ("F", 0), ("A", 0)
    x = torch.zeros(1, model.spec.chunk_length, model.spec.action_dim)
    times = time_grid(steps)
    for time_, after in zip(times[:-1], times[1:], strict=True):
        contents = {frame: state["z"].unflatten(1, (model.substrate.tokens, model.substrate.width)), action: x}
        velocity, _ = model._run(
            [frame, action], contents, {frame: torch.ones(1, 1), action: torch.full((1, 1), time_)}, state["task"]
        )
        x = x + (after - time_) * velocity[action]
    return x


@torch.no_grad()
def latency(directory: Path, variants: Sequence[str], turns: int) -> dict[str, Any]:
    """Milliseconds per chunk of one row by turns, and floating-point operations as torch counts them."""
    calls: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    keys = list(load(directory, variants[0]).spec.observation)
    data = EpisodeDataset.open(directory / "data", keys=keys)
    window = data.sample(1, 1, torch.Generator().manual_seed(0))
    observation = TensorDict({**window["observation"][:, 0].to_dict(), "task": window["task"]}, [1])
    for variant in variants:
        model = load(directory, variant)
        metrics[f"{variant}/parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        for steps in STEPS_SWEEP:

            def call(model: FlowWAM = model, steps: int = steps) -> object:
                model.action_steps = model.future_steps = steps
                return model.propose(model.encode(Context.from_observation(observation)), 1, mode="ode")

            calls[f"{variant}/k{steps}"] = call
            if variant == "fast":
                calls[f"fast_uncached/k{steps}"] = lambda model=model, steps=steps: uncached(model, observation, steps)
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 3):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if turn >= 3:
                milliseconds[name].append(1e3 * (time.perf_counter() - begun))
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        metrics[f"{name}/latency_p50_ms"] = float(np.median(milliseconds[name]))
        metrics[f"{name}/gflop"] = counter.get_total_flops() / 1e9
    for name in calls:
        variant, _, steps_name = name.partition("/")
        if variant != "fast" and "fast" in variants:
            for key in ("latency_p50_ms", "gflop"):
                metrics[f"{name}/{key}_over_fast"] = metrics[f"{name}/{key}"] / metrics[f"fast/{steps_name}/{key}"]
    return metrics


def collect_metrics(arguments: argparse.Namespace, directories: Mapping[tuple[str, int], Path]) -> dict[str, Any]:
    """Success pooled over seeds, with intervals; imagination per seed averaged; training seconds."""
    metrics: dict[str, Any] = {}
    for task in arguments.tasks:
        mine = [directory for (name, _), directory in directories.items() if name == task]
        pooled: dict[str, list[Episode]] = {}
        for directory in mine:
            for path in sorted(directory.glob("*.csv")):
                pooled.setdefault(path.stem, []).extend(read_episodes(path))
        for name, episodes in pooled.items():
            found = summarise(episodes)
            metrics[f"{task}/{name}/success"] = {
                "mean": found.success, "n": found.n, "low": found.low, "high": found.high
            }  # fmt: skip
        for variant in arguments.variants:
            seconds = [json.loads((d / f"train_{variant}.done").read_text())["seconds"] for d in mine]
            metrics[f"{task}/{variant}/train_s"] = float(np.median(seconds))
        if "mot_uwm" in arguments.variants:
            errors = [imagination(directory) for directory in mine]
            for name in errors[0]:
                for step in (0, len(errors[0][name]) // 2 - 1, len(errors[0][name]) - 1):
                    value = float(np.mean([e[name][step] for e in errors]))
                    metrics[f"{task}/mot_uwm/error_{name}_h{step + 1}"] = value
    return metrics


def main() -> None:
    """Run what is missing and store the metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["drawer-open", "push"], help="Meta-World's names without -v3")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps of every variant")
    parser.add_argument("--episodes", type=int, default=34, help="starts per task and seed")
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--pixels", action="store_true", help="read images and proprioception, not the state")
    parser.add_argument("--tokenizer-steps", type=int, default=900, help="optimiser steps of the tokenizer")
    parser.add_argument("--data", default="demonstrations", help="of configs/data")
    parser.add_argument("--demonstrations", type=int, help="per task; the default depends on the task")
    parser.add_argument("--overrides", nargs="*", default=[], help="for training the variants")
    parser.add_argument("--sweep", action="store_true", help="also success of fast at 1, 2, 4 and 10 steps")
    parser.add_argument("--turns", type=int, default=100, help="of the latency measurement")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/fast_wam"))
    parser.add_argument("--result", type=Path, default=RESULTS / "fast_wam.json")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    clock = Clock()
    directories = {(t, s): arguments.out / f"{t}_seed{s}" for t in arguments.tasks for s in arguments.seeds}
    for (task, seed), directory in directories.items():
        directory.mkdir(parents=True, exist_ok=True)
        for name, command in stages(arguments, task, seed, directory):
            run_stage(name, command, directory)
        for variant in arguments.variants:
            closed_loop(arguments, task, seed, directory, variant, "policy", None)
        if "mot_uwm" in arguments.variants:
            for way in WAYS:
                closed_loop(arguments, task, seed, directory, "mot_uwm", way, None)
        if arguments.sweep and "fast" in arguments.variants:
            for steps in STEPS_SWEEP:
                closed_loop(arguments, task, seed, directory, "fast", "policy", steps)
    metrics = collect_metrics(arguments, directories)
    metrics |= latency(next(iter(directories.values())), arguments.variants, arguments.turns)
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k not in ("out", "result")}
    clock.store(
        arguments.result, config=config, metrics=metrics, arguments=" ".join(sys.argv[1:]), seeds=arguments.seeds
    )
    for key, value in metrics.items():
        if isinstance(value, dict):
            print(f"{key:50s} {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}] n={value['n']}")
        else:
            print(f"{key:50s} {value:.4g}")


if __name__ == "__main__":
    main()
