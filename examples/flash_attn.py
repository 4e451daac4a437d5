"""A stand-in for `flash_attn` on a machine without it: the same functions on a CPU, readable.

Put it beside the adapter of a model that says `from flash_attn import flash_attn_func`: the model
then attends with `scaled_dot_product_attention`, which capture reads. Signatures and meanings are
those of flash-attn 2 (https://github.com/Dao-AILab/flash-attention); what has no counterpart in
`scaled_dot_product_attention` (a soft cap, paged caches) is refused. Where queries are fewer than
keys they are the last ones. Axes: `B` samples, `T` tokens, `H` heads (`Hk` of keys), `d` width.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__version__ = "2.8.0"
sys.modules[f"{__name__}.flash_attn_interface"] = sys.modules[__name__]  # imported from as well


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, **unused: Any,
) -> Tensor:  # fmt: skip
    """Attention `(B, Tq, H, d)` of `q` `(B, Tq, H, d)` to `k` and `v` `(B, Tk, Hk, d)`."""
    if softcap or unused.get("return_attn_probs"):
        what = "this stand-in for flash_attn knows no softcap and gives no probs"
        raise NotImplementedError(what)
    at = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)[None]
    return _attend(q, k, v, at, causal, window_size, alibi_slopes, softmax_scale, dropout_p)


def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`flash_attn_func` of `qkv` `(B, T, 3, H, d)`."""
    return flash_attn_func(*qkv.unbind(2), *args, **kwargs)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`flash_attn_func` of `kv` `(B, Tk, 2, Hk, d)`."""
    return flash_attn_func(q, *kv.unbind(2), *args, **kwargs)


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None, **unused: Any,
) -> Tensor:  # fmt: skip
    """Attention `(B, Tq, H, d)` to caches `(B, S, Hk, d)`, to which `k` and `v` are added in place.

    `cache_seqlens` are tokens in the caches before, one number or `(B,)`; None: they are full.
    `rotary_cos` and `rotary_sin` `(S, r / 2)` turn the first `r` columns of queries and new keys.
    """
    for name, value in unused.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"this stand-in for flash_attn does not know {name}")
    n_before = k_cache.shape[1] if cache_seqlens is None else cache_seqlens
    n_before = torch.as_tensor(n_before, device=q.device).expand(len(q))
    n_new = 0 if k is None else k.shape[1]
    places = n_before[:, None] + torch.arange(n_new, device=q.device)  # (B, new)
    at = (n_before + n_new - q.shape[1])[:, None] + torch.arange(q.shape[1], device=q.device)
    if rotary_cos is not None:
        turned = at if causal or window_size != (-1, -1) else n_before[:, None].expand_as(at)
        q = _rotate(q, rotary_cos, rotary_sin, turned, rotary_interleaved)
        k = _rotate(k, rotary_cos, rotary_sin, places, rotary_interleaved)
    if n_new:
        samples = torch.arange(len(q), device=q.device)[:, None]
        k_cache[samples, places], v_cache[samples, places] = k, v
    return _attend(q, k_cache, v_cache, at, causal, window_size, alibi_slopes, softmax_scale)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, at: Tensor, causal: bool, window: tuple[int, int],
    slopes: Tensor | None, scale: float | None, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention of queries that stand `at (B or 1, Tq)` among the keys, the last at the last one.

    `causal`, `window`: how far a query may look, before and behind, -1 for any distance; `slopes
    (H,)` or `(B, H)`: of ALiBi.
    """
    before, behind = window[0], 0 if causal else window[1]
    keys = torch.arange(k.shape[1], device=k.device)
    back = at[:, :, None] - keys  # (B, Tq, Tk)
    allowed = ((back <= before) | (before < 0)) & ((-back <= behind) | (behind < 0))
    allowed &= (keys <= at[:, -1:])[:, None]  # in a cache there is nothing yet behind the last one
    bias = torch.zeros(allowed.shape, device=k.device).masked_fill(~allowed, -torch.inf)[:, None]
    bias = bias if slopes is None else bias - slopes[..., None, None] * back.abs()[:, None]
    heads = (x.transpose(1, 2) for x in (q, k, v))
    how = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": q.shape[2] != k.shape[2]}
    mixed = scaled_dot_product_attention(*heads, bias.to(q.dtype), **how)
    return mixed.nan_to_num().transpose(1, 2)  # who sees nothing gets zeros


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, places: Tensor, interleaved: bool) -> Tensor:
    """Rotary positions (Su et al. 2021) of `x` `(B, T, H, d)` at `places` `(B, T)`."""
    half = cos.shape[1]
    cos, sin = cos[places][:, :, None], sin[places][:, :, None]  # (B, T, 1, r / 2)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    sizes, axis = ((half, 2), -1) if interleaved else ((2, half), -2)
    first, second = turned.unflatten(-1, sizes).unbind(axis)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], axis).flatten(-2)
    return torch.cat([turned, rest], dim=-1)
