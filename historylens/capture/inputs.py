"""What an attention call is computed from: one record, whichever way a model computes it.

A reader takes the name of the calling module, for errors, the number of heads for tensors with 3
axes, `(B * H, T, d)`, and the arguments of the call. Axes: `B` samples, `H` heads, `Tq` queries,
`Tk` keys (both `T` in self-attention), `d` width of a head, `D` width of the model.
"""

import inspect
import math
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from historylens.capture.masks import Mask, floor_of, pick

WAY_OUT = (
    "Compute it with nn.functional.scaled_dot_product_attention or a softmax over (B, H, T, T) "
    '(Hugging Face: attn_implementation="sdpa" or "eager"), or hand its weights in: '
    "historylens.record_attention(name, weights)"
)
LAYERS = "capture(model, layers=[...])"
OTHER_LAYERS = f"choose the other layers: {LAYERS}"


class CaptureError(RuntimeError):
    """Attention could not be captured; the message names the layer and the way out."""


class Projection(NamedTuple):
    """How a multi-head attention makes queries and keys of `H` heads from its inputs."""

    n_heads: int
    weights: Sequence[Tensor]  # of queries (D, D), of keys (D, kdim), of values (D, vdim)
    biases: Sequence[Tensor | None]  # the same, (D,)

    def of(self, x: Tensor, which: int) -> Tensor:
        """Queries (0), keys (1) or values (2) `(..., D)` of all heads, of inputs `(..., D)`."""
        bias = self.biases[which]
        bias = bias if bias is None else bias.to(x.dtype)
        return functional.linear(x, self.weights[which].to(x.dtype), bias)

    def heads(self, x: Tensor, which: int) -> Tensor:
        """The same `(B, H, T, d)` of inputs `(B, 1, T, D)`."""
        values = self.of(x.squeeze(1), which).unflatten(-1, (self.n_heads, -1))
        return values.transpose(1, 2).contiguous()

    def folded_query(self, x: Tensor) -> Tensor:
        """A query `(B, H, kdim)` of an input `(B, 1, D)`, to score the inputs of the keys with, as
        `q (W x + b) = (q W) x + q b`. The constant `q b` does not change the softmax.
        """
        q, weight = self.of(x, 0), self.weights[1].to(x.dtype)
        q = q.view(len(x), self.n_heads, -1).transpose(0, 1)  # (H, B, d)
        return q.bmm(weight.view(self.n_heads, -1, weight.shape[-1])).transpose(0, 1)


@dataclass(eq=False)
class Call:
    """One attention call. Where a model holds its scores these are `q`, and `k` is None."""

    q: Tensor  # (B, H, Tq, d) queries, not yet scaled; the scores (B, H, Tq, Tk), masked already
    k: Tensor | None  # (B, Hk, Tk, d) keys; head h of the queries reads head h // (H / Hk)
    mask: Mask = Mask()
    scale: float = 1.0
    projection: Projection | None = None  # of q and k, which are inputs (B, 1, T, D) then
    padded: Tensor | None = None  # (B, Tq) bool, queries that are padding; None if nothing tells
    given: bool = False  # the scores are logarithms of weights, and only `mask` forbids
    extra: tuple[int, int] | None = None  # keys that are no tokens, before and behind the others
    missing: int = 0  # the first tokens, whose keys a sliding cache has dropped

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """`(B, H, Tq, Tk)`."""
        n_samples, n_heads, n_queries, n_keys = self.q.shape
        n_heads = n_heads if self.projection is None else self.projection.n_heads
        return n_samples, n_heads, n_queries, n_keys if self.k is None else self.k.shape[2]

    @property
    def n_tokens(self) -> int:
        """`T`, the tokens that the queries may look at."""
        return self.shape[-1] - sum(self.extra or ()) + self.missing

    def on_tokens(self, values: Tensor) -> Tensor:
        """Of values `(..., Tk)` of keys those of tokens, `(..., T)`."""
        if any(self.extra or ()):
            values = values[..., self.extra[0] : values.shape[-1] - self.extra[1]]
        return functional.pad(values, (self.missing, 0)) if self.missing else values

    @cached_property
    def _floor(self) -> float:
        return floor_of(self.q)

    def extra_keys(self) -> tuple[int, int]:
        """How many keys before and behind the others are no tokens (memory, attention sinks): what
        the first query sees beside itself under a causal mask. Without one nothing tells them.
        """
        _, _, n_queries, n_keys = self.shape
        n_extra = n_keys - n_queries
        if self.extra is not None:
            return self.extra
        if n_extra <= 0 or n_queries < 2 or (self.k is not None and not self.mask.biases):
            return 0, 0

        def sees(query: int) -> Tensor:  # (Tk,), by some head of some sample that is not padding
            if self.k is None and not self.given:
                scores = pick(self.q, query)
                seen = (scores > -torch.inf) & (scores >= self._floor)
            else:
                like = self.q.new_zeros(1, 1, self.shape[-1], dtype=torch.float32)
                bias, low = self.mask.of_query(query, like)
                seen = (bias > -torch.inf) & (True if low is None else ~low)
            return seen.flatten(0, -2).any(0)

        seen = sees(0)
        before = int(seen.int().cumprod(0).sum()) - 1
        expected = torch.ones_like(seen)
        expected[before + 1 : before + n_queries] = False
        is_causal = 0 <= before <= n_extra and torch.equal(seen, expected)
        for row in {1, n_queries - 1} if is_causal else ():
            seen, own = sees(row), before + row
            is_causal &= bool(seen[own] and not seen[own + 1 : before + n_queries].any())
        return (before, n_extra - before) if is_causal else (0, 0)

    def row(self, query: int | Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights `(B, H, Tk)` of one query a sample, and which keys it may see: see `weigh`.

        Its position, `0 <= query < Tq`, holds for all samples or is `(B,)` int64.
        """
        q = scores = wide(pick(self.q, query))  # (B, H, d)
        if self.k is not None:
            k = wide(self.k).flatten(0, 1)  # (B Hk, Tk, d)
            if self.projection is not None:  # the inputs of the keys are one head then
                q = self.projection.folded_query(q)  # (B, H, kdim)
            grouped = q.reshape(len(k), -1, k.shape[-1])  # (B Hk, H / Hk, d)
            scores = torch.baddbmm(k.new_empty(()), grouped, k.mT, beta=0, alpha=self.scale)
            scores = scores.view(*q.shape[:2], -1)
        return self.weigh(scores, *self.mask.of_query(query, scores))

    def weigh(self, scores: Tensor, bias: Tensor | None, low: Tensor | None) -> tuple:
        """Weights of rows of scores `(..., R, Tk)`, and a bool of keys seen that broadcasts to
        them, None for all. A row sums to 1, or is zeros where it sees nothing, as in fused kernels.
        """
        weights = (scores if bias is None else scores + bias).softmax(-1)
        if self.given:
            weights = weights.nan_to_num(0.0)  # rows of zeros
        elif self.k is None:  # scores hold their mask
            bias = scores
            low = scores < self._floor if self._floor > -torch.inf else None
        if bias is None:
            return weights, None
        seen = bias > -torch.inf
        if low is not None:
            seen = seen & ~(low & (weights == 0))
        return weights.masked_fill_(~seen.any(-1, keepdim=True), 0.0), seen

    def inputs(self) -> Tensor:
        """What each token feeds in, `(B, T, F)`, in self-attention: query, key, or both by one."""
        before = self.extra[0]
        if self.k is None:  # its score with itself
            return self.q.diagonal(before, dim1=2, dim2=3).transpose(1, 2).clone()
        keys = self.k[:, :, before : before + self.q.shape[2]]
        return torch.cat([x.transpose(1, 2).flatten(2) for x in (self.q, keys)], -1)

    def prepared(self) -> "Call":
        """The same call of heads, scaled, float32 or wider; scores stay as they are."""
        if self.k is None:
            return self
        q, k = wide(self.q), wide(self.k)
        if self.projection is not None:
            q, k = self.projection.heads(q, 0), self.projection.heads(k, 1)
        return replace(self, q=q * self.scale, k=k, scale=1.0, projection=None)


def wide(values: Tensor) -> Tensor:
    """In float32, if narrower."""
    return values.float() if values.dtype.itemsize < 4 else values


# The arguments of nn.functional's two attentions.
_PARAMETERS = inspect.signature(functional.multi_head_attention_forward).parameters
_DEFAULTS = [p.default for p in _PARAMETERS.values() if p.default is not p.empty]
MultiHead = namedtuple("MultiHead", _PARAMETERS, defaults=_DEFAULTS)
_NAMES = "query key value attn_mask dropout_p is_causal scale enable_gqa"
ScaledDot = namedtuple("ScaledDot", _NAMES, defaults=(None, 0.0, False, None, False))


def read_multi_head(name: str, _n_heads: int | None, *args: Any, **kwargs: Any) -> Call:
    """What a call of `nn.functional.multi_head_attention_forward` attends with."""
    given = MultiHead(*args, **kwargs)
    if given.static_k is not None:
        what = f"{name} passes static_k to multi_head_attention_forward"
        raise CaptureError(f"{what}, which capture does not read; leave it out with layers=")
    if given.bias_k is not None or given.add_zero_attn:
        what = f"{name} adds keys of its own (add_bias_kv, add_zero_attn)"
        raise CaptureError(f"{what}, which are no token of the input; {OTHER_LAYERS}")
    q, k = (
        x[None, None] if x.dim() == 2 else x.transpose(0, 1).unsqueeze(1)  # (B, 1, T, D)
        for x in (given.query, given.key)
    )
    mask, padded = _multi_head_mask(given, len(q))
    scale = 1.0 / math.sqrt(q.shape[-1] // given.num_heads)
    return Call(q, k, mask, scale, projection_of(given), padded)


def projection_of(given: MultiHead) -> Projection:
    """What such a call makes queries, keys and values with."""
    weights = given.q_proj_weight, given.k_proj_weight, given.v_proj_weight
    if not given.use_separate_proj_weight:
        weights = given.in_proj_weight.chunk(3)
    biases = [None] * 3 if given.in_proj_bias is None else given.in_proj_bias.chunk(3)
    return Projection(given.num_heads, weights, biases)


def _multi_head_mask(given: MultiHead, n_samples: int) -> tuple[Mask, Tensor | None]:
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
            is_bool = keys.dtype == torch.bool
            padded = keys if is_bool else (keys == -torch.inf) | (keys < floor_of(biases[-1]))
    return Mask(tuple(biases)), padded


def read_sdpa(name: str, n_heads: int | None, *args: Any, **kwargs: Any) -> Call:
    """What a call of `nn.functional.scaled_dot_product_attention` attends with."""
    query, key, _, bias, _, is_causal, scale, enable_gqa = ScaledDot(*args, **kwargs)
    if query.is_nested or key.is_nested:
        what = f"{name} calls scaled_dot_product_attention with nested tensors"
        way_out = "give the model padded tensors and a mask"
        raise CaptureError(f"{what}, which capture does not read; {way_out}")
    if query.shape[:-2] != key.shape[:-2] and not enable_gqa:
        leading = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        query, key = (x.expand(*leading, *x.shape[-2:]) for x in (query, key))
    q, k = (with_heads(name, x, n_heads, "queries") for x in (query, key))
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    n_keys, extra = key.shape[-2], None
    if bias is None:
        return Call(q, k, Mask(causal=is_causal), scale)
    if hasattr(bias, "_materialize"):  # torch.nn.attention.bias.CausalBias, slow to import
        bias, extra = bias._materialize(), (0, 0)  # keys beyond the queries are of a cache
    if bias.dim() > 2 and query.dim() != 4:
        bias = with_heads(name, bias.expand(*query.shape[:-1], n_keys), n_heads, "a mask")
    bias = bias[(None,) * (4 - bias.dim())].expand(-1, -1, -1, n_keys)
    return Call(q, k, Mask((bias,), bias.dtype == torch.bool, is_causal), scale, extra=extra)


def read_softmax(name: str, n_heads: int | None, scores: Tensor) -> Call:
    """Attention whose weights are a softmax of scores `(B, H, Tq, Tk)`, their mask included."""
    return Call(with_heads(name, scores, n_heads, "scores"), None)


def read_weights(name: str, n_heads: int | None, weights: Tensor, mask: Tensor | None) -> Call:
    """Attention by its weights: see `record_attention`."""
    weights = wide(with_heads(name, weights.detach(), n_heads, "weights"))
    if not (weights >= 0).all():
        raise CaptureError(f"{name}: expected attention weights of 0 or more, got some below 0")
    _, _, n_queries, n_keys = weights.shape
    if mask is None:
        ahead = torch.ones(n_queries, n_keys, dtype=torch.bool, device=weights.device)
        mask = ahead.triu_(1 + n_keys - n_queries).logical_not_()
        mask = mask if not weights.masked_fill(mask, 0).any() else torch.ones_like(mask)
    mask = mask[(None,) * (4 - mask.dim())].expand(-1, -1, -1, n_keys)
    return Call(weights.log(), None, Mask((mask,), mask.dtype == torch.bool), given=True)


def scores_of(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The input of a softmax over its last axis; None if it is over another axis."""
    scores = args[0] if args else kwargs.get("input", kwargs.get("self"))
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return scores if isinstance(dim, int) and dim in (-1, scores.dim() - 1) else None


def with_heads(name: str, values: Tensor, n_heads: int | None, what: str) -> Tensor:
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
    **dict.fromkeys(("softmax", "special_softmax", "_softmax"), read_softmax),
}


@cache
def reader_of(kernel: str) -> Callable[..., Call] | None:
    """What reads a call of a PyTorch function of this name, None if it is no attention."""
    name = kernel.split(".")[0]
    if name in _READERS or not ("attention" in name or "attn" in name):
        return _READERS.get(name)

    def refuse(name: str, *_args: Any, **_kwargs: Any) -> Call:
        what = f"{name} calls {kernel}, a kernel whose attention capture cannot read"
        raise CaptureError(f"{what}. {WAY_OUT}, or {OTHER_LAYERS}")

    return refuse
