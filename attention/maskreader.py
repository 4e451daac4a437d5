"""Read the attention mask that PyTorch's own attention modules are given.

masks = MaskReader()                                # one a model: its layers share their mask
mask = masks.read("layers.0", attn_mask, is_causal, (B, H, Tq, Tk))
"""

import torch
from torch import Tensor

from attention.calls import CaptureError
from attention.masks import Mask


class MaskReader:
    """Reads the mask of a layer's call; the layers of a model share one, which is read once."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, bool, tuple, Mask] | None = None

    def read(
        self, name: str, bias: Tensor | None, is_causal: bool, shape: tuple[int, int, int, int]
    ) -> Mask:
        """The mask of a call for `shape = (B, H, Tq, Tk)`.

        Raises:
            CaptureError: its shape is unknown, or `is_causal` contradicts it.
        """
        if bias is None:
            return Mask("full")  # is_causal alone masks nothing: PyTorch ignores or refuses it
        if self._last is not None:
            last_bias, *key, mask = self._last
            if last_bias is bias and key == [is_causal, shape]:
                return mask
        mask = self._interpret(name, bias, is_causal, shape)
        self._last = (bias, is_causal, shape, mask)
        return mask

    def _interpret(
        self, name: str, bias: Tensor, is_causal: bool, shape: tuple[int, int, int, int]
    ) -> Mask:
        n_samples, n_heads, *rows_and_columns = shape
        n_queries, n_keys = rows_and_columns
        if bias.shape == (n_samples * n_heads, n_queries, n_keys):
            bias = bias.unflatten(0, (n_samples, n_heads))
        elif bias.shape != (n_queries, n_keys):
            raise CaptureError(
                f"{name}: expected a mask of shape ({n_queries}, {n_keys}) or "
                f"({n_samples * n_heads}, {n_queries}, {n_keys}), got {tuple(bias.shape)}"
            )
        if is_causal:
            _check_causal(name, bias)
            return Mask("causal")
        return Mask("additive", bias)


def _check_causal(name: str, bias: Tensor) -> None:
    """Compare three rows of the mask with `is_causal=True`: PyTorch may follow either."""
    n_queries, n_keys = bias.shape[-2:]
    rows = torch.tensor([0, n_queries // 2, n_queries - 1], device=bias.device)
    given = bias[..., rows, :]
    ahead = torch.arange(n_keys, device=bias.device) > rows[:, None]
    if bias.dtype == torch.bool:
        agrees = given == ahead
    else:
        agrees = given == torch.zeros_like(given).masked_fill_(ahead, -torch.inf)
    if not agrees.all():
        raise CaptureError(
            f"{name} was called with is_causal=True and a mask that is not causal; which of the "
            "two PyTorch follows depends on the kernel. Leave is_causal out"
        )
