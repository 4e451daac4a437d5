"""Follows a model while it runs: forward hooks, and a mode that sees every call of torch.

with Session(roots_of(model), options).attached() as session:
    model(*inputs)
session.record
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from historylens.capture.follow import Followed, Weights
from historylens.capture.inputs import (
    OTHER_LAYERS,
    WAY_OUT,
    WITH_SDPA,
    Call,
    CaptureError,
    read_softmax,
    read_weights,
    reader_of,
    scores_of,
    with_heads,
)
from historylens.capture.layers import (
    compiled_error,
    forward_of,
    matches,
    may_attend,
    names_of,
    should_attend,
)
from historylens.capture.masks import Mask
from historylens.capture.record import Options, Record, Seen


@dataclass(eq=False)
class _Run:
    """A running module: its attention calls so far, and whether any came from it or inside it."""

    module: nn.Module
    name: str
    n_calls: int = 0
    attended: bool = False


class Session(TorchFunctionMode):
    """Follows the running modules of a model, and records the attention calls that they make."""

    def __init__(self, roots: dict[str, nn.Module], options: Options) -> None:
        super().__init__()
        self._roots, self.options = roots, options
        self._names = names_of(roots)
        known = nn.TransformerEncoderLayer.forward, nn.MultiheadAttention.forward
        attending = [x for module, x in self._names.items() if forward_of(module) in known]
        self.record = Record(filter(options.chooses, attending), tuple(roots), self.take_weights)
        self.running: list[_Run] = []  # the innermost last
        self.weights = Followed()
        self.newest = ""  # the layer of the last call, if that attended
        self._unread: dict[str, str] = {}  # what ran and should have attended, and its class
        self._mask = Mask()  # of the last call
        self._hint = ""  # what came nearest to attention

    @contextmanager
    def attached(self) -> Iterator["Session"]:
        """A block in which the session sees what runs."""
        hooks = []
        try:
            for module in filter(may_attend, self._names):
                hooks.append(module.register_forward_pre_hook(self.enter))
                hooks.append(module.register_forward_hook(self.leave, always_call=True))
            with _uncompiled(), self:
                yield self
        finally:
            for hook in hooks:
                hook.remove()
            self._mask = Mask()  # the record lives on, the model's mask need not

    def enter(self, module: nn.Module, args: tuple) -> None:
        """Note that a module starts."""
        name = self._names.get(module)
        if name is None:
            return
        self.running.append(_Run(module, name))
        self.record.waiting.pop(name, None)
        is_mha = isinstance(module, nn.MultiheadAttention)
        if is_mha and any(isinstance(x, Tensor) and x.is_nested for x in args):  # needs a fast path
            raise CaptureError(
                f"{name} was called with nested tensors, which capture does not read; give it "
                "padded tensors and a key padding mask"
            )

    def leave(self, module: nn.Module, _args: tuple, _output: object) -> None:
        """Note that a module has ended, or failed."""
        if not any(run.module is module for run in self.running):
            return
        while (run := self.running.pop()).module is not module:
            pass  # what an interrupt left above it has ended too
        if not run.attended and should_attend(type(module)):
            self._unread[run.name] = type(module).__name__

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs, reader = kwargs or {}, reader_of(func)
        if reader is None or not self.running:
            output = func(*args, **kwargs)
            if self.weights.data:
                self._follow(func.__name__, (*args, *kwargs.values()), output)
            return output
        run, self.newest = self.running[-1], ""
        # The second: inside a compiled function that fell back to plain Python.
        callback = torch._C._dynamo.eval_frame.get_eval_frame_callback()
        if torch.compiler.is_compiling() or callback not in (None, False):
            raise compiled_error(run.name)
        if reader is not read_softmax:
            output = func(*args, **kwargs)  # PyTorch's own complaint about a shape comes first
            self._take(run, reader, args, kwargs)
            return output
        scores = scores_of(args, kwargs)
        self._take_softmax(run, scores)  # before it may overwrite its input
        output = func(*args, **kwargs)
        if self.newest:
            n_heads = self.options.heads if self.seen(self.newest) else 1
            shape = with_heads(self.newest, scores, n_heads, "scores").shape
            self.weights[output] = Weights((self.newest,), shape)
        return output

    def _take_softmax(self, run: _Run, scores: Tensor | None) -> None:
        """Record a softmax over the last axis if it is attention."""
        if scores is None:
            return
        caller = run
        if isinstance(run.module, nn.Softmax) and len(self.running) > 1:
            caller = self.running[-2]  # an nn.Softmax is a part of the attention around it
        chosen = self.options.softmax
        is_named = any(matches(run.name, x) or matches(caller.name, x) for x in chosen)
        if is_named or (scores.dim() == 4 and self._is_attention(caller, scores)):
            self._take(caller, read_softmax, (scores,), {})
        elif scores.dim() > 2:
            self._hint = self._hint or (
                f" (a softmax over {tuple(scores.shape)} in {run.name} is not taken for attention "
                f'unless you say so: capture(model, softmax="{run.name}"), with heads=H if it has '
                "3 axes; 4 are to be (B, H, Tq, Tk))"
            )

    def _is_attention(self, caller: _Run, scores: Tensor) -> bool:
        """Whether scores are square, read on, or have keys for all tokens and some of their own."""
        n_queries, n_keys = scores.shape[2:]
        reads_on = self._reads_on(caller.name, n_queries, n_keys)
        return n_queries == n_keys or reads_on or any(Call(scores, None).extra_keys())

    def _take(self, run: _Run, reader: Callable[..., Call], args: tuple, kwargs: dict) -> None:
        """Record an attention call of a running module, if it is wanted."""
        run.n_calls += 1
        name = run.name if run.n_calls == 1 else f"{run.name} #{run.n_calls}"
        self._keep(name, reader, args, kwargs)

    def take_weights(self, name: str, weights: Tensor, mask: Tensor | None) -> None:
        """Record weights that the model's code hands in, and not the softmax that they are of."""
        if weights in self.weights:
            for unmixed in self.weights[weights].names:
                self.record.calls.pop(unmixed, None)
        for unread in [x for x in self._unread if matches(x, name) or matches(name, x)]:
            del self._unread[unread]
        number, own = 1, name  # a function that serves several layers gives one name for all
        while own in self.record.calls and not self._reads_on(own, *weights.shape[-2:]):
            number += 1
            own = f"{name} #{number}"
        self._keep(own, read_weights, (weights, mask), {})

    def _reads_on(self, name: str, n_queries: int, n_keys: int) -> bool:
        """Whether a call goes on with a layer that has been recorded."""
        seen = self.seen(name)
        return seen is not None and seen.continues(n_queries, n_keys)

    def seen(self, name: str) -> Seen | None:
        """A layer as far as it is recorded."""
        return (self.record.calls.get(name) or (None, None))[1]

    def _keep(self, name: str, reader: Callable[..., Call], args: tuple, kwargs: dict) -> None:
        """Record what is read of a call, by its layer's name, if it is wanted."""
        for around in self.running:
            around.attended = True
        self.record.places |= {run.name for run in self.running[-1:]}
        calls, self.newest = self.record.calls, name
        is_known, before = name in calls, self.seen(name)
        calls.setdefault(name, None)
        if not self.options.chooses(name, list(calls).index(name)):
            return
        transforms = torch._C._functorch.get_interpreter_stack() or ()
        if any(one.key() == torch._C._functorch.TransformType.Vmap for one in transforms):
            raise CaptureError(
                f"{name} runs inside torch.func.vmap, which capture cannot follow. Run it once for "
                f"each member instead, in a loop, or {OTHER_LAYERS}"
            )
        with _plain_arithmetic():
            call = reader(name, self.options.heads, *args, **kwargs)
            if is_known and not (before and before.continues(*call.shape[2:])):
                raise CaptureError(
                    f"{name} ran twice inside one capture. Run the model once per `with "
                    "capture(...)`, in an adapter once per act(), and not in backward; a layer "
                    "that is used in several places needs a copy for each (copy.deepcopy)"
                )
            if call.mask.key == self._mask.key:  # what is known of it counts for all layers
                call.mask = self._mask
            self._mask = call.mask
            calls[name] = before, self.options.attention(name, call, before)

    def _follow(self, kernel: str, args: tuple, output: Any) -> None:
        """Follow weights to the values: what they have become by then is the attention."""
        name, weights = self.weights.step(kernel, args, output) or ("", None)
        if call := self.record.calls.get(name):
            with _plain_arithmetic():
                allowed = (weights != 0).any(-3, keepdim=True)
                read = read_weights(name, self.options.heads, weights, allowed)
                self.record.calls[name] = call[0], self.options.attention(name, read, call[0])

    @property
    def _way_out(self) -> str:
        """What came nearest to attention, and what to do; of a softmax, not to write one."""
        return f"{self._hint}. Do so, or {WITH_SDPA}" if self._hint else f". {WAY_OUT}"

    def check_complete(self) -> None:
        """Refuse a record that lacks a layer: it attended unseen, did not run, or is not there."""
        self.record.check_all_ran()
        for name in filter(self.options.chooses, self._unread):
            raise CaptureError(
                f"{name} is a {self._unread[name]} that ran, but its attention was not seen"
                f"{self._way_out}, or choose the other layers: "
                "capture(model, layers=[...])"
            )
        for name, call in self.record.calls.items():
            if call and name in self.weights.lost - self.weights.met:
                raise CaptureError(
                    f"{name} changes its attention weights on their way to the values, as where "
                    "heads are mixed, in a way that capture does not follow; hand in what stands "
                    "for them at the values, 0 or more: historylens.record_attention(name, "
                    f"weights), or {OTHER_LAYERS}"
                )
        for call in filter(None, self.record.calls.values()):
            self.options.check_complete(call[1])
        calls = list(enumerate(self.record.calls))
        missing = {
            layer
            for layer in self.options.layers or ()
            if not any(matches(name, layer, number) for number, name in calls)
        }
        if missing:
            missing = sorted(missing, key=str)
            seen = ", ".join(self.record.calls) or "none"
            raise CaptureError(f"found no attention for layers={missing}; layers that ran: {seen}")
        for name, root in self._roots.items():
            is_root = self._names[root] == name  # and no part of another
            if is_root and not any(matches(found, name) for found in self.record.names):
                raise CaptureError(
                    f"{name} is a {type(root).__name__}, in which no attention was seen"
                    f"{self._way_out}"
                )
        if not len(self.record):
            raise CaptureError(
                f"found no nn.TransformerEncoderLayer in {type(root).__name__}, no "
                "nn.MultiheadAttention, no call of scaled_dot_product_attention and no softmax "
                f"over (B, H, T, T) by a module of it that ran{self._way_out}"
            )


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Compiled functions run as they were written, so that what they call is seen."""
    # Loaded where something was compiled, or is to be; it is slow to import.
    if not {"torch._dynamo.eval_frame", "torch.nn.attention.flex_attention"} & {*sys.modules}:
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there")
        yield


def _plain_arithmetic() -> AbstractContextManager:
    """Without gradients, autocast or inference mode, so that the record is of ordinary tensors."""
    are_on = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    is_plain = not any(are_on) and not torch._C._is_any_autocast_enabled()
    return nullcontext() if is_plain else _switched_off()  # which costs time


@contextmanager
def _switched_off() -> Iterator[None]:
    with torch._C._DisableAutocast(), torch.inference_mode(False), torch.no_grad():
        yield
