"""A batch of histories, and the pieces of which strategies that compress them are made.

`B` decisions, each with the `n` transitions that lie before it in the order of time. Nothing here
knows a model: whoever runs one hands the tensors over and reads them back.

    history = History.from_batch(batch, query_attention=rows[:, :-1])
    shorter = history.take(indices)                    # (B, k) indices
    logits = model(*shorter.inputs)
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

Generator = torch.Generator | np.random.Generator
PADDING = -1  # in front of the indices of a decision that keeps fewer than another


@dataclass(frozen=True)
class History:
    """Raw history before each of `B` decisions, and what is known of the attention to it.

    Arrays are accepted and kept as tensors. What is None is unknown; a strategy that looks at it
    then says so.

    Attributes:
        states, next_states: `(B, n, S)`, `S` numbers describe a state.
        actions: `(B, n)` int.
        rewards: `(B, n)`.
        query_states: `(B, S)`, the state in which to act.
        episodes: `(B, n)` int, number of the episode of each transition, never falling
            (`episode_ids` makes it).
        received: `(B, n)`, attention that each transition received from the tokens after it, the
            query not included, summed over them (`past_attention` makes it).
        last_rows: `(B, W, n)`, attention rows of the last `W` transitions.
        query_attention: `(B, n)`, the query's attention to each transition, after the softmax.
        tasks: `(B,)` int, equal where two histories are of the same task.

    Raises:
        ValueError: shapes that do not fit each other, or attention that is negative or no number.
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor
    next_states: Tensor
    query_states: Tensor | None = None
    episodes: Tensor | None = None
    received: Tensor | None = None
    last_rows: Tensor | None = None
    query_attention: Tensor | None = None
    tasks: Tensor | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None:
                object.__setattr__(self, field.name, torch.as_tensor(value))
        if self.actions.ndim != 2 or self.states.ndim != 3:
            raise ValueError(
                "expected actions of shape (B, n) and states of shape (B, n, S), "
                f"got {tuple(self.actions.shape)} and {tuple(self.states.shape)}"
            )
        size, n, width = *self.actions.shape, self.states.shape[-1]
        window = self.last_rows.shape[1] if self.last_rows is not None else 0
        expected = dict.fromkeys(["rewards", "episodes", "received", "query_attention"], (size, n))
        expected |= dict.fromkeys(["states", "next_states"], (size, n, width))
        expected |= {"query_states": (size, width), "tasks": (size,)}
        expected |= {"last_rows": (size, window, n)}
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(
                    f"expected {name} of shape {shape} beside actions of shape {(size, n)}, "
                    f"got {tuple(value.shape)}"
                )
        for name in ("received", "last_rows", "query_attention"):
            value = getattr(self, name)
            if value is not None and not ((value >= 0) & value.isfinite()).all():
                raise ValueError(f"expected {name} after the softmax: finite and not negative")

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any], **more: Any) -> "History":
        """From a batch of windows with the keys `states, actions, ...`; others are left out."""
        names = ("states", "actions", "rewards", "next_states", "query_states")
        return cls(**{name: batch[name] for name in names if name in batch}, **more)

    @property
    def size(self) -> int:
        """Number of decisions `B`."""
        return self.actions.shape[0]

    @property
    def n(self) -> int:
        """Transitions before each decision."""
        return self.actions.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the actions lie."""
        return self.actions.device

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """States, actions, rewards, next states and query states: what a model reads."""
        if self.query_states is None:
            raise ValueError("expected a history with query_states: no model can act without")
        return self.states, self.actions, self.rewards, self.next_states, self.query_states

    def take(self, indices: Tensor) -> "History":
        """Keep the transitions at `indices` `(B, k)`: ascending, none twice, none padded.

        With `k = n` the history itself is returned. `by_count` splits padded indices.
        """
        if indices.ndim != 2 or indices.shape[0] != self.size:
            raise ValueError(f"expected indices ({self.size}, k), got {tuple(indices.shape)}")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.n:
            raise ValueError(
                f"expected indices in 0..{self.n - 1}, got {int(indices.min())} to "
                f"{int(indices.max())} (padded ones go through by_count)"
            )
        if (indices.diff(dim=1) <= 0).any():
            raise ValueError("expected ascending indices, none twice")
        if indices.shape[1] == self.n:
            return self
        rows = torch.arange(self.size, device=indices.device)[:, None]
        kept = {
            name: value if name in ("query_states", "tasks") else value[rows, indices]
            for name, value in self._known().items()
            if name != "last_rows"
        }
        if self.last_rows is not None:
            window = self.last_rows.shape[1]
            kept["last_rows"] = self.last_rows.gather(2, indices[:, None].expand(-1, window, -1))
        return replace(self, **kept)

    def rows(self, rows: Tensor) -> "History":
        """The decisions at `rows` `(R,)`, which may repeat."""
        return replace(self, **{name: value[rows] for name, value in self._known().items()})

    def _known(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def kept_counts(indices: Tensor) -> Tensor:
    """Transitions really kept by each decision: `(B,)` for `(B, k)` indices, padded or not."""
    return (indices != PADDING).sum(dim=1)


def by_count(history: History, indices: Tensor) -> Iterator[tuple[Tensor, History]]:
    """Split a batch into parts that keep equally many transitions each.

    Args:
        history: the raw history.
        indices: `(B, k)`, padded in front with -1 where a decision keeps fewer than `k`.

    Yields:
        The rows `(R,)` of the batch and their compressed history, fewest transitions first.
    """
    counts = kept_counts(indices)
    for count in counts.unique(sorted=True).tolist():
        rows = (counts == count).nonzero()[:, 0]
        yield rows, history.rows(rows).take(indices[rows, indices.shape[1] - count :])


def compressed_logits(
    logits: Callable[[History], Tensor], history: History, indices: Tensor
) -> Tensor:
    """Action logits `(B, A)` on compressed history; a pass for every count that occurs.

    Args:
        logits: from a history of `R` decisions to `(R, A)`, say `lambda h: model(*h.inputs)`.
        history: the raw history.
        indices: `(B, k)`, padded in front with -1 where a decision keeps fewer than `k`.
    """
    parts = [(rows, logits(part)) for rows, part in by_count(history, indices)]
    order = torch.cat([rows for rows, _ in parts]).argsort()
    return torch.cat([part for _, part in parts])[order]


def episode_ids(n: int, horizon: int, steps_taken: int | Tensor | np.ndarray) -> Tensor:
    """Number the episodes of `n` transitions before a decision, from 0.

    Args:
        n: transitions.
        horizon: steps of a whole episode.
        steps_taken: `(B,)` or a number, steps of the decision's own episode taken before it.

    Returns:
        `(B, n)` int; `(1, n)` for a number. The first episode may be cut at its front.
    """
    taken = torch.as_tensor(steps_taken).reshape(-1, 1)
    from_own = torch.arange(n)[None, :] - (n - taken)  # negative before the decision's episode
    ids = torch.div(from_own, horizon, rounding_mode="floor")
    return ids - ids[:, :1]


def past_attention(maps: Tensor, window: int) -> dict[str, Tensor]:
    """What strategies want to know of the attention among the transitions themselves.

    Args:
        maps: `(B, n, n)`, attention of transition i (row) to transition j, averaged over heads or
            layers; the causally forbidden part is ignored, NaN included.
        window: number of last rows wanted.

    Returns:
        `received (B, n)` and `last_rows (B, min(window, n), n)`, as `History` takes them.
    """
    maps = maps.tril()
    return {"received": maps.sum(dim=1), "last_rows": maps[:, max(0, maps.shape[1] - window) :]}


def uniform(generator: Generator | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Draw float64 numbers in (0, 1) from either kind of generator.

    Raises:
        ValueError: there is no generator.
    """
    if isinstance(generator, np.random.Generator):
        drawn = torch.from_numpy(generator.random(shape))
    elif isinstance(generator, torch.Generator):
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    else:
        raise ValueError(
            f"expected a torch or numpy Generator for what is drawn at random, got {generator!r}"
        )
    return drawn.clamp(1e-300, 1 - 1e-16).to(device)


def best_first(*keys: Tensor) -> Tensor:
    """Order transitions by keys `(B, n)`, the largest first, the most important key first.

    Returns:
        `(B, n)` indices. Where all keys are equal, the more recent transition comes first.
    """
    size, n = keys[0].shape
    order = torch.arange(n - 1, -1, -1, device=keys[0].device).expand(size, n)
    for key in reversed(keys):
        key = key.byte() if key.dtype == torch.bool else key
        ranks = key.gather(1, order).sort(dim=1, descending=True, stable=True).indices
        order = order.gather(1, ranks)
    return order


def keep_best(n_keep: int, *keys: Tensor) -> Tensor:
    """Indices `(B, n_keep)` of the first `n_keep` of `best_first`, in the order of time."""
    return best_first(*keys)[:, :n_keep].sort(dim=1).values


def keep_where(mask: Tensor) -> Tensor:
    """Indices of a mask `(B, n)` in the order of time: `(B, most kept)`, -1 in front."""
    indices = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    indices = indices.masked_fill(~mask, PADDING).sort(dim=1).values
    most = int(mask.sum(dim=1).max()) if len(mask) else 0
    return indices[:, indices.shape[1] - most :]
