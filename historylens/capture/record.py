"""What a capture keeps of every attention call, and leaves behind: the layers by name, in order.

layer = Wanted(received=True).of("layers.0", call)                          # LayerAttention
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from historylens.capture import rows
from historylens.capture.inputs import Call, CaptureError


@dataclass(frozen=True)
class LayerAttention:
    """Attention of one layer, float32 on the CPU, before any dropout of weights.

    `H` are the query's heads. In self-attention `Tq = Tk = T`; in cross-attention queries and keys
    are different tokens.

    Attributes:
        name: the layer's name in the model.
        query_rows: `(B, H, Tk)` attention row of the query token: the last, unless another was
            asked for.
        visible: `(B, Tk)` bool, the keys that the mask lets some head of the query token see.
        received: `(B, H, Tk)` attention that each position receives, averaged over the queries
            allowed to see it, padded queries left out; NaN where there are none. None if not asked
            for.
        maps: `(M, H, R, C)` attention maps of the chosen samples, NaN where forbidden. A column is
            the mean weight of its tokens. None if not asked for.
        map_rows: `(R,)` int64, token index of each map row; the last is the last token's.
        map_cols: `(C,)` int64, first token index of each map column.
    """

    name: str
    query_rows: Tensor
    visible: Tensor
    received: Tensor | None = None
    maps: Tensor | None = None
    map_rows: Tensor | None = None
    map_cols: Tensor | None = None


class Record(Sequence[LayerAttention]):
    """The captured layers in the order in which they ran, complete once the forward has run.

    Layers that were given one by one keep the order in which they were given.

    Attributes:
        waiting: names of the layers that have to run and have not yet.
    """

    def __init__(self, waiting: Iterable[str], roots: Sequence[str]) -> None:
        self.waiting = dict.fromkeys(waiting)
        self._roots = roots  # "" for a model
        self._layers: list[LayerAttention] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layers captured so far, in order."""
        return tuple(layer.name for layer in self._layers)

    def add(self, layer: LayerAttention) -> None:
        """Take in a layer that has just run."""
        self._layers.append(layer)
        if "" not in self._roots:
            self._layers.sort(key=lambda found: self._roots.index(_root_of(found.name)))

    def check_all_ran(self) -> None:
        """Refuse a record that lacks a layer.

        Raises:
            CaptureError: a layer has not run yet.
        """
        for name in self.waiting:
            raise CaptureError(
                f"{name} has not run, so its attention was not captured. Run the model once "
                "inside `with capture(...)`, uncompiled (torch.compile skips hooks), and give "
                "capture only layers that this forward uses: capture(model, layers=[...])"
            )

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: int | slice) -> LayerAttention | list[LayerAttention]:
        self.check_all_ran()
        if not self._layers:
            raise CaptureError(
                "nothing is captured yet: no attention of the model has run inside `with "
                "capture(...)`"
            )
        return self._layers[index]


def _root_of(name: str) -> str:
    """Of "layer 3", "layer 3.attn" and "layer 3 #2" it is "layer 3"."""
    return name.split(".")[0].split(" #")[0]


@dataclass(frozen=True)
class Wanted:
    """What to keep of every call.

    Attributes:
        received: also the attention that each position receives, which needs every row.
        samples: samples of the batch whose maps are kept.
        map_size: largest number of rows and of columns of a map, at least 8.
        query: position of the query token, for all samples or `(B,)`; negative from the end.
        padding: `(B, T)` bool, True where a token is padding.

    Raises:
        CaptureError: `map_size`, `query` or `padding` is not such a value.
    """

    received: bool
    samples: tuple[int, ...]
    map_size: int
    query: int | Tensor
    padding: Tensor | None

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
        query_rows, visible = self._query_rows(name, call)
        found = {}
        if self.received or self.samples:
            q, k = call.queries_and_keys()
        if self.received:
            mask = replace(call.mask, padded=self._padded(name, call))
            found["received"] = _to_cpu(rows.received(q, k, mask))
        if self.samples:
            grid = rows.MapGrid.of(n_keys, self.map_size)
            map_rows = rows.MapGrid.of(n_queries, self.map_size).rows
            images = rows.maps(q, k, call.mask, samples=self.samples, grid=grid, rows=map_rows)
            found |= {"maps": _to_cpu(images), "map_rows": map_rows, "map_cols": grid.cols}
        return LayerAttention(name, _to_cpu(query_rows), visible.cpu(), **found)

    def _query_rows(self, name: str, call: Call) -> tuple[Tensor, Tensor]:
        """The query's rows `(B, H, Tk)`, and which keys some head may see `(B, Tk)`."""
        query = self._position(name, call)
        scores = call.row_scores(query)
        found, seen = rows.weigh(scores, call.mask.of_query(query, scores), call.mask)
        if seen is None:
            return found, found.new_ones(len(found), found.shape[-1], dtype=torch.bool)
        if not seen.any(-1).all():
            raise CaptureError(
                f"{name}: the mask lets the query token see nothing (by default the last token is "
                "the query). Say which token is: capture(model, query=...), one position or (B,)"
            )
        return found, seen.expand(found.shape).any(1)

    def _position(self, name: str, call: Call) -> int | Tensor:
        """The query's position among the queries of a call, counted from the start."""
        n_samples, _, n_queries, _ = call.shape
        query, what, positions = self.query, f"position {self.query}", [self.query]
        if isinstance(query, Tensor):
            query, positions = query.long(), query.tolist()
            what = f"positions {positions}"
            if len(query) != n_samples:
                raise CaptureError(
                    f"{name}: expected one query a sample ({n_samples}), got {len(query)}"
                )
        if not all(-n_queries <= position < n_queries for position in positions):
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
