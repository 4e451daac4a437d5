"""The decisions that an adapter gives, read and checked, as arrays of the shapes of a History."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
from torch import Tensor

from historylens.adapter.file import Adapter, kind
from historylens.common.reading import printable
from historylens.common.settings import MOST
from historylens.history import Decision
from historylens.metrics import NAMES

MAX_TITLE = 80  # characters that fit a picture's width
TAKEN = ("sample", "title", "layer", "head", "n_context", *NAMES)
Check = Callable[[bool, str, str, object], None]  # whether an array fits, its name, expected, got
NEEDED, WHOLE = ("states", "actions", "rewards", "query_state"), ("actions", "episodes")


def read_decisions(adapter: Adapter, n: int, seed: int) -> list[Decision]:
    """What an adapter's samples() gives, `n` decisions at most; UserError if one does not fit."""
    given = adapter.call("samples", n, seed)
    is_many = hasattr(given, "__iter__") and not isinstance(given, Decision)
    adapter.check(is_many, "samples()", "a list of Decision", kind(given))
    with adapter.blamed("samples()"):
        given = list(islice(given, n))  # runs a generator, which may have no end
    adapter.check(given, "samples()", f"up to {n} decisions", "none")
    read = [_read(adapter, i, one) for i, one in enumerate(given)]
    sizes = sorted({one.states.shape[1] for one in read})
    adapter.check(len(sizes) == 1, "samples()", "states of one size", f"sizes {sizes}")
    names = ("states", "next_states", "query_state")
    is_whole = all(vars(one)[name].dtype == np.int64 for one in read for name in names)
    dtype = np.int64 if is_whole else np.float32  # the same for all decisions
    return [replace(one, **{name: vars(one)[name].astype(dtype) for name in names}) for one in read]


def read_rewarded(
    adapter: Adapter, decisions: Sequence[Decision], flag: float | None
) -> tuple[float, str]:
    """Above which reward a transition counts as rewarded, and that in words where it is told.

    What the flag says, else the adapter's REWARDED_ABOVE. Where neither does: 0 for rewards of at
    most two values, but the middle of two where the higher is rare and not above 0; else the top
    quarter. UserError: it is no number.
    """
    name, given = "--rewarded-above", flag
    if flag is None:
        name, given = "REWARDED_ABOVE", adapter.get("REWARDED_ABOVE")
    if given is not None:
        is_number = isinstance(given, int | float) and abs(given) <= MOST
        expected = f"a finite number, a reward, {MOST} at most"
        adapter.check(is_number, name, expected, printable(repr(given)))
        return float(given), f"rewards above {given:g}, as {name} says"
    rewards = np.concatenate([one.rewards for one in decisions])
    values = np.unique(rewards)
    is_usual = np.mean(rewards == values[-1]) > 0.5  # as where falling costs 1, and nothing else
    if len(values) == 1 or (len(values) == 2 and (values[1] > 0 or is_usual)):
        return 0.0, ""
    above, what = float(np.quantile(rewards, 0.75)), "the top quarter"
    if len(values) == 2:
        above, what = float(values.mean()), "the higher"
    elif above >= values[-1]:  # more than a quarter are the highest
        above, what = float(values[-2]), "the highest"
    which = f"rewards above {above:.4g}, {what} of those in samples"
    return above, f"{which}; REWARDED_ABOVE or --rewarded-above says otherwise"


def as_array(values: object, whole: bool = False) -> np.ndarray:
    """An array of int64 or float32, or of objects where these do not hold all that is in it.

    `whole`: they stand for whole numbers, which may be floats without a fraction.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        return array.astype(object)
    is_whole = array.dtype.kind in "biu" or (whole and np.array_equal(array, array.round()))
    dtype, most = (np.int64, 2**62) if is_whole else (np.float32, np.finfo(np.float32).max)
    is_held = (np.abs(array) <= most) | ~np.isfinite(array)
    return array.astype(dtype if is_held.all() else object)


def _read(adapter: Adapter, index: int, given: Decision) -> Decision:
    where, arrays = f"samples()[{index}]", {}
    adapter.check(isinstance(given, Decision), where, "a Decision", kind(given))

    def check(is_fit: bool, name: str, expected: str, got: object) -> None:
        adapter.check(is_fit, f"{where}.{name}", expected, got)

    for name in (*NEEDED, "next_states", "episodes", "goal"):
        values = vars(given)[name]
        check(values is not None or name not in NEEDED, name, "an array", kind(values))
        if values is not None:
            with adapter.blamed(f"{where}.{name}"):
                arrays[name] = as_array(values, whole=name in WHOLE)
            is_fit = arrays[name].dtype != object
            check(is_fit, name, "numbers that float32 or int64 holds", kind(values))
    arrays["rewards"] = rewards = arrays["rewards"].astype(np.float32)
    is_fit = rewards.ndim == 1 and len(rewards) > 0
    check(is_fit, "rewards", "shape (n,) with at least one transition", rewards.shape)
    is_fit = (np.abs(rewards) <= MOST).all()
    check(is_fit, "rewards", f"finite numbers, {MOST} at most", "others")
    _shape_states(check, arrays, n=len(rewards))
    arrays.setdefault("episodes", np.zeros(len(rewards), dtype=np.int64))
    for name in WHOLE:
        shape, dtype = arrays[name].shape, arrays[name].dtype
        check(shape == rewards.shape, name, f"shape {rewards.shape}", shape)
        check(dtype == np.int64, name, "whole numbers", dtype)
    never_fall = (np.diff(arrays["episodes"]) >= 0).all()
    check(never_fall, "episodes", "numbers that never fall", "some that do")
    latest, now, task = int(arrays["episodes"][-1]), given.query_episode, given.task
    is_fit = now is None or (isinstance(now, int | np.integer) and latest <= now <= MOST)
    check(is_fit, "query_episode", f"a whole number from {latest} on, the latest episode", now)
    is_fit = task is None or (_is_number(task) and task == int(task))
    check(is_fit, "task", "a whole number", kind(task))
    with adapter.blamed(f"{where}.title"):
        title = " ".join(_shown(given.title).split()) or f"sample {index}"
    title = title if len(title) <= MAX_TITLE else f"{title[: MAX_TITLE - 1]}…"
    labels = _read_labels(check, given.labels)
    return Decision(**arrays, title=title, labels=labels, task=task, query_episode=now)


def _shape_states(check: Check, arrays: dict[str, np.ndarray], n: int) -> None:
    """Bring states and next states to `(n, S)`, the query state to `(S,)`, goals to `(m, S)`."""
    states, query, goal = arrays["states"], arrays["query_state"], arrays.get("goal")
    is_fit = states.ndim in (1, 2) and len(states) == n
    check(is_fit, "states", f"shape ({n},) or ({n}, S), as rewards say", states.shape)
    states, size = states.reshape(n, -1), states[0].size
    check(query.size == size, "query_state", f"{size} numbers, as states", query.shape)
    query = query.reshape(size)
    if goal is not None:
        is_fit = goal.size == size or goal.shape[1:] == (size,)
        check(is_fit, "goal", f"{size} numbers, as states", goal.shape)
        arrays["goal"] = goal.reshape(-1, size)
    after = arrays.get("next_states", np.concatenate([states[1:], query[None]]))
    is_fit = after.size == states.size and after.shape[:1] == (n,)
    check(is_fit, "next_states", "the shape of states", after.shape)
    arrays |= {"states": states, "next_states": after.reshape(n, size), "query_state": query}


def _read_labels(check: Check, labels: object) -> dict[str, int | float | str]:
    """Labels as plain values that a table and JSON can hold."""
    check(isinstance(labels, dict), "labels", "a dict", kind(labels))
    plain, expected = {}, f"a finite number or a string, {MOST} at most"
    for name, value in labels.items():
        value = value.item() if hasattr(value, "item") and np.size(value) == 1 else value
        is_fit = isinstance(value, str) or _is_number(value)
        check(is_fit, f"labels[{name!r}]", expected, kind(value))
        name = _shown(name)
        check(name not in TAKEN, "labels", "names that are no columns of metrics.csv", repr(name))
        plain[name] = _shown(value) if isinstance(value, str) else value
    return plain


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer) and bool(-MOST <= value <= MOST)


def _shown(value: object) -> str:
    """A value as text that files can hold: without halves of characters."""
    return str(value).encode(errors="replace").decode()
