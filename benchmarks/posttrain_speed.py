"""How fast post-training is: TorchRL's collector beside the bare environment, and an update beside SB3's PPO.

    python -m benchmarks.posttrain_speed

Collector: 64 Meta-World rows under the reference policy; the bare rate is the same environment stepped with actions
drawn beforehand, resets included. Update: eight epochs over the same transitions with the same minibatch and equal
networks, once through `wamrl.agents.ppo` without the world model's loss, advantages included, once through SB3's PPO,
alternately in one process. SB3 reads what the WAM's heads read (the latents, which neither trains), and its policy and
value networks are built by the functions that build the WAM's: two hidden layers of 256, and four heads of 128, with
LayerNorm. `sb3_plain` beside it is SB3's own network of these widths, without LayerNorm. Times are CPU seconds of this
process; medians.
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
from torch import nn
from torchrl.collectors import Collector

from benchmarks.stored import RESULTS, Clock
from wamrl import checkpoint
from wamrl.agents.base import EpisodeEnv, encode, value_unit
from wamrl.agents.ppo import PPO
from wamrl.envs.metaworld import MetaWorldEnv
from wamrl.models.parts import ensemble_mlp, mlp

ROWS, DECISIONS, EPOCHS, MINIBATCH = 64, 48, 8, 512


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU time of this process that `work` takes."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def make_peer(batch: TensorDict, inputs: torch.Tensor, *, equal: bool) -> Any:
    """SB3's PPO with `batch` [B, T] in its buffer, observing `inputs` [B, T, X]; `equal`: with the WAM's networks."""
    import numpy as np
    from gymnasium.spaces import Box
    from stable_baselines3 import PPO as SB3PPO
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.policies import ActorCriticPolicy

    class Networks(nn.Module):
        latent_dim_pi, latent_dim_vf = 256, 4 * 128

        def __init__(self, width: int) -> None:
            super().__init__()
            self.policy = mlp(width, [256, 256], 1)[:-1]
            self.values = ensemble_mlp(4, width, [128], 1)[:-1]

        def forward_actor(self, x: torch.Tensor) -> torch.Tensor:
            return self.policy(x)

        def forward_critic(self, x: torch.Tensor) -> torch.Tensor:
            return self.values(x.expand(4, -1, -1)).movedim(0, -1).flatten(1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.forward_actor(x), self.forward_critic(x)

    class EqualPolicy(ActorCriticPolicy):
        def _build_mlp_extractor(self) -> None:
            self.mlp_extractor = Networks(self.features_dim)  # type: ignore[assignment]

    plain = {"net_arch": {"pi": [256, 256], "vf": [4 * 128]}, "activation_fn": nn.SiLU}
    peer = SB3PPO(
        EqualPolicy if equal else "MlpPolicy", None, n_steps=DECISIONS, batch_size=MINIBATCH, n_epochs=EPOCHS,
        device="cpu", seed=0, policy_kwargs={} if equal else plain, _init_setup_model=False,
    )  # type: ignore[arg-type]  # fmt: skip
    peer.observation_space = Box(-np.inf, np.inf, (inputs.shape[-1],), np.float32)
    peer.action_space = Box(-1.0, 1.0, (batch["chain"].shape[-1],), np.float32)
    peer.n_envs = ROWS
    peer._setup_model()
    peer._logger = Logger(None, [])
    buffer = peer.rollout_buffer
    for step in range(DECISIONS):
        now = batch[:, step]
        reward, first = now["next", "reward"][:, 0].numpy(), now["done"][:, 0].float().numpy()
        value, log_prob = now["state_value"][:, 0], now["action_log_prob"]
        buffer.add(inputs[:, step].numpy(), now["chain"].numpy(), reward, first, value, log_prob)
    buffer.compute_returns_and_advantage(batch["state_value"][:, -1, 0], batch["next", "done"][:, -1, 0].numpy())
    return peer


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

    batch = batches[0]
    learner._values(batch)
    with torch.no_grad():
        inputs = model.policy_input(encode(model, batch.reshape(-1))).view(ROWS, DECISIONS, -1)
    peers = {"sb3": make_peer(batch, inputs, equal=True), "sb3_plain": make_peer(batch, inputs, equal=False)}
    times: dict[str, list[float]] = {"wamrl": [], "sb3": [], "sb3_plain": []}
    for number in range(2 * repeats + 1):
        learner.begin(number + 1)
        given = batch.clone()
        found = {"wamrl": cpu_seconds(lambda given=given: learner.learn(given))}
        found |= {name: cpu_seconds(peer.train) for name, peer in peers.items()}
        if number:  # the first is a warm-up
            for name, seconds in found.items():
                times[name].append(seconds)
    collector.shutdown()
    metrics = {
        "collector/bare_steps_per_cpu_s": statistics.median(rates["bare"]),
        "collector/collector_steps_per_cpu_s": statistics.median(rates["collector"]),
        "collector/ratio": statistics.median(c / b for b, c in zip(rates["bare"], rates["collector"], strict=True)),
        "update/wamrl_cpu_s": statistics.median(times["wamrl"]),
        "update/sb3_cpu_s": statistics.median(times["sb3"]),
        "update/sb3_plain_cpu_s": statistics.median(times["sb3_plain"]),
        "update/ratio": statistics.median(a / b for a, b in zip(times["wamrl"], times["sb3"], strict=True)),
    }
    config = {"rows": ROWS, "decisions": DECISIONS, "epochs": EPOCHS, "minibatch": MINIBATCH, "repeats": repeats}
    clock.store(RESULTS / "posttrain_speed.json", config=config, metrics=metrics, arguments=" ".join(sys.argv[1:]))
    for name, value in metrics.items():
        print(f"{name:40s} {value:.3f}")


if __name__ == "__main__":
    main()
