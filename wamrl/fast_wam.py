"""Do World Action Models need test-time imagination? Fast-WAM's four variants and mot_uwm on the same data.

Per seed and task: demonstrations are collected once, every variant is trained on them by `python -m wamrl.train` with
the same optimiser steps, and acts closed loop from the same start states, replanning every half chunk: as trained, with
other numbers of denoising steps, and under declared shifts (`wamrl.properties`) that no training start has. mot_uwm
acts in all of its ways (policy, joint, future_first) and under a planner, and its imagination is measured with the
executed actions, with those of other windows, and against persistence. Latency and counted operations are taken by
turns in one process. What is done is not done again.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from wamrl import checkpoint, properties
from wamrl.cli import overrides_of
from wamrl.control import ModelPolicy, PlannerPolicy
from wamrl.data import EpisodeDataset
from wamrl.envs.metaworld import MetaWorldEnv
from wamrl.evaluation import (
    Episode,
    Start,
    check_starts,
    paired,
    read_episodes,
    run_episodes,
    summarise,
    write_episodes,
)
from wamrl.files import write_json
from wamrl.image_quality import decoded_quality
from wamrl.interfaces import Context, Policy
from wamrl.models.flow import time_grid
from wamrl.models.flow_wam import FlowWAM
from wamrl.naming import unknown_name, whole_number
from wamrl.noise import NoiseKey
from wamrl.pages import Section, TableOf, provenance_rows, rate, write_page
from wamrl.planners.mppi import make_mppi
from wamrl.results import peak_rss_mib
from wamrl.stages import Stage, run_stage

VARIANTS = ("fast", "joint", "idm", "no_cotrain", "mot_uwm")
WAYS = ("joint", "future_first", "planner")
"""How mot_uwm acts beside its policy."""
DEMONSTRATIONS = {"metaworld/drawer-open-v3": 60, "metaworld/push-v3": 300}
HELD_OUT, HELD_OUT_START = 10, 900
"""Episodes that nothing is trained on, and the first of their start states."""
LATENCY_STEPS = (1, 2, 4, 10)

Say = Callable[[str], None]


def check(settings: Mapping[str, Any]) -> None:
    """Refuse settings that could not be measured, before anything is collected."""
    chosen = settings["fast_wam"]
    for name in ("tasks", "seeds", "variants"):
        if not chosen[name]:
            raise ValueError(f"fast_wam.{name} is empty, so that there is nothing to measure; name at least one")
    check_starts(
        whole_number("fast_wam.first_start", chosen["first_start"], 0),
        whole_number("episodes", settings["episodes"], 1),
        ("fast_wam.first_start", "episodes"),
    )
    if (chosen["demonstrations"] or 0) > HELD_OUT_START:
        raise ValueError(
            f"fast_wam.demonstrations is {chosen['demonstrations']}, but from start {HELD_OUT_START} on episodes are "
            f"held out; choose at most {HELD_OUT_START}"
        )
    for name in chosen["variants"]:
        if name not in VARIANTS:
            raise unknown_name("variant", str(name), VARIANTS)
    for shift in chosen["shifts"]:
        if shift not in properties.SHIFTS:
            raise unknown_name("shift", str(shift), properties.SHIFTS)
        if shift in properties.VISUAL and not chosen["pixels"]:
            raise ValueError(
                f"the shift '{shift}' changes images, but fast_wam.pixels=false: the models read the state"
            )
    if settings["split"] == "train":
        raise ValueError("split=train: the models are trained on these start states; use dev or test")
    if chosen["data"] != "demonstrations" and chosen["demonstrations"] is not None:
        raise ValueError(
            f"fast_wam.demonstrations counts episodes of data=demonstrations, but fast_wam.data={chosen['data']}, "
            "whose mixture says how many; leave fast_wam.demonstrations=null"
        )


def stages(settings: Mapping[str, Any], task: str, seed: int, directory: Path) -> list[Stage]:
    """What comes before the closed loop, in order."""
    chosen = settings["fast_wam"]
    count = chosen["demonstrations"] or DEMONSTRATIONS.get(task, 100)
    common: tuple[str, ...] = (f"seed={seed}", f"threads={settings['threads']}")
    found = []
    for name, first, episodes, data in (
        ("collect", 0, count, "data"),
        ("collect_held", HELD_OUT_START, HELD_OUT, "held"),
    ):
        mixture = [f"data.mixture.expert={episodes}"] if chosen["data"] == "demonstrations" else []
        found.append(
            Stage(name, "collect", (
                f"env={task}", f"data={chosen['data']}", *mixture, f"path={directory / data}", *common,
                f"first_start={1000 * seed + first}", "snapshots=false", f"env.pixels={str(chosen['pixels']).lower()}",
            ))
        )  # fmt: skip
    common += (f"data={directory / 'data'}", "tensorboard=false", "validation_fraction=0")
    reads: tuple[str, ...] = ()
    if chosen["pixels"]:
        words = ("wam=tokenizer", "observation=[pixels]", *common, *overrides_of(chosen["tokenizer"]))
        found.append(Stage("tokenizer", "train", words))
        reads = ("wam/substrate=pixels", "observation=[pixels,proprioception]", f"tokenizer={directory / 'tokenizer'}")
    for variant in chosen["variants"]:
        words = (f"wam={variant}", f"steps={chosen['steps']}", *reads, *common, *overrides_of(chosen["train"]))
        found.append(Stage(f"train_{variant}", "train", words))
    return found


def runs(chosen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is run closed loop for each seed and task, as the options of `closed_loop`."""
    found: list[dict[str, Any]] = [{"variant": variant} for variant in chosen["variants"]]
    found += [{"variant": v, "shift": shift} for shift in chosen["shifts"] for v in chosen["variants"]]
    if "mot_uwm" in chosen["variants"]:
        found += [{"variant": "mot_uwm", "way": way} for way in WAYS]
    if "fast" in chosen["variants"]:
        found += [{"variant": "fast", "steps": steps} for steps in chosen["denoising_steps"]]
    return found


def name_of(variant: str, *, way: str = "policy", steps: int | None = None, shift: str = "none") -> str:
    """The name of a run, and of its file."""
    name = variant + ("" if way == "policy" else f"_{way}") + (f"_k{steps}" if steps else "")
    return name + ("" if shift == "none" else f"@{shift}")


def load(directory: Path, variant: str, *, policy: str | None = None, steps: int | None = None) -> FlowWAM:
    """A trained variant, set to act in one of its ways with a number of denoising steps."""
    model = checkpoint.load(directory / f"train_{variant}")
    assert isinstance(model, FlowWAM)
    model.policy_query = policy or model.policy_query
    model.action_steps = steps or model.action_steps
    return model


def closed_loop(
    settings: Mapping[str, Any],
    task: str,
    seed: int,
    directory: Path,
    variant: str,
    *,
    way: str = "policy",
    steps: int | None = None,
    shift: str = "none",
) -> str | None:
    """Episodes of one way to act, in <directory>/<name>.csv; what to say of them, None when they were there."""
    name = name_of(variant, way=way, steps=steps, shift=shift)
    path, split, first = directory / f"{name}.csv", settings["split"], settings["fast_wam"]["first_start"]
    starts = [Start(task, first + i) for i in range(settings["episodes"])]
    if path.exists() and [(e.start, e.split) for e in read_episodes(path)] == [(s.index, split) for s in starts]:
        return None
    model = load(directory, variant, policy=None if way in ("policy", "planner") else way, steps=steps)
    replan = max(1, model.spec.chunk_length // 2)
    policy: Policy = ModelPolicy(model, replan_every=replan, seed=seed)
    if way == "planner":
        planner = make_mppi(horizon=model.spec.chunk_length, num_candidates=16, sigma=0.1)
        policy = PlannerPolicy(model, planner, replan_every=replan, seed=seed)
    camera = json.loads((directory / "data" / "dataset.json").read_text())["env"]["camera"]
    rows = min(settings["num_envs"], len(starts))
    env = MetaWorldEnv([task], num_envs=rows, split=split, camera=camera, pixels="pixels" in model.spec.observation)
    properties.apply_shift(env, shift)
    started = time.perf_counter()
    episodes = run_episodes(env, policy, starts, method=name, split=split, seed=seed, max_steps=env.max_steps)
    env.close()
    write_episodes(path, sorted(episodes, key=lambda episode: episode.start))
    return f"{name} {sum(e.success for e in episodes)}/{len(episodes)} in {time.perf_counter() - started:.0f} s"


@torch.no_grad()
def imagination(directory: Path, windows: int = 400) -> dict[str, list[float]]:
    """How wrong the frames that mot_uwm imagines are, by step, on windows of held-out episodes.

    Root mean squares in standard deviations of what moves: with the executed actions (`true`), with those of another
    window (`shuffled`), without any (`video`), and of the guess that nothing moves (`persistence`). From pixels also
    `psnr_db` and `ssim` of the images decoded from `true`, and `psnr_db_persistence`.
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
    moving = model.denoiser.moves.flatten()
    key = NoiseKey.for_rows(windows)

    def error(guess: Tensor) -> list[float]:
        square = (guess - truth)[..., moving].square().mean(-1)
        return [float(square[:, h][batch["valid"][:, h]].mean().sqrt()) for h in range(horizon)]

    found = {}
    for name, actions in (
        ("true", batch["action"].unsqueeze(1)),
        ("shuffled", batch["action"].roll(1, 0).unsqueeze(1)),
        ("video", None),
    ):
        imagined = model.imagine(state, actions, futures=1, noise=key, with_frames=True)
        assert imagined.frames is not None
        found[name] = error(imagined.frames[:, 0, 0])
    found["persistence"] = error(frames[0].unsqueeze(1).expand_as(truth))
    if "pixels" in model.spec.observation:
        quality = decoded_quality(model, batch[:128])["pixels"]
        for name in ("psnr_db", "ssim"):
            found[name] = [step[name] for step in quality["imagined"]]
        found["psnr_db_persistence"] = [step["psnr_db"] for step in quality["persistence"]]
    return found


def uncached(model: FlowWAM, observation: TensorDict, steps: int) -> Tensor:
    """A chunk of fast with the present frame run anew in every step: what the cache saves."""
    state = model.encode(Context.from_observation(observation))
    frame, action = ("F", 0), ("A", 0)
    x = torch.zeros(1, model.spec.chunk_length, model.spec.action_dim)
    times = time_grid(steps)
    for time_, after in zip(times[:-1], times[1:], strict=True):
        contents = {frame: state["z"].unflatten(1, (model.substrate.tokens, model.substrate.width)), action: x}
        velocity, _ = model.denoiser.run(
            [frame, action], contents, {frame: torch.ones(1, 1), action: torch.full((1, 1), time_)}, state["task"]
        )
        x = x + (after - time_) * velocity[action]
    return x


class _Operations(TorchDispatchMode):
    """Counts operations that torch dispatches, whatever their size: at one row a call costs about as much as any."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _one_observation(directory: Path, keys: Sequence[str]) -> TensorDict:
    window = EpisodeDataset.open(directory / "data", keys=list(keys)).sample(1, 1, torch.Generator().manual_seed(0))
    return TensorDict({**window["observation"][:, 0].to_dict(), "task": window["task"]}, [1])


@torch.no_grad()
def acting_memory(directory: Path, variant: str) -> float:
    """The most MiB that this process held once it has chosen one chunk; to be run in a fresh one."""
    torch.set_num_threads(1)
    model = load(directory, variant)
    observation = _one_observation(directory, list(model.spec.observation))
    model.propose(model.encode(Context.from_observation(observation)), 1, mode="ode")
    return peak_rss_mib()


@torch.no_grad()
def latency(directory: Path, variants: Sequence[str], turns: int) -> dict[str, Any]:
    """What one row's chunk costs each variant by denoising steps K, all by turns.

    `<variant>/k<K>/latency_p50_ms`; `gflop`, as torch counts them, and `operations` that are dispatched; each also over
    fast's of the same K (`..._over_fast`). `fast_uncached` is fast without its cache. `parameters`; `act_peak_mib`, of
    a fresh process that loads the model and acts.
    """
    calls: dict[str, Callable[[], object]] = {}
    metrics: dict[str, Any] = {}
    observation = _one_observation(directory, list(load(directory, variants[0]).spec.observation))
    for variant in variants:
        model = load(directory, variant)
        metrics[f"{variant}/parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            metrics[f"{variant}/act_peak_mib"] = fresh.submit(acting_memory, directory, variant).result()
        for steps in LATENCY_STEPS:

            def call(model: FlowWAM = model, steps: int = steps) -> object:
                model.action_steps = model.future_steps = steps
                return model.propose(model.encode(Context.from_observation(observation)), 1, mode="ode")

            calls[f"{variant}/k{steps}"] = call
            if variant == "fast":
                calls[f"fast_uncached/k{steps}"] = functools.partial(uncached, model, observation, steps)
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 3):
        for name, work in calls.items():
            begun = time.perf_counter()
            work()
            if turn >= 3:
                milliseconds[name].append(1e3 * (time.perf_counter() - begun))
    for name, work in calls.items():
        with FlopCounterMode(display=False) as flops:
            work()
        with _Operations() as operations:
            work()
        metrics[f"{name}/latency_p50_ms"] = float(np.median(milliseconds[name]))
        metrics[f"{name}/gflop"] = flops.get_total_flops() / 1e9
        metrics[f"{name}/operations"] = operations.count
    for name in calls:
        variant, _, steps_name = name.partition("/")
        if variant != "fast" and "fast" in variants:
            for key in ("latency_p50_ms", "gflop", "operations"):
                metrics[f"{name}/{key}_over_fast"] = metrics[f"{name}/{key}"] / metrics[f"fast/{steps_name}/{key}"]
    return metrics


def _once(file: Path, work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `work` returns, kept in `file`."""
    if not file.exists():
        write_json(file, work(*arguments))
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def measure(
    settings: Mapping[str, Any], folder: Path, say: Say, done: Callable[[dict[str, Any], list[Any]], None]
) -> None:
    """Run what is missing below `folder`; after each seed and task, `done(metrics, [[task, seed], ...])`."""
    chosen, reads = settings["fast_wam"], "pixels" if settings["fast_wam"]["pixels"] else "state"
    finished: dict[tuple[str, int], Path] = {}
    costs: dict[str, Any] | None = None
    for seed in chosen["seeds"]:
        for task in chosen["tasks"]:
            directory = folder / f"{reads}_{task.rpartition('/')[2]}_seed{seed}"
            directory.mkdir(parents=True, exist_ok=True)
            for stage in stages(settings, task, seed, directory):
                begun = time.perf_counter()
                run_stage(stage, directory)
                if time.perf_counter() - begun > 1.0:
                    say(f"{directory.name}: {stage.name} in {time.perf_counter() - begun:.0f} s")
            for options in runs(chosen):
                told = closed_loop(settings, task, seed, directory, **options)
                if told:
                    say(f"{directory.name}: {told}")
            finished[task, seed] = directory
            if costs is None:
                file = folder / f"latency_{reads}_{'-'.join(chosen['variants'])}_{chosen['turns']}.json"
                costs = {f"{reads}/{key}": value for key, value in _once(
                    file, latency, directory, chosen["variants"], chosen["turns"]).items()}  # fmt: skip
            done({**metrics(settings, finished), **costs}, [list(key) for key in finished])


def metrics(settings: Mapping[str, Any], finished: Mapping[tuple[str, int], Path]) -> dict[str, Any]:
    """Success pooled over seeds, and over tasks as `mean`, with intervals; costs of training; errors of imagination."""
    chosen, reads = settings["fast_wam"], "pixels" if settings["fast_wam"]["pixels"] else "state"
    found: dict[str, Any] = {}
    everything: dict[str, dict[tuple[str, int, int], Episode]] = {}
    for (task, seed), directory in finished.items():
        for name in sorted({name_of(**options) for options in runs(chosen)}):  # others are of earlier settings
            own = everything.setdefault(name, {})
            own |= {(task, seed, e.start): e for e in read_episodes(directory / f"{name}.csv")}
    tasks = list(dict.fromkeys(task for task, _ in finished))
    for name, episodes in everything.items():
        method, _, shift = name.partition("@")
        prefix = f"{shift}_" if shift else ""
        for place in [*tasks, "mean"]:
            total = summarise([episode for key, episode in episodes.items() if place in ("mean", key[0])])
            where = f"{reads}/{place.rpartition('/')[2]}/{method}/{prefix}success"
            found[where] = {"mean": total.success, "n": total.n, "low": total.low, "high": total.high}
        reference = everything.get(f"fast@{shift}" if shift else "fast", {})
        both = [key for key in episodes if key in reference]
        if method != "fast" and both:
            gap = paired([episodes[k].success for k in both], [reference[k].success for k in both])
            found[f"{reads}/mean/{method}/{prefix}minus_fast"] = {
                "mean": gap.difference, "n": len(both), "low": gap.low, "high": gap.high, "p": gap.p_value,
            }  # fmt: skip
    for variant in chosen["variants"]:
        trained = [json.loads((d / f"train_{variant}" / "results.json").read_text()) for d in finished.values()]
        for key in ("cpu_seconds", "peak_rss_mib"):
            found[f"{reads}/{variant}/train_{key}"] = float(np.median([run[key] for run in trained]))
    if "mot_uwm" in chosen["variants"]:
        for task in tasks:
            errors = [_once(d / "imagination.json", imagination, d) for (t, _), d in finished.items() if t == task]
            for name, by_step in errors[0].items():
                for step in (0, len(by_step) // 2 - 1, len(by_step) - 1):
                    value = float(np.mean([e[name][step] for e in errors]))
                    found[f"{reads}/{task.rpartition('/')[2]}/mot_uwm/imagined_{name}_h{step + 1}"] = value
    return found


# -------------------------------------------------------------------------------------------------- the page


PARTS = ("success", "start_outside", "latency", "cost", "imagination")
"""Tables of a run with the default shifts."""


def tables(metrics: Mapping[str, Any]) -> dict[str, TableOf]:
    """The metrics of states or of images as tables; what was not measured is left out."""
    reads = next(iter(metrics)).partition("/")[0]
    names = list(dict.fromkeys(key.split("/")[2] for key in metrics if key.endswith("success")))
    places = list(dict.fromkeys(key.split("/")[1] for key in metrics if key.endswith("success")))
    variants = [name for name in VARIANTS if f"{reads}/{name}/parameters" in metrics]
    shifts = list(dict.fromkeys(key.split("/")[3][: -len("_success")] for key in metrics if key.endswith("_success")))

    def cell(key: str) -> str:
        return rate(metrics[key]) if key in metrics else ""

    found = {
        "success": TableOf(
            ["acts", *places, "minus fast, points"],
            [
                [name, *(cell(f"{reads}/{place}/{name}/success") for place in places),
                 _points(metrics.get(f"{reads}/mean/{name}/minus_fast"))]
                for name in names if f"{reads}/mean/{name}/success" in metrics
            ],
        )
    }  # fmt: skip
    for shift in shifts:
        rows = [
            [name, *(cell(f"{reads}/{place}/{name}/{shift}_success") for place in places),
             _points(metrics.get(f"{reads}/mean/{name}/{shift}_minus_fast"))]
            for name in names if f"{reads}/mean/{name}/{shift}_success" in metrics
        ]  # fmt: skip
        found[shift] = TableOf(["acts", *places, "minus fast, points"], rows)
    rows = []
    for name in [v for v in (*variants[:1], "fast_uncached", *variants[1:]) if f"{reads}/{v}/k4/gflop" in metrics]:
        for steps in (4, 10):
            one = f"{reads}/{name}/k{steps}"
            rows.append(
                [name, str(steps), f"{metrics[f'{one}/latency_p50_ms']:.1f}"]
                + [f"{metrics[k]:.2f}" if (k := f"{one}/{part}_over_fast") in metrics else "1"
                   for part in ("latency_p50_ms", "operations", "gflop")]
            )  # fmt: skip
    found["latency"] = TableOf(
        ["variant", "denoising steps", "ms per chunk", "over fast", "operations over fast", "GFLOP over fast"], rows
    )
    found["cost"] = TableOf(
        ["variant", "parameters", "training, CPU s", "training, peak MiB", "acting, peak MiB"],
        [
            [v, f"{metrics[f'{reads}/{v}/parameters']:,}", f"{metrics[f'{reads}/{v}/train_cpu_seconds']:.0f}",
             f"{metrics[f'{reads}/{v}/train_peak_rss_mib']:.0f}", f"{metrics[f'{reads}/{v}/act_peak_mib']:.0f}"]
            for v in variants
        ],
    )  # fmt: skip
    kinds = list(dict.fromkeys(key.split("/")[3] for key in metrics if "/mot_uwm/imagined_" in key))
    if kinds:
        rows = [[kind.removeprefix("imagined_"), *(f"{metrics[f'{reads}/{place}/mot_uwm/{kind}']:.3f}"
                 for place in places if f"{reads}/{place}/mot_uwm/{kind}" in metrics)] for kind in kinds]  # fmt: skip
        found["imagination"] = TableOf(["error of", *(place for place in places if place != "mean")], rows)
    return found


def _points(gap: Mapping[str, float] | None) -> str:
    return "" if gap is None else f"{100 * gap['mean']:+.1f} [{100 * gap['low']:.1f}, {100 * gap['high']:.1f}]"


WORDS = {
    "success": "Success from the start states of the split, with Wilson 95 % intervals; mean pools tasks and seeds. "
    "Names after the variant: the way it acts, or its number of denoising steps.",
    "latency": "One row, one thread, by turns in one process; encoding included. Counted: operations that torch "
    "dispatches, and their floating-point operations.",
    "cost": "Equal optimiser steps. Memory is that of the whole process, libraries included.",
    "imagination": "Root mean square error of mot_uwm's frames on held-out episodes, in standard deviations of what "
    "moves, with the executed actions (true), those of other windows (shuffled), none (video), and if nothing moved.",
}


def write_report(run_dir: Path, results: Mapping[str, Any]) -> None:
    """report.html of the results."""
    sections = [
        Section(name.replace("_", " ").capitalize(), [WORDS.get(name) or f"Shift: {properties.SHIFTS[name]}."],
                tables=[table])
        for name, table in tables(results["metrics"]).items()
    ]  # fmt: skip
    write_page(
        run_dir / "report.html",
        title="Do World Action Models need test-time imagination?",
        kicker=f"wamrl bench fast_wam, {results['started']}",
        lead=f"{len(results['finished'])} trainings of each variant, on "
        f"{', '.join(dict.fromkeys(task for task, _ in results['finished']))}.",
        warnings=results["warnings"],
        sections=sections,
        command=results["command"],
        provenance=provenance_rows(results),
        config=results["config"],
    )
