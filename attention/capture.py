"""Capture the attention of every transformer layer during one forward pass, without changing it.

Fused kernels return no attention weights. So a forward pre-hook on each layer reads the layer's
input, recomputes its queries and keys, and keeps what analysis needs: the query token's row, the
attention that each position receives, and maps of bounded size, never a T x T matrix.

    with capture(model, maps=[0]) as record:
        model(*inputs)
    record[0].query_rows                                   # (B, H, T) of the first layer

Each hook takes itself off while its layer runs. PyTorch's encoder layer leaves its fast path as
soon as a hook is on it, and the two paths differ in the last digits; this way the layer runs
exactly as it does without capture, bit for bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from attention import rows
from attention.layers import CaptureError, MaskReader, find_layers, read_call

MAP_SIZE = 512


@dataclass(frozen=True)
class LayerAttention:
    """Attention of one layer, float32 on the CPU, before any dropout of weights.

    Attributes:
        name: the layer's name in the model.
        query_rows: `(B, H, T)` attention row of the last token, which is the query token.
        received: `(B, H, T)` attention that each position receives, averaged over the queries
            allowed to see it; NaN where there are none. None if not asked for.
        maps: `(M, H, R, C)` attention maps of the chosen samples, NaN where forbidden. A column is
            the mean weight of its tokens. None if not asked for.
        map_rows: `(R,)` int64, token index of each map row; the last is the query token.
        map_cols: `(C,)` int64, first token index of each map column.
    """

    name: str
    query_rows: Tensor
    received: Tensor | None = None
    maps: Tensor | None = None
    map_rows: Tensor | None = None
    map_cols: Tensor | None = None


class Record(Sequence[LayerAttention]):
    """The captured layers in the order of the model, complete once its forward has run."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._found: dict[str, LayerAttention] = {}

    @property
    def layers(self) -> list[LayerAttention]:
        """Every layer.

        Raises:
            CaptureError: a layer has not run yet.
        """
        for name in self.names:
            if name not in self._found:
                raise CaptureError(
                    f"{name} has not run, so its attention was not captured. Run the model once "
                    "inside `with capture(...)`, uncompiled (torch.compile skips hooks), and give "
                    "capture only layers that this forward uses"
                )
        return [self._found[name] for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int | slice) -> LayerAttention | list[LayerAttention]:
        return self.layers[index]


@contextmanager
def capture(
    model_or_layers: nn.Module | Sequence[nn.Module],
    *,
    received: bool = True,
    maps: Sequence[int] | None = None,
    map_size: int = MAP_SIZE,
) -> Iterator[Record]:
    """Record the attention of one forward pass that runs inside the `with` block.

    Args:
        model_or_layers: a model, whose `nn.TransformerEncoderLayer` modules are found in order, or
            the layers themselves.
        received: also the attention that each position receives, which needs every row.
        maps: samples of the batch whose maps are kept, none by default.
        map_size: largest number of rows and of columns of a map, at least 8.

    Yields:
        The record, filled when the forward has run. Hooks are gone when the block ends.

    Raises:
        CaptureError: there is no layer to capture, one is of a kind that cannot be read, one did
            not run or ran twice, or it was called in a way that cannot be read.
    """
    if map_size < 8:
        raise CaptureError(f"expected a map_size of at least 8, got {map_size}")
    layers = find_layers(model_or_layers)
    record = Record(list(layers))
    wanted = _Wanted(received, tuple(maps or ()), map_size)
    hooks = _Hooks(layers, record, wanted)
    try:
        hooks.arm()
        yield record
        _ = record.layers
    finally:
        hooks.remove()


@dataclass(frozen=True)
class _Wanted:
    received: bool
    samples: tuple[int, ...]
    map_size: int


class _Hooks:
    """Owns every hook of one capture."""

    def __init__(self, layers: dict[str, nn.Module], record: Record, wanted: _Wanted) -> None:
        self._names = {layer: name for name, layer in layers.items()}
        self._record = record
        self._wanted = wanted
        self._handles: dict[nn.Module, Any] = {}
        self._rearm: Any = None
        self._masks = MaskReader()

    def arm(self) -> None:
        for layer in self._names:
            self._put_on(layer)
        # A hook on the layer would turn its fast path off while it runs; this global one does not.
        self._rearm = register_module_forward_hook(self._after, always_call=True)

    def remove(self) -> None:
        for handle in (self._rearm, *self._handles.values()):
            if handle is not None:
                handle.remove()
        self._handles.clear()

    def _put_on(self, layer: nn.Module) -> None:
        self._handles[layer] = layer.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        name = self._names[layer]
        if name in self._record._found:
            raise CaptureError(
                f"{name} ran twice inside one capture. Run the model once per `with capture(...)`; "
                "a model that reuses a layer, or recomputes it in backward, cannot be captured"
            )
        self._handles.pop(layer).remove()
        # Outside inference mode, so that the record is made of ordinary tensors.
        with torch.inference_mode(False), torch.no_grad(), _full_precision():
            self._record._found[name] = self._read(name, layer, args, kwargs)

    def _after(self, module: nn.Module, _args: tuple, _output: object) -> None:
        if module in self._names and module not in self._handles:
            self._put_on(module)

    def _read(self, name: str, layer: nn.Module, args: tuple, kwargs: dict) -> LayerAttention:
        wanted = self._wanted
        call = read_call(name, layer, args, kwargs, self._masks)
        n_samples, n_tokens, _ = call.x.shape
        if any(not 0 <= sample < n_samples for sample in wanted.samples):
            raise CaptureError(
                f"{name}: maps were asked for samples {list(wanted.samples)}, "
                f"expected numbers in 0..{n_samples - 1}, the samples of the batch"
            )
        found = {"query_rows": _to_cpu(rows.last_row(call.last_scores(), call.mask))}
        if wanted.received or wanted.samples:
            q, k = call.queries_and_keys()
        if wanted.received:
            found["received"] = _to_cpu(rows.received(q, k, call.mask))
        if wanted.samples:
            grid = rows.MapGrid.of(n_tokens, wanted.map_size)
            images = rows.maps(q, k, call.mask, samples=wanted.samples, grid=grid)
            found |= {"maps": _to_cpu(images), "map_rows": grid.rows, "map_cols": grid.cols}
        return LayerAttention(name, **found)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Without autocast; entering it costs time, so only where one is on."""
    devices = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _to_cpu(values: Tensor) -> Tensor:
    return values.to("cpu", torch.float32)
