"""Find and read the learning histories that go with a checkpoint, in either format.

path = histories_path(None, checkpoint)                  # those beside the checkpoint
histories = read_histories(path, checkpoint)             # .npz, .hdf5 or .h5
"""

from collections.abc import Callable
from pathlib import Path

from ad.checkpoints import HISTORIES_NAME, Checkpoint, is_dark_room
from ad.hdf5 import SUFFIXES, read_hdf5
from dataset import Histories
from historylens.common.errors import UserError, note


def histories_path(given: str | Path | None, checkpoint: Checkpoint) -> Path:
    """The file named by the user, or the one beside the checkpoint."""
    return Path(given) if given else checkpoint.path.parent / HISTORIES_NAME


def read_histories(
    path: str | Path, checkpoint: Checkpoint, tell: Callable[[str], None] = note
) -> Histories:
    """Read learning histories that the checkpoint's model can read.

    Of an HDF5 file, those of the goals that the checkpoint holds out.

    Args:
        path: an `.npz` file that `Histories.save` wrote, or `.hdf5` or `.h5` (see `ad.hdf5`).
        checkpoint: whose model is to read them.
        tell: called with a line of text that the user should read.

    Raises:
        UserError: there is no such file, or it does not fit the checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(_none_there(path, checkpoint))
    if path.suffix.lower() in SUFFIXES:
        histories = _read_hdf5(path, checkpoint, tell)
    else:
        histories = Histories.load(path)
    if not histories.states.size:
        raise UserError(f"{path} does not fit: expected learning histories, it holds none")
    _check_range(path, histories, checkpoint)
    return histories


def _read_hdf5(path: Path, checkpoint: Checkpoint, tell: Callable[[str], None]) -> Histories:
    if not is_dark_room(checkpoint.config):
        raise UserError(
            f"{path}: expected a checkpoint of env 'darkroom', where a group is a goal, got env "
            f"{checkpoint.config['env']!r}; save its histories as .npz instead"
        )
    goals = checkpoint.goals.get("test")
    if not goals:
        tell(f"{checkpoint.path} does not say which goals it holds out: all of {path} are read")
    horizon = checkpoint.config.get("horizon")
    if horizon is not None and (not isinstance(horizon, int) or horizon < 1):
        raise UserError(
            f"{checkpoint.path}: expected horizon of 1 or more in its config, got {horizon!r}"
        )
    return read_hdf5(path, checkpoint.model.config.grid_size, horizon, goals or None, tell)


def _check_range(path: Path, histories: Histories, checkpoint: Checkpoint) -> None:
    """Check that states and actions are among those that the model has embeddings for."""
    config = checkpoint.model.config
    for name, values, n in (
        ("rows and columns", histories.states, config.grid_size),
        ("rows and columns", histories.next_states, config.grid_size),
        ("actions", histories.actions, config.num_actions),
    ):
        if (highest := values.max()) >= n:
            raise UserError(
                f"{path} does not fit the checkpoint: expected {name} below {n}, got {highest}"
            )
        if (lowest := values.min()) < 0:
            raise UserError(f"{path}: expected {name} of 0 or more, got {lowest}")


def _none_there(path: Path, checkpoint: Checkpoint) -> str:
    """Why there are no histories, and what to do about it."""
    if path != histories_path(None, checkpoint):
        return f"no learning histories: there is no file {path}"
    config, expected = checkpoint.config, f"no learning histories: expected {path}"
    if "env_split_seed" in config:
        name = f"history_{config.get('env')}_{config.get('alg')}_alg-seed{config.get('alg_seed')}"
        return (
            f"{expected}; this run comes from code that keeps them apart from its checkpoints: "
            f"name its file, for example --histories datasets/{name}.hdf5"
        )
    return (
        f"{expected} beside the checkpoint; name a file with --histories, or train with "
        "`python train.py`, which writes it"
    )
