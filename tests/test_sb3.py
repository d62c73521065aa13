"""The promises of agent=sb3: the algorithms are SB3's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.agent_toys import AimEnv, reference_model
from wamrl.agents.sb3 import SB3
from wamrl.envs.base import RowsEnv

stable_baselines3 = pytest.importorskip("stable_baselines3", reason="needs the extra sb3")
QUICK = {
    "sac": {"batch_size": 16, "learning_starts": 48, "gamma": 0.5, "policy_kwargs": {"net_arch": [16, 16]}},
    "ppo": {"batch_size": 20, "n_epochs": 2},
}


def attached(env: RowsEnv | None = None, *, algorithm: str = "sac", decisions: int = 5, **settings) -> SB3:
    from wamrl.envs.sb3 import RowsSB3Env

    made = SB3(algorithm=algorithm, settings={**QUICK[algorithm], **settings})
    made.bind(reference_model(), None, rows=4, seed=0)
    env = env or AimEnv(4, tasks=("toy/aim-v0", "toy/aim-v1"))
    made.attach(RowsSB3Env(env), decisions=decisions, keys=("state",), tasks=(1, 2) if len(env.tasks) > 1 else (1,))
    return made


@pytest.mark.parametrize(
    "settings",
    [{}, {"target_update_interval": 2, "gamma": 0.9}, {"ent_coef": 0.1}, {"use_sde": True}],
    ids=["usual", "targets now and then", "fixed entropy", "gSDE"],
)
def test_a_gradient_step_of_sac_is_that_of_stable_baselines3(settings):
    mine = attached(gradient_steps=0, **settings)
    for iteration in range(8):
        mine.begin(iteration)
        mine.learn(None)
    mine = mine.algorithm
    plain = stable_baselines3.SAC("MultiInputPolicy", mine.env, seed=0, device="cpu", **{**QUICK["sac"], **settings})
    plain.policy.load_state_dict(mine.policy.state_dict())
    plain.replay_buffer = mine.replay_buffer
    plain.set_logger(mine.logger)
    begun = [parameter.clone() for parameter in mine.policy.parameters()]
    said = []
    for algorithm in (mine, plain):
        np.random.seed(3)
        torch.manual_seed(3)
        algorithm.train(7, batch_size=16)
        said.append({name: algorithm.logger.name_to_value[f"train/{name}"] for name in ("critic_loss", "actor_loss")})
    for ours, theirs, before in zip(mine.policy.parameters(), plain.policy.parameters(), begun, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)
        assert not torch.equal(ours, before) or "use_sde" in settings
    if "ent_coef" not in settings:
        torch.testing.assert_close(mine.log_ent_coef, plain.log_ent_coef, atol=1e-6, rtol=1e-6)
        assert float(mine.log_ent_coef.detach()) != 0.0
    assert said[0] == pytest.approx(said[1], rel=1e-4) and mine._n_updates == plain._n_updates == 7
    assert mine.lean == ("use_sde" not in settings)
