"""What a capture keeps of every attention call, and leaves behind: the layers in order.

options.attention("layers.0", call)                                         # LayerAttention
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from historylens.capture import rows
from historylens.capture.inputs import LAYERS, Call, CaptureError
from historylens.capture.layers import matches


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
            allowed to see it, padded ones left out; NaN where there are none. None if not wanted.
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
    """

    def __init__(self, waiting: Iterable[str], roots: Sequence[str]) -> None:
        self.waiting = dict.fromkeys(waiting)  # names of layers that have to run and have not yet
        self._roots = roots  # "" for a model
        self._layers: list[LayerAttention] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layers captured so far, in order."""
        return tuple(layer.name for layer in self._layers)

    def add(self, layer: LayerAttention) -> None:
        """Take in a layer that has just run."""
        self._layers.append(layer)
        if "" not in self._roots:  # "layer 3", "layer 3.attn" and "layer 3 #2" are of "layer 3"
            self._layers.sort(key=lambda x: self._roots.index(re.split(r"\.| #", x.name)[0]))

    def check_all_ran(self) -> None:
        """Raise `CaptureError` if a layer has not run yet."""
        for name in self.waiting:
            raise CaptureError(
                f"{name} has not run, so its attention was not captured. Run the model once "
                "inside `with capture(...)`, uncompiled (torch.compile skips hooks), and give "
                f"capture only layers that this forward uses: {LAYERS}"
            )

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: int | slice) -> LayerAttention | list[LayerAttention]:
        self.check_all_ran()
        if not self._layers:
            nothing = "nothing is captured yet: no attention of the model has run inside"
            raise CaptureError(f"{nothing} `with capture(...)`")
        return self._layers[index]


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Options:
    """The arguments of `capture`, checked, and what is kept of an attention call for them."""

    received: bool
    maps: Sequence[int]
    map_size: int
    query: int | Tensor
    padding: Tensor | None
    layers: Sequence[str | int] | None
    softmax: Sequence[str]
    heads: int | None

    def __post_init__(self) -> None:
        query, padding, layers = self.query, self.padding, self.layers
        _expect(self.map_size >= 8, "a map_size of at least 8", self.map_size)
        if isinstance(query, Tensor):
            is_whole = query.dim() == 1 and query.dtype in _WHOLE
            found = f"{query.dtype} {tuple(query.shape)}"
            _expect(is_whole, "a query of whole numbers (B,), one position a sample", found)
        if padding is not None:
            is_bool = padding.dtype == torch.bool
            _expect(is_bool, "a bool padding (B, T), True for padding", padding.dtype)
        if layers is not None:
            is_choice = layers and all(isinstance(x, str) or x >= 0 for x in layers)
            wanted = "layers by name or by number from 0 in the order in which they run"
            _expect(is_choice, wanted, list(layers))

    def chooses(self, name: str, number: int | None = None) -> bool:
        """Whether to capture a layer of this name, or the `number`-th that runs."""
        return self.layers is None or any(matches(name, x, number) for x in self.layers)

    def attention(self, name: str, call: Call) -> LayerAttention:
        """What is kept of a call. It raises where the options do not fit the call."""
        n_samples = call.shape[0]
        if any(not 0 <= sample < n_samples for sample in self.maps):
            raise CaptureError(
                f"{name}: maps were asked for samples {list(self.maps)}, "
                f"expected numbers in 0..{n_samples - 1}, the samples of the batch"
            )
        query_rows, visible = self._query_rows(name, call)
        found = {"query_rows": query_rows.to("cpu", torch.float32), "visible": visible.cpu()}
        if self.received or self.maps:
            call = call.prepared()
        if self.received:
            received = rows.received(call, self._padded(name, call))
            found["received"] = received.to("cpu", torch.float32)
        if self.maps:
            images, map_rows, map_cols = rows.maps(call, self.maps, self.map_size)
            images = images.to("cpu", torch.float32)
            found |= {"maps": images, "map_rows": map_rows, "map_cols": map_cols}
        return LayerAttention(name, **found)

    def _query_rows(self, name: str, call: Call) -> tuple[Tensor, Tensor]:
        """The query's rows `(B, H, Tk)`, and which keys some head may see `(B, Tk)`."""
        n_samples, _, n_queries, _ = call.shape
        query, what, positions = self.query, f"position {self.query}", [self.query]
        if isinstance(query, Tensor):
            query, positions = query.long(), query.tolist()
            what, wanted = f"positions {positions}", f"one query a sample ({n_samples})"
            _expect(len(query) == n_samples, wanted, len(query), name)
        if not all(-n_queries <= position < n_queries for position in positions):
            where = f"{name} has {n_queries} queries, none at {what}"
            raise CaptureError(f"{where}; choose the layers that have: {LAYERS}")
        query = query % n_queries
        scores = call.row_scores(query)
        found, seen = rows.weigh(scores, call.mask.of_query(query, scores), call.k is None)
        if seen is None:
            return found, found.new_ones(len(found), found.shape[-1], dtype=torch.bool)
        if not seen.any(-1).all():
            raise CaptureError(
                f"{name}: the mask lets the query token see nothing (by default the last token is "
                "the query). Say which token is: capture(model, query=...), one position or (B,)"
            )
        return found, seen.expand(found.shape).any(1)

    def _padded(self, name: str, call: Call) -> Tensor | None:
        """Which queries are padding: as the call says itself, and as the user says."""
        n_samples, _, n_queries, n_keys = call.shape
        padding, shape = self.padding, (n_samples, n_queries)
        if padding is None or (padding.shape != shape and n_queries != n_keys):
            return call.padded
        found = f"{tuple(padding.shape)}; choose the layers that it fits: {LAYERS}"
        _expect(padding.shape == shape, f"a padding of shape {shape}", found, name)
        return padding if call.padded is None else padding.to(call.padded.device) | call.padded


def _expect(fits: bool, wanted: str, found: object, name: str = "") -> None:
    if not fits:
        raise CaptureError(f"{name}{': ' * bool(name)}expected {wanted}, got {found}")
