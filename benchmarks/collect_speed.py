"""How fast episodes are collected, against a bare loop over Meta-World: `python -m benchmarks.collect_speed`.

Both run the scripted expert from the same start states with two simulator steps per control step, and stop an episode
ten control steps after its first success. The bare loop keeps nothing; `wamrl.collect.collect` labels, checks
contacts, saves the full simulator state of every step and writes whole episodes to disk. They take turns, and rates
are per second of CPU time of this process, so that a busy machine slows both alike. Making the simulators is counted
apart: it is paid once per run, however many episodes follow.

Images: 64x64 pixels of the default camera, one simulator step between two of them, drawing time only.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.stored import RESULTS, Clock
from wamrl.collect import collect
from wamrl.data import EpisodeDataset
from wamrl.envs.metaworld import PREFIX, ExpertPolicy, MetaWorldEnv, Simulator, start_states
from wamrl.envs.rendering import RenderingUnavailable

TASKS = ("metaworld/push-v3", "metaworld/drawer-open-v3")
OUT = RESULTS / "collect_speed.json"


def bare_loop(task: str, simulator: Simulator, first: int, episodes: int) -> tuple[int, float]:
    """(control steps, CPU seconds) of the loop that one would write without wamrl."""
    from metaworld.policies import ENV_POLICY_MAP

    raw, expert = simulator.raw, ENV_POLICY_MAP[task.removeprefix(PREFIX)]()
    vectors = start_states(task, "train", first + episodes).rand_vec[first:]
    steps, begun = 0, time.process_time()
    for vector in vectors:
        raw._last_rand_vec = vector
        observation, _ = raw.reset()
        after = None
        for _ in range(100):
            action = np.clip(expert.get_action(observation), -1, 1)
            success = False
            for _ in range(2):
                observation, _, _, _, info = raw.step(action)
                success = success or info["success"] > 0
            steps += 1
            after = after + 1 if after is not None else (0 if success else None)
            if after is not None and after >= 10:
                break
    return steps, time.process_time() - begun


def measure(episodes: int, turns: int, rows: int) -> dict[str, Any]:
    """The flat metrics."""
    # Deleted at the end only: ext4 passes over lately deleted files one by one whenever it makes a new one, so that a
    # turn after a deletion would make its files in ten to fifty times the time.
    with tempfile.TemporaryDirectory() as folder:
        return _measure(Path(folder), episodes, turns, rows)


def _measure(folder: Path, episodes: int, turns: int, rows: int) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for task in TASKS:
        begun = time.process_time()
        simulator = Simulator(task)
        making = time.process_time() - begun
        ratios, ours, bare, setup = [], [], [], 0.0
        for turn in range(turns):
            first = turn * episodes
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                steps, seconds = bare_loop(task, simulator, first, episodes)
            bare.append(steps / seconds)
            begun = time.process_time()
            MetaWorldEnv(task, rows)
            setup = time.process_time() - begun
            begun = time.process_time()
            env = {"_target_": "wamrl.envs.metaworld.MetaWorldEnv", "tasks": [task]}
            path = folder / f"{task.removeprefix(PREFIX)}-{turn}"
            collect(path, env, {"expert": episodes}, first_start=first, rows=rows, progress=False)
            whole = time.process_time() - begun
            data = EpisodeDataset.open(path)
            ours.append(data.num_steps / (whole - setup))
            ratios.append(ours[-1] / bare[-1])
        name = task.removeprefix(PREFIX)
        metrics[f"state/{name}/bare_loop_steps_per_cpu_s"] = float(np.median(bare))
        metrics[f"state/{name}/collect_steps_per_cpu_s"] = float(np.median(ours))
        metrics[f"state/{name}/ratio"] = float(np.median(ratios))
        metrics[f"state/{name}/make_one_simulator_s"] = making
        metrics[f"state/{name}/make_all_simulators_s"] = setup
    return metrics


def measure_images(count: int) -> dict[str, Any]:
    """Images per second of CPU time and of wall time; empty where nothing can be drawn."""
    metrics = {}
    for task in TASKS:
        env, expert = MetaWorldEnv(task, 1), ExpertPolicy(task)
        td = env.reset()
        try:
            env.render_rgb(0, 64)
        except RenderingUnavailable as error:
            print(f"no images: {error}")
            return {}
        cpu = wall = 0.0
        for _ in range(count):
            td = env.step(td.set("action", expert.label(td["state"], td["task"])))["next"]
            begun_cpu, begun = time.process_time(), time.perf_counter()
            env.render_rgb(0, 64)
            cpu, wall = cpu + time.process_time() - begun_cpu, wall + time.perf_counter() - begun
        env.close()
        name = task.removeprefix(PREFIX)
        metrics[f"pixels/{name}/frames_per_cpu_s"] = count / cpu
        metrics[f"pixels/{name}/frames_per_s"] = count / wall
    return metrics


def main() -> None:
    """Measure, print, and store `benchmarks/results/collect_speed.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=100, help="per turn and task (default 100)")
    parser.add_argument("--turns", type=int, default=3, help="default 3")
    parser.add_argument("--rows", type=int, default=8, help="simulators side by side (default 8)")
    parser.add_argument("--images", type=int, default=200, help="images per task (default 200)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default {OUT.name} in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = Clock()
    metrics = measure(options.episodes, options.turns, options.rows) | measure_images(options.images)
    for name, value in metrics.items():
        print(f"{name:48s} {value:10.2f}")
    config = {"tasks": TASKS, "episodes": options.episodes, "turns": options.turns, "rows": options.rows}
    config |= {"images": options.images, "action_repeat": 2, "size": 64}
    clock.store(options.out, config=config, metrics=metrics)


if __name__ == "__main__":
    main()
