"""What an evaluation has, and what it leaves: the judges that are compared, results.json and episodes.csv.

Letters: K policies, N start states of all tasks together.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensordict import TensorDict

from wamrl import provenance
from wamrl.checkpoint import Metadata
from wamrl.evaluation import Episode, Start
from wamrl.interfaces import WAM
from wamrl.judging import verdict, worlds
from wamrl.judging.cells import Cells
from wamrl.judging.policies import Entrant, Surroundings
from wamrl.judging.verdict import Judged
from wamrl.judging.worlds import Cost, Imagining
from wamrl.report import short
from wamrl.results import peak_rss_mib, plan_times


@dataclass
class Bench:
    """What an evaluation works with: the judging model, who is judged, and from where."""

    settings: dict[str, Any]
    model: WAM
    metadata: Metadata
    entrants: list[Entrant]
    tasks: tuple[str, ...]
    starts: list[Start]
    frames: TensorDict
    max_steps: int
    action_repeat: int
    digest: str
    around: Surroundings
    warnings: list[str] = field(default_factory=list)
    real_cost: Cost = field(default_factory=Cost)
    imagined_cost: Cost = field(default_factory=Cost)
    cells: Cells | None = None  # where finished policies are kept
    reused: int = 0  # policies times tasks whose real episodes were read, not played


@dataclass
class Played:
    """Every episode of some policies on some starts. Letters: K policies, N starts.

    real: [K][N] episodes, None without a simulator. imagined: roll-out name -> [K][N][replicas].
    drift: task -> errors [K * N_task, H] by steps ahead, open loop and closed loop. decisions: [K] what
    `wamrl.results.time_decisions` found, of all tasks; empty where nothing was timed.
    """

    starts: list[Start]
    names: list[str]
    real: list[list[Episode | None]]
    imagined: dict[str, list[list[list[Imagining]]]]
    decisions: list[list[dict[str, Any]]]
    open_loop: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)
    closed_loop: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)

    @property
    def outcomes(self) -> NDArray[np.bool_]:
        """[K, N] real success."""
        return np.array([[e is not None and e.success for e in row] for row in self.real])

    def scores(self, variant: Mapping[str, Any]) -> NDArray[np.float64]:
        """[K, N] of a judge of `asked_judges`."""
        rows = self.imagined[variant["roll_out"]]
        return np.array(
            [
                [worlds.score(r[: variant["replicas"]], penalty=variant["penalty"], veto=variant["veto"]) for r in row]
                for row in rows
            ]
        )


def asked_roll_outs(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """How often each start is imagined, and how: everything that the judges of `asked_judges` read."""
    common = {"replicas": settings["ensemble"], "uncertainty": settings["uncertainty_penalty"] > 0}
    found: dict[str, dict[str, Any]] = {"plain": {"keyframe_every": None, **common}}
    if settings["keyframe_every"] is not None:
        found["keyframe"] = {"keyframe_every": settings["keyframe_every"], **common}
    return found


def asked_judges(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The judges that are compared: without any remedy, each remedy alone, and what was asked for ("judge")."""
    base = {"roll_out": "plain", "replicas": 1, "penalty": 0.0, "veto": None}
    found = {"none": base}
    if settings["threshold"] != 0.5:
        found["threshold"] = dict(base)
    if settings["uncertainty_penalty"]:
        found["uncertainty_penalty"] = {**base, "penalty": settings["uncertainty_penalty"]}
    if settings["contact_veto"] is not None:
        found["contact_veto"] = {**base, "veto": settings["contact_veto"]}
    if settings["ensemble"] > 1:
        found["ensemble"] = {**base, "replicas": settings["ensemble"]}
    if settings["keyframe_every"] is not None:
        found["keyframe"] = {**base, "roll_out": "keyframe"}
    found["judge"] = {
        "roll_out": "plain" if settings["keyframe_every"] is None else "keyframe",
        "replicas": settings["ensemble"],
        "penalty": settings["uncertainty_penalty"],
        "veto": settings["contact_veto"],
    }
    return found


def has_positions(model: WAM) -> bool:
    """Whether positions can be read off the model's `state`, as metres of hand and object."""
    return model.spec.layout.has("hand", "object")


def drift_keys(model: WAM) -> list[str]:
    """The keys whose error is drift: the state alone where it tells of positions."""
    keys = [key for key in model.spec.observation if key != "snapshot"]
    return ["state"] if has_positions(model) else keys


def results_of(
    bench: Bench, played: Played, calibrated: Mapping[str, Any], started: datetime, clock: float
) -> dict[str, Any]:
    """What results.json holds; clock is `time.perf_counter()` at the start of the run."""
    settings, tasks = bench.settings, [start.task for start in played.starts]
    variants = asked_judges(settings)
    judges = {n: Judged(played.scores(v), calibrated["thresholds"][n]) for n, v in variants.items()}
    decisions = {name: judge.decisions(tasks) for name, judge in judges.items()}
    imagined, names = decisions["judge"], played.names
    real = played.outcomes if settings["real"] else None
    independent = [k for k, e in enumerate(bench.entrants) if e.origin == "independent"]
    warnings = list(bench.warnings)
    agreement: dict[str, Any] = {}
    leading = list(range(len(names)))  # whom the headline and the comparison of judges are about
    if real is not None:
        agreement["all"] = verdict.compare(real, imagined, tasks, seed=settings["seed"])
        if 3 <= len(independent) < len(names):
            agreement["independent"] = verdict.compare(
                real[independent], imagined[independent], tasks, seed=settings["seed"]
            )
        elif len(independent) < 3:
            warnings.append(
                f"Only {len(independent)} of the {len(names)} policies are of independent origin; the others are "
                "degraded versions, and agreement over those says less."
            )
        for task in bench.tasks if len(bench.tasks) > 1 else ():
            mine = np.array([t == task for t in tasks])
            agreement[task] = verdict.compare(
                real[:, mine], imagined[:, mine], [task] * int(mine.sum()), seed=settings["seed"]
            )
        leading = independent if "independent" in agreement else leading
        found = agreement["independent" if "independent" in agreement else "all"]
        warnings += verdict.warnings_of(found, real[leading], imagined[leading], [names[k] for k in leading])
    shown: dict[str, Any] = {}
    for k, entrant in enumerate(bench.entrants):
        entry: dict[str, Any] = {
            key: getattr(entrant, key) for key in ("kind", "origin", "content_hash", "wam", "planner")
        }
        for scope in ("mean", *bench.tasks):
            chosen = np.array([scope in ("mean", t) for t in tasks])
            entry[scope] = {"imagined": verdict.rate(imagined[k, chosen])}
            if real is not None:
                entry[scope]["real"] = verdict.rate(real[k, chosen])
        if real is not None:
            entry["kappa"] = verdict.ag.kappa(real=real[k], imagined=imagined[k])
            entry["tags"] = _tags(played.real[k])
            timed = played.decisions[k]
            entry["latency"] = plan_times(timed, settings["threads"]) if timed else None
        shown[entrant.name] = entry
    compared: dict[str, Any] = {}
    for name, variant in variants.items():
        compared[name] = {"settings": variant, "thresholds": dict(judges[name].thresholds)}
        if real is not None:
            found = verdict.compare(real[leading], decisions[name][leading], tasks, seed=settings["seed"])
            compared[name] |= {
                "intervals": {k: [found[k]["low"], found[k]["high"]] for k in ("pearson", "mmrv", "gap", "kappa")},
                "pearson": found["pearson"]["mean"],
                "mmrv": found["mmrv"]["mean"],
                "gap": found["gap"]["mean"],
                "bias": found["bias"],
                "kappa": found["kappa"]["mean"],
                "precision": found["judge"]["precision"],
                "recall": found["judge"]["recall"],
                "false_positive_rate": found["judge"]["false_positive_rate"],
                "ece": verdict.calibration(real[leading].ravel(), judges[name].scores[leading].ravel())["ece"],
            }
    results: dict[str, Any] = {
        "name": "evaluate",
        "command": settings["command"],
        "started": started.isoformat(timespec="seconds"),
        "protocol_hash": bench.digest,
        "protocol": {
            "split": settings["split"],
            "episodes": settings["episodes"],
            "first_start": settings["first_start"],
            "max_steps": bench.max_steps,
            "action_repeat": bench.action_repeat,
            "control_dt_s": bench.model.spec.control_dt_s,
        },
        "wam": {
            "name": str(settings["wam"]["checkpoint"]),
            "content_hash": bench.metadata.content_sha256,
            "parameters": sum(p.numel() for p in bench.model.parameters()),
            "observation": list(bench.model.spec.observation),
            "trained_horizon": bench.model.spec.max_horizon,
            "failures_in_training": worlds.failures_in_training(bench.metadata.provenance),
        },
        "versions": provenance.versions(),
        "device": settings["device"],
        "threads": settings["threads"],
        "seeds": [settings["seed"]],
        "real": settings["real"],
        "reality": {"directory": settings["reality"], "read": bench.reused, "of": len(names) * len(bench.tasks)},
        "tasks": list(bench.tasks),
        "policies": shown,
        "agreement": agreement,
        # What the report leads with: versions of one policy would flatter the correlation.
        "headline": "independent" if "independent" in agreement else "all",
        "calibration": {**calibrated, "thresholds": calibrated["thresholds"]["judge"]},
        "variants": compared,
        "drift": {},
        "warnings": warnings,
        "config": settings,
    }
    if real is not None:
        results["calibration"] |= verdict.calibration(real.ravel(), judges["judge"].scores.ravel())
        unit = "cm" if has_positions(bench.model) else "deviations"
        for name, by_task in (("open_loop", played.open_loop), ("closed_loop", played.closed_loop)):
            whole = [np.concatenate(parts) for parts in by_task.values()]
            results["drift"][name] = {
                "unit": unit,
                "mean": verdict.drift(np.concatenate(whole), settings["epsilon"]),
                **{t: verdict.drift(e, settings["epsilon"]) for t, e in zip(by_task, whole, strict=True)},
            }
    real_cost, imagined_cost = bench.real_cost, bench.imagined_cost
    results["cost"] = {
        "imagined_us_per_step": 1e6 * imagined_cost.env_s / max(imagined_cost.steps, 1),
        "imagined_s": imagined_cost.env_s,
        "policy_s": real_cost.policy_s + imagined_cost.policy_s,
        "peak_rss_mib": peak_rss_mib(),
    }
    if real is not None:
        results["cost"]["real_us_per_step"] = 1e6 * real_cost.env_s / max(real_cost.steps, 1)
        results["cost"]["real_s"] = real_cost.env_s
    results["metrics"] = _metrics(results)
    results["wall_s"] = time.perf_counter() - clock
    return results


def _tags(episodes: Sequence[Episode | None]) -> dict[str, int]:
    found = [e.tag for e in episodes if e is not None and e.tag]
    return {tag: found.count(tag) for tag in sorted(set(found))}


def _metrics(results: Mapping[str, Any]) -> dict[str, Any]:
    """Flat metrics, as every results file of this project has them."""
    metrics: dict[str, Any] = {}
    for name, entry in results["policies"].items():
        for scope in ("mean", *results["tasks"]):
            for world, found in entry[scope].items():
                place = f"evaluate/{short(scope)}/{name}/{world}_success"
                metrics[place] = {k: found[k] for k in ("mean", "n", "low", "high")}
        if entry.get("latency"):
            for q, value in entry["latency"]["total_ms"].items():
                metrics[f"evaluate/mean/{name}/decision_{q}_ms"] = value
    for scope, found in results["agreement"].items():
        for key in ("pearson", "mmrv", "gap", "kappa"):
            metrics[f"evaluate/{short(scope)}/{key}"] = {k: found[key][k] for k in ("mean", "n", "low", "high")}
        for key in ("spearman", "permutation_p", "bias"):
            metrics[f"evaluate/{short(scope)}/{key}"] = found[key]
    for name, found in results["drift"].items():
        metrics[f"evaluate/mean/{name}_sustained_steps"] = found["mean"]["sustained"]
    for key, value in results["cost"].items():
        metrics[f"evaluate/{key}"] = value
    return metrics


def episodes_csv(bench: Bench, played: Played, results: Mapping[str, Any]) -> str:
    """One line per policy and start state, with what every judge said of it."""
    variants = asked_judges(bench.settings)
    judge, scores = variants["judge"], {name: played.scores(variant) for name, variant in variants.items()}
    columns = ["policy", "origin", "task", "start", "split", "seed", "real_success", "real_first_success_step"]
    columns += ["real_length", "real_tag", "imagined_success", "imagined_score", "imagined_first_step"]
    columns += ["max_uncertainty", *(f"score_{name}" for name in variants)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for k, entrant in enumerate(bench.entrants):
        for i, start in enumerate(played.starts):
            real = played.real[k][i]
            threshold = results["variants"]["judge"]["thresholds"][start.task]
            replicas = played.imagined[judge["roll_out"]][k][i]
            step = worlds.first_step(replicas, threshold, penalty=judge["penalty"], veto=judge["veto"])
            row: dict[str, Any] = {
                "policy": entrant.name,
                "origin": entrant.origin,
                "task": start.task,
                "start": start.index,
                "split": bench.settings["split"],
                "seed": bench.settings["seed"],
                "imagined_success": int(scores["judge"][k, i] >= threshold),
                "imagined_score": f"{scores['judge'][k, i]:.6f}",
                "imagined_first_step": "" if step is None else step,
                "max_uncertainty": f"{max(float(r.uncertainty.max(initial=0.0)) for r in replicas):.6f}"
                if bench.settings["uncertainty_penalty"]
                else "",
                **{f"score_{name}": f"{values[k, i]:.6f}" for name, values in scores.items()},
            }
            if real is not None:
                row |= {
                    "real_success": int(real.success),
                    "real_first_success_step": "" if real.first_success_step is None else real.first_success_step,
                    "real_length": real.length,
                    "real_tag": real.tag,
                }
            writer.writerow(row)
    return text.getvalue()
