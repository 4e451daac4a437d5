"""The transformer against its formulas: packed passes, causality, positions, initial weights."""

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
    lambda n_transit, n_layers, n_heads, size, inner: ModelConfig(
        n_transit, n_layers, n_heads, n_heads * size, inner, grid_size=4
    ),
    *(st.integers(1, most) for most in (12, 3, 3, 6, 16)),
)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@settings(max_examples=10)
@given(config=configs, size=st.integers(0, 3), seed=st.integers(0, 99), data=st.data())
def test_packed_logits_are_those_of_passes_on_prefixes(dtype, tolerance, config, size, seed, data):
    n = data.draw(st.integers(0, config.n_transit - 1), label="n")
    last = slice(data.draw(st.integers(0, n + 1), label="first query"), None)
    model = sharp_model(config, seed, dtype)
    context, queries = random_window(config, size, n, seed)
    with torch.no_grad():
        packed = model.forward_packed(*context, queries)
        few = model.forward_packed(*context, queries[:, last])  # after the longest prefixes
        separate = [model(*(c[:, :j] for c in context), queries[:, j]) for j in range(n + 1)]
    torch.testing.assert_close(packed, torch.stack(separate, dim=1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(few, packed[:, last], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("n", [0, 1, 11])
def test_logits_equal_the_formulas_written_out(tiny_config, n):
    model = sharp_model(tiny_config, dtype=torch.float64)
    context, queries = random_window(tiny_config, 2, n)
    logits = model(*context, queries[:, 0]).detach()
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for i in range(2):
        transitions = list(zip(*(part[i].tolist() for part in context), strict=True))
        plain, _ = run_model(tensors, vars(tiny_config), transitions, queries[i, 0].tolist())
        np.testing.assert_allclose(logits[i], plain, rtol=1e-9, atol=1e-9)


@given(config=configs)
def test_parameters_have_the_names_and_shapes_of_existing_checkpoints(config):
    d, inner = config.tf_n_embd, config.tf_n_inner
    maps = {"embed_context.": (d, 2 * 2 + 5 + 1), "pred_action.": (5, d)}
    for i in range(config.tf_n_layer):
        layer = f"transformer_encoder.layers.{i}"
        maps |= {f"{layer}.self_attn.in_proj_": (3 * d, d), f"{layer}.self_attn.out_proj.": (d, d)}
        maps |= {f"{layer}.linear1.": (inner, d), f"{layer}.linear2.": (d, inner)}
        maps |= {f"{layer}.norm1.": (d,), f"{layer}.norm2.": (d,)}
    expected = {"pos_embedding": (1, config.n_transit, d), "embed_query_state.weight": (16, d)}
    for name, shape in maps.items():
        expected |= {f"{name}weight": shape, f"{name}bias": shape[:1]}
    found = {k: tuple(v.shape) for k, v in ADTransformer(config).state_dict().items()}
    assert found == expected


def test_the_seed_decides_the_weights_which_differ_between_layers_and_all_learn(tiny_config):
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = ADTransformer(tiny_config)
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    context, queries = random_window(tiny_config, 8, 11)
    model.forward_packed(*context, queries).square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    first, second = model.transformer_encoder.layers
    for name, parameter in first.named_parameters():
        assert parameter.dim() == 1 or not torch.equal(parameter, second.get_parameter(name)), name


def test_inputs_may_be_of_any_number_type(tiny_model, tiny_config):
    context, queries = random_window(tiny_config, 2, 5)
    expected = tiny_model(*context, queries[:, -1])
    for dtype in (torch.int8, torch.float32, torch.float64):
        inputs = (part.to(dtype) for part in (*context, queries[:, -1]))
        assert torch.equal(tiny_model(*inputs), expected)


def test_dropout_acts_everywhere_but_on_attention_and_while_training_only(tiny_config):
    model = sharp_model(tiny_config)
    dropouts = [part for part in model.modules() if isinstance(part, nn.Dropout)]
    assert [part.p for part in dropouts] == [0.1] * 3 * tiny_config.tf_n_layer
    assert [layer.self_attn.dropout for layer in model.transformer_encoder.layers] == [0.0, 0.0]
    context, queries = random_window(tiny_config, 2, 11)
    with torch.no_grad():
        calm, same = (model.forward_packed(*context, queries) for _ in range(2))
        noisy, other = (model.train().forward_packed(*context, queries) for _ in range(2))
        for part in dropouts:
            part.p = 0.0
        without = model.forward_packed(*context, queries)
    assert torch.equal(calm, same)
    assert not torch.equal(noisy, other)
    torch.testing.assert_close(without, calm, rtol=1e-5, atol=1e-5)


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


def test_a_context_or_positions_that_the_model_has_no_room_for_are_errors(tiny_model, tiny_config):
    context, queries = random_window(tiny_config, 2, 12)
    for forward, query in ((tiny_model, queries[:, -1]), (tiny_model.forward_packed, queries)):
        with pytest.raises(ValueError, match=r"at most 11 context transitions.*got 12"):
            forward(*context, query)
    context, queries = random_window(tiny_config, 2, 3)
    rows = [0, 1, 2], [0, 1, 2, 3, 4], [0.0, 1.0, 2.0, 3.0], [9, 10, 11, 12], [-1, 0, 1, 2]
    for positions in ([0, 1, 2, 3], *([row, row] for row in rows)):
        with pytest.raises(ValueError, match=r"positions \(2, 4\) of whole numbers in 0\.\.11"):
            tiny_model(*context, queries[:, 3], torch.tensor(positions))
