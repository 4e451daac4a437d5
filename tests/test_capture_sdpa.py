"""Attention of a module's own calls: scaled dot products and softmax, equal to eager weights."""

import sys
import warnings
from functools import partial

import eager
import pytest
import torch
from eager import CLOSE, CONTEXTS, Attend, Given, causal, check, eager_weights, refused, run_twice
from eager import split_heads as split
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention as attend

from historylens.capture import capture

CALLS = [
    attend,
    lambda q, k, v, **options: attend(query=q, key=k, value=v, **options),
    torch.ops.aten.scaled_dot_product_attention,
]


@settings(max_examples=40)
@given(
    n_samples=st.integers(1, 3), n_queries=st.integers(1, 9), call=st.sampled_from(CALLS),
    n_keys=st.sampled_from([None, 1, 5, 12]), context=st.sampled_from(CONTEXTS),
    heads=st.sampled_from([(1, 1), (3, 3), (4, 2), (4, 1)]),
    mask=st.sampled_from(["none", "causal", "bool 2", "float 2", "bool 4", "float 4", "bool 3"]),
    scale=st.sampled_from([None, 0.3, 1.0]), dropout=st.booleans(), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    low=st.sampled_from(eager.LOW), data=st.data(),
)  # fmt: skip
def test_scaled_dot_product_attention(
    n_samples, n_queries, n_keys, heads, mask, scale, call, dropout, context, dtype, seed, low, data
):
    """With a bias and what forbids in one mask, and the query anywhere."""
    torch.manual_seed(seed)
    n_keys = n_keys or n_queries
    q = torch.randn(n_samples, heads[0], n_queries, 4).to(dtype).requires_grad_()
    k, v = torch.randn(2, n_samples, heads[1], n_keys, 4).to(dtype)
    options = {"scale": scale, "enable_gqa": heads[0] != heads[1], "dropout_p": 0.2 * dropout}
    leading = {"2": (), "3": (heads[0],), "4": (n_samples, 1)}.get(mask[-1], ())
    forbidden = torch.rand(*leading, n_queries, n_keys) < 0.3
    forbidden[..., 0] = False
    added = torch.randn(forbidden.shape).to(dtype)
    if mask == "none":
        forbidden[:] = False
    elif mask == "causal":
        forbidden = causal(n_queries, n_keys)
        options["is_causal"] = True
    elif "bool" in mask:
        options["attn_mask"] = ~forbidden
    else:
        options["attn_mask"] = torch.where(forbidden, added + low, added)
    query = data.draw(eager.query_places(n_samples, n_queries))
    record = run_twice(Given(call, **options), q, k, v, context=context, query=query)
    assume(record[0].extra is None)  # by chance a mask of memory before the tokens
    extra = added if "float" in mask else None
    check(record[0], eager_weights(q, k, forbidden, extra, scale), forbidden, query=query)


@pytest.mark.parametrize(("mask", "diagonal"), [(causal_upper_left, 1), (causal_lower_right, 3)])
def test_a_causal_bias_of_either_corner(mask, diagonal):
    q, k, mask = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4), mask(3, 5)
    forbidden = causal(3, 5, diagonal)
    check(run_twice(Attend(attn_mask=mask), q, k, k)[0], eager_weights(q, k, forbidden), forbidden)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_and_the_causal_flag_both_hold(dtype):
    q, k, v = torch.randn(3, 1, 2, 6, 4).unbind()
    mask = torch.rand(6, 6) < 0.6
    mask[:, 0] = True
    forbidden = ~mask | causal(6)
    mask = mask if dtype == torch.bool else mask.log()
    model, weights = Attend(attn_mask=mask, is_causal=True), eager_weights(q, k, forbidden)
    torch.testing.assert_close(model(q, k, v), (weights @ v.double()).float())
    check(run_twice(model, q, k, v)[0], weights, forbidden)


@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize("n_masks", [None, 1, 6])
def test_three_axes_with_the_number_of_heads(n_heads, n_masks):
    q, k, v = torch.randn(3, 6, 5, 4).unbind()
    allowed = (torch.rand(n_masks or 1, 5, 5) < 0.7) | torch.eye(5, dtype=torch.bool)
    model = Attend(attn_mask=allowed if n_masks else None)
    record = run_twice(model, q, k, v, heads=n_heads)
    forbidden = (~allowed & bool(n_masks)).expand(6, 5, 5)
    q, k, forbidden = (x.unflatten(0, (-1, n_heads)) for x in (q, k, forbidden))
    check(record[0], eager_weights(q, k, forbidden), forbidden)


def test_two_axes_are_one_head_more_than_four_are_samples_and_others_are_broadcast():
    q = torch.randn(5, 4)
    record = run_twice(Attend(is_causal=True), q, q, q)
    check(record[0], eager_weights(q[None, None], q[None, None], causal(5)), causal(5))
    q, k = torch.randn(2, 2, 2, 4, 5, 4).unbind()
    mask = (torch.rand(2, 1, 1, 5, 5) < 0.7) | torch.eye(5, dtype=torch.bool)
    record = run_twice(Attend(attn_mask=mask), q, k, k)
    forbidden = ~mask.expand(2, 2, 4, 5, 5).flatten(0, 1)
    check(record[0], eager_weights(q.flatten(0, 1), k.flatten(0, 1), forbidden), forbidden)
    q, k = torch.randn(2, 1, 5, 4), torch.randn(1, 3, 5, 4)
    record = run_twice(Attend(), q, k, k)
    check(record[0], eager_weights(q.expand(2, 3, 5, 4), k.expand(2, 3, 5, 4)))


def test_gradients_are_those_without_capture():
    layer, x = nn.TransformerEncoderLayer(8, 2, dropout=0.0), torch.randn(2, 5, 8)
    model = nn.Sequential(layer, Given(lambda x: attend(*[split(x)] * 3)))

    def gradients():
        return torch.autograd.grad(model(x).square().sum(), [*model.parameters()])

    plain = gradients()
    with capture(model):
        captured = gradients()
    assert all(map(torch.equal, plain, captured))


def test_two_calls_of_one_module_are_two_entries():
    q, k, v = torch.randn(3, 1, 2, 4, 4).unbind()
    model = Given(lambda q, k, v: attend(q, k, v) - attend(k, q, v))
    record = run_twice(model, q, k, v, layers=["Given"])
    assert record.names == ("Given", "Given #2")
    torch.testing.assert_close(record[1].query_rows, eager_weights(k, q)[:, :, -1], **CLOSE)


SOFTMAX = {
    "nn.Softmax by number": nn.Softmax(dim=3),
    "functional in float32": lambda s: functional.softmax(s, -1, dtype=torch.float32),
    "torch, by keyword": lambda s: torch.softmax(input=s, dim=-1),
    "torch, in place": lambda s: torch.softmax(s, -1, out=s),
    "method": lambda s: s.softmax(dim=-1),
    "special": lambda s: torch.special.softmax(s, -1),
    "aten": lambda s: torch.ops.aten._softmax(s, -1, False),
}


class CrossAttention(Given):
    """By its name one that attends, also where another does so inside it."""


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize(("mask_value", "context", "dtype"), [
    (-torch.inf, torch.no_grad, torch.float32),
    (-1e3, torch.enable_grad, torch.bfloat16),
    (torch.finfo(torch.float32).min, torch.inference_mode, torch.float32),
])  # fmt: skip
def test_an_explicit_softmax(softmax, mask_value, context, dtype):
    def scores(heads):
        return (heads @ heads.mT).masked_fill(causal(6), mask_value)

    def attend_by_softmax(x):
        heads = split(x.to(dtype))
        weights = core.softmax(scores(heads)).to(dtype)
        return (weights @ heads).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    core = Given(attend_by_softmax)
    core.softmax = SOFTMAX[softmax]
    model, x = CrossAttention(nn.Sequential(core, nn.Identity())), torch.randn(2, 6, 8)
    record = run_twice(model, x.requires_grad_("in place" not in softmax), context=context)
    assert record.names == ("inner.0",)
    weights = scores(split(x.detach().to(dtype))).double().softmax(-1)
    check(record[0], weights, causal(6))


def test_a_softmax_of_three_axes_or_of_cross_attention_is_named():
    model = nn.Sequential(*[Given(lambda x: (x @ x.mT).softmax(-1) @ x) for _ in range(2)])
    x = torch.randn(2, 5, 4)
    said = (
        r'softmax over \(2, 5, 5\) .*softmax="0".*heads=H.*\(B, H, Tq, Tk\).*implementation="sdpa"'
    )
    refused(f"^(?!.*eager).*{said}", model, x)
    record = run_twice(model, x, softmax=["0", "1"], heads=1)
    check(record[0], (x @ x.mT).double().softmax(-1)[:, None])
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    model = CrossAttention(lambda q, k: (q @ k.mT).softmax(-1))
    refused("CrossAttention .*was not seen.*softmax over", model, q, k)
    record = run_twice(model, q, k, softmax="Cross*")
    check(record[0], (q @ k.mT).double().softmax(-1))


def test_a_softmax_over_another_axis_or_of_whole_numbers_is_no_attention():
    segment = Given(lambda x: x.softmax(1) + x.log_softmax(-1))
    refused(r"found no .*record_attention\(name, weights\)", segment, torch.randn(1, 3, 5, 5))
    of_counts = Given(functional.softmax, dim=-1, dtype=torch.float32)
    refused("found no", of_counts, torch.ones(2, 2, 3, 5, dtype=torch.int64))


fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
in_numpy = CrossAttention(lambda q, k, v: torch.from_numpy(q.numpy() + v.numpy()))
nest = partial(torch.nested.nested_tensor, layout=torch.jagged)
nested = Given(lambda q, *_: attend(*[nest([*q])] * 3))
mapped = Given(torch.func.vmap(lambda q, *_: (q @ q.mT)[None].softmax(-1)[0] @ q))


@pytest.mark.parametrize(("unread", "message"), [
    (Given(lambda *qkv: fused(*qkv)[0]), rf"^1 calls {fused.__name__}, .*layers="),
    (in_numpy, r"^1 is a CrossAttention that ran, but .*seen.*layers="),
    (mapped, r"^1 runs inside torch\.func\.vmap, .*layers="),
    (nested, "^1 calls scaled_dot_product_attention with nested tensors"),
    (Given(flex_attention), "^1 calls flex_attention, a kernel .*scaled_dot_product.*layers="),
])  # fmt: skip
def test_what_cannot_be_read_is_an_error_though_other_layers_are_seen(unread, message):
    model, q = nn.Sequential(Attend(), unread), torch.randn(1, 2, 16, 16)
    model.forward = lambda q: model[0](q, q, q) + model[1](q, q, q).sum()
    with warnings.catch_warnings(action="ignore"):
        refused(message, model, q)
    assert run_twice(model, q, layers=["0"]).names == ("0",)


def test_flex_attention_is_refused_as_well_where_it_is_the_first_to_be_compiled(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo.eval_frame", raising=False)
    q = torch.randn(1, 2, 16, 16)
    with warnings.catch_warnings(action="ignore"):
        refused("^Given calls flex_attention, a kernel", Given(flex_attention), q, q, q)


def test_a_mode_of_the_users_own_goes_on_working():
    def forward(x):
        with torch.device("cpu"):
            return attention(x, x, x, need_weights=False)[0] + attend(*[x[:, None]] * 3)[:, 0]

    model = Given(forward)
    model.part = attention = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    assert run_twice(model, torch.randn(2, 5, 4)).names == ("part", "Given")
