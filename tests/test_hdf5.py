"""Histories in HDF5: read as written, cut and told, and every kind of damage one line."""

import runpy
import sys

import h5py
import numpy as np
import pytest
import torch
from conftest import make_histories, sharp_model
from foreign import foreign_logits, held_out, make_foreign_run, write_hdf5
from hypothesis import given, settings
from hypothesis import strategies as st

from ad import hdf5
from ad.checkpoints import find_checkpoint, load_checkpoint
from ad.darkroom import MOVES
from ad.decisions import HistoryDecisions, Place
from ad.hdf5 import read_hdf5
from ad.histories import histories_path, read_histories
from historylens.common.errors import UserError
from historylens.history import History

GRID, HORIZON = 3, 4
GOALS = [[2, 0], [0, 1]]


def content(n_steps=8, n_streams=2):
    """Arrays of one group by hand: each entry tells its step, stream and axis."""
    steps, streams = np.arange(n_steps)[:, None], np.arange(n_streams)[None]
    cell = (steps + streams) % GRID
    return {
        "states": np.stack([cell, (cell + 1) % GRID], axis=-1).astype(np.float32),
        "actions": (steps + 2 * streams) % 5,
        "rewards": np.zeros((n_steps, n_streams), dtype=np.float32),
        "next_states": np.stack([(cell + 2) % GRID, cell], axis=-1).astype(np.float32),
        "dones": np.broadcast_to(steps % HORIZON == HORIZON - 1, (n_steps, n_streams)),
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "history.hdf5"


def write(path, groups):
    """A file of groups by name; arrays that are None are left out."""
    with h5py.File(path, "w") as file:
        for name, arrays in groups.items():
            group = file.create_group(name)
            for key, values in arrays.items():
                if values is not None:
                    group[key] = values
    return path


def both(**changes):
    """Both groups of `GOALS`, the second changed."""
    return {"6": content(), "1": content() | changes}


def read(path, goals=GOALS, horizon=HORIZON, told=None):
    notes = [] if told is None else told
    histories = read_hdf5(path, GRID, horizon, goals, tell=notes.append)
    assert told is not None or not notes
    return histories


def error_of(path, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(path, told=[], **options)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# What is read


@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.data())
def test_any_file_is_read_as_written(tmp_path_factory, n_episodes, n_streams, horizon, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    n_steps = n_episodes * horizon
    cells = data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True))
    number = data.draw(st.sampled_from([np.int32, np.int64, np.uint8, np.float32, np.float64]))
    groups = {
        str(cell): {
            "states": rng.integers(GRID, size=(n_steps, n_streams, 2)).astype(number),
            "actions": rng.integers(5, size=(n_steps, n_streams)).astype(number),
            "rewards": np.zeros((n_steps, n_streams), dtype=number),
            "next_states": rng.integers(GRID, size=(n_steps, n_streams, 2)).astype(number),
        }
        for cell in cells
    }
    path = write(tmp_path_factory.mktemp("any") / "x.h5", groups)
    histories = read(path, goals=[divmod(cell, GRID) for cell in cells], horizon=horizon)
    for i, cell in enumerate(cells):
        for stream in range(n_streams):
            row = i * n_streams + stream
            assert histories.goals[row].tolist() == list(divmod(cell, GRID))
            for name in ("states", "actions", "rewards", "next_states"):
                expected = groups[str(cell)][name][:, stream]
                np.testing.assert_array_equal(getattr(histories, name)[row], expected)
    assert histories.states.dtype == histories.actions.dtype == np.int8
    assert histories.states.flags["C_CONTIGUOUS"]
    assert histories.horizon == horizon


def test_rewards_that_are_not_whole_stay_so(path):
    rewards = np.full((8, 2), 0.5)
    histories = read(write(path, both(rewards=rewards, next_states=np.tile([0, 1], (8, 2, 1)))))
    assert histories.rewards.dtype == np.float32
    assert histories.rewards[:, 0].tolist() == [0, 0, 0.5, 0.5]


def test_the_state_after_the_reset_is_kept(tmp_path):
    path = tmp_path / "x.hdf5"
    write_hdf5(path, grid_size=3, horizon=5, n_steps=20, n_streams=1)
    histories = read_hdf5(path, 3, 5)
    assert histories.next_states[:, 4::5].tolist() == [[[1, 1]] * 4] * 9
    reached = np.clip(histories.states + MOVES[histories.actions], 0, 2)
    assert (histories.next_states != reached).any()
    np.testing.assert_array_equal(histories.next_states[:, 0::5], reached[:, 0::5])


def test_without_goals_all_groups_are_read_in_the_order_of_their_numbers(path):
    write(path, {name: content() for name in ("10", "0", "9")})
    histories = read_hdf5(path, 4, HORIZON)
    assert histories.goals[::2].tolist() == [[0, 0], [2, 1], [2, 2]]


def test_what_is_not_asked_for_may_be_anything(path):
    groups = both(optimal_actions=np.zeros((2, 8))) | {"4": {"x": np.zeros(3)}, "about": {}}
    assert read(write(path, groups)).n_histories == 4


@pytest.mark.parametrize("dones", [None, np.zeros((8, 2), dtype=bool)])
def test_dones_may_be_missing_or_unmarked_where_the_horizon_is_known(path, dones):
    write(path, {"6": content() | {"dones": dones}, "1": content() | {"dones": dones}})
    assert read(path).horizon == HORIZON
    message = error_of(path, horizon=None)
    assert "expected the steps of an episode in the checkpoint's config" in message
    assert read(write(path, both()), horizon=None).horizon == HORIZON


# What is told


def test_histories_are_cut_to_whole_episodes_and_the_shortest_and_that_is_told_once(path):
    told = []
    write(path, {"6": content(11), "1": content(15)})
    histories = read(path, told=told)
    assert histories.n_steps == 8
    np.testing.assert_array_equal(histories.actions[0], content(11)["actions"][:8, 0])
    (text,) = told
    assert "up to 15 steps; the first 8 of each are used, whole episodes of 4 steps" in text


def test_streams_that_do_not_fit_memory_are_left_out_and_that_is_told_once(path, monkeypatch):
    monkeypatch.setattr(hdf5, "MAX_TRANSITIONS", 2 * 8 * 2 + 15)
    told = []
    write(path, {"6": content(8, 5), "1": content(8, 1)})
    histories = read(path, told=told)
    assert histories.goals.tolist() == [[2, 0], [2, 0], [0, 1]]
    np.testing.assert_array_equal(histories.actions[1], content(8, 5)["actions"][:, 1])
    (text,) = told
    assert "2 goals x up to 5 streams x 8 steps; the first 2 streams of each goal" in text


def test_rewards_away_from_the_goal_that_a_group_is_named_for_are_told(path):
    rewards, next_states = np.zeros((8, 2)), np.tile([0, 1], (8, 2, 1))
    rewards[5, 1], next_states[5, 1] = 1, [1, 2]
    told = []
    read(write(path, both(rewards=rewards, next_states=next_states)), told=told)
    (text,) = told
    assert "rewards of the group named for goal 0,1 are earned at 1,2" in text
    rewards[5, 1], rewards[7, 0], next_states[7, 0] = 0, 1, [1, 1]
    read(write(path, both(rewards=rewards, next_states=next_states)))  # the reset hides the place


# What is an error


def test_without_h5py_other_files_are_read_and_one_line_says_what_to_install(tiny_run, monkeypatch):
    run, file = tiny_run
    make_histories().save(run / "x.npz")
    monkeypatch.setitem(sys.modules, "h5py", None)
    runpy.run_path(hdf5.__file__)
    checkpoint = checkpoint_of(run)
    assert read_histories(run / "x.npz", checkpoint).n_histories == 3
    with pytest.raises(UserError, match="needs h5py, which is not installed: pip install h5py"):
        read_histories(file, checkpoint)


@pytest.mark.parametrize("part", [0, 0.3, 0.9, None])
def test_a_truncated_file_or_one_of_another_kind_is_an_error(path, part):
    whole = write(path, both()).read_bytes()
    path.write_bytes(b"not HDF5" if part is None else whole[: int(part * len(whole))])
    assert "cannot be read as an HDF5 file of learning histories" in error_of(path)


NAMED = "a group for each goal, named 0 to 8 row by row"


@pytest.mark.parametrize(
    ("names", "goals", "expected"),
    [
        ([], GOALS, f"is empty: expected {NAMED}"),
        ("012345", GOALS, f"{NAMED}, got none of goal 2,0 (6) in 0, 1, 2, 3, ... (6)"),
        (["goal-0"], GOALS, f"{NAMED}, got none of goal 2,0 (6) in goal-0"),
        (["goal-0"], None, f"{NAMED}, got 'goal-0'"),
        (["9"], None, f"{NAMED}, got '9'"),
    ],
)
def test_groups_that_are_missing_or_named_otherwise_are_an_error(path, names, goals, expected):
    write(path, {name: content() for name in names})
    assert expected in error_of(path, goals=goals)


def test_a_dataset_in_the_place_of_a_group_is_an_error(path):
    with h5py.File(path, "w") as file:
        file["6"] = np.zeros(3)
    assert "got none of goal 2,0 (6)" in error_of(path)


def spoilt(name, step, value):
    """An array of a group with another value at a step of stream 1."""
    values = content()[name].astype(np.array(value).dtype)
    values[step, 1] = value
    return {name: values}


ENDS = "expected an episode to end every 4 steps, as the checkpoint's horizon says, got"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"states": None}, "expected a dataset states, got actions, dones, next_states, rewards"),
        ({"actions": None}, "expected a dataset actions, got dones, next_states, rewards, states"),
        ({"rewards": None}, "expected a dataset rewards, got actions, dones, next_states, states"),
        ({"next_states": None}, "expected a dataset next_states, got actions, dones, rewards, sta"),
        ({"states": np.zeros((8, 2))}, "expected states of shape (8, 2, 2) beside actions of sha"),
        ({"states": np.zeros((2, 8, 2))}, "expected states of shape (8, 2, 2) beside actions of "
         "shape (8, 2) (time, streams), got (2, 8, 2)"),
        ({"next_states": np.zeros((8, 2, 3))}, "expected next_states of shape (8, 2, 2)"),
        ({"rewards": np.zeros((8, 3))}, "expected rewards of shape (8, 2)"),
        ({"dones": np.zeros(8)}, "expected dones of shape (8, 2)"),
        ({"actions": np.zeros(8)}, "expected actions (T, streams), got (8,)"),
        ({"actions": np.zeros((8, 2, 1))}, "expected actions (T, streams), got (8, 2, 1)"),
        ({"actions": np.zeros((0, 2))}, "expected learning histories, got (0, 2) actions"),
        ({"actions": np.zeros((8, 0))}, "expected learning histories, got (8, 0) actions"),
        (spoilt("states", 3, 0.5), "states: expected whole numbers, got 0.5"),
        (spoilt("actions", 3, 1.25), "actions: expected whole numbers, got 1.25"),
        (spoilt("actions", 3, b"up"), "actions: expected numbers, got |S2"),
        (spoilt("next_states", 3, np.nan), "next_states: expected finite numbers, got nan"),
        (spoilt("rewards", 3, np.inf), "rewards: expected finite numbers, got inf"),
        (spoilt("dones", 5, True), f"{ENDS} an end at step 5 of stream 1"),
        (spoilt("dones", 3, False), f"{ENDS} none at step 3 of stream 1"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_named_with_what_was_expected(path, changes, expected):
    assert f"{path}, group 1: {expected}" in error_of(write(path, both(**changes)))


def test_fewer_steps_than_an_episode_are_an_error(path):
    write(path, {"6": content(3), "1": content(3)})
    assert "expected episodes of 4 steps, got 3 steps" in error_of(path)


# With a checkpoint


@pytest.fixture
def tiny_run(tmp_path, tiny_model):
    """A run of a tiny model in a room of 5 x 5."""
    weights = tiny_model.state_dict()
    return make_foreign_run(tmp_path, weights, 2, grid_size=5, horizon=5, n_steps=40)


def checkpoint_of(run, changes=None, **config):
    """The checkpoint of a run after changes of it and of its config; None removes a setting."""
    path = find_checkpoint(run).path
    content = torch.load(path, weights_only=True)
    config = {k: v for k, v in (content["config"] | config).items() if v is not None}
    torch.save(content | {"config": config} | (changes or {}), path)
    return load_checkpoint(path)


def logits_both_ways(run, file, cell, stream, step, **room):
    """Logits of one decision here, and from that code alone; `cell` counts those held out."""
    checkpoint = load_checkpoint(find_checkpoint(run).path)
    histories, cells = read_histories(file, checkpoint), held_out(0, 0.9, **room)
    grid_size = checkpoint.model.config.grid_size
    assert histories.goals[::2].tolist() == [list(divmod(cell, grid_size)) for cell in cells]
    places = [Place(2 * cell + stream, step)]
    history = History.of(HistoryDecisions(histories, places, checkpoint.model.n_context_max))
    with torch.no_grad():
        found = checkpoint.model(*history.inputs)[0]
    return found, foreign_logits(checkpoint.path, file, cells[cell], stream, step)


def test_held_out_goals_are_read_and_decided_on_as_that_code_does(tmp_path):
    run, file = make_foreign_run(tmp_path, n_steps=200, n_streams=2)  # the shipped weights
    for cell, stream, step in ((3, 1, 123), (7, 0, 199)):
        found, expected = logits_both_ways(run, file, cell, stream, step)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert expected.std() > 0.1


def test_sharp_weights_and_another_room_give_the_same_logits(tiny_run, tmp_path, tiny_config):
    for step in range(11, 40, 4):
        found, expected = logits_both_ways(*tiny_run, 0, 1, step, n_cells=25)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    other = sharp_model(tiny_config, seed=1).state_dict()  # the comparison can fail
    run, _ = make_foreign_run(tmp_path / "other", other, 2, grid_size=5, horizon=5, n_steps=40)
    assert (logits_both_ways(run, tiny_run[1], 0, 1, 39, n_cells=25)[1] - found).abs().max() > 0.1


def test_a_checkpoint_with_goals_of_its_own_reads_those(tiny_run):
    run, file = tiny_run
    checkpoint = checkpoint_of(run, {"goals": {"train": [], "test": [[3, 1]]}})
    assert read_histories(file, checkpoint).goals.tolist() == [[3, 1]] * 2


def test_without_a_split_all_goals_are_read_and_that_is_told(tiny_run, capsys):
    run, file = tiny_run
    told = []
    checkpoint = checkpoint_of(run, env_split_seed=None)
    assert read_histories(file, checkpoint, told.append).n_histories == 50
    (text,) = told
    assert "does not say which goals it holds out" in text
    read_histories(file, checkpoint)
    assert capsys.readouterr().err == f"note: {text}\n"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"env": "darkroompermuted"}, "env 'darkroom', where a group is a goal, got env 'dark"),
        ({"horizon": 0}, "expected horizon of 1 or more in its config, got 0"),
        ({"horizon": "long"}, "expected horizon of 1 or more in its config, got 'long'"),
        ({"horizon": 2.5}, "expected horizon of 1 or more in its config, got 2.5"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error(tiny_run, config, expected):
    run, file = tiny_run
    with pytest.raises(UserError, match=expected):
        read_histories(file, checkpoint_of(run, **config))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("states", 5, "does not fit the checkpoint: expected rows and columns below 5, got 5"),
        ("next_states", -1, "expected rows and columns of 0 or more, got -1"),
        ("actions", 5, "does not fit the checkpoint: expected actions below 5, got 5"),
        ("actions", -1, "expected actions of 0 or more, got -1"),
    ],
)
@pytest.mark.parametrize("suffix", ["hdf5", "npz"])
def test_states_and_actions_that_the_model_does_not_know_are_an_error(
    tiny_run, name, value, expected, suffix
):
    run, file = tiny_run
    if suffix == "npz":
        histories = make_histories()
        getattr(histories, name)[1, 3] = value
        file = run / "x.npz"
        histories.save(file)
    else:
        with h5py.File(file, "r+") as opened:
            opened[str(held_out(0, 0.9, 25)[1])][name][3, 1] = value
    with pytest.raises(UserError, match=f"{file}.*{expected}"):
        read_histories(file, checkpoint_of(run))


@pytest.mark.parametrize("name", ["x.h5", "x.HDF5"])
def test_the_kind_of_file_is_told_by_its_suffix(tiny_run, name):
    run, file = tiny_run
    assert read_histories(file.rename(run / name), checkpoint_of(run)).n_histories == 6
    make_histories().save(run / "x.npz")
    assert read_histories(run / "x.npz", checkpoint_of(run)).n_histories == 3


def test_histories_that_are_not_there_are_asked_for(tiny_run):
    run, file = tiny_run
    checkpoint = checkpoint_of(run)
    beside = histories_path(None, checkpoint)
    assert beside == run / "histories-test.npz"
    assert histories_path(file, checkpoint) == file
    with pytest.raises(UserError, match=r"^no learning histories: there is no file no\.hdf5$"):
        read_histories("no.hdf5", checkpoint)
    with pytest.raises(UserError) as caught:
        read_histories(beside, checkpoint)
    assert f"expected {beside}; this run comes from code that keeps them apart" in str(caught.value)
    assert "--histories datasets/history_darkroom_PPO_alg-seed42.hdf5" in str(caught.value)
    with pytest.raises(UserError, match=f"expected {beside} beside the checkpoint; name a file"):
        read_histories(beside, checkpoint_of(run, env_split_seed=None))


def test_a_file_without_histories_is_an_error(tiny_run):
    run, _ = tiny_run
    make_histories(goals=np.zeros((0, 2), dtype=int)).save(run / "x.npz")
    with pytest.raises(UserError, match="does not fit: expected learning histories"):
        read_histories(run / "x.npz", checkpoint_of(run))
