"""Dark Room against one room in plain python, its best play, and the split of its goals."""

import numpy as np
import pytest
from conftest import PlainRoom
from hypothesis import given
from hypothesis import strategies as st

from ad.darkroom import DarkRoom, all_goals, optimal_return, split_goals, start_state

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


@pytest.mark.parametrize(
    ("actions", "path"),
    [
        ([DOWN, RIGHT, RIGHT, UP, LEFT, STAY], [[5, 4], [5, 5], [5, 6], [4, 6], [4, 5], [4, 5]]),
        ([DOWN] * 6, [[5, 4], [6, 4], [7, 4], [8, 4], [8, 4], [8, 4]]),
        ([UP] * 6, [[3, 4], [2, 4], [1, 4], [0, 4], [0, 4], [0, 4]]),
        ([RIGHT] * 6, [[4, 5], [4, 6], [4, 7], [4, 8], [4, 8], [4, 8]]),
        ([LEFT] * 6, [[4, 3], [4, 2], [4, 1], [4, 0], [4, 0], [4, 0]]),
    ],
)
def test_actions_move_and_a_move_into_a_wall_stays(actions, path):
    states, _ = walk(DarkRoom([[0, 0]]), actions)
    assert states[:, 0].tolist() == path


def test_every_step_on_the_goal_is_rewarded_and_none_ends_the_episode():
    room = DarkRoom([[4, 5], [5, 5]], horizon=6)
    _, rewards = walk(room, [RIGHT, STAY, DOWN, UP, RIGHT])
    assert rewards.T.tolist() == [[1, 1, 0, 1, 0], [0, 0, 1, 0, 0]]
    assert room.step(np.array([LEFT, LEFT]))[2]


def test_an_episode_starts_in_the_centre():
    assert start_state(9).tolist() == [4, 4]
    assert start_state(4).tolist() == [2, 2]
    assert DarkRoom([[0, 0], [1, 1]], 4).reset().tolist() == [[2, 2], [2, 2]]


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


def test_goals_are_all_cells_row_by_row():
    assert all_goals(2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert len(all_goals(9)) == 81


def best_play(goal, size, horizon):
    """Highest reward of an episode, by trying every action from every cell backwards in time."""
    cells = [(row, col) for row in range(size) for col in range(size)]
    room = PlainRoom(goal, size, horizon)
    value = dict.fromkeys(cells, 0)
    for _ in range(horizon):
        new = {}
        for cell in cells:
            options = []
            for action in range(5):
                room.reset()
                room.cell = cell
                reached, reward, _ = room.step(action)
                options.append(reward + value[reached])
            new[cell] = max(options)
        value = new
    return value[room.reset()]


@pytest.mark.parametrize(("size", "horizon"), [(1, 3), (2, 1), (3, 4), (4, 2), (5, 8)])
def test_optimal_return_is_that_of_the_best_play(size, horizon):
    goals = all_goals(size)
    expected = [best_play(goal, size, horizon) for goal in goals]
    assert optimal_return(goals, size, horizon).tolist() == expected


def test_optimal_return_of_the_room_of_the_paper():
    goals = [[4, 4], [4, 5], [3, 5], [0, 0], [8, 4]]
    assert optimal_return(np.array(goals)).tolist() == [20, 20, 19, 13, 17]


@given(st.integers(0, 99), st.integers(2, 9), st.integers(1, 9), st.integers(1, 9))
def test_a_split_deals_every_goal_to_exactly_one_part(seed, size, n_test, n_val):
    if n_test + n_val >= size**2:
        with pytest.raises(ValueError, match="cannot be split"):
            split_goals(seed, size, n_test, n_val)
        return
    parts = split_goals(seed, size, n_test, n_val)
    assert (len(parts["test"]), len(parts["validation"])) == (n_test, n_val)
    dealt = np.concatenate([parts[name] for name in ("train", "validation", "test")])
    assert sorted(dealt.tolist()) == all_goals(size).tolist()


@given(seed=st.integers(0, 99), n_val=st.integers(1, 60))
def test_test_goals_do_not_depend_on_how_many_goals_validate(seed, n_val):
    few, many = (split_goals(seed, n_validation=n)["test"] for n in (6, n_val))
    assert np.array_equal(few, many)


def test_a_split_is_seeded():
    one, same, other = split_goals(1), split_goals(1), split_goals(2)
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["test"], other["test"])


@pytest.mark.parametrize(("n_test", "n_val"), [(0, 6), (8, 0), (-1, 6), (75, 6)])
def test_a_split_needs_a_goal_in_every_part(n_test, n_val):
    with pytest.raises(ValueError, match="cannot be split"):
        split_goals(0, n_test=n_test, n_validation=n_val)
