"""What a capture keeps of every attention call, and leaves behind: the layers in order.

seen = options.attention("layers.0", call)                              # Seen
seen = options.attention("layers.0", later_call, seen)                  # of both passes
seen.layer                                                              # LayerAttention
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from historylens.capture import rows
from historylens.capture.inputs import LAYERS, Call, CaptureError
from historylens.capture.layers import matches


@dataclass(frozen=True)
class LayerAttention:
    """Attention of one layer, float32 on the CPU, before any dropout of weights.

    `H` are the query's heads. In self-attention `Tq = Tk = T`, of all passes together where the
    model read its tokens in several; in cross-attention queries and keys are different tokens.

    Attributes:
        name: the layer's name in the model.
        query_rows: `(B, H, Tk)` attention row of the query token: the last, unless another was
            asked for. It sums to 1 with `extra`.
        visible: `(B, Tk)` bool, the keys that the mask lets some head of the query token see.
        received: `(B, H, Tk)` attention that each position receives, averaged over the queries
            allowed to see it, padded queries left out; NaN where there are none. None if not asked
            for.
        maps: `(M, H, R, C)` attention maps of the chosen samples, NaN where forbidden. A column is
            the mean weight of its tokens. None if not asked for.
        map_rows: `(R,)` int64, token index of each map row; the last is the last token's.
        map_cols: `(C,)` int64, first token index of each map column.
        extra: `(B, H)` what the query's row has on keys that are no tokens (memory, sinks). None if
            there are none.
        inputs: `(B, T, F)` what each token feeds into its query and key. None if not asked for.
    """

    name: str
    query_rows: Tensor
    visible: Tensor
    received: Tensor | None = None
    maps: Tensor | None = None
    map_rows: Tensor | None = None
    map_cols: Tensor | None = None
    extra: Tensor | None = None
    inputs: Tensor | None = None


@dataclass(frozen=True)
class Seen:
    """A layer in the passes that have run so far, and what a further pass needs to go on."""

    layer: LayerAttention
    n_queries: int  # of all passes
    passes: tuple[int, ...]  # tokens of each part of the columns of maps
    extra: tuple[int, int]  # keys that are no tokens, before and behind the others
    reached: Tensor  # (B,) bool, whether the query token was among the queries
    counts: Tensor | None = None  # (B, H, T), queries over which received attention is averaged

    @property
    def is_of_self(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return sum(self.passes) == self.n_queries

    def continues(self, n_queries: int, n_keys: int) -> bool:
        """Whether a call reads on: its keys are tokens so far, all or the latest, and its own."""
        n_tokens = n_keys - sum(self.extra)
        return self.is_of_self and n_queries < n_tokens <= self.n_queries + n_queries

    def after(self, before: "Seen") -> "Seen":
        """The same with what earlier passes showed."""
        old, new = before.layer, self.layer
        n_more, own = self.n_queries - before.n_queries, self.reached[:, None]
        rows = functional.pad(old.query_rows, (0, n_more))
        found = {
            "query_rows": torch.where(own[..., None], new.query_rows, rows),
            "visible": torch.where(own, new.visible, functional.pad(old.visible, (0, n_more))),
        }
        counts = self.counts
        if new.extra is not None:
            found["extra"] = torch.where(own, new.extra, old.extra)
        if new.received is not None:
            earlier = functional.pad(before.counts, (0, n_more))
            total = functional.pad(old.received.nan_to_num(), (0, n_more)) * earlier
            counts = earlier + self.counts
            found["received"] = (total + new.received.nan_to_num() * self.counts) / counts
        if new.maps is not None:
            wider = (0, len(new.map_cols) - len(old.map_cols))
            maps = [functional.pad(old.maps, wider, value=torch.nan), new.maps]
            found["maps"] = torch.cat(maps, 2)
            found["map_rows"] = torch.cat([old.map_rows, new.map_rows + before.n_queries])
        reached = self.reached | before.reached
        return replace(self, layer=replace(new, **found), counts=counts, reached=reached)


class Record(Sequence[LayerAttention]):
    """The captured layers in the order in which they ran, complete once the forward has run.

    Layers that were given one by one keep the order in which they were given.

    Attributes:
        waiting: names of the layers that have to run and have not yet.
        places: names of the modules that attended in sight, or handed weights in.
    """

    def __init__(self, waiting: Iterable[str], roots: Sequence[str], take: Callable) -> None:
        self.waiting, self.places = dict.fromkeys(waiting), set()
        self._take = take
        self._roots = roots  # "" for a model
        self._layers: list[LayerAttention] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layers captured so far, in order."""
        return tuple(layer.name for layer in self._layers)

    def add(self, name: str, weights: Tensor, mask: Tensor | None = None) -> None:
        """Take in attention that cannot be read: see `record_attention`."""
        self._take(name, weights, mask)

    def put(self, layer: LayerAttention) -> None:
        """Take in a layer that has just run, or run on."""
        if layer.name in self.names:
            self._layers[self.names.index(layer.name)] = layer
            return
        self._layers.append(layer)
        if "" not in self._roots:  # "layer 3", "layer 3.attn" and "layer 3 #2" are of "layer 3"
            order = {root: i for i, root in enumerate(self._roots)}
            self._layers.sort(key=lambda x: order.get(re.split(r"\.| #", x.name)[0], len(order)))

    def drop(self, name: str) -> None:
        """Take a layer out again."""
        self._layers = [layer for layer in self._layers if layer.name != name]

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
            raise CaptureError(
                "nothing is captured yet: no attention of the model has run inside `with "
                "capture(...)`"
            )
        return self._layers[index]


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Options:
    """The arguments of `capture`, checked, and what is kept of an attention call for them."""

    received: bool = True
    maps: Sequence[int] = ()
    map_size: int = 512
    query: int | Tensor = -1
    padding: Tensor | None = None
    layers: Sequence[str | int] | None = None
    softmax: Sequence[str] = ()
    heads: int | None = None
    inputs: bool = False

    def __post_init__(self) -> None:
        softmax = (self.softmax,) if isinstance(self.softmax, str) else self.softmax
        layers = [self.layers] if isinstance(self.layers, str | int) else self.layers
        vars(self).update(softmax=softmax, layers=layers, maps=tuple(self.maps or ()))  # frozen
        query, padding = self.query, self.padding
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

    def attention(self, name: str, call: Call, before: Seen | None = None) -> Seen:
        """What is kept of a call that reads on `before`. It raises where an option does not fit."""
        n_samples, _, n_queries, n_keys = call.shape
        if any(not 0 <= sample < n_samples for sample in self.maps):
            raise CaptureError(
                f"{name}: maps were asked for samples {list(self.maps)}, "
                f"expected numbers in 0..{n_samples - 1}, the samples of the batch"
            )
        extra = before.extra if before is not None else call.extra_keys()
        start, n_tokens = 0, n_keys - sum(extra)
        if before is not None:
            start, n_tokens = before.n_queries, before.n_queries + n_queries
        call = replace(call, extra=extra, missing=n_tokens + sum(extra) - n_keys)
        found, reached = self._query_rows(name, call, start)
        passes, counts = (n_tokens,), None
        if before is not None:
            fixed = torch.as_tensor(self.query) >= 0  # from the end: it is another one now
            before = replace(before, reached=before.reached & fixed)
            *passes, last = before.passes
            is_whole = last + n_queries <= self.map_size  # then a column each
            passes += [last + n_queries] if is_whole else [last, n_queries]
        if self.inputs and n_queries == n_tokens:
            found["inputs"] = call.inputs().cpu()
        if self.received or self.maps:
            call = call.prepared()
        if self.received:
            received, counts = rows.received(call, self._padded(name, call, start))
            found["received"], counts = received.to("cpu", torch.float32), counts.cpu()
        if self.maps:
            images, map_rows, map_cols = rows.maps(call, self.maps, self.map_size, passes)
            images = images.to("cpu", torch.float32)
            found |= {"maps": images, "map_rows": map_rows, "map_cols": map_cols}
        layer, n_all = LayerAttention(name, **found), start + n_queries
        seen = Seen(layer, n_all, tuple(passes), extra, reached, counts)
        return seen if before is None else seen.after(before)

    def _query_rows(self, name: str, call: Call, start: int) -> tuple[dict[str, Tensor], Tensor]:
        """Fields of the query's rows, and in which samples it is among the queries `(B,)`.

        `start` queries came in earlier passes.
        """
        n_samples, _, n_queries, _ = call.shape
        places = [self.query]
        if isinstance(self.query, Tensor):
            places, wanted = self.query.tolist(), f"one query a sample ({n_samples})"
            _expect(len(places) == n_samples, wanted, len(places), name)
        places = [place + n_queries if place < 0 else place - start for place in places]
        reached = torch.tensor([0 <= place < n_queries for place in places]).expand(n_samples)
        places = [min(max(place, 0), n_queries - 1) for place in places]
        query = torch.tensor(places) if isinstance(self.query, Tensor) else places[0]
        scores = call.row_scores(query)
        weights, seen = rows.weigh(call, scores, *call.mask.of_query(query, scores))
        if seen is None:
            visible = weights.new_ones(len(weights), weights.shape[-1], dtype=torch.bool)
        elif (seen.any(-1).all(-1).cpu() | ~reached).all():
            visible = seen.expand(weights.shape).any(1)
        else:
            raise CaptureError(
                f"{name}: the mask lets the query token see nothing (by default the last token is "
                "the query). Say which token is: capture(model, query=...), one position or (B,)"
            )
        on_tokens = call.on_tokens(weights)
        found = {"query_rows": on_tokens.to("cpu", torch.float32)}
        found["visible"] = call.on_tokens(visible).cpu()
        if any(call.extra):
            found["extra"] = (weights.sum(-1) - on_tokens.sum(-1)).to("cpu", torch.float32)
        return found, reached

    def _padded(self, name: str, call: Call, start: int) -> Tensor | None:
        """Which queries are padding: as the call says itself, and as the user says."""
        n_samples, _, n_queries, _ = call.shape
        padding, end = self.padding, start + n_queries
        is_self = call.n_tokens == end
        if padding is None or not (is_self or padding.shape == (n_samples, n_queries)):
            return call.padded
        own = padding[:, start:end]
        found = f"{tuple(padding.shape)}; choose the layers that it fits: {LAYERS}"
        fits = own.shape == (n_samples, n_queries)
        _expect(fits, f"a padding of shape {(n_samples, end)}", found, name)
        return own if call.padded is None else own.to(call.padded.device) | call.padded

    def check_complete(self, seen: Seen) -> None:
        """Raise `CaptureError` if a layer has run without the query token, or padding is left."""
        name, size = seen.layer.name, (len(seen.reached), seen.n_queries)
        if not seen.reached.all():
            is_each = isinstance(self.query, Tensor)
            what = f"positions {self.query.tolist()}" if is_each else f"position {self.query}"
            where = f"{name} has {seen.n_queries} queries, none at {what}"
            raise CaptureError(f"{where}; choose the layers that have: {LAYERS}")
        if self.padding is not None and seen.is_of_self and self.received:
            found = tuple(self.padding.shape)
            _expect(found == size, f"a padding of shape {size}", found, name)


def _expect(fits: bool, wanted: str, found: object, name: str = "") -> None:
    if not fits:
        raise CaptureError(f"{name}{': ' * bool(name)}expected {wanted}, got {found}")
