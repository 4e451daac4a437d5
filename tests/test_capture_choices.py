"""Which layers, which query, what is padding: what `capture` can be told, and what it refuses."""

import pytest
import torch
from eager import CLOSE, Attend, Given, attend_by_heads, causal, check, check_pooled, refused
from eager import eager_weights as weights_of
from eager import run_twice as run
from eager import split_heads as split
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from historylens.capture import CaptureError, capture


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


@given(
    n_samples=st.integers(1, 4), n_tokens=st.integers(1, 12), data=st.data(),
    kind=st.sampled_from(["sdpa", "causal", "each", "softmax", "attention"]),
)  # fmt: skip
def test_the_query_may_stand_anywhere(n_samples, n_tokens, kind, data):
    positions = st.integers(-n_tokens, n_tokens - 1)
    one_each = st.lists(positions, min_size=n_samples, max_size=n_samples).map(torch.tensor)
    query = data.draw(positions | one_each)
    torch.manual_seed(0)
    x = torch.randn(n_samples, n_tokens, 8)
    allowed = ~causal(n_tokens)
    if kind == "each":
        allowed = torch.rand(n_samples, 1, n_tokens, n_tokens) < 0.6
        allowed |= torch.eye(n_tokens, dtype=torch.bool)
    if kind == "attention":
        attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True).eval()
        attention.in_proj_weight.data = torch.eye(8).repeat(3, 1)
        options = {"attn_mask": ~allowed, "is_causal": True, "need_weights": False}
        record = run(Given(attention, **options), x, x, x, query=query)
    elif kind == "softmax":
        record = run(Given(attend_by_softmax), x, allowed, query=query)
    else:
        allowed = None if kind == "sdpa" else allowed
        record = run(Stack(1), x, allowed, query=query)
    forbidden = causal(1) if allowed is None else ~allowed
    check(record[0], whole(x, allowed), forbidden, query=query)


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


def test_maps_of_long_contexts_are_pooled_and_bounded_on_both_axes():
    q, k = torch.randn(2, 2, 90, 4), torch.randn(2, 2, 30, 4)
    found = run(Attend(), q, k, k, maps=[1], map_size=20)[0]
    assert found.maps.shape[2:] == (len(found.map_rows), len(found.map_cols))
    assert max(found.maps.shape[2:]) <= 20
    check_pooled(found, weights_of(q, k)[1])


def test_maps_of_several_samples_are_those_of_each_in_the_order_asked_for():
    q, k = torch.randn(4, 4, 9, 8), torch.randn(4, 2, 9, 8)
    options = {"is_causal": True, "enable_gqa": True}
    together = run(Attend(**options), q, k, k, maps=[1, 3, 0])[0].maps
    for i, sample in enumerate((1, 3, 0)):
        alone = run(Attend(**options), q, k, k, maps=[sample])[0].maps
        torch.testing.assert_close(together[i : i + 1], alone, equal_nan=True)
