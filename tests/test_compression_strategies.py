"""Each strategy on cases worked out by hand, and beside a slow plain twin."""

from functools import partial

import numpy as np
import pytest
import torch
from compression_cases import histories, make_history
from hypothesis import given, settings
from hypothesis import strategies as st

from compression import STRATEGIES, History, kept_counts
from compression.clusters import (
    farthest_points,
    k_means,
    k_medoids,
    squared_distances,
    transition_features,
)
from compression.history import best_first
from compression.strategies import decay


def line(cells, actions=None, rewards=None, **known):
    """One history that visits cells (0, c) in the order given."""
    cells = torch.tensor(cells)
    states = torch.stack([torch.zeros_like(cells), cells], dim=1)[None]
    n = len(cells)
    return History(
        states,
        torch.tensor([actions or [0] * n]),
        torch.tensor([rewards or [0] * n]),
        states,
        **{name: torch.tensor([value]) for name, value in known.items()},
    )


def choose(name, history, n_keep):
    generator = torch.Generator().manual_seed(0)
    return STRATEGIES[name].select(history, n_keep, generator)[0].tolist()


@pytest.mark.parametrize(
    ("name", "n_keep", "kept"),
    [
        ("full", 3, list(range(10))),
        ("empty", 3, []),
        ("recent", 3, [7, 8, 9]),
        ("recent", 1, [9]),
        ("first-recent", 1, [9]),
        ("first-recent", 5, [0, 1, 7, 8, 9]),
        ("first-recent", 9, [0, 1, 2, 3, 5, 6, 7, 8, 9]),
        ("even", 1, [9]),
        ("even", 2, [0, 9]),
        ("even", 4, [0, 3, 6, 9]),
        ("even", 5, [0, 2, 4, 6, 9]),
        ("decay-spaced", 1, [9]),
        ("decay-spaced", 2, [0, 9]),
        ("decay-spaced", 3, [0, 7, 9]),  # ages 1, 10 ** 0.5 and 10
        ("decay-spaced", 4, [0, 5, 8, 9]),  # ages 1, 2.15, 4.64 and 10
        ("decay-spaced", 9, [0, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_those_that_look_at_nothing(name, n_keep, kept):
    assert choose(name, line(range(10)), n_keep) == kept


@pytest.mark.parametrize(
    ("name", "n_keep", "kept"),
    [
        ("top-k", 1, [6]),  # 1 and 6 are equal: the more recent
        ("top-k", 3, [1, 4, 6]),
        ("top-k", 5, [1, 4, 6, 7, 9]),  # 2, 7 and 9 are equal
        ("top-30", 8, [1, 4, 6]),
        ("top-30", 2, [1, 6]),
        ("threshold", 9, [1, 4, 6]),  # 0.1 is not above 0.1
        ("threshold", 2, [1, 6]),
        ("prune-low", 9, [1, 2, 4, 6, 7, 9]),  # 0.84 of 0.9 on history without any more of them
        ("prune-low", 4, [1, 4, 6, 9]),
        ("least-attended", 3, [3, 5, 8]),
        ("least-attended", 1, [8]),
    ],
)
def test_those_that_look_at_the_query(name, n_keep, kept):
    attention = [0.02, 0.2, 0.1, 0.0, 0.15, 0.01, 0.2, 0.1, 0.0, 0.1]
    assert choose(name, line(range(10), query_attention=attention), n_keep) == kept


def test_thresholds_keep_different_counts_in_one_batch():
    attention = torch.tensor([[0.9, 0.02, 0.02, 0.02], [0.2, 0.3, 0.2, 0.2], [0.05] * 4, [0.0] * 4])
    part = torch.zeros(4, 4, dtype=torch.long)
    cells = torch.zeros(4, 4, 2)
    history = History(cells, part, part, cells, query_attention=attention)
    strong = STRATEGIES["threshold"].select(history, 3)
    assert strong.tolist() == [[-1, -1, 0], [1, 2, 3], [-1, -1, -1], [-1, -1, -1]]
    assert kept_counts(strong).tolist() == [1, 3, 0, 0]
    pruned = STRATEGIES["prune-low"].select(history, 3)
    assert pruned.tolist() == [[-1, -1, 0], [1, 2, 3], [1, 2, 3], [-1, -1, -1]]


def test_landmarks_keep_whole_blocks_of_five_counted_back():
    attention = [0.02] * 12  # blocks 0..1, 2..6 and 7..11
    attention[4], attention[1], attention[9] = 0.3, 0.1, 0.05
    history = line(range(12), query_attention=attention)
    assert choose("landmark", history, 5) == [2, 3, 4, 5, 6]
    assert choose("landmark", history, 7) == [0, 1, 2, 3, 4, 5, 6]
    assert choose("landmark", history, 8) == [0, 1, 2, 3, 4, 5, 6, 9]
    assert choose("landmark", history, 2) == [4, 6]


def test_landmarks_of_equal_attention_keep_their_blocks_together():
    attention = [0.2, 0.05, 0.05, 0.05, 0.05, 0.01, 0.2, 0.01, 0.01, 0.01]
    history = line(range(10), query_attention=attention)
    assert choose("landmark", history, 5) == [5, 6, 7, 8, 9]
    assert choose("landmark", history, 6) == [0, 5, 6, 7, 8, 9]


def test_rewarded_and_recent_share_the_budget():
    rewards = [1, 0, 1, 1, 0, 0, 0, 1, 0, 0]
    history = line(range(10), rewards=rewards)
    assert choose("rewarded-recent", history, 4) == [3, 7, 8, 9]
    assert choose("rewarded-recent", history, 6) == [0, 2, 3, 7, 8, 9]
    assert choose("rewarded-recent", history, 8) == [0, 2, 3, 5, 6, 7, 8, 9]  # 5 fills up
    assert choose("rewarded-recent", history, 1) == [9]


def test_one_visit_keeps_the_latest_of_each_state_and_action():
    history = line([4, 4, 5, 4, 5, 4], actions=[0, 1, 0, 0, 0, 1])
    assert choose("one-visit", history, 2) == [4, 5]
    assert choose("one-visit", history, 3) == [3, 4, 5]
    assert choose("one-visit", history, 4) == [2, 3, 4, 5]  # 2 repeats 4 and fills up


def test_last_episodes_are_whole():
    history = line(range(10), episodes=[0, 0, 0, 1, 1, 1, 2, 2, 2, 3])
    assert choose("last-episodes", history, 3) == [9]
    assert choose("last-episodes", history, 4) == [6, 7, 8, 9]
    assert choose("last-episodes", history, 9) == [3, 4, 5, 6, 7, 8, 9]
    whole = line(range(9), episodes=[0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert choose("last-episodes", whole, 2) == [7, 8]  # not even one fits: its end


def test_last_episodes_keep_different_counts_in_one_batch():
    part, cells = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, 2)
    episodes = torch.tensor([[0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1]])
    history = History(cells, part, part, cells, episodes=episodes)
    assert STRATEGIES["last-episodes"].select(history, 4).tolist() == [[-1, -1, 5], [3, 4, 5]]


def test_best_episodes_are_those_of_highest_return():
    history = line(
        range(10),
        rewards=[0, 1, 1, 0, 0, 1, 1, 1, 0, 0],
        episodes=[0, 0, 0, 1, 1, 1, 2, 2, 2, 3],
    )
    assert choose("best-episodes", history, 3) == [6, 7, 8]  # as good as episode 0, but later
    assert choose("best-episodes", history, 6) == [0, 1, 2, 6, 7, 8]
    assert choose("best-episodes", history, 7) == [0, 1, 2, 5, 6, 7, 8]  # the end of episode 1
    assert choose("best-episodes", history, 2) == [7, 8]


def test_nearest_goes_by_the_state_to_act_in():
    history = line([0, 7, 5, 9, 3, 5, 0], query_states=[1, 5])
    assert choose("nearest", history, 2) == [2, 5]
    assert choose("nearest", history, 3) == [2, 4, 5]  # 1 and 4 are equally near


def test_accumulated_attention_beside_the_recent():
    history = line(range(8), received=[1.0, 5, 2, 5, 0, 3, 9, 9])
    assert choose("accumulated-recent", history, 3) == [3, 6, 7]
    assert choose("accumulated-recent", history, 5) == [1, 3, 5, 6, 7]
    assert choose("accumulated-recent", history, 6) == [1, 2, 3, 5, 6, 7]


def test_votes_of_the_last_rows_are_pooled_over_five():
    rows = torch.zeros(2, 12)
    rows[0, 3], rows[1, 4], rows[1, 9] = 0.4, 0.4, 0.5
    history = line(range(12), last_rows=rows.tolist())
    # Means 0.2, 0.2 and 0.25; pooled, 2..5 have both small ones, and 1 and 6 one of them. 10 and
    # 11 vote and stay anyhow.
    assert choose("pooled-votes", history, 4) == [4, 5, 10, 11]
    assert choose("pooled-votes", history, 6) == [2, 3, 4, 5, 10, 11]
    assert choose("pooled-votes", history, 9) == [2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert choose("pooled-votes", history, 1) == [11]


def test_diverse_takes_the_farthest_each_time():
    history = line([0, 1, 8, 9, 9, 4, 0])
    assert choose("diverse", history, 1) == [6]
    assert choose("diverse", history, 2) == [4, 6]  # 9 is farthest from 0, its later visit
    assert choose("diverse", history, 3) == [4, 5, 6]
    assert choose("diverse", history, 6) == [1, 2, 3, 4, 5, 6]


def test_medoids_sit_in_the_middle_of_their_groups():
    history = line([0, 1, 2, 20, 21, 22, 40, 41, 42])
    assert choose("k-medoids", history, 3) == [1, 4, 7]


class TestDraws:
    def frequencies(self, select, n=6, draws=4000, **known):
        part = torch.zeros(draws, n, dtype=torch.long)
        known = {k: torch.tensor(v).expand(draws, -1) for k, v in known.items()}
        history = History(part[..., None], part, part, part[..., None], **known)
        chosen = select(history)
        return np.bincount(chosen.flatten().numpy(), minlength=n) / draws

    def test_random_is_even(self):
        found = self.frequencies(
            lambda h: STRATEGIES["random"].select(h, 3, np.random.default_rng(0))
        )
        assert np.allclose(found, 0.5, atol=0.04)

    def test_random_recent_leaves_the_recent_half_alone(self):
        found = self.frequencies(
            lambda h: STRATEGIES["random-recent"].select(h, 3, np.random.default_rng(0))
        )
        assert np.allclose(found, [0.25] * 4 + [1, 1], atol=0.04)

    def test_importance_draws_by_attention_and_nothing_unattended_before(self):
        found = self.frequencies(
            lambda h: STRATEGIES["importance"].select(h, 1, np.random.default_rng(0)),
            query_attention=[0.1, 0.4, 0.0, 0.2, 0.0, 0.1],
        )
        assert np.allclose(found, np.array([1, 4, 0, 2, 0, 1]) / 8, atol=0.04)
        five = self.frequencies(
            lambda h: STRATEGIES["importance"].select(h, 5, np.random.default_rng(0)),
            query_attention=[0.1, 0.4, 0.0, 0.2, 0.0, 0.1],
        )
        assert five.tolist() == [1, 1, 0, 1, 1, 1]  # the later of the two that are not attended

    @pytest.mark.parametrize(("half_life", "ratio"), [(None, 2.0), (2, 2**0.5)])
    def test_decay_halves_with_every_half_life(self, half_life, ratio):
        found = self.frequencies(
            lambda h: decay(h, 1, np.random.default_rng(0), half_life), draws=20000
        )
        expected = ratio ** np.arange(6.0)
        assert np.allclose(found, expected / expected.sum(), atol=0.02)

    def test_decay_defaults_to_the_budget(self):
        history = make_history(n=40)
        one = decay(history, 8, np.random.default_rng(0))
        assert torch.equal(one, decay(history, 8, np.random.default_rng(0), half_life=8))
        named = STRATEGIES["decay"].select(history, 8, np.random.default_rng(0))
        assert torch.equal(one, named)
        other = partial(decay, half_life=100)(history, 8, np.random.default_rng(0))
        assert not torch.equal(one, other)


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


class TestTwins:
    @settings(max_examples=30, deadline=None)
    @given(history=histories(), n_keep=st.integers(1, 8))
    def test_rules_that_rank(self, history, n_keep):
        if n_keep >= history.n:
            return
        for b in range(history.size):
            for name, key in plain_keys(history, b, n_keep).items():
                ranked = sorted(range(history.n), key=lambda i, key=key: (key(i), i), reverse=True)
                found = STRATEGIES[name].select(history, n_keep)[b].tolist()
                assert found == sorted(ranked[:n_keep]), name

    @settings(max_examples=30, deadline=None)
    @given(history=histories(), n_keep=st.integers(1, 8))
    def test_farthest_points(self, history, n_keep):
        if n_keep >= history.n:
            return
        points = transition_features(history)
        found = farthest_points(points, n_keep)
        for b in range(history.size):
            chosen = [history.n - 1]
            while len(chosen) < n_keep:
                gaps = {
                    i: min(
                        round((points[b, i] - points[b, c]).square().sum().item(), 8)
                        for c in chosen
                    )
                    for i in range(history.n)
                    if i not in chosen
                }
                chosen.append(max(gaps, key=lambda i: (gaps[i], i)))
            assert found[b].tolist() == chosen

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12))
    def test_best_first_orders_by_keys_then_by_time(self, rows):
        first, second = (torch.tensor([column]) for column in zip(*rows, strict=True))
        expected = sorted(range(len(rows)), key=lambda i: (*rows[i], i), reverse=True)
        assert best_first(first, second)[0].tolist() == expected


def cost(points, medoids):
    """Sum over points of the squared distance to the nearest medoid: `(B,)`."""
    chosen = torch.stack([p[m] for p, m in zip(points, medoids, strict=True)])
    return squared_distances(points, chosen).amin(dim=2).sum(dim=1)


class TestClusters:
    @pytest.mark.parametrize("n_keep", [2, 5, 12])
    def test_medoids_cover_better_than_chance_and_than_where_they_start(self, n_keep):
        points = torch.randn(20, 60, 3, generator=torch.Generator().manual_seed(n_keep)).double()
        found = cost(points, k_medoids(points, n_keep))
        assert (found <= cost(points, farthest_points(points, n_keep))).all()
        rng = np.random.default_rng(0)
        drawn = torch.stack(
            [
                cost(points, [torch.tensor(rng.permutation(60)[:n_keep]) for _ in range(20)])
                for _ in range(30)
            ]
        )
        assert (found < drawn.mean(0)).all()
        assert found.mean() < 0.8 * drawn.mean()

    def test_medoids_settle(self):
        """No member of a cluster is nearer to all its members than its medoid."""
        points = torch.randn(6, 30, 2, generator=torch.Generator().manual_seed(1)).double()
        medoids = k_medoids(points, 4)
        for p, m in zip(points, medoids, strict=True):
            distances = torch.cdist(p, p) ** 2
            labels = distances[:, m].argmin(dim=1)
            for k in range(4):
                members = (labels == k).nonzero()[:, 0]
                sums = distances[:, members].sum(dim=1)
                assert sums[m[k]] <= sums[members].min() + 1e-9

    @settings(max_examples=30, deadline=None)
    @given(
        seed=st.integers(0, 10**6),
        n=st.integers(1, 25),
        n_distinct=st.integers(1, 6),
        data=st.data(),
    )
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
        assert labels[0] == labels[1] == labels[2]
        assert labels[3] == labels[4]
        assert labels[5] == labels[6] == labels[7]
        assert len(set(labels)) == 3

    def test_features_scale_each_part_to_one(self):
        history = line([0, 5, 10], actions=[0, 2, 2], rewards=[0, 4, 0])
        points = transition_features(history)[0]
        assert (points[0] - points[1]).square().sum().item() == pytest.approx(
            0.5**2 + 1 + 1 + 0.5**2  # state, action, reward, next state
        )
        assert (points[1] - points[2]).square().sum().item() == pytest.approx(0.5 + 1)
