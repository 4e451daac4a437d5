"""Which decisions are analysed: spread, reproducible, filtered, never short of context."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from dataset import Histories, context_steps
from decisions import Decision, Filter, _distinct, choose_decisions, describe


def make_histories(goals=((0, 0), (0, 1), (1, 1)), streams=2, episodes=10, horizon=4):
    n, steps = len(goals) * streams, episodes * horizon
    rng = np.random.default_rng(0)
    return Histories(
        states=rng.integers(3, size=(n, steps, 2)),
        actions=rng.integers(5, size=(n, steps)),
        rewards=rng.integers(2, size=(n, steps)),
        next_states=rng.integers(3, size=(n, steps, 2)),
        goals=np.repeat(goals, streams, axis=0),
        horizon=horizon,
    )


def test_goals_and_their_histories_take_turns():
    chosen = choose_decisions(make_histories(), n_context=6, n_samples=12, seed=0)
    per_history = np.bincount([d.history for d in chosen], minlength=6)
    assert per_history.tolist() == [2] * 6


def test_stages_of_learning_are_spread_evenly():
    histories = make_histories(episodes=100)
    chosen = choose_decisions(histories, n_context=0, n_samples=10, seed=3)
    tenths = sorted(d.step * 10 // histories.n_steps for d in chosen)
    assert tenths == list(range(10))


def test_the_same_seed_chooses_the_same_and_another_seed_others():
    first, again, other = (choose_decisions(make_histories(), 6, 8, seed) for seed in (1, 1, 2))
    assert first == again != other


@settings(max_examples=40, deadline=None)
@given(
    n_samples=st.integers(1, 300), n_context=st.integers(0, 20), stride=st.integers(1, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_decisions_are_distinct_and_have_a_full_context(n_samples, n_context, stride, seed):
    histories = make_histories(goals=((0, 0), (2, 1)), streams=3, episodes=24)
    chosen = choose_decisions(histories, n_context, n_samples, seed, stride)
    assert len(set(chosen)) == len(chosen)
    steps = np.array([d.step for d in chosen])
    context = context_steps(steps, n_context, stride, histories.horizon)
    assert context.min(initial=0) >= 0
    n_eligible = 6 * sum(
        context_steps(np.array([t]), n_context, stride, 4).min(initial=0) >= 0
        for t in range(histories.n_steps)
    )
    assert len(chosen) == min(n_samples, n_eligible)


def test_asking_for_more_than_there_are_takes_every_decision_once():
    histories = make_histories(streams=1, episodes=2)
    chosen = choose_decisions(histories, n_context=5, n_samples=1000, seed=0)
    assert sorted((d.history, d.step) for d in chosen) == [
        (history, step) for history in range(3) for step in (5, 6, 7)
    ]


def test_filters_by_goal_history_and_steps():
    histories = make_histories()
    only = Filter(goals=[(0, 1), (1, 1)], histories=[0, 3, 4], steps=(10, 19))
    chosen = choose_decisions(histories, 6, 20, seed=0, only=only)
    assert {(d.history, d.step) for d in chosen} == {(h, t) for h in (3, 4) for t in range(10, 20)}


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (Filter(goals=[(5, 5)]), "no history of goal 5,5: expected one of 0,0, 0,1, 1,1"),
        (Filter(histories=[6]), r"expected histories in 0\.\.5, got 6"),
        (Filter(steps=(0, 5)), "expected steps between 6 .* and 39, got 0:5"),
        (Filter(goals=[(0, 0)], histories=[5]), "no history is of a goal asked for"),
    ],
)
def test_a_filter_that_nothing_passes_says_what_would(only, message):
    with pytest.raises(UserError, match=message):
        choose_decisions(make_histories(), 6, 4, seed=0, only=only)


def test_histories_too_short_for_the_context_say_so():
    with pytest.raises(UserError, match="expected 40 transitions before a decision"):
        choose_decisions(make_histories(), 40, 4, seed=0)


def test_a_sample_names_its_decision_and_marks_its_tokens():
    histories = make_histories()
    sample = describe(histories, Decision(history=3, step=14), index=7, n_context=6)
    assert sample.title == "goal (0, 1), history 3, episode 4 of 10, step 14"
    # Steps 8 .. 13: episode 2 (8-11) and two steps of episode 3 (12, 13).
    assert sample.episode_starts.tolist() == [0, 4]
    assert sample.rewarded.tolist() == (histories.rewards[3, 8:14] > 0).tolist()
    assert sample.labels == {"goal_row": 0, "goal_col": 1, "history": 3, "step": 14, "stride": 1}


def test_a_stride_joins_every_second_episode():
    sample = describe(make_histories(), Decision(0, 17, stride=2), index=0, n_context=6)
    # One step of episode 4, then episode 2 (8-11) and the last step of episode 0.
    assert sample.episode_starts.tolist() == [0, 1, 5]
    assert "one episode in 2" in sample.title


def test_equal_indices_are_pushed_apart_within_bounds():
    assert _distinct(np.array([0, 0, 4, 4]), 5).tolist() == [0, 1, 3, 4]
