"""Histories that are no selection: merged transitions, and controls that must break the model.

A merge makes new tokens, each the mean of several transitions: states, next states and rewards are
averaged (float32), the action is the most frequent one. No such token was seen in training. A
control changes what the history says: a model whose action stays the same does not read it.

    shorter = METHODS["recent-summary"].compress(history, n_keep=10)
    strange = METHODS["other-task"].compress(history, 0, torch.Generator().manual_seed(0))
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from historylens.compression.clusters import k_means, transition_features
from historylens.compression.method import (
    METHODS,
    Generator,
    Kind,
    Method,
    first_sentence,
    uniform,
)
from historylens.history import History

SUMMARY_SHARE = 4  # one token in so many of "recent-summary" is a summary


def enter(kind: Kind, name: str, source: str, looks_at: str = "nothing") -> Callable:
    """Enter a merge's labels or a control in `METHODS`; its docstring says what it does.

    A merge's rule gives the new token that each transition goes into, for `0 < n_keep < n`:
    `(B, n)` int, every one of `0 .. n_keep - 1` at least once. Tokens stand in the order of the
    mean time of what they hold, and the episode of a token is that of its latest transition.
    """

    def entered(rule: Callable) -> Callable:
        def merge(history: History, n_keep: int, generator: Generator | None) -> History:
            return _pool(history, rule(history, n_keep), n_keep)

        def control(history: History, n_keep: int, generator: Generator | None) -> History:
            return rule(history, generator)

        keeps = "n_keep" if kind == "merge" else "all"
        apply = merge if kind == "merge" else control
        about = kind, first_sentence(rule), source, looks_at, keeps, ()
        METHODS[name] = Method(name, *about, apply)
        return rule

    return entered


@enter("merge", "recent-summary",
       "Rae et al. 2020, arXiv 1911.05507 (Compressive Transformer, mean pooling)")  # fmt: skip
def summary_labels(history: History, n_keep: int) -> Tensor:
    """Keep the latest transitions for three quarters of the budget, and average the older ones in
    consecutive groups of equal length.

    One group at least: with `n_keep = 1` the whole history is averaged.
    """
    n_summaries = max(1, n_keep // SUMMARY_SHARE)
    n_recent = n_keep - n_summaries
    n_older = history.n - n_recent
    time = torch.arange(history.n, device=history.device)
    grouped = time * n_summaries // n_older
    labels = torch.where(time < n_older, grouped, time - n_older + n_summaries)
    return labels.expand(history.size, -1)


@enter("merge", "centroids", "Lloyd 1982 (k-means)", "history")
def centroid_labels(history: History, n_keep: int) -> Tensor:
    """Replace each k-means cluster of transitions by its centroid."""
    return k_means(transition_features(history), n_keep)


@enter("control", "other-task", "control: the wrong task")
def other_task(history: History, generator: Generator | None) -> History:
    """Give each decision the history of another one in the batch, of another task where tasks are
    known.

    Raises:
        ValueError: the batch holds no other task, or no other decision.
    """
    tasks = history.tasks
    if tasks is None:
        tasks = torch.arange(history.size, device=history.device)
    differs = tasks[:, None] != tasks[None, :]
    if not differs.any(dim=1).all():
        raise ValueError(
            "expected a batch with histories of at least two tasks, so that each decision can "
            "be given another task's history"
        )
    drawn = uniform(generator, (history.size, history.size), history.device)
    donors = history.rows(drawn.masked_fill(~differs, -1.0).argmax(dim=1))
    return replace(
        donors, query_states=history.query_states, tasks=history.tasks, query_attention=None
    )


@enter("control", "shuffled-rewards", "control; Min et al. 2022, arXiv 2202.12837")
def shuffled_rewards(history: History, generator: Generator | None) -> History:
    """Deal the rewards of each history out anew among its transitions."""
    drawn = uniform(generator, (history.size, history.n), history.device)
    shuffled = history.rewards.gather(1, drawn.argsort(dim=1))
    return replace(history, rewards=shuffled, received=None, last_rows=None, query_attention=None)


def _pool(history: History, labels: Tensor, n_tokens: int) -> History:
    """Average the transitions that go into each token; `labels` is `(B, n)`."""
    size, n = labels.shape
    time = torch.arange(1.0, n + 1, dtype=torch.float64, device=labels.device).expand(size, n)

    def sums(values: Tensor, into: Tensor, width: int) -> Tensor:
        return values.new_zeros(size, width).scatter_add(1, into, values)

    counts = sums(torch.ones_like(time), labels, n_tokens)  # (B, K)
    rank = (sums(time, labels, n_tokens) / counts).argsort(dim=1, stable=True).argsort(dim=1)
    labels = rank.gather(1, labels)
    counts = sums(torch.ones_like(time), labels, n_tokens)

    def mean(values: Tensor) -> Tensor:  # (B, n) -> (B, K)
        return (sums(values.double(), labels, n_tokens) / counts).float()

    n_actions = int(history.actions.max()) + 1
    pairs = labels * n_actions + history.actions.long()
    taken = sums(torch.ones_like(time), pairs, n_tokens * n_actions)
    # Among equally frequent actions the one taken last: its time breaks the tie, below one count.
    taken = taken + _latest_time(time, pairs, n_tokens * n_actions) / (n + 1)
    last = _latest_time(time, labels, n_tokens).long() - 1
    return History(
        states=torch.stack([mean(part) for part in history.states.unbind(2)], dim=2),
        actions=taken.view(size, n_tokens, n_actions).argmax(dim=2).to(history.actions.dtype),
        rewards=mean(history.rewards),
        next_states=torch.stack([mean(part) for part in history.next_states.unbind(2)], dim=2),
        query_states=history.query_states,
        episodes=None if history.episodes is None else history.episodes.gather(1, last),
        tasks=history.tasks,
    )


def _latest_time(time: Tensor, into: Tensor, width: int) -> Tensor:
    return time.new_zeros(time.shape[0], width).scatter_reduce(1, into, time, "amax")
