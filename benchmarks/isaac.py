"""Steps per second of Isaac Lab environments, in its own virtual environment.

    WARP_CACHE_PATH=.venv-isaac/warp-cache .venv-isaac/bin/python -m benchmarks.isaac

`IsaacLabEnv.step` and the raw environment's own `step` take turns on the same simulation, resets of rows that are over
left out of both; ratios are medians over the turns. Upstream's cart and pole is a stand-in of ours unless --asset-root
names Isaac Sim's assets.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
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


_GROUND = """#usda 1.0
(
    defaultPrim = "Root"
    metersPerUnit = 1
    upAxis = "Z"
)
def Xform "Root"
{
    def Xform "Environment"
    {
        float3 xformOp:scale = (1, 1, 1)
        uniform token[] xformOpOrder = ["xformOp:scale"]
        def Mesh "Geometry"
        {
            point3f[] points = [(-50, -50, 0), (50, -50, 0), (50, 50, 0), (-50, 50, 0)]
            int[] faceVertexCounts = [4]
            int[] faceVertexIndices = [0, 1, 2, 3]
            texCoord2f[] primvars:st = [(0, 0), (1, 0), (1, 1), (0, 1)] (interpolation = "varying")
        }
    }
    def Plane "CollisionPlane" (prepend apiSchemas = ["PhysicsCollisionAPI"])
    {
        uniform token axis = "Z"
        uniform token purpose = "guide"
    }
    def Scope "Looks"
    {
        def Material "theGrid"
        {
            def Shader "Shader"
            {
                color3f inputs:diffuse_tint = (1, 1, 1)
            }
        }
    }
}
"""


def stand_in_assets(root: Path) -> str:
    """Stand-ins for the assets of upstream's Cartpole below `root`: our cart and pole under its name, and a plane."""
    robot = root / "Isaac/IsaacLab/Robots/Classic/Cartpole"
    ground = root / "Isaac/IsaacLab/Environments/Grid/default_ground_plane_checker_v1"
    robot.mkdir(parents=True)
    ground.mkdir(parents=True)
    ours = Path(__file__).resolve().parents[1] / "envs/assets/cartpole.usda"
    (robot / "cartpole.usd").write_text(ours.read_text(encoding="utf-8"), encoding="utf-8")
    (ground / "default_ground_plane.usda").write_text(_GROUND, encoding="utf-8")
    return str(root)


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
    parser.add_argument("--asset-root", help="the folder that holds Isaac/ (default: a stand-in)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=OUT, help=f"default {OUT.name} in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock, metrics = Clock(), {}
    folder = tempfile.TemporaryDirectory()
    assets = options.asset_root or stand_in_assets(Path(folder.name))
    for task, sizes in SIZES.items():
        for size in sizes:
            metrics |= measure(task, size, options.seconds, assets, options.device)
    metrics = {name: round(value, 4) for name, value in metrics.items()}
    for name, value in metrics.items():
        print(f"{name:48s} {value:14.3f}")
    folder.cleanup()
    config: dict[str, Any] = {"seconds": options.seconds, "device": options.device, "sizes": SIZES}
    config["assets"] = "stand-in" if options.asset_root is None else "upstream's"
    clock.store(options.out, config=config, metrics=metrics)


if __name__ == "__main__":
    main()
