"""Graphs mean the same after what is changed in them before they are compiled."""

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")  # torch's own, on import

addmm, mm = torch.ops.aten.addmm.default, torch.ops.aten.mm.default


def passed(function, *arguments: Tensor) -> torch.fx.GraphModule:  # type: ignore[no-untyped-def]
    """The graph of `function` after the pass; it has to give what the function gives."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from wamrl.planners.compiler_passes import BiasApart

    made = make_fx(function, tracing_mode="fake")(*arguments)
    BiasApart()(made.graph)
    made.recompile()
    torch.testing.assert_close(made(*arguments), function(*arguments))
    return made


def targets(made: torch.fx.GraphModule) -> list[object]:
    return [node.target for node in made.graph.nodes]


def test_a_linear_layer_becomes_a_product_and_a_sum() -> None:
    x, weight, bias = torch.randn(3, 5), torch.randn(5, 4), torch.randn(4)
    made = passed(lambda b, x, w: torch.addmm(torch.ones(4), torch.addmm(b, x, w).relu(), w[:4]), bias, x, weight)
    assert targets(made).count(mm) == 2 and addmm not in targets(made)


def test_what_would_become_other_numbers_stays_one_call() -> None:
    x, weight, bias = torch.randn(3, 5), torch.randn(5, 4), torch.randn(4)
    assert addmm in targets(passed(lambda b, x, w: torch.addmm(b, x, w, beta=2.0), bias, x, weight))
    short = [value.bfloat16() for value in (bias, x, weight)]
    assert addmm in targets(passed(torch.addmm, *short))
