"""A sample's attention as pictures show it: tokens in the order of time, the one that decides last.

    shown = show(layer, sample, place=3, map_place=0, uniform_row=uniform[3])
    shown.maps, shown.sample                   # for the heatmap: a row and a column a token
    shown.query, shown.received                # for the line plot: curves over transitions

What the model's own order is does not matter to a reader; that pictures of all models read alike
does. Axes: `T` tokens of the model, `P` of them shown (all but padding), `n` transitions, `H`
heads.
"""

from dataclasses import dataclass, replace

import numpy as np

from attention.metrics import uniform_received as causal_received
from attention.record import LayerAttention
from attention.samples import Sample
from attention.tokens import PADDING, Curves, Tokens, arrange, curves, uniform_received


@dataclass(frozen=True)
class Shown:
    """Attention of one sample and layer, as it is drawn.

    Attributes:
        maps: `(H, R, C)` weights, NaN where forbidden; the last row is the deciding token's.
        rows: `(R,)` place of each row among the `P` tokens shown, ascending.
        cols: `(C,)` place of the first token of each column, ascending.
        sample: the sample with a token for each of its transitions: `n_context = P - 1`.
        query: what the deciding token attends to.
        received: what each transition receives.
        uniform: the deciding token's row and the received attention, `(T,)` both in the model's
            order, where all weigh equally what they may see; none of it for plain samples.
    """

    maps: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    sample: Sample
    query: Curves
    received: Curves
    uniform: tuple[np.ndarray, ...] = ()


def show(
    layer: LayerAttention,
    sample: Sample,
    place: int,
    map_place: int,
    uniform_row: np.ndarray | None = None,
) -> Shown:
    """Arrange the attention of one sample.

    Args:
        layer: with received attention and maps.
        sample: the sample.
        place: its place in the batch.
        map_place: its place among the samples with maps.
        uniform_row: `(T,)` the deciding token's row if it weighed all that it may see equally;
            None: every token.
    """
    rows, received = layer.query_rows[place].numpy(), layer.received[place].numpy()
    maps = layer.maps[map_place].numpy()
    map_rows, map_cols = layer.map_rows.numpy(), layer.map_cols.numpy()
    n_tokens = rows.shape[-1]
    even = np.full(n_tokens, 1 / n_tokens) if uniform_row is None else uniform_row
    if sample.tokens is None:
        query = Curves((), rows[:, :-1], rows.mean(0)[:-1], even[:-1])
        even = causal_received(n_tokens)[:-1]
        received = Curves((), received[:, :-1], received.mean(0)[:-1], even)
        return Shown(maps, map_rows, map_cols, sample, query, received)
    tokens = sample.tokens
    received_evenly = _uniform_received(maps, map_rows, map_cols, tokens)
    picture = _arranged_map(maps, map_rows, map_cols, rows, even, tokens)
    return Shown(
        *picture,
        token_sample(sample),
        curves(rows, even, tokens, "sum"),
        curves(np.nan_to_num(received), np.nan_to_num(received_evenly), tokens, "mean"),
        (even, np.nan_to_num(received_evenly)),
    )


def token_sample(sample: Sample) -> Sample:
    """The sample with the `P` tokens that a picture shows in place of its transitions."""
    shown = sample.tokens.take(arrange(sample.tokens))
    context = shown.transition[:-1]
    places = np.searchsorted(np.maximum.accumulate(context), sample.episode_starts)
    return replace(
        sample,
        n_context=len(context),
        episode_starts=np.unique(places[places < len(context)]),
        rewarded=np.append(sample.rewarded, False)[context],
        tokens=shown,
    )


def _arranged_map(
    maps: np.ndarray,
    rows: np.ndarray,
    cols: np.ndarray,
    query_rows: np.ndarray,
    even: np.ndarray,
    tokens: Tokens,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps, rows and columns with the tokens in the order of pictures.

    The last row is made of the deciding token's own `(H, T)` attention, wherever it stands.
    """
    order = arrange(tokens)
    place = np.full(len(tokens), -1)
    place[order] = np.arange(len(order))
    ends = np.append(cols[1:], len(tokens))
    bins = [place[start:end] for start, end in zip(cols, ends, strict=True)]
    first = np.array([one[one >= 0].min() if (one >= 0).any() else -1 for one in bins])
    columns = np.flatnonzero(first >= 0)
    columns = columns[np.argsort(first[columns])]
    keep = np.flatnonzero((place[rows] >= 0) & (rows != tokens.decides))
    keep = keep[np.argsort(place[rows[keep]])]
    n_seen = np.add.reduceat(even > 0, cols, dtype=float)
    with np.errstate(invalid="ignore"):
        last = np.add.reduceat(query_rows * (even > 0), cols, axis=1) / n_seen  # 0 / 0: forbidden
    arranged = np.concatenate([maps[:, keep], last[:, None]], axis=1)[:, :, columns]
    return arranged, np.append(place[rows[keep]], len(order) - 1), first[columns]


def _uniform_received(
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
