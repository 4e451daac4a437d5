"""The decisions that an adapter gives, read and checked: arrays of the shapes that a History has.

    decisions = read_decisions(load_adapter("my_model.py"), n=10, seed=0)

What does not fit is told with the number of the decision and the name of the array.
"""

from dataclasses import replace

import numpy as np
from torch import Tensor

from historylens.adapter.file import Adapter, kind
from historylens.history import Decision
from historylens.metrics import NAMES

MAX_TITLE = 80  # characters that fit a picture's width
TAKEN = ("sample", "title", "layer", "head", "n_context", *NAMES)
NEEDED = ("states", "actions", "rewards", "query_state")


def read_decisions(adapter: Adapter, n: int, seed: int) -> list[Decision]:
    """The decisions that an adapter's samples() gives, `n` at most.

    States are int64 where those of all decisions are whole numbers, else float32.

    Raises:
        UserError: there are none, or one does not fit.
    """
    given = adapter.call("samples", n, seed)
    if isinstance(given, Decision) or not hasattr(given, "__iter__"):
        raise adapter.wrong("samples()", "a list of Decision", kind(given))
    with adapter.blamed("samples()"):
        given = list(given)[:n]  # runs a generator
    if not given:
        raise adapter.wrong("samples()", f"up to {n} decisions", "none")
    read = [_read(adapter, f"samples()[{i}]", i, one) for i, one in enumerate(given)]
    sizes = sorted({one.states.shape[1] for one in read})
    if len(sizes) > 1:
        raise adapter.wrong("samples()", "states of one size", f"sizes {sizes}")
    names = ("states", "next_states", "query_state")
    is_whole = all(vars(one)[name].dtype == np.int64 for one in read for name in names)
    dtype = np.int64 if is_whole else np.float32
    return [replace(one, **{name: vars(one)[name].astype(dtype) for name in names}) for one in read]


def as_array(values: object, whole: bool = False) -> np.ndarray:
    """An array of int64 or float32 numbers from a tensor, an array or a list.

    Args:
        values: numbers; what is none gives an array of objects.
        whole: they stand for whole numbers, which may be floats without a fraction.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        return array.astype(object)
    if array.dtype.kind in "biu" or (whole and np.array_equal(array, array.round())):
        return array.astype(np.int64)
    return array.astype(np.float32)


def _read(adapter: Adapter, where: str, index: int, decision: Decision) -> Decision:
    """A decision with arrays: states `(n, S)`, the numbers of a query state `(S,)`."""
    if not isinstance(decision, Decision):
        raise adapter.wrong(where, "a Decision", kind(decision))
    arrays = {}
    for name in (*NEEDED, "next_states", "episodes"):
        values = vars(decision)[name]
        if values is not None:
            with adapter.blamed(f"{where}.{name}"):
                arrays[name] = as_array(values, whole=name in ("actions", "episodes"))
            if arrays[name].dtype == object:
                raise adapter.wrong(f"{where}.{name}", "numbers", kind(values))
        elif name in NEEDED:
            raise adapter.wrong(f"{where}.{name}", "an array", "nothing (None)")
    shape = arrays["rewards"].shape
    if len(shape) != 1 or not shape[0]:
        raise adapter.wrong(
            f"{where}.rewards", "shape (n,) with at least one transition", f"{shape}"
        )
    arrays |= _read_states(adapter, where, arrays, n=shape[0])
    arrays["rewards"] = arrays["rewards"].astype(np.float32)
    arrays.setdefault("episodes", np.zeros(shape, dtype=np.int64))
    for name in ("actions", "episodes"):
        if arrays[name].shape != shape:
            raise adapter.wrong(f"{where}.{name}", f"shape {shape}", f"{arrays[name].shape}")
        if arrays[name].dtype != np.int64:
            raise adapter.wrong(f"{where}.{name}", "whole numbers", f"{arrays[name].dtype}")
    if (np.diff(arrays["episodes"]) < 0).any():
        raise adapter.wrong(f"{where}.episodes", "numbers that never fall", "some that do")
    if not isinstance(decision.task, int | np.integer | None):
        raise adapter.wrong(f"{where}.task", "a whole number", kind(decision.task))
    labels = _read_labels(adapter, f"{where}.labels", decision.labels)
    title = " ".join(str(decision.title).split()) or f"sample {index}"
    title = title if len(title) <= MAX_TITLE else f"{title[: MAX_TITLE - 1]}…"
    return Decision(**arrays, title=title, labels=labels, task=decision.task)


def _read_states(
    adapter: Adapter, where: str, arrays: dict[str, np.ndarray], n: int
) -> dict[str, np.ndarray]:
    """States and next states `(n, S)`, and the query state `(S,)`."""
    states, query = arrays["states"], arrays["query_state"]
    if states.ndim not in (1, 2) or len(states) != n:
        raise adapter.wrong(
            f"{where}.states", f"shape ({n},) or ({n}, S), as rewards say", f"{states.shape}"
        )
    states, size = states.reshape(n, -1), states[0].size
    if query.size != size:
        raise adapter.wrong(f"{where}.query_state", f"{size} numbers, as states", f"{query.shape}")
    query = query.reshape(size)
    after = arrays.get("next_states", np.concatenate([states[1:], query[None]]))
    if after.size != states.size or after.shape[:1] != (n,):
        raise adapter.wrong(f"{where}.next_states", "the shape of states", f"{after.shape}")
    return {"states": states, "next_states": after.reshape(n, size), "query_state": query}


def _read_labels(adapter: Adapter, where: str, labels: object) -> dict[str, int | float | str]:
    """Labels as plain values that a table and JSON can hold."""
    if not isinstance(labels, dict):
        raise adapter.wrong(where, "a dict", kind(labels))
    plain = {}
    for name, value in labels.items():
        value = value.item() if hasattr(value, "item") and np.size(value) == 1 else value
        is_number = isinstance(value, int | float) and np.isfinite(value)
        if not (is_number or isinstance(value, str)):
            raise adapter.wrong(f"{where}[{name!r}]", "a finite number or a string", kind(value))
        if name in TAKEN:
            raise adapter.wrong(where, "names that are no columns of metrics.csv", repr(name))
        plain[str(name)] = value
    return plain
