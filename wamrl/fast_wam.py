"""Do World Action Models need test-time imagination? Fast-WAM's four variants and mot_uwm on the same data.

Per seed and task: demonstrations are collected once, every variant is trained on them by `python -m wamrl.train` with
the same optimiser steps, and acts closed loop from the same start states, replanning every half chunk: as trained, with
other numbers of denoising steps, and under declared shifts (`wamrl.properties`) that no training start has. mot_uwm
acts in all of its ways (policy, joint, future_first). A model that has seen nothing but successes is no simulator, so
simulator and the reference WAM are trained on the demonstrations and on play (`<model>_play`), and a planner acts in
both, with its scores and with shuffled ones. Imagination is measured on held-out play with the executed actions, with
those of other windows, and against persistence. Latency and counted operations are taken by turns in one process. What
is done is not done again.
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
from wamrl.interfaces import WAM, Context, Policy
from wamrl.models.flow import time_grid
from wamrl.models.flow_wam import FlowWAM
from wamrl.naming import unknown_name, whole_number
from wamrl.noise import NoiseKey
from wamrl.pages import Section, TableOf, provenance_rows, rate, write_page
from wamrl.planners.mppi import make_mppi
from wamrl.probe import probe_errors
from wamrl.results import peak_rss_mib
from wamrl.stages import Stage, run_stage

VARIANTS = ("fast", "joint", "idm", "no_cotrain", "mot_uwm")
WAYS = ("joint", "future_first")
"""How mot_uwm acts beside its policy."""
SIMULATORS, PLAY = ("simulator", "mot_uwm", "reference"), "_play"
PLANNERS = {"planner": False, "shuffled": True}
"""Ways to act by a planner, and whether its scores are shuffled."""
OTHERS = ("policy", "shuffled")
"""What a planner is held against."""
DEMONSTRATIONS, MOST_DEMONSTRATIONS = 60, {"metaworld/push-v3": 300}
STEPS, MOST_STEPS = 400, {"metaworld/push-v3": 700}
"""Per task and seed, and of the tasks that need more."""
HELD_OUT, HELD_OUT_START, PLAY_START = {"noisy_expert": 6, "failing": 3, "random": 3}, 900, 600
"""Episodes of play that nothing is trained on, the first of their start states, and that of play to train on."""
LATENCY_STEPS = (1, 2, 4, 10)
WIDE = "_wide"

Say = Callable[[str], None]


def check(settings: Mapping[str, Any]) -> None:
    """Refuse settings that could not be measured, before anything is collected."""
    chosen = settings["fast_wam"]
    for name in ("tasks", "seeds", "variants"):
        if not chosen[name] and not (name == "variants" and chosen["simulators"]):
            raise ValueError(f"fast_wam.{name} is empty, so that there is nothing to measure; name at least one")
    last = max(whole_number("fast_wam.seeds", seed, 0) for seed in chosen["seeds"])
    check_starts(
        whole_number("fast_wam.first_start", chosen["first_start"], 0),
        (last + 1) * whole_number("episodes", settings["episodes"], 1),
        ("fast_wam.first_start", "(the greatest of fast_wam.seeds + 1) * episodes"),
    )
    if (chosen["demonstrations"] or 0) > PLAY_START:
        raise ValueError(
            f"fast_wam.demonstrations is {chosen['demonstrations']}, but from start {PLAY_START} on episodes are play "
            f"or held out; choose at most {PLAY_START}"
        )
    for name in chosen["variants"]:
        if name not in VARIANTS:
            raise unknown_name("variant", str(name), VARIANTS)
    for name in chosen["simulators"]:
        if name not in SIMULATORS:
            raise unknown_name("simulator", str(name), SIMULATORS)
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
    count = chosen["demonstrations"] or MOST_DEMONSTRATIONS.get(task, DEMONSTRATIONS)
    steps = chosen["steps"] or MOST_STEPS.get(task, STEPS)
    common: tuple[str, ...] = (f"seed={seed}", f"threads={settings['threads']}")
    expert = [f"data.mixture.expert={count}"] if chosen["data"] == "demonstrations" else []
    held = [f"data.mixture.{name}={episodes}" for name, episodes in HELD_OUT.items()]
    collected = [("data", 0, chosen["data"], expert), ("held", HELD_OUT_START, "play", held)]
    if chosen["simulators"]:
        collected.append(("play", PLAY_START, "play", []))
    found = [
        Stage(f"collect_{name}", "collect", (
            f"env={task}", f"data={data}", *mixture, f"path={directory / name}", *common,
            f"first_start={1000 * seed + first}", "snapshots=false", f"env.pixels={str(chosen['pixels']).lower()}",
        ))
        for name, first, data, mixture in collected
    ]  # fmt: skip
    common += ("tensorboard=false", "validation_fraction=0", f"device={settings['device']}")
    seen = f"data={directory / 'data'}"
    with_play = f"data=[{directory / 'data'},{directory / 'play'}]" if chosen["simulators"] else seen
    reads: tuple[str, ...] = ()
    if chosen["pixels"]:
        words = ("wam=tokenizer", "observation=[pixels]", with_play, *common, *overrides_of(chosen["tokenizer"]))
        found.append(Stage("tokenizer", "train", words))
        reads = ("observation=[pixels,proprioception]", f"tokenizer={directory / 'tokenizer'}")
    trained = [(name, name, seen) for name in chosen["variants"]]
    trained += [(name + PLAY, name, with_play) for name in chosen["simulators"]]
    for label, name, data in trained:
        flow = name != "reference"
        own = ("wam/substrate=pixels",) if chosen["pixels"] and flow else ()
        settings_of = overrides_of(chosen["train" if flow else "train_reference"])
        if name == "simulator":
            settings_of += overrides_of(chosen["train_simulator"])
        words = (f"wam={name}", f"steps={steps}", *own, *reads, data, *common, *settings_of)
        found.append(Stage(f"train_{label}", "train", words))
    return found


def runs(chosen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is run closed loop for each seed and task, as the options of `closed_loop`."""
    found: list[dict[str, Any]] = [{"variant": variant} for variant in chosen["variants"]]
    found += [{"variant": v, "shift": shift} for shift in chosen["shifts"] for v in chosen["variants"]]
    if "mot_uwm" in chosen["variants"]:
        found += [{"variant": "mot_uwm", "way": way} for way in WAYS]
    found += [{"variant": name + PLAY, "way": way} for name in chosen["simulators"] for way in ("policy", *PLANNERS)]
    if "fast" in chosen["variants"]:
        found += [{"variant": "fast", "steps": steps} for steps in chosen["denoising_steps"]]
    return found


def name_of(variant: str, *, way: str = "policy", steps: int | None = None, shift: str = "none") -> str:
    """The name of a run, and of its file."""
    name = variant + ("" if way == "policy" else f"_{way}") + (f"_k{steps}" if steps else "")
    return name + ("" if shift == "none" else f"@{shift}")


def load(
    directory: Path, variant: str, *, policy: str | None = None, steps: int | None = None, device: str = "cpu"
) -> WAM:
    """A trained model; a flow-matching one is set to act in one of its ways with a number of denoising steps."""
    model = checkpoint.load(directory / f"train_{variant}", device=device, policy=policy)
    if isinstance(model, FlowWAM):
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
    first += seed * settings["episodes"]
    starts = [Start(task, first + i) for i in range(settings["episodes"])]
    given = {"split": split, "first_start": first, "episodes": len(starts)}
    given |= {"planner": dict(settings["fast_wam"]["planner"])} if way in PLANNERS else {}
    stamp = path.with_suffix(".json")
    if path.exists() and stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == given:
        return None
    model = load(directory, variant, policy=way if way in WAYS else None, steps=steps, device=settings["device"])
    replan = max(1, model.spec.chunk_length // 2)
    policy: Policy = ModelPolicy(model, replan_every=replan, seed=seed)
    if way in PLANNERS:
        words = {"horizon": model.spec.chunk_length, **settings["fast_wam"]["planner"]}
        planner = make_mppi(**words, shuffle_scores=PLANNERS[way])
        policy = PlannerPolicy(model, planner, replan_every=replan, seed=seed)
    camera = json.loads((directory / "data" / "dataset.json").read_text())["env"]["camera"]
    rows = min(settings["num_envs"], len(starts))
    env = MetaWorldEnv([task], num_envs=rows, split=split, camera=camera, pixels="pixels" in model.spec.observation)
    properties.apply_shift(env, shift)
    started = time.perf_counter()
    episodes = run_episodes(env, policy, starts, method=name, split=split, seed=seed, max_steps=env.max_steps)
    env.close()
    stamp.unlink(missing_ok=True)
    write_episodes(path, sorted(episodes, key=lambda episode: episode.start))
    write_json(stamp, given)
    return f"{name} {sum(e.success for e in episodes)}/{len(episodes)} in {time.perf_counter() - started:.0f} s"


@torch.no_grad()
def imagination(directory: Path, variant: str, windows: int = 256) -> dict[str, list[float]]:
    """How wrong what a model imagines is, by step, on held-out play.

    Root mean squares in standard deviations of the tracks of the state, as a linear read-out of the imagined latents
    gives them (`wamrl.probe`): `imagined` under the executed actions, or without any by a model that imagines so;
    `encoded`, of latents of the true frames; `persistence`, of the guess that nothing moves. For flow-matching
    simulators also of what moves in their own frames: with the executed actions (`true`), with those of another window
    (`shuffled`), without any (`video`), and of the guess that nothing moves (`still`). From pixels, where the model
    decodes them, also `psnr_db` and `ssim` of the imagined images, and `psnr_db_persistence`. Of simulators, also the
    read-out under the actions of another window (`probe_shuffled`), and by how much the model's own value changes: the
    correlation over windows of what it makes of the imagined frame with what it makes of the true one, `value_true` and
    `value_shuffled`.
    """
    model = checkpoint.load(directory / f"train_{variant}")
    horizon = min(8, model.spec.max_horizon)
    keys = list(dict.fromkeys([*model.spec.observation, "state"]))
    draw = torch.Generator().manual_seed(0)
    seen = directory / ("play" if (directory / "play").exists() else "data")  # like what the read-out is asked of
    fitted = EpisodeDataset.open(seen, keys=keys)
    batch = EpisodeDataset.open(directory / "held", keys=keys).sample(windows, horizon, draw)
    scale = fitted.statistics()["state"]["std"].flatten()
    shown = fitted.sample(2048, 1, draw)
    found = {f"probe_{name}": by_step for name, by_step in probe_errors(model, shown, batch, "state", scale).items()}
    if "rollout" in model.spec.provides:
        others = batch.clone(False).set("action", batch["action"].roll(1, 0))
        found["probe_shuffled"] = probe_errors(model, shown, others, "state", scale)["imagined"]
        found |= {"value_true": value_changes(model, batch), "value_shuffled": value_changes(model, others)}
    if "pixels" in model.spec.observation:
        quality = decoded_quality(model, batch[:128]).get("pixels", {})
        if "imagined" in quality:
            for name in ("psnr_db", "ssim"):
                found[name] = [step[name] for step in quality["imagined"]]
            found["psnr_db_persistence"] = [step["psnr_db"] for step in quality["persistence"]]
    if not isinstance(model, FlowWAM) or not {"rollout", "video"} <= model.spec.provides:
        return found
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

    for name, actions in (
        ("true", batch["action"].unsqueeze(1)),
        ("shuffled", batch["action"].roll(1, 0).unsqueeze(1)),
        ("video", None),
    ):
        imagined = model.imagine(state, actions, futures=1, noise=key, with_frames=True)
        assert imagined.frames is not None
        found[name] = error(imagined.frames[:, 0, 0, :horizon])
    found["still"] = error(frames[0].unsqueeze(1).expand_as(truth))
    return found


@torch.no_grad()
def value_changes(model: WAM, batch: TensorDict) -> list[float]:
    """By step, how the change of value from now on that is imagined correlates with that on the true frames."""
    frames = [
        model.encode(Context.from_observation(o.clone(False).set("task", batch["task"])))
        for o in batch["observation"].unbind(1)
    ]
    now = model.value(frames[0]).mean(-1)
    found = []
    for h in range(batch["action"].shape[1]):
        leaf = model.imagine(frames[0], batch["action"][:, None, : h + 1]).leaf
        changes = torch.stack([model.value(leaf).mean((1, 2, 3)) - now, model.value(frames[h + 1]).mean(-1) - now])
        found.append(float(torch.corrcoef(changes[:, batch["valid"][:, h]].double())[0, 1].nan_to_num()))
    return found


def uncached(model: FlowWAM, observation: TensorDict, steps: int) -> Tensor:
    """A chunk of fast with the present frame run anew in every step: what the cache saves."""
    state = model.encode(Context.from_observation(observation))
    frame, action = ("F", 0), ("A", 0)
    x = state["z"].new_zeros(1, model.spec.chunk_length, model.spec.action_dim)
    times = time_grid(steps)
    for time_, after in zip(times[:-1], times[1:], strict=True):
        contents = {frame: state["z"].unflatten(1, (model.substrate.tokens, model.substrate.width)), action: x}
        velocity, _ = model.denoiser.run(
            [frame, action], contents, {frame: x.new_ones(1, 1), action: x.new_full((1, 1), time_)}, state["task"]
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
def latency(
    directory: Path, variants: Sequence[str], turns: int, wide: Mapping[str, Any], device: str
) -> dict[str, Any]:
    """What one row's chunk costs each variant by denoising steps K, all by turns.

    `<variant>_wide` are the same variants with the backbone settings `wide`, where arithmetic outweighs the dispatch of
    operations as it does in Fast-WAM itself. `fast_uncached` is fast without its cache.

    `<variant>/k<K>/latency_p50_ms`; `gflop`, as torch counts them, and `operations` that are dispatched; each also over
    fast's of the same K (`..._over_fast`). `measured_over_predicted` is the first ratio over that of the operations,
    for `_wide` over that of the floating-point operations. `parameters`; `act_peak_mib`, of a fresh process that loads
    the model and acts.
    """
    calls: dict[str, Callable[[], object]] = {}
    metrics: dict[str, Any] = {}
    observation = _one_observation(directory, list(load(directory, variants[0]).spec.observation)).to(device)
    for variant in variants:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            metrics[f"{variant}/act_peak_mib"] = fresh.submit(acting_memory, directory, variant).result()
        for size, backbone in {"": {}, WIDE: wide}.items():
            model = load(directory, variant, device=device)
            if size:  # fresh weights: time does not depend on them
                config = checkpoint.read_metadata(directory / f"train_{variant}").model
                model = checkpoint.build({**config, "backbone": {**config["backbone"], **backbone}}).to(device).eval()
            assert isinstance(model, FlowWAM)
            metrics[f"{variant}{size}/parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            for steps in LATENCY_STEPS:

                def call(model: FlowWAM = model, steps: int = steps) -> object:
                    model.action_steps = model.future_steps = steps
                    return model.propose(model.encode(Context.from_observation(observation)), 1, mode="ode")

                calls[f"{variant}{size}/k{steps}"] = call
                if variant == "fast":
                    calls[f"fast_uncached{size}/k{steps}"] = functools.partial(uncached, model, observation, steps)
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 3):
        for name, work in calls.items():
            begun = time.perf_counter()
            work()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
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
        fast = "fast" + (WIDE if variant.endswith(WIDE) else "")
        if variant != fast and "fast" in variants:
            for key in ("latency_p50_ms", "gflop", "operations"):
                metrics[f"{name}/{key}_over_fast"] = metrics[f"{name}/{key}"] / metrics[f"{fast}/{steps_name}/{key}"]
            predicted = metrics[f"{name}/{'gflop' if variant.endswith(WIDE) else 'operations'}_over_fast"]
            metrics[f"{name}/measured_over_predicted"] = metrics[f"{name}/latency_p50_ms_over_fast"] / predicted
    return metrics


def _once(file: Path, work: Callable[..., dict[str, Any]], directory: Path, *arguments: Any) -> dict[str, Any]:
    """What `work(directory, *arguments)` returns, kept in `file` for these arguments."""
    stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if stored.get("arguments") != list(arguments):
        write_json(file, {"arguments": arguments, "found": work(directory, *arguments)})
        stored = json.loads(file.read_text(encoding="utf-8"))
    found: dict[str, Any] = stored["found"]
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
            if costs is None and not chosen["variants"]:
                costs = {}  # what acts in fast's place is what latency compares
            if costs is None:
                arguments = (chosen["variants"], chosen["turns"], chosen["wide"], settings["device"])
                found = _once(folder / f"latency_{reads}.json", latency, directory, *arguments)
                costs = {f"{reads}/{key}": value for key, value in found.items()}
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
            gap = compared([episodes[k].success for k in both], [reference[k].success for k in both])
            found[f"{reads}/mean/{method}/{prefix}minus_fast"] = gap
    for model in (name + PLAY for name in chosen["simulators"]):
        planned = everything[f"{model}_planner"]
        for name, other in zip(OTHERS, (model, f"{model}_shuffled"), strict=True):
            both = [key for key in planned if key in everything[other]]
            gap = compared([planned[k].success for k in both], [everything[other][k].success for k in both])
            found[f"{reads}/mean/{model}_planner/minus_{name}"] = gap
    models = [*chosen["variants"], *(name + PLAY for name in chosen["simulators"])]
    for variant in models:
        trained = [json.loads((d / f"train_{variant}" / "results.json").read_text()) for d in finished.values()]
        for key in ("cpu_seconds", "peak_rss_mib"):
            found[f"{reads}/{variant}/train_{key}"] = float(np.median([run[key] for run in trained]))
    for variant in models:
        if variant == "no_cotrain":  # learns no future
            continue
        for task in tasks:
            errors = [
                _once(d / f"imagination_{variant}.json", imagination, d, variant)
                for (t, _), d in finished.items() if t == task
            ]  # fmt: skip
            for name, by_step in errors[0].items():
                for step in (0, len(by_step) // 2 - 1, len(by_step) - 1):
                    value = float(np.mean([e[name][step] for e in errors]))
                    found[f"{reads}/{task.rpartition('/')[2]}/{variant}/imagined_{name}_h{step + 1}"] = value
    return found


def compared(mine: Sequence[bool], fast: Sequence[bool]) -> dict[str, float]:
    """A paired comparison with fast, or another one, as the metrics hold it, with the counts of starts it rests on.

    both: both succeed. only: only this one does. only_fast: only the other. With n, all that is needed to pool it with
    other seeds'.
    """
    gap = paired(mine, fast)
    return {
        "mean": gap.difference, "n": gap.n, "low": gap.low, "high": gap.high, "p": gap.p_value,
        "both": sum(mine) - gap.only_first, "only": gap.only_first, "only_fast": gap.only_second,
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------- the page


COSTS = ("parameters", "train_cpu_seconds", "train_peak_rss_mib", "act_peak_mib")
KINDS = {
    "imagination": ("true", "shuffled", "video", "still"),
    "probe": ("probe_imagined", "probe_shuffled", "probe_encoded", "probe_persistence"),
    "value": ("value_true", "value_shuffled"),
    "decoded": ("psnr_db", "psnr_db_persistence", "ssim"),
}
"""Tables of `imagination`, and what each shows of it."""
PARTS = ("success", "start_outside", "latency", "cost", "planning", *KINDS)
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

    beside = ["minus fast, points"] if "fast" in names else []
    found = {
        "success": TableOf(
            ["acts", *places, *beside],
            [
                [name, *(cell(f"{reads}/{place}/{name}/success") for place in places),
                 *(_points(metrics.get(f"{reads}/mean/{name}/minus_fast")) for _ in beside)]
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
    for name in (v + size for size in ("", WIDE) for v in (*variants[:1], "fast_uncached", *variants[1:])):
        for steps in (4, 10) if f"{reads}/{name}/k4/gflop" in metrics else ():
            one = f"{reads}/{name}/k{steps}"
            rows.append(
                [name, str(steps), f"{metrics[f'{one}/latency_p50_ms']:.1f}"]
                + [f"{metrics[k]:.2f}" if (k := f"{one}/{part}") in metrics else "1"
                   for part in ("latency_p50_ms_over_fast", "operations_over_fast", "gflop_over_fast",
                                "measured_over_predicted")]
            )  # fmt: skip
    found["latency"] = TableOf(
        [
            "variant",
            "denoising steps",
            "ms per chunk",
            "over fast",
            "operations over fast",
            "GFLOP over fast",
            "measured over predicted",
        ],
        rows,
    )
    found["cost"] = TableOf(
        ["variant", "parameters", "training, CPU s", "training, peak MiB", "acting, peak MiB"],
        [
            [v, *(f"{metrics[key]:,.0f}" if (key := f"{reads}/{v}/{kind}") in metrics else "" for kind in COSTS)]
            for v in dict.fromkeys(key.split("/")[1] for key in metrics if key.endswith("/train_cpu_seconds"))
        ],
    )
    planned = [name for name in names if name.endswith("_planner")]
    rows = [
        [
            name.removesuffix("_planner"),
            *(_points(metrics.get(f"{reads}/mean/{name}/minus_{other}")) for other in OTHERS),
        ]
        for name in planned
    ]
    if any(any(row[1:]) for row in rows):
        head = ["planner in", "minus its own policy, points", "minus shuffled scores, points"]
        found["planning"] = TableOf(head, rows)
    models = list(dict.fromkeys(key.split("/")[2] for key in metrics if "/imagined_" in key))
    columns = [place for place in places if place != "mean"]

    def by_horizon(model: str, kind: str, digits: int) -> list[str]:
        cells = []
        for place in columns:
            start = f"{reads}/{place}/{model}/imagined_{kind}_h"
            cells.append(" / ".join(f"{metrics[key]:.{digits}f}" for key in metrics if key.startswith(start)))
        return cells

    for part, kinds in KINDS.items():
        table = [
            (model, kind, by_horizon(model, kind, 1 if "psnr" in kind else 2)) for model in models for kind in kinds
        ]
        filled = [[model, kind.removeprefix(f"{part}_"), *cells] for model, kind, cells in table if any(cells)]
        if filled:
            found[part] = TableOf(["model", "of", *columns], filled)
    return found


def _points(gap: Mapping[str, float] | None) -> str:
    return "" if gap is None else f"{100 * gap['mean']:+.1f} [{100 * gap['low']:.1f}, {100 * gap['high']:.1f}]"


WORDS = {
    "success": "Success from the start states of the split, with Wilson 95 % intervals; mean pools tasks and seeds. "
    "Names after the variant: the way it acts, or its number of denoising steps.",
    "latency": "One row, one thread, by turns in one process; encoding included. Counted: operations that torch "
    "dispatches, and their floating-point operations. _wide: the same variants with a larger backbone (fast_wam.wide) "
    "and fresh weights, where arithmetic weighs more than dispatch. Predicted: the ratio of operations, for _wide of "
    "floating-point operations.",
    "cost": "Equal optimiser steps. Memory is that of the whole process, libraries included.",
    "imagination": "Root mean square error of the model's own frames on held-out play, in standard deviations of what "
    "moves, 1, 4 and 8 control steps ahead: with the executed actions (true), those of other windows (shuffled), none "
    "(video), and if nothing moved (still). From pixels this includes the noise of the tokens.",
    "probe": "Root mean square error of the state read linearly off imagined latents, on the same windows and "
    "horizons, in standard deviations: under the executed actions (fast, joint and idm imagine without actions), off "
    "latents of the true frames, which no imagination can beat, and if nothing moved.",
    "value": "Correlation over held-out windows of how the model's own value changes on the imagined frames with how "
    "it changes on the true ones, under the executed actions and under those of other windows.",
    "planning": "The planner with the model's scores against the model's own policy and against shuffled scores, from "
    "the same starts.",
    "decoded": "Images decoded from imagined frames against the true ones, and those of the guess that nothing moves.",
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
