"""The true simulator behind the model's contract: what it imagines is what happens."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from wamrl.control import PlannerPolicy
from wamrl.interfaces import Budget, Context
from wamrl.models.joint_embedding import JointEmbeddingWAM
from wamrl.noise import NoiseKey
from wamrl.oracle import OracleWAM
from wamrl.planners import NoiseProposer, ReturnScorer, make_best_of_n, make_cem, make_gradient, make_mcts, make_mppi

metaworld = pytest.importorskip("wamrl.envs.metaworld")

PUSH, REACH = "metaworld/push-v3", "metaworld/reach-v3"


def _model() -> JointEmbeddingWAM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return JointEmbeddingWAM(
            observation={"state": (39,)},
            action_dim=4,
            tasks=[REACH, PUSH],
            control_dt_s=0.025,
            latent_dim=16,
            width=16,
            dynamics_width=16,
            head_width=16,
            members=2,
            values=2,
        ).eval()


def _oracle(task: str) -> tuple[OracleWAM, metaworld.MetaWorldEnv]:
    simulator = metaworld.MetaWorldEnv(task, num_envs=1, snapshots=True)
    return OracleWAM(_model(), simulator), metaworld.MetaWorldEnv(task, num_envs=2, snapshots=True, split="dev")


def _observed(now: TensorDict) -> TensorDict:
    return now.select("state", "snapshot", "task")


@pytest.fixture(scope="module")
def pushing():
    return _oracle(PUSH)


def test_what_the_oracle_imagines_is_what_happens(pushing):
    oracle, env = pushing
    now = env.reset(TensorDict({"start": torch.tensor([3, 4])}, batch_size=[2]))
    state = oracle.encode(Context.from_observation(_observed(now)))
    actions = NoiseKey.for_rows(2, seed=1).uniform(3, 6, 4) * 2 - 1
    imagined = oracle.imagine(state, actions)
    assert imagined.reward is not None and imagined.success is not None and imagined.uncertainty is not None
    assert imagined.reward.shape == (2, 3, 1, 6)
    assert imagined.evaluations == 3 * 6
    assert not imagined.uncertainty.any()
    for candidate in (2, 0):
        env.reset(TensorDict({"start": torch.tensor([3, 4])}, batch_size=[2]))
        after = now.clone()
        for step in range(6):
            after["action"] = actions[:, candidate, step]
            after = env.step(after)["next"]
            assert torch.equal(after["reward"][:, 0], imagined.reward[:, candidate, 0, step])
            assert torch.equal(after["success"][:, 0], imagined.success[:, candidate, 0, step].bool())
        assert torch.equal(after["snapshot"], imagined.leaf["snapshot"][:, candidate, 0])
        assert torch.equal(after["state"], oracle.decode(imagined.leaf[:, candidate, 0], ("state",))["state"])


def test_imagining_leaves_the_controlled_simulator_alone(pushing):
    oracle, env = pushing
    now = env.reset(TensorDict({"start": torch.tensor([0, 1])}, batch_size=[2]))
    before = [simulator.snapshot() for simulator in env.simulators]
    oracle.imagine(oracle.encode(Context.from_observation(_observed(now))), torch.ones(2, 2, 4, 4))
    assert all((a == s.snapshot()).all() for a, s in zip(before, env.simulators, strict=True))


def test_the_oracles_value_is_the_models_value_of_where_it_ends(pushing):
    oracle, env = pushing
    now = env.reset(TensorDict({"start": torch.tensor([0, 1])}, batch_size=[2]))
    state = oracle.encode(Context.from_observation(_observed(now)))
    leaf = oracle.imagine(state, torch.zeros(2, 1, 2, 4)).leaf
    for _ in range(2):
        now["action"] = torch.zeros(2, 4)
        now = env.step(now)["next"]
    direct = oracle.model.encode(Context.from_observation(now.select("state", "task")))
    torch.testing.assert_close(oracle.value(leaf)[:, 0, 0], oracle.model.value(direct))


def test_planning_in_the_true_simulator_reaches_the_goal():
    oracle, env = _oracle(REACH)
    rewards = ReturnScorer(value_weight=0.0)
    planner = make_mppi(
        horizon=4, num_candidates=16, proposer=NoiseProposer, sigma=0.7, scorer=rewards, temperature=0.1, choose="mean"
    )
    now = env.reset(TensorDict({"start": torch.tensor([0, 1])}, batch_size=[2]))

    def distance() -> torch.Tensor:
        return (now["state"][:, 0:3] - now["state"][:, 36:39]).norm(dim=-1)

    first, plan_state = distance(), planner.initial_state(oracle, 2)
    for step in range(12):
        state = oracle.encode(Context.from_observation(_observed(now)))
        plan, plan_state = planner.plan(oracle, state, plan_state, NoiseKey.for_rows(2, step=step), Budget())
        for k in range(2):
            now["action"] = plan.actions[:, k]
            now = env.step(now)["next"]
        plan_state["shift"] = torch.full_like(plan_state["shift"], 2)
    assert (distance() < 0.5 * first).all()


def test_the_oracle_plans_among_the_candidates_of_its_model(pushing):
    oracle, env = pushing
    now = env.reset(TensorDict({"start": torch.tensor([0, 1])}, batch_size=[2]))
    planner = make_mppi(horizon=2, num_candidates=6)
    candidates = []
    for model in (oracle, oracle.model):
        state = model.encode(Context.from_observation(_observed(now).select(*model.spec.observation, "task")))
        plan, _ = planner.plan(model, state, planner.initial_state(model, 2), NoiseKey.for_rows(2), Budget())
        candidates.append(plan.candidates)
    assert torch.equal(*candidates)
    assert "behaviour" in oracle.spec.provides


PLANNERS = {
    "mppi": lambda: make_mppi(horizon=3, num_candidates=12),
    "cem": lambda: make_cem(horizon=3, num_candidates=6, iterations=2, num_elites=2),
    "icem": lambda: make_cem(horizon=3, num_candidates=6, iterations=2, num_elites=2, keep_elites=2),
    "best_of_n": lambda: make_best_of_n(horizon=3, num_candidates=12),
    "mcts": lambda: make_mcts(chunk=3, depth=2, simulations=12, num_candidates=6),
    "mcts, with reuse": lambda: make_mcts(chunk=3, depth=2, simulations=12, num_candidates=6, reuse=True),
}


@pytest.mark.parametrize("name", PLANNERS)
def test_every_planner_plans_in_the_true_simulator(pushing, name: str) -> None:
    """Two plans of 24 transitions per row at most; what they promise is what happens, as far as rewards say it."""
    oracle, env = pushing
    planner, budget = PLANNERS[name](), Budget(evaluations=24)
    now = env.reset(TensorDict({"start": torch.tensor([0, 1])}, batch_size=[2]))
    plan_state = planner.initial_state(oracle, 2)
    for step in range(2):
        state = oracle.encode(Context.from_observation(_observed(now)))
        plan, plan_state = planner.plan(oracle, state, plan_state, NoiseKey.for_rows(2, step=step), budget)
        assert plan.actions.shape == (2, 3, 4) and bool(plan.actions.isfinite().all())
        assert 0 < int(plan.evaluations.min()) and int(plan.evaluations.max()) <= 24
        imagined = oracle.imagine(state, plan.actions[:, None])
        assert imagined.reward is not None
        for k in range(3):
            now["action"] = plan.actions[:, k]
            now = env.step(now)["next"]
            assert torch.equal(now["reward"][:, 0], imagined.reward[:, 0, 0, k])
        plan_state["shift"] = torch.full_like(plan_state["shift"], 3)


def test_the_oracle_has_no_gradients_to_climb(pushing):
    oracle, _ = pushing
    with pytest.raises(ValueError, match="OracleWAM gives none.*use planner=cem"):
        make_gradient(start=make_cem(horizon=2)).initial_state(oracle, 1)
    with pytest.raises(ValueError, match="OracleWAM gives none.*use planner=cem"):
        PlannerPolicy(oracle, make_gradient(start=make_cem(horizon=2)))


def test_the_oracle_says_what_it_is_not(pushing):
    oracle, _ = pushing
    assert oracle.spec.ensemble_size == 1
    with pytest.raises(ValueError, match="needs one row"):
        OracleWAM(_model(), metaworld.MetaWorldEnv(REACH, num_envs=2))
    with pytest.raises(ValueError, match="does not answer 'inverse'"):
        oracle.spec.require("inverse")
    with pytest.raises(ValueError, match="one future"):
        oracle.imagine(TensorDict({}, batch_size=[1]), torch.zeros(1, 1, 1, 4), futures=2)
