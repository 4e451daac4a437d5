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
            bias = self._causal(index.to(like.device), like)
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
            # The usual query, the last token, sees everything.
            if not (isinstance(query, int) and query >= like.shape[-1] - 1):
                index = torch.as_tensor(query, device=like.device).reshape(-1, 1)
                bias = self._causal(index, like)
        elif self.kind == "additive":
            bias = self.bias
            if isinstance(query, int):
                bias = bias[..., query, :]
            else:
                bias = bias.expand(like.shape[0], -1, -1, -1) if bias.dim() == 4 else bias
                samples, query = torch.arange(len(query), device=bias.device), query.to(bias.device)
                bias = bias[query][:, None] if bias.dim() == 2 else bias[samples, :, query]
            bias = self._additive(bias, like)
        if self.keys is not None:
            keys = _additive(self.keys, like)[:, None]
            bias = keys if bias is None else bias + keys
        return bias

    def _part(self, sample: int, heads: slice) -> Tensor:
        if self.bias.dim() == 2:
            return self.bias
        bias = self.bias[sample if len(self.bias) > 1 else 0]
        return bias[heads] if len(bias) > 1 else bias

    def _causal(self, index: Tensor, like: Tensor) -> Tensor:
        """Rows `(R, Tk)` of the causal mask, or `(B, 1, Tk)` for `index` `(B, 1)`."""
        ahead = torch.arange(like.shape[-1], device=like.device) > index[..., None]
        return _additive(ahead, like)

    def _additive(self, bias: Tensor, like: Tensor) -> Tensor:
        return _additive(~bias if self.allows else bias, like)


def hidden(scores: Tensor, weights: Tensor) -> Tensor:
    """Where a mask that is part of the scores forbids, for the softmax `weights` of `scores`."""
    return (scores == -torch.inf) | ((scores <= MASKED_SCORE) & (weights == 0))


def _additive(bias: Tensor, like: Tensor) -> Tensor:
    """A bool that forbids, or a float, as a float to add."""
    if bias.dtype == torch.bool:
        return like.new_zeros(bias.shape).masked_fill_(bias, -torch.inf)
    return bias.to(like.dtype)
