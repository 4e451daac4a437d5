"""Dark Room against one room in plain python, its best play, and the split of its goals."""

import numpy as np
import pytest
from conftest import PlainRoom
from hypothesis import given
from hypothesis import strategies as st

from ad.darkroom import DarkRoom, all_goals, optimal_return, split_goals

DOWN, UP, RIGHT, LEFT, STAY = range(5)


@given(st.integers(1, 7), st.integers(1, 8), st.integers(1, 5), st.integers(0, 99))
def test_many_rooms_at_once_do_what_each_does_alone(size, horizon, n, seed):
    rng = np.random.default_rng(seed)
    goals, actions = rng.integers(size, size=(n, 2)), rng.integers(5, size=(3 * horizon, n))
    room, plain = DarkRoom(goals, size, horizon), [PlainRoom(goal, size, horizon) for goal in goals]
    for t in range(3 * horizon):
        if t % horizon == 0:
            assert room.reset().tolist() == [list(one.reset()) for one in plain]
        states, rewards, done = room.step(actions[t])
        cells, earned, ends = zip(*map(PlainRoom.step, plain, actions[t]), strict=True)
        assert states.tolist() == [list(cell) for cell in cells]
        assert (rewards.tolist(), [done] * n) == (list(earned), list(ends))


def test_best_returns_and_an_episode_from_a_reset_to_an_end_that_no_step_follows_by_hand():
    best = optimal_return(np.array([[4, 4], [4, 5], [3, 5], [0, 0], [8, 4]]))
    assert best.tolist() == [20, 20, 19, 13, 17]
    room = DarkRoom([[4, 5], [5, 5]], horizon=6)
    room.step([STAY, STAY])
    assert room.reset().tolist() == [[4, 4], [4, 4]]
    steps = [room.step(np.full(2, action)) for action in (RIGHT, STAY, DOWN, UP, LEFT, LEFT)]
    assert [s[0].tolist() for s, _, _ in steps] == [[4, 5], [4, 5], [5, 5], [4, 5], [4, 4], [4, 3]]
    assert [r.tolist() for _, r, _ in steps] == [[1, 0], [1, 0], [0, 1], [1, 0], [0, 0], [0, 0]]
    assert [done for *_, done in steps] == [False] * 5 + [True]
    with pytest.raises(RuntimeError, match="ended after 6 steps"):
        room.step([STAY, STAY])


def test_goals_outside_the_room_and_actions_that_do_not_exist_are_errors():
    for goals in ([[0, 9]], [[-1, 0]], [0, 0], [[0, 0, 0]], [[2.5, 3.0]]):
        with pytest.raises(ValueError, match="expected goals"):
            DarkRoom(np.array(goals))
    for actions in ([5, 0], [-1, 0], [0], [[0, 0]], [0.0, 1.0]):
        with pytest.raises(ValueError, match=r"expected 2 actions in 0\.\.4"):
            DarkRoom([[0, 0], [1, 1]]).step(np.array(actions))


@pytest.mark.parametrize(("size", "horizon"), [(1, 3), (2, 1), (3, 4), (4, 2), (5, 8)])
def test_optimal_return_is_that_of_the_best_play(size, horizon):
    def tried(cell, action, goal):
        room = PlainRoom(goal, size, horizon)
        room.reset()
        room.cell = cell
        return room.step(action)[:2]

    cells, expected = [(row, col) for row in range(size) for col in range(size)], []
    for goal in cells:  # every action from every cell, backwards in time
        value = dict.fromkeys(cells, 0)
        for _ in range(horizon):
            ends = {cell: [tried(cell, action, goal) for action in range(5)] for cell in cells}
            value = {cell: max(r + value[to] for to, r in ends[cell]) for cell in cells}
        expected.append(value[size // 2, size // 2])
    assert [tuple(goal) for goal in all_goals(size).tolist()] == cells
    assert optimal_return(all_goals(size), size, horizon).tolist() == expected


@given(st.integers(0, 99), st.integers(2, 9), st.integers(-1, 40), st.integers(-1, 30))
def test_a_split_deals_every_goal_to_one_part_and_the_seed_alone_decides_the_test_goals(
    seed, size, n_test, n_val
):
    cases = ((seed, 6), (seed, max(1, n_val)), (seed + 1, 6))
    few, many, other = (split_goals(s, n_validation=n)["test"] for s, n in cases)
    assert np.array_equal(few, many)
    assert not np.array_equal(few, other)
    if min(n_test, n_val) < 1 or n_test + n_val >= size**2:
        with pytest.raises(ValueError, match="cannot be split"):
            split_goals(seed, size, n_test, n_val)
        return
    parts = split_goals(seed, size, n_test, n_val)
    assert (len(parts["test"]), len(parts["validation"])) == (n_test, n_val)
    assert sorted(np.concatenate([*parts.values()]).tolist()) == all_goals(size).tolist()
