"""What every environment promises, asked of each of them: specs, seeds, bounds, ends, saving, partial resets.

An environment of configs/env/ is added by a line in `CASES`, whose name may go on after a comma; the others are built
in `OTHERS`. Those of Isaac Lab run in a lane of their own, `make test-isaac`.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from tensordict import TensorDict
from torchrl.data import OneHot
from torchrl.envs.utils import check_env_specs

from wamrl.interfaces import Env, task_id

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "env"
ROWS, STEPS = 3, 6


@dataclass(frozen=True)
class Case:
    """An environment to ask.

    needs: the package without which it is skipped. restores: greatest difference of a restored future from the one
    that was lived through, None where the state cannot be saved; two restores always agree exactly. rounding: by how
    much a row may differ when others are stepped with it, or stand elsewhere. alone: only one can be open in a process.
    """

    needs: str = ""
    restores: float | None = 0.0
    rounding: float = 0.0
    alone: bool = False
    options: tuple[tuple[str, Any], ...] = ()


CASES: dict[str, Case] = {
    "metaworld/push-v3": Case("metaworld"),
    "gymnasium/pendulum": Case(options=(("workers", 2),)),
    "gymnasium/pendulum, pixels": Case("pygame", options=(("workers", 0), ("pixels", True))),
    "gymnasium/cartpole": Case(options=(("workers", 0),)),
    "gymnasium/half_cheetah": Case("mujoco", options=(("workers", 0),)),
    "gymnasium/fetch_reach": Case("gymnasium_robotics", options=(("workers", 0),)),
    "gymnasium/fetch_push": Case("gymnasium_robotics", options=(("workers", 2),)),
    "gymnasium/fetch_pick_and_place": Case("gymnasium_robotics", 0.01, options=(("workers", 0),)),
    "gymnasium/point_maze": Case("gymnasium_robotics", options=(("workers", 0),)),
    "gymnasium/cube": Case("ogbench", 0.1, options=(("workers", 2),)),
    "gymnasium/pusht": Case("gym_pusht", None, options=(("workers", 0),)),
    "gymnasium/dm_cartpole_swingup": Case("shimmy", options=(("workers", 0),)),
    "gymnasium/dm_reacher_easy": Case("shimmy", options=(("workers", 0),)),
    "gymnasium/dm_cheetah_run": Case("shimmy", options=(("workers", 0),)),
    "mjx/cartpole": Case("mujoco.mjx"),
    "mjx/pusher": Case("mujoco.mjx"),
    "isaaclab/balance": Case("isaaclab", 1e-4, rounding=1e-5, alone=True),
    "isaaclab/push": Case("isaaclab", 1e-4, rounding=1e-5, alone=True),
}
SLOW = {"mjx/pusher"}  # compiles for minutes
Make = Callable[..., Any]


def _imagined(**changes: Any) -> Any:
    from wamrl import checkpoint
    from wamrl.envs.imagined_env import ImaginedEnv
    from wamrl.envs.metaworld import MetaWorldEnv

    real = MetaWorldEnv(["metaworld/push-v3", "metaworld/reach-v3"], 2)
    frames = [real.reset().select("state", "proprioception", "task") for _ in range(4)]
    return ImaginedEnv(checkpoint.load("six"), torch.cat(frames), **changes)


OTHERS: dict[str, tuple[Case, Make]] = {"imagined": (Case("metaworld", rounding=1e-5), _imagined)}


def _maker(name: str) -> tuple[Case, Make]:
    if name in OTHERS:
        return OTHERS[name]
    path = CONFIGS / f"{name.partition(',')[0]}.yaml"
    case, config = CASES[name], OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(config, dict)
    # Not Hydra's instantiate: it would turn an environment's own errors into its own.
    target = get_class(config.pop("_target_"))
    return case, lambda **changes: target(**{**config, **dict(case.options), **changes})


@dataclass
class Subject:
    """An environment with what is needed to make another one like it."""

    case: Case
    make: Make
    env: Any

    def twin(self) -> Any:
        """Another one, from the pickled and JSON-encoded config; takes the place of this one if `alone`."""
        config = json.loads(json.dumps(pickle.loads(pickle.dumps(self.env.config))))
        if not self.case.alone:
            return self.make(**config)
        self.env.close(raise_if_closed=False)
        self.env = self.make(**config)
        return self.env

    def close(self, twin: Any) -> None:
        if twin is not self.env:
            twin.close()

    def start(self, *numbers: int) -> TensorDict:
        return self.env.reset(TensorDict({"start": torch.tensor(numbers)}, [ROWS]))


def _marks(name: str) -> list[pytest.MarkDecorator]:
    if name.startswith("isaaclab/"):
        return [pytest.mark.isaac, pytest.mark.filterwarnings("ignore")]  # upstream warns about its own future
    return [pytest.mark.slow] if name in SLOW else []


@pytest.fixture(scope="module", params=[pytest.param(name, marks=_marks(name)) for name in [*CASES, *OTHERS]])
def subject(request):
    case, make = _maker(request.param)
    if case.needs:
        pytest.importorskip(case.needs, reason=f"{request.param} needs it", exc_type=ImportError)
    env = make(num_envs=ROWS, max_steps=STEPS, **({} if case.restores is None else {"snapshots": True}))
    found = Subject(case, make, env)
    yield found
    found.env.close(raise_if_closed=False)


def actions(env: Any, steps: int, seed: int = 0) -> torch.Tensor:
    """[T, B, ...] valid ones."""
    rng = torch.Generator().manual_seed(seed)
    shape = tuple(env.action_spec.shape)
    if isinstance(env.action_spec, OneHot):
        return torch.eye(shape[-1])[torch.randint(shape[-1], (steps, ROWS), generator=rng)]
    return torch.rand(steps, *shape, generator=rng) * 2 - 1


def follow(env: Any, td: TensorDict, path: torch.Tensor) -> TensorDict:
    """[T, B] what the rows show under a path of actions."""
    found = []
    for action in path:
        td = env.step(td.clone().set("action", action))["next"]
        found.append(td.clone())
    return torch.stack(found)


def assert_same(a: TensorDict, b: TensorDict, case: Case) -> None:
    assert set(a.keys()) == set(b.keys())
    for key in a.keys():
        # A snapshot that is not exact holds leftovers of earlier episodes, without effect on the later ones.
        if key != "snapshot" or case.restores == 0.0:
            assert torch.equal(a[key], b[key]), key


def test_torchrl_accepts_it(subject):
    check_env_specs(subject.env)


def test_its_keys_are_those_of_the_contract(subject):
    assert isinstance(subject.env, Env)
    env, td = subject.env, subject.start(0, 1, 2)
    keys = set(env.observation_spec.keys())
    assert keys >= {"task", "success", "simulator_error", "state"}
    for key in keys & {"state", "proprioception", "contact"}:
        assert td[key].dtype == torch.float32 and td[key].shape[0] == ROWS and td[key].isfinite().all()
    assert td["task"].tolist() == [task_id(env.row_tasks[row]) for row in range(ROWS)]
    assert td["success"].dtype == td["simulator_error"].dtype == torch.bool
    assert [env.tasks[row % len(env.tasks)] for row in range(ROWS)] == list(env.row_tasks)
    assert len(env.instructions) == ROWS and all(text and text == text.lower() for text in env.instructions)
    assert env.control_dt_s > 0 and env.max_steps == STEPS and env.action_repeat >= 1
    assert ("snapshot" in keys) == (subject.case.restores is not None)


def test_the_same_start_and_actions_give_the_same_episode_in_an_equal_environment(subject):
    path, config = actions(subject.env, 4), subject.env.config
    mine = follow(subject.env, subject.start(0, 1, 2), path)
    twin = subject.twin()
    assert twin.config == config
    theirs = follow(twin, twin.reset(TensorDict({"start": torch.arange(ROWS)}, [ROWS])), path)
    assert_same(mine, theirs, subject.case)
    subject.close(twin)


def test_the_seed_decides_the_order_of_the_starts(subject):
    def order(seed: int) -> list[Any]:
        subject.env.set_seed(seed)
        shown = [subject.env.reset()["state"].tolist() for _ in range(2)]
        return [*shown, subject.env.start_index.tolist()]

    assert order(3) == order(3)
    assert any(order(3) != order(seed) for seed in range(4, 12))


def test_numbers_beyond_the_bounds_are_clamped(subject):
    if isinstance(subject.env.action_spec, OneHot):
        pytest.skip("one-hot actions have no room beyond their bounds")
    assert subject.env.action_spec.space.low.min() == -1 and subject.env.action_spec.space.high.max() == 1
    path = actions(subject.env, 2).sign()
    ones = follow(subject.env, subject.start(0, 1, 2), path)
    assert_same(ones, follow(subject.env, subject.start(0, 1, 2), path * 7), subject.case)


def test_actions_that_do_not_fit_are_refused(subject):
    td, (action,) = subject.start(0, 1, 2), actions(subject.env, 1)

    def step(action: torch.Tensor) -> None:
        # A TensorDict without a device, which would move the action.
        subject.env.step(TensorDict({**dict(td.items()), "action": action}, [ROWS]))

    with pytest.raises(ValueError, match="action has shape"):
        step(action[..., :0])
    with pytest.raises(ValueError, match=r"action is torch.float64.*action.float\(\)"):
        step(action.double())
    with pytest.raises(ValueError, match=r"action is on meta.*action.to\('cpu'\)"):
        step(action.to("meta"))
    broken = action.clone()
    broken[1] = torch.nan
    with pytest.raises(ValueError, match=r"row\(s\) \[1\] holds NaN"):
        step(broken)
    step(action)  # none of that did harm


def test_an_episode_ends_with_its_own_last_observation(subject):
    env, path = subject.env, actions(subject.env, STEPS + 1)
    env.set_seed(0)
    alone = follow(env, subject.start(0, 1, 2), path[:STEPS])
    assert alone["truncated"][-1].all() or alone["done"].any(0).all()
    end = int(alone["done"][:, 0, 0].int().argmax())  # the first row's
    steps = iter(path)
    td = subject.start(0, 1, 2)
    for number in range(end + 1):
        td = td.set("action", next(steps))
        td, following = env.step_and_maybe_reset(td)
        assert torch.equal(td["next", "state"][0], alone["state"][number, 0])
        td = following
    assert not bool(td["done"][0])  # the next episode has begun, at another place
    assert not torch.equal(td["state"][0], alone["state"][end, 0])


def test_a_restored_row_has_the_same_future(subject):
    if subject.case.restores is None:
        with pytest.raises(ValueError, match="cannot be"):
            subject.make(num_envs=1, snapshots=True)
        return
    env, path = subject.env, actions(subject.env, STEPS, seed=5)
    td = follow(env, subject.start(0, 1, 2), path[:2])[-1]
    saved = td["snapshot"].clone()
    lived = follow(env, td, path[2:])

    def restored(env: Any) -> TensorDict:
        again = env.reset(TensorDict({"snapshot": saved}, [ROWS]))
        assert torch.equal(again["state"], td["state"])
        assert env.start_index.tolist() == [-1] * ROWS
        return follow(env, again, path[2:])

    first = restored(env)
    subject.start(2, 1, 0)  # elsewhere in between
    assert_same(first, restored(env), subject.case)
    twin = subject.twin()
    assert_same(first, restored(twin), subject.case)  # in an instance that never saw it
    subject.close(twin)
    env = subject.env
    assert (first["state"] - lived["state"]).abs().max() <= subject.case.restores
    assert torch.equal(first["truncated"], lived["truncated"])
    if subject.case.restores == 0.0:
        assert_same(first, lived, subject.case)
    with pytest.raises(ValueError, match="NaN"):
        env.reset(TensorDict({"snapshot": torch.full_like(saved, torch.nan)}, [ROWS]))


def test_a_partial_reset_leaves_the_other_rows_alone(subject):
    env, path = subject.env, actions(subject.env, 4, seed=2)
    alone = follow(env, subject.start(0, 1, 2), path)
    td = follow(env, subject.start(0, 1, 2), path[:2])[-1]
    before = td.clone()
    request = td.clone().set("_reset", torch.tensor([[False], [True], [False]])).set("start", torch.tensor([0, 1, 0]))
    td = env.reset(request).exclude("_reset", "start")
    for key in env.observation_spec.keys():
        assert torch.equal(td[key][[0, 2]], before[key][[0, 2]]), key
    assert env.start_index.tolist() == [0, 1, 2]
    after = follow(env, td, path[2:])
    assert (after["state"] - alone["state"][2:])[:, [0, 2]].abs().max() <= subject.case.rounding
    fresh = subject.start(0, 1, 2)
    assert torch.equal(td["state"][1], fresh["state"][1])


def test_the_last_output_can_be_handed_in_for_a_reset_of_the_rows_that_are_done(subject):
    """Its snapshot, where it holds one, is not gone back to."""
    env = subject.env
    td = follow(env, subject.start(0, 1, 2), actions(env, STEPS))[-1]
    assert td["done"][1]
    fresh = env.reset(td.clone().set("_reset", td["done"] & torch.tensor([[False], [True], [False]])))
    assert fresh["done"][:, 0].tolist() == [bool(td["done"][0]), False, bool(td["done"][2])]
    assert (env.start_index[1] >= 0) == env.numbered_starts and not torch.equal(fresh["state"][1], td["state"][1])
    assert torch.equal(fresh["state"][[0, 2]], td["state"][[0, 2]])
    assert not env.reset(fresh.set("_reset", fresh["done"].clone()))["done"].any()


def test_rows_left_out_of_a_step_stay_as_they_are(subject):
    env, path = subject.env, actions(subject.env, 3)
    td = follow(env, subject.start(0, 1, 2), path[:1])[-1]
    request = td.clone().set("action", path[1]).set("_step", torch.tensor([True, False, True]))
    after = env.step(request)["next"]
    for key in env.observation_spec.keys():
        assert torch.equal(after[key][1], td[key][1]), key
    both = follow(env, subject.start(0, 1, 2), path[:2])[-1]
    assert (after["state"] - both["state"])[[0, 2]].abs().max() <= subject.case.rounding


def test_observations_do_not_depend_on_what_was_seen_before(subject):
    """Nothing that normalises them drifts."""
    first = subject.start(0, 1, 2)
    for round in range(2):
        follow(subject.env, subject.start(2, 0, 1), actions(subject.env, STEPS, seed=round))
    assert_same(first, subject.start(0, 1, 2), subject.case)


def test_it_can_be_closed_twice_and_made_again(subject):
    twin = subject.twin()
    with pytest.raises(RuntimeError, match="before reset"):
        twin.step(TensorDict({"action": actions(twin, 1)[0]}, [ROWS]))
    twin.reset()
    twin.close()
    twin.close(raise_if_closed=False)
    again = subject.twin()
    again.reset()
    subject.close(again)


def test_settings_out_of_range_are_refused(subject):
    for bad in ({"num_envs": 0}, {"num_envs": 1.5}, {"max_steps": 0}):
        with pytest.raises(ValueError, match="must be"):
            subject.make(**bad)


def test_every_shipped_yaml_is_asked():
    folders = ("gymnasium", "mjx", "isaaclab")
    shipped = {f"{folder}/{path.stem}" for folder in folders for path in (CONFIGS / folder).glob("*.yaml")}
    assert shipped - set(CASES) == {"isaaclab/cartpole"}  # upstream's, asked in tests/test_env_isaaclab.py
    assert np.all([case.restores is None or case.restores <= 0.1 for case in CASES.values()])
