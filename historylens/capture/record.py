"""What a capture leaves behind: the attention of every layer, by name and in order."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from attention.calls import CaptureError


@dataclass(frozen=True)
class LayerAttention:
    """Attention of one layer, float32 on the CPU, before any dropout of weights.

    `H` are the query's heads. In self-attention `Tq = Tk = T`; in cross-attention queries and keys
    are different tokens.

    Attributes:
        name: the layer's name in the model.
        query_rows: `(B, H, Tk)` attention row of the query token: the last, unless another was
            asked for.
        received: `(B, H, Tk)` attention that each position receives, averaged over the queries
            allowed to see it, padded queries left out; NaN where there are none. None if not asked
            for.
        maps: `(M, H, R, C)` attention maps of the chosen samples, NaN where forbidden. A column is
            the mean weight of its tokens. None if not asked for.
        map_rows: `(R,)` int64, token index of each map row; the last is the last token's.
        map_cols: `(C,)` int64, first token index of each map column.
    """

    name: str
    query_rows: Tensor
    received: Tensor | None = None
    maps: Tensor | None = None
    map_rows: Tensor | None = None
    map_cols: Tensor | None = None


class Record(Sequence[LayerAttention]):
    """The captured layers in the order in which they ran, complete once the forward has run.

    Layers that were given one by one keep the order in which they were given.
    """

    def __init__(self, expected: Sequence[str] = (), given: Sequence[str] | None = None) -> None:
        self._expected = tuple(expected)
        self._given = given
        self._found: dict[str, LayerAttention] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layers captured so far, in order."""
        return tuple(layer.name for layer in self._sorted())

    @property
    def layers(self) -> list[LayerAttention]:
        """Every layer.

        Raises:
            CaptureError: a layer has not run yet.
        """
        for name in self._expected:
            if name not in self._found:
                raise CaptureError(
                    f"{name} has not run, so its attention was not captured. Run the model once "
                    "inside `with capture(...)`, uncompiled (torch.compile skips hooks), and give "
                    "capture only layers that this forward uses: capture(model, layers=[...])"
                )
        if not self._found:
            raise CaptureError(
                "nothing is captured yet: no attention of the model has run inside `with "
                "capture(...)`"
            )
        return self._sorted()

    def add(self, layer: LayerAttention) -> None:
        """Take in a layer that has just run."""
        self._found[layer.name] = layer

    def _sorted(self) -> list[LayerAttention]:
        found = list(self._found.values())
        if self._given is None:
            return found
        place = {name: i for i, name in enumerate(self._given)}
        return sorted(found, key=lambda layer: place[_given_name(layer.name)])

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: int | slice) -> LayerAttention | list[LayerAttention]:
        return self.layers[index]


def _given_name(name: str) -> str:
    """Name of the given layer: of "layer 3.attn" and "layer 3 #2" it is "layer 3"."""
    return name.split(".")[0].split(" #")[0]
