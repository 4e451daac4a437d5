"""Learning histories in HDF5, as existing Dark Room code for Algorithm Distillation keeps them.

A file holds a group for each goal, named by the cell of the goal, row by row: "0" to "80" in a room
of 9 x 9. A group holds `states` and `next_states` `(T, streams, 2)` and `actions`, `rewards` and
`dones` `(T, streams)`, time first. A stream is one learning history.

At the last step of an episode `next_states` holds the state after the reset, not the one reached.
It is kept so: the models of that code were trained on it.

    histories = read_hdf5("datasets/history_darkroom_PPO_alg-seed42.hdf5", 9, 20, goals=[[4, 2]])

Needs h5py (`pip install h5py`), which nothing else does.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset import Histories
from historylens.common.errors import UserError, note

SUFFIXES = (".hdf5", ".h5")
MAX_TRANSITIONS = 2**26  # held at once: 400 MB, as one transition takes 6 bytes
_AXES = {"states": 3, "actions": 2, "rewards": 2, "next_states": 3}


def read_hdf5(
    path: str | Path,
    grid_size: int,
    horizon: int | None = None,
    goals: Sequence[Sequence[int]] | None = None,
    tell: Callable[[str], None] = note,
) -> Histories:
    """Read the learning histories of some goals.

    Every stream of a goal is one history, those of a goal side by side. Histories are cut to whole
    episodes and to the shortest of them. Of a file of more than `MAX_TRANSITIONS` transitions the
    first streams of each goal are read, as many as stay below it. Each is told once.

    Args:
        path: the file.
        grid_size: rows and columns of the room.
        horizon: steps an episode; where it is None, up to the first of `dones`.
        goals: `(G, 2)`, (row, column) of the goals wanted; None: all in the file.
        tell: called with a line of text that the user should read.

    Returns:
        Histories of `N = G * streams`; states and actions are whole numbers, rewards too where all
        of them are, float32 elsewhere.

    Raises:
        UserError: h5py is missing, or the file is damaged or not of this kind.
    """
    path = Path(path)
    with _open(path) as file:
        try:
            groups = _find_groups(path, file, grid_size, goals)
            shapes = [_shape_of(path, cell, group) for cell, group in groups.items()]
            horizon = horizon or _horizon_of(path, groups)
            n_steps, n_streams = _cut(path, shapes, horizon, tell)
            parts = [
                _read_group(f"{path}, group {cell}", group, n_steps, n_streams, horizon)
                for cell, group in groups.items()
            ]
        except (OSError, RuntimeError) as error:  # what h5py raises where bytes are missing
            raise UserError(f"{path} is damaged: {_one_line(error)}") from error
    arrays = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    cells = np.repeat(list(groups), [len(part[1]) for part in parts])
    histories = Histories(*arrays, np.stack(np.divmod(cells, grid_size), axis=1), horizon)
    if elsewhere := _rewarded_elsewhere(histories):
        tell(
            f"{path}: {elsewhere}; if its groups are in another order than row by row, the goals "
            "named here are wrong"
        )
    return histories


def _open(path: Path) -> Any:
    """The opened file; h5py is imported here, so that nobody needs it for other files."""
    try:
        import h5py

        return h5py.File(path, "r")
    except ImportError as error:
        what = f"reading {path} needs h5py, which is not installed: pip install h5py"
        raise UserError(what) from error
    except OSError as error:
        what = f"{path} cannot be read as an HDF5 file of learning histories"
        raise UserError(f"{what}: {_one_line(error)}") from error


def _find_groups(
    path: Path, file: Any, grid_size: int, goals: Sequence[Sequence[int]] | None
) -> dict[int, Any]:
    """Groups by the cell of their goal, in the order of `goals` or of the cells."""
    expected = f"expected a group for each goal, named 0 to {grid_size**2 - 1} row by row"
    if not len(file):
        raise UserError(f"{path} is empty: {expected}")
    there = ", ".join(list(file)[:4]) + (f", ... ({len(file)})" if len(file) > 4 else "")
    if goals is None:
        if odd := [name for name in file if not name.isdecimal() or int(name) >= grid_size**2]:
            raise UserError(f"{path}: {expected}, got {odd[0]!r}")
        cells = sorted(map(int, file))
    else:
        cells = [int(row) * grid_size + int(col) for row, col in goals]
    groups = {cell: file.get(str(cell)) for cell in cells}
    for cell, group in groups.items():
        if not hasattr(group, "keys"):
            row, col = divmod(cell, grid_size)
            raise UserError(f"{path}: {expected}, got none of goal {row},{col} ({cell}) in {there}")
    return groups


def _shape_of(path: Path, cell: int, group: Any) -> tuple[int, int]:
    """Steps and streams of a group whose arrays fit each other."""
    where = f"{path}, group {cell}"
    names = [*_AXES, *({"dones"} & group.keys())]
    for name in names:
        if not hasattr(group.get(name), "shape"):
            there = ", ".join(group) or "nothing"
            raise UserError(f"{where}: expected a dataset {name}, got {there}")
    found = group["actions"].shape
    if len(found) != 2:
        raise UserError(f"{where}: expected actions (T, streams), got {found}")
    if 0 in found:
        raise UserError(f"{where}: expected learning histories, got {found} actions")
    for name in names:
        expected = (*found, 2)[: _AXES.get(name, 2)]
        if group[name].shape != expected:
            raise UserError(
                f"{where}: expected {name} of shape {expected} beside actions of shape {found} "
                f"(time, streams), got {group[name].shape}"
            )
    return found


def _horizon_of(path: Path, groups: dict[int, Any]) -> int:
    """Steps up to the first end of an episode."""
    for group in groups.values():
        ends = np.flatnonzero(group["dones"][:, 0]) if "dones" in group else []
        if len(ends):
            return int(ends[0]) + 1
    raise UserError(
        f"{path}: expected the steps of an episode in the checkpoint's config (horizon) or marked "
        "by dones, got neither"
    )


def _cut(
    path: Path, shapes: Sequence[tuple[int, int]], horizon: int, tell: Callable[[str], None]
) -> tuple[int, int]:
    """Steps that every history has, in whole episodes; streams of a goal that fit memory."""
    steps, streams = zip(*shapes, strict=True)
    n_steps = min(steps) // horizon * horizon
    if not n_steps:
        raise UserError(f"{path}: expected episodes of {horizon} steps, got {min(steps)} steps")
    if max(steps) > n_steps:
        tell(
            f"{path} holds histories of up to {max(steps):,} steps; the first {n_steps:,} of each "
            f"are used, whole episodes of {horizon} steps that all of them have"
        )
    n_streams = max(1, MAX_TRANSITIONS // (n_steps * len(shapes)))
    if n_streams < max(streams):
        tell(
            f"{path} holds {len(shapes)} goals x up to {max(streams):,} streams x {n_steps:,} "
            f"steps; the first {n_streams:,} streams of each goal are used"
        )
    return n_steps, n_streams


def _read_group(
    where: str, group: Any, n_steps: int, n_streams: int, horizon: int
) -> tuple[np.ndarray, ...]:
    """States, actions, rewards and next states of a goal, streams first."""
    arrays = {
        name: np.ascontiguousarray(group[name][:n_steps, :n_streams].swapaxes(0, 1))
        for name in (*_AXES, *({"dones"} & group.keys()))
    }
    dones = arrays.pop("dones", np.zeros(0)) != 0
    ends = np.arange(n_steps) % horizon == horizon - 1
    if dones.any() and (dones != ends).any():
        stream, step = np.argwhere(dones != ends)[0]
        found = "an end" if dones[stream, step] else "none"
        raise UserError(
            f"{where}: expected an episode to end every {horizon} steps, as the checkpoint's "
            f"horizon says, got {found} at step {step} of stream {stream} (dones)"
        )
    for name in ("states", "actions", "next_states", "rewards"):
        arrays[name] = _numbers(f"{where}: {name}", arrays[name], is_whole=name != "rewards")
    return tuple(arrays[name] for name in _AXES)


def _numbers(what: str, values: np.ndarray, is_whole: bool) -> np.ndarray:
    """Finite numbers in as few bytes as they need, whatever type they are stored as."""
    if values.dtype.kind not in "buif":
        raise UserError(f"{what}: expected numbers, got {values.dtype}")
    if not np.isfinite(values).all():
        raise UserError(f"{what}: expected finite numbers, got {values[~np.isfinite(values)][0]}")
    odd = values[values != np.round(values)] if values.dtype.kind == "f" else values[:0]
    if odd.size and is_whole:
        raise UserError(f"{what}: expected whole numbers, got {odd[0]}")
    if odd.size:
        return values.astype(np.float32)
    small = values.min() >= -128 and values.max() <= 127
    return values.astype(np.int8 if small else np.int64)


def _rewarded_elsewhere(histories: Histories) -> str:
    """Where rewards are earned elsewhere than at the goal that a group is named for."""
    inside = np.arange(histories.n_steps) % histories.horizon < histories.horizon - 1
    rewarded = (histories.rewards > 0) & inside  # at an episode's end the reset hides the place
    away = (histories.next_states != histories.goals[:, None]).any(axis=2)
    for history, step in np.argwhere(rewarded & away)[:1]:
        row, col = histories.goals[history]
        there = ",".join(map(str, histories.next_states[history, step]))
        return f"rewards of the group named for goal {row},{col} are earned at {there}"
    return ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
