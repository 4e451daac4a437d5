"""Find and read the learning histories that go with a checkpoint, in either format.

path = histories_path(None, checkpoint)                  # those beside the checkpoint
histories = read_histories(path, checkpoint)             # .npz, .hdf5 or .h5
"""

from collections.abc import Callable
from pathlib import Path

from ad.checkpoints import HISTORIES_NAME, Checkpoint, task_of
from ad.hdf5 import SUFFIXES, read_hdf5
from dataset import Histories
from historylens.common.errors import expect, note
from historylens.common.reading import printable
from historylens.common.text import counted


def histories_path(given: str | Path | None, checkpoint: Checkpoint) -> Path:
    """The file named by the user, or the one beside the checkpoint."""
    return Path(given) if given else checkpoint.path.parent / HISTORIES_NAME


def read_histories(
    path: str | Path, checkpoint: Checkpoint, tell: Callable[[str], None] = note
) -> Histories:
    """Read learning histories that the checkpoint's model can read.

    `path` is an `.npz` file that `Histories.save` wrote, or `.hdf5` or `.h5` (see `ad.hdf5`), of
    which the goals that the checkpoint holds out are read. UserError where it does not fit.
    """
    path, config, columns = Path(path), checkpoint.model.config, checkpoint.task.columns
    expect(path.is_file(), _none_there(path, checkpoint))
    is_hdf5 = path.suffix.lower() in SUFFIXES
    histories = _read_hdf5(path, checkpoint, tell) if is_hdf5 else Histories.load(path)
    what = f"{path} does not fit: expected learning histories, it holds none"
    expect(histories.states.size, what)
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
        tell(f"{what}; the checkpoint was trained on {trained}")
    return histories


def _read_hdf5(path: Path, checkpoint: Checkpoint, tell: Callable[[str], None]) -> Histories:
    config, goals = checkpoint.config, checkpoint.goals.get("test")
    what = f"{path}: expected a checkpoint of env 'darkroom', where a group is a goal, got env"
    what += f" {config.get('env')!r}; save its histories as .npz instead"
    expect(task_of(config) == "darkroom", what)
    if not goals:
        tell(f"{checkpoint.path} does not say which goals it holds out: all of {path} are read")
    size, horizon = checkpoint.model.config.grid_size, config.get("horizon")
    return read_hdf5(path, size, horizon, goals or None, tell)


def _none_there(path: Path, checkpoint: Checkpoint) -> str:
    """Why there are no histories, and what to do about it."""
    config, what = checkpoint.config, "no learning histories:"
    if path != histories_path(None, checkpoint):
        return f"{what} there is no file {path}"
    if "env_split_seed" not in config:
        how = "name a file with --histories, or train with `python train.py`, which writes it"
        return f"{what} expected {path} beside the checkpoint; {how}"
    name = f"history_{config.get('env')}_{config.get('alg')}_alg-seed{config.get('alg_seed')}"
    how = "this run comes from code that keeps them apart from its checkpoints: name its file, for"
    return f"{what} expected {path}; {how} example --histories datasets/{printable(name)}.hdf5"
