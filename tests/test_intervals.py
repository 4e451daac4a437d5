"""Intervals and verdicts: against plain twins, and over thousands of studies with known truth."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_study import result

from historylens.comparison import intervals
from historylens.comparison.intervals import Collapses, Estimate, largest_rate, mean, verdict
from historylens.comparison.study import judge

pytestmark = pytest.mark.usefixtures("few_resamples")


def plain_iqm(values):
    """Mean of the middle half, as rliable takes it: a quarter cut off at either end."""
    n_cut = int(0.25 * len(values))
    return float(np.mean(sorted(values)[n_cut : len(values) - n_cut]))


@settings(max_examples=15)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**20))
def test_statistics_equal_a_loop_over_the_drawn_runs(n_goals, n_seeds, seed):
    scores = np.random.default_rng(seed).integers(0, 5, size=(n_goals, n_seeds)).astype(float)
    even = np.full(n_seeds, 1 / n_seeds)
    counts = np.random.default_rng(5).multinomial(n_seeds, even, size=(1000, n_goals))  # in strata
    drawn = [np.repeat(scores.ravel(), count.ravel()) for count in counts]
    for estimate, plain in ((mean(scores, 5), np.mean), (intervals.iqm(scores, 5), plain_iqm)):
        assert estimate.value == pytest.approx(plain(scores.ravel()))
        if n_seeds == 1:
            assert (estimate.low, estimate.high) == (None, None)
            continue
        freedom = int(intervals.degrees_of_freedom(scores[None])[0] + 1e-9)
        scale = intervals.student_quantile(0.975, freedom) / 1.959964
        scale *= np.sqrt(n_seeds / (n_seeds - 1))
        shift = float(intervals.skew_shift(scores[None], 1.959964)[0]) if plain is np.mean else 0.0
        deviations = np.array([plain(runs) for runs in drawn]) - estimate.value
        low, high = np.quantile(deviations, [0.025, 0.975])
        expected = estimate.value + scale * np.array([min(low, 0), max(high, 0)]) + shift
        assert (estimate.low, estimate.high) == pytest.approx(tuple(expected), abs=1e-6)


def test_student_quantiles_are_those_of_the_tables_and_freedom_that_of_the_goals_that_vary():
    for freedom, expected in {1: 12.7062, 2: 4.3027, 3: 3.1824, 24: 2.0639, 10**6: 1.95996}.items():
        assert intervals.student_quantile(0.975, freedom) == pytest.approx(expected, abs=1e-4)
    even = np.tile(np.arange(4.0), (8, 1))
    one = even * (np.arange(8) == 0)[:, None]
    freedom = intervals.degrees_of_freedom(np.stack([even, one, 0 * even]))
    assert freedom == pytest.approx([24, 3, 24])


def test_skewness_moves_the_interval_towards_the_long_tail():
    long_above = np.array([[[0.0] * 7 + [9.0]]])
    above, below = (intervals.skew_shift(x, 1.96)[0] for x in (long_above, -long_above))
    assert above == -below > 0
    for without in (long_above[..., 6:], np.ones((1, 2, 5))):
        assert intervals.skew_shift(without, 1.96) == 0


def test_late_scores_are_the_second_half_and_without_variance_have_a_point_never_negative_zero():
    for n_episodes, expected in ((5, 11.0), (4, 6.5), (1, 1.0)):  # the middle one included
        returns = np.array([[[1.0, 2.0, 3.0, 10.0, 20.0][:n_episodes]]])
        assert intervals.late_scores(returns).tolist() == [[expected]]
    assert mean(np.full((2, 3), 4.0)) == Estimate(4.0, 4.0, 4.0)
    assert Estimate(-0.001, -0.004, 0.123).text("+") == "+0.00 [+0.00, +0.12]"
    assert Estimate(1.0, None, None).text() == "1.00"


@pytest.mark.parametrize(("low", "high", "margin", "risk", "expected"), [
    (0.1, 0.9, 0.5, 0.5, "better"),
    (0.1, 0.9, 0.5, 0.6, "safe so far"),
    (0.6, 0.9, 0.5, 0.6, "better"),  # more is gained than collapses may cost
    (0.0, 0.9, 0.5, 0.5, "safe"),
    (-0.4, -0.1, 0.5, 0.1, "safe"),  # a loss that is shown, and shown not to matter
    (-0.5, 0.3, 0.5, 0.1, "inconclusive"),
    (-0.9, -0.5, 0.5, 0.9, "inconclusive"),
    (-0.9, -0.6, 0.5, 0.9, "worse"),
    (0.0, 0.0, 0.0, 0.0, "inconclusive"),  # full history earns nothing: nothing is safe
    (None, None, 0.5, 0.1, "inconclusive"),  # one seed
    (math.nan, math.nan, 0.5, 0.1, "inconclusive"),
])  # fmt: skip
def test_the_verdict_of_an_interval_and_of_the_cost_of_collapses(low, high, margin, risk, expected):
    assert verdict(*[Estimate(0.0, low, high)] * 2, margin, risk) == expected


@given(st.integers(1, 300), st.data())
def test_at_the_largest_rate_so_few_collapses_are_as_rare_as_the_tail(n_runs, data):
    n = data.draw(st.integers(0, n_runs - 1))
    rate = largest_rate(n, n_runs, 0.05)
    seen = [math.comb(n_runs, k) * rate**k * (1 - rate) ** (n_runs - k) for k in range(n + 1)]
    assert math.fsum(seen) == pytest.approx(0.05)
    assert largest_rate(0, n_runs, 0.05) == pytest.approx(1 - 0.05 ** (1 / n_runs))
    assert largest_rate(n_runs, n_runs, 0.05) == 1
    assert largest_rate(n, n_runs, 0.05 / 9) > rate


def test_collapses_are_below_half_of_a_goals_return_in_one_of_a_pair():
    full = np.array([[10, 10, 4, 16], [2, 2, 2, 2.0]])  # half: 5 and 1
    arm = np.array([[5, 4.9, 0, 99], [0, 1, 0.9, 2]])
    assert Collapses.of(arm, full) == Collapses(arm=3, full=0, n_runs=8)
    assert Collapses.of(full, full) == Collapses(0, 0, 8)
    full[0, 0] = 1  # half: 3.875
    assert Collapses.of(arm, full) == Collapses(arm=3, full=1, n_runs=8)
    assert Collapses.of(np.array([[-14, -16, -99.0]]), np.full((1, 3), -10.0)).arm == 2


@pytest.mark.parametrize(("collapses", "text", "said"), [
    ((0, 0, 256), "0, < 1.2%", "no collapse in 256 runs: more than 1.2 % is ruled out (95 %)"),
    ((0, 9, 32), "0-9, < 9%", "no collapse in 32 runs: more than 9 % is ruled out (95 %)"),
    ((2, 0, 2), "2, < 100%", "2 of 2 runs collapsed: more than 100 % is ruled out (95 %)"),
    ((10, 10, 256), "10-10, < 3.2%", "10 of 256 runs collapsed, and 10 others of full history: "
     "net more than 3.2 % is ruled out (95 %)"),
])  # fmt: skip
def test_the_bound_in_words(collapses, text, said):
    assert (Collapses(*collapses).text(), Collapses(*collapses).sentence()) == (text, said)


def test_the_bound_is_net_of_what_full_history_does_and_of_both_errors():
    above = largest_rate(10, 256, 0.05) - 10 / 256
    below = 8 / 256 - (1 - largest_rate(248, 256, 0.05))
    assert Collapses(10, 8, 256).bound() == pytest.approx(2 / 256 + math.hypot(above, below))
    assert Collapses(3, 0, 64).bound(7) == pytest.approx(largest_rate(3, 64, 0.05 / 7))
    assert Collapses(3, 40, 64).bound() == pytest.approx(largest_rate(0, 64, 0.05))


@pytest.mark.parametrize(("n_compared", "least"), [(1, 72), (25, 135)])
def test_without_a_collapse_so_many_runs_are_needed_to_be_safe(n_compared, least):
    """The level of both, the interval and the bound on collapses, is 2.5 % for all arms."""
    for n_runs, expected in ((least, "safe"), (least - 1, "safe so far")):
        full = 10 + 0.01 * np.random.default_rng(0).normal(size=(1, n_runs))
        told = intervals.judged(np.stack([full - 0.01, full - 0.02]), full, 0.05, n_compared)
        assert [verdict for _, _, verdict in told] == [expected] * 2
    assert intervals.judged(np.empty((0, *full.shape)), full, 0.05, n_compared) == []


def test_intervals_of_returns_end_where_no_return_can_be():
    few = {"shape": (2, 2, 4), "noise": 0.0}

    def made(key, *runs):
        arm = result(key, 0.0, **few)
        return replace(arm, returns=arm.returns + np.array(runs, dtype=float).reshape(2, 2, 1))

    arms = [made("full", 0, 3, 4, 4), made("empty", 0, 1, 0, 0), made("recent@3", 4, 3, 0, 1)]
    study, unknown = judge(arms, 0.05, best=[4.0, 4.0]), judge(arms, 0.05)
    estimates = [one for row in study.rows for one in (row.mean, row.iqm)]
    for one in (*estimates, *study.full_by_episode):
        assert 0 <= one.low <= one.value <= one.high <= 4
    for row in study.rows:
        assert 0 <= row.part_of_best.low <= row.part_of_best.high <= 1
    assert (study.full.mean.high, study.empty.mean.low) == (4, 0)
    assert unknown.full.mean.high > 4
    assert unknown.empty.mean.low == 0  # nothing below was ever earned
    costs = [replace(arm, returns=-arm.returns) for arm in arms]
    assert judge(costs, 0.05).empty.mean.high == 0
    below = [replace(arm, returns=arm.returns - 1) for arm in arms]
    assert judge(below, 0.05).empty.mean.low < -1


ONE_OF_EIGHT = np.array([[1.0], *[[0.1]] * 7])
NOISES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "rare large losses": lambda rng, shape: 1 - rng.exponential(size=shape),
    "rare large gains": lambda rng, shape: rng.exponential(size=shape) - 1,
    "one noisy goal": lambda rng, shape: rng.normal(size=shape) * ONE_OF_EIGHT[: shape[1]],
}
MARGIN = 0.05 * 12  # of full history's mean return


def of_full(n_goals, n_seeds, seed, n_studies, spread):
    """Scores of full history, study by study; goals differ in difficulty."""
    rng, shape = np.random.default_rng(seed), (n_studies, n_goals, n_seeds)
    levels = 12 + np.linspace(-4, 4, n_goals)[:, None]
    return rng, shape, levels + spread * rng.normal(size=shape)


def studies(noise, n_goals, n_seeds, loss, seed, n_studies=1000, spread=2.0):
    """Such scores, and those of an arm that truly loses `loss`; half of the noise is common."""
    rng, shape, full = of_full(n_goals, n_seeds, seed, n_studies, spread)
    return full, full - loss + spread * NOISES[noise](rng, shape)


def collapsing(rate, n_goals, n_seeds, noise, seed, n_studies=1000):
    """Such scores, and those of an arm alike but for `noise` and for runs that earn 0."""
    rng, shape, full = of_full(n_goals, n_seeds, seed, n_studies, 1.0)
    return full, np.where(rng.random(shape) < rate, 0.0, full + noise * rng.normal(size=shape))


def share(names, full, arms, may_collapse=False):
    """How often one of the verdicts is said; of many at once."""
    differences, levels = arms - full, full.mean(axis=(1, 2))
    estimates = intervals.means(differences)
    rates = map(Collapses.bound, map(Collapses.of, arms, full))
    at_risk = levels * (list(rates) if may_collapse else 0)
    judged = zip(estimates, 0.05 * levels, at_risk, strict=True)
    return np.mean([verdict(each[0], *each) in names for each in judged])


GOOD = ("safe", "better")


@pytest.mark.parametrize("size", [(8, 2), (8, 4), (8, 16), (3, 12)])
def test_what_is_not_true_is_said_in_at_most_5_percent_by_the_interval_alone(size):
    for noise in NOISES:
        assert share(GOOD, *studies(noise, *size, loss=MARGIN, seed=1)) <= 0.05, noise
    assert share(("better",), *studies("normal", *size, loss=0.0, seed=3)) <= 0.05
    assert share(("worse",), *studies("normal", *size, loss=MARGIN, seed=4)) <= 0.05


@pytest.mark.parametrize("n_seeds", [2, 8, 32])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2])
def test_an_arm_that_collapses_so_often_is_safe_in_at_most_5_percent(n_seeds, rate):
    """All below 5 % as counted; the standard error of 5 % of 1,000 studies is 0.7 %."""
    for noise in (0.0, 2.0):
        arms = collapsing(rate, 8, n_seeds, noise, seed=9)
        assert share(GOOD, *arms, may_collapse=True) <= 0.05, noise


@pytest.mark.parametrize("size", [(8, 4), (2, 3)])
def test_intervals_hold_the_truth_as_often_as_they_say_many_at_once_as_one_at_a_time(size):
    _, arms = studies("normal", *size, loss=0.0, seed=7)
    low, high = np.array([(each.low, each.high) for each in intervals.means(arms)]).T
    assert 0.93 <= np.mean((low <= 12) & (high >= 12)) < 1
    one = mean(arms[3])
    assert (one.low, one.high) == pytest.approx((low[3], high[3]), rel=1e-12)
