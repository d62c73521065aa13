"""Deadlines within an iteration: candidates in blocks, none of which starts that would end too late.

Shapes: R rows, N candidates, H steps, A action dims.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from wamrl.interfaces import Budget, Imagined
from wamrl.planners.proposers import join_imagined

Judged = TypeVar("Judged")

BLOCK_GROWTH = 4
"""A block has at most that many times the candidates of the one before: what few took says little of very many."""
KEPT_BACK = 0.05
"""Share of a deadline that is left for what follows the search."""


def check_deadline(budget: Budget) -> None:
    """ValueError for a deadline that is not above 0."""
    if budget.deadline_s is not None and not budget.deadline_s > 0:
        raise ValueError(f"budget.deadline_s is {budget.deadline_s}, but must be above 0 seconds")


class Pace:
    """How many candidates there is still time for until `ends` (of `time.perf_counter`), judged by those before.

    after: what is left for afterwards, in multiples of what the first candidates take. looked: how many candidates the
    latest iteration has looked at.
    """

    def __init__(self, ends: float, after: float = 0.0) -> None:
        self.ends, self.looked, self._after = ends, 0, after
        self._least: tuple[int, float] | None = None  # candidates and seconds of the smallest block
        self._latest, self._judging = (1, 0.0), (1, 0.0)

    def imagined(self, num: int, seconds: float) -> None:
        """Note that imagining `num` candidates took `seconds`."""
        if self._least is None:
            self.ends -= self._after * seconds
        self._latest = num, seconds
        if self._least is None or num <= self._least[0]:
            self._least = num, max(seconds, 0.0 if self._least is None else self._least[1])

    def judged(self, num: int, seconds: float) -> None:
        """Note that scoring `num` candidates and refitting took `seconds`."""
        self._judging = num, seconds

    def more(self, looked: int, wanted: int) -> int:
        """Candidates of the next block, at most `wanted`, that can be judged in time with the `looked` before; or 0."""
        if wanted < 1 or self._least is None:
            return 0
        (least, base), (latest, seconds), (judged, judging) = self._least, self._latest, self._judging
        each, judge_each = seconds / latest, judging / judged
        most = min(wanted, BLOCK_GROWTH * latest)
        # Fewer than the smallest block take as long as it did: what a call costs, however few it is about.
        left = self.ends - time.perf_counter() - base - judge_each * (looked + min(least, most))
        if left < 0.0:
            return 0
        beyond = left / (each + judge_each) if each + judge_each > 0 else math.inf
        return int(min(most, least + beyond))


def in_blocks(
    look: Callable[[int, int, int], tuple[Tensor, Tensor, Imagined]],
    judge: Callable[[Tensor, Tensor, Imagined], Judged],
    num: int,
    first: int,
    pace: Pace,
) -> tuple[Judged, int]:
    """What `judge` makes of those of `num` candidates that there is time for, and the evaluations that they took.

    look: block, first candidate, candidates -> actions [R, n, H, A], which of them [R, n] are broken, their futures.
    judge: the same three of all candidates so far. first: candidates that are looked at in any case. Leaves in
    `pace.looked` how many it were.
    """
    pace.looked = min(first, num)
    begun = time.perf_counter()
    actions, broken, imagined = look(0, 0, pace.looked)
    then = time.perf_counter()
    pace.imagined(pace.looked, then - begun)
    # The first block is judged by itself, and again with those that follow, to know how long that takes.
    found = judge(actions, broken, imagined)
    pace.judged(pace.looked, time.perf_counter() - then)
    block = 0
    while more := pace.more(pace.looked, num - pace.looked):
        begun, block = time.perf_counter(), block + 1
        further, unusable, futures = look(block, pace.looked, more)
        actions, broken = torch.cat([actions, further], dim=1), torch.cat([broken, unusable], dim=1)
        imagined = join_imagined(imagined, futures)
        pace.imagined(more, time.perf_counter() - begun)
        pace.looked += more
    if block:
        found = judge(actions, broken, imagined)
    return found, imagined.evaluations
