"""What the MPPI planner costs on top of its model: `python -m benchmarks.planner_overhead`.

Everything runs in one process on one CPU thread, the methods taking turns in a new order each time, so that a busy
machine slows all alike; ratios are medians of the per-turn ratios. The dynamics are the same random MLP everywhere,
float32, white noise, reward -|z'|^2 per step and no terminal value:

* large: 512 candidates, 16 steps, MLP 68-256-256-64, with 1 and 6 iterations, against a loop written by hand.
* small: 64 candidates, 16 steps, MLP 68-16-16-64, 6 iterations, against the same and against pytorch_mppi.

The planner goes through `wamrl.planners.make_mppi` and a WAM whose `imagine` rolls that MLP, as for any other model.
pytorch_mppi is not needed by wamrl; where it is missing, the run stops and says how to get it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.stored import RESULTS, Clock
from wamrl.interfaces import WAM, Anatomy, Budget, Context, Imagined, Spec, State
from wamrl.noise import NoiseKey
from wamrl.planners import NoiseProposer, ReturnScorer, ShootingPlanner, make_mppi

LATENT, ACTION, HORIZON = 64, 4, 16
SIGMA, TEMPERATURE = 0.5, 0.5
# Name -> candidates, hidden width, iterations.
SETTINGS = {"512x16_w256_i1": (512, 256, 1), "512x16_w256_i6": (512, 256, 6), "64x16_w16_i6": (64, 16, 6)}
OUT = RESULTS / "planner_overhead.json"


class MLPDynamics(WAM):
    """A latent model that is one MLP: z' = MLP(z, a), reward -|z'|^2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spec = Spec(
            observation={"state": (LATENT,)},
            action_dim=ACTION,
            tasks=("benchmark/mlp-v0",),
            chunk_length=HORIZON,
            max_horizon=HORIZON,
            discount=1.0,
            control_dt_s=0.1,
            provides=frozenset({"rollout", "reward"}),
            anatomy=Anatomy("state", "mlp", "separate", "offline"),
        )
        self.net = nn.Sequential(
            nn.Linear(LATENT + ACTION, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, LATENT)
        )

    def encode(self, context: Context) -> State:
        """The state is the latent."""
        z = context.observation["state"][:, -1]
        return TensorDict({"z": z}, batch_size=[z.shape[0]])

    def encode_latent(self, z: Tensor) -> State:
        """The state [1] of the latent `z` [D]."""
        return TensorDict({"z": z[None]}, batch_size=[1])

    def imagine(
        self,
        state: State,
        actions: Tensor | None,
        *,
        futures: int | None = None,
        noise: NoiseKey | None = None,
        with_frames: bool = False,
    ) -> Imagined:
        """Roll the MLP."""
        assert actions is not None
        rows, num, horizon, action_dim = actions.shape
        z = state["z"][:, None].expand(-1, num, -1).reshape(rows * num, -1)
        costs = []
        for action in actions.reshape(rows * num, horizon, action_dim).unbind(dim=1):
            z = self.net(torch.cat([z, action], dim=1))
            costs.append(z.square().sum(dim=1))
        return Imagined(
            leaf=TensorDict({"z": z.view(rows, num, 1, LATENT)}, batch_size=[rows, num, 1]),
            evaluations=num * horizon,
            reward=torch.stack(costs, dim=1).neg_().view(rows, num, 1, horizon),
        )


class HandLoop:
    """MPPI written by hand around the MLP: eager torch, no classes, nothing but what the maths needs."""

    def __init__(self, net: nn.Module, num: int, iterations: int) -> None:
        self.net, self.num, self.iterations = net, num, iterations
        self.mean = torch.zeros(HORIZON, ACTION)

    @torch.no_grad()
    def __call__(self, z0: Tensor) -> Tensor:
        """One plan [H, A] from the latent `z0` [D]."""
        mean = torch.cat([self.mean[1:], self.mean[-1:]])
        for _ in range(self.iterations):
            actions = (mean + SIGMA * torch.randn(self.num, HORIZON, ACTION)).clamp(-1.0, 1.0)
            z = z0.expand(self.num, LATENT)
            total = torch.zeros(self.num)
            for h in range(HORIZON):
                z = self.net(torch.cat([z, actions[:, h]], dim=1))
                total = total - z.square().sum(dim=1)
            total = (total - total.mean()) / total.std()
            weights = torch.softmax(total / TEMPERATURE, dim=0)
            mean = torch.einsum("n,nha->ha", weights, actions)
        self.mean = mean
        return mean


class Ours:
    """`make_mppi`, warm-started from plan to plan as a controller does."""

    def __init__(self, model: MLPDynamics, num: int, iterations: int, *, compile: bool) -> None:
        self.model = model
        self.planner: ShootingPlanner = make_mppi(
            horizon=HORIZON,
            num_candidates=num,
            iterations=iterations,
            temperature=TEMPERATURE,
            proposer=NoiseProposer,
            sigma=SIGMA,
            correlation=0.0,
            scorer=ReturnScorer(value_weight=0.0),
            choose="mean",
            compile=compile,
        )
        self.plan_state = self.planner.initial_state(model, 1)
        self.step = 0

    def __call__(self, z0: Tensor) -> Tensor:
        """One plan [1, H, A] from the latent `z0` [D]."""
        state = self.model.encode_latent(z0)
        noise = NoiseKey.for_rows(1, step=self.step)
        self.step += 1
        plan, self.plan_state = self.planner.plan(self.model, state, self.plan_state, noise, Budget())
        return plan.actions


class PytorchMPPI:
    """pytorch_mppi's MPPI; one plan is `iterations` commands, of which only the first shifts the mean."""

    def __init__(self, net: nn.Module, num: int, iterations: int) -> None:
        from pytorch_mppi import MPPI

        self.iterations = iterations
        self.mppi = MPPI(
            lambda z, a: net(torch.cat([z, a], dim=1)),
            lambda z, a: z.square().sum(dim=1),
            LATENT,
            torch.eye(ACTION) * SIGMA**2,
            num_samples=num,
            horizon=HORIZON,
            lambda_=TEMPERATURE,
            u_min=-torch.ones(ACTION),
            u_max=torch.ones(ACTION),
            U_init=torch.zeros(HORIZON, ACTION),
        )

    @torch.no_grad()
    def __call__(self, z0: Tensor) -> Tensor:
        """The first action [A] from the latent `z0` [D]."""
        action = self.mppi.command(z0)
        for _ in range(self.iterations - 1):
            action = self.mppi.command(z0, shift_nominal_trajectory=False)
        return action


def interleave(
    methods: dict[str, Callable[[Tensor], object]], seconds: float, *, warmup: int = 3
) -> dict[str, list[float]]:
    """Milliseconds per call; every turn calls each method once, in a new order, until `seconds` have passed."""
    order = random.Random(0)
    z0 = torch.randn(LATENT, generator=torch.Generator().manual_seed(1))
    for method in methods.values():
        for _ in range(warmup):
            method(z0)
    times: dict[str, list[float]] = {name: [] for name in methods}
    names = list(methods)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        order.shuffle(names)
        for name in names:
            begun = time.perf_counter()
            methods[name](z0)
            times[name].append((time.perf_counter() - begun) * 1e3)
    return times


def median_ratio(a: list[float], b: list[float]) -> float:
    """Median over the turns of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def measure(seconds: float) -> dict[str, float]:
    """Flat metrics: median milliseconds per plan and ratios; `seconds` is the time of each of the three settings."""
    metrics: dict[str, float] = {}
    torch.manual_seed(0)  # the MLPs' weights and the other planners' noise
    for setting, (num, width, iterations) in SETTINGS.items():
        model = MLPDynamics(width)
        methods: dict[str, Callable[[Tensor], object]] = {
            "hand_loop": HandLoop(model.net, num, iterations),
            "wamrl": Ours(model, num, iterations, compile=False),
            "wamrl_compiled": Ours(model, num, iterations, compile=True),
            "pytorch_mppi": PytorchMPPI(model.net, num, iterations),
        }
        times = interleave(methods, seconds)
        for name, values in times.items():
            metrics[f"{setting}/{name}/plan_p50_ms"] = statistics.median(values)
            metrics[f"{setting}/{name}/plan_p95_ms"] = statistics.quantiles(values, n=20)[-1]
            for other in ("hand_loop", "pytorch_mppi"):
                if name.startswith("wamrl"):
                    metrics[f"{setting}/{name}/ratio_to_{other}"] = median_ratio(values, times[other])
        metrics[f"{setting}/turns"] = len(times["hand_loop"])
    return {name: round(value, 4) for name, value in metrics.items()}


def main() -> None:
    """Measure, print, and store `benchmarks/results/planner_overhead.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="per setting; there are three (default 20)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default {OUT.name} in benchmarks/results")
    options = parser.parse_args()
    try:
        peer = importlib.metadata.version("pytorch_mppi")
    except importlib.metadata.PackageNotFoundError:
        sys.exit("this benchmark compares with pytorch_mppi, which is not installed: pip install 'wamrl[bench]'")
    torch.set_num_threads(1)
    clock = Clock()
    metrics = measure(options.seconds)
    for name, value in metrics.items():
        print(f"{name:48s} {value:10.3f}")
    config: dict[str, Any] = {
        "latent": LATENT,
        "action": ACTION,
        "horizon": HORIZON,
        "sigma": SIGMA,
        "temperature": TEMPERATURE,
        "dtype": "float32",
        "settings": {name: list(sizes) for name, sizes in SETTINGS.items()},
        "seconds_per_setting": options.seconds,
    }
    clock.store(options.out, config=config, metrics=metrics, peers={"pytorch_mppi": peer})


if __name__ == "__main__":
    main()
