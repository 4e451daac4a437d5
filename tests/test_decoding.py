import numpy as np
import pytest
import torch
from conftest import random_window, sharp_model
from hypothesis import given
from hypothesis import strategies as st

from acting import decoding
from acting.decoding import CachedContext, fast_logits
from compression import History
from config import ModelConfig
from model import ADTransformer

SHAPES = [(12, 1, 1, 8), (12, 2, 2, 16), (20, 3, 4, 16), (2, 2, 1, 8)]  # T, L, H, D


def make_model(n_transit, n_layers, n_heads, width) -> ADTransformer:
    config = ModelConfig(
        n_transit=n_transit,
        tf_n_layer=n_layers,
        tf_n_head=n_heads,
        tf_n_embd=width,
        tf_n_inner=24,
        grid_size=5,
    )
    return sharp_model(config, dtype=torch.float64)


MODELS = {shape: make_model(*shape) for shape in SHAPES}


def forward(model, window, queries, first, last):
    """The model's own logits on transitions `first .. last - 1` and the query state behind them."""
    with torch.inference_mode():
        return model(*(part[:, first:last] for part in window), queries[:, last])


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@given(data=st.data(), shape=st.sampled_from(SHAPES), n_rooms=st.integers(1, 3))
def test_any_chunks_give_the_logits_of_one_forward_pass(data, shape, n_rooms):
    model = MODELS[shape]
    n = model.n_context_max
    window, queries = random_window(model.config, n_rooms, n, seed=shape[0])
    cuts = data.draw(st.lists(st.integers(0, n), max_size=6).map(sorted))
    context = CachedContext(model, n_rooms)
    begin = 0
    for end in [*cuts, n]:
        logits = context.act(queries[:, end], *(part[:, begin:end] for part in window))
        assert_equal(logits, forward(model, window, queries, 0, end))
        assert context.n_context == end
        begin = end


@given(st.integers(0, 11), st.integers(0, 11))
def test_after_clear_nothing_of_the_old_context_is_left(n_before, n_after):
    model = MODELS[SHAPES[1]]
    window, queries = random_window(model.config, 2, 11)
    context = CachedContext(model, 2)
    context.act(queries[:, 0], *(part[:, :n_before] for part in window))
    context.clear()
    assert context.n_context == 0
    # The newest transitions, as a context that slides reads them anew: at the first positions
    logits = context.act(queries[:, 11], *(part[:, 11 - n_after :] for part in window))
    assert_equal(logits, forward(model, window, queries, 11 - n_after, 11))


def test_without_transitions_the_query_alone_is_read():
    model = MODELS[SHAPES[1]]
    window, queries = random_window(model.config, 3, 4)
    context = CachedContext(model, 3)
    assert_equal(context.act(queries[:, 0]), forward(model, window, queries, 0, 0))
    context.act(queries[:, 3], *(part[:, :3] for part in window))
    assert_equal(context.act(queries[:, 3]), forward(model, window, queries, 0, 3))


def test_a_query_leaves_no_trace_in_the_context():
    model = MODELS[SHAPES[2]]
    window, queries = random_window(model.config, 2, 8)
    asked, quiet = CachedContext(model, 2), CachedContext(model, 2)
    first, rest = ([part[:, cut] for part in window] for cut in (slice(5), slice(5, 8)))
    asked.act(queries[:, 5], *first)
    quiet.act(queries[:, 0], *first)
    for other in range(5):
        asked.act(queries[:, other])
    assert torch.equal(asked.act(queries[:, 8], *rest), quiet.act(queries[:, 8], *rest))


@pytest.mark.parametrize("chunks", [[12], [11, 1], [5, 7]])
def test_outgrowing_the_positions_is_an_error_that_names_both_lengths(chunks):
    model = MODELS[SHAPES[1]]
    window, queries = random_window(model.config, 1, 12)
    context = CachedContext(model, 1)
    begin = 0
    for size in chunks[:-1]:
        context.act(queries[:, 0], *(part[:, begin : begin + size] for part in window))
        begin += size
    with pytest.raises(ValueError, match="at most 11 transitions in context, got 12"):
        context.act(queries[:, 0], *(part[:, begin:] for part in window))


def test_an_error_leaves_the_context_usable():
    model = MODELS[SHAPES[1]]
    window, queries = random_window(model.config, 1, 12)
    context = CachedContext(model, 1)
    context.act(queries[:, 4], *(part[:, :4] for part in window))
    with pytest.raises(ValueError, match="got 16"):
        context.act(queries[:, 4], *window)
    logits = context.act(queries[:, 6], *(part[:, 4:6] for part in window))
    assert_equal(logits, forward(model, window, queries, 0, 6))


def test_rooms_do_not_read_each_other():
    model = MODELS[SHAPES[2]]
    window, queries = random_window(model.config, 4, 9)
    together, alone = CachedContext(model, 4), CachedContext(model, 1)
    for i in range(9):
        new = [part[:, i : i + 1] for part in window]
        both = together.act(queries[:, i], *new)
        assert_equal(both[2:3], alone.act(queries[2:3, i], *(part[2:3] for part in new)))
    assert np.ptp(both.numpy(), axis=0).min() > 1e-3


@pytest.mark.parametrize("tokens_at_once", [1, 12, 25, 10_000])
def test_a_large_batch_in_parts_gives_the_logits_of_one_pass(monkeypatch, tokens_at_once):
    model = MODELS[12, 2, 2, 16]
    n = model.n_context_max
    window, queries = random_window(model.config, 7, n)
    monkeypatch.setattr(decoding, "TOKENS_AT_ONCE", tokens_at_once)
    found = fast_logits(model, History(*window, query_states=queries[:, n]))
    assert_equal(found, forward(model, window, queries, 0, n))
