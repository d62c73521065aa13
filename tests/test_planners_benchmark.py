"""The planners' benchmark compares like with like, and says what is missing."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from benchmarks import planners
from benchmarks.planner_overhead import MLPDynamics
from wamrl.interfaces import Budget
from wamrl.noise import NoiseKey
from wamrl.planners import make_mcts


@pytest.mark.parametrize("kind", ["mppi", "cem"])
def test_torchrls_planner_improves_on_doing_nothing_in_the_same_model(kind: str) -> None:
    torch.manual_seed(0)
    model = MLPDynamics(16).requires_grad_(False)
    z = torch.randn(64)
    plan = planners.torchrl_planner(model.net, 64, kind)
    ours = planners.OursCEM(model, 64)
    with torch.no_grad():
        action = plan(z)
        assert action.shape == (1, planners.ACTION) and action.abs().max() <= 1.0

        def reward(first: torch.Tensor) -> float:
            return -float(model.net(torch.cat([z[None], first.view(1, -1)], dim=1)).square().sum())

        idle = reward(torch.zeros(planners.ACTION))
        assert reward(action) > idle and reward(ours(z)[0, 0]) > idle


def test_sixteen_rows_at_once_plan_as_one_by_one() -> None:
    torch.manual_seed(0)
    model = MLPDynamics(16).requires_grad_(False)
    z = torch.randn(64)
    at_once = planners.OursRows(model, 64, 16)(z)
    alone = planners.Ours(model, 64, planners.ITERATIONS, compile=False)(z)
    torch.testing.assert_close(at_once[0], alone[0], atol=1e-4, rtol=0)


def test_the_discrete_model_gives_what_the_tree_asks() -> None:
    torch.manual_seed(0)
    model = planners.DiscreteMLP(16).requires_grad_(False)
    planner = make_mcts(chunk=1, depth=4, simulations=20, num_candidates=8, backup="mean")
    state = model.state(torch.randn(3, planners.LATENT))
    plan, _ = planner.plan(model, state, planner.initial_state(model, 3), NoiseKey.for_rows(3), Budget())
    assert plan.evaluations.tolist() == [20] * 3 and (plan.actions.sum(dim=2) == 1).all()


def test_a_missing_peer_is_named_with_the_way_to_get_it_or_to_go_without(monkeypatch) -> None:
    def version(name: str) -> str:
        if name == "mctx":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert planners.versions_of(["torchrl"]) == {"torchrl": "1.0"}
    with pytest.raises(SystemExit, match="pip install 'mctx'; or leave it out: --peers torchrl"):
        planners.versions_of(["torchrl", "mctx"])
