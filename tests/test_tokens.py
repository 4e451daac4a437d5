"""Token maps: from attention over tokens to rows over transitions, and to pictures."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention import metrics
from attention.arranged import show, token_sample
from attention.record import LayerAttention
from attention.samples import Sample
from attention.tokens import (
    Tokens,
    arrange,
    curves,
    sum_rows,
    uniform_received,
    uniform_rows,
    visible_to_query,
)

PARTS = ("state", "action", "reward")


@st.composite
def maps_of_tokens(draw):
    """Any map: transitions in any order, tokens of none among them, any token deciding."""
    n = draw(st.integers(1, 5))
    numbers = [*range(n), *draw(st.lists(st.integers(-1, n - 1), min_size=1, max_size=8))]
    numbers = draw(st.permutations(numbers))
    part = [draw(st.sampled_from(PARTS if t >= 0 else ("query", "padding"))) for t in numbers]
    own = [i for i, name in enumerate(part) if name != "padding"]
    return Tokens(numbers, part, draw(st.sampled_from(own)))


def sample_of(tokens, episode_starts=(0,), rewarded=()):
    rewards = np.isin(np.arange(tokens.n), rewarded)
    return Sample(0, "title", tokens.n, np.array(episode_starts), rewards, tokens=tokens)


def some_rows(tokens, seed=0, n_samples=1, n_heads=2):
    weights = np.random.default_rng(seed).random((n_samples, n_heads, len(tokens)))
    return weights / weights.sum(-1, keepdims=True)


# Layouts


def test_three_tokens_a_transition_and_the_query_last():
    tokens = Tokens.of(2, PARTS)
    assert tokens.transition.tolist() == [0, 0, 0, 1, 1, 1, -1]
    assert tokens.part == (*PARTS, *PARTS, "query")
    assert (tokens.decides, tokens.n, len(tokens), tokens.parts) == (6, 2, 7, PARTS)


def test_the_query_first_decides_unless_another_token_is_said_to():
    assert Tokens.of(3, query="first").decides == 0
    tokens = Tokens.of(3, query="first", decides=-1)
    assert tokens.transition.tolist() == [-1, 0, 1, 2]
    assert tokens.decides == 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (([0, 2], "transition"), "no token is of transition 1"),
        (([-1, -1], "query"), "no token is of transition 0"),
        (([0, -2], "transition"), "got -2"),
        (([0, -1], ("transition",)), "2 tokens, got 1"),
        (([0, -1], ("transition", "query"), 2), "0..1, got 2"),
        (([0.0, 1.0], "transition"), "whole numbers"),
        (([[0], [1]], "transition"), "shape (2, 1)"),
        (([0, 1], ("transition", "padding")), "token 1 is padding"),
        (([0, -1], ("transition", "padding")), "expected it not to be padding"),
    ],
)
def test_a_map_that_cannot_be_is_refused(fields, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        Tokens(*fields)


# From tokens to transitions


@given(maps_of_tokens(), st.integers(0, 99))
def test_summed_rows_equal_those_of_plain_loops(tokens, seed):
    rows = some_rows(tokens, seed, n_samples=2)
    found = sum_rows(rows, [tokens, tokens])
    for b in range(2):
        for h in range(2):
            expected = [0.0] * (tokens.n + 1)
            for weight, transition in zip(rows[b, h], tokens.transition, strict=True):
                expected[transition if transition >= 0 else tokens.n] += weight
            np.testing.assert_allclose(found[b, h], expected, atol=1e-12)


def test_samples_of_a_batch_may_have_maps_of_their_own():
    first, second = Tokens.of(2), Tokens.of(2, query="first")
    rows = np.array([[[0.1, 0.2, 0.7]], [[0.1, 0.2, 0.7]]])
    found = sum_rows(rows, [first, second])
    np.testing.assert_allclose(found[:, 0], [[0.1, 0.2, 0.7], [0.2, 0.7, 0.1]])


@given(st.integers(2, 12), st.integers(0, 99))
def test_metrics_do_not_depend_on_how_many_tokens_a_transition_is_cut_into(n, seed):
    whole = some_rows(Tokens.of(n), seed)[0]
    parts = np.concatenate([np.repeat(whole[:, :-1] / 3, 3, axis=1), whole[:, -1:]], axis=1)
    summed = sum_rows(parts[None], [Tokens.of(n, PARTS)])[0]
    for name, values in metrics.summary_metrics(whole).items():
        np.testing.assert_allclose(metrics.summary_metrics(summed)[name], values, rtol=1e-9)


# Uniform attention


def test_uniform_rows_weigh_what_the_query_sees_and_nothing_else():
    layers = [np.array([[[0.5, 0.0, 0.5], [1.0, 0.0, 0.0]]]), np.array([[[0.2, 0.0, 0.8]] * 2])]
    assert uniform_rows(visible_to_query(layers)).tolist() == [[0.5, 0.0, 0.5]]


def test_a_uniform_row_over_three_tokens_a_transition_is_even_over_transitions():
    even = uniform_rows(np.ones((1, 7), dtype=bool))
    np.testing.assert_allclose(sum_rows(even, [Tokens.of(2, PARTS)]), [[3 / 7, 3 / 7, 1 / 7]])


def test_padding_takes_no_part_in_the_uniform_reference():
    tokens = Tokens([-1, 0, 1, -1], ["query", "transition", "transition", "padding"], 0)
    rows = np.array([[[0.2, 0.5, 0.3, 0.0]]])
    even = sum_rows(uniform_rows(visible_to_query([rows])), [tokens])
    result = metrics.collect([sum_rows(rows, [tokens])], [sample_of(tokens)], uniform_rows=even)
    assert result.uniform["mean_context_attention"] == pytest.approx(1 / 3)
    assert result.uniform["mass_self"] == pytest.approx(1 / 3)


@given(st.integers(2, 9))
def test_uniform_received_of_a_causal_mask_is_the_known_one(n_tokens):
    found = uniform_received(np.tri(n_tokens, dtype=bool))
    np.testing.assert_allclose(found, metrics.uniform_received(n_tokens))


def test_uniform_received_where_nobody_may_look_is_no_number():
    seen = np.array([[True, False], [True, False]])
    np.testing.assert_array_equal(uniform_received(seen), [1.0, np.nan])


# Pictures


@given(maps_of_tokens())
def test_pictures_show_all_but_padding_in_time_and_what_decides_last(tokens):
    order = arrange(tokens)
    shown = tokens.take(order)
    assert order[-1] == tokens.decides == order[shown.decides]
    assert set(order) == {i for i, name in enumerate(tokens.part) if name != "padding"}
    assert (np.diff(shown.transition[:-1]) >= 0).all()


def attention_of(weights, tokens):
    """What capture gives of one sample: a map that is the matrix itself, the query's row in it."""
    maps = torch.tensor(weights, dtype=torch.float32)[None]  # (1, H, T, T)
    every = torch.arange(len(tokens))
    seen = ~maps.isnan()
    received = maps.nan_to_num().sum(-2) / seen.sum(-2)
    return LayerAttention(
        "layer", maps[:, :, tokens.decides].nan_to_num(), received, maps, every, every
    )


@given(maps_of_tokens(), st.integers(0, 99))
def test_a_map_is_shown_with_rows_and_columns_in_the_order_of_pictures(tokens, seed):
    size = len(tokens)
    weights = np.random.default_rng(seed).random((2, size, size)).astype(np.float32) + 0.01
    found = show(attention_of(weights, tokens), sample_of(tokens), 0, 0, np.full(size, 1 / size))
    order = arrange(tokens)
    np.testing.assert_array_equal(found.maps, weights[:, order][:, :, order])
    assert found.rows.tolist() == found.cols.tolist() == list(range(len(order)))
    assert found.sample.n_context == len(order) - 1


def test_what_the_query_may_not_see_is_blank_in_its_row():
    tokens = Tokens.of(2, query="first")
    weights = np.array([[[0.6, 0.4, np.nan], [1, 0, 0], [1, 0, 0]]])
    found = show(attention_of(weights, tokens), sample_of(tokens), 0, 0, np.array([0.5, 0.5, 0]))
    np.testing.assert_allclose(found.maps[0, -1], [0.4, np.nan, 0.6], rtol=1e-6)


def test_binned_maps_keep_their_bins_and_move_a_token_that_has_its_own():
    tokens = Tokens.of(8, query="first")  # 9 tokens, of which the map has 4 columns
    maps = torch.arange(16.0).reshape(1, 1, 4, 4)
    rows = torch.full((1, 1, 9), 1 / 9)
    layer = LayerAttention(
        "layer", rows, rows, maps, torch.tensor([0, 1, 4, 8]), torch.tensor([0, 1, 2, 5])
    )
    found = show(layer, sample_of(tokens), 0, 0, np.full(9, 1 / 9))
    assert found.cols.tolist() == [0, 1, 4, 8]
    assert found.rows.tolist() == [0, 3, 7, 8]
    np.testing.assert_allclose(found.maps[0, :-1], [[5, 6, 7, 4], [9, 10, 11, 8], [13, 14, 15, 12]])
    np.testing.assert_allclose(found.maps[0, -1], 1 / 9)


def test_episodes_and_rewards_are_marked_on_tokens():
    shown = token_sample(sample_of(Tokens.of(4, PARTS), episode_starts=(0, 3), rewarded=[1]))
    assert shown.episode_starts.tolist() == [0, 9]
    assert np.flatnonzero(shown.rewarded).tolist() == [3, 4, 5]


def test_curves_are_of_parts_and_add_up_to_the_transition():
    tokens = Tokens.of(2, ("state", "action"))
    heads = np.array([[0.1, 0.2, 0.3, 0.1, 0.3], [0.3, 0.2, 0.1, 0.1, 0.3]])
    found = curves(heads, np.full(5, 0.2), tokens, "sum")
    assert found.names == ("state", "action")
    np.testing.assert_allclose(found.values, [[0.2, 0.2], [0.2, 0.1]])
    np.testing.assert_allclose(found.whole, [0.4, 0.3])
    np.testing.assert_allclose(found.uniform, [0.4, 0.4])
    np.testing.assert_allclose(curves(heads, np.ones(5), tokens, "mean").whole, [0.2, 0.15])


def test_curves_are_of_heads_where_a_transition_is_one_token():
    heads = np.array([[0.1, 0.2, 0.7], [0.3, 0.4, 0.3]])
    found = curves(heads, np.full(3, 1 / 3), Tokens.of(2), "sum")
    assert found.names == ()
    np.testing.assert_allclose(found.values, heads[:, :2])
    np.testing.assert_allclose(found.whole, [0.2, 0.3])
