"""The stand-in for flash_attn against attention written out entry by entry."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from eager import CLOSE, Given, eager_weights
from hypothesis import given
from hypothesis import strategies as st

from historylens import capture

path = Path(__file__).parents[1] / "examples" / "flash_attn.py"
spec = importlib.util.spec_from_file_location("flash_standin", path)  # no real installation's name
flash = sys.modules["flash_standin"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(flash)


def eager(q, k, v, scale=None, causal=False, window=(-1, -1), slopes=None):
    """The last query stands at the last key; one that sees nothing gives zeros."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))  # (B, H, T, d)
    ahead = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - k.shape[2] + q.shape[2]
    hidden = causal & (ahead > 0)
    for far, distance in zip(window, (-ahead, ahead), strict=True):
        hidden |= (far >= 0) & (distance > far)
    alibi = None if slopes is None else -slopes[:, None, None] * ahead.abs()
    weights = eager_weights(q, k, hidden, alibi, scale)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return (weights.nan_to_num() @ values).transpose(1, 2)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    n_queries=st.integers(1, 5), n_older=st.integers(0, 3), causal=st.booleans(),
    heads=st.sampled_from([(1, 1), (4, 2), (2, 2)]), alibi=st.booleans(),
    window=st.sampled_from([(-1, -1), (2, 0), (0, 1)]), scale=st.sampled_from([None, 0.3]),
)  # fmt: skip
def test_every_option_equals_attention_written_out(
    n_queries, n_older, heads, causal, window, alibi, scale
):
    q = drawn(2, n_queries, heads[0], 4)
    k, v = (drawn(2, n_queries + n_older, heads[1], 4, seed=s) for s in (1, 2))
    slopes = torch.linspace(0.1, 1, heads[0]) if alibi else None
    options = {"alibi_slopes": slopes, "deterministic": True}
    found = flash.flash_attn_func(q, k, v, 0.0, scale, causal, window, **options)
    expected = eager(q, k, v, scale, causal, window, slopes)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_packed_forms_are_the_same_and_read():
    qkv = drawn(2, 5, 3, 2, 4)
    whole = flash.flash_attn_func(*qkv.unbind(2), causal=True)
    found = flash.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True)
    torch.testing.assert_close(found, whole)
    with capture(block := Given(flash.flash_attn_qkvpacked_func, causal=True)) as record:
        torch.testing.assert_close(block(qkv), whole)
    q, k, _ = qkv.transpose(1, 3).unbind(2)
    torch.testing.assert_close(record[0].query_rows, eager_weights(q, k)[:, :, -1], **CLOSE)


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_cache_filled_step_by_step_gives_what_one_pass_gives(interleaved):
    q, k, v = (drawn(2, 6, 2, 8, seed=s) for s in range(3))
    angle = torch.arange(9)[:, None] * torch.tensor([1.0, 0.1])  # turns 4 of 8 columns
    rotary = {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}
    caches = torch.zeros(2, 2, 9, 2, 8).unbind(0)
    rows = [
        flash.flash_attn_with_kvcache(
            q[:, t : t + 1], *caches, k[:, t : t + 1], v[:, t : t + 1], cache_seqlens=t,
            causal=True, rotary_interleaved=interleaved, **rotary,
        )
        for t in range(6)
    ]  # fmt: skip

    def turned(x):  # as complex numbers
        out = x.clone()
        for i in range(2):
            pair = [2 * i, 2 * i + 1] if interleaved else [i, i + 2]
            turn = torch.polar(torch.ones(6), angle[:6, i])[:, None]
            out[..., pair] = torch.view_as_real(torch.view_as_complex(x[..., pair]) * turn)
        return out

    expected = eager(turned(q), turned(k), v, causal=True)
    torch.testing.assert_close(torch.cat(rows, 1).double(), expected, rtol=1e-5, atol=1e-5)


def test_caches_of_unlike_length_hold_only_what_was_written():
    q, k, v = drawn(2, 1, 2, 4), drawn(2, 5, 2, 4, seed=1), drawn(2, 5, 2, 4, seed=2)
    lengths = torch.tensor([2, 5])
    found = flash.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)
    for i, n in enumerate(lengths.tolist()):
        expected = eager(q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n])
        torch.testing.assert_close(found[i : i + 1].double(), expected, rtol=1e-5, atol=1e-5)


def test_what_has_no_counterpart_is_refused():
    q = drawn(1, 2, 1, 4)
    with pytest.raises(NotImplementedError, match="softcap"):
        flash.flash_attn_func(q, q, q, softcap=10.0)
    with pytest.raises(NotImplementedError, match="block_table"):
        flash.flash_attn_with_kvcache(q, q, q, block_table=torch.zeros(1, 1))
