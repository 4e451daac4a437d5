"""Token maps: what each token is of, rows over transitions, and what pictures show in order."""

import re

import numpy as np
import pytest
import torch
from adapters import ADAPTERS, CPU, analysed, check_metrics
from attention_rows import PARTS, decision, maps_of_tokens, random_rows
from conftest import refused
from hypothesis import assume, example, given
from hypothesis import strategies as st

from historylens import metrics
from historylens.adapter.agent import load
from historylens.capture import LayerAttention
from historylens.pictures.order import SampleAttention, curves
from historylens.tokens import Tokens, order_of_time, sum_rows, uniform_received, uniform_rows
from visualize_attention import main

PREVIOUS = ("previous action", "previous reward", "state")
NAMES = [*PARTS, "time", *PREVIOUS, "previous transition"]


@given(st.integers(0, 6), st.lists(st.sampled_from(NAMES), min_size=1, max_size=4), st.booleans())
def test_a_map_of_parts_is_that_of_a_plain_loop(n, parts, is_first):
    """A previous part is of the transition before its step; then the query's step is one more."""
    is_before = [name.startswith("previous") for name in parts]
    assume(not (is_first and any(is_before)))
    expected = []
    for step in range(n + any(is_before)):
        for name, before in zip(parts, is_before, strict=True):
            of = step - before  # -1, none, in the first step
            expected.append((of, name) if before or step < n else (-1, "query"))
    if not any(is_before):
        expected.insert(0 if is_first else len(expected), (-1, "query"))
    found = Tokens.of(n, parts, "first" if is_first else "last")
    assert [*zip(found.transition, found.part, strict=True)] == expected
    assert (found.decides, found.n) == (0 if is_first else len(expected) - 1, n)
    owned = dict.fromkeys(name for of, name in expected if of >= 0)
    assert found.parts == tuple(owned)


def test_another_token_may_decide_and_a_plain_map_has_a_token_a_transition_and_then_the_query():
    assert Tokens.of(3, query="first", decides=-1).decides == 3
    assert Tokens.of(2, PREVIOUS, decides=5).decides == 5
    assert Tokens(torch.tensor([0, -1]), "s").part == ("s", "s")
    assert Tokens.of(2, "previous transition").transition.tolist() == [-1, 0, 1]  # a text is one
    for more in ({"query": "middle"}, {"query": "first", "parts": PREVIOUS}):
        with pytest.raises(ValueError, match=r"expected query as 'last' .*, got '(middle|first)'"):
            Tokens.of(3, **more)
    others = {"query": "first"}, {"decides": 2}, {"parts": PARTS}, {"parts": "previous transition"}
    assert not any(Tokens.of(3, **more).is_plain for more in others)
    assert not Tokens.of(0, PREVIOUS).is_plain
    assert all(one.is_plain for one in (Tokens.of(3), Tokens.of(0), Tokens.of(0, query="first")))


def test_a_step_may_be_one_token_which_is_of_the_transition_before(tmp_path, capsys):
    """And a map of the step itself is refused, with the name of the right one."""
    path, out = tmp_path / "mine.py", tmp_path / "figs"
    text = ADAPTERS["previous_action"].read_text()
    for old, new in (
        ("torch.stack(parts, dim=2).flatten(1, 2)", "sum(parts)"),
        ('"previous action", "previous reward", "state"))', '"previous transition",))'),
    ):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    content, _ = analysed(path, out)
    check_metrics(content, load(path, 3, 0, CPU), lambda rows: rows[..., 1:])
    assert len(list(out.glob("layer_0/*.png"))) == 2
    path.write_text(text.replace('parts=("previous transition",)', ""))
    said = refused(main, ["--adapter", path, "--out", out, "--device=cpu"], capsys)
    assert '("previous transition",)' in said


@pytest.mark.parametrize(("fields", "words"), [
    (([0, 2], "transition"), "no token is of transition 1"),
    ((np.array([], dtype=int), "query"), "T of at least 1"),
    (([0, -2], "transition"), "got -2"),
    (([0, -1], ("transition",)), "2 tokens, got 1"),
    (([0, -1], ("transition", "query"), 2), "0..1, got 2"),
    (([0.0, 1.0], "transition"), "whole numbers"),
    (([[0], [1]], "transition"), "shape (2, 1)"),
    (([0, 1], ("transition", "padding")), "token 1 is padding"),
    (([0, -1], ("transition", "padding")), "expected it not to be padding"),
])  # fmt: skip
def test_a_map_that_cannot_be_is_refused(fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Tokens(*fields)


@given(maps_of_tokens())
@example(Tokens([-1, 0, 0, 1, 1, -1, -1], ("start", *PARTS[:2] * 2, "return", "query")))
@example(Tokens([0, 0, -1, -1], (*PARTS[:2], "query", "action"), 2))
@example(Tokens([-1, -1, -1], ("padding", "state", "query")))
def test_pictures_show_all_but_padding_in_time_and_what_decides_last(tokens):
    order = order_of_time(tokens)
    shown = tokens.take(order)
    assert order[-1] == tokens.decides == order[shown.decides]
    others = [i for i, name in enumerate(tokens.part) if name != "padding" and i != order[-1]]
    outside = [i for i in others if tokens.transition[i] < 0]  # the plain twin
    owned = sorted({*others} - {*outside}, key=lambda i: (tokens.transition[i], i))
    last = max((i for i, t in enumerate(tokens.transition) if t >= 0), default=-1)
    first, rest = ([i for i in outside if (i < last) == is_first] for is_first in (True, False))
    assert order.tolist() == [*first, *owned, *rest, tokens.decides]


@given(maps_of_tokens(), st.integers(0, 99))
@example(Tokens.of(0), 0)
def test_summed_rows_equal_those_of_plain_loops(tokens, seed):
    rows = random_rows(np.random.default_rng(seed), 2, 2, len(tokens))
    other = Tokens(tokens.transition[::-1], tokens.part[::-1], -1 - tokens.decides)
    for maps in ([tokens, tokens], [tokens, other]):  # one for the batch, or one a sample
        found = sum_rows(rows, maps)
        for b, head in np.ndindex(2, 2):
            expected = [0.0] * (tokens.n + 1)
            for weight, transition in zip(rows[b, head], maps[b].transition, strict=True):
                expected[transition if transition >= 0 else tokens.n] += weight
            np.testing.assert_allclose(found[b, head], expected, atol=1e-12)


def test_uniform_rows_weigh_what_the_query_sees_and_nothing_else():
    visible = np.array([[1, 0, 1], [1, 1, 1], [0, 0, 0]], dtype=bool)
    np.testing.assert_array_equal(uniform_rows(visible), [[0.5, 0, 0.5], [1 / 3] * 3, [0] * 3])


@given(st.integers(2, 9))
def test_uniform_received_is_that_of_a_causal_mask_and_no_number_where_nobody_may_look(n_tokens):
    found = uniform_received(np.tri(n_tokens, dtype=bool))
    np.testing.assert_allclose(found, metrics.uniform_received(n_tokens))
    seen = np.array([[True, False], [True, False]])
    np.testing.assert_array_equal(uniform_received(seen), [1.0, np.nan])


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


def test_without_history_the_query_is_all_there_is():
    sample = of_matrix(np.ones((2, 1, 1)), Tokens.of(0), [True])
    for name in ("query_rows", "received"):
        assert sample.numbers()[name] == {"mean": [1.0], "heads": [[1.0], [1.0]]}
    assert [one.values.shape for one in sample.curves()] == [(2, 0)] * 2


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
    np.testing.assert_allclose(found.uniform_received, metrics.uniform_received(9))


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
