"""How far attention ranks transitions by what they do to the action.

Leave-one-out runs the model without each transition in turn: that is what a transition does. The
rank correlation with the query's attention, for every layer and head, says how far attention may
be taken as a guide (Jain and Wallace 2019, arXiv 1902.10186, section 4.2).

    faithfulness = measure_faithfulness(trial, layers=[0, 1], heads=[[0, 1, 2, 3]] * 2)
    faithfulness.means, faithfulness.best_head

Axes: `B` decisions, `H` heads, `L` layers, `n` transitions before each decision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm import tqdm

from historylens.agent import Agent
from historylens.common.batches import MAX_TOKENS_ACTING
from historylens.common.text import aligned, counted, wrap
from historylens.effects.effect import kl_divergence
from historylens.effects.measure import Trial, spread
from historylens.history import History

MAX_LEFT_OUT_TOKENS = 40_000  # tokens run for leave-one-out, if that does for one decision
DECIMALS = 7  # divergences closer than this are equal: noise of float32 logits


@dataclass(frozen=True)
class Faithfulness:
    """Spearman correlations of attention with leave-one-out KL, over transitions.

    NaN where it is not defined: attention or effects that are all equal.

    Attributes:
        samples: numbers of the decisions.
        layers: numbers of the layers.
        heads: numbers of their heads, for each layer.
        correlations: `(B, L, H + 1)`, of each head, and last of their average; NaN behind the heads
            of a layer that has fewer.
        means: `(B,)`, of attention averaged over layers and heads.
        recency: `(B,)`, of the place in time: what ranking the latest first would reach.
        kl: `(B, n)` float64 nats, KL(full || without the transition).
        flips: `(B,)` share of the transitions without which the most likely action is another one.
    """

    samples: Sequence[int]
    layers: Sequence[int]
    heads: Sequence[Sequence[int]]
    correlations: np.ndarray
    means: np.ndarray
    recency: np.ndarray
    kl: np.ndarray
    flips: Sequence[float]

    @property
    def best_head(self) -> tuple[int, int, float] | None:
        """Layer, head and mean correlation of the head that ranks best; None without any."""
        mean = mean_defined(self.correlations)[:, :-1]  # (L, H)
        if np.isnan(mean).all():
            return None
        i, j = np.unravel_index(np.nanargmax(mean), mean.shape)  # the first among equals
        return self.layers[i], self.heads[i][j], float(mean[i, j])

    def json(self) -> dict[str, Any]:
        """As plain values; what is not defined is null."""
        by_layer = self.correlations.transpose(1, 2, 0)  # (L, H + 1, B)
        return {
            "note": "Spearman correlation of the query's attention with the KL, in nats, that "
            "leaving out each transition causes; over transitions, null where either is constant",
            "samples": list(self.samples),
            "overall": _plain(mean_defined(self.means)),
            "recency": _plain(mean_defined(self.recency)),
            "layers": [
                {
                    "layer": layer,
                    "head_numbers": list(heads),
                    "head_average": _plain(mean_defined(values[-1])),
                    "heads": _plain(mean_defined(values[: len(heads)].T)),
                    "head_average_per_sample": _plain(values[-1]),
                    "heads_per_sample": _plain(values[: len(heads)].T),
                }
                for layer, heads, values in zip(self.layers, self.heads, by_layer, strict=True)
            ],
            "overall_per_sample": _plain(self.means),
            "recency_per_sample": _plain(self.recency),
            "leave_one_out": {"kl": self.kl.tolist(), "flips": list(self.flips)},
        }

    def text(self) -> str:
        """How far attention ranks transitions by their effect: a line a layer, what it means."""
        table = [("layer", "head average", "best head", "worst head")]
        means = mean_defined(self.correlations)  # (L, H + 1)
        for layer, heads, values in zip(self.layers, self.heads, means, strict=True):
            ends = ["-", "-"]
            if np.isfinite(values[:-1]).any():
                places = np.nanargmax(values[:-1]), np.nanargmin(values[:-1])
                ends = [f"{_signed(values[place])} (head {heads[place]})" for place in places]
            table.append((str(layer), _signed(values[-1]), *ends))
        legend = (
            "Spearman correlation of the query's attention with the KL that leaving out each of "
            f"{counted(self.kl.shape[1], 'transition')} alone causes, mean over "
            f"{counted(len(self.samples), 'decision')}; 1: attention ranks transitions as their "
            "effect does, 0: it says nothing"
        )
        text = "Not defined: attention, or the effect of every transition, is the same throughout."
        if self.best_head is not None:
            layer, head, value = self.best_head
            text = (
                f"Attention of layer {layer} head {head} ranks transitions most like their "
                f"measured effect: {_signed(value)}. The average over all layers and heads reaches "
                f"{_signed(mean_defined(self.means))}, and ranking the latest first, without a "
                f"look at attention, {_signed(mean_defined(self.recency))}."
            )
        lines = ["HOW FAR ATTENTION IS A GUIDE", wrap(text), *aligned(table), wrap(legend)]
        return "\n".join(lines)


def _signed(value: float) -> str:
    return f"{value + 0.0:.2f}" if np.isfinite(value) else "-"


def _plain(values: np.ndarray) -> Any:
    """Nested lists of floats, None for NaN."""
    if np.ndim(values):
        return [_plain(value) for value in values]
    return float(values) if np.isfinite(values) else None


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


def affordable(n_samples: int, n: int) -> list[int]:
    """Which of some decisions on `n` transitions leave-one-out takes: one at least, evenly."""
    return spread(n_samples, max(1, MAX_LEFT_OUT_TOKENS // (n * n)))


@torch.inference_mode()
def leave_one_out(agent: Agent, history: History) -> tuple[np.ndarray, float]:
    """What leaving out each transition does (Li et al. 2016, arXiv 1612.08220).

    A transition is left out, not masked: those after it move one position to the front, as in
    every compressed history.

    Args:
        agent: what decides; runs on `n` histories of `n - 1` transitions.
        history: `n` transitions before one decision, as many as the model can read at most.

    Returns:
        `(n,)` float64 nats, KL(full || without the transition), and the share of the transitions
        without which the most likely action is another one.
    """
    n = history.n
    others = torch.arange(n - 1, device=history.device).expand(n, -1)
    kept = others + (others >= torch.arange(n, device=history.device)[:, None])  # (n, n - 1)
    full = agent.act(history)
    parts = [
        agent.act(history.rows(torch.zeros(len(part), dtype=torch.int64)).take(part))
        for part in kept.split(max(1, MAX_TOKENS_ACTING // n))
    ]
    without = torch.cat(parts)  # (n, A)
    flips = full.argmax(-1) != without.argmax(-1)
    kl = kl_divergence(full.expand_as(without), without)
    return kl.cpu().numpy(), float(flips.double().mean())


def measure_faithfulness(
    trial: Trial, layers: Sequence[int], heads: Sequence[Sequence[int]], bar: tqdm
) -> Faithfulness:
    """Correlate attention with leave-one-out effects.

    Args:
        trial: decisions, and the attention before them.
        layers: numbers of the layers that count.
        heads: numbers of the heads that count, for each of these layers.
        bar: progress bar, moved on by 1 after each decision that is `affordable`.
    """
    places = affordable(len(trial.samples), trial.n)
    kl, flips = np.zeros((len(places), trial.n)), []
    for i, place in enumerate(places):
        kl[i], share = leave_one_out(trial.agent, trial.history.rows(slice(place, place + 1)))
        flips.append(share)
        bar.update()

    def correlate(values: np.ndarray) -> np.ndarray:  # (B, n) -> (B,)
        return np.array([spearman(*pair) for pair in zip(values, kl.round(DECIMALS), strict=True)])

    correlations = np.full((len(places), len(layers), max(map(len, heads)) + 1), np.nan)
    averages = []
    for i, (layer, own) in enumerate(zip(layers, heads, strict=True)):
        attention = trial.attention[layer][places][:, list(own)]  # (B, H, n)
        averages.append(attention.mean(axis=1))
        for j in range(len(own)):
            correlations[:, i, j] = correlate(attention[:, j])
        correlations[:, i, -1] = correlate(averages[-1])
    return Faithfulness(
        *([trial.samples[place] for place in places], layers, heads, correlations),
        means=correlate(np.mean(averages, axis=0)),
        recency=correlate(np.tile(np.arange(trial.n), (len(places), 1))),
        kl=kl,
        flips=flips,
    )
