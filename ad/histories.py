"""The learning histories that go with a checkpoint: found, read in either format, checked.

histories = read_histories(histories_path(None, checkpoint), checkpoint)   # those beside it

A file is an `.npz` that `Histories.save` wrote, or HDF5 as existing Dark Room code for Algorithm
Distillation keeps it: a group for each goal, named by its cell, row by row, "0" to "80" in a room
of 9 x 9, with `states` and `next_states` `(T, streams, 2)` and `actions`, `rewards` and `dones`
`(T, streams)`; a stream is one learning history. At the last step of an episode `next_states` holds
the state after the reset; it is kept so, as the models of that code were trained on it.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ad.checkpoints import HISTORIES_NAME, Checkpoint, task_of
from dataset import CONTEXT, Histories
from historylens.common.errors import UserError, expect, note
from historylens.common.reading import most_unpacked, printable, reading
from historylens.common.text import counted

SUFFIXES = (".hdf5", ".h5")
MAX_TRANSITIONS = 2**26  # of HDF5 held at once: 400 MB, as one transition takes 6 bytes
Goals = Sequence[Sequence[int]]  # (row, column) each


def histories_path(given: str | Path | None, checkpoint: Checkpoint) -> Path:
    """The file named by the user, or the one beside the checkpoint."""
    return Path(given) if given else checkpoint.path.parent / HISTORIES_NAME


def read_histories(path: str | Path, checkpoint: Checkpoint) -> Histories:
    """Learning histories that fit a checkpoint, of HDF5 those held out; UserError: they do not."""
    path, config, columns = Path(path), checkpoint.model.config, checkpoint.task.columns
    expect(path.is_file(), _none_there(path, checkpoint))
    is_hdf5 = path.suffix.lower() in SUFFIXES
    histories = _read_held_out(path, checkpoint) if is_hdf5 else Histories.load(path)
    is_there = histories.states.size
    expect(is_there, f"{path} does not fit: expected learning histories, it holds none")
    what = f"{path} does not fit the checkpoint: expected"
    goals = f"goals of {len(columns)} numbers, {', '.join(columns)}"
    n_numbers = histories.goals.shape[1]
    expect(n_numbers == len(columns), f"{what} {goals}, got {n_numbers}")
    for name, values, n in (
        ("rows and columns", histories.states, config.grid_size),
        ("rows and columns", histories.next_states, config.grid_size),
        ("actions", histories.actions, config.num_actions),
        ("goals", histories.goals, config.grid_size),
    ):
        low, high = values.min(), values.max()
        expect(high < n, f"{what} {name} below {n}, got {high}")
        expect(low >= 0, f"{path}: expected {name} of 0 or more, got {low}")
    trained = checkpoint.config.get("horizon")
    if trained not in (None, histories.horizon):
        what = f"{path} has episodes of {counted(histories.horizon, 'step')}"
        note(f"{what}; the checkpoint was trained on {trained}")
    return histories


def _none_there(path: Path, checkpoint: Checkpoint) -> str:
    config, what = checkpoint.config, "no learning histories:"
    if path != histories_path(None, checkpoint):
        return f"{what} there is no file {path}"
    if "env_split_seed" not in config:
        how = "name a file with --histories, or train with `python train.py`, which writes it"
        return f"{what} expected {path} beside the checkpoint; {how}"
    name = f"history_{config.get('env')}_{config.get('alg')}_alg-seed{config.get('alg_seed')}"
    how = "this run comes from code that keeps them apart from its checkpoints: name its file, for"
    return f"{what} expected {path}; {how} example --histories datasets/{printable(name)}.hdf5"


def _read_held_out(path: Path, checkpoint: Checkpoint) -> Histories:
    config, goals = checkpoint.config, checkpoint.goals.get("test")
    what = f"{path}: expected a checkpoint of env 'darkroom', where a group is a goal, got env"
    is_plain, how = task_of(config) == "darkroom", "save its histories as .npz instead"
    expect(is_plain, f"{what} {config.get('env')!r}; {how}")
    if not goals:
        note(f"{checkpoint.path} does not say which goals it holds out: all of {path} are read")
    size, horizon = checkpoint.model.config.grid_size, config.get("horizon")
    return read_hdf5(path, size, horizon, goals or None)


def read_hdf5(
    path: str | Path, grid_size: int, horizon: int | None, goals: Goals | None
) -> Histories:
    """The learning histories of the `goals` `(G, 2)` or of all: `N = G * streams`, goal by goal.

    An episode has `horizon` steps; where that is None, as many as up to the first of `dones`.
    Histories are cut to whole episodes of the shortest, and to as many streams of each goal as stay
    below `MAX_TRANSITIONS`, which is told. UserError: no h5py, or damaged or of another kind.
    """
    try:
        import h5py  # here, as nothing else needs it
    except ImportError as error:
        what = f"reading {path} needs h5py, which is not installed: pip install h5py"
        raise UserError(what) from error
    kind = "an HDF5 file of learning histories", "Name another with --histories"
    with reading(path, *kind), h5py.File(path, "r") as file:
        cells = _find_cells(path, file, grid_size, goals)
        groups = {f"{path}, group {cell}": file[str(cell)] for cell in cells}
        n_steps, n_streams, horizon = _extent(path, groups, horizon)
        parts = [_arrays(*item, n_steps, n_streams, horizon) for item in groups.items()]
        arrays = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        cells = np.repeat(cells, [len(part[0]) for part in parts])
        histories = Histories(*arrays, np.stack(np.divmod(cells, grid_size), axis=1), horizon)
    _check_rewards(path, histories)
    return histories


def _own(where: str, group: Any, name: str) -> Any:
    """What a group holds by a name, or None; UserError: a link to elsewhere."""
    kind = type(group.get(name, getlink=True)).__name__
    is_own = kind in ("HardLink", "NoneType")
    expect(is_own, f"{where}: expected {name} in the file itself, got a {kind}")
    return group.get(name)


def _find_cells(path: str | Path, file: Any, grid_size: int, goals: Goals | None) -> list[int]:
    """Cells of the goals asked for, or of all in the file: each has a group of that name."""
    expected = f"expected a group for each goal, named 0 to {grid_size**2 - 1} row by row"
    expect(len(file), f"{path} is empty: {expected}")
    if goals is None:
        names = set(map(str, range(grid_size**2)))
        for name in file:
            expect(name in names, f"{path}: {expected}, got {printable(repr(name))}")
        cells = sorted(map(int, file))
    else:
        cells = [row * grid_size + col for row, col in goals]
    there = ", ".join(list(file)[:4]) + (f", ... ({len(file)})" if len(file) > 4 else "")
    for cell in cells:
        row, col = divmod(cell, grid_size)
        is_group = hasattr(_own(str(path), file, str(cell)), "keys")
        expect(is_group, f"{path}: {expected}, got none of goal {row},{col} ({cell}) in {there}")
    return cells


def _shape_of(where: str, group: Any) -> tuple[int, int, int]:
    """Steps and streams of a group whose arrays fit each other, and the bytes that it declares."""
    there, arrays, n_bytes = ", ".join(group) or "nothing", {}, 0
    for name in (*CONTEXT, *({"dones"} & group.keys())):
        arrays[name] = array = _own(where, group, name)
        expect(hasattr(array, "shape"), f"{where}: expected a dataset {name}, got {there}")
        is_inside = not array.is_virtual and not array.external
        expect(is_inside, f"{where}: expected {name} in the file itself, it lies in another")
        is_number = array.dtype.kind in "buif" and array.dtype.itemsize <= 8
        expect(is_number, f"{where}: {name}: expected numbers, got {array.dtype}")
        n_bytes += max(array.size, math.prod(array.chunks or ())) * array.dtype.itemsize
    shape = arrays["actions"].shape
    expect(len(shape) == 2, f"{where}: expected actions (T, streams), got {shape}")
    expect(0 not in shape, f"{where}: expected learning histories, got {shape} actions")
    for name, array in arrays.items():
        expected = (*shape, 2) if "states" in name else shape
        what = f"{where}: expected {name} of shape {expected} beside actions of shape {shape}"
        expect(array.shape == expected, f"{what} (time, streams), got {array.shape}")
    return *shape, n_bytes


def _extent(path: str | Path, groups: dict[str, Any], horizon: int | None) -> tuple[int, int, int]:
    """Steps that every history has, streams of a goal that fit memory, and steps an episode."""
    shapes = [_shape_of(where, group) for where, group in groups.items()]
    steps, streams, n_bytes = zip(*shapes, strict=True)
    total, most = sum(n_bytes), most_unpacked(path)
    expect(total <= most, f"its arrays are {total:,} bytes: expected at most {most:,}")
    ends = (np.flatnonzero(group["dones"][:, 0]) for group in groups.values() if "dones" in group)
    horizon = horizon or next((int(each[0]) + 1 for each in ends if each.size), None)
    what = "the steps of an episode in the checkpoint's config (horizon) or marked by dones"
    expect(horizon, f"{path}: expected {what}, got neither")
    n_steps = min(steps) // horizon * horizon
    expect(n_steps, f"{path}: expected episodes of {horizon} steps, got {min(steps)} steps")
    if max(steps) > n_steps:
        which = f"first {n_steps:,} of each are used, whole episodes of {horizon} steps that all"
        note(f"{path} holds histories of up to {max(steps):,} steps; the {which} of them have")
    n_streams = max(1, MAX_TRANSITIONS // (n_steps * len(shapes)))
    if n_streams < max(streams):
        what = f"{len(shapes)} goals x up to {max(streams):,} streams x {n_steps:,} steps"
        note(f"{path} holds {what}; the first {n_streams:,} streams of each goal are used")
    return n_steps, n_streams, horizon


def _arrays(where: str, group: Any, n_steps: int, n_streams: int, horizon: int) -> list[np.ndarray]:
    """The `CONTEXT` of a goal, streams first."""

    def read(name: str) -> np.ndarray:
        return np.ascontiguousarray(group[name][:n_steps, :n_streams].swapaxes(0, 1))

    dones = read("dones") != 0 if "dones" in group else np.zeros(0, dtype=bool)
    wrong = dones != (np.arange(n_steps) % horizon == horizon - 1) if dones.any() else dones
    for stream, step in np.argwhere(wrong)[:1]:
        what = f"an episode to end every {horizon} steps, as the checkpoint's horizon says"
        found = f"{'an end' if dones[stream, step] else 'none'} at step {step} of stream {stream}"
        raise UserError(f"{where}: expected {what}, got {found} (dones)")
    return [_numbers(f"{where}: {name}", read(name), name == "rewards") for name in CONTEXT]


def _numbers(what: str, values: np.ndarray, may_be_fractions: bool) -> np.ndarray:
    """Finite numbers in as few bytes as they need, whatever type they are stored as."""
    if (odd := values[~np.isfinite(values)]).size:
        raise UserError(f"{what}: expected finite numbers, got {odd[0]}")
    if values.dtype.kind == "f" and (odd := values[values != np.round(values)]).size:
        expect(may_be_fractions, f"{what}: expected whole numbers, got {odd[0]}")
        return values.astype(np.float32)
    small = values.min() >= -128 and values.max() <= 127
    return values.astype(np.int8 if small else np.int64)


def _check_rewards(path: str | Path, histories: Histories) -> None:
    """Tell where a reward is earned elsewhere than at the goal that its group is named for."""
    inside = np.arange(histories.n_steps) % histories.horizon < histories.horizon - 1
    rewarded = (histories.rewards > 0) & inside  # at an episode's end the reset hides the place
    away = (histories.next_states != histories.goals[:, None]).any(axis=2)
    for history, step in np.argwhere(rewarded & away)[:1]:
        row, col = histories.goals[history]
        there = ",".join(map(str, histories.next_states[history, step]))
        what = f"rewards of the group named for goal {row},{col} are earned at {there}"
        why = "its groups are in another order than row by row, the goals named here are wrong"
        note(f"{path}: {what}; if {why}")
