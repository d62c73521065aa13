"""The main job: plan inside a World Action Model, act in the simulator, and compare on the same start states.

    python -m wamrl.plan env=metaworld/push-v3 planner=mppi planner.horizon=8 wam=<checkpoint>

Load and check, run every method's episodes in worker processes, time single plans, write the run directory, report.
The run directory holds results.json, episodes.csv, traces.json, report.html, figures/*.svg and an mp4 per task.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tensordict import TensorDict

from wamrl import checkpoint, provenance
from wamrl.cli import command, plain
from wamrl.control import ModelPolicy, PlannerPolicy
from wamrl.evaluation import check_starts, protocol_hash, write_episodes
from wamrl.files import write_text
from wamrl.goals import EXPERT, described, one_goal, read_goal
from wamrl.naming import unknown_name, whole_number
from wamrl.report import METHODS, gain_words, late_words, short
from wamrl.results import Run, plan_times, time_decisions
from wamrl.workers import (
    load_model,
    make_env,
    model_policy,
    module_of,
    oracle_policy,
    planner_policy,
    remaining_jobs,
    spread,
    start_states,
)


@command(
    "plan",
    help="Plan inside a World Action Model and act in the simulator; compare with the model's own policy, random "
    "actions, the scripted expert, and the same planner with shuffled scores, all on the same start states.",
    examples=[
        "env=metaworld/push-v3 planner=mppi planner.horizon=8",
        "planner=cem scorer@planner.scorer=success gate@planner.gate=critical_phase",
        "wam=outputs/train/latest episodes=50",
        "env=metaworld/push-v3 oracle=true",
        "-m split=dev planner.sigma=0.05,0.1,0.2",
    ],
)
def main(config: DictConfig, run_dir: Path) -> float | None:
    """Run the comparison; returns the planner's success rate, for sweepers."""
    started, clock = datetime.now(UTC), time.perf_counter()
    settings, earlier = _settings(plain(config), run_dir)
    torch.set_num_threads(settings["threads"])
    run = _prepare(settings, run_dir, started, earlier)
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(
        f"[bold]{run.checkpoint['name']}[/] ({run.checkpoint['parameters']:,} parameters) on {len(run.tasks)} "
        f"task{'s' if len(run.tasks) > 1 else ''}, {settings['split']} starts, {run.wanted} episodes in all"
        + (f", {len(run.episodes)} of them already there" if run.episodes else "")
    )
    run.write(clock, partial=True)
    resume = f"python -m wamrl.plan resume={shlex.quote(str(run_dir))}"
    try:
        _run_episodes(run, console)
        run.write(clock, partial=True)
        _time_single_decisions(run, console)
    except KeyboardInterrupt:
        with _uninterrupted():
            run.write(clock, partial=True, report=bool(run.episodes))
        raise KeyboardInterrupt(
            f"{len(run.episodes)} of {run.wanted} episodes are done and written. Finish them with: {resume}"
        ) from None
    except Exception:
        run.write(clock, partial=True)
        raise
    if not settings["video"]:
        run.video_note = "switched off with video=false"
    results = run.write(clock, partial=False, report=True)
    _print_table(results, console)
    if settings["video"] and run.video_note:
        console.print(f"[yellow]no video: {run.video_note}[/]")
    planner = results["summary"].get("planner", {}).get("mean")
    return planner["success"] if planner else None


# -------------------------------------------------------------------------------------------------- load and check


def _settings(given: dict[str, Any], run_dir: Path) -> tuple[dict[str, Any], Path | None]:
    """The checked settings, and the directory of the stopped run if one is resumed."""
    earlier = None
    if given["resume"] is not None:
        earlier = Path(given["resume"])
        given = _stopped_run(given, earlier)
        write_text(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(given)))
    for key in ("episodes", "oracle_episodes", "oracle_candidates", "workers", "num_envs", "threads"):
        whole_number(key, given[key], 1)
    for key in ("latency_plans", "seed", "first_start"):
        whole_number(key, given[key], 0)
    check_starts(given["first_start"], given["episodes"])
    for key in ("oracle", "video", "debug"):
        if not isinstance(given[key], bool):
            raise ValueError(f"{key} is {given[key]!r}, but must be true or false")
    methods = given["methods"]
    if methods is None:
        has_expert = hasattr(importlib.import_module(str(given["env"]["_target_"]).rpartition(".")[0]), "ExpertPolicy")
        methods = [m for m in METHODS if m != "oracle" and (m != "expert" or has_expert)]
    if not isinstance(methods, list) or not methods:
        raise ValueError(f"methods is {methods!r}, but must be a list such as [planner,policy]")
    for method in methods:
        if method not in METHODS:
            raise unknown_name("method", str(method), METHODS)
    given["methods"] = [m for m in METHODS if m in methods or (m == "oracle" and given["oracle"])]
    given["oracle"] = "oracle" in given["methods"]
    if given["goal"] is not None and not isinstance(given["goal"], str):
        raise ValueError(f"goal is {given['goal']!r}, but must be expert, the path of an npz file, or null")
    if given["split"] not in ("test", "dev", "train"):
        raise unknown_name("split", str(given["split"]), ("test", "dev", "train"))
    if given["split"] == "train" and not given["debug"]:
        raise ValueError(
            "split=train: the model was trained on these start states, so success there says little. "
            "Use split=dev to choose settings or split=test to report; debug=true allows it for debugging"
        )
    if given["split"] == "test" and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ValueError(
            "a sweep chooses between settings, and choosing on the test starts would spoil them for the report; "
            "run the sweep with split=dev, then the winner once with split=test"
        )
    device = str(given["device"])
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device} cannot be used here: {reason}; use device=cpu") from error
    return given, earlier


def _stopped_run(given: Mapping[str, Any], earlier: Path) -> dict[str, Any]:
    """The settings of the run in `earlier`; none may be given beside `resume`."""
    for name in ("config.yaml", "results.json", "episodes.csv"):
        if not (earlier / name).is_file():
            raise FileNotFoundError(
                f"resume={earlier}: there is no {name}; give the directory of a run of wamrl.plan that was stopped"
            )
    given_now = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    others = [word for word in given_now if word.partition("=")[0] not in ("resume", "run_dir")]
    if others:
        raise ValueError(f"resume takes all settings from the stopped run, so leave out {' '.join(others)}")
    results = json.loads((earlier / "results.json").read_text(encoding="utf-8"))
    if not results["partial"]:
        raise ValueError(f"resume={earlier}: this run is complete, there is nothing left to do; see its report.html")
    # Settings that the stopped run did not have yet keep their defaults.
    return {**given, **results["config"], "resume": str(earlier), "run_dir": given["run_dir"]}


def _command_line(settings: Mapping[str, Any]) -> str:
    if settings.get("command"):
        return str(settings["command"])
    words: list[str] = []
    if HydraConfig.initialized():
        words = [w for w in HydraConfig.get().overrides.task if not w.startswith(("run_dir=", "resume="))]
    return shlex.join(["python", "-m", "wamrl.plan", *words])


def _prepare(settings: dict[str, Any], directory: Path, started: datetime, earlier: Path | None) -> Run:
    """Build everything once, so that a mistake is an error before any work; carry over what a stopped run has."""
    settings["command"] = _command_line(settings)
    env = make_env(settings, None, 1)
    tasks = tuple(env.tasks)
    path = checkpoint.resolve(settings["wam"]["checkpoint"])
    metadata = checkpoint.read_metadata(path)
    model = load_model(settings)
    _check_camera(metadata, env)
    checkpoint.check_environment(model.spec, env)
    if settings["goal"] == EXPERT and not hasattr(module_of(env), "ExpertPolicy"):
        raise ValueError(
            f"goal=expert, but {module_of(env).__name__} has no ExpertPolicy; give goal=<npz>, or goal=null"
        )
    if settings["goal"] not in (None, EXPERT):
        read_goal(settings["goal"], model.spec.observation)
    if {"planner", "shuffled"} & set(settings["methods"]):
        planner_policy(settings, model).initial_state(1)  # asks the planner whether the model answers what it needs
    if settings["oracle"]:
        try:
            oracle_policy(settings, model, tasks[0]).initial_state(1)
        except ValueError as error:
            raise ValueError(
                f"oracle=true plans in the true simulator, which does not answer all that these settings ask: {error}"
            ) from error
    if "expert" in settings["methods"] and not hasattr(module_of(env), "ExpertPolicy"):
        others = ",".join(m for m in settings["methods"] if m != "expert")
        raise ValueError(f"{module_of(env).__name__} has no ExpertPolicy; leave it out: methods=[{others}]")
    count, first = settings["episodes"], settings["first_start"]
    states = {task: start_states(env, task, settings["split"], first + count) for task in tasks}
    versions = provenance.versions()
    digest = protocol_hash(
        starts={
            t: {"split": s.split, "indices": range(first, first + count), "rand_vec": s.rand_vec[first:].tolist()}
            for t, s in states.items()
        },
        seeds=[settings["seed"]],
        max_steps=env.max_steps,
        action_repeat=env.action_repeat,
        versions={k: str(versions.get(k)) for k in ("mujoco", "metaworld")},
        goal=described(settings["goal"]),
    )
    run = Run(
        settings=settings,
        directory=directory,
        started=started,
        tasks=tasks,
        checkpoint={
            "name": str(settings["wam"]["checkpoint"]),
            "content_hash": metadata.content_sha256,
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": path.stat().st_size,
            "observation": {key: list(shape) for key, shape in model.spec.observation.items()},
            "provenance": metadata.provenance,
        },
        protocol={
            "split": settings["split"],
            "episodes": count,
            "first_start": first,
            "max_steps": env.max_steps,
            "action_repeat": env.action_repeat,
            "control_dt_s": env.control_dt_s,
            "goal": settings["goal"],
            "min_distance": min(s.min_distance for s in states.values()),
            "methods": {m: METHODS[m] for m in settings["methods"]},
        },
        protocol_hash=digest,
    )
    env.close()
    if earlier is not None:
        run.carry_over(earlier)
    return run


def _check_camera(metadata: checkpoint.Metadata, env: Any) -> None:
    """Raise ValueError when a model of images would see them through another camera than that of its data."""
    if not hasattr(env, "camera") or all(len(shape) < 3 for shape in metadata.spec.observation.values()):
        return
    mine, default = env.camera.to_dict(), type(env.camera)().to_dict()
    for source in metadata.provenance.get("data", []):
        theirs = {**default, **((source.get("env") or {}).get("camera") or {})}
        changed = [key for key in mine if mine[key] != theirs[key]]
        if changed:
            had = ", ".join(f"{key} {theirs[key]} (here {mine[key]})" for key in changed)
            words = " ".join(f"env.camera.{key}={theirs[key]}".replace(" ", "") for key in changed)
            raise ValueError(f"the checkpoint was trained on images of a camera with {had}; write {words}")


# ---------------------------------------------------------------------------------------------- loop and report


def _run_episodes(run: Run, console: Console) -> None:
    """Run the episodes that are missing in worker processes, with a progress bar."""
    jobs = remaining_jobs(run)
    if not jobs:
        return
    left = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*left, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("episodes", total=run.wanted, completed=len(run.episodes))
        written = time.monotonic()

        def take(kind: str, value: Any) -> None:
            nonlocal written
            run.take(kind, value)
            if kind == "episode":
                outcome = "solved" if value.success else "failed"
                progress.update(bar, advance=1, description=f"{value.method} {short(value.task)} {outcome}".ljust(36))
                if time.monotonic() - written > 0.5:
                    write_episodes(run.directory / "episodes.csv", run.episodes)
                    written = time.monotonic()

        spread(run.settings, run.directory, jobs, take)
        progress.update(bar, description="episodes".ljust(36))


@contextlib.contextmanager
def _uninterrupted() -> Any:
    """A second Ctrl-C, SIGTERM or SIGHUP does not stop the writing of what is done."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _time_single_decisions(run: Run, console: Console) -> None:
    """Time plans, and decisions of the model's policy, for one environment, in this process alone."""
    settings, count = run.settings, run.settings["latency_plans"]
    if count == 0 or not run.observations:
        return
    model = load_model(settings)
    policies: dict[str, ModelPolicy | PlannerPolicy] = {}
    if "planner" in run.methods:
        goals = None
        if settings["goal"] is not None:  # any goal costs the same
            shown = {k: torch.as_tensor(run.observations[0][k])[None] for k in model.spec.observation}
            goals = one_goal(TensorDict(shown, batch_size=[1], device=settings["device"]))
        policies["single"] = planner_policy(settings, model, goals=goals)
    if "policy" in run.methods:
        policies["policy"] = model_policy(settings, model)
    with console.status("timing single decisions"):
        for name, policy in policies.items():
            log = time_decisions(policy, run.observations, count, device=settings["device"])
            run.timing[name] = plan_times(log, settings["threads"])


def _print_table(results: Mapping[str, Any], console: Console) -> None:
    tasks = results["tasks"]
    title = f"success on {results['protocol']['split']} starts, {results['protocol']['episodes']} per task"
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    table.add_column("success", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right", no_wrap=True)
    if len(tasks) > 1:
        for task in tasks:
            table.add_column(short(task).split("-")[0], justify="right")
    for name in ("steps", "return", "ms/plan", "evals"):
        table.add_column(name, justify="right")
    single = results["timing"].get("single") or results["timing"].get("batched")
    for method, by_task in results["summary"].items():
        mean = by_task["mean"]
        timing = {**results["timing"], "planner": single, "shuffled": single}.get(method)
        per_task = [f"{by_task[t]['successes']}/{by_task[t]['n']}" if t in by_task else "" for t in tasks]
        evaluations = results["evaluations_per_plan"] if method in ("planner", "shuffled") else None
        table.add_row(
            method,
            f"{mean['successes']}/{mean['n']}  {mean['success']:.0%}",
            f"{100 * mean['low']:.0f} to {100 * mean['high']:.0f} %",
            *(per_task if len(tasks) > 1 else []),
            "" if mean["steps"] is None else f"{mean['steps']:.1f}",
            f"{mean['episode_return']:.1f}",
            f"{timing['total_ms']['p50']:.1f}" if timing else "",
            f"{evaluations:,.0f}" if evaluations else "",
            style="bold" if method == "planner" else None,
        )
    console.print(table)
    console.print(
        "steps: control steps to success. return: until success, so quick successes have small ones. "
        "ms/plan: one environment, median; of the policy, per decision. evals: model evaluations per plan"
        + (f", one per {results['steps_per_plan']:.2f} steps." if results["steps_per_plan"] else ".")
    )
    if late := late_words(results):
        console.print(late)
    if "mean" in results["gain"]:
        console.print(gain_words(results["gain"]["mean"]))


if __name__ == "__main__":
    main()
