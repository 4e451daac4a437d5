"""Distances between transitions, and points or clusters that cover a history.

The distance is that of what a transition says, not of when it happened: state, action, reward and
next state, each scaled so that none rules by its unit. `F` numbers describe a transition.

    points = transition_features(history)                       # (B, n, F)
    medoids = k_medoids(points, 10)                             # (B, 10), in no order
"""

import torch
from torch import Tensor

from historylens.history import History

MAX_ROUNDS = 20  # of k-medoids and k-means; both have mostly settled after five
DECIMALS = 9  # squared distances closer than this are equal: noise of float64


def transition_features(history: History) -> Tensor:
    """Describe each transition: `(B, n, F)` float64.

    Numbers of states and the reward are scaled by their range within a history, so that each
    spans 0 to 1; one that never changes says nothing. Two different actions lie 1 apart.
    """
    parts = []
    for pair in (torch.cat([history.states, history.next_states], dim=1), history.rewards):
        values = pair.double().reshape(*pair.shape[:2], -1)
        low = values.amin(dim=1, keepdim=True)
        span = values.amax(dim=1, keepdim=True) - low
        parts.append((values - low) / torch.where(span > 0, span, torch.ones_like(span)))
    places, rewards = parts
    actions = torch.nn.functional.one_hot(history.actions.long()).double() / 2**0.5
    return torch.cat([places[:, : history.n], actions, rewards, places[:, history.n :]], dim=2)


def squared_distances(points: Tensor, centres: Tensor, squares: Tensor | None = None) -> Tensor:
    """Squared Euclidean distances `(B, n, K)` of `(B, n, F)` to `(B, K, F)`, rounded.

    `squares` `(B, n)` are the squared lengths of the points, if they are known.
    """
    squares = points.square().sum(dim=2) if squares is None else squares
    sums = squares[:, :, None] + centres.square().sum(dim=2)[:, None, :]
    found = torch.baddbmm(sums, points, centres.transpose(1, 2), alpha=-2)
    return found.clamp_(min=0).round_(decimals=DECIMALS)


def farthest_points(points: Tensor, n_keep: int) -> Tensor:
    """Farthest-point sampling (Gonzalez 1985): each new point is the one farthest from all before.

    Starts with the most recent of the points `(B, n, F)` in the order of time, and prefers the more
    recent one among equals.

    Returns:
        `(B, n_keep)` indices in the order in which they were chosen, none twice.
    """
    size, n, _ = points.shape
    rows, squares = torch.arange(size, device=points.device), points.square().sum(dim=2)
    chosen = torch.full((size, n_keep), n - 1, device=points.device)
    nearest = torch.full((size, n), torch.inf, dtype=points.dtype, device=points.device)
    for step in range(n_keep):
        if step:
            chosen[:, step] = _last_argmax(nearest)
        latest = points[rows, chosen[:, step]][:, None]  # (B, 1, F)
        nearest = nearest.minimum(squared_distances(points, latest, squares)[:, :, 0])
        nearest[rows, chosen[:, step]] = -1.0  # lies behind copies of itself, at 0
    return chosen


def _last_argmax(values: Tensor) -> Tensor:
    """Index of the largest entry of each row, the last of them among equals."""
    time = torch.arange(1, values.shape[1] + 1, device=values.device)
    return ((values == values.amax(dim=1, keepdim=True)) * time).amax(dim=1) - 1


def k_medoids(points: Tensor, n_keep: int) -> Tensor:
    """Points with a small sum of squared distances from every point to the nearest of them.

    Starts from `farthest_points`; then, in turn, every point joins its nearest medoid and every
    cluster takes the member nearest to all its members as its medoid (Park and Jun 2009). With
    squared distances that is the member nearest to the cluster's mean. The sum never rises.

    Returns:
        `(B, n_keep)` indices of the points `(B, n, F)`, which are in the order of time; in no
        order, none twice.
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
    """Cluster points `(B, n, F)` around their means (Lloyd 1982), from `farthest_points`.

    Returns:
        `(B, n)`, number of each point's cluster; no cluster is empty.
    """
    starts = farthest_points(points, n_clusters)
    centres, labels = points.take_along_dim(starts[:, :, None], dim=1), None
    for _ in range(MAX_ROUNDS):
        updated = _fill_empty(squared_distances(points, centres).argmin(dim=2), starts)
        if labels is not None and torch.equal(updated, labels):
            break
        labels, centres = updated, cluster_means(points, updated, n_clusters)
    return labels


def cluster_means(points: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """Mean `(B, K, F)` of the points in each cluster, none of which is empty."""
    size, _, width = points.shape
    into = labels[:, :, None].expand(-1, -1, width)
    means = points.new_zeros(size, n_clusters, width)
    return means.scatter_reduce(1, into, points, "mean", include_self=False)


def _fill_empty(labels: Tensor, starts: Tensor) -> Tensor:
    """Give clusters without points the one they started from, until none is empty.

    That may empty another cluster in turn; at worst every cluster ends with its own start.
    """
    numbers = torch.arange(starts.shape[1], device=labels.device).expand_as(starts)
    returned = torch.zeros_like(starts, dtype=torch.bool)
    while True:
        counts = torch.zeros_like(starts).scatter_add(1, labels, torch.ones_like(labels))
        if (counts > 0).all():
            return labels
        returned = returned | (counts == 0)
        kept = torch.where(returned, numbers, labels.gather(1, starts))
        labels = labels.scatter(1, starts, kept)
