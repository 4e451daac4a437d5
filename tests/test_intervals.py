"""Intervals and verdicts: against plain twins, and over thousands of studies with known truth."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from historylens.comparison import intervals
from historylens.comparison.intervals import (
    Bootstrap,
    Estimate,
    degrees_of_freedom,
    late_scores,
    skew_shift,
    student_quantile,
    verdict,
)

N_STUDIES = 1000


def plain_iqm(values):
    """Mean of the middle half, as rliable takes it: a quarter cut off at either end."""
    values = sorted(values)
    n_cut = int(0.25 * len(values))
    return float(np.mean(values[n_cut : len(values) - n_cut]))


# Values


@settings(max_examples=15)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**20))
def test_values_are_those_of_plain_python(n_goals, n_seeds, seed):
    scores = np.random.default_rng(seed).integers(0, 5, size=(n_goals, n_seeds)).astype(float)
    bootstrap = Bootstrap(n_goals, n_seeds, n_resamples=50)
    assert bootstrap.mean(scores).value == pytest.approx(sum(scores.ravel()) / scores.size)
    assert bootstrap.iqm(scores).value == pytest.approx(plain_iqm(scores.ravel()))


def test_resampled_statistics_equal_a_loop_over_the_drawn_runs():
    scores = np.random.default_rng(3).normal(size=(3, 4))
    bootstrap = Bootstrap(3, 4, seed=5, n_resamples=40)
    even = np.full(4, 1 / 4)
    counts = np.random.default_rng(5).multinomial(4, even, size=(40, 3))  # a goal is a stratum
    drawn = [np.repeat(scores.ravel(), count.ravel()) for count in counts]
    freedom = int(degrees_of_freedom(scores[None])[0])
    scale = np.sqrt(4 / 3) * student_quantile(0.975, freedom) / 1.959964
    shift = float(skew_shift(scores[None], 1.959964)[0])
    for estimate, resampled, moved in (
        (bootstrap.mean(scores), [np.mean(runs) for runs in drawn], shift),
        (bootstrap.iqm(scores), [plain_iqm(runs) for runs in drawn], 0.0),
    ):
        low, high = np.quantile(np.array(resampled) - estimate.value, [0.025, 0.975])
        assert estimate.low == pytest.approx(estimate.value + scale * low + moved)
        assert estimate.high == pytest.approx(estimate.value + scale * high + moved)


TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 10: 2.2281, 24: 2.0639, 120: 1.9799}


@pytest.mark.parametrize(("freedom", "expected"), [*TABLE.items(), (10**6, 1.95996)])
def test_student_quantiles_are_those_of_the_tables(freedom, expected):
    assert student_quantile(0.975, freedom) == pytest.approx(expected, abs=1e-4)


def test_freedom_is_that_of_the_goals_that_vary():
    even = np.tile([[0.0, 1.0, 2.0, 3.0]], (8, 1))
    one = even * (np.arange(8) == 0)[:, None]
    freedom = degrees_of_freedom(np.stack([even, one, np.zeros((8, 4))]))
    assert freedom == pytest.approx([8 * 3, 3, 8 * 3])


def test_skewness_moves_the_interval_towards_the_long_tail():
    long_above = np.array([[[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0]]])
    above, below = (skew_shift(x, 1.96)[0] for x in (long_above, -long_above))
    assert above > 0
    assert below == -above
    assert skew_shift(long_above[..., 6:], 1.96) == 0
    assert skew_shift(np.ones((1, 2, 5)), 1.96) == 0


def test_late_scores_are_the_second_half_the_middle_one_included():
    returns = np.array([[[1.0, 2.0, 3.0, 10.0, 20.0]]])
    for n_episodes, expected in ((5, 11.0), (4, 6.5), (1, 1.0)):
        assert late_scores(returns[..., :n_episodes]) == pytest.approx(np.array([[expected]]))


# Intervals


def test_goals_of_different_difficulty_do_not_widen_the_interval():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(8, 6))
    bootstrap = Bootstrap(8, 6)
    alike, apart = (bootstrap.mean(noise + k * np.arange(8)[:, None]) for k in (0, 100))
    assert apart.high - apart.low == pytest.approx(alike.high - alike.low)


@settings(max_examples=15)
@given(st.integers(0, 2**20), st.floats(0.1, 50), st.floats(-50, 50))
def test_intervals_hold_their_value_and_follow_the_unit(seed, scale, offset):
    scores = np.random.default_rng(seed).exponential(size=(4, 3))
    bootstrap = Bootstrap(4, 3, n_resamples=200)
    for statistic in (bootstrap.mean, bootstrap.iqm):
        one, other = statistic(scores), statistic(scale * scores + offset)
        assert one.low <= one.value <= one.high
        assert other.low == pytest.approx(scale * one.low + offset, abs=1e-6)
        assert other.high == pytest.approx(scale * one.high + offset, abs=1e-6)


def test_many_studies_at_once_equal_one_at_a_time():
    _, arms = studies("rare large losses", 3, 4, loss=0.0, seed=8, n_studies=5)
    bootstrap = Bootstrap(3, 4, n_resamples=300)
    for scores, (low, high) in zip(arms, bootstrap.bounds(arms), strict=True):
        one = bootstrap.mean(scores)
        assert (one.low, one.high) == pytest.approx((low, high), rel=1e-12)


def test_one_seed_has_no_interval_and_no_variance_has_a_point():
    alone = Bootstrap(3, 1).mean(np.array([[1.0], [2.0], [3.0]]))
    assert alone == Estimate(2.0, None, None)
    assert alone.is_open
    assert Bootstrap(2, 3).mean(np.full((2, 3), 4.0)) == Estimate(4.0, 4.0, 4.0)


def test_an_interval_that_corrects_for_many_comparisons_is_wider():
    scores = np.random.default_rng(0).normal(size=(4, 4))
    usual, strict = (Bootstrap(4, 4).mean(scores, n) for n in (1, 50))
    assert strict.low < usual.low
    assert usual.high < strict.high


def test_intervals_are_written_without_a_negative_zero():
    assert Estimate(-0.001, -0.004, 0.123).text("+") == "+0.00 [+0.00, +0.12]"
    assert Estimate(1.0, None, None).text() == "1.00"


# Verdicts


JUDGED = [
    (0.1, 0.9, 0.5, "better"),
    (0.0, 0.9, 0.5, "safe"),
    (-0.4, -0.1, 0.5, "safe"),  # a loss that is shown, and shown not to matter
    (-0.5, 0.3, 0.5, "inconclusive"),
    (-0.9, -0.5, 0.5, "inconclusive"),
    (-0.9, -0.6, 0.5, "worse"),
    (0.0, 0.0, 0.0, "inconclusive"),  # full history earns nothing: nothing is safe
    (-0.2, -0.1, 0.0, "worse"),
    (0.1, 0.2, 0.0, "better"),
    (0.0, 0.0, 0.5, "safe"),  # no variance
    (None, None, 0.5, "inconclusive"),  # one seed
]


@pytest.mark.parametrize(("low", "high", "margin", "expected"), JUDGED)
def test_the_verdict_of_an_interval(low, high, margin, expected):
    assert verdict(Estimate(0.0, low, high), margin) == expected


NOISES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "rare large losses": lambda rng, shape: 1 - rng.exponential(size=shape),
    "rare large gains": lambda rng, shape: rng.exponential(size=shape) - 1,
    "one noisy goal": lambda rng, shape: (
        rng.normal(size=shape) * np.where(np.arange(shape[1]) == 0, 1.0, 0.1)[None, :, None]
    ),
}


def studies(noise, n_goals, n_seeds, loss, seed, n_studies=N_STUDIES, spread=2.0):
    """Paired scores of full history and of an arm that truly loses `loss`, study by study.

    Goals differ in difficulty, and what the runs of a pair have in common is half of the noise.
    """
    rng = np.random.default_rng(seed)
    shape = (n_studies, n_goals, n_seeds)
    full = 12 + np.linspace(-4, 4, n_goals)[:, None] + spread * rng.normal(size=shape)
    return full, full - loss + spread * NOISES[noise](rng, shape)


def verdicts(full, arms, margin_share=0.05):
    """Verdicts of many studies at once; `bounds` is what `Bootstrap.mean` calls for each."""
    differences, margins = arms - full, margin_share * full.mean(axis=(1, 2))
    ends = Bootstrap(*full.shape[1:], n_resamples=1000).bounds(differences)
    estimates = zip(differences.mean(axis=(1, 2)), *ends.T, strict=True)
    return [verdict(Estimate(*e), margin) for e, margin in zip(estimates, margins, strict=True)]


def share(said, *names):
    return np.mean([name in names for name in said])


SIZES = [(8, 2), (8, 4), (8, 16), (3, 12)]


@pytest.mark.parametrize(("noise", "size"), list(itertools.product(NOISES, SIZES)))
def test_safe_is_said_of_an_inferior_arm_in_at_most_5_percent(noise, size):
    said = verdicts(*studies(noise, *size, loss=0.05 * 12, seed=1))
    assert share(said, "safe", "better") <= 0.05


@pytest.mark.parametrize("size", SIZES)
def test_better_and_worse_are_seldom_said_where_they_are_not_true(size):
    for loss, seed, untrue in ((0.0, 3, "better"), (0.05 * 12, 4, "worse")):
        said = verdicts(*studies("normal", *size, loss=loss, seed=seed))
        assert share(said, untrue) <= 0.05


def test_with_enough_runs_the_truth_is_said():
    size = {"n_goals": 8, "n_seeds": 16, "seed": 5, "n_studies": 200, "spread": 1.0}
    for loss, true in ((0.0, ("safe", "better")), (1.5, ("worse",)), (-1.5, ("better",))):
        assert share(verdicts(*studies("normal", loss=loss, **size)), *true) > 0.95


def test_few_noisy_runs_are_inconclusive():
    said = verdicts(*studies("normal", 4, 2, loss=0.3, seed=6, n_studies=200, spread=4.0))
    assert share(said, "inconclusive") > 0.8


def test_intervals_hold_the_truth_as_often_as_they_say():
    for size in ((8, 4), (2, 3)):
        _, arms = studies("normal", *size, loss=0.0, seed=7)
        low, high = Bootstrap(*size, n_resamples=1000).bounds(arms).T
        assert 0.93 <= np.mean((low <= 12) & (high >= 12)) < 1


def test_the_studies_catch_a_verdict_without_an_interval():
    full, arms = studies("normal", 8, 4, loss=0.05 * 12, seed=1)
    assert (arms.mean(axis=(1, 2)) > 0.95 * full.mean(axis=(1, 2))).mean() > 0.3


def test_the_studies_catch_a_bootstrap_that_is_too_narrow(monkeypatch):
    one_noisy_goal = studies("one noisy goal", 8, 2, loss=0.05 * 12, seed=1)
    monkeypatch.setattr(intervals, "student_quantile", lambda p, freedom: 1.96)
    monkeypatch.setattr(intervals.math, "sqrt", lambda _: 1.0)
    assert share(verdicts(*one_noisy_goal), "safe", "better") > 0.05
