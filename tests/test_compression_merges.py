"""Merged tokens hold the means of what they replace; controls keep only the shape."""

import pytest
import torch
from compression_cases import histories, known, line, make_history
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from historylens.compression import METHODS
from historylens.compression.merges import centroid_labels, summary_labels

NAMES = ("states", "actions", "rewards", "next_states")
LABELS = {"recent-summary": summary_labels, "centroids": centroid_labels}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", LABELS)
@given(history=histories(), data=st.data())
def test_merges_make_exactly_as_many_new_tokens_as_asked(name, history, data):
    n_keep = data.draw(st.integers(0, history.n))
    shorter = METHODS[name].compress(history, n_keep)
    assert shorter.n == n_keep
    assert shorter.states.shape == (history.size, n_keep, 2)
    if 0 < n_keep < history.n:
        assert set(known(shorter)) == {*NAMES, "query_states", "episodes", "tasks"}
        assert torch.equal(shorter.query_states, history.query_states)
        assert shorter.counts.tolist() == [n_keep] * history.size
        assert (shorter.episodes.diff(dim=1) >= 0).all() or name == "centroids"


def test_the_summary_averages_groups_of_older_steps():
    history = line(
        [0, 2, 10, 20, 5, 6, 7, 8, 9, 3],
        actions=[1, 1, 2, 0, 4, 4, 3, 3, 2, 1],
        rewards=[0, 1, 0, 0, 0, 0, 0, 0, 0, 1],
        episodes=[0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
    )
    merge = METHODS["recent-summary"]
    short = merge.compress(history, 4)  # one summary of 7, three recent
    assert short.states[0, :, 1].tolist() == pytest.approx([50 / 7, 8, 9, 3])
    assert torch.equal(short.next_states, short.states)
    assert short.rewards[0].tolist() == pytest.approx([1 / 7, 0, 0, 1])
    assert short.actions[0].tolist() == [4, 3, 2, 1]  # 1 and 4 twice each: 4 was taken later
    assert short.episodes[0].tolist() == [1, 1, 1, 1]
    two = merge.compress(history, 8)  # two summaries of two, six recent
    assert two.states[0, :, 1].tolist() == [1, 15, 5, 6, 7, 8, 9, 3]
    assert two.actions[0].tolist() == [1, 0, 4, 4, 3, 3, 2, 1]
    assert merge.compress(history, 1).states.tolist() == [[[0, 7]]]  # the mean of all


def test_centroids_are_the_means_of_groups_in_the_order_of_their_time():
    history = line([50, 0, 51, 1, 100, 2, 101], actions=[0, 1, 0, 1, 2, 1, 2])
    short = METHODS["centroids"].compress(history, 3)
    assert short.states[0, :, 1].tolist() == [50.5, 1, 100.5]
    assert short.actions[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", LABELS)
@settings(max_examples=12)
@given(history=histories(), data=st.data())
def test_merges_beside_a_plain_twin(name, history, data):
    assume(history.n > 1)
    n_keep = data.draw(st.integers(1, history.n - 1))
    labels = LABELS[name](history, n_keep, None)
    short = METHODS[name].compress(history, n_keep)
    for b in range(history.size):
        groups = [[i for i in range(history.n) if labels[b, i] == k] for k in range(n_keep)]
        groups.sort(key=lambda g: sum(g) / len(g))
        times = [sum(g) / len(g) for g in groups]
        if len(set(times)) < len(times):
            continue  # two tokens of the same mean time: their order is the clustering's
        for k, group in enumerate(groups):
            actions = history.actions[b, group].tolist()
            latest = {a: i for i, a in enumerate(actions)}
            most = max(latest, key=lambda a: (actions.count(a), latest[a]))
            assert short.actions[b, k] == most
            for part in ("states", "next_states", "rewards"):
                mean = getattr(history, part)[b, group].double().mean(0)
                assert torch.allclose(getattr(short, part)[b, k].double(), mean, atol=1e-5)
            assert short.episodes[b, k] == history.episodes[b, max(group)]


class TestControls:
    @pytest.mark.parametrize("name", ["other-task", "shuffled-rewards"])
    def test_the_seed_decides_and_whatever_the_budget_the_shape_stays(self, name):
        history = make_history(size=6, n=9)
        changed, same, other = (
            METHODS[name].compress(history, n_keep, generator(seed))
            for n_keep, seed in ((0, 0), (9, 0), (4, 1))
        )
        assert all(torch.equal(a, b) for a, b in zip(changed.inputs, same.inputs, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(changed.inputs, other.inputs, strict=True))
        assert changed.n == other.n == 9
        assert changed.kept is changed.query_attention is None
        with pytest.raises(ValueError, match="Generator"):
            METHODS[name].compress(history, 4)

    def test_another_task_gives_each_decision_a_history_of_another_task(self):
        history = make_history(size=6, n=40)
        donors = set()
        for seed in range(10):
            changed = METHODS["other-task"].compress(history, 0, generator(seed))
            assert torch.equal(changed.query_states, history.query_states)
            for b in range(6):
                donor = [d for d in range(6) if torch.equal(changed.states[b], history.states[d])]
                assert len(donor) == 1
                assert history.tasks[donor[0]] != history.tasks[b]
                assert torch.equal(changed.rewards[b], history.rewards[donor[0]])
                donors.add((b, donor[0]))
        assert len(donors) > 12

    def test_one_task_alone_has_no_other(self):
        history = make_history(size=2, n=5)  # both of task 0
        with pytest.raises(ValueError, match="at least two tasks"):
            METHODS["other-task"].compress(history, 0, generator())

    def test_shuffled_rewards_are_the_same_rewards_elsewhere(self):
        history = make_history(size=4, n=200)
        changed = METHODS["shuffled-rewards"].compress(history, 0, generator())
        assert torch.equal(changed.rewards.sort(1).values, history.rewards.sort(1).values)
        assert (changed.rewards != history.rewards).any(dim=1).all()
        assert torch.equal(changed.states, history.states)
        assert torch.equal(changed.actions, history.actions)
