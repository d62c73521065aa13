"""What an environment of wamrl costs over its simulator's own loop: `python -m benchmarks.envs`.

Everything runs on one CPU thread per process, the two of a pair taking turns, so that a busy machine slows both alike;
ratios and differences are medians over the turns.

* adapter: B rows in this process (`workers=0`) against a bare loop over B raw Gymnasium environments that are given
  the same actions. Stored: microseconds per step and environment on top of the raw loop, and their ratio.
* workers: the same environment in two worker processes against Gymnasium's AsyncVectorEnv and TorchRL's ParallelEnv
  with as many rows in two processes. AsyncVectorEnv and ParallelEnv run one process per row.
* imagined: the imagined environment in the shipped checkpoint against Meta-World's own step, per second of CPU time.
* mjx: the step of `MJXEnv` against the compiled function alone, at 64 and 1024 rows, on a GPU at 4096.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import TensorDict

from benchmarks.stored import RESULTS, Clock
from wamrl.envs.gymnasium_env import GymnasiumEnv

OUT = RESULTS / "envs.json"
# Preset -> id, packages, seconds per step (None: the environment says it).
RAW: dict[str, tuple[str, tuple[str, ...], float | None]] = {
    "pendulum": ("Pendulum-v1", (), None),
    "half_cheetah": ("HalfCheetah-v5", (), None),
    "point_maze": ("PointMaze_UMaze-v3", ("gymnasium_robotics",), 0.01),
    "fetch_push": ("FetchPush-v4", ("gymnasium_robotics",), None),
}
ROWS = 16


def turns(pair: dict[str, Callable[[], int]], seconds: float) -> dict[str, list[float]]:
    """Seconds per step of each, turn by turn; each call does some steps and returns how many."""
    times: dict[str, list[float]] = {name: [] for name in pair}
    for run in pair.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in pair.items():
            begun = time.perf_counter()
            steps = run()
            times[name].append((time.perf_counter() - begun) / steps)
    return times


def median_of(a: list[float], b: list[float], how: Callable[[float, float], float]) -> float:
    """Median over the turns."""
    return statistics.median(how(x, y) for x, y in zip(a, b, strict=True))


def unit_actions(env: Any) -> torch.Tensor:
    """Fixed actions [B, ...] in [-1, 1]."""
    return torch.rand(env.action_spec.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def stepper(env: Any, steps: int) -> Callable[[], int]:
    """`steps` batched steps with fixed actions; rows that end are reset as collectors do."""
    rows = env.batch_size[0]
    action = unit_actions(env).to(env.device)
    td = env.reset()

    def run() -> int:
        nonlocal td
        for _ in range(steps):
            after = env.step(TensorDict({"action": action}, [rows]))["next"]
            done = after["done"]
            td = env.reset(after.set("_reset", done.clone())) if bool(done.any()) else after
        return steps * rows

    return run


def bare_loop(name: str, steps: int) -> Callable[[], int]:
    """The loop that one would write without wamrl: step every environment, reset those that are over."""
    id, packages, _ = RAW[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from wamrl.envs.gymnasium_rows import import_packages

        import_packages(packages)
        envs = [gymnasium.make(id) for _ in range(ROWS)]
    low, high = envs[0].action_space.low, envs[0].action_space.high  # type: ignore[attr-defined]
    unit = torch.rand(ROWS, len(low), generator=torch.Generator().manual_seed(0)).numpy()
    actions = (low + unit * (high - low)).astype(np.float32)
    for number, env in enumerate(envs):
        env.reset(seed=number)

    def run() -> int:
        for _ in range(steps):
            for env, action in zip(envs, actions, strict=True):
                _, _, terminated, truncated, _ = env.step(action)
                if terminated or truncated:
                    env.reset()
        return steps * ROWS

    return run


def measure_adapter(seconds: float) -> dict[str, float]:
    """Microseconds and ratios of the adapter over the bare loop."""
    metrics = {}
    for name, (id, packages, dt) in RAW.items():
        env = GymnasiumEnv(f"gymnasium/{id}", ROWS, workers=0, imports=packages, control_dt_s=dt)
        times = turns({"wamrl": stepper(env, 20), "raw": bare_loop(name, 20)}, seconds)
        metrics[f"adapter/{name}/raw_us"] = 1e6 * statistics.median(times["raw"])
        metrics[f"adapter/{name}/wamrl_us"] = 1e6 * statistics.median(times["wamrl"])
        metrics[f"adapter/{name}/overhead_us"] = 1e6 * median_of(times["wamrl"], times["raw"], lambda a, b: a - b)
        metrics[f"adapter/{name}/ratio"] = median_of(times["wamrl"], times["raw"], lambda a, b: a / b)
        env.close()
    return metrics


def measure_workers(seconds: float, rows: int = 4) -> dict[str, float]:
    """Steps per second of worker processes, Gymnasium's and TorchRL's."""
    from torchrl.envs import GymEnv, ParallelEnv

    id = "HalfCheetah-v5"
    ours = GymnasiumEnv(f"gymnasium/{id}", rows, workers=2)
    theirs = gymnasium.make_vec(id, num_envs=rows, vectorization_mode="async")
    theirs.reset(seed=0)
    actions = theirs.action_space.sample()
    parallel = ParallelEnv(rows, functools.partial(GymEnv, id))
    td = parallel.reset()
    torchrl_actions = torch.from_numpy(actions)

    def gymnasium_steps() -> int:
        for _ in range(50):
            theirs.step(actions)
        return 50 * rows

    def torchrl_steps() -> int:
        nonlocal td
        for _ in range(50):
            _, td = parallel.step_and_maybe_reset(td.set("action", torchrl_actions))
        return 50 * rows

    times = turns(
        {"wamrl": stepper(ours, 50), "gymnasium_async": gymnasium_steps, "torchrl_parallel": torchrl_steps}, seconds
    )
    ours.close()
    theirs.close()
    parallel.close()
    torch.set_num_threads(1)  # ParallelEnv gives this process all cores
    metrics = {f"workers/{name}/steps_per_s": 1 / statistics.median(values) for name, values in times.items()}
    for name in ("gymnasium_async", "torchrl_parallel"):
        ratio = median_of(times[name], times["wamrl"], lambda a, b: a / b)
        metrics[f"workers/wamrl_over_{name}"] = ratio
    return metrics


def measure_imagined(seconds: float, sizes: tuple[int, ...] = (256, 1024, 4096)) -> dict[str, float]:
    """Imagined steps against Meta-World's, per second of one core; both with two simulator steps per control step."""
    from wamrl import checkpoint
    from wamrl.envs.imagined_env import ImaginedEnv
    from wamrl.envs.metaworld import MetaWorldEnv, Simulator, start_states

    task = "metaworld/push-v3"
    model = checkpoint.load("six")
    real = MetaWorldEnv(task, 4)
    frames = torch.cat([real.reset().select("state", "proprioception", "task") for _ in range(4)])
    simulator = Simulator(task)
    simulator.reset(start_states(task, "train", 1).rand_vec[0])
    action = np.array([0.1, -0.1, 0.05, 0.3], np.float32)

    def raw() -> int:
        for _ in range(50):
            for _ in range(2):
                simulator.raw.step(action)
        return 50

    metrics = {}
    for size, name in itertools.product(sizes, ("imagined", "imagined, one future")):
        env = ImaginedEnv(model, frames, size, max_steps=100, uncertainty=name == "imagined")
        times = turns({"imagined": stepper(env, 1), "metaworld": raw}, seconds)
        metrics[f"{name}/{size}/steps_per_s"] = 1 / statistics.median(times["imagined"])
        metrics[f"{name}/{size}/over_metaworld"] = median_of(times["metaworld"], times["imagined"], lambda a, b: a / b)
        metrics[f"{name}/{size}/metaworld_steps_per_s"] = 1 / statistics.median(times["metaworld"])
    return metrics


def compiled_loop(env: Any, steps: int) -> Callable[[], int]:
    """`steps` calls of the compiled function of an `MJXEnv` from where it is, with `stepper`'s actions."""
    import jax

    rows, device = env.batch_size[0], env._jax_device
    action = jax.device_put(unit_actions(env).numpy(), device)
    chosen = jax.device_put(np.ones(rows, bool), device)

    def run() -> int:
        now, shown = env._state, None
        for _ in range(steps):
            now, shown, _ = env.program.advance(now, action, chosen)
        jax.block_until_ready(shown)
        return steps * rows

    return run


def measure_mjx(seconds: float) -> dict[str, float]:
    """Steps per second of the compiled function and of the environment around it."""
    import jax

    from wamrl.envs.mjx_env import MJXEnv

    gpu = torch.cuda.is_available() and any(device.platform == "gpu" for device in jax.devices())
    metrics = {}
    for task in ("cartpole", "pusher"):
        for device, size in [("cpu", 64), ("cpu", 1024), *([("cuda", 4096)] if gpu else [])]:
            env = MJXEnv(f"mjx/{task}", size, device=device)
            env.reset()
            times = turns({"wamrl": stepper(env, 5), "raw": compiled_loop(env, 5)}, seconds)
            key = f"mjx/{task}/{device}/{size}"
            metrics[f"{key}/steps_per_s"] = 1 / statistics.median(times["wamrl"])
            metrics[f"{key}/raw_steps_per_s"] = 1 / statistics.median(times["raw"])
            metrics[f"{key}/ratio"] = median_of(times["wamrl"], times["raw"], lambda a, b: a / b)
            env.close()
    return metrics


PARTS = {
    "adapter": measure_adapter,
    "workers": measure_workers,
    "imagined": measure_imagined,
    "mjx": measure_mjx,
}


def main() -> None:
    """Measure, print, and store `benchmarks/results/envs.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="per pair (default 10)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default {OUT.name} in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = Clock()
    metrics: dict[str, float] = {}
    for part in options.parts:
        metrics |= PARTS[part](options.seconds)
    metrics = {name: round(value, 4) for name, value in metrics.items()}
    for name, value in metrics.items():
        print(f"{name:48s} {value:14.3f}")
    config: dict[str, Any] = {"seconds": options.seconds, "parts": options.parts, "rows": ROWS, "cores": os.cpu_count()}
    clock.store(options.out, config=config, metrics=metrics)


if __name__ == "__main__":
    main()
