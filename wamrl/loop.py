"""The closed loop between imagination and a simulator: python -m wamrl.loop environment=metaworld/push-v3.

Round 0 collects the first data, unless some is given; every round trains the WAM on all data so far, improves its
policy in imagination, and measures policy and planner in the simulator; the next round collects with both. Every stage
is one of the commands that users run, in a directory of its own, and leaves <stage>.done; the same command with the
same run_dir goes on with the first stage that is not done, which itself goes on where it stopped.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from wamrl import cli
from wamrl.files import write_json, write_text
from wamrl.naming import is_number, whole_number
from wamrl.provenance import versions
from wamrl.stages import Stage, is_done, run_stage

MOST_SHARE = 3.0
"""The most times `episodes` that one task is given with `by_failures`."""


def stages(settings: Mapping[str, Any], number: int, folder: Path) -> list[Stage]:
    """The stages of round `number` in order; all that they read stands in `folder` or in the settings."""
    env = (f"env={settings['environment']}", *settings["environment_overrides"])
    common = (f"seed={settings['seed']}", f"threads={settings['threads']}")
    shares = shares_of(settings, number, folder)
    each = settings["episodes"] if not settings["by_failures"] else round(MOST_SHARE * settings["episodes"])
    taken = settings["first_episodes"] + max(0, number - 1) * len(settings["collect_by"]) * each
    first_start = settings["first_start"] + taken
    found = []

    def collect(name: str, *overrides: str) -> None:
        data = folder / f"{name}_data"
        extra = settings["first_collect" if number == 0 else "collect"]
        own = ("snapshots=false", *overrides, *extra, f"path={data}")
        found.append(Stage(name, "collect", (*env, *common, *own)))

    if number > 0:
        for part, acting in enumerate(settings["collect_by"]):
            # Who first knows only what experts did seldom succeeds under noise.
            noisy = round(settings["noisy_share"] * settings["episodes"]) if number > 1 else 0
            collect(
                f"round{number}_collect_{acting}", "data=planner",
                f"data.mixture.policy={settings['episodes'] - noisy}",
                *([f"data.mixture.noisy_policy={noisy}"] if noisy else []),
                f"acting={acting}", f"wam={model_of(settings, number - 1, folder)}",
                f"first_start={first_start + part * each}", *shares,
            )  # fmt: skip
    elif settings["dataset"] is None:
        collect("round0_collect", f"data={settings['mixture']}", f"first_start={settings['first_start']}")
    data = ",".join(str(path) for path in data_of(settings, number, folder))
    if not _given(settings, number):
        start = settings["checkpoint"] if number == 0 else model_of(settings, number - 1, folder)
        start = None if settings["anew"] else start
        # A checkpoint brings its own sizes: what stands of wam in the settings is for a new model.
        own = [word for word in settings["train"] if start is None or not word.lstrip("+").startswith("wam.")]
        wam = f"wam={start or 'reference'}"
        found.append(Stage(f"round{number}_train", "train", (f"data=[{data}]", wam, *common, *own)))
    simulator = (
        f"env@simulator={settings['environment']}",
        *(_at_simulator(w) for w in settings["environment_overrides"]),
    )
    if settings["learner"] is not None:
        found.append(
            Stage(
                f"round{number}_posttrain",
                "posttrain",
                (
                    f"agent={settings['learner']}",
                    "env=imagined",
                    *simulator,
                    f"wam={_trained(settings, number, folder)}",
                    f"data=[{data}]",
                    f"episodes={settings['evaluation_episodes']}",
                    *common,
                    *settings["posttrain"],
                ),
            )  # fmt: skip
        )
    found.append(
        Stage(
            f"round{number}_plan",
            "plan",
            (
                *env,
                f"wam={model_of(settings, number, folder)}",
                "split=dev",
                "methods=[planner,policy]",
                "workers=1",
                f"episodes={settings['evaluation_episodes']}",
                "video=false",
                "latency_plans=0",
                *common,
                *settings["plan"],
            ),
        )  # fmt: skip
    )
    return found


def _given(settings: Mapping[str, Any], number: int) -> bool:
    """Whether the model of round `number` is the checkpoint that the loop starts from, with nothing new to learn."""
    return number == 0 and settings["dataset"] is not None and settings["checkpoint"] is not None


def _trained(settings: Mapping[str, Any], number: int, folder: Path) -> str:
    """The model of round `number` before its policy is improved in imagination."""
    return str(settings["checkpoint"] if _given(settings, number) else folder / f"round{number}_train")


def model_of(settings: Mapping[str, Any], number: int, folder: Path) -> str:
    """The model that round `number` ends with: a run directory, or the checkpoint that the loop starts from."""
    if settings["learner"] is not None:
        return str(folder / f"round{number}_posttrain")
    return _trained(settings, number, folder)


def shares_of(settings: Mapping[str, Any], number: int, folder: Path) -> tuple[str, ...]:
    """With `by_failures`, each task's share of a round's episodes: as its failures in what the round before collected.

    Of f failures in n episodes, (f + 1) / (n + 2) counts, relative to the mean over tasks, at most `MOST_SHARE`. All
    have the same in round 1, before which nobody but experts has acted.
    """
    if not settings["by_failures"] or number < 2:
        return ()
    counts: dict[str, list[int]] = {}
    for acting in settings["collect_by"]:
        results = json.loads((folder / f"round{number - 1}_collect_{acting}" / "results.json").read_text())
        for task, behaviours in results["tasks"].items():
            count = counts.setdefault(task, [0, 0])
            for group in behaviours.values():
                count[0] += group["episodes"] - group["successes"]
                count[1] += group["episodes"]
    failed = {task: (failures + 1) / (episodes + 2) for task, (failures, episodes) in counts.items()}
    mean = sum(failed.values()) / len(failed)
    shares = (f"{task}:{min(MOST_SHARE, rate / mean):.2f}" for task, rate in sorted(failed.items()))
    return ("shares={" + ",".join(shares) + "}",)


def data_of(settings: Mapping[str, Any], number: int, folder: Path) -> list[Path]:
    """The datasets that round `number` trains on, its own included."""
    found = [folder / "round0_collect_data" if settings["dataset"] is None else Path(settings["dataset"])]
    for earlier in range(1, number + 1):
        found += [folder / f"round{earlier}_collect_{acting}_data" for acting in settings["collect_by"]]
    return found


def _at_simulator(word: str) -> str:
    """An override of env as one of posttrain's simulator."""
    return "simulator." + word.removeprefix("env.") if word.startswith("env.") else word


def check(settings: Mapping[str, Any], folder: Path) -> None:
    """Compose the commands of the first rounds as they would be, and compare what is there with the settings.

    Raises:
        ValueError: a command would be refused, or a stage was done or begun with other settings.
    """
    wrong: dict[str, str] = {}
    for number in range(settings["rounds"]):
        if number > 1 and not any(folder.glob(f"round{number}_*.done")):
            break  # what it would collect may depend on results that are not there yet
        for stage in stages(settings, number, folder):
            if not is_done(stage, folder) and number < 2:
                try:
                    _composed(stage, folder)
                except ValueError as error:
                    wrong.setdefault(stage.command, str(error))
    if wrong:
        raise ValueError("\n".join(f"python -m wamrl.{name} would say: {text}" for name, text in wrong.items()))
    first = stages(settings, 0, folder)[0]
    if settings["rounds"] > 1 and first.command == "collect" and not is_done(first, folder):
        most = max(_episodes(_composed(first, folder)).values())
        if most > settings["first_episodes"]:
            raise ValueError(
                f"round 0 collects {most} episodes of a task, but later rounds take their start states from number "
                f"first_episodes={settings['first_episodes']} on, some of them again; set first_episodes={most}"
            )
    most = most_steps(settings, 0, folder)
    if most > settings["budget"]:
        raise ValueError(
            f"the first collection can take {most:,} real steps, but the budget is {settings['budget']:,}; raise it, "
            "or collect fewer or shorter episodes (first_collect, mixture, environment_overrides)"
        )


def _composed(stage: Stage, folder: Path) -> dict[str, Any]:
    """The settings that the command of a stage begins with."""
    # A run that is not there yet is no choice of wam; a checkpoint of any name is.
    words = [f"{w}/model.safetensors" if w.startswith(f"wam={folder}/") else w for w in stage.overrides]
    return cli.check(stage.command, words)


def most_steps(settings: Mapping[str, Any], number: int, folder: Path) -> int:
    """The most control steps in the simulator that round `number` takes: those it took, and the longest episodes else.

    An environment whose own limit holds (env.max_steps=null) counts nothing before it has acted.
    """
    most = 0
    for stage in stages(settings, number, folder):
        if stage.command != "collect":
            continue
        if is_done(stage, folder):
            most += int(run_stage(stage, folder)["steps"])
            continue
        own = _composed(stage, folder)
        most += sum(_episodes(own).values()) * (own["env"].get("max_steps") or 0)
    return most


def _episodes(collect: Mapping[str, Any]) -> dict[str, int]:
    """How many episodes of each task a `collect` of these settings takes."""
    tasks = [collect["env"]["tasks"]] if isinstance(collect["env"]["tasks"], str) else collect["env"]["tasks"]
    shares, counts = collect["shares"] or {}, collect["data"]["mixture"].values()
    return {task: sum(round(shares.get(task, 1.0) * count) for count in counts) for task in tasks}


def run_round(settings: Mapping[str, Any], number: int, folder: Path, steps_before: int) -> dict[str, Any]:
    """All stages of a round, and what the report says of it."""
    collected, found = 0, {}
    for stage in stages(settings, number, folder):
        print(f"round {number}: {stage.command}", flush=True)
        found[stage.command] = results = run_stage(stage, folder)
        if stage.command == "collect":
            collected += int(results["steps"])
    plan, after = found["plan"]["summary"], found.get("posttrain", {})
    return {
        "round": number,
        "collected_steps": collected,
        "real_steps": steps_before + collected + int(after.get("real_steps", 0)),
        "before": after["before"].get("real") if after else None,
        "after": after["after"].get("real") if after else plan["policy"]["mean"],
        "planner": plan["planner"]["mean"],
        "real_gain": after.get("gain"),
        "imagined_gain": after.get("imagined_gain"),
        "imagined_gain_minus_real_gain": after.get("imagined_gain_minus_real_gain"),
        "world": after.get("world"),
    }


@cli.command(
    "loop",
    help="The closed loop: collect in the simulator, train the World Action Model, improve its policy in imagination, "
    "plan and measure in the simulator, collect with the new policy and planner, and again, within a budget of real "
    "steps. The same command with the same run_dir goes on where it stopped.",
    examples=[
        "environment=metaworld/push-v3 rounds=3 run_dir=outputs/loop/push",
        "environment=metaworld/six mixture=rich first_episodes=100 learner=ppo budget=200000 run_dir=outputs/loop/six",
    ],
)
def main(config: DictConfig, run_dir: Path) -> None:
    """Run the rounds that are missing, report after each."""
    settings = cli.plain(config)
    for name, least in (("rounds", 1), ("episodes", 1), ("first_episodes", 0), ("first_start", 0), ("budget", 1),
                        ("evaluation_episodes", 1)):  # fmt: skip
        whole_number(name, settings[name], least)
    if settings["learner"] == "sb3":
        raise ValueError(
            "learner=sb3 trains networks of its own and leaves the World Action Model as it was, so that no round "
            "could build on it; choose another one, such as learner=distil, latent or ppo"
        )
    if not settings["collect_by"] or set(settings["collect_by"]) - {"policy", "planner"}:
        raise ValueError(f"collect_by is {settings['collect_by']!r}, but must name policy, planner or both")
    if not (is_number(settings["noisy_share"]) and 0.0 <= settings["noisy_share"] <= 1.0):
        raise ValueError(f"noisy_share is {settings['noisy_share']!r}, but must be a number from 0 to 1")
    check(settings, run_dir)
    rounds: list[dict[str, Any]] = []
    steps, stopped = 0, "all rounds done"
    for number in range(settings["rounds"]):
        most, left = most_steps(settings, number, run_dir), settings["budget"] - steps
        if left <= 0 or most > left:
            stopped = (
                f"round {number} and later ones are left out: it can take {most:,} real steps, and of "
                f"{settings['budget']:,} there are {max(0, left):,} left"
            )
            print(stopped, flush=True)
            break
        try:
            rounds.append(run_round(settings, number, run_dir, steps))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped in round {number}; all stages before are kept. Go on with the same command and "
                f"run_dir={run_dir}"
            ) from None
        steps = rounds[-1]["real_steps"]
        write_report(run_dir, settings, rounds, "going on")
    write_report(run_dir, settings, rounds, stopped)
    print("\n".join(_lines(rounds)))


def write_report(run_dir: Path, settings: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], stopped: str) -> None:
    """results.json and report.html of the rounds so far."""
    results = {"name": "loop", "stopped": stopped, "rounds": list(rounds), "config": settings, "versions": versions()}
    write_json(run_dir / "results.json", results)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(one)) + "</tr>" for one in rounds
    )
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    write_text(
        run_dir / "report.html",
        "<!doctype html><meta charset='utf-8'><title>wamrl loop</title><style>body{font:15px sans-serif;margin:2em}"
        "td,th{padding:.3em .8em;text-align:right;border-bottom:1px solid #ccc}</style>"
        f"<h1>{html.escape(str(settings['environment']))}: real success against real steps</h1>{_curve(rounds)}"
        f"<table><tr>{head}</tr>{rows}</table><p>{html.escape(stopped)}. Success on dev starts, 95 % intervals.</p>",
    )


_COLUMNS = ("round", "real steps", "policy before", "policy after", "planner", "imagined gain", "real gain",
            "imagined - real", "world error")  # fmt: skip


def _cells(one: Mapping[str, Any]) -> list[str]:
    def rate(summary: Mapping[str, Any] | None) -> str:
        if not summary:
            return "-"
        return f"{100 * summary['success']:.0f} % [{100 * summary['low']:.0f}, {100 * summary['high']:.0f}]"

    def signed(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:+.0f}"

    gain = one["real_gain"]["difference"] if one["real_gain"] else None
    world = one["world"] or {"growth": None, "decayed": None}
    parts = [name for name, part in world.get("parts", {}).items() if part["decayed"]]
    decayed = [*(["all"] if world["decayed"] else []), *parts]
    error = "-"
    if world["decayed"] is not None:
        after = "not finite" if world["error_after"] is None else f"{world['error_after']:.3f}"
        error = f"{world['error_before']:.3f} -> {after}"
    return [str(one["round"]), f"{one['real_steps']:,}", rate(one["before"]), rate(one["after"]), rate(one["planner"]),
            signed(one["imagined_gain"]), signed(gain), signed(one["imagined_gain_minus_real_gain"]),
            error + (f" DECAYED ({', '.join(decayed)})" if decayed else "")]  # fmt: skip


def _lines(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    table = [list(_COLUMNS), *(_cells(one) for one in rounds)]
    widths = [max(len(row[i]) for row in table) for i in range(len(_COLUMNS))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]


def _curve(rounds: Sequence[Mapping[str, Any]]) -> str:
    """An SVG of the success of policy and planner over real steps."""
    if not rounds:
        return ""
    most = max(1, *(one["real_steps"] for one in rounds))
    lines = ""
    for key, colour in (("after", "#1f77b4"), ("planner", "#d62728")):
        points = [(60 + 500 * one["real_steps"] / most, 220 - 200 * one[key]["success"]) for one in rounds if one[key]]
        path = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
        dots = "".join(f"<circle cx='{x:.0f}' cy='{y:.0f}' r='4' fill='{colour}'/>" for x, y in points)
        lines += f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>{dots}"
    return (
        f"<svg viewBox='0 0 620 260' width='620'><path d='M60 20V220H560' fill='none' stroke='#888'/>{lines}"
        f"<text x='10' y='26'>100 %</text><text x='28' y='224'>0 %</text><text x='500' y='245'>{most:,} steps</text>"
        "<text x='70' y='40' fill='#1f77b4'>policy</text><text x='70' y='58' fill='#d62728'>planner</text></svg>"
    )


if __name__ == "__main__":
    main()
