"""All ways to compress a history, rules of one sentence: strategies, merges, controls.

Among equals the more recent transition stays. What looks at the query's attention shows what could
go, and saves no compute. A model whose action stays the same under a control ignores its history.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from historylens.compression import clusters
from historylens.compression.method import (
    Generator,
    ages,
    best_first,
    draw,
    enter,
    keep_best,
    keep_where,
    latest_half,
    uniform,
)
from historylens.history import CONTEXT, History
from historylens.metrics import MASS_SHARE, STRONG_WEIGHT, TOLERANCE

N_FIRST = 4  # transitions that "first-recent" keeps of the beginning, as StreamingLLM does
POOL_WIDTH = 5  # neighbouring transitions that share votes, as in SnapKV
BLOCK = 5  # transitions behind one landmark
TOP_PERCENT = 30  # of the history, kept by "top-30"
UP_TO = "up to n_keep"
SUMMARY_SHARE = 4  # one token in so many of "recent-summary" is a summary


@enter("baseline")
def random(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep transitions drawn at random, all equally likely."""
    return keep_best(n_keep, uniform(generator, (history.size, history.n), history.device))


@enter("baseline; Zaheer et al. 2020, arXiv 2007.14062")
def random_recent(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the latest transitions for half of the budget, and older ones drawn at random."""
    drawn = uniform(generator, (history.size, history.n), history.device)
    return keep_best(n_keep, latest_half(history, n_keep), drawn)


@enter("Laskin et al. 2022, arXiv 2210.14215 (the sliding context)")
def recent(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the latest transitions and drop what is older."""
    return keep_best(n_keep, -ages(history))


@enter("Xiao et al. 2023, arXiv 2309.17453 (StreamingLLM)")
def first_recent(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the first 4 transitions (at most half of the budget) and the latest ones."""
    return keep_best(n_keep, ages(history) > history.n - min(N_FIRST, n_keep // 2))


@enter("Aggarwal 2006 (biased reservoir sampling)")
def decay(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Draw transitions with a chance that halves with every n_keep steps back in time."""
    return draw(history, -ages(history).double() * math.log(2) / n_keep, n_keep, generator)


@enter("Li et al. 2019, arXiv 1907.00235 (LogSparse)")
def decay_spaced(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep transitions whose ages grow by a constant factor, from the latest to the first."""
    back = [1]
    for j in range(1, n_keep):
        spaced = round(history.n ** (j / (n_keep - 1)))
        back.append(max(back[-1] + 1, min(spaced, history.n - (n_keep - 1 - j))))
    return (history.n - torch.tensor(back[::-1], device=history.device)).expand(history.size, -1)


@enter("Child et al. 2019, arXiv 1904.10509 (strided attention)")
def even(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep evenly spaced transitions, the first and the latest among them."""
    if n_keep == 1:
        return keep_best(1, -ages(history))
    steps = torch.arange(n_keep, device=history.device)
    return (steps * (history.n - 1) // (n_keep - 1)).expand(history.size, -1)


@enter("Sener and Savarese 2018, arXiv 1708.00489 (farthest points)", *CONTEXT)
def diverse(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the latest transition, then again and again the one least like all that are kept."""
    return clusters.farthest_points(clusters.features(history), n_keep).sort(dim=1).values


@enter("Park and Jun 2009 (k-means-like k-medoids)", *CONTEXT)
def k_medoids(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Group like transitions and keep the most central one of each group."""
    return clusters.k_medoids(clusters.features(history), n_keep).sort(dim=1).values


@enter("Isele and Cosgun 2018, arXiv 1802.10269 (coverage)", "states", "actions")
def one_visit(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the latest visit of each state and action, the latest of these first, and fill up with
    repeated visits.
    """
    group = torch.arange(history.size, device=history.device).repeat_interleave(history.n)
    for column in (*history.states.unbind(2), history.actions):
        values, number = column.flatten().unique(return_inverse=True)
        group = (group * len(values) + number).unique(return_inverse=True)[1]
    time = torch.arange(group.numel(), device=history.device)
    last = torch.zeros_like(time).scatter_reduce(0, group, time, "amax")
    return keep_best(n_keep, (last[group] == time).view(history.size, history.n))


@enter("Isele and Cosgun 2018, arXiv 1802.10269 (reward)", "rewards")
def rewarded_recent(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the latest transitions for half of the budget, then older rewarded ones, the latest
    first, and fill up with the latest of the rest.
    """
    return keep_best(n_keep, latest_half(history, n_keep), history.rewarded)


@enter("Laskin et al. 2022, arXiv 2210.14215 (contexts of whole episodes)", "episodes", keeps=UP_TO)
def last_episodes(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the latest episodes, each whole or not at all, as many as fit; of a latest one that does
    not fit, its end.
    """
    first = torch.searchsorted(history.episodes.contiguous(), history.episodes.contiguous())
    fits = history.n - first <= n_keep  # (B, n): from the start of its episode to the end
    return keep_where(torch.where(fits.any(dim=1, keepdim=True), fits, ages(history) <= n_keep))


@enter("Liu and Abbeel 2023, arXiv 2305.16554 (episodes ranked by return)", "episodes")
def best_episodes(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the episodes of highest return, the later first among equals, and of the last that fits
    only in part its end.
    """
    first = torch.searchsorted(history.episodes.contiguous(), history.episodes.contiguous())
    rewards = history.rewards.double()
    returns = torch.zeros_like(rewards).scatter_add(1, first, rewards).gather(1, first)
    return keep_best(n_keep, returns)


@enter("Schmied et al. 2024, arXiv 2410.07071 (retrieval for in-context RL)", "query_states")
def nearest(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the transitions whose state lies nearest to the state in which to act."""
    distance = (history.states - history.query_states[:, None]).double().abs().sum(dim=2)
    return keep_best(n_keep, -distance)


@enter("Zhang et al. 2023, arXiv 2306.14048 (H2O)", "received")
def accumulated_recent(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the latest transitions for half of the budget, and older ones that have received most
    attention so far.
    """
    return keep_best(n_keep, latest_half(history, n_keep), history.received)


@enter("Li et al. 2024, arXiv 2404.14469 (SnapKV)", "last_rows")
def pooled_votes(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the last transitions (as many as vote, at most half of the budget), and the older ones
    that those attend most, averaged over 5 neighbours.
    """
    votes = history.last_rows.double().mean(dim=1)
    pooled = F.avg_pool1d(votes[:, None], POOL_WIDTH, stride=1, padding=POOL_WIDTH // 2)[:, 0]
    voters = ages(history) <= history.last_rows.shape[1]
    return keep_best(n_keep, voters & latest_half(history, n_keep), pooled)


@enter("Gupta et al. 2021, arXiv 2106.06899 (top-k attention)", "query_attention")
def top_k(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the transitions that the query attends most."""
    return keep_best(n_keep, history.query_attention)


@enter("Kobayashi et al. 2020, arXiv 2004.10102 (norm of the weighted values)", "norm")
def norm(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the transitions for which the heads add the longest vectors to the query."""
    return keep_best(n_keep, history.norm)


@enter("after Kobayashi et al. 2021, arXiv 2109.07152 (along the output)", "contribution")
def contribution(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the transitions to which most of what the heads add to the query is due."""
    return keep_best(n_keep, history.contribution)


@enter("Goyal et al. 2020, arXiv 2001.08950 (PoWER-BERT)", "query_attention", keeps=UP_TO)
def top_30(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the 30 % of the transitions that the query attends most, rounded up."""
    return keep_best(min(n_keep, -(-history.n * TOP_PERCENT // 100)), history.query_attention)


@enter("Kim et al. 2021, arXiv 2107.00910 (learned token pruning)", "query_attention", keeps=UP_TO)
def threshold(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the transitions with an attention weight above 0.1."""
    strong = history.query_attention > STRONG_WEIGHT + TOLERANCE
    ranks = best_first(history.query_attention).argsort(dim=1)  # (B, n), 0 for the best
    return keep_where(strong & (ranks < n_keep))


@enter("Lin et al. 2025, arXiv 2502.02770 (top-p pruning)", "query_attention", keeps=UP_TO)
def prune_low(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the fewest transitions that hold 90 % of the attention on history, and drop the rest."""
    mass = history.query_attention.double().sum(dim=1, keepdim=True)
    shares = history.query_attention.double() / torch.where(mass > 0, mass, 1.0)
    held = shares.sort(dim=1, descending=True).values.cumsum(dim=1)
    n_needed = ((held < MASS_SHARE - TOLERANCE).sum(dim=1, keepdim=True) + 1) * (mass > 0)
    ranks = best_first(shares).argsort(dim=1)  # (B, n), 0 for the best
    return keep_where(ranks < n_needed.clamp(max=n_keep))


@enter("Kool et al. 2019, arXiv 1903.06059 (Gumbel top-k)", "query_attention")
def importance(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Draw transitions with the query's attention as their chance."""
    return draw(history, history.query_attention.double().log(), n_keep, generator)


@enter("Mohtashami and Jaggi 2023, arXiv 2305.16300 (landmark attention)", "query_attention")
def landmark(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the blocks of 5 transitions whose most attended one, the landmark, is attended most, and
    of a block that fits only in part its most attended ones.
    """
    block, weights = (ages(history) - 1) // BLOCK, history.query_attention  # 0 is the latest
    marks = torch.zeros_like(weights).scatter_reduce(1, block, weights, "amax").gather(1, block)
    return keep_best(n_keep, marks, -block, weights)


@enter("baseline: the worst choice, if attention says what matters", "query_attention")
def least_attended(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the transitions that the query attends least."""
    return keep_best(n_keep, -history.query_attention)


@enter("Rae et al. 2020, arXiv 1911.05507 (Compressive Transformer, mean pooling)", kind="merge")
def recent_summary(history: History, n_keep: int, generator: Generator | None) -> History:
    """Keep the latest transitions for three quarters of the budget, and average the older ones in
    consecutive groups of equal length.
    """
    n_summaries = max(1, n_keep // SUMMARY_SHARE)  # of a budget of 1, of the whole history
    n_older = history.n - (n_keep - n_summaries)
    groups = torch.arange(n_older, device=history.device) * n_summaries // n_older
    latest = torch.arange(n_summaries, n_keep, device=history.device)
    return clusters.pool(history, torch.cat([groups, latest]).expand(history.size, -1), n_keep)


@enter("Lloyd 1982 (k-means)", *CONTEXT, kind="merge")
def centroids(history: History, n_keep: int, generator: Generator | None) -> History:
    """Replace each k-means cluster of transitions by its centroid."""
    return clusters.pool(history, clusters.k_means(clusters.features(history), n_keep), n_keep)


@enter("control: the wrong task", kind="control", keeps="all")
def other_task(history: History, n_keep: int, generator: Generator | None) -> History:
    """Give each decision the history of another one in the batch, of another task where tasks are
    known.
    """
    tasks = torch.arange(history.size) if history.tasks is None else history.tasks
    differs = (tasks[:, None] != tasks[None, :]).to(history.device)
    if not differs.any(dim=1).all():
        why = "so that each decision can be given another task's history"
        raise ValueError(f"expected a batch with histories of at least two tasks, {why}")
    drawn = uniform(generator, (history.size, history.size), history.device)
    donors = history.rows(drawn.masked_fill(~differs, -1.0).argmax(dim=1)).unlooked()
    return replace(donors, query_states=history.query_states, tasks=history.tasks)


@enter("control; Min et al. 2022, arXiv 2202.12837", kind="control", keeps="all")
def shuffled_rewards(history: History, n_keep: int, generator: Generator | None) -> History:
    """Deal the rewards of each history out anew among its transitions."""
    order = uniform(generator, (history.size, history.n), history.device).argsort(dim=1)
    return replace(history.unlooked(), rewards=history.rewards.gather(1, order))
