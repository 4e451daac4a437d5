"""Find the transformer layers of a model and read queries, keys and mask off a layer's call.

Today the one kind of layer is `nn.TransformerEncoderLayer`: pre-norm or post-norm, batch first or
not, any mask. What cannot be read is refused with a `CaptureError` that names the layer.

    layers = find_layers(model)                                        # {name: layer}, in order
    call = read_call(name, layer, args, kwargs, MaskReader())
    q, k = call.queries_and_keys()                                     # (B, H, T, d)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Call:
    """One call of an encoder layer: what its attention is computed from.

    Attributes:
        attention: the layer's attention module.
        x: `(B, T, D)` input of the attention, float32 or wider.
        mask: what each query may see.
    """

    attention: nn.MultiheadAttention
    x: Tensor
    mask: Mask

    @property
    def n_heads(self) -> int:
        """Number of heads `H`."""
        return self.attention.num_heads

    def last_scores(self) -> Tensor:
        """Scores `(B, H, T)` of the last token's query, up to a constant in each row.

        `q (W x + b) = (q W) x + q b`: folding the key projection into the query saves projecting
        every token, and the constant `q b` does not change the softmax.
        """
        n_samples, _, width = self.x.shape
        q = self._project(0, self.x[:, -1]).view(n_samples, self.n_heads, 1, -1)
        weight = self._weight(1).view(self.n_heads, -1, width)  # (H, d, D)
        folded = (q @ weight).squeeze(2)  # (B, H, D)
        return folded @ self.x.mT * self._scale

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """Scaled queries and keys, `(B, H, T, d)` both."""
        q = self._project(0, self.x).mul_(self._scale)
        return self._split(q), self._split(self._project(1, self.x))

    @property
    def _scale(self) -> float:
        return 1.0 / math.sqrt(self.attention.head_dim)

    def _split(self, values: Tensor) -> Tensor:
        n_samples, n_tokens, _ = values.shape
        return values.view(n_samples, n_tokens, self.n_heads, -1).transpose(1, 2).contiguous()

    def _project(self, part: int, x: Tensor) -> Tensor:
        bias = self.attention.in_proj_bias
        if bias is not None:
            width = self.attention.embed_dim
            bias = bias[part * width : (part + 1) * width].to(x.dtype)
        return functional.linear(x, self._weight(part), bias)

    def _weight(self, part: int) -> Tensor:
        """Projection of the queries (part 0) or keys (part 1), `(D, D)`."""
        packed, width = self.attention.in_proj_weight, self.attention.embed_dim
        if packed is None:
            weight = (self.attention.q_proj_weight, self.attention.k_proj_weight)[part]
        else:
            weight = packed[part * width : (part + 1) * width]
        return weight.to(self.x.dtype)


def read_call(
    name: str,
    layer: nn.TransformerEncoderLayer,
    args: tuple,
    kwargs: dict[str, Any],
    masks: "MaskReader",
) -> Call:
    """What a call of a layer attends with.

    Args:
        name: the layer's name, for errors.
        layer: the layer.
        args, kwargs: the arguments of the call.
        masks: reads the mask, which the layers of a model share.

    Raises:
        CaptureError: padding, or a mask that cannot be read.
    """
    x, bias, padding, is_causal = _arguments(*args, **kwargs)
    if x.is_nested or padding is not None:
        raise CaptureError(
            f"{name} was called with padding (src_key_padding_mask or a nested tensor), which "
            "capture does not read; give it samples of one length without a padding mask"
        )
    attention = layer.self_attn
    if layer.norm_first:
        # Autocast may hand over a narrower type; forward: hooks of the user must not fire twice.
        x = layer.norm1.forward(x.to(layer.linear1.weight.dtype))
    if x.dim() == 2:
        x = x.unsqueeze(0)
    elif not attention.batch_first:
        x = x.transpose(0, 1)
    if x.dtype.itemsize < 4:
        x = x.float()
    n_samples, n_tokens, _ = x.shape
    mask = masks.read(name, bias, is_causal, (n_samples, attention.num_heads, n_tokens))
    return Call(attention, x, mask)


def _arguments(
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """The arguments of `nn.TransformerEncoderLayer.forward`, however they were given."""
    return src, src_mask, src_key_padding_mask, is_causal


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
