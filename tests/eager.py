"""The plain twin of capture: whole attention matrices in float64, and what follows from them."""

import math
from functools import partial
from unittest import mock

import pytest
import torch
from conftest import n_hooks
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from historylens.capture import CaptureError, capture

AUTOCAST = partial(torch.autocast, "cpu", torch.bfloat16)
CONTEXTS = [torch.enable_grad, torch.no_grad, torch.inference_mode, AUTOCAST]
CLOSE = {"atol": 1e-6, "rtol": 0, "check_dtype": False, "equal_nan": True}
ALL_SEEN = torch.zeros(1, dtype=torch.bool)
LOW = [-torch.inf, torch.finfo(torch.float32).min, -1e9, -65504.0, -1e4, -1e3]  # each forbids


class Given(nn.Module):
    """Calls a module or a function with further arguments."""

    def __init__(self, inner, **kwargs):
        super().__init__()
        self.inner, self.kwargs = inner, kwargs

    def forward(self, *tensors):
        return self.inner(*tensors, **self.kwargs)


Attend = partial(Given, functional.scaled_dot_product_attention)
fast_path = partial(mock.patch.object, torch.backends.mha, "_is_fastpath_enabled")  # on or off


def split_heads(x, n_heads=2):
    """(B, T, D) to (B, H, T, D / H)."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def attend_by_heads(x, allowed=None):
    """Two heads, whose queries, keys and values are parts of x (B, T, D)."""
    heads = split_heads(x)
    out = functional.scaled_dot_product_attention(heads, heads, heads, allowed)
    return out.transpose(1, 2).flatten(2)


def eager_weights(q, k, forbidden=None, added=None, scale=None):
    """Weights (B, H, Tq, Tk) of q (B, H, Tq, d) and k (B, Hk, Tk, d)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.double() @ k.double().mT * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = scores if added is None else scores + added.double()
    scores = scores if forbidden is None else scores.masked_fill(forbidden, -torch.inf)
    return scores.softmax(-1).detach()


def weights_of(attention, query, key, forbidden=None, added=None):
    """Weights (B, H, Tq, Tk) of an nn.MultiheadAttention for inputs (B, T, D)."""
    weights = attention.q_proj_weight, attention.k_proj_weight
    if attention.in_proj_weight is not None:
        weights = attention.in_proj_weight.chunk(3)[:2]
    biases = (None, None) if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)[:2]
    q, k = (
        functional.linear(x.double(), w.double(), None if b is None else b.double())
        for x, w, b in zip((query, key), weights, biases, strict=True)
    )
    heads = (split_heads(x, attention.num_heads) for x in (q, k))
    return eager_weights(*heads, forbidden, added)


def check(found, weights, forbidden=ALL_SEEN, padded=None, query=-1):
    """Every field of a captured layer, its maps those of the first samples.

    forbidden: bool, broadcasts to the weights; padded: (B, Tq), queries that are left out; query:
    one for all samples, or (B,).
    """
    allowed = (~forbidden).expand(weights.shape)
    row = torch.arange(len(weights)), slice(None), torch.as_tensor(query).expand(len(weights))
    torch.testing.assert_close(found.query_rows, weights[row], **CLOSE)
    assert torch.equal(found.visible, allowed[row].any(1))
    counted = allowed if padded is None else allowed & ~padded[:, None, :, None]
    received = (weights * counted).sum(2) / counted.sum(2)
    torch.testing.assert_close(found.received, received, **CLOSE)
    whole = weights.masked_fill(~allowed, torch.nan)[: len(found.maps)]
    torch.testing.assert_close(found.maps, whole, **CLOSE)
    values = found.query_rows, found.received, found.maps
    assert all(x.dtype == torch.float32 and not x.is_inference() for x in values)


def check_pooled(found, whole, i=0):
    """A column of the `i`-th map is the mean of its tokens in `whole` (H, Tq, Tk)."""
    ends = [*found.map_cols[1:].tolist(), whole.shape[-1]]
    for c, (start, end) in enumerate(zip(found.map_cols.tolist(), ends, strict=True)):
        expected = whole[:, found.map_rows, start:end].nanmean(-1)
        torch.testing.assert_close(found.maps[i, :, :, c], expected, **CLOSE)


def softmaxed(x, dtype=None):
    """Weights `(B, H, T, T)` that a model with `split_heads` computes itself."""
    return (split_heads(x) @ split_heads(x).mT).softmax(-1, dtype)


def run_twice(model, *inputs, context=torch.no_grad, maps=(0,), **options):
    """The record of a forward pass, whose output is, to the bit, the one without capture."""

    def run():
        torch.manual_seed(1)
        output = model(*inputs)
        return output[0] if isinstance(output, tuple) else output

    with context():
        with fast_path(False):
            plain = run()
        with capture(model, maps=maps, **options) as record:
            captured = run()
    assert torch.equal(plain, captured)
    assert plain.requires_grad == captured.requires_grad
    kept = [x for layer in record for x in vars(layer).values() if isinstance(x, torch.Tensor)]
    assert not any(x.requires_grad or x.is_inference() for x in kept)
    assert is_clean(model)
    return record


def refused(message, model, *inputs, **options):
    """Check that capture refuses a forward pass, and leaves nothing behind."""
    with pytest.raises(CaptureError, match=message), torch.no_grad(), capture(model, **options):
        model(*inputs)
    assert is_clean(model)


def randomized(module, seed=0):
    """The module in evaluation mode, its attention far from uniform."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.eval()


def query_places(n_samples, n_queries):
    """Where the query may stand: in one place, or in one of each sample."""
    places = st.integers(-n_queries, n_queries - 1)
    return places | st.lists(places, min_size=n_samples, max_size=n_samples).map(torch.tensor)


def causal(n_queries, n_keys=None, diagonal=1):
    """What a causal mask forbids (Tq, Tk)."""
    return torch.ones(n_queries, n_keys or n_queries, dtype=torch.bool).triu(diagonal)


def is_clean(model):
    """Whether capture left neither a hook nor a mode behind."""
    return n_hooks(model) == 0 and torch._C._len_torch_function_stack() == 0
