"""Several passes that read on count as one; keys that are no tokens are kept apart."""

import pytest
import torch
from eager import CLOSE, Attend, Given, causal, check, check_pooled, refused, run_twice
from eager import eager_weights as weights_of
from eager import split_heads as split
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from historylens.capture import CaptureError, capture

ALL_SEEN = causal(1)


class Cached(nn.Module):
    """Causal attention that keeps its keys, and some keys of its own before and behind them."""

    def __init__(self, way="sdpa", before=0, behind=0, hides=-1e9):
        super().__init__()
        self.way, self.before, self.behind, self.hides = way, before, behind, hides
        self.own = nn.Parameter(torch.randn(before + behind, 8))
        self.past = []

    def keys(self, x):
        own = self.own.expand(len(x), -1, -1)
        return split(torch.cat([own[:, : self.before], x, own[:, self.before :]], dim=1))

    def forward(self, x):
        start = sum(part.shape[1] for part in self.past)
        self.past.append(x)
        q, k = split(x), self.keys(torch.cat(self.past, 1))
        n_queries, n_keys = q.shape[2], k.shape[2]
        forbidden = causal(n_queries, n_keys - self.before - self.behind, 1 + start)
        forbidden = functional.pad(forbidden, (self.before, self.behind))
        if self.way == "sdpa":
            mask = None if not forbidden.any() else ~forbidden
            return functional.scaled_dot_product_attention(q, k, k, mask)
        return (q @ k.mT / 2).masked_fill(forbidden, self.hides).softmax(-1) @ k


def truth(model, x):
    """Weights (B, H, T, T) on the tokens, and (B, H, T) on other keys."""
    n_tokens, k = x.shape[1], model.keys(x)
    forbidden = functional.pad(causal(n_tokens), (model.before, model.behind))
    weights = weights_of(split(x), k, forbidden)
    on_tokens = weights[..., model.before : model.before + n_tokens]
    return on_tokens, 1 - on_tokens.sum(-1)


def captured(model, x, chunks, **options):
    with torch.no_grad(), capture(model, **options) as record:
        for part in x.split(chunks, 1):
            model(part)
    assert record.names == ("Cached",)
    return record[0]


@settings(max_examples=60)
@given(
    before=st.sampled_from([0, 0, 1, 4]), behind=st.sampled_from([0, 0, 2]), data=st.data(),
    first=st.integers(1, 12), more=st.lists(st.integers(1, 6), max_size=4),
    way=st.sampled_from(["sdpa", "softmax"]), n_samples=st.integers(1, 2),
    hides=st.sampled_from([-torch.inf, -1e9, torch.finfo(torch.float32).min]),
)  # fmt: skip
def test_passes_that_read_on_are_one_attention_over_all_tokens_and_keys_of_no_token_are_kept_apart(
    before, behind, data, first, more, way, n_samples, hides
):
    """Memory before the tokens, sinks behind them, in one pass or several."""
    torch.manual_seed(0)
    n_extra, chunks = before + behind, [first, *more]
    assume(first > 1 or not n_extra)  # one query does not tell
    places = st.integers(0, sum(chunks) - 1)
    one_each = st.lists(places, min_size=n_samples, max_size=n_samples).map(torch.tensor)
    query = data.draw(st.just(-1) | places | one_each)
    x, model = torch.randn(n_samples, sum(chunks), 8), Cached(way, before, behind, hides)
    found = captured(model, x, chunks, maps=[0], query=query)
    weights, extra = truth(model, x)
    check(found, weights, causal(sum(chunks)), query=query)
    assert found.map_rows.tolist() == found.map_cols.tolist() == list(range(sum(chunks)))
    assert (found.extra is None) == (n_extra == 0)
    if n_extra:
        own = torch.arange(n_samples), slice(None), torch.as_tensor(query).expand(n_samples)
        torch.testing.assert_close(found.extra, extra[own], **CLOSE)


@pytest.mark.parametrize("query", [9, -2])
def test_a_query_that_is_in_no_pass_is_an_error(query):
    """One counted from the end must be in the last pass: earlier ones cannot know of it."""
    message = f"Cached has 9 queries, none at position {query}"
    with pytest.raises(CaptureError, match=message):
        captured(Cached(), torch.randn(1, 9, 8), [8, 1], query=query)


def test_padded_queries_of_every_pass_are_left_out():
    x, model = torch.randn(1, 6, 8), Cached()
    padding = torch.tensor([[False, True, False, False, True, False]])
    found = captured(model, x, [4, 2], padding=padding, maps=[0])
    weights = truth(model, x)[0]
    received = weights[:, :, ~padding[0]].sum(2) / (~causal(6))[~padding[0]].sum(0)
    torch.testing.assert_close(found.received, received, **CLOSE)


def test_maps_of_several_passes_stay_small():
    x, model = torch.randn(1, 103, 8), Cached()
    found = captured(model, x, [100, 1, 2], maps=[0], map_size=16)
    assert found.maps.shape[2] <= 16 + 3
    assert found.map_rows[-3:].tolist() == found.map_cols[-3:].tolist() == [100, 101, 102]
    check_pooled(found, truth(model, x)[0][0].masked_fill(causal(103), torch.nan))


@pytest.mark.parametrize(("shape", "forbidden"), [
    ((2, 5, 3, 51), ALL_SEEN),  # atoms of a distribution of returns
    ((2, 5, 4, 6), torch.tensor([False] * 5 + [True])),  # actions, some not allowed
    ((2, 4, 6, 3), ALL_SEEN),  # experts
    ((2, 3, 4, 6), causal(6)[:4]),  # beyond what any query sees
    ((2, 3, 1, 6), ALL_SEEN),
])  # fmt: skip
def test_a_softmax_that_is_not_square_is_no_attention_unless_its_mask_tells(shape, forbidden):
    model = Given(lambda scores: scores.masked_fill(forbidden, -torch.inf).softmax(-1))
    refused("found no", model, torch.randn(shape))


@pytest.mark.parametrize("low", [-1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("fused", [True, False])
def test_memory_keys_are_told_where_a_sample_begins_with_padding(low, fused):
    allowed = torch.ones(2, 1, 3, 4, dtype=torch.bool).tril(1)
    allowed[0, 0, 0] = False  # it is padding, and sees nothing
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, low)
    q, k = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 4, 4)
    written = Given(lambda q, k: (q @ k.mT / 2 + mask).softmax(-1) @ k)
    inputs = (q, k, k) if fused else (q, k)
    (found,) = run_twice(Attend(attn_mask=mask) if fused else written, *inputs)
    assert (found.query_rows.shape[2], found.extra.shape) == (3, (2, 1))


def test_a_softmax_of_whole_numbers_is_no_attention():
    model = Given(functional.softmax, dim=-1, dtype=torch.float32)
    refused("found no", model, torch.ones(2, 2, 3, 5, dtype=torch.int64))


def test_cross_attention_keeps_all_its_keys():
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 7, 4)
    for mask in (None, (torch.arange(7) < 5).expand(3, 7), torch.ones(3, 7).tril() > 0):
        (found,) = run_twice(Attend(attn_mask=mask), q, k, k)
        forbidden = ALL_SEEN if mask is None else ~mask
        check(found, weights_of(q, k, forbidden), forbidden)
        assert found.extra is None
