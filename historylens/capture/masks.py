"""Which keys a query may see, in the one form that the row arithmetic of `rows.py` takes.

Mask("causal")
Mask("additive", bias)                       # (Tq, Tk), or (B, H, Tq, Tk) with axes of length 1
Mask("full", keys=key_padding_mask)          # (B, Tk), True or -inf: nobody may see this key
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# A score this low that a softmax turns into exactly 0 was masked by adding a large negative number.
MASKED_SCORE = -1e4


@dataclass(frozen=True)
class Mask:
    """Which keys a query may see.

    Attributes:
        kind: "full" (every key), "causal" (keys up to the query's own position), "additive" (see
            `bias`) or "scores" (the mask is part of the scores already: -inf, or at most
            `MASKED_SCORE` with a weight of exactly 0).
        bias: for "additive": `(Tq, Tk)`, or 4 axes that broadcast to `(B, H, Tq, Tk)`. A float is
            added to the scores, -inf forbids; a bool is True where attention is forbidden.
        allows: a bool `bias` is True where attention is allowed instead.
        keys: `(B, Tk)`, beside the above: a bool is True for a key that nobody may see, a float is
            added to its scores. None for "scores".
        padded: `(B, Tq)` bool, True for queries that are padding: received attention leaves them
            out.
    """

    kind: Literal["full", "causal", "additive", "scores"]
    bias: Tensor | None = None
    allows: bool = False
    keys: Tensor | None = None
    padded: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Full or causal with nothing beside."""
        return self.kind in ("full", "causal") and self.keys is None

    def of_rows(
        self, sample: int, heads: slice, rows: slice | Tensor, like: Tensor
    ) -> Tensor | None:
        """Additive mask of rows of a sample, `(R, Tk)` or `(h, R, Tk)`; None if all is seen.

        Args:
            sample, heads, rows: which.
            like: scores `(h, R, Tk)`, whose type the mask takes.
        """
        bias = None
        if self.kind == "causal":
            index = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
            bias = _causal(index.to(like.device), like)
        elif self.kind == "additive":
            bias = self._additive(self._part(sample, heads)[..., rows, :], like)
        if self.keys is not None:
            keys = _additive(self.keys[sample], like)
            bias = keys.expand(like.shape[-2:]) if bias is None else bias + keys
        return bias

    def of_query(self, query: int | Tensor, like: Tensor) -> Tensor | None:
        """Additive mask of one query a sample, broadcasts to `(B, H, Tk)`; None if it sees all.

        Args:
            query: its position, for all samples or `(B,)` int64.
            like: scores `(B, H, Tk)`, whose type the mask takes.
        """
        bias = None
        if self.kind == "causal":
            if isinstance(query, Tensor) or query < like.shape[-1] - 1:  # the last sees everything
                index = torch.as_tensor(query, device=like.device)
                bias = _causal(index.reshape(-1, 1), like)
        elif self.kind == "additive":
            bias = self.bias if self.bias.dim() == 4 else self.bias[None, None]
            bias = self._additive(pick(bias, query), like)
        if self.keys is not None:
            keys = _additive(self.keys, like)[:, None]
            bias = keys if bias is None else bias + keys
        return bias

    def _part(self, sample: int, heads: slice) -> Tensor:
        if self.bias.dim() == 2:
            return self.bias
        bias = self.bias[sample if len(self.bias) > 1 else 0]
        return bias[heads] if len(bias) > 1 else bias

    def _additive(self, bias: Tensor, like: Tensor) -> Tensor:
        return _additive(~bias if self.allows else bias, like)


def pick(values: Tensor, query: int | Tensor) -> Tensor:
    """One query a sample of `(B, H, Tq, d)`: `(B, H, d)`."""
    if isinstance(query, int):
        return values.select(2, query)
    samples = torch.arange(len(query), device=values.device)
    return values.expand(len(query), -1, -1, -1)[samples, :, query.to(values.device)]


def hidden(scores: Tensor, weights: Tensor) -> Tensor:
    """Where a mask that is part of the scores forbids, for the softmax `weights` of `scores`."""
    return (scores == -torch.inf) | ((scores <= MASKED_SCORE) & (weights == 0))


def _causal(index: Tensor, like: Tensor) -> Tensor:
    """Rows `(R, Tk)` of the causal mask at `index` `(R,)`; `(B, 1, Tk)` for `(B, 1)`."""
    return _additive(torch.arange(like.shape[-1], device=like.device) > index[..., None], like)


def _additive(bias: Tensor, like: Tensor) -> Tensor:
    """A bool that forbids, or a float, as a float to add."""
    if bias.dtype == torch.bool:
        return like.new_zeros(bias.shape).masked_fill_(bias, -torch.inf)
    return bias.to(like.dtype)
