"""Heads told apart, changed and kept from keys, whichever way a model attends."""

import math
from functools import partial

import pytest
import torch
from eager import Given, causal, eager_weights, is_clean
from torch import nn
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from historylens.capture import capture
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


def tokens_first(axes, weights, v):
    return torch.einsum(axes, weights, v).transpose(1, 2)


def three_axes(attend):
    return lambda *qkv: attend(*(x.flatten(0, 1) for x in qkv)).unflatten(0, (-1, H))


bare = partial(sdpa, is_causal=True)
WAYS = {
    "causal": bare,
    "bool mask": partial(sdpa, attn_mask=~AHEAD),
    "float mask": partial(sdpa, attn_mask=AHEAD * -1e9),
    "grouped": partial(bare, enable_gqa=True),
    "matmul": eager(torch.matmul),
    "bmm": eager(bmm),
    "tokens first": eager(lambda w, v: tokens_first("bhij,bjhd->bihd", w, v.transpose(1, 2))),
    "tokens first, not in values": eager(partial(tokens_first, "bhij,bhjd->bihd")),
    "3 axes": three_axes(bare),
    "softmax of 3 axes": three_axes(eager(torch.bmm)),
}
OPTIONS = {"3 axes": {"heads": H}, "softmax of 3 axes": {"heads": H, "softmax": "Own"}}


def encoder(way):
    layer = nn.TransformerEncoderLayer(D, H, 32, batch_first=True, norm_first=way == "norm first")
    inner = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Given(inner, mask=AHEAD, is_causal=True)


def made(way):
    torch.manual_seed(0)
    model = Own(WAYS[way], 2 if way == "grouped" else H) if way in WAYS else encoder(way)
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
    ((name, layer),) = seen.items()
    v, weights, expected = plain(model, x)
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(layer.values.double(), v, **CLOSE)
    torch.testing.assert_close(layer.output.double(), weights @ v, **CLOSE)
    torch.testing.assert_close(layer.query_rows.double(), weights[:, :, -1], **CLOSE)
    assert torch.equal(layer.projection, model.project.weight)
    added = (output - x - model.project.bias)[:, -1]
    torch.testing.assert_close(layer.added().sum(1), added, **CLOSE)
    for shares in layer.shares():
        torch.testing.assert_close(shares.sum(1), torch.ones(B).double())
    hidden = torch.zeros(B, T, T, dtype=torch.bool)
    hidden[1, 5:, 2], hidden[2, -1, :4] = True, True
    with heads(model, hide={name: hidden}, **options):
        output = model(x)
    torch.testing.assert_close(output, plain(model, x, hidden)[2], **CLOSE)


@pytest.mark.parametrize("way", [*WAYS, "norm last", "norm first"])
@torch.no_grad()
def test_a_change_of_a_head_changes_what_it_adds_and_nothing_is_left_behind(way):
    model, x, options = made(way)
    with heads(model, **options) as seen:
        full = model(x)
    assert len(seen) == (1 if way in WAYS else 2)
    first = next(iter(seen))
    with heads(model, change={first: torch.clone}, **options) as again:
        assert torch.equal(model(x), full)
    assert [*again] == [first]
    only = lambda output: output * torch.tensor([0.0, 1, 1, 1])[:, None, None]  # noqa: E731
    with heads(model, change={first: only}, **options) as again:
        changed = model(x)
    assert is_clean(model)
    assert (again[first].output[:, 0] == 0).all()
    assert torch.equal(again[first].output[:, 1:], seen[first].output[:, 1:])
    projection = model.project if way in WAYS else model.inner.layers[0].self_attn.out_proj
    projection.weight[:, : D // H] = 0  # it leaves the head out
    torch.testing.assert_close(changed, model(x), **CLOSE)


def test_dropout_draws_as_without_and_what_is_run_again_is_not_seen():
    model = nn.TransformerEncoderLayer(D, H, dropout=0.5, batch_first=True)  # in training
    x = torch.randn(2, 5, D)
    torch.manual_seed(0)
    plain = model(x)
    torch.manual_seed(0)
    with capture(model) as record, heads(model) as seen:
        assert torch.equal(model(x), plain)
    assert (len(record), len(seen)) == (1, 1)


@pytest.mark.parametrize("way", ["norm last", "norm first"])
@torch.no_grad()
def test_keys_are_hidden_in_pytorchs_own_layers_beside_padding_and_any_mask(way):
    model, x, _ = made(way)
    hidden = torch.zeros(B, T, T, dtype=torch.bool)
    hidden[0, 4:, 1] = True
    with heads(model, hide={f"inner.layers.{i}": hidden for i in range(2)}):
        output = model(x)
    mask = (hidden | AHEAD).repeat_interleave(H, 0)
    torch.testing.assert_close(output, model.inner(x, mask=mask), **CLOSE)
    attention = model.inner.layers[0].self_attn
    padding = torch.arange(T) >= torch.tensor([9, 9, 6])[:, None]
    call = lambda m: attention(x, x, x, key_padding_mask=padding, attn_mask=m)[0]  # noqa: E731
    with heads(attention, hide={"MultiheadAttention": hidden}):
        output = call(None)
    torch.testing.assert_close(output, call(hidden.repeat_interleave(H, 0)), **CLOSE)


def test_a_layer_whose_heads_are_not_told_apart_is_missing():
    def forward(x):
        weights = (x @ x.mT)[:, None].expand(-1, 2, -1, -1).softmax(-1)
        return torch.einsum("bhij,bjd->bid", weights, x)

    with heads(model := Given(forward)) as seen:
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
    memory = torch.randn(B, H, 2, D // H)

    def attend(q, k, v):
        if way == "no value":
            scores = (q @ k.mT).masked_fill(AHEAD, -torch.inf)
            return pad(scores, (0, 1)).softmax(-1)[..., :-1] @ v
        k, v, ahead = torch.cat([memory, k], 2), torch.cat([memory, v], 2), pad(AHEAD, (2, 0))
        if way == "sdpa":
            return sdpa(q, k, v, ~ahead)
        return (q @ k.mT).masked_fill(ahead, -torch.inf).softmax(-1) @ v

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
