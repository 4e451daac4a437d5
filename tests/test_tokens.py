"""Token maps: from attention over tokens to rows over transitions, and to the order of pictures."""

import re

import numpy as np
import pytest
import torch
from attention_rows import PARTS, maps_of_tokens, random_rows
from hypothesis import example, given
from hypothesis import strategies as st

from historylens import metrics
from historylens.tokens import Tokens, order_of_time, sum_rows, uniform_received, uniform_rows


def test_the_query_is_last_or_first_and_decides_unless_another_token_is_said_to():
    tokens = Tokens.of(2, PARTS)
    assert tokens.transition.tolist() == [0, 0, 0, 1, 1, 1, -1]
    assert tokens.part == (*PARTS, *PARTS, "query")
    assert (tokens.decides, tokens.n, len(tokens), tokens.parts) == (6, 2, 7, PARTS)
    assert vars(Tokens(torch.tensor([0, -1]), "s"))["part"] == ("s", "s")
    first, other = Tokens.of(3, query="first"), Tokens.of(3, query="first", decides=-1)
    assert first.transition.tolist() == other.transition.tolist() == [-1, 0, 1, 2]
    assert (first.decides, other.decides) == (0, 3)
    with pytest.raises(ValueError, match="'last' or 'first', got 'middle'"):
        Tokens.of(3, query="middle")
    assert Tokens.of(3).is_plain  # a token a transition and the query last
    assert not any(one.is_plain for one in (tokens, first, other, Tokens.of(3, decides=2)))


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
def test_pictures_show_all_but_padding_in_time_and_what_decides_last(tokens):
    order = order_of_time(tokens)
    shown = tokens.take(order)
    assert order[-1] == tokens.decides == order[shown.decides]
    assert set(order) == {i for i, name in enumerate(tokens.part) if name != "padding"}
    others = [i for i in sorted(order) if i != tokens.decides]  # the plain twin
    outside = [i for i in others if tokens.transition[i] < 0]
    owned = sorted({*others} - {*outside}, key=lambda i: (tokens.transition[i], i))
    last = max(i for i, t in enumerate(tokens.transition) if t >= 0)
    first, rest = ([i for i in outside if (i < last) == is_first] for is_first in (True, False))
    assert order.tolist() == [*first, *owned, *rest, tokens.decides]


@given(maps_of_tokens(), st.integers(0, 99))
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
    even = uniform_rows(np.ones((1, 7), dtype=bool))  # even over transitions of three tokens too
    np.testing.assert_allclose(sum_rows(even, [Tokens.of(2, PARTS)]), [[3 / 7, 3 / 7, 1 / 7]])


@given(st.integers(2, 9))
def test_uniform_received_is_that_of_a_causal_mask_and_no_number_where_nobody_may_look(n_tokens):
    found = uniform_received(np.tri(n_tokens, dtype=bool))
    np.testing.assert_allclose(found, metrics.uniform_received(n_tokens))
    seen = np.array([[True, False], [True, False]])
    np.testing.assert_array_equal(uniform_received(seen), [1.0, np.nan])
