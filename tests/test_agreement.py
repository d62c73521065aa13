"""The statistics of an evaluation in imagination, against cases worked by hand, scipy and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from wamrl.judging import agreement as ag

REAL, IMAGINED = [0.1, 0.4, 0.6, 0.9], [0.3, 0.2, 0.8, 0.7]


def test_pearson_and_spearman_are_scipys():
    rng = np.random.default_rng(0)
    for count in (3, 8, 20):
        real, imagined = rng.random(count).round(1), rng.random(count).round(1)  # rounded: ties
        assert ag.pearson(real=real, imagined=imagined) == pytest.approx(stats.pearsonr(real, imagined)[0])
        assert ag.spearman(real=real, imagined=imagined) == pytest.approx(stats.spearmanr(real, imagined)[0])


def test_a_constant_side_has_no_correlation():
    for real, imagined in (([0.2, 0.5, 0.9], [1.0, 1.0, 1.0]), ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3])):
        assert ag.pearson(real=real, imagined=imagined) is None
        assert ag.spearman(real=real, imagined=imagined) is None
        assert ag.permutation_p(real=real, imagined=imagined) is None
    assert ag.fisher_interval(None, 10) is None


def test_two_policies_give_one_or_minus_one_and_no_interval():
    assert ag.pearson(real=[0.1, 0.9], imagined=[0.4, 0.5]) == 1.0
    assert ag.pearson(real=[0.1, 0.9], imagined=[0.5, 0.4]) == -1.0
    assert ag.fisher_interval(1.0, 2) is None and ag.fisher_interval(0.5, 3) is None
    assert ag.leave_one_out(real=[0.1, 0.9], imagined=[0.4, 0.5]) == [None, None]
    with pytest.raises(ValueError, match="1 policies"):
        ag.pearson(real=[0.1], imagined=[0.1])


def test_mmrv_of_a_case_worked_by_hand():
    # Pairs in the wrong order: (0, 1) with a real gap of .3, and (2, 3) with .3. Each policy's worst is .3.
    assert ag.mmrv(real=REAL, imagined=IMAGINED) == pytest.approx(0.3)
    # The gap is the real one: with the sides exchanged the same pairs have gaps of .1 each.
    assert ag.mmrv(real=IMAGINED, imagined=REAL) == pytest.approx(0.1)
    # Policy 0 was best in imagination and worst in reality: violations .5 and .7 for it, .5 and .7 for the others.
    assert ag.mmrv(real=[0.2, 0.7, 0.9], imagined=[1.0, 0.1, 0.2]) == pytest.approx((0.7 + 0.5 + 0.7) / 3)
    assert ag.mmrv(real=REAL, imagined=[0.01, 0.02, 0.03, 0.04]) == 0.0


def test_mmrv_with_ties():
    # Equal in imagination, different in reality: imagination cannot tell them apart, which is a violation for both.
    assert ag.mmrv(real=[0.2, 0.8], imagined=[0.5, 0.5]) == pytest.approx(0.6)
    # Equal in reality: whatever imagination says costs nothing.
    assert ag.mmrv(real=[0.5, 0.5], imagined=[0.1, 0.9]) == 0.0
    assert ag.mmrv(real=[0.5, 0.5, 0.5], imagined=[0.5, 0.5, 0.5]) == 0.0


def test_the_sides_are_keywords_only():
    for statistic in (ag.pearson, ag.spearman, ag.mmrv, ag.kappa, ag.permutation_p):
        with pytest.raises(TypeError):
            statistic(REAL, IMAGINED)


def test_the_permutation_p_value_is_exact_for_few_policies_and_has_its_floor():
    assert ag.permutation_p(real=[0.1, 0.2, 0.4], imagined=[0.1, 0.2, 0.4]) == pytest.approx(1 / math.factorial(3))
    assert ag.permutation_p(real=[0.1, 0.2, 0.4], imagined=[0.4, 0.2, 0.1]) == 1.0
    rng = np.random.default_rng(1)
    real, imagined = rng.random(7), rng.random(7)
    scipy_p = stats.permutation_test(
        (imagined,),
        lambda x: np.corrcoef(real, x)[0, 1],
        permutation_type="pairings",
        alternative="greater",
        n_resamples=np.inf,
    ).pvalue
    assert ag.permutation_p(real=real, imagined=imagined) == pytest.approx(scipy_p)


def test_the_sampled_permutation_p_value_is_near_the_truth():
    rng = np.random.default_rng(2)
    real = rng.random(12)
    imagined = 0.5 * real + rng.random(12)
    expected = stats.pearsonr(real, imagined, alternative="greater").pvalue
    assert ag.permutation_p(real=real, imagined=imagined) == pytest.approx(expected, rel=0.3)
    assert ag.permutation_p(real=real, imagined=real) == pytest.approx(1 / 100_001)


def test_the_fisher_interval_is_scipys():
    rng = np.random.default_rng(3)
    real = rng.random(15)
    imagined = real + 0.3 * rng.random(15)
    found = stats.pearsonr(real, imagined)
    interval = found.confidence_interval(0.95)
    assert ag.fisher_interval(found[0], 15) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
def test_the_fisher_interval_covers_a_known_correlation_at_its_rate(rho):
    rng, studies, policies = np.random.default_rng(4), 2000, 12
    covered = 0
    for _ in range(studies):
        x = rng.standard_normal(policies)
        y = rho * x + math.sqrt(1 - rho**2) * rng.standard_normal(policies)
        low, high = ag.fisher_interval(ag.pearson(real=x, imagined=y), policies)
        covered += low <= rho <= high
    # Three standard errors of a share of 2000 studies are 1.5 points.
    assert abs(covered / studies - 0.95) < 0.015


def test_the_bootstrap_covers_a_known_gap_of_rates_at_its_rate():
    """Two policies whose real and imagined success probabilities are known; the statistic is the mean rate gap."""
    rng, studies, starts = np.random.default_rng(5), 200, 100
    truth = 0.15

    def bias(*, real, imagined):
        return float((imagined.mean(1) - real.mean(1)).mean())

    covered = 0
    for study in range(studies):
        real = rng.random((2, starts)) < 0.5
        imagined = rng.random((2, starts)) < 0.5 + truth
        low, high = ag.bootstrap(bias, real=real, imagined=imagined, draws=300, seed=study)
        covered += low <= truth <= high
    assert 0.90 <= covered / studies <= 0.99


def test_the_interval_of_the_gap_covers_small_and_large_gaps():
    """Twelve policies, half of them judged rightly; percentiles of a plain bootstrap lie above a true gap of 0."""
    rng = np.random.default_rng(0)
    rates, plain_covered = np.linspace(0.05, 0.8, 12), 0

    def gap(*, real, imagined):
        return float(np.abs(real.mean(1) - imagined.mean(1)).mean())

    for added in (0.0, 0.1, 0.2):
        judged = rates + added * (np.arange(12) % 2)
        covered = 0
        for study in range(60):
            real, imagined = (rng.random((12, 100)) < r[:, None] for r in (rates, judged))
            low, high = ag.gap_interval(real=real, imagined=imagined, draws=200, seed=study)
            assert low <= gap(real=real, imagined=imagined) <= high + 1e-9
            covered += low <= 0.5 * added <= high
            if not added and study < 20:
                plain_covered += ag.bootstrap(gap, real=real, imagined=imagined, draws=200, seed=study)[0] <= 0
        assert covered >= 50, added  # 9 in 10 of 60 are 54
    assert plain_covered == 0


def test_the_interval_of_the_gap_of_cases_worked_by_hand():
    real = np.array([[True, False] * 10, [True] * 20])
    assert ag.gap_interval(real=real, imagined=real, draws=50) == (0.0, 0.0)  # every start alike: no chance in it
    low, high = ag.gap_interval(real=real, imagined=np.ones_like(real), draws=200)
    assert 0.1 < low < 0.25 < high < 0.4  # half of 50 points, with the standard error of half of 20 coins
    with pytest.raises(ValueError, match="both must be"):
        ag.gap_interval(real=real, imagined=real[:1])


def test_the_bootstrap_draws_within_groups_and_the_same_starts_for_all():
    real = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=bool)
    # Whatever is drawn within the groups {0, 1} and {2, 3}, every policy solves half of it.
    assert ag.bootstrap(
        lambda *, real, imagined: float(real.mean(1).max()), real=real, imagined=real, groups=[0, 0, 1, 1], draws=50
    ) == (0.5, 0.5)


def test_leave_one_out_finds_the_policy_that_carries_the_correlation():
    without = ag.leave_one_out(real=[0.1, 0.12, 0.11, 0.9], imagined=[0.3, 0.2, 0.25, 0.95])
    assert np.argmin(without) == 3 and without[3] == pytest.approx(-1.0)


def test_kappa_of_a_table_worked_by_hand():
    # 20 both, 5 only imagined, 10 only real, 15 neither: agreement .7, by chance .5, kappa .4.
    real = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    imagined = [1] * 20 + [1] * 5 + [0] * 10 + [0] * 15
    assert ag.kappa(real=real, imagined=imagined) == pytest.approx(0.4)
    assert ag.kappa(real=[1, 1], imagined=[1, 1]) is None
    assert ag.kappa(real=[1, 0, 1, 0], imagined=[1, 1, 1, 1]) == 0.0
    judge = ag.confusion(real=real, imagined=imagined)
    assert (judge.hits, judge.false_alarms, judge.misses, judge.rejections) == (20, 5, 10, 15)
    assert judge.precision == 0.8 and judge.recall == pytest.approx(2 / 3) and judge.false_positive_rate == 0.25


def test_rates_without_a_denominator_are_undefined():
    judge = ag.confusion(real=[True, True], imagined=[False, False])
    assert judge.precision is None and judge.false_positive_rate is None and judge.recall == 0.0


def test_the_calibration_error_of_a_case_worked_by_hand():
    # Bin [.2, .3): mean .25, half real; bin [.9, 1]: mean .95, all real. ECE = (2 * .25 + 2 * .05) / 4.
    error, bins = ag.calibration(real=[1, 0, 1, 1], probability=[0.22, 0.28, 0.9, 1.0])
    assert error == pytest.approx(0.15)
    assert [(b.count, b.successes) for b in bins] == [(2, 1), (2, 2)]
    rng = np.random.default_rng(6)
    p = rng.random(20_000)
    assert ag.calibration(real=rng.random(20_000) < p, probability=p)[0] < 0.02
    assert ag.calibration(real=rng.random(20_000) < 0.2, probability=np.ones(20_000))[0] == pytest.approx(0.8, abs=0.02)
    with pytest.raises(ValueError, match="outside"):
        ag.calibration(real=[1], probability=[1.2])


def test_the_threshold_judges_as_many_successful_as_are():
    score, real = np.array([0.05, 0.1, 0.2, 0.3, 0.9]), np.array([0, 0, 1, 0, 1], dtype=bool)
    threshold = ag.matching_threshold(real=real, score=score)
    assert threshold == pytest.approx(0.25) and (score >= threshold).sum() == real.sum()
    assert ag.matching_threshold(real=[True, True], score=[0.1, 0.2]) == 0.5  # nothing to learn from
    # A judge that saw neither success gets no threshold that would call its noise a success.
    assert ag.matching_threshold(real=[True, True, False], score=[0.001, 0.002, 0.0]) == 0.1


def test_the_sustained_horizon_of_a_case_worked_by_hand():
    errors = np.full((10, 5), 1.0)
    errors[0, 1] = 9.0  # one of ten fails at step 2 and counts as failed from then on
    errors[1, 3] = 9.0  # a second one at step 4
    assert ag.sustained_horizon(errors, 5.0) == 3
    assert ag.sustained_horizon(errors, 5.0, share=0.95) == 1
    assert ag.sustained_horizon(errors, 0.5) == 0
    ended = np.full((4, 6), 1.0)
    ended[1:, 3:] = np.nan  # three of four episodes are over after step 3
    assert ag.sustained_horizon(ended, 5.0) == 3


def test_shapes_and_nan_are_refused():
    with pytest.raises(ValueError, match="both must be"):
        ag.pearson(real=[0.1, 0.2], imagined=[0.1])
    with pytest.raises(ValueError, match="NaN"):
        ag.mmrv(real=[0.1, float("nan")], imagined=[0.1, 0.2])
    with pytest.raises(ValueError, match="same"):
        ag.kappa(real=[], imagined=[])
