"""What wamrl.envs.isaaclab_env promises beside tests/test_env_contract.py, on real Isaac Lab (`make test-isaac`).

What needs no Isaac Lab runs always.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict

from benchmarks.isaac import stand_in_assets
from wamrl.envs.isaaclab_env import IsaacLabEnv, start_states
from wamrl.naming import UnknownNameError

ROOT = Path(__file__).resolve().parents[1]
HERE = importlib.util.find_spec("isaaclab") is not None
isaac = pytest.mark.isaac
needs_isaac = pytest.mark.skipif(not HERE, reason="needs Isaac Lab: make test-isaac")
# Upstream warns about its own future.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="session")
def asset_root(tmp_path_factory) -> str:
    """Stand-ins for upstream's assets: our cart and pole under its name, and a plane."""
    return stand_in_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module", params=["Wamrl-Balance", "Wamrl-Push"])
def env(request, asset_root):
    made = IsaacLabEnv(f"isaaclab/{request.param}", 4, asset_root=asset_root, max_steps=20, snapshots=True)
    yield made
    made.close()


def starts(*numbers: int) -> TensorDict:
    return TensorDict({"start": torch.tensor(numbers)}, [len(numbers)])


def follow(env: IsaacLabEnv, td: TensorDict, steps: int, level: float = 0.5) -> TensorDict:
    found = []
    for _ in range(steps):
        td = env.step(td.clone().set("action", torch.full(env.action_spec.shape, level)))["next"]
        found.append(td.clone())
    return torch.stack(found)


# ------------------------------------------------------------------------------------------------ without Isaac Lab


def balanced_until_the_end(task: Any, length: int, off: set[int]) -> list[bool]:
    """Success in every step of an episode of `Balance` that is not balanced in the steps `off`, from 1 on."""
    found = []
    for step in range(1, length + 1):
        zero = torch.zeros(1, 1)
        task._parts = lambda zero=zero, step=step: (zero, zero, zero + (0.3 if step in off else 0.1), zero)
        task.episode_length_buf = torch.tensor([step])
        over, last = task._get_dones()
        assert not over.any() and bool(last) == (step == length)
        found.append(bool(task.success))
    return found


@pytest.mark.skipif(HERE, reason="Isaac Lab is installed here")
def test_balance_succeeds_at_the_end_of_an_episode_whose_last_second_was_balanced(monkeypatch):
    # The task's own arithmetic, on stand-ins for the modules that it is made of.
    class Base:
        pass

    names = ("isaaclab", "isaaclab.sim", "isaaclab.actuators", "isaaclab.assets", "isaaclab.envs", "isaaclab.scene",
             "isaaclab.sensors", "isaaclab.utils", "isaaclab_newton", "isaaclab_newton.physics",
             "isaaclab_newton.renderers")  # fmt: skip
    for name in names:
        monkeypatch.setitem(sys.modules, name, MagicMock())
    for kind in ("DirectRLEnv", "DirectRLEnvCfg"):
        setattr(sys.modules["isaaclab.envs"], kind, Base)
    sys.modules["isaaclab.scene"].InteractiveSceneCfg = type("Scene", (), {"__init__": lambda self, **_: None})
    sys.modules["isaaclab.utils"].configclass = lambda cls: cls
    monkeypatch.setattr(gymnasium, "register", lambda *given, **options: None)
    module = importlib.import_module("wamrl.envs.isaaclab_tasks")
    del sys.modules["wamrl.envs.isaaclab_tasks"]
    for length, off, wanted in (
        (100, set(), True),
        (100, {1, 40}, True),  # 60 steps of 1/60 s were balanced since
        (100, {41}, False),
        (100, {100}, False),
        (20, set(), True),
        (20, {1}, False),  # an episode that is shorter than a second has to be balanced throughout
    ):
        task = object.__new__(module.Balance)
        task.step_dt, task.max_episode_length = 1 / 60, length
        task._lost = torch.zeros(1, dtype=torch.int64)
        assert balanced_until_the_end(task, length, off) == [False] * (length - 1) + [wanted], (length, off)


@pytest.mark.skipif(HERE, reason="Isaac Lab is installed here")
def test_a_missing_isaac_lab_is_answered_with_how_to_get_it():
    with pytest.raises(ModuleNotFoundError, match="make setup-isaac"):
        IsaacLabEnv("isaaclab/Wamrl-Push")


def test_a_missing_asset_root_is_noticed_at_once(monkeypatch, tmp_path):
    monkeypatch.delenv("ISAACSIM_ASSET_ROOT", raising=False)
    with pytest.raises(ValueError, match="asset_root=<folder"):
        IsaacLabEnv("isaaclab/Isaac-Cartpole-Direct")
    with pytest.raises(FileNotFoundError, match="there is no folder .*Isaac"):
        IsaacLabEnv("isaaclab/Isaac-Cartpole-Direct", asset_root=str(tmp_path))


def test_settings_out_of_range_are_refused():
    for options, message in (
        ({"tasks": "Wamrl-Push"}, "did you mean 'isaaclab/Wamrl-Push'"),
        ({"tasks": ["isaaclab/Wamrl-Push", "isaaclab/Wamrl-Balance"]}, "one env per task"),
        ({"tasks": "isaaclab/Wamrl-Push", "num_envs": 0}, "num_envs is 0"),
        ({"tasks": "isaaclab/Wamrl-Push", "max_steps": 0}, "max_steps is 0"),
        ({"tasks": "isaaclab/Wamrl-Push", "split": "trian"}, "did you mean 'train'"),
    ):
        with pytest.raises(ValueError, match=message):
            IsaacLabEnv(**options)


def test_seeds_of_splits_never_meet():
    seeds = [set(start_states("x", split, 50).rand_vec[:, 0]) for split in ("train", "dev", "test")]
    assert not (seeds[0] & seeds[1] | seeds[0] & seeds[2] | seeds[1] & seeds[2])


def test_a_second_camera_keeps_its_own_name():
    images = {"front": torch.zeros(2, 4, 6, 3, dtype=torch.uint8), "wrist": torch.ones(2, 4, 6, 3, dtype=torch.uint8)}
    named = IsaacLabEnv._named(None, {"policy": torch.zeros(2, 5), **images})
    assert {key: tuple(value.shape[1:]) for key, value in named.items()} == {
        "state": (5,), "pixels": (3, 4, 6), "wrist": (3, 4, 6)
    }  # fmt: skip
    assert not named["pixels"].any() and named["wrist"].all()


# --------------------------------------------------------------------------------------------------- on Isaac Lab
# One simulation per process: these first, before the environment that the others share is open.


@isaac
@needs_isaac
@pytest.mark.parametrize("task", ["Isaac-Cartpole-Direct", "Isaac-Cartpole"])
def test_upstream_tasks_run_with_stand_in_assets(task, asset_root):
    made = IsaacLabEnv(f"isaaclab/{task}", 8, asset_root=asset_root, overrides=["physics=newton_mjwarp"], max_steps=10)
    first, second = (follow(made, made.reset(starts(*range(8))), 10, level=0.1) for _ in range(2))
    assert torch.equal(first["state"], second["state"]) and first["state"].shape == (10, 8, 4)
    assert first["truncated"][-1].all() and not first["truncated"][:-1].any()
    assert made.control_dt_s == pytest.approx(made.action_repeat / 120)
    assert made.config == {**made.config, "tasks": [f"isaaclab/{task}"], "max_steps": 10}
    made.close()
    made.close(raise_if_closed=False)


@isaac
@needs_isaac
@pytest.mark.parametrize(
    ("override", "reason"),
    [("physics=newton_mjwrap", "did not match"), ("scene.num_env=3", "not in struct"), ("nonsense", "EQUAL")],
)
def test_an_override_that_the_task_does_not_take_is_refused_by_name(override: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)Wamrl-Balance' does not take the overrides.*{override}.*{reason}"):
        IsaacLabEnv("isaaclab/Wamrl-Balance", 2, overrides=[override])


@isaac
@needs_isaac
def test_one_that_cannot_be_made_leaves_room_for_the_next(asset_root, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect")

    for where in ("gymnasium.make", "wamrl.envs.isaaclab_env.IsaacLabEnv._named"):  # before and after there is a task
        with monkeypatch.context() as patch:
            patch.setattr(where, broken)
            with pytest.raises(ZeroDivisionError, match="a defect"):
                IsaacLabEnv("isaaclab/Wamrl-Balance", 2, asset_root=asset_root)
    made = IsaacLabEnv("isaaclab/Wamrl-Balance", 2, asset_root=asset_root)
    assert made.reset()["state"].isfinite().all()
    made.close()


@isaac
@needs_isaac
def test_making_one_leaves_the_global_generators_alone(asset_root):
    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = drawn()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    made = IsaacLabEnv("isaaclab/Wamrl-Balance", 2, asset_root=asset_root, seed=5)
    made.close()
    assert drawn() == expected


@isaac
@needs_isaac
def test_unknown_ids_are_answered_with_near_ones(asset_root):
    with pytest.raises(UnknownNameError, match="did you mean 'isaaclab/Isaac-Cartpole-Direct'"):
        IsaacLabEnv("isaaclab/Isaac-Cartpole-Directt", asset_root=asset_root)


@isaac
@needs_isaac
def test_balance_does_not_succeed_before_its_end(asset_root):
    made = IsaacLabEnv("isaaclab/Wamrl-Balance", 4, asset_root=asset_root, max_steps=10)
    path = follow(made, made.reset(starts(0, 1, 2, 3)), 10, level=0.0)
    state = path["state"]  # cart, its speed, angle, its speed
    wanted = ((state[..., 2].abs() < 0.2) & (state[..., 3].abs() < 1.0) & (state[..., 0].abs() < 1.0)).all(0)
    made.close()
    assert not path["success"][:-1].any() and torch.equal(path["success"][-1, :, 0], wanted)
    made = IsaacLabEnv("isaaclab/Wamrl-Balance", 4, asset_root=asset_root, max_steps=250)
    length = made.raw.max_episode_length
    made.close()
    assert length == 250  # 250 / 60 s over 1 / 60 s is a little more in floating point


@isaac
@needs_isaac
def test_ppo_learns_to_balance(asset_root):
    from stable_baselines3 import PPO

    from wamrl.envs.sb3 import RowsSB3Env

    made = IsaacLabEnv("isaaclab/Wamrl-Balance", 64, asset_root=asset_root, max_steps=100)
    env = RowsSB3Env(made)

    def mean_return(learner: PPO) -> float:
        made.set_seed(7)
        shown, total, alive = env.reset(), np.zeros(64), np.ones(64)
        for _ in range(100):
            env.step_async(learner.predict(shown, deterministic=True)[0])
            shown, reward, done, _ = env.step_wait()
            total += reward * alive
            alive *= ~done
        return float(total.mean())

    sizes = {"n_steps": 32, "batch_size": 512, "n_epochs": 8, "learning_rate": 2e-3, "gamma": 0.98, "gae_lambda": 0.9}
    learner = PPO("MultiInputPolicy", env, seed=0, device="cpu", **sizes)
    before = mean_return(learner)
    learner.learn(64 * 32 * 15)
    after = mean_return(learner)
    made.close()
    assert after > before + 10, (before, after)


@isaac
@needs_isaac
def test_our_own_tasks_need_no_asset_root():
    code = (
        "import torch\nfrom wamrl.envs.isaaclab_env import IsaacLabEnv\n"
        "env = IsaacLabEnv('isaaclab/Wamrl-Balance', 2)\n"
        "td = env.step(env.reset().set('action', torch.zeros(2, 1)))['next']\n"
        "print('finite', bool(td['state'].isfinite().all()))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "ISAACSIM_ASSET_ROOT"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=250)
    assert "finite True" in done.stdout, done.stderr


@isaac
@needs_isaac
def test_the_same_start_is_the_same_episode_and_another_is_not(env):
    first, second = (follow(env, env.reset(starts(0, 1, 2, 3)), 6) for _ in range(2))
    for key in first.keys():
        assert torch.equal(first[key], second[key]), key
    assert not torch.equal(first["state"][:, 0], first["state"][:, 1])
    swapped = follow(env, env.reset(starts(1, 0, 3, 2)), 6)  # whichever row it runs in, up to the row's place
    assert torch.allclose(swapped["state"][:, 0], first["state"][:, 1], atol=1e-3)


@isaac
@needs_isaac
def test_the_seed_decides_what_resets_draw(env):
    def drawn(seed: int) -> torch.Tensor:
        env.set_seed(seed)
        return torch.stack([env.reset()["state"] for _ in range(2)])

    before = torch.get_rng_state()
    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    assert torch.equal(before, torch.get_rng_state())


@isaac
@needs_isaac
def test_an_episode_ends_with_its_own_last_observation(env):
    path = follow(env, env.reset(starts(0, 1, 2, 3)), 20, level=1.0)
    assert path["truncated"][-1].all() and not path["truncated"][:-1].any()
    if "Balance" in env.tasks[0]:  # a pole that is pushed in one direction falls, and is seen to have fallen
        ended = path["terminated"][..., 0].int().argmax(0)
        assert path["terminated"].any(0).all()
        assert all(abs(float(path["state"][ended[row], row, 2])) > 1.0 for row in range(4))
    td, following = env.step_and_maybe_reset(path[-2].clone().set("action", torch.zeros(env.action_spec.shape)))
    assert td["next", "done"].all() and not following["done"].any()
    assert not torch.equal(td["next", "state"], following["state"])


@isaac
@needs_isaac
def test_rows_left_out_of_a_step_need_a_reset(env):
    td, action = env.reset(starts(0, 1, 2, 3)), torch.zeros(env.action_spec.shape)
    left = torch.tensor([True, True, True, False])
    after = env.step(td.clone().update({"action": action, "_step": left}))["next"]
    assert torch.equal(after["state"][3], td["state"][3])
    with pytest.raises(RuntimeError, match=r"row\(s\) \[3\].*reset them"):
        env.step(after.clone().set("action", action))


@isaac
@needs_isaac
def test_a_simulation_that_gives_nan_ends_its_row_only(env):
    td = env.reset(starts(0, 1, 2, 3))
    observe = env.raw._get_observations

    def broken():
        shown = observe()
        shown["policy"] = shown["policy"].clone()
        shown["policy"][2] = torch.nan
        return shown

    env.raw._get_observations = broken
    try:
        after = env.step(td.clone().set("action", torch.zeros(env.action_spec.shape)))["next"]
    finally:
        del env.raw._get_observations
    assert after["simulator_error"][:, 0].tolist() == [False, False, True, False] == after["truncated"][:, 0].tolist()
    assert torch.equal(after["state"][2], td["state"][2]) and torch.equal(after["snapshot"][2], td["snapshot"][2])
    assert after["snapshot"].isfinite().all() and after["state"].isfinite().all()


@isaac
@needs_isaac
def test_the_camera_sees_what_moves(env):
    if "Push" not in env.tasks[0]:
        pytest.skip("only the pushing task has a camera")
    td = env.reset(starts(0, 1, 2, 3))
    after = follow(env, td, 10)[-1]
    before = follow(env, env.reset(starts(0, 1, 2, 3)), 1)[-1]
    assert after["pixels"].shape == (4, 3, 64, 64) and after["pixels"].dtype == torch.uint8
    red, green, blue = (after["pixels"][:, i].int() for i in range(3))
    finger, goal = (red - green > 60) & (red - blue > 60), (green - red > 60) & (green - blue > 60)
    assert (goal.flatten(1).sum(1) > 40).all() and (finger.flatten(1).sum(1) > 2).all()
    assert ((after["pixels"].int() - before["pixels"].int()).abs().amax(1).flatten(1) > 60).any(1).all()


@isaac
@needs_isaac
def test_a_scripted_push_moves_the_cube_to_the_goal(env):
    if "Push" not in env.tasks[0]:
        pytest.skip("only the pushing task has a cube")
    td, reward, success = env.reset(starts(0, 1, 2, 3)), [], torch.zeros(4, dtype=torch.bool)
    first = td["state"][:, 4:6].clone()
    env.max_steps, limit = 10_000, env.max_steps
    for _ in range(240):
        finger, cube, goal = (td["state"][:, i : i + 2] for i in (0, 4, 8))
        way = (goal - cube) / (goal - cube).norm(dim=1, keepdim=True)
        behind = cube - 0.1 * way
        aligned = ((finger - cube) * way).sum(1, keepdim=True) < -0.05
        near = ((finger - cube) - ((finger - cube) * way).sum(1, keepdim=True) * way).norm(dim=1, keepdim=True) < 0.015
        action = torch.where(aligned & near, 0.6 * way, 6.0 * (behind - finger)).clamp(-1, 1)
        td = env.step(td.clone().set("action", action * ~success[:, None]))["next"]
        success |= td["success"][:, 0]
        reward.append(td["reward"][:, 0])
    env.max_steps = limit
    assert ((td["state"][:, 4:6] - first).norm(dim=1) > 0.1).all()
    assert success.float().mean() >= 0.5
    assert (torch.stack(reward) >= 0).all() and (torch.stack(reward) <= 1).all()


@isaac
@needs_isaac
def test_only_one_can_be_open(env, asset_root):
    with pytest.raises(RuntimeError, match=r"close\(\) it first"):
        IsaacLabEnv("isaaclab/Wamrl-Balance", asset_root=asset_root)
