"""Compressing the history that an in-context reinforcement learner reads.

Which transitions can go, and what the model does without them. `STRATEGIES` choose transitions,
`MERGES` make new ones, `ORACLES` ask the model, `CONTROLS` take the history's information away.

    shorter = compress_history(states, actions, rewards, next_states, attention_weights, k=10)

    history = History.from_batch(batch, query_attention=rows[:, :-1])
    indices = get_strategy("top-k").select(history, n_keep=10)              # (B, 10)
    logits = compressed_logits(lambda h: model(*h.inputs), history, indices)
"""

import difflib

import numpy as np
import torch
from torch import Tensor

import compression.attention  # noqa: F401 - enters its strategies
from attention.evidence import BROAD_SHARE, FOCUSED_ENTROPY, RECENCY_RATIO
from attention.evidence import is_sparse as has_sparse_rows
from attention.metrics import detail_metrics, summary_metrics
from compression.history import (
    Generator,
    History,
    by_count,
    compressed_logits,
    episode_ids,
    kept_counts,
    past_attention,
)
from compression.merges import CONTROLS, MERGES, Control, Merge
from compression.oracles import (
    ORACLES,
    Effects,
    Oracle,
    elimination_order,
    kl_divergence,
    leave_one_out,
)
from compression.strategies import STRATEGIES, Strategy, whole_number

__all__ = [
    "CONTROLS",
    "MERGES",
    "ORACLES",
    "STRATEGIES",
    "STRATEGY_OF_PATTERN",
    "Control",
    "Effects",
    "Generator",
    "History",
    "Merge",
    "Oracle",
    "Strategy",
    "attention_pattern",
    "by_count",
    "compress_history",
    "compressed_logits",
    "elimination_order",
    "episode_ids",
    "get_strategy",
    "kept_counts",
    "kl_divergence",
    "leave_one_out",
    "past_attention",
]

STRATEGY_OF_PATTERN = {
    "recency": "recent",
    "sparse": "top-k",
    "focused": "top-k",
    "uniform": "even",
}


def get_strategy(name: str) -> Strategy | Merge:
    """Look up a strategy or a merge.

    Raises:
        ValueError: there is none of that name; the message has the names that there are.
    """
    known = STRATEGIES | MERGES
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ValueError(f"unknown strategy '{name}': {hint}There are: {', '.join(known)}")
    return known[name]


def attention_pattern(attention_weights: Tensor | np.ndarray) -> str:
    """Say how the query reads its history: "recency", "sparse", "focused" or "uniform".

    The rules of `attention.insights` for one row, in this order: recency; sparse; uniform;
    focused. Where a short history is read evenly, the two rules of concentration would hold as
    well, and it counts as uniform; so does a row that fits no rule.

    Args:
        attention_weights: `(n,)` with `n >= 2`, finite and not negative. Weights that sum to more
            than 1, as scores accumulated over queries do, are scaled to a sum of 1.
    """
    weights = torch.as_tensor(attention_weights).detach().cpu().double().numpy()
    weights = weights / max(1.0, weights.sum())
    row = np.append(weights, max(0.0, 1 - weights.sum()))[None]  # (1, T), the query token last
    nothing = np.zeros((1, len(weights)), dtype=bool)
    values = summary_metrics(row) | detail_metrics(row, nothing, nothing)
    entropy = values["entropy"][0]
    is_broad = not weights.any() or values["effective_tokens"][0] >= BROAD_SHARE * len(weights)
    if values["recent_distant_ratio"][0] > RECENCY_RATIO:
        return "recency"
    if has_sparse_rows(values)[0] and not is_broad:
        return "sparse"
    if entropy < FOCUSED_ENTROPY and not is_broad:
        return "focused"
    return "uniform"


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
    uniform attention `k` evenly spaced ones (`attention_pattern` and `STRATEGY_OF_PATTERN`). That
    is a guess from attention; what it does to the action has to be measured.

    Args:
        states: `(n, S)`, any number type, as are the others.
        actions: `(n,)`.
        rewards: `(n,)`.
        next_states: `(n, S)`.
        attention_weights: `(n,)`, the query's attention to each transition after the softmax, or
            `(n + 1,)` with that to the query token itself last. May be None where `strategy` is
            one that does not look at it.
        k: transitions to keep.
        strategy: name in `STRATEGIES` or `MERGES`, to choose it whatever the attention.
        generator: for strategies that draw.
        known: further fields of `History` without their batch axis, for example `episodes (n,)`.

    Returns:
        `states (k, S), actions (k,), rewards (k,), next_states (k, S)` in the order of time; those
        given where `k >= n`; fewer for strategies that keep "up to n_keep".

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
    history = History(*(torch.as_tensor(part)[None] for part in context), **known)
    chosen = get_strategy(strategy) if strategy is not None else None
    if k >= n and strategy != "empty":
        return context
    if chosen is None:
        pattern = attention_pattern(history.query_attention[0]) if k else "uniform"
        chosen = STRATEGIES[STRATEGY_OF_PATTERN[pattern]]
    if isinstance(chosen, Merge):
        shorter = chosen.merge(history, k, generator)
    else:
        shorter = history.take(chosen.select(history, k, generator))
    return shorter.states[0], shorter.actions[0], shorter.rewards[0], shorter.next_states[0]
