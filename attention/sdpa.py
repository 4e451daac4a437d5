"""Read queries, keys and mask off a call of `nn.functional.scaled_dot_product_attention`.

Queries and keys come straight from the call, so rotary positions, normalised queries and a scale of
one's own are exact. Dropout of weights is left out.

    call = read_sdpa("blocks.0.attn", args, kwargs)
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attention.calls import CaptureError, pick, wide
from attention.masks import Mask


@dataclass(frozen=True)
class ScaledCall:
    """A call that was given its queries and keys.

    Attributes:
        q: `(B, H, Tq, d)`, not yet scaled.
        k: `(B, Hk, Tk, d)`, where `Hk` divides `H`: head `h` reads key head `h // (H / Hk)`.
        scale: factor of the scores.
        mask: what each query may see.
    """

    q: Tensor
    k: Tensor
    scale: float
    mask: Mask

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(B, H, Tq, Tk)`."""
        return *self.q.shape[:3], self.k.shape[2]

    def row_scores(self, query: int | Tensor) -> Tensor:
        """Scores `(B, H, Tk)` of one query a sample."""
        q = wide(pick(self.q, query)) * self.scale  # (B, H, d)
        grouped = q.unflatten(1, (self.k.shape[1], -1))  # (B, Hk, H / Hk, d)
        return (grouped @ wide(self.k).mT).flatten(1, 2)

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """Scaled queries `(B, H, Tq, d)` and keys `(B, Hk, Tk, d)`."""
        return wide(self.q) * self.scale, wide(self.k)


def read_sdpa(
    name: str, args: tuple, kwargs: dict[str, Any], n_heads: int | None = None
) -> ScaledCall:
    """What a call of `scaled_dot_product_attention` attends with.

    Args:
        name: of the module that made the call, for errors.
        args, kwargs: the arguments of the call.
        n_heads: `H` of queries with 3 axes, `(B * H, T, d)`.

    Raises:
        CaptureError: queries with 3 axes and no `n_heads`, or tensors that cannot be read.
    """
    query, key, bias, is_causal, scale, grouped = _arguments(*args, **kwargs)
    if query.is_nested or key.is_nested:
        raise CaptureError(
            f"{name} calls scaled_dot_product_attention with nested tensors, which capture does "
            "not read; give the model padded tensors and a mask"
        )
    if not grouped:
        leading = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        query = query.expand(*leading, *query.shape[-2:])
        key = key.expand(*leading, *key.shape[-2:])
    q, k = (with_heads(name, part, n_heads, "queries") for part in (query, key))
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    shape = *query.shape[:-1], key.shape[-2]
    return ScaledCall(q, k, scale, _mask(bias, is_causal, shape, n_heads))


def with_heads(name: str, values: Tensor, n_heads: int | None, what: str) -> Tensor:
    """`values` `(..., H, T, d)` with exactly 4 axes; further leading axes count as samples.

    Raises:
        CaptureError: there are 3 axes, and nobody says how many of the first are heads.
    """
    if values.dim() == 2:
        return values[None, None]
    if values.dim() != 3:
        return values.flatten(0, -4)
    if n_heads is None or len(values) % n_heads:
        raise CaptureError(
            f"{name} attends with {what} of 3 axes {tuple(values.shape)}, of which the first holds "
            "samples and heads; say how many heads there are: capture(model, heads=H), with "
            "heads=1 if each call is a single head"
        )
    return values.unflatten(0, (-1, n_heads))


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, bool, float | None, bool]:
    """What matters of the arguments of `scaled_dot_product_attention`."""
    return query, key, attn_mask, is_causal, scale, enable_gqa


def _mask(
    bias: Tensor | None, is_causal: bool, shape: tuple[int, ...], n_heads: int | None
) -> Mask:
    """The mask of a call whose weights would be `shape = (..., Tq, Tk)`."""
    if bias is None:
        return Mask("causal" if is_causal else "full")
    if hasattr(bias, "_materialize"):  # torch.nn.attention.bias.CausalBias, slow to import
        bias = bias._materialize()
    if bias.dim() > 2:
        leading = (1,) * (len(shape) - bias.dim()) + bias.shape[:-2]
        bias = bias.expand(*leading, *shape[-2:])
        if len(shape) > 4 or (len(shape) == 3 and len(bias) > 1):
            bias = bias.expand(shape)
        if len(shape) == 3:
            bias = bias.unflatten(0, (-1, n_heads)) if len(bias) > 1 else bias[None]
        elif len(shape) > 4:
            bias = bias.flatten(0, -4)
    else:
        bias = bias.expand(shape[-2:])
    if is_causal:  # where PyTorch does not refuse the two together, both hold
        rows, columns = (torch.arange(n, device=bias.device) for n in shape[-2:])
        ahead = columns > rows[:, None]
        is_bool = bias.dtype == torch.bool
        bias = bias & ~ahead if is_bool else bias.masked_fill(ahead, -torch.inf)
    return Mask("additive", bias, allows=bias.dtype == torch.bool)
