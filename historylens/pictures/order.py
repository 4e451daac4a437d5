"""The attention of one sample and layer as pictures show it, whatever the model's own order is.

    sample = SampleAttention.of(decision, tokens, layer, 3, 0, uniform_row)
    sample.maps                                     # for the heatmap: a row and a column a token
    sample.query_curves, sample.received_curves     # for the line plot: over transitions
    sample.numbers()                                # what is drawn, for metrics.json

Tokens stand in the order of time, the one that decides last, so that pictures of all models read
alike. Axes: `T` tokens of the model, `P` of them shown (all but padding), `n` transitions, `H`
heads.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from historylens.capture import LayerAttention
from historylens.common.files import rounded
from historylens.history import Decision
from historylens.metrics import uniform_received as causal_received
from historylens.tokens import NONE, PADDING, Tokens, order_of_time, uniform_received


@dataclass(frozen=True)
class Curves:
    """Curves over `n` transitions.

    Attributes:
        names: of the `K` curves: parts of a transition, or empty for one curve a head.
        values: `(K, n)`.
        whole: `(n,)` what they add up to, or their mean.
        uniform: `(n,)` the same under uniform attention.
    """

    names: tuple[str, ...]
    values: np.ndarray
    whole: np.ndarray
    uniform: np.ndarray


def curves(
    heads: np.ndarray, uniform: np.ndarray, tokens: Tokens, combine: Literal["sum", "mean"]
) -> Curves:
    """Curves over transitions: one a part, averaged over heads; one a head of a single part.

    Args:
        heads: `(H, T)` weights on tokens.
        uniform: `(T,)` the same under uniform attention.
        tokens: what they are.
        combine: what becomes of the tokens of a transition.
    """

    def over(chosen: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """`(..., T)` to `(..., n)`, the chosen tokens of a transition added or averaged."""
        owner = tokens.transition[chosen]
        total = np.zeros((*weights.shape[:-1], tokens.n))
        np.add.at(total, (..., owner), weights[..., chosen])
        if combine == "mean":
            total /= np.maximum(np.bincount(owner, minlength=tokens.n), 1)
        return total

    owned = tokens.transition != NONE
    per_head, uniform = over(owned, heads), over(owned, uniform)
    if len(tokens.parts) == 1:
        return Curves((), per_head, per_head.astype(heads.dtype).mean(0), uniform)
    part, mean = np.array(tokens.part), heads.mean(0)
    values = np.stack([over(owned & (part == name), mean) for name in tokens.parts])
    return Curves(tokens.parts, values, per_head.mean(0), uniform)


@dataclass(frozen=True)
class SampleAttention:
    """Attention of one sample and layer, as it is drawn.

    Attributes:
        decision: what was decided.
        tokens: what the model read. In its order are:
        query_rows: `(H, T)` the deciding token's attention.
        received: `(H, T)` attention that each token receives, 0 where nobody may look.
        uniform_row, uniform_received: `(T,)` both, where all weigh equally what they may see.
        maps: `(H, R, C)` weights, NaN where forbidden; the last row is the deciding token's.
        rows: `(R,)` place of each row among the `P` tokens shown, ascending.
        cols: `(C,)` place of the first token of each column, ascending; a column is the mean weight
            of its tokens.
    """

    decision: Decision
    tokens: Tokens
    query_rows: np.ndarray
    received: np.ndarray
    uniform_row: np.ndarray
    uniform_received: np.ndarray
    maps: np.ndarray
    rows: np.ndarray
    cols: np.ndarray

    @classmethod
    def of(
        cls,
        decision: Decision,
        tokens: Tokens,
        layer: LayerAttention,
        place: int,
        map_place: int,
        uniform_row: np.ndarray,
    ) -> "SampleAttention":
        """Pick one sample out of a batch, and order its map.

        Args:
            decision, tokens: what was decided, and what the model read.
            layer: with received attention and maps.
            place: of the sample in the batch.
            map_place: its place among the samples with maps.
            uniform_row: `(T,)` the deciding token's row if it weighed all that it may see equally.
        """
        query_rows, received = layer.query_rows[place].numpy(), layer.received[place].numpy()
        image = layer.maps[map_place].numpy(), layer.map_rows.numpy(), layer.map_cols.numpy()
        return cls(
            decision,
            tokens,
            query_rows,
            np.nan_to_num(received),
            uniform_row,
            np.nan_to_num(_received_evenly(*image, tokens)),
            *_in_order(*image, query_rows, uniform_row > 0, tokens),
        )

    @cached_property
    def shown(self) -> Tokens:
        """The `P` tokens shown, in their order."""
        return self.tokens.take(order_of_time(self.tokens))

    @property
    def on_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens shown at which an episode begins, `(E,)` int, and which are rewarded, `(P - 1,)`.

        The token that decides is left out.
        """
        transition = self.shown.transition[:-1]
        starts = np.searchsorted(np.maximum.accumulate(transition), self.decision.episode_starts)
        starts = np.unique(starts[starts < len(transition)])
        return starts, np.append(self.decision.rewarded, False)[transition]

    @property
    def query_curves(self) -> Curves:
        """What the deciding token attends to."""
        return curves(self.query_rows, self.uniform_row, self.tokens, "sum")

    @property
    def received_curves(self) -> Curves:
        """What each transition receives."""
        return curves(self.received, self.uniform_received, self.tokens, "mean")

    def numbers(self) -> dict[str, Any]:
        """What the pictures show, in the model's order, rounded to 6 significant digits.

        Returns:
            `query_rows` and `received`, each `{"mean": T numbers, "heads": H lists of T}`; then
            `uniform_query_row` and `uniform_received`, `T` numbers each, but for a causal mask and
            a token a transition with the query last: `1 / T` and `metrics.uniform_received`.
        """
        drawn: dict[str, Any] = {}
        for name, weights in (("query_rows", self.query_rows), ("received", self.received)):
            weights = weights.astype(np.float64)
            drawn[name] = {"mean": rounded(weights.mean(0)), "heads": rounded(weights)}
        n_tokens = len(self.tokens)
        is_usual = (
            self.tokens.is_plain
            and np.allclose(self.uniform_row, 1 / n_tokens)
            and np.allclose(self.uniform_received, causal_received(n_tokens))
        )
        if not is_usual:
            drawn["uniform_query_row"] = rounded(self.uniform_row)
            drawn["uniform_received"] = rounded(self.uniform_received)
        return drawn


def _in_order(
    maps: np.ndarray,
    rows: np.ndarray,
    cols: np.ndarray,
    query_rows: np.ndarray,
    visible: np.ndarray,
    tokens: Tokens,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps, rows and columns with the tokens in the order of time.

    A binned map may lack the deciding token's row: it is made of its `(H, T)` attention.
    """
    if tokens.decides not in rows:
        n_seen = np.add.reduceat(visible, cols, dtype=float)
        with np.errstate(invalid="ignore"):
            own = np.add.reduceat(query_rows * visible, cols, axis=1) / n_seen  # 0 / 0: forbidden
        maps = np.concatenate([maps, own[:, None].astype(maps.dtype)], axis=1)
        rows = np.append(rows, tokens.decides)
    order = order_of_time(tokens)
    place = np.full(len(tokens), len(tokens))
    place[order] = np.arange(len(order))
    first, at = np.minimum.reduceat(place, cols), place[rows]
    columns = np.argsort(first)[: np.count_nonzero(first < len(order))]  # padding is left out
    keep = np.argsort(at)[: np.count_nonzero(at < len(order))]
    return maps[:, keep][:, :, columns], at[keep], first[columns]


def _received_evenly(
    maps: np.ndarray, rows: np.ndarray, cols: np.ndarray, tokens: Tokens
) -> np.ndarray:
    """`(T,)`: what each token would receive if every token weighed all that it may see equally.

    Padding does not look. Exact where the map is the matrix itself; in a binned map only a causal
    mask is told from none.
    """
    n_tokens = len(tokens)
    padding = np.array([name == PADDING for name in tokens.part])
    seen = ~np.isnan(maps).all(axis=0) & ~padding[rows][:, None]  # (R, C)
    if len(cols) == n_tokens == len(rows):
        return uniform_received(seen[np.argsort(rows)])
    is_causal = not seen[cols[None] > rows[:, None]].any()
    return causal_received(n_tokens) if is_causal else np.full(n_tokens, 1 / n_tokens)
