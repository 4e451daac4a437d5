"""What rooms have lived through so far: raw transitions in a store that grows in place.

The history before a decision may be far longer than what a model can read at once. It is handed
out as views of the store: nothing is copied, however long it is.

    lived = Lived(n_rooms=32, n_steps=800, state_size=2)
    lived.append(states, actions, rewards, next_states, done)
    history = lived.history(query_states)                       # a compression.History, (32, n)
"""

import torch
from torch import Tensor

from compression import History


class Lived:
    """Transitions of `B` rooms that step together, at most `n_steps` of them.

    Args:
        n_rooms: rooms `B`.
        n_steps: transitions that there is place for.
        state_size: numbers `S` that describe a state.
        device: where the store lies and what it hands out.
        state_dtype: type of the numbers of a state.
        tasks: `(B,)` int, equal where two rooms are of the same task; handed on to the histories.

    Attributes:
        n: transitions so far.
    """

    def __init__(
        self,
        n_rooms: int,
        n_steps: int,
        state_size: int,
        device: torch.device | str = "cpu",
        state_dtype: torch.dtype = torch.int64,
        tasks: Tensor | None = None,
    ) -> None:
        shape = (n_rooms, n_steps)
        self.n = 0
        self._tasks = None if tasks is None else torch.as_tensor(tasks, device=device)
        self._states = torch.empty(*shape, state_size, dtype=state_dtype, device=device)
        self._next_states = torch.empty_like(self._states)
        self._actions = torch.empty(shape, dtype=torch.int64, device=device)
        self._rewards = torch.empty(shape, dtype=torch.float32, device=device)
        self._episodes = torch.zeros(n_steps + 1, dtype=torch.int64, device=device)

    def append(
        self,
        states: Tensor,
        actions: Tensor,
        rewards: Tensor,
        next_states: Tensor,
        done: bool = False,
    ) -> None:
        """Append one transition of every room.

        Args:
            states, next_states: `(B, S)` of the store's type.
            actions: `(B,)` int.
            rewards: `(B,)`, kept as float32.
            done: whether an episode ends with it, so that the next transition begins another.

        Raises:
            ValueError: the store is full, or shapes or types do not fit it.
        """
        if self.n == self._actions.shape[1]:
            raise ValueError(f"expected at most the {self.n} transitions that there is place for")
        new = {"states": states, "next_states": next_states, "actions": actions, "rewards": rewards}
        for name, value in new.items():
            place = getattr(self, f"_{name}")[:, self.n]
            # Rewards become float32; float states in a store of ints would lose what they say.
            if value.shape != place.shape or (
                name != "rewards" and value.is_floating_point() and not place.is_floating_point()
            ):
                raise ValueError(
                    f"expected {name} {tuple(place.shape)} of {place.dtype}, "
                    f"got {tuple(value.shape)} of {value.dtype}"
                )
        for name, value in new.items():
            getattr(self, f"_{name}")[:, self.n] = value
        self.n += 1
        self._episodes[self.n] = self._episodes[self.n - 1] + int(done)

    def history(self, query_states: Tensor, first: int = 0) -> History:
        """The raw transitions `first .. n - 1` before decisions in `query_states` `(B, S)`.

        Views of the store, which later transitions leave as they are.
        """
        lived = slice(first, self.n)
        return History(
            self._states[:, lived],
            self._actions[:, lived],
            self._rewards[:, lived],
            self._next_states[:, lived],
            query_states=query_states,
            episodes=self._episodes[lived].expand(len(self._actions), -1),
            tasks=self._tasks,
        )
