"""Attention arithmetic in row blocks: exact softmax rows, never a whole T x T matrix.

Every function takes the scaled queries and the keys of one layer and a `Mask` that says what a
query may see. A block holds as many rows as fit the processor's cache, so that the softmax and the
column sums of a block cost no trip to main memory:

    q = q / math.sqrt(q.shape[-1])
    last = last_row(scores, Mask("causal"))                                  # (B, H, T)
    columns = received(q, k, Mask("causal"))                                 # (B, H, T)
    images = maps(q, k, Mask("causal"), samples=[0], grid=MapGrid.of(16384, size=512))

Axes: `B` samples, `H` heads, `T` tokens, `d` width of a head, `R`, `C` rows, columns of a map.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

# Scores held at once. A CPU is fastest while they stay in its cache; a GPU wants wide kernels.
BLOCK_SCORES_CPU = 2**19
BLOCK_SCORES_GPU = 2**26
MIN_BLOCK_ROWS = 32
N_EXACT_FIRST = 4  # leading tokens, where attention sinks sit, that keep a map column each


@dataclass(frozen=True)
class Mask:
    """Which keys a query may see.

    Attributes:
        kind: "full" (every key), "causal" (keys up to the query's own) or "additive".
        bias: for "additive": `(T, T)` or `(B, H, T, T)`. A float is added to the scores, -inf
            forbids; a bool is True where attention is forbidden.
    """

    kind: Literal["full", "causal", "additive"]
    bias: Tensor | None = None

    def of_rows(self, sample: int, heads: slice, rows: slice | Tensor, like: Tensor) -> Tensor:
        """Additive mask of rows of a sample, `(R, T)` or `(h, R, T)`, in the type of `like`."""
        bias = self.bias[rows] if self.bias.dim() == 2 else self.bias[sample, heads][:, rows]
        return _additive(bias, like)

    def of_query(self, like: Tensor) -> Tensor:
        """Additive mask of the last token, `(T,)` or `(B, H, T)`, in the type of `like`."""
        return _additive(self.bias[..., -1, :], like)


def _additive(bias: Tensor, like: Tensor) -> Tensor:
    if bias.dtype == torch.bool:
        return like.new_zeros(bias.shape).masked_fill_(bias, -torch.inf)
    return bias.to(like.dtype)


@dataclass(frozen=True)
class MapGrid:
    """Where the rows and columns of an attention map of bounded size lie among `T` tokens.

    Up to `size` tokens the map is the matrix itself. Beyond, the first tokens and the query token
    keep a column each and the rest is cut into bins of equal width. A row is the row of the last
    token of its bin, so the causal triangle stays a triangle and the last row is the query token's.
    The value of a bin is the mean weight of its tokens that may be seen, so that uniform attention
    stays `1 / T` however wide the bins.

    Attributes:
        n_tokens: `T`.
        rows: `(R,)` int64, token index of each map row.
        cols: `(C,)` int64, first token index of each map column; `C = R`.
        n_first: leading tokens that have a column each.
        bin_width: tokens in a bin of the middle part, 1 when the map is the matrix itself.
    """

    n_tokens: int
    rows: Tensor
    cols: Tensor
    n_first: int
    bin_width: int

    @classmethod
    def of(cls, n_tokens: int, size: int) -> "MapGrid":
        """The grid of at most `size` rows and columns (at least 4) for `n_tokens` tokens."""
        if n_tokens <= size:
            index = torch.arange(n_tokens)
            return cls(n_tokens, index, index, n_tokens, 1)
        n_first = min(N_EXACT_FIRST, size // 4)
        query = n_tokens - 1
        width = -(-(query - n_first) // (size - n_first - 1))
        starts = [*range(n_first), *range(n_first, query, width), query]
        ends = [start - 1 for start in starts[1:]] + [query]
        return cls(n_tokens, torch.tensor(ends), torch.tensor(starts), n_first, width)

    def pool(self, values: Tensor) -> Tensor:
        """Sum over the tokens of each bin: `(..., T)` to `(..., C)`."""
        if self.bin_width == 1:
            return values
        middle = values[..., self.n_first : self.n_tokens - 1]
        middle = functional.pad(middle, (0, -middle.shape[-1] % self.bin_width))
        # A product with ones: torch sums short rows slowly.
        middle = middle.unflatten(-1, (-1, self.bin_width)) @ values.new_ones(self.bin_width)
        return torch.cat([values[..., : self.n_first], middle, values[..., -1:]], dim=-1)


def last_row(scores: Tensor, mask: Mask) -> Tensor:
    """Attention row of the last token from its scores.

    Args:
        scores: `(B, H, T)`, up to a constant in each row.
        mask: what the last token may see: everything under a causal mask.

    Returns:
        `(B, H, T)`, each row sums to 1; zeros where the mask lets the last token see nothing.
    """
    if mask.kind != "additive":
        return scores.softmax(-1)
    return _masked_softmax(scores, mask.of_query(scores))


def received(q: Tensor, k: Tensor, mask: Mask) -> Tensor:
    """Attention that each position receives, averaged over the queries allowed to see it.

    Args:
        q: `(B, H, T, d)` scaled queries.
        k: `(B, H, T, d)`.
        mask: what a query may see.

    Returns:
        `(B, H, T)`: column means of the attention matrix over its allowed entries, `T - j` of them
        in column `j` under a causal mask; NaN where no query may see a position.
    """
    n_samples, n_heads, n_tokens, _ = k.shape
    total = k.new_zeros(n_samples, n_heads, n_tokens)
    count = torch.zeros_like(total)
    if mask.kind == "causal":
        count += torch.arange(n_tokens, 0, -1, device=k.device)
    elif mask.kind == "full":
        count += n_tokens
    for b, heads, rows in _blocks(k):
        if mask.kind == "causal":
            seen = slice(0, rows.stop)
            scores = q[b, heads, rows] @ k[b, heads, seen].mT  # (h, R, rows.stop)
            n_rows = rows.stop - rows.start
            ahead = torch.ones(n_rows, n_rows, dtype=torch.bool, device=k.device).triu_(1)
            scores[..., rows].masked_fill_(ahead, -torch.inf)
            total[b, heads, seen] += scores.softmax(-1).sum(1)
            continue
        scores = q[b, heads, rows] @ k[b, heads].mT  # (h, R, T)
        if mask.kind == "full":
            total[b, heads] += scores.softmax(-1).sum(1)
            continue
        bias = mask.of_rows(b, heads, rows, scores)
        total[b, heads] += _masked_softmax(scores, bias).sum(1)
        count[b, heads] += (bias > -torch.inf).sum(-2)
    return total / count


def maps(q: Tensor, k: Tensor, mask: Mask, *, samples: Sequence[int], grid: MapGrid) -> Tensor:
    """Attention maps of bounded size.

    Args:
        q: `(B, H, T, d)` scaled queries.
        k: `(B, H, T, d)`.
        mask: what a query may see.
        samples: which `M` of the `B` samples.
        grid: rows and columns of the maps.

    Returns:
        `(M, H, R, C)`, NaN where every token of the bin is forbidden to the row.
    """
    n_heads, n_tokens = k.shape[1:3]
    out = k.new_empty(len(samples), n_heads, len(grid.rows), len(grid.cols))
    step = max(1, _block_scores(k) // (n_heads * n_tokens))
    positions = torch.arange(n_tokens, device=k.device)
    every_head = slice(None)
    for m, b in enumerate(samples):
        for start in range(0, len(grid.rows), step):
            rows = grid.rows[start : start + step].to(k.device)
            scores = q[b, :, rows] @ k[b].mT  # (H, R, T)
            if mask.kind == "additive":
                bias = mask.of_rows(b, every_head, rows, scores)
                weights, seen = _masked_softmax(scores, bias), bias > -torch.inf
            elif mask.kind == "causal":
                seen = positions <= rows[:, None]
                weights = scores.masked_fill_(~seen, -torch.inf).softmax(-1)
            else:
                weights, seen = scores.softmax(-1), positions >= 0
            n_seen = grid.pool(seen.to(scores.dtype))
            out[m, :, start : start + step] = grid.pool(weights) / n_seen  # 0 / 0: forbidden
    return out


def _masked_softmax(scores: Tensor, bias: Tensor) -> Tensor:
    """Softmax of `scores + bias`; a row that may see nothing is zeros, as in the fused kernels."""
    weights = (scores + bias).softmax(-1)
    blind = (bias == -torch.inf).all(-1, keepdim=True)
    return weights.masked_fill_(blind, 0.0)


def _block_scores(k: Tensor) -> int:
    return BLOCK_SCORES_CPU if k.device.type == "cpu" else BLOCK_SCORES_GPU


def _blocks(k: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Sample, heads and rows of each block of scores."""
    n_samples, n_heads, n_tokens, _ = k.shape
    n_scores = _block_scores(k)
    per_block = min(n_heads, max(1, n_scores // (n_tokens * min(MIN_BLOCK_ROWS, n_tokens))))
    n_rows = min(n_tokens, max(MIN_BLOCK_ROWS, n_scores // (n_tokens * per_block)))
    for b in range(n_samples):
        for head in range(0, n_heads, per_block):
            for row in range(0, n_tokens, n_rows):
                heads = slice(head, min(head + per_block, n_heads))
                yield b, heads, slice(row, min(row + n_rows, n_tokens))
