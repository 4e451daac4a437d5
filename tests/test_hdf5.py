"""Histories in HDF5: read as written, cut and told, and every kind of damage one line."""

import contextlib
import fcntl
import io
import itertools
import runpy
import sys

import h5py
import numpy as np
import pytest
import torch
from conftest import make_histories
from foreign import foreign_logits, held_out, make_foreign_run, write_hdf5
from hostile import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from ad import histories as module
from ad.checkpoints import find_checkpoint, load_checkpoint
from ad.darkroom import MOVES
from ad.decisions import HistoryDecisions, Place
from ad.histories import histories_path, read_hdf5, read_histories
from dataset import CONTEXT
from historylens.common.errors import UserError
from historylens.history import History

GRID, HORIZON = 3, 4
GOALS = [[2, 0], [0, 1]]
NAMED = "a group for each goal, named 0 to 8 row by row"
ENDS = "expected an episode to end every 4 steps, as the checkpoint's horizon says, got"


def content(n_steps=8, n_streams=2, **changes):
    """Arrays of one group by hand: each entry tells its step, stream and axis."""
    steps, streams = np.arange(n_steps)[:, None], np.arange(n_streams)[None]
    cell = (steps + streams) % GRID
    arrays = {
        "states": np.stack([cell, (cell + 1) % GRID], axis=-1).astype(np.float32),
        "actions": (steps + 2 * streams) % 5,
        "rewards": np.zeros((n_steps, n_streams), dtype=np.float32),
        "next_states": np.stack([(cell + 2) % GRID, cell], axis=-1).astype(np.float32),
        "dones": np.broadcast_to(steps % HORIZON == HORIZON - 1, (n_steps, n_streams)),
    }
    return arrays | changes


@pytest.fixture
def path(tmp_path):
    return tmp_path / "history.hdf5"


def write(path, groups):
    with h5py.File(path, "w") as file:
        for name, arrays in groups.items():
            file.create_group(name)
            for key, values in arrays.items():
                if values is not None:
                    file[f"{name}/{key}"] = values
    return path


def both(**changes):
    return {"6": content(), "1": content(**changes)}  # the groups of `GOALS`


def read(path, goals=GOALS, horizon=HORIZON):
    """Histories of a file, and the one line that was told, if any."""
    with contextlib.redirect_stderr(io.StringIO()) as told:
        histories = read_hdf5(path, GRID, horizon, goals)
    assert told.getvalue().count("note: ") <= 1
    return histories, told.getvalue()


def error_of(path, **options) -> str:
    return refusal(path, lambda path: read(path, **options))


@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.data())
def test_any_file_is_read_as_written(tmp_path_factory, n_episodes, n_streams, horizon, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    n_steps = n_episodes * horizon
    cells = data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True))
    number = data.draw(st.sampled_from([np.int32, np.int64, np.uint8, np.float32, np.float64]))
    shapes = {name: (n_steps, n_streams, 2)[: 3 if "states" in name else 2] for name in CONTEXT}
    groups = {str(cell): {} for cell in cells}
    for arrays, (name, shape) in itertools.product(groups.values(), shapes.items()):
        arrays[name] = rng.integers(1 if name == "rewards" else GRID, size=shape).astype(number)
    path = write(tmp_path_factory.mktemp("any") / "x.h5", groups)
    goals = [divmod(cell, GRID) for cell in cells]
    histories, told = read(path, goals, horizon)
    assert not told
    assert histories.goals.tolist() == np.repeat(goals, n_streams, axis=0).tolist()
    for name in CONTEXT:
        expected = np.concatenate([groups[str(cell)][name].swapaxes(0, 1) for cell in cells])
        np.testing.assert_array_equal(getattr(histories, name), expected)
    assert histories.states.dtype == histories.actions.dtype == np.int8
    assert histories.states.flags["C_CONTIGUOUS"]
    assert histories.horizon == horizon


def test_rewards_may_be_fractions_dones_unmarked_and_what_is_not_asked_for_anything(path):
    groups = both(optimal_actions=np.zeros((2, 8))) | {"4": {"x": np.zeros(3)}, "about": {}}
    histories, told = read(write(path, groups))
    assert (len(histories.goals), told) == (4, "")
    histories, _ = read(write(path, both(rewards=np.full((8, 2), 0.5))))
    assert histories.rewards.dtype == np.float32
    assert histories.rewards[:, 0].tolist() == [0, 0, 0.5, 0.5]
    assert read(path, horizon=None)[0].horizon == HORIZON
    for dones in (None, np.zeros((8, 2), dtype=bool)):  # the horizon is known
        write(path, {name: content(dones=dones) for name in "61"})
        assert read(path)[0].horizon == HORIZON
        message = error_of(path, horizon=None)
        assert "expected the steps of an episode in the checkpoint's config" in message


def test_the_state_after_the_reset_is_kept_and_without_goals_groups_are_in_order(path):
    write_hdf5(path, grid_size=3, horizon=5, n_steps=20, n_streams=1)
    histories = read_hdf5(path, 3, 5, None)
    assert histories.next_states[:, 4::5].tolist() == [[[1, 1]] * 4] * 9
    reached = np.clip(histories.states + MOVES[histories.actions], 0, 2)
    np.testing.assert_array_equal(histories.next_states[:, 0::5], reached[:, 0::5])
    write(path, {name: content() for name in ("10", "0", "9")})
    assert read_hdf5(path, 4, HORIZON, None).goals[::2].tolist() == [[0, 0], [2, 1], [2, 2]]


def test_what_is_cut_to_whole_episodes_or_to_fit_memory_is_told_once(path, monkeypatch):
    histories, told = read(write(path, {"6": content(11), "1": content(15)}))
    assert histories.n_steps == 8
    np.testing.assert_array_equal(histories.actions[0], content(11)["actions"][:8, 0])
    assert "up to 15 steps; the first 8 of each are used, whole episodes of 4 steps" in told
    monkeypatch.setattr(module, "MAX_TRANSITIONS", 2 * 8 * 2 + 15)
    histories, told = read(write(path, {"6": content(8, 5), "1": content(8, 1)}))
    assert histories.goals.tolist() == [[2, 0], [2, 0], [0, 1]]
    np.testing.assert_array_equal(histories.actions[1], content(8, 5)["actions"][:, 1])
    assert "2 goals x up to 5 streams x 8 steps; the first 2 streams of each goal" in told
    write(path, {"6": content(3), "1": content(3)})
    assert "expected episodes of 4 steps, got 3 steps" in error_of(path)


@pytest.mark.parametrize(("step", "is_told"), [(5, True), (7, False)])  # the reset hides the place
def test_rewards_away_from_the_goal_that_a_group_is_named_for_are_told(path, step, is_told):
    rewards, next_states = np.zeros((8, 2)), np.tile([0, 1], (8, 2, 1))
    rewards[step, 1], next_states[step, 1] = 1, [1, 2]
    _, told = read(write(path, both(rewards=rewards, next_states=next_states)))
    said = "rewards of the group named for goal 0,1 are earned at 1,2; if its groups"
    assert (said in told) == bool(told) == is_told


@pytest.mark.parametrize(("names", "goals", "expected"), [
    ([], GOALS, f"is empty: expected {NAMED}"),
    ("012345", GOALS, f"{NAMED}, got none of goal 2,0 (6) in 0, 1, 2, 3, ... (6)"),
    (["goal-0"], None, f"{NAMED}, got 'goal-0'"), (["9"], None, f"{NAMED}, got '9'"),
])  # fmt: skip
def test_groups_missing_or_named_otherwise_are_told(path, names, goals, expected):
    write(path, {name: content() for name in names})
    assert expected in error_of(path, goals=goals)


def test_files_of_other_things_and_damaged_ones_are_told(path):
    with h5py.File(path, "w") as file:
        file["6"] = np.zeros(3)
    assert "got none of goal 2,0 (6)" in error_of(path)
    whole = write(path, both()).read_bytes()
    for damaged in (b"", whole[: len(whole) // 3], whole[:-99], b"not HDF5"):
        path.write_bytes(damaged)
        assert "cannot be read as an HDF5 file of learning histories" in error_of(path)


def spoilt(name, step, value):
    """An array of a group with another value at a step of stream 1."""
    values = content()[name].astype(np.array(value).dtype)
    values[step, 1] = value
    return {name: values}


@pytest.mark.parametrize(("changes", "expected"), [
    ({"states": None}, "expected a dataset states, got actions, dones, next_states, rewards"),
    ({"states": np.zeros((2, 8, 2))}, "expected states of shape (8, 2, 2) beside actions of "
     "shape (8, 2) (time, streams), got (2, 8, 2)"),
    ({"next_states": np.zeros((8, 2, 3))}, "expected next_states of shape (8, 2, 2)"),
    ({"rewards": np.zeros((8, 3))}, "expected rewards of shape (8, 2)"),
    ({"dones": np.zeros(8)}, "expected dones of shape (8, 2)"),
    ({"actions": np.zeros(8)}, "expected actions (T, streams), got (8,)"),
    ({"actions": np.zeros((8, 0))}, "expected learning histories, got (8, 0) actions"),
    (spoilt("states", 3, 0.5), "states: expected whole numbers, got 0.5"),
    (spoilt("next_states", 3, np.nan), "next_states: expected finite numbers, got nan"),
    (spoilt("dones", 5, True), f"{ENDS} an end at step 5 of stream 1"),
    (spoilt("dones", 3, False), f"{ENDS} none at step 3 of stream 1"),
])  # fmt: skip
def test_arrays_that_do_not_fit_are_named_with_what_was_expected(path, changes, expected):
    assert f"{path}, group 1: {expected}" in error_of(write(path, both(**changes)))


@pytest.fixture
def tiny_run(tmp_path, tiny_model):
    return make_foreign_run(tmp_path, tiny_model.state_dict(), n_steps=40)


def checkpoint_of(run, changes=(), **config):
    """The checkpoint of a run after changes of it and of its config; None removes a setting."""
    path = find_checkpoint(run)[0]
    content = torch.load(path, weights_only=True)
    config = {k: v for k, v in (content["config"] | config).items() if v is not None}
    torch.save(content | {"config": config} | dict(changes), path)
    return load_checkpoint(path)


@torch.no_grad()
def test_held_out_goals_are_read_and_decided_on_as_that_code_does(tmp_path, tiny_run):
    shipped = make_foreign_run(tmp_path / "shipped", n_steps=120)
    for (run, file), number, step in ((shipped, 3, 113), (tiny_run, 0, 11), (tiny_run, 0, 39)):
        checkpoint = load_checkpoint(find_checkpoint(run)[0])
        model, size = checkpoint.model, checkpoint.model.config.grid_size
        histories, cells = read_histories(file, checkpoint), held_out(0, 0.9, size**2)
        assert histories.goals[::2].tolist() == [list(divmod(cell, size)) for cell in cells]
        places = [Place(2 * number + 1, step)]
        history = History.of(HistoryDecisions(histories, places, model.n_context_max))
        expected = foreign_logits(checkpoint.path, file, cells[number], 1, step)
        torch.testing.assert_close(model(*history.inputs)[0], expected, rtol=0, atol=1e-4)
        assert expected.std() > 0.1


def test_goals_of_its_own_are_read_and_without_a_split_all_are_and_that_is_told(tiny_run, capsys):
    run, file = tiny_run
    checkpoint = checkpoint_of(run, env_split_seed=None)
    assert len(read_histories(file, checkpoint).goals) == 50
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("note: ")
    assert "does not say which goals it holds out" in told
    checkpoint = checkpoint_of(run, {"goals": {"train": [], "test": [[3, 1]]}})
    assert read_histories(file, checkpoint).goals.tolist() == [[3, 1]] * 2


@pytest.mark.parametrize(("name", "value", "expected"), [
    ("states", 5, "does not fit the checkpoint: expected rows and columns below 5, got 5"),
    ("next_states", -1, "expected rows and columns of 0 or more, got -1"),
    ("actions", 5, "does not fit the checkpoint: expected actions below 5, got 5"),
    ("actions", -1, "expected actions of 0 or more, got -1"),
])  # fmt: skip
def test_what_the_model_does_not_know_is_an_error(tiny_run, name, value, expected):
    run, file = tiny_run
    histories, npz = make_histories(), run / "x.npz"
    getattr(histories, name)[1, 3] = value
    histories.save(npz)
    with h5py.File(file, "r+") as opened:
        opened[str(held_out(0, 0.9, 25)[1])][name][3, 1] = value
    for path in (npz, file):
        with pytest.raises(UserError, match=f"{path}.*{expected}"):
            read_histories(path, checkpoint_of(run))


def test_suffixes_tell_kinds_of_files_and_without_h5py_others_are_read(tiny_run, monkeypatch):
    run, file = tiny_run
    checkpoint = checkpoint_of(run)
    make_histories().save(run / "x.npz")
    for name in ("x.h5", "x.HDF5"):
        file = file.rename(run / name)
        assert len(read_histories(file, checkpoint).goals) == 6
    monkeypatch.setitem(sys.modules, "h5py", None)
    runpy.run_path(module.__file__)
    assert len(read_histories(run / "x.npz", checkpoint).goals) == 3
    with pytest.raises(UserError, match="needs h5py, which is not installed: pip install h5py"):
        read_histories(file, checkpoint)


def test_histories_that_are_not_there_and_a_checkpoint_that_does_not_fit_are_an_error(tiny_run):
    run, file = tiny_run
    checkpoint = checkpoint_of(run)
    beside = histories_path(None, checkpoint)
    assert (beside, histories_path(file, checkpoint)) == (run / "histories-test.npz", file)
    make_histories(goals=np.zeros((0, 2), dtype=int)).save(run / "x.npz")
    apart = "code that keeps them apart .*--histories datasets/history_darkroom_PPO_alg-seed42.hdf5"
    with file.open() as opened:  # as HDF5 does in a program that writes
        fcntl.flock(opened, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"{file} is open for writing elsewhere"):
            read_histories(file, checkpoint)
    for path, config, expected in (
        (run / "x.npz", {}, "does not fit: expected learning histories"),
        ("no.hdf5", {}, r"^no learning histories: there is no file no\.hdf5$"),
        (beside, {}, f"expected {beside}; this run comes from {apart}"),
        (beside, {"env_split_seed": None}, f"expected {beside} beside the checkpoint; name a file"),
        (file, {"env": "permuted"}, "env 'darkroom', where a group is a goal, got env 'permuted'"),
    ):
        with pytest.raises(UserError, match=expected):
            read_histories(path, checkpoint_of(run, **config))
