"""Write the tables and curves of README.md and docs/ from benchmarks/results/*.json; `--check` fails when they differ.

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`; NAME is a key of `TABLES`. A table whose
result was not made yet stays empty, and the command says how to make it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import curves
from benchmarks import posttrain as posttraining
from benchmarks.stored import RESULTS, ROOT
from wamrl import fast_wam
from wamrl.files import write_text
from wamrl.naming import unknown_name
from wamrl.report import short

PAGES = ("README.md", "docs/*.md")
BLOCK = re.compile(r"(<!-- table: (?P<name>[a-z_]+) -->\n)(?P<body>.*?)(<!-- end table -->)", re.DOTALL)
SETTINGS = {"rich": "rich", "scarce": "scarce", "scarce_own_episodes": "scarce and own episodes"}
METHOD_NAMES = {
    "planner": "planner in the WAM",
    "policy": "the WAM's own policy",
    "shuffled": "planner, shuffled scores (null control)",
    "random": "random actions",
    "expert": "scripted expert",
}


class MissingResult(FileNotFoundError):
    """A result that no benchmark has stored yet; the message names the command that makes it."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path.name} is missing; make it with: python -m benchmarks.{path.stem}")


def _rate(value: Mapping[str, float]) -> str:
    return f"{100 * value['mean']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def _grid(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _settings(metrics: Mapping[str, Any]) -> list[str]:
    found = [s for s in SETTINGS if f"{s}/mean/planner/success" in metrics]
    if not found:
        raise ValueError(f"plan_metaworld.json holds none of the settings {', '.join(SETTINGS)}; was it cut short?")
    return found


def success(result: Mapping[str, Any]) -> str:
    """Mean success of every method in each data setting."""
    metrics = result["metrics"]
    settings = _settings(metrics)
    rows = [
        [METHOD_NAMES[m], *(_rate(metrics[f"{s}/mean/{m}/success"]) for s in settings)]
        for m in METHOD_NAMES
        if f"{settings[0]}/mean/{m}/success" in metrics
    ]
    numbers = [metrics[f"{s}/mean/planner/success"]["n"] for s in settings]
    head = ["success, %, Wilson 95 % interval"]
    head += [f"{SETTINGS[s]}, n = {n}" for s, n in zip(settings, numbers, strict=True)]
    return _grid(head, rows)


def tasks(result: Mapping[str, Any]) -> str:
    """Success by task of the planner and the policy in each data setting."""
    metrics = result["metrics"]
    settings = _settings(metrics)
    names = sorted({key.split("/")[1] for key in metrics if key.endswith("-v3/planner/success")})
    head = ["task"] + [f"{SETTINGS[s]}: {m}" for s in settings for m in ("planner", "policy", "shuffled")]
    rows = [
        [
            name,
            *(_rate(metrics[f"{s}/{name}/{m}/success"]) for s in settings for m in ("planner", "policy", "shuffled")),
        ]
        for name in names
    ]
    return _grid(head, rows)


def paired(result: Mapping[str, Any]) -> str:
    """The planner minus the policy and minus the shuffled control, on the same starts."""
    metrics = result["metrics"]
    rows = []
    for setting in _settings(metrics):
        for other in ("policy", "shuffled"):
            prefix = f"{setting}/mean/planner_minus_{other}"
            difference = metrics[f"{prefix}/success"]
            p = metrics[f"{prefix}/mcnemar_p"]
            shown = "< 0.001" if p < 1e-3 else f"{p:.3f}"
            steps = metrics.get(f"{prefix}/steps")
            sooner = "" if steps is None else f"{steps['mean']:+.1f} [{steps['low']:+.1f}, {steps['high']:+.1f}]"
            row = [SETTINGS[setting], METHOD_NAMES[other], _rate(difference), str(difference["n"]), shown, sooner]
            rows.append(row)
    head = ["setting", "planner minus", "percentage points, 95 % interval", "n", "McNemar's p"]
    return _grid([*head, "control steps to success where both succeed"], rows)


def latency(result: Mapping[str, Any]) -> str:
    """Milliseconds of a plan for one environment, by part."""
    metrics, parts = result["metrics"], ("encode", "imagine", "search", "total")
    rows = [[q, *(f"{metrics[f'plan/{part}_{q}_ms']:.1f}" for part in parts)] for q in ("p50", "p95", "p99")]
    return _grid(["quantile", *(f"{part}, ms" for part in parts)], rows)


def overhead(result: Mapping[str, Any]) -> str:
    """The planner's time over that of a hand-written loop and of pytorch_mppi."""
    metrics = result["metrics"]
    head = ["setting"] + [
        f"{ours} / {other}"
        for other in ("hand-written loop", "pytorch_mppi")
        for ours in ("wamrl", "wamrl compiled")
    ]  # fmt: skip
    names = {key.split("/")[0]: None for key in metrics}
    rows = []
    for name in names:
        sizes = re.fullmatch(r"(\d+)x(\d+)_w(\d+)_i(\d+)", name)
        text = f"{sizes[1]} candidates, {sizes[2]} steps, width {sizes[3]}, iterations {sizes[4]}" if sizes else name
        ratios = [
            f"{metrics[f'{name}/{ours}/ratio_to_{other}']:.3f}"
            for other in ("hand_loop", "pytorch_mppi")
            for ours in ("wamrl", "wamrl_compiled")
        ]
        rows.append([text, *ratios])
    return _grid(head, rows)


def planners(result: Mapping[str, Any]) -> str:
    """Milliseconds per plan of every planner and peer, and how wamrl's planner of the same kind compares."""
    metrics = result["metrics"]
    rows = []
    for key in metrics:
        if key.startswith("shooting/") and key.endswith("/plan_p50_ms"):
            _, setting, method, _ = key.split("/")
            ours, p95 = f"wamrl_{method.rsplit('_', 1)[1]}", metrics[f"shooting/{setting}/{method}/plan_p95_ms"]
            ratios = [metrics.get(f"shooting/{setting}/{ours}{how}/ratio_to_{method}") for how in ("", "_compiled")]
            rows.append(
                [
                    setting,
                    method,
                    f"{metrics[key]:.1f}",
                    f"{p95:.1f}",
                    *("" if r is None else f"{r:.2f}" for r in ratios),
                ]
            )
    head = ["setting", "method", "p50, ms", "p95, ms", "wamrl's of this kind / it", "wamrl's compiled / it"]
    return _grid(head, rows)


def planner_budget(result: Mapping[str, Any]) -> str:
    """Success of every planner at every budget of model evaluations, and of its shuffled twin."""
    metrics, rows = result["metrics"], []
    for key in metrics:
        if key.startswith("curve/") and key.endswith("/planner/success"):
            _, name, budget, *_ = key.split("/")
            place = f"curve/{name}/{budget}"
            shuffled = metrics.get(f"{place}/shuffled/success")
            spent, milliseconds = metrics[f"{place}/evaluations_per_step"], metrics[f"{place}/plan_p50_ms"]
            rows.append([
                name, f"{spent:.0f}", str(metrics[key]["n"]), _rate(metrics[key]), _rate(shuffled) if shuffled else "",
                f"{milliseconds:.0f}",
            ])  # fmt: skip
    head = ["planner", "evaluations per control step", "n", "success, %", "shuffled scores, %", "ms per plan"]
    return _grid(head, rows)


def planner_gate(result: Mapping[str, Any]) -> str:
    """Success and model evaluations of a gated planner, beside the same one that always searches, and controls."""
    metrics = result["metrics"]
    policy = metrics["gate/always/policy/success"]
    rows = [["the policy alone", "0", "", str(policy["n"]), _rate(policy), ""]]
    for key in metrics:
        if key.startswith("gate/") and key.endswith("/planner/success"):
            name = key.split("/")[1]
            share, apart = (metrics.get(f"gate/{name}/{part}") for part in ("share_of_evaluations", "minus_always"))
            rows.append([
                name, f"{metrics[f'gate/{name}/evaluations_per_step']:.0f}", "" if share is None else f"{share:.2f}",
                str(metrics[key]["n"]), _rate(metrics[key]), "" if apart is None else _points(apart),
            ])  # fmt: skip
    head = ["planner", "evaluations per control step", "of always", "n", "success, %", "minus always, points"]
    return _grid(head, rows)


def deadlines(result: Mapping[str, Any]) -> str:
    """What planners make of a deadline."""
    metrics = result["metrics"]
    rows = []
    for key in metrics:
        if key.startswith("deadline/") and key.endswith("/late"):
            _, planner, deadline, _ = key.split("/")
            p50, p99, count, spent = (
                metrics[f"deadline/{planner}/{deadline}/{part}"]
                for part in ("planning_p50_ms", "planning_p99_ms", "plans", "evaluations")
            )
            rows.append(
                [
                    planner,
                    deadline.removesuffix("ms"),
                    f"{p50:.1f}",
                    f"{p99:.1f}",
                    f"{metrics[key]} of {count}",
                    f"{spent:,.0f}",
                ]
            )
    return _grid(["planner", "deadline, ms", "p50, ms", "p99, ms", "late plans", "evaluations per plan"], rows)


def _points(value: Mapping[str, float]) -> str:
    return f"{100 * value['mean']:+.1f} [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"


def planners_batched(result: Mapping[str, Any]) -> str:
    """Sixteen environments in one plan, and simulations of a tree per second."""
    metrics = result["metrics"]
    rows = []
    if "rows/wamrl_at_once/plans_p50_ms" in metrics:
        rows += [
            [
                f"16 environments: wamrl at once / {name.replace('_', ' ')}",
                f"{metrics[f'rows/wamrl_at_once/ratio_to_{name}']:.2f}",
            ]
            for name in ("wamrl_in_turn", "pytorch_mppi_in_turn")
        ]
    if "default/compiled_over_eager" in metrics:
        place = "default plan in the shipped model"
        rows.append([f"{place}: compiled / as it is", f"{metrics['default/compiled_over_eager']:.2f}"])
        first = metrics["default/wamrl_compiled/first_call_s"]
        rows.append([f"{place}: compiled, first call (compilation), s", f"{first:.1f}"])
    if "tree/mctx/simulations_per_s" in metrics:
        for name in ("wamrl", "wamrl_compiled", "mctx"):
            method, metric = name.replace("_", " "), f"tree/{name}"
            rows.append([f"tree, 64 roots: {method}, simulations/s", f"{metrics[f'{metric}/simulations_per_s']:.0f}"])
            if name != "mctx":
                rows.append(
                    [f"tree: {method}'s simulations/s over mctx's", f"{metrics[f'{metric}/ratio_to_mctx']:.2f}"]
                )
            if name != "wamrl":
                rows.append(
                    [f"tree: {method}'s first call (compilation), s", f"{metrics[f'{metric}/first_call_s']:.1f}"]
                )
    return _grid(["what", "measured"], rows)


def _wams(result: Mapping[str, Any]) -> dict[str, str]:
    """Judging WAM -> what its metrics begin with; the first one's with nothing. Earlier results are of one alone."""
    names = list(result["config"].get("wams") or [result["config"]["wam"]])
    return {name: f"wam/{name}/" if k else "" for k, name in enumerate(names)}


def judged(result: Mapping[str, Any]) -> str:
    """Every policy's success in the simulator and in each WAM's imagination, in the order of the first."""
    metrics, wams = result["metrics"], _wams(result)
    names = [key.split("/")[1] for key in metrics if key.startswith("mean/") and key.endswith("/real_success")]
    names.sort(key=lambda name: -metrics[f"mean/{name}/real_success"]["mean"])
    rows = []
    for name in names:
        real, origin = metrics[f"mean/{name}/real_success"], result["config"]["origins"][name]
        row = [name if origin == "independent" else f"{name} ({origin})", _rate(real)]
        for prefix in wams.values():
            imagined = metrics[f"{prefix}mean/{name}/imagined_success"]
            row += [_rate(imagined), f"{100 * (imagined['mean'] - real['mean']):+.0f}"]
        rows.append(row)
    n = metrics[f"mean/{names[0]}/real_success"]["n"]
    head = ["policy", f"simulator, %, n = {n}"]
    for name in wams:
        head += ["imagined, %" if len(wams) == 1 else f"imagined by {name}, %", "gap, points"]
    return _grid(head, rows)


def _value(value: Any, scale: float = 1.0, digits: int = 2) -> str:
    """A statistic that is stored alone, or with its interval."""
    if not isinstance(value, Mapping):
        return "" if value is None else f"{scale * value:.{digits}f}"
    if value["mean"] is None:
        return "undefined"
    bounds = "" if value["low"] is None else f" [{scale * value['low']:.{digits}f}, {scale * value['high']:.{digits}f}]"
    return f"{scale * value['mean']:.{digits}f}{bounds}"


_JUDGED_BY = (("pearson", 1.0, 3), ("mmrv", 1.0, 3), ("gap", 100.0, 1), ("kappa", 1.0, 2))


def judging_wams(result: Mapping[str, Any]) -> str:
    """The judging WAMs side by side, over the independent policies."""
    metrics, about = result["metrics"], result["config"].get("wams", {})
    scope = "independent" if "independent/pearson" in metrics else "all"
    rows = []
    for name, prefix in _wams(result).items():
        found = [_value(metrics[f"{prefix}{scope}/{key}"], scale, digits) for key, scale, digits in _JUDGED_BY]
        found += [_value(metrics[f"{prefix}{scope}/false_positive_rate"])]
        found += [str(metrics[f"{prefix}mean/open_loop_sustained_steps"])]
        found += [_value(metrics[f"{prefix}cost/imagined_share_of_real"], digits=3)]
        rows.append([name, ", ".join(about.get(name, {}).get("observation", [])), *found])
    head = ["WAM", "reads", "Pearson", "MMRV", "gap, points", "kappa", "false positives", "H*, steps", "cost"]
    return _grid(head, rows)


def judged_tasks(result: Mapping[str, Any]) -> str:
    """How well each WAM judges on each task, over all policies."""
    metrics, rows = result["metrics"], []
    for name, prefix in _wams(result).items():
        for task in map(short, result["config"]["tasks"]):
            found = [_value(metrics[f"{prefix}{task}/{key}"], scale, digits) for key, scale, digits in _JUDGED_BY]
            found.append(f"{100 * metrics[f'{prefix}{task}/bias']:+.1f}")
            rows.append([name, task, *found, _value(metrics[f"{prefix}{task}/false_positive_rate"])])
    head = ["WAM", "task", "Pearson", "MMRV", "gap, points", "kappa", "bias, points", "false positives"]
    return _grid(head, rows)


def judges(result: Mapping[str, Any]) -> str:
    """How well each way of judging by the first WAM agrees with the simulator, over the independent policies."""
    metrics, rows = result["metrics"], []
    columns = (*_JUDGED_BY, ("recall", 1.0, 2), ("false_positive_rate", 1.0, 2))
    for key in metrics:
        if key.startswith("judges/") and key.endswith("/pearson"):
            name = key.removeprefix("judges/").removesuffix("/pearson")
            found = [_value(metrics[f"judges/{name}/{key}"], scale, digits) for key, scale, digits in columns]
            rows.append([name.replace("_", " "), *found])
    return _grid(["judge", "Pearson", "MMRV", "gap, points", "kappa", "recall", "false positives"], rows)


def collection(result: Mapping[str, Any]) -> str:
    """Control steps per CPU second of the collector and of a bare expert loop, and images per CPU second."""
    metrics = result["metrics"]
    rows = [
        [
            task,
            f"{metrics[f'state/{task}/bare_loop_steps_per_cpu_s']:.0f}",
            f"{metrics[f'state/{task}/collect_steps_per_cpu_s']:.0f}",
            f"{metrics[f'state/{task}/ratio']:.2f}",
            f"{metrics[f'pixels/{task}/frames_per_cpu_s']:.0f}",
        ]
        for task in (key.split("/")[1] for key in metrics if key.startswith("state/") and key.endswith("/ratio"))
    ]
    head = ["task", "bare loop, steps/s", "collect, steps/s", "ratio", "64x64 images/s"]
    return _grid(head, rows)


def ablation(result: Mapping[str, Any]) -> str:
    """Success of every variant of the ablation."""
    metrics = result["metrics"]
    rows = [
        [
            name if method == "planner" else "the policy alone",
            _rate(metrics[f"{name}/mean/{method}/success"]),
        ]
        for key in metrics
        if key.endswith("/success")
        for name, _, method, _ in [key.rsplit("/", 3)]
    ]
    n = metrics["default/mean/planner/success"]["n"]
    return _grid(["changed", f"success on dev starts, %, n = {n}"], rows)


def adapter(result: Mapping[str, Any]) -> str:
    """What the adapters add to a bare loop, per step and environment."""
    metrics = result["metrics"]
    names = [key.split("/")[1] for key in metrics if key.startswith("adapter/") and key.endswith("/ratio")]
    rows = [
        [name, *(f"{metrics[f'adapter/{name}/{part}_us']:.0f}" for part in ("raw", "wamrl", "overhead"))]
        + [f"{metrics[f'adapter/{name}/ratio']:.2f}"]
        for name in names
    ]
    for place in (key.removesuffix("/ratio") for key in metrics if key.startswith("mjx/") and key.endswith("/ratio")):
        ours, raw = (1e6 / metrics[f"{place}/{name}"] for name in ("steps_per_s", "raw_steps_per_s"))
        _, task, device, count = place.split("/")
        numbers = [f"{raw:.0f}", f"{ours:.0f}", f"{ours - raw:.0f}", f"{metrics[f'{place}/ratio']:.2f}"]
        rows.append([f"mjx/{task} on {device}, {count} rows", *numbers])
    return _grid(["environment", "bare loop, us", "wamrl, us", "difference, us", "ratio"], rows)


def env_speed(result: Mapping[str, Any]) -> str:
    """Steps per second of everything that runs many rows, and over what it is compared with."""
    metrics = result["metrics"]
    rows = []
    for key in metrics:
        parts = key.split("/")
        if parts[0].startswith("imagined") and parts[2] == "over_metaworld":
            rate, raw = (metrics[f"{parts[0]}/{parts[1]}/{name}"] for name in ("steps_per_s", "metaworld_steps_per_s"))
            what = [f"{parts[0]}, {parts[1]} rows", "Meta-World's own step"]
            rows.append([*what, f"{rate:.0f}", f"{raw:.0f}", f"{metrics[key]:.1f}"])
        if parts[0] == "mjx" and parts[-1] == "ratio":
            rate, raw = (metrics[f"{'/'.join(parts[:4])}/{name}"] for name in ("steps_per_s", "raw_steps_per_s"))
            what = [f"mjx/{parts[1]} on {parts[2]}, {parts[3]} rows", "the compiled function alone"]
            rows.append([*what, f"{rate:.0f}", f"{raw:.0f}", f"{1 / metrics[key]:.2f}"])
    ours = metrics["workers/wamrl/steps_per_s"]
    for name, text in (("gymnasium_async", "Gymnasium's AsyncVectorEnv"), ("torchrl_parallel", "TorchRL ParallelEnv")):
        theirs, ratio = metrics[f"workers/{name}/steps_per_s"], metrics[f"workers/wamrl_over_{name}"]
        rows.append(["worker processes", text, f"{ours:.0f}", f"{theirs:.0f}", f"{ratio:.2f}"])
    return _grid(["environment", "compared with", "steps/s", "its steps/s", "ratio"], rows)


def isaac(result: Mapping[str, Any]) -> str:
    """Steps per second of Isaac Lab's tasks, over those of the raw environment."""
    metrics, rows = result["metrics"], []
    for place in (key.removesuffix("/ratio") for key in metrics if key.endswith("/ratio")):
        task, device, count = place.split("/")
        rate, raw = (metrics[f"{place}/{name}"] for name in ("steps_per_s", "raw_steps_per_s"))
        apart = 1e6 / rate - 1e6 / raw
        rows.append(
            [f"{task} on {device}, {count} rows", f"{rate:,.0f}", f"{raw:,.0f}", f"{rate / raw:.2f}", f"{apart:.1f}"]
        )
    head = ["environment", "steps/s", "of the raw environment", "ratio", "us more per step and row"]
    return _grid(head, rows)


def posttrain(result: Mapping[str, Any]) -> str:
    """Success before and after every variant that has finished, by task, what it began with and what it cost."""
    metrics = result["metrics"]
    data_steps = result.get("config", {}).get("data_steps", {})
    head = [
        "variant",
        "task",
        "before, %",
        "after, %",
        "gain, points",
        "n",
        "seeds",
        "begins with",
        "steps of its data",
        "real steps",
        "world model's error",
    ]
    rows = []
    for name in dict.fromkeys(key.partition("/")[0] for key in metrics):
        seeds = metrics[f"{name}/seeds"]
        where = [key.split("/")[1] for key in metrics if key.startswith(f"{name}/") and key.endswith("/after/success")]
        for task in where:
            before, after = (_rate(metrics[f"{name}/{task}/{moment}/success"]) for moment in ("before", "after"))
            n = metrics[f"{name}/{task}/after/success"]["n"]
            found = [f"`{name}`" if task == "mean" else "", task, before, after]
            if task == "mean":
                gain = metrics.get(f"{name}/mean/gain/success")
                growth = metrics[f"{name}/world_error_growth"]
                decay = "not finite" if growth is None else f"{100 * growth:+.1f} %"
                data = data_steps.get(posttraining.data_of(name))
                found += [
                    _points(gain) if gain else "",
                    str(n),
                    str(seeds),
                    f"`{posttraining.STARTS.get(name, 'weak')}`",
                    "" if data is None else f"{data:,.0f}",
                    f"{metrics[f'{name}/real_steps']:,.0f}",
                    decay,
                ]
            rows.append([*found, *[""] * (len(head) - len(found))])
    return _grid(head, rows)


def closed_loop(result: Mapping[str, Any]) -> str:
    """Success of planner and policy after every round of the closed loop, of the last one by task as well."""
    metrics, rows = result["metrics"], []
    tasks = sorted({key.split("/")[1] for key in metrics if key.endswith("/planner/success")} - {"mean"})
    tasks = [task for task in tasks if not task.startswith("seed")]
    rounds = sum(key.endswith("/real_steps") for key in metrics)
    for number in range(rounds):
        place = f"round{number}"
        for scope in ("mean", *(tasks if number == rounds - 1 else ())):
            planner, policy = (metrics[f"{place}/{scope}/{method}/success"] for method in ("planner", "policy"))
            first = [str(number), f"{metrics[f'{place}/real_steps']:,.0f}"] if scope == "mean" else ["", ""]
            rows.append([*first, scope, _rate(planner), _rate(policy), str(planner["n"])])
    return _grid(["round", "real steps", "task", "planner, %", "policy, %", "n"], rows)


def posttrain_isaac(result: Mapping[str, Any]) -> str:
    """Return and success in Isaac Lab before and after, and the paired gain of every seed."""
    metrics, rows = result["metrics"], []
    for seed in result["seeds"]:
        gain = metrics[f"return_gain_seed{seed}"]
        interval = f"{gain['mean']:+.0f} [{gain['low']:+.0f}, {gain['high']:+.0f}]"
        rows.append([str(seed), interval, str(gain["n"]), f"{metrics[f'wall_s_seed{seed}'] / 60:.1f}"])
    return _grid(["seed", "return gained", "test starts", "minutes"], rows)


def posttrain_speed(result: Mapping[str, Any]) -> str:
    """The collector beside the bare environment, and an update beside SB3's."""
    m = result["metrics"]
    bare, ours = (f"{m[f'collector/{name}_steps_per_cpu_s']:.0f}" for name in ("bare", "collector"))
    mine, peer, plain = (f"{m[f'update/{name}_cpu_s']:.2f}" for name in ("wamrl", "sb3", "sb3_plain"))
    apart = m["update/wamrl_cpu_s"] / m["update/sb3_plain_cpu_s"]
    return _grid(
        ["what", "wamrl", "beside", "ratio"],
        [
            ["collector, control steps per CPU second (bare environment)", ours, bare, f"{m['collector/ratio']:.2f}"],
            ["PPO update, CPU seconds (Stable-Baselines3, equal networks)", mine, peer, f"{m['update/ratio']:.2f}"],
            ["PPO update, CPU seconds (Stable-Baselines3 without LayerNorm)", mine, plain, f"{apart:.2f}"],
        ],
    )


_FAST_WAM = {"state": "from state", "pixels": "from pixels", "push": "from pixels, longer"}
"""What the settings of benchmarks.fast_wam are called."""
_SIMULATORS = {"simulators": "from pixels"}
"""That which has a page of its own."""
_OF_SIMULATORS = ("success", "planning", "cost", *fast_wam.KINDS)
"""Its tables; planning and value were not measured in the others."""


def _fast_wam(part: str, settings: Mapping[str, str] = _FAST_WAM) -> Callable[[Mapping[str, Any]], str]:
    """One part of `wamrl.fast_wam.tables`, of the settings that were measured; of push alone what it is run for."""

    def make(result: Mapping[str, Any]) -> str:
        grids = []
        for setting, called in settings.items():
            own = {key: value for key, value in result["metrics"].items() if key.startswith(f"{setting}/")}
            found = fast_wam.tables(own) if own and (setting != "push" or part in ("success", "start_outside")) else {}
            if part in found:
                head, *others = found[part].head
                grids.append(_grid([f"{head}, {called}", *others], [list(row) for row in found[part].rows]))
        return "\n".join(grids)

    return make


TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "success": ("plan_metaworld", success),
    "tasks": ("plan_metaworld", tasks),
    "paired": ("plan_metaworld", paired),
    "latency": ("plan_latency", latency),
    "deadlines": ("plan_latency", deadlines),
    "ablation": ("plan_ablation", ablation),
    "overhead": ("planner_overhead", overhead),
    "planners": ("planners", planners),
    "planner_budget": ("planner_budget", planner_budget),
    "planner_gate": ("planner_budget", planner_gate),
    "planners_batched": ("planners", planners_batched),
    "judged": ("policy_evaluation", judged),
    "judges": ("policy_evaluation", judges),
    "judging_wams": ("policy_evaluation", judging_wams),
    "judged_tasks": ("policy_evaluation", judged_tasks),
    "collection": ("collect_speed", collection),
    "adapter": ("envs", adapter),
    "env_speed": ("envs", env_speed),
    "isaac": ("isaac", isaac),
    "posttrain": ("posttrain", posttrain),
    "closed_loop": ("closed_loop", closed_loop),
    "posttrain_isaac": ("posttrain_isaac", posttrain_isaac),
    "posttrain_speed": ("posttrain_speed", posttrain_speed),
    **{f"fast_wam_{p}": ("fast_wam", _fast_wam(p)) for p in fast_wam.PARTS if p not in ("planning", "value")},
    **{f"simulators_{part}": ("fast_wam", _fast_wam(part, _SIMULATORS)) for part in _OF_SIMULATORS},
}


FIGURES: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "docs/images/posttrain.svg": ("posttrain", curves.posttrain)
}
"""Drawn from a result's metrics."""


def table(name: str, results: Path = RESULTS) -> str:
    """The table `name` as Markdown, from the stored result it belongs to.

    Raises:
        UnknownNameError: no such table.
        MissingResult: its benchmark has not stored a result yet.
        ValueError: the result lacks something that the table shows.
    """
    if name not in TABLES:
        raise unknown_name("table", name, TABLES)
    source, make = TABLES[name]
    path = results / f"{source}.json"
    if not path.is_file():
        raise MissingResult(path)
    try:
        return make(json.loads(path.read_text(encoding="utf-8")))
    except KeyError as error:
        raise ValueError(
            f"{path.name} lacks {error}, which the table '{name}' shows; "
            f"make it again with: python -m benchmarks.{source}"
        ) from error


def render(text: str, results: Path = RESULTS, *, missing: list[str] | None = None) -> str:
    """`text` with every table made anew from the stored results.

    missing: collects the messages about results that do not exist yet, whose tables become empty; without it such a
    result raises MissingResult.
    """

    def block(match: re.Match[str]) -> str:
        try:
            body = table(match["name"], results)
        except MissingResult as error:
            if missing is None:
                raise
            missing.append(str(error))
            body = ""
        return match[1] + body + match[4]

    return BLOCK.sub(block, text)


def pages(root: Path = ROOT) -> Iterator[Path]:
    """Every page that may hold a table."""
    for pattern in PAGES:
        yield from sorted(root.glob(pattern))


def update(root: Path = ROOT, *, check: bool = False) -> tuple[list[str], list[str]]:
    """Write the tables of all pages below `root` and the figures, or only look when `check`.

    Returns the files that were out of date, and a message for each result that is missing.
    """
    stale: list[str] = []
    missing: list[str] = []
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        fresh = render(text, root / "benchmarks" / "results", missing=missing)
        if fresh != text:
            stale.append(page.relative_to(root).as_posix())
            if not check:
                write_text(page, fresh)
    for place, (source, draw) in FIGURES.items():
        result, picture = root / "benchmarks" / "results" / f"{source}.json", root / place
        if not result.is_file():  # its table says so
            continue
        fresh = draw(json.loads(result.read_text(encoding="utf-8"))["metrics"])
        if not picture.is_file() or fresh != picture.read_text(encoding="utf-8"):
            stale.append(place)
            if not check:
                picture.parent.mkdir(parents=True, exist_ok=True)
                write_text(picture, fresh)
    return stale, sorted(set(missing))


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a page is out of date")
    check = parser.parse_args().check
    stale, missing = update(check=check)
    problems = list(missing)
    if stale and check:
        problems.append(f"out of date: {', '.join(stale)}; run python -m benchmarks.tables")
    elif stale:
        print(f"wrote {', '.join(stale)}")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
