"""Store the Fast-WAM comparison: `python -m wamrl.bench fast_wam` on fresh test starts, from states and from images.

    python -m benchmarks.fast_wam                                          # all, with the default tasks and seeds
    python -m benchmarks.fast_wam --settings push                          # fast on push alone, with `PUSH`'s steps
    python -m benchmarks.fast_wam --settings simulators                    # models trained on play, for a planner
    python -m benchmarks.fast_wam --settings state --state fast_wam.seeds=[0]
    python -m benchmarks.fast_wam --pixels fast_wam.tasks=[metaworld/drawer-open-v3] fast_wam.seeds=[0]
    python -m benchmarks.fast_wam --settings pixels --pixels fast_wam.seeds=[3] --add   # a seed more than is stored

`--state`, `--pixels`, `--push` and `--simulators` are followed by settings of that run. What is done is not done again;
`--store` runs nothing and stores what a stopped run has finished, with the list of it. The metrics go to
benchmarks/results/fast_wam.json, where the settings that were not run stay as they were stored.

With `--add`, seeds of a stored setting that the file lacks are pooled with those that it has, whose models need not be
there any more: rates and paired comparisons by their counts, errors of imagination as means over seeds. What depends on
the machine (latency, memory, seconds of training) stays as it was stored, so that it is of one run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.stored import RESULTS, ROOT, Clock, rate
from wamrl import bench, fast_wam

FIRST_TEST_START = 100  # starts 0 to 99 were read while earlier versions were made
PUSH = ("fast_wam.tasks=[metaworld/push-v3]", "fast_wam.variants=[fast]", "fast_wam.simulators=[]",
        "fast_wam.denoising_steps=[]", "fast_wam.steps=4000")  # fmt: skip
"""From images as well, with steps for ten minutes of a quiet core, by the seconds per step of shorter runs."""
TASKS = ("metaworld/door-open-v3", "metaworld/button-press-topdown-v3")
"""Where planning in mot_uwm_play did most harm, and where, of 60 demonstrations, policies had most to gain."""
SIMULATORS = (f"fast_wam.tasks=[{','.join(TASKS)}]", "fast_wam.variants=[]", "fast_wam.denoising_steps=[]",
              "fast_wam.shifts=[]", "fast_wam.steps=400", "fast_wam.tokenizer.steps=300", "episodes=17",
              "fast_wam.first_start=300", "+fast_wam.train_reference.batch_size=64")  # fmt: skip
"""From images as well, on starts that no other setting reads; tasks, steps and episodes for an hour of one core."""
SETTINGS = ("state", "pixels", "push", "simulators")


def words(setting: str, out: Path, more: list[str]) -> list[str]:
    """The arguments of `wamrl.bench` for one setting."""
    fixed = ["split=test", "episodes=34", f"fast_wam.first_start={FIRST_TEST_START}"]
    return [
        "fast_wam",
        *fixed,
        f"fast_wam.pixels={str(setting != 'state').lower()}",
        *{"push": PUSH, "simulators": SIMULATORS}.get(setting, ()),
        *more,
        f"run_dir={out / setting}",
    ]


def pooled(before: Mapping[str, Any], after: Mapping[str, Any], seeds: tuple[int, int]) -> dict[str, Any]:
    """The metrics of as many seeds before and after as `seeds` says, as if they had been measured in one run."""
    if before.keys() != after.keys():
        apart = sorted(before.keys() ^ after.keys())
        raise ValueError(f"the stored metrics and the new ones differ in {len(apart)} keys, such as {apart[0]}")
    found: dict[str, Any] = {}
    for key, old in before.items():
        new = after[key]
        if isinstance(old, dict) and "both" in old:
            both, only, only_fast, n = (old[k] + new[k] for k in ("both", "only", "only_fast", "n"))
            neither = n - both - only - only_fast
            mine = [True] * (both + only) + [False] * (only_fast + neither)
            fast = [True] * both + [False] * only + [True] * only_fast + [False] * neither
            found[key] = fast_wam.compared(mine, fast)
        elif isinstance(old, dict):
            found[key] = rate(round(old["mean"] * old["n"] + new["mean"] * new["n"]), old["n"] + new["n"])
        elif "/imagined_" in key:
            found[key] = (old * seeds[0] + new * seeds[1]) / sum(seeds)
        else:
            found[key] = old
    return found


def added(stored: Mapping[str, Any], fresh: Mapping[str, Any], setting: str) -> dict[str, Any]:
    """The metrics of `setting` in the stored file together with those of a run of other seeds; ValueError if unlike."""
    config = stored["config"][setting]
    one, other = (dict(c["fast_wam"]) for c in (config, fresh["config"]))
    before, after = one.pop("seeds"), other.pop("seeds")
    again = sorted(set(before) & set(after))
    if again:
        raise ValueError(f"seeds {again} are in the stored file already; give fast_wam.seeds others than {before}")
    unlike = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
    unlike += [key for key in ("split", "episodes") if config[key] != fresh["config"][key]]
    if unlike:
        raise ValueError(f"{', '.join(sorted(unlike))} is not as in the stored run, so that nothing can be added to it")
    mine = {key: value for key, value in stored["metrics"].items() if key.startswith(f"{setting}/")}
    return pooled(mine, fresh["metrics"], (len(before), len(after)))


def main() -> None:
    """Run what is missing and store the metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--state", nargs="*", default=[], help="settings of the run from states")
    parser.add_argument("--pixels", nargs="*", default=[], help="settings of the run from images")
    parser.add_argument("--push", nargs="*", default=[], help="settings of the run on push alone")
    parser.add_argument("--simulators", nargs="*", default=[], help="settings of the run of simulators alone")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/fast_wam"))
    parser.add_argument("--store", action="store_true", help="run nothing, store what is finished")
    parser.add_argument("--add", action="store_true", help="pool with the seeds that are stored")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    clock = Clock()
    runs: dict[str, Any] = {}
    for setting in arguments.settings:
        if not arguments.store:
            bench.main(words(setting, arguments.out, getattr(arguments, setting)))
        run = json.loads((arguments.out / setting / "results.json").read_text())
        run["metrics"] = {f"{setting}/{key.partition('/')[2]}": value for key, value in run["metrics"].items()}
        runs[setting] = run
    config = {setting: {"command": run["command"], **run["config"]} for setting, run in runs.items()}
    for setting, run in runs.items():
        if run.get("partial"):
            config[setting] |= {"finished": run["finished"], "versions": run["versions"]}
    metrics = {key: value for run in runs.values() for key, value in run["metrics"].items()}
    path = RESULTS / "fast_wam.json"
    stored = json.loads(path.read_text()) if path.exists() else {"config": {}, "metrics": {}}
    if arguments.add:
        for setting, run in runs.items():
            if setting not in stored["config"]:
                continue
            metrics |= added(stored, run, setting)
            before = stored["config"][setting]
            run_of = {"command": run["command"], "versions": run["versions"], "finished": run["finished"]}
            config[setting] = {**before, "added": [*before.get("added", []), run_of]}
            together = before["fast_wam"]["seeds"] + run["config"]["fast_wam"]["seeds"]
            config[setting]["fast_wam"] = {**before["fast_wam"], "seeds": together}
    kept = {key: value for key, value in stored["metrics"].items() if key.partition("/")[0] not in runs}
    metrics, config = {**kept, **metrics}, {**stored["config"], **config}
    seeds = {seed for of in config.values() for seed in of["fast_wam"]["seeds"]}
    clock.store(
        path,
        config=config,
        metrics=metrics,
        arguments=shlex.join(sys.argv[1:]),
        seeds=sorted(seeds),
    )


if __name__ == "__main__":
    main()
