"""The metrics against a slow plain twin, hand-worked rows and the uniform closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.metrics import (
    ALL_METRICS,
    SUMMARY_METRICS,
    AttentionMetrics,
    collect,
    concatenate,
    detail_metrics,
    quarter,
    received_from_map,
    summary_metrics,
    uniform_received,
    uniform_reference,
)
from attention.samples import Sample


def make_sample(index, n, rng, starts=None):
    starts = np.arange(0, n, 3) if starts is None else np.array(starts)
    return Sample(index, f"sample {index}", n, starts, rng.random(n) < 0.4, {"step": index})


def random_rows(shape, rng, sharpness=3.0):
    scores = rng.normal(size=shape) * sharpness
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def plain_metrics(row, last_episode_start, rewarded):
    """Every metric of one row, written as sums over positions."""
    row = [float(x) for x in row]
    n = len(row) - 1
    p = row[:n]
    total = sum(p)
    mean = total / n
    width = max(1, n // 4)
    shares = [x / total for x in p]
    entropy = -sum(q * math.log(q) for q in shares if q > 0)
    count, held = 0, 0.0
    for q in sorted(shares, reverse=True):
        if held >= 0.9 - 1e-6:
            break
        count, held = count + 1, held + q
    strong = [x for x in p if x > 0.1 + 1e-6]
    return {
        "mean_context_attention": mean,
        "concentration": math.sqrt(sum((x - mean) ** 2 for x in p) / n),
        "entropy": -sum(x * math.log(x + 1e-10) for x in p),
        "recent_distant_ratio": (sum(p[-width:]) / width) / (sum(p[:width]) / width + 1e-10),
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


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    n_heads=st.integers(1, 4),
    n_samples=st.integers(1, 3),
    sharpness=st.sampled_from([0.0, 1.0, 4.0]),
    seed=st.integers(0, 1000),
)
def test_collected_metrics_equal_the_plain_twin(n, n_heads, n_samples, sharpness, seed):
    rng = np.random.default_rng(seed)
    rows = random_rows((n_samples, n_heads, n + 1), rng, sharpness)
    samples = [make_sample(i, n, rng) for i in range(n_samples)]
    layer = collect([rows], samples).layers[0]
    for s, sample in enumerate(samples):
        start = sample.episode_starts[-1]
        expected = plain_metrics(rows[s].mean(0), start, sample.rewarded)
        assert set(layer.mean) == set(expected) == set(ALL_METRICS)
        for name, value in expected.items():
            assert layer.mean[name][s] == pytest.approx(value, rel=1e-9, abs=1e-12), name
        for h in range(n_heads):
            for name, value in plain_metrics(rows[s, h], start, sample.rewarded).items():
                assert layer.heads[name][s, h] == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_summary_metrics_of_a_row_worked_by_hand():
    row = [0.1, 0.0, 0.1, 0.0, 0.1, 0.0, 0.2, 0.2, 0.3]  # n = 8, quarters of 2
    values = summary_metrics(row)
    assert values["mean_context_attention"] == pytest.approx(0.0875)
    assert values["concentration"] == pytest.approx(math.sqrt(0.11 / 8 - 0.0875**2))
    assert values["entropy"] == pytest.approx(-(0.3 * math.log(0.1) + 0.4 * math.log(0.2)))
    assert values["recent_distant_ratio"] == pytest.approx(4.0)


def test_detail_metrics_of_a_row_worked_by_hand():
    row = [0.4, 0.0, 0.0, 0.4, 0.2]
    values = detail_metrics(row, [False, False, True, True], [True, False, False, False])
    expected = {
        "normalised_entropy": 0.5,
        "effective_tokens": 2.0,
        "tokens_for_90_percent": 2.0,
        "mean_distance": (4 + 1) / 2,
        "mass_self": 0.2,
        "mass_first_token": 0.4,
        "mass_first_quarter": 0.4,
        "mass_last_quarter": 0.4,
        "mass_last_episode": 0.4,
        "mass_rewarded": 0.4,
        "strong_positions": 2.0,
        "strong_share": 1.0,
    }
    assert {name: float(v) for name, v in values.items()} == pytest.approx(expected)


def test_entropy_is_not_renormalised_but_normalised_entropy_is():
    faint = np.array([0.01] * 10 + [0.9])
    assert summary_metrics(faint)["entropy"] == pytest.approx(-0.1 * math.log(0.01), rel=1e-6)
    mask = np.ones(10, bool)
    assert detail_metrics(faint, mask, mask)["normalised_entropy"] == pytest.approx(1.0)


def test_ninety_percent_of_ten_equal_tokens_takes_nine():
    for dtype in (np.float32, np.float64):
        row = np.array([0.1] * 10 + [0.0], dtype=dtype)
        mask = np.ones(10, bool)
        assert detail_metrics(row, mask, mask)["tokens_for_90_percent"] == 9


def test_a_float32_weight_of_a_tenth_is_not_strong():
    row = np.array([0.1] * 5 + [0.5], dtype=np.float32)
    mask = np.ones(5, bool)
    assert detail_metrics(row, mask, mask)["strong_positions"] == 0


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9, 100])
def test_uniform_reference_equals_the_closed_forms(n):
    p = 1 / (n + 1)
    values = uniform_reference(n, n_last_episode=1, n_rewarded=n // 2)
    expected = {
        "mean_context_attention": p,
        "concentration": 0.0,
        "entropy": n * p * math.log(n + 1),
        "recent_distant_ratio": 1.0,
        "normalised_entropy": 1.0,
        "effective_tokens": n,
        "tokens_for_90_percent": math.ceil(0.9 * n - 1e-9),
        "mean_distance": (n + 1) / 2,
        "mass_self": p,
        "mass_first_token": p,
        "mass_first_quarter": quarter(n) * p,
        "mass_last_quarter": quarter(n) * p,
        "mass_last_episode": p,
        "mass_rewarded": (n // 2) * p,
        "strong_positions": n if n < 9 else 0,
        "strong_share": 1.0 if n < 9 else 0.0,
    }
    assert values == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_uniform_values_of_a_sample_follow_its_own_masks():
    sample = Sample(0, "", 6, np.array([0, 4]), np.array([1, 1, 1, 0, 0, 0], bool))
    result = collect([np.full((1, 2, 7), 1 / 7)], [sample])
    assert result.uniform["mass_last_episode"] == pytest.approx([2 / 7])
    assert result.uniform["mass_rewarded"] == pytest.approx([3 / 7])
    for name in ALL_METRICS:
        assert result.layers[0].mean[name] == pytest.approx(result.uniform[name], abs=1e-9), name


@pytest.mark.parametrize("n", [1, 3])
def test_a_context_without_mass_reads_nothing_and_stays_finite(n):
    row = np.append(np.zeros(n), 1.0)
    mask = np.ones(n, bool)
    values = summary_metrics(row) | detail_metrics(row, mask, mask)
    assert values.pop("mass_self") == 1.0
    assert {name: float(v) for name, v in values.items()} == dict.fromkeys(values, 0.0)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_short_contexts_have_quarters_of_one_token(n):
    row = np.zeros(n + 1)
    row[n - 1] += 0.6
    row[0] += 0.3
    ratio = summary_metrics(row)["recent_distant_ratio"]
    assert ratio == pytest.approx(1.0 if n == 1 else 2.0)


def test_every_metric_is_finite_on_one_hot_rows_of_any_length():
    for n in (1, 2, 3, 5, 50):
        for position in range(n + 1):
            row = np.zeros(n + 1)
            row[position] = 1.0
            mask = np.arange(n) == 0
            values = summary_metrics(row) | detail_metrics(row, mask, mask)
            assert all(np.isfinite(v).all() for v in values.values())


def test_received_is_the_column_mean_over_queries_that_may_see_it():
    rng = np.random.default_rng(0)
    maps = np.tril(rng.random((2, 3, 6, 6)))
    hidden = maps.copy()
    hidden[..., ~np.tri(6, dtype=bool)] = np.nan
    for weights in (maps, hidden, torch.from_numpy(maps)):
        received = received_from_map(weights)
        for b, h, j in np.ndindex(2, 3, 6):
            plain = sum(maps[b, h, i, j] for i in range(j, 6)) / (6 - j)
            assert received[b, h, j] == pytest.approx(plain)


def test_uniform_received_equals_that_of_a_uniform_map():
    weights = np.tri(7) / np.arange(1, 8)[:, None]
    assert uniform_received(7) == pytest.approx(received_from_map(weights))
    assert uniform_received(2) == pytest.approx([(1 + 1 / 2) / 2, 1 / 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_torch_rows_with_gradients_are_measured_in_float64(dtype):
    rows = torch.full((2, 3, 9), 1 / 9, dtype=dtype, requires_grad=True)
    values = summary_metrics(rows)
    assert values["entropy"].dtype == np.float64
    assert values["entropy"].shape == (2, 3)


def small_result(n_samples=4, n_layers=2, n_heads=3, n=8, seed=0, layers=None):
    rng = np.random.default_rng(seed)
    samples = [make_sample(i, n, rng) for i in range(n_samples)]
    rows = [random_rows((n_samples, n_heads, n + 1), rng) for _ in range(n_layers)]
    return rows, samples, collect(rows, samples, layers)


def test_aggregates_are_population_statistics_of_head_averaged_rows():
    rows, _, result = small_result()
    entropies = np.array([summary_metrics(r.mean(1))["entropy"] for r in rows])  # (L, S)
    layer = result.layers[1].summary()["entropy"]
    assert (layer.mean, layer.std, layer.median) == pytest.approx(
        (entropies[1].mean(), entropies[1].std(ddof=0), np.median(entropies[1]))
    )
    overall = result.overall()["entropy"]
    assert (overall.mean, overall.std, overall.median) == pytest.approx(
        (entropies.mean(), entropies.std(ddof=0), np.median(entropies))
    )
    heads = summary_metrics(rows[1])["entropy"].mean(0)
    assert result.layers[1].head_means()["entropy"] == pytest.approx(heads)


def test_batches_joined_equal_one_large_batch():
    rows, samples, whole = small_result(n_samples=5)
    parts = [collect([r[a:b] for r in rows], samples[a:b]) for a, b in ((0, 2), (2, 3), (3, 5))]
    joined = concatenate(parts)
    assert [s.index for s in joined.samples] == [0, 1, 2, 3, 4]
    for name in ALL_METRICS:
        assert joined.uniform[name] == pytest.approx(whole.uniform[name], rel=1e-12)
        for one, other in zip(joined.layers, whole.layers, strict=True):
            assert one.mean[name] == pytest.approx(other.mean[name], rel=1e-12)
            assert one.heads[name] == pytest.approx(other.heads[name], rel=1e-12)


def test_batches_may_differ_in_context_length_but_not_in_layers():
    short, long = small_result(n=4)[2], small_result(n=9)[2]
    joined = concatenate([short, long])
    assert joined.n_context.tolist() == [4] * 4 + [9] * 4
    assert joined.uniform_mean()["effective_tokens"] == pytest.approx(6.5)
    with pytest.raises(ValueError, match="same layers"):
        concatenate([short, small_result(n_layers=3)[2]])
    with pytest.raises(ValueError, match="same layers"):
        concatenate([])


def test_rows_list_every_head_and_then_the_mean():
    _, _, result = small_result(n_samples=2, n_layers=2, n_heads=2, layers=[1, 3])
    rows = list(result.rows())
    assert [(r["sample"].index, r["layer"], r["head"]) for r in rows[:6]] == [
        (0, 1, 0), (0, 1, 1), (0, 1, "mean"), (0, 3, 0), (0, 3, 1), (0, 3, "mean"),
    ]  # fmt: skip
    assert len(rows) == 2 * 2 * 3
    assert rows[5]["entropy"] == result.layers[1].mean["entropy"][0]
    assert rows[4]["entropy"] == result.layers[1].heads["entropy"][0, 1]


def test_layers_may_differ_in_their_number_of_heads():
    rng = np.random.default_rng(0)
    rows = [random_rows((1, 2, 5), rng), random_rows((1, 7, 5), rng)]
    result = collect(rows, [make_sample(0, 4, rng)])
    assert [layer.heads["entropy"].shape for layer in result.layers] == [(1, 2), (1, 7)]
    assert len(list(result.rows())) == 3 + 8


def test_a_sample_without_episode_starts_is_one_episode():
    sample = Sample(0, "", 4, np.array([], dtype=int), np.zeros(4, bool))
    result = collect([np.full((1, 1, 5), 0.2)], [sample])
    assert result.layers[0].mean["mass_last_episode"] == pytest.approx([0.8])


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
        summary_metrics(row)


def test_shapes_that_do_not_fit_are_named():
    rows, samples, result = small_result()
    assert isinstance(result, AttentionMetrics)
    with pytest.raises(ValueError, match=r"layer 1: expected query rows \(B, H, T\) = \(4, H, 9\)"):
        collect([rows[0], rows[1][:, :, :-1]], samples)
    with pytest.raises(ValueError, match="at least one sample"):
        collect(rows, [])
    with pytest.raises(ValueError, match="rows of 2 layers"):
        collect(rows, samples, layers=[0])
    with pytest.raises(ValueError, match="one context length"):
        collect(rows, [*samples[:3], make_sample(3, 5, np.random.default_rng(0))])
    with pytest.raises(ValueError, match="square maps"):
        received_from_map(np.zeros((2, 3)))
    assert tuple(result.layers[0].mean)[:4] == SUMMARY_METRICS
