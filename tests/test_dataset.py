"""Learning histories on disk, and the windows drawn from them."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_histories
from hypothesis import assume, given
from hypothesis import strategies as st

from dataset import ADDataset, Histories, context_steps, max_stride_of, packed_queries
from historylens.common.errors import UserError

ARRAYS = ("states", "actions", "rewards", "next_states", "goals")
BROKEN = "is not a whole file of learning histories"


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


def windows_of(dataset, rows, steps, stride=1):
    """The windows of decisions at `steps` of the histories `rows`."""
    n, horizon = dataset.n_context, dataset.histories.horizon
    context = np.stack([context_steps(step, n, stride, horizon) for step in steps])
    return dataset.gather(np.array(rows), np.array(steps), context)


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
    found = context_steps(t, n, stride, horizon)
    assert found.shape == (n,)
    assert found.min() < 0 if walked is None else found.tolist() == walked


@given(st.integers(0, 60), st.integers(0, 25), st.integers(1, 7))
def test_the_largest_stride_is_the_last_that_reaches_far_enough(t, n, horizon):
    largest = max_stride_of(np.array([t]), n, horizon)[0]
    for stride in range(1, 70):
        assert (walk_back(t, n, stride, horizon) is not None) == (stride <= largest), stride


# Histories


@pytest.fixture
def path(tmp_path):
    """The file of some histories."""
    make_histories().save(tmp_path / "histories.npz")
    return tmp_path / "histories.npz"


def test_histories_survive_a_round_trip_through_a_file(path):
    written, read = make_histories(), Histories.load(path)
    for name in ARRAYS:
        assert np.array_equal(getattr(read, name), getattr(written, name))
        assert getattr(read, name).dtype == getattr(written, name).dtype
    assert read.horizon == written.horizon
    assert isinstance(read.horizon, int)
    assert os.listdir(path.parent) == ["histories.npz"]


def test_a_failed_save_leaves_the_old_file_and_no_part_of_a_new_one(path, monkeypatch):
    before = path.read_bytes()

    def full_disk(file, **arrays):
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OSError, match="no space left"):
        make_histories(seed=1).save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["histories.npz"]


@pytest.mark.parametrize("part", [0, 0.02, 0.5, 0.98])
def test_a_truncated_file_is_one_clear_error(path, part):
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(UserError, match=f"histories.npz {BROKEN}"):
        Histories.load(path)


def test_a_file_that_is_damaged_of_another_kind_or_missing_is_one_clear_error(path, tmp_path):
    content = bytearray(path.read_bytes())
    content[80:140] = bytes(60)
    path.write_bytes(content)
    (tmp_path / "text.npz").write_text("not an archive")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in (path.name, "text.npz", "one.npy"):
        with pytest.raises(UserError, match=f"{name} {BROKEN}"):
            Histories.load(tmp_path / name)
    with pytest.raises(UserError, match=r"there is no file .*nowhere\.npz"):
        Histories.load(tmp_path / "nowhere.npz")


def write(path, **changes):
    """An `.npz` of histories with some arrays changed, or left out where None."""
    arrays = {name: getattr(make_histories(), name) for name in (*ARRAYS, "horizon")} | changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"actions": None}, "actions is not a file"),
        ({"horizon": None}, "horizon is not a file"),
        ({"horizon": np.array([5, 5])}, BROKEN),
        ({"horizon": 4}, "expected whole episodes of 4 steps, got 30 steps a history"),
        ({"horizon": 0}, "expected whole episodes of 0 steps"),
        ({"actions": np.zeros(90, dtype=int)}, BROKEN),
        ({"states": np.zeros((3, 30, 3), dtype=int)}, r"expected states of shape \(3, 30, 2\)"),
        ({"rewards": np.zeros((3, 29), dtype=int)}, r"expected rewards of shape \(3, 30\)"),
        ({"goals": np.zeros((2, 2), dtype=int)}, r"expected goals of shape \(3, 2\)"),
        ({"next_states": np.zeros((3, 29, 2), dtype=int)}, "expected next_states of shape"),
        ({"states": np.zeros((3, 30, 2))}, "expected states of an integer type, got float64"),
        ({"rewards": np.array([[None]])}, BROKEN),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_one_clear_error(tmp_path, changes, expected):
    with pytest.raises(UserError, match=rf"odd\.npz.*{expected}"):
        Histories.load(write(tmp_path / "odd.npz", **changes))


def test_code_in_a_file_is_refused_and_not_executed(tmp_path):
    class Intruder:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    rewards = np.full((3, 30), None)
    rewards[0, 0] = Intruder()
    with pytest.raises(UserError, match=BROKEN):
        Histories.load(write(tmp_path / "bad.npz", rewards=rewards))
    assert not (tmp_path / "executed").exists()


def test_episode_returns_worked_by_hand():
    rewards = np.array([[0, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1]])
    histories = replace(numbered(2, 2, 3), rewards=rewards)
    assert histories.episode_returns().tolist() == [[2, 0], [3, 1]]


# Windows


@given(
    n=st.integers(0, 23), horizon=st.integers(1, 6), n_episodes=st.integers(1, 9),
    max_stride=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_windows_hold_what_lies_before_their_decisions(n, horizon, n_episodes, max_stride, seed):
    assume(n_episodes * horizon > n)
    histories = numbered(2, n_episodes, horizon)
    dataset = ADDataset(histories, min(n, 3), max_stride)
    rows, steps, context = dataset.draw(40, n, np.random.default_rng(seed))
    window = dataset.gather(rows, steps, context)
    assert context.shape == (40, n)
    assert context.min(initial=0) >= 0
    for name in ("states", "actions", "rewards", "next_states"):
        assert np.array_equal(window[name], getattr(histories, name)[rows[:, None], context])
    assert np.array_equal(window["query_states"], histories.states[rows, steps])
    assert np.array_equal(window["target_actions"], histories.actions[rows, steps])
    for step, before in zip(steps, context.tolist(), strict=True):
        episodes = sorted({s // horizon for s in [*before, step]})
        whole = [e * horizon + i for e in episodes for i in range(horizon)]
        assert before == whole[: whole.index(step)][-n or len(whole) :]


def test_a_batch_has_the_promised_keys_shapes_and_types(tiny_histories):
    shapes = {
        "states": (8, 11, 2),
        "actions": (8, 11),
        "rewards": (8, 11),
        "next_states": (8, 11, 2),
        "query_states": (8, 2),
        "target_actions": (8,),
    }
    batch = ADDataset(tiny_histories, 11, max_stride=2).sample(8, np.random.default_rng(0))
    assert {name: tuple(value.shape) for name, value in batch.items()} == shapes
    assert {value.dtype for value in batch.values()} == {torch.int64}
    parts = replace(tiny_histories, rewards=tiny_histories.rewards / 2)
    batch = ADDataset(parts, 11).sample(8, np.random.default_rng(0))
    assert batch["rewards"].dtype == torch.float32


@pytest.mark.parametrize("n_context", [30, 31, 99])
def test_histories_too_short_for_the_context_are_an_error(tiny_histories, n_context):
    with pytest.raises(UserError, match=rf"more than {n_context} steps.* got 30"):
        ADDataset(tiny_histories, n_context)


@pytest.fixture(scope="module")
def drawn():
    """4,000 windows of 10 transitions from 3 histories of 60 episodes of 4 steps."""
    dataset = ADDataset(numbered(3, 60, 4), 10, max_stride=3)
    rows, targets, steps = dataset.draw(4000, 10, np.random.default_rng(0))
    return rows, steps, targets


def test_half_of_the_drawn_windows_begin_with_an_episode(drawn):
    _, steps, targets = drawn
    at_a_start = steps[:, 0] % 4 == 0
    assert at_a_start.mean() == pytest.approx(0.5 + 0.5 / 4, abs=0.03)
    others = np.bincount(targets[~at_a_start] % 4, minlength=4)
    assert others[10 % 4] == 0
    np.testing.assert_allclose(others[others > 0] / others.sum(), 1 / 3, atol=0.04)


def test_drawn_windows_are_uniform_over_histories(drawn):
    np.testing.assert_allclose(np.bincount(drawn[0]) / 4000, 1 / 3, atol=0.03)


def gaps_of(steps, targets):
    """Episodes between neighbours in a window, the decision's own included: a list a window."""
    return [
        np.diff(sorted({*(row // 4), target // 4})).tolist()
        for row, target in zip(steps, targets, strict=True)
    ]


def test_half_of_the_drawn_windows_join_every_kth_episode(drawn):
    _, steps, targets = drawn
    even = [gap[0] for gap in gaps_of(steps, targets) if len(set(gap)) == 1]
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


def test_packed_queries_are_the_state_and_action_after_each_prefix():
    batch = windows_of(ADDataset(numbered(2, 4, 3), 4), [1, 0], [10, 6])
    queries, targets = packed_queries(batch)
    assert queries.shape == (2, 5, 2)
    assert queries[..., 0].tolist() == [[1006, 1007, 1008, 1009, 1010], [2, 3, 4, 5, 6]]
    assert targets.tolist() == [[101_006 + j for j in range(5)], [100_002 + j for j in range(5)]]


def test_decisions_that_a_batch_names_itself_are_its_queries():
    queries, targets = torch.zeros(2, 3, 2), torch.ones(2, 3)
    found = packed_queries({"query_states": queries, "target_actions": targets})
    assert found[0] is queries
    assert found[1] is targets
