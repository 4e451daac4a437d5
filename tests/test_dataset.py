import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_histories
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from config import UserError
from dataset import ADDataset, Histories, context_steps, max_stride_of, packed_queries

ARRAYS = ("states", "actions", "rewards", "next_states", "goals")


def numbered(n=2, n_episodes=4, horizon=3) -> Histories:
    """Histories whose every entry says which history, step and array it is of."""
    n_steps = n_episodes * horizon
    row, step = np.indices((n, n_steps))
    mark = 1000 * row + step
    return Histories(
        np.stack([mark, mark + 0], axis=2),
        mark + 100_000,
        mark + 200_000,
        np.stack([mark + 300_000, mark + 400_000], axis=2),
        np.stack([np.arange(n), np.arange(n) % 2], axis=1),
        horizon,
    )


def walk_back(t, n, stride, horizon):
    """The `n` steps before the decision at `t`, found by walking back; None if they run out."""
    episode = t // horizon
    context = list(range(episode * horizon, t))
    while len(context) < n:
        episode -= stride
        if episode < 0:
            return None
        context = list(range(episode * horizon, (episode + 1) * horizon)) + context
    return context[len(context) - n :]


# Which steps are the context


@given(st.integers(0, 60), st.integers(0, 25), st.integers(1, 4), st.integers(1, 7))
def test_context_steps_are_those_met_when_walking_back(t, n, stride, horizon):
    walked = walk_back(t, n, stride, horizon)
    found = context_steps(np.array([t]), n, stride, horizon)
    assert found.shape == (1, n)
    if walked is None:
        assert found.min() < 0
    else:
        assert found[0].tolist() == walked


def test_context_steps_worked_by_hand():
    # Episodes 0-2, 3-5, 6-8, 9-11; the decision at step 10 is the second of the fourth episode
    steps = np.array([10, 10, 10, 9])
    found = context_steps(steps, 5, np.array([1, 2, 3, 2]), 3)
    assert found[:2].tolist() == [[5, 6, 7, 8, 9], [-1, 3, 4, 5, 9]]
    assert found[2, 1:].tolist() == [0, 1, 2, 9]
    assert found[2, 0] < 0
    assert found[3, 2:].tolist() == [3, 4, 5]


@given(st.integers(0, 60), st.integers(0, 25), st.integers(1, 7))
def test_the_largest_stride_is_the_last_that_reaches_far_enough(t, n, horizon):
    largest = max_stride_of(np.array([t]), n, horizon)[0]
    for stride in range(1, 70):
        assert (walk_back(t, n, stride, horizon) is not None) == (stride <= largest), stride


# Histories


def test_histories_survive_a_round_trip_through_a_file(tmp_path):
    written = make_histories()
    written.save(tmp_path / "histories.npz")
    read = Histories.load(tmp_path / "histories.npz")
    for name in ARRAYS:
        assert np.array_equal(getattr(read, name), getattr(written, name))
        assert getattr(read, name).dtype == getattr(written, name).dtype
    assert read.horizon == written.horizon
    assert isinstance(read.horizon, int)
    assert [path.name for path in tmp_path.iterdir()] == ["histories.npz"]


def test_a_failed_save_leaves_the_old_file_and_no_part_of_a_new_one(tmp_path, monkeypatch):
    path = tmp_path / "histories.npz"
    make_histories().save(path)
    before = path.read_bytes()

    def full_disk(file, **arrays):
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OSError, match="no space left"):
        make_histories(seed=1).save(path)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["histories.npz"]


@pytest.mark.parametrize("part", [0, 0.02, 0.5, 0.98])
def test_a_truncated_file_is_one_clear_error(tmp_path, part):
    path = tmp_path / "histories.npz"
    make_histories().save(path)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(
        UserError, match=r"histories\.npz is not a whole file of learning histories"
    ):
        Histories.load(path)


def test_flipped_bytes_are_one_clear_error(tmp_path):
    path = tmp_path / "histories.npz"
    make_histories().save(path)
    content = bytearray(path.read_bytes())
    content[80:140] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a whole file of learning histories"):
        Histories.load(path)


def write(path, **changes):
    """An `.npz` of histories with some arrays changed, or left out where None."""
    arrays = {name: getattr(make_histories(), name) for name in (*ARRAYS, "horizon")} | changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"actions": None},
        {"horizon": None},
        {"horizon": np.array([5, 5])},
        {"horizon": 7},
        {"horizon": 0},
        {"actions": np.zeros(90, dtype=int)},
        {"goals": np.zeros((2, 2), dtype=int)},
        {"next_states": np.zeros((3, 29, 2), dtype=int)},
        {"rewards": np.array([[None]])},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_arrays_that_do_not_fit_each_other_are_one_clear_error(tmp_path, changes):
    path = write(tmp_path / "odd.npz", **changes)
    with pytest.raises(UserError, match=r"odd\.npz"):
        Histories.load(path)


def test_another_kind_of_file_is_one_clear_error(tmp_path):
    (tmp_path / "text.npz").write_text("not an archive")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("text.npz", "one.npy"):
        with pytest.raises(UserError, match="not a whole file of learning histories"):
            Histories.load(tmp_path / name)


def test_code_in_a_file_is_refused_and_not_executed(tmp_path):
    class Intruder:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    rewards = np.full((3, 30), None)
    rewards[0, 0] = Intruder()
    path = write(tmp_path / "bad.npz", rewards=rewards)
    with pytest.raises(UserError, match="not a whole file of learning histories"):
        Histories.load(path)
    assert not (tmp_path / "executed").exists()


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises((FileNotFoundError, UserError), match=r"nowhere\.npz"):
        Histories.load(tmp_path / "nowhere.npz")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("states", (3, 30, 3)), ("rewards", (3, 29)), ("next_states", (2, 30, 2)), ("goals", (3, 3))],
)
def test_histories_say_which_array_has_the_wrong_shape(name, shape):
    with pytest.raises(ValueError, match=f"expected {name} of shape"):
        replace(make_histories(), **{name: np.zeros(shape, dtype=int)})


def test_histories_hold_whole_episodes_only():
    with pytest.raises(ValueError, match="whole episodes of 4 steps, got 30"):
        replace(make_histories(), horizon=4)


def test_episode_returns_worked_by_hand():
    rewards = np.array([[0, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1]])
    histories = replace(numbered(2, 2, 3), rewards=rewards)
    assert histories.episode_returns().tolist() == [[2, 0], [3, 1]]


def same_part(part, whole, rows, steps):
    for name in ("states", "actions", "rewards", "next_states"):
        assert np.array_equal(getattr(part, name), getattr(whole, name)[rows][:, steps])
    assert np.array_equal(part.goals, whole.goals[rows])
    assert part.horizon == whole.horizon


def test_select_by_goal_keeps_every_history_of_those_goals():
    whole = make_histories(goals=[(0, 1), (2, 2), (0, 1), (1, 0)])
    same_part(whole.select(goals=[(0, 1)]), whole, [0, 2], slice(None))
    same_part(whole.select(goals=np.array([(1, 0), (0, 1)])), whole, [0, 2, 3], slice(None))
    same_part(whole.select(goals=(2, 2)), whole, [1], slice(None))
    assert whole.select(goals=[(4, 4)]).n_histories == 0


def test_select_counts_histories_among_those_of_the_goals():
    whole = make_histories(goals=[(0, 1), (2, 2), (0, 1), (1, 0)])
    same_part(whole.select(histories=[3, 1]), whole, [3, 1], slice(None))
    same_part(whole.select(goals=[(0, 1)], histories=[1]), whole, [2], slice(None))


@pytest.mark.parametrize("steps", [slice(5, 20), slice(None, 10), slice(-10, None), slice(0, 30)])
def test_select_by_steps_cuts_at_episodes(steps):
    whole = make_histories()
    same_part(whole.select(steps=steps), whole, [0, 1, 2], steps)


@pytest.mark.parametrize("steps", [slice(3, 23), slice(5, 17), slice(0, 30, 2), slice(None, 9)])
def test_select_never_cuts_an_episode(steps):
    with pytest.raises(ValueError, match="episode"):
        make_histories().select(steps=steps)


# Windows


@given(
    n_context=st.integers(0, 20),
    horizon=st.integers(1, 6),
    n_episodes=st.integers(1, 8),
    max_stride=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_windows_hold_what_the_history_holds(n_context, horizon, n_episodes, max_stride, seed):
    assume(n_episodes * horizon > n_context)
    histories = numbered(2, n_episodes, horizon)
    dataset = ADDataset(histories, n_context, max_stride, seed)
    assert len(dataset) == 2 * (n_episodes * horizon - n_context)
    seen = []
    for index in range(len(dataset)):
        item = dataset[index]
        row, step = divmod(int(item["target_actions"]) - 100_000, 1000)
        seen.append((row, step))
        mark = item["actions"].numpy() - 100_000 - 1000 * row
        allowed = [walk_back(step, n_context, k, horizon) for k in range(1, max_stride + 1)]
        assert mark.tolist() in allowed
        for name in ("states", "actions", "rewards", "next_states"):
            assert np.array_equal(item[name], getattr(histories, name)[row, mark])
        assert np.array_equal(item["query_states"], histories.states[row, step])
    assert seen == [(r, t) for r in (0, 1) for t in range(n_context, histories.n_steps)]


def test_an_item_has_the_promised_keys_shapes_and_types(tiny_histories):
    shapes = {
        "states": (11, 2),
        "actions": (11,),
        "rewards": (11,),
        "next_states": (11, 2),
        "query_states": (2,),
        "target_actions": (),
    }
    for index in (0, 7, -1):
        item = ADDataset(tiny_histories, 11, max_stride=2)[index]
        assert {name: tuple(value.shape) for name, value in item.items()} == shapes
        assert {value.dtype for value in item.values()} == {torch.int64}


def test_the_default_collate_of_a_data_loader_makes_batches(tiny_histories):
    dataset = ADDataset(tiny_histories, 11, max_stride=2)
    batches = list(DataLoader(dataset, batch_size=8, shuffle=False))
    assert batches[0]["next_states"].shape == (8, 11, 2)
    assert sum(len(batch["target_actions"]) for batch in batches) == len(dataset) == 57
    for name, value in dataset[9].items():
        assert torch.equal(batches[1][name][1], value)


def test_indexes_count_from_the_end_and_stop_there(tiny_histories):
    dataset = ADDataset(tiny_histories, 11, max_stride=2)
    for name, value in dataset[len(dataset) - 1].items():
        assert torch.equal(dataset[-1][name], value)
    assert len(list(dataset)) == len(dataset)
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError):
            dataset[index]


def contexts(dataset, indexes):
    return [dataset[index]["actions"].tolist() for index in indexes]


def test_the_stride_of_an_item_is_drawn_once_from_the_seed():
    histories = numbered(1, 40, 3)
    late = range(90, 110)
    a, b, c = (ADDataset(histories, 7, 4, seed) for seed in (0, 0, 1))
    assert contexts(a, late) == contexts(a, late) == contexts(b, reversed(late))[::-1]
    assert contexts(a, late) != contexts(c, late)


def test_every_stride_up_to_the_largest_occurs():
    dataset = ADDataset(numbered(1, 40, 3), 7, max_stride=4)
    strides = {
        k
        for index in range(80, 110)
        for k in range(1, 7)
        if contexts(dataset, [index])[0]
        == [100_000 + step for step in walk_back(index + 7, 7, k, 3)]
    }
    assert strides == {1, 2, 3, 4}


def test_windows_are_the_chosen_ones():
    batch = ADDataset(numbered(2, 4, 3), 4).windows([1, 0], [10, 6], [2, 1])
    assert batch["states"][..., 0].tolist() == [[1003, 1004, 1005, 1009], [2, 3, 4, 5]]
    assert batch["next_states"][0, 0].tolist() == [301_003, 401_003]
    assert batch["query_states"][:, 0].tolist() == [1010, 6]
    assert batch["target_actions"].tolist() == [101_010, 100_006]


def test_a_window_that_reaches_before_the_history_is_an_error():
    dataset = ADDataset(numbered(2, 4, 3), 4)
    with pytest.raises(UserError, match="decision at step 7 lacks 3 of its 4 transitions"):
        dataset.windows([0, 0], [10, 7], [2, 3])


@pytest.mark.parametrize("n_context", [30, 31, 99])
def test_histories_too_short_for_the_context_are_an_error(tiny_histories, n_context):
    with pytest.raises(UserError, match=rf"more than {n_context} steps.* got 30"):
        ADDataset(tiny_histories, n_context)


def test_one_step_more_than_the_context_is_one_window_a_history(tiny_histories):
    dataset = ADDataset(tiny_histories, 29, max_stride=9)
    assert len(dataset) == 3
    assert np.array_equal(dataset[1]["actions"], tiny_histories.actions[1, :29])
    assert dataset[1]["target_actions"] == tiny_histories.actions[1, 29]


# Training batches


@given(
    n_context=st.integers(0, 20),
    horizon=st.integers(1, 6),
    n_episodes=st.integers(1, 9),
    max_stride=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_sampled_windows_never_reach_before_the_history(
    n_context, horizon, n_episodes, max_stride, seed
):
    assume(n_episodes * horizon > n_context)
    dataset = ADDataset(numbered(2, n_episodes, horizon), n_context, max_stride)
    batch = dataset.sample(40, np.random.default_rng(seed))
    for row_of_actions, target in zip(batch["actions"], batch["target_actions"], strict=True):
        row, step = divmod(int(target) - 100_000, 1000)
        mark = (row_of_actions - 100_000 - 1000 * row).tolist()
        episodes = sorted({s // horizon for s in [*mark, step]})
        whole = [e * horizon + i for e in episodes for i in range(horizon)]
        assert mark == whole[: whole.index(step)][-n_context or len(whole) :]
        assert min(mark, default=0) >= 0


@pytest.fixture(scope="module")
def drawn():
    """4,000 windows of 10 transitions from 3 histories of 60 episodes of 4 steps."""
    dataset = ADDataset(numbered(3, 60, 4), 10, max_stride=3)
    batch = dataset.sample(4000, np.random.default_rng(0))
    steps = batch["actions"].numpy() - 100_000
    targets = batch["target_actions"].numpy() - 100_000
    return steps // 1000, steps % 1000, targets % 1000


def test_half_of_the_sampled_windows_begin_with_an_episode(drawn):
    _, steps, targets = drawn
    at_a_start = steps[:, 0] % 4 == 0
    assert at_a_start.mean() == pytest.approx(0.5 + 0.5 / 4, abs=0.03)
    others = np.bincount(targets[~at_a_start] % 4, minlength=4)
    assert others[10 % 4] == 0
    np.testing.assert_allclose(others[others > 0] / others.sum(), 1 / 3, atol=0.04)


def test_sampled_windows_are_uniform_over_histories(drawn):
    np.testing.assert_allclose(np.bincount(drawn[0][:, 0]) / 4000, 1 / 3, atol=0.03)


def gaps_of(steps, targets):
    """Episodes between neighbours in a window, the decision's own included: a list a window."""
    return [
        np.diff(sorted({*(row // 4), target // 4})).tolist()
        for row, target in zip(steps, targets, strict=True)
    ]


def test_half_of_the_sampled_windows_join_every_kth_episode(drawn):
    _, steps, targets = drawn
    gaps = gaps_of(steps, targets)
    even = [gap[0] for gap in gaps if len(set(gap)) == 1]
    # Few of the others have equal gaps by chance.
    assert len(even) / 4000 == pytest.approx(0.5, abs=0.06)
    counts = np.bincount(even, minlength=4)[1:4]
    assert counts.min() > 0.7 * counts.max()


def test_the_other_half_spreads_over_the_history_and_looks_at_early_learning_most(drawn):
    _, steps, targets = drawn
    spread = np.array([len(set(gap)) > 1 for gap in gaps_of(steps, targets)])
    begins, ends = steps[spread, 0] // 4, targets[spread] // 4
    assert np.median(begins) <= 3 < 10 < np.median(steps[~spread, 0] // 4)
    assert ends.max() >= 55
    assert np.median(ends - begins) > 15


def test_sampling_is_seeded(tiny_histories):
    dataset = ADDataset(tiny_histories, 8, max_stride=3)
    a, b, c = (dataset.sample(16, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["states"], c["states"])


@given(
    n=st.integers(0, 23),
    horizon=st.integers(1, 4),
    n_episodes=st.integers(6, 9),
    seed=st.integers(0, 99),
)
def test_contexts_of_any_length_are_drawn_and_gathered(n, horizon, n_episodes, seed):
    assume(n_episodes * horizon > n)
    dataset = ADDataset(numbered(2, n_episodes, horizon), 3, max_stride=2)
    rows, steps, context = dataset.draw(30, n, np.random.default_rng(seed))
    assert context.shape == (30, n)
    assert (np.diff(np.column_stack([context, steps])) > 0).all()
    window = dataset.gather(rows, steps, context)
    assert np.array_equal(window["actions"], 100_000 + 1000 * rows[:, None] + context)
    assert np.array_equal(window["target_actions"], 100_000 + 1000 * rows + steps)


def test_decisions_that_a_batch_names_itself_are_its_queries():
    queries, targets = torch.zeros(2, 3, 2), torch.ones(2, 3)
    found = packed_queries({"query_states": queries, "target_actions": targets})
    assert found[0] is queries
    assert found[1] is targets


def test_packed_queries_are_the_state_and_action_after_each_prefix():
    batch = ADDataset(numbered(2, 4, 3), 4).windows([1, 0], [10, 6], [1, 1])
    queries, targets = packed_queries(batch)
    assert queries.shape == (2, 5, 2)
    assert queries[..., 0].tolist() == [[1006, 1007, 1008, 1009, 1010], [2, 3, 4, 5, 6]]
    assert targets.tolist() == [[101_006 + j for j in range(5)], [100_002 + j for j in range(5)]]
