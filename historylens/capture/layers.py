"""What the modules of a model are called, and which of them should attend.

names_of(roots_of(model))                                        # {module: name}, in order
matches("decoder.layers.0.self_attn", "*.self_attn")             # True
"""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import cache

import torch
from torch import nn

from historylens.capture.inputs import CaptureError

# Class names that end so are expected to attend: LlamaAttention, CausalSelfAttention, FlashAttn2.
_PASS_ON = nn.ModuleList, nn.TransformerEncoder, nn.TransformerDecoder  # they only call their parts
_ATTENTION_NAME = re.compile(r"(attention|attn|mha)\d*d?$", re.IGNORECASE)


def roots_of(model_or_layers: nn.Module | Sequence[nn.Module]) -> dict[str, nn.Module]:
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

    def visit(module: nn.Module, path: str) -> None:
        if module in done:
            return
        done.add(module)
        name = names.setdefault(module, path or type(module).__name__)
        if forward_of(module) is nn.TransformerEncoderLayer.forward:
            names.setdefault(module.self_attn, name)
        for part, child in module._modules.items():
            if child is not None:  # "_orig_mod" is in a wrapper of torch.compile
                visit(child, path if part == "_orig_mod" else f"{path}.{part}".lstrip("."))

    for prefix, root in roots.items():
        visit(root, prefix)
    return names


def forward_of(module: nn.Module) -> Callable | None:
    """The function behind a module's forward, None for a scripted one."""
    return getattr(type(module), "forward", None)


def may_attend(module: nn.Module) -> bool:
    """Whether a module is worth a hook: PyTorch's own without parts, or around theirs, are not."""
    if isinstance(module, torch.jit.ScriptModule):  # takes no hooks, and nothing in it is seen
        return False
    if isinstance(module, nn.Softmax) or "forward" in vars(module):
        return True
    if type(module) is nn.TransformerEncoderLayer:
        return type(module.self_attn) is not nn.MultiheadAttention
    is_own = type(module).__module__.startswith("torch.nn.modules.")
    return not is_own or (bool(module._modules) and type(module) not in _PASS_ON)


def compiled_error(name: str) -> CaptureError:
    """The error for compiled code, whose attention nobody sees."""
    return CaptureError(
        f"{name} runs code that torch.compile compiles while it is captured, which capture cannot "
        'follow. Call torch.compiler.set_stance("force_eager") before: at the top of the adapter '
        "file, before load() runs; or attend with scaled_dot_product_attention (Hugging Face: "
        'attn_implementation="sdpa")'
    )


@cache
def should_attend(kind: type[nn.Module]) -> bool:
    """Whether a module of this class should have attended when it has run."""
    name_tells = _ATTENTION_NAME.search(kind.__name__) is not None
    return name_tells or issubclass(kind, nn.TransformerEncoderLayer)


def matches(name: str, chosen: str | int, number: int | None = None) -> bool:
    """Whether a layer is chosen: by its number, its name or one above it, or by wildcards."""
    if isinstance(chosen, int):
        return chosen == number
    name = name.split(" #")[0]
    return name == chosen or name.startswith(f"{chosen}.") or fnmatchcase(name, chosen)
