"""The promises of wamrl.envs.mjx_env beside those of every environment (tests/test_env_contract.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict

pytest.importorskip("mujoco.mjx", reason="needs the extra mjx", exc_type=ImportError)

import jax
import jax.numpy as jnp
import mujoco

from wamrl.envs import mjx_env
from wamrl.envs.mjx_env import TASKS, MJXEnv, start_states, to_jax, to_torch
from wamrl.naming import UnknownNameError

PENDULUM = """
<mujoco><worldbody><body><joint name="hinge" type="hinge" axis="0 1 0" damping="0.01"/>
<geom type="capsule" fromto="0 0 0 0 0 -1" size="0.05" mass="1"/></body></worldbody>
<actuator><motor joint="hinge" gear="3" {range}/></actuator></mujoco>
"""


@pytest.fixture(scope="module")
def cartpole() -> MJXEnv:
    return MJXEnv("mjx/cartpole", 64, max_steps=200)


def begin(env: MJXEnv, first: int = 0) -> TensorDict:
    rows = env.batch_size[0]
    return env.reset(TensorDict({"start": torch.arange(first, first + rows)}, [rows]))


def agreement(env: MJXEnv, steps: int) -> float:
    """Greatest difference of qpos from C MuJoCo with the same MJCF, starts and actions (radians and metres)."""
    rng, model, rows = np.random.default_rng(0), env.model, env.batch_size[0]
    td, worst = begin(env), 0.0
    data = [mujoco.MjData(model) for _ in range(rows)]
    first = {key: np.asarray(env._state[key]) for key in ("qpos", "qvel", "mocap_pos")}
    for row in range(rows):
        for key, value in first.items():
            getattr(data[row], key)[:] = value[row]
    for _ in range(steps):
        action = rng.uniform(-1, 1, (rows, model.nu)).astype(np.float32)
        td = env.step(td.set("action", torch.from_numpy(action)))["next"]
        low, high = model.actuator_ctrlrange.T
        for row in range(rows):
            data[row].ctrl[:] = (low + high) / 2 + (high - low) / 2 * action[row]
            for _ in range(env.action_repeat):
                mujoco.mj_step(model, data[row])
        worst = max(worst, float(np.abs(np.asarray(env._state["qpos"]) - [d.qpos for d in data]).max()))
    return worst


def test_cartpole_agrees_with_c_mujoco_over_a_second(cartpole):
    assert agreement(cartpole, 50) < 1e-3


def test_the_pusher_agrees_with_c_mujoco_over_a_second_and_its_arm_pushes_the_puck():
    env = MJXEnv("mjx/pusher", 4)
    assert agreement(env, 25) < 1e-2
    td = begin(env)
    puck, touched, reward = td["state"][:, 6:8].clone(), torch.zeros(4), []
    for _ in range(60):
        state = td["state"]
        q1, q12 = state[:, 0], state[:, 0] + state[:, 1]
        far = (state[:, 6:8] - state[:, 4:6]) * 20  # towards the puck, by the transposed Jacobian
        along = torch.stack([-0.3 * q12.sin(), 0.3 * q12.cos()], 1)
        whole = along + torch.stack([-0.3 * q1.sin(), 0.3 * q1.cos()], 1)
        torque = torch.stack([(whole * far).sum(1), (along * far).sum(1)], 1) - 0.3 * state[:, 2:4]
        td = env.step(td.set("action", torque.clamp(-1, 1)))["next"]
        touched = torch.maximum(touched, td["contact"][:, 0])
        reward.append(td["reward"])
    assert touched.all() and ((td["state"][:, 6:8] - puck).norm(dim=1) > 0.02).all()
    assert (torch.stack(reward) >= 0).all() and (torch.stack(reward) <= 1).all()


def test_a_linear_controller_balances_the_pole_and_that_is_success(cartpole):
    td = None
    for first in range(0, 640, 64):  # a start from which it is already nearly upright
        td = begin(cartpole, first)
        near = (td["state"][:, 1] > 0.98) & (td["state"][:, 0].abs() < 0.8)
        if near.any():
            break
    assert td is not None and near.any() and not td["success"].any()
    for _ in range(150):
        x, _, sine, speed, turn = td["state"].unbind(1)
        push = 3.0 * sine + 0.7 * turn + 0.1 * x + 0.25 * speed
        td = cartpole.step(td.set("action", push.clamp(-1, 1)[:, None]))["next"]
    assert td["success"][near].all() and (td["reward"][near] > 0.9).all()
    assert not td["success"].all()


def test_arrays_change_hands_without_a_copy():
    array = jnp.arange(6.0).reshape(2, 3)
    tensor = to_torch(array)
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    tensor = torch.arange(6.0)
    assert to_jax(tensor).unsafe_buffer_pointer() == tensor.data_ptr()


def test_what_a_step_takes_and_gives_is_the_memory_of_the_compiled_function(cartpole, monkeypatch):
    seen = {}

    def watched(state, action, chosen, real=cartpole.program.advance):
        after, shown, failed = real(state, action, chosen)
        seen.update(shown, action=action, failed=failed)
        return after, shown, failed

    monkeypatch.setattr(cartpole.program, "advance", watched)
    action, clamped = torch.zeros(64, 1), []
    monkeypatch.setattr(mjx_env, "to_jax", lambda tensor: clamped.append(tensor.data_ptr()) or to_jax(tensor))
    td = cartpole.step(begin(cartpole).set("action", action))["next"]
    assert clamped == [seen["action"].unsafe_buffer_pointer()]
    for key, name in (("state", "state"), ("reward", "reward"), ("success", "success"), ("simulator_error", "failed")):
        assert td[key].data_ptr() == seen[name].unsafe_buffer_pointer(), key


def test_a_simulation_that_diverges_ends_its_row_only(cartpole):
    td = begin(cartpole)
    cartpole._state["qvel"] = cartpole._state["qvel"].at[3].set(jnp.nan)
    after = cartpole.step(td.clone().set("action", torch.zeros(64, 1)))["next"]
    assert after["simulator_error"].flatten().nonzero().flatten().tolist() == [3]
    assert after["truncated"].flatten().nonzero().flatten().tolist() == [3]
    assert after["state"].isfinite().all() and torch.equal(after["state"][3], td["state"][3])
    assert float(after["reward"][3]) == 0.0
    td = cartpole.reset(after.clone().set("_reset", after["done"].clone()).exclude("start"))
    assert not td["simulator_error"].any()
    assert cartpole.step(td.set("action", torch.zeros(64, 1)))["next"]["state"].isfinite().all()


def test_each_function_is_compiled_once_whichever_rows_are_reset_or_restored():
    env = MJXEnv("mjx/cartpole", 5, physics_steps=1, snapshots=True)  # a program of its own
    td = begin(env)
    for count in (1, 2, 5, 3):
        for _ in range(2):
            td = env.step(td.set("action", torch.zeros(5, 1)))["next"]
        mask = torch.arange(5)[:, None] < count
        td = env.reset(td.set("_reset", mask).set("start", torch.arange(5))).exclude("_reset", "start")
        saved = TensorDict({"_reset": mask, "snapshot": td["snapshot"].clone()}, [5])
        td = env.reset(saved).exclude("_reset")
    compiled = {name: getattr(env.program, name)._cache_size() for name in ("begin", "advance", "show", "merge")}
    assert compiled == {"begin": 1, "advance": 1, "show": 1, "merge": 1}


@pytest.mark.parametrize("task", TASKS)
def test_splits_keep_their_distance(task):
    parts = {split: start_states(task, split, 300) for split in ("train", "dev", "test")}
    for a, b in (("train", "dev"), ("train", "test"), ("dev", "test")):
        gaps = np.linalg.norm(parts[a].rand_vec[:, None] - parts[b].rand_vec[None], axis=-1)
        assert gaps.min() >= parts[a].min_distance == 0.02
    assert np.array_equal(start_states(task, "dev", 5).rand_vec, parts["dev"].rand_vec[:5])


def swing(model, data):
    return jnp.cos(data.qpos[0])


def test_any_mjcf_is_a_task_with_functions_of_its_own(tmp_path):
    path = tmp_path / "pendulum.xml"
    path.write_text(PENDULUM.format(range='ctrlrange="-1 1" ctrllimited="true"'))
    env = MJXEnv("mjx/pendulum", 2, model=path, reward="test_env_mjx.swing", physics_steps=5)
    td = begin(env)
    assert td["state"].shape == (2, 2) and td["state"][:, 1].abs().max() <= 0.05 and env.max_steps == 200
    raw = mujoco.MjData(env.model)
    raw.qpos[:], raw.qvel[:] = td["state"][0, 0], td["state"][0, 1]
    td = env.step(td.set("action", torch.full((2, 1), 0.5)))["next"]
    raw.ctrl[:] = 0.5
    for _ in range(5):
        mujoco.mj_step(env.model, raw)
    assert td["state"][0].tolist() == pytest.approx([float(raw.qpos[0]), float(raw.qvel[0])], abs=1e-4)
    assert td["reward"][:, 0].tolist() == pytest.approx(td["state"][:, 0].cos().tolist())
    assert env.config["reward"] == "test_env_mjx.swing" and not td["success"].any()
    first = env.start_states("mjx/pendulum", "train", 3).rand_vec  # which collect and plan ask for
    shown = env.reset(TensorDict({"start": torch.tensor([0, 2])}, [2]))["state"]
    assert shown[:, 1].tolist() == pytest.approx((0.1 * first[[0, 2], 0] - 0.05).tolist(), abs=1e-6)


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'mjx/cartpole'"):
        MJXEnv("mjx/cartpol")
    with pytest.raises(FileNotFoundError, match=r"no MJCF at .*absent.xml"):
        MJXEnv("mjx/absent", model=tmp_path / "absent.xml")
    still, loose = tmp_path / "still.xml", tmp_path / "loose.xml"
    still.write_text(PENDULUM.partition("<actuator>")[0] + "</mujoco>")
    loose.write_text(PENDULUM.format(range=""))
    with pytest.raises(ValueError, match="no actuators"):
        MJXEnv("mjx/still", model=still)
    with pytest.raises(ValueError, match="need a ctrlrange"):
        MJXEnv("mjx/loose", model=loose)
    with pytest.raises(ValueError, match="model=<path>"):
        MJXEnv("mjx/cartpole", reward=swing)
    with pytest.raises(ValueError, match="cannot be imported"):
        MJXEnv("mjx/still", model=still, reward="test_env_mjx.absent")
    with pytest.raises(ValueError, match="one env per task"):
        MJXEnv(["mjx/cartpole", "mjx/pusher"], 2)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="JAX has none such"):
            MJXEnv("mjx/cartpole", device="cuda")


def test_a_missing_package_is_answered_with_how_to_get_it():
    code = "import sys\nsys.modules['mujoco.mjx'] = None\nimport wamrl.envs.mjx_env"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert 'pip install "wamrl[mjx]"' in done.stderr


@pytest.mark.gpu
def test_thousands_of_rows_on_a_gpu():
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        pytest.skip(f"torch has a GPU here, but JAX has none: {error}")
    env = MJXEnv("mjx/cartpole", 4096, device="cuda")
    td = begin(env)
    assert td["state"].is_cuda
    td = env.step(td.set("action", torch.zeros(4096, 1, device="cuda")))["next"]
    host = MJXEnv("mjx/cartpole", 4096)
    expected = host.step(begin(host).set("action", torch.zeros(4096, 1)))["next"]
    assert torch.allclose(td["state"].cpu(), expected["state"], atol=1e-4)
