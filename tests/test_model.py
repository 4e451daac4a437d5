"""The transformer against its formulas: packed passes, causality, positions, initial weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_window, sharp_model
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_model import run_model
from torch import nn

from config import ModelConfig
from model import ADTransformer

configs = st.builds(
    lambda heads, d_head, **rest: ModelConfig(
        tf_n_head=heads, tf_n_embd=heads * d_head, grid_size=4, num_actions=5, **rest
    ),
    heads=st.integers(1, 3),
    d_head=st.integers(1, 6),
    n_transit=st.integers(1, 12),
    tf_n_layer=st.integers(1, 3),
    tf_n_inner=st.integers(1, 16),
)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@given(config=configs, n_samples=st.integers(1, 3), seed=st.integers(0, 99), data=st.data())
def test_packed_logits_equal_separate_passes_on_every_prefix(
    dtype, tolerance, config, n_samples, seed, data
):
    n = data.draw(st.integers(0, config.n_transit - 1), label="n")
    n_queries = data.draw(st.integers(0, n + 1), label="n_queries")
    last = slice(n + 1 - n_queries, None)
    model = sharp_model(config, seed, dtype)
    context, queries = random_window(config, n_samples, n, seed)
    with torch.no_grad():
        packed = model.forward_packed(*context, queries)
        few = model.forward_packed(*context, queries[:, last])  # after the longest prefixes
        separate = [model(*(c[:, :j] for c in context), queries[:, j]) for j in range(n + 1)]
    assert packed.shape == (n_samples, n + 1, config.num_actions)
    assert packed.dtype == dtype
    torch.testing.assert_close(packed, torch.stack(separate, dim=1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(few, packed[:, last], rtol=tolerance, atol=tolerance)


def test_packed_gradients_equal_those_of_separate_passes(tiny_config):
    model = sharp_model(tiny_config, dtype=torch.float64)
    context, queries = random_window(tiny_config, 2, 7)
    model.forward_packed(*context, queries).square().sum().backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    sum(
        model(*(c[:, :j] for c in context), queries[:, j]).square().sum() for j in range(8)
    ).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("n", [0, 1, 6, 11])
def test_logits_equal_the_formulas_written_out(tiny_config, n):
    model = sharp_model(tiny_config, dtype=torch.float64)
    context, queries = random_window(tiny_config, 2, n)
    with torch.inference_mode():
        logits = model(*context, queries[:, 0])
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for i in range(2):
        transitions = list(zip(*(part[i].tolist() for part in context), strict=True))
        plain, _ = run_model(tensors, vars(tiny_config), transitions, queries[i, 0].tolist())
        np.testing.assert_allclose(logits[i], plain, rtol=1e-9, atol=1e-9)


@given(config=configs)
def test_parameters_have_the_names_and_shapes_of_existing_checkpoints(config):
    d, inner = config.tf_n_embd, config.tf_n_inner
    expected = {
        "pos_embedding": (1, config.n_transit, d),
        "embed_context.weight": (d, 2 * 2 + 5 + 1),
        "embed_context.bias": (d,),
        "embed_query_state.weight": (16, d),
        "pred_action.weight": (5, d),
        "pred_action.bias": (5,),
    }
    layer = {
        "self_attn.in_proj_weight": (3 * d, d),
        "self_attn.in_proj_bias": (3 * d,),
        "self_attn.out_proj.weight": (d, d),
        "self_attn.out_proj.bias": (d,),
        "linear1.weight": (inner, d),
        "linear1.bias": (inner,),
        "linear2.weight": (d, inner),
        **dict.fromkeys(("linear2.bias", "norm1.weight", "norm1.bias"), (d,)),
        **dict.fromkeys(("norm2.weight", "norm2.bias"), (d,)),
    }
    for i in range(config.tf_n_layer):
        expected |= {f"transformer_encoder.layers.{i}.{k}": v for k, v in layer.items()}
    found = {k: tuple(v.shape) for k, v in ADTransformer(config).state_dict().items()}
    assert found == expected


def test_layers_start_from_different_weights(tiny_config):
    layers = ADTransformer(tiny_config).transformer_encoder.layers
    for name, parameter in layers[0].named_parameters():
        if parameter.dim() > 1:
            assert not torch.equal(parameter, layers[1].get_parameter(name)), name


def test_the_seed_decides_the_weights(tiny_config):
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(nn.utils.parameters_to_vector(ADTransformer(tiny_config).parameters()))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_every_parameter_learns(tiny_config):
    model = ADTransformer(tiny_config)
    context, queries = random_window(tiny_config, 8, 11)
    model.forward_packed(*context, queries).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_the_context_leaves_one_position_for_the_query(tiny_model, tiny_config):
    assert tiny_model.n_context_max == 11
    context, queries = random_window(tiny_config, 1, 12)
    for forward, query in ((tiny_model, queries[:, -1]), (tiny_model.forward_packed, queries)):
        with pytest.raises(ValueError, match=r"at most 11 context transitions.*got 12"):
            forward(*context, query)


def test_inputs_may_be_of_any_number_type(tiny_model, tiny_config):
    context, queries = random_window(tiny_config, 2, 5)
    with torch.no_grad():
        expected = tiny_model(*context, queries[:, -1])
        for dtype in (torch.int8, torch.float32, torch.float64):
            found = tiny_model(*(c.to(dtype) for c in context), queries[:, -1].to(dtype))
            assert torch.equal(found, expected)


def test_dropout_acts_everywhere_but_on_attention_and_while_training_only(tiny_config):
    model = sharp_model(tiny_config)
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert len(rates) == 3 * tiny_config.tf_n_layer
    assert set(rates.values()) == {tiny_config.tf_dropout} == {0.1}
    assert [layer.self_attn.dropout for layer in model.transformer_encoder.layers] == [0.0, 0.0]
    context, queries = random_window(tiny_config, 2, 5)
    with torch.no_grad():
        calm = [model(*context, queries[:, -1]) for _ in range(2)]
        model.train()
        noisy = [model(*context, queries[:, -1]) for _ in range(2)]
    assert torch.equal(calm[0], calm[1])
    assert not torch.equal(noisy[0], noisy[1])


def test_packed_training_passes_without_dropout_equal_evaluation(tiny_config):
    model = sharp_model(replace(tiny_config, tf_dropout=0.0))
    context, queries = random_window(tiny_config, 2, 11)
    with torch.no_grad():
        evaluated = model.forward_packed(*context, queries)
        trained = model.train().forward_packed(*context, queries)
    torch.testing.assert_close(trained, evaluated, rtol=1e-5, atol=1e-5)


@settings(max_examples=8)
@given(n=st.integers(0, 11), data=st.data())
def test_tokens_stand_where_positions_say(tiny_config, n, data):
    model = sharp_model(tiny_config, dtype=torch.float64)
    rows = st.permutations(range(12)).map(lambda order: order[: n + 1])
    positions = torch.tensor([data.draw(rows), data.draw(rows)])
    context, queries = random_window(tiny_config, 2, n)
    with torch.no_grad():
        logits = model(*context, queries[:, n], positions)
        for i in range(2):
            # A model whose embeddings of positions are dealt out anew, read in the default order
            moved = sharp_model(tiny_config, dtype=torch.float64)
            moved.pos_embedding[0, : n + 1] = model.pos_embedding[0, positions[i]]
            alone = moved(*(part[i : i + 1] for part in context), queries[i : i + 1, n])
            torch.testing.assert_close(logits[i], alone[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [0, 5, 11])
def test_positions_in_order_are_the_default(tiny_model, tiny_config, n):
    context, queries = random_window(tiny_config, 2, n)
    in_order = torch.arange(n + 1).expand(2, -1)
    with torch.no_grad():
        default = tiny_model(*context, queries[:, n])
        assert torch.equal(tiny_model(*context, queries[:, n], in_order), default)


@pytest.mark.parametrize(
    "positions",
    [
        torch.arange(4),
        torch.arange(3).expand(2, -1),
        torch.arange(5).expand(2, -1),
        torch.arange(4.0).expand(2, -1),
        torch.arange(9, 13).expand(2, -1),
        torch.arange(-1, 3).expand(2, -1),
    ],
)
def test_positions_that_the_model_has_not_are_an_error(tiny_model, tiny_config, positions):
    context, queries = random_window(tiny_config, 2, 3)
    with pytest.raises(ValueError, match=r"positions \(2, 4\) of whole numbers in 0\.\.11"):
        tiny_model(*context, queries[:, 3], positions)
