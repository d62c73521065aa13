"""What an evaluation in imagination found: agreement with reality over policies and start states, and its warnings.

Letters: K policies, N start states of all tasks together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wamrl.evaluation import wilson
from wamrl.judging import agreement as ag
from wamrl.report import short

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Judged:
    """One judge's answers. scores: [K, N] in [0, 1]. thresholds: task -> score from which an episode is a success."""

    scores: Floats
    thresholds: Mapping[str, float]

    def decisions(self, tasks: Sequence[str]) -> Bools:
        """[K, N] imagined success; `tasks` [N] is the task of each start."""
        return self.scores >= np.array([self.thresholds[task] for task in tasks])


def rate(outcomes: Bools) -> dict[str, Any]:
    """Success rate of outcomes [N] with its Wilson 95 % interval."""
    n, k = len(outcomes), int(outcomes.sum())
    low, high = wilson(k, n)
    return {"n": n, "successes": k, "mean": k / n, "low": low, "high": high}


def _rates(real: Bools, imagined: Bools) -> tuple[Floats, Floats]:
    return real.mean(axis=1), imagined.mean(axis=1)


def _r(*, real: Bools, imagined: Bools) -> float | None:
    one, other = _rates(real, imagined)
    return ag.pearson(real=one, imagined=other)


def _mmrv(*, real: Bools, imagined: Bools) -> float:
    one, other = _rates(real, imagined)
    return ag.mmrv(real=one, imagined=other)


def compare(
    real: Bools, imagined: Bools, tasks: Sequence[str], *, draws: int = 1000, seed: int = 0, intervals: bool = True
) -> dict[str, Any]:
    """Every agreement statistic of outcomes [K, N] in reality and in imagination; a value is None where undefined.

    Rates of a policy are pooled over the tasks. `low` and `high` of `pearson` are Fisher's interval, over policies;
    those of `gap` are `agreement.gap_interval`, and those of the others, and `starts_low` and `starts_high` of
    `pearson`, bootstrap intervals over start states.
    """
    count = len(real)
    if count < 2:
        raise ValueError(f"there are {count} policies, but agreement needs at least 2")
    one, other = _rates(real, imagined)
    groups = np.unique(np.asarray(tasks), return_inverse=True)[1]

    def spread(statistic: Any) -> tuple[float, float] | None:
        if not intervals:
            return None
        return ag.bootstrap(statistic, real=real, imagined=imagined, groups=groups, draws=draws, seed=seed)

    def with_interval(value: float | None, bounds: tuple[float, float] | None) -> dict[str, Any]:
        low, high = bounds if bounds is not None else (None, None)
        return {"mean": value, "low": low, "high": high, "n": count}

    r = ag.pearson(real=one, imagined=other)
    pearson = with_interval(r, ag.fisher_interval(r, count))
    by_starts = spread(_r)
    pearson["starts_low"], pearson["starts_high"] = by_starts if by_starts else (None, None)
    judge = ag.confusion(real=real, imagined=imagined)
    cells = [(real[:, groups == g].mean(1), imagined[:, groups == g].mean(1)) for g in np.unique(groups)]
    in_cells = tuple(np.concatenate(side) for side in zip(*cells, strict=True))
    return {
        "policies": count,
        "starts": real.shape[1],
        "pearson": pearson,
        "pearson_cells": ag.pearson(real=in_cells[0], imagined=in_cells[1]),
        "permutation_p": ag.permutation_p(real=one, imagined=other, seed=seed),
        "permutation_floor": 1 / math.factorial(count) if count <= 8 else 1 / 100_001,
        "spearman": ag.spearman(real=one, imagined=other),
        "mmrv": with_interval(ag.mmrv(real=one, imagined=other), spread(_mmrv)),
        "gap": with_interval(
            float(np.abs(one - other).mean()),
            ag.gap_interval(real=real, imagined=imagined, groups=groups, draws=draws, seed=seed) if intervals else None,
        ),
        "bias": float((other - one).mean()),
        "kappa": with_interval(ag.kappa(real=real, imagined=imagined), spread(ag.kappa)),
        "leave_one_out": ag.leave_one_out(real=one, imagined=other),
        "judge": {
            **asdict(judge),
            "precision": judge.precision,
            "recall": judge.recall,
            "false_positive_rate": judge.false_positive_rate,
        },
    }


def warnings_of(found: Mapping[str, Any], real: Bools, imagined: Bools, names: Sequence[str]) -> list[str]:
    """What a reader has to know before believing the numbers of `compare`."""
    texts: list[str] = []
    one, other = _rates(real, imagined)
    judge = found["judge"]
    if found["pearson"]["mean"] is None:
        side = "imagined" if np.ptp(other) == 0 else "real"
        value = (other if side == "imagined" else one)[0]
        texts.append(
            f"All {side} success rates are {value:.0%}, so there is no correlation to speak of: "
            + ("imagination does not tell these policies apart." if side == "imagined" else "choose other policies.")
        )
    false, failures = judge["false_alarms"], judge["false_alarms"] + judge["rejections"]
    if failures and false / failures > 0.3:
        texts.append(
            f"Imagination is too rosy: {false} of {failures} real failures ({false / failures:.0%}) succeed in it."
        )
    misses, successes = judge["misses"], judge["misses"] + judge["hits"]
    if successes and misses / successes > 0.3:
        texts.append(
            f"Imagination is too poor: of {successes} real successes it missed {misses} ({misses / successes:.0%})."
        )
    if found["policies"] < 10:
        texts.append(f"Only {found['policies']} policies: a correlation over so few says little; read its interval.")
    if np.ptp(one) < 0.3:
        texts.append(f"The real rates span only {one.min():.0%} to {one.max():.0%}, a narrow range to correlate over.")
    without = [(r, name) for r, name in zip(found["leave_one_out"], names, strict=True) if r is not None]
    r = found["pearson"]["mean"]
    if r is not None and without:
        least, name = min(without)
        if r - least > 0.1:
            texts.append(f"Pearson's r hangs on one policy: without '{name}' it falls from {r:.2f} to {least:.2f}.")
    return texts


def calibration(real: Bools, scores: Floats) -> dict[str, Any]:
    """ECE and the calibration curve of the judge's scores, with Wilson bounds of each bin."""
    error, bins = ag.calibration(real=real, probability=scores)
    curve = []
    for one in bins:
        low, high = wilson(one.successes, one.count)
        curve.append({**asdict(one), "low": low, "high": high})
    return {"ece": error, "bins": curve}


def thresholds(
    real: Bools, scores: Floats, tasks: Sequence[str], *, otherwise: float = 0.5
) -> tuple[dict[str, float], list[str]]:
    """One threshold per task from calibration episodes [K, N], and the tasks where there was nothing to learn from."""
    found, blind = {}, []
    for task in dict.fromkeys(tasks):
        mine = np.array([t == task for t in tasks])
        found[task] = ag.matching_threshold(real=real[:, mine], score=scores[:, mine], otherwise=otherwise)
        if real[:, mine].all() or not real[:, mine].any():
            blind.append(task)
    return found, blind


def limits_met(found: Mapping[str, float]) -> list[str]:
    """A warning per task whose calibrated threshold stands at a limit: the one that matches lies beyond."""
    return [
        f"The judge's threshold on {short(task)} stands at its limit of {level:g}: its scores are too "
        f"{'hard on' if level == ag.THRESHOLDS[0] else 'kind to'} the calibration policies, and may not be to others. "
        "Calibrate on policies of the kind that is judged (calibration.policies)."
        for task, level in found.items()
        if level in ag.THRESHOLDS
    ]


def drift(errors: Floats, epsilon: float) -> dict[str, Any]:
    """Median, 90th percentile and count of errors [N, H] by steps ahead, and the sustained horizon H*."""
    by_horizon = []
    for h in range(errors.shape[1]):
        known = errors[np.isfinite(errors[:, h]), h]
        if len(known):
            low, high = np.percentile(known, [50, 90])
            by_horizon.append({"h": h + 1, "median": float(low), "p90": float(high), "n": len(known)})
    return {"by_horizon": by_horizon, "sustained": ag.sustained_horizon(errors, epsilon), "epsilon": epsilon}
