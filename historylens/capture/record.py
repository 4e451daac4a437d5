"""What a capture keeps of every attention call, and leaves behind: the layers in order."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from operator import and_, or_

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

from historylens.capture import rows
from historylens.capture.inputs import LAYERS, Call, CaptureError


@dataclass(frozen=True)
class LayerAttention:
    """Attention of one layer, float32 on the CPU, before any dropout of weights.

    `H` are the query's heads; `Tk = T` in self-attention, of all passes together. What was not
    asked for is None.

    Attributes:
        name: the layer's name in the model.
        query_rows: `(B, H, Tk)` attention row of the query token; sums to 1 with `extra`.
        visible: `(B, Tk)` bool, the keys that the mask lets some head of the query token see.
        received: `(B, H, Tk)` attention that each position receives, averaged over the queries
            allowed to see it, padded queries left out; NaN where there are none.
        maps: `(M, H, R, C)` attention maps of the chosen samples, NaN where forbidden. A column is
            the mean weight of its tokens.
        map_rows: `(R,)` int64, token index of each map row; the last is the last token's.
        map_cols: `(C,)` int64, first token index of each map column.
        extra: `(B, H)` what the query's row has on keys that are no tokens; None without such.
        inputs: `(B, T, F)` what each token feeds into its query and key.
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
    reached: tuple[bool, ...]  # B, or 1 for all: whether the query token was among the queries
    counts: Tensor | None  # (B, H, T), queries over which received attention is averaged
    before: "Seen | None"  # the same before the last pass

    @property
    def is_of_self(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return sum(self.passes) == self.n_queries

    def after(self, before: "Seen") -> "Seen":
        """The same with what earlier passes showed."""
        old, new, counts = before.layer, self.layer, self.counts
        n_more, own = self.n_queries - before.n_queries, torch.tensor(self.reached)[:, None]

        def longer(values: Tensor, n: int = n_more, fill: float = 0) -> Tensor:
            return functional.pad(values, (0, n), value=fill)

        found = {
            "query_rows": torch.where(own[..., None], new.query_rows, longer(old.query_rows)),
            "visible": torch.where(own, new.visible, longer(old.visible)),
        }
        if new.extra is not None:
            found["extra"] = torch.where(own, new.extra, old.extra)
        if counts is not None:
            earlier = longer(before.counts)
            total = longer(old.received.nan_to_num()) * earlier
            found["received"] = (total + new.received.nan_to_num() * counts) / (earlier + counts)
            counts = earlier + counts
        if new.maps is not None:
            wider = longer(old.maps, len(new.map_cols) - len(old.map_cols), torch.nan)
            found["maps"] = torch.cat([wider, new.maps], 2)
            found["map_rows"] = torch.cat([old.map_rows, new.map_rows + before.n_queries])
        reached = tuple(map(or_, self.reached, before.reached))
        return replace(self, layer=replace(new, **found), counts=counts, reached=reached)


class Record(Sequence[LayerAttention]):
    """The captured layers as they ran, or in the order in which they were given one by one.

    Attributes:
        waiting: names of the layers that have to run and have not yet.
        places: names of the modules that attended in sight, or handed weights in.
        calls: by name, in order, what is seen of each layer; None of what is not kept.
    """

    def __init__(self, waiting: Iterable[str], roots: Iterable[str]) -> None:
        self.waiting, self.places = dict.fromkeys(waiting), set()
        self.calls: dict[str, Seen | None] = {}
        self._order = {root: i for i, root in enumerate(roots) if root}

    @property
    def _layers(self) -> list[LayerAttention]:
        """In order; "layer 3", "layer 3.attn" and "layer 3 #2" are of the root "layer 3"."""
        layers, n = [seen.layer for seen in self.calls.values() if seen], len(self._order)
        return sorted(layers, key=lambda x: self._order.get(re.split(r"\.| #", x.name)[0], n))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layers captured so far, in order."""
        return tuple(layer.name for layer in self._layers)

    def add(self, name: str, weights: Tensor, mask: Tensor | None = None) -> None:
        """Take in weights as `record_attention` does; CaptureError: the block has ended."""
        for session in _get_current_function_mode_stack():
            if getattr(session, "record", None) is self:
                return session.take_weights(name, weights, mask)
        raise CaptureError(f"{name} is handed in too late: do so inside `with capture(...)`")

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
        if layers := self._layers:
            return layers[index]
        raise CaptureError(
            "nothing is captured yet: no attention of the model has run inside `with capture(...)`"
        )


@dataclass(eq=False)
class Options:
    """The arguments of `capture`, checked, and what is kept of an attention call for them."""

    received: bool = True
    maps: Sequence[int] | None = None
    map_size: int = 512
    query: int | Tensor = -1
    padding: Tensor | None = None
    layers: Sequence[str | int] | None = None
    softmax: Sequence[str] = ()
    heads: int | None = None
    inputs: bool = False

    def __post_init__(self) -> None:
        maps = torch.as_tensor(() if self.maps is None else self.maps, device="cpu")
        self.maps = tuple(maps.flatten().tolist())
        self.softmax = (self.softmax,) if isinstance(self.softmax, str) else self.softmax
        self.layers = [self.layers] if isinstance(self.layers, str | int) else self.layers
        _expect(self.map_size >= 8, "a map_size of at least 8", self.map_size)
        query, self._is_each = self.query, isinstance(self.query, Tensor)
        if self._is_each:
            is_whole = torch.can_cast(query.dtype, torch.int64) and query.dtype != torch.bool
            found = f"{query.dtype} {tuple(query.shape)}"
            wanted = "a query of whole numbers (B,), one position a sample"
            _expect(is_whole and query.dim() == 1, wanted, found)
        self._places = query.tolist() if self._is_each else [query]
        if self.padding is not None:
            dtype = self.padding.dtype
            _expect(dtype == torch.bool, "a bool padding (B, T), True for padding", dtype)
        if self.layers is not None:
            is_choice = self.layers and all(isinstance(x, str) or x >= 0 for x in self.layers)
            wanted = "layers by name or by number from 0 in the order in which they run"
            _expect(is_choice, wanted, list(self.layers))

    def chooses(self, name: str, number: int | None = None) -> bool:
        """Whether to capture a layer of this name, or the `number`-th that runs."""
        return self.layers is None or any(matches(name, x, number) for x in self.layers)

    def attention(self, name: str, call: Call, before: Seen | None) -> Seen:
        """What is kept of a call that reads on `before`. It raises where an option does not fit."""
        n_samples, _, n_queries, n_keys = call.shape
        if any(not 0 <= sample < n_samples for sample in self.maps):
            wanted = f"expected numbers in 0..{n_samples - 1}, the samples of the batch"
            raise CaptureError(f"{name}: maps were asked for samples {list(self.maps)}, {wanted}")
        start = before.n_queries if before else 0
        call.extra = before.extra if before else call.extra_keys()
        n_tokens = start + n_queries if before else n_keys - sum(call.extra)
        call.missing = n_tokens + sum(call.extra) - n_keys
        found, reached = self._query_rows(name, call, start)
        passes, counts = [n_tokens], None
        if before:
            *passes, last = before.passes
            is_whole = last + n_queries <= self.map_size  # then a column each
            passes += [last + n_queries] if is_whole else [last, n_queries]
            is_same = [place >= 0 for place in self._places]  # from the end, it is another now
            before = replace(before, reached=tuple(map(and_, before.reached, is_same)), before=None)
        if self.inputs and n_queries == n_tokens:
            found["inputs"] = call.inputs().to("cpu", torch.float32)
        if self.received or self.maps:
            call = call.prepared()
        if self.received:
            received, counts = rows.received(call, self._padded(name, call, start))
            found["received"], counts = received.to("cpu", torch.float32), counts.cpu()
        if self.maps:
            images, map_rows, map_cols = rows.maps(call, self.maps, self.map_size, passes)
            images = images.to("cpu", torch.float32)
            found |= {"maps": images, "map_rows": map_rows, "map_cols": map_cols}
        told = start + n_queries, tuple(passes), call.extra, reached, counts, before
        seen = Seen(LayerAttention(name, **found), *told)
        return seen.after(before) if before else seen

    def _query_rows(self, name: str, call: Call, start: int) -> tuple[dict[str, Tensor], tuple]:
        """Fields of the query's rows, and what it has `reached`; `start` queries came before."""
        (n_samples, _, n_queries, _), n_given = call.shape, len(self._places)
        fits = n_given == n_samples or not self._is_each
        _expect(fits, f"one query a sample ({n_samples})", n_given, name)
        places = [place + n_queries if place < 0 else place - start for place in self._places]
        reached = tuple(place in range(n_queries) for place in places)
        inside = [min(max(place, 0), n_queries - 1) for place in places]
        weights, seen = call.row(torch.tensor(inside) if self._is_each else inside[0])
        if seen is None:
            visible = weights.new_ones(n_samples, weights.shape[-1], dtype=torch.bool)
        elif (seen.any(-1).all(-1).cpu() | ~torch.tensor(reached)).all():
            visible = seen.expand(weights.shape).any(1)
        else:
            raise CaptureError(
                f"{name}: the mask lets the query token see nothing (by default the last token is "
                "the query). Say which token is: capture(model, query=...), one position or (B,)"
            )
        on_tokens, visible = call.on_tokens(weights), call.on_tokens(visible).cpu()
        found = {"query_rows": on_tokens.to("cpu", torch.float32), "visible": visible}
        if any(call.extra):
            found["extra"] = (weights.sum(-1) - on_tokens.sum(-1)).to("cpu", torch.float32)
        return found, reached

    def _padded(self, name: str, call: Call, start: int) -> Tensor | None:
        """Which queries are padding: as the call says itself, and as the user says."""
        n_samples, _, n_queries, _ = call.shape
        padding, end = self.padding, start + n_queries
        if padding is None or (call.n_tokens != end and padding.shape != (n_samples, n_queries)):
            return call.padded
        own = padding[:, start:end]
        found = f"{tuple(padding.shape)}; choose the layers that it fits: {LAYERS}"
        fits = own.shape == (n_samples, n_queries)
        _expect(fits, f"a padding of shape {(n_samples, end)}", found, name)
        return own if call.padded is None else own.to(call.padded.device) | call.padded

    def check_complete(self, seen: Seen) -> None:
        """Raise `CaptureError` if a layer has run without the query token, or padding is left."""
        name, size = seen.layer.name, (len(seen.layer.visible), seen.n_queries)
        if not all(seen.reached):
            what = f"positions {self._places}" if self._is_each else f"position {self.query}"
            where = f"{name} has {seen.n_queries} queries, none at {what}"
            raise CaptureError(f"{where}; choose the layers that have: {LAYERS}")
        if self.padding is not None and seen.is_of_self and self.received:
            found = tuple(self.padding.shape)
            _expect(found == size, f"a padding of shape {size}", found, name)


def matches(name: str, chosen: str | int, number: int | None = None) -> bool:
    """Whether a layer is chosen: by its number, its name or one above it, or by wildcards."""
    if isinstance(chosen, int):
        return chosen == number
    name = name.split(" #")[0]
    return name == chosen or name.startswith(f"{chosen}.") or fnmatchcase(name, chosen)


def _expect(fits: bool, wanted: str, found: object, name: str = "") -> None:
    if not fits:
        raise CaptureError(f"{name}{': ' * bool(name)}expected {wanted}, got {found}")
