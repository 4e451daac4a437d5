"""Which transitions of a history to keep, without a look at attention.

Each is a rule of one sentence, its docstring, that only picks real transitions. Rules run where
there is something to choose, `0 < n_keep < n`. Among equals the more recent transition stays.
"""

import math

import torch
from torch import Tensor

from historylens.compression.clusters import farthest_points, k_medoids, transition_features
from historylens.compression.method import (
    Generator,
    ages,
    draw,
    half,
    keep_best,
    keep_where,
    latest,
    strategy,
    uniform,
)
from historylens.history import History

N_FIRST = 4  # transitions that "first-recent" keeps of the beginning, as StreamingLLM does


@strategy("full", "baseline", "nothing", keeps="all")
def full(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the whole history, whatever is asked."""
    raise NotImplementedError("compress() answers before any rule")


@strategy("empty", "baseline", "nothing", keeps="none")
def empty(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep nothing, whatever is asked."""
    raise NotImplementedError("compress() answers before any rule")


@strategy("random", "baseline", "nothing")
def random(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep transitions drawn at random, all equally likely."""
    return keep_best(n_keep, uniform(generator, (history.size, history.n), history.device))


@strategy("random-recent", "baseline; Zaheer et al. 2020, arXiv 2007.14062", "nothing")
def random_recent(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the latest transitions for half of the budget, and older ones drawn at random."""
    drawn = uniform(generator, (history.size, history.n), history.device)
    return keep_best(n_keep, latest(history, half(n_keep)), drawn)


@strategy("recent", "Laskin et al. 2022, arXiv 2210.14215 (the sliding context)", "nothing")
def recent(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the latest transitions and drop what is older."""
    return keep_best(n_keep, -ages(history))


@strategy("first-recent", "Xiao et al. 2023, arXiv 2309.17453 (StreamingLLM)", "nothing")
def first_recent(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the first 4 transitions (at most half of the budget) and the latest ones."""
    n_first = min(N_FIRST, n_keep // 2)
    return keep_best(n_keep, ages(history) > history.n - n_first)


@strategy("decay", "Aggarwal 2006 (biased reservoir sampling)", "nothing")
def decay(
    history: History, n_keep: int, generator: Generator | None, half_life: float | None = None
) -> Tensor:
    """Draw transitions with a chance that halves with every n_keep steps back in time.

    Args:
        history: the raw history.
        n_keep: transitions wanted.
        generator: what to draw from.
        half_life: steps over which the chance halves; None: `n_keep`.
    """
    log_weights = -ages(history).double() * math.log(2) / (half_life or n_keep)
    return draw(history, log_weights, n_keep, generator)


@strategy("decay-spaced", "Li et al. 2019, arXiv 1907.00235 (LogSparse)", "nothing")
def decay_spaced(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep transitions whose ages grow by a constant factor, from the latest to the first."""
    back = [1]
    for j in range(1, n_keep):
        spaced = round(history.n ** (j / (n_keep - 1)))
        back.append(max(back[-1] + 1, min(spaced, history.n - (n_keep - 1 - j))))
    indices = history.n - torch.tensor(back[::-1], device=history.device)
    return indices.expand(history.size, -1)


@strategy("even", "Child et al. 2019, arXiv 1904.10509 (strided attention)", "nothing")
def even(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep evenly spaced transitions, the first and the latest among them."""
    steps = torch.arange(n_keep, device=history.device)
    if n_keep == 1:
        return (steps + history.n - 1).expand(history.size, -1)
    return (steps * (history.n - 1) // (n_keep - 1)).expand(history.size, -1)


@strategy("diverse", "Sener and Savarese 2018, arXiv 1708.00489 (farthest points)", "history")
def diverse(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the latest transition, then again and again the one least like all that are kept."""
    return farthest_points(transition_features(history), n_keep).sort(dim=1).values


@strategy("k-medoids", "Park and Jun 2009 (k-means-like k-medoids)", "history")
def medoids(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Group like transitions and keep the most central one of each group."""
    return k_medoids(transition_features(history), n_keep).sort(dim=1).values


@strategy("one-visit", "Isele and Cosgun 2018, arXiv 1802.10269 (coverage)", "history")
def one_visit(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the latest visit of each state and action, the latest of these first, and fill up with
    repeated visits.
    """
    return keep_best(n_keep, is_last_visit(history))


def is_last_visit(history: History) -> Tensor:
    """Transitions `(B, n)` bool after which the same action is not taken in the same state."""
    group = torch.arange(history.size, device=history.device).repeat_interleave(history.n)
    for column in (*history.states.unbind(2), history.actions):
        values, number = column.flatten().unique(return_inverse=True)
        group = (group * len(values) + number).unique(return_inverse=True)[1]
    time = torch.arange(group.numel(), device=history.device)
    last = torch.zeros_like(time).scatter_reduce(0, group, time, "amax")
    return (last[group] == time).view(history.size, history.n)


@strategy("rewarded-recent", "Isele and Cosgun 2018, arXiv 1802.10269 (reward)", "history")
def rewarded_recent(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the latest transitions for half of the budget, then older rewarded ones, the latest
    first, and fill up with the latest of the rest.
    """
    return keep_best(n_keep, latest(history, half(n_keep)), history.rewards > 0)


@strategy("last-episodes", "Laskin et al. 2022, arXiv 2210.14215 (contexts of whole episodes)",
          "history", keeps="up to n_keep", needs=("episodes",))  # fmt: skip
def last_episodes(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the latest episodes, each whole or not at all, as many as fit; of a latest one that does
    not fit, its end.
    """
    first = torch.searchsorted(history.episodes.contiguous(), history.episodes.contiguous())
    fits = history.n - first <= n_keep  # (B, n): from the start of its episode to the end
    return keep_where(torch.where(fits.any(dim=1, keepdim=True), fits, latest(history, n_keep)))


@strategy("best-episodes", "Liu and Abbeel 2023, arXiv 2305.16554 (episodes ranked by return)",
          "history", needs=("episodes",))  # fmt: skip
def best_episodes(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the episodes of highest return, the later first among equals, and of the last that fits
    only in part its end.
    """
    first = torch.searchsorted(history.episodes.contiguous(), history.episodes.contiguous())
    rewards = history.rewards.double()
    returns = torch.zeros_like(rewards).scatter_add(1, first, rewards).gather(1, first)
    return keep_best(n_keep, returns)


@strategy("nearest", "Schmied et al. 2024, arXiv 2410.07071 (retrieval for in-context RL)",
          "history", needs=("query_states",))  # fmt: skip
def nearest(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the transitions whose state lies nearest to the state in which to act."""
    distance = (history.states - history.query_states[:, None]).double().abs().sum(dim=2)
    return keep_best(n_keep, -distance)
