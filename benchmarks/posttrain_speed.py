"""How fast post-training is: TorchRL's collector beside the bare environment, and an update beside SB3's PPO.

    python -m benchmarks.posttrain_speed

Collector: 64 Meta-World rows under the reference policy; the bare rate is the same environment stepped with actions
drawn beforehand, resets included. Update: eight epochs over the same number of transitions with the same minibatch,
once through `wamrl.agents.ppo` without the world model's loss, once through SB3's PPO with two hidden layers of 256
for policy and value (the WAM's policy has those and LayerNorm, its critic four heads of 128), alternately in one
process. Times are CPU seconds of this process; medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.collectors import Collector

from benchmarks.stored import RESULTS, Clock
from wamrl import checkpoint
from wamrl.agents.base import EpisodeEnv, value_unit
from wamrl.agents.ppo import PPO
from wamrl.envs.metaworld import MetaWorldEnv
from wamrl.envs.sb3 import RowsSB3Env

ROWS, DECISIONS, EPOCHS, MINIBATCH = 64, 48, 8, 512


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU time of this process that `work` takes."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    clock = Clock()
    model = checkpoint.load("six")
    learner = PPO(world_weight=0.0, epochs=EPOCHS, minibatch=MINIBATCH, kl_limit=1e9)
    bare = MetaWorldEnv(["metaworld/push-v3"], ROWS, split="train")
    env = EpisodeEnv(
        MetaWorldEnv(["metaworld/push-v3"], ROWS, split="train"),
        keys=model.spec.observation,
        discount=model.spec.discount,
        success_bonus=model.spec.success_bonus,
        value_unit=value_unit(model),
        success_ends=False,
    )
    learner.bind(model, None, rows=ROWS, seed=0)
    collector = Collector(
        env, learner.actor, frames_per_batch=ROWS * DECISIONS, total_frames=-1, reset_at_each_iter=True,
        trust_policy=True, auto_register_policy_transforms=False,
    )  # fmt: skip
    drawn = torch.rand(DECISIONS, ROWS, 4) * 2.0 - 1.0
    batches: list[TensorDict] = []

    def step_bare() -> None:
        bare.set_seed(0)
        bare.reset()
        for action in drawn:
            bare.step(TensorDict({"action": action}, batch_size=[ROWS]))

    def collect() -> None:
        learner.begin(0)
        env.set_seed(0)
        batches.append(next(iter(collector)).clone())

    rates: dict[str, list[float]] = {"bare": [], "collector": []}
    step_bare()
    collect()
    for _ in range(repeats):
        rates["bare"].append(ROWS * DECISIONS / cpu_seconds(step_bare))
        rates["collector"].append(ROWS * DECISIONS / cpu_seconds(collect))

    from stable_baselines3 import PPO as SB3PPO

    vec = RowsSB3Env(bare)
    widths = [256, 256]
    peer = SB3PPO(
        "MultiInputPolicy", vec, n_steps=DECISIONS, batch_size=MINIBATCH, n_epochs=EPOCHS, device="cpu", seed=0,
        policy_kwargs={"net_arch": {"pi": widths, "vf": widths}, "activation_fn": torch.nn.SiLU},
    )  # fmt: skip
    peer.learn(ROWS * DECISIONS)  # fills its buffer, and warms up
    times: dict[str, list[float]] = {"wamrl": [], "sb3": []}
    for number in range(repeats + 1):
        learner.begin(number + 1)
        ours = cpu_seconds(lambda: learner.learn(batches[0].clone()))
        theirs = cpu_seconds(peer.train)
        if number:  # the first is a warm-up
            times["wamrl"].append(ours)
            times["sb3"].append(theirs)
    collector.shutdown()
    metrics = {
        "collector/bare_steps_per_cpu_s": statistics.median(rates["bare"]),
        "collector/collector_steps_per_cpu_s": statistics.median(rates["collector"]),
        "collector/ratio": statistics.median(c / b for b, c in zip(rates["bare"], rates["collector"], strict=True)),
        "update/wamrl_cpu_s": statistics.median(times["wamrl"]),
        "update/sb3_cpu_s": statistics.median(times["sb3"]),
        "update/ratio": statistics.median(a / b for a, b in zip(times["wamrl"], times["sb3"], strict=True)),
    }
    config = {"rows": ROWS, "decisions": DECISIONS, "epochs": EPOCHS, "minibatch": MINIBATCH, "repeats": repeats}
    clock.store(RESULTS / "posttrain_speed.json", config=config, metrics=metrics, arguments=" ".join(sys.argv[1:]))
    for name, value in metrics.items():
        print(f"{name:40s} {value:.3f}")


if __name__ == "__main__":
    main()
