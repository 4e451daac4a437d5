"""Which module of a model runs at this moment, and what PyTorch functions its own code calls.

Global forward hooks keep a stack of the running modules. While the innermost one runs code of its
own, a `TorchFunctionMode` reports its calls; while it is one of PyTorch's attention modules, the
mode is off, because PyTorch leaves its fast paths as soon as a mode is on.

    watch = Watch({module: name}, closed={encoder_layer}, on_enter, on_call)
    watch.arm() ... watch.remove()
"""

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from attention.calls import CaptureError

_KINDS = {
    "scaled_dot_product_attention": "sdpa",
    "multi_head_attention_forward": "mha",
    "softmax": "softmax",
    "special_softmax": "softmax",
    "_softmax": "softmax",
}


@dataclass(eq=False)
class Frame:
    """A running module.

    Attributes:
        module, name: which.
        n_calls: attention calls so far of the module's own code.
        n_inside: attention calls so far, with those of the modules inside.
    """

    module: nn.Module
    name: str
    n_calls: int = 0
    n_inside: int = 0


class Watch:
    """Follows the modules of a model while it runs.

    Attributes:
        stack: the running modules, the innermost last.
        compiled: name of the module in which torch.compile failed, because the mode was on.

    Args:
        names: modules to follow.
        closed: those whose own calls are not reported.
        on_enter: called when a module starts.
        on_leave: called when a module ends, or fails.
        on_call: called with the kind of attention ("sdpa", "mha", "softmax", or "opaque" for a
            kernel that cannot be read), the function and its arguments.
    """

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        closed: Collection[nn.Module],
        on_enter: Callable[[Frame], None],
        on_leave: Callable[[Frame], None],
        on_call: Callable[[str, Callable, tuple, dict], None],
    ) -> None:
        self.stack: list[Frame] = []
        self.compiled: str | None = None
        self._names = names
        self._closed = closed
        self._on_enter = on_enter
        self._on_leave = on_leave
        self._mode = _Calls(self, on_call)
        self._mode_is_on = False
        self._handles: list[Any] = []

    @property
    def listens(self) -> bool:
        """Whether the innermost running module is one whose calls are reported."""
        return bool(self.stack) and self.stack[-1].module not in self._closed

    def arm(self) -> None:
        """Follow the model from now on."""
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        """Take off all hooks and the mode."""
        for handle in self._handles:
            handle.remove()
        self.stack.clear()
        self._switch()

    def _enter(self, module: nn.Module, _args: tuple) -> None:
        name = self._names.get(module)
        if name is not None:
            self.stack.append(Frame(module, name))
            self._switch()
            self._on_enter(self.stack[-1])
        elif isinstance(module, nn.TransformerEncoderLayer) and module.self_attn in self._names:
            raise CaptureError(
                f"{self._names[module.self_attn]} is the attention of an "
                "nn.TransformerEncoderLayer, whose fast path a hook there would switch off; give "
                "capture the encoder layer itself"
            )

    def _leave(self, module: nn.Module, _args: tuple, _output: object) -> None:
        if module not in self._names or not any(f.module is module for f in self.stack):
            return
        # What an interrupt left above it has ended too.
        while (frame := self.stack.pop()).module is not module:
            pass
        if self.stack:
            self.stack[-1].n_inside += frame.n_inside
        self._switch()
        error = sys.exc_info()[0]  # a hook that is always called runs where the error is handled
        if error is not None and error.__module__.startswith("torch._dynamo"):
            self.compiled = self.compiled or frame.name
        self._on_leave(frame)

    def _switch(self) -> None:
        """Put the mode on or off as the innermost module wants it.

        Below a mode of the user's it stays on: the fast paths are off then with or without it.
        """
        if self.listens and not self._mode_is_on:
            self._mode.__enter__()
            self._mode_is_on = True
        elif not self.listens and self._mode_is_on and _get_current_function_mode() is self._mode:
            self._mode.__exit__(None, None, None)
            self._mode_is_on = False


class _Calls(TorchFunctionMode):
    """Reports attention calls of the running module; every call goes on as it is."""

    def __init__(self, watch: Watch, on_call: Callable[[str, Callable, tuple, dict], None]) -> None:
        super().__init__()
        self._watch = watch
        self._on_call = on_call
        self._kinds: dict[Callable, str | None] = {}

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._watch.listens:
            return func(*args, **kwargs)
        if torch.compiler.is_compiling() or _in_compiled_code():
            raise compiled_error(self._watch.stack[-1].name)
        if func not in self._kinds:
            self._kinds[func] = _kind_of(func)
        kind = self._kinds[func]
        if kind in ("softmax", "opaque"):  # a softmax may overwrite its input
            self._on_call(kind, func, args, kwargs)
        output = func(*args, **kwargs)
        if kind in ("sdpa", "mha"):  # PyTorch's own complaint about a wrong shape comes first
            self._on_call(kind, func, args, kwargs)
        return output


def compiled_error(name: str) -> CaptureError:
    """The error for compiled code, whose attention nobody sees."""
    return CaptureError(
        f"{name} runs code compiled by torch.compile (flex_attention always does), which capture "
        "cannot follow. Capture the model before it is compiled, run it inside "
        'torch.compiler.set_stance("force_eager"), or attend with scaled_dot_product_attention '
        '(Hugging Face: attn_implementation="sdpa")'
    )


def _in_compiled_code() -> bool:
    """Whether this runs inside a compiled function that fell back to plain Python."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)


def _kind_of(func: Callable) -> str | None:
    name = getattr(func, "__name__", "").split(".")[0]
    kind = _KINDS.get(name)
    if kind is None and ("attention" in name or "attn" in name):
        return "opaque"
    return kind
