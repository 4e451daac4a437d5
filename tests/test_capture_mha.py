"""Attention of PyTorch's own modules: equal to eager weights, the model unchanged to the bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from attention.capture import CaptureError, capture

CONTEXTS = [torch.enable_grad, torch.no_grad, torch.inference_mode]
CLOSE = {"atol": 1e-6, "rtol": 0, "check_dtype": False, "equal_nan": True}


@pytest.fixture(autouse=True)
def _restore_fast_path():
    enabled = torch.backends.mha.get_fastpath_enabled()
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def eager_weights(attention, query, key, forbidden=None, added=None):
    """The plain twin: weights (B, H, Tq, Tk) from batch-first inputs, in float64."""
    if attention.in_proj_weight is None:
        weights = attention.q_proj_weight, attention.k_proj_weight
    else:
        weights = attention.in_proj_weight.chunk(3)[:2]
    biases = (None, None) if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)[:2]
    q, k = (
        functional.linear(x.double(), w.double(), None if b is None else b.double())
        .unflatten(-1, (attention.num_heads, -1))
        .transpose(1, 2)
        for x, w, b in zip((query, key), weights, biases, strict=True)
    )
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if added is not None:
        scores = scores + added.double()
    if forbidden is not None:
        scores = scores.masked_fill(forbidden, -torch.inf)
    return scores.softmax(-1).detach()


def means_received(weights, forbidden, padded=None):
    """Column means over the queries that are allowed and real."""
    counted = ~forbidden.expand(weights.shape)
    if padded is not None:
        counted = counted & ~padded[:, None, :, None]
    return (weights * counted).sum(2) / counted.sum(2)


def check(found, weights, forbidden, padded=None):
    n_samples = len(found.maps)
    torch.testing.assert_close(found.query_rows, weights[:, :, -1], **CLOSE)
    received = means_received(weights, forbidden, padded)
    torch.testing.assert_close(found.received, received, **CLOSE)
    maps = weights.masked_fill(forbidden, torch.nan)[:n_samples]
    torch.testing.assert_close(found.maps, maps, **CLOSE)


def hooks_of(model):
    own = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    module = torch.nn.modules.module
    own += [*module._global_forward_hooks, *module._global_forward_pre_hooks]
    return own + [None] * torch._C._len_torch_function_stack()


def random_weights(module, seed):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.eval()


@settings(max_examples=40, deadline=None)
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
    fast_path=st.booleans(),
    training=st.booleans(),
    context=st.sampled_from(CONTEXTS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_multi_head_attention_alone(
    n_samples, n_queries, n_keys, n_heads, batch_first, bias, widths, mask, padding, need_weights,
    fast_path, training, context, dtype, seed,
):  # fmt: skip
    """With `n_keys` None, and one width, self-attention on one and the same tensor."""
    torch.backends.mha.set_fastpath_enabled(fast_path)
    options = {"batch_first": batch_first, "bias": bias, "dtype": dtype, "dropout": 0.2}
    attention = nn.MultiheadAttention(8, n_heads, kdim=widths[0], vdim=widths[1], **options)
    random_weights(attention, seed).train(training)
    is_self = n_keys is None and widths == (None, None)
    n_keys = n_keys or n_queries
    query = torch.randn(n_samples, n_queries, 8, dtype=dtype)
    key = query if is_self else torch.randn(n_samples, n_keys, widths[0] or 8, dtype=dtype)
    value = (
        key if widths == (None, None) else torch.randn(n_samples, n_keys, widths[1] or 8).to(key)
    )
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
        float_mask = torch.randn(forbidden.shape, dtype=dtype).masked_fill(forbidden, -torch.inf)
        kwargs["attn_mask"] = float_mask
        finite = float_mask.masked_fill(forbidden, 0.0)
        added += finite.unflatten(0, (n_samples, n_heads)) if each else finite
    if each:
        forbidden = forbidden.unflatten(0, (n_samples, n_heads))
    forbidden = forbidden.expand(added.shape)
    padded = torch.zeros(n_samples, n_keys, dtype=torch.bool)
    if padding:
        padded[:, 1:] = torch.rand(n_samples, n_keys - 1) < 0.4
        kwargs["key_padding_mask"] = padded
        if padding == "float":
            kwargs["key_padding_mask"] = torch.zeros(padded.shape, dtype=dtype)
            kwargs["key_padding_mask"][padded] = -torch.inf
        forbidden = forbidden | padded[:, None, None, :]
    tensors = [query, key, value]
    if not batch_first:
        moved = {id(x): x.transpose(0, 1) for x in tensors}
        tensors = [moved[id(x)] for x in tensors]

    def run():
        torch.manual_seed(1)
        return attention(*tensors, **kwargs)[0]

    with context():
        plain = run()
        with capture(attention, maps=[0]) as record:
            captured = run()
    assert torch.equal(plain, captured)
    assert record.names == ("MultiheadAttention",)
    weights = eager_weights(attention, query, key, forbidden, added)
    check(record[0], weights, forbidden, padded if is_self and padding else None)


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_encoder_layers_with_a_padding_mask(fast_path, norm_first, masked):
    torch.backends.mha.set_fastpath_enabled(fast_path)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
    encoder = random_weights(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 0)
    x, padded = torch.randn(3, 7, 16), torch.arange(7) >= torch.tensor([7, 4, 2])[:, None]
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1) if masked else None
    options = {"mask": mask, "src_key_padding_mask": padded}
    with torch.no_grad():
        plain = encoder(x, **options)
        with capture(encoder, maps=[0, 1]) as record:
            captured = encoder(x, **options)
    assert torch.equal(plain, captured)
    forbidden = padded[:, None, None, :].expand(3, 1, 7, 7)
    forbidden = forbidden | mask if masked else forbidden
    first = encoder.layers[0]
    inside = first.norm1(x) if norm_first else x
    weights = eager_weights(first.self_attn, inside, inside, forbidden)
    check(record[0], weights, forbidden, padded)
    assert (record[0].query_rows[1, :, 4:] == 0).all()
    assert record[0].maps[1, :, :, 4:].isnan().all()


def test_nested_tensors_of_the_fast_path():
    """PyTorch's encoder turns a padded batch into a nested tensor: rows keep the batch's length."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    encoder = random_weights(nn.TransformerEncoder(layer, 2), 0)
    lengths = torch.tensor([6, 4, 2])
    x, padded = torch.randn(3, 7, 16), torch.arange(7) >= lengths[:, None]
    with torch.no_grad():
        plain = encoder(x, src_key_padding_mask=padded)
        with capture(encoder, query=lengths - 1) as record:
            captured = encoder(x, src_key_padding_mask=padded)
        after_first = encoder.layers[0](x, src_key_padding_mask=padded)
    assert torch.equal(plain, captured)
    forbidden = padded[:, None, None, :]
    for found, inside, layer in zip(record, (x, after_first), encoder.layers, strict=True):
        weights = eager_weights(layer.self_attn, inside, inside, forbidden)
        expected = weights[torch.arange(3), :, lengths - 1]
        torch.testing.assert_close(found.query_rows, expected, atol=2e-6, rtol=0, check_dtype=False)
        received = means_received(weights, forbidden, padded)
        torch.testing.assert_close(
            found.received, received, atol=2e-6, rtol=0, check_dtype=False, equal_nan=True
        )


def test_a_padded_query_of_a_nested_tensor_is_an_error():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    encoder = random_weights(nn.TransformerEncoder(layer, 1), 0)
    padded = torch.arange(5) >= torch.tensor([5, 3])[:, None]
    with (
        torch.no_grad(),
        pytest.raises(CaptureError, match=r"layers\.0: the query token .* padding"),
        capture(encoder),
    ):
        encoder(torch.randn(2, 5, 16), src_key_padding_mask=padded)
    assert not hooks_of(encoder)


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("training", [True, False])
def test_decoder_layers_have_self_and_cross_attention(fast_path, context, training):
    torch.backends.mha.set_fastpath_enabled(fast_path)
    layer = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True, dropout=0.1)
    decoder = random_weights(nn.TransformerDecoder(layer, 2), 0).train(training)
    target, memory = torch.randn(2, 5, 16), torch.randn(2, 8, 16)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    padded = torch.arange(8) >= torch.tensor([8, 3])[:, None]
    inputs = {}
    kept = decoder.layers[0].multihead_attn.register_forward_pre_hook(
        lambda _, args: inputs.update(query=args[0].detach().clone())
    )

    def run():
        torch.manual_seed(1)
        return decoder(target, memory, tgt_mask=causal, memory_key_padding_mask=padded)

    with context():
        plain = run()
        with capture(decoder, maps=[0]) as record:
            captured = run()
    kept.remove()
    assert torch.equal(plain, captured)
    ends = ("self_attn", "multihead_attn")
    assert record.names == tuple(f"layers.{i}.{end}" for i in range(2) for end in ends)
    first = decoder.layers[0]
    ahead = (causal == -torch.inf).expand(2, 4, 5, 5)
    check(record[0], eager_weights(first.self_attn, target, target, ahead), ahead)
    hidden = padded[:, None, None, :].expand(2, 4, 5, 8)
    check(record[1], eager_weights(first.multihead_attn, inputs["query"], memory, hidden), hidden)
    assert record[1].maps.shape == (1, 4, 5, 8)
    assert record[1].map_rows.tolist() == list(range(5))


def test_a_whole_transformer_in_the_order_in_which_it_runs():
    model = random_weights(nn.Transformer(16, 4, 1, 1, 32, batch_first=True), 0)
    with torch.no_grad(), capture(model, received=False) as record:
        model(torch.randn(1, 6, 16), torch.randn(1, 3, 16))
    ends = ("encoder.layers.0", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn")
    assert record.names == ends
    assert [layer.query_rows.shape[-1] for layer in record] == [6, 3, 6]


@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched_input(batch_first):
    attention = random_weights(nn.MultiheadAttention(8, 2, batch_first=batch_first), 0)
    query, key = torch.randn(4, 8), torch.randn(6, 8)
    padded = torch.tensor([False] * 5 + [True])
    with torch.no_grad(), capture(attention, maps=[0]) as record:
        attention(query, key, key, key_padding_mask=padded)
    forbidden = padded.expand(1, 2, 4, 6)
    check(record[0], eager_weights(attention, query[None], key[None], forbidden), forbidden)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_computed_in_float32(dtype):
    attention = random_weights(nn.MultiheadAttention(8, 2, batch_first=True), 0).to(dtype)
    x = torch.randn(2, 6, 8).to(dtype)
    with torch.no_grad(), capture(attention, maps=[0]) as record:
        attention(x, x, x, need_weights=False)
    check(record[0], eager_weights(attention, x, x), torch.zeros(2, 2, 6, 6, dtype=torch.bool))


def test_autocast_does_not_reach_the_statistics():
    attention = random_weights(nn.MultiheadAttention(8, 2, batch_first=True), 0)
    x = torch.randn(2, 6, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), capture(attention) as record:
        attention(x, x, x, need_weights=False)
    weights = eager_weights(attention, x, x)
    torch.testing.assert_close(record[0].query_rows, weights[:, :, -1], **CLOSE)
    torch.testing.assert_close(record[0].received, weights.mean(2), **CLOSE)


def test_a_call_of_the_functional_form():
    class Pooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = random_weights(nn.MultiheadAttention(8, 2), 0)

        def forward(self, x):
            part = self.attention
            weights = part.in_proj_weight, part.in_proj_bias, None, None, False, 0.0
            out = part.out_proj.weight, part.out_proj.bias
            return functional.multi_head_attention_forward(x[:1], x, x, 8, 2, *weights, *out)[0]

    model, x = Pooling(), torch.randn(5, 3, 8)
    with torch.no_grad():
        plain = model(x)
        with capture(model, maps=[0], layers=["Pooling"]) as record:
            captured = model(x)
    assert torch.equal(plain, captured)
    forbidden = torch.zeros(3, 2, 1, 5, dtype=torch.bool)
    batch = x.transpose(0, 1)
    check(record[0], eager_weights(model.attention, batch[:, :1], batch), forbidden)


def test_fast_paths_stay_on_inside_a_module_of_ones_own(monkeypatch):
    calls = []

    def spy(name):
        kernel = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a: calls.append(name) or kernel(*a))

    spy("_native_multi_head_attention")
    spy("_transformer_encoder_layer_fwd")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = self.layer(x)
            return self.attention(x, x, x, need_weights=False)[0]

    model = random_weights(Model(), 0)
    with torch.no_grad(), capture(model) as record:
        model(torch.randn(1, 5, 8))
    assert calls == ["_transformer_encoder_layer_fwd", "_native_multi_head_attention"]
    assert record.names == ("layer", "attention")


class OwnForward(nn.TransformerEncoderLayer):
    """A forward of one's own that leaves PyTorch's aside."""

    def forward(self, src, **_):
        return src + self.self_attn(src, src, src)[0]


class AroundForward(nn.TransformerEncoderLayer):
    def forward(self, src, **kwargs):
        return super().forward(src + 1, **kwargs)


class AroundAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)


def test_an_encoder_layer_with_a_forward_of_its_own_is_seen_through_its_attention():
    model, x = random_weights(OwnForward(8, 2, batch_first=True), 0), torch.randn(2, 4, 8)
    with torch.no_grad():
        plain = model(x)
        with capture(model) as record:
            captured = model(x)
    assert torch.equal(plain, captured)
    assert record.names == ("self_attn",)
    weights = eager_weights(model.self_attn, x, x)
    torch.testing.assert_close(record[0].query_rows, weights[:, :, -1], **CLOSE)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (AroundForward(8, 2), "AroundForward with its own forward"),
        (AroundAttention(8, 2), "AroundAttention with its own forward"),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), "adds keys of its own.*layers="),
        (nn.MultiheadAttention(8, 2, add_zero_attn=True), "adds keys of its own.*layers="),
    ],
)
def test_what_cannot_be_read_says_why_and_what_to_do(model, message):
    with pytest.raises(CaptureError, match=message), capture(model):
        pass
    assert not hooks_of(model)


def test_the_attention_inside_an_encoder_layer_is_refused():
    """A hook there would switch the layer's fast path off."""
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    with (
        torch.no_grad(),
        pytest.raises(CaptureError, match="give capture the encoder layer itself"),
        capture([layer.self_attn]),
    ):
        layer(torch.randn(1, 3, 8))
    assert not hooks_of(layer)


def test_nothing_is_left_behind_after_an_error_inside_an_attention():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 3, 8)
    with pytest.raises(AssertionError), capture(attention):
        attention(x, x, x[:, :2])
    assert not hooks_of(attention)
