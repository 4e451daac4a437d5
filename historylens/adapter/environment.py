"""The environments of an adapter, whose episodes all are `HORIZON` steps.

    rooms = GymRooms(Adapter("my_model.py"), state, horizon=20, seed=0, goals=[0, 1, 1])

They speak the vector API of Gymnasium (https://gymnasium.farama.org); nothing here imports it. One
that ends early begins anew at once: its state is the new episode's, its return that of `HORIZON`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from historylens.adapter.decisions import as_array
from historylens.adapter.file import SIGNATURES, Adapter, kind
from historylens.common.errors import expect

# What a method of an environment gives, and a dict.
GIVEN = {"reset": ["states"], "step": ["states", "rewards", "terminated", "truncated"]}


def read_tasks(adapter: Adapter) -> tuple[tuple[str, ...], int]:
    """Names of the tasks, and steps an episode; UserError where an environment is not complete."""
    needed = f"`def {SIGNATURES['make_env']}`, GOALS and HORIZON"
    missing = f"no make_env(): a comparison plays in an environment: expected {needed}"
    expect(adapter.get("make_env"), f"{adapter.path}: {missing}")
    goals, horizon = adapter.get("GOALS"), adapter.get("HORIZON")
    is_list = isinstance(goals, Sequence) and not isinstance(goals, str) and len(goals) > 0
    adapter.check(is_list, "GOALS", "a list of names of tasks beside make_env()", kind(goals))
    is_count = isinstance(horizon, int) and horizon > 0
    adapter.check(is_count, "HORIZON", "a whole number, the steps of an episode", kind(horizon))
    return tuple(map(str, goals)), horizon


class GymRooms:
    """Environments of a Gymnasium vector environment.

    `state` `(S,)` is one of samples(): those here are of its size and type. What happens in
    environment i depends on `seed` and i alone; `goals` `(N,)` int are the numbers of the tasks.
    """

    def __init__(
        self, adapter: Adapter, state: np.ndarray, horizon: int, seed: int, goals: np.ndarray
    ) -> None:
        self._adapter, self._horizon, self._state = adapter, horizon, state
        goals = np.asarray(goals).tolist()
        self._env, self._n_envs = adapter.call("make_env", goals), len(goals)
        is_fit = all(callable(getattr(self._env, name, None)) for name in GIVEN)
        adapter.check(is_fit, "make_env()", "a gymnasium.vector.VectorEnv", kind(self._env))
        n_envs = getattr(self._env, "num_envs", len(goals))
        adapter.check(n_envs == len(goals), "make_env()", f"{len(goals)} environments", n_envs)
        self._seeds: list[int] | None = [seed + i for i in range(len(goals))]
        self._n_steps = 0

    def reset(self) -> np.ndarray:
        """Begin an episode in all of them: `(N, S)` states."""
        seeds, self._seeds, self._n_steps = self._seeds, None, 0
        states, _ = self._call("reset", seed=seeds)
        return self._read_states(states)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Act once in all of them: next states `(N, S)`, rewards `(N,)`, end of the episode."""
        states, rewards, terminated, truncated, _ = self._call("step", actions)
        self._n_steps += 1
        is_last = self._n_steps == self._horizon
        ended = np.asarray(terminated) | np.asarray(truncated)
        if ended.any() and not is_last:
            mode = getattr(self._env, "metadata", {}).get("autoreset_mode")
            mode = str(getattr(mode, "name", mode)).upper()
            early = f"ended after {self._n_steps} of HORIZON = {self._horizon} steps"
            expect(
                mode in ("DISABLED", "SAME_STEP"),
                f"{self._adapter.path}: make_env(): an environment {early}: expected all to last "
                "that long, or the vector environment made with "
                "autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP",
            )
            if mode == "DISABLED":
                states, _ = self._call("reset", options={"reset_mask": ended})
        rewards = np.asarray(rewards, dtype=np.float32)
        is_fit, expected = rewards.shape == (self._n_envs,), f"rewards of shape ({self._n_envs},)"
        self._adapter.check(is_fit, "step() of make_env()'s environment", expected, kind(rewards))
        return self._read_states(states), rewards, is_last

    def _call(self, method: str, *args: Any, **options: Any) -> tuple:
        name, names = f"{method}() of make_env()'s environment", GIVEN[method]
        with self._adapter.blamed(name):
            given = getattr(self._env, method)(*args, **options)
        is_fit = isinstance(given, tuple) and len(given) == len(names) + 1
        self._adapter.check(is_fit, name, f"{', '.join(names)} and a dict", kind(given))
        return given

    def _read_states(self, given: Any) -> np.ndarray:
        n, size, dtype = self._n_envs, self._state.size, self._state.dtype
        states = as_array(given, whole=dtype == np.int64)
        is_fit = states.dtype != object and states.size == n * size and states.shape[:1] == (n,)
        is_whole = np.can_cast(states.dtype, dtype, "same_kind")
        expected = "states of {} numbers, as samples() has them"
        self._adapter.check(is_fit, "make_env()", expected.format(size), kind(given))
        self._adapter.check(is_whole, "make_env()", expected.format("whole"), kind(given))
        return states.reshape(n, size).astype(dtype)
