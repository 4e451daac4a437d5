"""Follows a model while it runs: forward hooks, and a mode that sees every call of torch."""

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, overrides

from historylens.capture import inputs
from historylens.capture.follow import Followed, Weights
from historylens.capture.inputs import OTHER_LAYERS, Call, CaptureError
from historylens.capture.masks import Mask
from historylens.capture.record import Options, Record, matches
from historylens.common.steady import SteadySums

# Class names that end so are expected to attend: LlamaAttention, CausalSelfAttention, FlashAttn2.
_ATTENTION_NAME = re.compile(r"(attention|attn|mha)\d*d?$", re.IGNORECASE)
_PASS_ON = nn.ModuleList, nn.TransformerEncoder, nn.TransformerDecoder  # they only call their parts


@dataclass(eq=False)
class _Run:
    """A running module: its attention calls so far, and whether any came from it or inside it."""

    module: nn.Module
    name: str
    n_calls: int = 0
    attended: bool = False


class Session(overrides.TorchFunctionMode):
    """Follows the running modules of a model, and records the attention calls that they make."""

    def __init__(self, model_or_layers: nn.Module | Sequence[nn.Module], options: Options) -> None:
        super().__init__()
        self._roots, self.options = _roots_of(model_or_layers), options
        self._names = names_of(self._roots)
        known = nn.TransformerEncoderLayer.forward, nn.MultiheadAttention.forward
        attending = [
            x for m, x in self._names.items() if getattr(type(m), "forward", None) in known
        ]
        self.record = Record(filter(options.chooses, attending), self._roots)
        self.running: list[_Run] = []  # the innermost last
        self.weights = Followed()
        self.newest = ""  # the layer of the last call, if that attended
        self._unread: dict[str, str] = {}  # what ran and should have attended, and its class
        self._mask = Mask()  # of the last call
        self._hint = ""  # what came nearest to attention
        self._refused: CaptureError | None = None  # the first, while the model may catch it

    @contextmanager
    def attached(self) -> Iterator["Session"]:
        """A block in which the session sees what runs."""
        with ExitStack() as hooks, uncompiled(), self:
            for module in filter(_may_attend, self._names):
                hooks.enter_context(module.register_forward_pre_hook(self._enter))
                hooks.enter_context(module.register_forward_hook(self._leave, always_call=True))
            hooks.callback(setattr, self, "_mask", Mask())  # the record lives on, that need not
            yield self

    def _enter(self, module: nn.Module, args: tuple) -> None:
        name = self._names.get(module)
        if name is None or not self._is_on():
            return
        self.running.append(_Run(module, name))
        self.record.waiting.pop(name, None)
        is_mha = isinstance(module, nn.MultiheadAttention)
        if is_mha and any(isinstance(x, Tensor) and x.is_nested for x in args):  # needs a fast path
            what = f"{name} was called with nested tensors, which capture does not read"
            raise CaptureError(f"{what}; give it padded tensors and a key padding mask")

    def _is_on(self) -> bool:
        """Not so where another thread runs the model, or backward a part of it again."""
        return self in overrides._get_current_function_mode_stack()

    def _leave(self, module: nn.Module, _args: tuple, output: object) -> None:
        if not (any(run.module is module for run in self.running) and self._is_on()):
            return
        while (run := self.running.pop()).module is not module:
            pass  # what an interrupt left above it has ended too
        if not self.running and output is None:  # an error has left the model, uncaught
            self._refused = None
        kind, is_layer = type(module).__name__, isinstance(module, nn.TransformerEncoderLayer)
        if not run.attended and (is_layer or _ATTENTION_NAME.search(kind)):
            self._unread[run.name] = kind

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs, self.newest, kernel = kwargs or {}, "", getattr(func, "__name__", "")
        reader = inputs.reader_of(kernel)
        if reader is None or not self.running:
            output = func(*args, **kwargs)
            if self.weights.data:
                self._follow(kernel, (*args, *kwargs.values()), output)
            return output
        try:
            return self._attend(self.running[-1], reader, func, args, kwargs)
        except CaptureError as error:
            self._refused = self._refused or error
            raise

    def _attend(
        self, run: _Run, reader: Callable[..., Call], func: Callable, args: tuple, kwargs: dict
    ) -> Any:
        """Run an attention call of a running module, and record it."""
        # The second: inside a compiled function that fell back to plain Python.
        callback = torch._C._dynamo.eval_frame.get_eval_frame_callback()
        if torch.compiler.is_compiling() or callback not in (None, False):
            raise CaptureError(
                f"{run.name} runs code that torch.compile compiles while it is captured, which "
                'capture cannot follow. Call torch.compiler.set_stance("force_eager") before: at '
                "the top of the adapter file, before load() runs; or attend with "
                'scaled_dot_product_attention (Hugging Face: attn_implementation="sdpa")'
            )
        if reader is not inputs.read_softmax:
            output = func(*args, **kwargs)  # PyTorch's own complaint about a shape comes first
            self._take(run, reader, args, kwargs)
            return output
        scores = inputs.scores_of(args, kwargs)
        if scores is not None and scores.is_floating_point():
            self._take_softmax(run, scores)  # before it may overwrite its input
        output = func(*args, **kwargs)
        if self.newest:
            n_heads = self.options.heads if self.record.calls[self.newest] else 1
            shape = inputs.with_heads(self.newest, scores, n_heads, "scores").shape
            self.weights[output] = Weights((self.newest,), shape)
        return output

    def _take_softmax(self, run: _Run, scores: Tensor) -> None:
        """Record a softmax if it is named, or square, reads on, or has keys that are no tokens."""
        # An nn.Softmax is a part of the attention around it.
        caller = self.running[-2:][0] if isinstance(run.module, nn.Softmax) else run
        chosen = self.options.softmax
        is_taken = any(matches(run.name, x) or matches(caller.name, x) for x in chosen)
        if scores.dim() == 4 and not is_taken:
            n_queries, n_keys = scores.shape[2:]
            reads_on = self._reads_on(caller.name, n_queries, n_keys)
            is_taken = n_queries == n_keys or reads_on or any(Call(scores, None).extra_keys())
        if is_taken:
            self._take(caller, inputs.read_softmax, (scores,), {})
        elif scores.dim() > 2:
            self._hint = self._hint or (
                f" (a softmax over {tuple(scores.shape)} in {run.name} is not taken for attention "
                f'unless you say so: capture(model, softmax="{run.name}"), with heads=H if it has '
                "3 axes; 4 are to be (B, H, Tq, Tk))"
            )

    def _take(self, run: _Run, reader: Callable[..., Call], args: tuple, kwargs: dict) -> None:
        """Record an attention call of a running module, if it is wanted."""
        run.n_calls += 1
        name = run.name if run.n_calls == 1 else f"{run.name} #{run.n_calls}"
        self._keep(name, reader, args, kwargs)

    def take_weights(self, name: str, weights: Tensor, mask: Tensor | None = None) -> None:
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
        self._keep(own, inputs.read_weights, (weights, mask), {})

    def _reads_on(self, name: str, n_queries: int, n_keys: int) -> bool:
        """Whether a call goes on with a layer: its keys are tokens so far, all or the latest, and
        its own.
        """
        if (seen := self.record.calls.get(name)) is None or not seen.is_of_self:
            return False
        return n_queries < n_keys - sum(seen.extra) <= seen.n_queries + n_queries

    def _keep(self, name: str, reader: Callable[..., Call], args: tuple, kwargs: dict) -> None:
        """Record what is read of a call, by its layer's name, if it is wanted."""
        for around in self.running:
            around.attended = True
        self.record.places |= {run.name for run in self.running[-1:]}
        calls, self.newest = self.record.calls, name
        is_known, before = name in calls, calls.setdefault(name, None)
        if not self.options.chooses(name, list(calls).index(name)):
            return
        transforms = torch._C._functorch.get_interpreter_stack() or ()
        if any(one.key() == torch._C._functorch.TransformType.Vmap for one in transforms):
            what = f"{name} runs inside torch.func.vmap, which capture cannot follow"
            way_out = f"Run it once for each member instead, in a loop, or {OTHER_LAYERS}"
            raise CaptureError(f"{what}. {way_out}")
        with _plain_arithmetic():
            call = reader(name, self.options.heads, *args, **kwargs)
            if is_known and not self._reads_on(name, *call.shape[2:]):
                raise CaptureError(
                    f"{name} ran twice inside one capture. Run the model once per `with "
                    "capture(...)`, in an adapter once per act(), and not in backward; where "
                    "passes read on from a cache, it has to grow with them, not to be as long from "
                    "the start; a layer that is used in several places needs a copy for each "
                    "(copy.deepcopy)"
                )
            if call.mask.biases and call.mask.key == self._mask.key:  # known already
                call.mask = self._mask
            self._mask = call.mask
            calls[name] = self.options.attention(name, call, before)

    def _follow(self, kernel: str, args: tuple, output: Any) -> None:
        """Follow weights to the values: what they have become by then is the attention."""
        name, weights = self.weights.step(kernel, args, output) or (None, None)
        if seen := self.record.calls.get(name):
            with _plain_arithmetic():
                allowed = (weights != 0).any(-3, keepdim=True)
                read = inputs.read_weights(name, self.options.heads, weights, allowed)
                self.record.calls[name] = self.options.attention(name, read, seen.before)

    def check_complete(self) -> None:
        """Refuse a record that lacks a layer: it attended unseen, did not run, or is not there."""
        record, chosen = self.record, self.options.layers or ()
        if self._refused:
            raise self._refused
        record.check_all_ran()
        sdpa = 'scaled_dot_product_attention (Hugging Face: attn_implementation="sdpa")'
        hint = f"{self._hint}. Do so, or attend with {sdpa}"  # of a softmax, not to write one
        way_out = hint if self._hint else f". {inputs.WAY_OUT}"
        for name in filter(self.options.chooses, self._unread):
            what = f"{name} is a {self._unread[name]} that ran, but its attention was not seen"
            raise CaptureError(f"{what}{way_out}, or {OTHER_LAYERS}")
        for name, seen in record.calls.items():
            if seen and name in (self.weights.lost | self.weights.changed) - self.weights.met:
                raise CaptureError(
                    f"{name} changes its attention weights on their way to the values, as where "
                    "heads are mixed, in a way that capture does not follow; hand in what stands "
                    "for them at the values, 0 or more: historylens.record_attention(name, "
                    f"weights), or {OTHER_LAYERS}"
                )
        for seen in filter(None, record.calls.values()):
            self.options.check_complete(seen)
        calls = list(enumerate(record.calls))
        found = {x for x in chosen if any(matches(name, x, number) for number, name in calls)}
        if missing := sorted({*chosen} - found, key=str):
            ran = ", ".join(record.calls) or "none"
            raise CaptureError(f"found no attention for layers={missing}; layers that ran: {ran}")
        for name, root in self._roots.items():
            is_root = self._names[root] == name  # and no part of another
            if is_root and not any(matches(found, name) for found in record.names):
                what = f"{name} is a {type(root).__name__}, in which no attention was seen"
                raise CaptureError(f"{what}{way_out}")
        if not record.names:
            raise CaptureError(
                f"found no nn.TransformerEncoderLayer in {type(root).__name__}, no "
                "nn.MultiheadAttention, no call of scaled_dot_product_attention and no softmax "
                f"over (B, H, T, T) by a module of it that ran{way_out}"
            )


def _roots_of(model_or_layers: nn.Module | Sequence[nn.Module]) -> dict[str, nn.Module]:
    """The model by the name "", or its layers: "layer 0", "layer 1", ..."""
    if isinstance(model_or_layers, nn.Module) and not isinstance(model_or_layers, nn.ModuleList):
        return {"": model_or_layers}
    layers = list(model_or_layers)
    if not layers:
        raise CaptureError("expected a model or its transformer layers, got an empty list")
    if len(set(layers)) < len(layers):
        raise CaptureError("a layer stands twice in the list; give each layer once")
    return {f"layer {i}": layer for i, layer in enumerate(layers)}


def names_of(roots: dict[str, nn.Module]) -> dict[nn.Module, str]:
    """The name of every module. The attention of PyTorch's encoder layer goes by the layer's."""
    names, done = {}, set()
    for prefix, root in roots.items():
        for path, module in root.named_modules(done, prefix):
            if "_orig_mod" in path:  # of torch.compile
                path = ".".join(part for part in path.split(".") if part != "_orig_mod")
            name = names.setdefault(module, path or type(module).__name__)
            if getattr(type(module), "forward", None) is nn.TransformerEncoderLayer.forward:
                names.setdefault(module.self_attn, name)
    return names


def _may_attend(module: nn.Module) -> bool:
    """Whether a module is worth a hook: PyTorch's own without parts, or around theirs, are not."""
    if isinstance(module, torch.jit.ScriptModule):  # takes no hooks, and nothing in it is seen
        return False
    if isinstance(module, nn.Softmax) or "forward" in vars(module):
        return True
    if type(module) is nn.TransformerEncoderLayer:
        return type(module.self_attn) is not nn.MultiheadAttention
    is_own = type(module).__module__.startswith("torch.nn.modules.")
    return not is_own or (bool(module._modules) and type(module) not in _PASS_ON)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled functions run as they were written, so that what they call is seen."""
    # Loaded where something was compiled, or is to be; it is slow to import.
    slow = "torch._dynamo.eval_frame", "torch.nn.attention.flex_attention"
    if not any(name in sys.modules for name in slow):
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there")
        yield


@contextmanager
def _plain_arithmetic() -> Iterator[None]:
    """Without gradients, autocast or inference mode, so that the record is of ordinary tensors."""
    subclasses, off = torch._C.DisableTorchFunctionSubclass(), nullcontext()  # others are slow
    autocast = torch._C._DisableAutocast() if torch._C._is_any_autocast_enabled() else off
    is_kept = torch.is_grad_enabled() or torch.is_inference_mode_enabled()
    inference, grad = (torch.inference_mode(False), torch.no_grad()) if is_kept else (off, off)
    with without_modes(), subclasses, autocast, inference, grad:
        yield


@contextmanager
def without_modes() -> Iterator[None]:
    """Without function modes, of the user or of captures, but for that which makes sums steady."""
    modes = overrides._get_current_function_mode_stack()
    try:
        _have_modes(mode for mode in modes if isinstance(mode, SteadySums))
        yield
    finally:
        _have_modes(modes)


def _have_modes(modes: Iterable[overrides.TorchFunctionMode]) -> None:
    while overrides._get_current_function_mode() is not None:
        overrides._pop_mode()
    for mode in modes:
        overrides._push_mode(mode)
