"""From an attention call to what is kept of it: the query row, received attention and maps.

Statistics(received=True).of("layers.0", call)                              # LayerAttention
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attention import rows
from attention.calls import Call, CaptureError
from attention.record import LayerAttention

MAP_SIZE = 512


@dataclass(frozen=True)
class Statistics:
    """What to keep of every call.

    Attributes:
        received: also the attention that each position receives, which needs every row.
        samples: samples of the batch whose maps are kept.
        map_size: largest number of rows and of columns of a map, at least 8.
        query: position of the query token, for all samples or `(B,)`; negative from the end.
        padding: `(B, T)` bool, True where a token is padding.
    """

    received: bool = True
    samples: tuple[int, ...] = ()
    map_size: int = MAP_SIZE
    query: int | Tensor = -1
    padding: Tensor | None = None

    def __post_init__(self) -> None:
        if self.map_size < 8:
            raise CaptureError(f"expected a map_size of at least 8, got {self.map_size}")
        query = self.query
        if isinstance(query, Tensor) and (query.dim() != 1 or query.dtype not in _WHOLE):
            raise CaptureError(
                "expected a query of whole numbers (B,), one position a sample, got "
                f"{query.dtype} {tuple(query.shape)}"
            )
        if self.padding is not None and self.padding.dtype != torch.bool:
            raise CaptureError(
                f"expected a bool padding (B, T), True for padding, got {self.padding.dtype}"
            )

    def of(self, name: str, call: Call) -> LayerAttention:
        """What is kept of a call.

        Raises:
            CaptureError: a sample, the query or the padding does not fit the call, or the query
                may see nothing.
        """
        n_samples, _, n_queries, n_keys = call.shape
        if any(not 0 <= sample < n_samples for sample in self.samples):
            raise CaptureError(
                f"{name}: maps were asked for samples {list(self.samples)}, "
                f"expected numbers in 0..{n_samples - 1}, the samples of the batch"
            )
        found = {"query_rows": _to_cpu(self._query_rows(name, call))}
        if self.received or self.samples:
            q, k = call.queries_and_keys()
        if self.received:
            mask = replace(call.mask, padded=self._padded(name, call))
            found["received"] = _to_cpu(rows.received(q, k, mask))
        if self.samples:
            grid = rows.MapGrid.of(n_keys, self.map_size)
            map_rows = grid.rows
            if n_queries != n_keys:
                map_rows = rows.MapGrid.of(n_queries, self.map_size).rows
            images = rows.maps(q, k, call.mask, samples=self.samples, grid=grid, rows=map_rows)
            found |= {"maps": _to_cpu(images), "map_rows": map_rows, "map_cols": grid.cols}
        return LayerAttention(name, **found)

    def _query_rows(self, name: str, call: Call) -> Tensor:
        query = self._position(name, call)
        scores = call.row_scores(query)
        bias = call.mask.of_query(query, scores)
        seen = scores if call.mask.kind == "scores" else bias
        if seen is not None and (seen == -torch.inf).all(-1).any():
            raise CaptureError(
                f"{name}: the mask lets the query token see nothing (by default the last token is "
                "the query). Say which token is: capture(model, query=...), one position or (B,)"
            )
        return rows.query_row(scores, bias)

    def _position(self, name: str, call: Call) -> int | Tensor:
        """The query's position among the queries of a call, counted from the start."""
        n_samples, _, n_queries, _ = call.shape
        query, what = self.query, f"position {self.query}"
        if isinstance(query, Tensor):
            if len(query) != n_samples:
                raise CaptureError(
                    f"{name}: expected one query a sample ({n_samples}), got {len(query)}"
                )
            query = query.long()
            inside = bool(((query >= -n_queries) & (query < n_queries)).all())
            what = f"positions {query.tolist()}"
        else:
            inside = -n_queries <= query < n_queries
        if not inside:
            raise CaptureError(
                f"{name} has {n_queries} queries, none at {what}; choose the layers that have: "
                "capture(model, layers=[...])"
            )
        return query % n_queries

    def _padded(self, name: str, call: Call) -> Tensor | None:
        """Which queries are padding: as the call says itself, and as the user says."""
        n_samples, _, n_queries, n_keys = call.shape
        own, padding = call.mask.padded, self.padding
        if padding is None:
            return own
        if padding.shape != (n_samples, n_queries):
            if n_queries != n_keys:
                return own
            raise CaptureError(
                f"{name}: expected a padding of shape ({n_samples}, {n_queries}), got "
                f"{tuple(padding.shape)}; choose the layers that it fits: "
                "capture(model, layers=[...])"
            )
        return padding if own is None else padding.to(own.device) | own


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _to_cpu(values: Tensor) -> Tensor:
    return values.to("cpu", torch.float32)
