"""Captured attention equals an eager softmax(q k^T / sqrt(d) + mask); the model never notices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attention.capture import CaptureError, capture
from attention.rows import MapGrid, Mask, last_row, maps, received


@pytest.fixture(autouse=True)
def _restore_fast_path():
    enabled = torch.backends.mha.get_fastpath_enabled()
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def make_encoder(n_layers=3, width=16, n_heads=4, seed=0, **settings):
    torch.manual_seed(seed)
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True} | settings
    layer = nn.TransformerEncoderLayer(width, n_heads, 32, **options)
    encoder = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.4)
    return encoder.eval()


def causal_mask(n_tokens):
    return nn.Transformer.generate_square_subsequent_mask(n_tokens)


def eager_attention(layer, x, bias):
    """The plain twin: the whole attention (B, H, T, T) of a layer for its input x (B, T, D)."""
    x = layer.norm1(x) if layer.norm_first else x
    attention = layer.self_attn
    q, k, _ = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    q, k = (
        part.double().unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in (q, k)
    )
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return (scores + bias.double()).softmax(-1)


def eager_layers(encoder, x, bias):
    """The attention of every layer, each fed by the real output of the layer before it."""
    found = []
    with torch.no_grad():
        for layer in encoder.layers:
            batch_first = layer.self_attn.batch_first
            found.append(eager_attention(layer, x if batch_first else x.transpose(0, 1), bias))
            x = layer(x, src_mask=bias)
    return found


def check_layer(found, expected, bias):
    """Every field of a captured layer against the whole attention matrix (B, H, T, T)."""
    allowed = (bias > -torch.inf).expand(expected.shape)
    close = {"atol": 1e-6, "rtol": 0, "check_dtype": False}
    torch.testing.assert_close(found.query_rows, expected[:, :, -1], **close)
    mean = expected.sum(2) / allowed.sum(2)
    torch.testing.assert_close(found.received, mean, equal_nan=True, **close)
    whole = expected.masked_fill(~allowed, torch.nan)
    torch.testing.assert_close(found.maps, whole[[0]], equal_nan=True, **close)
    assert found.query_rows.dtype == found.received.dtype == found.maps.dtype == torch.float32


def hooks_of(model):
    own = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    module = torch.nn.modules.module
    return own + [*module._global_forward_hooks, *module._global_forward_pre_hooks]


MASKS = {
    "none": lambda t: None,
    "causal": causal_mask,
    "bool": lambda t: torch.ones(t, t, dtype=torch.bool).triu(1),
    "bias": lambda t: causal_mask(t) - 0.3 * torch.arange(t),
}


@settings(max_examples=25, deadline=None)
@given(
    n_samples=st.integers(1, 3),
    n_tokens=st.integers(1, 40),
    n_heads=st.sampled_from([1, 2, 3, 4]),
    norm_first=st.booleans(),
    batch_first=st.booleans(),
    bias=st.booleans(),
    mask=st.sampled_from(sorted(MASKS)),
    hint=st.booleans(),
    seed=st.integers(0, 99),
)
def test_capture_equals_eager_attention(
    n_samples, n_tokens, n_heads, norm_first, batch_first, bias, mask, hint, seed
):
    encoder = make_encoder(
        2, 12, n_heads, seed, norm_first=norm_first, batch_first=batch_first, bias=bias
    )
    x = torch.randn((n_samples, n_tokens, 12) if batch_first else (n_tokens, n_samples, 12))
    src_mask = MASKS[mask](n_tokens)
    is_causal = True if hint and mask in ("causal", "bool") else None
    with torch.no_grad(), capture(encoder, maps=[0]) as record:
        encoder(x, mask=src_mask, is_causal=is_causal)
    additive = torch.zeros(n_tokens, n_tokens)
    if src_mask is not None:
        is_bool = src_mask.dtype == torch.bool
        additive = additive.masked_fill(src_mask, -torch.inf) if is_bool else src_mask
    for found, expected in zip(record, eager_layers(encoder, x, additive), strict=True):
        check_layer(found, expected, additive)


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("norm_first", [True, False])
def test_outputs_do_not_change_by_a_bit(fast_path, training, context, norm_first):
    torch.backends.mha.set_fastpath_enabled(fast_path)
    encoder = make_encoder(norm_first=norm_first, dropout=0.1).train(training)
    x, mask = torch.randn(2, 30, 16), causal_mask(30)

    def run():
        torch.manual_seed(1)
        return encoder(x, mask=mask, is_causal=True)

    with context():
        plain = run()
        with capture(encoder, maps=[0]) as record:
            captured = run()
    assert torch.equal(plain, captured)
    assert captured.requires_grad == plain.requires_grad
    check_layer(record[0], eager_attention(encoder.layers[0], x, mask), mask)


@pytest.mark.parametrize("n_layers", [1, 3])
def test_layers_keep_their_fast_path_while_captured(n_layers, monkeypatch):
    calls = []
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(1) or fused(*a)
    )
    encoder = make_encoder(n_layers)
    with torch.no_grad(), capture(encoder):
        encoder(torch.randn(1, 8, 16), mask=causal_mask(8), is_causal=True)
    assert len(calls) == n_layers


def test_gradients_are_those_without_capture():
    encoder, x = make_encoder().train(), torch.randn(2, 9, 16)
    gradients = []
    for capturing in (False, True):
        encoder.zero_grad()
        if capturing:
            with capture(encoder):
                encoder(x, mask=causal_mask(9)).square().sum().backward()
        else:
            encoder(x, mask=causal_mask(9)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_captured_tensors_are_ordinary_after_inference_mode():
    encoder = make_encoder()
    with torch.inference_mode(), capture(encoder, maps=[0]) as record:
        encoder(torch.randn(1, 5, 16))
    for values in (record[0].query_rows, record[0].received, record[0].maps):
        assert not values.is_inference()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_capture_accumulates_in_float32_or_better(dtype):
    encoder = make_encoder(1).to(dtype)
    x = torch.randn(2, 20, 16, dtype=dtype)
    with torch.no_grad(), capture(encoder) as record:
        encoder(x, mask=causal_mask(20).to(dtype))
    expected = eager_attention(encoder.layers[0].double(), x.double(), causal_mask(20))
    torch.testing.assert_close(
        record[0].query_rows, expected[:, :, -1], atol=1e-6, rtol=0, check_dtype=False
    )


@pytest.mark.parametrize("norm_first", [True, False])
def test_autocast_leaves_the_statistics_in_float32(norm_first):
    encoder, x = make_encoder(2, norm_first=norm_first), torch.randn(1, 12, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), capture(encoder) as record:
        encoder(x, mask=causal_mask(12))
    assert record[1].query_rows.dtype == torch.float32
    expected = eager_attention(encoder.layers[0], x, causal_mask(12))[:, :, -1]
    torch.testing.assert_close(record[0].query_rows, expected, atol=1e-6, rtol=0, check_dtype=False)


def test_a_mask_for_every_sample_and_head():
    encoder, x = make_encoder(2), torch.randn(3, 10, 16)
    mask = causal_mask(10) + torch.randn(12, 10, 10)
    mask[:, 4:, 2] = -torch.inf
    with torch.no_grad(), capture(encoder, maps=[0]) as record:
        encoder(x, mask=mask)
    bias = mask.unflatten(0, (3, 4))
    check_layer(record[0], eager_attention(encoder.layers[0], x, bias), bias)


def test_a_position_that_no_query_may_see_receives_nan():
    encoder = make_encoder(1)
    mask = torch.zeros(6, 6).index_fill_(1, torch.tensor([2]), -torch.inf)
    with torch.no_grad(), capture(encoder) as record:
        encoder(torch.randn(1, 6, 16), mask=mask)
    assert record[0].received[..., 2].isnan().all()
    assert record[0].received[..., [0, 1, 3, 4, 5]].isfinite().all()


def test_one_sample_without_a_batch_axis():
    encoder, x = make_encoder(1), torch.randn(7, 16)
    with torch.no_grad(), capture(encoder) as record:
        encoder(x, mask=causal_mask(7))
    assert record[0].query_rows.shape == (1, 4, 7)


def test_uniform_attention_by_hand():
    """Zero weights: row i is 1/(i+1), so position j receives the mean of 1/(i+1) over i >= j."""
    encoder = make_encoder(1)
    nn.init.zeros_(encoder.layers[0].self_attn.in_proj_weight)
    nn.init.zeros_(encoder.layers[0].self_attn.in_proj_bias)
    with torch.no_grad(), capture(encoder, maps=[0]) as record:
        encoder(torch.randn(1, 3, 16), mask=causal_mask(3), is_causal=True)
    torch.testing.assert_close(record[0].query_rows[0, 0], torch.full((3,), 1 / 3))
    by_hand = torch.tensor([(1 + 1 / 2 + 1 / 3) / 3, (1 / 2 + 1 / 3) / 2, 1 / 3])
    torch.testing.assert_close(record[0].received[0, 0], by_hand)
    by_hand = torch.tensor(
        [[1, torch.nan, torch.nan], [1 / 2, 1 / 2, torch.nan], [1 / 3, 1 / 3, 1 / 3]]
    )
    torch.testing.assert_close(record[0].maps[0, 0], by_hand, equal_nan=True)


@pytest.mark.parametrize("target", [0, 3, 10])
def test_planted_attention_to_one_position_is_found(target):
    """Queries that match one position's key: rows and received attention peak there."""
    n_tokens, sharpness = 12, 20.0
    k = torch.zeros(1, 1, n_tokens, 4)
    k[0, 0, target, 0] = 1.0
    q = torch.zeros_like(k)
    q[..., 0] = sharpness
    assert last_row((q[:, :, -1:] @ k.mT)[:, :, 0], Mask("causal"))[0, 0, target] > 0.999
    columns = received(q, k, Mask("causal"))[0, 0]
    assert columns[target] > 0.999
    image = maps(q, k, Mask("causal"), samples=[0], grid=MapGrid.of(n_tokens, 512))[0, 0]
    assert (image[target:, target] > 0.999).all()


def test_only_what_is_asked_for_is_kept():
    encoder = make_encoder(2)
    with torch.no_grad(), capture(encoder, received=False) as record:
        encoder(torch.randn(2, 5, 16), mask=causal_mask(5))
    assert len(record) == 2
    assert record[1].received is record[1].maps is record[1].map_rows is None
    assert [layer.name for layer in record] == ["layers.0", "layers.1"]


def test_chosen_layers_only():
    encoder = make_encoder(3)
    with torch.no_grad(), capture([encoder.layers[2]]) as record:
        encoder(torch.randn(1, 5, 16), mask=causal_mask(5))
    assert len(record) == 1


@settings(max_examples=20, deadline=None)
@given(n_tokens=st.integers(1, 300), size=st.integers(8, 64))
def test_map_grid_covers_every_token_once_and_ends_with_the_query(n_tokens, size):
    grid = MapGrid.of(n_tokens, size)
    assert len(grid.rows) == len(grid.cols) <= size
    assert grid.rows[-1] == grid.cols[-1] == n_tokens - 1
    assert (grid.rows[1:-1] + 1 == grid.cols[2:]).all()
    assert grid.cols[0] == 0
    assert (grid.cols[1:] > grid.rows[:-1]).all()
    weights = torch.rand(2, n_tokens)
    ends = [*grid.cols[1:].tolist(), n_tokens]
    bins = zip(grid.cols.tolist(), ends, strict=True)
    plain = torch.stack([weights[:, start:end].sum(1) for start, end in bins], 1)
    torch.testing.assert_close(grid.pool(weights), plain)


@pytest.mark.parametrize("mask", ["causal", "bias", "none"])
def test_long_context_maps_are_pooled_rows_of_the_matrix(mask):
    encoder, x = make_encoder(1), torch.randn(2, 150, 16)
    src_mask = MASKS[mask](150)
    with torch.no_grad(), capture(encoder, maps=[1], map_size=40) as record:
        encoder(x, mask=src_mask)
    bias = torch.zeros(150, 150) if src_mask is None else src_mask
    whole = eager_attention(encoder.layers[0], x, bias)[1]
    whole = whole.masked_fill(bias == -torch.inf, torch.nan)
    found = record[0]
    starts, ends = found.map_cols.tolist(), [*found.map_cols[1:].tolist(), 150]
    for r, row in enumerate(found.map_rows.tolist()):
        for c, (start, end) in enumerate(zip(starts, ends, strict=True)):
            seen = whole[:, row, start:end]
            torch.testing.assert_close(
                found.maps[0, :, r, c],
                seen.nanmean(-1),
                atol=1e-6,
                rtol=0,
                check_dtype=False,
                equal_nan=True,
            )


@pytest.mark.parametrize("block", [1, 64, 700])
@pytest.mark.parametrize("mask", ["causal", "full", "additive"])
def test_block_size_does_not_change_the_result(block, mask, monkeypatch):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 41, 4).unbind()
    mask = Mask(mask, causal_mask(41) if mask == "additive" else None)
    grid = MapGrid.of(41, 16)
    whole = received(q, k, mask), maps(q, k, mask, samples=[1], grid=grid)
    monkeypatch.setattr("attention.rows.BLOCK_SCORES_CPU", block)
    monkeypatch.setattr("attention.rows.MIN_BLOCK_ROWS", 3)
    torch.testing.assert_close(received(q, k, mask), whole[0])
    found = maps(q, k, mask, samples=[1], grid=grid)
    torch.testing.assert_close(found, whole[1], equal_nan=True)


def test_hooks_are_gone_afterwards():
    encoder = make_encoder()
    with torch.no_grad(), capture(encoder):
        assert hooks_of(encoder)
        encoder(torch.randn(1, 5, 16))
    assert not hooks_of(encoder)


def test_hooks_are_gone_after_an_error_around_the_model():
    encoder = make_encoder()
    with pytest.raises(ZeroDivisionError), capture(encoder):
        1 / 0  # noqa: B018
    assert not hooks_of(encoder)


def test_hooks_are_gone_after_an_error_inside_a_layer():
    encoder = make_encoder()
    encoder.layers[1].linear1 = nn.Linear(3, 3)
    with pytest.raises(RuntimeError), capture(encoder):
        encoder(torch.randn(1, 5, 16))
    assert not hooks_of(encoder)


def test_a_layer_that_does_not_run_is_an_error():
    encoder = make_encoder(2)
    with (
        pytest.raises(CaptureError, match=r"layers\.1 has not run"),
        torch.no_grad(),
        capture(encoder),
    ):
        encoder.layers[0](torch.randn(1, 5, 16))
    assert not hooks_of(encoder)


def test_no_forward_at_all_is_an_error():
    with pytest.raises(CaptureError, match=r"layers\.0 has not run"), capture(make_encoder()):
        pass


@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("fast_path", [True, False])
def test_a_second_forward_is_an_error(n_layers, fast_path):
    torch.backends.mha.set_fastpath_enabled(fast_path)
    encoder, x = make_encoder(n_layers), torch.randn(1, 5, 16)
    with torch.no_grad(), capture(encoder):
        encoder(x)
        with pytest.raises(CaptureError, match=r"layers\.0 ran twice"):
            encoder(x)
    assert not hooks_of(encoder)


def test_reading_the_record_too_early_is_an_error():
    encoder = make_encoder()
    with torch.no_grad(), capture(encoder) as record:
        with pytest.raises(CaptureError, match="has not run"):
            _ = record[0]
        encoder(torch.randn(1, 5, 16))


class OtherAttention(nn.TransformerEncoderLayer):
    def _sa_block(self, x, *args, **kwargs):
        return x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "found no nn.TransformerEncoderLayer in Linear"),
        ([], "empty list"),
        ([nn.Linear(2, 2)], "layer 0 is a Linear"),
        (nn.ModuleList([nn.Identity()]), "layer 0 is a Identity"),
        (OtherAttention(8, 2), "its own _sa_block"),
    ],
)
def test_a_model_that_cannot_be_read_is_an_error(model, message):
    with pytest.raises(CaptureError, match=message), capture(model):
        pass


def test_a_layer_given_twice_is_an_error():
    layer = make_encoder(1).layers[0]
    with pytest.raises(CaptureError, match="stands twice"), capture([layer, layer]):
        pass


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"mask": torch.zeros(5, 5), "is_causal": True}, "mask that is not causal"),
        ({"mask": torch.zeros(4, 4)}, r"expected a mask of shape \(5, 5\)"),
        ({"mask": torch.full((5, 5), -torch.inf)}, "see nothing"),
    ],
)
def test_a_call_that_cannot_be_read_is_an_error(call, message):
    encoder = make_encoder()
    with pytest.raises(CaptureError, match=message), torch.no_grad(), capture(encoder):
        encoder(torch.randn(1, 5, 16), **call)
    assert not hooks_of(encoder)


def test_maps_of_a_sample_outside_the_batch_is_an_error():
    encoder = make_encoder()
    with (
        pytest.raises(CaptureError, match=r"expected numbers in 0\.\.1"),
        capture(encoder, maps=[2]),
    ):
        encoder(torch.randn(2, 5, 16))
