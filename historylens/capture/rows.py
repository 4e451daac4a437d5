"""Attention arithmetic in row blocks: exact softmax rows, never a whole T x T matrix.

    columns, counts = received(call)                                         # (B, H, T)
    images, map_rows, map_cols = maps(call, samples=[0], size=512)

Axes as in `inputs.py`; `R`, `C` rows and columns of a map.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from historylens.capture.inputs import Call, wide

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
    """

    rows: Tensor  # (R,) int64, token index of each map row
    cols: Tensor  # (C,) int64, first token index of each map column; C = R
    n_first: int  # leading tokens that have a column each
    bin_width: int  # tokens in a bin of the middle part, 1 where the map is the matrix itself

    @classmethod
    def of(cls, n_tokens: int, size: int) -> "MapGrid":
        """The grid of at most `size` rows and columns (at least 4) for `n_tokens` tokens."""
        if n_tokens <= size:
            return cls(*[torch.arange(n_tokens)] * 2, n_tokens, 1)
        n_first = min(N_EXACT_FIRST, size // 4)
        query = n_tokens - 1
        width = -(-(query - n_first) // (size - n_first - 1))
        starts = [*range(n_first), *range(n_first, query, width), query]
        ends = [start - 1 for start in starts[1:]] + [query]
        return cls(torch.tensor(ends), torch.tensor(starts), n_first, width)

    def pool(self, values: Tensor) -> Tensor:
        """Sum over the tokens of each bin: `(..., T)` to `(..., C)`."""
        if self.bin_width == 1:
            return values
        middle = values[..., self.n_first : -1]
        middle = functional.pad(middle, (0, -middle.shape[-1] % self.bin_width))
        # A product with ones: torch sums short rows slowly.
        middle = middle.unflatten(-1, (-1, self.bin_width)) @ values.new_ones(self.bin_width)
        return torch.cat([values[..., : self.n_first], middle, values[..., -1:]], dim=-1)


def received(call: Call, padded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention `(B, H, T)` that each token receives, averaged over the queries that may see it.

    Of a prepared call; NaN where there are none. Queries that are `padded` `(B, Tq)` are left out.
    With it, how many queries those are.
    """
    shape, n_keys = call.shape[:2], call.n_tokens
    if padded is None:
        call = _merged(call, range(len(call.q)))
    n_samples, n_heads, n_queries, _ = call.shape
    device, is_causal = call.q.device, call.mask.causal
    total = wide(call.q.new_zeros(n_samples, n_heads, n_keys))
    count = torch.zeros_like(total)
    by_position = call.k is not None and not call.mask.biases and padded is None
    if by_position:  # the counts are known beforehand
        first = torch.arange(n_keys, device=device) if is_causal else 0
        count += torch.as_tensor(n_queries - first).clamp(min=0)
    for b, heads, rows in _blocks(call):
        weights, seen = _weights(call, b, heads, rows, cut=by_position and is_causal)
        if padded is not None:
            real = ~padded[b, rows].to(device)
            weights, seen = weights[:, real], seen[..., real, :]
        total[b, heads, : weights.shape[-1]] += weights.sum(1)
        if not by_position:
            count[b, heads] += seen.sum(-2)
    total, count = (x.view(*shape, n_keys) for x in (total, count))
    return total / count, count


def maps(call: Call, samples: Sequence[int], size: int, passes: list[int]) -> tuple[Tensor, ...]:
    """Attention maps `(M, H, R, C)` of samples of a prepared call, on a `MapGrid` of that size.

    The mean weight of the tokens of a bin that may be seen, NaN where there are none. With them the
    token of each row `(R,)` and the first token of each column `(C,)`, int64 on the CPU. Each of
    `passes`, so many tokens, has a grid.
    """
    shape, limit = (len(samples), call.shape[1]), _block_scores(call.q.device)
    if math.prod(shape) * call.shape[3] * MIN_BLOCK_ROWS <= limit:  # blocks of as many rows stay
        merged = _merged(call, samples)
        call, samples = merged, samples if merged is call else [0]
    _, n_heads, n_queries, n_keys = call.shape
    grids = [MapGrid.of(n, size) for n in passes]
    cols = torch.cat([grid.cols + sum(passes[:i]) for i, grid in enumerate(grids)])

    def pool(values: Tensor) -> Tensor:
        parts = zip(grids, values.split(passes, -1), strict=True)
        pooled = [grid.pool(part) for grid, part in parts]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, -1)

    rows = MapGrid.of(n_queries, size).rows
    out = wide(call.q.new_empty(len(samples), n_heads, len(rows), len(cols)))
    step = max(1, limit // (n_heads * n_keys))
    for m, b in enumerate(samples):
        for start in range(0, len(rows), step):
            chosen = rows[start : start + step].to(out.device)
            weights, seen = _weights(call, b, slice(0, n_heads), chosen)  # (H, R, T)
            n_seen = pool(seen.to(weights.dtype))
            out[m, :, start : start + step] = pool(weights) / n_seen  # 0 / 0: forbidden
    return out.view(*shape, *out.shape[2:]), rows, cols


def _merged(call: Call, samples: Sequence[int]) -> Call:
    """The call with samples as further heads of one, where one mask is for all, else as it is."""
    if len(samples) < 2 or any(bias.shape[:2] != (1, 1) for bias in call.mask.biases):
        return call
    is_all = [*samples] == [*range(len(call.q))]
    chosen = slice(None) if is_all else torch.as_tensor(samples, device=call.q.device)
    q, k = (x if x is None else x[chosen].flatten(0, 1)[None] for x in (call.q, call.k))
    return replace(call, q=q, k=k)


def _weights(call: Call, b: int, heads: slice, rows: slice | Tensor, cut: bool = False) -> tuple:
    """Weights `(h, R, T)` of rows and which of them are allowed, which broadcasts to them.

    Under a bare causal mask it may be `cut`: the keys after all of these rows are left out.
    """
    q, k = call.q[b, heads, rows], call.k
    if k is None:
        scores = wide(q)
    else:
        group, own = call.q.shape[1] // k.shape[1], heads
        if group > 1:
            own = torch.arange(heads.start, heads.stop, device=k.device) // group
        scores = q @ k[b, own, : rows.stop if cut else None].mT
    if cut:
        n_rows, n_keys = scores.shape[-2:]
        near = slice(min(rows.start, n_keys), n_keys)  # where the mask cuts through the rows
        ahead = torch.ones(n_rows, n_keys - near.start, dtype=torch.bool, device=scores.device)
        scores[..., near].masked_fill_(ahead.triu_(1), -torch.inf)
        return scores.softmax(-1), None
    weights, seen = call.weigh(scores, *call.mask.of_rows(b, heads, rows, scores))
    seen = weights.new_ones(1, dtype=torch.bool) if seen is None else seen
    seen = seen.expand(*seen.shape[:-2], *weights.shape[-2:])
    return call.on_tokens(weights), call.on_tokens(seen)


def _block_scores(device: torch.device) -> int:
    return BLOCK_SCORES_CPU if device.type == "cpu" else BLOCK_SCORES_GPU


def _blocks(call: Call) -> Iterator[tuple[int, slice, slice]]:
    """Sample, heads and rows of each block of scores."""
    n_samples, n_heads, n_queries, n_keys = call.shape
    n_scores = _block_scores(call.q.device)
    per_block = min(n_heads, max(1, n_scores // (n_keys * min(MIN_BLOCK_ROWS, n_queries))))
    n_rows = min(n_queries, max(MIN_BLOCK_ROWS, n_scores // (n_keys * per_block)))
    heads = [slice(i, min(i + per_block, n_heads)) for i in range(0, n_heads, per_block)]
    rows = [slice(i, min(i + n_rows, n_queries)) for i in range(0, n_queries, n_rows)]
    return product(range(n_samples), heads, rows)
