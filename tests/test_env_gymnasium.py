"""The promises of wamrl.envs.gymnasium_env beside those of every environment (tests/test_env_contract.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensordict import TensorDict

from wamrl.control import RandomPolicy
from wamrl.envs.gymnasium_env import GymnasiumEnv, start_states
from wamrl.evaluation import Start, run_episodes
from wamrl.interfaces import Layout
from wamrl.naming import UnknownNameError

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "env" / "gymnasium"
FAULTY = {"tasks": "gymnasium/wamrl-test/Faulty-v0", "imports": ["faulty_envs"]}


def starts(*numbers: int) -> TensorDict:
    return TensorDict({"start": torch.tensor(numbers)}, [len(numbers)])


def step(env: GymnasiumEnv, td: TensorDict, *actions: float) -> TensorDict:
    return env.step(td.clone().set("action", torch.tensor(actions)[:, None]))["next"]


def faults(env: GymnasiumEnv) -> tuple[int, int, int]:
    return env.faults.worker_restarts, env.faults.episodes_dropped, env.faults.simulator_errors


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_of_several_tasks_share_one_time_limit(workers):
    tasks = ["gymnasium/wamrl-test/Faulty-v0", "gymnasium/wamrl-test/Short-v0"]
    env = GymnasiumEnv(tasks, 2, imports=["faulty_envs"], workers=workers)
    td = env.reset(starts(0, 0))
    ends = []
    for _ in range(env.max_steps):
        td = step(env, td, 0.0, 0.0)
        ends.append(td["truncated"][:, 0].tolist())
    assert env.max_steps == 10 and ends == [[False, False]] * 9 + [[True, True]]
    env.close()


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_processes_change_nothing(workers):
    one = GymnasiumEnv("gymnasium/Pendulum-v1", 4, workers=0)
    many = GymnasiumEnv("gymnasium/Pendulum-v1", 4, workers=workers)
    a, b = one.reset(starts(5, 6, 7, 8)), many.reset(starts(5, 6, 7, 8))
    for number in range(5):
        action = torch.linspace(-1, 1, 4)[:, None] * (number - 2) / 2
        a, b = one.step(a.set("action", action))["next"], many.step(b.set("action", action))["next"]
        assert torch.equal(a["state"], b["state"]) and torch.equal(a["reward"], b["reward"])
    many.close()


def test_it_is_gymnasiums_own_episode():
    """Reset seed, action bounds, rewards and the time limit are those of a plain Gymnasium loop."""
    import gymnasium

    env, raw = GymnasiumEnv("gymnasium/Pendulum-v1", 1, workers=0, split="dev"), gymnasium.make("Pendulum-v1")
    td, (seen, _) = env.reset(starts(4)), raw.reset(seed=3 * 4 + 1)
    assert np.array_equal(td["state"][0].numpy(), seen)
    for number in range(200):
        action = np.sin(number, dtype=np.float32)
        td = step(env, td, float(action))
        seen, reward, _, truncated, _ = raw.step(np.array([2 * action]))
        assert np.array_equal(td["state"][0].numpy(), seen)
        assert float(td["reward"]) == pytest.approx(float(reward), rel=1e-6)
        assert bool(td["truncated"]) == truncated == (number == 199)


def test_seeds_of_splits_never_meet():
    seeds = [set(start_states("gymnasium/Pendulum-v1", split, 50).rand_vec[:, 0]) for split in ("train", "dev", "test")]
    assert not (seeds[0] & seeds[1] | seeds[0] & seeds[2] | seeds[1] & seeds[2])
    few, many = start_states("x", "test", 3), start_states("x", "test", 9)
    assert np.array_equal(few.rand_vec, many.rand_vec[:3])


def test_repeats_sum_rewards_and_success_is_any():
    env = GymnasiumEnv(**FAULTY, num_envs=1, workers=0, action_repeat=2)
    assert env.max_steps == 5 and env.control_dt_s == pytest.approx(0.2)
    td = step(env, env.reset(starts(0)), 0.0)
    assert float(td["reward"]) == 2.0 and not bool(td["success"])
    td = step(env, td, 0.0)
    assert bool(td["success"]) and td["state"][0].tolist() == [0.0, 4.0]


def test_images_in_the_observation_become_pixels_and_the_rest_the_state():
    env = GymnasiumEnv("gymnasium/wamrl-test/Stateful-v0", 2, workers=1, imports=["faulty_envs"], pixels=True)
    td = step(env, env.reset(starts(0, 1)), 0.0, 0.0)
    assert td["pixels"].shape == (2, 3, 4, 6) and td["state"].shape == (2, 2)
    after = step(env, td, 0.0, 0.0)
    assert (after["pixels"].int() - td["pixels"].int() == 1).all()
    assert torch.allclose(after["state"][:, 0] - td["state"][:, 0], torch.tensor(0.1))
    env.close()


def test_renderings_become_pixels():
    env = GymnasiumEnv("gymnasium/Pendulum-v1", 1, workers=0, pixels=True)
    td = env.reset(starts(0))
    after = step(env, td, 1.0)
    assert td["pixels"].dtype == torch.uint8 and td["pixels"].shape[1] == 3
    assert (td["pixels"] != after["pixels"]).any()
    env.close()


def test_one_hot_actions_are_those_of_a_discrete_space():
    env = GymnasiumEnv("gymnasium/CartPole-v1", 2, workers=0, control_dt_s=0.02)
    td = env.reset(starts(0, 0))
    after = env.step(td.clone().set("action", torch.eye(2)))["next"]
    assert after["state"][0, 1] < td["state"][0, 1] < after["state"][1, 1]  # pushed left, pushed right
    with pytest.raises(ValueError, match=r"row\(s\) \[1\] is not one-hot"):
        env.step(td.clone().set("action", torch.tensor([[1.0, 0.0], [0.5, 0.5]])))


def test_gymnasium_and_sb3_see_a_discrete_space_as_theirs():
    from gymnasium import spaces

    from wamrl.envs.vector import RowsVectorEnv

    env = GymnasiumEnv("gymnasium/CartPole-v1", 2, workers=0, control_dt_s=0.02)
    vector = RowsVectorEnv(env)
    first, _ = vector.reset(seed=0, options={"start": [0, 0]})
    assert vector.single_action_space == spaces.Discrete(2)
    after, *_ = vector.step(np.array([0, 1]))
    assert after["state"][0, 1] < first["state"][0, 1] < after["state"][1, 1]  # pushed left, pushed right
    for _ in range(60):
        vector.step(vector.action_space.sample())
    for wrong in (np.array([0, 2]), np.array([0, -1]), np.array([0.0, 1.0]), np.eye(2)):
        with pytest.raises(ValueError, match="2 whole numbers from 0 to 1"):
            vector.step(wrong)

    pytest.importorskip("stable_baselines3", reason="needs the extra sb3")
    from stable_baselines3 import PPO

    from wamrl.envs.sb3 import RowsSB3Env

    learner = PPO("MultiInputPolicy", RowsSB3Env(env), n_steps=16, batch_size=32, n_epochs=1, seed=0, device="cpu")
    assert learner.action_space == spaces.Discrete(2)
    learner.learn(32)


def test_fingers_that_touch_the_cube_say_so():
    pytest.importorskip("gymnasium_robotics", reason="needs the extra robotics")
    env = GymnasiumEnv(
        "gymnasium/FetchPickAndPlace-v4", 1, workers=0, imports=["gymnasium_robotics"],
        contacts={"fingers": [["robot0:l_gripper_finger_link", "robot0:r_gripper_finger_link"], ["object0"]]},
    )  # fmt: skip
    td = env.reset(starts(0))
    touched = []
    for number in range(50):  # above the cube, down, close
        hand, cube = td["state"][0, 6:9], td["state"][0, 9:12]
        height = 0.08 if number < 15 else 0.0
        move = (cube + torch.tensor([0.0, 0.0, height]) - hand) * 10
        grip = torch.tensor([-1.0 if number > 35 else 1.0])
        td = env.step(td.set("action", torch.cat([move, grip]).clamp(-1, 1)[None]))["next"]
        touched.append(float(td["contact"]))
    assert touched[0] == 0.0 and touched[-1] == 1.0


# -------------------------------------------------------------------------------------------------------- faults


def test_a_worker_that_dies_is_restarted_and_its_episodes_are_dropped():
    env = GymnasiumEnv(**FAULTY, num_envs=4, workers=2)
    td = step(env, env.reset(starts(0, 1, 2, 3)), 0.0, 0.0, 0.0, 0.0)
    pids = [worker.process.pid for worker in env._workers]
    after = step(env, td, 0.0, 0.0, 1.0, 0.0)  # kills the process of rows 2 and 3
    assert after["simulator_error"][:, 0].tolist() == [False, False, True, True]
    assert after["truncated"][:, 0].tolist() == [False, False, True, True]
    assert torch.equal(after["state"][2:], td["state"][2:]) and after["reward"][:, 0].tolist() == [1, 1, 0, 0]
    assert faults(env) == (1, 2, 0)
    now = [worker.process.pid for worker in env._workers]
    assert now[0] == pids[0] and now[1] != pids[1]
    again = step(env, after, 0.0, 0.0, 0.0, 0.0)  # not reset yet: still no episode to go on with
    assert again["simulator_error"][:, 0].tolist() == [False, False, True, True]
    td = env.reset(again.clone().set("_reset", again["done"].clone()).set("start", torch.tensor([0, 0, 7, 8])))
    td = step(env, td, 0.0, 0.0, 0.0, 0.0)
    assert td["state"].tolist() == [[0.0, 4.0], [3.0, 4.0], [21.0, 1.0], [24.0, 1.0]]
    assert not td["simulator_error"].any() and faults(env) == (1, 2, 0)
    env.close()


def test_a_worker_killed_between_steps_is_noticed_at_a_reset_too():
    env = GymnasiumEnv(**FAULTY, num_envs=2, workers=2)
    td = step(env, env.reset(starts(0, 1)), 0.0, 0.0)
    env._workers[1].process.kill()
    env._workers[1].process.wait()
    mask = torch.tensor([[False], [True]])
    td = env.reset(td.clone().set("_reset", mask).set("start", torch.tensor([0, 5])))
    assert td["state"].tolist() == [[0.0, 1.0], [15.0, 0.0]] and faults(env) == (1, 0, 0)
    assert step(env, td, 0.0, 0.0)["state"].tolist() == [[0.0, 2.0], [15.0, 1.0]]
    env.close()


def test_a_run_goes_on_after_a_worker_died():
    env = GymnasiumEnv(**FAULTY, num_envs=4, workers=2, max_steps=5)
    episodes = run_episodes(
        env, _Deadly(), [Start(env.tasks[0], i) for i in range(8)],
        method="deadly", split="train", seed=0, max_steps=5,
    )  # fmt: skip
    assert len(episodes) == 8 and env.faults.worker_restarts >= 1
    assert [e.start for e in episodes if e.tag == "simulator_error"]
    assert sum(e.success for e in episodes) >= 4
    env.close()


class _Deadly(RandomPolicy):
    """Kills the process of the episode that starts at seed 6, in its second step."""

    def __init__(self) -> None:
        super().__init__(1)

    def act(self, observation, policy_state, is_init):
        fatal = (observation["state"][:, 0] == 6) & (observation["state"][:, 1] == 1)
        return fatal.float()[:, None], policy_state


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("action", [-1.0, 0.5])
def test_nan_from_a_simulator_truncates_and_tags_its_row_only(workers, action):
    env = GymnasiumEnv(**FAULTY, num_envs=2, workers=workers)
    td = step(env, env.reset(starts(0, 1)), 0.0, 0.0)
    after = step(env, td, 0.0, action)
    assert after["simulator_error"][:, 0].tolist() == [False, True] == after["truncated"][:, 0].tolist()
    assert torch.isfinite(after["state"]).all() and after["reward"][:, 0].tolist() == [1.0, 0.0]
    assert torch.equal(after["state"][1], td["state"][1]) and faults(env) == (0, 0, 1)
    env.close()


def test_a_diverging_mujoco_simulation_is_tagged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its log there
    env = GymnasiumEnv("gymnasium/HalfCheetah-v5", 1, workers=0)
    td = env.reset()
    env._group.members[0].env.unwrapped.data.qvel[:] = 1e15
    after = env.step(td.clone().set("action", torch.ones(1, 6)))["next"]
    assert bool(after["simulator_error"]) and torch.equal(after["state"], td["state"])


def test_a_dm_control_simulation_that_diverges_is_tagged_and_the_other_rows_go_on(tmp_path, monkeypatch):
    """It raises where Gymnasium's own environments give NaN."""
    pytest.importorskip("shimmy", reason="needs the extra dmcontrol")
    pytest.importorskip("dm_control", reason="needs the extra dmcontrol")
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its log there
    env = GymnasiumEnv("gymnasium/dm_control/cartpole-swingup-v0", 2, workers=0, imports=["shimmy"],
                       control_dt_s=0.01, max_steps=9, snapshots=True)  # fmt: skip
    td = env.reset(starts(0, 1))
    env._group.members[1]._physics[1].qvel[:] = 1e15
    after = env.step(td.clone().set("action", torch.ones(2, 1)))["next"]
    assert after["simulator_error"][:, 0].tolist() == [False, True] == after["truncated"][:, 0].tolist()
    for key in ("state", "snapshot"):
        assert torch.equal(after[key][1], td[key][1]) and not torch.equal(after[key][0], td[key][0])
    td = env.reset(after.clone().set("_reset", after["done"].clone()))
    again = env.step(td.set("action", torch.ones(2, 1)))["next"]
    assert not again["simulator_error"].any() and faults(env) == (0, 0, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_defect_of_an_environment_keeps_its_own_error(workers):
    env = GymnasiumEnv(**FAULTY, num_envs=1, workers=workers)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        step(env, env.reset(), -0.5)
    env.close()


# ------------------------------------------------------------------------------------------------------ refusals


def test_unknown_ids_are_answered_with_near_ones():
    with pytest.raises(UnknownNameError, match="did you mean 'gymnasium/Pendulum-v1'"):
        GymnasiumEnv("gymnasium/Pendulun-v1")
    with pytest.raises(UnknownNameError, match="did you mean 'gymnasium/Pendulum-v1'"):
        GymnasiumEnv("Pendulum-v1")


@pytest.mark.parametrize(
    ("package", "extra"),
    [("gymnasium_robotics", "robotics"), ("ogbench", "ogbench"), ("gym_pusht", "pusht"), ("shimmy", "dmcontrol")],
)
def test_a_missing_package_is_answered_with_how_to_get_it(monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf'pip install "wamrl\[{extra}\]"'):
        GymnasiumEnv("gymnasium/Anything-v0", imports=[package])


def test_a_missing_mujoco_is_answered_with_how_to_get_it(tmp_path):
    """In a process that has not imported it yet."""
    code = (
        "import sys\nsys.modules['mujoco'] = None\nfrom wamrl.envs.gymnasium_env import GymnasiumEnv\n"
        "GymnasiumEnv('gymnasium/HalfCheetah-v5', workers=0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert 'pip install "wamrl[metaworld]"' in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "gymnasium/wamrl-test/Ragged-v0", "imports": ["faulty_envs"]}, "no fixed size"),
        ({"tasks": "gymnasium/wamrl-test/Unbounded-v0", "imports": ["faulty_envs"]}, "real and bounded"),
        ({"tasks": ["gymnasium/Pendulum-v1", "gymnasium/HalfCheetah-v5"], "num_envs": 2}, "make two environments"),
        ({**FAULTY, "tasks": [FAULTY["tasks"], "gymnasium/wamrl-test/Slower-v0"]}, "lasts 0.2 s.* 0.1 s"),
        (
            {
                "tasks": ["gymnasium/wamrl-test/Stateful-v0", "gymnasium/wamrl-test/Wide-v0"],
                "imports": ["faulty_envs"],
                "pixels": True,
            },
            r"images of \(3, 4, 8\), but .* \(3, 4, 6\)",
        ),
        ({**FAULTY, "snapshots": True}, "cannot be saved"),
        ({**FAULTY, "proprioception": [5]}, "`state` has 2 numbers"),
        ({**FAULTY, "contacts": {"a": [["x"], ["y"]]}}, "no MuJoCo environment"),
        ({**FAULTY, "max_steps": 0}, "max_steps is 0"),
        ({**FAULTY, "workers": -1}, "workers is -1"),
        ({**FAULTY, "num_envs": 0}, "num_envs is 0"),
        ({**FAULTY, "split": "tran"}, "did you mean 'train'"),
        ({"tasks": "gymnasium/CartPole-v1"}, "give control_dt_s"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GymnasiumEnv(**{"workers": 0, **options})


# ----------------------------------------------------------------------------------------------------- commands


def test_train_and_plan_take_a_preset(tmp_path, monkeypatch):
    """Its episodes train a model, in which `plan env=gymnasium/pendulum` plans, worker processes and all."""
    import json

    from wamrl import plan, train
    from wamrl.data import EpisodeWriter, episode_tensordict

    monkeypatch.chdir(tmp_path)
    env = GymnasiumEnv("gymnasium/Pendulum-v1", 2, workers=0, max_steps=20)
    writer = EpisodeWriter(
        "data",
        {
            "tasks": list(env.tasks),
            "split": "train",
            "label_behaviours": ["random"],
            "env": {"name": "gymnasium", "control_dt_s": env.control_dt_s},
            "plan": {"episodes": 4},
            "provenance": {"seed": 0},
        },
    )
    noise = torch.Generator().manual_seed(0)
    for number in range(0, 4, 2):
        td, path = env.reset(starts(number, number + 1)), []
        while not (path and path[-1]["next", "done"].all()):
            td = env.step(td.clone().set("action", torch.rand(2, 1, generator=noise) * 2 - 1))
            path.append(td)
            td = td["next"]
        for row in range(2):
            states = torch.stack([path[0]["state"][row], *(step["next", "state"][row] for step in path)])
            action = torch.stack([step["action"][row] for step in path])
            reward, success = (
                torch.stack([step["next", key][row, 0] for step in path]) for key in ("reward", "success")
            )
            episode = episode_tensordict({"state": states}, action=action, label=action, reward=reward, success=success)
            writer.write(f"episode-{number + row:03d}", episode, {"task": env.tasks[0], "behaviour": "random"})
    small = ["wam.latent_dim=16", "wam.width=16", "wam.dynamics_width=16", "wam.head_width=16", "wam.members=2"]
    train.main([
        "data=data", "observation=[state]", *small, "steps=5", "batch_size=8", "length=4", "warmup_steps=1",
        "validation_fraction=0", "threads=1", "device=cpu", "tensorboard=false",
    ])  # fmt: skip
    plan.main([
        "env=gymnasium/pendulum", "env.max_steps=6", "wam=outputs/train/latest", "methods=[planner,random]",
        "episodes=2", "split=dev", "workers=2", "num_envs=2", "latency_plans=1", "video=false",
    ])  # fmt: skip
    results = json.loads((tmp_path / "outputs/plan/latest/results.json").read_text())
    assert results["summary"]["planner"]["mean"]["n"] == results["summary"]["random"]["mean"]["n"] == 2


@pytest.mark.parametrize("preset", ["fetch_reach", "fetch_push", "fetch_pick_and_place"])
def test_hand_object_and_goal_stand_where_the_preset_says(preset):
    pytest.importorskip("gymnasium_robotics")
    config = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text())
    config.pop("_target_")
    env = GymnasiumEnv(**{**config, "workers": 0})
    state = env.reset(starts(4))["state"][0]
    raw = env._group.members[0].env.unwrapped
    measured = {"hand": raw._utils.get_site_xpos(raw.model, raw.data, "robot0:grip"), "goal": raw.goal}
    if preset != "fetch_reach":
        measured["object"] = raw._utils.get_site_xpos(raw.model, raw.data, "object0")
    assert set(env.layout.places["state"]) == set(measured) and env.layout.has(*measured)
    for name, place in measured.items():
        np.testing.assert_allclose(state[env.layout.place(name)], place, atol=1e-6)
    env.close()


def test_a_place_outside_of_the_state_is_refused():
    assert GymnasiumEnv("gymnasium/Pendulum-v1", workers=0).layout == Layout()
    with pytest.raises(ValueError, match="'goal' at 2:5 of 'state'"):
        GymnasiumEnv("gymnasium/Pendulum-v1", workers=0, places={"goal": [2, 5]})
