"""Capture the attention of every layer of a PyTorch transformer during one forward pass.

Fused kernels return no attention weights. So hooks read what each attention call is computed from,
compute the rows once more, and keep what analysis needs: the query token's row, the attention that
each position receives, and maps of bounded size, never a T x T matrix of their own. The model never
notices: its outputs are the same bit for bit.

    with capture(model, maps=[0]) as record:
        model(*inputs)
    record.names                                           # as the layers ran
    record[0].query_rows                                   # (B, H, T) of the first layer

Seen are `nn.MultiheadAttention`, alone and inside PyTorch's encoder and decoder layers, every call
of `nn.functional.scaled_dot_product_attention`, `nn.functional.multi_head_attention_forward` and
softmax (see `softmax.py`) by a module of the model.

The hook of an encoder layer takes itself off while the layer runs. PyTorch's encoder layer leaves
its fast path as soon as a hook is on it, and the two paths differ in the last digits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attention.calls import Call, CaptureError
from attention.choice import Choice, matches
from attention.layers import Survey, expects_attention
from attention.mha import MaskReader, read_attention, read_encoder_layer, read_functional
from attention.record import LayerAttention, Record
from attention.sdpa import read_sdpa
from attention.softmax import is_square, read_softmax, softmax_scores
from attention.statistics import MAP_SIZE, Statistics
from attention.watch import Frame, Watch, compiled_error

__all__ = ["MAP_SIZE", "CaptureError", "LayerAttention", "Record", "capture"]


@contextmanager
def capture(
    model_or_layers: nn.Module | Sequence[nn.Module],
    *,
    received: bool = True,
    maps: Sequence[int] | None = None,
    map_size: int = MAP_SIZE,
    query: int | Tensor = -1,
    padding: Tensor | None = None,
    layers: Sequence[str | int] | None = None,
    softmax: str | Sequence[str] = (),
    heads: int | None = None,
) -> Iterator[Record]:
    """Record the attention of one forward pass that runs inside the `with` block.

    Args:
        model_or_layers: a model, whose attention is found, or its layers one by one.
        received: also the attention that each position receives, which needs every row.
        maps: samples of the batch whose maps are kept, none by default.
        map_size: largest number of rows and of columns of a map, at least 8.
        query: position of the query token, whose row is kept, for all samples or `(B,)` whole
            numbers; negative from the end. In a padded batch: `lengths - 1`.
        padding: `(B, T)` bool, True where a token is padding, for models whose mask does not tell
            (a `key_padding_mask` does). Received attention leaves padded queries out.
        layers: names or numbers (in the order in which they run) of the layers to capture, all by
            default. A name stands for what is below it too, and may hold wildcards.
        softmax: names of modules, with wildcards, whose softmax over the last axis is attention
            whatever its shape. One over `(B, H, T, T)` is without being named.
        heads: `H`, for attention that comes as `(B * H, T, T)` or from queries `(B * H, T, d)`.

    Yields:
        The record, filled when the forward has run. Hooks are gone when the block ends.

    Raises:
        CaptureError: there is no attention, a layer's cannot be read, did not run or ran twice, or
            an argument does not fit. It names the layer and the way out.
    """
    statistics = Statistics(received, tuple(maps or ()), map_size, query, padding)
    choice = Choice(layers)
    survey = Survey.of(model_or_layers)
    named = (softmax,) if isinstance(softmax, str) else tuple(softmax)
    session = _Session(survey, statistics, choice, named, heads)
    try:
        session.arm()
        yield session.record
        session.check_complete()
    except Exception as error:
        if session.watch.compiled is not None:
            raise compiled_error(session.watch.compiled) from error
        raise
    finally:
        session.remove()


class _Session:
    """Owns every hook of one capture, and fills its record."""

    def __init__(
        self,
        survey: Survey,
        statistics: Statistics,
        choice: Choice,
        softmax: tuple[str, ...],
        n_heads: int | None,
    ) -> None:
        expected = [] if choice.by_number else filter(choice.has_name, survey.expected())
        self.record = Record(tuple(expected), survey.given)
        self.watch = Watch(survey.names, survey.closed, self._entered, self._left, self._called)
        self._survey = survey
        self._statistics = statistics
        self._choice = choice
        self._softmax = softmax
        self._n_heads = n_heads
        self._encoder_layers = set(survey.encoder_layers)
        self._handles: list[Any] = []
        self._layer_hooks: dict[nn.Module, Any] = {}
        self._masks = MaskReader()
        self._lengths: dict[nn.Module, int] = {}  # of the padded batch, for layers of an encoder
        self._frames: dict[str, Frame] = {}
        self._n_calls = 0
        self._unread: dict[str, str] = {}
        self._other_softmax: dict[str, tuple[int, ...]] = {}

    def arm(self) -> None:
        for module, error in self._survey.refused.items():
            if not self._choice.by_number and self._choice.has_name(self._survey.names[module]):
                raise error
        for module in self._survey.encoder_layers:
            self._put_on(module)
        for hook, modules in (
            (self._before_attention, self._survey.attentions),
            (self._before_encoder, self._survey.encoders),
        ):
            self._handles += [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
        self.watch.arm()

    def remove(self) -> None:
        self.watch.remove()
        for handle in (*self._handles, *self._layer_hooks.values()):
            handle.remove()
        self._layer_hooks.clear()

    def check_complete(self) -> None:
        """Refuse a record that lacks a layer.

        Raises:
            CaptureError: something attended unseen, did not run, or there is nothing at all.
        """
        if self.record._expected:
            _ = self.record.layers
        if self._unread:
            name, kind = next(iter(self._unread.items()))
            raise CaptureError(
                f"{name} is a {kind} that ran, but its attention was not seen{self._hint()}. "
                f"{_WAY_OUT}, or choose the other layers: capture(model, layers=[...])"
            )
        if self._choice.missing:
            seen = ", ".join(self._frames) or "none"
            raise CaptureError(
                f"found no attention for layers={self._choice.missing}; layers that ran: {seen}"
            )
        given = self._survey.given or ()
        names = self.record.names
        for module, name in self._survey.names.items():
            if name in given and not any(matches(found, name) for found in names):
                raise CaptureError(
                    f"{name} is a {type(module).__name__}, in which no attention was seen"
                    f"{self._hint()}. {_WAY_OUT}"
                )
        if not len(self.record):
            raise CaptureError(
                f"found no nn.TransformerEncoderLayer in {self._survey.title}, no "
                "nn.MultiheadAttention, no call of scaled_dot_product_attention and no softmax "
                f"over (B, H, T, T) by a module of it that ran{self._hint()}. {_WAY_OUT}"
            )

    def _hint(self) -> str:
        """What came nearest to attention."""
        for name, shape in self._other_softmax.items():
            return (
                f" (a softmax over {shape} in {name} is not taken for attention unless you say so: "
                f'capture(model, softmax="{name}"), with heads=H if it has 3 axes)'
            )
        return ""

    def _put_on(self, layer: nn.Module) -> None:
        hook = self._before_layer
        self._layer_hooks[layer] = layer.register_forward_pre_hook(hook, with_kwargs=True)

    def _before_layer(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        # Off while the layer runs; when it has, _left puts it on again.
        self._layer_hooks.pop(layer).remove()
        length = self._lengths.get(layer)
        self._take(
            self.watch.stack[-1],
            lambda name: read_encoder_layer(name, layer, args, kwargs, self._masks, length),
        )

    def _before_attention(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._take(
            self.watch.stack[-1],
            lambda name: read_attention(name, module, args, kwargs, self._masks),
        )

    def _before_encoder(self, encoder: nn.Module, args: tuple, kwargs: dict) -> None:
        source = args[0] if args else kwargs.get("src")
        if isinstance(source, Tensor) and source.dim() == 3 and not source.is_nested:
            self._lengths |= dict.fromkeys(encoder.layers, source.shape[1])

    def _entered(self, frame: Frame) -> None:
        error = self._survey.refused.get(frame.module)
        if error is not None and self._admit(frame)[1]:
            raise error

    def _left(self, frame: Frame) -> None:
        module = frame.module
        if module in self._encoder_layers and module not in self._layer_hooks:
            self._put_on(module)
        if frame.n_inside or self._choice.by_number or not expects_attention(module):
            return
        if self._choice.has_name(frame.name):
            self._unread[frame.name] = type(module).__name__

    def _called(self, kind: str, func: Callable, args: tuple, kwargs: dict) -> None:
        frame = self.watch.stack[-1]
        if kind == "softmax":
            self._take_softmax(args, kwargs)
        elif kind == "sdpa":
            self._take(frame, lambda name: read_sdpa(name, args, kwargs, self._n_heads))
        elif kind == "mha":
            self._take(frame, lambda name: read_functional(name, args, kwargs, self._masks))
        elif self._admit(frame)[1]:
            raise CaptureError(
                f"{frame.name} calls {func.__name__}, a kernel whose attention capture cannot "
                f"read. {_WAY_OUT}, or choose the other layers: capture(model, layers=[...])"
            )

    def _take_softmax(self, args: tuple, kwargs: dict) -> None:
        frame = caller = self.watch.stack[-1]
        if isinstance(frame.module, nn.Softmax) and len(self.watch.stack) > 1:
            caller = self.watch.stack[-2]  # an nn.Softmax is a part of the attention around it
        scores = softmax_scores(args, kwargs)
        if scores is None:
            return
        names = frame.name, caller.name
        named = any(matches(name, chosen) for name in names for chosen in self._softmax)
        if named or is_square(scores):
            self._take(caller, lambda name: read_softmax(name, scores, self._n_heads))
        elif scores.dim() > 2:
            self._other_softmax.setdefault(frame.name, tuple(scores.shape))

    def _admit(self, frame: Frame) -> tuple[str, bool]:
        """Name of an attention call of a module, and whether it is wanted.

        Raises:
            CaptureError: the module has attended before, in an earlier run.
        """
        frame.n_calls += 1
        frame.n_inside += 1
        name = frame.name if frame.n_calls == 1 else f"{frame.name} #{frame.n_calls}"
        wanted = self._choice.takes(name, self._n_calls)
        self._n_calls += 1
        first = self._frames.setdefault(name, frame)
        if first is not frame and (wanted or self._choice.by_number):
            raise CaptureError(
                f"{name} ran twice inside one capture. Run the model once per `with capture(...)`; "
                "a model that reuses a layer, or recomputes it in backward, cannot be captured"
            )
        return name, wanted

    def _take(self, frame: Frame, read: Callable[[str], Call]) -> None:
        name, wanted = self._admit(frame)
        if wanted:
            with _plain_arithmetic():
                self.record.add(self._statistics.of(name, read(name)))


_WAY_OUT = (
    "Compute it with nn.functional.scaled_dot_product_attention or a softmax over (B, H, T, T) "
    '(Hugging Face: attn_implementation="sdpa" or "eager")'
)


@contextmanager
def _plain_arithmetic() -> Iterator[None]:
    """Without gradients, autocast or inference mode, so that the record is of ordinary tensors.

    Each costs time to enter, so only where one is on.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_grad_enabled():
            stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
