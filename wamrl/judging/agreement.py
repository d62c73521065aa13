"""How well one judgement of policies agrees with another: correlation, rank violations, calibration, horizons.

Everything here takes plain arrays. `real` is what happened in the simulator, `imagined` what the learned model said;
the two are keyword-only, because published code disagrees about their order and MMRV is not symmetric in them.
A statistic that is not defined (a constant rate has no correlation) is None, never a number made up for it.

Letters: K policies, N start states, H steps ahead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Z_95 = 1.959963984540054
THRESHOLDS = 0.1, 0.9  # between which `matching_threshold` lies
_EXACT = 8  # 8! = 40320 permutations are gone through one by one
_DRAWS = 100_000


def _pair(real: ArrayLike, imagined: ArrayLike, least: int) -> tuple[Floats, Floats]:
    one, other = np.asarray(real, dtype=np.float64), np.asarray(imagined, dtype=np.float64)
    if one.ndim != 1 or one.shape != other.shape:
        raise ValueError(f"real has shape {one.shape} and imagined {other.shape}, but both must be [K], in one order")
    if len(one) < least:
        raise ValueError(f"there are {len(one)} policies, but this needs at least {least}")
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise ValueError("real or imagined holds NaN or infinity; leave out policies without episodes")
    return one, other


def pearson(*, real: ArrayLike, imagined: ArrayLike) -> float | None:
    """Pearson's r over policies [K >= 2]; None where a side is constant. With K = 2 it is 1 or -1 by construction."""
    one, other = _pair(real, imagined, 2)
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    one, other = one - one.mean(), other - other.mean()
    return float(np.clip((one @ other) / math.sqrt((one @ one) * (other @ other)), -1.0, 1.0))


def spearman(*, real: ArrayLike, imagined: ArrayLike) -> float | None:
    """Spearman's rho [K >= 2]: Pearson's r of the ranks, ties sharing their mean; None where a side is constant."""
    one, other = _pair(real, imagined, 2)
    return pearson(real=stats.rankdata(one), imagined=stats.rankdata(other))


def mmrv(*, real: ArrayLike, imagined: ArrayLike) -> float:
    """Mean maximum rank violation (Li et al., 2024, SIMPLER, arXiv:2405.05941), 0 is best.

    The mean over policies i of the largest |real_i - real_j| among the j that imagination orders otherwise. Ties: a
    pair that is equal in reality costs nothing, whatever imagination says; a pair that differs in reality and is equal
    in imagination is a violation, for i and for j, since imagination cannot tell them apart.
    """
    one, other = _pair(real, imagined, 2)
    gap = one[:, None] - one[None, :]
    wrong = np.sign(gap) != np.sign(other[:, None] - other[None, :])
    return float((np.abs(gap) * wrong).max(axis=1).mean())


def permutation_p(*, real: ArrayLike, imagined: ArrayLike, draws: int = _DRAWS, seed: int = 0) -> float | None:
    """One-sided p-value of Pearson's r: how often policies matched at random correlate at least as well.

    Exact for K <= 8, where the smallest possible value is 1/K!; above it, `draws` random permutations with one added to
    both counts (Phipson and Smyth, 2010). None where r is not defined.
    """
    one, other = _pair(real, imagined, 2)
    if pearson(real=one, imagined=other) is None:
        return None
    one, other = one - one.mean(), other - other.mean()
    least = one @ other - 1e-12 * math.sqrt((one @ one) * (other @ other))  # equal up to rounding counts as equal
    count = len(one)
    if count <= _EXACT:
        orders = np.array(list(itertools.permutations(range(count))))
        return float((other[orders] @ one >= least).mean())
    rng = np.random.default_rng(seed)
    hits = sum(
        int((rng.permuted(np.tile(other, (part, 1)), axis=1) @ one >= least).sum())
        for part in [10_000] * (draws // 10_000) + [draws % 10_000]
        if part
    )
    return (hits + 1) / (draws + 1)


def fisher_interval(r: float | None, count: int, *, z: float = Z_95) -> tuple[float, float] | None:
    """Fisher's interval of a correlation over `count` policies drawn independently; 95 % with the default `z`.

    None where r is not defined or count < 4: the interval's width is 1 / sqrt(count - 3). At r = 1 or -1 it collapses.
    """
    if r is None or count < 4:
        return None
    if abs(r) >= 1.0:
        return r, r
    half = z / math.sqrt(count - 3)
    return math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def leave_one_out(
    *, real: ArrayLike, imagined: ArrayLike, statistic: Callable[..., float | None] = pearson
) -> list[float | None]:
    """[K] the statistic without policy k; None where it is not defined, or fewer than two policies would be left."""
    one, other = _pair(real, imagined, 2)
    if len(one) < 3:
        return [None] * len(one)
    return [statistic(real=np.delete(one, k), imagined=np.delete(other, k)) for k in range(len(one))]


def kappa(*, real: ArrayLike, imagined: ArrayLike) -> float | None:
    """Cohen's kappa of two judgements of the same episodes [N]: agreement beyond that of chance, 1 is best.

    None where both judge everything alike, so that chance agrees fully.
    """
    one, other = np.asarray(real, dtype=bool).ravel(), np.asarray(imagined, dtype=bool).ravel()
    if one.shape != other.shape or not len(one):
        raise ValueError(f"real has {len(one)} episodes and imagined {len(other)}; kappa needs the same, at least one")
    agree = float((one == other).mean())
    chance = float(one.mean() * other.mean() + (1 - one.mean()) * (1 - other.mean()))
    return None if chance >= 1.0 else (agree - chance) / (1 - chance)


def bootstrap(
    statistic: Callable[..., float | None],
    *,
    real: NDArray[Any],
    imagined: NDArray[Any],
    groups: Sequence[int] | NDArray[np.int64] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """95 % percentile interval of `statistic(real=..., imagined=...)` when the start states are drawn again.

    real, imagined: [K, N] outcomes per policy and start; the same starts are drawn for all policies and both sides, and
    within each group of `groups` [N] (the tasks). It says how far the numbers hang on the start states, not how other
    policies would do. None where more than one draw in twenty has no defined value.
    """
    if real.shape != imagined.shape or real.ndim != 2:
        raise ValueError(f"real has shape {real.shape} and imagined {imagined.shape}, but both must be [K, N]")
    found: list[float] = []
    for chosen in _redrawn(real.shape[1], groups, draws, seed):
        value = statistic(real=real[:, chosen], imagined=imagined[:, chosen])
        if value is not None:
            found.append(value)
    if len(found) < 0.95 * draws:
        return None
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def _redrawn(
    count: int, groups: Sequence[int] | NDArray[np.int64] | None, draws: int, seed: int
) -> Iterator[NDArray[np.int64]]:
    """`draws` times the numbers of `count` start states, drawn with replacement within each group."""
    group = np.zeros(count, dtype=np.int64) if groups is None else np.asarray(groups)
    members = [np.flatnonzero(group == g) for g in np.unique(group)]
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.concatenate([rng.choice(m, len(m)) for m in members])


def gap_interval(
    *,
    real: NDArray[Any],
    imagined: NDArray[Any],
    groups: Sequence[int] | NDArray[np.int64] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of the mean |imagined - real| rate over policies, arguments as of `bootstrap`.

    Chance alone makes absolute differences: where the rates are equal the mean of a sample's is above 0, and those of
    samples drawn again from it higher still, so that their percentiles do not reach down to it. Here a bootstrap test
    is inverted (Carpenter, 1999): the true differences are taken for t times the measured ones, as they are and shrunk
    by what chance makes of them (James and Stein, 1961), and that chance for what drawing the start states again shows.
    The interval holds the gaps of all t with which the measured one is neither among the lowest nor the highest 2.5 %,
    and the measured one in any case.
    """
    if real.shape != imagined.shape or real.ndim != 2:
        raise ValueError(f"real has shape {real.shape} and imagined {imagined.shape}, but both must be [K, N]")
    by_start = imagined.astype(np.float64) - real.astype(np.float64)
    apart = by_start.mean(axis=1)
    chance = np.array([by_start[:, c].mean(axis=1) - apart for c in _redrawn(real.shape[1], groups, draws, seed)])
    gap, most = float(np.abs(apart).mean()), float(np.quantile(np.abs(chance).mean(axis=1), 0.975))
    if gap == 0:
        return 0.0, most
    shrunk = apart * np.maximum(0.0, 1.0 - chance.var(axis=0) / np.maximum(apart**2, 1e-12))
    held = [gap]
    for true in (apart, shrunk) if shrunk.any() else (apart,):
        size = float(np.abs(true).mean())
        for t in np.linspace(0.0, (gap + most) / size, 201):  # beyond, chance cannot bring it down to the measured one
            found = np.abs(t * true + chance).mean(axis=1)
            lowest, highest = (found <= gap).mean(), (found >= gap).mean()
            if min(lowest, highest) >= 0.025 or (t == 0.0 and lowest < 0.025):  # the latter: less than chance makes
                held.append(float(t) * size)
    return min(held), max(held)


@dataclass(frozen=True)
class Confusion:
    """The judge against reality, counted over episodes. A rate whose denominator is empty is None.

    hits: both say success. false_alarms: imagined success, real failure. misses: imagined failure, real success.
    """

    hits: int
    false_alarms: int
    misses: int
    rejections: int

    @property
    def precision(self) -> float | None:
        return _share(self.hits, self.hits + self.false_alarms)

    @property
    def recall(self) -> float | None:
        return _share(self.hits, self.hits + self.misses)

    @property
    def false_positive_rate(self) -> float | None:
        """P(imagined success | real failure)."""
        return _share(self.false_alarms, self.false_alarms + self.rejections)


def confusion(*, real: ArrayLike, imagined: ArrayLike) -> Confusion:
    """Count the four cases over episodes [N]."""
    one, other = np.asarray(real, dtype=bool).ravel(), np.asarray(imagined, dtype=bool).ravel()
    if one.shape != other.shape:
        raise ValueError(f"real has {len(one)} episodes, but imagined {len(other)}")
    return Confusion(
        hits=int((one & other).sum()),
        false_alarms=int((~one & other).sum()),
        misses=int((one & ~other).sum()),
        rejections=int((~one & ~other).sum()),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True)
class Bin:
    """One bin of a calibration curve: mean predicted probability, share of real successes, and episodes."""

    predicted: float
    real: float
    count: int
    successes: int


def calibration(*, real: ArrayLike, probability: ArrayLike, bins: int = 10) -> tuple[float, list[Bin]]:
    """Expected calibration error over `bins` equal bins of [0, 1] (Guo et al., 2017), and the bins that are not empty.

    real: [N] outcomes. probability: [N] in [0, 1]; the value 1 belongs to the last bin.
    """
    outcome, p = np.asarray(real, dtype=bool).ravel(), np.asarray(probability, dtype=np.float64).ravel()
    if outcome.shape != p.shape or not len(p):
        raise ValueError(f"real has {len(outcome)} episodes and probability {len(p)}; give the same, at least one")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("probability has entries outside of [0, 1] or NaN")
    index = np.minimum((p * bins).astype(int), bins - 1)
    found = [
        Bin(float(p[mine].mean()), float(outcome[mine].mean()), int(mine.sum()), int(outcome[mine].sum()))
        for mine in (index == b for b in range(bins))
        if mine.any()
    ]
    return sum(b.count * abs(b.predicted - b.real) for b in found) / len(p), found


def matching_threshold(*, real: ArrayLike, score: ArrayLike, otherwise: float = 0.5) -> float:
    """The threshold at which as many episodes are judged successful as are, false alarms and misses balancing.

    A rate over policies wants this one rather than the threshold with the fewest errors, which favours the commoner
    outcome. Of the scores that the threshold may lie between, it lies in the middle, but within [0.1, 0.9]: where a few
    episodes put it beyond, the judge saw nothing of what happened, and a threshold there would be luck. Where reality
    has only successes or only failures there is nothing to learn, and `otherwise` comes back.
    """
    outcome, s = np.asarray(real, dtype=bool).ravel(), np.asarray(score, dtype=np.float64).ravel()
    if outcome.shape != s.shape or not len(s):
        raise ValueError(f"real has {len(outcome)} episodes and score {len(s)}; give the same, at least one")
    wanted = int(outcome.sum())
    if wanted in (0, len(s)):
        return otherwise
    ordered = np.sort(s)[::-1]
    return float(np.clip((ordered[wanted - 1] + ordered[wanted]) / 2, *THRESHOLDS))


def sustained_horizon(errors: NDArray[np.floating[Any]], epsilon: float, *, share: float = 0.9) -> int:
    """H*: the largest h at which at least `share` of the roll-outs have kept every error up to h below `epsilon`.

    errors: [N, H] for 1, ..., H steps ahead; NaN where an episode was over, which ends that roll-out's say. Zero where
    the first step already fails; a horizon that half of the roll-outs do not reach does not count.
    """
    if errors.ndim != 2 or not errors.size:
        raise ValueError(f"errors has shape {errors.shape}, but must be [N, H] with at least one roll-out and step")
    known = np.isfinite(errors)
    kept = np.logical_and.accumulate(np.where(known, errors < epsilon, True), axis=1)
    best = 0
    for h in range(errors.shape[1]):
        count = int(known[:, h].sum())
        if 2 * count < len(errors) or count == 0 or kept[known[:, h], h].mean() < share:
            break
        best = h + 1
    return best
