"""Attention arithmetic in row blocks: exact softmax rows, never a whole T x T matrix.

A block holds as many rows as fit the processor's cache, so that the softmax and the column sums
cost no trip to main memory:

    q = q / math.sqrt(q.shape[-1])
    columns = received(q, k, Mask("causal"))                                 # (B, H, T)
    grid = MapGrid.of(16384, size=512)
    images = maps(q, k, Mask("causal"), samples=[0], grid=grid, rows=grid.rows)

Axes as in `inputs.py`; `R`, `C` rows and columns of a map.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from historylens.capture.masks import Mask, hidden

# Scores held at once. A CPU is fastest while they stay in its cache; a GPU wants wide kernels.
BLOCK_SCORES_CPU = 2**19
BLOCK_SCORES_GPU = 2**26
MIN_BLOCK_ROWS = 32
N_EXACT_FIRST = 4  # leading tokens, where attention sinks sit, that keep a map column each


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
            return cls(n_tokens, *[torch.arange(n_tokens)] * 2, n_tokens, 1)
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


def weigh(scores: Tensor, bias: Tensor | None, mask: Mask) -> tuple[Tensor, Tensor | None]:
    """Attention weights of rows of scores, and which keys they may see.

    Args:
        scores: `(..., R, Tk)`, up to a constant in each row.
        bias: what the mask adds to them, broadcasts to the scores; None for nothing.
        mask: which keys a query may see.

    Returns:
        Weights `(..., R, Tk)`, each row sums to 1, or is zeros where it may see nothing, as in the
        fused kernels; and bool that broadcasts to them, or None if all is seen.
    """
    weights = (scores if bias is None else scores + bias).softmax(-1)
    if mask.kind == "scores":
        seen = ~hidden(scores, weights)
    elif bias is None:
        return weights, None
    else:
        seen = bias > -torch.inf
    return weights.masked_fill_(~seen.any(-1, keepdim=True), 0.0), seen


def received(q: Tensor, k: Tensor | None, mask: Mask) -> Tensor:
    """Attention that each key receives, averaged over the queries allowed to see it.

    Args:
        q: `(B, H, Tq, d)` scaled queries, or the scores `(B, H, Tq, Tk)`.
        k: `(B, Hk, Tk, d)`, `Hk` dividing `H`; None if `q` are scores.
        mask: what a query may see. Queries that are padding are left out.

    Returns:
        `(B, H, Tk)`: column means of the attention matrix over its allowed entries, `T - j` of them
        in column `j` under a causal mask; NaN where no query may see a key.
    """
    n_samples, n_heads, n_queries, n_keys = _shape(q, k)
    total = q.new_zeros(n_samples, n_heads, n_keys, dtype=_wide(q.dtype))
    count = torch.zeros_like(total)
    by_position = mask.plain and mask.padded is None  # then the counts are known beforehand
    if by_position:
        first = torch.arange(n_keys, device=q.device) if mask.kind == "causal" else 0
        count += torch.as_tensor(n_queries - first).clamp(min=0)
    for b, heads, rows in _blocks(n_samples, n_heads, n_queries, n_keys, q.device):
        if by_position and mask.kind == "causal":
            weights = _causal_weights(q, k, b, heads, rows)
            total[b, heads, : weights.shape[-1]] += weights.sum(1)
            continue
        weights, seen = _weights(q, k, mask, b, heads, rows)
        if mask.padded is not None:
            real = ~mask.padded[b, rows].to(q.device)
            weights, seen = weights[:, real], seen[..., real, :]
        total[b, heads] += weights.sum(1)
        if not by_position:
            count[b, heads] += seen.sum(-2)
    return total / count


def maps(
    q: Tensor,
    k: Tensor | None,
    mask: Mask,
    *,
    samples: Sequence[int],
    grid: MapGrid,
    rows: Tensor,
) -> Tensor:
    """Attention maps of bounded size.

    Args:
        q, k, mask: as in `received`.
        samples: which `M` of the `B` samples.
        grid: columns of the maps.
        rows: `(R,)` int64, queries that have a row.

    Returns:
        `(M, H, R, C)`, NaN where every token of the bin is forbidden to the row.
    """
    _, n_heads, _, n_keys = _shape(q, k)
    shape = len(samples), n_heads, len(rows), len(grid.cols)
    out = q.new_empty(shape, dtype=_wide(q.dtype))
    step = max(1, _block_scores(q.device) // (n_heads * n_keys))
    for m, b in enumerate(samples):
        for start in range(0, len(rows), step):
            chosen = rows[start : start + step].to(q.device)
            weights, seen = _weights(q, k, mask, b, slice(0, n_heads), chosen)  # (H, R, Tk)
            n_seen = grid.pool(seen.to(weights.dtype))
            out[m, :, start : start + step] = grid.pool(weights) / n_seen  # 0 / 0: forbidden
    return out


def _weights(
    q: Tensor, k: Tensor | None, mask: Mask, b: int, heads: slice, rows: slice | Tensor
) -> tuple[Tensor, Tensor]:
    """Weights `(h, R, Tk)` of rows and which of them are allowed, which broadcasts to them."""
    scores = _scores(q, k, b, heads, rows)
    weights, seen = weigh(scores, mask.of_rows(b, heads, rows, scores), mask)
    if seen is None:
        seen = weights.new_ones(1, dtype=torch.bool).expand(weights.shape[-2:])
    return weights, seen


def _causal_weights(q: Tensor, k: Tensor, b: int, heads: slice, rows: slice) -> Tensor:
    """Weights `(h, R, C)` of rows under a causal mask; the keys after all of these are left out."""
    scores = _scores(q, k[:, :, : rows.stop], b, heads, rows)
    n_keys = scores.shape[-1]
    near = slice(min(rows.start, n_keys), n_keys)  # where the mask cuts through the rows
    ahead = torch.ones(rows.stop - rows.start, n_keys - near.start, dtype=torch.bool)
    scores[..., near].masked_fill_(ahead.to(q.device).triu_(1), -torch.inf)
    return scores.softmax(-1)


def _scores(q: Tensor, k: Tensor | None, b: int, heads: slice, rows: slice | Tensor) -> Tensor:
    """Scores `(h, R, Tk)` of rows."""
    if k is None:
        return q[b, heads, rows].to(_wide(q.dtype))
    group = q.shape[1] // k.shape[1]
    shared = heads
    if group > 1:
        shared = torch.arange(heads.start, heads.stop, device=k.device) // group
    return q[b, heads, rows] @ k[b, shared].mT


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= 4 else torch.float32


def _shape(q: Tensor, k: Tensor | None) -> tuple[int, int, int, int]:
    """`(B, H, Tq, Tk)`."""
    n_samples, n_heads, n_queries, last = q.shape
    return n_samples, n_heads, n_queries, last if k is None else k.shape[2]


def _block_scores(device: torch.device) -> int:
    return BLOCK_SCORES_CPU if device.type == "cpu" else BLOCK_SCORES_GPU


def _blocks(
    n_samples: int, n_heads: int, n_queries: int, n_keys: int, device: torch.device
) -> Iterator[tuple[int, slice, slice]]:
    """Sample, heads and rows of each block of scores."""
    n_scores = _block_scores(device)
    per_block = min(n_heads, max(1, n_scores // (n_keys * min(MIN_BLOCK_ROWS, n_queries))))
    n_rows = min(n_queries, max(MIN_BLOCK_ROWS, n_scores // (n_keys * per_block)))
    for b in range(n_samples):
        for head in range(0, n_heads, per_block):
            for row in range(0, n_queries, n_rows):
                heads = slice(head, min(head + per_block, n_heads))
                yield b, heads, slice(row, min(row + n_rows, n_queries))
