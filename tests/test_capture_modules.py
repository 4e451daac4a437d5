"""Attention of the modules of PyTorch and Hugging Face: their weights, and outputs as they are."""

import eager
import pytest
import torch
from eager import CONTEXTS, Given, causal, check, randomized, refused, run_twice, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from historylens.capture import capture


@settings(max_examples=40)
@given(
    n_samples=st.integers(1, 3), n_queries=st.integers(1, 9), seed=st.integers(0, 99),
    n_keys=st.sampled_from([None, 1, 4, 9]), n_heads=st.sampled_from([1, 2, 4]),
    batch_first=st.booleans(), bias=st.booleans(), need_weights=st.booleans(),
    widths=st.sampled_from([(None, None), (6, None), (6, 10)]), training=st.booleans(),
    mask=st.sampled_from([None, "bool", "float", "bool each", "float each", "causal"]),
    padding=st.sampled_from([None, "bool", "float"]), context=st.sampled_from(CONTEXTS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    low=st.sampled_from(eager.LOW), data=st.data(),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_multi_head_attention_alone(
    n_samples, n_queries, n_keys, n_heads, batch_first, bias, widths, mask, padding,
    need_weights, training, context, dtype, seed, low, data,
):  # fmt: skip
    """With `n_keys` None, and one width, self-attention on one and the same tensor."""
    options = {"batch_first": batch_first, "bias": bias, "dtype": dtype, "dropout": 0.2}
    attention = nn.MultiheadAttention(8, n_heads, kdim=widths[0], vdim=widths[1], **options)
    randomized(attention, seed).train(training)
    is_self, n_keys = n_keys is None and widths == (None, None), n_keys or n_queries
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
        forbidden[:] = False
    elif mask == "causal":
        forbidden = causal(n_queries, n_keys)
        kwargs |= {"attn_mask": forbidden, "is_causal": True}
    elif "bool" in mask:
        kwargs["attn_mask"] = forbidden
    else:
        finite = torch.randn(forbidden.shape, dtype=dtype)
        kwargs["attn_mask"] = torch.where(forbidden, finite + low, finite)
        added += finite.unflatten(0, (n_samples, n_heads)) if each else finite
    forbidden = forbidden.unflatten(0, (n_samples, n_heads)) if each else forbidden
    padded = torch.zeros(n_samples, n_keys, dtype=torch.bool)
    if padding:
        padded[:, 1:] = torch.rand(n_samples, n_keys - 1) < 0.4
        float_mask = torch.where(padded, torch.tensor(low, dtype=dtype), 0)
        kwargs["key_padding_mask"] = padded if padding == "bool" else float_mask
    forbidden = (forbidden | padded[:, None, None, :]).expand(added.shape)
    tensors = query, key, value
    moved = {id(x): x if batch_first else x.transpose(0, 1) for x in tensors}
    place = data.draw(eager.query_places(n_samples, n_queries))
    inputs = [moved[id(x)] for x in tensors]
    record = run_twice(Given(attention, **kwargs), *inputs, context=context, query=place)
    assert record.names == ("inner",)
    weights = weights_of(attention, query, key, forbidden, added)
    check(record[0], weights, forbidden, padded if is_self and padding else None, place)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padding", [None, torch.tensor([[True] + [False] * 4])])
def test_a_causal_hint_beside_another_mask_counts_where_pytorch_follows_it(need_weights, padding):
    attention = randomized(nn.MultiheadAttention(8, 2, batch_first=True))
    x, far = torch.randn(1, 5, 8), causal(5).T  # no key before the query
    options = {"attn_mask": far, "key_padding_mask": padding, "need_weights": need_weights}
    found = run_twice(Given(attention, is_causal=True, **options), x, x, x, query=2)[0]
    forbidden = causal(5) if padding is None and not need_weights else far
    forbidden = forbidden if padding is None else forbidden | padding
    check(found, weights_of(attention, x, x, forbidden), forbidden, padding, query=2)


@pytest.mark.parametrize("low", [None, *eager.LOW])
def test_queries_and_keys_may_be_one_tensor_and_the_values_another(low):
    """Then padded queries are known too, though the module transposes each by itself."""
    attention = randomized(nn.MultiheadAttention(8, 2, batch_first=True))
    x, values = torch.randn(2, 2, 5, 8).unbind()
    padded = torch.arange(5) >= torch.tensor([5, 3])[:, None]
    weights = weights_of(attention, x, x, forbidden := padded[:, None, None, :])
    more = torch.arange(5) < torch.tensor([1, 0])[:, None]  # beside those of the mask
    mask = padded if low is None else torch.zeros(2, 5).masked_fill(padded, low)
    for own in (None, more):
        record = run_twice(Given(attention, key_padding_mask=mask), x, x, values, padding=own)
        check(record[0], weights, forbidden, padded if own is None else padded | own)


def test_unbatched_input():
    attention = randomized(nn.MultiheadAttention(8, 2))
    query, key, padded = torch.randn(4, 8), torch.randn(6, 8), torch.arange(6) == 5
    record = run_twice(Given(attention, key_padding_mask=padded), query, key, key)
    check(record[0], weights_of(attention, query[None], key[None], padded), padded)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_an_error():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(2, 16)])
    message = " was called with nested tensors, .*padding mask"
    refused(f"^TransformerEncoderLayer{message}", layer, nested)
    refused(f"^inner{message}", Given(layer.self_attn), nested, nested, nested)


class AroundForward(nn.TransformerEncoderLayer):
    def forward(self, src, **kwargs):
        return super().forward(src, **kwargs)


class AroundBlock(nn.TransformerEncoderLayer):
    def _sa_block(self, *args, **kwargs):
        return super()._sa_block(*args, **kwargs)


class AroundAttention(nn.MultiheadAttention):
    def forward(self, query, key=None, value=None, **kwargs):
        return super().forward(query, query, query, **kwargs)


class WithOwnAttention(nn.TransformerEncoderLayer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.self_attn = AroundAttention(*args, **kwargs)


@pytest.mark.parametrize(("kind", "name"), [
    (AroundForward, "self_attn"),
    (AroundBlock, "AroundBlock"),
    (AroundAttention, "AroundAttention"),
    (WithOwnAttention, "WithOwnAttention"),
])  # fmt: skip
def test_subclasses_are_seen_through_the_calls_that_they_make(kind, name):
    model, x = randomized(kind(8, 2, batch_first=True)), torch.randn(2, 4, 8)
    record = run_twice(model, x)
    assert record.names == (name,)
    check(record[0], weights_of(getattr(model, "self_attn", model), x, x))


@pytest.mark.parametrize("adds", ["add_bias_kv", "add_zero_attn"])
def test_keys_that_are_no_tokens_are_an_error(adds):
    x = torch.randn(5, 3, 8)
    attention = nn.MultiheadAttention(8, 2, **{adds: True})
    refused("^inner adds keys of its own .*layers=", Given(attention), x, x, x)
    weights = attention.in_proj_weight, None, None, None, False, 0.0, attention.out_proj.weight
    call = functional.multi_head_attention_forward
    fixed = Given(lambda x: call(x, x, x, 8, 2, *weights, None, static_k=torch.zeros(6, 5, 4)))
    refused("^Given passes static_k .*layers=", fixed, x)


IDS = torch.arange(18).view(2, 9) % 7
PADDED = (torch.arange(9) >= torch.tensor([[0], [2]])).long()  # sample 1, on the left


SMALL = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = {
    "gpt2": {"bos_token_id": 0, "eos_token_id": 0},
    "llama": {"intermediate_size": 32, "num_key_value_heads": 2},
    # Sinks beside the tokens, and layers that drop old keys.
    "gpt_oss": {"intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 4,
                "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
}  # fmt: skip


def made(kind):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **SMALL, **SIZES[kind])
    return randomized(transformers.AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def own_weights(model, ids, mask=None):
    """What the model returns itself, a tensor `(B, H, T, T)` a layer."""
    model.set_attn_implementation("eager")
    return model(ids, attention_mask=mask, output_attentions=True).attentions


def check_own(record, own, atol=1e-6):
    for found, weights in zip(record, own, strict=True):
        torch.testing.assert_close(found.query_rows, weights[:, :, -1], atol=atol, rtol=0)
        torch.testing.assert_close(found.maps[0].nan_to_num(), weights[0], atol=atol, rtol=0)


@pytest.mark.parametrize(("kind", "name"), [
    ("gpt2", "inner.transformer.h.{}.attn"), ("llama", "inner.model.layers.{}.self_attn"),
])  # fmt: skip
@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("mask", [None, PADDED])
def test_captured_rows_are_the_models_own(kind, name, context, mask):
    """By the model's default implementation, and by its eager one, with gradients."""
    model = made(kind)
    if context == torch.enable_grad:
        model.set_attn_implementation("eager")
    whole = Given(model, attention_mask=mask, return_dict=False)
    record = run_twice(whole, IDS, context=context)
    assert record.names == (name.format(0), name.format(1))
    check_own(record, own := own_weights(model, IDS, mask))
    for found, weights in zip(record, own, strict=True):
        assert torch.equal(found.visible, (weights[:, :, -1] > 0).any(1))
        assert (found.maps[0].isnan() == causal(9)).all()
        received = weights[0].sum(1) / torch.arange(9, 0, -1)
        torch.testing.assert_close(found.received[0], received, atol=1e-6, rtol=0)


def test_generating_with_a_cache_is_one_attention_over_all_tokens():
    model = made("llama")
    with capture(model, maps=[0]) as record:
        ids = model.generate(IDS, max_new_tokens=3, do_sample=False)[:, :-1]
    check_own(record, own_weights(model, ids))


@torch.no_grad()
def test_what_lies_on_sinks_is_kept_apart_in_every_pass():
    model = made("gpt_oss")
    model.set_attn_implementation("eager")
    kept = pytest.importorskip("transformers").DynamicCache(config=model.config)
    with capture(model, maps=[0]) as record:
        for part in IDS.split([2, 6, 1], 1):
            model(part, past_key_values=kept, use_cache=True)
    check_own(record, own := own_weights(model, IDS), atol=1e-5)
    for found, weights in zip(record, own, strict=True):
        torch.testing.assert_close(found.extra, 1 - weights[:, :, -1].sum(-1), atol=1e-5, rtol=0)
