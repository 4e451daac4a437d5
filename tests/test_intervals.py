"""Intervals and verdicts: against plain twins, and over thousands of studies with known truth."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comparison import intervals
from comparison.intervals import (
    Bootstrap,
    Estimate,
    degrees_of_freedom,
    late_scores,
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


def test_the_iqm_ignores_one_run_that_exploded():
    scores = np.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1e6]])
    assert Bootstrap(2, 4).iqm(scores).value == 1.0


def test_resampled_statistics_equal_a_loop_over_the_drawn_runs():
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(3, 4))
    bootstrap = Bootstrap(3, 4, n_resamples=40)
    means, iqms = [], []
    for counts in bootstrap._counts:
        drawn = np.repeat(scores.ravel(), counts.astype(int))
        assert (counts.reshape(3, 4).sum(axis=1) == 4).all()  # a stratum stays a stratum
        means.append(drawn.mean())
        iqms.append(plain_iqm(drawn))
    freedom = float(degrees_of_freedom(scores[None])[0])
    scale = np.sqrt(4 / 3) * student_quantile(0.975, freedom) / 1.959964
    shift = float(intervals.skew_shift(scores[None], 1.959964)[0])
    for found, resampled, moved in (
        (bootstrap.mean(scores), means, shift),
        (bootstrap.iqm(scores), iqms, 0.0),
    ):
        low, high = np.quantile(np.array(resampled) - found.value, [0.025, 0.975])
        assert found.low == pytest.approx(found.value + scale * low + moved)
        assert found.high == pytest.approx(found.value + scale * high + moved)


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [
        (1, 12.7062),
        (2, 4.3027),
        (3, 3.1824),
        (4, 2.7764),
        (10, 2.2281),
        (24, 2.0639),
        (120, 1.9799),
    ],
)
def test_student_quantiles_are_those_of_the_tables(freedom, expected):
    assert student_quantile(0.975, freedom) == pytest.approx(expected, abs=1e-4)
    assert student_quantile(0.975, 10**6) == pytest.approx(1.95996, abs=1e-4)


def test_freedom_is_that_of_the_goals_that_vary():
    even = np.tile([[0.0, 1.0, 2.0, 3.0]], (8, 1))
    one = even * (np.arange(8) == 0)[:, None]
    found = degrees_of_freedom(np.stack([even, one, np.zeros((8, 4))]))
    assert found == pytest.approx([8 * 3, 3, 8 * 3])


def test_skewness_moves_the_interval_towards_the_long_tail():
    long_above = np.array([[[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0]]])
    above, below = (intervals.skew_shift(x, 1.96)[0] for x in (long_above, -long_above))
    assert above > 0
    assert below == -above
    assert intervals.skew_shift(long_above[..., 6:], 1.96) == 0
    assert intervals.skew_shift(np.ones((1, 2, 5)), 1.96) == 0


def test_late_scores_are_the_second_half_the_middle_one_included():
    returns = np.array([[[1.0, 2.0, 3.0, 10.0, 20.0]]])
    assert late_scores(returns) == pytest.approx(np.array([[11.0]]))
    assert late_scores(returns[..., :4]) == pytest.approx(np.array([[6.5]]))
    assert late_scores(returns[..., :1]) == pytest.approx(np.array([[1.0]]))


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


def test_the_same_seed_draws_the_same():
    scores = np.random.default_rng(0).normal(size=(3, 3))
    one, same, other = (Bootstrap(3, 3, seed=s, n_resamples=100).mean(scores) for s in (0, 0, 1))
    assert one == same != other


def test_one_seed_has_no_interval_and_no_variance_has_a_point():
    alone = Bootstrap(3, 1).mean(np.array([[1.0], [2.0], [3.0]]))
    assert alone == Estimate(2.0, None, None)
    assert alone.is_open
    assert Bootstrap(2, 3).mean(np.full((2, 3), 4.0)) == Estimate(4.0, 4.0, 4.0)


def test_a_stricter_level_is_wider():
    scores = np.random.default_rng(0).normal(size=(4, 4))
    bootstrap = Bootstrap(4, 4)
    usual, strict = bootstrap.mean(scores), bootstrap.mean(scores, level=0.999)
    assert strict.low < usual.low
    assert usual.high < strict.high


@pytest.mark.parametrize("scores", [np.zeros((2, 2)), np.full((3, 2), np.nan), np.zeros(6)])
def test_scores_of_another_shape_or_not_finite_are_refused(scores):
    with pytest.raises(ValueError, match=r"expected finite scores of shape \(3, 2\)"):
        Bootstrap(3, 2).mean(scores)


# Verdicts


@pytest.mark.parametrize(
    ("low", "high", "margin", "expected"),
    [
        (0.1, 0.9, 0.5, "better"),
        (0.0, 0.9, 0.5, "safe"),
        (-0.4, 0.3, 0.5, "safe"),
        (-0.4, -0.1, 0.5, "safe"),  # a loss that is shown, and shown not to matter
        (-0.5, 0.3, 0.5, "inconclusive"),
        (-0.9, 0.3, 0.5, "inconclusive"),
        (-0.9, -0.5, 0.5, "inconclusive"),
        (-0.9, -0.6, 0.5, "worse"),
        (0.0, 0.0, 0.0, "inconclusive"),  # full history earns nothing: nothing is safe
        (-0.2, -0.1, 0.0, "worse"),
        (0.1, 0.2, 0.0, "better"),
        (0.0, 0.0, 0.5, "safe"),  # no variance
        (None, None, 0.5, "inconclusive"),  # one seed
    ],
)
def test_the_verdict_of_an_interval(low, high, margin, expected):
    assert verdict(Estimate(0.0, low, high), margin) == expected


def test_a_negative_margin_is_refused():
    with pytest.raises(ValueError, match="margin of 0 or more"):
        verdict(Estimate(0.0, 0.0, 0.0), -0.1)


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


def verdicts(full, arms, margin_share=0.05, judge=verdict):
    """Verdicts of many studies at once; `bounds` is what `Bootstrap.mean` calls for each."""
    differences, margins = arms - full, margin_share * full.mean(axis=(1, 2))
    ends = Bootstrap(*full.shape[1:], n_resamples=1000).bounds(differences)
    estimates = zip(differences.mean(axis=(1, 2)), *ends.T, strict=True)
    return [judge(Estimate(*e), margin) for e, margin in zip(estimates, margins, strict=True)]


def share(found, *names):
    return np.mean([name in names for name in found])


SIZES = [(8, 2), (8, 4), (8, 16), (3, 12)]


@pytest.mark.parametrize(("noise", "size"), list(itertools.product(NOISES, SIZES)))
def test_safe_is_said_of_an_inferior_arm_in_at_most_5_percent(noise, size):
    found = verdicts(*studies(noise, *size, loss=0.05 * 12, seed=1))
    assert share(found, "safe", "better") <= 0.05


@pytest.mark.parametrize("size", SIZES)
def test_better_and_worse_are_seldom_said_where_they_are_not_true(size):
    equal = verdicts(*studies("normal", *size, loss=0.0, seed=3))
    assert share(equal, "better") <= 0.05
    at_margin = verdicts(*studies("normal", *size, loss=0.05 * 12, seed=4))
    assert share(at_margin, "worse") <= 0.05


def test_with_enough_runs_the_truth_is_found():
    size = {"n_goals": 8, "n_seeds": 16, "seed": 5, "n_studies": 200, "spread": 1.0}
    assert share(verdicts(*studies("normal", loss=0.0, **size)), "safe", "better") > 0.95
    assert share(verdicts(*studies("normal", loss=1.5, **size)), "worse") > 0.95
    assert share(verdicts(*studies("normal", loss=-1.5, **size)), "better") > 0.95


def test_few_noisy_runs_are_inconclusive():
    found = verdicts(*studies("normal", 4, 2, loss=0.3, seed=6, n_studies=200, spread=4.0))
    assert share(found, "inconclusive") > 0.8


def test_intervals_hold_the_truth_as_often_as_they_say():
    for size in ((8, 4), (2, 3)):
        _, arms = studies("normal", *size, loss=0.0, seed=7)
        low, high = Bootstrap(*size, n_resamples=1000).bounds(arms).T
        assert 0.93 <= np.mean((low <= 12) & (high >= 12)) < 1


def test_the_studies_catch_a_verdict_that_is_too_bold():
    full, arms = studies("normal", 8, 4, loss=0.05 * 12, seed=1)

    def without_interval(difference, margin):
        return "safe" if difference.value > -margin else "worse"

    assert share(verdicts(full, arms, judge=without_interval), "safe") > 0.3


def test_the_studies_catch_a_bootstrap_that_is_too_narrow(monkeypatch):
    full, arms = studies("one noisy goal", 8, 2, loss=0.05 * 12, seed=1)
    monkeypatch.setattr(intervals, "student_quantile", lambda p, freedom: 1.96)
    monkeypatch.setattr(intervals.math, "sqrt", lambda _: 1.0)
    assert share(verdicts(full, arms), "safe", "better") > 0.05
