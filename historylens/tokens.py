"""What each token of a model is: which transition it belongs to, which part of it, which decides.

Metrics are about transitions, so they mean the same for all models. Axes: `T` tokens, `H` heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

NONE = -1  # the transition of a token that belongs to none
QUERY, PADDING = "query", "padding"  # parts of such tokens
PREVIOUS = "previous"  # how parts begin that a model reads a step after their transition


@dataclass(frozen=True)
class Tokens:
    """The `T` tokens that a model reads before one decision, in its order; ValueError: no map."""

    transition: np.ndarray  # (T,) int, each token's, numbered from 0 in the order of time; -1: none
    part: tuple[str, ...]  # (T,) what each holds, "query" to act in, "padding" if it is masked out
    decides: int = -1  # the token whose output gives the action; negative: from the end

    def __post_init__(self) -> None:
        numbers = np.asarray(self.transition)
        size = numbers.size
        if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer) or not size:
            what = "the transition of each token as whole numbers (T,) with T of at least 1"
            raise ValueError(f"expected {what}, got shape {numbers.shape} of {numbers.dtype}")
        part = (self.part,) * size if isinstance(self.part, str) else tuple(self.part)
        if len(part) != size:
            raise ValueError(f"expected the part of each of {size} tokens, got {len(part)}")
        decides, lowest = int(self.decides), int(numbers.min())
        if not -size <= decides < size:
            raise ValueError(f"expected the token that decides in 0..{size - 1}, got {decides}")
        if lowest < NONE:
            raise ValueError(f"expected transitions from 0, or -1 for none, got {lowest}")
        if missing := {*range(int(numbers.max()) + 1)} - {*numbers.tolist()}:
            raise ValueError(f"no token is of transition {min(missing)}")
        for i, name in enumerate(part):
            if name == PADDING and numbers[i] != NONE:
                raise ValueError(f"token {i} is padding, so expected it to be of no transition")
        decides %= size
        if part[decides] == PADDING:
            raise ValueError(f"token {decides} decides, so expected it not to be padding")
        vars(self).update(transition=numbers.astype(np.int64), part=part, decides=decides)  # frozen

    @classmethod
    def of(
        cls,
        n: int,
        parts: Sequence[str] = ("transition",),
        query: Literal["last", "first"] = "last",
        decides: int | None = None,
    ) -> "Tokens":
        """The parts of `n` transitions, and a query, which decides unless another token does.

        Parts named "previous ..." are of the transition before: the model reads `n + 1` steps, each
        with what the step before brought, of no transition in the first; in the last, whose own is
        still to come, they alone are of one, and its last token decides. `("previous transition",)`
        is a token a step that holds all of that.
        """
        parts = (parts,) if isinstance(parts, str) else tuple(parts)
        before = np.array([name.startswith(PREVIOUS) for name in parts], dtype=int)
        if before.any() and query != "last":
            raise ValueError(f"expected query as 'last' beside {parts}, got {query!r}")
        if query not in ("last", "first"):
            raise ValueError(f"expected query as 'last' or 'first', got {query!r}")
        numbers, names = np.repeat(np.arange(n), len(parts)), parts * n
        if query == "first":
            return cls(np.append(NONE, numbers), (QUERY, *names), decides or 0)
        numbers, ending = np.append(numbers, NONE), (QUERY,)
        if before.any():
            steps = np.arange(n + 1)[:, None] - before  # n of the last step: its state, the query
            numbers = np.where(steps == n, NONE, steps).ravel()  # -1 of the first step: NONE
            ending = [name if is_of else QUERY for name, is_of in zip(parts, before, strict=True)]
        return cls(numbers, (*names, *ending), -1 if decides is None else decides)

    def __len__(self) -> int:
        return len(self.transition)

    @property
    def n(self) -> int:
        """Transitions; 0 where there is no history yet."""
        return int(self.transition.max()) + 1

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The parts of transitions, each once, in the order of the model."""
        owned = (p for p, t in zip(self.part, self.transition, strict=True) if t != NONE)
        return tuple(dict.fromkeys(owned))

    @property
    def is_plain(self) -> bool:
        """Whether there is one token a transition, in the order of time, then the query."""
        plain = np.append(np.arange(self.n), NONE)
        return np.array_equal(self.transition, plain) and self.decides == self.n

    def take(self, places: np.ndarray) -> "Tokens":
        """Some of the tokens, in another order; the one that decides must be among them."""
        decides = int(np.flatnonzero(places == self.decides)[0])
        return Tokens(self.transition[places], [self.part[i] for i in places], decides)


def order_of_time(tokens: Tokens) -> np.ndarray:
    """Places `(P,)` of the tokens that pictures show, in time, last what decides.

    Tokens of no transition stand first, but behind all transitions where the model reads them so.
    """
    shown = np.array([i for i, name in enumerate(tokens.part) if name != PADDING])
    is_now = shown > np.flatnonzero(tokens.transition != NONE).max(initial=-1)
    order = np.lexsort((shown, tokens.transition[shown], is_now, shown == tokens.decides))
    return shown[order]


def sum_rows(rows: np.ndarray, tokens: Sequence[Tokens]) -> np.ndarray:
    """Sum attention `(B, ..., T)` over the tokens of each transition, by `B` maps of the same `n`.

    `(B, ..., n + 1)` float64: each transition's weight in the order of time, then what lies on
    tokens of no transition, where a model of one token a transition has the query's own weight.
    """
    rows, n = np.asarray(rows, dtype=np.float64), tokens[0].n
    summed = totals = np.zeros((*rows.shape[:-1], n + 1))
    if all(one is tokens[0] for one in tokens):  # one map for the whole batch
        tokens, rows, totals = tokens[:1], rows[None], summed[None]
    for one, row, total in zip(tokens, rows, totals, strict=True):
        places = np.where(one.transition == NONE, n, one.transition)
        order = np.argsort(places, kind="stable")
        owned, starts = np.unique(places[order], return_index=True)
        total[..., owned] = np.add.reduceat(row[..., order], starts, axis=-1)
    return summed


def uniform_rows(visible: np.ndarray) -> np.ndarray:
    """`(B, T)`: rows that weigh all that they may see equally, for `visible (B, T)` bool."""
    return visible / np.maximum(visible.sum(axis=-1, keepdims=True), 1)


def uniform_received(seen: np.ndarray) -> np.ndarray:
    """`(T,)`: attention received, mean over those that may see it, where all weigh that equally.

    NaN without any; `seen (T, T)` bool: row sees column.
    """
    with np.errstate(invalid="ignore"):
        return uniform_rows(seen).sum(axis=0) / seen.sum(axis=0)
