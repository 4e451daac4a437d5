"""Which layers a capture takes, by name or by number.

Choice(["decoder", "*.cross_attn"]).has_name("decoder.layers.0.self_attn")             # True
Choice([0, 3]).takes("blocks.3.attn", 3)                                               # True
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from attention.calls import CaptureError


class Choice:
    """Which layers to capture.

    Args:
        layers: names, with wildcards, and numbers in the order in which layers run; None for all.

    Raises:
        CaptureError: there are none, or a number is negative.
    """

    def __init__(self, layers: Sequence[str | int] | str | int | None) -> None:
        if isinstance(layers, str | int):
            layers = [layers]
        self._open = None if layers is None else set(layers)
        self._names = [item for item in layers or () if isinstance(item, str)]
        self._numbers = {item for item in layers or () if isinstance(item, int)}
        if any(number < 0 for number in self._numbers) or (layers is not None and not layers):
            raise CaptureError(
                "expected layers by name or by number from 0 in the order in which they run, got "
                f"{list(layers)}"
            )

    @property
    def is_all(self) -> bool:
        """Whether every layer is taken."""
        return self._open is None

    @property
    def by_number(self) -> bool:
        """Whether a layer is chosen by its number, which is known only once it runs."""
        return bool(self._numbers)

    @property
    def missing(self) -> list[str | int]:
        """What was chosen and has not come."""
        return sorted(self._open or (), key=str)

    def has_name(self, name: str) -> bool:
        """Whether a layer is chosen by its name."""
        return self.is_all or any(matches(name, chosen) for chosen in self._names)

    def takes(self, name: str, number: int) -> bool:
        """Whether to capture the layer that runs as the `number`-th."""
        if self.is_all:
            return True
        matching = {chosen for chosen in self._names if matches(name, chosen)}
        matching |= self._numbers & {number}
        self._open -= matching
        return bool(matching)


def matches(name: str, chosen: str) -> bool:
    """Whether a layer is `chosen`, lies below it or fits its wildcards."""
    name = name.split(" #")[0]
    return name == chosen or name.startswith(f"{chosen}.") or fnmatchcase(name, chosen)
