"""Find the transformer layers of a model and read queries, keys and mask off a layer's call.

Today the one kind of layer is `nn.TransformerEncoderLayer`: pre-norm or post-norm, batch first or
not, any mask. What cannot be read is refused with a `CaptureError` that names the layer.

    layers = find_layers(model)                                        # {name: layer}, in order
    q, k, mask = read_call(name, layer, args, kwargs, every_query=True, masks=MaskReader())
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from attention.rows import Mask


class CaptureError(RuntimeError):
    """Attention could not be captured; the message names the layer and the way out."""


def find_layers(model_or_layers: nn.Module | Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Layers by name, in order."""
    if isinstance(model_or_layers, nn.Module) and not isinstance(model_or_layers, nn.ModuleList):
        layers = {
            name or type(module).__name__: module
            for name, module in model_or_layers.named_modules()
            if isinstance(module, nn.TransformerEncoderLayer)
        }
        if not layers:
            raise CaptureError(
                f"found no nn.TransformerEncoderLayer in {type(model_or_layers).__name__}, "
                "the kind of layer that can be captured; if there is one that the model does not "
                "register as a submodule, pass the layers: capture([layer, ...])"
            )
    else:
        layers = {f"layer {i}": layer for i, layer in enumerate(model_or_layers)}
        if not layers:
            raise CaptureError("expected a model or its transformer layers, got an empty list")
        if len(set(layers.values())) < len(layers):
            raise CaptureError("a layer stands twice in the list; give each layer once")
    for name, layer in layers.items():
        _check_encoder_layer(name, layer)
    return layers


def _check_encoder_layer(name: str, layer: nn.Module) -> None:
    """Refuse a layer whose queries and keys are not what the code below computes."""
    kind = nn.TransformerEncoderLayer
    if not isinstance(layer, kind):
        raise CaptureError(
            f"{name} is a {type(layer).__name__}, expected an nn.TransformerEncoderLayer"
        )
    for method in ("forward", "_sa_block"):
        if getattr(type(layer), method) is not getattr(kind, method):
            raise CaptureError(
                f"{name} is a {type(layer).__name__} with its own {method}, so its attention may "
                "differ from that of nn.TransformerEncoderLayer; capture a plain layer"
            )
    attention = layer.self_attn
    if type(attention) is not nn.MultiheadAttention:
        raise CaptureError(
            f"{name}.self_attn is a {type(attention).__name__}, expected nn.MultiheadAttention"
        )
    if attention.bias_k is not None or attention.add_zero_attn:
        raise CaptureError(f"{name}.self_attn adds keys of its own (bias_k, add_zero_attn)")


def read_call(
    name: str,
    layer: nn.TransformerEncoderLayer,
    args: tuple,
    kwargs: dict[str, Any],
    every_query: bool,
    masks: "MaskReader",
) -> tuple[Tensor, Tensor, Mask]:
    """Scaled queries `(B, H, T or 1, d)`, keys `(B, H, T, d)` and mask of one call of a layer."""
    x, bias, padding, is_causal = _arguments(*args, **kwargs)
    if x.is_nested or padding is not None:
        raise CaptureError(
            f"{name} was called with padding (src_key_padding_mask or a nested tensor), which "
            "capture does not read; give it samples of one length without a padding mask"
        )
    attention = layer.self_attn
    if layer.norm_first:
        x = layer.norm1(x)
    if x.dim() == 2:
        x = x.unsqueeze(0)
    elif not attention.batch_first:
        x = x.transpose(0, 1)
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # (B, T, D)
    n_samples, n_tokens, _ = x.shape
    mask = masks.read(name, bias, is_causal, (n_samples, attention.num_heads, n_tokens))

    weights, biases = _projections(attention, x.dtype)
    split = (-1, (attention.num_heads, attention.head_dim))
    q = functional.linear(x if every_query else x[:, -1:], weights[0], biases[0])
    q = q.mul_(1.0 / math.sqrt(attention.head_dim)).unflatten(*split).transpose(1, 2)
    k = functional.linear(x, weights[1], biases[1]).unflatten(*split).transpose(1, 2)
    if every_query:
        q, k = q.contiguous(), k.contiguous()
    return q, k, mask


def _arguments(
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """The arguments of `nn.TransformerEncoderLayer.forward`, however they were given."""
    return src, src_mask, src_key_padding_mask, is_causal


def _projections(
    attention: nn.MultiheadAttention, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """Weights and biases of the query and key projections."""
    if attention.in_proj_weight is None:
        weights = (attention.q_proj_weight, attention.k_proj_weight)
    else:
        weights = attention.in_proj_weight.chunk(3)[:2]
    if attention.in_proj_bias is None:
        return tuple(weight.to(dtype) for weight in weights), (None, None)
    biases = attention.in_proj_bias.chunk(3)[:2]
    return tuple(weight.to(dtype) for weight in weights), tuple(bias.to(dtype) for bias in biases)


class MaskReader:
    """Reads the mask of a layer's call; the layers of a model share one, which is read once."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, bool, Mask] | None = None

    def read(
        self, name: str, bias: Tensor | None, is_causal: bool, shape: tuple[int, int, int]
    ) -> Mask:
        """The mask of a call for `shape = (B, H, T)`.

        Raises:
            CaptureError: its shape is unknown, `is_causal` contradicts it, or it lets the query
                token see nothing.
        """
        if bias is None:
            return Mask("full")  # is_causal alone masks nothing: PyTorch ignores or refuses it
        if self._last is not None and self._last[0] is bias and self._last[1] == is_causal:
            return self._last[2]
        mask = self._interpret(name, bias, is_causal, shape)
        self._last = (bias, is_causal, mask)
        return mask

    def _interpret(
        self, name: str, bias: Tensor, is_causal: bool, shape: tuple[int, int, int]
    ) -> Mask:
        n_samples, n_heads, n_tokens = shape
        if bias.shape == (n_samples * n_heads, n_tokens, n_tokens):
            bias = bias.unflatten(0, (n_samples, n_heads))
        elif bias.shape != (n_tokens, n_tokens):
            raise CaptureError(
                f"{name}: expected a mask of shape ({n_tokens}, {n_tokens}) or "
                f"({n_samples * n_heads}, {n_tokens}, {n_tokens}), got {tuple(bias.shape)}"
            )
        if is_causal:
            _check_causal(name, bias)
            return Mask("causal")
        query = bias[..., -1, :]
        forbidden = query if bias.dtype == torch.bool else query == -torch.inf
        if forbidden.all(-1).any():
            raise CaptureError(f"{name}: the mask lets the last (query) token see nothing")
        return Mask("additive", bias)


def _check_causal(name: str, bias: Tensor) -> None:
    """Compare three rows of the mask with `is_causal=True`: PyTorch may follow either."""
    n_tokens = bias.shape[-1]
    rows = torch.tensor([0, n_tokens // 2, n_tokens - 1], device=bias.device)
    given = bias[..., rows, :]
    ahead = torch.arange(n_tokens, device=bias.device) > rows[:, None]
    if bias.dtype == torch.bool:
        agrees = given == ahead
    else:
        agrees = given == torch.zeros_like(given).masked_fill_(ahead, -torch.inf)
    if not agrees.all():
        raise CaptureError(
            f"{name} was called with is_causal=True and a mask that is not causal; which of the "
            "two PyTorch follows depends on the kernel. Leave is_causal out"
        )
