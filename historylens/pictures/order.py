"""The attention of one sample and layer as pictures show it, whatever the model's own order is.

Tokens stand in the order of time, the one that decides last. Axes: `T` tokens of the model, `P` of
them shown (all but padding), `n` transitions, `H` heads, `R` rows and `C` columns of a map.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from historylens.capture import LayerAttention
from historylens.common.files import rounded
from historylens.common.text import counted
from historylens.history import Decision
from historylens.metrics import uniform_received as causal_received
from historylens.pictures.page import REWARD
from historylens.tokens import NONE, PADDING, Tokens, order_of_time, sum_rows, uniform_received

EPISODE_GREYS = (200, 238)
MAX_STARTS = 40  # episodes; more boundaries than this hide what they mark


class Curves(NamedTuple):
    """Curves over `n` transitions."""

    names: tuple[str, ...]  # of the K curves: parts of a transition; empty: one curve a head
    values: np.ndarray  # (K, n)
    whole: np.ndarray  # (n,) what they add up to, or their mean
    uniform: np.ndarray  # (n,) the same under uniform attention


def curves(
    heads: np.ndarray, uniform: np.ndarray, tokens: Tokens, combine: Literal["sum", "mean"]
) -> Curves:
    """Of weights `(H, T)` and `(T,)`: one a part, averaged over heads; of one part one a head."""

    def over(weights: np.ndarray, chosen: np.ndarray) -> np.ndarray:  # (..., T) -> (..., n)
        total, n_tokens = (sum_rows(w, [tokens])[..., :-1] for w in (weights * chosen, chosen))
        return total / np.maximum(n_tokens, 1) if combine == "mean" else total

    part, mean = np.array(tokens.part), heads.mean(0)
    per_head, uniform = (over(weights, np.full(len(tokens), True)) for weights in (heads, uniform))
    if len(tokens.parts) < 2:
        return Curves((), per_head, per_head.astype(heads.dtype).mean(0), uniform)
    values = np.stack([over(mean, part == name) for name in tokens.parts])
    return Curves(tokens.parts, values, per_head.mean(0), uniform)


@dataclass(frozen=True)
class SampleAttention:
    """Attention of one sample and layer, as it is drawn. Arrays of `T` are in the model's order."""

    decision: Decision
    tokens: Tokens  # what the model read
    query_rows: np.ndarray  # (H, T) the deciding token's attention
    received: np.ndarray  # (H, T) attention that each token receives, 0 where nobody may look
    uniform_row: np.ndarray  # (T,) the first where all weigh equally what they may see
    uniform_received: np.ndarray  # (T,) the second where they do
    maps: np.ndarray  # (H, R, C) NaN where forbidden; the last row is the deciding token's
    rows: np.ndarray  # (R,) place of each row among the P tokens shown, ascending
    cols: np.ndarray  # (C,) place of the first token of each column, ascending; a column is a mean

    @classmethod
    def of(
        cls, decision: Decision, tokens: Tokens, layer: LayerAttention,
        place: int, map_place: int, uniform_row: np.ndarray,
    ) -> "SampleAttention":  # fmt: skip
        """Pick the sample at `place` of a batch, `map_place` of its maps, and order its map."""
        query_rows, maps = layer.query_rows[place].numpy(), layer.maps[map_place].numpy()
        received = np.nan_to_num(layer.received[place].numpy())
        rows, cols = layer.map_rows.numpy(), layer.map_cols.numpy()
        rows = rows if len(rows) > 1 else np.array([tokens.decides])  # the only query of its layer
        padding = np.array([name == PADDING for name in tokens.part])
        seen = ~np.isnan(maps).all(axis=0) & ~padding[rows][:, None]  # (R, C); padding sees nothing
        if len(cols) == len(tokens) == len(rows):
            even = uniform_received(seen[np.argsort(rows)])
        elif seen[cols[None] > rows[:, None]].any():  # bins tell only a causal mask from none
            even = np.full(len(tokens), 1 / len(tokens))
        else:
            even = causal_received(len(tokens))
        if tokens.decides not in rows:  # a binned map may lack the row that decides
            visible = uniform_row > 0
            n_seen = np.add.reduceat(visible, cols, dtype=float)
            with np.errstate(invalid="ignore"):  # 0 / 0: forbidden
                own = np.add.reduceat(query_rows * visible, cols, axis=1) / n_seen
            maps = np.concatenate([maps, own[:, None].astype(maps.dtype)], axis=1)
            rows = np.append(rows, tokens.decides)
        order = order_of_time(tokens)
        shown_at = np.full(len(tokens), len(tokens))  # padding comes last and is left out
        shown_at[order] = np.arange(len(order))
        at, first = shown_at[rows], np.minimum.reduceat(shown_at, cols)
        keep = np.argsort(at)[: np.count_nonzero(at < len(order))]
        columns = np.argsort(first)[: np.count_nonzero(first < len(order))]
        image = maps[:, keep][:, :, columns], at[keep], first[columns]
        return cls(decision, tokens, query_rows, received, uniform_row, np.nan_to_num(even), *image)

    @cached_property
    def shown(self) -> Tokens:
        """The `P` tokens shown, in their order."""
        return self.tokens.take(order_of_time(self.tokens))

    @property
    def on_tokens(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of all tokens shown but the last: `(E,)` first of an episode, bool owned, rewarded."""
        transition = self.shown.transition[:-1]
        starts = np.searchsorted(np.maximum.accumulate(transition), self.decision.episode_starts)
        starts = np.unique(starts[starts < len(transition)])
        return starts, transition != NONE, np.append(self.decision.rewarded, False)[transition]

    def curves(self) -> tuple[Curves, Curves]:
        """What the deciding token attends to, and what each transition receives."""
        attends = curves(self.query_rows, self.uniform_row, self.tokens, "sum")
        return attends, curves(self.received, self.uniform_received, self.tokens, "mean")

    def numbers(self) -> dict[str, Any]:
        """What the pictures show, in the model's order, rounded to 6 significant digits.

        `query_rows` and `received`, each `{"mean": T numbers, "heads": H lists of T}`; unless they
        are `1 / T` and `metrics.uniform_received` also `uniform_query_row` and `uniform_received`.
        """
        drawn: dict[str, Any] = {}
        for name in ("query_rows", "received"):
            weights = getattr(self, name).astype(np.float64)
            drawn[name] = {"mean": rounded(weights.mean(0)), "heads": rounded(weights)}
        even = {"uniform_query_row": self.uniform_row, "uniform_received": self.uniform_received}
        usual = 1 / len(self.tokens), causal_received(len(self.tokens))
        if not self.tokens.is_plain or not all(map(np.allclose, even.values(), usual)):
            drawn |= {name: rounded(weights) for name, weights in even.items()}
        return drawn


def subtitle(decision: Decision, tokens: Tokens) -> str:
    """The line that says which decision a picture shows, and how long its context is."""
    n_tokens = len(tokens) - tokens.part.count(PADDING)
    query = " and the query: " if tokens.is_plain else ", "
    transitions, read = counted(tokens.n, "transition"), counted(n_tokens, "token")
    return f"{decision.title} · {transitions}{query}T = {read}"


def history_strip(
    starts: np.ndarray, owned: np.ndarray, rewarded: np.ndarray, cells: np.ndarray,
    most: int = MAX_STARTS,
) -> np.ndarray:  # fmt: skip
    """Colours `(C, 3)` uint8 of a strip that shows the history: episodes in greys, rewards in red.

    `starts (E,)`: first token of each episode, `cells (C,)`: of each cell of the strip, both
    ascending; `owned` and `rewarded (N,)` bool: of a transition, and of a rewarded one, the query
    being token `N`. A cell is as red as the share of its tokens that was rewarded, white without
    any of a transition; one grey where episodes are more than `most`.
    """
    number = np.searchsorted(starts[: 1 if len(starts) > most else None], cells, "right")
    grey = np.take(EPISODE_GREYS, np.maximum(number, 1) % 2)[:, None]
    marks = np.pad([rewarded, owned], ((0, 0), (0, 1))).astype(float)
    n_rewarded, n_owned = np.add.reduceat(marks, cells, axis=1)
    share = n_rewarded / np.diff(np.append(cells, len(rewarded) + 1))
    red = np.array(list(bytes.fromhex(REWARD[1:])))
    colours = grey + share[:, None] * (red - grey)
    colours[n_owned == 0] = 255
    return np.rint(colours).astype(np.uint8)
