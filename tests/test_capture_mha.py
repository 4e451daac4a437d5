"""Attention of PyTorch's own modules: equal to eager weights, the model unchanged to the bit."""

import pytest
import torch
from eager import (
    CLOSE,
    CONTEXTS,
    causal,
    check,
    fast_path,
    projected_weights,
    random_weights,
    refused,
    run_twice,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from historylens.capture import capture

ALL_SEEN = torch.zeros(1, dtype=torch.bool)


class Given(nn.Module):
    """Calls a module with further arguments."""

    def __init__(self, inner, **kwargs):
        super().__init__()
        self.inner, self.kwargs = inner, kwargs

    def forward(self, *tensors):
        return self.inner(*tensors, **self.kwargs)


@settings(max_examples=40)
@given(
    n_samples=st.integers(1, 3),
    n_queries=st.integers(1, 9),
    n_keys=st.sampled_from([None, 1, 4, 9]),
    n_heads=st.sampled_from([1, 2, 4]),
    batch_first=st.booleans(),
    bias=st.booleans(),
    widths=st.sampled_from([(None, None), (6, None), (6, 10)]),
    mask=st.sampled_from([None, "bool", "float", "bool each", "float each", "causal"]),
    padding=st.sampled_from([None, "bool", "float"]),
    need_weights=st.booleans(),
    training=st.booleans(),
    context=st.sampled_from(CONTEXTS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_multi_head_attention_alone(
    n_samples, n_queries, n_keys, n_heads, batch_first, bias, widths, mask, padding, need_weights,
    training, context, dtype, seed,
):  # fmt: skip
    """With `n_keys` None, and one width, self-attention on one and the same tensor."""
    options = {"batch_first": batch_first, "bias": bias, "dtype": dtype, "dropout": 0.2}
    attention = nn.MultiheadAttention(8, n_heads, kdim=widths[0], vdim=widths[1], **options)
    random_weights(attention, seed).train(training)
    is_self = n_keys is None and widths == (None, None)
    n_keys = n_keys or n_queries
    query = torch.randn(n_samples, n_queries, 8, dtype=dtype)
    key = query if is_self else torch.randn(n_samples, n_keys, widths[0] or 8, dtype=dtype)
    value = torch.randn(n_samples, n_keys, widths[1] or 8, dtype=dtype)
    value = key if widths == (None, None) else value
    each = (n_samples * n_heads,) if mask and "each" in mask else ()
    forbidden = torch.rand(*each, n_queries, n_keys) < 0.3
    forbidden[..., 0] = False  # PyTorch gives NaN for a query that sees nothing
    kwargs = {"need_weights": need_weights}
    added = torch.zeros(n_samples, n_heads, n_queries, n_keys)
    if mask is None:
        forbidden = torch.zeros(n_queries, n_keys, dtype=torch.bool)
    elif mask == "causal":
        forbidden = torch.ones(n_queries, n_keys, dtype=torch.bool).triu(1)
        kwargs |= {"attn_mask": forbidden, "is_causal": True}
    elif "bool" in mask:
        kwargs["attn_mask"] = forbidden
    else:
        finite = torch.randn(forbidden.shape, dtype=dtype)
        kwargs["attn_mask"] = finite.masked_fill(forbidden, -torch.inf)
        added += finite.unflatten(0, (n_samples, n_heads)) if each else finite
    if each:
        forbidden = forbidden.unflatten(0, (n_samples, n_heads))
    forbidden = forbidden.expand(added.shape)
    padded = torch.zeros(n_samples, n_keys, dtype=torch.bool)
    if padding:
        padded[:, 1:] = torch.rand(n_samples, n_keys - 1) < 0.4
        kwargs["key_padding_mask"] = padded
        if padding == "float":
            zeros = torch.zeros(padded.shape, dtype=dtype)
            kwargs["key_padding_mask"] = zeros.masked_fill(padded, -torch.inf)
        forbidden = forbidden | padded[:, None, None, :]
    tensors = [query, key, value]
    if not batch_first:
        moved = {id(x): x.transpose(0, 1) for x in tensors}
        tensors = [moved[id(x)] for x in tensors]
    record = run_twice(Given(attention, **kwargs), *tensors, context=context)
    assert record.names == ("inner",)
    weights = projected_weights(attention, query, key, forbidden, added)
    check(record[0], weights, forbidden, padded if is_self and padding else None)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padding", [None, torch.tensor([[True] + [False] * 4])])
def test_a_causal_hint_beside_another_mask_counts_where_pytorch_follows_it(need_weights, padding):
    attention = random_weights(nn.MultiheadAttention(8, 2, batch_first=True))
    x, far = torch.randn(1, 5, 8), causal(5).T  # no key before the query
    options = {"attn_mask": far, "key_padding_mask": padding, "need_weights": need_weights}
    found = run_twice(Given(attention, is_causal=True, **options), x, x, x, query=2)[0]
    followed = causal(5) if padding is None and not need_weights else far
    forbidden = followed if padding is None else followed | padding
    weights = projected_weights(attention, x, x, forbidden)
    torch.testing.assert_close(found.query_rows, weights[:, :, 2], **CLOSE)
    assert torch.equal(found.visible[0], ~forbidden[2])


@pytest.mark.parametrize("batch_first", [True, False])
def test_queries_and_keys_may_be_one_tensor_and_the_values_another(batch_first):
    """Then padded queries are known too, though the module transposes each by itself."""
    attention = random_weights(nn.MultiheadAttention(8, 2, batch_first=batch_first))
    x, values = torch.randn(2, 2, 5, 8).unbind()
    padded = torch.arange(5) >= torch.tensor([5, 3])[:, None]
    q, v = (x, values) if batch_first else (x.transpose(0, 1), values.transpose(0, 1))
    record = run_twice(Given(attention, key_padding_mask=padded), q, q, v)
    forbidden = padded[:, None, None, :].expand(2, 2, 5, 5)
    check(record[0], projected_weights(attention, x, x, forbidden), forbidden, padded)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor"
)
def test_encoder_layers_with_a_padding_mask(enabled, nested, norm_first, masked):
    """Whatever path PyTorch would take, nested tensors too; the query may be padding itself."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
    encoder = random_weights(nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested))
    x, padded = torch.randn(3, 7, 16), torch.arange(7) >= torch.tensor([6, 4, 2])[:, None]
    mask = causal(7) if masked else None
    with fast_path(enabled):
        record = run_twice(encoder, x, mask, padded, maps=[0, 1])
        with torch.no_grad():
            plain = encoder(x, mask, padded)
            with capture(encoder):
                captured = encoder(x, mask, padded)
    real = ~padded[:, : plain.shape[1]]
    torch.testing.assert_close(captured[:, : plain.shape[1]][real], plain[real], atol=1e-5, rtol=0)
    forbidden = padded[:, None, None, :].expand(3, 4, 7, 7)
    forbidden = forbidden | mask if masked else forbidden
    first = encoder.layers[0]
    inside = first.norm1(x) if norm_first else x
    weights = projected_weights(first.self_attn, inside, inside, forbidden)
    check(record[0], weights, forbidden, padded)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_an_error():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(2, 16)])
    message = "^{} was called with nested tensors, .*padding mask"
    refused(message.format("TransformerEncoderLayer"), layer, nested)
    refused(message.format("inner"), Given(layer.self_attn), nested, nested, nested)


@pytest.mark.parametrize("context", CONTEXTS)
def test_decoder_layers_have_self_and_cross_attention(context):
    layer = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)
    decoder = random_weights(nn.TransformerDecoder(layer, 2))
    target, memory = torch.randn(2, 5, 16), torch.randn(2, 8, 16)
    padded = torch.arange(8) >= torch.tensor([8, 3])[:, None]
    model = Given(decoder, tgt_mask=causal(5), memory_key_padding_mask=padded)
    record = run_twice(model, target, memory, context=context)
    ends = ("self_attn", "multihead_attn")
    assert record.names == tuple(f"inner.layers.{i}.{end}" for i in range(2) for end in ends)
    first = decoder.layers[0]
    check(record[0], projected_weights(first.self_attn, target, target, causal(5)), causal(5))
    query = first.norm1(target + first.self_attn(target, target, target, attn_mask=causal(5))[0])
    hidden = padded[:, None, None, :]
    check(record[1], projected_weights(first.multihead_attn, query, memory, hidden), hidden)
    assert record[1].map_rows.tolist() == list(range(5))


def test_a_whole_transformer_in_the_order_in_which_it_runs():
    model = random_weights(nn.Transformer(16, 4, 1, 1, 32, batch_first=True))
    record = run_twice(model, torch.randn(1, 6, 16), torch.randn(1, 3, 16))
    ends = ("encoder.layers.0", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn")
    assert record.names == ends
    assert [layer.query_rows.shape[-1] for layer in record] == [6, 3, 6]


@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched_input(batch_first):
    attention = random_weights(nn.MultiheadAttention(8, 2, batch_first=batch_first))
    query, key = torch.randn(4, 8), torch.randn(6, 8)
    padded = torch.tensor([False] * 5 + [True])
    record = run_twice(Given(attention, key_padding_mask=padded), query, key, key)
    forbidden = padded.expand(1, 2, 4, 6)
    weights = projected_weights(attention, query[None], key[None], forbidden)
    check(record[0], weights, forbidden)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types_and_autocast_do_not_reach_the_statistics(dtype):
    attention = random_weights(nn.MultiheadAttention(8, 2, batch_first=True)).to(dtype)
    x = torch.randn(2, 6, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        record = run_twice(Given(attention, need_weights=False), x, x, x)
    check(record[0], projected_weights(attention, x, x), ALL_SEEN)


class Pooling(nn.Module):
    """Calls the functional form."""

    def __init__(self, **options):
        super().__init__()
        self.attention = random_weights(nn.MultiheadAttention(8, 2))
        self.options = options

    def forward(self, x):
        part = self.attention
        weights = part.in_proj_weight, part.in_proj_bias, None, None, False, 0.0
        out = part.out_proj.weight, part.out_proj.bias
        attend = functional.multi_head_attention_forward
        return attend(x[:1], x, x, 8, 2, *weights, *out, **self.options)[0]


def test_a_call_of_the_functional_form():
    model, x = Pooling(), torch.randn(5, 3, 8)
    record = run_twice(model, x, layers=["Pooling"])
    batch = x.transpose(0, 1)
    weights = projected_weights(model.attention, batch[:, :1], batch)
    check(record[0], weights, ALL_SEEN)


class OwnForward(nn.TransformerEncoderLayer):
    """A forward of one's own that leaves PyTorch's aside."""

    def forward(self, src, **_):
        return src + self.self_attn(src, src, src)[0]


class AroundForward(nn.TransformerEncoderLayer):
    def forward(self, src, **kwargs):
        return super().forward(src, **kwargs)


class AroundBlock(nn.TransformerEncoderLayer):
    def _sa_block(self, *args, **kwargs):
        return super()._sa_block(*args, **kwargs)


class AroundAttention(nn.MultiheadAttention):
    def forward(self, query, key=None, value=None, **kwargs):
        return super().forward(query, query, query, **kwargs)


def with_own_attention():
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    layer.self_attn = AroundAttention(8, 2, batch_first=True)
    return layer


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (OwnForward(8, 2, batch_first=True), "self_attn"),
        (AroundForward(8, 2, batch_first=True), "self_attn"),
        (AroundBlock(8, 2, batch_first=True), "AroundBlock"),
        (AroundAttention(8, 2, batch_first=True), "AroundAttention"),
        (with_own_attention(), "TransformerEncoderLayer"),
    ],
)
def test_subclasses_are_seen_through_the_calls_that_they_make(model, name):
    x = torch.randn(2, 4, 8)
    record = run_twice(random_weights(model), x)
    assert record.names == (name,)
    attention = model if isinstance(model, nn.MultiheadAttention) else model.self_attn
    check(record[0], projected_weights(attention, x, x), ALL_SEEN)


def test_the_attention_inside_an_encoder_layer_may_be_given_alone():
    layer = random_weights(nn.TransformerEncoderLayer(8, 2, batch_first=True))
    with torch.no_grad(), capture([layer.self_attn], maps=[0]) as record:
        layer(x := torch.randn(1, 3, 8))
    assert record.names == ("layer 0",)
    check(record[0], projected_weights(layer.self_attn, x, x), ALL_SEEN)


@pytest.mark.parametrize("adds", ["add_bias_kv", "add_zero_attn"])
def test_keys_that_are_no_tokens_are_an_error(adds):
    x = torch.randn(5, 3, 8)
    attention = nn.MultiheadAttention(8, 2, **{adds: True})
    refused("^inner adds keys of its own .*layers=", Given(attention), x, x, x)
    fixed = Pooling(static_k=torch.zeros(6, 5, 4))
    refused("^Pooling passes static_k .*layers=", fixed, x)
