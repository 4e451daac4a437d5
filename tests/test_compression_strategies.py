"""Each strategy, merge and control by hand, and beside a slow plain twin."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from compression_cases import generator, histories, known, line, make_history
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from historylens.compression import METHODS
from historylens.compression.clusters import farthest_points, features, k_means, k_medoids
from historylens.history import LOOKS, History

STEPS = line(range(10))
ATTENDED = line(range(10), query_attention=[0.02, 0.2, 0.1, 0.0, 0.15, 0.01, 0.2, 0.1, 0.0, 0.1])
WEIGHTS = [0.02, 0.1, 0.02, 0.02, 0.3, 0.02, 0.02, 0.02, 0.02, 0.05, 0.02, 0.02]
BLOCKS = line(range(12), query_attention=WEIGHTS)  # 0..1, 2..6, 7..11
TIED_BLOCKS = line(range(10), query_attention=[0.2, *[0.05] * 4, 0.01, 0.2, *[0.01] * 3])
NUMBERS = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
ROWS = [[0, 0, 0, 0.4] + [0] * 8, [0] * 4 + [0.4] + [0] * 4 + [0.5, 0, 0]]
VOTES = line(range(12), last_rows=ROWS)
CASES = [  # name, history, and by n_keep the transitions kept, a hexadecimal digit each
    ("full", STEPS, {3: "0123456789"}),
    ("empty", STEPS, {3: ""}),
    ("recent", STEPS, {3: "789", 1: "9"}),
    ("first-recent", STEPS, {1: "9", 5: "01789", 9: "012356789"}),
    ("even", STEPS, {1: "9", 2: "09", 4: "0369", 5: "02469"}),
    # Ages 1, 10 ** 0.5 and 10; then 1, 2.15, 4.64 and 10.
    ("decay-spaced", STEPS, {1: "9", 3: "079", 4: "0589", 9: "023456789"}),
    ("top-30", ATTENDED, {8: "146", 2: "16"}),
    ("threshold", ATTENDED, {9: "146", 2: "16"}),  # 0.1 is not above 0.1
    ("prune-low", ATTENDED, {9: "124679", 4: "1469"}),  # the fewest that hold 90 % of 0.88
    ("landmark", BLOCKS, {2: "46", 5: "23456", 7: "0123456", 8: "01234569"}),  # whole blocks
    ("landmark", TIED_BLOCKS, {5: "56789", 6: "056789"}),  # blocks of equal attention stay whole
    ("last-episodes", line(range(10), episodes=NUMBERS), {3: "9", 4: "6789", 9: "3456789"}),
    ("last-episodes", line(range(9), episodes=NUMBERS[:9]), {2: "78"}),  # none fits: its end
    # Means 0.2, 0.2 and 0.25; pooled over five, 2..5 have both small ones, and 1 and 6 one of them.
    # The two last vote, and stay anyhow.
    ("pooled-votes", VOTES, {1: "b", 4: "45ab", 6: "2345ab", 9: "2345789ab"}),
    ("diverse", line([0, 1, 8, 9, 9, 4, 0]), {1: "6", 2: "46", 3: "456", 6: "123456"}),  # later 9
    ("k-medoids", line([0, 1, 2, 20, 21, 22, 40, 41, 42]), {3: "147"}),
]


@pytest.mark.parametrize(("name", "history", "expected"), CASES)
def test_cases_worked_out_by_hand(name, history, expected):
    for n_keep, digits in expected.items():
        shorter = METHODS[name].compress(history, n_keep)
        kept = [*range(history.n)] if shorter is history else shorter.kept[0].tolist()
        assert kept == [int(digit, 16) for digit in digits], n_keep


def chances_of_two(p):
    """Of each to be among two that are drawn one after the other with chances `p`."""
    return [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(6) if j != i) for i in range(6)]


@pytest.mark.parametrize(("name", "n_keep", "expected"), [
    ("random", 3, [0.5] * 6),
    ("random-recent", 3, [0.25] * 4 + [1, 1]),
    ("importance", 1, [1 / 8, 1 / 2, 0, 1 / 4, 0, 1 / 8]),
    ("importance", 5, [1, 1, 0, 1, 1, 1]),  # the later of the two that are not attended
    ("decay", 1, 2.0 ** np.arange(6) / 63),
    ("decay", 2, chances_of_two(2.0 ** (np.arange(6) / 2) / (7 + 7 * 2**0.5))),
])  # fmt: skip
def test_what_is_drawn_has_its_chance(name, n_keep, expected):
    part = torch.zeros(20000, 6, dtype=torch.long)
    weights = torch.tensor([0.1, 0.4, 0.0, 0.2, 0.0, 0.1]).expand(part.shape)
    history = History(part[..., None], part, part, part[..., None], query_attention=weights)
    kept = METHODS[name].compress(history, n_keep, np.random.default_rng(0)).kept
    found = np.bincount(kept.flatten().numpy(), minlength=6) / len(part)
    assert np.allclose(found, expected, atol=0.02)
    assert (found[np.isin(expected, (0, 1))] % 1 == 0).all()  # what is certain is so in every draw


def plain_keys(history, b, n_keep):
    """What each ranking strategy ranks by: a function of the index, for one decision."""
    n, n_recent = history.n, (n_keep + 1) // 2
    of = {name: values[b].tolist() for name, values in known(history).items()}
    attention, received, rewards = of["query_attention"], of["received"], of["rewards"]
    episodes, states, query = of["episodes"], of["states"], of["query_states"]
    visits = list(zip(states, of["actions"], strict=True))
    return {
        "top-k": lambda i: attention[i],
        "norm": lambda i: of["norm"][i],
        "contribution": lambda i: of["contribution"][i],
        "head-1-2": lambda i: of["head_attention"][1][2][i],
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


@given(history=histories(), n_keep=st.integers(1, 8))
def test_farthest_points_beside_a_plain_twin(history, n_keep):
    assume(n_keep < history.n)
    points = features(history)
    found = farthest_points(points, n_keep)
    for b, p in enumerate(points):
        apart = (p[:, None] - p).square().sum(dim=2).round(decimals=8)
        chosen = [history.n - 1]
        while len(chosen) < n_keep:
            others = set(range(history.n)) - set(chosen)
            gaps = {i: apart[i, chosen].min().item() for i in others}
            chosen.append(max(gaps, key=lambda i: (gaps[i], i)))
        assert found[b].tolist() == chosen


def test_no_member_of_a_cluster_is_nearer_to_all_its_members_than_its_medoid():
    points = torch.randn(6, 30, 2, generator=generator(1)).double()
    for p, m in zip(points, k_medoids(points, 4), strict=True):
        distances = torch.cdist(p, p) ** 2
        labels = distances[:, m].argmin(dim=1)
        for k in range(4):
            sums = distances[:, labels == k].sum(dim=1)
            assert sums[m[k]] <= sums[labels == k].min() + 1e-9


@given(st.integers(0, 10**6), st.integers(1, 25), st.integers(1, 6), st.data())
def test_no_cluster_is_empty_even_among_copies(seed, n, n_distinct, data):
    g = generator(seed)
    kinds = torch.randint(0, n_distinct, (3, n), generator=g)
    points = torch.randn(n_distinct, 2, generator=g, dtype=torch.float64)[kinds]
    n_keep = data.draw(st.integers(1, n))
    for labels, medoids in zip(k_means(points, n_keep), k_medoids(points, n_keep), strict=True):
        assert labels.unique().tolist() == list(range(n_keep))
        assert len(medoids.unique()) == n_keep


def test_features_scale_each_part_to_one():
    history = line([5, 10, 15], actions=[0, 2, 2], rewards=[1, 5, 1])
    gaps = features(history)[0].diff(dim=0).square().sum(dim=1).tolist()
    assert gaps == pytest.approx([0.5**2 + 1 + 1 + 0.5**2, 0.5 + 1])  # then the same action


@pytest.mark.parametrize("name", ["recent-summary", "centroids"])
@settings(max_examples=12)
@given(history=histories(), data=st.data())
def test_merges_beside_a_plain_twin(name, history, data):
    assume(history.n > 1)
    n_keep = data.draw(st.integers(1, history.n - 1))
    short = METHODS[name].compress(history, n_keep)
    assert known(short).keys() == known(history).keys() - LOOKS
    assert torch.equal(short.query_states, history.query_states)
    assert torch.equal(short.tasks, history.tasks)
    assert short.states.shape == (history.size, n_keep, 2)
    n_summaries = max(1, n_keep // 4)
    n_older = history.n - n_keep + n_summaries
    older = [i * n_summaries // n_older for i in range(n_older)]
    into = [[*older, *range(n_summaries, n_keep)]] * history.size  # the token of each transition
    if name == "centroids":
        into = k_means(features(history), n_keep).tolist()
    for b, labels in enumerate(into):
        groups = [[i for i in range(history.n) if labels[i] == k] for k in range(n_keep)]
        groups.sort(key=lambda g: sum(g) / len(g))
        times = [sum(g) / len(g) for g in groups]
        if len(set(times)) < len(times):
            continue  # two tokens of the same mean time: their order is the clustering's
        for k, group in enumerate(groups):
            actions = history.actions[b, group].tolist()  # the latest of the most frequent
            assert short.actions[b, k] == max(reversed(actions), key=actions.count)
            for part in ("states", "next_states", "rewards"):
                mean = getattr(history, part)[b, group].double().mean(0)
                assert torch.allclose(getattr(short, part)[b, k].double(), mean, atol=1e-5)
            assert short.episodes[b, k] == history.episodes[b, max(group)]


def test_a_control_gives_a_history_of_another_task_whatever_the_budget():
    history, other_task, donors = make_history(size=6, n=40), METHODS["other-task"], set()
    for seed in range(10):
        changed = other_task.compress(history, 5 * seed, generator(seed))
        assert known(changed).keys() == known(history).keys() - LOOKS
        assert torch.equal(changed.query_states, history.query_states)
        assert torch.equal(changed.tasks, history.tasks)
        for b in range(6):
            (donor,) = (d for d in range(6) if torch.equal(changed.states[b], history.states[d]))
            assert history.tasks[donor] != history.tasks[b]
            assert torch.equal(changed.rewards[b], history.rewards[donor])
            donors.add((b, donor))
    assert len(donors) > 12
    changed = other_task.compress(replace(history, tasks=None), 0, generator())
    assert (changed.states != history.states).flatten(1).any(dim=1).all()
    with pytest.raises(ValueError, match="at least two tasks"):
        other_task.compress(history.rows(slice(2)), 0, generator())  # both of task 0


@pytest.mark.parametrize("n_keep", [0, 200])
def test_a_control_gives_the_same_rewards_elsewhere(n_keep):
    history = make_history(size=4, n=200)
    changed = METHODS["shuffled-rewards"].compress(history, n_keep, generator())
    assert known(changed).keys() == known(history).keys() - LOOKS
    assert torch.equal(changed.rewards.sort(1).values, history.rewards.sort(1).values)
    assert (changed.rewards != history.rewards).any(dim=1).all()
    assert torch.equal(changed.states, history.states)
    assert torch.equal(changed.actions, history.actions)
