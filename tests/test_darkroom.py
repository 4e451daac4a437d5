"""Dark Room against one room in plain python, its best play, and the split of its goals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_room import PlainRoom

from ad.darkroom import TASKS, DarkRoom, all_goals, optimal_return, split_goals

EACH = pytest.mark.parametrize("env", TASKS)


@EACH
@given(st.integers(1, 7), st.integers(1, 20), st.integers(1, 5), st.integers(0, 99))
def test_many_rooms_at_once_do_what_each_does_alone(env, size, horizon, n, seed):
    rng, width = np.random.default_rng(seed), 2 * len(TASKS[env].hidden)
    goals, actions = rng.integers(size, size=(n, width)), rng.integers(5, size=(3 * horizon, n))
    room = DarkRoom(goals, size, horizon, env, range(seed, seed + n))
    plain = [PlainRoom(goal, size, horizon, env) for goal in goals]
    for t in range(3 * horizon):
        if t % horizon == 0:
            starts = room.reset().tolist()
            given = starts if TASKS[env].starts_anywhere else [None] * n
            resets = zip(plain, given, strict=True)
            assert starts == [list(one.reset(start)) for one, start in resets]
        states, rewards, done = room.step(actions[t])
        cells, earned, ends = zip(*map(PlainRoom.step, plain, actions[t]), strict=True)
        assert states.tolist() == [list(cell) for cell in cells]
        assert (rewards.tolist(), [done] * n) == (list(earned), list(ends))
        if env == "key-to-door":
            assert room.n_found.tolist() == [one.has_key + one.is_done for one in plain]


def test_no_step_follows_the_end_of_an_episode():
    room = DarkRoom([[4, 5], [5, 5]], horizon=1)
    room.step([0, 0])
    with pytest.raises(RuntimeError, match="ended after 1 steps"):
        room.step([0, 0])


def test_starts_by_chance_are_the_rooms_own_and_every_cell_is_one():
    goals = np.tile([0, 0, 2, 2], (400, 1))
    many = DarkRoom(goals, 3, 5, "key-to-door", range(400))
    few = DarkRoom(goals[:2], 3, 5, "key-to-door", [7, 399])
    starts = [(many.reset(), few.reset()) for _ in range(3)]
    assert all(np.array_equal(a[[7, 399]], b) for a, b in starts)
    counts = np.unique(starts[0][0], axis=0, return_counts=True)[1]
    assert (len(counts), counts.min() > 20) == (9, True)  # of 44 on average
    assert not np.array_equal(starts[0][0], starts[1][0])


@EACH
@pytest.mark.parametrize(("size", "horizon"), [(1, 3), (2, 1), (3, 4), (4, 2), (3, 7)])
def test_optimal_return_is_that_of_the_best_play(env, size, horizon):
    def tried(goal, cell, found, action):
        room = PlainRoom(goal, size, horizon, env)
        room.reset()
        room.cell, room.has_key = cell, found > 0
        room.is_done = found == len(TASKS[env].hidden)
        to, reward, _ = room.step(action)
        return (to, found + reward * TASKS[env].is_once), reward

    cells, expected = [(row, col) for row in range(size) for col in range(size)], []
    goals = all_goals(size, env)[:: 1 + 12 * (env == "key-to-door")]
    states = [(cell, n) for cell in cells for n in range(len(TASKS[env].hidden) + 1)]
    for goal in goals.tolist():  # every action in every state, backwards in time
        ends = {one: [tried(goal, *one, action) for action in range(5)] for one in states}
        value = dict.fromkeys(states, 0)
        for _ in range(horizon):
            value = {one: max(r + value[to] for to, r in ends[one]) for one in states}
        starts = cells if TASKS[env].starts_anywhere else [(size // 2, size // 2)]
        expected.append(np.mean([value[cell, 0] for cell in starts]))
    assert [tuple(goal) for goal in all_goals(size).tolist()] == cells
    assert optimal_return(goals, size, horizon, env) == pytest.approx(np.array(expected))


def test_there_is_a_task_for_every_pair_of_cells():
    goals = all_goals(9, "key-to-door")
    assert (goals.shape, goals.min(), goals.max()) == ((6561, 4), 0, 8)
    assert len(np.unique(goals, axis=0)) == 6561
    assert (optimal_return(goals, 9, 50, "key-to-door") == 2).all()
    assert (optimal_return(all_goals(17), 17, 20, "darkroom-hard") == 1).all()
    split = split_goals(3, 9, 8, 6, "key-to-door", n_train=50)
    assert [len(split[name]) for name in ("train", "validation", "test")] == [50, 6, 8]
    assert len(np.unique(np.concatenate([*split.values()]), axis=0)) == 64
    with pytest.raises(ValueError, match="cannot be split"):
        split_goals(3, 3, 8, 6, "key-to-door", n_train=68)


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
