"""Steps per second of Isaac Lab environments, in its own virtual environment.

    WARP_CACHE_PATH=.venv-isaac/warp-cache .venv-isaac/bin/python -m benchmarks.isaac --asset-root <folder with Isaac/>

`IsaacLabEnv.step` and the raw environment's own `step` take turns on the same simulation, resets of rows that are over
left out of both; ratios are medians over the turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from benchmarks.stored import RESULTS, Clock
from wamrl.envs.isaaclab_env import IsaacLabEnv

OUT = RESULTS / "isaac.json"
TASKS = {"Isaac-Cartpole-Direct": ("physics=newton_mjwarp",), "Wamrl-Balance": (), "Wamrl-Push": ()}
SIZES = {"Isaac-Cartpole-Direct": (64, 1024), "Wamrl-Balance": (64, 1024), "Wamrl-Push": (16,)}


def measure(task: str, size: int, seconds: float, asset_root: str | None, device: str) -> dict[str, float]:
    """Environment steps per second of the adapter and of the raw environment."""
    env = IsaacLabEnv(
        f"isaaclab/{task}", size, asset_root=asset_root, overrides=TASKS[task], device=device, max_steps=1_000_000
    )
    env.reset()
    action = torch.zeros(env.action_spec.shape, device=device)
    times: dict[str, list[float]] = {"wamrl": [], "raw": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["raw"]) < 3:
        begun = time.perf_counter()
        for _ in range(10):
            env.step(TensorDict({"action": action}, [size]))
        middle = time.perf_counter()
        with env._no_auto_reset():
            for _ in range(10):
                env.raw.step(action)
        times["wamrl"].append((middle - begun) / (10 * size))
        times["raw"].append((time.perf_counter() - middle) / (10 * size))
    env.close()
    key = f"{task}/{device}/{size}"
    ratio = statistics.median(a / b for a, b in zip(times["wamrl"], times["raw"], strict=True))
    return {
        f"{key}/steps_per_s": 1 / statistics.median(times["wamrl"]),
        f"{key}/raw_steps_per_s": 1 / statistics.median(times["raw"]),
        f"{key}/ratio": ratio,
    }


def main() -> None:
    """Measure, print, and store `benchmarks/results/isaac.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="per task and size (default 10)")
    parser.add_argument("--asset-root", help="the folder that holds Isaac/, for upstream's task; without it: ours only")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=OUT, help=f"default {OUT.name} in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock, metrics = Clock(), {}
    for task, sizes in SIZES.items():
        if task.startswith("Isaac-") and options.asset_root is None:
            print(f"{task} is left out: it needs --asset-root")
            continue
        for size in sizes:
            metrics |= measure(task, size, options.seconds, options.asset_root, options.device)
    metrics = {name: round(value, 4) for name, value in metrics.items()}
    for name, value in metrics.items():
        print(f"{name:48s} {value:14.3f}")
    config: dict[str, Any] = {"seconds": options.seconds, "device": options.device, "sizes": SIZES}
    clock.store(options.out, config=config, metrics=metrics)


if __name__ == "__main__":
    main()
