"""An adapter's model in its own environments, as something that compare_compression.py can play.

    task = adapter_task(load_adapter("my_model.py"), seed=0, device=device)

The environments speak the vector API of Gymnasium (https://gymnasium.farama.org); nothing here
imports it. An episode is `HORIZON` steps: all environments are reset after so many. One that ends
earlier begins anew at once, and its return is that of the `HORIZON` steps.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from adapter.decisions import as_array
from adapter.file import Adapter, kind
from adapter.subject import AdaptedSubject
from comparison.task import Task
from config import UserError

N_TRIED = 4  # samples that are read to see what the model takes


def adapter_task(adapter: Adapter, seed: int, device: torch.device) -> Task:
    """The model and the environments of an adapter.

    Raises:
        UserError: the adapter lacks an environment, or something does not fit.
    """
    goals, horizon = _read_settings(adapter)
    subject = AdaptedSubject.of(adapter, N_TRIED, seed, device)
    size = subject.decisions[0].states.shape[1]

    def make_room(numbers: np.ndarray) -> "GymRooms":
        return GymRooms(adapter, np.asarray(numbers).tolist(), horizon, size, seed)

    make_room(np.zeros(1, dtype=int)).reset()
    return Task(
        name=f"{type(subject.model).__name__} of {adapter.path.name}",
        view=subject.view,
        make_room=make_room,
        goals=goals,
        best=None,
        horizon=horizon,
        identity={
            "adapter": hashlib.sha256(adapter.path.read_bytes()).hexdigest(),
            "weights": weights_digest(subject.model),
        },
    )


def _read_settings(adapter: Adapter) -> tuple[tuple[str, ...], int]:
    """Names of the tasks, and steps an episode."""
    if not adapter.has("make_env"):
        raise UserError(
            f"{adapter.path}: no make_env(): a comparison plays in an environment: expected "
            "`def make_env(goals) -> gymnasium.vector.VectorEnv`, GOALS and HORIZON"
        )
    goals = getattr(adapter.module, "GOALS", None)
    if not isinstance(goals, Sequence) or isinstance(goals, str) or not goals:
        raise adapter.wrong("GOALS", "a list of names of tasks beside make_env()", kind(goals))
    horizon = getattr(adapter.module, "HORIZON", None)
    if not isinstance(horizon, int) or horizon < 1:
        raise adapter.wrong("HORIZON", "a whole number, the steps of an episode", kind(horizon))
    return tuple(str(goal) for goal in goals), horizon


def weights_digest(model: nn.Module) -> str:
    """Digest of all parameters and buffers of a model."""
    digest = hashlib.sha256()
    for name, values in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(values, torch.Tensor):
            digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class GymRooms:
    """Environments of a Gymnasium vector environment, whose episodes all are `horizon` steps.

    Args:
        adapter: whose make_env() makes them.
        goals: numbers of the tasks, one an environment.
        horizon: steps an episode.
        state_size: numbers `S` of a state.
        seed: of the environments; that of environment i depends on it and i alone.
    """

    def __init__(
        self, adapter: Adapter, goals: list[int], horizon: int, state_size: int, seed: int
    ) -> None:
        self._adapter, self._horizon = adapter, horizon
        self._shape = len(goals), state_size
        self._env = adapter.call("make_env", goals)
        for method in ("reset", "step"):
            if not callable(getattr(self._env, method, None)):
                raise adapter.wrong("make_env()", "a gymnasium.vector.VectorEnv", kind(self._env))
        n_envs = getattr(self._env, "num_envs", len(goals))
        if n_envs != len(goals):
            raise adapter.wrong("make_env()", f"{len(goals)} environments", f"{n_envs}")
        self._seeds: list[int] | None = [seed + i for i in range(len(goals))]
        self._n_steps = 0

    def reset(self) -> np.ndarray:
        """Begin an episode in all of them: `(N, S)` states."""
        with self._adapter.blamed("reset() of make_env()'s environment"):
            given = self._env.reset(seed=self._seeds)
        self._seeds, self._n_steps = None, 0
        if not isinstance(given, tuple) or len(given) != 2:
            raise self._wrong("reset()", "states and a dict", given)
        return self._states(given[0])

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
        if rewards.shape != self._shape[:1]:
            raise self._wrong("step()", f"rewards of shape {self._shape[:1]}", rewards)
        return self._states(states), rewards, is_last

    def _begin_anew(self, states: Any, ended: np.ndarray) -> Any:
        """States after environments that ended early were reset."""
        mode = getattr(self._env, "metadata", {}).get("autoreset_mode")
        name = str(getattr(mode, "name", mode)).upper()
        if name == "SAME_STEP":
            return states
        if name == "DISABLED":
            with self._adapter.blamed("reset() of make_env()'s environment"):
                return self._env.reset(options={"reset_mask": ended})[0]
        raise UserError(
            f"{self._adapter.path}: make_env(): an environment ended after {self._n_steps} of "
            f"HORIZON = {self._horizon} steps: expected all to last that long, or the vector "
            "environment made with autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP"
        )

    def _states(self, given: Any) -> np.ndarray:
        states = as_array(given)
        n, size = self._shape
        if states.dtype == object or states.size != n * size or len(states) != n:
            raise self._wrong("", f"states of {size} numbers, as samples() has them", given)
        return states.reshape(n, size)

    def _wrong(self, method: str, expected: str, given: Any) -> UserError:
        name = f"{method} of make_env()'s environment" if method else "make_env()"
        return self._adapter.wrong(name, expected, kind(given))
