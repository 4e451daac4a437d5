"""Read queries, keys and mask off `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`.

Their fused kernels return no weights, so queries and keys are projected once more, from the input
that the module was called with.

    call = read_attention(name, module, args, kwargs, MaskReader())
    q, k = call.queries_and_keys()                                     # (B, H, T, d)
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from attention.calls import CaptureError, pick, wide
from attention.maskreader import MaskReader
from attention.masks import Mask

_FUNCTIONAL = inspect.signature(functional.multi_head_attention_forward)


@dataclass(frozen=True)
class Projections:
    """How a multi-head attention makes its queries and keys.

    Attributes:
        n_heads: `H`.
        q_weight, k_weight: `(D, D)` and `(D, kdim)`.
        q_bias, k_bias: `(D,)` or None.
        scale: of the scores, one over the root of a head's width.
    """

    n_heads: int
    q_weight: Tensor
    k_weight: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    scale: float

    @classmethod
    def of(
        cls,
        n_heads: int,
        packed: Tensor | None,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        bias: Tensor | None,
    ) -> "Projections":
        """From the parameters of PyTorch, packed `(3 D, D)` or separate; `bias` is `(3 D,)`."""
        if packed is not None:
            width = packed.shape[0] // 3
            q_weight, k_weight = packed[:width], packed[width : 2 * width]
        width = q_weight.shape[0]
        biases = (None, None) if bias is None else (bias[:width], bias[width : 2 * width])
        return cls(n_heads, q_weight, k_weight, *biases, 1.0 / math.sqrt(width // n_heads))


@dataclass(frozen=True)
class ProjectedCall:
    """A call whose queries and keys are projected from what the attention was given.

    Attributes:
        name: of the layer, for errors.
        projections: of the attention.
        query: `(B, Tq, D)`, float32 or wider.
        key: `(B, Tk, kdim)`, the same.
        mask: what each query may see.
        absent: `(B, Tq)` bool, True where a nested tensor has no token, so that there is no query.
    """

    name: str
    projections: Projections
    query: Tensor
    key: Tensor
    mask: Mask
    absent: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(B, H, Tq, Tk)`."""
        return self.query.shape[0], self.projections.n_heads, self.query.shape[1], self.key.shape[1]

    def row_scores(self, query: int | Tensor) -> Tensor:
        """Scores `(B, H, Tk)` of one query a sample, up to a constant in each row.

        `q (W x + b) = (q W) x + q b`: folding the key projection into the query saves projecting
        every token, and the constant `q b` does not change the softmax.

        Raises:
            CaptureError: there is no token at the query's position.
        """
        if self.absent is not None and pick(self.absent[..., None], query).any():
            raise CaptureError(
                f"{self.name}: the query token of a sample is padding, for which PyTorch computes "
                "nothing here. Say which token is the query: capture(model, query=lengths - 1)"
            )
        parts, n_samples = self.projections, self.query.shape[0]
        q = self._project(parts.q_weight, parts.q_bias, pick(self.query, query))
        weight = parts.k_weight.to(q.dtype).view(parts.n_heads, -1, self.key.shape[-1])  # (H, d, D)
        folded = (q.view(n_samples, parts.n_heads, 1, -1) @ weight).squeeze(2)  # (B, H, D)
        return folded @ self.key.mT * parts.scale

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """Scaled queries `(B, H, Tq, d)` and keys `(B, H, Tk, d)`."""
        parts = self.projections
        q = self._project(parts.q_weight, parts.q_bias, self.query).mul_(parts.scale)
        return self._split(q), self._split(self._project(parts.k_weight, parts.k_bias, self.key))

    def _split(self, values: Tensor) -> Tensor:
        return values.unflatten(-1, (self.projections.n_heads, -1)).transpose(1, 2).contiguous()

    @staticmethod
    def _project(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def read_encoder_layer(
    name: str,
    layer: nn.TransformerEncoderLayer,
    args: tuple,
    kwargs: dict[str, Any],
    masks: MaskReader,
    n_tokens: int | None = None,
) -> ProjectedCall:
    """What a call of an encoder layer attends with.

    Args:
        name: the layer's name, for errors.
        layer: the layer.
        args, kwargs: the arguments of the call.
        masks: reads the mask, which the layers of a model share.
        n_tokens: length of the padded batch from which PyTorch made a nested tensor.

    Raises:
        CaptureError: a mask that cannot be read.
    """
    x, bias, padding, is_causal = _encoder_arguments(*args, **kwargs)
    absent = None
    if x.is_nested:
        x, absent = _padded(name, x, n_tokens)
        padding = absent
    attention = layer.self_attn
    if layer.norm_first:
        # Autocast may hand over a narrower type; forward: hooks of the user must not fire twice.
        x = layer.norm1.forward(x.to(layer.linear1.weight.dtype))
    inputs = _Inputs(x, x, bias, padding, is_causal, attention.batch_first, absent)
    return inputs.call(name, _projections(attention), masks)


def read_attention(
    name: str,
    attention: nn.MultiheadAttention,
    args: tuple,
    kwargs: dict[str, Any],
    masks: MaskReader,
) -> ProjectedCall:
    """What a call of `nn.MultiheadAttention` attends with; arguments as in `read_encoder_layer`.

    Raises:
        CaptureError: a mask that cannot be read, or keys that the attention adds of its own.
    """
    check_no_added_keys(name, attention.bias_k, attention.add_zero_attn)
    query, key, padding, bias, is_causal = _attention_arguments(*args, **kwargs)
    absent = None
    if query.is_nested or key.is_nested:
        if query is not key:
            raise CaptureError(
                f"{name} was called with nested tensors, which capture reads in self-attention "
                "only; give it padded tensors and a key_padding_mask"
            )
        key = query = (padded := _padded(name, query, None))[0]
        padding = absent = padded[1]
    inputs = _Inputs(query, key, bias, padding, is_causal, attention.batch_first, absent)
    return inputs.call(name, _projections(attention), masks)


def read_functional(
    name: str, args: tuple, kwargs: dict[str, Any], masks: MaskReader
) -> ProjectedCall:
    """What a call of `functional.multi_head_attention_forward` attends with."""
    found = _functional_arguments(*args, **kwargs)
    if found["static_k"] is not None:
        raise CaptureError(
            f"{name} passes static_k to multi_head_attention_forward, which capture does not read; "
            "leave it out with layers="
        )
    check_no_added_keys(name, found["bias_k"], found["add_zero_attn"])
    projections = Projections.of(
        found["num_heads"],
        None if found["use_separate_proj_weight"] else found["in_proj_weight"],
        found["q_proj_weight"],
        found["k_proj_weight"],
        found["in_proj_bias"],
    )
    mask = found["attn_mask"], found["key_padding_mask"], found["is_causal"]
    return _Inputs(found["query"], found["key"], *mask, False).call(name, projections, masks)


def check_no_added_keys(name: str, bias_k: Tensor | None, add_zero_attn: bool) -> None:
    """Refuse an attention whose keys are not the tokens alone."""
    if bias_k is not None or add_zero_attn:
        raise CaptureError(
            f"{name} adds keys of its own (add_bias_kv, add_zero_attn), which are no token of the "
            "input; choose the other layers: capture(model, layers=[...])"
        )


class _Inputs(NamedTuple):
    """Arguments of an attention, before they are brought into one layout."""

    query: Tensor
    key: Tensor
    bias: Tensor | None
    padding: Tensor | None
    is_causal: bool
    batch_first: bool
    absent: Tensor | None = None

    def call(self, name: str, projections: Projections, masks: MaskReader) -> ProjectedCall:
        query, key = self._batch_first(self.query), self._batch_first(self.key)
        shape = query.shape[0], projections.n_heads, query.shape[1], key.shape[1]
        mask = masks.read(name, self.bias, self.is_causal, shape)
        if self.padding is not None:
            keys = self.padding if self.padding.dim() == 2 else self.padding[None]
            own = keys if keys.dtype == torch.bool else keys == -torch.inf
            padded = own if self.query is self.key else None
            mask = Mask(mask.kind, mask.bias, mask.allows, keys, padded)
        return ProjectedCall(name, projections, wide(query), wide(key), mask, self.absent)

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)


def _projections(attention: nn.MultiheadAttention) -> Projections:
    return Projections.of(
        attention.num_heads,
        attention.in_proj_weight,
        attention.q_proj_weight,
        attention.k_proj_weight,
        attention.in_proj_bias,
    )


def _padded(name: str, x: Tensor, n_tokens: int | None) -> tuple[Tensor, Tensor]:
    """A nested tensor as `(B, T, D)` with zeros, and where it has no token `(B, T)`."""
    if x.layout != torch.strided:
        raise CaptureError(
            f"{name} was called with a nested tensor of layout {x.layout}, which capture does not "
            "read; give it padded tensors and a key padding mask"
        )
    lengths = x._nested_tensor_size()[:, 0].to(x.device)
    n_tokens = n_tokens or int(lengths.max())
    size = (len(lengths), n_tokens, x.size(2))
    absent = torch.arange(n_tokens, device=x.device) >= lengths[:, None]
    return torch.nested.to_padded_tensor(x, 0.0, size), absent


def _encoder_arguments(
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """The arguments of `nn.TransformerEncoderLayer.forward`, however they were given."""
    return src, src_mask, src_key_padding_mask, is_causal


def _attention_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, bool]:
    """What matters of the arguments of `nn.MultiheadAttention.forward`."""
    return query, key, key_padding_mask, attn_mask, is_causal


def _functional_arguments(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of `functional.multi_head_attention_forward` by name."""
    bound = _FUNCTIONAL.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments
