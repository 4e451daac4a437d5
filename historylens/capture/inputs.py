"""What an attention call is computed from: one record, whichever way a model computes it.

    read = reader_of(nn.functional.scaled_dot_product_attention)
    call = read("blocks.0.attn", args, kwargs, n_heads)
    call.row_scores(query), call.queries_and_keys()

A reader takes the name of the calling module, for errors, the arguments of the call, and the number
of heads for tensors with 3 axes, `(B * H, T, d)`. It raises `CaptureError` where it cannot read.
Dropout of weights is left out. Axes: `B` samples, `H` heads, `Tq` queries, `Tk` keys (both `T` in
self-attention), `d` width of a head, `D` width of the model.
"""

import inspect
import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from historylens.capture.masks import Mask, pick

# The arguments of the functions by name; the second is a built-in, which has no signature.
_PARAMETERS = inspect.signature(functional.multi_head_attention_forward).parameters
_DEFAULTS = [p.default for p in _PARAMETERS.values() if p.default is not p.empty]
_MultiHead = namedtuple("_MultiHead", _PARAMETERS, defaults=_DEFAULTS)
_SDPA = "query key value attn_mask dropout_p is_causal scale enable_gqa"
_ScaledDotProduct = namedtuple("_ScaledDotProduct", _SDPA, defaults=[None, 0.0, False, None, False])


WAY_OUT = (
    "Compute it with nn.functional.scaled_dot_product_attention or a softmax over (B, H, T, T) "
    '(Hugging Face: attn_implementation="sdpa" or "eager")'
)


class CaptureError(RuntimeError):
    """Attention could not be captured; the message names the layer and the way out."""


class Projection(NamedTuple):
    """How a multi-head attention makes queries and keys of `H` heads from its inputs.

    Attributes:
        n_heads: `H`.
        weights: of queries `(D, D)` and of keys `(D, kdim)`.
        biases: the same, `(D,)` or None.
    """

    n_heads: int
    weights: tuple[Tensor, Tensor]
    biases: tuple[Tensor | None, Tensor | None]

    def heads(self, x: Tensor, which: int) -> Tensor:
        """Queries (which = 0) or keys (1) `(B, H, T, d)` of inputs `(B, 1, T, D)`."""
        weight, bias = self.weights[which].to(x.dtype), self.biases[which]
        bias = None if bias is None else bias.to(x.dtype)
        values = functional.linear(x.squeeze(1), weight, bias)  # (B, T, D)
        split = values.view(*values.shape[:2], self.n_heads, -1)
        return split.transpose(1, 2).contiguous()

    def folded_query(self, x: Tensor) -> Tensor:
        """A query `(B, H, kdim)` of an input `(B, 1, D)`, to score the inputs of the keys with.

        `q (W x + b) = (q W) x + q b`: it saves projecting every key, and the constant `q b` does
        not change the softmax.
        """
        q = self.heads(x[:, None], 0)  # (B, H, 1, d)
        weight = self.weights[1].to(q.dtype).unflatten(0, (self.n_heads, -1))  # (H, d, kdim)
        return (q @ weight).squeeze(2)


@dataclass(frozen=True)
class Call:
    """One attention call.

    Attributes:
        q: `(B, H, Tq, d)` queries, not yet scaled; the scores `(B, H, Tq, Tk)` where `k` is None.
        k: `(B, Hk, Tk, d)` keys, `Hk` dividing `H`: head `h` reads key head `h // (H / Hk)`. None
            where a model holds its scores.
        mask: which keys a query may see.
        scale: factor of the scores.
        projection: makes the heads of `q` and `k`, which are inputs `(B, 1, T, D)` then.
    """

    q: Tensor
    k: Tensor | None
    mask: Mask
    scale: float = 1.0
    projection: Projection | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(B, H, Tq, Tk)`."""
        n_samples, n_heads, n_queries, n_keys = self.q.shape
        if self.projection is not None:
            n_heads = self.projection.n_heads
        return n_samples, n_heads, n_queries, n_keys if self.k is None else self.k.shape[2]

    def row_scores(self, query: int | Tensor) -> Tensor:
        """Scores `(B, H, Tk)` of one query a sample, before the mask, up to a constant a row.

        Args:
            query: its position, `0 <= query < Tq`, for all samples or `(B,)` int64.
        """
        q = wide(pick(self.q, query))  # (B, H, d)
        if self.k is None:
            return q
        if self.projection is not None:
            q = self.projection.folded_query(
                q
            )  # (B, H, kdim), the inputs of the keys being one head
        grouped = q.reshape(len(q), self.k.shape[1], -1, q.shape[-1])  # (B, Hk, H / Hk, d)
        return (grouped @ wide(self.k).mT).flatten(1, 2) * self.scale

    def queries_and_keys(self) -> tuple[Tensor, Tensor | None]:
        """Scaled queries `(B, H, Tq, d)` and keys `(B, Hk, Tk, d)`, float32 or wider.

        Where a model holds its scores: these as they are, `(B, H, Tq, Tk)`, and None.
        """
        if self.k is None:
            return self.q, None
        q, k = wide(self.q), wide(self.k)
        if self.projection is not None:
            q, k = self.projection.heads(q, 0), self.projection.heads(k, 1)
        return q * self.scale, k


def wide(values: Tensor) -> Tensor:
    """In float32, if narrower."""
    return values.float() if values.dtype.itemsize < 4 else values


def read_multi_head(name: str, args: tuple, kwargs: dict[str, Any], n_heads: int | None) -> Call:
    """What a call of `nn.functional.multi_head_attention_forward` attends with."""
    given = _MultiHead(*args, **kwargs)
    if given.static_k is not None:
        raise CaptureError(
            f"{name} passes static_k to multi_head_attention_forward, which capture does not read; "
            "leave it out with layers="
        )
    if given.bias_k is not None or given.add_zero_attn:
        raise CaptureError(
            f"{name} adds keys of its own (add_bias_kv, add_zero_attn), which are no token of the "
            "input; choose the other layers: capture(model, layers=[...])"
        )
    weights = given.q_proj_weight, given.k_proj_weight
    if not given.use_separate_proj_weight:
        weights = given.in_proj_weight.chunk(3)[:2]
    biases = (None, None) if given.in_proj_bias is None else given.in_proj_bias.chunk(3)[:2]
    q, k = (
        x[None, None] if x.dim() == 2 else x.transpose(0, 1)[:, None]  # (B, 1, T, D)
        for x in (given.query, given.key)
    )
    scale = 1.0 / math.sqrt(q.shape[-1] // given.num_heads)
    projection = Projection(given.num_heads, weights, biases)
    return Call(q, k, _multi_head_mask(given, len(q)), scale, projection)


def _multi_head_mask(given: _MultiHead, n_samples: int) -> Mask:
    """The mask that the function follows, which is not always the one that it is given."""
    bias, keys = given.attn_mask, given.key_padding_mask
    if given.is_causal and keys is None and not given.need_weights:
        return Mask("causal")  # then it does not look at attn_mask
    if bias is not None and bias.dim() == 3:
        bias = bias.unflatten(0, (n_samples, given.num_heads))
    mask = Mask("full") if bias is None else Mask("additive", bias)
    if keys is None:
        return mask
    keys = keys if keys.dim() == 2 else keys[None]
    padded = keys if keys.dtype == torch.bool else keys == -torch.inf
    q, k = given.query, given.key  # in self-attention one tensor, or two views of it
    is_self = (q.data_ptr(), q.shape, q.stride()) == (k.data_ptr(), k.shape, k.stride())
    return replace(mask, keys=keys, padded=padded if is_self else None)


def softmax_scores(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The input of a softmax over its last axis; None if it is over another axis."""
    scores = args[0] if args else kwargs.get("input", kwargs.get("self"))
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return scores if isinstance(dim, int) and dim in (-1, scores.dim() - 1) else None


def read_softmax(name: str, args: tuple, kwargs: dict[str, Any], n_heads: int | None) -> Call:
    """Attention whose weights are a softmax of scores `(B, H, Tq, Tk)`, their mask included."""
    scores = _with_heads(name, softmax_scores(args, kwargs), n_heads, "scores")
    return Call(scores, None, Mask("scores"))


def read_sdpa(name: str, args: tuple, kwargs: dict[str, Any], n_heads: int | None) -> Call:
    """What a call of `nn.functional.scaled_dot_product_attention` attends with.

    Queries and keys are those of the call, so rotary positions, normalised queries and a scale of
    one's own are exact.
    """
    given = _ScaledDotProduct(*args, **kwargs)
    query, key, bias = given.query, given.key, given.attn_mask
    if query.is_nested or key.is_nested:
        raise CaptureError(
            f"{name} calls scaled_dot_product_attention with nested tensors, which capture does "
            "not read; give the model padded tensors and a mask"
        )
    if not given.enable_gqa:
        leading = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        query, key = (x.expand(*leading, *x.shape[-2:]) for x in (query, key))
    q, k = (_with_heads(name, x, n_heads, "queries") for x in (query, key))
    scale = 1.0 / math.sqrt(q.shape[-1]) if given.scale is None else given.scale
    if bias is None:
        return Call(q, k, Mask("causal" if given.is_causal else "full"), scale)
    bias = _sdpa_bias(name, bias, (*query.shape[:-1], key.shape[-2]), n_heads)
    allows = bias.dtype == torch.bool
    if given.is_causal:  # where PyTorch does not refuse the two together, both hold
        ahead = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu_(1)
        bias = bias & ~ahead if allows else bias.masked_fill(ahead, -torch.inf)
    return Call(q, k, Mask("additive", bias, allows=allows), scale)


def _sdpa_bias(name: str, bias: Tensor, shape: tuple[int, ...], n_heads: int | None) -> Tensor:
    """The mask of weights `shape = (..., Tq, Tk)` as `(Tq, Tk)`, or with the 4 axes of a `Mask`."""
    if hasattr(bias, "_materialize"):  # torch.nn.attention.bias.CausalBias, slow to import
        bias = bias._materialize()
    if bias.dim() < 3:
        return bias.expand(shape[-2:])
    if len(shape) != 4:
        return _with_heads(name, bias.expand(shape), n_heads, "a mask")
    bias = bias.expand(*bias.shape[:-2], *shape[-2:])
    return bias if bias.dim() == 4 else bias[None]


def _with_heads(name: str, values: Tensor, n_heads: int | None, what: str) -> Tensor:
    """`values` `(..., H, T, d)` with exactly 4 axes; further leading axes count as samples."""
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


Reader = Callable[[str, tuple, dict[str, Any], int | None], Call]
_READERS = {
    "scaled_dot_product_attention": read_sdpa,
    "multi_head_attention_forward": read_multi_head,
    "softmax": read_softmax,
    "special_softmax": read_softmax,
    "_softmax": read_softmax,
}


def reader_of(func: Callable) -> Reader | None:
    """What reads a call of a PyTorch function, None if it is no attention.

    Of a kernel that cannot be read it raises.
    """
    name = getattr(func, "__name__", "").split(".")[0]
    if name not in _READERS and ("attention" in name or "attn" in name):
        return partial(_refuse, func.__name__)
    return _READERS.get(name)


def _refuse(kernel: str, name: str, *_call: Any) -> Call:
    raise CaptureError(
        f"{name} calls {kernel}, a kernel whose attention capture cannot read. {WAY_OUT}, or "
        "choose the other layers: capture(model, layers=[...])"
    )
