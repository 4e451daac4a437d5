"""Attention of a module's own calls: scaled dot products and softmax, equal to eager weights."""

import warnings

import pytest
import torch
from eager import CLOSE, CONTEXTS, causal, check, eager_weights, refused, run_twice
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.attention import bias as attention_bias
from torch.nn.functional import scaled_dot_product_attention as imported_by_name

from historylens.capture import capture


class Attend(nn.Module):
    """Calls scaled_dot_product_attention with whatever it is given."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, **self.options)


class ByName(Attend):
    def forward(self, q, k, v):
        return imported_by_name(query=q, key=k, value=v, **self.options)


class Overload(Attend):
    def forward(self, q, k, v):
        return torch.ops.aten.scaled_dot_product_attention(q, k, v, **self.options)


@settings(max_examples=50)
@given(
    n_samples=st.integers(1, 3),
    n_queries=st.integers(1, 9),
    n_keys=st.sampled_from([None, 1, 5, 12]),
    heads=st.sampled_from([(1, 1), (3, 3), (4, 2), (4, 1)]),
    mask=st.sampled_from(["none", "causal", "bool 2", "float 2", "bool 4", "float 4", "bool 3"]),
    scale=st.sampled_from([None, 0.3, 1.0]),
    kind=st.sampled_from([Attend, ByName, Overload]),
    dropout=st.booleans(),
    context=st.sampled_from(CONTEXTS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_scaled_dot_product_attention(
    n_samples, n_queries, n_keys, heads, mask, scale, kind, dropout, context, dtype, seed
):
    torch.manual_seed(seed)
    n_keys = n_keys or n_queries
    q = torch.randn(n_samples, heads[0], n_queries, 4).to(dtype).requires_grad_()
    k, v = torch.randn(2, n_samples, heads[1], n_keys, 4).to(dtype)
    options = {"scale": scale, "enable_gqa": heads[0] != heads[1], "dropout_p": 0.2 * dropout}
    leading = {"2": (), "3": (heads[0],), "4": (n_samples, 1)}.get(mask[-1], ())
    allowed = torch.rand(*leading, n_queries, n_keys) < 0.7
    allowed[..., 0] = True
    added = torch.randn(allowed.shape).to(dtype)
    if mask == "none":
        allowed[:] = True
    elif mask == "causal":
        allowed = torch.ones(n_queries, n_keys, dtype=torch.bool).tril()
        options["is_causal"] = True
    elif "bool" in mask:
        options["attn_mask"] = allowed
    else:
        options["attn_mask"] = added.masked_fill(~allowed, -torch.inf)
    record = run_twice(kind(**options), q, k, v, context=context)
    extra = added if "float" in mask else None
    check(record[0], eager_weights(q, k, ~allowed, extra, scale), ~allowed)


def test_a_causal_bias_of_either_corner():
    q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    for make, diagonal in (
        (attention_bias.causal_upper_left, 0),
        (attention_bias.causal_lower_right, 2),
    ):
        record = run_twice(Attend(attn_mask=make(3, 5)), q, k, v)
        forbidden = torch.ones(3, 5, dtype=torch.bool).triu(diagonal + 1)
        check(record[0], eager_weights(q, k, forbidden), forbidden)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_and_the_causal_flag_both_hold(dtype):
    q, k, v = torch.randn(3, 1, 2, 6, 4).unbind()
    allowed = torch.rand(6, 6) < 0.6
    allowed[:, 0] = True
    mask = allowed if dtype == torch.bool else torch.zeros(6, 6).masked_fill(~allowed, -torch.inf)
    model = Attend(attn_mask=mask, is_causal=True)
    forbidden = ~allowed | causal(6)
    weights = eager_weights(q, k, forbidden)
    with torch.no_grad():
        torch.testing.assert_close(model(q, k, v), (weights @ v.double()).float())
    check(run_twice(model, q, k, v)[0], weights, forbidden)


def test_axes_before_the_heads_count_as_samples():
    q, k, v = torch.randn(3, 2, 2, 4, 5, 4).unbind()
    mask = torch.rand(2, 1, 1, 5, 5) < 0.7
    mask[..., 0] = True
    record = run_twice(Attend(attn_mask=mask), q, k, v)
    forbidden = ~mask.expand(2, 2, 4, 5, 5).flatten(0, 1)
    check(record[0], eager_weights(q.flatten(0, 1), k.flatten(0, 1), forbidden), forbidden)


@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize("n_masks", [None, 1, 6])
def test_three_axes_with_the_number_of_heads(n_heads, n_masks):
    q, k, v = torch.randn(3, 6, 5, 4).unbind()
    allowed = torch.rand(n_masks or 1, 5, 5) < 0.7
    allowed[..., 0] = True
    model = Attend(attn_mask=allowed if n_masks else None)
    record = run_twice(model, q, k, v, heads=n_heads)
    forbidden = (~allowed & bool(n_masks)).expand(6, 5, 5)
    split = [x.unflatten(0, (-1, n_heads)) for x in (q, k, forbidden)]
    check(record[0], eager_weights(*split), split[2])


def test_two_axes_are_one_head():
    q, k, v = torch.randn(3, 5, 4).unbind()
    record = run_twice(Attend(is_causal=True), q, k, v)
    check(record[0], eager_weights(q[None, None], k[None, None], causal(5)), causal(5))


def test_gradients_are_those_without_capture():
    def split(x):
        return (x.unflatten(-1, (2, -1)).transpose(1, 2),) * 3

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.attend = nn.TransformerEncoderLayer(8, 2, dropout=0.0), Attend()

        def forward(self, x):
            return self.attend(*split(self.layer(x)))

    model, x = Model(), torch.randn(2, 5, 8)
    model(x).square().sum().backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with capture(model):
        model(x).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))


def test_autocast_does_not_reach_the_statistics():
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        record = run_twice(Attend(), q, k, v)
    check(record[0], eager_weights(q, k), torch.zeros(9, 9, dtype=torch.bool))


def test_two_calls_of_one_module_are_two_entries():
    class Twice(nn.Module):
        def forward(self, q, k, v):
            attend = functional.scaled_dot_product_attention
            return attend(q, k, v) - attend(k, q, v)

    q, k, v = torch.randn(3, 1, 2, 4, 4).unbind()
    record = run_twice(Twice(), q, k, v)
    assert record.names == ("Twice", "Twice #2")
    torch.testing.assert_close(record[1].query_rows, eager_weights(k, q)[:, :, -1], **CLOSE)


class Explicit(nn.Module):
    """Eager attention whose weights come from `weigh(scores)`."""

    def __init__(self, weigh, mask_value=-torch.inf, dtype=torch.float32):
        super().__init__()
        self.softmax = weigh
        self.mask_value, self.dtype = mask_value, dtype

    def scores(self, x):
        heads = x.to(self.dtype).unflatten(-1, (2, -1)).transpose(1, 2)
        return (heads @ heads.mT).masked_fill(causal(x.shape[1]), self.mask_value)

    def forward(self, x):
        heads = x.to(self.dtype).unflatten(-1, (2, -1)).transpose(1, 2)
        return (self.softmax(self.scores(x)).to(self.dtype) @ heads).transpose(1, 2).flatten(2)


SOFTMAX = {
    "nn.Softmax": nn.Softmax(dim=-1),
    "nn.Softmax by number": nn.Softmax(dim=3),
    "functional": lambda s: functional.softmax(s, dim=-1),
    "functional in float32": lambda s: functional.softmax(s, -1, dtype=torch.float32),
    "torch": lambda s: torch.softmax(s, -1),
    "torch, by keyword": lambda s: torch.softmax(input=s, dim=-1),
    "torch, in place": lambda s: torch.softmax(s, -1, out=s),
    "method": lambda s: s.softmax(dim=-1),
    "special": lambda s: torch.special.softmax(s, -1),
    "aten": lambda s: torch.ops.aten._softmax(s, -1, False),
}


@pytest.mark.parametrize("weigh", SOFTMAX)
@pytest.mark.parametrize(
    ("mask_value", "context", "dtype"),
    [
        (-torch.inf, torch.no_grad, torch.float32),
        (-1e9, torch.enable_grad, torch.bfloat16),
        (torch.finfo(torch.float32).min, torch.inference_mode, torch.float32),
    ],
)
def test_an_explicit_softmax(weigh, mask_value, context, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(Explicit(SOFTMAX[weigh], mask_value, dtype), nn.Linear(8, 8, dtype=dtype))
    x = torch.randn(2, 6, 8)
    record = run_twice(model, x.requires_grad_("in place" not in weigh), context=context)
    assert record.names == ("0",)
    weights = model[0].scores(x).detach().double().softmax(-1)
    check(record[0], weights, causal(6))
    found = run_twice(model, x, context=context, query=3)[0]
    torch.testing.assert_close(found.query_rows, weights[:, :, 3], **CLOSE)
    assert found.visible.tolist() == [[True] * 4 + [False] * 2] * 2


def test_a_softmax_of_three_axes_is_named():
    class Head(nn.Module):
        def forward(self, x):
            return (x @ x.mT).softmax(-1) @ x

    model, x = nn.Sequential(Head(), Head()), torch.randn(2, 5, 4)
    refused(r'softmax over \(2, 5, 5\) .*softmax="0".*heads=H', model, x)
    record = run_twice(model, x, softmax=["0", "1"], heads=1)
    weights = (x @ x.mT).double().softmax(-1)[:, None]
    check(record[0], weights, torch.zeros(5, 5, dtype=torch.bool))


def test_cross_attention_through_a_softmax_is_named():
    class CrossAttention(nn.Module):
        def forward(self, q, k):
            return (q @ k.mT).softmax(-1)

    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    model = CrossAttention()
    refused("CrossAttention .*was not seen.*softmax over", model, q, k)
    record = run_twice(model, q, k, softmax="Cross*")
    weights = (q @ k.mT).double().softmax(-1)
    check(record[0], weights, torch.zeros(3, 5, dtype=torch.bool))


def test_a_softmax_over_another_axis_is_no_attention():
    class Segmentation(nn.Module):
        def forward(self, x):
            return x.softmax(1) + x.log_softmax(-1)

    refused("found no", Segmentation(), torch.randn(1, 3, 5, 5))


class Kernel(nn.Module):
    """A fused kernel that nobody can look into."""

    def forward(self, q, k, v):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


class ExternalAttention(nn.Module):
    def forward(self, q, k, v):
        return torch.from_numpy((q.numpy() + v.numpy())[:])


class Nested(Attend):
    def forward(self, q, k, v):
        super().forward(*[torch.nested.nested_tensor(list(q), layout=torch.jagged)] * 3)
        return q


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Kernel, r"^1 calls _scaled_dot_product_flash_attention_for_cpu, .*layers="),
        (ExternalAttention, r"^1 is a ExternalAttention that ran, but .*not seen.*layers="),
        (Nested, r"^1 calls scaled_dot_product_attention with nested tensors"),
    ],
)
def test_what_cannot_be_read_is_an_error_though_other_layers_are_seen(kind, message):
    class Stack(nn.Sequential):
        def forward(self, q):
            return self[1](self[0](q, q, q), q, q)

    model, q = Stack(Attend(), kind()), torch.randn(1, 2, 3, 8)
    refused(message, model, q)
    assert run_twice(model, q, layers=["0"]).names == ("0",)


def test_flex_attention_is_an_error():
    from torch.nn.attention.flex_attention import flex_attention

    class Flex(nn.Module):
        def forward(self, q):
            return flex_attention(q, q, q)

    message = "^0 runs code compiled .*set_stance.*sdpa"
    with warnings.catch_warnings(action="ignore"):
        refused(message, nn.Sequential(Flex()), torch.randn(1, 2, 16, 16))


@pytest.mark.parametrize("how", ["wrapped", "in place", "forward", "inside"])
@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_compiled_modules_are_an_error(how):
    model, options = nn.Sequential(Attend()), {"backend": "eager"}
    if how == "wrapped":
        model = torch.compile(model, **options)
    elif how == "in place":
        model.compile(**options)
    elif how == "forward":
        model[0].forward = torch.compile(model[0].forward, **options)
    else:
        attend = functional.scaled_dot_product_attention
        inner = torch.compile(lambda *tensors: attend(*tensors), **options)

        class Inside(nn.Module):
            def forward(self, q, k, v):
                return inner(q, k, v)

        model = Inside()
    message = r"compiled by torch\.compile .*force_eager"
    refused(message, model, *[torch.randn(1, 2, 3, 4)] * 3)


def test_an_attention_that_leaves_the_work_to_a_module_inside():
    class OuterAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = nn.Sequential(Explicit(nn.Softmax(-1)))

        def forward(self, x):
            return self.core(x)

    assert run_twice(OuterAttention(), torch.randn(1, 3, 8)).names == ("core.0",)


def test_calls_outside_the_model_do_not_count():
    model, q = Attend(), torch.randn(1, 2, 3, 4)
    with capture(model) as record:
        functional.scaled_dot_product_attention(q, q, q)
        Attend()(q, q, q)
        model(q, q, q)
        q.softmax(-1)
    assert record.names == ("Attend",)


def test_a_mode_of_the_users_own_goes_on_working():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.attention = Attend(), nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            with torch.device("cpu"):
                x = self.attention(x, x, x, need_weights=False)[0]
            q = x[:, None]
            return self.attend(q, q, q)

    assert run_twice(Model().eval(), torch.randn(2, 5, 4)).names == ("attention", "attend")
