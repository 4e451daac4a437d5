"""The environments of an adapter, whose episodes all are `HORIZON` steps.

    rooms = GymRooms(load_adapter("my_model.py"), goals=[0, 1, 1], horizon=20, state=state, seed=0)

They speak the vector API of Gymnasium (https://gymnasium.farama.org); nothing here imports it. All
are reset after `HORIZON` steps. One that ends earlier begins anew at once, and its return is that
of the `HORIZON` steps.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from historylens.adapter.decisions import as_array
from historylens.adapter.file import Adapter, kind
from historylens.common.errors import UserError


def read_tasks(adapter: Adapter) -> tuple[tuple[str, ...], int]:
    """Names of the tasks, and steps an episode.

    Raises:
        UserError: the adapter lacks an environment, or what goes with it.
    """
    if adapter.get("make_env") is None:
        raise UserError(
            f"{adapter.path}: no make_env(): a comparison plays in an environment: expected "
            "`def make_env(goals) -> gymnasium.vector.VectorEnv`, GOALS and HORIZON"
        )
    goals, horizon = adapter.get("GOALS"), adapter.get("HORIZON")
    if not isinstance(goals, Sequence) or isinstance(goals, str) or not goals:
        raise adapter.wrong("GOALS", "a list of names of tasks beside make_env()", kind(goals))
    if not isinstance(horizon, int) or horizon < 1:
        raise adapter.wrong("HORIZON", "a whole number, the steps of an episode", kind(horizon))
    return tuple(str(goal) for goal in goals), horizon


class GymRooms:
    """Environments of a Gymnasium vector environment.

    Args:
        adapter: whose make_env() makes them.
        goals: numbers of the tasks, one an environment.
        horizon: steps an episode.
        state: `(S,)`, a state of samples(): those here are of its size and type.
        seed: of the environments; that of environment i depends on it and i alone.
    """

    def __init__(
        self, adapter: Adapter, goals: list[int], horizon: int, state: np.ndarray, seed: int
    ) -> None:
        self._adapter, self._horizon, self._state = adapter, horizon, state
        self._n_envs = len(goals)
        self._env = adapter.call("make_env", goals)
        if not all(callable(getattr(self._env, name, None)) for name in ("reset", "step")):
            raise adapter.wrong("make_env()", "a gymnasium.vector.VectorEnv", kind(self._env))
        n_envs = getattr(self._env, "num_envs", len(goals))
        if n_envs != len(goals):
            raise adapter.wrong("make_env()", f"{len(goals)} environments", f"{n_envs}")
        self._seeds: list[int] | None = [seed + i for i in range(len(goals))]
        self._n_steps = 0

    def reset(self) -> np.ndarray:
        """Begin an episode in all of them: `(N, S)` states."""
        seeds, self._seeds, self._n_steps = self._seeds, None, 0
        return self._states(self._reset(seed=seeds))

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Act once in all of them: next states `(N, S)`, rewards `(N,)`, end of the episode."""
        with self._adapter.blamed("step() of make_env()'s environment"):
            given = self._env.step(actions)
        if not isinstance(given, tuple) or len(given) != 5:
            raise self._wrong("step()", "states, rewards, terminated, truncated and a dict", given)
        states, rewards, terminated, truncated, _ = given
        self._n_steps += 1
        is_last = self._n_steps == self._horizon
        ended = np.asarray(terminated) | np.asarray(truncated)
        if ended.any() and not is_last:
            states = self._begin_anew(states, ended)
        rewards = np.asarray(rewards, dtype=np.float32)
        if rewards.shape != (self._n_envs,):
            raise self._wrong("step()", f"rewards of shape ({self._n_envs},)", rewards)
        return self._states(states), rewards, is_last

    def _reset(self, **how: Any) -> Any:
        with self._adapter.blamed("reset() of make_env()'s environment"):
            given = self._env.reset(**how)
        if not isinstance(given, tuple) or len(given) != 2:
            raise self._wrong("reset()", "states and a dict", given)
        return given[0]

    def _begin_anew(self, states: Any, ended: np.ndarray) -> Any:
        """States after environments that ended early were reset."""
        mode = getattr(self._env, "metadata", {}).get("autoreset_mode")
        name = str(getattr(mode, "name", mode)).upper()
        if name == "SAME_STEP":
            return states
        if name == "DISABLED":
            return self._reset(options={"reset_mask": ended})
        raise UserError(
            f"{self._adapter.path}: make_env(): an environment ended after {self._n_steps} of "
            f"HORIZON = {self._horizon} steps: expected all to last that long, or the vector "
            "environment made with autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP"
        )

    def _states(self, given: Any) -> np.ndarray:
        n, size, dtype = self._n_envs, self._state.size, self._state.dtype
        states = as_array(given, whole=dtype == np.int64)
        if states.dtype == object or states.size != n * size or states.shape[:1] != (n,):
            raise self._wrong("", f"states of {size} numbers, as samples() has them", given)
        if not np.can_cast(states.dtype, dtype, "same_kind"):
            raise self._wrong("", "states of whole numbers, as samples() has them", given)
        return states.reshape(n, size).astype(dtype)

    def _wrong(self, method: str, expected: str, given: Any) -> UserError:
        name = f"{method} of make_env()'s environment" if method else "make_env()"
        return self._adapter.wrong(name, expected, kind(given))
