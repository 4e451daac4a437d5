"""Attention that cannot be read: handed in, compiled, or unseen; and what is left alone."""

from functools import partial
from threading import Thread, current_thread, main_thread

import numpy as np
import pytest
import torch
from eager import (
    Given,
    attend_by_heads,
    causal,
    check,
    eager_weights,
    is_clean,
    refused,
    run_twice,
    softmaxed,
)  # fmt: skip
from eager import split_heads as split
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from historylens import record_attention
from historylens.capture import capture
from historylens.capture.probes import disturbed, mixing_modules

attend = functional.scaled_dot_product_attention


def attend_by_kernel(x):
    """Leaves PyTorch, as a kernel of one's own does: nothing of it is seen."""
    q = split(x).detach().numpy()
    w = np.exp(q @ q.swapaxes(-1, -2) / 2) * np.tri(x.shape[1], dtype=np.float32)
    return torch.from_numpy(w / w.sum(-1, keepdims=True) @ q).transpose(1, 2).flatten(2)


class FlashAttention(nn.Module):
    def forward(self, x):
        record_attention("mine", eager_weights(split(x), split(x), causal(x.shape[1])))
        return attend_by_kernel(x)


def test_weights_are_handed_in_by_name():
    model, x = nn.Sequential(FlashAttention(), nn.Linear(8, 8)), torch.randn(2, 5, 8)
    record = run_twice(model, x)  # at first without a capture, where nothing happens
    assert record.names == ("mine",)
    check(record[0], eager_weights(split(x), split(x), causal(5)), causal(5))
    assert run_twice(model, x, layers=["mine"]).names == ("mine",)
    refused(r"layers=\['0'\]; layers that ran: mine", model, x, layers=["0"])


@pytest.mark.parametrize("name", ["n", "", ".x"])
def test_handing_weights_in_is_no_attention_of_its_own_whatever_they_are_called(name):
    attend = Given(lambda x: softmaxed(x) @ split(x))
    hand_in = Given(lambda x: record_attention(name, torch.rand(1, 2, 5, 5)) or x)
    model = nn.Sequential(attend, hand_in)
    assert run_twice(model, torch.randn(1, 5, 8), softmax="1").names == ("0", name)


def test_weights_that_are_handed_in_stand_for_the_softmax_that_they_are_of():
    def forward(x):
        record_attention("mine", weights := softmaxed(x))
        return (weights * 1.5) @ split(x)

    x = torch.randn(1, 5, 8)
    record = run_twice(nn.Sequential(Given(forward)), x)
    assert record.names == ("mine",)
    check(record[0], softmaxed(x, torch.float64))


def test_calls_outside_the_model_and_layers_that_are_not_chosen_do_not_count():
    model, x = nn.Sequential(Given(attend_by_heads), FlashAttention()), torch.randn(1, 3, 8)
    with capture(model, layers=[0]) as record:
        for other in (attend_by_heads, softmaxed, Given(attend_by_heads), FlashAttention()):
            other(x)
        model(x)
    assert record.names == ("0",)


@settings(max_examples=40)
@given(
    n_queries=st.integers(1, 8), n_more=st.integers(0, 3), is_lower=st.booleans(),
    kind=st.sampled_from([torch.relu, torch.sigmoid]),
    mask=st.sampled_from([None, "bool", -torch.inf, -1e9]), seed=st.integers(0, 50),
)  # fmt: skip
def test_weights_of_any_kind_are_divided_by_their_sum(
    n_queries, n_more, is_lower, kind, mask, seed
):
    """A row of zeros stays one, and a weight of 0 is not forbidden by that.

    Without a mask all is seen, or all that is not ahead.
    """
    torch.manual_seed(seed)
    weights = kind(torch.randn(2, 3, n_queries, n_queries + n_more))
    forbidden = ahead = causal(*weights.shape[2:], 1 + n_more)
    if mask is None:
        forbidden = ahead if is_lower else ahead & (weights * ahead == 0).all()
    elif not is_lower:
        forbidden = torch.rand(ahead.shape) < 0.3
        forbidden[:, 0] = False
    weights, told = weights * ~forbidden, None if mask is None else ~forbidden
    if mask not in (None, "bool"):
        told = torch.zeros(forbidden.shape).masked_fill(forbidden, mask)
    with capture(nn.Identity(), maps=[0]) as record:
        record.add("mine", weights, told)
    assume(record[0].extra is None)  # by chance a mask of memory before the tokens
    check(record[0], (weights / weights.sum(-1, keepdim=True)).nan_to_num(), forbidden)


@pytest.mark.parametrize("fails", [True, False])
def test_an_error_of_the_capture_that_the_model_catches_is_raised_at_the_end(fails):
    def forward(x):
        q = split(x).flatten(0, 1)  # (B * H, T, d): needs heads=
        try:
            return attend(q, q, q)
        except RuntimeError:
            return q * 2

    model, x = nn.Sequential(Given(attend_by_heads), Given(forward)), torch.randn(2, 5, 8)
    before = run_twice(model, x, heads=2 if fails else None, layers=None if fails else [0])
    assert len(before) == 1 + fails
    if fails:
        refused("^1 attends with queries of 3 axes", model, x)


def test_modes_of_the_user_and_a_default_device_are_left_alone():
    class Counting(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.append(getattr(func, "__name__", ""))
            return func(*args, **kwargs or {})

    forward = lambda x: attend(*[split(x)] * 3, is_causal=True).transpose(1, 2).flatten(2)  # noqa: E731
    model, x, called = nn.Sequential(Given(forward)), torch.randn(1, 3, 8), []
    with Counting(), capture(model):
        model(x)
    assert called.count("scaled_dot_product_attention") == 1
    assert not {"softmax", "baddbmm", "sum", "new_zeros"} & {*called}  # its own arithmetic
    query = torch.ones(1, dtype=torch.int64)
    run_twice(model, x, query=query, context=partial(torch.device, "meta"))


def test_a_model_that_another_thread_runs_meanwhile_is_followed_here_alone():
    def forward(x):
        if current_thread() is main_thread():
            thread = Thread(target=model, args=(x,))
            thread.start()
            thread.join()
        return attend_by_heads(x)

    model = nn.Sequential(Given(forward), Given(attend_by_heads))
    with capture(model) as record:
        model(torch.randn(1, 3, 8))
    assert record.names == ("0", "1")


@pytest.mark.parametrize("is_softmax", [True, False])
def test_what_each_token_feeds_in_is_a_copy_in_float32(is_softmax):
    def forward(x):
        q = split(x)
        scores = q @ q.mT
        y = scores.softmax(-1) @ q if is_softmax else attend(q, q, q)
        scores.zero_()
        return y.transpose(1, 2).flatten(2)

    x = torch.randn(2, 5, 8).bfloat16()
    with capture(model := Given(forward), inputs=True) as record:
        model(x)
    fed, q = record[0].inputs, split(x)
    own = (q @ q.mT).diagonal(dim1=2, dim2=3).mT if is_softmax else torch.cat([x, x], -1)
    assert (fed.dtype, fed.untyped_storage().nbytes()) == (torch.float32, 4 * fed.numel())
    assert torch.equal(fed, own.float())


@pytest.mark.parametrize("maps", [np.array([1, 0]), torch.tensor([1, 0]), range(1, -1, -1)])
def test_samples_of_maps_may_be_an_array(maps):
    x = torch.randn(2, 5, 8)
    with capture(model := Given(attend_by_heads), maps=maps) as record:
        model(x)
    with capture(model, maps=[1, 0]) as again:
        model(x)
    assert torch.equal(record[0].maps.nan_to_num(), again[0].maps.nan_to_num())
    with capture(model, maps=maps[1:]) as record:  # the first sample alone
        model(x)
    assert len(record[0].maps) == 1


@pytest.mark.parametrize("how", ["wrapped", "in place", "forward", "inside", "rotary"])
@pytest.mark.filterwarnings("error:Using `torch.compile")
def test_compiled_code_runs_as_it_was_written_and_is_read(how):
    compiled, x = partial(torch.compile, backend="eager"), torch.randn(1, 2, 3, 4)
    own = lambda x: attend(x, x, x)  # noqa: E731
    turn = compiled(lambda x: x + 1 - 1.0)
    inside = {"inside": compiled(own), "rotary": lambda x: attend(turn(x), turn(x), x)}
    model = Given(Given(inside.get(how, own)))
    if how == "wrapped":
        model = compiled(model)
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "forward":
        model.inner.forward = compiled(model.inner.forward)
    before = torch._dynamo.eval_frame._stance.stance
    with torch.no_grad(), capture(model, maps=[0]) as record:
        model(x)
    assert torch._dynamo.eval_frame._stance.stance == before
    assert record.names == ("inner",)
    check(record[0], eager_weights(x, x))
    assert is_clean(model)


def test_code_that_is_compiled_while_it_is_captured_is_an_error_with_a_way_out(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    said = "^0 runs code .*set_stance.*top of the adapter file, before load"
    refused(said, nn.Sequential(Given(attend_by_heads)), torch.randn(1, 3, 8))


def convolution():
    part = Given(lambda x: part.channels(x.mT).mT)
    part.channels = nn.Conv1d(8, 8, 1)
    return part


def found_in(*parts, n_tokens=5):
    torch.manual_seed(0)
    model = Given(lambda x: [part(x) for part in (model.attend, *parts)])
    model.attend, model.parts = Given(attend_by_heads), nn.ModuleList(parts)
    with torch.no_grad():
        run = lambda: model.eval()(torch.randn(2, n_tokens, 8))  # noqa: E731
        found = mixing_modules(model, ["attend"], n_tokens, run)
    assert is_clean(model)
    return found


def test_a_module_that_mixes_tokens_unseen_is_found():
    """Also one that is traced, is recurrent, reads one token alone, or keeps a cache."""
    kernel = nn.Sequential(Given(attend_by_kernel), nn.ReLU())
    traced = torch.jit.trace(Given(lambda x: (x @ x.mT).softmax(-1) @ x), torch.ones(2, 5, 8))
    middle, gru = Given(lambda x: x + x[:, 2:3]), nn.GRU(8, 8, batch_first=True)
    cached = Given(lambda x, cache: cache.append(x) or torch.cat(cache, 1).cumsum(1)[:, -5:])
    around = Given(lambda x: cached(x, []))
    around.part = cached
    found = found_in(nn.Linear(8, 8), kernel, traced, gru, middle, around)
    assert list(found) == ["parts.1.0", "parts.2", "parts.3", "parts.4", "parts.5.part"]
    assert (found["parts.1.0"], found["parts.3"]) == ("Given", "GRU")


@pytest.mark.filterwarnings("error:Using `torch.compile")
def test_a_compiled_module_is_looked_at_as_it_was_written():
    mixes = Given(lambda x: x.cumsum(1))
    mixes.compile(backend="eager")
    assert [*found_in(torch.compile(nn.Linear(8, 8), backend="eager"), mixes)] == ["parts.1"]


def test_what_works_on_each_token_fails_or_differs_when_called_again_or_has_tokens_last_is_none():
    block = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    parts = [nn.LayerNorm(8), nn.ReLU(inplace=True), convolution(), nn.Dropout(0.5), block]
    runs = iter([1])
    broken = Given(lambda x: x + next(runs) * x.mean(1, keepdim=True))
    parts += [broken, nn.BatchNorm1d(5), Given(lambda x: x + torch.rand_like(x))]
    assert found_in(*parts) == {}
    assert found_in(convolution(), n_tokens=8) == {}  # (B, D, T) or (B, T, D)?


@pytest.mark.parametrize(("make", "axis"), [
    (lambda: Given(attend_by_heads), 1),
    (lambda: nn.TransformerEncoderLayer(8, 2, batch_first=True), 1),
    (lambda: nn.TransformerEncoderLayer(8, 2), 0),
    (lambda: Given(lambda x: (softmaxed(x) @ split(x)).transpose(1, 2)), 1),
])  # fmt: skip
def test_only_a_row_of_the_output_is_changed(make, axis):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(1, 5, 8).movedim(1, axis)
    with torch.no_grad():
        with capture(model) as record:
            plain = model(x)
        for row in (0, 3, None):
            with disturbed(model, record.names[-1], row):
                moved = (model(x) - plain).abs().movedim(axis, 0).flatten(1).amax(1) > 1e-6
            assert moved.tolist() == [row is None or i == row for i in range(5)]
        torch.testing.assert_close(model(x), plain)
    assert is_clean(model)
