"""What an attention call is computed from: one record, whichever way a model computes it.

    read = reader_of(nn.functional.scaled_dot_product_attention)
    call = read("blocks.0.attn", n_heads, *args, **kwargs)

A reader takes the name of the calling module, for errors, the number of heads for tensors with 3
axes, `(B * H, T, d)`, and the arguments of the call. It raises `CaptureError` where it cannot read.
Dropout of weights is left out. Axes: `B` samples, `H` heads, `Tq` queries, `Tk` keys (both `T` in
self-attention), `d` width of a head, `D` width of the model.
"""

import inspect
import math
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

WAY_OUT = (
    "Compute it with nn.functional.scaled_dot_product_attention or a softmax over (B, H, T, T) "
    '(Hugging Face: attn_implementation="sdpa" or "eager")'
)
LAYERS = "capture(model, layers=[...])"
OTHER_LAYERS = f"choose the other layers: {LAYERS}"


class CaptureError(RuntimeError):
    """Attention could not be captured; the message names the layer and the way out."""


@dataclass(frozen=True)
class Mask:
    """Which keys a query may see: those that all of this allows.

    A bias is `(B, H, Tq, Tk)`, where `B`, `H` and `Tq` may be 1. A float is added to the scores,
    -inf forbids; a bool is True where attention is forbidden.
    """

    biases: tuple[Tensor, ...] = ()
    allows: bool = False  # a bool bias is True where attention is allowed instead
    causal: bool = False  # only the keys up to the query's own position

    def of_rows(
        self, sample: int, heads: slice, rows: slice | Tensor, like: Tensor
    ) -> Tensor | None:
        """What to add to scores `like` `(h, R, Tk)` of rows of a sample; None if all is seen."""
        parts = []
        for bias in self.biases:
            n_samples, n_heads, n_rows, _ = bias.shape
            which_heads = heads if n_heads > 1 else slice(None)
            which_rows = rows if n_rows > 1 else slice(None)
            parts.append(bias[sample % n_samples, which_heads, which_rows])
        index = None
        if self.causal:
            index = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        total = self._total(parts, index, like)
        return None if total is None else total.expand(*total.shape[:-2], *like.shape[-2:])

    def of_query(self, query: int | Tensor, like: Tensor) -> Tensor | None:
        """What to add to scores `like` `(B, H, Tk)` of one query a sample; None if it sees all.

        Its position holds for all samples or is `(B,)` int64.
        """
        index = None
        if self.causal and (isinstance(query, Tensor) or query < like.shape[-1] - 1):
            index = torch.as_tensor(query).reshape(-1, 1)  # the last one sees everything
        return self._total([pick(bias, query) for bias in self.biases], index, like)

    def _total(self, parts: Sequence[Tensor], index: Tensor | None, like: Tensor) -> Tensor | None:
        """Sum of parts of the biases and of the causal mask of the queries at `index`."""
        parts = [_additive(~bias if self.allows else bias, like) for bias in parts]
        if index is not None:
            keys = torch.arange(like.shape[-1], device=like.device)
            parts.append(_additive(keys > index.to(like.device)[..., None], like))
        return reduce(torch.add, parts) if parts else None


def pick(values: Tensor, query: int | Tensor) -> Tensor:
    """One query a sample of `(B, H, Tq, d)`: `(B, H, d)`; an only row serves every query."""
    query = query % values.shape[2]
    if isinstance(query, int):
        return values.select(2, query)
    samples = torch.arange(len(query), device=values.device)
    return values.expand(len(query), -1, -1, -1)[samples, :, query.to(values.device)]


def _additive(bias: Tensor, like: Tensor) -> Tensor:
    """A bool that forbids, or a float, as a float to add."""
    if bias.dtype == torch.bool:
        return like.new_zeros(bias.shape).masked_fill_(bias, -torch.inf)
    return bias.to(like.dtype)


class Projection(NamedTuple):
    """How a multi-head attention makes queries and keys of `H` heads from its inputs."""

    n_heads: int
    weights: tuple[Tensor, Tensor]  # of queries (D, D), of keys (D, kdim)
    biases: tuple[Tensor | None, Tensor | None]  # the same, (D,)

    def heads(self, x: Tensor, which: int) -> Tensor:
        """Queries (which = 0) or keys (1) `(B, H, T, d)` of inputs `(B, 1, T, D)`."""
        weight, bias = self.weights[which].to(x.dtype), self.biases[which]
        bias = None if bias is None else bias.to(x.dtype)
        values = functional.linear(x.squeeze(1), weight, bias)  # (B, T, D)
        return values.unflatten(-1, (self.n_heads, -1)).transpose(1, 2).contiguous()

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
    """One attention call. Where a model holds its scores these are `q`, and `k` is None."""

    q: Tensor  # (B, H, Tq, d) queries, not yet scaled; the scores (B, H, Tq, Tk), masked already
    k: Tensor | None  # (B, Hk, Tk, d) keys; head h of the queries reads head h // (H / Hk)
    mask: Mask = Mask()
    scale: float = 1.0
    projection: Projection | None = None  # of q and k, which are inputs (B, 1, T, D) then
    padded: Tensor | None = None  # (B, Tq) bool, queries that are padding; None if nothing tells

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(B, H, Tq, Tk)`."""
        n_samples, n_heads, n_queries, n_keys = self.q.shape
        if self.projection is not None:
            n_heads = self.projection.n_heads
        return n_samples, n_heads, n_queries, n_keys if self.k is None else self.k.shape[2]

    def row_scores(self, query: int | Tensor) -> Tensor:
        """Scores `(B, H, Tk)` of one query a sample, before the mask, up to a constant a row.

        Its position, `0 <= query < Tq`, holds for all samples or is `(B,)` int64.
        """
        q = wide(pick(self.q, query))  # (B, H, d)
        if self.k is None:
            return q
        if self.projection is not None:  # the inputs of the keys are one head then
            q = self.projection.folded_query(q)  # (B, H, kdim)
        grouped = q.reshape(len(q), self.k.shape[1], -1, q.shape[-1])  # (B, Hk, H / Hk, d)
        return (grouped @ wide(self.k).mT).flatten(1, 2) * self.scale

    def prepared(self) -> "Call":
        """The same call of heads, scaled, float32 or wider; scores stay as they are."""
        if self.k is None:
            return self
        q, k = wide(self.q), wide(self.k)
        if self.projection is not None:
            q, k = self.projection.heads(q, 0), self.projection.heads(k, 1)
        return Call(q * self.scale, k, self.mask, padded=self.padded)


def wide(values: Tensor) -> Tensor:
    """In float32, if narrower."""
    return values.float() if values.dtype.itemsize < 4 else values


# The arguments of nn.functional.multi_head_attention_forward by name.
_PARAMETERS = inspect.signature(functional.multi_head_attention_forward).parameters
_DEFAULTS = [p.default for p in _PARAMETERS.values() if p.default is not p.empty]
_MultiHead = namedtuple("_MultiHead", _PARAMETERS, defaults=_DEFAULTS)


def read_multi_head(name: str, _n_heads: int | None, *args: Any, **kwargs: Any) -> Call:
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
            f"input; {OTHER_LAYERS}"
        )
    weights = given.q_proj_weight, given.k_proj_weight
    if not given.use_separate_proj_weight:
        weights = given.in_proj_weight.chunk(3)[:2]
    biases = (None, None) if given.in_proj_bias is None else given.in_proj_bias.chunk(3)[:2]
    projection = Projection(given.num_heads, weights, biases)
    q, k = (
        x[None, None] if x.dim() == 2 else x.transpose(0, 1)[:, None]  # (B, 1, T, D)
        for x in (given.query, given.key)
    )
    mask, padded = _multi_head_mask(given, len(q))
    scale = 1.0 / math.sqrt(q.shape[-1] // given.num_heads)
    return Call(q, k, mask, scale, projection, padded)


def _multi_head_mask(given: _MultiHead, n_samples: int) -> tuple[Mask, Tensor | None]:
    """The mask that the function follows, not always the one it is given, and padded queries."""
    bias, keys, padded = given.attn_mask, given.key_padding_mask, None
    if given.is_causal and keys is None and not given.need_weights:
        return Mask(causal=True), None  # then it does not look at attn_mask
    biases = []
    if bias is not None:
        is_each = bias.dim() == 3  # (B * H, Tq, Tk)
        biases.append(bias.unflatten(0, (n_samples, -1)) if is_each else bias[None, None])
    if keys is not None:
        keys = keys if keys.dim() == 2 else keys[None]  # (B, Tk)
        biases.append(keys[:, None, None])
        q, k = given.query, given.key  # in self-attention one tensor, or two views of it
        if (q.data_ptr(), q.shape, q.stride()) == (k.data_ptr(), k.shape, k.stride()):
            padded = keys if keys.dtype == torch.bool else keys == -torch.inf
    return Mask(tuple(biases)), padded


def read_sdpa(
    name: str,
    n_heads: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call:
    """What a call of `nn.functional.scaled_dot_product_attention` attends with.

    Queries and keys are those of the call, so rotary positions, normalised queries and a scale of
    one's own are exact.
    """
    if query.is_nested or key.is_nested:
        raise CaptureError(
            f"{name} calls scaled_dot_product_attention with nested tensors, which capture does "
            "not read; give the model padded tensors and a mask"
        )
    if query.shape[:-2] != key.shape[:-2] and not enable_gqa:
        leading = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        query, key = (x.expand(*leading, *x.shape[-2:]) for x in (query, key))
    q, k = (_with_heads(name, x, n_heads, "queries") for x in (query, key))
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    bias, n_keys = attn_mask, key.shape[-2]
    if bias is None:
        return Call(q, k, Mask(causal=is_causal), scale)
    if hasattr(bias, "_materialize"):  # torch.nn.attention.bias.CausalBias, slow to import
        bias = bias._materialize()
    if bias.dim() > 2 and query.dim() != 4:
        bias = _with_heads(name, bias.expand(*query.shape[:-1], n_keys), n_heads, "a mask")
    bias = bias[(None,) * (4 - bias.dim())].expand(-1, -1, -1, n_keys)
    return Call(q, k, Mask((bias,), bias.dtype == torch.bool, is_causal), scale)


def read_softmax(name: str, n_heads: int | None, scores: Tensor) -> Call:
    """Attention whose weights are a softmax of scores `(B, H, Tq, Tk)`, their mask included."""
    return Call(_with_heads(name, scores, n_heads, "scores"), None)


def scores_of(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The input of a softmax over its last axis; None if it is over another axis."""
    scores = args[0] if args else kwargs.get("input", kwargs.get("self"))
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return scores if isinstance(dim, int) and dim in (-1, scores.dim() - 1) else None


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


_READERS = {
    "scaled_dot_product_attention": read_sdpa,
    "multi_head_attention_forward": read_multi_head,
    "softmax": read_softmax,
    "special_softmax": read_softmax,
    "_softmax": read_softmax,
}


@cache
def reader_of(func: Callable) -> Callable[..., Call] | None:
    """What reads a call of a PyTorch function, None if it is no attention."""
    kernel = getattr(func, "__name__", "")
    name = kernel.split(".")[0]
    if name in _READERS or not ("attention" in name or "attn" in name):
        return _READERS.get(name)

    def refuse(name: str, *_args: Any, **_kwargs: Any) -> Call:
        raise CaptureError(
            f"{name} calls {kernel}, a kernel whose attention capture cannot read. {WAY_OUT}, or "
            f"{OTHER_LAYERS}"
        )

    return refuse
