"""Learning histories on disk and the windows drawn from them; Dark Room, where they are made."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_histories
from hypothesis import assume, given
from hypothesis import strategies as st
from plain_room import PlainRoom

from ad.darkroom import TASKS, DarkRoom, all_goals, optimal_return, split_goals
from dataset import CONTEXT, ADDataset, Histories, context_steps, max_stride_of
from historylens.common.errors import UserError

BROKEN = "cannot be read as learning histories"


def numbered(n=2, n_episodes=4, horizon=3) -> Histories:
    """Histories whose every entry says which history, step and array it is of."""
    row, step = np.indices((n, n_episodes * horizon))
    mark = 1000 * row + step
    states = np.stack([mark, mark], axis=2)
    next_states = np.stack([mark + 300_000, mark + 400_000], axis=2)
    goals = np.stack([np.arange(n), np.arange(n) % 2], axis=1)
    return Histories(states, mark + 100_000, mark + 200_000, next_states, goals, horizon)


def walk_back(t, n, stride, horizon):
    """The `n` steps before the decision at `t`, found by walking back; None if they run out."""
    starts = range(t // horizon * horizon, -1, -stride * horizon)
    walked = [
        step for start in starts for step in range(min(t, start + horizon) - 1, start - 1, -1)
    ]
    return walked[:n][::-1] if len(walked) >= n else None


@given(st.integers(0, 60), st.integers(0, 25), st.integers(1, 7))
def test_context_steps_are_those_met_when_walking_back_up_to_the_largest_stride(t, n, horizon):
    largest = max_stride_of(np.array([t]), n, horizon)[0]
    for stride in range(1, 70):
        walked, found = walk_back(t, n, stride, horizon), context_steps(t, n, stride, horizon)
        assert (walked is not None) == (stride <= largest), stride
        assert found.shape == (n,)
        assert found.min() < 0 if walked is None else found.tolist() == walked


def test_histories_survive_a_round_trip(tmp_path):
    (written := make_histories()).save(tmp_path / "histories.npz")
    read = Histories.load(tmp_path / "histories.npz")
    for name in (*CONTEXT, "goals"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name), strict=True)
    assert (read.horizon, type(read.horizon)) == (written.horizon, int)


def test_a_file_that_is_cut_damaged_of_another_kind_or_missing_is_one_clear_error(tmp_path):
    make_histories().save(path := tmp_path / "histories.npz")
    content = path.read_bytes()
    for part in (0, 0.5, 0.98):
        (tmp_path / f"cut{part}.npz").write_bytes(content[: int(part * len(content))])
    path.write_bytes(content[:80] + bytes(60) + content[140:])
    (tmp_path / "text.npz").write_text("not an archive")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for file in tmp_path.iterdir():
        with pytest.raises(UserError, match=rf"{file.name} \(.* bytes\) {BROKEN}"):
            Histories.load(file)
    with pytest.raises(UserError, match=r"there is no file .*nowhere\.npz"):
        Histories.load(tmp_path / "nowhere.npz")


@pytest.mark.parametrize(("changes", "expected"), [
    ({"actions": None}, f"{BROKEN}.*actions is not a file"),
    ({"horizon": np.array([5, 5])}, BROKEN), ({"actions": np.zeros(90, dtype=int)}, BROKEN),
    ({"horizon": 4}, "expected whole episodes of 4 steps, got 30 steps a history"),
    ({"horizon": 0}, "expected whole episodes of 0 steps"),
    ({"states": np.zeros((3, 30, 3), dtype=int)}, r"expected states of shape \(3, 30, 2\)"),
    ({"goals": np.zeros((2, 2), dtype=int)}, r"expected goals of shape \(3, 2\)"),
    ({"states": np.zeros((3, 30, 2))}, "expected states of an integer type, got float64"),
])  # fmt: skip
def test_arrays_that_do_not_fit_each_other_are_one_clear_error(tmp_path, changes, expected):
    arrays = vars(make_histories()) | changes
    np.savez(tmp_path / "odd.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(UserError, match=rf"odd\.npz.*{expected}"):
        Histories.load(tmp_path / "odd.npz")


def test_code_in_a_file_is_refused_and_not_executed(tmp_path):
    class Intruder:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    arrays = vars(make_histories()) | {"rewards": np.full((3, 30), Intruder())}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match="Object arrays cannot be loaded"):
        Histories.load(tmp_path / "bad.npz")
    assert not (tmp_path / "executed").exists()


@given(*(st.integers(*ends) for ends in ((0, 23), (1, 6), (1, 9), (1, 4), (0, 99))))
def test_windows_hold_what_lies_before_their_decisions(n, horizon, n_episodes, max_stride, seed):
    assume(n_episodes * horizon > n)
    histories = numbered(2, n_episodes, horizon)
    dataset = ADDataset(histories, min(n, 3), max_stride)
    rows, steps, context = dataset.draw(20, n, np.random.default_rng(seed))
    window = dataset.gather(rows, steps, context)
    assert context.shape == (20, n)
    assert context.min(initial=0) >= 0
    for name in CONTEXT:
        assert np.array_equal(window[name], getattr(histories, name)[rows[:, None], context])
    for row, step, states, actions, before in zip(
        rows, steps, window["query_states"], window["target_actions"], context.tolist(), strict=True
    ):
        episodes = sorted({s // horizon for s in [*before, step]})
        whole = [e * horizon + i for e in episodes for i in range(horizon)]
        assert before == whole[: whole.index(step)][-n or len(whole) :]
        marks = [1000 * row + s for s in (*before, step)]  # a decision after every prefix
        assert states.tolist() == [[mark, mark] for mark in marks]
        assert actions.tolist() == [mark + 100_000 for mark in marks]


def test_a_batch_is_seeded_and_has_the_promised_keys_shapes_and_types(tiny_histories):
    shapes = {"states": (8, 11, 2), "actions": (8, 11), "rewards": (8, 11)}
    shapes |= {"next_states": (8, 11, 2), "query_states": (8, 12, 2), "target_actions": (8, 12)}
    dataset = ADDataset(tiny_histories, 11, max_stride=2)
    a, b, c = (dataset.sample(8, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert {name: tuple(value.shape) for name, value in a.items()} == shapes
    assert {value.dtype for value in a.values()} == {torch.int64}
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["states"], c["states"])
    halves = ADDataset(replace(tiny_histories, rewards=tiny_histories.rewards / 2), 11)
    assert halves.sample(8, np.random.default_rng(0))["rewards"].dtype == torch.float32
    with pytest.raises(UserError, match=r"more than 30 steps.* got 30"):
        ADDataset(tiny_histories, 30)


def drawn(n_windows, **options):
    """Windows of 10 of three histories of 60 episodes: rows, decisions, steps, and episodes."""
    draw = ADDataset(numbered(3, 60, 4), 10, max_stride=3, **options).draw
    rows, targets, steps = draw(n_windows, 10, np.random.default_rng(0))
    episodes = np.column_stack([steps, targets]) // 4
    gaps = [set(np.diff(sorted(set(row))).tolist()) for row in episodes.tolist()]
    return rows, targets, steps, episodes, gaps


def test_draws_are_even_over_histories_half_at_episode_starts_and_others_look_at_early_learning():
    rows, targets, steps, episodes, gaps = drawn(4000)
    np.testing.assert_allclose(np.bincount(rows) / 4000, 1 / 3, atol=0.03)
    at_a_start = steps[:, 0] % 4 == 0
    assert at_a_start.mean() == pytest.approx(0.5 + 0.5 / 4, abs=0.03)
    others = np.bincount(targets[~at_a_start] % 4, minlength=4)
    assert others[10 % 4] == 0
    np.testing.assert_allclose(others[others > 0] / others.sum(), 1 / 3, atol=0.04)
    even = np.array([len(gap) == 1 for gap in gaps])
    assert even.mean() == pytest.approx(0.5, abs=0.06)
    counts = [gaps.count({stride}) for stride in (1, 2, 3)]
    assert min(counts) > 0.7 * max(counts)
    begins, ends = episodes[~even, 0], episodes[~even, -1]
    assert np.median(begins) <= 3 < 10 < np.median(episodes[even, 0])
    assert ends.max() >= 55
    assert np.median(ends - begins) > 15


@pytest.mark.parametrize("part", [0.0, 0.2, 1.0])
def test_the_part_of_windows_that_join_random_episodes_is_a_setting(part):
    *_, gaps = drawn(2000, random=part)
    even = np.mean([len(gap) == 1 for gap in gaps])  # few of the others are so by chance
    assert even == pytest.approx(1 - part, abs=0.06)


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
