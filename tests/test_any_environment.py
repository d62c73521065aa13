"""An environment is a module and a YAML: what is collected in it trains a model, and the model plans in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from wamrl import plan, train
from wamrl.collect import collect
from wamrl.collect import main as collect_main
from wamrl.data import EpisodeDataset, load_episode
from wamrl.envs.base import RowsEnv, seed_start_states
from wamrl.interfaces import Layout

HERE = "tests.test_any_environment.ReachToy"
TASKS = ["toy/left", "toy/right"]
start_states = seed_start_states


class ReachToy(RowsEnv):
    """A gripper on a line of three dims: `state` is hand xyz, object xyz, goal xyz; it ends at the goal."""

    control_dt_s, action_repeat, max_steps = 0.1, 1, 12
    layout = Layout(places={"state": {"hand": (0, 3), "object": (3, 6), "goal": (6, 9)}})

    def __init__(self, tasks, num_envs=1, *, split="train", seed=0, device="cpu") -> None:
        super().__init__(tasks, num_envs, device=device, seed=seed)
        self.state, self.count = torch.zeros(num_envs, 9), torch.zeros(num_envs, 1)
        self._declare({"state": (9,)}, (4,))

    def _start_count(self, task):
        return 50

    def _begin(self, rows, start, snapshot):
        self.state[rows], self.count[rows] = torch.sin(start[:, None] * torch.arange(1.0, 10.0)), 0
        return {"state": self.state[rows]}

    def _advance(self, rows, action):
        self.state[rows, :3] += 0.3 * action[:, :3]
        self.count[rows] += 1
        away = (self.state[rows, :3] - self.state[rows, 6:]).norm(dim=1, keepdim=True)
        over = away < 0.4
        shown = {"state": self.state[rows], "reward": -away, "success": over, "terminated": over}
        return shown | {"truncated": self.count[rows] >= self.max_steps, "simulator_error": torch.zeros_like(over)}


class UnmarkedToy(ReachToy):
    """It does not say what its state holds where."""

    layout = Layout()


class ExpertPolicy:
    """Straight to the goal; counts its steps in its state, which says whether the rows keep theirs."""

    gripper = 3

    def __init__(self, tasks) -> None:
        self.tasks = tasks

    def initial_state(self, rows):
        return TensorDict({"steps": torch.zeros(rows)}, batch_size=[rows])

    def act(self, observation, policy_state, is_init):
        state, steps = observation["state"], policy_state["steps"]
        way = 2.0 * (state[:, 6:] - state[:, :3])
        policy_state = policy_state.clone().set("steps", steps + 1)
        return torch.cat([way, steps[:, None] / 100], dim=1).clamp(-1, 1), policy_state


def _collected(path: Path, mixture: dict, **options) -> dict[str, tuple[TensorDict, dict]]:
    collect(path, {"_target_": HERE, "tasks": TASKS}, mixture, snapshots=False, progress=False, **options)
    return {folder.name: load_episode(folder) for folder in sorted((path / "episodes").iterdir())}


def test_every_behaviour_works_where_a_module_has_an_expert(tmp_path: Path) -> None:
    mixture = {"expert": 2, "noisy_expert": 2, "failing": 12, "near_miss": 4, "random": 2}
    found = _collected(tmp_path / "data", mixture)
    assert len(found) == 44
    for episode, info in found.values():
        steps, state = torch.arange(info["steps"]), episode["observation", "state"]
        # The expert's clean action, at its own step of its own episode, whoever acted.
        clean = torch.cat([2.0 * (state[:-1, 6:] - state[:-1, :3]), steps[:, None] / 100], dim=1).clamp(-1, 1)
        torch.testing.assert_close(episode["label"], clean)
        assert torch.equal(episode["action"], episode["label"]) == (info["behaviour"] == "expert")
        ended = bool(episode["success"][-1])
        assert episode["terminated"].tolist() == [False] * (info["steps"] - 1) + [ended]
        assert episode["truncated"].tolist() == [False] * (info["steps"] - 1) + [info["steps"] == 12 and not ended]
    kinds = {info["details"]["kind"] for _, info in found.values() if info["behaviour"] == "failing"}
    assert kinds == {"noise", "gripper", "offset"}
    index = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert index["env"]["name"] == "toy" and index["env"]["control_dt_s"] == 0.1
    assert EpisodeDataset.open(tmp_path / "data").layout == ReachToy.layout
    again = _collected(tmp_path / "again", mixture, rows=3)
    assert all((again[name][0] == episode).all() and again[name][1] == info for name, (episode, info) in found.items())


@pytest.mark.parametrize(
    ("env", "options", "message"),
    [
        ("agent_toys.AimEnv", {"mixture": {"expert": 1}}, "agent_toys has no ExpertPolicy; choose data=random"),
        ("test_any_environment.UnmarkedToy", {"mixture": {"near_miss": 1}}, "near_miss needs an environment"),
        ("agent_toys.AimEnv", {"snapshots": True}, "AimEnv cannot save its state; collect with snapshots=false"),
    ],
)
def test_what_an_environment_lacks_is_said_before_anything_is_written(tmp_path, env, options, message) -> None:
    settings = {"mixture": {"random": 1}, "snapshots": False, "progress": False} | options
    with pytest.raises(ValueError, match=message):
        collect(tmp_path / "data", {"_target_": f"tests.{env}", "tasks": ["toy/aim-v0"]}, **settings)
    assert not (tmp_path / "data").exists()


class _Killer:
    """Kills the process of start 1 in its first step and that of start 2 in its third; else holds still."""

    def initial_state(self, rows):
        return TensorDict({}, batch_size=[rows])

    def act(self, observation, policy_state, is_init):
        seed, count = observation["state"].unbind(1)
        kills = ((seed == 3.0) & (count == 0.0)) | ((seed == 6.0) & (count == 2.0))  # train start n has seed 3 n
        return torch.where(kills, 1.0, 0.0)[:, None], policy_state


@pytest.mark.filterwarnings("ignore")
def test_a_simulator_that_dies_costs_its_episode_and_not_the_run(tmp_path: Path, capfd) -> None:
    env = {"_target_": "wamrl.envs.gymnasium_env.GymnasiumEnv", "tasks": ["gymnasium/wamrl-test/Faulty-v0"]}
    env |= {"imports": ["faulty_envs"], "workers": 1, "kwargs": {}}
    data = collect(
        tmp_path, env, {"policy": 4}, policy=_Killer(), snapshots=False, steps_after_success=0, rows=1, progress=False
    )
    assert data is not None
    found = {e["start"]: (e["steps"], e["success"], e["simulator_error"]) for e in data.episodes}
    assert found == {0: (3, True, False), 2: (2, False, True), 3: (3, True, False)}
    assert "Faulty-v0-00001 (start 1), which is left out" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_one_hot_actions_are_drawn_and_a_fall_is_an_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    collect_main(["env=gymnasium/cartpole", "env.workers=0", "data=random", "data.mixture.random=4", "path=data"])
    for folder in (tmp_path / "data" / "episodes").iterdir():
        episode, _ = load_episode(folder)
        action = episode["action"].numpy()
        assert np.array_equal(action.sum(1), np.ones(len(action))) and set(np.unique(action)) == {0.0, 1.0}
        assert not episode["label_available"].any()
        assert bool(episode["terminated"][-1]) and not episode["truncated"].any()


@pytest.mark.filterwarnings("ignore")
def test_a_preset_is_collected_trained_on_and_planned_in(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    env = ["env=gymnasium/pendulum", "env.workers=0", "env.max_steps=12"]
    collect_main([*env, "data=random", "data.mixture.random=6", "path=data"])
    small = [f"wam.{name}=16" for name in ("latent_dim", "width", "dynamics_width", "head_width")]
    train.main([
        "data=data", *small, "wam.members=2", "wam.horizon=3", "steps=4", "batch_size=8", "length=4", "warmup_steps=1",
        "validation_fraction=0", "threads=1", "device=cpu", "tensorboard=false",
    ])  # fmt: skip
    wam = ["wam=outputs/train/latest", "planner.num_candidates=4", "planner.horizon=3", "controller.replan_every=3"]
    plan.main([*env, *wam, "episodes=1", "workers=1", "num_envs=1", "latency_plans=1"])
    results = json.loads(Path("outputs/plan/latest/results.json").read_text())
    assert results["methods"] == ["planner", "policy", "shuffled", "random"]  # there is no expert
    (trace,) = json.loads(Path("outputs/plan/latest/traces.json").read_text())
    assert [plan["step"] for plan in trace["plans"]] == [0, 3, 6, 9] and len(trace["path"]) == 13
    assert all(len(plan["candidates"]) == 4 and len(plan["path"]) == 4 for plan in trace["plans"])
    assert trace["axes"][0].startswith("principal component 1 of the state (")
    assert trace["axes"][0] in Path("outputs/plan/latest/report.html").read_text()
    one = "env.tasks=gymnasium/Pendulum-v1"  # a single task may stand without brackets
    collect_main([*env, one, *wam, "data=planner", "data.mixture.policy=2", "first_start=6", "path=more"])
    assert {e["behaviour"] for e in EpisodeDataset.open("more").episodes} == {"policy"}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        plan.main([*env, *wam, "methods=[expert]"])
    assert "has no ExpertPolicy" in capsys.readouterr().err
