"""The environments of an adapter, in episodes of `HORIZON` steps or shorter ones.

They speak the vector API of Gymnasium (https://gymnasium.farama.org), which nothing here imports.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from historylens.adapter.decisions import as_array
from historylens.adapter.file import SIGNATURES, Adapter, kind
from historylens.common.errors import expect
from historylens.common.reading import printable
from historylens.common.settings import MOST

# What a method of an environment gives, and a dict.
GIVEN = {"reset": ["states"], "step": ["states", "rewards", "terminated", "truncated"]}
FINAL = ("final_obs", "final_observation")  # in infos, where an episode ended in the same step
OURS = "of make_env()'s environment"
TOGETHER = (
    "an environment ended alone, and cannot be reset without the others: expected a SyncVectorEnv "
    "or an AsyncVectorEnv of gymnasium.vector, or one made with "
    "autoreset_mode=AutoresetMode.SAME_STEP"
)


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
    """Rooms of an `Environment`, of tasks `goals`; one that ends early begins anew at once.

    It does in each of the three modes of AutoresetMode, and no action is lost. `state` `(S,)` is
    one of samples(): those here are of its size and type.
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
            ended = np.logical_or(terminated, truncated).astype(bool)
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
