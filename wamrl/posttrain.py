"""Improve a World Action Model's policy by reinforcement learning: python -m wamrl.posttrain agent=ppo wam=<it>.

Load, measure, collect and learn, measure again (`wamrl.posttraining`). Where it trains is the choice of `env`: a
simulator or env=imagined.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from tensordict import TensorDict

from wamrl import checkpoint, cli
from wamrl.agents.base import Learner
from wamrl.data import EpisodeDataset, start_frames
from wamrl.envs.base import RowsEnv
from wamrl.envs.imagined_env import ImaginedEnv
from wamrl.evaluation import check_starts
from wamrl.experience import MakeEnv
from wamrl.interfaces import WAM, Layout
from wamrl.measuring import Measuring
from wamrl.naming import unknown_name, whole_number
from wamrl.posttraining import DECAY, posttrain
from wamrl.provenance import data_of

IMAGINED = "wamrl.imagined.make"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; see `python -m wamrl.posttrain --help`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _refuse_unheeded(given)
        given = cli.rewritten("posttrain", given)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    _command(given)


def _refuse_unheeded(given: Sequence[str]) -> None:
    """Raise ValueError for settings of env that another one stands in for."""
    for word in given:
        name, _, value = word.lstrip("+").partition("=")
        if name in ("env.num_envs", "simulator.num_envs"):
            raise ValueError(f"{name}={value} would go unheeded: the rows that a learner acts in are num_envs={value}")
        if name == "env.wam" and "env=imagined" in given:
            raise ValueError(f"env.wam={value} would go unheeded: what is improved is what imagines. Set wam={value}")


@cli.command(
    "posttrain",
    help="Improve the policy of a World Action Model by reinforcement learning, in a simulator or in its own "
    "imagination, while its world model is kept from decaying. Success is measured before and after on dev "
    "starts. Ctrl-C saves; resume=<run> goes on exactly where it stopped.",
    examples=[
        "agent=ppo env=metaworld/push-v3 wam=six data=data/rich",
        "agent=rft env=metaworld/push-v3 wam=six data=data/rich",
        "agent=distil env=imagined env@simulator=metaworld/push-v3 wam=six data=data/rich",
        "resume=outputs/posttrain/latest",
    ],
)
def _command(config: DictConfig, run_dir: Path) -> None:
    settings = cli.plain(config)
    torch.set_num_threads(settings["threads"])
    _check(settings)
    device = cli.device(settings["device"])
    imagined = settings["env"]["_target_"] == IMAGINED
    simulator = settings.get("simulator") or (None if imagined else settings["env"])
    if "_target_" not in settings["wam"]:
        name, own = settings["wam"]["checkpoint"], {k: settings["wam"].get(k) for k in ("model_class", "policy")}
        stored = checkpoint.read_metadata(name)
        model = checkpoint.load(name, device=device, **own)
        sizes, start, earlier = stored.model, stored.content_sha256, stored.provenance
        if own["policy"] is not None:
            sizes = {**sizes, "policy": own["policy"]}
        normalisation = stored.normalisation
    else:
        if simulator is None:
            raise ValueError("a model made anew learns nothing from its own imagination; choose a simulator for env")
        model, sizes, normalisation = _fresh(settings, simulator, device)
        start, earlier = None, None
    learner: Learner = instantiate(settings["agent"], _convert_="all")
    _refuse_unread(settings, learner.kind)
    if imagined and getattr(learner, "kl_reference", None) == 0:
        if settings["uncertainty_limit"] is None and settings["env"].get("uncertainty_limit") is None:
            print(
                "note: nothing holds the policy where the model knows what it imagines, so that it may exploit the "
                "model's errors; agent.kl_reference=0.1 or an uncertainty_limit does",
                file=sys.stderr,
            )
    data = None
    if settings["dataset"] is not None:
        keys = None if learner.kind == "sb3" else list(model.spec.observation)
        data = _known(EpisodeDataset.open(settings["dataset"], keys=keys), model)
        if start is None and hasattr(model, "set_extent"):
            model.set_extent(data.extent(data.statistics()))  # type: ignore[operator]
    env: RowsEnv | MakeEnv | None = None
    if learner.kind != "imagine":

        def make() -> RowsEnv:
            return _simulator(settings["env"], model, "train", settings["num_envs"], device)

        env = _imagination(settings, model, device) if imagined else make
    frames = None
    if learner.kind == "imagine":
        if settings["dataset"] is None:
            raise ValueError("this agent imagines from real frames; name them with data=<dataset>")
        frames = _frames(settings, model).to(device)
    measuring = Measuring(
        simulator=None if simulator is None else lambda split, rows: _simulator(simulator, model, split, rows, device),
        split=settings["evaluate"],
        episodes=settings["episodes"],
        first_start=settings["first_start"],
        seed=settings["seed"],
    )
    stored_config = {**settings, "wam": sizes}
    real = not imagined and learner.kind != "imagine"
    seen = [
        *(data.indices if data is not None else []),
        *([{"split": "train", "env": settings["env"]}] if real else []),
    ]
    provenance = {
        "seed": settings["seed"],
        "data": data_of(earlier, *seen),
        "initial": start,
        "agent": settings["agent"],
        "device": device,
    }
    refresh = settings["refresh"]
    results = posttrain(
        model,
        learner,
        env,
        run_dir=run_dir,
        save_model=lambda path, model, step: checkpoint.save(
            path, model, config=stored_config, provenance={**provenance, "step": step}, normalisation=normalisation
        ),
        data=data,
        frames=frames,
        measuring=measuring,
        real=real,
        refresh=real and getattr(learner, "refreshes", False) if refresh is None else refresh,
        identity=_identity(settings, start),
        command=f"python -m wamrl.posttrain resume={run_dir}",
        **{name: settings[name] for name in _LOOP},
    )
    print(summary(results))


_LOOP = ("iterations", "decisions", "num_envs", "real_steps", "max_seconds", "success_ends", "seed", "world_batch",
         "world_length",
         "validation_fraction", "validation_windows", "evaluate_every", "save_every")  # fmt: skip
_FREE = ("iterations", "real_steps", "max_seconds", "save_every", "threads", "run_dir", "resume", "device")


def _identity(settings: Mapping[str, Any], start: str | None) -> str:
    kept = {name: value for name, value in settings.items() if name not in _FREE}
    return hashlib.sha256(json.dumps([kept, start], sort_keys=True, default=str).encode()).hexdigest()[:16]


def _check(settings: Mapping[str, Any]) -> None:
    for name, least in (("iterations", 1), ("num_envs", 1), ("decisions", 1), ("episodes", 0), ("first_start", 0),
                        ("evaluate_every", 0), ("save_every", 1), ("world_batch", 1), ("world_length", 1)):  # fmt: skip
        if settings[name] is not None or name != "world_length":
            whole_number(name, settings[name], least)
    check_starts(settings["first_start"], settings["episodes"])
    if settings["evaluate"] not in ("dev", "test"):
        raise unknown_name("evaluate", str(settings["evaluate"]), ("dev", "test"))
    if settings["evaluate"] == "test" and not settings["final_report"]:
        raise ValueError(
            "evaluate=test: choosing settings on the test starts would spoil them for the report. Use evaluate=dev, "
            "and final_report=true once, for the numbers that are published"
        )
    for place in ("env", "simulator"):
        env = settings.get(place) or {}
        if "num_envs" in env and env["_target_"] != IMAGINED:
            raise ValueError(
                f"{place}.num_envs is {env['num_envs']}, which would go unheeded: take it out and set "
                f"num_envs={env['num_envs']}, the rows that a learner acts in"
            )
    if settings["env"].get("split") not in (None, "train"):
        raise ValueError(f"env.split is {settings['env']['split']}, but learners see train start states only")
    split = (settings.get("simulator") or {}).get("split")
    if split not in (None, "train", settings["evaluate"]):
        raise ValueError(f"simulator.split={split} would go unheeded: evaluate=dev or test says what is measured on")
    if settings["observation"] is not None and "_target_" not in settings["wam"]:
        raise ValueError(
            f"observation={settings['observation']} would go unheeded: a trained model reads what it was trained on. "
            "It is for one made anew, such as wam=reference"
        )
    if settings["uncertainty_limit"] is not None and settings["env"]["_target_"] != IMAGINED:
        raise ValueError(
            f"uncertainty_limit={settings['uncertainty_limit']} would go unheeded: a simulator's episodes are not cut "
            "short by what the model is uncertain of; choose env=imagined"
        )


def _refuse_unread(settings: Mapping[str, Any], kind: str) -> None:
    """Raise ValueError for settings that a learner of this `kind` does not read."""
    imagined = settings["env"] if settings["env"]["_target_"] == IMAGINED else {}
    instead = {
        "imagine": {
            "uncertainty_limit": "agent.uncertainty_limit is this agent's own",
            "env.uncertainty_limit": "agent.uncertainty_limit is this agent's own",
            "env.max_steps": "this agent imagines agent.horizon control steps",
            "success_ends": "this agent imagines agent.horizon control steps, whatever happens in them",
        },
        "sb3": {"success_ends": "this agent learns from the task's own ends"},
    }
    given = {**settings, **{f"env.{name}": value for name, value in imagined.items()}}
    for name, reason in instead.get(kind, {}).items():
        if given.get(name) is not None:
            raise ValueError(f"{name}={given[name]} would go unheeded: {reason}")


def _known(data: EpisodeDataset, model: WAM) -> EpisodeDataset:
    """The episodes of tasks that the model knows."""
    kept = [number for number, episode in enumerate(data.episodes) if episode["task"] in model.spec.tasks]
    if not kept:
        raise ValueError(f"the data holds {', '.join(data.tasks)}, of which the model knows none")
    return data.select(kept)


def _frames(settings: Mapping[str, Any], model: WAM) -> TensorDict:
    wanted = settings["env"].get("tasks") if settings["env"]["_target_"] == IMAGINED else None
    tasks = wanted or [t for t in model.spec.tasks if t in EpisodeDataset.open(settings["dataset"]).tasks]
    first = bool(settings["env"].get("first_only", False))
    return start_frames(settings["dataset"], keys=tuple(model.spec.observation), tasks=tasks, first_only=first)


def _imagination(settings: Mapping[str, Any], model: WAM, device: str) -> RowsEnv:
    """The model itself as the environment."""
    if settings["dataset"] is None:
        raise ValueError("env=imagined begins at real frames; name them with data=<dataset>")
    left_out = ("_target_", "wam", "data", "tasks", "first_only", "num_envs")
    options = {name: value for name, value in settings["env"].items() if name not in left_out}
    if settings["uncertainty_limit"] is not None:
        options["uncertainty_limit"] = settings["uncertainty_limit"]
    if options.get("uncertainty_limit") is None:
        options["uncertainty"] = False  # no learner reads it, and one future per row is several times cheaper
    steps = options.get("max_steps")
    if steps is not None and steps > model.spec.max_horizon and not settings["beyond_horizon"]:
        raise ValueError(
            f"env.max_steps is {steps}, but the model is meant to imagine {model.spec.max_horizon} control steps; "
            "choose at most that, train it with wam.horizon and length raised, or set beyond_horizon=true where its "
            "longer episodes have been seen to agree with real ones (imagined_success in results.json)"
        )
    return ImaginedEnv(model, _frames(settings, model).to(device), settings["num_envs"], device=device, **options)


def _simulator(env: Mapping[str, Any], model: WAM, split: str, rows: int, device: str) -> RowsEnv:
    given = {name: value for name, value in env.items() if name != "split"}
    made = instantiate(given, split=split, num_envs=max(rows, len(given.get("tasks") or ())), device=device)
    checkpoint.check_environment(model.spec, made)
    return made


def _fresh(
    settings: Mapping[str, Any], env: Mapping[str, Any], device: str
) -> tuple[WAM, dict[str, Any], dict[str, Any]]:
    """An untrained model for an environment, normalised by 20 control steps of random actions in 32 episodes."""
    made = instantiate(env, split="train", num_envs=max(32, len(env.get("tasks") or ())), device=device)
    wanted = settings["observation"] or [
        key for key in ("state", "proprioception") if key in made.observation_spec.keys()
    ]
    draw = torch.Generator().manual_seed(settings["seed"])
    shown = [made.reset().select(*wanted).cpu()]
    for _ in range(20):
        action = torch.rand(made.action_spec.shape, generator=draw) * 2.0 - 1.0
        request = TensorDict({"action": action.to(device)}, batch_size=made.batch_size, device=made.device)
        shown.append(made.step(request)["next"].select(*wanted).cpu())
    path = torch.stack(shown)
    statistics = {
        key: {
            "mean": path[key].flatten(0, 1).mean(0),
            "std": path[key].flatten(0, 1).std(0).clamp_min(1e-3),
            "change": (path[key][1:] - path[key][:-1]).flatten(0, 1).square().mean(0).sqrt(),
        }
        for key in wanted
    }
    sizes = {
        **{name: value for name, value in settings["wam"].items() if name != "checkpoint"},
        "observation": {key: list(made.observation_spec[key].shape[1:]) for key in wanted},
        "action_dim": made.action_spec.shape[-1],
        "tasks": list(made.tasks),
        "control_dt_s": float(made.control_dt_s),
    }
    layout = Layout.of(getattr(made, "layout", None), sizes["observation"])
    if layout != Layout():
        sizes["layout"] = layout.to_dict()
    made.close()
    model = checkpoint.build(sizes, seed=settings["seed"], model_class=sizes["_target_"])
    model.set_normalisation(statistics)  # type: ignore[operator]
    return model.to(device), sizes, statistics


def summary(results: Mapping[str, Any]) -> str:
    """A few lines for the terminal."""
    lines = [f"{results['iterations']} iterations, {results['real_steps']} real steps ({results['stopped']})"]
    for name in ("before", "after"):
        real = results[name].get("real")
        if real:
            lines.append(
                f"{name}: success {real['success']:.0%} ({100 * real['low']:.0f} to {100 * real['high']:.0f} %, "
                f"n={real['n']}), return {real['episode_return']:.1f} on {results['split']} starts"
            )
    if "gain" in results:
        gain = results["gain"]
        lines.append(f"gain: {gain['difference']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})")
    if "return_gain" in results:
        gain = results["return_gain"]
        interval = "" if gain["low"] is None else f" ({gain['low']:+.2f} to {gain['high']:+.2f})"
        lines.append(f"return gained: {gain['difference']:+.2f}{interval}")
    if "imagined_gain" in results:
        lines.append(f"imagined gain {results['imagined_gain']:+.3f}, minus the real one "
                     f"{results['imagined_gain_minus_real_gain']:+.3f}")  # fmt: skip
    world = results["world"]
    if world["decayed"] is not None:
        lines.append(f"world model's validation error {_change(world)}")
    if world["decayed"]:
        by = "" if world["growth"] is None else f" by {world['growth']:.0%} (more than {DECAY:.0%})"
        lines.append(
            f"WARNING: THE WORLD MODEL DECAYED{by}; its imagination and its plans are worse than before. Raise "
            "agent.world_weight or lower the learning rates"
        )
    for name, part in world["parts"].items():
        if part["decayed"]:
            lines.append(
                f"WARNING: what the world model says of {name} decayed: held-out error {_change(part)}. "
                "Raise agent.world_weight or lower the learning rates"
            )
    return "\n".join(lines)


def _change(found: Mapping[str, Any]) -> str:
    after = "not finite" if found["error_after"] is None else f"{found['error_after']:.4f}"
    return f"{found['error_before']:.4f} -> {after}"


if __name__ == "__main__":
    main()
