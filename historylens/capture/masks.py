"""Which keys a query may see, and where a mask of large negative numbers begins.

A mask forbids by -inf, by a bool, or by a large negative number. The last is told from a bias by
`floor_of`; a key so low is forbidden where its weight is exactly 0, so that a row which is masked
altogether, and attends evenly then, still counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

NEAR = -450.0  # down to twice this, numbers are no mask
CHUNK_CPU, CHUNK_GPU = 2**18, 2**26  # numbers looked at together
Added = tuple[Tensor | None, Tensor | None]  # what is added to scores; where it may be a mask's


def floor_of(values: Tensor) -> float:
    """Below this, biases or scores `(B, H, Tq, Tk)` are a mask's; -inf where only -inf forbids.

    What is graded (ALiBi of any slope, relative positions, scores) goes down in steps, at most to
    its double, from `NEAR` on. A mask jumps.
    """
    for axis, stride in enumerate(values.stride()):
        values = values.narrow(axis, 0, 1) if stride == 0 else values
    size = max(1, (CHUNK_CPU if values.device.type == "cpu" else CHUNK_GPU) // values.shape[-1])
    parts = [part for one in values for head in one for part in head.split(size)]
    lowest = torch.finfo(values.dtype).min

    def down_to(limit: float) -> float:
        limit = max(limit, lowest)
        return min(float(part.masked_fill(part < limit, 0).amin()) for part in parts)

    deepest, reached = down_to(lowest), NEAR
    if deepest >= 2 * NEAR:
        return -torch.inf
    while (near := down_to(2 * reached)) < reached:
        reached = near
    return 2 * reached if deepest < 2 * reached else -torch.inf


@dataclass(frozen=True)
class Mask:
    """Which keys a query may see: those that all of this allows.

    A bias is `(B, H, Tq, Tk)`, where `B`, `H` and `Tq` may be 1. A float is added to the scores,
    -inf forbids; a bool is True where attention is forbidden.
    """

    biases: tuple[Tensor, ...] = ()
    allows: bool = False  # a bool bias is True where attention is allowed instead
    causal: bool = False  # only the keys up to the query's own position

    @cached_property
    def floors(self) -> tuple[float, ...]:
        """`floor_of` each bias."""
        return tuple(-torch.inf if x.dtype == torch.bool else floor_of(x) for x in self.biases)

    @cached_property
    def key(self) -> tuple:
        """Equal for masks of the same tensors, unchanged, as long as one of them is kept."""
        versions = [object() if x.is_inference() else x._version for x in self.biases]
        places = [(x.data_ptr(), x.shape, x.stride()) for x in self.biases]
        return self.allows, self.causal, places, versions

    def of_rows(self, sample: int, heads: slice, rows: slice | Tensor, like: Tensor) -> Added:
        """What to add to scores `like` `(h, R, Tk)` of rows of a sample, None for nothing, and
        where a large negative number may forbid, a bool, None for nowhere.
        """
        parts = []
        for bias in self.biases:
            n_samples, n_heads, n_rows, _ = bias.shape
            own = heads if n_heads > 1 else slice(None), rows if n_rows > 1 else slice(None)
            parts.append(bias[sample % n_samples, *own])
        index = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        return self._total(parts, index if self.causal else None, like)

    def of_query(self, query: int | Tensor, like: Tensor) -> Added:
        """The same for scores `like` `(B, H, Tk)` of one query, for all samples or `(B,)`."""
        index = None
        if self.causal and (isinstance(query, Tensor) or query < like.shape[-1] - 1):
            index = torch.as_tensor(query).reshape(-1, 1)  # the last one sees everything
        return self._total([pick(bias, query) for bias in self.biases], index, like)

    def _total(self, parts: Sequence[Tensor], index: Tensor | None, like: Tensor) -> Added:
        """Sum of parts of the biases and of the causal mask of the queries at `index`."""
        floors = zip(parts, self.floors, strict=True)
        low = [part < floor for part, floor in floors if floor > -torch.inf]
        parts = [_additive(~bias if self.allows else bias, like) for bias in parts]
        if index is not None:
            keys = torch.arange(like.shape[-1], device=like.device)
            parts.append(_additive(keys > index.to(like.device)[..., None], like))
        total = reduce(torch.add, parts) if parts else None
        return total, reduce(torch.logical_or, low) if low else None


def pick(values: Tensor, query: int | Tensor) -> Tensor:
    """One query a sample of `(B, H, Tq, d)`: `(B, H, d)`; an only row serves every query."""
    query = query % values.shape[2]
    if isinstance(query, int):
        return values.select(2, query)
    samples = torch.arange(len(query), device=values.device)
    return values.expand(len(query), -1, -1, -1)[samples, :, query.to(values.device)]


def _additive(bias: Tensor, like: Tensor) -> Tensor:
    """A bool that forbids, or a float, as a float to add."""
    if bias.dtype == torch.bool:
        return like.new_zeros(bias.shape).masked_fill_(bias, -torch.inf)
    return bias.to(like.dtype)
