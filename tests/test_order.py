"""Pictures show the tokens of any model in the order of time, the one that decides last."""

import numpy as np
import torch
from attention_rows import PARTS, decision, maps_of_tokens
from hypothesis import given
from hypothesis import strategies as st

from historylens.capture import LayerAttention
from historylens.metrics import uniform_received
from historylens.pictures.order import SampleAttention, curves
from historylens.tokens import Tokens, order_of_time


def drawn(tokens, uniform_row, rows, maps, map_rows, map_cols, received=None, **marks):
    """The only sample of a layer, as it is drawn; `rows (H, T)`, `maps (H, R, C)`."""
    arrays = rows, rows if received is None else received, maps
    rows, received, maps = (torch.from_numpy(np.float32(array))[None] for array in arrays)
    seen = torch.from_numpy(np.asarray(uniform_row) > 0)[None]
    places = torch.as_tensor(map_rows), torch.as_tensor(map_cols)
    layer = LayerAttention("layer", rows, seen, received, maps, *places)
    return SampleAttention.of(decision(tokens.n, **marks), tokens, layer, 0, 0, uniform_row)


def of_matrix(weights, tokens, visible, **marks):
    """What is drawn of a sample whose map is the matrix `(H, T, T)` itself, NaN where forbidden."""
    row, every = np.nan_to_num(weights[:, tokens.decides]), range(len(tokens))
    received = np.nansum(weights, -2) / (~np.isnan(weights)).sum(-2)
    even = np.array(visible) / np.sum(visible)
    return drawn(tokens, even, row, weights, every, every, received, **marks)


@given(maps_of_tokens(), st.integers(0, 99))
def test_a_map_is_shown_with_rows_and_columns_in_the_order_of_pictures(tokens, seed):
    size = len(tokens)
    weights = np.random.default_rng(seed).random((2, size, size)).astype(np.float32) + 0.01
    found, order = of_matrix(weights, tokens, np.ones(size)), order_of_time(tokens)
    np.testing.assert_array_equal(found.maps, weights[:, order][:, :, order])
    assert found.rows.tolist() == found.cols.tolist() == list(range(len(order)))


def test_the_only_query_of_a_layer_is_the_token_that_decides():
    row = np.array([[0.5, 0.3, 0.2]])
    found = drawn(Tokens.of(2), np.full(3, 1 / 3), row, row[:, None], [0], range(3))
    np.testing.assert_allclose(found.maps, row[:, None], rtol=1e-6)
    assert found.rows.tolist() == [2]


def test_forbidden_is_blank_in_the_query_row_and_episodes_and_rewards_are_marked_on_tokens():
    weights = np.array([[[0.6, 0.4, np.nan], [1, 0, 0], [1, 0, 0]]])
    found = of_matrix(weights, Tokens.of(2, query="first"), [True, True, False])
    np.testing.assert_allclose(found.maps[0, -1], [0.4, np.nan, 0.6], rtol=1e-6)
    even, marks = np.ones((1, 13, 13)), {"episodes": [0, 0, 0, 1], "rewarded": [1]}
    starts, owned, rewarded = of_matrix(even, Tokens.of(4, PARTS), np.ones(13), **marks).on_tokens
    assert starts.tolist() == [0, 9]
    assert np.flatnonzero(rewarded).tolist() == [3, 4, 5]
    assert owned.all()


def test_a_binned_map_keeps_its_bins_moves_a_token_with_its_own_and_gets_the_deciding_row():
    tokens, even = Tokens.of(8, query="first"), np.full(9, 1 / 9)  # the map has 4 columns
    maps = np.arange(16.0).reshape(1, 4, 4)
    maps[0, 0] = 1 / 9
    found = drawn(tokens, even, even[None], maps, [0, 1, 4, 8], [0, 1, 2, 5])
    assert found.cols.tolist() == [0, 1, 4, 8]
    assert found.rows.tolist() == [0, 3, 7, 8]
    np.testing.assert_allclose(found.maps[0, :-1], [[5, 6, 7, 4], [9, 10, 11, 8], [13, 14, 15, 12]])
    np.testing.assert_allclose(found.maps[0, -1], 1 / 9, rtol=1e-6)
    row, even = [[0.1, 0.2, 0.3, 0.2, 0.2, 0, 0, 0, 0]], np.r_[[0.2] * 5, [0.0] * 4]
    maps = np.where(np.tri(4), 0.5, np.nan)[None]  # causal, without the row that decides
    found = drawn(Tokens.of(8, decides=4), even, row, maps, [0, 3, 6, 8], [0, 2, 5, 7])
    assert found.maps.shape == (1, 5, 4)
    np.testing.assert_allclose(np.sort(found.maps[0, -1]), [0.15, 0.7 / 3, np.nan, np.nan], 1e-6)
    np.testing.assert_allclose(found.uniform_received, uniform_received(9))


def test_curves_are_of_parts_and_add_up_to_the_transition_or_of_heads_where_it_is_one_token():
    tokens, even = Tokens.of(2, ("state", "action")), np.full(5, 0.2)
    heads = np.array([[0.1, 0.2, 0.3, 0.1, 0.3], [0.3, 0.2, 0.1, 0.1, 0.3]])
    found = curves(heads, even, tokens, "sum")
    assert found.names == ("state", "action")
    np.testing.assert_allclose(found.values, [[0.2, 0.2], [0.2, 0.1]])
    np.testing.assert_allclose([found.whole, found.uniform], [[0.4, 0.3], [0.4, 0.4]])
    np.testing.assert_allclose(curves(heads, even, tokens, "mean").whole, [0.2, 0.15])
    found = curves(heads, even, Tokens.of(4), "sum")
    assert found.names == ()
    np.testing.assert_allclose(found.values, heads[:, :4])
    np.testing.assert_allclose(found.whole, [0.2, 0.2, 0.2, 0.1])


def test_drawn_numbers_have_six_digits_and_uniform_ones_only_where_they_are_not_the_known_ones():
    causal = np.where(np.tri(3), np.tri(3) / np.arange(1, 4)[:, None], np.nan)[None]
    known = of_matrix(causal, Tokens.of(2), [True] * 3).numbers()
    rows = {"query_rows": [0.333333] * 3, "received": [0.611111, 0.416667, 0.333333]}
    assert known == {name: {"mean": row, "heads": [row]} for name, row in rows.items()}
    numbers = of_matrix(np.full((1, 3, 3), 1 / 3), Tokens.of(2), [True] * 3).numbers()
    assert numbers["uniform_query_row"] == numbers["uniform_received"] == [0.333333] * 3
