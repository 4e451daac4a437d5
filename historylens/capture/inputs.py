"""What an attention call is computed from, whichever way a model computes it.

A `Call` gives the scores of a query and the queries and keys of all; `mha.py`, `sdpa.py` and
`softmax.py` read one off a model. `capture.py` turns it into rows, received attention and maps.

Axes: `B` samples, `H` heads, `Tq` queries, `Tk` keys, `d` width of a head. In self-attention
`Tq = Tk = T`.
"""

from typing import Protocol

import torch
from torch import Tensor

from attention.masks import Mask


class CaptureError(RuntimeError):
    """Attention could not be captured; the message names the layer and the way out."""


class Call(Protocol):
    """One attention call.

    Attributes:
        shape: `(B, H, Tq, Tk)`; grouped queries count as heads.
        mask: which keys a query may see.
    """

    shape: tuple[int, int, int, int]
    mask: Mask

    def row_scores(self, query: int | Tensor) -> Tensor:
        """Scores `(B, H, Tk)` of one query a sample, before the mask, up to a constant a row.

        Args:
            query: its position, `0 <= query < Tq`, for all samples or `(B,)` int64.
        """

    def queries_and_keys(self) -> tuple[Tensor, Tensor | None]:
        """Scaled queries `(B, H, Tq, d)` and keys `(B, Hk, Tk, d)`, `Hk` dividing `H`.

        Float32 or wider. Where a model holds its scores: these, `(B, H, Tq, Tk)`, and None.
        """


def pick(values: Tensor, query: int | Tensor) -> Tensor:
    """The query's part of `(B, T, D)` or `(B, H, T, D)`: `(B, D)` or `(B, H, D)`."""
    if isinstance(query, int):
        return values.select(-2, query)
    samples, query = torch.arange(len(values), device=values.device), query.to(values.device)
    return values[samples, query] if values.dim() == 3 else values[samples, :, query]


def wide(values: Tensor) -> Tensor:
    """In float32, if narrower."""
    return values.float() if values.dtype.itemsize < 4 else values
