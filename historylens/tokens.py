"""What each token of a model is: which transition it belongs to, which part of it, which decides.

    tokens = Tokens.of(n=20, parts=("state", "action", "reward"))        # 61 tokens, query last
    sum_rows(layer.query_rows, [tokens] * len(batch))                    # (B, H, 61) -> (B, H, 21)
    order_of_time(tokens)                                                # how pictures order them

A model may read three tokens a transition, a query before or after its history, padding anywhere.
Metrics are about transitions, so they mean the same for all models: the weights of a transition's
tokens are summed, and what lies on tokens of no transition comes last, where the query's own weight
is in a model of one token a transition. Axes: `T` tokens, `n` transitions, `B` samples, `H` heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

NONE = -1  # the transition of a token that belongs to none
QUERY, PADDING = "query", "padding"  # parts of such tokens


@dataclass(frozen=True)
class Tokens:
    """The `T` tokens that a model reads before one decision, in the model's order.

    Attributes:
        transition: `(T,)` int, number of each token's transition in the order of time, from 0; -1
            for a token of none.
        part: `(T,)` what each token holds, for example "state", "action", "reward" or
            "transition"; "query" for the state in which to act, "padding" for what is masked out.
        decides: the token whose output gives the action; negative numbers count from the end.

    Raises:
        ValueError: a map that cannot be.
    """

    transition: np.ndarray
    part: tuple[str, ...]
    decides: int = -1

    def __post_init__(self) -> None:
        numbers = np.asarray(self.transition)
        if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer) or len(numbers) < 2:
            raise ValueError(
                "expected the transition of each token as whole numbers (T,) with T of at least 2, "
                f"got shape {numbers.shape} of {numbers.dtype}"
            )
        n_tokens = len(numbers)
        part = (self.part,) * n_tokens if isinstance(self.part, str) else tuple(self.part)
        if len(part) != n_tokens:
            raise ValueError(f"expected the part of each of {n_tokens} tokens, got {len(part)}")
        if not -n_tokens <= self.decides < n_tokens:
            raise ValueError(
                f"expected the token that decides in 0..{n_tokens - 1}, got {self.decides}"
            )
        if numbers.min() < NONE:
            raise ValueError(
                f"expected transitions from 0, or -1 for none, got {int(numbers.min())}"
            )
        missing = sorted(set(range(int(numbers.max()) + 1)) - set(numbers.tolist()))
        if missing or numbers.max() == NONE:
            raise ValueError(f"no token is of transition {missing[0] if missing else 0}")
        padded = [i for i, name in enumerate(part) if name == PADDING and numbers[i] != NONE]
        if padded:
            raise ValueError(f"token {padded[0]} is padding, so expected it to be of no transition")
        object.__setattr__(self, "transition", numbers.astype(np.int64))
        object.__setattr__(self, "part", part)
        object.__setattr__(self, "decides", int(self.decides) % n_tokens)
        if part[self.decides] == PADDING:
            raise ValueError(f"token {self.decides} decides, so expected it not to be padding")

    @classmethod
    def of(
        cls,
        n: int,
        parts: Sequence[str] = ("transition",),
        query: Literal["last", "first"] = "last",
        decides: int | None = None,
    ) -> "Tokens":
        """The usual layouts: the tokens of `n` transitions, and a query after or before them.

        Args:
            n: transitions.
            parts: what the tokens of each transition are, in order.
            query: where the token of the state to act in stands.
            decides: the token whose output gives the action; None: the query token.
        """
        parts = (parts,) if isinstance(parts, str) else tuple(parts)
        if query not in ("last", "first"):
            raise ValueError(f"expected query as 'last' or 'first', got {query!r}")
        numbers, names = np.repeat(np.arange(n), len(parts)), parts * n
        if query == "first":
            numbers, names = np.append(NONE, numbers), (QUERY, *names)
        else:
            numbers, names = np.append(numbers, NONE), (*names, QUERY)
        if decides is None:
            decides = 0 if query == "first" else -1
        return cls(numbers, names, decides)

    def __len__(self) -> int:
        return len(self.transition)

    @property
    def n(self) -> int:
        """Transitions."""
        return int(self.transition.max()) + 1

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The parts of transitions, each once, in the order of the model."""
        owned = (p for p, t in zip(self.part, self.transition, strict=True) if t != NONE)
        return tuple(dict.fromkeys(owned))

    @cached_property
    def slots(self) -> np.ndarray:
        """`(T,)` place of each token's weight in a summed row: its transition, or `n` for none."""
        return np.where(self.transition == NONE, self.n, self.transition)

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
    """The order in which pictures show tokens: places `(P,)` in the model's order.

    Tokens of no transition first, then the order of time, the one that decides last, whatever its
    place in the model. Padding is left out.
    """
    shown = np.array([i for i, name in enumerate(tokens.part) if name != PADDING])
    own = shown != tokens.decides
    order = np.lexsort((shown, tokens.transition[shown], ~own))
    return shown[order]


def sum_rows(rows: np.ndarray, tokens: Sequence[Tokens]) -> np.ndarray:
    """Sum attention over the tokens of each transition.

    Args:
        rows: `(B, ..., T)` attention over tokens, of `B` samples.
        tokens: what they are, `B` maps of the same `n`.

    Returns:
        `(B, ..., n + 1)` float64: each transition's weight in the order of time, then what lies on
        tokens of no transition.
    """
    rows = np.asarray(rows, dtype=np.float64)
    summed = np.zeros((*rows.shape[:-1], tokens[0].n + 1))
    if all(one is tokens[0] for one in tokens):  # one map for the whole batch
        tokens, rows, totals = tokens[:1], rows[None], summed[None]
    else:
        totals = summed
    for one, row, total in zip(tokens, rows, totals, strict=True):
        order = np.argsort(one.slots, kind="stable")
        slots, starts = np.unique(one.slots[order], return_index=True)
        total[..., slots] = np.add.reduceat(row[..., order], starts, axis=-1)
    return summed


def uniform_rows(visible: np.ndarray) -> np.ndarray:
    """`(B, T)`: a row that weighs all that it may see equally, for `visible (B, T)` bool."""
    return visible / np.maximum(visible.sum(axis=-1, keepdims=True), 1)


def uniform_received(seen: np.ndarray) -> np.ndarray:
    """Attention that each token receives where every token weighs all that it may see equally.

    Args:
        seen: `(T, T)` bool, whether the token of a row may see that of a column.

    Returns:
        `(T,)`: average over the tokens that may see it; NaN where there are none.
    """
    with np.errstate(invalid="ignore"):
        return uniform_rows(seen).sum(axis=0) / seen.sum(axis=0)
