"""Hugging Face models as they come: equal to the weights that they return eagerly."""

import pytest
import torch
from eager import Given, causal, randomized, run_twice

from historylens.capture import CaptureError, capture

transformers = pytest.importorskip("transformers")

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
    config = transformers.AutoConfig.for_model(kind, **SMALL, **SIZES[kind])
    return randomized(transformers.AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def eager_weights(model, ids, mask=None):
    """What the model returns itself, a tensor `(B, H, T, T)` a layer."""
    model.set_attn_implementation("eager")
    return model(ids, attention_mask=mask, output_attentions=True).attentions


def check(record, eager, atol=1e-6):
    for found, weights in zip(record, eager, strict=True):
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
    check(record, eager := eager_weights(model, IDS, mask))
    for found, weights in zip(record, eager, strict=True):
        assert torch.equal(found.visible, (weights[:, :, -1] > 0).any(1))
        assert (found.maps[0].isnan() == causal(9)).all()
        received = weights[0].sum(1) / torch.arange(9, 0, -1)
        torch.testing.assert_close(found.received[0], received, atol=1e-6, rtol=0)


def test_generating_with_a_cache_is_one_attention_over_all_tokens():
    model = made("llama")
    with capture(model, maps=[0]) as record:
        ids = model.generate(IDS, max_new_tokens=3, do_sample=False)[:, :-1]
    check(record, eager_weights(model, ids))


@torch.no_grad()
def test_what_lies_on_sinks_is_kept_apart_in_every_pass():
    model = made("gpt_oss")
    model.set_attn_implementation("eager")
    kept = transformers.DynamicCache(config=model.config)
    with capture(model, maps=[0]) as record:
        for part in IDS.split([2, 6, 1], 1):
            model(part, past_key_values=kept, use_cache=True)
    check(record, eager := eager_weights(model, IDS), atol=1e-5)
    for found, weights in zip(record, eager, strict=True):
        torch.testing.assert_close(found.extra, 1 - weights[:, :, -1].sum(-1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_eager_model_with_a_cache_is_not_told_to_be_eager():
    model = made("gpt2")
    model.set_attn_implementation("eager")
    cache = model(IDS[:, :8]).past_key_values
    with pytest.raises(CaptureError) as error, capture(model):
        model(IDS[:, 8:], past_key_values=cache)
    assert 'capture(model, softmax="transformer.h.0.attn")' in str(error.value)
    assert 'attn_implementation="sdpa"' in str(error.value)
    assert "eager" not in str(error.value)
