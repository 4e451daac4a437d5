"""Capture the attention of every layer of a PyTorch transformer during one forward pass.

    with capture(model, maps=[0]) as record:
        model(*inputs)
    record.names                                           # as the layers ran
    record[0].query_rows                                   # (B, H, T) of the first layer

Fused kernels return no attention weights. So capture reads what each attention is computed from,
computes the rows once more, and keeps what analysis needs: the query token's row, the attention
that each position receives, and maps of bounded size, never a T x T matrix of its own.

Forward hooks name the module that runs, and a `TorchFunctionMode` sees its calls of softmax, of
`nn.functional.scaled_dot_product_attention` and of `nn.functional.multi_head_attention_forward`, to
which `nn.MultiheadAttention`, PyTorch's encoder and decoder layers and subclasses of them come.

While a mode is on, PyTorch leaves the fast path of its own layers. So the outputs are, bit for bit,
those with `torch.backends.mha.set_fastpath_enabled(False)`; the fast path differs from them in the
last digits, and at padded positions, which it may skip. (It also takes a float mask for a bool one:
a bias that is not 0 or -inf, such as ALiBi, is lost there.)
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from historylens.capture.inputs import (
    WAY_OUT,
    CaptureError,
    Reader,
    read_softmax,
    reader_of,
    softmax_scores,
)
from historylens.capture.layers import Choice, Names, compiled_error, expects_attention, matches
from historylens.capture.record import LayerAttention, Record, Wanted

__all__ = ["CaptureError", "LayerAttention", "Record", "capture"]


@contextmanager
def capture(
    model_or_layers: nn.Module | Sequence[nn.Module],
    *,
    received: bool = True,
    maps: Sequence[int] | None = None,
    map_size: int = 512,
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
        The record, filled when the forward has run. Hooks and mode are gone when the block ends;
        the fast path of PyTorch's layers is off inside it.

    Raises:
        CaptureError: there is no attention, a layer's cannot be read, did not run or ran twice, or
            an argument does not fit. It names the layer and the way out.
    """
    wanted = Wanted(received, tuple(maps or ()), map_size, query, padding)
    named = (softmax,) if isinstance(softmax, str) else tuple(softmax)
    session = _Session(Names(model_or_layers), wanted, Choice(layers), named, heads)
    handles = []
    try:
        handles.append(register_module_forward_pre_hook(session.enter))
        handles.append(register_module_forward_hook(session.leave, always_call=True))
        with session:
            yield session.record
        session.check_complete()
    except Exception as error:
        if session.compiled is not None:
            raise compiled_error(session.compiled) from error
        raise
    finally:
        for handle in handles:
            handle.remove()


@dataclass(eq=False)
class _Run:
    """A running module: its attention calls so far, and whether any came from it or inside it."""

    module: nn.Module
    name: str
    n_calls: int = 0
    attended: bool = False


class _Session(TorchFunctionMode):
    """Follows the running modules of a model, and records the attention calls that they make."""

    def __init__(
        self,
        names: Names,
        wanted: Wanted,
        choice: Choice,
        softmax: Sequence[str],
        n_heads: int | None,
    ) -> None:
        super().__init__()
        self.record = Record(filter(choice.has_name, names.expected), tuple(names.roots))
        self.compiled: str | None = None  # where torch.compile failed, because the mode was on
        self._names = names
        self._wanted = wanted
        self._choice = choice
        self._softmax = softmax
        self._n_heads = n_heads
        self._running: list[_Run] = []  # the innermost last
        self._readers: dict[Callable, Reader | None] = {}
        self._calls: dict[str, _Run] = {}  # the run that made the attention call of this name
        self._n_calls = 0
        self._unread: dict[str, str] = {}
        self._hint = ""  # what came nearest to attention

    def enter(self, module: nn.Module, args: tuple) -> None:
        """Note that a module starts.

        Raises:
            CaptureError: it is given a nested tensor, which PyTorch attends to on a fast path only.
        """
        name = self._names.of.get(module)
        if name is None:
            return
        self._running.append(_Run(module, name))
        self.record.waiting.pop(name, None)
        is_mha = isinstance(module, nn.MultiheadAttention)
        if is_mha and any(isinstance(x, Tensor) and x.is_nested for x in args):
            raise CaptureError(
                f"{name} was called with nested tensors, which capture does not read; give it "
                "padded tensors and a key padding mask"
            )

    def leave(self, module: nn.Module, _args: tuple, _output: object) -> None:
        """Note that a module has ended, or failed."""
        if not any(run.module is module for run in self._running):
            return
        while (run := self._running.pop()).module is not module:
            pass  # what an interrupt left above it has ended too
        error = sys.exc_info()[0]  # a hook that is always called runs where the error is handled
        if error is not None and error.__module__.startswith("torch._dynamo"):
            self.compiled = self.compiled or run.name
        if not run.attended and expects_attention(type(module)):
            self._unread[run.name] = type(module).__name__

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._readers:
            self._readers[func] = reader_of(func)
        reader = self._readers[func]
        if reader is None or not self._running:
            return func(*args, **kwargs)
        run = self._running[-1]
        if torch.compiler.is_compiling() or _in_compiled_code():
            raise compiled_error(run.name)
        if reader is read_softmax:  # before it may overwrite its input
            self._take_softmax(run, args, kwargs)
            return func(*args, **kwargs)
        output = func(*args, **kwargs)  # PyTorch's own complaint about a wrong shape comes first
        self._take(run, reader, args, kwargs)
        return output

    def _take_softmax(self, run: _Run, args: tuple, kwargs: dict) -> None:
        scores = softmax_scores(args, kwargs)
        if scores is None:
            return
        caller = run
        if isinstance(run.module, nn.Softmax) and len(self._running) > 1:
            caller = self._running[-2]  # an nn.Softmax is a part of the attention around it
        names = run.name, caller.name
        is_square = scores.dim() == 4 and scores.shape[-1] == scores.shape[-2]
        if is_square or any(matches(name, chosen) for name in names for chosen in self._softmax):
            self._take(caller, read_softmax, args, kwargs)
        elif scores.dim() > 2:
            self._hint = self._hint or (
                f" (a softmax over {tuple(scores.shape)} in {run.name} is not taken for attention "
                f'unless you say so: capture(model, softmax="{run.name}"), with heads=H if it has '
                "3 axes)"
            )

    def _take(self, run: _Run, reader: Reader, args: tuple, kwargs: dict) -> None:
        """Record an attention call of a running module, if it is wanted."""
        for around in self._running:
            around.attended = True
        run.n_calls += 1
        name = run.name if run.n_calls == 1 else f"{run.name} #{run.n_calls}"
        is_wanted = self._choice.takes(name, self._n_calls)
        self._n_calls += 1
        is_new = self._calls.setdefault(name, run) is run
        if not is_new and (is_wanted or name in self.record.names):
            raise CaptureError(
                f"{name} ran twice inside one capture. Run the model once per `with capture(...)`; "
                "a model that reuses a layer, or recomputes it in backward, cannot be captured"
            )
        if is_wanted:
            with _plain_arithmetic():
                self.record.add(self._wanted.of(name, reader(name, args, kwargs, self._n_heads)))

    def check_complete(self) -> None:
        """Refuse a record that lacks a layer.

        Raises:
            CaptureError: something attended unseen, did not run, or there is nothing at all.
        """
        self.record.check_all_ran()
        for name in filter(self._choice.has_name, self._unread):
            raise CaptureError(
                f"{name} is a {self._unread[name]} that ran, but its attention was not seen"
                f"{self._hint}. {WAY_OUT}, or choose the other layers: "
                "capture(model, layers=[...])"
            )
        if self._choice.missing:
            missing, seen = sorted(self._choice.missing, key=str), ", ".join(self._calls) or "none"
            raise CaptureError(f"found no attention for layers={missing}; layers that ran: {seen}")
        for name, root in self._names.roots.items():
            is_root = self._names.of[root] == name  # and no part of another
            if is_root and not any(matches(found, name) for found in self.record.names):
                raise CaptureError(
                    f"{name} is a {type(root).__name__}, in which no attention was seen"
                    f"{self._hint}. {WAY_OUT}"
                )
        if not len(self.record):
            raise CaptureError(
                f"found no nn.TransformerEncoderLayer in {type(root).__name__}, no "
                "nn.MultiheadAttention, no call of scaled_dot_product_attention and no softmax "
                f"over (B, H, T, T) by a module of it that ran{self._hint}. {WAY_OUT}"
            )


def _in_compiled_code() -> bool:
    """Whether this runs inside a compiled function that fell back to plain Python."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)


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
