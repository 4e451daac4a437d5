"""Points or clusters that cover a history, by what its transitions say: `features`, and means."""

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
    """Squared distances `(B, n, K)` of `(B, n, F)`, of `squares` as lengths, to `(B, K, F)`."""
    squares = points.square().sum(dim=2) if squares is None else squares
    sums = squares[:, :, None] + centres.square().sum(dim=2)[:, None, :]
    found = torch.baddbmm(sums, points, centres.transpose(1, 2), alpha=-2)
    return found.clamp_(min=0).round_(decimals=DECIMALS)


def farthest_points(points: Tensor, n_keep: int) -> Tensor:
    """Indices `(B, n_keep)` of points, each the one farthest from all before (Gonzalez 1985).

    Of points `(B, n, F)` in the order of time the latest is first, and comes first among equals.
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
    """Indices `(B, n_keep)`, in no order, of central points of clusters (Park and Jun 2009).

    From `farthest_points` on, in turn, every point joins its nearest medoid and every cluster takes
    the member nearest to all its members, so to their mean.
    """
    (size, n, _), medoids = points.shape, farthest_points(points, n_keep)
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
    centres, labels = points.take_along_dim(starts[:, :, None], dim=1), starts.new_empty(0)
    for _ in range(MAX_ROUNDS):
        updated = _fill_empty(squared_distances(points, centres).argmin(dim=2), starts)
        if torch.equal(updated, labels):
            break
        labels, centres = updated, cluster_means(points, updated, n_clusters)
    return labels


def cluster_means(points: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """Mean `(B, K, F)` of the points in each cluster, none of which is empty."""
    zeros = points.new_zeros(len(points), n_clusters, points.shape[2])
    counts = zeros[..., 0].scatter_add(1, labels, torch.ones_like(points[..., 0]))
    return zeros.scatter_add(1, labels[..., None].expand_as(points), points) / counts[..., None]


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
    columns = [history.states, history.next_states, history.rewards[..., None], time[..., None]]
    means = cluster_means(torch.cat([part.double() for part in columns], 2), labels, n_tokens)
    states, next_states, rewards, times = means.split([width, width, 1, 1], dim=2)  # (B, K, ...)
    actions, n_actions = history.actions.long(), int(history.actions.max()) + 1
    pairs, none = labels * n_actions + actions, time.new_zeros(size, n_tokens * n_actions)
    # Among equally frequent actions the one taken last: its time breaks the tie, below one count.
    taken = none.scatter_add(1, pairs, torch.ones_like(time))
    taken += none.scatter_reduce(1, pairs, time, "amax") / (n + 1)
    last = labels.new_zeros(size, n_tokens).scatter_reduce(1, labels, time.long(), "amax") - 1
    merged = replace(
        history.unlooked(),
        states=states.float(),
        actions=taken.view(size, n_tokens, n_actions).argmax(dim=2).to(history.actions.dtype),
        rewards=rewards[..., 0].float(),
        next_states=next_states.float(),
        episodes=None if history.episodes is None else history.episodes.gather(1, last),
    )
    return replace(merged.take(times[..., 0].argsort(dim=1, stable=True)), kept=None)
