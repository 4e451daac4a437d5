"""What an adapter gives, read and checked: decisions, and environments to act in.

These speak the vector API of Gymnasium (https://gymnasium.farama.org), which nothing here imports.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from historylens.adapter.file import SIGNATURES, Adapter, kind
from historylens.common.errors import expect
from historylens.common.reading import printable
from historylens.common.settings import MOST
from historylens.history import Decision
from historylens.metrics import NAMES

MAX_TITLE = 80  # characters that fit a picture's width
TAKEN = ("sample", "title", "layer", "head", "n_context", *NAMES)
Check = Callable[[object, str, str, object], None]  # whether an array fits, its name, expected, got
NEEDED, WHOLE = ("states", "actions", "rewards", "query_state"), ("actions", "episodes")
# What a method of an environment gives, and a dict.
GIVEN = {"reset": ["states"], "step": ["states", "rewards", "terminated", "truncated"]}
FINAL = ("final_obs", "final_observation")  # in infos, where an episode ended in the same step
OURS = "of make_env()'s environment"
TOGETHER = (
    "an environment ended alone, and cannot be reset without the others: expected a SyncVectorEnv "
    "or an AsyncVectorEnv of gymnasium.vector, or one made with "
    "autoreset_mode=AutoresetMode.SAME_STEP"
)


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

    As the flag says, or REWARDED_ABOVE, a number; else 0 for rewards of at most two values, but the
    middle of two where the higher is rare and not above 0; else the top quarter.
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
    """An array of int64 or float32, of objects if these lose some; `whole` floats become int64."""
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

    def check(is_fit: object, name: str, expected: str, got: object) -> None:
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
    check((np.abs(rewards) <= MOST).all(), "rewards", f"finite numbers, {MOST} at most", "others")
    _shape_states(check, arrays, n=len(rewards))
    episodes = arrays.setdefault("episodes", np.zeros(len(rewards), dtype=np.int64))
    for name in WHOLE:
        shape, dtype = arrays[name].shape, arrays[name].dtype
        check(shape == rewards.shape, name, f"shape {rewards.shape}", shape)
        check(dtype == np.int64, name, "whole numbers", dtype)
    check((np.diff(episodes) >= 0).all(), "episodes", "numbers that never fall", "some that do")
    latest, now, task = int(episodes[-1]), given.query_episode, given.task
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


def read_tasks(adapter: Adapter) -> tuple[tuple[str, ...], int]:
    """Names of the tasks, and steps an episode; UserError where an environment is not complete."""
    needed = f"`def {SIGNATURES['make_env']}`, GOALS and HORIZON"
    missing = f"no make_env(): to play takes an environment: expected {needed}"
    expect(adapter.get("make_env"), f"{adapter.path}: {missing}")
    goals, horizon = adapter.get("GOALS"), adapter.get("HORIZON")
    is_list = isinstance(goals, Sequence) and not isinstance(goals, str) and len(goals) > 0
    adapter.check(is_list, "GOALS", "a list of names of tasks beside make_env()", kind(goals))
    is_count = isinstance(horizon, int) and horizon > 0
    adapter.check(is_count, "HORIZON", "a whole number, the steps of an episode", kind(horizon))
    with adapter.blamed("GOALS"):
        return tuple(printable(str(goal)) for goal in goals), horizon


class GymRooms:
    """Rooms of an `Environment`, their states like `state` `(S,)`, which is one of samples().

    One that ends early begins anew at once, in any AutoresetMode: no action is lost.
    """

    def __init__(
        self, adapter: Adapter, state: np.ndarray, horizon: int, goals: np.ndarray, seeds: Sequence
    ) -> None:
        self._adapter, self.horizon, self._state, self._n = adapter, horizon, state, len(goals)
        self._env = adapter.call("make_env", np.asarray(goals).tolist())
        is_fit = all(callable(getattr(self._env, name, None)) for name in GIVEN)
        adapter.check(is_fit, "make_env()", "a gymnasium.vector.VectorEnv", kind(self._env))
        n_envs = getattr(self._env, "num_envs", self._n)
        adapter.check(n_envs == self._n, "make_env()", f"{self._n} environments", n_envs)
        told = getattr(self._env, "metadata", None)
        mode = told.get("autoreset_mode") if isinstance(told, Mapping) else None
        self._mode = str(getattr(mode, "name", mode)).upper()  # how it begins anew; or NONE
        self._seed: int | None = int(seeds[0])  # environment i takes it + i
        self._begun = np.zeros(self._n, dtype=bool)  # those that began anew in the last step
        self._due = self._begun  # those that ended in it, and have not begun anew

    def __del__(self) -> None:
        with suppress(Exception):  # gymnasium would kill processes, which say so
            self._env.close()

    @property
    def states(self) -> np.ndarray:
        """`(N, S)` to act in: those that ended have begun anew. UserError: one of them cannot."""
        if self._due.any():
            before, others = self._states, ~self._due
            self._reset(self._due)
            is_alone = not others.any() or self._mode != "NONE"
            is_alone &= np.array_equal(self._states[others], before[others], True)
            expect(is_alone, f"{self._adapter.path}: make_env(): {TOGETHER}")
        return self._states

    def reset(self) -> np.ndarray:
        """Begin an episode in all that have not just begun one: `(N, S)` states."""
        if not self._begun.all():
            self._reset(~self._begun)
        return self._states

    def _reset(self, which: np.ndarray) -> None:
        seed, self._seed = self._seed, None
        options = {"seed": seed} if which.all() else {"options": {"reset_mask": which.copy()}}
        self._states = self._read_states(self._call("reset", **options)[0])
        self._due = np.zeros_like(which)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Act once in all of them: states reached `(N, S)`, rewards `(N,)`, whose episode ended."""
        _ = self.states
        states, rewards, terminated, truncated, infos = self._call("step", actions)
        with self._adapter.blamed(f"what step() gives {OURS}"):
            rewards, infos = as_array(rewards), dict(infos)
            ended = np.logical_or(as_array(terminated), as_array(truncated)).astype(bool)
        for what, values in (("rewards", rewards), ("ends", ended)):
            is_fit = values.dtype != object and values.shape == (self._n,)
            is_fit = is_fit and (np.abs(values) <= MOST).all()
            expected = f"{what} of shape ({self._n},), finite, {MOST} at most"
            self._adapter.check(is_fit, f"step() {OURS}", expected, kind(values))
        self._states = reached = self._read_states(states)
        final = next((infos[key] for key in FINAL if key in infos), None)
        is_anew = final is not None or self._mode == "SAME_STEP"
        self._begun, self._due = ended & is_anew, ended & (not is_anew)
        if self._begun.any():
            reached = self._with_final(reached, final)
        return reached, rewards.astype(np.float32), ended

    def _with_final(self, states: np.ndarray, final: Any) -> np.ndarray:
        """The states, and of those that began anew the last before, which `final` holds."""
        check, last = self._adapter.check, list(states)
        for i in np.flatnonzero(self._begun):
            is_fit = final is not None and len(final) == self._n and final[i] is not None
            expected = "infos['final_obs'] of every environment whose episode ended"
            check(is_fit, f"step() {OURS}", expected, kind(final))
            last[i] = as_array(final[i]).reshape(-1)
            is_fit, expected = last[i].size == states[i].size, f"{states[i].size} numbers"
            check(is_fit, "infos['final_obs']", expected, kind(final[i]))
        return self._read_states(np.stack(last))

    def _call(self, method: str, *args: Any, **options: Any) -> tuple:
        with self._adapter.blamed(name := f"{method}() {OURS}"):
            given = getattr(self._env, method)(*args, **options)
        is_fit = isinstance(given, tuple) and len(given) == len(GIVEN[method]) + 1
        self._adapter.check(is_fit, name, f"{', '.join(GIVEN[method])} and a dict", kind(given))
        return given

    def _read_states(self, given: Any) -> np.ndarray:
        check, n, size, dtype = self._adapter.check, self._n, self._state.size, self._state.dtype
        with self._adapter.blamed("what make_env()'s environment gives"):
            states = as_array(given, whole=dtype == np.int64)
        is_fit = states.dtype != object and states.size == n * size and states.shape[:1] == (n,)
        is_whole = np.can_cast(states.dtype, dtype, "same_kind")
        expected = "states of {} numbers, as samples() has them"
        check(is_fit, "make_env()", expected.format(size), kind(given))
        check(is_whole, "make_env()", expected.format("whole"), kind(given))
        return states.reshape(n, size).astype(dtype)
