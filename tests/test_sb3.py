"""The promises of agent=sb3: the algorithms are SB3's, a stopped run goes on bit for bit, and steps are counted."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.agent_toys import AimEnv, reference_model, write_dataset
from tests.test_posttrain import MEASURING, small
from wamrl import training
from wamrl.agents.base import LearningDiverged
from wamrl.agents.sb3 import SB3
from wamrl.envs.base import RowsEnv
from wamrl.measuring import Measuring
from wamrl.training import find_state, write_state

stable_baselines3 = pytest.importorskip("stable_baselines3", reason="needs the extra sb3")
QUICK = {
    "sac": {"batch_size": 16, "learning_starts": 48, "gamma": 0.5, "policy_kwargs": {"net_arch": [16, 16]}},
    "ppo": {"batch_size": 20, "n_epochs": 2},
}


class Killed(BaseException):
    pass


def learner(name: str, **settings) -> SB3:
    return SB3(algorithm=name, demonstrations=name == "sac", settings={**QUICK[name], **settings})


def attached(env: RowsEnv | None = None, *, algorithm: str = "sac", decisions: int = 5, **settings) -> SB3:
    from wamrl.envs.sb3 import RowsSB3Env

    made = SB3(algorithm=algorithm, settings={**QUICK[algorithm], **settings})
    made.bind(reference_model(), None, rows=4, seed=0)
    env = env or AimEnv(4, tasks=("toy/aim-v0", "toy/aim-v1"))
    made.attach(RowsSB3Env(env), decisions=decisions, keys=("state",), tasks=(1, 2) if len(env.tasks) > 1 else (1,))
    return made


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_stable_baselines3_learns_in_the_same_environment(tmp_path, algorithm):
    data = write_dataset(tmp_path / "data")
    settings = {"learning_rate": 3e-3, "batch_size": 48, "gamma": 0.5}
    settings |= {"learning_starts": 48} if algorithm == "sac" else {"n_epochs": 8, "n_steps": 6}
    learner = SB3(algorithm=algorithm, demonstrations=algorithm == "sac", settings=settings)
    model = reference_model()
    found = small(tmp_path / "run", model=model, learner=learner, data=data, iterations=30)
    assert found["real_steps"] == 30 * 16 * 6
    assert found["after"]["real"]["reward"] > found["before"]["real"]["reward"] + 0.1
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in reference_model().state_dict().items())


RESUMED = {
    "ppo": lambda: learner("ppo"),
    "sac": lambda: learner("sac", gradient_steps=-1, learning_starts=200),  # killed while it still acts at random
    "sac whose buffer is full": lambda: learner("sac", buffer_size=16 * 12),
    "sac with gSDE and a fixed entropy": lambda: learner("sac", use_sde=True, ent_coef=0.1),
}


@pytest.mark.parametrize("moment", ["learning", "writing"])
@pytest.mark.parametrize("agent", RESUMED)
def test_a_killed_run_resumes_bit_for_bit(tmp_path, monkeypatch, agent, moment):
    if moment == "writing" and agent != "sac":
        pytest.skip("once is enough")
    data = write_dataset(tmp_path / "data")

    def run(folder):
        # What a process does beside draws from the global generators, another number of times in each of them.
        for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
            for _ in range(3 if folder == "whole" else 5):
                draw()
        # Five steps of episodes of six: an iteration ends within an episode.
        how = Measuring(simulator=MEASURING.simulator, episodes=2, rows=2)
        return small(tmp_path / folder, learner=RESUMED[agent](), data=data, decisions=5, iterations=5,
                     evaluate_every=1, save_model=lambda *_: None, measuring=how)  # fmt: skip

    whole = run("whole")
    learn, calls = SB3.learn, []

    def dies(*given):
        calls.append(given)
        if len(calls) == 4:
            raise Killed
        return learn(*given)

    def dies_writing(folder, tensors, facts):
        if facts["iteration"] < 4:
            return write_state(folder, tensors, facts)
        monkeypatch.setattr(training, "write_json", lambda *_: (_ for _ in ()).throw(Killed))  # the tensors are there
        return write_state(folder, tensors, facts)

    if moment == "learning":
        monkeypatch.setattr(SB3, "learn", dies)
    else:
        monkeypatch.setattr("wamrl.posttraining.write_state", dies_writing)
    with pytest.raises(Killed):
        run("parts")
    monkeypatch.undo()
    assert json.loads((find_state(tmp_path / "parts" / "checkpoints") / "state.json").read_text())["iteration"] == 2
    parts = run("parts")
    folders = [find_state(tmp_path / name / "checkpoints") for name in ("whole", "parts")]
    states = [load_file(folder / "state.safetensors") for folder in folders]
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    assert whole["curve"] == parts["curve"] and whole["real_steps"] == parts["real_steps"] == 5 * 16 * 5
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    if "full" in agent:
        assert states[0]["learner.replay_place"].tolist()[1] == 1 and len(states[0]["learner.replay.actions"]) == 12
    elif agent != "ppo":
        kept = states[0]["learner.replay.rewards"]
        assert len(kept) * 16 == data.num_steps // 16 * 16 + 5 * 16 * 5  # the demonstrations, and every step since


def test_a_finished_run_can_be_made_longer(tmp_path):
    data = write_dataset(tmp_path / "data")

    def run(folder, iterations):
        return small(tmp_path / folder, learner=learner("sac"), data=data, iterations=iterations, evaluate_every=2)

    whole = run("whole", 6)
    first = run("parts", 4)
    assert [point["iteration"] for point in first["curve"]] == [0, 2, 4]
    assert run("parts", 6)["curve"] == whole["curve"]
    assert [point["iteration"] for point in whole["curve"]] == [0, 2, 4, 6]


def test_the_state_of_an_earlier_version_is_refused():
    with pytest.raises(ValueError, match="kept nothing of SB3"):
        attached().load_state_dict({})
    with pytest.raises(ValueError, match="only SB3's own buffer can be saved"):
        attached(replay_buffer_class="her")


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
@pytest.mark.parametrize("fault", ["a reward", "an observation", "a weight of the policy"])
def test_what_is_not_finite_stops_the_run_before_the_last_good_checkpoint_is_lost(tmp_path, algorithm, fault):
    class Blind(AimEnv):
        def _show(self, rows):
            shown = super()._show(rows)
            return {"state": shown["state"] * torch.nan} if fault == "an observation" and self.taken == 15 else shown

    env = Blind(16, nan_after=14 if fault == "a reward" else None)  # in the last step of the third iteration
    made, measuring = learner(algorithm), Measuring(simulator=MEASURING.simulator, episodes=2, rows=2)
    begin = made.begin

    def spoil(iteration):
        begin(iteration)
        if fault == "a weight of the policy" and iteration == 2:
            policy = made.algorithm.policy
            (policy.action_net if algorithm == "ppo" else policy.actor.mu).weight.data[0, 0] = torch.nan

    made.begin = spoil
    with pytest.raises(LearningDiverged, match=f"{fault} was NaN or infinite, and Stable-Baselines3"):
        small(tmp_path, learner=made, env=env, data=write_dataset(tmp_path / "data"), save_every=1,
              decisions=5, measuring=measuring)  # fmt: skip
    folder = find_state(tmp_path / "checkpoints")
    assert json.loads((folder / "state.json").read_text())["iteration"] == 2
    kept = load_file(folder / "state.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_global_generators_are_left_alone(algorithm):
    def states():
        return random.getstate(), [part.tolist() if hasattr(part, "tolist") else part for part in np.random.get_state()]

    before = states()
    made = attached(algorithm=algorithm)
    made.begin(0)
    made.learn(None)
    assert states() == before


def test_steps_beyond_what_was_asked_for_are_counted():
    made = attached(algorithm="ppo", n_steps=8, batch_size=16)
    made.begin(0)
    assert made.learn(None)["steps"] == 4 * 8  # SB3's PPO collects whole buffers
    made = attached(train_freq=3)
    made.begin(0)
    assert made.learn(None)["steps"] == 4 * 6
