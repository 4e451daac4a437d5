"""Compressing the history that an in-context reinforcement learner reads.

Which transitions can go, and what the model does without them: `METHODS` of one kind, by name.

    shorter = compress_history(states, actions, rewards, next_states, attention_weights, k=10)
    shorter = get_method("top-k").compress(history, n_keep=10)                # a History
"""

import numpy as np
import torch
from torch import Tensor

# Each enters its methods, in the order of tables and comparisons.
import historylens.compression.strategies  # isort: skip
import historylens.compression.merges  # noqa: F401 # isort: skip
from historylens.compression.method import METHODS, Generator, get_method, whole_number
from historylens.history import History
from historylens.insights import verdicts
from historylens.insights.patterns import PATTERNS, Scope
from historylens.metrics import measure_one

__all__ = ["METHODS", "attention_pattern", "compress_history", "get_method"]


def attention_pattern(attention_weights: Tensor | np.ndarray) -> str:
    """Say how the query reads its history: "recency", "sparse", "focused" or "uniform".

    The rules of `historylens.insights` for one row, in this order: recency; sparse; uniform;
    focused. Where a short history is read evenly, the two rules of concentration would hold as
    well, and it counts as uniform; so does a row that fits no rule.

    Args:
        attention_weights: `(n,)` with `n >= 2`, finite and not negative. Weights that sum to more
            than 1, as scores accumulated over queries do, are scaled to a sum of 1.
    """
    weights = torch.as_tensor(attention_weights).detach().cpu().double().numpy()
    weights = weights / max(1.0, weights.sum())
    values = measure_one(np.append(weights, max(0.0, 1 - weights.sum())))  # the query token last
    row = {name: np.array([value]) for name, value in values.items()}
    scope = Scope(None, row, row, np.array([len(weights)]), "one row")
    holds = {name for name, (_, rule_holds) in verdicts(scope).items() if rule_holds}
    if "recency" in holds:
        return "recency"
    if scope.is_broad or not weights.any():
        return "uniform"
    return next((name for name in ("sparse", "focused") if name in holds), "uniform")


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
    **known: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compress one history, by default in the way that its attention suggests.

    Recency keeps the latest `k` transitions, sparse or focused attention the `k` most attended,
    uniform attention `k` evenly spaced ones (`attention_pattern`, `PATTERNS`). That is a guess
    from attention; what it does to the action has to be measured.

    Args:
        states: `(n, S)`, any number type, as are the others.
        actions: `(n,)`.
        rewards: `(n,)`.
        next_states: `(n, S)`.
        attention_weights: `(n,)`, the query's attention to each transition after the softmax, or
            `(n + 1,)` with that to the query token itself last. May be None where `strategy` is
            one that does not look at it.
        k: transitions to keep.
        strategy: name of a strategy or a merge, whatever the attention.
        generator: for strategies that draw.
        known: further fields of `History` without their batch axis, for example `episodes (n,)`.

    Returns:
        `states (k, S), actions (k,), rewards (k,), next_states (k, S)` in the order of time; those
        given where nothing goes; fewer for strategies that keep "up to n_keep".

    Raises:
        ValueError: shapes that do not fit each other, attention that is negative or no number, an
            unknown strategy, or one that looks at what is not given.
    """
    context = (states, actions, rewards, next_states)
    k, n = whole_number(k), len(actions)
    if attention_weights is not None:
        weights = torch.as_tensor(attention_weights)
        if weights.shape not in ((n,), (n + 1,)):
            raise ValueError(
                f"expected attention_weights of shape ({n},), or ({n + 1},) with the query's own "
                f"last, for {n} transitions, got {tuple(weights.shape)}"
            )
        known["query_attention"] = weights[:n]
    elif strategy is None:
        raise ValueError("expected attention_weights, or the name of a strategy to use without")
    known = {name: torch.as_tensor(value)[None] for name, value in known.items()}
    history = History(*(torch.as_tensor(part)[None] for part in context), **known).checked()
    if strategy is None:
        pattern = attention_pattern(weights[:n]) if 0 < k < n else "uniform"
        strategy = PATTERNS[pattern].strategy
    shorter = get_method(strategy).compress(history, k, generator)
    if shorter is history:
        return context
    return shorter.states[0], shorter.actions[0], shorter.rewards[0], shorter.next_states[0]
