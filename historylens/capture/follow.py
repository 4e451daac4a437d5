"""Follows weights from their softmax to the values: what they have become by then is the attention.

followed[weights] = Weights(("layers.0",), shape)    # that a softmax gave
followed.step("matmul", (weights, values), output)   # after each call; weights where they are met
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# What weights go through on their way to the values, and come out as they are.
_KEEP = {
    "to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach",
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "nan_to_num",
    "dropout", "dropout_", "alpha_dropout", "feature_alpha_dropout", "feature_dropout",
}  # fmt: skip
_TURN = {"__get__", "transpose", "permute", "swapaxes", "swapdims", "movedim"}  # .mT, or other axes
_TAKE = {"__getitem__", "select", "narrow", "chunk", "split", "unbind", "index_select"}
_JOIN = {"cat", "concat", "concatenate", "stack"}
PRODUCTS = {"matmul", "__matmul__", "bmm", "einsum", "baddbmm"}
_GROW = _KEEP | _JOIN | PRODUCTS | {"linear", "conv1d", "conv2d"}  # may give more than they get


class Weights(NamedTuple):
    """What a tensor is that has come of weights which a softmax gave."""

    names: tuple[str, ...]  # of the layer; of several where weights of several were put together
    shape: Sequence[int]  # (B, H, Tq, Tk), whichever axes they have
    is_changed: bool = False
    whole: Tensor | None = None  # what it is a part of, or has other axes than; None: all of them
    is_lost: bool = False  # changed in a way that is not followed


class Followed(WeakIdKeyDictionary):
    """Tensors -> `Weights`, and layers whose weights have `met` values, or were `lost` before."""

    def __init__(self) -> None:
        super().__init__()
        self.met, self.lost, self.changed = set(), set(), set()

    def whole_in(self, args: Iterable) -> tuple[str, Sequence[int]] | None:
        """Layer and shape `(B, H, Tq, Tk)` of weights, all of them, that are among arguments."""
        held = [self[x] for x in args if isinstance(x, Tensor) and x in self]
        is_whole = held and held[0].whole is None and not held[0].is_lost
        return (held[0].names[0], held[0].shape) if is_whole else None

    def step(self, kernel: str, args: Iterable, output: Any) -> tuple[str, Tensor] | None:
        """Go on after a call: layer and weights `(B, H, Tq, Tk)` where changed ones meet values."""
        args = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]
        is_in_place = kernel.endswith("_") and not kernel.startswith("_") and kernel not in _KEEP
        if is_in_place and isinstance(args[0], Tensor):  # so are views of the same memory
            place = args[0].untyped_storage().data_ptr()
            views = [y for y in self if y is not args[0]]
            others = [y for y in views if y.untyped_storage().data_ptr() == place]
            self.update({y: self[y]._replace(is_changed=True) for y in others})
        held = [x for x in args if isinstance(x, Tensor) and x in self]
        if not held:
            return None
        x = min(held, key=lambda x: (not self[x].is_lost, self[x].whole is not None))
        names = tuple(dict.fromkeys(name for y in held for name in self[y].names))
        told = self[x]._replace(names=names)
        is_one = told.is_lost or len(held) == 1
        if kernel in PRODUCTS and is_one and _sums_over_keys(args, x, told):
            (self.lost if told.is_lost else self.met).update(names)
            is_new = told.is_changed and not told.is_lost
            weights = x if told.whole is None else told.whole
            return (names[0], weights.reshape(told.shape)) if is_new else None
        if kernel == "__setitem__":
            is_known = args[0] is x and told.whole is None and not told.is_lost
            self[args[0]] = told._replace(is_changed=True, is_lost=not is_known)
        if kernel in _JOIN and not any(self[y].is_changed or self[y].is_lost for y in held):
            self[output] = told._replace(whole=x)
            return None
        most = max(y.numel() for y in held)
        for y in output if isinstance(output, list | tuple) else [output]:
            if isinstance(y, Tensor) and y.is_floating_point():
                after = _after(kernel, args, x, told, y)
                if after is not None and (kernel in _GROW or y.numel() <= most):
                    self[y] = after
                    self.changed.update(after.names if after.is_changed else ())
        return None


def _after(kernel: str, args: list, x: Tensor, told: Weights, y: Tensor) -> Weights | None:
    """What an output of a call with weights is; None where it cannot be weights."""
    is_all = told.whole is None and x.numel() == y.numel() and x.shape[-2:] == y.shape[-2:]
    if kernel in _KEEP | _TURN | _TAKE:
        if args[0] is not x:  # such as x.type_as(weights)
            return None
        if told.is_lost or (is_all and kernel in _KEEP):
            return told
        if told.whole is None and kernel in _TAKE and x.shape[:-1] == y.shape[:-1]:  # fewer keys
            is_changed = told.is_changed or x.shape == y.shape  # or the same in another order
            return told._replace(shape=(*told.shape[:3], y.shape[-1]), is_changed=is_changed)
        return told._replace(whole=x if told.whole is None else told.whole)
    if is_all and not told.is_lost and len(told.names) == 1:
        own, out = _terms(args, x) if kernel == "einsum" else ("", "")
        if out.endswith(own[-2:]):
            return told._replace(is_changed=True)
    is_sum = y.shape in (x.shape[:-1], (*x.shape[:-1], 1))  # over keys, or queries
    is_none = (is_sum and not told.is_lost) or not _may_be(y.shape, *told.shape[-2:])
    return None if is_none else told._replace(whole=None, is_lost=True)


def _may_be(shape: Sequence[int], n_queries: int, n_keys: int) -> bool:
    """Whether weights can have this shape: with an axis of queries and one of keys, or of both."""
    others = list(shape)
    if n_queries in others:
        others.remove(n_queries)
    is_split = len(others) < len(shape) and n_keys in others
    return is_split or any(n and n % max(1, n_queries * n_keys) == 0 for n in shape)


def _sums_over_keys(args: list, x: Tensor, told: Weights) -> bool:
    """Whether a product sums weights over their keys, as that with the values does."""
    is_own, n_keys = told.whole is None and not told.is_lost, told.shape[-1]
    if isinstance(args[0], str):
        own, out = _terms(args, x)
        sizes = zip(own[::-1], x.shape[::-1], strict=False)  # "..." stands in front
        return own[-1] not in out if is_own else any(c not in out and n == n_keys for c, n in sizes)
    *_, first, _ = (y for y in args if isinstance(y, Tensor))
    return first is x if is_own else x.shape[-1 if first is x else -2] == n_keys


def _terms(args: list, x: Tensor) -> tuple[str, str]:
    """Axes of an operand of `torch.einsum`, and of its output."""
    terms, arrow, out = args[0].replace(" ", "").replace("...", "").partition("->")
    out = out if arrow else "".join(c for c in sorted(terms) if terms.count(c) == 1)
    return terms.split(",")[next(i for i, y in enumerate(args[1:]) if y is x)], out
