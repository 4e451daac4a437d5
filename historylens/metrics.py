"""Attention rows in, numbers out: the four summary metrics and those that cover their blind spots.

A row is what the query token (the last of `T = n + 1` tokens) reads: `p[:n]` lies on the context,
`p[n]` on the query token itself. Everything here is pure, vectorised and float64; torch tensors
and numpy arrays are both accepted. Axes: `B` samples, `H` heads, `T` tokens, `n` context tokens.

    result = collect([layer.query_rows for layer in record], samples)     # rows (B, H, T) per layer
    result.overall()["entropy"].mean
    result = concatenate([result, next_batch])                            # streaming

Where a context carries no mass at all (every `p[:n]` is 0), nothing is read: `effective_tokens`,
`tokens_for_90_percent`, `normalised_entropy` and `mean_distance` are 0, a value they cannot take
otherwise (`normalised_entropy`: unless a single token holds everything). No metric is ever NaN or
infinite.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from attention.samples import Sample

EPSILON = 1e-10  # inside the logarithm and the ratio's denominator
STRONG_WEIGHT = 0.1  # a position above this weight counts as strongly attended
MASS_SHARE = 0.9  # of `tokens_for_90_percent`
TOLERANCE = 1e-6  # a float32 weight that stands for 0.1 is not above 0.1

SUMMARY_METRICS = ("mean_context_attention", "concentration", "entropy", "recent_distant_ratio")
DETAIL_METRICS = (
    "normalised_entropy",
    "effective_tokens",
    "tokens_for_90_percent",
    "mean_distance",
    "mass_self",
    "mass_first_token",
    "mass_first_quarter",
    "mass_last_quarter",
    "mass_last_episode",
    "mass_rewarded",
    "strong_positions",
    "strong_share",
)
ALL_METRICS = SUMMARY_METRICS + DETAIL_METRICS
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


def as_float64(weights: ArrayLike) -> np.ndarray:
    """Torch tensor (any device or dtype) or array-like -> float64 numpy array."""
    if hasattr(weights, "detach"):
        weights = weights.detach().cpu().double().numpy()
    return np.asarray(weights, dtype=np.float64)


def as_rows(rows: ArrayLike) -> np.ndarray:
    """Check attention rows `(..., T)` and return them in float64.

    Raises:
        ValueError: fewer than two tokens, or weights that cannot come from a softmax.
    """
    rows = as_float64(rows)
    if rows.ndim < 1 or rows.shape[-1] < 2:
        raise ValueError(
            "expected rows (..., T) with at least one context token and the query (T >= 2), "
            f"got shape {rows.shape}"
        )
    if not np.isfinite(rows).all() or (rows < 0).any() or (rows.sum(-1) > 1.05).any():
        raise ValueError(
            "expected attention weights after the softmax: finite, not negative, each row with "
            "a sum of at most 1; got rows that are not (scores before the softmax?)"
        )
    return rows


def quarter(n_context: int) -> int:
    """Tokens in the first and in the last quarter of the context; 1 where `n_context < 4`."""
    return max(1, n_context // 4)


def summary_metrics(rows: ArrayLike) -> dict[str, np.ndarray]:
    """Compute the four summary metrics of attention rows.

    Args:
        rows: `(..., T)`, attention rows of the query token, the query token last.

    Returns:
        `SUMMARY_METRICS`, each `(...)` float64. With `n = 1` both quarters are the same token and
        the ratio is 1; a context without mass has ratio 0.
    """
    context = as_rows(rows)[..., :-1]  # (..., n)
    width = quarter(context.shape[-1])
    recent = context[..., -width:].mean(-1)
    distant = context[..., :width].mean(-1)
    return {
        "mean_context_attention": context.mean(-1),
        # Shifted by one entry, which changes nothing but makes equal weights exactly 0.
        "concentration": (context - context[..., :1]).std(-1),
        "entropy": -(context * np.log(context + EPSILON)).sum(-1),
        "recent_distant_ratio": recent / (distant + EPSILON),
    }


def detail_metrics(
    rows: ArrayLike, last_episode: ArrayLike, rewarded: ArrayLike
) -> dict[str, np.ndarray]:
    """Compute the metrics that the four leave out.

    Args:
        rows: `(..., T)`, attention rows of the query token, the query token last.
        last_episode: `(..., n)` bool, context tokens of the last episode; broadcast against rows.
        rewarded: `(..., n)` bool, rewarded context tokens; broadcast against rows.

    Returns:
        `DETAIL_METRICS`, each `(...)` float64; `DESCRIPTIONS` has definitions and units.
    """
    rows = as_rows(rows)
    context = rows[..., :-1]  # (..., n)
    n = context.shape[-1]
    mass = context.sum(-1)
    reads = mass > 0
    shares = context / np.where(reads, mass, 1.0)[..., None]
    logs = np.log(np.where(shares > 0, shares, 1.0))
    entropy = np.clip(-(shares * logs).sum(-1), 0.0, np.log(n))
    evenness = entropy / np.log(n) if n > 1 else np.ones_like(entropy)
    held = np.cumsum(np.sort(shares, axis=-1)[..., ::-1], axis=-1)
    strong = context > STRONG_WEIGHT + TOLERANCE
    return {
        "normalised_entropy": np.where(reads, evenness, 0.0),
        "effective_tokens": np.where(reads, np.exp(entropy), 0.0),
        "tokens_for_90_percent": np.where(reads, (held < MASS_SHARE - TOLERANCE).sum(-1) + 1.0, 0),
        "mean_distance": (shares * np.arange(n, 0, -1)).sum(-1),
        "mass_self": rows[..., -1],
        "mass_first_token": context[..., 0],
        "mass_first_quarter": context[..., : quarter(n)].sum(-1),
        "mass_last_quarter": context[..., -quarter(n) :].sum(-1),
        "mass_last_episode": (context * np.asarray(last_episode, dtype=bool)).sum(-1),
        "mass_rewarded": (context * np.asarray(rewarded, dtype=bool)).sum(-1),
        "strong_positions": strong.sum(-1).astype(np.float64),
        "strong_share": (shares * strong).sum(-1),
    }


def uniform_reference(
    n_context: int, n_last_episode: int | None = None, n_rewarded: int = 0
) -> dict[str, float]:
    """Every metric under uniform causal attention: the query weighs all T tokens `1 / (n + 1)`.

    Args:
        n_context: context tokens `n`, at least 1.
        n_last_episode: context tokens of the last episode; None: all of them.
        n_rewarded: rewarded context tokens.
    """
    order = np.arange(n_context)
    row = np.full(n_context + 1, 1.0 / (n_context + 1))
    last = order < (n_context if n_last_episode is None else n_last_episode)
    values = summary_metrics(row) | detail_metrics(row, last, order < n_rewarded)
    return {name: float(value) for name, value in values.items()}


def received_from_map(weights: ArrayLike) -> np.ndarray:
    """Average attention each position receives from the queries that may see it.

    Args:
        weights: `(..., T, T)`, causal attention maps, row = query; what lies above the diagonal
            is ignored, NaN included.

    Returns:
        `(..., T)` float64: the column sum over queries `i >= j`, divided by `T - j`.
    """
    weights = as_float64(weights)
    n_tokens = weights.shape[-1]
    if weights.ndim < 2 or weights.shape[-2] != n_tokens:
        raise ValueError(f"expected square maps (..., T, T), got shape {weights.shape}")
    seen = np.tri(n_tokens, dtype=bool)
    return np.where(seen, weights, 0.0).sum(-2) / np.arange(n_tokens, 0, -1)


def uniform_received(n_tokens: int) -> np.ndarray:
    """`(T,)`: what `received_from_map` gives where every query weighs all it may see equally.

    Position j receives `1 / (i + 1)` from every query `i >= j`: the average over those.
    """
    weights = 1.0 / np.arange(1, n_tokens + 1)  # query i reads i + 1 tokens
    return np.cumsum(weights[::-1])[::-1] / np.arange(n_tokens, 0, -1)


@dataclass(frozen=True)
class Summary:
    """A metric over many decisions: mean, population standard deviation and median."""

    mean: float
    std: float
    median: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Summary":
        """Summarise all entries of `values`."""
        return cls(float(np.mean(values)), float(np.std(values)), float(np.median(values)))


@dataclass(frozen=True)
class LayerMetrics:
    """Every metric of one layer over `S` samples.

    Attributes:
        layer: number of the layer in the model.
        mean: name -> `(S,)`, metrics of the row averaged over heads (not averaged metrics).
        heads: name -> `(S, H)`, metrics of every head's own row.
    """

    layer: int
    mean: dict[str, np.ndarray]
    heads: dict[str, np.ndarray]

    def summary(self) -> dict[str, Summary]:
        """Each metric of the head-averaged row over samples."""
        return {name: Summary.of(values) for name, values in self.mean.items()}

    def head_means(self) -> dict[str, np.ndarray]:
        """Each metric per head, `(H,)`: the mean over samples."""
        return {name: values.mean(0) for name, values in self.heads.items()}


@dataclass(frozen=True)
class AttentionMetrics:
    """Every metric of `S` samples in all analysed layers; `concatenate` joins batches.

    Attributes:
        samples: the `S` decisions, in order.
        layers: one `LayerMetrics` a layer, in layer order.
        uniform: name -> `(S,)`, each metric of that sample under uniform attention to all that the
            query may see.
        heads: numbers of the heads measured, in order; None: 0, 1, 2, ...
    """

    samples: tuple[Sample, ...]
    layers: tuple[LayerMetrics, ...]
    uniform: dict[str, np.ndarray]
    heads: tuple[int, ...] | None = None

    def head_number(self, place: int) -> int:
        """Number in the model of the head at a place of the measured ones."""
        return place if self.heads is None else self.heads[place]

    @property
    def n_context(self) -> np.ndarray:
        """`(S,)` int, context tokens of each sample."""
        return np.array([sample.n_context for sample in self.samples])

    def pooled(self, name: str) -> np.ndarray:
        """`(L, S)`: one metric of the head-averaged row, every layer and sample."""
        return np.stack([layer.mean[name] for layer in self.layers])

    def overall(self) -> dict[str, Summary]:
        """Each metric of the head-averaged row, over all `L * S` pairs of layer and sample.

        The spread therefore holds differences between layers as well as between samples.
        """
        return {name: Summary.of(self.pooled(name)) for name in ALL_METRICS}

    def uniform_mean(self) -> dict[str, float]:
        """Each metric under uniform causal attention, mean over samples."""
        return {name: float(values.mean()) for name, values in self.uniform.items()}

    def rows(self) -> Iterator[dict[str, Any]]:
        """One dict a sample, layer and head (a number, then "mean"): `sample` and the metrics."""
        for s, sample in enumerate(self.samples):
            for layer in self.layers:
                for head in range(layer.heads["entropy"].shape[1]):
                    values = {name: float(v[s, head]) for name, v in layer.heads.items()}
                    number = self.head_number(head)
                    yield {"sample": sample, "layer": layer.layer, "head": number, **values}
                values = {name: float(v[s]) for name, v in layer.mean.items()}
                yield {"sample": sample, "layer": layer.layer, "head": "mean", **values}


def sample_masks(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """`(last_episode, rewarded)`, both `(B, n)` bool, of samples with the same `n`.

    A sample without episode starts counts as one single episode.
    """
    sizes = {sample.n_context for sample in samples}
    if len(sizes) != 1:
        raise ValueError(f"expected samples of one context length in a batch, got {sorted(sizes)}")
    starts = np.array([max(s.episode_starts, default=0) for s in samples], dtype=int)  # (B,)
    last_episode = np.arange(sizes.pop()) >= starts[:, None]
    return last_episode, np.stack([sample.rewarded for sample in samples]).astype(bool)


def collect(
    query_rows: Sequence[ArrayLike],
    samples: Sequence[Sample],
    layers: Sequence[int] | None = None,
    uniform_rows: ArrayLike | None = None,
) -> AttentionMetrics:
    """Measure one batch.

    Args:
        query_rows: one `(B, H, T)` a layer, the query token's attention rows; layers may differ
            in `H`.
        samples: the `B` samples of the batch, all with `n = T - 1` context tokens.
        layers: number of each layer in the model; None: 0, 1, 2, ...
        uniform_rows: `(B, T)`, the row that weighs all that the query may see equally; None: every
            token `1 / T`, as under a causal mask with the query last.

    Raises:
        ValueError: shapes that do not fit each other, or rows that are no attention weights.
    """
    numbers = list(range(len(query_rows))) if layers is None else list(layers)
    if not samples or not query_rows or len(numbers) != len(query_rows):
        raise ValueError(
            f"expected at least one sample, and rows for each of the layers {numbers}; "
            f"got {len(samples)} samples and rows of {len(query_rows)} layers"
        )
    last_episode, rewarded = sample_masks(samples)  # (B, n)
    n_samples, n = rewarded.shape
    measured = []
    for number, layer_rows in zip(numbers, query_rows, strict=True):
        rows = as_float64(layer_rows)
        if rows.ndim != 3 or rows.shape[0] != n_samples or rows.shape[2] != n + 1:
            raise ValueError(
                f"layer {number}: expected query rows (B, H, T) = ({n_samples}, H, {n + 1}), "
                f"got {rows.shape}"
            )
        heads = _measure(rows, last_episode[:, None], rewarded[:, None])
        measured.append(LayerMetrics(number, _measure(rows.mean(1), last_episode, rewarded), heads))
    even = np.full((n_samples, n + 1), 1.0 / (n + 1)) if uniform_rows is None else uniform_rows
    uniform = _measure(as_float64(even), last_episode, rewarded)
    return AttentionMetrics(tuple(samples), tuple(measured), uniform)


def _measure(rows: np.ndarray, last_episode: np.ndarray, rewarded: np.ndarray) -> dict:
    return summary_metrics(rows) | detail_metrics(rows, last_episode, rewarded)


def concatenate(parts: Sequence[AttentionMetrics]) -> AttentionMetrics:
    """Join batches over samples, in the order given; context lengths may differ between batches.

    Raises:
        ValueError: no parts, or parts that measured different layers or numbers of heads.
    """
    shapes = {tuple((p.layer, p.heads["entropy"].shape[1]) for p in q.layers) for q in parts}
    if len(shapes) != 1:
        raise ValueError(f"expected parts with the same layers and heads, got {sorted(shapes)}")
    layers = tuple(
        LayerMetrics(
            same_layer[0].layer,
            _join([part.mean for part in same_layer]),
            _join([part.heads for part in same_layer]),
        )
        for same_layer in zip(*(part.layers for part in parts), strict=True)
    )
    samples = tuple(sample for part in parts for sample in part.samples)
    uniform = _join([part.uniform for part in parts])
    return AttentionMetrics(samples, layers, uniform, parts[0].heads)


def _join(dicts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([d[name] for d in dicts]) for name in dicts[0]}
