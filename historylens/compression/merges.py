"""Histories that are no selection: merged transitions, and controls that must break the model.

A merge makes new tokens, each the mean of several transitions: states, next states and rewards are
averaged (float32), the action is the most frequent one. No such token was seen in training. A
control changes what the history says: a model whose action stays the same does not read it.

    shorter = METHODS["recent-summary"].compress(history, n_keep=10)
    strange = METHODS["other-task"].compress(history, 0, torch.Generator().manual_seed(0))
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from historylens.compression.clusters import k_means, transition_features
from historylens.compression.method import Generator, enter, uniform
from historylens.history import History

SUMMARY_SHARE = 4  # one token in so many of "recent-summary" is a summary


def _pool(history: History, labels: Tensor) -> History:
    """Average the transitions that go into each of `K` new tokens.

    `labels` `(B, n)` int is the token that each goes into, every one of `0 .. K - 1` at least once.
    Tokens stand in the order of the mean time of what they hold, and the episode of a token is that
    of its latest transition.
    """
    (size, n), n_tokens = labels.shape, int(labels.max()) + 1
    time = torch.arange(1.0, n + 1, dtype=torch.float64, device=labels.device).expand(size, n)

    def sums(values: Tensor, into: Tensor, width: int) -> Tensor:
        return values.new_zeros(size, width).scatter_add(1, into, values)

    def latest(into: Tensor, width: int) -> Tensor:
        return time.new_zeros(size, width).scatter_reduce(1, into, time, "amax")

    def mean(values: Tensor) -> Tensor:  # (B, n) -> (B, K)
        return (sums(values.double(), labels, n_tokens) / counts).float()

    counts = sums(torch.ones_like(time), labels, n_tokens)
    rank = (sums(time, labels, n_tokens) / counts).argsort(dim=1, stable=True).argsort(dim=1)
    labels = rank.gather(1, labels)
    counts = sums(torch.ones_like(time), labels, n_tokens)
    n_actions = int(history.actions.max()) + 1
    pairs, n_pairs = labels * n_actions + history.actions.long(), n_tokens * n_actions
    # Among equally frequent actions the one taken last: its time breaks the tie, below one count.
    taken = sums(torch.ones_like(time), pairs, n_pairs) + latest(pairs, n_pairs) / (n + 1)
    last = latest(labels, n_tokens).long() - 1
    return History(
        torch.stack([mean(part) for part in history.states.unbind(2)], dim=2),
        taken.view(size, n_tokens, n_actions).argmax(dim=2).to(history.actions.dtype),
        mean(history.rewards),
        torch.stack([mean(part) for part in history.next_states.unbind(2)], dim=2),
        history.query_states,
        None if history.episodes is None else history.episodes.gather(1, last),
        history.tasks,
    )


merge = partial(enter, kind="merge", finish=_pool)
control = partial(enter, kind="control", keeps="all", finish=lambda history, changed: changed)


@merge("recent-summary",
       "Rae et al. 2020, arXiv 1911.05507 (Compressive Transformer, mean pooling)")  # fmt: skip
def summary_labels(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the latest transitions for three quarters of the budget, and average the older ones in
    consecutive groups of equal length.

    One group at least: with `n_keep = 1` the whole history is averaged.
    """
    n_summaries = max(1, n_keep // SUMMARY_SHARE)
    n_older = history.n - (n_keep - n_summaries)
    time = torch.arange(history.n, device=history.device)
    grouped = time * n_summaries // n_older
    labels = torch.where(time < n_older, grouped, time - n_older + n_summaries)
    return labels.expand(history.size, -1)


@merge("centroids", "Lloyd 1982 (k-means)", "history")
def centroid_labels(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Replace each k-means cluster of transitions by its centroid."""
    return k_means(transition_features(history), n_keep)


@control("other-task", "control: the wrong task")
def other_task(history: History, n_keep: int, generator: Generator | None) -> History:
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


@control("shuffled-rewards", "control; Min et al. 2022, arXiv 2202.12837")
def shuffled_rewards(history: History, n_keep: int, generator: Generator | None) -> History:
    """Deal the rewards of each history out anew among its transitions."""
    drawn = uniform(generator, (history.size, history.n), history.device)
    shuffled = history.rewards.gather(1, drawn.argsort(dim=1))
    return replace(history, rewards=shuffled, received=None, last_rows=None, query_attention=None)
