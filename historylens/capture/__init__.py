"""Capture the attention of every layer of a PyTorch transformer during one forward pass.

    with capture(model, maps=[0]) as record:
        model(*inputs)
    record.names                                           # as the layers ran
    record[0].query_rows                                   # (B, H, T) of the first layer

Fused kernels return no attention weights. So capture reads what each attention is computed from,
computes the rows once more, and keeps the query token's row, the attention that each position
receives, and maps of bounded size, never a T x T matrix of its own. Forward hooks name the module
that runs, and a `TorchFunctionMode` sees its calls of softmax, `scaled_dot_product_attention` and
`multi_head_attention_forward`, to which all of PyTorch's own layers come.

While a mode is on, PyTorch leaves the fast path of its layers: the outputs are, bit for bit, those
with `torch.backends.mha.set_fastpath_enabled(False)`; the fast path differs in the last digits and
at padded positions, and it takes a float mask for a bool one (a bias such as ALiBi is lost there).
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

from historylens.capture.inputs import WAY_OUT, CaptureError, read_softmax, reader_of, scores_of
from historylens.capture.layers import compiled_error, matches, names_of, roots_of, should_attend
from historylens.capture.record import LayerAttention, Options, Record

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
        The record, filled when the forward has run. Hooks and mode are gone when the block ends.

    Raises:
        CaptureError: there is no attention, a layer's cannot be read, did not run or ran twice, or
            an argument does not fit. It names the layer and the way out.
    """
    layers = [layers] if isinstance(layers, str | int) else layers
    softmax = [softmax] if isinstance(softmax, str) else softmax
    maps = tuple(maps or ())
    options = Options(received, maps, map_size, query, padding, layers, softmax, heads)
    session = _Session(roots_of(model_or_layers), options)
    try:
        with (
            register_module_forward_pre_hook(session.enter),
            register_module_forward_hook(session.leave, always_call=True),
            session,
        ):
            yield session.record
        session.check_complete()
    except Exception as error:
        if session.compiled is not None:
            raise compiled_error(session.compiled) from error
        raise


@dataclass(eq=False)
class _Run:
    """A running module: its attention calls so far, and whether any came from it or inside it."""

    module: nn.Module
    name: str
    n_calls: int = 0
    attended: bool = False


class _Session(TorchFunctionMode):
    """Follows the running modules of a model, and records the attention calls that they make."""

    def __init__(self, roots: dict[str, nn.Module], options: Options) -> None:
        super().__init__()
        self._roots, self._options = roots, options
        self._names = names_of(roots)
        known = nn.TransformerEncoderLayer.forward, nn.MultiheadAttention.forward
        attending = [name for module, name in self._names.items() if type(module).forward in known]
        self.record = Record(filter(options.chooses, attending), tuple(roots))
        self.compiled: str | None = None  # where torch.compile failed, because the mode was on
        self._running: list[_Run] = []  # the innermost last
        self._calls: list[str] = []  # the attention calls by name, in order
        self._unread: dict[str, str] = {}  # what ran and should have attended, and its class
        self._hint = ""  # what came nearest to attention

    def enter(self, module: nn.Module, args: tuple) -> None:
        """Note that a module starts."""
        name = self._names.get(module)
        if name is None:
            return
        self._running.append(_Run(module, name))
        self.record.waiting.pop(name, None)
        is_mha = isinstance(module, nn.MultiheadAttention)
        if is_mha and any(isinstance(x, Tensor) and x.is_nested for x in args):  # needs a fast path
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
        if not run.attended and should_attend(type(module)):
            self._unread[run.name] = type(module).__name__

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        reader = reader_of(func)
        if reader is None or not self._running:
            return func(*args, **kwargs)
        run = self._running[-1]
        # The second: inside a compiled function that fell back to plain Python.
        callback = torch._C._dynamo.eval_frame.get_eval_frame_callback()
        if torch.compiler.is_compiling() or callback not in (None, False):
            raise compiled_error(run.name)
        if reader is read_softmax:  # before it may overwrite its input
            self._take_softmax(run, scores_of(args, kwargs))
            return func(*args, **kwargs)
        output = func(*args, **kwargs)  # PyTorch's own complaint about a wrong shape comes first
        self._take(run, reader, *args, **kwargs)
        return output

    def _take_softmax(self, run: _Run, scores: Tensor | None) -> None:
        """Record a softmax over the last axis if it is attention."""
        if scores is None:
            return
        caller = run
        if isinstance(run.module, nn.Softmax) and len(self._running) > 1:
            caller = self._running[-2]  # an nn.Softmax is a part of the attention around it
        is_square = scores.dim() == 4 and scores.shape[-1] == scores.shape[-2]
        chosen = self._options.softmax
        if is_square or any(matches(run.name, x) or matches(caller.name, x) for x in chosen):
            self._take(caller, read_softmax, scores)
        elif scores.dim() > 2:
            self._hint = self._hint or (
                f" (a softmax over {tuple(scores.shape)} in {run.name} is not taken for attention "
                f'unless you say so: capture(model, softmax="{run.name}"), with heads=H if it has '
                "3 axes)"
            )

    def _take(self, run: _Run, reader: Callable, *args: Any, **kwargs: Any) -> None:
        """Record an attention call of a running module, if it is wanted."""
        for around in self._running:
            around.attended = True
        run.n_calls += 1
        name = run.name if run.n_calls == 1 else f"{run.name} #{run.n_calls}"
        is_wanted = self._options.chooses(name, len(self._calls))
        if name in self._calls and (is_wanted or name in self.record.names):
            raise CaptureError(
                f"{name} ran twice inside one capture. Run the model once per `with capture(...)`; "
                "a model that reuses a layer, or recomputes it in backward, cannot be captured"
            )
        self._calls.append(name)
        if is_wanted:
            with _plain_arithmetic():
                call = reader(name, self._options.heads, *args, **kwargs)
                self.record.add(self._options.attention(name, call))

    def check_complete(self) -> None:
        """Refuse a record that lacks a layer: it attended unseen, did not run, or is not there."""
        self.record.check_all_ran()
        for name in filter(self._options.chooses, self._unread):
            what = f"{name} is a {self._unread[name]} that ran, but its attention was not seen"
            choose = "or choose the other layers: capture(model, layers=[...])"
            raise CaptureError(f"{what}{self._hint}. {WAY_OUT}, {choose}")
        ran, missing = list(enumerate(self._calls)), set(self._options.layers or ())
        missing = {x for x in missing if not any(matches(name, x, i) for i, name in ran)}
        if missing:
            missing = sorted(missing, key=str)
            seen = ", ".join(dict.fromkeys(self._calls)) or "none"
            raise CaptureError(f"found no attention for layers={missing}; layers that ran: {seen}")
        for name, root in self._roots.items():
            is_root = self._names[root] == name  # and no part of another
            if is_root and not any(matches(found, name) for found in self.record.names):
                what = f"{name} is a {type(root).__name__}, in which no attention was seen"
                raise CaptureError(f"{what}{self._hint}. {WAY_OUT}")
        if not len(self.record):
            raise CaptureError(
                f"found no nn.TransformerEncoderLayer in {type(root).__name__}, no "
                "nn.MultiheadAttention, no call of scaled_dot_product_attention and no softmax "
                f"over (B, H, T, T) by a module of it that ran{self._hint}. {WAY_OUT}"
            )


@contextmanager
def _plain_arithmetic() -> Iterator[None]:
    """Without gradients, autocast or inference mode, so that the record is of ordinary tensors."""
    # Each costs time to enter, so only where one is on.
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_grad_enabled():
            stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
