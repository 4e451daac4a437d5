"""How far attention ranks transitions by what they do to the action.

Leave-one-out runs the model without each transition in turn: that is what a transition does. The
rank correlation with the query's attention, for every layer and head, says how far attention may
be taken as a guide (Jain and Wallace 2019, arXiv 1902.10186, section 4.2).

    found = measure_faithfulness(Analysis(subject, layers=[0, 1, 2, 3]), indices=[0, 5])
    found.overall, found.best_head

Axes: `B` decisions, `H` heads, `L` layers, `n` transitions before each decision.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from analysis import Analysis
from attention.tokens import sum_rows
from compression import leave_one_out
from compression.oracles import DECIMALS
from effects.measure import MAX_TOKENS, spread

MAX_LEFT_OUT_TOKENS = 40_000  # tokens run for leave-one-out, if that does for one decision


@dataclass(frozen=True)
class Faithfulness:
    """Spearman correlations of attention with leave-one-out KL, over transitions.

    NaN where it is not defined: attention or effects that are all equal.

    Attributes:
        samples: numbers of the decisions.
        layers: numbers of the layers.
        head_numbers: numbers of the heads, a tuple a layer.
        heads: an array `(B, H)` a layer.
        layer_means: `(L, B)`, of attention averaged over a layer's heads.
        means: `(B,)`, of attention averaged over layers and heads.
        recency: `(B,)`, of the place in time: what ranking the latest first would reach.
        kl: `(B, n)` float64 nats, KL(full || without the transition).
        flips: `(B, n)` bool, whether the most likely action is another one.
    """

    samples: tuple[int, ...]
    layers: tuple[int, ...]
    head_numbers: tuple[tuple[int, ...], ...]
    heads: tuple[np.ndarray, ...]
    layer_means: np.ndarray
    means: np.ndarray
    recency: np.ndarray
    kl: np.ndarray
    flips: np.ndarray

    @property
    def overall(self) -> float:
        """Correlation of attention averaged over layers and heads, mean over decisions."""
        return float(mean_defined(self.means))

    @property
    def best_head(self) -> tuple[int, int, float] | None:
        """Layer, head and mean correlation of the head that ranks best; None without any."""
        found = [
            (float(value), -layer, -head)
            for layer, numbers, heads in zip(
                self.layers, self.head_numbers, self.heads, strict=True
            )
            for head, value in zip(numbers, mean_defined(heads), strict=True)
            if np.isfinite(value)
        ]
        if not found:
            return None
        value, layer, head = max(found)
        return -layer, -head, value


def mean_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis, of what is not NaN; NaN where all is."""
    defined = np.isfinite(values)
    total = np.where(defined, values, 0.0).sum(axis=0)
    count = defined.sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def average_ranks(values: ArrayLike) -> np.ndarray:
    """Ranks `(n,)` from 1, ascending; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman rank correlation of `(n,)` with `(n,)`; NaN where either is constant."""
    a, b = average_ranks(x), average_ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(np.clip(a @ b / scale, -1.0, 1.0)) if scale > 0 else float("nan")


def affordable(samples: Sequence[int], n: int) -> list[int]:
    """Those of the decisions that leave-one-out takes: as many as the tokens allow, at least one.

    Args:
        samples: numbers of decisions.
        n: transitions before each.
    """
    n_wanted = max(1, MAX_LEFT_OUT_TOKENS // max(1, n * n))
    return [samples[i] for i in spread(len(samples), n_wanted)]


@torch.inference_mode()
def measure_faithfulness(
    analysis: Analysis,
    indices: Sequence[int],
    step: Callable[[], object] = lambda: None,
) -> Faithfulness | None:
    """Correlate attention with leave-one-out effects.

    Args:
        analysis: a subject, and which of its layers and heads are analysed.
        indices: numbers of decisions of one length.
        step: called after each decision, for a progress bar.

    Returns:
        The correlations; None where the histories are longer than what the model can read, or
        nothing.
    """
    view, history = analysis.subject.view, analysis.subject.history(indices)
    if not 0 < history.n <= view.n_max:
        return None
    numbers, attention = query_attention(analysis, indices)
    kl, flips = [], []
    for i in range(history.size):
        one = history.rows(torch.tensor([i], device=history.device))
        effect = leave_one_out(view.logits, one, max(1, MAX_TOKENS // (history.n + 1)))
        kl.append(effect.kl[0].cpu().numpy())
        flips.append(effect.flips[0].cpu().numpy())
        step()
    ranked = [values.round(DECIMALS) for values in kl]
    by_layer = [part.mean(axis=1) for part in attention]

    def correlate(values: np.ndarray) -> np.ndarray:  # (B, n) -> (B,)
        return np.array([spearman(*pair) for pair in zip(values, ranked, strict=True)])

    return Faithfulness(
        samples=tuple(indices),
        layers=tuple(analysis.layers),
        head_numbers=numbers,
        heads=tuple(
            np.stack([correlate(part[:, head]) for head in range(part.shape[1])], axis=1)
            for part in attention
        ),
        layer_means=np.stack([correlate(part) for part in by_layer]),
        means=correlate(np.mean(by_layer, axis=0)),
        recency=correlate(np.tile(np.arange(history.n), (len(kl), 1))),
        kl=np.stack(kl),
        flips=np.stack(flips),
    )


def query_attention(
    analysis: Analysis, indices: Sequence[int]
) -> tuple[tuple[tuple[int, ...], ...], list[np.ndarray]]:
    """The query's attention to transitions, in one pass: head numbers, `(B, H, n)` a layer."""
    subject = analysis.subject
    tokens = subject.tokens(indices)
    with (
        torch.inference_mode(),
        subject.captured(analysis.layers, indices, received=False) as record,
    ):
        subject.forward(indices)
    numbers, rows = [], []
    for layer in record:
        own = list(analysis.heads or range(layer.query_rows.shape[1]))
        numbers.append(tuple(own))
        part = layer.query_rows[:, own].double().numpy()
        rows.append(part if tokens is None else sum_rows(part, tokens))
    return tuple(numbers), [part[:, :, :-1] for part in rows]
