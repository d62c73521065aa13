"""Who takes part in an evaluation: descriptions become policies, and what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from wamrl.interfaces import Policy, task_id
from wamrl.judging.policies import NoisyPolicy, Surroundings, build, describe, from_callable, load_sb3

pytest.importorskip("metaworld")
REACH = "metaworld/reach-v3"
AROUND = Surroundings((REACH,), 4, "wamrl.envs.metaworld", "six", {}, {}, seed=3)


def middle(observation: TensorDict) -> np.ndarray:
    return np.full((observation.batch_size[0], 4), 0.5)


class Constant:
    def __init__(self, value: float = 0.25) -> None:
        self.value = value

    def initial_state(self, rows):
        return TensorDict({}, batch_size=[rows])

    def act(self, observation, policy_state, is_init):
        return torch.full((observation.batch_size[0], 4), self.value), policy_state


NOT_A_POLICY = 7


def _observation(rows: int = 2) -> TensorDict:
    return TensorDict({"state": torch.zeros(rows, 39), "task": torch.full((rows,), task_id(REACH))}, batch_size=[rows])


def _act(policy: Policy, steps: int = 1, rows: int = 2, first_row: int = 0) -> torch.Tensor:
    state, init = policy.initial_state(rows), torch.ones(rows, dtype=torch.bool)
    taken = []
    for _ in range(steps):
        state["row"] = torch.arange(first_row, first_row + rows)
        action, state = policy.act(_observation(rows), state, init)
        init = torch.zeros(rows, dtype=torch.bool)
        taken.append(action)
    return torch.stack(taken, 1)


def test_words_stand_for_policies():
    entrants = build(["expert", "expert+0.5", "random", "six", "tests.test_policies:middle"], AROUND)
    assert [e.name for e in entrants] == ["expert", "expert+0.5", "random", "six", "middle"]
    assert [e.origin for e in entrants] == ["independent", "degraded", "independent", "independent", "independent"]
    assert entrants[3].content_hash and entrants[3].provenance
    assert describe("planner:six") == {"kind": "planner", "checkpoint": "six", "name": "planner:six"}
    assert describe("ppo.zip") == {"kind": "sb3", "path": "ppo.zip"}


def test_mappings_name_kind_settings_and_origin():
    given = {"kind": "callable", "target": "tests.test_policies:Constant", "arguments": {"value": 0.5}, "noise": 0.1}
    one = build([{**given, "name": "mine", "origin": "independent"}], AROUND)[0]
    assert one.name == "mine" and one.origin == "independent" and isinstance(one.policy, NoisyPolicy)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([{"kind": "expret"}], "did you mean 'expert'"),
        ([{"kind": "expert", "nois": 1}], "did you mean 'noise'"),
        (["expert", "expert"], "two policies are called 'expert'"),
        (["expert+lots"], "noise's deviation"),
        ([7], "must be a word"),
        ([], "must be a list"),
        (["tests.test_policies:absent"], "cannot be imported"),
        (["tests.test_policies:NOT_A_POLICY"], "no act and initial_state"),
        (["ppo.zip"], "trust: true"),
        ([{"kind": "sb3", "path": "absent.zip", "trust": "yes"}], "pickles"),
        ([{"kind": "expert", "noise": -1.0}], "above 0"),
        (["sixx"], "sixx"),
    ],
)
def test_what_does_not_fit_is_refused(given, reason):
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        build(given, AROUND)


def test_what_decides_how_a_policy_acts_is_told(tmp_path, monkeypatch):
    """Kept episodes are found by it: other code, weights, noise or planners are another policy, another name is not."""
    import sys

    from wamrl.evaluate import _identity

    monkeypatch.syspath_prepend(str(tmp_path))

    def written(text: str) -> dict:
        (tmp_path / "own_policy_of_mine.py").write_text(f"def act(observation):\n    return {text}\n")
        sys.modules.pop("own_policy_of_mine", None)
        (entrant,) = build(["own_policy_of_mine:act"], AROUND)
        bench = SimpleNamespace(digest="a", metadata=SimpleNamespace(content_sha256="b"), settings={"command": "c"},
                                entrants=[entrant])  # fmt: skip
        return {"settings": entrant.settings, "identity": _identity(bench)}

    assert written("0") == written("0") and written("0")["settings"] != written("1")["settings"]
    assert written("0")["identity"] != written("1")["identity"]  # a stopped run does not go on with other code
    plain, named, loud = build(["expert", {"kind": "expert", "name": "x"}, "expert+0.5"], AROUND)
    assert plain.settings == named.settings != loud.settings
    planner = {"_target_": "wamrl.planners.best_of_n.make_best_of_n", "num_candidates": 4}
    around = replace(AROUND, planner=planner, controller={"_target_": "wamrl.control.PlannerPolicy", "_partial_": True})
    few, many = build(["planner", {"kind": "planner", "planner": {"num_candidates": 8}, "name": "many"}], around)
    assert few.settings["content_hash"] == many.settings["content_hash"] and few.settings != many.settings


def test_policies_for_other_actions_or_tasks_are_refused():
    with pytest.raises(ValueError, match="takes 2; was it trained on another robot"):
        build(["six"], Surroundings((REACH,), 2, "wamrl.envs.metaworld", "six", {}, {}))
    with pytest.raises(ValueError, match="hammer"):
        build(["six"], Surroundings(("metaworld/hammer-v3",), 4, "wamrl.envs.metaworld", "six", {}, {}))
    with pytest.raises(ValueError, match="no ExpertPolicy"):
        build(["expert"], Surroundings((REACH,), 4, "wamrl.envs.imagined_env", "six", {}, {}))


def test_functions_classes_and_instances_are_policies():
    assert _act(from_callable("tests.test_policies:middle")).eq(0.5).all()
    assert _act(from_callable("tests.test_policies:Constant")).eq(0.25).all()
    assert _act(from_callable("tests.test_policies:Constant", {"value": 0.75})).eq(0.75).all()


def test_noise_is_correlated_keyed_by_the_episode_and_the_same_in_every_batch():
    noisy = NoisyPolicy(Constant(0.0), 0.1, 0.5, seed=3)
    both = _act(noisy, steps=400)
    assert torch.equal(both, _act(noisy, steps=400))
    assert torch.equal(both[1:], _act(noisy, steps=400, rows=1, first_row=1))
    assert not torch.equal(both[0], both[1])
    assert both.std().item() == pytest.approx(0.1, rel=0.1)
    lagged = np.corrcoef(both[:, 1:].flatten(), both[:, :-1].flatten())[0, 1]
    assert lagged == pytest.approx(0.5, abs=0.07)


def test_a_zip_of_stable_baselines3_acts_once_it_is_trusted(tmp_path):
    sb3 = pytest.importorskip("stable_baselines3")
    import gymnasium
    from gymnasium import spaces

    class Still(gymnasium.Env):
        def __init__(self, observation, dims=4):
            self.observation_space, self.action_space = observation, spaces.Box(-1, 1, (dims,), np.float32)

        def reset(self, *, seed=None, options=None):
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), 0.0, True, False, {}

    box = spaces.Box(-1, 1, (39,), np.float32)
    flat, keyed, other = tmp_path / "flat.zip", tmp_path / "keyed.zip", tmp_path / "other.zip"
    sb3.PPO("MlpPolicy", Still(box), device="cpu").save(flat)
    sb3.PPO("MultiInputPolicy", Still(spaces.Dict(state=box)), device="cpu").save(keyed)
    sb3.PPO("MlpPolicy", Still(box, dims=2), device="cpu").save(other)
    assert _act(load_sb3(str(keyed), "PPO", trust=True, action_dim=4)).shape == (2, 1, 4)
    assert _act(load_sb3(str(flat), "PPO", trust=True, action_dim=4, observation="state")).shape == (2, 1, 4)
    with pytest.raises(ValueError, match="one flat observation"):
        load_sb3(str(flat), "PPO", trust=True, action_dim=4)
    with pytest.raises(ValueError, match="takes 4 numbers"):
        load_sb3(str(other), "PPO", trust=True, action_dim=4, observation="state")
    with pytest.raises(ValueError, match="PP0"):
        load_sb3(str(flat), "PP0", trust=True, action_dim=4)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_sb3(str(Path("absent.zip")), "PPO", trust=True, action_dim=4)
