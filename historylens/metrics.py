"""Attention rows in, numbers out: the four summary metrics and those that cover their blind spots.

    metrics = Metrics(n_samples=5000, layers=[0, 1], heads=[[0, 1, 2, 3]] * 2)
    metrics.put(indices, rows, even, history)                   # a batch, in any order
    metrics.gather(group).of("entropy").mean()                  # of all processes, on rank 0

A row is what the query token reads: `p[:n]` lies on the context, `p[n]` on the query token itself
(and on what else belongs to no transition). Axes: `S` samples, of which `B` in a batch, `L` layers,
`H` heads, `n` context tokens, `M` metrics. None is ever NaN or infinite: where a context has no
mass, `effective_tokens`, `tokens_for_90_percent`, `normalised_entropy` and `mean_distance` are 0.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike

from historylens.common.processes import Group
from historylens.history import History

EPSILON = 1e-10  # inside the logarithm and the ratio's denominator
STRONG_WEIGHT = 0.1  # a position above this weight counts as strongly attended
MASS_SHARE = 0.9  # of `tokens_for_90_percent`
TOLERANCE = 1e-6  # a float32 weight that stands for 0.1 is not above 0.1

DESCRIPTIONS = {
    "mean_context_attention": "mean attention weight of a context token",
    "concentration": "population standard deviation of the context weights",
    "entropy": "-sum p ln(p + 1e-10) over the context, nats, not renormalised",
    "recent_distant_ratio": "mean weight of the last quarter / (of the first quarter + 1e-10)",
    "normalised_entropy": "entropy of the renormalised context weights / ln n; 1 when n = 1",
    "effective_tokens": "exp(entropy of the renormalised context weights), tokens",
    "tokens_for_90_percent": "fewest context tokens that hold 90 % of the context mass",
    "mean_distance": "mean distance from the query over the context mass, tokens; 1 = latest",
    "mass_self": "weight of the query token on itself",
    "mass_first_token": "weight of the first context token",
    "mass_first_quarter": "summed weight of the first quarter of the context",
    "mass_last_quarter": "summed weight of the last quarter of the context",
    "mass_last_episode": "summed weight of the context tokens of the last episode",
    "mass_rewarded": "summed weight of the rewarded context tokens",
    "strong_positions": "context tokens with a weight above 0.1",
    "strong_share": "share of the context mass that those tokens hold",
}
NAMES = tuple(DESCRIPTIONS)
SUMMARY_METRICS = NAMES[:4]


def measure(rows: ArrayLike, last_episode: ArrayLike, rewarded: ArrayLike) -> np.ndarray:
    """Every metric of rows `(..., T)`, the query's own weight last: `(..., M)` float64, as `NAMES`.

    `last_episode` and `rewarded` `(..., n)` bool say which context tokens are so; broadcast against
    rows. A quarter is one token where `n < 4`; a context without mass has ratio 0. With no context
    (`T = 1`) all is 0 but `mass_self`. ValueError: weights that cannot come from a softmax.
    """
    rows = np.asarray(rows, dtype=np.float64)
    if not np.isfinite(rows).all() or (rows < 0).any() or (rows.sum(-1) > 1.05).any():
        what = "expected attention weights after the softmax: finite, not negative, each row with "
        what += "a sum of at most 1; got rows that are not (scores before the softmax?)"
        raise ValueError(what)
    context = rows[..., :-1]  # (..., n)
    n = context.shape[-1]
    if n == 0:
        return np.where([name == "mass_self" for name in NAMES], rows, 0.0)  # (..., M)
    first, last = context[..., : max(1, n // 4)], context[..., -max(1, n // 4) :]
    mass = context.sum(-1)
    reads = mass > 0
    shares = context / np.where(reads, mass, 1.0)[..., None]
    logs = np.log(np.where(shares > 0, shares, 1.0))
    entropy = np.clip(-(shares * logs).sum(-1), 0.0, np.log(n))
    evenness = entropy / np.log(n) if n > 1 else np.ones_like(entropy)
    held = np.cumsum(np.sort(shares, axis=-1)[..., ::-1], axis=-1)
    strong = context > STRONG_WEIGHT + TOLERANCE
    values = {
        "mean_context_attention": context.mean(-1),
        # Shifted by one entry, which changes nothing but makes equal weights exactly 0.
        "concentration": (context - context[..., :1]).std(-1),
        "entropy": -(context * np.log(context + EPSILON)).sum(-1),
        "recent_distant_ratio": last.mean(-1) / (first.mean(-1) + EPSILON),
        "normalised_entropy": np.where(reads, evenness, 0.0),
        "effective_tokens": np.where(reads, np.exp(entropy), 0.0),
        "tokens_for_90_percent": np.where(reads, (held < MASS_SHARE - TOLERANCE).sum(-1) + 1.0, 0),
        "mean_distance": (shares * np.arange(n, 0, -1)).sum(-1),
        "mass_self": rows[..., -1],
        "mass_first_token": context[..., 0],
        "mass_first_quarter": first.sum(-1),
        "mass_last_quarter": last.sum(-1),
        "mass_last_episode": (context * np.asarray(last_episode, dtype=bool)).sum(-1),
        "mass_rewarded": (context * np.asarray(rewarded, dtype=bool)).sum(-1),
        "strong_positions": strong.sum(-1),
        "strong_share": (shares * strong).sum(-1),
    }
    return np.stack([values[name] for name in NAMES], axis=-1)


def measure_one(row: ArrayLike) -> dict[str, float]:
    """Every metric of one row `(T,)` by name, where nothing is known of episodes and rewards."""
    return dict(zip(NAMES, measure(row, True, False).tolist(), strict=True))


def uniform_received(n_tokens: int) -> np.ndarray:
    """`(T,)`: average attention received where all tokens read themselves and the past alike."""
    weights = 1.0 / np.arange(1, n_tokens + 1)  # token i reads i + 1 tokens
    return np.cumsum(weights[::-1])[::-1] / np.arange(n_tokens, 0, -1)


class Metrics:
    """Every metric of `S` samples, filled batch by batch and process by process."""

    def __init__(
        self, n_samples: int, layers: Sequence[int], heads: Sequence[Sequence[int]]
    ) -> None:
        self.n_samples = n_samples
        self.layers, self.heads = tuple(layers), tuple(map(tuple, heads))  # their numbers
        # (S, L, H + 1, M): of every head's own row and, last, of the row averaged over heads; NaN
        # where a layer has fewer heads than the largest.
        shape = (n_samples, len(layers), max(map(len, heads)) + 1, len(NAMES))
        self.values = np.full(shape, np.nan)
        self.uniform = np.full((n_samples, len(NAMES)), np.nan)  # (S, M), of even reading
        self.n_context = np.full(n_samples, -1)  # (S,), -1 until it is measured

    def put(
        self, indices: Sequence[int], rows: Sequence[np.ndarray], even: np.ndarray, history: History
    ) -> None:
        """Measure a batch of `B` samples: `rows (B, H, n + 1)` of each layer.

        These are the query's attention to each transition, then what lies on tokens of none;
        `even (B, n + 1)` weigh all that it may see equally.
        """
        episodes = history.episodes
        episodes = torch.zeros_like(history.actions) if episodes is None else episodes
        last = (episodes == episodes[:, -1:]).cpu().numpy()  # (B, n)
        rewarded = history.rewarded.cpu().numpy()
        for layer, heads in enumerate(rows):
            values = measure(heads, last[:, None], rewarded[:, None])  # (B, H, M)
            self.values[indices, layer, : heads.shape[1]] = values
            self.values[indices, layer, -1] = measure(heads.mean(1), last, rewarded)
        self.uniform[indices] = measure(even, last, rewarded)
        self.n_context[indices] = history.n

    def gather(self, group: Group) -> "Metrics | None":
        """The metrics of all processes, on rank 0; None on others."""
        arrays = (self.values, self.uniform, self.n_context)
        own = np.flatnonzero(self.n_context >= 0)
        parts = group.gather(None if group.is_main else (own, [array[own] for array in arrays]))
        for indices, theirs in parts[1:] if group.is_main else ():
            for array, values in zip(arrays, theirs, strict=True):
                array[indices] = values
        return self if group.is_main else None

    # Copies in one order of memory: sums then do not depend on how values are stored.

    def of(self, name: str) -> np.ndarray:
        """A metric of the head-averaged rows: `(L, S)`."""
        return np.ascontiguousarray(self.values[:, :, -1, NAMES.index(name)].T)

    def of_heads(self, name: str, place: int) -> np.ndarray:
        """A metric of each head of the layer at a place in `layers`: `(S, H)`."""
        n_heads = len(self.heads[place])
        return np.asfortranarray(self.values[:, place, :n_heads, NAMES.index(name)])

    def of_uniform(self, name: str) -> np.ndarray:
        """A metric of the rows that weigh all equally: `(S,)`."""
        return np.ascontiguousarray(self.uniform[:, NAMES.index(name)])

    def uniform_mean(self) -> dict[str, float]:
        """Each metric of the rows that weigh all equally, mean over samples."""
        return {name: float(self.of_uniform(name).mean()) for name in NAMES}

    def summaries(self, place: int | None = None) -> dict[str, dict[str, float]]:
        """Mean, std and median of each metric over samples, in the layer at a place or in all."""
        chosen, rules = slice(None) if place is None else place, (np.mean, np.std, np.median)
        values = {name: self.of(name)[chosen] for name in NAMES}
        return {name: {f.__name__: float(f(x)) for f in rules} for name, x in values.items()}
