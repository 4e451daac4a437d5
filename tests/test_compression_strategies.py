"""Each strategy on cases worked out by hand, and beside a slow plain twin."""

import numpy as np
import pytest
import torch
from compression_cases import histories, line
from hypothesis import assume, given
from hypothesis import strategies as st

from historylens.compression import METHODS
from historylens.compression.clusters import (
    farthest_points,
    k_means,
    k_medoids,
    squared_distances,
    transition_features,
)
from historylens.compression.method import best_first
from historylens.history import History

STEPS = line(range(10))
ATTENTION = [0.02, 0.2, 0.1, 0.0, 0.15, 0.01, 0.2, 0.1, 0.0, 0.1]
ATTENDED = line(range(10), query_attention=ATTENTION)
BLOCKS = [0.02, 0.1, 0.02, 0.02, 0.3, 0.02, 0.02, 0.02, 0.02, 0.05, 0.02, 0.02]  # 0..1, 2..6, 7..11
TIED_BLOCKS = [0.2, 0.05, 0.05, 0.05, 0.05, 0.01, 0.2, 0.01, 0.01, 0.01]
NUMBERS = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
CASES = [  # name, history, and by n_keep the transitions kept, a digit each
    ("full", STEPS, {3: "0123456789"}),
    ("empty", STEPS, {3: ""}),
    ("recent", STEPS, {3: "789", 1: "9"}),
    ("first-recent", STEPS, {1: "9", 5: "01789", 9: "012356789"}),
    ("even", STEPS, {1: "9", 2: "09", 4: "0369", 5: "02469"}),
    # Ages 1, 10 ** 0.5 and 10; then 1, 2.15, 4.64 and 10.
    ("decay-spaced", STEPS, {1: "9", 2: "09", 3: "079", 4: "0589", 9: "023456789"}),
    ("top-k", ATTENDED, {1: "6", 3: "146", 5: "14679"}),  # 1 and 6 are equal, and 2, 7 and 9
    ("top-30", ATTENDED, {8: "146", 2: "16"}),
    ("threshold", ATTENDED, {9: "146", 2: "16"}),  # 0.1 is not above 0.1
    ("prune-low", ATTENDED, {9: "124679", 4: "1469"}),  # the fewest that hold 90 % of 0.88
    ("least-attended", ATTENDED, {3: "358", 1: "8"}),
    # Whole blocks of five, counted back; those of equal attention stay together.
    (
        "landmark",
        line(range(12), query_attention=BLOCKS),
        {2: "46", 5: "23456", 7: "0123456", 8: "01234569"},
    ),
    ("landmark", line(range(10), query_attention=TIED_BLOCKS), {5: "56789", 6: "056789"}),
    (
        "rewarded-recent",  # with 8, 5 fills up
        line(range(10), rewards=[1, 0, 1, 1, 0, 0, 0, 1, 0, 0]),
        {1: "9", 4: "3789", 6: "023789", 8: "02356789"},
    ),
    (
        "one-visit",  # 2 repeats 4
        line([4, 4, 5, 4, 5, 4], actions=[0, 1, 0, 0, 0, 1]),
        {2: "45", 3: "345", 4: "2345"},
    ),
    ("last-episodes", line(range(10), episodes=NUMBERS), {3: "9", 4: "6789", 9: "3456789"}),
    (
        "last-episodes",
        line(range(9), episodes=NUMBERS[:9]),
        {2: "78"},
    ),  # not even one fits: its end
    (
        "best-episodes",  # 2 is as good as 0, but later; then the end of 1
        line(range(10), rewards=[0, 1, 1, 0, 0, 1, 1, 1, 0, 0], episodes=NUMBERS),
        {2: "78", 3: "678", 6: "012678", 7: "0125678"},
    ),
    # 1 and 4 are equally near.
    ("nearest", line([0, 7, 5, 9, 3, 5, 0], query_states=[1, 5]), {2: "25", 3: "245"}),
    (
        "accumulated-recent",
        line(range(8), received=[1.0, 5, 2, 5, 0, 3, 9, 9]),
        {3: "367", 5: "13567", 6: "123567"},
    ),
    # 9 is farthest from 0, its later visit.
    ("diverse", line([0, 1, 8, 9, 9, 4, 0]), {1: "6", 2: "46", 3: "456", 6: "123456"}),
    ("k-medoids", line([0, 1, 2, 20, 21, 22, 40, 41, 42]), {3: "147"}),
]


@pytest.mark.parametrize(("name", "history", "expected"), CASES)
def test_cases_worked_out_by_hand(name, history, expected):
    for n_keep, digits in expected.items():
        shorter = METHODS[name].compress(history, n_keep)
        kept = range(history.n) if shorter is history else shorter.kept[0].tolist()
        assert "".join(map(str, kept)) == digits, n_keep


@pytest.mark.parametrize(
    ("name", "known", "kept"),
    [
        ("threshold", "query_attention", [[-1, -1, 0], [1, 2, 3], [-1, -1, -1], [-1, -1, -1]]),
        ("prune-low", "query_attention", [[-1, -1, 0], [1, 2, 3], [1, 2, 3], [-1, -1, -1]]),
        ("last-episodes", "episodes", [[-1, -1, 3], [1, 2, 3], [-1, 2, 3], [1, 2, 3]]),
    ],
)
def test_what_keeps_as_many_as_it_needs_pads_a_batch_in_front(name, known, kept):
    values = {
        "query_attention": [[0.9, 0.02, 0.02, 0.02], [0.2, 0.3, 0.2, 0.2], [0.05] * 4, [0.0] * 4],
        "episodes": [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]],
    }
    part, cells = torch.zeros(4, 4, dtype=torch.long), torch.zeros(4, 4, 2)
    history = History(cells, part, part, cells, **{known: torch.tensor(values[known])})
    assert METHODS[name].compress(history, 3).kept.tolist() == kept


def test_votes_of_the_last_rows_are_pooled_over_five():
    rows = torch.zeros(2, 12)
    rows[0, 3], rows[1, 4], rows[1, 9] = 0.4, 0.4, 0.5
    history = line(range(12), last_rows=rows.tolist())
    # Means 0.2, 0.2 and 0.25; pooled, 2..5 have both small ones, and 1 and 6 one of them. 10 and
    # 11 vote and stay anyhow.
    expected = {
        1: [11],
        4: [4, 5, 10, 11],
        6: [2, 3, 4, 5, 10, 11],
        9: [2, 3, 4, 5, 7, 8, 9, 10, 11],
    }
    for n_keep, kept in expected.items():
        assert METHODS["pooled-votes"].compress(history, n_keep).kept.tolist() == [kept]


class TestDraws:
    def frequencies(self, name, n_keep, draws=4000, **known):
        part = torch.zeros(draws, 6, dtype=torch.long)
        known = {k: torch.tensor(v).expand(draws, -1) for k, v in known.items()}
        history = History(part[..., None], part, part, part[..., None], **known)
        kept = METHODS[name].compress(history, n_keep, np.random.default_rng(0)).kept
        return np.bincount(kept.flatten().numpy(), minlength=6) / draws

    def test_random_is_even(self):
        assert np.allclose(self.frequencies("random", 3), 0.5, atol=0.04)

    def test_random_recent_leaves_the_recent_half_alone(self):
        found = self.frequencies("random-recent", 3)
        assert np.allclose(found, [0.25] * 4 + [1, 1], atol=0.04)

    def test_importance_draws_by_attention_and_nothing_unattended_before(self):
        weights = [0.1, 0.4, 0.0, 0.2, 0.0, 0.1]
        one, five = (self.frequencies("importance", k, query_attention=weights) for k in (1, 5))
        assert np.allclose(one, np.array([1, 4, 0, 2, 0, 1]) / 8, atol=0.04)
        assert five.tolist() == [1, 1, 0, 1, 1, 1]  # the later of the two that are not attended

    @pytest.mark.parametrize("n_keep", [1, 2])
    def test_decay_halves_with_every_n_keep_steps(self, n_keep):
        p = 2.0 ** (np.arange(6) / n_keep)
        p /= p.sum()
        second = [sum(p[j] * p[i] / (1 - p[j]) for j in range(6) if j != i) for i in range(6)]
        expected = p if n_keep == 1 else p + second  # of one drawn, or of two without replacement
        assert np.allclose(self.frequencies("decay", n_keep, draws=20000), expected, atol=0.02)


def plain_keys(history, b, n_keep):
    """What each ranking strategy ranks by: a function of the index, for one decision."""
    n, n_recent = history.n, (n_keep + 1) // 2
    attention, received, rewards, episodes, states, actions = (
        getattr(history, name)[b].tolist()
        for name in ("query_attention", "received", "rewards", "episodes", "states", "actions")
    )
    query = history.query_states[b].tolist()
    visits = list(zip(states, actions, strict=True))
    return {
        "top-k": lambda i: attention[i],
        "least-attended": lambda i: -attention[i],
        "rewarded-recent": lambda i: (i >= n - n_recent, rewards[i] > 0),
        "accumulated-recent": lambda i: (i >= n - n_recent, received[i]),
        "best-episodes": lambda i: sum(rewards[j] for j in range(n) if episodes[j] == episodes[i]),
        "one-visit": lambda i: visits[i] not in visits[i + 1 :],
        "nearest": lambda i: -abs(states[i][0] - query[0]) - abs(states[i][1] - query[1]),
    }


@given(history=histories(), n_keep=st.integers(1, 8))
def test_rules_that_rank_beside_a_plain_twin(history, n_keep):
    assume(n_keep < history.n)
    for b in range(history.size):
        for name, key in plain_keys(history, b, n_keep).items():
            ranked = sorted(range(history.n), key=lambda i, key=key: (key(i), i), reverse=True)
            kept = METHODS[name].compress(history, n_keep).kept[b].tolist()
            assert kept == sorted(ranked[:n_keep]), name


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12))
def test_best_first_orders_by_keys_then_by_time(rows):
    first, second = (torch.tensor([column]) for column in zip(*rows, strict=True))
    expected = sorted(range(len(rows)), key=lambda i: (*rows[i], i), reverse=True)
    assert best_first(first, second)[0].tolist() == expected


def cost(points, medoids):
    """Sum over points of the squared distance to the nearest medoid: `(B,)`."""
    chosen = torch.stack([p[m] for p, m in zip(points, medoids, strict=True)])
    return squared_distances(points, chosen).amin(dim=2).sum(dim=1)


class TestClusters:
    @given(history=histories(), n_keep=st.integers(1, 8))
    def test_farthest_points_beside_a_plain_twin(self, history, n_keep):
        assume(n_keep < history.n)
        points = transition_features(history)
        found = farthest_points(points, n_keep)
        for b, p in enumerate(points):
            chosen = [history.n - 1]
            while len(chosen) < n_keep:
                gaps = {
                    i: min(round((p[i] - p[c]).square().sum().item(), 8) for c in chosen)
                    for i in range(history.n)
                    if i not in chosen
                }
                chosen.append(max(gaps, key=lambda i: (gaps[i], i)))
            assert found[b].tolist() == chosen

    @pytest.mark.parametrize("n_keep", [2, 5, 12])
    def test_medoids_cover_better_than_chance_and_than_where_they_start(self, n_keep):
        points = torch.randn(20, 60, 3, generator=torch.Generator().manual_seed(n_keep)).double()
        found = cost(points, k_medoids(points, n_keep))
        assert (found <= cost(points, farthest_points(points, n_keep))).all()
        rng = np.random.default_rng(0)
        draws = [[rng.permutation(60)[:n_keep] for _ in points] for _ in range(30)]
        drawn = torch.stack([cost(points, draw) for draw in draws])
        assert (found < drawn.mean(0)).all()
        assert found.mean() < 0.8 * drawn.mean()

    def test_medoids_settle(self):
        """No member of a cluster is nearer to all its members than its medoid."""
        points = torch.randn(6, 30, 2, generator=torch.Generator().manual_seed(1)).double()
        for p, m in zip(points, k_medoids(points, 4), strict=True):
            distances = torch.cdist(p, p) ** 2
            labels = distances[:, m].argmin(dim=1)
            for k in range(4):
                members = (labels == k).nonzero()[:, 0]
                sums = distances[:, members].sum(dim=1)
                assert sums[m[k]] <= sums[members].min() + 1e-9

    @given(st.integers(0, 10**6), st.integers(1, 25), st.integers(1, 6), st.data())
    def test_no_cluster_is_empty_even_among_copies(self, seed, n, n_distinct, data):
        g = torch.Generator().manual_seed(seed)
        kinds = torch.randint(0, n_distinct, (3, n), generator=g)
        points = torch.randn(n_distinct, 2, generator=g, dtype=torch.float64)[kinds]
        n_keep = data.draw(st.integers(1, n))
        for row in k_means(points, n_keep):
            assert row.unique().tolist() == list(range(n_keep))
        for row in k_medoids(points, n_keep):
            assert len(row.unique()) == n_keep

    def test_k_means_finds_separate_groups(self):
        points = torch.tensor([0.0, 1, 2, 50, 51, 100, 101, 102])[None, :, None].double()
        labels = k_means(points, 3)[0].tolist()
        groups = [set(labels[:3]), set(labels[3:5]), set(labels[5:])]
        assert [len(group) for group in groups] == [1, 1, 1]
        assert len(set.union(*groups)) == 3

    def test_features_scale_each_part_to_one(self):
        history = line([0, 5, 10], actions=[0, 2, 2], rewards=[0, 4, 0])
        points = transition_features(history)[0]
        gaps = points.diff(dim=0).square().sum(dim=1).tolist()
        # state, action, reward, next state; then the same action
        assert gaps == pytest.approx([0.5**2 + 1 + 1 + 0.5**2, 0.5 + 1])
