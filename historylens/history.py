"""The transitions before decisions: one `Decision`, a batch of them, and a store that grows.

history = History.of([decision, other])            # B decisions, n transitions before each
shorter = history.take(indices)                    # (B, k) indices
logits = model(*shorter.inputs)                    # (B, A)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

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
    """A state in which a model acts, and the `n` transitions before it in the order of time.

    Arrays, tensors or lists; what else a transition holds may be columns of its state.

    Attributes:
        states: `(n,)` or `(n, S)`, the state before each transition.
        actions: `(n,)` int.
        rewards: `(n,)`.
        query_state: a number or `(S,)`, the state to act in.
        next_states: as `states`; None: the state of the transition that follows.
        episodes: `(n,)` int, number of the episode of each transition, never falling; None: one.
        title: says which decision this is, in the titles of pictures.
        labels: columns of metrics.csv that name it.
        task: number of the task, for comparisons between decisions of different tasks.
        query_episode: number of the episode in which the decision is made; None: that of the latest
            transition.
        goal: a state `(S,)` that is the goal, or `(m, S)` several in the order in which they count,
            to be marked in maps of a room; None: not known.
        rewarded_above: rewards above it count as rewarded. Of an adapter's samples it is not read:
            REWARDED_ABOVE says it for all of them.
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
    query_episode: int | None = None
    goal: Any = None
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
    """Raw history before each of `B` decisions, and what is known of the attention to it.

    Nothing is checked here: `checked` does, where histories enter. What is None is unknown.

    Attributes:
        states, next_states: `(B, n, S)`, `S` numbers describe a state.
        actions: `(B, n)` int.
        rewards: `(B, n)`.
        query_states: `(B, S)`, the state in which to act.
        episodes: `(B, n)` int, number of the episode of each transition, never falling.
        query_episodes: `(B,)` int, numbers of the episodes in which to act.
        tasks: `(B,)` int, equal where two histories are of the same task.
        received: `(B, n)`, attention that each transition received from the tokens after it, the
            query not included, summed over them.
        last_rows: `(B, W, n)`, attention rows of the last `W` transitions.
        query_attention: `(B, n)`, the query's attention to each transition, after the softmax.
        head_attention: `(B, L, H, n)`, the same of each head; NaN where a layer has fewer.
        norm, contribution: `(B, n)`, the same weighed by what is read, see `HeadOutput`.
        kept: `(B, n)` int64, which transitions of the raw history these are, ascending; a decision
            that keeps fewer than another has `PADDING` in front, and any transition there
            (`by_count` splits such a batch). None: nothing was left out, or these are new tokens.
        rewarded_above: rewards above it count as rewarded.
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor
    next_states: Tensor
    query_states: Tensor | None = None
    episodes: Tensor | None = None
    query_episodes: Tensor | None = None
    tasks: Tensor | None = None
    received: Tensor | None = None
    last_rows: Tensor | None = None
    query_attention: Tensor | None = None
    head_attention: Tensor | None = None
    norm: Tensor | None = None
    contribution: Tensor | None = None
    kept: Tensor | None = None
    rewarded_above: float = 0.0

    @classmethod
    def of(cls, decisions: Sequence[Decision], device: torch.device | str = "cpu") -> "History":
        """Of decisions with equally many transitions; what one of them lacks is unknown of all."""

        def stacked(name: str) -> Tensor | None:
            parts = [getattr(decision, name) for decision in decisions]
            if any(part is None for part in parts):
                return None
            values = torch.from_numpy(np.stack(parts)).to(device)  # int64 or float32
            return values.float() if values.is_floating_point() else values.long()

        names = ("states", "actions", "rewards", "next_states", "query_state", "episodes")
        more = map(stacked, (*names, "query_episode", "task"))
        return cls(*more, rewarded_above=decisions[0].rewarded_above)

    def checked(self) -> "History":
        """The same, of tensors; ValueError: shapes that do not fit, or attention below 0 or NaN."""
        known = {name: torch.as_tensor(value) for name, value in self._known().items()}
        shapes = {name: tuple(value.shape) for name, value in known.items()}
        actions, states = shapes["actions"], shapes["states"]
        if len(actions) != 2 or len(states) != 3:
            expected = "actions of shape (B, n) and states of shape (B, n, S)"
            raise ValueError(f"expected {expected}, got {actions} and {states}")
        window = shapes.get("last_rows", (0, 0))[1]
        layers = shapes.get("head_attention", (0, 0, 0))[1:3]
        sizes = dict(zip("BnSWLH", (*actions, states[2], window, *layers), strict=True))
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
        chosen = {}
        for name, value in self._known().items():
            if (axis := AXES[name].find("n")) > 0:
                chosen[name] = choose(value.movedim(axis, 1)).movedim(1, axis)
        return replace(self, **chosen)

    def unlooked(self) -> "History":
        """The same, with nothing known of the attention to it."""
        return replace(self, **dict.fromkeys(LOOKS))


class HistoryBuffer:
    """Transitions of `B` environments that step together, at most `n_steps`: a store that grows.

    Histories, far longer than what a model can read at once, are views of it: nothing is copied. It
    lies where the first states `(B, S)` do, and is of their type; `tasks` `(B,)` as in a `History`.
    """

    def __init__(self, states: Tensor, n_steps: int, tasks: ArrayLike | None = None) -> None:
        size, width = states.shape
        self.n = 0  # transitions so far
        self._tasks = None if tasks is None else torch.as_tensor(tasks, device=states.device)
        self._stores = (
            states.new_empty(size, n_steps, width),
            states.new_empty(size, n_steps, dtype=torch.int64),
            states.new_empty(size, n_steps, dtype=torch.float32),
            states.new_empty(size, n_steps, width),
        )
        self._episodes = states.new_zeros(size, n_steps + 1, dtype=torch.int64)

    def append(
        self,
        states: Tensor,
        actions: Tensor,
        rewards: Tensor,
        next_states: Tensor,
        done: Tensor | bool,
    ) -> None:
        """Append a transition of every environment, `(B, S)` or `(B,)`.

        `done`, `(B,)` or one for all: with it an episode ends.
        """
        transition = (states, actions, rewards, next_states)
        for store, values in zip(self._stores, transition, strict=True):
            store[:, self.n] = values
        self.n += 1
        done = torch.as_tensor(done, device=self._episodes.device)
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

    Tasks take turns, and so do the histories of each, whose numbers `by_task` holds. The stages
    divide the eligible `steps`, ascending, into `n_samples` equal parts, one decision from each,
    dealt out to the tasks in random order. Where fewer are eligible, all of them are taken.
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
