"""Heads told apart, changed and kept from keys, whichever way a model attends."""

import math
from functools import partial

import pytest
import torch
from conftest import n_hooks
from eager import causal, eager_weights
from torch import nn
from torch.nn import functional

from historylens.capture.heads import heads

B, H, T, D = 3, 4, 9, 16
AHEAD = causal(T)
CLOSE = {"atol": 1e-5, "rtol": 0}


class Own(nn.Module):
    """Queries, keys and values by one projection, and one behind; `attend` differs."""

    def __init__(self, attend, n_kv=H):
        super().__init__()
        self.attend, self.n_kv = attend, n_kv
        self.make = nn.Linear(D, D + 2 * n_kv * D // H)
        self.project = nn.Linear(D, D)

    def parts(self, x):
        parts = self.make(x).split([D, *[self.n_kv * D // H] * 2], -1)
        return [y.unflatten(-1, (-1, D // H)).transpose(1, 2) for y in parts]

    def forward(self, x):
        return x + self.project(self.attend(*self.parts(x)).transpose(1, 2).reshape(x.shape))


def eager(product):
    def attend(q, k, v):
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(AHEAD, -1e9)
        return product(scores.softmax(-1), v)

    return attend


def bmm(weights, v):
    return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, weights.shape[:2])


def three_axes(attend):
    return lambda *qkv: attend(*(x.flatten(0, 1) for x in qkv)).unflatten(0, (-1, H))


sdpa = functional.scaled_dot_product_attention
WAYS = {
    "causal": lambda: Own(partial(sdpa, is_causal=True)),
    "bool mask": lambda: Own(lambda q, k, v: sdpa(q, k, v, ~AHEAD)),
    "float mask": lambda: Own(lambda q, k, v: sdpa(q, k, v, AHEAD * -1e9)),
    "grouped": lambda: Own(partial(sdpa, is_causal=True, enable_gqa=True), 2),
    "matmul": lambda: Own(eager(torch.matmul)),
    "bmm": lambda: Own(eager(bmm)),
    "tokens first": lambda: Own(
        eager(lambda w, v: torch.einsum("bhij,bjhd->bihd", w, v.transpose(1, 2)).transpose(1, 2))
    ),
    "tokens first, not in values": lambda: Own(
        eager(lambda w, v: torch.einsum("bhij,bhjd->bihd", w, v).transpose(1, 2))
    ),
    "3 axes": lambda: Own(three_axes(partial(sdpa, is_causal=True))),
    "softmax of 3 axes": lambda: Own(three_axes(eager(torch.bmm))),
}
OPTIONS = {"3 axes": {"heads": H}, "softmax of 3 axes": {"heads": H, "softmax": "Own"}}


class Encoder(nn.Module):
    """PyTorch's own layer, two of them."""

    def __init__(self, norm_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, H, 32, batch_first=True, norm_first=norm_first)
        self.inner = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.inner(x, mask=AHEAD, is_causal=True)


def made(way):
    torch.manual_seed(0)
    model = WAYS[way]() if way in WAYS else Encoder(way == "norm first")
    return model.eval(), torch.randn(B, T, D), OPTIONS.get(way, {})


def plain(model, x, hidden=None):
    """Queries, keys, values and weights of `Own`, in float64."""
    q, k, v = (y.double() for y in model.parts(x))
    v = v.repeat_interleave(H // model.n_kv, 1)
    weights = eager_weights(q, k, AHEAD if hidden is None else AHEAD | hidden[:, None])
    output = (weights @ v).transpose(1, 2).reshape(x.shape).float()
    return v, weights, x + model.project(output)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_values_outputs_rows_and_the_projection_are_those_of_a_plain_computation(way):
    model, x, options = made(way)
    with heads(model, **options) as seen:
        output = model(x)
    (layer,) = seen.values()
    v, weights, expected = plain(model, x)
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(layer.values.double(), v, **CLOSE)
    torch.testing.assert_close(layer.output.double(), weights @ v, **CLOSE)
    torch.testing.assert_close(layer.query_rows.double(), weights[:, :, -1], **CLOSE)
    assert torch.equal(layer.projection, model.project.weight)
    added = (output - x - model.project.bias)[:, -1]
    torch.testing.assert_close(layer.added().sum(1), added, **CLOSE)
    norms, along = layer.shares()
    torch.testing.assert_close(norms.sum(1), torch.ones(B).double())
    torch.testing.assert_close(along.sum(1), torch.ones(B).double())
    hidden = torch.zeros(B, T, T, dtype=torch.bool)
    hidden[1, 5:, 2], hidden[2, -1, :4] = True, True
    (name,) = seen
    with heads(model, hide={name: hidden}, **options):
        output = model(x)
    torch.testing.assert_close(output, plain(model, x, hidden)[2], **CLOSE)


@pytest.mark.parametrize("way", [*WAYS, "norm last", "norm first"])
@torch.no_grad()
def test_a_change_of_a_head_changes_what_it_adds_and_nothing_is_left_behind(way):
    model, x, options = made(way)
    before = n_hooks(model)
    with heads(model, **options) as seen:
        full = model(x)
    first, *more = seen
    with heads(model, change={first: torch.clone}, **options) as again:
        assert torch.equal(model(x), full)
    assert [*again] == [first]
    only = lambda output: output * torch.tensor([0.0, 1, 1, 1])[:, None, None]  # noqa: E731
    with heads(model, change={first: only}, **options) as again:
        changed = model(x)
    assert (again[first].output[:, 0] == 0).all()
    assert torch.equal(again[first].output[:, 1:], seen[first].output[:, 1:])
    if way in WAYS:
        lost = seen[first].output.clone()
        lost[:, 1:] = 0
        lost = lost.transpose(1, 2).flatten(2) @ seen[first].projection.T
        torch.testing.assert_close(full - changed, lost, **CLOSE)
    else:  # as with a projection that leaves the head out
        own = dict(model.named_modules())[f"{first}.self_attn"].out_proj.weight
        own[:, : D // H] = 0
        torch.testing.assert_close(changed, model(x), **CLOSE)
        assert len(more) == 1
    assert n_hooks(model) == before


@pytest.mark.parametrize("way", ["norm last", "norm first"])
@torch.no_grad()
def test_keys_are_hidden_in_pytorchs_own_layers_beside_padding_and_any_mask(way):
    model, x, _ = made(way)
    hidden = torch.zeros(B, T, T, dtype=torch.bool)
    hidden[0, 4:, 1] = True
    names = [f"inner.layers.{i}" for i in range(2)]
    with heads(model, hide=dict.fromkeys(names, hidden)):
        output = model(x)
    mask = (hidden | AHEAD).repeat_interleave(H, 0)
    torch.testing.assert_close(output, model.inner(x, mask=mask), **CLOSE)
    attention = model.inner.layers[0].self_attn
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[2, 6:] = True
    call = lambda m: attention(x, x, x, key_padding_mask=padding, attn_mask=m)[0]  # noqa: E731
    with heads(attention, hide={"MultiheadAttention": hidden}):
        output = call(None)
    torch.testing.assert_close(output, call(hidden.repeat_interleave(H, 0)), **CLOSE)


def test_a_layer_whose_heads_are_not_told_apart_is_missing():
    class Axes(nn.Module):
        def forward(self, x):
            weights = (x @ x.mT)[:, None].expand(-1, 2, -1, -1).softmax(-1)
            return torch.einsum("bhij,bjd->bid", weights, x)

    with heads(model := Axes()) as seen:
        model(torch.randn(B, T, D))
    assert seen == {}


@pytest.mark.parametrize("way", ["causal", "matmul", "norm last"])
@torch.no_grad()
def test_of_some_layers_the_others_are_left_as_they_are(way):
    part, x, _ = made(way)
    model = nn.Sequential(part, made(way)[0])
    expected = model(x)
    with heads(model, layers=["1"]) as seen:
        output = model(x)
    torch.testing.assert_close(output, expected, **CLOSE)
    assert {name.split(".")[0] for name in seen} == {"1"}


@pytest.mark.parametrize("way", ["sdpa", "eager", "no value"])
@torch.no_grad()
def test_keys_of_no_token_stay_in_sight(way):
    """Two memory keys before the tokens, as x-transformers has them, or a sink as gpt-oss has."""
    memory = torch.randn(1, H, 2, D // H)

    def attend(q, k, v):
        if way == "no value":
            scores = (q @ k.mT).masked_fill(AHEAD, -torch.inf)
            return functional.pad(scores, (0, 1)).softmax(-1)[..., :-1] @ v
        k, v = (torch.cat([memory.expand(B, -1, -1, -1), x], 2) for x in (k, v))
        seen = functional.pad(~AHEAD, (2, 0), value=True)
        if way == "sdpa":
            return sdpa(q, k, v, seen)
        return (q @ k.mT / math.sqrt(D // H)).masked_fill(~seen, -torch.inf).softmax(-1) @ v

    torch.manual_seed(0)
    model, x = Own(attend).eval(), torch.randn(B, T, D)
    with heads(model) as seen:
        full = model(x)
    (layer,) = seen.values()
    assert layer.values.shape[2] == layer.query_rows.shape[2] == T
    hidden = torch.zeros(B, T, T, dtype=torch.bool)
    hidden[:, 1:, 0] = True
    with heads(model, hide=dict.fromkeys(seen, hidden)):
        changed = model(x)
    moved = (changed - full).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False] + [True] * (T - 1)
