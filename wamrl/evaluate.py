"""Judge policies inside a World Action Model, and the judgement against the simulator.

    python -m wamrl.evaluate policies=[expert,expert+0.5,random,six] env=metaworld/push-v3 split=dev

Load and check, calibrate the judge on dev starts, run every policy from the same start states in the simulator and in
imagination, compare, report. The run directory holds results.json, episodes.csv, report.html, figures/*.svg and films.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tensordict import TensorDict

from wamrl import budget, checkpoint, provenance
from wamrl.cli import command, plain
from wamrl.data import EpisodeDataset, start_frames
from wamrl.evaluation import Start, protocol_hash
from wamrl.files import write_json, write_text
from wamrl.interfaces import WAM, task_id
from wamrl.judging import films, policies, reality, verdict, worlds
from wamrl.judging.cells import Cell, Cells
from wamrl.judging.outcome import (
    Bench,
    Played,
    asked_judges,
    asked_roll_outs,
    drift_keys,
    episodes_csv,
    has_positions,
    results_of,
)
from wamrl.judging.policies import Entrant, Surroundings
from wamrl.judging.reality import Reality
from wamrl.judging.settings import checked
from wamrl.judging.verdict import Judged
from wamrl.judging.worlds import Cost, Imagining
from wamrl.naming import unknown_name
from wamrl.pages import evaluation_page, number
from wamrl.report import short
from wamrl.results import time_decisions
from wamrl.workers import load_model, make_env, start_states


@command(
    "evaluate",
    help="Judge policies inside a World Action Model: the same start states closed loop in imagination and in the "
    "simulator, and how well the two agree, over policies and start by start.",
    examples=[
        "env=metaworld/push-v3 policies=[expert,expert+0.5,random,six] split=dev",
        "policies=[expert,six,planner:six,outputs/train/latest,my_package.my_module:my_policy]",
        "'policies=[expert,random,{kind:sb3,path:ppo.zip,algorithm:PPO,trust:true}]'",
        "ensemble=8 uncertainty_penalty=0.2 keyframe_every=10",
        "real=false threshold=0.5 frames=data/dev_starts",
        "resume=outputs/evaluate/latest",
    ],
)
def main(config: DictConfig, run_dir: Path) -> float | None:
    """Run the evaluation; returns Pearson's r over policies, for sweepers (None without a simulator)."""
    started, clock = datetime.now(UTC), time.perf_counter()
    settings, home = checked(plain(config), run_dir)
    torch.set_num_threads(settings["threads"])
    bench = _prepare(settings)
    bench.cells = Cells(home, _identity(bench), settings)
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(
        f"[bold]{settings['wam']['checkpoint']}[/] judges {len(bench.entrants)} policies on {len(bench.tasks)} "
        f"task{'s' if len(bench.tasks) > 1 else ''}, {settings['episodes']} {settings['split']} starts each"
        + ("" if settings["real"] else ", without a simulator")
    )
    try:
        calibrated = _calibrate(bench, console)
        timed = -(-settings["latency_plans"] // len(bench.tasks))
        judged = _run(bench, bench.entrants, bench.starts, settings["split"], console, "policies", timed=timed)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "Every policy that finished a task is kept. Do the rest with: "
            f"python -m wamrl.evaluate resume={shlex.quote(str(home))}"
        ) from None
    results = results_of(bench, judged, calibrated, started, clock)
    write_text(run_dir / "episodes.csv", episodes_csv(bench, judged, results))
    write_json(run_dir / "results.json", results)
    made, note = _films(bench, judged, results, run_dir)
    if note:
        results["warnings"].append(f"No film: {note}")
        write_json(run_dir / "results.json", results)
    rows = budget.by_hash(budget.rows_of({"": results})).get(bench.digest)  # none without a simulator
    evaluation_page(run_dir, results, made, budget.section("Accuracy at budget", rows) if rows else None)
    bench.cells.remove()
    _print(results, console)
    return results["agreement"][results["headline"]]["pearson"]["mean"] if results["agreement"] else None


# -------------------------------------------------------------------------------------------------- load and check


def _identity(bench: Bench) -> dict[str, Any]:
    """What has to be the same for a stopped run to go on."""
    return {
        "protocol_hash": bench.digest,
        "wam": bench.metadata.content_sha256,
        "policies": [[e.name, e.content_hash or e.settings.get("file")] for e in bench.entrants],
        "command": bench.settings["command"],
    }


def _prepare(settings: dict[str, Any]) -> Bench:
    """Build everything once, so that a mistake is an error before any work."""
    if settings["wam"].get("policy") is not None:
        raise ValueError(
            f"wam.policy={settings['wam']['policy']}: the WAM that judges does not act; say how a model acts among the "
            "policies, as in {kind: checkpoint, checkpoint: <run>, policy: joint}"
        )
    metadata = checkpoint.read_metadata(settings["wam"]["checkpoint"])
    model = load_model(settings)
    model.spec.require("rollout", "reward", "success", "decode")
    if settings["uncertainty_penalty"] or settings["ensemble"] > 1:
        model.spec.require("uncertainty")
    if settings["contact_veto"] is not None and not has_positions(model):
        raise ValueError(
            "contact_veto reads where hand and object are, which this model's observation does not tell; leave it out"
        )
    worlds.check_keyframes(model, settings["keyframe_every"])
    env_module = str(settings["env"]["_target_"]).rpartition(".")[0]
    if settings["ensemble"] > model.spec.ensemble_size:
        raise ValueError(
            f"ensemble={settings['ensemble']}, but the model has {model.spec.ensemble_size} members; use at most those"
        )
    _refuse_trained_on(settings["split"], metadata.provenance, f"the judging WAM {settings['wam']['checkpoint']}")
    starts: list[Start] = []
    if settings["frames"] is None:
        env = make_env(settings, None, len(settings["env"]["tasks"]) if "tasks" in settings["env"] else 1)
        tasks, max_steps, action_repeat = tuple(env.tasks), env.max_steps, env.action_repeat
        checkpoint.check_environment(model.spec, env)
        first, count = settings["first_start"], settings["episodes"]
        starts = [Start(task, i) for task in tasks for i in range(first, first + count)]
        frames = worlds.first_frames(env, starts).select(*model.spec.observation, "task")
        vectors = {t: start_states(env, t, settings["split"], first + count).rand_vec[first:] for t in tasks}
        env.close()
    else:
        starts, frames = _starts_of_data(settings, model)
        tasks = tuple(dict.fromkeys(start.task for start in starts))
        max_steps, action_repeat = int(settings["env"]["max_steps"]), int(settings["env"].get("action_repeat", 1))
        flat = torch.cat([frames[key].flatten(1).double() for key in model.spec.observation], dim=1).numpy()
        vectors = {t: flat[[i for i, s in enumerate(starts) if s.task == t]] for t in tasks}
    versions = provenance.versions()
    digest = protocol_hash(
        starts={
            t: {"split": settings["split"], "indices": [s.index for s in starts if s.task == t], "rand_vec": v.tolist()}
            for t, v in vectors.items()
        },
        seeds=[settings["seed"]],
        max_steps=max_steps,
        action_repeat=action_repeat,
        versions={k: str(versions.get(k)) for k in ("mujoco", "metaworld")},
    )
    around = Surroundings(
        tasks=tasks,
        action_dim=model.spec.action_dim,
        env_module=env_module,
        wam=str(settings["wam"]["checkpoint"]),
        planner=settings["planner"],
        controller=settings["controller"],
        seed=settings["seed"],
        device=settings["device"],
    )
    entrants = policies.build(settings["policies"], around)
    for entrant in entrants:
        _refuse_trained_on(settings["split"], entrant.provenance, f"the policy '{entrant.name}'")
    bench = Bench(settings, model, metadata, entrants, tasks, starts, frames, max_steps, action_repeat, digest, around)
    failures = worlds.failures_in_training(metadata.provenance)
    if failures != "some":
        known = "holds no episodes that were made to fail" if failures == "none" else "does not say what it holds"
        bench.warnings.append(
            f"The judging WAM's training data {known}; a success head that saw few failures tends to imagine success. "
            "Collect some with data=rich, or data.mixture.failing=<episodes>, and train again."
        )
    if not worlds.training_splits(metadata.provenance):
        bench.warnings.append(
            "The judging WAM does not say which start states it was trained on, so only you can know that those of "
            "this evaluation were not among them."
        )
    silent = [e.name for e in entrants if e.kind in ("sb3", "callable")]
    silent += [e.name for e in entrants if e.provenance is not None and not worlds.training_splits(e.provenance)]
    if silent:
        bench.warnings.append(
            f"{', '.join(silent)} cannot say which start states {'it was' if len(silent) == 1 else 'they were'} made "
            "from, so only you can know that these were not among them."
        )
    kin: dict[str, list[str]] = {}
    for entrant in entrants:
        if entrant.content_hash is not None and entrant.origin == "independent":
            kin.setdefault(entrant.content_hash, []).append(entrant.name)
    bench.warnings += [
        f"{', '.join(names)} have the same weights: they count as {len(names)} policies of independent origin, which "
        "flatters the correlation; origin=degraded sets one apart."
        for names in kin.values()
        if len(names) > 1
    ]
    same = [e.name for e in entrants if e.content_hash == metadata.content_sha256]
    if same:
        bench.warnings.append(
            f"{', '.join(same)} share{'s' if len(same) == 1 else ''} the judging WAM's weights, so its errors and "
            "those of the judge are not independent."
        )
    return bench


def _refuse_trained_on(split: str, provenance_of: Mapping[str, Any] | None, who: str) -> None:
    if split in worlds.training_splits(provenance_of):
        raise ValueError(
            f"{who} was trained on {split} start states, so what it says of them proves nothing; "
            "use the other split, or a checkpoint trained on split=train"
        )


def _starts_of_data(settings: Mapping[str, Any], model: WAM) -> tuple[list[Start], TensorDict]:
    """The first frames of a dataset of held-out starts, one per start state."""
    keys = tuple(model.spec.observation)
    wanted = settings["env"].get("tasks")
    dataset = EpisodeDataset.open(settings["frames"], keys=keys, training=False)
    for index in dataset.indices:
        if index["split"] != settings["split"]:
            raise ValueError(
                f"{index['path']} was collected from {index['split']} start states, but split={settings['split']}; "
                "evaluate on a dataset of that split"
                + (": train starts are refused" if index["split"] == "train" else "")
            )
    frames = start_frames(settings["frames"], keys=keys, first_only=True, training=False)
    starts: list[Start] = []
    chosen: list[int] = []
    for i, info in enumerate(dataset.episodes):
        start = Start(info["task"], int(info["start"]))
        many = sum(s.task == start.task for s in starts)
        if start not in starts and many < settings["episodes"] and (wanted is None or start.task in wanted):
            starts.append(start)
            chosen.append(i)
    if not starts:
        raise ValueError(
            f"{settings['frames']} holds no episode of {', '.join(wanted or [])}; choose another env or frames"
        )
    for start in starts:
        if start.task not in model.spec.tasks:
            raise unknown_name("task for this checkpoint", start.task, model.spec.tasks)
    assert all(int(frames["task"][i]) == task_id(s.task) for i, s in zip(chosen, starts, strict=True))
    return starts, frames[torch.tensor(chosen)]


# -------------------------------------------------------------------------------------------------- run


def _run(
    bench: Bench,
    entrants: Sequence[Entrant],
    starts: Sequence[Start],
    split: str,
    console: Console,
    title: str,
    frames: TensorDict | None = None,
    timed: int = 0,
) -> Played:
    """Every entrant from every start, in both worlds. timed: decisions per task to take the time of."""
    settings = bench.settings
    frames = bench.frames if frames is None else frames
    roll_outs = asked_roll_outs(settings)
    played = Played(
        starts=list(starts),
        names=[e.name for e in entrants],
        real=[[] for _ in entrants],
        imagined={r: [[] for _ in entrants] for r in roll_outs},
        decisions=[[] for _ in entrants],
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task(title.ljust(36), total=len(entrants) * len(bench.tasks))
        for task in bench.tasks:
            mine = [i for i, start in enumerate(starts) if start.task == task]
            some, first = [starts[i] for i in mine], frames[torch.tensor(mine)]
            env: Any | None = None

            def simulator(task: str = task, rows: int = len(some)) -> Any:
                nonlocal env
                if env is None:
                    env = make_env({**settings, "split": split}, [task], min(settings["num_envs"], rows))
                return env

            for k, entrant in enumerate(entrants):
                progress.update(bar, description=f"{entrant.name} {short(task)}".ljust(36)[:36])
                cell = bench.cells.read(title, task, entrant.name) if bench.cells else None
                if cell is None:
                    cell = _play(bench, entrant, some, first, split, simulator if settings["real"] else None, timed)
                    if bench.cells:
                        bench.cells.write(cell, title, task, entrant.name)
                bench.reused += cell.reused
                played.real[k] += [None] * len(some) if cell.real is None else cell.real
                played.decisions[k] += cell.decisions
                for name in roll_outs:
                    played.imagined[name][k] += cell.imagined[name]
                if cell.open_loop is not None and cell.closed_loop is not None:
                    played.open_loop.setdefault(task, []).append(cell.open_loop)
                    played.closed_loop.setdefault(task, []).append(cell.closed_loop)
                for whole, part in ((bench.real_cost, cell.real_cost), (bench.imagined_cost, cell.imagined_cost)):
                    whole.add(part.env_s, part.policy_s, part.steps)
                progress.advance(bar)
            if env is not None:
                env.close()
        progress.update(bar, description=title.ljust(36))
    return played


def _play(
    bench: Bench,
    entrant: Entrant,
    starts: Sequence[Start],
    first: TensorDict,
    split: str,
    simulator: Callable[[], Any] | None,
    timed: int,
) -> Cell:
    """The episodes of one entrant on the starts of one task, in imagination and, with `simulator`, in that.

    There, `timed` single decisions on what it saw are timed as well.
    """
    settings, cell, real = bench.settings, Cell(), None
    common: dict[str, Any] = {
        "name": entrant.name,
        "split": split,
        "seed": settings["seed"],
        "max_steps": bench.max_steps,
    }
    if simulator is not None:
        real, cell.reused = _real(bench, entrant, starts, split, simulator, timed)
        cell.real, cell.decisions, cell.real_cost = real.episodes, real.decisions, real.cost
    for name, how in asked_roll_outs(settings).items():
        runs = [
            worlds.run_imagined(
                bench.model,
                first,
                entrant.policy,
                starts,
                num_envs=settings["num_envs"],
                replica=replica,
                cost=cell.imagined_cost,
                path_keys=drift_keys(bench.model) if real and replica == 0 and name == "plain" else (),
                **how,
                **common,
            )
            for replica in range(how["replicas"])
        ]
        if real is not None and name == "plain":
            cell.open_loop, cell.closed_loop = _drift(bench, real, runs[0], starts, first)
        for one in runs[0]:
            one.path = np.empty((0, 0))  # read above; large
        cell.imagined[name] = [list(replicas) for replicas in zip(*runs, strict=True)]
    return cell


def _real(
    bench: Bench, entrant: Entrant, starts: Sequence[Start], split: str, simulator: Callable[[], Any], timed: int
) -> tuple[Reality, bool]:
    """The real episodes of one entrant on the starts of one task, and whether they were read, not played."""
    settings, keys, drift = bench.settings, list(bench.model.spec.observation), drift_keys(bench.model)
    versions = provenance.versions()
    asked = {
        "policy": dict(entrant.settings),
        "task": starts[0].task,
        "split": split,
        "starts": [start.index for start in starts],
        "seed": settings["seed"],
        "max_steps": bench.max_steps,
        # Images cost time, and change nothing of what policies do that read none.
        "env": {
            k: v
            for k, v in settings["env"].items()
            if k != "tasks" and (entrant.images or k not in ("pixels", "camera"))
        },
        "versions": {k: str(versions.get(k)) for k in ("wamrl", "commit", "torch", "mujoco", "metaworld")},
        "keys": drift,
        "timed": timed,
    }
    path = None if settings["reality"] is None else reality.place(settings["reality"], asked)
    known = None if path is None else reality.read(path)
    if known is not None:
        known.episodes = [replace(episode, method=entrant.name) for episode in known.episodes]
        return known, True
    cost = Cost()
    episodes, recording = worlds.run_real(
        simulator(), entrant.policy, starts, keys=keys, cost=cost,
        name=entrant.name, split=split, seed=settings["seed"], max_steps=bench.max_steps,
    )  # fmt: skip
    found = Reality(
        episodes=episodes,
        actions=[torch.stack(recording.actions[start]).double().cpu().numpy() for start in starts],
        paths=[worlds.real_path(recording, start, drift) for start in starts],
        cost=cost,
    )
    if timed:
        seen = [{key: one[key] for key in (*keys, "task")} for one in recording.some(24)]
        found.decisions = time_decisions(entrant.policy, seen, timed, device=settings["device"])
    if path is not None:
        reality.write(path, found, asked)
    return found, False


def _drift(
    bench: Bench, real: Reality, imagined: Sequence[Imagining], starts: Sequence[Start], first: TensorDict
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[N, H] errors of imagination by steps ahead, told the executed actions and closed loop; NaN after an end."""
    keys, horizon, paths = drift_keys(bench.model), bench.max_steps, real.paths
    scale: Any = bench.model.spec.layout
    if not has_positions(bench.model):
        scale = np.maximum(np.concatenate(paths).std(axis=0), 1e-6)
    closed = np.full((len(starts), horizon), np.nan)
    for i, (one, path) in enumerate(zip(imagined, paths, strict=True)):
        length = min(len(path), len(one.path)) - 1
        closed[i, :length] = worlds.errors_of(one.path[1 : length + 1], path[1 : length + 1], scale)
    actions = [torch.as_tensor(one, dtype=torch.float32) for one in real.actions]
    return worlds.told_error(bench.model, starts, first, actions, paths, keys, horizon, scale), closed


def _calibrate(bench: Bench, console: Console) -> dict[str, Any]:
    """Judge -> thresholds per task, and where they come from."""
    settings, variants = bench.settings, asked_judges(bench.settings)
    given = settings["threshold"]
    if isinstance(given, int | float) and not isinstance(given, bool):
        if not 0 < given <= 1:
            raise ValueError(f"threshold is {given}, but a score lies in (0, 1]")
        values = {name: dict.fromkeys(bench.tasks, float(given)) for name in variants}
        return {"source": "given", "thresholds": {**values, "none": dict.fromkeys(bench.tasks, 0.5)}}
    if given != "calibrated":
        return _thresholds_of(Path(str(given)), bench, variants)
    how = settings["calibration"]
    first, count = how["first_start"], how["episodes"]
    starts = [Start(task, i) for task in bench.tasks for i in range(first, first + count)]
    env = make_env({**settings, "split": "dev"}, None, len(bench.tasks))
    frames = worlds.first_frames(env, starts).select(*bench.model.spec.observation, "task")
    env.close()
    entrants = policies.build(how["policies"], bench.around)
    for entrant in entrants:
        _refuse_trained_on("dev", entrant.provenance, f"the calibration policy '{entrant.name}'")
    _refuse_trained_on("dev", bench.metadata.provenance, f"the judging WAM {settings['wam']['checkpoint']}")
    played = _run(bench, entrants, starts, "dev", console, "calibration", frames)
    tasks = [start.task for start in starts]
    found: dict[str, dict[str, float]] = {}
    for name, variant in variants.items():
        found[name], blind = verdict.thresholds(played.outcomes, played.scores(variant), tasks)
    if blind:
        bench.warnings.append(
            f"On {', '.join(map(short, blind))} the calibration policies all succeeded or all failed, so the threshold "
            "there is 0.5; add others to calibration.policies."
        )
    bench.warnings += verdict.limits_met(found["judge"])
    bench.real_cost, bench.imagined_cost, bench.reused = Cost(), Cost(), 0  # the policies' alone are reported
    return {
        "source": f"{len(entrants)} policies on {count} dev starts per task, {first} to {first + count - 1}",
        "starts": [first, first + count],
        "policies": [e.name for e in entrants],
        "thresholds": {**found, "none": dict.fromkeys(bench.tasks, 0.5)},
    }


def _thresholds_of(directory: Path, bench: Bench, variants: Mapping[str, Any]) -> dict[str, Any]:
    path = directory / "results.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"threshold={directory}: there is no results.json; give calibrated, a number, or a directory of evaluate"
        )
    before = json.loads(path.read_text(encoding="utf-8"))
    if before.get("name") != "evaluate" or before["wam"]["content_hash"] != bench.metadata.content_sha256:
        raise ValueError(
            f"threshold={directory}: that run was of another command or WAM; its thresholds mean nothing here"
        )
    if before["variants"].get("judge", {}).get("settings") != variants["judge"]:
        raise ValueError(
            f"threshold={directory}: its judge had other remedies: {before['variants']['judge']['settings']}"
        )
    stored = before["variants"]["judge"]["thresholds"]
    absent = [task for task in bench.tasks if task not in stored]
    if absent:
        raise ValueError(f"threshold={directory}: it has none for {', '.join(absent)}; give a number, or another run")
    starts = before["calibration"].get("starts")
    mine = range(bench.settings["first_start"], bench.settings["first_start"] + bench.settings["episodes"])
    if starts and bench.settings["split"] == "dev" and mine.start < starts[1] and starts[0] < mine.stop:
        raise ValueError(
            f"threshold={directory}: it was calibrated on dev starts {starts[0]} to {starts[1] - 1}, which overlap "
            f"with {mine.start} to {mine.stop - 1} of this run; set first_start={starts[1]}, or split=test"
        )
    # A judge that the earlier run compared as well brings its own threshold.
    same = {n: before["variants"].get(n, {}).get("settings") == v for n, v in variants.items()}
    values = {
        name: {t: before["variants"][name if same[name] else "judge"]["thresholds"][t] for t in bench.tasks}
        for name in variants
    }
    return {
        "source": f"calibrated by {before['command']}",
        "starts": starts,
        "thresholds": {**values, "none": dict.fromkeys(bench.tasks, 0.5)},
    }


def _films(
    bench: Bench, played: Played, results: Mapping[str, Any], run_dir: Path
) -> tuple[list[dict[str, str]], str | None]:
    """Films of the most telling episodes, and why there are none."""
    settings, judge = bench.settings, results["variants"]["judge"]
    if not settings["real"] or not settings["films"]:
        return [], None
    if not bench.model.spec.layout.has("hand", "object", "goal"):
        return [], "films show where hand, object and goal are, which this model's observation does not tell"
    tasks = [start.task for start in played.starts]
    judged = Judged(played.scores(judge["settings"]), judge["thresholds"])
    decisions, real = judged.decisions(tasks), played.outcomes
    how = asked_roll_outs(settings)[judge["settings"]["roll_out"]]
    envs = {task: make_env(settings, [task], 1) for task in bench.tasks}
    choices = []
    for k, n in films.choose(real, decisions, judged.scores, settings["films"]):
        start = played.starts[n]
        choices.append(
            {
                "env": envs[start.task],
                "model": bench.model,
                "frame": bench.frames[n],
                "policy": bench.entrants[k].policy,
                "start": start,
                "name": bench.entrants[k].name,
                "split": settings["split"],
                "seed": settings["seed"],
                "max_steps": bench.max_steps,
                "threshold": judge["thresholds"][start.task],
                "solved": (bool(real[k, n]), bool(decisions[k, n])),
                **how,
            }
        )
    made, note = films.films_of(choices, run_dir)
    for env in envs.values():
        env.close()
    return made, note


def _print(results: Mapping[str, Any], console: Console) -> None:
    real = results["real"]
    table = Table(title=f"success on {results['protocol']['split']} starts", title_justify="left")
    for name in ("policy", *(("real",) if real else ()), "imagined", *(("kappa",) if real else ())):
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    order = "real" if real else "imagined"
    for name, entry in sorted(results["policies"].items(), key=lambda item: -item[1]["mean"][order]["mean"]):
        cells = [
            f"{v['mean']:.0%} [{v['low']:.0%}, {v['high']:.0%}]"
            for v in (entry["mean"][w] for w in ("real", "imagined") if w in entry["mean"])
        ]
        table.add_row(name, *cells, *([number(entry["kappa"])] if real else []))
    console.print(table)
    for scope, found in results["agreement"].items():
        r = found["pearson"]
        bounds = "" if r["low"] is None else f" [{r['low']:.2f}, {r['high']:.2f}]"
        console.print(
            f"{short(scope)}: {found['policies']} policies, Pearson {number(r['mean'])}{bounds}, "
            f"Spearman {number(found['spearman'])}, p {number(found['permutation_p'], 4)}, "
            f"MMRV {found['mmrv']['mean']:.3f}, mean gap {100 * found['gap']['mean']:.1f} points, "
            f"kappa {number(found['kappa']['mean'])}, P(imagined success | real failure) "
            f"{number(found['judge']['false_positive_rate'])}",
            highlight=False,
        )
    if real and len(results["variants"]) > 2:
        table = Table(title="remedies", title_justify="left")
        for name in ("judge", "Pearson", "MMRV", "gap", "bias", "kappa", "recall", "false positives", "ECE"):
            table.add_column(name, justify="left" if name == "judge" else "right")
        for name, v in results["variants"].items():
            cells = [
                number(v[k], 3)
                for k in ("pearson", "mmrv", "gap", "bias", "kappa", "recall", "false_positive_rate", "ece")
            ]
            table.add_row(name, *cells)
        console.print(table)
    if real:
        ends = {n: d["mean"]["sustained"] for n, d in results["drift"].items()}
        console.print(
            f"sustained horizon H* (error below {results['config']['epsilon']:g}): {ends['open_loop']} steps told the "
            f"real actions, {ends['closed_loop']} closed loop",
            highlight=False,
        )
    for text in results["warnings"]:
        console.print(f"[yellow]warning:[/] {text}", highlight=False)


if __name__ == "__main__":
    main()
