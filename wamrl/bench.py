"""Measure what matters together: accuracy at budget, the five properties of a World Action Model, Fast-WAM's question.

python -m wamrl.bench budget runs=[outputs/plan/latest]
python -m wamrl.bench properties wam=six
python -m wamrl.bench fast_wam run_dir=outputs/fast_wam
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from wamrl import budget, checkpoint, fast_wam, properties, provenance
from wamrl.cli import command, plain
from wamrl.control import ModelPolicy
from wamrl.evaluation import Recording, Start, check_starts, wilson
from wamrl.files import write_json
from wamrl.judging import policies, worlds
from wamrl.naming import unknown_name, whole_number
from wamrl.pages import Section, TableOf, number, provenance_rows, rate, write_page
from wamrl.properties import Check
from wamrl.report import short
from wamrl.results import peak_rss_mib
from wamrl.workers import load_model, make_env

CHECKS = ("budget", "properties", "fast_wam")
_TAKE_A_VALUE = (
    "-c",
    "--cfg",
    "-p",
    "--package",
    "-cp",
    "--config-path",
    "-cn",
    "--config-name",
    "-cd",
    "--config-dir",
)


@command(
    "bench",
    help="Accuracy at budget of plan and evaluate runs (first word: budget), or the score card of the five properties "
    "of a WAM (first word: properties), or Fast-WAM's variants trained on the same data (first word: fast_wam; hours; "
    "the same run_dir goes on with a stopped one).",
    examples=[
        "budget runs=[outputs/plan/latest,outputs/evaluate/latest]",
        "budget 'configurations={mppi:{planner:mppi},cem:{planner:cem,planner.horizon:6}}'",
        "properties wam=six env=metaworld/push-v3",
        "fast_wam fast_wam.tasks=[metaworld/reach-v3] fast_wam.seeds=[0] run_dir=outputs/fast_wam",
    ],
)
def _command(config: DictConfig, run_dir: Path) -> None:
    """Measure, write results.json and report.html."""
    started, clock = datetime.now(UTC), time.perf_counter()
    settings = plain(config)
    torch.set_num_threads(settings["threads"])
    if settings["check"] is None:
        raise ValueError(
            f"say what to measure as the first word: python -m wamrl.bench {', '.join(CHECKS[:-1])} or {CHECKS[-1]}"
        )
    if settings["check"] not in CHECKS:
        raise unknown_name("check", str(settings["check"]), CHECKS)
    words = []
    if HydraConfig.initialized():
        words = [w for w in HydraConfig.get().overrides.task if not w.startswith(("run_dir=", "check="))]
    console = Console(width=None if sys.stdout.isatty() else 150)
    results: dict[str, Any] = {
        "name": settings["check"],
        "command": shlex.join(["python", "-m", "wamrl.bench", settings["check"], *words]),
        "started": started.isoformat(timespec="seconds"),
        "versions": provenance.versions(),
        "device": settings["device"],
        "threads": settings["threads"],
        "seeds": [settings["seed"]],
        "config": settings,
    }
    if settings["check"] == "fast_wam":
        _fast_wam(settings, run_dir, console, results)
        return
    if settings["check"] == "budget":
        results |= _budget(settings, run_dir, console)
    else:
        results |= _properties(settings, console)
    results["wall_s"] = time.perf_counter() - clock
    write_json(run_dir / "results.json", results)
    (_budget_page if settings["check"] == "budget" else _properties_page)(run_dir, results)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: its first word that is no setting is the check, as in `budget runs=[...]`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for i, word in enumerate(words):
        if "=" not in word and word[:1] not in "-+~" and (i == 0 or words[i - 1] not in _TAKE_A_VALUE):
            words[i] = f"check={word}"
            break
    _command(words)


# -------------------------------------------------------------------------------------------------- budget


def _budget(settings: Mapping[str, Any], run_dir: Path, console: Console) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for directory in settings["runs"]:
        path = Path(str(directory))
        name = path.resolve().name
        named[name if name not in named else str(path)] = budget.read_results(path)
    common = settings["common"] or {"split": "dev", "episodes": 10, "video": False, "workers": 1}
    for name, overrides in (settings["configurations"] or {}).items():
        where = run_dir / "runs" / str(name)
        words = [f"{key}={value}" for key, value in {**common, **(overrides or {})}.items()]
        words.append(f"run_dir={where}")
        console.print(f"running {name}: python -m wamrl.plan {shlex.join(words)}", highlight=False)
        done = subprocess.run([sys.executable, "-m", "wamrl.plan", *words], capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            why = next((line for line in said if line.startswith("error: ")), said[-1] if said else "it said nothing")
            raise ValueError(f"configuration '{name}' failed (exit status {done.returncode}): {why}")
        named[str(name)] = budget.read_results(where)
    if not named:
        raise ValueError(
            "there is nothing to compare: give runs=[<directory>, ...], or configurations={mppi:{planner:mppi}}"
        )
    rows = budget.rows_of(named)
    groups, warnings = budget.by_hash(rows), []
    if len(groups) > 1:
        warnings.append(
            f"These runs have {len(groups)} different protocol hashes ({', '.join(groups)}): other start states, "
            f"seeds, "
            "lengths or versions. Each has a table of its own; do not compare success across them."
        )
    settings_of = {(r["device"], r["threads"]) for r in rows if r["ms"]}
    if len(settings_of) > 1:
        warnings.append(
            "The latencies were measured on different devices or numbers of threads; compare them within those."
        )
    if len({r["timed"] for r in rows if r["ms"]}) > 1:
        warnings.append("Some latencies are of single plans, some of batches during the episodes; compare them apart.")
    for digest, group in groups.items():
        table = Table(title=f"protocol {digest}", title_justify="left")
        for column in budget.HEAD:
            table.add_column(column, justify="left" if column in ("configuration", "failures") else "right")
        for row in group:
            table.add_row(*budget.cells(row), style="bold" if row["front"] else None)
        console.print(table)
    for text in warnings:
        console.print(f"[yellow]warning:[/] {text}", highlight=False)
    metrics: dict[str, Any] = {}
    for row in rows:
        metrics[f"budget/{row['hash']}/{row['name']}/success"] = row["success"]
        if row["ms"]:
            for part, quantiles in row["ms"].items():
                for q, value in quantiles.items():
                    metrics[f"budget/{row['hash']}/{row['name']}/{part}_{q}_ms"] = value
    return {
        "protocol_hash": list(groups),
        "groups": groups,
        "warnings": warnings,
        "metrics": metrics,
    }


def _budget_page(run_dir: Path, results: Mapping[str, Any]) -> None:
    count = sum(map(len, results["groups"].values()))
    write_page(
        run_dir / "report.html",
        title="Accuracy at budget",
        kicker=f"wamrl bench budget, {results['started']}",
        lead=f"{count} ways of acting under {len(results['groups'])} "
        f"protocol{'s' if len(results['groups']) > 1 else ''}: "
        "what success costs in time, model evaluations and memory.",
        warnings=results["warnings"],
        sections=[budget.section(f"Protocol {digest}", rows) for digest, rows in results["groups"].items()],
        command=results["command"],
        provenance=provenance_rows(results),
        config=results["config"],
    )


# -------------------------------------------------------------------------------------------------- fast_wam


def _fast_wam(settings: Mapping[str, Any], run_dir: Path, console: Console, results: dict[str, Any]) -> None:
    """Measure, keeping results.json and report.html after each seed and task."""
    fast_wam.check(settings)
    chosen, clock = settings["fast_wam"], time.perf_counter()
    results["seeds"] = chosen["seeds"]

    def done(metrics: Mapping[str, Any], finished: Sequence[Any]) -> None:
        wanted = len(chosen["seeds"]) * len(chosen["tasks"])
        partial = len(finished) < wanted
        results.update(metrics=metrics, finished=finished, partial=partial, wall_s=time.perf_counter() - clock)
        results["warnings"] = [f"{len(finished)} of {wanted} seeds and tasks are done."] if partial else []
        write_json(run_dir / "results.json", results)
        fast_wam.write_report(run_dir, results)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    fast_wam.measure(settings, run_dir, say, done)
    for name, content in fast_wam.tables(results["metrics"]).items():
        table = Table(title=name.replace("_", " "), title_justify="left")
        for column in content.head:
            table.add_column(column, justify="right" if table.columns else "left")
        for row in content.rows:
            table.add_row(*row)
        console.print(table)


# -------------------------------------------------------------------------------------------------- properties


def _properties(settings: dict[str, Any], console: Console) -> dict[str, Any]:
    for key in ("episodes", "num_envs"):
        whole_number(key, settings[key], 1)
    check_starts(0, settings["episodes"])
    metadata = checkpoint.read_metadata(settings["wam"]["checkpoint"])
    model = load_model(settings)
    model.spec.require("rollout", "policy")
    for shift in settings["shifts"]:
        if shift not in properties.SHIFTS:
            raise unknown_name("shift", str(shift), properties.SHIFTS)
    if settings["split"] in worlds.training_splits(metadata.provenance) or settings["split"] == "train":
        raise ValueError(f"split={settings['split']}: the WAM was trained on these start states; use dev or test")
    tasks = tuple(settings["env"]["tasks"])
    count, rows = settings["episodes"], min(settings["num_envs"], settings["episodes"])
    thresholds, env_module = settings["thresholds"], str(settings["env"]["_target_"]).rpartition(".")[0]
    decodes = "decode" in model.spec.provides and properties.tells_positions(model.spec.layout)
    recordings: list[Recording] = []
    others: list[Recording] = []
    checks: list[Check] = []
    warnings: list[str] = []
    shifted: dict[str, dict[str, Any]] = {}
    with console.status("recording episodes"):
        for task in tasks:
            env = make_env(settings, [task], rows)
            checkpoint.check_environment(model.spec, env)
            layout = env.layout
            if not properties.tells_positions(layout):
                raise ValueError(
                    f"the checks read hand, gripper and object off 'state', but {type(env).__name__} does not say "
                    "where these stand (its `layout`); use an environment that does, such as env=metaworld/push-v3"
                )
            around = policies.Surroundings((task,), model.spec.action_dim, env_module, "", {}, {}, settings["seed"])
            expert = policies.build([{"kind": "expert", "noise": settings["noise"]}], around)[0]
            keys = list(dict.fromkeys((*model.spec.observation, "state")))
            recordings.append(_play(settings, env, keys, expert.policy, task, range(count))[1])
            if not decodes:
                others.append(_play(settings, env, keys, expert.policy, task, range(count, 2 * count))[1])
            env.close()
    windows = properties.windows_of(recordings, settings["horizon"])
    if not decodes:
        model = properties.read_out(model, layout, others)
        error = properties.position_error_cm(model, windows)
        warnings.append(
            f"The model does not decode 'state', so hand and object are read linearly off its latents, fitted on "
            f"{count} other episodes per task. Off true frames that is {error:.1f} cm beside on average, which is part "
            "of every error here."
        )
    with console.status("interactability, causality, plausibility"):
        checks += properties.interactability(model, windows, thresholds, seed=settings["seed"])
        checks += properties.causality(model, windows, thresholds, seed=settings["seed"])
    with console.status("persistence"):
        env = make_env(settings, list(tasks), len(tasks) * max(1, rows // len(tasks)))
        checks += properties.persistence(model, env, thresholds, seed=settings["seed"])
        env.close()
    checks += properties.plausibility(model, windows, thresholds)
    for shift in settings["shifts"]:
        with console.status(f"shift: {shift}"):
            shifted[shift] = _shift(settings, model, tasks, shift, env_module)
    checks += _shift_checks(shifted, thresholds)
    table = Table(title=f"five properties of {settings['wam']['checkpoint']}", title_justify="left")
    for name in ("property", "check", "value", "threshold", "verdict", "detail"):
        table.add_column(name, justify="right" if name in ("value", "threshold") else "left")
    for check in checks:
        table.add_row(*_check_cells(check))
    console.print(table)
    for text in warnings:
        console.print(f"[yellow]warning:[/] {text}", highlight=False)
    return {
        "wam": {"name": str(settings["wam"]["checkpoint"]), "content_hash": metadata.content_sha256},
        "checks": [{**asdict(c), "verdict": c.verdict} for c in checks],
        "shifts": shifted,
        "peak_rss_mib": peak_rss_mib(),
        "warnings": warnings,
        "metrics": {
            **{f"properties/{c.group}/{c.name}": c.value for c in checks if c.value is not None},
            **{f"properties/{s}/success": e["success"] for s, e in shifted.items() if e["success"] is not None},
        },
    }


def _play(
    settings: Mapping[str, Any], env: Any, keys: Sequence[str], policy: Any, task: str, starts: range
) -> tuple[Any, Recording]:
    return worlds.run_real(
        env,
        policy,
        [Start(task, i) for i in starts],
        name="the policy",
        keys=keys,
        split=settings["split"],
        seed=settings["seed"],
        max_steps=env.max_steps,
        cost=worlds.Cost(),
    )


def _shift(
    settings: Mapping[str, Any], model: Any, tasks: Sequence[str], shift: str, env_module: str
) -> dict[str, Any]:
    """Success of the model's own policy and the model's error after `horizon` steps, under one declared shift."""
    if shift in properties.VISUAL and "pixels" not in model.spec.observation:
        why = f"the model reads {', '.join(model.spec.observation)}, which no {shift.replace('_', ' ')} changes"
        return {"success": None, "error_cm": None, "by_task": {}, "detail": f"not applicable: {why}"}
    successes, errors, by_task = 0, [], {}
    count, horizon = settings["episodes"], settings["horizon"]
    for task in tasks:
        env = make_env(settings, [task], min(settings["num_envs"], count))
        properties.apply_shift(env, shift)
        policy: Any = ModelPolicy(model, seed=settings["seed"])
        if shift == "action_noise":
            policy = policies.NoisyPolicy(policy, 0.3, 0.5, seed=settings["seed"])
        episodes, recording = _play(settings, env, list(model.spec.observation), policy, task, range(count))
        env.close()
        found = worlds.open_loop(model, recording, ["state"], horizon, model.spec.layout)[:, -1]
        solved = sum(e.success for e in episodes)
        by_task[task] = {
            "successes": solved,
            "n": count,
            "error_cm": float(np.nanmean(found)) if np.isfinite(found).any() else None,
        }
        successes += solved
        errors.append(found)
    n = count * len(tasks)
    low, high = wilson(successes, n)
    known = np.concatenate(errors)
    return {
        "success": {"n": n, "mean": successes / n, "low": low, "high": high},
        "error_cm": float(np.nanmean(known)) if np.isfinite(known).any() else None,
        "by_task": by_task,
        "detail": properties.SHIFTS[shift],
    }


def _shift_checks(shifted: Mapping[str, Mapping[str, Any]], thresholds: Mapping[str, float]) -> list[Check]:
    base = shifted.get("none")
    checks = []
    for shift, found in shifted.items():
        if shift == "none":
            continue
        drop = ratio = None
        if base is not None and found["success"] is not None:
            drop = base["success"]["mean"] - found["success"]["mean"]
            if base["error_cm"] and found["error_cm"] is not None:
                ratio = found["error_cm"] / base["error_cm"]
        detail = found["detail"] if base is not None else "add 'none' to shifts: there is nothing to compare with"
        checks.append(
            Check("generalization", f"{shift}_success_drop", drop, thresholds["shift_success_drop"], False, "", detail)
        )
        checks.append(
            Check(
                "generalization", f"{shift}_error_ratio", ratio, thresholds["shift_error_ratio"], False, "times", detail
            )
        )
    return checks


def _check_cells(check: Check) -> list[str]:
    value = "" if check.value is None else f"{check.value:.3g} {check.unit}".strip()
    sign = "at least" if check.at_least else "at most"
    return [check.group, check.name, value, f"{sign} {check.threshold:g}", check.verdict, check.detail]


def _properties_page(run_dir: Path, results: Mapping[str, Any]) -> None:
    checks = results["checks"]
    order = dict.fromkeys(c["group"] for c in checks)
    tiles = []
    for name in order:
        mine = [c["verdict"] for c in checks if c["group"] == name]
        asked = [v for v in mine if v != "not applicable"]
        tiles.append((f"{asked.count('pass')} of {len(asked)}", f"{name}: checks passed"))
    sections = []
    for name in order:
        rows = [
            [c["name"], "" if c["value"] is None else f"{c['value']:.3g} {c['unit']}".strip(),
             f"{'at least' if c['at_least'] else 'at most'} {c['threshold']:g}", c["verdict"], c["detail"]]
            for c in checks if c["group"] == name
        ]  # fmt: skip
        sections.append(
            Section(name.capitalize(), tables=[TableOf(["check", "value", "threshold", "verdict", ""], rows)])
        )
    tasks = list(next((e["by_task"] for e in results["shifts"].values() if e["by_task"]), {}))
    matrix = []
    for shift, e in results["shifts"].items():
        cells = [f"{e['by_task'][t]['successes']}/{e['by_task'][t]['n']}" if e["by_task"] else "" for t in tasks]
        whole = rate(e["success"]) if e["success"] else "not applicable"
        matrix.append([shift, whole, "" if e["error_cm"] is None else number(e["error_cm"]), *cells, e["detail"]])
    sections.append(
        Section(
            "The matrix of declared shifts",
            ["Success of the WAM's own policy and the model's error (larger of hand and object, centimetres, told "
            "the actions "
             f"that were executed, after {results['config']['horizon']} steps), per axis of change."],
            tables=[TableOf(["shift", "success", "error, cm", *map(short, tasks), "what changed"], matrix)],
        )
    )  # fmt: skip
    write_page(
        run_dir / "report.html",
        title=f"Five properties of {results['wam']['name']}",
        kicker=f"wamrl bench properties, {results['started']}",
        lead="Interactability, causality, persistence, physical plausibility and generalization of one World Action "
        "Model, "
        "each as checks with a threshold.",
        warnings=results["warnings"],
        tiles=tiles,
        sections=sections,
        command=results["command"],
        provenance=provenance_rows(results),
        config=results["config"],
    )


if __name__ == "__main__":
    main()
