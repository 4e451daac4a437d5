"""What the modules of a model are called, and which of them should attend.

names_of(roots_of(model))                                        # {module: name}, in order
matches("decoder.layers.0.self_attn", "*.self_attn")             # True
"""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import cache

from torch import nn

from historylens.capture.inputs import CaptureError

# Class names that end so are expected to attend: LlamaAttention, CausalSelfAttention, FlashAttn2.
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
    names = {}
    for prefix, root in roots.items():
        for path, module in root.named_modules():
            parts = (prefix, *path.split("."))  # the second is a wrapper's of torch.compile
            name = ".".join(p for p in parts if p not in ("", "_orig_mod")) or type(module).__name__
            name = names.setdefault(module, name)
            if forward_of(module) is nn.TransformerEncoderLayer.forward:
                names.setdefault(module.self_attn, name)
    return names


def forward_of(module: nn.Module) -> Callable | None:
    """The function behind a module's forward, None for a scripted one."""
    return getattr(type(module), "forward", None)


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
