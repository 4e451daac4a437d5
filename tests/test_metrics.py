"""The metrics against a slow plain twin, hand-worked rows and the uniform closed forms."""

import math

import numpy as np
import pytest
import torch
from attention_rows import decision, measured, random_rows, uniform
from hypothesis import given
from hypothesis import strategies as st
from plain_model import four_metrics

from historylens import metrics as module
from historylens.common.processes import ALONE
from historylens.history import History
from historylens.metrics import NAMES, Metrics, measure, measure_one


def named(values):
    return dict(zip(NAMES, values.tolist(), strict=True))


def plain_metrics(row, last_episode_start, rewarded):
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


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.sampled_from([0.0, 1.0, 4.0]))
def test_metrics_of_heads_and_of_their_average_equal_the_plain_twin(n, n_heads, size, sharpness):
    rng = np.random.default_rng(n)
    rows = random_rows(rng, size, n_heads, n + 1, sharpness=sharpness)
    episodes = np.sort(rng.integers(3, size=(size, n)))
    decisions = [decision(n, e, np.flatnonzero(rng.random(n) < 0.4)) for e in episodes]
    values = measured(rows, decisions=decisions).values[:, 0]  # (S, H + 1, M)
    for s, one in enumerate(decisions):
        for h, row in enumerate([*rows[s], rows[s].mean(0)]):
            expected = plain_metrics(row, one.episode_starts[-1], one.rewarded)
            assert named(values[s, h]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_four_come_first_and_all_are_described():
    assert module.SUMMARY_METRICS == NAMES[:4] == tuple(four_metrics([0.5, 0.5]))
    assert list(module.DESCRIPTIONS) == list(NAMES) == list(plain_metrics([0.5, 0.5], 0, [False]))
    row = [0.4, 0.0, 0.0, 0.4, 0.2]
    assert measure_one(row) == named(measure(row, np.ones(4, bool), np.zeros(4, bool)))


def test_measuring_is_in_float64_whatever_the_type_and_what_is_no_attention_is_refused():
    for dtype in (np.float32, np.float64):
        assert measure_one(np.array([0.1] * 10 + [0.0], dtype))["tokens_for_90_percent"] == 9
        assert measure_one(np.array([0.1] * 5 + [0.5], dtype))["strong_positions"] == 0
    values = measure(torch.full((2, 3, 9), 1 / 9), True, False)
    assert (values.shape, values.dtype) == ((2, 3, 16), np.float64)
    for row in ([0.5, np.nan], [0.5, np.inf], [-0.5, 0.5], [3.0, 1.0], [1.5], [-0.1], [np.nan]):
        with pytest.raises(ValueError, match="softmax"):
            measure_one(row)


@pytest.mark.parametrize("n", [0, 1, 3, 9])
def test_uniform_attention_has_no_spread_quarters_are_of_one_and_no_mass_reads_nothing(n):
    assert measure_one(uniform(n))["concentration"] == 0.0  # exactly
    weights = np.tri(n) / np.arange(1, n + 1)[:, None]  # row: who looks
    assert module.uniform_received(n) == pytest.approx([weights[j:, j].mean() for j in range(n)])
    row = np.zeros(n + 1)  # with less than eight tokens
    row[n - 1] += 0.6
    row[0] += 0.3
    ratio = pytest.approx({0: 0.0, 1: 1.0}.get(n, 2.0))
    assert measure_one(row)["recent_distant_ratio"] == ratio
    assert np.isfinite(measure(np.eye(n + 1), np.arange(n) == 0, False)).all()
    alone = {name: float(name == "mass_self") for name in NAMES}
    assert measure_one(np.append(np.zeros(n), 1.0)) == alone
    assert measure_one(np.append(np.zeros(n), 0.25)) == {k: x / 4 for k, x in alone.items()}
    metrics = measured(np.append(np.zeros(n), 1.0))
    assert (metrics.n_context == n).all()
    assert n or metrics.uniform_mean() == alone
    assert all((metrics.of(name) == x).all() for name, x in alone.items())


def some(n_samples=4, n_layers=2, n=8):
    rng = np.random.default_rng(0)
    return [random_rows(rng, n_samples, 3, n + 1) for _ in range(n_layers)]


def put(metrics, indices, rows):
    indices, n_tokens = list(indices), rows[0].shape[-1]
    even = np.full((len(indices), n_tokens), 1 / n_tokens)
    history = History.of([decision(n_tokens - 1)] * len(indices))
    metrics.put(indices, [layer[indices] for layer in rows], even, history)


def test_aggregates_are_of_the_population_of_head_averaged_rows_and_layers_may_differ_in_heads():
    rows = some()
    metrics = measured(*rows)
    entropies = np.array([[measure_one(row)["entropy"] for row in r.mean(1)] for r in rows])
    np.testing.assert_array_equal(metrics.of("entropy"), entropies)  # (L, S)
    for values, place in ((entropies, None), (entropies[1], 1)):
        found = metrics.summaries(place)["entropy"]
        expected = {"mean": values.mean(), "std": values.std(ddof=0), "median": np.median(values)}
        assert found == expected
    heads = [[measure_one(row)["entropy"] for row in sample] for sample in rows[1]]
    np.testing.assert_array_equal(metrics.of_heads("entropy", 1), heads)  # (S, H)
    metrics = measured(rows[0][:, :2], rows[1], numbers=[1, 3])
    assert [metrics.of_heads("entropy", place).shape for place in (0, 1)] == [(4, 2), (4, 3)]
    assert (metrics.layers, metrics.heads) == ((1, 3), (tuple(range(2)), tuple(range(3))))
    assert np.isnan(metrics.values[:, 0, 2:-1]).all()
    assert np.isfinite(metrics.of("entropy")).all()


def test_uniform_values_of_a_sample_follow_its_own_episodes_and_rewards():
    decisions = [decision(6, [0, 0, 0, 0, 1, 1], [0, 1, 2]), decision(6, [0] * 6)]
    metrics = measured(uniform(6), n_samples=2, decisions=decisions)
    assert metrics.of_uniform("mass_last_episode") == pytest.approx([2 / 7, 6 / 7])
    assert metrics.of_uniform("mass_rewarded") == pytest.approx([3 / 7, 0])
    assert metrics.uniform_mean()["mass_rewarded"] == pytest.approx(1.5 / 7)
    np.testing.assert_allclose(metrics.values[:, 0, -1], metrics.uniform, atol=1e-9)
    metrics = measured(uniform(4), decisions=[decision(4, None)] * 3)  # no episodes are one
    assert metrics.of("mass_last_episode") == pytest.approx(np.full((1, 3), 0.8))


def test_batches_in_any_order_and_of_any_length_are_put_in_their_place():
    rows = some(n_samples=5)
    metrics = Metrics(5, range(2), [range(3)] * 2)
    put(metrics, [3, 4], rows)
    put(metrics, [1], rows)
    put(metrics, [0, 2], rows)
    found, expected = metrics.gather(ALONE), measured(*rows)
    for name in ("values", "uniform", "n_context"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    metrics = Metrics(4, [0], [range(3)])
    put(metrics, [0, 2], some(n_layers=1, n=4))
    put(metrics, [1, 3], some(n_layers=1, n=9))
    assert metrics.gather(ALONE).n_context.tolist() == [4, 9, 4, 9]
    assert metrics.uniform_mean()["effective_tokens"] == pytest.approx(6.5)
