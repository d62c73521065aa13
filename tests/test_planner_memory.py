"""What a plan allocates grows with candidates x steps, and no faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wamrl.interfaces import Budget, Context, Planner
from wamrl.models.joint_embedding import JointEmbeddingWAM
from wamrl.noise import NoiseKey
from wamrl.planners import make_best_of_n, make_cem, make_gradient, make_mcts, make_mppi
from wamrl.planners.toys import TASKS


class Allocated(TorchDispatchMode):
    """Adds up the bytes of all tensors that operations make; views of what is there cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.total += tensor.untyped_storage().nbytes()
        return result


def allocated(planner: Planner) -> int:
    """Bytes of one plan of two environments."""
    torch.manual_seed(0)
    model = JointEmbeddingWAM(
        observation={"state": (6,)}, action_dim=2, tasks=TASKS, control_dt_s=0.1, latent_dim=16, width=16,
        dynamics_width=16, head_width=16, members=2, values=2, horizon=16,
    ).requires_grad_(False)  # fmt: skip
    state = model.encode(Context.blank(model.spec, 2))
    plan_state = planner.initial_state(model, 2)
    with Allocated() as counter:
        planner.plan(model, state, plan_state, NoiseKey.for_rows(2), Budget())
    return counter.total


def shooting(make: Callable[..., Planner], **options: Any) -> Callable[[int, int], Planner]:
    return lambda num, horizon: make(num_candidates=num, horizon=horizon, **options)


PLANNERS = {
    "mppi": shooting(make_mppi),
    "cem": shooting(make_cem, num_elites=4),
    "best_of_n": shooting(make_best_of_n),
    "gradient": lambda num, horizon: make_gradient(
        start=make_cem(num_candidates=num, horizon=horizon, num_elites=4), num_starts=num, steps=2
    ),
    # A tree has simulations for candidates, each of `chunk` steps; a node has `num_candidates` slots for children.
    "mcts": lambda num, horizon: make_mcts(simulations=num, chunk=horizon, depth=1, num_candidates=16),
}


@pytest.mark.parametrize("name", PLANNERS)
def test_memory_is_linear_in_candidates_and_in_steps(name: str) -> None:
    """Twice as many cost at most twice as much: nothing is allocated per pair of candidates, or of steps."""
    small, wide, long, both = (
        allocated(PLANNERS[name](num, horizon)) for num, horizon in ((64, 8), (128, 8), (64, 16), (128, 16))
    )
    for more, times in ((wide, 2), (long, 2), (both, 4)):
        assert more <= 1.05 * times * small, f"{more / small:.2f} times the memory for {times} times the work"
    assert both > 2.0 * small, "what is counted is not what grows"
