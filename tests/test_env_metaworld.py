"""The promises of wamrl.envs.metaworld: exact save and restore, splits that never meet, upright images."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

pytest.importorskip("metaworld", reason="needs the extra metaworld")

from wamrl.envs import metaworld as mw
from wamrl.envs.metaworld import SIX_TASKS, ExpertPolicy, MetaWorldEnv, Simulator, start_states
from wamrl.envs.rendering import Camera, RenderingUnavailable
from wamrl.interfaces import Policy, task_id
from wamrl.naming import UnknownNameError

PUSH = "metaworld/push-v3"
TASKS = mw.task_names()


def smooth_actions(seed: int, steps: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    action, found = rng.uniform(-1, 1, 4), []
    for _ in range(steps):
        action = np.clip(0.8 * action + 0.6 * rng.standard_normal(4), -1, 1)
        found.append(action.astype(np.float32))
    return np.stack(found)


def follow(simulator: Simulator, actions: np.ndarray) -> list[np.ndarray]:
    """Everything that can be seen over some steps: observation, reward, success, contacts."""
    seen = []
    for action in actions:
        observation, reward, success, failed = simulator.step(action)
        seen.append(np.concatenate([observation, [reward, success, failed], simulator.contact()]))
    return seen


def expert_steps(simulator: Simulator, steps: int) -> None:
    expert = ExpertPolicy(simulator.task)
    task = torch.tensor([task_id(simulator.task)])
    for _ in range(steps):
        simulator.step(expert.label(torch.from_numpy(simulator.observation)[None], task)[0].numpy())


# ------------------------------------------------------------------------------------------- save and restore


def assert_restores(task: str, *, steps: int) -> None:
    vectors = start_states(task, "dev", 2).rand_vec
    first = Simulator(task)
    first.reset(vectors[0])
    expert_steps(first, steps)
    saved, seen_then = first.snapshot(), first.observation.copy()
    actions = smooth_actions(1, 20)
    expected = follow(first, actions)

    used = Simulator(task)
    used.reset(vectors[1])
    expert_steps(used, 7)
    for other in (first, used, Simulator(task)):
        assert np.array_equal(other.restore(saved), seen_then)
        assert np.array_equal(other.snapshot(), saved)
        for a, b in zip(follow(other, actions), expected, strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("task", SIX_TASKS)
def test_a_restored_simulator_has_exactly_the_same_future(task: str) -> None:
    assert_restores(task, steps=25)


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(set(TASKS) - set(SIX_TASKS)))
def test_every_task_restores_exactly(task: str) -> None:
    assert_restores(task, steps=12)


OTHER_PROCESS = """
import json, sys
import numpy as np
from wamrl.envs.metaworld import Simulator
given = json.loads(sys.stdin.read())
simulator = Simulator(given["task"])
seen = [simulator.restore(np.array(given["snapshot"])).tolist()]
for action in given["actions"]:
    observation, reward, success, _ = simulator.step(np.array(action, dtype=np.float32))
    seen.append([*observation.tolist(), reward, float(success)])
print(json.dumps(seen))
"""


def test_another_process_restores_exactly() -> None:
    task = "metaworld/pick-place-v3"
    simulator = Simulator(task)
    simulator.reset(start_states(task, "dev", 1).rand_vec[0])
    expert_steps(simulator, 25)
    saved, actions = simulator.snapshot(), smooth_actions(2, 10)
    expected = [simulator.observation.tolist()]
    for action in actions:
        observation, reward, success, _ = simulator.step(action)
        expected.append([*observation.tolist(), reward, float(success)])
    given = json.dumps({"task": task, "snapshot": saved.tolist(), "actions": actions.tolist()})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OTHER_PROCESS], input=given, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


@pytest.mark.parametrize("task", SIX_TASKS)
def test_a_start_depends_on_nothing_before_it(task: str) -> None:
    vectors = start_states(task, "dev", 3).rand_vec
    fresh, used = Simulator(task), Simulator(task)
    used.reset(vectors[1])
    expert_steps(used, 30)
    used.reset(vectors[2])
    assert np.array_equal(fresh.reset(vectors[0]), used.reset(vectors[0]))
    actions = smooth_actions(3, 10)
    for a, b in zip(follow(fresh, actions), follow(used, actions), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("task", [pytest.param(t, marks=[] if t in SIX_TASKS else pytest.mark.slow) for t in TASKS])
def test_a_start_is_the_one_that_metaworld_makes(task: str) -> None:
    ours, theirs = Simulator(task), Simulator(task)
    for vector in start_states(task, "dev", 2).rand_vec:
        ours.reset(vector)
        theirs.raw._last_rand_vec = vector.copy()
        theirs.raw.reset()
        theirs._finish_reset()
        assert np.array_equal(ours.snapshot(), theirs.snapshot())
        for a, b in zip(follow(ours, smooth_actions(4, 5)), follow(theirs, smooth_actions(4, 5)), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("task", SIX_TASKS)
def test_the_first_observation_shows_the_goal_and_no_motion(task: str) -> None:
    simulator = Simulator(task)
    for vector in start_states(task, "dev", 3).rand_vec:
        first = simulator.reset(vector).copy()
        assert np.array_equal(first[:18], first[18:36])
        assert np.abs(first[36:]).sum() > 0
        later, *_ = simulator.step(np.zeros(4, dtype=np.float32))
        assert np.array_equal(first[36:], later[36:])
        assert np.abs(first[4:7] - later[4:7]).max() < 0.02  # the object was where it said


def test_a_snapshot_of_another_task_or_size_is_refused() -> None:
    push, reach = Simulator(PUSH), Simulator("metaworld/reach-v3")
    with pytest.raises(ValueError, match="row that runs the task"):
        push.restore(np.pad(reach.snapshot(), (0, 50)))
    with pytest.raises(ValueError, match="has shape"):
        push.restore(push.snapshot()[:-1])


# ----------------------------------------------------------------------------------------------- start states


@pytest.mark.parametrize("task", SIX_TASKS)
def test_splits_keep_their_distance(task: str) -> None:
    space = mw._reset_space(task)
    points, distance = {}, 0.0
    for split, num in (("train", 200), ("dev", 50), ("test", 200)):
        for seed in (0, 1):
            found = start_states(task, split, num, seed=seed)
            distance = found.min_distance
            unit = (found.rand_vec - space.low)[:, space.effective] / (space.high - space.low)[space.effective]
            assert unit.min() >= 0 and unit.max() <= 1
            assert len(np.unique(unit, axis=0)) == num
            points.setdefault(split, []).append(unit)
    assert distance >= 0.01
    joined = {split: np.concatenate(parts) for split, parts in points.items()}
    for a, b in (("train", "dev"), ("train", "test"), ("dev", "test")):
        gaps = np.linalg.norm(joined[a][:, None] - joined[b][None], axis=-1)
        assert gaps.min() >= distance


def test_start_states_are_deterministic_and_grow_at_the_end() -> None:
    few, many = start_states(PUSH, "test", 10), start_states(PUSH, "test", 150)
    assert np.array_equal(few.rand_vec, many.rand_vec[:10])
    mw._draw_start_states.cache_clear()
    assert np.array_equal(start_states(PUSH, "test", 10).rand_vec, few.rand_vec)
    assert not np.array_equal(start_states(PUSH, "test", 10, seed=1).rand_vec, few.rand_vec)


def test_components_without_effect_do_not_count_as_distance() -> None:
    assert mw._reset_space("metaworld/drawer-open-v3").effective == [0]  # only x varies
    assert 5 not in mw._reset_space(PUSH).effective  # the goal's height is overwritten by the puck's


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'metaworld/push-v3'"):
        MetaWorldEnv("metaworld/pusch-v3")
    with pytest.raises(UnknownNameError, match="'train'"):
        start_states(PUSH, "trian", 3)


def test_a_missing_package_is_answered_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mw._environment_classes.cache_clear()
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        mw.task_names()
    monkeypatch.undo()
    mw._environment_classes.cache_clear()
    assert len(mw.task_names()) == 50


# ------------------------------------------------------------------------------------------------ environment


@pytest.fixture(scope="module")
def env() -> MetaWorldEnv:
    return MetaWorldEnv([PUSH, "metaworld/drawer-open-v3"], 4, max_steps=6, snapshots=True, split="dev")


def test_torchrl_accepts_the_environment(env: MetaWorldEnv) -> None:
    check_env_specs(env)


def test_same_seed_same_trajectory(env: MetaWorldEnv) -> None:
    def rollout(seed: int) -> TensorDict:
        env.set_seed(seed)
        td, found = env.reset(), []
        for action in smooth_actions(seed, 3):
            td["action"] = torch.from_numpy(action).expand(4, 4)
            td = env.step(td)["next"]
            found.append(td.clone())
        return torch.stack(found)

    first, second, other = rollout(3), rollout(3), rollout(4)
    assert (first == second).all()
    assert not torch.equal(first["state"], other["state"])


def test_a_partial_reset_leaves_other_rows_alone(env: MetaWorldEnv) -> None:
    td = env.reset(TensorDict({"start": torch.arange(4)}, [4]))
    td["action"] = torch.ones(4, 4)
    td = env.step(td)["next"]
    before = td.clone()
    mask = torch.tensor([[False], [True], [False], [False]])
    td = env.reset(td.clone().set("_reset", mask).set("start", torch.tensor([0, 7, 0, 0])))
    assert torch.equal(td["state"][[0, 2, 3]], before["state"][[0, 2, 3]])
    assert torch.equal(td["snapshot"][[0, 2, 3]], before["snapshot"][[0, 2, 3]])
    assert env.start_index.tolist() == [0, 7, 2, 3]
    fresh = env.reset(TensorDict({"start": torch.full((4,), 7)}, [4]))
    assert torch.equal(td["state"][1], fresh["state"][1])


def test_restoring_through_reset_is_exact(env: MetaWorldEnv) -> None:
    td = env.reset()
    actions = torch.from_numpy(smooth_actions(5, 4))
    for action in actions[:2]:
        td = env.step(td.set("action", action.expand(4, 4)))["next"]
    saved = td["snapshot"].clone()

    def future(td: TensorDict) -> list[TensorDict]:
        found = []
        for action in actions[2:]:
            td = env.step(td.set("action", action.expand(4, 4)))["next"]
            found.append(td.clone())
        return found

    expected = future(td)
    again = env.reset(TensorDict({"snapshot": saved}, [4]))
    for a, b in zip(future(again), expected, strict=True):
        assert (a == b).all()


def test_rows_left_out_of_a_step_stay_as_they_are(env: MetaWorldEnv) -> None:
    td = env.reset()
    before = td["snapshot"].clone()
    td.update({"action": torch.ones(4, 4), "_step": torch.tensor([True, False, True, False])})
    after = env.step(td)["next"]
    assert torch.equal(after["snapshot"][[1, 3]], before[[1, 3]])
    assert not torch.equal(after["snapshot"][[0, 2]], before[[0, 2]])


def test_rows_are_truncated_and_never_terminated(env: MetaWorldEnv) -> None:
    td = env.reset()
    for step in range(6):
        td = env.step(td.set("action", torch.zeros(4, 4)))["next"]
        assert not td["terminated"].any()
        assert bool(td["truncated"].all()) == (step == 5)


def test_actions_that_are_not_finite_are_refused_and_large_ones_clamped(env: MetaWorldEnv) -> None:
    td = env.reset(TensorDict({"start": torch.zeros(4, dtype=torch.int64)}, [4]))
    action = torch.zeros(4, 4)
    action[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"row\(s\) \[2\]"):
        env.step(td.clone().set("action", action))
    start = TensorDict({"start": torch.zeros(4, dtype=torch.int64)}, [4])
    one = env.step(env.reset(start.clone()).set("action", torch.ones(4, 4)))["next"]
    ten = env.step(env.reset(start.clone()).set("action", torch.full((4, 4), 10.0)))["next"]
    assert torch.equal(one["state"], ten["state"])


def test_a_diverging_simulator_truncates_its_row_only(
    env: MetaWorldEnv, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))  # MuJoCo writes its log there
    td = env.reset()
    env.simulators[1].raw.data.qvel[:] = np.nan
    after = env.step(td.clone().set("action", torch.zeros(4, 4)))["next"]
    assert after["simulator_error"].flatten().tolist() == [False, True, False, False]
    assert after["truncated"].flatten().tolist() == [False, True, False, False]
    assert torch.isfinite(after["state"]).all() and torch.isfinite(after["reward"]).all()
    assert torch.equal(after["state"][1], td["state"][1])
    td = env.reset(after.set("_reset", after["done"].clone()).exclude("snapshot"))
    assert not td["simulator_error"].any()


def test_settings_make_an_equal_environment(env: MetaWorldEnv) -> None:
    config = json.loads(json.dumps(env.config))
    other = MetaWorldEnv(**config)
    assert other.config == env.config
    start = TensorDict({"start": torch.tensor([1, 2, 3, 4])}, [4])
    assert torch.equal(env.reset(start.clone())["state"], other.reset(start.clone())["state"])


@pytest.mark.parametrize("bad", [{"num_envs": 0}, {"action_repeat": 0}, {"max_steps": 2.5}, {"tasks": []}])
def test_settings_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="must be|empty"):
        MetaWorldEnv(**({"tasks": PUSH} | bad))


def test_an_episode_is_no_longer_than_meta_world_allows() -> None:
    raw = mw._compiled_class(PUSH)()
    assert raw.max_path_length == mw.MAX_SIMULATOR_STEPS
    assert MetaWorldEnv(PUSH, action_repeat=2, max_steps=250).max_steps == 250
    with pytest.raises(ValueError, match="max_steps is 251 control steps of 2.*at most 500 simulator steps"):
        MetaWorldEnv(PUSH, action_repeat=2, max_steps=251)


# ----------------------------------------------------------------------------------------- expert and contact


def test_the_experts_succeed_and_touch_the_object() -> None:
    env = MetaWorldEnv(SIX_TASKS, 6, split="dev")
    expert = ExpertPolicy(SIX_TASKS)
    assert isinstance(expert, Policy)
    td = env.reset(TensorDict({"start": torch.zeros(6, dtype=torch.int64)}, [6]))
    state, init = expert.initial_state(6), torch.ones(6, dtype=torch.bool)
    success, contact, best = torch.zeros(6, dtype=torch.bool), torch.zeros(6, 4), torch.zeros(6)
    for _ in range(60):
        action, state = expert.act(td, state, init)
        assert action.abs().max() <= 1
        td = env.step(td.set("action", action))["next"]
        success |= td["success"].flatten()
        contact = torch.maximum(contact, td["contact"])
        best = torch.maximum(best, td["reward"].flatten())
        init = torch.zeros(6, dtype=torch.bool)
    assert success.all()
    assert (best > 5).all() and (best <= 10).all()
    touched = dict(zip(env.row_tasks, contact[:, mw.CONTACT_NAMES.index("hand_object")].tolist(), strict=True))
    assert touched.pop("metaworld/reach-v3") == 0
    assert all(touched.values())
    pads = contact[SIX_TASKS.index("metaworld/pick-place-v3"), :2]
    assert pads.tolist() == [1, 1]


def test_the_expert_refuses_nan_and_foreign_tasks() -> None:
    expert = ExpertPolicy(PUSH)
    with pytest.raises(ValueError, match="NaN"):
        expert.label(torch.full((1, 39), float("nan")), torch.tensor([task_id(PUSH)]))
    with pytest.raises(ValueError, match="does not know"):
        expert.label(torch.zeros(1, 39), torch.tensor([5]))


# ----------------------------------------------------------------------------------------------------- images


def test_images_are_upright_and_show_the_object() -> None:
    env = MetaWorldEnv(PUSH, 2, pixels=True, split="dev", camera={"distance": 0.9})
    try:
        td = env.reset()
    except RenderingUnavailable as error:
        pytest.skip(str(error))
    pixels = td["pixels"]
    assert pixels.shape == (2, 3, 64, 64) and pixels.dtype == torch.uint8
    # The robot comes from above: red is in the upper half of an upright image.
    large = env.render_rgb(0, 128).astype(int)
    red = (large[..., 0] > 90) & (large[..., 1] < 60) & (large[..., 2] < 60)
    assert red[:64].sum() > 3 * red[64:].sum() > 0
    # Where the puck goes the image changes.
    simulator = env.simulators[0]
    vectors = start_states(PUSH, "dev", 2).rand_vec
    simulator.reset(vectors[0])
    before = env.render_rgb(0, 64).astype(int)
    moved = vectors[0].copy()
    moved[:2] = vectors[1][:2]
    simulator.reset(moved)
    assert (np.abs(env.render_rgb(0, 64).astype(int) - before).max(-1) > 30).sum() >= 8
    # The same renderer at another size, and the same image again.
    assert env.render_rgb(1, (32, 48)).shape == (32, 48, 3)
    simulator.reset(vectors[0])
    assert np.array_equal(env.render_rgb(0, 64), before)
    env.close()


def test_a_machine_without_graphics_says_what_to_install() -> None:
    code = (
        "from wamrl.envs.metaworld import MetaWorldEnv\n"
        "from wamrl.envs.rendering import RenderingUnavailable\n"
        "env = MetaWorldEnv('metaworld/reach-v3')\n"
        "env.reset()\n"
        "try:\n    env.render_rgb(0)\n"
        "except RenderingUnavailable as error:\n    print(error)\n"
    )
    environment = {**os.environ, "MUJOCO_GL": "off"}
    environment.pop("PYOPENGL_PLATFORM", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert "apt-get install" in done.stdout, done.stderr


@pytest.mark.parametrize("bad", [{"distance": 0}, {"lookat": (0, 1)}, {"height": 4}])
def test_cameras_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="camera"):
        Camera(**bad)
