"""The benchmark's own learners, on data whose answer is known."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

pytest.importorskip("metaworld")

from benchmarks import policy_evaluation as bench
from wamrl.interfaces import Policy, task_id
from wamrl.judging.policies import describe

TASKS = ["metaworld/reach-v3"]


@pytest.fixture(autouse=True)
def known_demonstrations(monkeypatch):
    """States whose right action is the sign of their first four numbers, halved."""

    def made(data, per_task, tasks, seed):
        state = torch.zeros(per_task * 50, 39)
        state[:, :4] = torch.randn(per_task * 50, 4, generator=torch.Generator().manual_seed(seed))
        return state, 0.5 * state[:, :4].sign(), torch.full((len(state),), task_id(tasks[0]))

    monkeypatch.setattr(bench, "demonstrations", made)


@pytest.mark.parametrize("learner", [bench.cloned, bench.nearest, bench.linear])
def test_a_learner_imitates_its_demonstrations(learner):
    policy = learner("unused", 40, TASKS, 0)
    assert isinstance(policy, Policy)
    state = torch.zeros(200, 39)
    state[:, :4] = torch.randn(200, 4, generator=torch.Generator().manual_seed(9))
    observation = TensorDict({"state": state, "task": torch.full((200,), task_id(TASKS[0]))}, batch_size=[200])
    action, _ = policy.act(observation, policy.initial_state(200), torch.ones(200, dtype=torch.bool))
    clear = state[:, :4].abs() > 0.5
    error = (action - 0.5 * state[:, :4].sign())[clear].square().mean()
    assert error < 0.03  # always answering 0 would give 0.25


def test_other_seeds_give_other_policies():
    one, same, other = (bench.cloned("unused", 2, TASKS, seed, steps=20) for seed in (0, 0, 1))
    state = TensorDict({"state": torch.ones(1, 39), "task": torch.tensor([task_id(TASKS[0])])}, batch_size=[1])
    actions = [p.act(state, p.initial_state(1), torch.ones(1, dtype=torch.bool))[0] for p in (one, same, other)]
    assert torch.equal(actions[0], actions[1]) and not torch.equal(actions[0], actions[2])


def test_the_full_benchmark_has_a_dozen_independent_policies(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "run", lambda command, done, log: None)
    described = [describe(p) for p in bench.policies(tmp_path, TASKS, None)]
    independent = [p for p in described if not p.get("noise")]
    assert len(independent) >= 12 and len(bench.TASKS) >= 4
    words = bench._words([p for p in bench.policies(tmp_path, TASKS, None)])
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides([f"policies={words}"])[0].value()
    assert [describe(p if isinstance(p, dict) else str(p))["kind"] for p in parsed] == [p["kind"] for p in described]
