"""Post-training of a deliberately weak policy: in the real simulator, in imagination, null controls, and SB3's SAC.

    python -m benchmarks.posttrain                                # all variants, three seeds
    python -m benchmarks.posttrain --seeds 0 --variants expert_iteration
    python -m benchmarks.posttrain --variants sb3_sac --steps 128000    # of the simulator; later on, further
    python -m benchmarks.posttrain --report                       # store what is finished, whole seeds of a variant

What is stored of variants that are not finished here stays, where it was run by the same commands.

The weak policy is the reference model taught by three labelled demonstrations per task and 42 other episodes, for
4000 steps; that of `distil_plenty` has as few labelled demonstrations, but four times as many other episodes, and
6000 steps. PPO goes on where expert iteration ended. Every stage is one of the commands that users run, in a
directory of its own under `--out`; a stage that is done is not done again, and a stopped one goes on; those in
`BUDGETED` go on from fewer steps of the simulator to more, too, and are measured where they stand if that is beyond
`--steps`. Settings were chosen on dev starts with seed 0; success is on test starts. The metrics go to
benchmarks/results/posttrain.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.stored import RESULTS, ROOT, Clock, difference, rate, run_told, told
from wamrl.checkpoint import read_metadata
from wamrl.evaluation import paired
from wamrl.stages import Stage, is_done

TASKS = ("reach-v3", "push-v3", "pick-place-v3", "coffee-push-v3")
ENV = f"[{','.join(f'metaworld/{task}' for task in TASKS)}]"
EPISODES, FIRST_TEST_START = 25, 500  # test starts per task; lower numbers were read before

ROWS, SAC_ROWS, DECISIONS = 32, 20, 100
_SIMULATOR = ("env=metaworld/six", f"env.tasks={ENV}")
_REAL = (*_SIMULATOR, f"num_envs={ROWS}", f"decisions={DECISIONS}")
_EXPERT_ITERATION = (*_REAL, "agent=expert_iteration", "evaluate_every=4", "world_batch=128",
                     "agent.planner.num_candidates=32", "agent.planner.sigma=0.1",
                     "agent.planner.compile=true")  # fmt: skip
# Imitation alone touches the policy's own weights: without a world loss the simulator half stays exactly what it was.
_IMITATION = ("agent.learning_rate=5e-4", "agent.world_weight=0")
# The policy acts for eight imagined steps from 500 real frames each; the planner teaches it in half of the states, by
# its candidates' weighted mean: the best candidate alone is mostly the noise that it was drawn with.
_IMAGINED = ("env=imagined", "env@simulator=metaworld/six", f"simulator.tasks={ENV}", "agent=distil", "num_envs=500",
             "decisions=8", "iterations=6", "evaluate_every=2", "agent.max_plans=2000", "agent.buffer=16000",
             "agent.planner.num_candidates=32", "agent.planner.sigma=0.1", "agent.target=mean", "agent.updates=600",
             "agent.planner.proposer.behaviour_share=0", *_IMITATION)  # fmt: skip
# Advantages over shorter times than usual and a small step: the policy already succeeds in most episodes.
_PPO = (*_SIMULATOR, "agent=ppo", "num_envs=64", "decisions=128", "iterations=16",
        "evaluate_every=4", "agent.learning_rate=1e-4", "agent.world_weight=0", "agent.noise=[0.05,0.3]",
        "agent.gae_lambda=0.9", "agent.minibatch=1024")  # fmt: skip
VARIANTS: dict[str, tuple[str, ...]] = {
    "expert_iteration": _EXPERT_ITERATION,
    "expert_iteration_shuffled": (*_EXPERT_ITERATION, "agent.planner.shuffle_scores=true"),
    "ppo": _PPO,
    "ppo_shuffled": (*_PPO, "agent.shuffle_rewards=true"),
    "rft": (*_REAL, "agent=rft", "agent.behaviour_share=0.5", "agent.noise=[0.02,0.2]", "iterations=5",
            "evaluate_every=1", "agent.updates=600", *_IMITATION),
    "distil_imagined": _IMAGINED,
    "distil_shuffled": (*_IMAGINED, "agent.planner.shuffle_scores=true"),
    "distil_plenty": _IMAGINED,
    "distil_plenty_shuffled": (*_IMAGINED, "agent.planner.shuffle_scores=true"),
    # Iterations of whole episodes, so that cutting them there, which makes a run resumable, cuts none.
    "sb3_sac": (*_SIMULATOR, f"num_envs={SAC_ROWS}", f"decisions={DECISIONS}",
                "evaluate_every=15", "save_every=5", "agent=sb3", "agent.algorithm=sac", "agent.demonstrations=true",
                "+agent.settings.gradient_steps=-1"),
}  # fmt: skip
# The stage whose model a variant begins with, where that is not the weak one.
STARTS = {"ppo": "expert_iteration", "ppo_shuffled": "expert_iteration", "distil_plenty": "weak_plenty",
          "distil_plenty_shuffled": "weak_plenty"}  # fmt: skip
# Name -> episodes per task by behaviour, and how the weak model is trained on them.
DATA = {
    "weak": ({"expert": 3, "noisy_expert": 22, "failing": 10, "random": 10}, ("steps=4000",)),
    "weak_plenty": ({"expert": 3, "noisy_expert": 88, "failing": 40, "random": 40},
                    ("steps=6000", "compile=true", "precision=bfloat16")),
}  # fmt: skip
# Steps of an iteration, and of the whole, of variants whose iterations are not among their settings: a longer run is
# the same one.
BUDGETED = {
    "expert_iteration": (ROWS * DECISIONS, 51_200),
    "expert_iteration_shuffled": (ROWS * DECISIONS, 51_200),
    "sb3_sac": (SAC_ROWS * DECISIONS, 300_000),
}


def stages(seed: int, directory: Path, variants: Sequence[str], steps: int | None = None) -> list[Stage]:
    """Those of one seed, in order, each once: what `variants` begin with, and they; of none, the weak model.

    steps: as in `run`, of `variants` alone.
    """
    found: dict[str, Stage] = {}
    for name in variants or ("weak",):
        for stage in _chain(seed, directory, name, steps):
            found[stage.name] = stage if stage.name == name else found.get(stage.name, stage)
    return list(found.values())


def _chain(seed: int, directory: Path, name: str, steps: int | None = None) -> list[Stage]:
    """The stage of a weak model or a variant, last, and those that come before it."""
    common = (f"seed={seed}", "threads=1")
    data = directory / data_of(name)
    if name in DATA:
        mixture, how = DATA[name]
        collect = (*_SIMULATOR, "data=scarce",
                   *(f"data.mixture.{behaviour}={count}" for behaviour, count in mixture.items()), f"path={data}",
                   f"first_start={1000 * seed}", "snapshots=false")  # fmt: skip
        train = (f"data={data}", "wam=reference", *how, "tensorboard=false")
        gather = name.replace("weak", "collect")
        return [Stage(gather, "collect", (*collect, *common)), Stage(name, "train", (*train, *common))]
    start = STARTS.get(name, "weak")
    own = (f"wam={directory / start}", f"data={data}", f"episodes={EPISODES}", f"first_start={FIRST_TEST_START}",
           "evaluate=test", "final_report=true")  # fmt: skip
    length = (f"iterations={_iterations(name, steps)}",) if name in BUDGETED else ()
    return [*_chain(seed, directory, start), Stage(name, "posttrain", (*VARIANTS[name], *own, *common), length)]


def data_of(name: str) -> str:
    """The folder of the episodes of a weak model, or of that which a variant began with."""
    while name not in DATA:
        name = STARTS.get(name, "weak")
    return name.replace("weak", "data")


def run(seed: int, out: Path, variants: Sequence[str], steps: int | None = None) -> None:
    """Run the missing stages of one seed; RuntimeError with the log's end when one fails.

    steps: of the simulator, for variants in `BUDGETED`, rounded up to whole iterations; None: what stands there.
    """
    directory = out / f"seed{seed}"
    for stage in stages(seed, directory, variants, steps):
        longer = False
        if stage.length and is_done(stage, directory):
            ran = json.loads((directory / stage.name / "results.json").read_text())["iterations"]
            longer = ran < _iterations(stage.name, steps)
        run_told(stage, directory, again=longer, label=f"seed {seed}")


def _iterations(variant: str, steps: int | None) -> int:
    each, usual = BUDGETED[variant]
    return math.ceil((steps or usual) / each)


def finished(out: Path, seeds: Sequence[int]) -> dict[str, dict[int, dict[str, Any]]]:
    """Variant -> seed -> results.json, of the seeds that have finished a variant.

    Raises:
        ValueError: one was run with other settings than those of `VARIANTS`, its seeds took different numbers of
            steps, or that which it began with has gone on since.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in VARIANTS:
        for seed in seeds:
            directory = out / f"seed{seed}"
            if is_done(stages(seed, directory, [name])[-1], directory):
                start = STARTS.get(name, "weak")
                if (
                    start in VARIANTS
                    and _began_with(directory / name) != read_metadata(directory / start).content_sha256
                ):
                    raise ValueError(
                        f"{directory / name} began with an earlier {start} than the one there; remove it, and its "
                        f"{name}.done, to run it again"
                    )
                found.setdefault(name, {})[seed] = json.loads((directory / name / "results.json").read_text())
        steps = {seed: results["real_steps"] for seed, results in found.get(name, {}).items()}
        if name in BUDGETED and len(set(steps.values())) > 1:
            each = ", ".join(f"{taken:,} for seed {seed}" for seed, taken in steps.items())
            raise ValueError(
                f"{name} took {each} steps, which are no one number; go on with --steps {max(steps.values())}"
            )
    return found


def _began_with(run: Path) -> Any:
    return (read_metadata(run).provenance or {}).get("initial")


def data_steps(out: Path, variants: Sequence[str], seeds: Sequence[int]) -> dict[str, float]:
    """Control steps of the episodes that the weak models of `variants` learned from, in the mean over the seeds."""
    found = {}
    for data in {data_of(name) for name in variants}:
        collects = [out / f"seed{seed}" / data.replace("data", "collect") / "results.json" for seed in seeds]
        steps = [json.loads(path.read_text())["steps"] for path in collects if path.exists()]
        found[data] = sum(steps) / len(steps)
    return found


def commits(out: Path, found: Mapping[str, Mapping[int, Any]]) -> dict[str, str]:
    """The commits that the finished variants ran at."""
    ran = {
        name: {json.loads((out / f"seed{seed}" / f"{name}.done").read_text())["versions"]["commit"] for seed in runs}
        for name, runs in found.items()
    }
    return {name: ", ".join(sorted(map(str, those))) for name, those in ran.items()}


def config_of(out: Path, variants: Sequence[str]) -> dict[str, str]:
    """What was run for `variants`, by stage, as a user would type it for seed 0."""
    found = {}
    for stage in stages(0, out / "seed0", variants):
        if stage.length:
            stage = replace(stage, length=(f"iterations=<real steps / {BUDGETED[stage.name][0]}>",))
        found[stage.name] = told(stage, out / "seed0").replace(str(out), "<out>")
    return found


def collect_metrics(finished: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Flat metrics over the finished seeds of every variant, as `finished` gives them.

    Steps of the simulator and the growth of the world model's error are those of the whole way from the weak model on;
    the success before, the gain and the time are those of the variant alone, which may begin where another ended.
    """
    metrics: dict[str, Any] = {}
    for name, runs in finished.items():
        for moment in ("before", "after"):
            pooled: dict[str, list[tuple[int, int]]] = {"mean": []}
            for results in runs.values():
                for task, one in results[moment]["real_by_task"].items():
                    counts = (round(one["success"] * one["n"]), one["n"])
                    pooled.setdefault(task.removeprefix("metaworld/"), []).append(counts)
                    pooled["mean"].append(counts)
            for task, counts in pooled.items():
                metrics[f"{name}/{task}/{moment}/success"] = _rate(counts)
        for seed, results in runs.items():
            metrics[f"{name}/mean/gain_seed{seed}/success"] = difference(results["gain"])
        pairs = [_pair(results) for results in runs.values()]
        pooled_gain = paired(*([outcome for pair in pairs for outcome in pair[moment]] for moment in (0, 1)))
        metrics[f"{name}/mean/gain/success"] = difference(asdict(pooled_gain))
        earlier = _steps_before(finished, name)
        for points in zip(*(results["curve"] for results in runs.values()), strict=True):
            place = f"{name}/mean/at_{points[0]['iteration']}"
            metrics[f"{place}/real_steps"] = earlier + sum(point["real_steps"] for point in points) / len(points)
            counts = [(point["real"]["successes"], point["real"]["n"]) for point in points]
            metrics[f"{place}/success"] = _rate(counts)
        count = len(runs)
        metrics[f"{name}/seeds"] = count
        metrics[f"{name}/real_steps"] = earlier + sum(r["real_steps"] for r in runs.values()) / count
        growths = [_growth(finished, name, seed) for seed in runs]
        known = [growth for growth in growths if growth is not None]
        metrics[f"{name}/world_error_growth"] = sum(known) / count if len(known) == count else None
        gaps = [r["imagined_gain_minus_real_gain"] for r in runs.values() if "imagined_gain_minus_real_gain" in r]
        if gaps:
            metrics[f"{name}/imagined_gain_minus_real_gain"] = sum(gaps) / len(gaps)
        metrics[f"{name}/wall_s"] = sum(r["seconds"] for r in runs.values()) / count
    return metrics


def _steps_before(finished: Mapping[str, Mapping[int, Mapping[str, Any]]], name: str) -> float:
    """Steps of the simulator that the model which a variant begins with had cost, in the mean over its seeds."""
    start = STARTS.get(name, "weak")
    if start in DATA:
        return 0.0
    steps = [finished[start][seed]["real_steps"] for seed in finished[name]]
    return _steps_before(finished, start) + sum(steps) / len(steps)


def _growth(finished: Mapping[str, Mapping[int, Mapping[str, Any]]], name: str, seed: int) -> float | None:
    """Of the world model's error from the weak model on; None: it is no finite number any more."""
    start, own = STARTS.get(name, "weak"), finished[name][seed]["world"]["growth"]
    earlier = 0.0 if start in DATA else _growth(finished, start, seed)
    return None if own is None or earlier is None else (1.0 + earlier) * (1.0 + own) - 1.0


def _pair(results: Mapping[str, Any]) -> tuple[list[bool], list[bool]]:
    """Success of the same starts after and before, from the counts of `gain`."""
    gain, after = results["gain"], results["after"]["real"]["successes"]
    only_after, only_before = gain["only_first"], gain["only_second"]
    both = after - only_after
    counts = ((True, True, both), (True, False, only_after), (False, True, only_before),
              (False, False, gain["n"] - both - only_after - only_before))  # fmt: skip
    first, second = ([pair[i] for *pair, count in counts for _ in range(count)] for i in (0, 1))
    return first, second


def with_stored(
    path: Path, config: Mapping[str, Any], metrics: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`config` and `metrics`, and what `path` holds of variants that are not among them.

    Those are kept where their commands, and those of what they begin with, are what they would be today.
    """
    stored = json.loads(path.read_text()) if path.exists() else {"config": {"commits": {}}, "metrics": {}}
    earlier, today = stored["config"], config_of(Path("<out>"), list(VARIANTS))
    same = {name for name, command in today.items() if earlier.get(name) == command}
    chains = {name: {stage.name for stage in _chain(0, Path("<out>"), name)} for name in VARIANTS}
    kept = [n for n in VARIANTS if n in earlier["commits"] and n not in config["commits"] and chains[n] <= same]
    needed = set().union(*(chains[name] for name in kept))
    found = {name: earlier[name] for name in today if name in needed} | dict(config)
    found["commits"] = {name: earlier["commits"][name] for name in kept} | config["commits"]
    found["data_steps"] = {data_of(n): earlier["data_steps"][data_of(n)] for n in kept} | config["data_steps"]
    whole = {**{key: value for key, value in stored["metrics"].items() if key.partition("/")[0] in kept}, **metrics}
    order = list(VARIANTS)
    return found, dict(sorted(whole.items(), key=lambda item: order.index(item[0].partition("/")[0])))


def _rate(counts: Sequence[tuple[int, int]]) -> dict[str, float]:
    successes, trials = (sum(column) for column in zip(*counts, strict=True))
    return rate(successes, trials)


def main() -> None:
    """Run what is missing and store the metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS),
                        help="none: the weak models alone")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/posttrain"))
    usual = ", ".join(f"{steps:,} for {name}" for name, (_, steps) in BUDGETED.items())
    parser.add_argument("--steps", type=int, help=f"of the simulator; default: {usual}")
    parser.add_argument("--report", action="store_true", help="run nothing; store the metrics of what is finished")
    arguments = parser.parse_args()
    os.chdir(ROOT)  # checkpoints record their data's path, so that it must not be one of this machine
    clock = Clock()
    if not arguments.report:
        for seed in arguments.seeds:
            run(seed, arguments.out, arguments.variants, arguments.steps)
    found = finished(arguments.out, arguments.seeds)
    if not found:
        parser.error(f"no variant is finished in {arguments.out}; run without --report first")
    path = RESULTS / "posttrain.json"
    config = {**config_of(arguments.out, list(found)), "commits": commits(arguments.out, found),
              "data_steps": data_steps(arguments.out, list(found), arguments.seeds)}  # fmt: skip
    config, metrics = with_stored(path, config, collect_metrics(found))
    seeds = sorted({seed for runs in found.values() for seed in runs})
    clock.store(path, config=config, metrics=metrics, arguments=" ".join(sys.argv[1:]), seeds=seeds)
    for key, value in metrics.items():
        if isinstance(value, Mapping) and "/mean/" in key:
            print(f"{key:45s} {value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}] n={value['n']}")


if __name__ == "__main__":
    main()
