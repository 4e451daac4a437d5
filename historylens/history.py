"""The transitions before decisions: one `Decision`, a batch of them, and a store that grows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

CONTEXT = ("states", "actions", "rewards", "next_states")  # what a model reads of a transition
PADDING = -1  # in front of the indices of a decision that keeps fewer than another
AXES = {  # of the fields of a History; W transitions have their attention rows known
    "actions": "Bn", "rewards": "Bn", "episodes": "Bn", "received": "Bn", "query_attention": "Bn",
    "states": "BnS", "next_states": "BnS", "query_states": "BS", "tasks": "B", "last_rows": "BWn",
    "query_episodes": "B",
    "kept": "Bn", "head_attention": "BLHn", "norm": "Bn", "contribution": "Bn",
}  # fmt: skip
# What a look at the model's attention gives; see `historylens.agent.look`.
LOOKS = "query_attention", "head_attention", "norm", "contribution", "received", "last_rows"


@dataclass(frozen=True)
class Decision:
    """A state in which a model acts, and the `n` transitions before it in the order of time."""

    states: Any  # (n,) or (n, S), before each transition; columns may hold whatever else it has
    actions: Any  # (n,) int, an array, tensor or list, as all the others
    rewards: Any  # (n,)
    query_state: Any  # a number or (S,), the state to act in
    next_states: Any = None  # as states; None: the state of the transition that follows
    episodes: Any = None  # (n,) int, number of each one's episode, never falling; None: one
    title: str = ""  # says which decision this is, in the titles of pictures
    labels: dict[str, int | float | str] = field(default_factory=dict)  # columns of metrics.csv
    task: int | None = None  # its number, for comparisons between decisions of different tasks
    query_episode: int | None = None  # the decision's own; None: that of the latest transition
    goal: Any = None  # a state (S,), or (m, S) in the order in which they count, to mark in maps
    # Rewards above it count as rewarded. An adapter says it by REWARDED_ABOVE, for all its samples.
    rewarded_above: float = 0.0

    @property
    def n(self) -> int:
        """Transitions before the decision."""
        return len(self.rewards)

    @property
    def episode_starts(self) -> np.ndarray:
        """`(E,)` int, transitions at which an episode begins, ascending."""
        episodes = np.zeros(self.n) if self.episodes is None else self.episodes
        return np.append(0, np.flatnonzero(np.diff(episodes)) + 1)[: self.n]

    @property
    def rewarded(self) -> np.ndarray:
        """`(n,)` bool, transitions that were rewarded."""
        return np.asarray(self.rewards) > self.rewarded_above


@dataclass(frozen=True)
class History:
    """Raw history before each of `B` decisions, and what is known, not None, of attention to it."""

    states: Tensor  # (B, n, S), S numbers describe a state
    actions: Tensor  # (B, n) int
    rewards: Tensor  # (B, n)
    next_states: Tensor  # (B, n, S)
    query_states: Tensor | None = None  # (B, S), the state in which to act
    episodes: Tensor | None = None  # (B, n) int, number of each one's episode, never falling
    query_episodes: Tensor | None = None  # (B,) int, those in which to act
    tasks: Tensor | None = None  # (B,) int, equal where two histories are of the same task
    received: Tensor | None = None  # (B, n), attention from the tokens after it but the query, sum
    last_rows: Tensor | None = None  # (B, W, n), attention rows of the last W transitions
    query_attention: Tensor | None = None  # (B, n), the query's to each, after the softmax
    head_attention: Tensor | None = None  # (B, L, H, n), that of each head; NaN: a layer has fewer
    norm: Tensor | None = None  # (B, n), the same weighed by what is read, see HeadOutput
    contribution: Tensor | None = None  # (B, n), as norm
    # (B, n) int64, which transitions of the raw history these are, ascending; a decision that keeps
    # fewer than another has PADDING in front, and any transition there (`by_count` splits such a
    # batch). None: nothing was left out, or these are new tokens.
    kept: Tensor | None = None
    rewarded_above: float = 0.0  # rewards above it count as rewarded

    @classmethod
    def of(cls, decisions: Sequence[Decision], device: torch.device | str = "cpu") -> "History":
        """Of decisions with equally many transitions; what one of them lacks is unknown of all."""

        def stacked(name: str) -> Tensor | None:
            parts = [getattr(decision, name) for decision in decisions]
            if any(part is None for part in parts):
                return None
            values = torch.from_numpy(np.stack(parts)).to(device)
            return values.float() if values.is_floating_point() else values.long()

        others = "query_state", "episodes", "query_episode", "task"
        return cls(*map(stacked, (*CONTEXT, *others)), rewarded_above=decisions[0].rewarded_above)

    def checked(self) -> "History":
        """The same, of tensors; ValueError: shapes that do not fit, or attention below 0 or NaN."""
        known = {name: torch.as_tensor(value) for name, value in self._known().items()}
        shapes = {name: tuple(value.shape) for name, value in known.items()}
        actions, states = shapes["actions"], shapes["states"]
        if len(actions) != 2 or len(states) != 3:
            what = "actions of shape (B, n) and states of shape (B, n, S)"
            raise ValueError(f"expected {what}, got {actions} and {states}")
        more = shapes.get("last_rows", (0, 0))[1], *shapes.get("head_attention", (0, 0, 0))[1:3]
        sizes = dict(zip("BnSWLH", (*actions, states[2], *more), strict=True))
        for name, shape in shapes.items():
            expected = tuple(sizes[axis] for axis in AXES[name])
            if shape != expected:
                got = f"beside actions of shape {actions}, got {shape}"
                raise ValueError(f"expected {name} of shape {expected} {got}")
        for name in {*LOOKS} - {"contribution"}:
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
    def rewarded(self) -> Tensor:
        """`(B, n)` bool, transitions that were rewarded."""
        return self.rewards > self.rewarded_above

    @property
    def same_state(self) -> Tensor:
        """`(B, n)` bool, transitions that began in the very state in which to act."""
        return (self.states == self.query_states[:, None]).all(dim=2)

    @property
    def counts(self) -> Tensor:
        """`(B,)` int, transitions that each decision really has."""
        if self.kept is None:
            return torch.full((self.size,), self.n, device=self.device)
        return (self.kept != PADDING).sum(dim=1)

    def take(self, indices: Tensor) -> "History":
        """Keep the transitions at `indices` `(B, k)`, ascending, none twice, padding in front."""
        rows, places = torch.arange(self.size, device=self.device)[:, None], indices.clamp(min=0)
        return replace(self._transitions(lambda value: value[rows, places]), kept=indices)

    def latest(self, n: int) -> "History":
        """The latest `n` transitions, or all where there are fewer; nothing counts as left out."""
        return self if n >= self.n else self._transitions(lambda value: value[:, self.n - n :])

    def rows(self, rows: Tensor | slice) -> "History":
        """The decisions at `rows` `(R,)`, which may repeat."""
        return replace(self, **{name: value[rows] for name, value in self._known().items()})

    def by_count(self) -> Iterator[tuple[Tensor, "History"]]:
        """Rows `(R,)` of decisions that have equally many, fewest first, and their bare history."""
        counts = self.counts
        for count in counts.unique(sorted=True).tolist():
            rows = (counts == count).nonzero()[:, 0]
            part = self if len(rows) == self.size else self.rows(rows)
            yield rows, part.latest(count)

    def _known(self) -> dict[str, Tensor]:
        return {name: vars(self)[name] for name in AXES if vars(self)[name] is not None}

    def _transitions(self, choose: Callable[[Tensor], Tensor]) -> "History":
        """Some of the transitions: `choose` is given every field as `(B, n, ...)`."""
        axes = {name: AXES[name].index("n") for name in self._known() if "n" in AXES[name]}
        chosen = {name: choose(vars(self)[name].movedim(i, 1)) for name, i in axes.items()}
        return replace(self, **{name: chosen[name].movedim(1, i) for name, i in axes.items()})

    def copied(self) -> "History":
        """The same in memory of its own, for code that may write to it."""
        return replace(self, **{name: value.clone() for name, value in self._known().items()})

    def unlooked(self) -> "History":
        """The same, with nothing known of the attention to it."""
        return replace(self, **dict.fromkeys(LOOKS))


class HistoryBuffer:
    """A store of up to `n_steps` transitions of `B` environments; histories are views of it.

    It lies where the first states `(B, S)` do, and is of their type.
    """

    def __init__(self, states: Tensor, n_steps: int, tasks: ArrayLike | None = None) -> None:
        size, width = states.shape
        self.n = 0  # transitions so far
        self._tasks = None if tasks is None else torch.as_tensor(tasks, device=states.device)
        both = states.new_empty(2, size, n_steps, width)  # states and next states
        actions = states.new_empty(size, n_steps, dtype=torch.int64)
        rewards = states.new_empty(size, n_steps, dtype=torch.float32)
        self._stores = both[0], actions, rewards, both[1]
        self._episodes = states.new_zeros(size, n_steps + 1, dtype=torch.int64)

    def append(self, *transition: Tensor, done: Tensor | bool) -> None:
        """Append states, actions, rewards and next states; with `done`, `(B,)`, an episode ends."""
        for store, values in zip(self._stores, transition, strict=True):
            store[:, self.n] = values
        self.n += 1
        self._episodes[:, self.n] = self._episodes[:, self.n - 1] + done

    def history(self, query_states: Tensor, first: int = 0) -> History:
        """Views of transitions `first .. n - 1`, which stay as they are, and queries `(B, S)`."""
        transitions = (store[:, first : self.n] for store in self._stores)
        episodes = self._episodes[:, first : self.n]
        return History(*transitions, query_states, episodes, self._episodes[:, self.n], self._tasks)


def spread_decisions(
    by_task: Sequence[np.ndarray], steps: np.ndarray, n_samples: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Spread `n_samples` decisions, (history, step), over tasks, histories and stages of learning.

    Tasks, and the histories `by_task` of each, take turns. The stages are `n_samples` equal parts
    of the eligible `steps`, ascending, a decision from each, dealt out in random order.
    """
    if n_samples >= len(steps) * sum(map(len, by_task)):
        return [(int(h), int(t)) for histories in by_task for h in histories for t in steps]
    rounds = zip_longest(*(list(histories) * len(steps) for histories in by_task))
    in_turn = (history for each in rounds for history in each if history is not None)
    turns = np.fromiter(islice(in_turn, n_samples), dtype=int)  # (n_samples,) histories
    stages = (rng.permutation(n_samples) + rng.random(n_samples)) / n_samples
    chosen = np.empty(n_samples, dtype=int)
    for history in np.unique(turns):
        own = np.flatnonzero(turns == history)
        own = own[np.argsort(stages[own])]
        chosen[own] = steps[distinct((stages[own] * len(steps)).astype(int), len(steps))]
    return [(int(h), int(t)) for h, t in zip(turns, chosen, strict=True)]


def distinct(indices: np.ndarray, size: int) -> np.ndarray:
    """Ascending indices `(..., n)` below `size`, moved as little as it takes to be distinct."""
    n = indices.shape[-1]
    forward = np.maximum.accumulate(indices - np.arange(n), axis=-1)
    return np.minimum(forward, size - n) + np.arange(n)


def episode_ids(n: int, horizon: int, steps_taken: int | Tensor | np.ndarray) -> Tensor:
    """Number the episodes, of `horizon` steps, of `n` transitions before a decision: `(B, n)` int.

    `steps_taken`: `(B,)` or a number (`B` is 1), those of the decision's own episode before it.
    """
    taken = torch.as_tensor(steps_taken).reshape(-1, 1)
    ids = (torch.arange(-n, 0) + taken) // horizon  # negative before the decision's own episode
    return ids - ids[:, :1]
