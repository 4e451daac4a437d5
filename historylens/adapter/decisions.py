"""The decisions that an adapter gives, read and checked: arrays of the shapes that a History has.

    decisions = read_decisions(load_adapter("my_model.py"), n=10, seed=0)

What does not fit is told with the number of the decision and the name of the array.
"""

import numpy as np
from torch import Tensor

from adapter.file import Adapter, Decision, kind
from attention.metrics import ALL_METRICS

MAX_TITLE = 80  # characters that fit a picture's width
TAKEN = ("sample", "title", "layer", "head", "n_context", *ALL_METRICS)
ARRAYS = ("states", "actions", "rewards", "query_state", "next_states", "episodes")


def read_decisions(adapter: Adapter, n: int, seed: int) -> list[Decision]:
    """The decisions that an adapter's samples() gives, `n` at most.

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
    decisions = [_as_arrays(adapter, f"samples()[{i}]", one) for i, one in enumerate(given)]
    widths = sorted({decision.states.shape[1] for decision in decisions})
    if len(widths) > 1:
        raise adapter.wrong("samples()", "states of one size", f"sizes {widths}")
    return decisions


def _as_arrays(adapter: Adapter, where: str, decision: Decision) -> Decision:
    """A decision with arrays: states `(n, S)`, the numbers of a query state `(S,)`."""
    if not isinstance(decision, Decision):
        raise adapter.wrong(where, "a Decision", kind(decision))
    given = {name: getattr(decision, name) for name in ARRAYS}
    found = {}
    for name, values in given.items():
        if values is not None:
            with adapter.blamed(f"{where}.{name}"):
                found[name] = as_array(values, whole=name in ("actions", "episodes"))
            if found[name].dtype == object:
                raise adapter.wrong(f"{where}.{name}", "numbers", kind(values))
    for name in ("states", "actions", "rewards", "query_state"):
        if name not in found:
            raise adapter.wrong(f"{where}.{name}", "an array", "nothing (None)")
    n = len(found["rewards"]) if found["rewards"].ndim == 1 else 0
    if not n:
        shape = found["rewards"].shape
        raise adapter.wrong(
            f"{where}.rewards", "shape (n,) with at least one transition", f"{shape}"
        )
    found |= _states(adapter, where, found, n)
    found["rewards"] = found["rewards"].astype(np.float32)
    found.setdefault("episodes", np.zeros(n, dtype=np.int64))
    for name in ("actions", "episodes"):
        if found[name].shape != (n,):
            raise adapter.wrong(f"{where}.{name}", f"shape ({n},)", f"{found[name].shape}")
        if not np.issubdtype(found[name].dtype, np.integer):
            raise adapter.wrong(f"{where}.{name}", "whole numbers", f"{found[name].dtype}")
    if (np.diff(found["episodes"]) < 0).any():
        raise adapter.wrong(f"{where}.episodes", "numbers that never fall", "some that do")
    labels = _plain_labels(adapter, f"{where}.labels", decision.labels)
    title = " ".join(str(decision.title).split())
    title = title if len(title) <= MAX_TITLE else f"{title[: MAX_TITLE - 1]}…"
    return Decision(**found, title=title, labels=labels, task=decision.task)


def _plain_labels(adapter: Adapter, where: str, labels: object) -> dict[str, int | float | str]:
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


def _states(
    adapter: Adapter, where: str, found: dict[str, np.ndarray], n: int
) -> dict[str, np.ndarray]:
    """States, next states `(n, S)` and the query state `(S,)`, all of one type."""
    states, query = found["states"], found["query_state"]
    if states.ndim not in (1, 2) or len(states) != n:
        raise adapter.wrong(
            f"{where}.states", f"shape ({n},) or ({n}, S), as rewards say", f"{states.shape}"
        )
    states, size = states.reshape(n, -1), states[0].size
    if query.size != size:
        raise adapter.wrong(f"{where}.query_state", f"{size} numbers, as states", f"{query.shape}")
    query = query.reshape(size)
    after = found.get("next_states")
    after = np.concatenate([states[1:], query[None]]) if after is None else after
    if after.size != states.size or len(after) != n:
        raise adapter.wrong(f"{where}.next_states", "the shape of states", f"{after.shape}")
    parts = {"states": states, "next_states": after.reshape(n, size), "query_state": query}
    kind_of = np.result_type(*parts.values())
    return {name: part.astype(kind_of) for name, part in parts.items()}


def as_array(values: object, whole: bool = False) -> np.ndarray:
    """An array of int64 or float32 numbers from a tensor, an array or a list.

    Args:
        values: numbers.
        whole: they stand for whole numbers, which may be floats without a fraction.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.dtype == object or array.dtype.kind not in "biuf":
        return array.astype(object)
    if array.dtype.kind in "biu" or (whole and np.array_equal(array, array.round())):
        return array.astype(np.int64)
    return array.astype(np.float32)
