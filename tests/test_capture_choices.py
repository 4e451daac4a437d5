"""Which layers, queries, passes and keys count, what is padding, and what capture refuses."""

import pytest
import torch
from eager import CLOSE, LOW, Attend, Given, attend_by_heads, causal, check, check_pooled, refused
from eager import eager_weights as weights_of
from eager import run_twice as run
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
    hides=st.sampled_from(LOW), is_padded=st.booleans(),
)  # fmt: skip
def test_passes_that_read_on_are_one_attention_over_all_tokens_and_keys_of_no_token_are_kept_apart(
    before, behind, data, first, more, way, n_samples, hides, is_padded
):
    torch.manual_seed(0)
    n_extra, chunks = before + behind, [first, *more]
    assume(first > 1 or not n_extra)  # one query does not tell
    places = st.integers(0, sum(chunks) - 1)
    one_each = st.lists(places, min_size=n_samples, max_size=n_samples).map(torch.tensor)
    query = data.draw(st.just(-1) | places | one_each)
    x, model = torch.randn(n_samples, sum(chunks), 8), Cached(way, before, behind, hides)
    padding = torch.rand(x.shape[:2]) < 0.3 if is_padded else None
    found = captured(model, x, chunks, maps=[0], query=query, padding=padding)
    weights, extra = truth(model, x)
    check(found, weights, causal(sum(chunks)), padding, query)
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
    (found,) = run(Attend(attn_mask=mask) if fused else written, *inputs)
    assert (found.query_rows.shape[2], found.extra.shape) == (3, (2, 1))


def test_cross_attention_keeps_all_its_keys():
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 7, 4)
    for mask in (None, (torch.arange(7) < 5).expand(3, 7), torch.ones(3, 7).tril() > 0):
        (found,) = run(Attend(attn_mask=mask), q, k, k)
        forbidden = ALL_SEEN if mask is None else ~mask
        check(found, weights_of(q, k, forbidden), forbidden)
        assert found.extra is None


def attend_by_softmax(x, allowed):
    scores = split(x) @ split(x).mT / 2
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1)


class Stack(nn.Module):
    """Blocks that attend, each within a block, with a mask that they share."""

    def __init__(self, n_blocks=3):
        super().__init__()
        blocks = (nn.ModuleDict({"attn": Given(attend_by_heads)}) for _ in range(n_blocks))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x, *allowed):
        for block in self.blocks:
            x = x + block["attn"](x, *allowed)
        return x


def whole(x, allowed=None):
    """Weights (B, 2, T, T) of the first block."""
    return weights_of(split(x), split(x), None if allowed is None else ~allowed)


def test_padding_leaves_its_queries_out_but_for_those_of_cross_attention():
    x, padding = torch.randn(2, 5, 8), torch.arange(5) >= torch.tensor([5, 3])[:, None]
    allowed = (~padding)[:, None, None, :].expand(2, 1, 5, 5)
    record = run(Stack(), x, allowed, padding=padding, maps=[0, 1])
    check(record[0], whole(x, allowed), ~allowed, padding)
    q, k = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 5, 4)
    record = run(Attend(), q, k, k, padding=padding)
    torch.testing.assert_close(record[0].received, weights_of(q, k).mean(2), **CLOSE)


@pytest.mark.parametrize(("layers", "numbers"), [
    (None, [0, 1, 2]),
    (["blocks.1"], [1]),
    (["*.2.*", 0], [0, 2]),
    ("blocks.0.attn", [0]),
    (1, [1]),
])  # fmt: skip
def test_layers_are_chosen_by_name_or_number(layers, numbers):
    record = run(Stack(), torch.randn(1, 4, 8), layers=layers)
    assert record.names == tuple(f"blocks.{i}.attn" for i in numbers)
    assert tuple(layer.name for layer in record) == record.names


def test_layers_given_one_by_one_keep_their_order_and_others_need_not_run():
    """A layer within another that is given goes by the name of that one."""
    model, x = Stack(), torch.randn(1, 4, 8)
    last, inner = model.blocks[2], model.blocks[0]["attn"]
    with torch.no_grad(), capture([last, inner]) as record, capture([model, inner]) as within:
        model(x)
    assert record.names == ("layer 0.attn", "layer 1")
    torch.testing.assert_close(record[1].query_rows, whole(x)[:, :, -1], **CLOSE)
    assert within.names == tuple(f"layer 0.blocks.{i}.attn" for i in range(3))
    unused = nn.Sequential(model, nn.MultiheadAttention(8, 2))
    unused.forward = model.forward
    assert run(unused, x, layers=["0"]).names == tuple(f"0.blocks.{i}.attn" for i in range(3))


def test_an_encoder_layer_is_chosen_by_its_own_name_or_its_attention_is_given():
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x = torch.randn(1, 4, 8)
    assert run(encoder, x, layers=["layers.1"]).names == ("layers.1",)
    last = encoder.layers[2]
    with torch.no_grad(), capture([last]) as record, capture([last.self_attn]) as inner:
        encoder(x)
    assert record.names == inner.names == ("layer 0",)
    assert torch.equal(record[0].query_rows, inner[0].query_rows)
    name = "layers.1.self_attn"
    refused(rf"layers=\['{name}'\]; layers that ran: layers\.0, ", encoder, x, layers=[name])


@pytest.mark.parametrize(("options", "message"), [
    ({"query": 4}, r"blocks\.0\.attn has 4 queries, none at position 4; .*layers="),
    ({"query": -5}, "none at position -5"),
    ({"query": torch.tensor([0])}, r"blocks\.0\.attn: expected one query a sample \(2\), got 1"),
    ({"query": torch.tensor([0, 9])}, r"none at positions \[0, 9\]"),
    ({"query": torch.tensor([0.0, 1.0])}, r"whole numbers \(B,\).*float32 \(2,\)"),
    ({"query": torch.tensor(1)}, r"got torch\.int64 \(\)"),
    ({"padding": torch.zeros(2, 3, dtype=torch.bool)}, r"padding of shape \(2, 4\), got"),
    ({"padding": torch.zeros(2, 5) > 0}, r"padding of shape \(2, 4\), got \(2, 5\)"),
    ({"padding": torch.zeros(2, 4)}, r"bool padding \(B, T\).*float32"),
    ({"maps": [2]}, r"expected numbers in 0\.\.1"),
    ({"map_size": 7}, "map_size of at least 8, got 7"),
    ({"layers": [-1]}, r"by number from 0 .*got \[-1\]"),
    ({"layers": []}, r"got \[\]"),
    ({"layers": ["blocks.7"]}, r"layers=\['blocks\.7'\]; layers that ran: blocks\.0\.attn, "),
    ({"layers": [3]}, r"layers=\[3\]; layers that ran: blocks\.0\.attn, "),
])  # fmt: skip
def test_what_does_not_fit_is_an_error(options, message):
    refused(message, Stack(), torch.randn(2, 4, 8), **options)


def test_a_query_that_sees_nothing_is_an_error_with_a_way_out():
    x, allowed = torch.randn(1, 4, 8), torch.ones(4, 4, dtype=torch.bool)
    allowed[3] = False
    message = r"blocks\.0\.attn: .*see nothing .*capture\(model, query="
    refused(message, Stack(1), x, allowed)
    assert run(Stack(1), x, allowed, query=2).names == ("blocks.0.attn",)
    refused("see nothing", Given(attend_by_softmax), x, allowed)
    encoder = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    refused("see nothing", encoder, x, torch.zeros(4, 4).masked_fill(~allowed, -torch.inf))


@pytest.mark.parametrize("is_fused", [True, False])
def test_a_row_that_is_masked_altogether_attends_evenly_and_sees_all(is_fused):
    q, mask = torch.randn(1, 2, 5, 4), torch.zeros(5, 5).masked_fill(causal(5), -1e9)
    mask[2] = -1e9
    written = Given(lambda q, *_: (q @ q.mT + mask).softmax(-1))
    (found,) = run(Attend(attn_mask=mask) if is_fused else written, q, q, q, query=2)
    assert found.visible.all()
    torch.testing.assert_close(found.query_rows, torch.full((1, 2, 5), 0.2), **CLOSE)
    assert found.maps[0].isnan().sum(-1)[0].tolist() == [4, 3, 0, 1, 0]


def test_three_axes_without_a_number_of_heads_that_fits_are_an_error():
    x = torch.randn(6, 3, 4)
    for n_heads in (None, 4):
        refused(r"^Given .*\(6, 3, 4\).*heads=H", Attend(), x, x, x, heads=n_heads)


@pytest.mark.parametrize("layers", [None, [0, "blocks.1"]])
def test_a_second_forward_is_an_error(layers):
    model, x = Stack(2), torch.randn(1, 3, 8)
    with torch.no_grad(), capture(model, layers=layers) as record:
        with pytest.raises(CaptureError, match="nothing is captured yet"):
            _ = record[0]
        model(x)
        with pytest.raises(CaptureError, match=r"0\.attn ran twice.*once per act\(\).*deepcopy"):
            model(x)
    assert record.names == ("blocks.0.attn", "blocks.1.attn")


@given(
    n_queries=st.integers(1, 300), n_keys=st.integers(1, 300) | st.none(), size=st.integers(8, 64),
    samples=st.permutations(range(3)), is_causal=st.booleans(),
)  # fmt: skip
def test_maps_of_long_contexts_are_pooled_and_bounded_on_both_axes(
    n_queries, n_keys, size, samples, is_causal
):
    """Of each sample in the order asked for; the first tokens have a column each."""
    n_keys, is_square = n_keys or n_queries, n_keys is None
    q, k = torch.randn(3, 4, n_queries, 4), torch.randn(3, 2, n_keys, 4)
    model = Attend(is_causal=is_causal, enable_gqa=True)
    (found,) = run(model, q, k, k, maps=samples[:2], map_size=size)
    rows, cols = found.map_rows, found.map_cols
    assert found.maps.shape[2:] == (len(rows), len(cols))
    assert max(len(rows), len(cols)) <= size
    assert (rows[-1], cols[-1]) == (n_queries - 1, n_keys - 1)
    n_first = min(n_keys, 1 + min(size // 4, 4))  # of which the last may begin a bin
    assert cols[:n_first].tolist() == [*range(n_first)]
    if is_square:  # a row is of the last token of its column
        assert rows[:-1].tolist() == [*(cols[1:] - 1)]
    forbidden = causal(n_queries, n_keys) & is_causal
    weights = weights_of(q, k, forbidden).masked_fill(forbidden, torch.nan)
    for i, sample in enumerate(samples[:2]):
        check_pooled(found, weights[sample], i)
