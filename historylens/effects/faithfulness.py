"""How far attention ranks transitions by what they do to the action, as leaving each out shows.

The rank correlation of the two, for every layer and head, says how far attention may be taken as a
guide (Jain and Wallace 2019, arXiv 1902.10186, section 4.2).

    guide = measure_faithfulness(trial, layers=[0, 1], heads=[[0, 1, 2, 3]] * 2, bar=tqdm())
    print(faithfulness_text(guide)); guide["overall"], guide["layers"][0]["heads"]
"""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm import tqdm

from historylens.agent import Agent
from historylens.common.batches import MAX_TOKENS_ACTING
from historylens.common.text import aligned, counted, wrap
from historylens.effects.measure import Trial, kl_divergence, spread
from historylens.history import History

MAX_LEFT_OUT_TOKENS = 40_000  # tokens run for leave-one-out, if that does for one decision
DECIMALS = 7  # divergences closer than this are equal: noise of float32 logits


def measure_faithfulness(
    trial: Trial, layers: Sequence[int], heads: Sequence[Sequence[int]], bar: tqdm
) -> dict[str, Any]:
    """Spearman correlations of attention with leave-one-out KL, as plain values.

    Of some heads (numbers, for each layer), of their average, of attention averaged over all layers
    ("overall"), and of the place in time ("recency": what ranking the latest first would reach).
    `bar` moves on by 1 after each of the `B` decisions on `n` transitions that are `affordable`.
    """
    places = affordable(len(trial.samples), trial.n)
    kl, flips = np.zeros((2, len(places), trial.n)), np.zeros(len(places))
    for i, place in enumerate(places):
        history = trial.history.rows(slice(place, place + 1))
        kl[:, i], flips[i] = leave_one_out(trial.agent, history, trial.beta)
        bar.update()

    def correlate(values: np.ndarray) -> np.ndarray:  # (B, n) -> (B,)
        return np.array(
            [spearman(*pair) for pair in zip(values, kl[1].round(DECIMALS), strict=True)]
        )

    by_layer, averages = [], []
    for layer, own in zip(layers, heads, strict=True):
        attention = trial.attention[layer][places][:, list(own)]  # (B, H, n)
        averages.append(attention.mean(axis=1))
        each = np.stack([correlate(attention[:, j]) for j in range(len(own))], axis=1)  # (B, H)
        average = correlate(averages[-1])
        by_layer.append(
            {
                "layer": layer,
                "head_numbers": list(own),
                "head_average": mean_defined(average),
                "heads": mean_defined(each),
                "head_average_per_sample": _plain(average),
                "heads_per_sample": _plain(each),
            }
        )
    overall = correlate(np.mean(averages, axis=0))
    recency = correlate(np.tile(np.arange(trial.n), (len(places), 1)))
    return {
        "note": "Spearman correlation of the query's attention with the KL, at the reference "
        "temperature, that leaving out each transition causes; over transitions, null where "
        "either is constant",
        "samples": [trial.samples[place] for place in places],
        "overall": mean_defined(overall),
        "recency": mean_defined(recency),
        "layers": by_layer,
        "overall_per_sample": _plain(overall),
        "recency_per_sample": _plain(recency),
        "leave_one_out": {
            "kl": kl[0].tolist(),
            "kl_reference": kl[1].tolist(),
            "flips": flips.tolist(),
        },
    }


def affordable(n_samples: int, n: int) -> list[int]:
    """Which of some decisions on `n` transitions leave-one-out takes: one at least, evenly."""
    return spread(n_samples, max(1, MAX_LEFT_OUT_TOKENS // (n * n)))


def leave_one_out(agent: Agent, history: History, beta: float) -> tuple[np.ndarray, float]:
    """What leaving out each of the `n` transitions before one decision does.

    `(2, n)` float64 nats, KL(full || without it), as it is and from logits times `beta`; the share
    of the transitions without which the most likely action is another one. A transition is left out
    (Li et al. 2016, arXiv 1612.08220), not masked: those after it move one position to the front.
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
    kl = [kl_divergence(full.expand_as(without), without, x) for x in (1.0, beta)]
    return torch.stack(kl).cpu().numpy(), float(flips.double().mean())


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman rank correlation of `(n,)` with `(n,)`; NaN where either is constant."""
    centred = []
    for values in (x, y):  # equal ones share the mean of their ranks
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
        centred.append(ranks - ranks.mean())
    a, b = centred
    scale = np.sqrt((a @ a) * (b @ b))
    return float(np.clip(a @ b / scale, -1.0, 1.0)) if scale > 0 else float("nan")


def mean_defined(values: np.ndarray) -> Any:
    """Plain mean over the first axis, of what is not NaN; None where all is."""
    return _plain(np.ma.filled(np.ma.masked_invalid(values).mean(axis=0), np.nan))


def _plain(values: np.ndarray) -> Any:
    """Nested lists of floats, None for NaN."""
    return np.where(np.isnan(values), None, values).tolist()


def faithfulness_text(guide: Mapping[str, Any]) -> str:
    """How far attention ranks transitions by their effect: what it means, a line a layer."""
    table, all_heads = [("layer", "head average", "best head", "worst head")], []
    for layer in guide["layers"]:
        pairs = zip(layer["heads"], layer["head_numbers"], strict=True)
        heads = [(value, number, layer["layer"]) for value, number in pairs if value is not None]
        ends = [end(heads, key=itemgetter(0)) for end in (max, min)] if heads else []
        cells = [f"{_signed(value)} (head {number})" for value, number, _ in ends] or ["-", "-"]
        table.append((str(layer["layer"]), _signed(layer["head_average"]), *cells))
        all_heads += heads
    text = "Not defined: attention, or the effect of every transition, is the same throughout."
    if all_heads:
        value, head, number = max(all_heads, key=itemgetter(0))  # the first among equals
        text = (
            f"Attention of layer {number} head {head} ranks transitions most like their "
            f"measured effect: {_signed(value)}. The average over all layers and heads reaches "
            f"{_signed(guide['overall'])}, and ranking the latest first, without a "
            f"look at attention, {_signed(guide['recency'])}."
        )
    legend = (
        "Spearman correlation of the query's attention with the KL that leaving out each of "
        f"{counted(len(guide['leave_one_out']['kl'][0]), 'transition')} alone causes, mean over "
        f"{counted(len(guide['samples']), 'decision')}, at a reference temperature; 1: attention "
        "ranks transitions as their effect does, 0: it says nothing"
    )
    return "\n".join(["HOW FAR ATTENTION IS A GUIDE", wrap(text), *aligned(table), wrap(legend)])


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value + 0.0:.2f}"
