"""Several passes that read on count as one; keys that are no tokens are kept apart."""

import pytest
import torch
from eager import CLOSE, causal, eager_weights, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from historylens.capture import CaptureError, capture

N_HEADS = 2


class Cached(nn.Module):
    """Causal attention that keeps its keys, and some keys of its own before and behind them."""

    def __init__(self, way="sdpa", before=0, behind=0, hides=-1e9):
        super().__init__()
        self.way, self.before, self.behind, self.hides = way, before, behind, hides
        self.own = nn.Parameter(torch.randn(before + behind, 8))
        self.past = []

    def keys(self, x):
        own = self.own.expand(len(x), -1, -1)
        x = torch.cat([own[:, : self.before], x, own[:, self.before :]], dim=1)
        return x.unflatten(-1, (N_HEADS, -1)).transpose(1, 2)

    def forward(self, x):
        start = sum(part.shape[1] for part in self.past)
        self.past.append(x)
        q, k = x.unflatten(-1, (N_HEADS, -1)).transpose(1, 2), self.keys(torch.cat(self.past, 1))
        n_queries, n_keys = q.shape[2], k.shape[2]
        forbidden = torch.ones(n_queries, n_keys - self.before - self.behind, dtype=torch.bool)
        forbidden = functional.pad(forbidden.triu(1 + start), (self.before, self.behind))
        if self.way == "sdpa":
            mask = None if not forbidden.any() else ~forbidden
            return functional.scaled_dot_product_attention(q, k, k, mask)
        scores = (q @ k.mT / 2).masked_fill(forbidden, self.hides)
        return scores.softmax(-1) @ k


def truth(model, x):
    """Weights (B, H, T, T) on the tokens, and (B, H, T) on other keys."""
    n_tokens, k = x.shape[1], model.keys(x)
    forbidden = functional.pad(causal(n_tokens), (model.before, model.behind))
    weights = eager_weights(x.unflatten(-1, (N_HEADS, -1)).transpose(1, 2), k, forbidden)
    on_tokens = weights[..., model.before : model.before + n_tokens]
    return on_tokens, 1 - on_tokens.sum(-1)


def compare(found, weights, extra, query=-1):
    n_tokens = weights.shape[-1]
    torch.testing.assert_close(found.query_rows, weights[:, :, query], **CLOSE)
    assert torch.equal(found.visible[0], ~causal(n_tokens)[query])
    received = weights.sum(2) / torch.arange(n_tokens, 0, -1)
    torch.testing.assert_close(found.received, received, **CLOSE)
    whole = weights[:1].masked_fill(causal(n_tokens), torch.nan)
    torch.testing.assert_close(found.maps, whole, **CLOSE)
    assert found.map_rows.tolist() == found.map_cols.tolist() == list(range(n_tokens))
    if extra is None:
        assert found.extra is None
    else:
        torch.testing.assert_close(found.extra, extra[:, :, query], **CLOSE)


@settings(max_examples=60)
@given(
    chunks=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    way=st.sampled_from(["sdpa", "softmax"]),
    hides=st.sampled_from([-torch.inf, -1e9]),
    n_samples=st.integers(1, 2),
    data=st.data(),
)
def test_passes_that_read_on_are_one_attention_over_all_tokens(chunks, way, hides, n_samples, data):
    torch.manual_seed(0)
    n_tokens = sum(chunks)
    query = data.draw(st.sampled_from([-1, *range(n_tokens)]))
    x, model = torch.randn(n_samples, n_tokens, 8), Cached(way, hides=hides)
    with torch.no_grad(), capture(model, maps=[0], query=query) as record:
        for part in x.split(chunks, 1):
            model(part)
    assert record.names == ("Cached",)
    compare(record[0], truth(model, x)[0], None, query)


@settings(max_examples=60)
@given(
    before=st.integers(0, 4),
    behind=st.integers(0, 2),
    n_tokens=st.integers(2, 12),
    more=st.lists(st.integers(1, 3), max_size=2),
    way=st.sampled_from(["sdpa", "softmax"]),
    hides=st.sampled_from([-torch.inf, -1e9, torch.finfo(torch.float32).min]),
)
def test_keys_of_no_token_are_kept_apart(before, behind, n_tokens, more, way, hides):
    """Memory before the tokens, sinks behind them, in one pass or several."""
    torch.manual_seed(0)
    x, model = torch.randn(2, n_tokens + sum(more), 8), Cached(way, before, behind, hides)
    with torch.no_grad(), capture(model, maps=[0]) as record:
        for part in x.split([n_tokens, *more], 1):
            model(part)
    weights, extra = truth(model, x)
    compare(record[0], weights, extra if before + behind else None)


def test_queries_of_samples_lie_in_different_passes():
    x, model = torch.randn(3, 9, 8), Cached()
    query = torch.tensor([1, 6, 8])
    with torch.no_grad(), capture(model, query=query) as record:
        for part in x.split([4, 4, 1], 1):
            model(part)
    expected = truth(model, x)[0][torch.arange(3), :, query]
    torch.testing.assert_close(record[0].query_rows, expected, **CLOSE)
    assert record[0].visible.sum(1).tolist() == [2, 7, 9]


@pytest.mark.parametrize("query", [9, -2, -10])
def test_a_query_that_is_in_no_pass_is_an_error(query):
    """One counted from the end must be in the last pass: earlier ones cannot know of it."""
    x, model = torch.randn(1, 9, 8), Cached()
    message = f"Cached has 9 queries, none at position {query}"
    with pytest.raises(CaptureError, match=message), capture(model, query=query):  # noqa: PT012
        for part in x.split([8, 1], 1):
            model(part)


def test_padded_queries_of_every_pass_are_left_out():
    x, model = torch.randn(1, 6, 8), Cached()
    padding = torch.tensor([[False, True, False, False, True, False]])
    with torch.no_grad(), capture(model, padding=padding) as record:
        for part in x.split([4, 2], 1):
            model(part)
    weights, real = truth(model, x)[0], ~padding[0]
    expected = weights[:, :, real].sum(2) / (~causal(6))[real].sum(0)
    torch.testing.assert_close(record[0].received, expected, **CLOSE)
    model.past.clear()
    wrong = torch.zeros(1, 7, dtype=torch.bool)
    refused(r"padding of shape \(1, 6\), got \(1, 7\)", model, x, padding=wrong)


def test_maps_of_several_passes_stay_small():
    x, model = torch.randn(1, 103, 8), Cached()
    with torch.no_grad(), capture(model, maps=[0], map_size=16) as record:
        for part in x.split([100, 1, 2], 1):
            model(part)
    found, weights = record[0], truth(model, x)[0][0]
    assert found.maps.shape[2] <= 16 + 3
    assert found.map_rows[-3:].tolist() == found.map_cols[-3:].tolist() == [100, 101, 102]
    ends = [*found.map_cols[1:].tolist(), 103]
    for c, (start, end) in enumerate(zip(found.map_cols.tolist(), ends, strict=True)):
        seen = (~causal(103))[found.map_rows, start:end].sum(-1)
        expected = weights[:, found.map_rows, start:end].sum(-1) / seen
        torch.testing.assert_close(found.maps[0, :, :, c], expected, **CLOSE)


@pytest.mark.parametrize("again", [9, 3])
def test_a_pass_that_does_not_read_on_is_still_an_error(again):
    x, model = torch.randn(1, 9, 8), Cached()
    with pytest.raises(CaptureError, match="Cached ran twice"), capture(model):  # noqa: PT012
        model(x)
        model.past.clear()
        model(x[:, :again])


class Softmax(nn.Module):
    def __init__(self, forbidden=None):
        super().__init__()
        self.forbidden = forbidden

    def forward(self, scores):
        if self.forbidden is not None:
            scores = scores.masked_fill(self.forbidden, -torch.inf)
        return scores.softmax(-1)


@pytest.mark.parametrize(
    ("shape", "forbidden"),
    [
        ((2, 5, 3, 51), None),  # atoms of a distribution of returns
        ((2, 5, 4, 6), torch.tensor([False] * 5 + [True])),  # actions, some not allowed
        ((2, 4, 6, 3), None),  # experts
        ((2, 3, 4, 6), causal(6)[:4]),  # beyond what any query sees
        ((2, 3, 1, 6), None),
    ],
)
def test_a_softmax_that_is_not_square_is_no_attention_unless_its_mask_tells(shape, forbidden):
    refused("found no", Softmax(forbidden), torch.randn(shape))


def test_cross_attention_keeps_all_its_keys():
    class Cross(nn.Module):
        def forward(self, q, k, mask=None):
            return functional.scaled_dot_product_attention(q, k, k, mask)

    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 7, 4)
    for mask in (None, (torch.arange(7) < 5).expand(3, 7), torch.ones(3, 7).tril() > 0):
        model = Cross()
        with torch.no_grad(), capture(model) as record:
            model(q, k, mask)
        forbidden = torch.zeros(3, 7, dtype=torch.bool) if mask is None else ~mask
        expected = eager_weights(q, k, forbidden)[:, :, -1]
        torch.testing.assert_close(record[0].query_rows, expected, **CLOSE)
        assert record[0].extra is None


def test_gpt_oss_and_generation_with_a_cache():
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, head_dim=4,
        num_key_value_heads=2, intermediate_size=16, num_local_experts=2, num_experts_per_tok=1,
        sliding_window=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.set_attn_implementation("eager")
    ids = torch.arange(18).view(2, 9) % 7
    with torch.no_grad():
        with capture(model, maps=[0]) as record:
            kept = transformers.DynamicCache(config=config)  # some layers drop old keys
            for part in ids.split([2, 6, 1], 1):
                model(part, past_key_values=kept, use_cache=True)
        eager = model(ids, output_attentions=True).attentions
    assert len(record) == 2
    for found, weights in zip(record, eager, strict=True):
        torch.testing.assert_close(found.query_rows, weights[:, :, -1], atol=1e-5, rtol=0)
        torch.testing.assert_close(found.extra, 1 - weights[:, :, -1].sum(-1), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.maps[0].nan_to_num(), weights[0], atol=1e-5, rtol=0)
