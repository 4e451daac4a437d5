"""The transitions before decisions: one decision, a batch of them, and a store that grows.

A `Decision` is a state in which a model acts and the transitions before it; a `History` is a batch
of `B` of them, each with `n` transitions in the order of time, and the one type that everything
passes on; a `HistoryBuffer` holds what environments that step together have been through.

    history = History.of([decision, other])
    shorter = history.take(indices)                    # (B, k) indices
    logits = model(*shorter.inputs)                    # (B, A)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

PADDING = -1  # in front of the indices of a decision that keeps fewer than another
AXES = {  # of the fields of a History; W transitions have their attention rows known
    "actions": "Bn", "rewards": "Bn", "episodes": "Bn", "received": "Bn", "query_attention": "Bn",
    "states": "BnS", "next_states": "BnS", "query_states": "BS", "tasks": "B", "last_rows": "BWn",
    "kept": "Bn",
}  # fmt: skip


@dataclass(frozen=True)
class Decision:
    """A state in which a model acts, and the `n` transitions before it in the order of time.

    Arrays, tensors and lists are accepted. Whatever else a transition holds (an image, flattened;
    a continuous action) may be columns of its state.

    Attributes:
        states: `(n,)` or `(n, S)`, the state before each transition.
        actions: `(n,)` int.
        rewards: `(n,)`; above 0 counts as rewarded.
        query_state: a number or `(S,)`, the state to act in.
        next_states: as `states`; None: the state of the transition that follows.
        episodes: `(n,)` int, number of the episode of each transition, never falling; None: one.
        title: says which decision this is, in the titles of pictures.
        labels: columns of metrics.csv that name it.
        task: number of the task, for comparisons between decisions of different tasks.
    """

    states: Any
    actions: Any
    rewards: Any
    query_state: Any
    next_states: Any = None
    episodes: Any = None
    title: str = ""
    labels: dict[str, int | float | str] = field(default_factory=dict)
    task: int | None = None

    @property
    def n(self) -> int:
        """Transitions before the decision."""
        return len(self.rewards)

    @property
    def episode_starts(self) -> np.ndarray:
        """`(E,)` int, transitions at which an episode begins, ascending."""
        if self.episodes is None:
            return np.zeros(min(self.n, 1), dtype=np.int64)
        return np.append(0, np.flatnonzero(np.diff(self.episodes)) + 1)[: self.n]

    @property
    def rewarded(self) -> np.ndarray:
        """`(n,)` bool, transitions that were rewarded."""
        return np.asarray(self.rewards) > 0


@dataclass(frozen=True)
class History:
    """Raw history before each of `B` decisions, and what is known of the attention to it.

    What is None is unknown. Nothing is checked here: `checked` does, where histories enter.

    Attributes:
        states, next_states: `(B, n, S)`, `S` numbers describe a state.
        actions: `(B, n)` int.
        rewards: `(B, n)`.
        query_states: `(B, S)`, the state in which to act.
        episodes: `(B, n)` int, number of the episode of each transition, never falling.
        tasks: `(B,)` int, equal where two histories are of the same task.
        received: `(B, n)`, attention that each transition received from the tokens after it, the
            query not included, summed over them.
        last_rows: `(B, W, n)`, attention rows of the last `W` transitions.
        query_attention: `(B, n)`, the query's attention to each transition, after the softmax.
        kept: `(B, n)` int64, which transitions of the raw history these are, ascending; a decision
            that keeps fewer than another has `PADDING` in front, and any transition there
            (`by_count` splits such a batch). None: nothing was left out, or these are new tokens.
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor
    next_states: Tensor
    query_states: Tensor | None = None
    episodes: Tensor | None = None
    tasks: Tensor | None = None
    received: Tensor | None = None
    last_rows: Tensor | None = None
    query_attention: Tensor | None = None
    kept: Tensor | None = None

    @classmethod
    def of(cls, decisions: Sequence[Decision], device: torch.device | str = "cpu") -> "History":
        """The histories of decisions with equally many transitions, arrays `(n, S)` and `(n,)`.

        Whole numbers become int64, others float32. Tasks and episodes are known where all
        decisions have them.
        """

        def stacked(name: str) -> Tensor | None:
            parts = [getattr(decision, name) for decision in decisions]
            if any(part is None for part in parts):
                return None
            values = torch.from_numpy(np.stack(parts)).to(device)
            return values.float() if values.is_floating_point() else values.long()

        names = ("states", "actions", "rewards", "next_states", "query_state", "episodes", "task")
        return cls(*map(stacked, names))

    def checked(self) -> "History":
        """The same with tensors in place of arrays and lists, for what a user hands over.

        Raises:
            ValueError: shapes that do not fit each other, or attention that is negative or no
                number.
        """
        known = {name: torch.as_tensor(value) for name, value in self._known().items()}
        actions, states = known["actions"], known["states"]
        if actions.ndim != 2 or states.ndim != 3:
            raise ValueError(
                "expected actions of shape (B, n) and states of shape (B, n, S), "
                f"got {tuple(actions.shape)} and {tuple(states.shape)}"
            )
        window = known["last_rows"].shape[1] if "last_rows" in known else 0
        sizes = dict(zip("BnSW", (*actions.shape, states.shape[-1], window), strict=True))
        for name, axes in AXES.items():
            shape = tuple(sizes[axis] for axis in axes)
            if name in known and tuple(known[name].shape) != shape:
                raise ValueError(
                    f"expected {name} of shape {shape} beside actions of shape "
                    f"{tuple(actions.shape)}, got {tuple(known[name].shape)}"
                )
        for name in ("received", "last_rows", "query_attention"):
            if name in known and not ((known[name] >= 0) & known[name].isfinite()).all():
                raise ValueError(f"expected {name} after the softmax: finite and not negative")
        return replace(self, **known)

    @property
    def size(self) -> int:
        """Number of decisions `B`."""
        return self.actions.shape[0]

    @property
    def n(self) -> int:
        """Transitions before each decision, padding of `kept` included."""
        return self.actions.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the actions lie."""
        return self.actions.device

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """States, actions, rewards, next states and query states: what a model reads."""
        return self.states, self.actions, self.rewards, self.next_states, self.query_states

    @property
    def counts(self) -> Tensor:
        """`(B,)` int, transitions that each decision really has."""
        if self.kept is None:
            return torch.full((self.size,), self.n, device=self.device)
        return (self.kept != PADDING).sum(dim=1)

    def take(self, indices: Tensor) -> "History":
        """Keep the transitions at `indices` `(B, k)`, ascending, none twice, padding in front."""
        rows = torch.arange(self.size, device=self.device)[:, None]
        places = indices.clamp(min=0)
        return replace(self._transitions(lambda value: value[rows, places]), kept=indices)

    def latest(self, n: int) -> "History":
        """The latest `n` transitions, or all where there are fewer; nothing counts as left out."""
        return self if n >= self.n else self._transitions(lambda value: value[:, self.n - n :])

    def rows(self, rows: Tensor | slice) -> "History":
        """The decisions at `rows` `(R,)`, which may repeat."""
        return replace(self, **{name: value[rows] for name, value in self._known().items()})

    def by_count(self) -> Iterator[tuple[Tensor, "History"]]:
        """Split into parts of equally many transitions each, without padding, fewest first.

        Yields:
            The rows `(R,)` of the batch, and their history.
        """
        counts = self.counts
        for count in counts.unique(sorted=True).tolist():
            rows = (counts == count).nonzero()[:, 0]
            part = self if len(rows) == self.size else self.rows(rows)
            yield rows, part.latest(count)

    def _known(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def _transitions(self, choose: Callable[[Tensor], Tensor]) -> "History":
        """Some of the transitions: `choose` is given every field as `(B, n, ...)`."""
        known = {name: value for name, value in self._known().items() if AXES[name][:2] == "Bn"}
        chosen = {name: choose(value) for name, value in known.items()}
        if self.last_rows is not None:
            chosen["last_rows"] = choose(self.last_rows.mT).mT
        return replace(self, **chosen)


class HistoryBuffer:
    """Transitions of `B` environments that step together: a store that grows in place.

    The history before a decision may be far longer than what a model can read at once. It is handed
    out as views of the store: nothing is copied, however long it is.

    Args:
        states: `(B, S)`, the first states: the store lies where they do, and is of their type.
        n_steps: transitions that there is place for.
        tasks: `(B,)` int, equal where two environments are of the same task.
    """

    def __init__(
        self, states: Tensor, n_steps: int, tasks: np.ndarray | Tensor | None = None
    ) -> None:
        device, shape = states.device, (len(states), n_steps)
        self.n = 0  # transitions so far
        self._tasks = None if tasks is None else torch.as_tensor(tasks, device=device)
        self._stores = (
            states.new_empty(*shape, states.shape[1]),
            torch.empty(shape, dtype=torch.int64, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
            states.new_empty(*shape, states.shape[1]),
        )
        self._episodes = torch.zeros(n_steps + 1, dtype=torch.int64, device=device)

    def append(
        self, states: Tensor, actions: Tensor, rewards: Tensor, next_states: Tensor, done: bool
    ) -> None:
        """Append one transition of every environment, `(B, S)` or `(B,)`; `done`: an episode ends.

        Rewards are kept as float32.
        """
        transition = (states, actions, rewards, next_states)
        for store, values in zip(self._stores, transition, strict=True):
            store[:, self.n] = values
        self.n += 1
        self._episodes[self.n] = self._episodes[self.n - 1] + int(done)

    def history(self, query_states: Tensor, first: int = 0) -> History:
        """The raw transitions `first .. n - 1` before decisions in `query_states` `(B, S)`.

        Views of the store, which later transitions leave as they are.
        """
        past = slice(first, self.n)
        episodes = self._episodes[past].expand(len(query_states), -1)
        transitions = (store[:, past] for store in self._stores)
        return History(*transitions, query_states, episodes, self._tasks)


def episode_ids(n: int, horizon: int, steps_taken: int | Tensor | np.ndarray) -> Tensor:
    """Number the episodes of `n` transitions before a decision, from 0: `(B, n)` int.

    Args:
        n: transitions.
        horizon: steps of a whole episode; the first may be cut at its front.
        steps_taken: `(B,)` or a number (`B` is 1), steps of the decision's own episode before it.
    """
    taken = torch.as_tensor(steps_taken).reshape(-1, 1)
    from_own = torch.arange(n)[None, :] - (n - taken)  # negative before the decision's episode
    ids = torch.div(from_own, horizon, rounding_mode="floor")
    return ids - ids[:, :1]
