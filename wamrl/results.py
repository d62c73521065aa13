"""What a run of `wamrl.plan` has so far, and the files it leaves: results.json, episodes.csv, traces.json, the report.

A stopped run is read back from the same files.
"""

from __future__ import annotations

import json
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from wamrl import provenance
from wamrl.control import ModelPolicy, PlannerPolicy
from wamrl.evaluation import (
    Episode,
    Start,
    compare,
    gain,
    percentiles,
    read_episodes,
    sooner,
    summarise,
    write_episodes,
)
from wamrl.files import write_json
from wamrl.interfaces import Policy
from wamrl.report import METHODS, PARTS, short, write_report

_WARM_UP = 5


@dataclass
class Run:
    """Everything that a run has so far; `write` puts it into the run directory.

    settings: the checked config, with "command", the command line that started the run. started: wall-clock time.
    checkpoint, protocol: as in results.json. plan_log, oracle_log: `PlannerPolicy.log` of the planner and the oracle.
    observations: a few of the planner's own episodes (the policy's, where nothing is planned), to time decisions on.
    """

    settings: dict[str, Any]
    directory: Path
    started: datetime
    tasks: tuple[str, ...]
    checkpoint: dict[str, Any]
    protocol: dict[str, Any]
    protocol_hash: str
    episodes: list[Episode] = field(default_factory=list)
    traces: dict[str, dict[str, Any]] = field(default_factory=dict)
    fidelity: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    plan_log: list[dict[str, Any]] = field(default_factory=list)
    oracle_log: list[dict[str, Any]] = field(default_factory=list)
    timing: dict[str, dict[str, Any]] = field(default_factory=dict)
    observations: list[dict[str, np.ndarray]] = field(default_factory=list)
    videos: list[dict[str, Any]] = field(default_factory=list)
    video_note: str | None = None
    plan_note: str | None = None
    evaluations_per_plan: float | None = None
    steps_per_plan: float | None = None
    worker_rss_mib: float = 0.0

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
        """The start states that have no episode yet."""
        done = {e.key for e in self.episodes}
        first = self.settings["first_start"]
        numbers = range(first, first + self.count(method))
        return [Start(task, i) for i in numbers if (method, task, i) not in done]

    def carry_over(self, earlier: Path) -> None:
        """Take in the episodes, traces and videos of a stopped run, if it is the same experiment."""
        before = json.loads((earlier / "results.json").read_text(encoding="utf-8"))
        if before["checkpoint"]["content_hash"] != self.checkpoint["content_hash"]:
            raise ValueError(f"resume={earlier}: its checkpoint has changed since; start a new run")
        if before["protocol_hash"] != self.protocol_hash:
            raise ValueError(
                f"resume={earlier}: its protocol was {before['protocol_hash']}, now it is {self.protocol_hash} "
                "(other simulator versions or start states?); start a new run"
            )
        self.episodes = read_episodes(earlier / "episodes.csv")
        traces = (earlier / "traces.json").read_text(encoding="utf-8")
        for trace in json.loads(traces.replace('"hand":', '"path":')):  # what earlier ones say for it
            trace.setdefault("axes", None)
            trace["plans"] = [
                {"values": [], "tree": None, "searched": True, "evaluations": None, **plan} for plan in trace["plans"]
            ]  # earlier ones lack them
            self.traces[trace["task"]] = trace
        self.fidelity, self.timing = before["fidelity"], before["timing"]
        self.evaluations_per_plan = before["evaluations_per_plan"]
        self.steps_per_plan = before.get("steps_per_plan")
        self.worker_rss_mib = before["peak_rss_mib"]["worker"]
        self.video_note, self.plan_note = before["video_note"], before.get("plan_note")
        kept = before.get("resume_data", {})
        self.plan_log, self.oracle_log = kept.get("plan_log", []), kept.get("oracle_log", [])
        self.observations = [
            {k: np.asarray(v["values"], dtype=v["dtype"]) for k, v in o.items()} for o in kept.get("observations", [])
        ]
        for film in before["videos"]:
            if self.directory.resolve() != earlier.resolve():
                shutil.copy2(earlier / film["file"], self.directory / film["file"])
            self.videos.append(film)

    def take(self, kind: str, value: Any) -> None:
        """Take in an event of `wamrl.workers`."""
        if kind == "episode":
            self.episodes.append(value)
        elif kind in ("plan_log", "oracle_log", "observations"):
            getattr(self, kind).extend(value)
        elif kind == "fidelity":
            task, errors = value
            self.fidelity[task] = errors
        elif kind == "trace" and "note" in value:
            self.plan_note = value["note"]
        elif kind == "trace":
            self.traces[value["task"]] = value
        elif kind == "video" and "note" in value:
            self.video_note = value["note"]
        elif kind == "video":
            self.videos.append(value)
        elif kind == "memory":
            self.worker_rss_mib = max(self.worker_rss_mib, value)

    def write(self, clock: float, *, partial: bool, report: bool = False) -> dict[str, Any]:
        """Write results.json, episodes.csv and traces.json, and the report if asked for; returns the results.

        clock: `time.perf_counter()` at the start of the run.
        """
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
        pairs = pairs if "planner" in self.methods else []
        compared = [
            {**asdict(found), "steps": None if (quicker := sooner(self.episodes, *pair)) is None else asdict(quicker)}
            for pair in pairs
            if (found := compare(self.episodes, *pair)) is not None
        ]
        gains = {t: gain([e for e in self.episodes if t in ("mean", e.task)]) for t in ("mean", *self.tasks)}
        if self.plan_log:
            self.timing["batched"] = plan_times(self.plan_log, self.settings["threads"])
            rows = sum(entry["rows"] for entry in self.plan_log)
            self.evaluations_per_plan = self.timing["batched"]["evaluations"]
            self.steps_per_plan = sum(e.length for e in self.episodes if e.method == "planner") / rows
        if self.oracle_log:
            self.timing["oracle"] = plan_times(self.oracle_log, self.settings["threads"])
        results = {
            "name": "plan",
            "command": self.settings["command"],
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
            "peak_rss_mib": {"main": peak_rss_mib(), "worker": self.worker_rss_mib},
            "tasks": list(self.tasks),
            "methods": self.methods,
            "episodes_wanted": self.wanted,
            "summary": summary,
            "paired": compared,
            "gain": {t: asdict(g) for t, g in gains.items() if g is not None},
            "timing": {k: self.timing[k] for k in ("single", "batched", "oracle", "policy") if k in self.timing},
            "evaluations_per_plan": self.evaluations_per_plan,
            "steps_per_plan": self.steps_per_plan,
            "fidelity": self.fidelity,
            "videos": self.videos,
            "video_note": self.video_note,
            "plan_note": self.plan_note,
            "config": self.settings,
        }
        results["metrics"] = _metrics(results)
        if partial:  # what the timing is worked out from, for whoever resumes
            observations = [
                {k: {"values": v.tolist(), "dtype": str(v.dtype)} for k, v in o.items()} for o in self.observations
            ]
            logs = {"plan_log": self.plan_log, "oracle_log": self.oracle_log, "observations": observations}
            results["resume_data"] = logs
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
    for task, g in results["gain"].items():
        prefix = f"plan/{short(task)}/gain"
        metrics[f"{prefix}/imagined"], metrics[f"{prefix}/real"] = g["imagined"], g["real"]
        entry = {"mean": g["difference"], "n": g["n"], "low": g["low"], "high": g["high"]}
        metrics[f"{prefix}/imagined_minus_real"] = entry
    for setting, timing in results["timing"].items():
        for part in PARTS:
            for q, value in timing.get(f"{part}_ms", {}).items():
                metrics[f"plan/{setting}/{part}_{q}_ms"] = value
        if "late" in timing and results["config"]["controller"].get("deadline_s") is not None:
            metrics[f"plan/{setting}/late"] = timing["late"] / timing["plans"]
    if results["evaluations_per_plan"] is not None:
        metrics["plan/evaluations_per_plan"] = results["evaluations_per_plan"]
        metrics["plan/steps_per_plan"] = results["steps_per_plan"]
    metrics["plan/peak_rss_mib"] = max(results["peak_rss_mib"].values())
    return metrics


def time_decisions(
    policy: Policy, observations: Sequence[Mapping[str, np.ndarray]], count: int, *, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Seconds of `count` decisions for one environment, each from a cold start, after a few that do not count.

    observations: of one environment, key -> array without a batch dim, taken in turn.
    Returns one dict per decision for `plan_times`: the log entry of a policy that keeps one (`PlannerPolicy`,
    `ModelPolicy`), otherwise plan_s, the time of the whole call of `act`.
    """
    given = [
        TensorDict({k: torch.as_tensor(v)[None] for k, v in o.items()}, batch_size=[1], device=device)
        for o in observations
    ]
    is_init, log = torch.ones(1, dtype=torch.bool, device=device), []
    for i in range(_WARM_UP + count):
        policy_state = policy.initial_state(1)
        begun = time.perf_counter()
        policy.act(given[i % len(given)], policy_state, is_init)
        entry = {"plan_s": time.perf_counter() - begun, "rows": 1, "replan_every": 1}
        log.append(policy.log[-1] if isinstance(policy, PlannerPolicy | ModelPolicy) else entry)
    return log[_WARM_UP:]


def plan_times(log: Sequence[Mapping[str, Any]], threads: int) -> dict[str, Any]:
    """Percentiles of the milliseconds per decision of `rows` environments, by part.

    log: entries of `PlannerPolicy.log`, `ModelPolicy.log` or `time_decisions`, all of one kind.
    Beside them how many there were (`plans`), `mean_rows`, `replan_every` (control steps that a decision is for), and
    of a planner `evaluations` (model evaluations per plan and environment), the share of plans that the gate let be
    `searched`, and how many plans were `late`.
    """
    seconds = {part: f"{part}_s" for part in PARTS} | {"total": "plan_s"}
    timing: dict[str, Any] = {
        f"{part}_ms": percentiles([1000 * entry[key] for entry in log])
        for part, key in seconds.items()
        if key in log[0]
    }
    timing |= {"plans": len(log), "threads": threads, "mean_rows": float(np.mean([e["rows"] for e in log]))}
    timing["replan_every"] = log[0].get("replan_every")  # stopped runs of earlier versions do not say
    if "evaluations" in log[0]:
        rows = sum(e["rows"] for e in log)
        timing["evaluations"] = sum(e["evaluations"] for e in log) / rows
        timing["searched"] = sum(e["searched"] for e in log) / rows
        timing["late"] = sum(e.get("late", 0) for e in log)
    return timing


def peak_rss_mib() -> float:
    """The most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.is_file():  # of this program alone: what getrusage tells was perhaps held by the process that started it
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
