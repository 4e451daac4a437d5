"""Names of the modules of a model, and which of them a capture takes.

Names(model).of                                                   # {module: name}, in order
Choice(["decoder", "*.cross_attn"]).has_name("decoder.layers.0.self_attn")            # True
Choice([0, 3]).takes("blocks.3.attn", 3)                                              # True
"""

import re
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache

from torch import nn

from historylens.capture.inputs import CaptureError

# Class names that end so are expected to attend: LlamaAttention, CausalSelfAttention, FlashAttn2.
_ATTENTION_NAME = re.compile(r"(attention|attn|mha)\d*d?$", re.IGNORECASE)


class Names:
    """What the modules of a model are called.

    Attributes:
        roots: the model by the name "", or its layers: "layer 0", "layer 1", ...
        of: the name of every module. The attention of PyTorch's encoder layer goes by the layer's.
        expected: names of those that attend for certain if they run.

    Raises:
        CaptureError: there is no layer, one stands twice, or a module is compiled.
    """

    def __init__(self, model_or_layers: nn.Module | Sequence[nn.Module]) -> None:
        is_model = isinstance(model_or_layers, nn.Module)
        if is_model and not isinstance(model_or_layers, nn.ModuleList):
            self.roots = {"": model_or_layers}
        else:
            layers = list(model_or_layers)
            if not layers:
                raise CaptureError("expected a model or its transformer layers, got an empty list")
            if len(set(layers)) < len(layers):
                raise CaptureError("a layer stands twice in the list; give each layer once")
            self.roots = {f"layer {i}": layer for i, layer in enumerate(layers)}
        self.of: dict[nn.Module, str] = {}
        self.expected: list[str] = []
        for prefix, root in self.roots.items():
            for path, module in root.named_modules():
                name = ".".join(filter(None, (prefix, path))) or type(module).__name__
                self._add(module, self.of.setdefault(module, name))

    def _add(self, module: nn.Module, name: str) -> None:
        if _is_compiled(module):
            raise compiled_error(name)
        forward = type(module).forward
        if forward in (nn.TransformerEncoderLayer.forward, nn.MultiheadAttention.forward):
            self.expected.append(name)
        if forward is nn.TransformerEncoderLayer.forward:
            self.of.setdefault(module.self_attn, name)


@cache
def expects_attention(kind: type[nn.Module]) -> bool:
    """Whether a module of this class should have attended when it has run."""
    is_known = issubclass(kind, nn.TransformerEncoderLayer)
    return is_known or _ATTENTION_NAME.search(kind.__name__) is not None


class Choice:
    """Which layers to capture.

    Attributes:
        missing: what was chosen and has not come.

    Args:
        layers: names, with wildcards, and numbers in the order in which layers run; None for all.

    Raises:
        CaptureError: there are none, or a number is negative.
    """

    def __init__(self, layers: Sequence[str | int] | str | int | None) -> None:
        chosen = [layers] if isinstance(layers, str | int) else list(layers or ())
        self._is_all = layers is None
        self._names = [item for item in chosen if isinstance(item, str)]
        self._numbers = {item for item in chosen if isinstance(item, int)}
        self.missing = set(chosen)
        if any(number < 0 for number in self._numbers) or not (chosen or self._is_all):
            raise CaptureError(
                "expected layers by name or by number from 0 in the order in which they run, got "
                f"{chosen}"
            )

    def has_name(self, name: str) -> bool:
        """Whether a layer is chosen by its name."""
        return self._is_all or any(matches(name, chosen) for chosen in self._names)

    def takes(self, name: str, number: int) -> bool:
        """Whether to capture the layer that runs as the `number`-th."""
        found = {chosen for chosen in self._names if matches(name, chosen)}
        found |= self._numbers & {number}
        self.missing -= found
        return self._is_all or bool(found)


def matches(name: str, chosen: str) -> bool:
    """Whether a layer is `chosen`, lies below it or fits its wildcards."""
    name = name.split(" #")[0]
    return name == chosen or name.startswith(f"{chosen}.") or fnmatchcase(name, chosen)


def compiled_error(name: str) -> CaptureError:
    """The error for compiled code, whose attention nobody sees."""
    return CaptureError(
        f"{name} runs code compiled by torch.compile (flex_attention always does), which capture "
        "cannot follow. Capture the model before it is compiled, run it inside "
        'torch.compiler.set_stance("force_eager"), or attend with scaled_dot_product_attention '
        '(Hugging Face: attn_implementation="sdpa")'
    )


def _is_compiled(module: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None or dynamo._stance.stance == "force_eager":
        return False
    if isinstance(module, dynamo.OptimizedModule) or module._compiled_call_impl is not None:
        return True
    return hasattr(module.forward, "_torchdynamo_orig_callable")
