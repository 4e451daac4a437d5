"""The metrics against a slow plain twin, hand-worked rows and the uniform closed forms."""

import math

import numpy as np
import pytest
import torch
from attention_rows import decision, measured, random_rows, uniform
from hypothesis import given
from hypothesis import strategies as st
from plain_model import four_metrics

from historylens.common.processes import ALONE, Group
from historylens.history import History
from historylens.metrics import (
    DESCRIPTIONS,
    NAMES,
    SUMMARY_METRICS,
    Metrics,
    measure,
    measure_one,
    uniform_received,
)


def named(values):
    """`(M,)` by name."""
    return dict(zip(NAMES, values.tolist(), strict=True))


def plain_metrics(row, last_episode_start, rewarded):
    """Every metric of one row, written as sums over positions."""
    row = [float(x) for x in row]
    n = len(row) - 1
    p = row[:n]
    total = sum(p)
    width = max(1, n // 4)
    shares = [x / total for x in p]
    entropy = -sum(q * math.log(q) for q in shares if q > 0)
    count, held = 0, 0.0
    for q in sorted(shares, reverse=True):
        if held >= 0.9 - 1e-6:
            break
        count, held = count + 1, held + q
    strong = [x for x in p if x > 0.1 + 1e-6]
    return four_metrics(row) | {
        "normalised_entropy": entropy / math.log(n) if n > 1 else 1.0,
        "effective_tokens": math.exp(entropy),
        "tokens_for_90_percent": count,
        "mean_distance": sum(q * (n - j) for j, q in enumerate(shares)),
        "mass_self": row[n],
        "mass_first_token": p[0],
        "mass_first_quarter": sum(p[:width]),
        "mass_last_quarter": sum(p[-width:]),
        "mass_last_episode": sum(p[last_episode_start:]),
        "mass_rewarded": sum(x for x, r in zip(p, rewarded, strict=True) if r),
        "strong_positions": len(strong),
        "strong_share": sum(strong) / total,
    }


# One row


@given(
    n=st.integers(1, 40),
    n_heads=st.integers(1, 4),
    n_samples=st.integers(1, 3),
    sharpness=st.sampled_from([0.0, 1.0, 4.0]),
    seed=st.integers(0, 1000),
)
def test_metrics_of_heads_and_of_their_average_equal_the_plain_twin(
    n, n_heads, n_samples, sharpness, seed
):
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, n_samples, n_heads, n + 1, sharpness=sharpness)
    episodes = np.sort(rng.integers(3, size=(n_samples, n)))
    decisions = [decision(n, e, np.flatnonzero(rng.random(n) < 0.4)) for e in episodes]
    values = measured(rows, decisions=decisions).values[:, 0]  # (S, H + 1, M)
    for s, one in enumerate(decisions):
        for h, row in enumerate([*rows[s], rows[s].mean(0)]):
            expected = plain_metrics(row, one.episode_starts[-1], one.rewarded)
            assert named(values[s, h]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_four_come_first_and_all_are_described():
    assert SUMMARY_METRICS == NAMES[:4] == (
        "mean_context_attention", "concentration", "entropy", "recent_distant_ratio",
    )  # fmt: skip
    assert list(DESCRIPTIONS) == list(NAMES) == list(plain_metrics([0.5, 0.5], 0, [False]))


def test_a_row_worked_by_hand():
    values = measure_one([0.1, 0.0, 0.1, 0.0, 0.1, 0.0, 0.2, 0.2, 0.3])  # n = 8, quarters of 2
    assert values["mean_context_attention"] == pytest.approx(0.0875)
    assert values["concentration"] == pytest.approx(math.sqrt(0.11 / 8 - 0.0875**2))
    assert values["entropy"] == pytest.approx(-(0.3 * math.log(0.1) + 0.4 * math.log(0.2)))
    assert values["recent_distant_ratio"] == pytest.approx(4.0)
    row = [0.4, 0.0, 0.0, 0.4, 0.2]
    values = measure(row, [False, False, True, True], [True, False, False, False])
    expected = [0.5, 2.0, 2.0, (4 + 1) / 2, 0.2, 0.4, 0.4, 0.4, 0.4, 0.4, 2.0, 1.0]
    assert values[4:] == pytest.approx(expected)
    assert measure_one(row) == named(measure(row, np.ones(4, bool), np.zeros(4, bool)))


def test_entropy_is_not_renormalised_but_normalised_entropy_is():
    values = measure_one([0.01] * 10 + [0.9])
    assert values["entropy"] == pytest.approx(-0.1 * math.log(0.01), rel=1e-6)
    assert values["normalised_entropy"] == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_tenth_counts_as_a_tenth_whatever_the_type(dtype):
    assert measure_one(np.array([0.1] * 10 + [0.0], dtype))["tokens_for_90_percent"] == 9
    assert measure_one(np.array([0.1] * 5 + [0.5], dtype))["strong_positions"] == 0


def test_torch_rows_of_any_shape_are_measured_in_float64():
    values = measure(torch.full((2, 3, 9), 1 / 9), True, False)
    assert values.shape == (2, 3, 16)
    assert values.dtype == np.float64


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9, 100])
def test_uniform_attention_has_the_closed_forms(n):
    values = measure_one(uniform(n))
    assert values["concentration"] == 0.0  # exactly
    assert values["entropy"] == pytest.approx(n / (n + 1) * math.log(n + 1))
    assert values["recent_distant_ratio"] == pytest.approx(1.0, rel=1e-6)
    assert values["normalised_entropy"] == pytest.approx(1.0)
    assert values["effective_tokens"] == pytest.approx(n)
    assert values["tokens_for_90_percent"] == math.ceil(0.9 * n - 1e-9)
    assert values["mean_distance"] == pytest.approx((n + 1) / 2)
    assert values["mass_last_quarter"] == pytest.approx(max(1, n // 4) / (n + 1))
    assert (values["strong_positions"], values["strong_share"]) == ((n, 1) if n < 9 else (0, 0))


@pytest.mark.parametrize("n", [1, 3])
def test_a_context_without_mass_reads_nothing(n):
    values = measure_one(np.append(np.zeros(n), 1.0))
    assert values == {name: float(name == "mass_self") for name in NAMES}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_short_contexts_have_quarters_of_one_token(n):
    row = np.zeros(n + 1)
    row[n - 1] += 0.6
    row[0] += 0.3
    assert measure_one(row)["recent_distant_ratio"] == pytest.approx(1.0 if n == 1 else 2.0)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 50])
def test_every_metric_is_finite_on_one_hot_rows(n):
    assert np.isfinite(measure(np.eye(n + 1), np.arange(n) == 0, False)).all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1.0], "T >= 2"),
        ([0.5, np.nan], "softmax"),
        ([0.5, np.inf], "softmax"),
        ([-0.5, 0.5], "softmax"),
        ([3.0, 1.0], "softmax"),
    ],
)
def test_rows_that_are_no_attention_weights_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        measure_one(row)


@pytest.mark.parametrize("n_tokens", [1, 2, 7])
def test_uniform_received_is_the_column_mean_over_tokens_that_may_look(n_tokens):
    weights = np.tri(n_tokens) / np.arange(1, n_tokens + 1)[:, None]  # row: who looks
    expected = [weights[j:, j].mean() for j in range(n_tokens)]
    assert uniform_received(n_tokens) == pytest.approx(expected)


# Many samples


def some(n_samples=4, n_layers=2, n_heads=3, n=8, seed=0):
    rng = np.random.default_rng(seed)
    return [random_rows(rng, n_samples, n_heads, n + 1) for _ in range(n_layers)]


def put(metrics, indices, rows):
    """Put the parts of rows of all samples that belong to some of them."""
    indices, n_tokens = list(indices), rows[0].shape[-1]
    even = np.full((len(indices), n_tokens), 1 / n_tokens)
    history = History.of([decision(n_tokens - 1)] * len(indices))
    metrics.put(indices, [layer[indices] for layer in rows], even, history)


def assert_same(found, expected):
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.uniform, expected.uniform)
    np.testing.assert_array_equal(found.n_context, expected.n_context)


def test_aggregates_are_population_statistics_of_head_averaged_rows():
    rows = some()
    metrics = measured(*rows)
    entropies = np.array([[measure_one(row)["entropy"] for row in r.mean(1)] for r in rows])
    np.testing.assert_array_equal(metrics.of("entropy"), entropies)  # (L, S)
    for values, place in ((entropies, None), (entropies[1], 1)):
        found = metrics.summaries(place)["entropy"]
        expected = values.mean(), values.std(ddof=0), np.median(values)
        assert (found.mean, found.std, found.median) == expected
    heads = [[measure_one(row)["entropy"] for row in sample] for sample in rows[1]]
    np.testing.assert_array_equal(metrics.of_heads("entropy", 1), heads)  # (S, H)


def test_uniform_values_of_a_sample_follow_its_own_episodes_and_rewards():
    decisions = [decision(6, [0, 0, 0, 0, 1, 1], [0, 1, 2]), decision(6, [0] * 6)]
    metrics = measured(uniform(6), n_samples=2, decisions=decisions)
    assert metrics.of_uniform("mass_last_episode") == pytest.approx([2 / 7, 6 / 7])
    assert metrics.of_uniform("mass_rewarded") == pytest.approx([3 / 7, 0])
    assert metrics.uniform_mean()["mass_rewarded"] == pytest.approx(1.5 / 7)
    np.testing.assert_allclose(metrics.values[:, 0, -1], metrics.uniform, atol=1e-9)


def test_a_history_without_episodes_is_one_episode():
    metrics = measured(uniform(4), decisions=[decision(4, None)] * 3)
    assert metrics.of("mass_last_episode") == pytest.approx(np.full((1, 3), 0.8))


def test_batches_in_any_order_equal_one_large_batch():
    rows = some(n_samples=5)
    metrics = Metrics(5, range(2), [range(3)] * 2)
    for indices in ([3, 4], [1], [0, 2]):
        put(metrics, indices, rows)
    assert_same(metrics.gather(ALONE), measured(*rows))


def test_batches_may_differ_in_context_length():
    metrics = Metrics(4, [0], [range(3)])
    put(metrics, [0, 2], some(n_layers=1, n=4))
    put(metrics, [1, 3], some(n_layers=1, n=9))
    assert metrics.gather(ALONE).n_context.tolist() == [4, 9, 4, 9]
    assert metrics.uniform_mean()["effective_tokens"] == pytest.approx(6.5)


def test_layers_may_differ_in_their_number_of_heads():
    rng = np.random.default_rng(0)
    metrics = measured(random_rows(rng, 1, 2, 5), random_rows(rng, 1, 7, 5), numbers=[1, 3])
    assert [metrics.of_heads("entropy", place).shape for place in (0, 1)] == [(1, 2), (1, 7)]
    assert (metrics.layers, metrics.heads) == ((1, 3), (tuple(range(2)), tuple(range(7))))
    assert np.isnan(metrics.values[:, 0, 2:-1]).all()
    assert np.isfinite(metrics.of("entropy")).all()


class OneOfTwo(Group):
    """A process of two; what the other sends goes through a shared list."""

    sent: list = []  # noqa: RUF012

    def gather(self, value):
        if self.is_main:
            return [value, *self.sent]
        self.sent.append(value)
        return None


def test_processes_together_have_what_one_has_to_the_bit():
    rows = some(n_samples=5)
    main, other = (Metrics(5, range(2), [range(3)] * 2) for _ in range(2))
    put(main, [0, 2, 3], rows)
    put(other, [1, 4], rows)
    assert other.gather(OneOfTwo(rank=1, size=2)) is None
    assert_same(main.gather(OneOfTwo(rank=0, size=2)), measured(*rows))


def test_a_sample_that_was_never_measured_is_missed():
    metrics = Metrics(5, range(2), [range(3)] * 2)
    put(metrics, [0, 1, 3], some(n_samples=5))
    with pytest.raises(ValueError, match="2 is missing"):
        metrics.gather(ALONE)
