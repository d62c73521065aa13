"""What a search runs its model with: a clock on every query, and functions that are compiled as a whole.

Letters: R rows that are searched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from wamrl.interfaces import WAM, Imagined, Proposal, State
from wamrl.noise import NoiseKey
from wamrl.provenance import has_cpp_compiler

MOST_GRAPHS = 64
"""Graphs that a compiled function may come to, in place of torch's eight."""


class ModelClock:
    """A model whose queries are timed; `seconds` is the time spent inside it."""

    def __init__(self, model: WAM) -> None:
        self.model = model
        self.spec = model.spec
        self.seconds = 0.0

    def timed(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        result = call(*arguments, **options)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - begun
        return result

    def imagine(self, *arguments: Any, **options: Any) -> Imagined:
        return cast(Imagined, self.timed(self.model.imagine, *arguments, **options))

    def propose(self, *arguments: Any, **options: Any) -> Proposal:
        return cast(Proposal, self.timed(self.model.propose, *arguments, **options))

    def value(self, *arguments: Any, **options: Any) -> Tensor:
        return cast(Tensor, self.timed(self.model.value, *arguments, **options))

    def success_value(self, *arguments: Any, **options: Any) -> Tensor:
        return cast(Tensor, self.timed(self.model.success_value, *arguments, **options))

    def log_prob(self, *arguments: Any, **options: Any) -> Tensor:
        return cast(Tensor, self.timed(self.model.log_prob, *arguments, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def require_compiler() -> None:
    """ValueError where `planner.compile=true` could not be served."""
    if not has_cpp_compiler():
        raise ValueError(
            "planner.compile=true needs a C++ compiler, and none was found (looked for $CXX, g++, clang++, c++); "
            "install one, or set planner.compile=false"
        )


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` as one graph of fixed shapes; where its first argument, the model, allows no such graph, it raises.

    options: of torch's compiler, `torch._inductor.config`.
    """
    from torch._dynamo import config  # seconds to import, so only where it is needed

    from wamrl.planners.compiler_passes import BiasApart

    # Torch counts the graphs of all planners of a process together, and a planner and its null control have one each
    # for every number of rows, deep trees two: with ten rows and fewer, ten or twenty.
    config.recompile_limit = max(config.recompile_limit, MOST_GRAPHS)
    # Last of all passes: torch's own would make one call of product and sum again.
    options = {"cpp_wrapper": True, "post_grad_custom_post_pass": BiasApart(), **options}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def padding(rows: int, device: torch.device) -> Tensor | None:
    """Numbers of `rows` rows, and the first of them again up to a power of two; None where they are one.

    A compiled function is compiled anew for every number of rows, which takes seconds, and after `MOST_GRAPHS` of them
    torch gives up. Gates and episodes that end let any number through, of which few are powers of two.
    """
    if rows & (rows - 1) == 0:
        return None
    at = torch.arange(1 << rows.bit_length(), device=device)
    return at.where(at < rows, 0)


def every_padding(state: State, noise: NoiseKey) -> Iterator[tuple[State, NoiseKey]]:
    """`state` and `noise` [R], in every number of rows that `padding` makes of R and fewer."""
    rows = noise.row.shape[0]
    for power in range((rows - 1).bit_length() + 1):
        at = torch.arange(1 << power, device=noise.row.device) % rows
        yield state[at], noise[at]


class CompiledQueries(ModelClock):
    """The model of a clock, which goes on counting, whose `propose` and `imagine` are compiled functions.

    functions: those that were compiled before, by name; new ones are left there.
    """

    def __init__(self, clock: ModelClock, functions: dict[str, Callable[..., Any]]) -> None:
        super().__init__(clock.model)
        self._functions = functions
        self.timed = clock.timed  # type: ignore[method-assign]

    def _run(self, query: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        name = query.__name__
        if name not in self._functions:
            self._functions[name] = compiled(query)
        return run_compiled(self._functions[name], self, *arguments, **options)

    def imagine(self, *arguments: Any, **options: Any) -> Imagined:
        return cast(Imagined, self._run(_imagine, *arguments, **options))

    def propose(self, *arguments: Any, **options: Any) -> Proposal:
        return cast(Proposal, self._run(_propose, *arguments, **options))


def _imagine(model: WAM, *arguments: Any, **options: Any) -> Imagined:
    return model.imagine(*arguments, **options)


def _propose(model: WAM, *arguments: Any, **options: Any) -> Proposal:
    return model.propose(*arguments, **options)


def run_compiled(function: Callable[..., Any], clock: ModelClock, *arguments: Any, **options: Any) -> Any:
    """What a `compiled` function makes of the clock's model and `arguments`; all of its time counts as the model's."""
    from torch._dynamo.exc import TorchDynamoException  # seconds to import, so only where it is needed

    try:
        return clock.timed(function, clock.model, *arguments, **options)
    except TorchDynamoException as cause:
        raise RuntimeError(
            f"planner.compile=true, but what is asked of {type(clock.model).__name__} cannot be compiled "
            f"({type(cause).__name__}); set planner.compile=false, or see the cause below"
        ) from cause
