"""Attention rows made by hand, and their metrics, as several test modules need them."""

import numpy as np
from hypothesis import strategies as st

from historylens.common.processes import ALONE
from historylens.history import Decision, History
from historylens.metrics import Metrics
from historylens.tokens import Tokens

PARTS = ("state", "action", "reward")


def decision(n, episodes=None, rewarded=(), title="", labels=None):
    """A decision of which only its length, its episodes and its rewards matter."""
    zeros, rewards = np.zeros(n, dtype=int), np.isin(np.arange(n), rewarded).astype(int)
    return Decision(zeros, zeros, rewards, 0, zeros, episodes, title, labels or {})


def random_rows(rng, *shape, sharpness=3.0, slope=0.0):
    """Rows `shape` after a softmax of random scores."""
    scores = rng.normal(size=shape) * sharpness + slope * np.arange(shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def uniform(n):
    """`(n + 1,)`: all tokens equally."""
    return np.full(n + 1, 1 / (n + 1))


def planted(n, positions, mass=1.0):
    """`(n + 1,)`: mass spread equally over some context tokens; the query keeps the rest."""
    row = np.append(np.zeros(n), 1 - mass)
    row[list(positions)] = mass / len(positions)
    return row


def measured(*layers, n_samples=3, n_heads=2, numbers=None, heads=None, decisions=None):
    """Metrics of layers, each a row `(T,)` for all samples and heads, or rows `(S, H, T)`."""
    rows = [x if x.ndim > 1 else np.broadcast_to(x, (n_samples, n_heads, len(x))) for x in layers]
    size, _, n_tokens = rows[0].shape
    heads = heads or [range(layer.shape[1]) for layer in rows]
    metrics = Metrics(size, numbers or range(len(rows)), heads)
    history = History.of(decisions or [decision(n_tokens - 1)] * size)
    metrics.put(range(size), rows, np.full((size, n_tokens), 1 / n_tokens), history)
    return metrics.gather(ALONE)


@st.composite
def maps_of_tokens(draw):
    """Any map: transitions in any order, tokens of none among them, any token deciding."""
    n = draw(st.integers(1, 5))
    numbers = [*range(n), *draw(st.lists(st.integers(-1, n - 1), min_size=1, max_size=8))]
    numbers = draw(st.permutations(numbers))
    part = [draw(st.sampled_from(PARTS if t >= 0 else ("query", "padding"))) for t in numbers]
    own = [i for i, name in enumerate(part) if name != "padding"]
    return Tokens(numbers, part, draw(st.sampled_from(own)))
