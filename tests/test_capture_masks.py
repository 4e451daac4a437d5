"""Masks of large negative numbers forbid as -inf does; what is graded is a bias at any depth."""

import math

import pytest
import torch
from eager import CLOSE, causal, check, eager_weights, randomized, weights_of
from eager import split_heads as heads_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from historylens.capture import capture, masks
from historylens.capture.masks import floor_of

WIDTH, N_HEADS = 8, 2
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Attend(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way
        if way in ("mha", "flat mask"):
            self.attention = randomized(nn.MultiheadAttention(WIDTH, N_HEADS, batch_first=True))

    def forward(self, x, mask):  # (B, T, D), (B, H, T, T)
        if self.way in ("mha", "flat mask"):
            flat = mask.flatten(0, 1) if self.way == "mha" else mask[0, 0]
            return self.attention(x, x, x, attn_mask=flat, need_weights=False)[0]
        q = heads_of(x).to(mask.dtype)
        if self.way == "sdpa":
            return functional.scaled_dot_product_attention(q, q, q, mask)
        return (q @ q.mT / q.shape[-1] ** 0.5 + mask).softmax(-1) @ q


def whole(model, x, forbidden, bias):
    if model.way in ("mha", "flat mask"):
        return weights_of(model.attention, x, x, forbidden, bias)
    return eager_weights(heads_of(x), heads_of(x), forbidden, bias)


def captured(model, *inputs, query=-1, **kwargs):
    with torch.no_grad(), capture(model, maps=[0], query=query) as record:
        model(*inputs, **kwargs)
    return record[0]


def slopes(n_tokens, steepest):
    """ALiBi (1, H, T, T), each head half as steep as the one before."""
    distance = torch.arange(n_tokens)[:, None] - torch.arange(n_tokens)
    steep = steepest / 2.0 ** torch.arange(N_HEADS)
    return -steep[:, None, None] * distance.clamp(min=0)


@settings(max_examples=60)
@given(
    n_samples=st.integers(1, 3), n_tokens=st.integers(1, 14),
    way=st.sampled_from(["sdpa", "mha", "flat mask", "softmax"]), dtype=st.sampled_from(DTYPES),
    value=st.sampled_from([-1e9, -1e4, -1e3, -3e38, torch.finfo(torch.float16).min, "lowest"]),
    shape=st.sampled_from(["causal", "random", "padded"]),
    steepest=st.sampled_from([0.0, 0.0, 0.3, 2.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_mask_of_any_number_forbids_as_one_of_infinity(
    n_samples, n_tokens, way, dtype, value, shape, steepest, seed
):
    """With ALiBi in the same tensor, too: all as the eager weights say."""
    torch.manual_seed(seed)
    dtype = dtype if way == "sdpa" else torch.float32  # what else is rounded on its way
    value = torch.finfo(dtype).min if value == "lowest" else value
    x, model = torch.randn(n_samples, n_tokens, WIDTH).to(dtype), Attend(way)
    forbidden = causal(n_tokens).expand(n_samples, N_HEADS, -1, -1).clone()
    if shape == "random":
        forbidden = torch.rand(forbidden.shape) < 0.4
    elif shape == "padded":
        forbidden |= torch.arange(n_tokens) >= torch.randint(1, n_tokens + 1, (n_samples, 1, 1, 1))
    forbidden[..., 0] = False
    bias = slopes(n_tokens, steepest).to(dtype).expand(forbidden.shape)
    if way == "flat mask":
        forbidden, bias = (v[:1, :1].expand(n_samples, N_HEADS, -1, -1) for v in (forbidden, bias))
    found = captured(model, x, bias + forbidden.to(dtype) * value)
    check(found, whole(model, x, forbidden, bias), forbidden)


@pytest.mark.parametrize("value", [-torch.inf, -3e38, -1e3])
def test_a_float_key_padding_mask_tells_padded_queries_too(value):
    attention = randomized(nn.MultiheadAttention(WIDTH, N_HEADS, batch_first=True))
    x, padded = torch.randn(2, 5, WIDTH), torch.arange(5) >= torch.tensor([5, 3])[:, None]
    keys = torch.zeros(2, 5).masked_fill(padded, value)
    mask = torch.zeros(5, 5).masked_fill(causal(5), -torch.inf)
    found = captured(attention, x, x, x, attn_mask=mask, key_padding_mask=keys)
    forbidden = (causal(5) | padded[:, None, None]).expand(2, N_HEADS, 5, 5)
    check(found, weights_of(attention, x, x, forbidden), forbidden, padded)


@pytest.mark.parametrize("way", ["sdpa", "softmax"])
def test_a_row_that_is_masked_altogether_attends_evenly_and_sees_all(way):
    mask = torch.zeros(1, N_HEADS, 5, 5).masked_fill(causal(5), -1e9)
    mask[:, :, 2] = -1e9
    found = captured(Attend(way), torch.randn(1, 5, WIDTH), mask, query=2)
    assert found.visible.all()
    torch.testing.assert_close(found.query_rows, torch.full((1, N_HEADS, 5), 0.2), **CLOSE)
    assert found.maps[0].isnan().sum(-1)[0].tolist() == [4, 3, 0, 1, 0]


@given(
    n_tokens=st.integers(2, 60), steepest=st.floats(0.01, 800),
    way=st.sampled_from(["sdpa", "mha"]), is_causal=st.booleans(),
)  # fmt: skip
def test_a_graded_bias_forbids_nothing_however_deep(n_tokens, steepest, way, is_causal):
    x, bias = torch.randn(1, n_tokens, WIDTH), slopes(n_tokens, steepest)[None]
    forbidden = causal(n_tokens) & is_causal
    found = captured(Attend(way), x, bias.masked_fill(forbidden, -torch.inf))
    assert found.visible.all()
    assert torch.equal(found.maps[0].isnan(), forbidden.expand(N_HEADS, -1, -1))


@settings(max_examples=100)
@given(
    graded=st.lists(st.floats(-440, 50), min_size=1, max_size=30),
    reach=st.sampled_from([0, 500, 1200, 3000]), value=st.sampled_from([-1e4, -1e5, -1e9, -3.4e38]),
    shape=st.sampled_from([(1, 1, 1, -1), (1, 1, -1, 1), (-1, 1, 1, 1)]), is_masked=st.booleans(),
    has_infinity=st.booleans(),
)  # fmt: skip
def test_where_a_mask_begins(graded, reach, value, shape, is_masked, has_infinity):
    steps = [-450.0 * 1.5**i for i in range(20) if 450 * 1.5**i <= reach]
    numbers = torch.tensor([*graded, *steps, *[value] * is_masked, *[-math.inf] * has_infinity])
    floor = floor_of(numbers.view(shape))
    low = numbers[(numbers < floor) & numbers.isfinite()]
    assert low.tolist() == torch.tensor([value] * is_masked).tolist()


def test_a_mask_that_is_expanded_is_looked_at_once(monkeypatch):
    mask = torch.zeros(8, 8).masked_fill(causal(8), -1e9)
    looked, fill = [], torch.Tensor.masked_fill
    counted = lambda self, *args: looked.append(self.numel()) or fill(self, *args)  # noqa: E731
    monkeypatch.setattr(masks, "CHUNK_CPU", 8)
    monkeypatch.setattr(torch.Tensor, "masked_fill", counted)
    assert floor_of(mask.expand(50, 20, 8, 8)) == -900
    assert sum(looked) == 2 * 64
    assert max(looked) == 8
