"""Captured attention equals an eager softmax(q k^T / sqrt(d) + mask); the model never notices."""

import gc
import math
import weakref

import eager
import pytest
import torch
from eager import Given, causal, check, fast_path, is_clean, randomized, run_twice, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from historylens.capture import CaptureError, capture, masks, rows
from historylens.capture.inputs import Call, Mask


def make_encoder(n_layers=3, nested=False, batch_first=True, **options):
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, "gelu", batch_first=batch_first, **options)
    return randomized(nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=nested))


causal_mask = nn.Transformer.generate_square_subsequent_mask


@given(
    n_samples=st.integers(1, 3), n_tokens=st.integers(1, 40), norm_first=st.booleans(),
    batch_first=st.booleans(), mask=st.sampled_from([None, "float", "bool"]), hint=st.booleans(),
    padding=st.booleans(), nested=st.booleans(), training=st.booleans(),
    context=st.sampled_from(eager.CONTEXTS),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*nested", "ignore:Support for mismatched")
def test_capture_equals_eager_attention_and_leaves_the_outputs_as_they_are(
    n_samples, n_tokens, norm_first, batch_first, mask, hint, padding, nested, training, context
):
    """As without the fast path to the bit, as with it but for the last digits.

    The query may be padding itself; a padded position is anything on the fast path.
    """
    options = {"norm_first": norm_first, "batch_first": batch_first, "nested": nested}
    encoder = make_encoder(2, **options).train(training)
    x = torch.randn((n_samples, n_tokens, 16) if batch_first else (n_tokens, n_samples, 16))
    ahead = causal(n_tokens) & (mask is not None)
    src_mask = {None: None, "bool": ahead}.get(mask, causal_mask(n_tokens))
    padded = torch.arange(n_tokens) >= torch.randint(1, n_tokens + 1, (n_samples, 1))
    padded = padded if padding else None
    inputs = x, src_mask, padded, True if hint and mask else None
    record = run_twice(encoder, *inputs, context=context)
    forbidden = ahead | padded[:, None, None, :] if padding else ahead
    with context(), fast_path(False):
        for found, layer in zip(record, encoder.layers, strict=True):
            inside = layer.norm1(x) if norm_first else x
            inside = inside if batch_first else inside.transpose(0, 1)
            weights = weights_of(layer.self_attn, inside, inside, forbidden)
            check(found, weights, forbidden, padded)
            x = layer(x, ahead, padded)
    with context(), fast_path(True):
        with capture(encoder, received=False):
            captured = encoder(*inputs)
        plain = encoder(*inputs)
    real = torch.ones(n_samples, n_tokens, dtype=torch.bool) if padded is None else ~padded
    real = (real if batch_first else real.T)[:, : plain.shape[1]]
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(captured[:, : plain.shape[1]][real], plain[real], **close)


def test_only_what_is_asked_for_is_kept():
    record = run_twice(make_encoder(2), torch.randn(2, 5, 16), maps=None, received=False)
    assert record[1].received is record[1].maps is record[1].map_rows is None
    assert [layer.name for layer in record] == ["layers.0", "layers.1"]


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
    floor = masks.floor_of(numbers.view(shape))
    low = numbers[(numbers < floor) & numbers.isfinite()]
    assert low.tolist() == torch.tensor([value] * is_masked).tolist()


def test_a_mask_that_is_expanded_is_looked_at_once(monkeypatch):
    mask = torch.zeros(8, 8).masked_fill(causal(8), -1e9)
    looked, fill = [], torch.Tensor.masked_fill
    counted = lambda self, *args: looked.append(self.numel()) or fill(self, *args)  # noqa: E731
    monkeypatch.setattr(masks, "CHUNK_CPU", 8)
    monkeypatch.setattr(torch.Tensor, "masked_fill", counted)
    assert masks.floor_of(mask.expand(50, 20, 8, 8)) == -900
    assert sum(looked) == 2 * 64
    assert max(looked) == 8


EACH = torch.arange(2 * 3 * 41 * 41).view(2, 3, 41, 41) % 7 < 3
ONE = causal_mask(41)[None, None]


@pytest.mark.parametrize("block", [1, 64, 700])
@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True), Mask((ONE,)), Mask((EACH,))])
def test_block_size_does_not_change_the_result(block, mask, monkeypatch):
    torch.manual_seed(0)
    call = Call(*torch.randn(2, 2, 3, 41, 4).unbind(), mask)
    whole = rows.received(call), rows.maps(call, [1], 16, [41])
    monkeypatch.setattr(rows, "BLOCK_SCORES_CPU", block)
    monkeypatch.setattr(rows, "MIN_BLOCK_ROWS", 3)
    found = rows.received(call), rows.maps(call, [1], 16, [41])
    torch.testing.assert_close(found, whole, equal_nan=True)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_error_leaves_nothing_behind_and_what_it_left_running_has_ended(error):
    """Hooks that are always called are not, on a KeyboardInterrupt."""

    def fail(x):
        attention(x, x, x)
        raise error

    encoder, x, failing = make_encoder(1), torch.randn(1, 5, 16), Given(fail)
    failing.part = attention = nn.MultiheadAttention(16, 4, batch_first=True)
    model = nn.Sequential(failing, encoder)
    with torch.no_grad(), capture(model, layers=["1"]) as record:
        assert not is_clean(model)
        with pytest.raises(error):
            model(x)
        encoder(x)
    assert record.names == ("1.layers.0",)
    with pytest.raises(error), capture(model):
        model(x)
    assert is_clean(model)


def test_a_record_is_freed_with_its_last_reference_and_takes_nothing_in_after_its_block():
    encoder, x = make_encoder(), torch.randn(2, 5, 16)
    gc.disable()  # what is in a cycle would wait for it, however large
    try:
        with capture(nn.Identity()) as outer, capture(encoder, maps=[0]) as record:
            outer.add("of the outer", torch.ones(1, 1, 5, 5))
            encoder(x)
            record.add("of this", torch.ones(1, 1, 5, 5))
        assert (outer.names, record.names[3:]) == (("of the outer",), ("of this",))
        with pytest.raises(CaptureError, match="mine is handed in too late"):
            record.add("mine", torch.ones(1, 1, 5, 5))
        maps = weakref.ref(record[0].maps)
        del record
        assert maps() is None
    finally:
        gc.enable()


def test_a_record_does_not_keep_the_mask_of_the_model_after_an_error_either():
    def fail(*tensors):
        nn.functional.scaled_dot_product_attention(*tensors)
        raise KeyError

    inputs = [*[torch.randn(1, 2, 5, 4)] * 3, torch.zeros(5, 5)]
    model, mask = Given(fail), weakref.ref(inputs[3])
    with pytest.raises(KeyError), capture(model) as record:
        model(*inputs)
    del inputs
    assert (mask(), len(record)) == (None, 1)


@pytest.mark.parametrize("n_run", [0, 1])
def test_a_layer_that_does_not_run_is_an_error(n_run):
    encoder, x = make_encoder(2), torch.randn(1, 5, 16)
    message = rf"layers\.{n_run} has not run"
    with pytest.raises(CaptureError, match=message), capture(encoder) as record:  # noqa: PT012
        for layer in encoder.layers[:n_run]:
            layer(x)
        with pytest.raises(CaptureError, match=message):
            _ = record[0]
    assert is_clean(encoder)


class WithoutAttention(nn.TransformerEncoderLayer):
    def _sa_block(self, x, *args, **kwargs):
        return x


@pytest.mark.parametrize(("model", "message"), [
    (nn.Linear(8, 8), "found no nn.TransformerEncoderLayer in Linear"),
    (WithoutAttention(8, 2), "WithoutAttention that ran, but its attention was not seen"),
    ([], "empty list"),
    ([nn.Linear(8, 8)], "layer 0 is a Linear"),
    (nn.ModuleList([nn.Identity()]), "layer 0 is a Identity"),
    ([nn.Identity(), layer := nn.Identity(), layer], "stands twice"),
])  # fmt: skip
def test_a_model_that_cannot_be_read_is_an_error(model, message):
    with pytest.raises(CaptureError, match=message), capture(model):  # noqa: PT012
        for part in model if isinstance(model, list | nn.ModuleList) else [model]:
            part(torch.randn(1, 3, 8))


def test_pytorchs_own_complaint_about_a_mask_comes_first():
    encoder = make_encoder()
    with pytest.raises(RuntimeError, match=r"should be \(5, 5\)"), capture(encoder):
        encoder(torch.randn(1, 5, 16), torch.zeros(4, 4))
    assert is_clean(encoder)
