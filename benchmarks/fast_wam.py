"""Store the Fast-WAM comparison: `python -m wamrl.bench fast_wam` on fresh test starts, from states and from images.

    python -m benchmarks.fast_wam                                          # both, with the default tasks and seeds
    python -m benchmarks.fast_wam --settings state --state fast_wam.seeds=[0]
    python -m benchmarks.fast_wam --pixels fast_wam.tasks=[metaworld/drawer-open-v3] fast_wam.seeds=[0]

`--state` and `--pixels` are followed by settings of that run. What is done is not done again; a stopped run's finished
seeds are stored as they are. The metrics go to benchmarks/results/fast_wam.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks.stored import RESULTS, ROOT, Clock
from wamrl import bench

FIRST_TEST_START = 100  # starts 0 to 99 were read while earlier versions were made
SETTINGS = ("state", "pixels")


def words(setting: str, out: Path, more: list[str]) -> list[str]:
    """The arguments of `wamrl.bench` for one setting."""
    fixed = ["split=test", "episodes=34", f"fast_wam.first_start={FIRST_TEST_START}"]
    return [
        "fast_wam",
        *fixed,
        f"fast_wam.pixels={str(setting == 'pixels').lower()}",
        *more,
        f"run_dir={out / setting}",
    ]


def main() -> None:
    """Run what is missing and store the metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--state", nargs="*", default=[], help="settings of the run from states")
    parser.add_argument("--pixels", nargs="*", default=[], help="settings of the run from images")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/fast_wam"))
    arguments = parser.parse_args()
    os.chdir(ROOT)
    clock = Clock()
    runs: dict[str, Any] = {}
    for setting in arguments.settings:
        bench.main(words(setting, arguments.out, getattr(arguments, setting)))
        runs[setting] = json.loads((arguments.out / setting / "results.json").read_text())
    clock.store(
        RESULTS / "fast_wam.json",
        config={setting: {"command": run["command"], **run["config"]} for setting, run in runs.items()},
        metrics={key: value for run in runs.values() for key, value in run["metrics"].items()},
        arguments=shlex.join(sys.argv[1:]),
        seeds=sorted({seed for run in runs.values() for seed in run["seeds"]}),
    )


if __name__ == "__main__":
    main()
