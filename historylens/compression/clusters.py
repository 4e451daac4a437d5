"""Distances between transitions by what they say, points or clusters that cover a history, means.

points = features(history)                                  # (B, n, F)
medoids = k_medoids(points, 10)                             # (B, 10), in no order
"""

from dataclasses import replace

import torch
from torch import Tensor

from historylens.history import History

MAX_ROUNDS = 20  # of k-medoids and k-means; both have mostly settled after five
DECIMALS = 9  # squared distances closer than this are equal: noise of float64


def features(history: History) -> Tensor:
    """Describe each transition by its state, action, reward and next state: `(B, n, F)` float64.

    Numbers of states and the reward are scaled by their range within a history, so that each
    spans 0 to 1; one that never changes says nothing. Two different actions lie 1 apart.
    """
    parts = []
    for part in (torch.cat([history.states, history.next_states], 1), history.rewards[..., None]):
        low, high = part.double().aminmax(dim=1, keepdim=True)
        parts.append((part - low) / torch.where(high > low, high - low, 1.0))
    places, rewards = parts
    actions = torch.nn.functional.one_hot(history.actions.long()).double() / 2**0.5
    return torch.cat([places[:, : history.n], actions, rewards, places[:, history.n :]], dim=2)


def squared_distances(points: Tensor, centres: Tensor, squares: Tensor | None = None) -> Tensor:
    """Squared Euclidean distances `(B, n, K)` of `(B, n, F)` to `(B, K, F)`, rounded.

    `squares` `(B, n)`: the squared lengths of the points, where they are known.
    """
    squares = points.square().sum(dim=2) if squares is None else squares
    sums = squares[:, :, None] + centres.square().sum(dim=2)[:, None, :]
    found = torch.baddbmm(sums, points, centres.transpose(1, 2), alpha=-2)
    return found.clamp_(min=0).round_(decimals=DECIMALS)


def farthest_points(points: Tensor, n_keep: int) -> Tensor:
    """Farthest-point sampling (Gonzalez 1985): each new point is the one farthest from all before.

    Of points `(B, n, F)` in the order of time the latest is first, and comes first among equals.
    `(B, n_keep)` indices in the order of choice, none twice.
    """
    size, n, _ = points.shape
    rows, squares = torch.arange(size, device=points.device), points.square().sum(dim=2)
    time = torch.arange(1, n + 1, device=points.device)
    chosen = torch.empty((size, n_keep), dtype=torch.int64, device=points.device)
    nearest = torch.full((size, n), torch.inf, dtype=points.dtype, device=points.device)
    for step in range(n_keep):
        farthest = nearest == nearest.amax(dim=1, keepdim=True)
        latest = (farthest * time).amax(dim=1) - 1
        chosen[:, step] = latest
        distances = squared_distances(points, points[rows, latest][:, None], squares)[:, :, 0]
        nearest = nearest.minimum(distances)
        nearest[rows, latest] = -1.0  # lies behind copies of itself, at 0
    return chosen


def k_medoids(points: Tensor, n_keep: int) -> Tensor:
    """Points with a small sum of squared distances from every point to the nearest of them.

    From `farthest_points` on, in turn, every point joins its nearest medoid and every cluster takes
    the member nearest to all its members, so to their mean (Park and Jun 2009): it never rises.
    `(B, n_keep)` indices of the points `(B, n, F)` in the order of time; in no order, none twice.
    """
    size, n, _ = points.shape
    medoids = farthest_points(points, n_keep)
    numbers = torch.arange(n_keep, device=points.device).expand(size, n_keep)
    time = torch.arange(n, device=points.device).expand(size, n)
    for _ in range(MAX_ROUNDS):
        centres = points.take_along_dim(medoids[:, :, None], dim=1)
        # A medoid leads its own cluster, also where it is a copy of another: none is ever empty.
        labels = squared_distances(points, centres).argmin(dim=2).scatter(1, medoids, numbers)
        means = cluster_means(points, labels, n_keep).take_along_dim(labels[:, :, None], dim=1)
        off = (points - means).square().sum(dim=2).round(decimals=DECIMALS)  # (B, n)
        least = off.new_full((size, n_keep), torch.inf).scatter_reduce(1, labels, off, "amin")
        central = torch.where(off == least.gather(1, labels), time, -1)
        updated = torch.full_like(medoids, -1).scatter_reduce(1, labels, central, "amax")
        if torch.equal(updated, medoids):
            break
        medoids = updated
    return medoids


def k_means(points: Tensor, n_clusters: int) -> Tensor:
    """Cluster `(B, n)` of each point, none empty, from `farthest_points` on (Lloyd 1982)."""
    starts = farthest_points(points, n_clusters)
    centres = points.take_along_dim(starts[:, :, None], dim=1)
    labels = starts.new_empty(0)
    for _ in range(MAX_ROUNDS):
        updated = _fill_empty(squared_distances(points, centres).argmin(dim=2), starts)
        if torch.equal(updated, labels):
            break
        labels, centres = updated, cluster_means(points, updated, n_clusters)
    return labels


def cluster_means(points: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """Mean `(B, K, F)` of the points in each cluster, none of which is empty."""
    means = points.new_zeros(len(points), n_clusters, points.shape[2])
    into = labels[:, :, None].expand_as(points)
    return means.scatter_reduce(1, into, points, "mean", include_self=False)


def _fill_empty(labels: Tensor, starts: Tensor) -> Tensor:
    """Give empty clusters the point they started from, until none is: at worst, all have theirs."""
    numbers = torch.arange(starts.shape[1], device=labels.device).expand_as(starts)
    returned = torch.zeros_like(starts, dtype=torch.bool)
    while True:
        counts = torch.zeros_like(starts).scatter_add(1, labels, torch.ones_like(labels))
        if counts.all():
            return labels
        returned = returned | (counts == 0)
        kept = torch.where(returned, numbers, labels.gather(1, starts))
        labels = labels.scatter(1, starts, kept)


def pool(history: History, labels: Tensor, n_tokens: int) -> History:
    """Make `K` new tokens, in the order of their mean time: means of transitions (float32).

    `labels` `(B, n)` int is the token that each transition goes into, every one of `0 .. K - 1` at
    least once. The action is the most frequent one, the episode that of the latest transition.
    """
    size, n, width = history.states.shape
    time = torch.arange(1.0, n + 1, dtype=torch.float64, device=labels.device).expand(size, n)

    def sums(values: Tensor, into: Tensor, n_groups: int) -> Tensor:
        return time.new_zeros(size, n_groups).scatter_add(1, into, values.double())

    def latest(into: Tensor, n_groups: int) -> Tensor:
        return time.new_zeros(size, n_groups).scatter_reduce(1, into, time, "amax")

    counts = sums(torch.ones_like(time), labels, n_tokens)
    columns = (*history.states.unbind(2), *history.next_states.unbind(2), history.rewards, time)
    means = torch.stack([sums(column, labels, n_tokens) / counts for column in columns], dim=2)
    states, next_states, rewards, times = means.split([width, width, 1, 1], dim=2)  # (B, K, ...)
    n_actions = int(history.actions.max()) + 1
    pairs, n_pairs = labels * n_actions + history.actions.long(), n_tokens * n_actions
    # Among equally frequent actions the one taken last: its time breaks the tie, below one count.
    taken = sums(torch.ones_like(time), pairs, n_pairs) + latest(pairs, n_pairs) / (n + 1)
    last = latest(labels, n_tokens).long() - 1
    merged = History(
        states.float(),
        taken.view(size, n_tokens, n_actions).argmax(dim=2).to(history.actions.dtype),
        rewards[..., 0].float(),
        next_states.float(),
        history.query_states,
        None if history.episodes is None else history.episodes.gather(1, last),
        history.query_episodes,
        history.tasks,
        rewarded_above=history.rewarded_above,
    )
    return replace(merged.take(times[..., 0].argsort(dim=1, stable=True)), kept=None)
