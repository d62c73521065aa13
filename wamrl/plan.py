"""The main job: plan inside a World Action Model, act in the simulator, and compare on the same start states.

    python -m wamrl.plan env=metaworld/push-v3 planner=mppi planner.horizon=8 wam=<checkpoint>

Load and check, run every method's episodes in worker processes, time single plans, write the run directory, report.
The run directory holds results.json, episodes.csv, traces.json, report.html, figures/*.svg and an mp4 per task.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import multiprocessing
import queue
import resource
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tensordict import TensorDict
from torch import Tensor

from wamrl import checkpoint, provenance
from wamrl.cli import command, plain
from wamrl.control import ModelPolicy, PlannerPolicy, RandomPolicy
from wamrl.evaluation import (
    Episode,
    Recording,
    Start,
    StepRecord,
    compare,
    fidelity,
    percentiles,
    protocol_hash,
    read_episodes,
    run_episodes,
    summarise,
    write_episodes,
)
from wamrl.files import write_json, write_text
from wamrl.interfaces import WAM, Policy, PolicyState, State
from wamrl.naming import unknown_name
from wamrl.oracle import OracleWAM
from wamrl.report import METHODS, short, write_report
from wamrl.video import View, write_video

Emit = Callable[[str, Any], None]

# Seen from the front left, wide enough for the arm and every task's object.
VIDEO_CAMERA: dict[str, Any] = {"azimuth": 150.0, "elevation": -32.0, "distance": 0.95, "lookat": (0.02, 0.68, 0.12)}
VIDEO_SIZE = (360, 400)
VIDEO_FPS = 10


@command(
    "plan",
    help="Plan inside a World Action Model and act in the simulator; compare with the model's own policy, random "
    "actions, the scripted expert, and the same planner with shuffled scores, all on the same start states.",
    examples=[
        "env=metaworld/push-v3 planner=mppi planner.horizon=8",
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
        _run_jobs(run, console)
        run.write(clock, partial=True)
        _time_single_plans(run, console)
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
    elif run.video_note:
        run.notes.append(f"no video: {run.video_note}")
    results = run.write(clock, partial=False, report=True)
    _print_table(results, console)
    for note in run.notes:
        console.print(f"[yellow]{note}[/]")
    planner = results["summary"].get("planner", {}).get("mean")
    return planner["success"] if planner else None


# -------------------------------------------------------------------------------------------------- load and check


def _settings(given: dict[str, Any], run_dir: Path) -> tuple[dict[str, Any], Path | None]:
    """The checked settings, and the directory of the stopped run if one is resumed."""
    earlier = None
    if given["resume"] is not None:
        earlier = Path(given["resume"])
        given = _stopped_run(given, earlier)
        write_text(run_dir / "config.yaml", _yaml(given))
    for key in ("episodes", "oracle_episodes", "oracle_candidates", "workers", "num_envs", "threads"):
        _whole_number(given, key, 1)
    _whole_number(given, "latency_plans", 0)
    _whole_number(given, "seed", 0)
    for key in ("oracle", "video", "debug"):
        if not isinstance(given[key], bool):
            raise ValueError(f"{key} is {given[key]!r}, but must be true or false")
    methods = given["methods"]
    if not isinstance(methods, list) or not methods:
        raise ValueError(f"methods is {methods!r}, but must be a list such as [planner,policy]")
    for method in methods:
        if method not in METHODS:
            raise unknown_name("method", str(method), METHODS)
    given["methods"] = [m for m in METHODS if m in methods or (m == "oracle" and given["oracle"])]
    given["oracle"] = "oracle" in given["methods"]
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


def _whole_number(given: Mapping[str, Any], key: str, least: int) -> None:
    value = given[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key} is {value!r}, but must be a whole number of at least {least}")


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
    return {**results["config"], "resume": str(earlier), "run_dir": given["run_dir"]}


def _yaml(settings: Mapping[str, Any]) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dict(settings)))


@dataclass
class _Run:
    """Everything that a run has so far; `write` puts it into the run directory."""

    settings: dict[str, Any]
    directory: Path
    started: datetime
    tasks: tuple[str, ...]
    checkpoint: dict[str, Any]
    protocol: dict[str, Any]
    protocol_hash: str
    horizon: int
    episodes: list[Episode] = field(default_factory=list)
    traces: dict[str, dict[str, Any]] = field(default_factory=dict)
    fidelity: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    plan_log: list[dict[str, Any]] = field(default_factory=list)
    oracle_log: list[dict[str, Any]] = field(default_factory=list)
    timing: dict[str, dict[str, Any]] = field(default_factory=dict)
    observations: list[dict[str, np.ndarray]] = field(default_factory=list)
    videos: list[dict[str, Any]] = field(default_factory=list)
    video_note: str | None = None
    evaluations_per_plan: float | None = None
    worker_rss_mib: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def methods(self) -> list[str]:
        return list(self.settings["methods"])

    def count(self, method: str) -> int:
        """Start states per task of a method."""
        wanted = self.settings["episodes"]
        return min(wanted, self.settings["oracle_episodes"]) if method == "oracle" else wanted

    @property
    def wanted(self) -> int:
        return len(self.tasks) * sum(self.count(m) for m in self.methods)

    def missing(self, method: str, task: str) -> list[Start]:
        done = {e.key for e in self.episodes}
        return [Start(task, i) for i in range(self.count(method)) if (method, task, i) not in done]

    def write(self, clock: float, *, partial: bool, report: bool = False) -> dict[str, Any]:
        """Write results.json, episodes.csv and traces.json, and the report if asked for; returns the results."""
        order = {m: i for i, m in enumerate(METHODS)}
        self.videos.sort(key=lambda v: self.tasks.index(v["task"]))
        self.traces = {t: self.traces[t] for t in self.tasks if t in self.traces}
        self.episodes.sort(key=lambda e: (self.tasks.index(e.task), order[e.method], e.start))
        summary: dict[str, dict[str, Any]] = {}
        for method in self.methods:
            mine = [e for e in self.episodes if e.method == method]
            if mine:
                by_task = {t: [e for e in mine if e.task == t] for t in self.tasks}
                summary[method] = {"mean": asdict(summarise(mine))}
                summary[method] |= {t: asdict(summarise(es)) for t, es in by_task.items() if es}
        pairs = [("planner", m) for m in ("policy", "shuffled", "random", "expert", "oracle") if m in self.methods]
        compared = [compare(self.episodes, *pair) for pair in pairs if "planner" in self.methods]
        if self.plan_log:
            self.timing["batched"] = _timing(self.plan_log, self.settings["threads"])
            per_row = [entry["evaluations"] / entry["rows"] for entry in self.plan_log]
            self.evaluations_per_plan = float(np.mean(per_row))
        if self.oracle_log:
            self.timing["oracle"] = _timing(self.oracle_log, self.settings["threads"])
        results = {
            "name": "plan",
            "command": _command_line(self.settings),
            "resume_command": f"python -m wamrl.plan resume={shlex.quote(str(self.directory))}",
            "partial": partial,
            "started": self.started.isoformat(timespec="seconds"),
            "wall_s": time.perf_counter() - clock,
            "protocol_hash": self.protocol_hash,
            "protocol": self.protocol,
            "checkpoint": self.checkpoint,
            "versions": provenance.versions(),
            "device": self.settings["device"],
            "dtype": "float32",
            "threads": self.settings["threads"],
            "workers": self.settings["workers"],
            "seeds": [self.settings["seed"]],
            "peak_rss_mib": {"main": _peak_rss_mib(), "worker": self.worker_rss_mib},
            "tasks": list(self.tasks),
            "methods": self.methods,
            "episodes_wanted": self.wanted,
            "summary": summary,
            "paired": [asdict(p) for p in compared if p is not None],
            "timing": {k: self.timing[k] for k in ("single", "batched", "oracle") if k in self.timing},
            "evaluations_per_plan": self.evaluations_per_plan,
            "fidelity": self.fidelity,
            "videos": self.videos,
            "video_note": self.video_note,
            "config": self.settings,
        }
        results["metrics"] = _metrics(results)
        write_episodes(self.directory / "episodes.csv", self.episodes)
        write_json(self.directory / "traces.json", list(self.traces.values()))
        write_json(self.directory / "results.json", results)
        if report:
            write_report(self.directory, results, [asdict(e) for e in self.episodes], list(self.traces.values()))
        return results


def _metrics(results: Mapping[str, Any]) -> dict[str, Any]:
    """Flat metrics, as every results file of this project has them."""
    metrics: dict[str, Any] = {}
    for method, by_task in results["summary"].items():
        for task, s in by_task.items():
            prefix = f"plan/{short(task)}/{method}"
            metrics[f"{prefix}/success"] = {"mean": s["success"], "n": s["n"], "low": s["low"], "high": s["high"]}
            metrics[f"{prefix}/return"] = s["episode_return"]
            metrics[f"{prefix}/reward_per_step"] = s["reward"]
            if s["steps"] is not None:
                metrics[f"{prefix}/steps_to_success"] = s["steps"]
    for setting, timing in results["timing"].items():
        for part in ("encode", "imagine", "search", "total"):
            for q, value in timing[f"{part}_ms"].items():
                metrics[f"plan/{setting}/{part}_{q}_ms"] = value
    if results["evaluations_per_plan"] is not None:
        metrics["plan/evaluations_per_plan"] = results["evaluations_per_plan"]
    metrics["plan/peak_rss_mib"] = max(results["peak_rss_mib"].values())
    return metrics


def _timing(log: Sequence[Mapping[str, Any]], threads: int) -> dict[str, Any]:
    """Percentiles of the milliseconds per call of the planner; one call plans `rows` environments."""
    parts = {"encode": "encode_s", "imagine": "imagine_s", "search": "search_s", "total": "plan_s"}
    timing: dict[str, Any] = {f"{p}_ms": percentiles([1000 * entry[k] for entry in log]) for p, k in parts.items()}
    return timing | {"plans": len(log), "threads": threads, "mean_rows": float(np.mean([e["rows"] for e in log]))}


def _peak_rss_mib() -> float:
    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _command_line(settings: Mapping[str, Any]) -> str:
    if settings.get("command"):
        return str(settings["command"])
    words: list[str] = []
    if HydraConfig.initialized():
        words = [w for w in HydraConfig.get().overrides.task if not w.startswith(("run_dir=", "resume="))]
    return shlex.join(["python", "-m", "wamrl.plan", *words])


def _load(settings: Mapping[str, Any]) -> WAM:
    wam = settings["wam"]
    return checkpoint.load(wam["checkpoint"], device=settings["device"], model_class=wam.get("model_class"))


def _prepare(settings: dict[str, Any], directory: Path, started: datetime, earlier: Path | None) -> _Run:
    """Build everything once, so that a mistake is an error before any work; carry over what a stopped run has."""
    settings["command"] = _command_line(settings)
    env = _make_env(settings, None, 1)
    tasks = tuple(env.tasks)
    path = checkpoint.resolve(settings["wam"]["checkpoint"])
    metadata = checkpoint.read_metadata(path)
    model = _load(settings)
    observation = {k: tuple(env.observation_spec[k].shape[1:]) for k in env.observation_spec.keys()}
    checkpoint.check_compatible(
        model.spec,
        observation=observation,
        action_dim=env.action_spec.shape[-1],
        tasks=tasks,
        control_dt_s=env.control_dt_s,
    )
    policy = _planner_policy(settings, model)
    policy.initial_state(1)  # asks the planner whether the model answers what it needs
    starts = _module(env).start_states
    if "expert" in settings["methods"] and not hasattr(_module(env), "ExpertPolicy"):
        others = ",".join(m for m in settings["methods"] if m != "expert")
        raise ValueError(f"{_module(env).__name__} has no ExpertPolicy; leave it out: methods=[{others}]")
    count = settings["episodes"]
    states = {task: starts(task, settings["split"], count) for task in tasks}
    versions = provenance.versions()
    digest = protocol_hash(
        starts={
            t: {"split": s.split, "indices": range(count), "rand_vec": s.rand_vec.tolist()} for t, s in states.items()
        },
        seeds=[settings["seed"]],
        max_steps=env.max_steps,
        action_repeat=env.action_repeat,
        versions={k: str(versions.get(k)) for k in ("mujoco", "metaworld")},
    )
    run = _Run(
        settings=settings,
        directory=directory,
        started=started,
        tasks=tasks,
        checkpoint={
            "name": str(settings["wam"]["checkpoint"]),
            "content_hash": metadata.content_sha256,
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": path.stat().st_size,
            "provenance": metadata.provenance,
        },
        protocol={
            "split": settings["split"],
            "episodes": count,
            "max_steps": env.max_steps,
            "action_repeat": env.action_repeat,
            "control_dt_s": env.control_dt_s,
            "min_distance": min(s.min_distance for s in states.values()),
            "methods": {m: METHODS[m] for m in settings["methods"]},
        },
        protocol_hash=digest,
        horizon=int(getattr(policy.planner, "horizon", model.spec.max_horizon)),
    )
    env.close()
    if earlier is not None:
        _carry_over(run, earlier)
    return run


def _carry_over(run: _Run, earlier: Path) -> None:
    """Take in the episodes, traces and videos of a stopped run, if it is the same experiment."""
    before = json.loads((earlier / "results.json").read_text(encoding="utf-8"))
    if before["checkpoint"]["content_hash"] != run.checkpoint["content_hash"]:
        raise ValueError(f"resume={earlier}: its checkpoint has changed since; start a new run")
    if before["protocol_hash"] != run.protocol_hash:
        raise ValueError(
            f"resume={earlier}: its protocol was {before['protocol_hash']}, now it is {run.protocol_hash} "
            "(other simulator versions or start states?); start a new run"
        )
    run.episodes = read_episodes(earlier / "episodes.csv")
    for trace in json.loads((earlier / "traces.json").read_text(encoding="utf-8")):
        run.traces[trace["task"]] = trace
    run.fidelity, run.timing = before["fidelity"], before["timing"]
    run.evaluations_per_plan = before["evaluations_per_plan"]
    run.worker_rss_mib = before["peak_rss_mib"]["worker"]
    for film in before["videos"]:
        if run.directory.resolve() != earlier.resolve():
            shutil.copy2(earlier / film["file"], run.directory / film["file"])
        run.videos.append(film)


def _make_env(
    settings: Mapping[str, Any], tasks: Sequence[str] | None, num_envs: int, *, snapshots: bool = False
) -> Any:
    options: dict[str, Any] = {"num_envs": num_envs, "split": settings["split"], "device": settings["device"]}
    if tasks is not None:
        options["tasks"] = list(tasks)
    if snapshots:
        options["snapshots"] = True
    return instantiate(settings["env"], **options)


def _module(env: Any) -> Any:
    return importlib.import_module(type(env).__module__)


def _planner_policy(
    settings: Mapping[str, Any], model: WAM, *, shuffle: bool = False, evaluations: int | None = None
) -> PlannerPolicy:
    planner = instantiate(settings["planner"], **({"shuffle_scores": True} if shuffle else {}))
    options: dict[str, Any] = {"seed": settings["seed"]}
    if evaluations is not None:
        options["evaluations"] = evaluations
    controller = instantiate(settings["controller"], **options)
    return controller(model, planner)


# ------------------------------------------------------------------------------------------------------- workers


@dataclass(frozen=True)
class _Job:
    """Episodes of some methods on one task. film: the start whose planner episode is recorded, or None."""

    task: str
    starts: tuple[tuple[str, tuple[Start, ...]], ...]
    film: Start | None


def _jobs(run: _Run) -> list[_Job]:
    """One job per task while there are at least as many tasks as workers, otherwise one per task and method."""
    jobs: list[_Job] = []
    for task in run.tasks:
        parts = [(m, tuple(run.missing(m, task))) for m in run.methods]
        parts = [(m, starts) for m, starts in parts if starts]
        # The slowest first, so that no worker ends long after the others.
        parts.sort(key=lambda p: ("oracle", "shuffled", "planner", "policy", "random", "expert").index(p[0]))
        first = next((starts[0] for m, starts in parts if m == "planner"), None)
        film = first if task not in run.traces else None
        if len(run.tasks) >= run.settings["workers"]:
            jobs += [_Job(task, tuple(parts), film)] if parts else []
        else:
            jobs += [_Job(task, (part,), film if part[0] == "planner" else None) for part in parts]
    return jobs


class _Worker:
    """Runs jobs with a model of its own; simulators are kept while the task stays the same."""

    def __init__(self, settings: Mapping[str, Any], directory: Path, emit: Emit) -> None:
        torch.set_num_threads(settings["threads"])
        self.settings, self.directory, self.emit = settings, directory, emit
        self.model = _load(settings)
        self._envs: dict[tuple[str, int, bool], Any] = {}

    def run(self, job: _Job) -> None:
        """Run the job, telling of episodes as they finish."""
        for method, starts in job.starts:
            if method == "oracle":
                self._run_oracle(job.task, starts)
            else:
                self._run_method(job, method, starts)
        self.emit("memory", _peak_rss_mib())

    def _env(self, task: str, rows: int, *, snapshots: bool = False) -> Any:
        key = (task, rows, snapshots)
        if key not in self._envs:
            for old in [k for k in self._envs if k[0] != task]:
                self._envs.pop(old).close()
            self._envs[key] = _make_env(self.settings, [task], rows, snapshots=snapshots)
        return self._envs[key]

    def _episodes(self, env: Any, policy: Policy, method: str, starts: Sequence[Start], **options: Any) -> None:
        run_episodes(
            env,
            policy,
            starts,
            method=method,
            split=self.settings["split"],
            seed=self.settings["seed"],
            max_steps=env.max_steps,
            on_episode=lambda episode: self.emit("episode", episode),
            **options,
        )

    def _run_method(self, job: _Job, method: str, starts: Sequence[Start]) -> None:
        env = self._env(job.task, min(self.settings["num_envs"], max(len(s) for _, s in job.starts)))
        if method == "planner":
            self._run_planner(env, job, starts)
        elif method == "shuffled":
            self._episodes(env, _planner_policy(self.settings, self.model, shuffle=True), method, starts)
        elif method == "policy":
            self._episodes(env, ModelPolicy(self.model, seed=self.settings["seed"]), method, starts)
        elif method == "random":
            self._episodes(env, RandomPolicy(env.action_spec.shape[-1], seed=self.settings["seed"]), method, starts)
        elif method == "expert":
            self._episodes(env, _module(env).ExpertPolicy(list(env.tasks)), method, starts)

    def _run_planner(self, env: Any, job: _Job, starts: Sequence[Start]) -> None:
        policy = _planner_policy(self.settings, self.model)
        film = _Film(policy, env, job.film, self.settings["video"]) if job.film else None
        memory = Recording()

        def on_step(record: StepRecord) -> None:
            memory.see(record)
            if film is not None:
                film.see(record)

        self._episodes(env, film or policy, "planner", starts, on_step=on_step)
        self.emit("plan_log", policy.log)
        self.emit("observations", memory.some(24))
        if "decode" in self.model.spec.provides:
            horizon = int(getattr(policy.planner, "horizon", self.model.spec.max_horizon))
            errors = fidelity(self.model, memory, horizon)
            if errors is not None:
                self.emit("fidelity", (job.task, errors))
        trace = film.trace() if film is not None and "decode" in self.model.spec.provides else None
        if film is not None and trace is not None:
            self.emit("trace", trace)
            self.emit("video", _write_video(self.directory, trace, film, env.control_dt_s))

    def _run_oracle(self, task: str, starts: Sequence[Start]) -> None:
        env = self._env(task, min(self.settings["num_envs"], len(starts)), snapshots=True)
        oracle = OracleWAM(self.model, _make_env(self.settings, [task], 1, snapshots=True))
        horizon = int(getattr(_planner_policy(self.settings, self.model).planner, "horizon", oracle.spec.max_horizon))
        budget = self.settings["oracle_candidates"] * horizon
        policy = _planner_policy(self.settings, oracle, evaluations=budget)
        self._episodes(env, policy, "oracle", starts, keep_snapshot=True)
        self.emit("oracle_log", policy.log)


def _write_video(directory: Path, trace: Mapping[str, Any], film: _Film, control_dt_s: float) -> dict[str, Any]:
    """Write the film as an mp4 and tell what it shows; {"note": why} if there is none."""
    if film.note is not None or film.view is None:
        return {"note": film.note or "this environment draws no pictures (it has no render_rgb)"}
    name = f"{short(trace['task'])}.mp4"
    try:
        write_video(directory / name, film.frames, trace, film.view, fps=VIDEO_FPS)
    except (ImportError, RuntimeError) as error:  # no imageio, or no ffmpeg for it
        return {"note": f"{error}; pip install imageio imageio-ffmpeg pillow"}
    return {
        "file": name,
        "task": trace["task"],
        "start": trace["start"],
        "success": trace["success"],
        "steps": len(trace["reward"]),
        "slowdown": 1.0 / (VIDEO_FPS * control_dt_s),
    }


class _Film:
    """A planner policy that is watched while it runs the episode of `start`: its plans, positions and pictures."""

    def __init__(self, policy: PlannerPolicy, env: Any, start: Start, pictures: bool) -> None:
        self.policy, self.env, self.start = policy, env, start
        self.note: str | None = None
        self.frames: list[np.ndarray] = []
        self._plans: list[tuple[int, State, Tensor, Tensor, Tensor, float]] = []
        self._states: list[Tensor] = []
        self._rewards: list[float] = []
        self._success = False
        self._pictures = pictures and all(hasattr(env, name) for name in ("render_rgb", "camera", "simulators"))
        self.view: View | None = None

    def initial_state(self, rows: int) -> PolicyState:
        return self.policy.initial_state(rows)

    def act(self, observation: TensorDict, policy_state: PolicyState, is_init: Tensor) -> tuple[Tensor, PolicyState]:
        mine = (policy_state["row"] == self.start.row).nonzero()[:, 0].tolist()
        if mine:
            self._picture()
        planned = len(self.policy.log)
        action, policy_state = self.policy.act(observation, policy_state, is_init)
        if mine and len(self.policy.log) > planned and self.policy.last_rows is not None:
            at = (self.policy.last_rows == mine[0]).nonzero()[:, 0].tolist()
            plan, state = self.policy.last_plan, self.policy.last_state
            if at and plan is not None and state is not None:
                k = at[0]
                best = plan.scores[k].nan_to_num(-math.inf).topk(min(24, plan.scores.shape[1])).indices
                worst = plan.scores[k].nan_to_num(math.inf).topk(min(8, plan.scores.shape[1]), largest=False).indices
                shown = torch.cat([best, worst]).unique()
                chosen, others = plan.actions[k], plan.candidates[k, shown]
                value = float(plan.value[k])
                self._plans.append((len(self._rewards), state[k : k + 1], chosen, others, plan.scores[k, shown], value))
        return action, policy_state

    def see(self, record: StepRecord) -> None:
        """Take in the step that followed."""
        for k, start in enumerate(record.starts):
            if start == self.start and "state" in record.after.keys():
                if not self._states:
                    self._states.append(record.observation["state"][k])
                self._states.append(record.after["state"][k])
                self._rewards.append(float(record.after["reward"][k]))
                over = bool(record.after["success"][k]) or bool(record.after["done"][k])
                self._success = self._success or bool(record.after["success"][k])
                if over:
                    self._picture()

    def _picture(self) -> None:
        if not self._pictures:
            return
        row = self.env.start_index.tolist().index(self.start.index)
        camera_class = type(self.env.camera)
        try:
            self.frames.append(self.env.render_rgb(row, VIDEO_SIZE, camera_class(**VIDEO_CAMERA)))
        except RuntimeError as error:  # RenderingUnavailable: the run goes on without pictures
            self.note, self._pictures, self.frames = str(error), False, []
            return
        fovy = float(self.env.simulators[row].raw.model.vis.global_.fovy)
        self.view = View(**VIDEO_CAMERA, fovy=fovy, height=VIDEO_SIZE[0], width=VIDEO_SIZE[1])

    def trace(self) -> dict[str, Any] | None:
        """Positions, rewards and plans of the episode as plain values; None without a Meta-World state."""
        if not self._states or self._states[0].shape[-1] != 39 or not self._plans:
            return None
        states = torch.stack(self._states)
        return {
            "task": self.start.task,
            "start": self.start.index,
            "success": self._success,
            "goal": _plain(states[-1, 36:39]),
            "hand": _plain(states[:, 0:3]),
            "object": _plain(states[:, 4:7]),
            "reward": _plain(torch.tensor(self._rewards)),
            "plans": [self._plan_trace(*plan) for plan in self._plans],
        }

    @torch.no_grad()
    def _plan_trace(
        self, step: int, state: State, chosen: Tensor, others: Tensor, scores: Tensor, value: float
    ) -> dict[str, Any]:
        model = self.policy.model
        imagined = model.imagine(state, torch.cat([chosen[None], others])[None], with_frames=True)
        decoded = model.decode(imagined, ("state",))["state"][0].mean(dim=1)  # [1 + N, H, 39]
        begin = self._states[step].to(decoded.device).expand(decoded.shape[0], 1, -1)
        path = torch.cat([begin, decoded], dim=1)
        uncertainty = imagined.uncertainty
        return {
            "step": step,
            "value": value if math.isfinite(value) else None,
            "hand": _plain(path[0, :, 0:3]),
            "object": _plain(path[0, :, 4:7]),
            "reward": [] if imagined.reward is None else _plain(imagined.reward[0, 0].mean(dim=0)),
            "uncertainty": [] if uncertainty is None else _plain(uncertainty[0, 0].mean(dim=0), 6),
            "candidates": [
                {"score": float(s), "hand": _plain(path[i + 1, :, 0:3])}
                for i, s in enumerate(scores)
                if math.isfinite(float(s))
            ],
        }


def _plain(values: Tensor, digits: int = 4) -> Any:
    """Nested lists of rounded numbers: tenths of a millimetre are enough for a picture."""
    return np.round(values.detach().cpu().double().numpy(), digits).tolist()


def _work(settings: Mapping[str, Any], directory: Path, jobs: Any, events: Any) -> None:
    """A worker process: take jobs until there are none, tell of everything through `events`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides
    emit: Emit = lambda kind, value: events.put((kind, value))  # noqa: E731
    try:
        worker = _Worker(settings, directory, emit)
        while (job := jobs.get()) is not None:
            worker.run(job)
        emit("finished", None)
    except Exception as error:
        emit("error", (isinstance(error, (ValueError, FileNotFoundError)), str(error), traceback.format_exc()))


def _run_jobs(run: _Run, console: Console) -> None:
    jobs = _jobs(run)
    if not jobs:
        return
    left = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*left, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("episodes", total=run.wanted, completed=len(run.episodes))
        written = time.monotonic()

        def take(kind: str, value: Any) -> None:
            nonlocal written
            if kind == "episode":
                run.episodes.append(value)
                outcome = "solved" if value.success else "failed"
                progress.update(bar, advance=1, description=f"{value.method} {short(value.task)} {outcome}".ljust(36))
                if time.monotonic() - written > 0.5:
                    write_episodes(run.directory / "episodes.csv", run.episodes)
                    written = time.monotonic()
            elif kind in ("plan_log", "oracle_log", "observations"):
                getattr(run, kind).extend(value)
            elif kind == "fidelity":
                run.fidelity[value[0]] = value[1]
            elif kind == "trace":
                run.traces[value["task"]] = value
            elif kind == "video" and "note" in value:
                run.video_note = value["note"]
            elif kind == "video":
                run.videos.append(value)
            elif kind == "memory":
                run.worker_rss_mib = max(run.worker_rss_mib, value)

        _spread(run.settings, run.directory, jobs, take)
        progress.update(bar, description="episodes".ljust(36))


def _spread(settings: Mapping[str, Any], directory: Path, jobs: Sequence[_Job], take: Emit) -> None:
    """Run the jobs in `workers` processes (in this one if a single worker is asked for)."""
    count = min(settings["workers"], len(jobs))
    if count == 1:
        worker = _Worker(settings, directory, take)
        for job in jobs:
            worker.run(job)
        return
    context = multiprocessing.get_context("spawn")
    todo, events = context.Queue(), context.Queue()
    for item in [*jobs, *[None] * count]:
        todo.put(item)
    arguments = (settings, directory, todo, events)
    processes = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(count)]
    try:
        for process in processes:
            process.start()
        finished = 0
        while finished < count:
            try:
                kind, value = events.get(timeout=1.0)
            except queue.Empty:
                dead = [p.exitcode for p in processes if p.exitcode]
                if dead:
                    hint = " (killed, perhaps for lack of memory: use fewer workers or num_envs)" if dead[0] < 0 else ""
                    raise RuntimeError(f"a worker process died with exit code {dead[0]}{hint}") from None
                continue
            if kind == "error":
                of_input, text, trace = value
                if of_input:
                    raise ValueError(text)
                raise RuntimeError(f"a worker process failed:\n{trace}")
            if kind == "finished":
                finished += 1
            else:
                take(kind, value)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            process.join()


@contextlib.contextmanager
def _uninterrupted() -> Any:
    """A second Ctrl-C does not stop the writing of what is done."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------- timing, videos, the table


def _time_single_plans(run: _Run, console: Console) -> None:
    """Time plans of one environment, in this process alone, on observations of the planner's own episodes."""
    count = run.settings["latency_plans"]
    if count == 0 or not run.observations or "planner" not in run.methods:
        return
    model = _load(run.settings)
    policy = _planner_policy(run.settings, model)
    rows = [
        TensorDict({k: torch.as_tensor(v)[None] for k, v in o.items()}, batch_size=[1], device=run.settings["device"])
        for o in run.observations
    ]
    warm_up = 5
    with console.status("timing single plans"):
        for i in range(count + warm_up):
            policy.act(
                rows[i % len(rows)],
                policy.initial_state(1),
                torch.ones(1, dtype=torch.bool, device=run.settings["device"]),
            )
    run.timing["single"] = _timing(policy.log[warm_up:], run.settings["threads"])


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
        timing = {"planner": single, "shuffled": single, "oracle": results["timing"].get("oracle")}.get(method)
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
        "ms/plan: one environment, median. evals: model evaluations per plan."
    )


if __name__ == "__main__":
    main()
