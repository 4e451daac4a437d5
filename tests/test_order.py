"""Pictures show the tokens of any model in the order of time, the one that decides last."""

import numpy as np
import torch
from attention_rows import PARTS, decision, maps_of_tokens
from hypothesis import given
from hypothesis import strategies as st

from historylens.capture import LayerAttention
from historylens.pictures.order import SampleAttention, curves
from historylens.tokens import Tokens, order_of_time


def drawn(layer, tokens, uniform_row, **marks):
    """The only sample of a layer, as it is drawn."""
    return SampleAttention.of(decision(tokens.n, **marks), tokens, layer, 0, 0, uniform_row)


def of_matrix(weights, tokens, visible, **marks):
    """What is drawn of a sample whose map is the matrix `(H, T, T)` itself."""
    maps = torch.tensor(weights, dtype=torch.float32)[None]  # (1, H, T, T)
    every, visible = torch.arange(len(tokens)), np.array(visible, dtype=bool)
    received = maps.nan_to_num().sum(-2) / (~maps.isnan()).sum(-2)
    layer = LayerAttention(
        "layer",
        maps[:, :, tokens.decides].nan_to_num(),
        torch.from_numpy(visible)[None],
        received,
        maps,
        every,
        every,
    )
    return drawn(layer, tokens, visible / visible.sum(), **marks)


@given(maps_of_tokens(), st.integers(0, 99))
def test_a_map_is_shown_with_rows_and_columns_in_the_order_of_pictures(tokens, seed):
    size = len(tokens)
    weights = np.random.default_rng(seed).random((2, size, size)).astype(np.float32) + 0.01
    found = of_matrix(weights, tokens, np.ones(size))
    order = order_of_time(tokens)
    np.testing.assert_array_equal(found.maps, weights[:, order][:, :, order])
    assert found.rows.tolist() == found.cols.tolist() == list(range(len(order)))


def test_what_the_query_may_not_see_is_blank_in_its_row():
    tokens = Tokens.of(2, query="first")
    weights = np.array([[[0.6, 0.4, np.nan], [1, 0, 0], [1, 0, 0]]])
    found = of_matrix(weights, tokens, [True, True, False])
    np.testing.assert_allclose(found.maps[0, -1], [0.4, np.nan, 0.6], rtol=1e-6)


def test_binned_maps_keep_their_bins_and_move_a_token_that_has_its_own():
    tokens = Tokens.of(8, query="first")  # 9 tokens, of which the map has 4 columns
    rows = torch.full((1, 1, 9), 1 / 9)
    maps = torch.arange(16.0).reshape(1, 1, 4, 4)
    maps[0, 0, 0] = 1 / 9
    layer = LayerAttention(
        "layer",
        rows,
        torch.ones(1, 9, dtype=torch.bool),
        rows,
        maps,
        torch.tensor([0, 1, 4, 8]),
        torch.tensor([0, 1, 2, 5]),
    )
    found = drawn(layer, tokens, np.full(9, 1 / 9))
    assert found.cols.tolist() == [0, 1, 4, 8]
    assert found.rows.tolist() == [0, 3, 7, 8]
    np.testing.assert_allclose(found.maps[0, :-1], [[5, 6, 7, 4], [9, 10, 11, 8], [13, 14, 15, 12]])
    np.testing.assert_allclose(found.maps[0, -1], 1 / 9, rtol=1e-6)


def test_a_binned_map_that_lacks_the_deciding_row_gets_it_from_the_query_row():
    row = torch.tensor([[[0.1, 0.2, 0.3, 0.2, 0.2, 0, 0, 0, 0]]])
    places = torch.tensor([1, 3, 6, 8]), torch.tensor([0, 2, 5, 7])
    layer = LayerAttention("", row, row[0] > 0, row, torch.full((1, 1, 4, 4), 0.5), *places)
    maps = drawn(layer, Tokens.of(8, decides=4), np.r_[[0.2] * 5, [0.0] * 4]).maps
    assert maps.shape == (1, 5, 4)
    np.testing.assert_allclose(np.sort(maps[0, -1]), [0.15, 0.7 / 3, np.nan, np.nan], rtol=1e-6)


def test_episodes_and_rewards_are_marked_on_tokens():
    even, marks = np.ones((1, 13, 13)), {"episodes": [0, 0, 0, 1], "rewarded": [1]}
    starts, rewarded = of_matrix(even, Tokens.of(4, PARTS), np.ones(13), **marks).on_tokens
    assert starts.tolist() == [0, 9]
    assert np.flatnonzero(rewarded).tolist() == [3, 4, 5]


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


def test_drawn_numbers_have_six_digits_and_uniform_ones_only_where_they_are_not_the_known_ones():
    causal = np.where(np.tri(3), np.tri(3) / np.arange(1, 4)[:, None], np.nan)[None]
    numbers = of_matrix(causal, Tokens.of(2), [True] * 3).numbers()
    assert set(numbers) == {"query_rows", "received"}
    assert numbers["query_rows"] == {"mean": [0.333333] * 3, "heads": [[0.333333] * 3]}
    assert numbers["received"]["mean"] == [0.611111, 0.416667, 0.333333]
    numbers = of_matrix(np.full((1, 3, 3), 1 / 3), Tokens.of(2), [True] * 3).numbers()
    assert numbers["uniform_query_row"] == numbers["uniform_received"] == [0.333333] * 3
