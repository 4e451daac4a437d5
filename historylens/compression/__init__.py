"""Compressing the history that an in-context reinforcement learner reads: `METHODS`, by name.

shorter = compress_history(states, actions, rewards, next_states, attention_weights, k=10)
shorter = get_method("top-k").compress(history, n_keep=10)  # any method, a History
"""

import numpy as np
import torch
from torch import Tensor

import historylens.compression.strategies  # noqa: F401 (enters its rules in METHODS)
from historylens.compression.method import METHODS, Generator, get_method
from historylens.history import History
from historylens.insights import holding
from historylens.insights.patterns import PATTERNS, Scope
from historylens.metrics import measure_one

__all__ = ["METHODS", "attention_pattern", "compress_history", "get_method"]


def attention_pattern(attention_weights: Tensor | np.ndarray) -> str:
    """Say how the query reads its history: "recency", "sparse", "focused" or "uniform".

    The first rule of `historylens.insights` that holds; "uniform" as well where none does.
    `attention_weights` `(n,)`, not negative, are scaled to a sum of 1 where they exceed it.
    """
    weights = torch.as_tensor(attention_weights).detach().cpu().double().numpy()
    weights = weights / max(1.0, weights.sum())
    values = measure_one(np.append(weights, max(0.0, 1 - weights.sum())))  # the query token last
    row = {name: np.array([value]) for name, value in values.items()}
    scope = Scope(None, row, row, np.array([len(weights)]))
    holds = {*holding(scope)}
    if scope.is_broad or not weights.any():
        holds -= {"sparse", "focused"}
    return next((name for name in ("recency", "sparse", "focused") if name in holds), "uniform")


def compress_history(
    states: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_states: Tensor,
    attention_weights: Tensor | None,
    k: int = 10,
    *,
    strategy: str | None = None,
    generator: Generator | None = None,
    rewarded_above: float = 0.0,
    **known: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compress one history, by default in the way that its attention suggests.

    Recency keeps the latest `k` transitions, sparse or focused attention the `k` most attended,
    uniform attention `k` evenly spaced ones: a guess, whose effect on the action is to be measured.

    States are `(n, S)`, actions and rewards `(n,)`, `attention_weights` `(n,)`: the query's to each
    transition after the softmax, or `(n + 1,)` with its own last; None where `strategy`, a method
    whatever the attention, does not look at it. One that draws takes a `generator`; `known` are
    further fields of `History` without their batch axis, such as `episodes (n,)`.

    Gives states, actions, rewards and next states of `k` transitions in the order of time; those
    given where nothing goes; fewer for strategies that keep "up to n_keep". ValueError: shapes that
    do not fit, attention that is negative or no number, an unknown strategy, or one that looks at
    what is not given.
    """
    context, n = (states, actions, rewards, next_states), len(actions)
    if attention_weights is not None:
        weights = torch.as_tensor(attention_weights)
        if (shape := tuple(weights.shape)) not in ((n,), (n + 1,)):
            expected = f"({n},), or ({n + 1},) with the query's own last, for {n} transitions"
            raise ValueError(f"expected attention_weights of shape {expected}, got {shape}")
        known["query_attention"] = weights[:n]
    elif strategy is None:
        raise ValueError("expected attention_weights, or the name of a strategy to use without")
    known = {name: torch.as_tensor(value)[None] for name, value in known.items()}
    parts = (torch.as_tensor(part)[None] for part in context)
    history = History(*parts, **known, rewarded_above=rewarded_above).checked()
    if strategy is None:
        strategy = PATTERNS[attention_pattern(weights[:n]) if n else "uniform"].strategy
    shorter = get_method(strategy).compress(history, k, generator)
    return context if shorter is history else tuple(part[0] for part in shorter.inputs[:4])
