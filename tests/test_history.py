"""Decisions and batches of histories: what is cut, kept, split and refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from agents import Recorder
from compression_cases import decisions_of, histories, known, make_history, same
from hypothesis import given
from hypothesis import strategies as st

from historylens.agent import act_in_parts
from historylens.history import Decision, History, episode_ids

OF_TRANSITIONS = (
    "states", "actions", "rewards", "next_states", "episodes", "received", "query_attention",
)  # fmt: skip


def test_a_decision_knows_its_episodes_and_rewards():
    decision = Decision([4, 5, 6, 7], [0] * 4, [0, 1, -1, 0.5], 8, episodes=[3, 3, 4, 6])
    assert decision.n == 4
    assert decision.episode_starts.tolist() == [0, 2, 3]
    assert decision.rewarded.tolist() == [False, True, False, True]
    assert Decision([4, 5], [0, 0], [0, 0], 8).episode_starts.tolist() == [0]
    assert Decision([], [], [], 8, episodes=[]).episode_starts.tolist() == []


def test_histories_of_decisions_are_whole_numbers_or_float32():
    given = make_history(size=3, n=5)
    decisions = decisions_of(given)
    history = History.of(decisions)
    assert all(torch.equal(a, b) for a, b in zip(history.inputs, given.inputs, strict=True))
    assert history.tasks.tolist() == [0, 0, 1]
    assert history.episodes is None
    small = History.of([replace(d, rewards=np.array(d.rewards, np.float64)) for d in decisions])
    assert (small.rewards.dtype, small.actions.dtype) == (torch.float32, torch.int64)
    assert History.of([replace(decisions[0], task=None), decisions[1]]).tasks is None


def test_take_keeps_every_field_of_the_chosen_transitions():
    history = make_history(size=2, n=5)
    indices = torch.tensor([[0, 3], [2, 4]])
    shorter = history.take(indices)
    assert shorter.kept is indices
    for b, kept in enumerate(indices.tolist()):
        for name in OF_TRANSITIONS:
            assert torch.equal(getattr(shorter, name)[b], getattr(history, name)[b, kept])
        assert torch.equal(shorter.last_rows[b], history.last_rows[b][:, kept])
    assert torch.equal(shorter.query_states, history.query_states)
    assert torch.equal(shorter.tasks, history.tasks)


@given(history=histories(), n=st.integers(0, 32))
def test_the_latest_are_the_end_and_nothing_counts_as_left_out(history, n):
    if n >= history.n:
        assert history.latest(n) is history
        return
    taken = history.take(torch.arange(history.n - n, history.n).expand(history.size, -1))
    assert same(history.latest(n), replace(taken, kept=None))


def test_rows_may_repeat():
    history = make_history(size=3, n=4).take(torch.tensor([[0, 3]] * 3))
    chosen = known(history.rows(torch.tensor([2, 0, 2])))
    assert all(torch.equal(chosen[name], v[[2, 0, 2]]) for name, v in known(history).items())


INDICES = torch.tensor([[-1, 2], [0, 5], [-1, -1], [-1, 4]])


def test_histories_that_keep_unequal_counts_are_split_fewest_first():
    history = make_history(size=4, n=6)
    assert history.counts.tolist() == [6] * 4
    shorter = history.take(INDICES)
    assert shorter.counts.tolist() == [1, 2, 0, 1]
    parts = [(part.n, rows.tolist()) for rows, part in shorter.by_count()]
    assert parts == [(0, [2]), (1, [0, 3]), (2, [1])]
    for rows, part in shorter.by_count():
        for b, row in enumerate(rows.tolist()):
            kept = [i for i in INDICES[row].tolist() if i >= 0]
            assert part.kept[b].tolist() == kept
            assert torch.equal(part.states[b], history.states[row, kept])
    ((rows, whole),) = history.by_count()
    assert rows.tolist() == [0, 1, 2, 3]
    assert whole is history


@pytest.mark.parametrize("max_tokens", [1, 6, 2**14])
def test_acting_in_parts_reads_no_padding_and_keeps_the_order(max_tokens, monkeypatch):
    """Logits: what is kept, its rewards, and where the first and the query stand."""
    monkeypatch.setattr("historylens.agent.MAX_TOKENS_ACTING", max_tokens)
    shorter = make_history(size=4, n=6).take(INDICES)
    agent = Recorder(logits=lambda part: part.rewards.sum(1, keepdim=True) + 10 * part.n)
    positions = torch.arange(12).view(4, 3)
    logits = act_in_parts(agent, shorter, positions)
    rewards = make_history(size=4, n=6).rewards
    sums = [rewards[b, [i for i in row if i >= 0]].sum() for b, row in enumerate(INDICES.tolist())]
    assert logits[:, 0].tolist() == [sums[0] + 10, sums[1] + 20, sums[2], sums[3] + 10]
    placed = sorted(row for part in agent.positions for row in part.tolist())
    assert placed == [[1, 2], [3, 4, 5], [8], [10, 11]]
    assert max(h.size * (h.n + 1) for h in agent.histories) <= max(max_tokens, 3)
    act_in_parts(agent, shorter)
    assert agent.positions[-1] is None


def test_what_a_user_gives_is_kept_as_tensors():
    history = make_history(size=2, n=5)
    arrays = {name: value.tolist() for name, value in known(history).items()}
    assert same(History(**arrays).checked(), history)


@pytest.mark.parametrize(
    "field", ["states", "rewards", "next_states", "query_states", "episodes", "last_rows", "tasks"]
)
def test_shapes_that_do_not_fit_are_refused(field):
    history = make_history(size=2, n=5)
    with pytest.raises(ValueError, match=f"{field}.* of shape"):
        replace(history, **{field: getattr(history, field)[..., :1]}).checked()


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf")])
def test_attention_before_the_softmax_is_refused(wrong):
    history = replace(make_history(size=1, n=2), query_attention=torch.tensor([[0.5, wrong]]))
    with pytest.raises(ValueError, match="query_attention after the softmax"):
        history.checked()


def test_episode_ids_count_back_from_the_episode_of_the_decision():
    ids = episode_ids(7, horizon=3, steps_taken=torch.tensor([0, 1, 2]))
    assert ids.tolist() == [[0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 1, 2, 2]]
    assert episode_ids(0, horizon=3, steps_taken=0).shape == (1, 0)
