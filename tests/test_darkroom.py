"""Dark Room against one room in plain python, its best play, and the split of its goals."""

import numpy as np
import pytest
from conftest import PlainRoom
from hypothesis import given
from hypothesis import strategies as st

from ad.darkroom import DarkRoom, all_goals, optimal_return, split_goals

DOWN, UP, RIGHT, LEFT, STAY = range(5)


def walk(room, actions):
    """States `(steps, N, 2)` and rewards `(steps, N)` of the same actions in every room."""
    steps = [room.step(np.full(room.n_rooms, action)) for action in actions]
    return np.stack([step[0] for step in steps]), np.stack([step[1] for step in steps])


@given(
    size=st.integers(1, 7), horizon=st.integers(1, 8), n=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_many_rooms_at_once_do_what_each_does_alone(size, horizon, n, seed):
    rng = np.random.default_rng(seed)
    goals = rng.integers(size, size=(n, 2))
    actions = rng.integers(5, size=(3 * horizon, n))
    room = DarkRoom(goals, size, horizon)
    starts, steps = [], []
    for t in range(3 * horizon):
        if t % horizon == 0:
            starts.append(room.reset())
        steps.append(room.step(actions[t]))
    for i in range(n):
        plain = PlainRoom(goals[i], size, horizon)
        for t in range(3 * horizon):
            if t % horizon == 0:
                assert tuple(starts[t // horizon][i]) == plain.reset()
            cell, reward, done = plain.step(actions[t, i])
            assert (tuple(steps[t][0][i]), steps[t][1][i], steps[t][2]) == (cell, reward, done)


def test_an_episode_worked_by_hand():
    room = DarkRoom([[4, 5], [5, 5]], horizon=6)
    assert room.reset().tolist() == [[4, 4], [4, 4]]
    states, rewards = walk(room, [RIGHT, STAY, DOWN, UP, LEFT])
    assert states[:, 0].tolist() == [[4, 5], [4, 5], [5, 5], [4, 5], [4, 4]]
    assert rewards.T.tolist() == [[1, 1, 0, 1, 0], [0, 0, 1, 0, 0]]
    assert room.step(np.array([LEFT, LEFT]))[2]


def test_reset_begins_a_whole_episode_and_a_step_after_its_end_is_an_error():
    room = DarkRoom([[0, 0]], horizon=3)
    walk(room, [DOWN, DOWN])
    room.reset()
    assert [room.step(np.array([STAY]))[2] for _ in range(3)] == [False, False, True]
    with pytest.raises(RuntimeError, match="ended after 3 steps"):
        room.step(np.array([STAY]))


@pytest.mark.parametrize("goals", [[[0, 9]], [[-1, 0]], [0, 0], [[0, 0, 0]], [[2.5, 3.0]]])
def test_a_goal_outside_the_room_is_an_error(goals):
    with pytest.raises(ValueError, match="expected goals"):
        DarkRoom(np.array(goals))


@pytest.mark.parametrize("actions", [[5, 0], [-1, 0], [0], [[0, 0]], [0.0, 1.0]])
def test_an_action_that_does_not_exist_is_an_error(actions):
    with pytest.raises(ValueError, match=r"expected 2 actions in 0\.\.4"):
        DarkRoom([[0, 0], [1, 1]]).step(np.array(actions))


def best_play(goal, size, horizon):
    """Highest reward of an episode, by trying every action from every cell backwards in time."""
    room = PlainRoom(goal, size, horizon)

    def act(cell, action):
        room.reset()
        room.cell = cell
        return room.step(action)[:2]

    value = {(row, col): 0 for row in range(size) for col in range(size)}
    for _ in range(horizon):
        tried = {cell: [act(cell, action) for action in range(5)] for cell in value}
        value = {c: max(reward + value[to] for to, reward in ends) for c, ends in tried.items()}
    return value[room.reset()]


@pytest.mark.parametrize(("size", "horizon"), [(1, 3), (2, 1), (3, 4), (4, 2), (5, 8)])
def test_optimal_return_is_that_of_the_best_play(size, horizon):
    goals = [[row, col] for row in range(size) for col in range(size)]
    expected = [best_play(goal, size, horizon) for goal in goals]
    assert all_goals(size).tolist() == goals
    assert optimal_return(all_goals(size), size, horizon).tolist() == expected


def test_optimal_return_of_the_room_of_the_paper():
    goals = [[4, 4], [4, 5], [3, 5], [0, 0], [8, 4]]
    assert optimal_return(np.array(goals)).tolist() == [20, 20, 19, 13, 17]


@given(st.integers(0, 99), st.integers(2, 9), st.integers(-1, 80), st.integers(-1, 9))
def test_a_split_deals_every_goal_to_exactly_one_part(seed, size, n_test, n_val):
    if min(n_test, n_val) < 1 or n_test + n_val >= size**2:
        with pytest.raises(ValueError, match="cannot be split"):
            split_goals(seed, size, n_test, n_val)
        return
    parts = split_goals(seed, size, n_test, n_val)
    assert (len(parts["test"]), len(parts["validation"])) == (n_test, n_val)
    dealt = np.concatenate([parts[name] for name in ("train", "validation", "test")])
    assert sorted(dealt.tolist()) == all_goals(size).tolist()


@given(seed=st.integers(0, 99), n_val=st.integers(1, 60))
def test_the_seed_alone_decides_the_test_goals_however_many_validate(seed, n_val):
    few, many, other = (split_goals(s, n_validation=n)["test"] for s, n in
                        ((seed, 6), (seed, n_val), (seed + 1, 6)))  # fmt: skip
    assert np.array_equal(few, many)
    assert not np.array_equal(few, other)
