"""Sort the modules of a model by how their attention can be seen.

PyTorch's own attention modules get a hook each; what a module of the user's calls is reported by
`watch.py` while it runs. What nobody can see is refused with a `CaptureError` that names the layer.

    survey = Survey.of(model)
    survey.names                                                # {module: name}, in order
"""

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from attention.calls import CaptureError
from attention.mha import check_no_added_keys
from attention.watch import compiled_error

# Class names that end so are expected to attend: LlamaAttention, CausalSelfAttention, FlashAttn2.
_ATTENTION_NAME = re.compile(r"(attention|attn|mha)\d*d?$", re.IGNORECASE)


@dataclass
class Survey:
    """The modules of a model, or of layers that were given one by one.

    Attributes:
        title: what was given, for errors.
        names: every module to follow. Those inside an encoder layer of PyTorch are left out: any
            hook there would take its fast path away.
        given: names of the layers, if they were given one by one.
        encoder_layers: PyTorch's encoder layers, whose fast path computes the attention.
        attentions: PyTorch's multi-head attentions elsewhere.
        encoders: PyTorch's encoders, which may turn their input into nested tensors.
        closed: modules that run PyTorch's own code, which must not be watched.
        refused: why a module's attention cannot be read.
    """

    title: str
    names: dict[nn.Module, str] = field(default_factory=dict)
    given: tuple[str, ...] | None = None
    encoder_layers: list[nn.Module] = field(default_factory=list)
    attentions: list[nn.Module] = field(default_factory=list)
    encoders: list[nn.Module] = field(default_factory=list)
    closed: set[nn.Module] = field(default_factory=set)
    refused: dict[nn.Module, CaptureError] = field(default_factory=dict)

    @classmethod
    def of(cls, model_or_layers: nn.Module | Sequence[nn.Module]) -> "Survey":
        """Look through a model or through layers, which are called "layer 0", "layer 1", ...

        Raises:
            CaptureError: there is no layer, one stands twice, or one is compiled.
        """
        if isinstance(model_or_layers, nn.Module) and not isinstance(
            model_or_layers, nn.ModuleList
        ):
            survey = cls(type(model_or_layers).__name__)
            survey._add(model_or_layers, "")
            return survey
        layers = list(model_or_layers)
        if not layers:
            raise CaptureError("expected a model or its transformer layers, got an empty list")
        if len(set(layers)) < len(layers):
            raise CaptureError("a layer stands twice in the list; give each layer once")
        survey = cls("the layers", given=tuple(f"layer {i}" for i in range(len(layers))))
        for name, layer in zip(survey.given, layers, strict=True):
            survey._add(layer, name)
        return survey

    def expected(self) -> Iterator[str]:
        """Names of the modules that will attend if they run, known beforehand."""
        known = {*self.encoder_layers, *self.attentions}
        return (name for module, name in self.names.items() if module in known)

    def _add(self, root: nn.Module, prefix: str) -> None:
        opaque: tuple[str, ...] = ()  # what stands below is not looked at
        for path, module in root.named_modules():
            if opaque and path.startswith(opaque):
                continue
            name = ".".join(filter(None, (prefix, path))) or type(module).__name__
            if module in self.names:
                continue
            self.names[module] = name
            if _is_compiled(module):
                raise compiled_error(name)
            if self._sort(name, module):
                if not path:
                    return
                opaque += (f"{path}.",)

    def _sort(self, name: str, module: nn.Module) -> bool:
        """Note what a module is; whether what it contains is part of it."""
        if isinstance(module, nn.TransformerEncoderLayer):
            kind, methods, found = nn.TransformerEncoderLayer, ("forward", "_sa_block"), "layer"
            listed = self.encoder_layers
        elif isinstance(module, nn.MultiheadAttention):
            kind, methods, found = nn.MultiheadAttention, ("forward",), "attention"
            listed = self.attentions
        else:
            if isinstance(module, nn.TransformerEncoder):
                self.encoders.append(module)
                if _runs_code_of(module, nn.TransformerEncoder):
                    self.closed.add(module)
            return False
        if not _runs_code_of(module, kind):
            return False  # a forward of its own that calls nothing of PyTorch's: watched
        own = [m for m in methods if getattr(type(module), m) is not getattr(kind, m)]
        self.closed.add(module)
        try:
            if own:
                raise CaptureError(
                    f"{name} is a {type(module).__name__} with its own {own[0]} around that of "
                    f"nn.{kind.__name__}, so its attention may differ; capture a plain {found}, or "
                    "choose the others: capture(model, layers=[...])"
                )
            _check_plain(name, module)
        except CaptureError as error:
            self.refused[module] = error
        else:
            listed.append(module)
        return True


def expects_attention(module: nn.Module) -> bool:
    """Whether a module that runs should have attended, going by the name of its class."""
    return _ATTENTION_NAME.search(type(module).__name__) is not None


def _check_plain(name: str, module: nn.Module) -> None:
    attention = module
    if isinstance(module, nn.TransformerEncoderLayer):
        attention, name = module.self_attn, f"{name}.self_attn"
        if type(attention) is not nn.MultiheadAttention:
            raise CaptureError(
                f"{name} is a {type(attention).__name__}, expected nn.MultiheadAttention, because "
                "the layer's fast path may run in its place; choose the other layers: "
                "capture(model, layers=[...])"
            )
    check_no_added_keys(name, attention.bias_k, attention.add_zero_attn)


def _runs_code_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module's forward is that of `kind`, or hands over to it through `super()`."""
    forward = type(module).forward
    if forward is kind.forward:
        return True
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is None or "__class__" in code.co_freevars


def _is_compiled(module: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None or dynamo._stance.stance == "force_eager":
        return False
    if isinstance(module, dynamo.OptimizedModule) or module._compiled_call_impl is not None:
        return True
    return hasattr(module.forward, "_torchdynamo_orig_callable")
