"""Save, find and load trained runs.

A run is a folder `checkpoints/RUN/` with one `ckpt-STEP.pt` or more and, beside them, the learning
histories of the test goals in `histories-test.npz`. A checkpoint is a dict of plain types and
tensors `{step, config, model, optimizer, lr_sched, goals}`, read with `weights_only=True` only.

    choice = find_checkpoint("checkpoints")
    checkpoint = load_checkpoint(choice.path)

Checkpoints of existing Dark Room code for Algorithm Distillation (`runs/AD-darkroom-seed0/`) load
as they are. They hold no `goals`: which ones were held out follows from the config (`split_of`).
"""

import numbers
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from config import ModelConfig
from historylens.common.errors import UserError
from historylens.common.files import write_atomically
from historylens.common.settings import from_dict
from model import ADTransformer

HISTORIES_NAME = "histories-test.npz"
_NAME = re.compile(r"ckpt-(\d+)\.pt")
_REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed global|but got <class '([^']+)'>")
# Prefixes that torch.compile and data-parallel wrappers put before the name of every tensor.
_WRAPPERS = ("module.", "_orig_mod.")
_SIZES = ("n_transit", "tf_n_layer", "tf_n_head", "tf_n_embd", "grid_size")


class Choice(NamedTuple):
    """A checkpoint file, and why it is the one."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Checkpoint:
    """A trained model and what it was trained on.

    Attributes:
        path: the file it was read from.
        step: gradient updates behind it.
        config: every setting of its training, flat.
        model: the model, in evaluation mode.
        goals: `{"train": [[row, col], ...], "validation": [...], "test": [...]}`; those of other
            code have no "validation", and where the split is not known it is empty.
    """

    path: Path
    step: int
    config: dict[str, Any]
    model: ADTransformer
    goals: dict[str, list[list[int]]]


def checkpoint_step(path: Path) -> int | None:
    """The step in the name `ckpt-STEP.pt`, or None if the file is not named so."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints_in(run: Path) -> list[Path]:
    """Checkpoints of a run, ascending by step as a number: 10000 comes after 9000."""
    files = [path for path in run.glob("ckpt-*.pt") if checkpoint_step(path) is not None]
    return sorted(files, key=checkpoint_step)


def find_checkpoint(where: str | Path) -> Choice:
    """Choose a checkpoint: `where` is a file, a run, or a folder of runs.

    Of a folder of runs it is the run last written to, of a run the highest step.

    Raises:
        UserError: there is none.
    """
    where = Path(where)
    if where.is_file():
        return Choice(where, "the file asked for")
    if own := checkpoints_in(where):
        return Choice(own[-1], f"highest step of {len(own)} in the run asked for")
    folders = sorted(where.iterdir()) if where.is_dir() else []
    runs = [files for run in folders if run.is_dir() and (files := checkpoints_in(run))]
    if not runs:
        raise UserError(
            f"No checkpoint found: expected ckpt-STEP.pt in {where} or in a folder of it. "
            "Train your model first using `python train.py`, or name one with --checkpoint."
        )
    latest = max(runs, key=lambda files: max(path.stat().st_mtime_ns for path in files))
    which = "the only run" if len(runs) == 1 else f"last written of {len(runs)} runs"
    return Choice(latest[-1], f"{which}, highest step of {len(latest)}")


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a dict of plain types and tensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: torch.save(content, file))


def read_file(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file as plain numbers and tensors; nothing in it is executed.

    Raises:
        UserError: it is not there, not a checkpoint, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No checkpoint found: there is no file {path}")
    try:
        with torch.serialization.safe_globals(_numpy_numbers()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for each kind of damage
        if refused := _REFUSED.search(str(error)):
            raise UserError(
                f"{path} cannot be read as a checkpoint: expected tensors and plain values, got a "
                f"{refused[1] or refused[2]}, which is not loaded because it could run code; where "
                "you trust the file, save it again without that"
            ) from error
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as a checkpoint: expected a "
            f"whole file written by train.py, got one that is truncated or of another kind "
            f"({type(error).__name__}). Choose another with --checkpoint or train again."
        ) from error
    needed = ("step", "config", "model")
    if not isinstance(content, dict) or any(key not in content for key in needed):
        found = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else None
        raise UserError(
            f"{path} is not a checkpoint of an AD model: expected a dict with {', '.join(needed)}, "
            f"got {f'one with {found}' if found else type(content).__name__}"
        )
    if isinstance(config := content["config"], dict):
        numpy = {name: v.item() for name, v in config.items() if isinstance(v, np.generic)}
        content["config"] = config | numpy
    return content


def _numpy_numbers() -> list[Any]:
    """What torch must know to read numbers of numpy, which can run nothing."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in "?bhilqBHILQefd"]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")  # numpy 1 and 2
    return [np.dtype, *kinds, *((scalar, f"{module}.scalar") for module in modules)]


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint and build its model, in evaluation mode on `device`.

    Raises:
        UserError: it cannot be read, or its tensors do not fit its config.
    """
    content = read_file(path)
    step, weights, config = content["step"], _unwrapped(content["model"]), content["config"]
    if not isinstance(step, numbers.Integral):
        raise UserError(f"{path}: expected a whole number as its step, got {type(step).__name__}")
    model = ADTransformer(_model_config(path, weights, config))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
    if wrong:
        name = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(
            f"{path}: its tensors do not fit its config: expected {name} of shape "
            f"{expected.get(name, 'none')}, got {found.get(name, 'none')}{more}"
        )
    diverged = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if diverged:
        raise UserError(
            f"{path}: {diverged[0]} is not finite: the training diverged. Choose an earlier "
            "checkpoint with --checkpoint, or train with a lower --lr"
        )
    model.load_state_dict(weights)
    goals = content.get("goals") or split_of(config)
    return Checkpoint(Path(path), int(step), config, model.to(device).eval(), goals)


def _unwrapped(weights: Any) -> Any:
    """Tensors by the names they have in the model itself, whatever it was wrapped in."""
    while isinstance(weights, dict) and weights:
        wrapper = next((w for w in _WRAPPERS if all(str(k).startswith(w) for k in weights)), None)
        if wrapper is None:
            break
        weights = {name.removeprefix(wrapper): tensor for name, tensor in weights.items()}
    return weights


def _model_config(path: str | Path, weights: Any, config: Any) -> ModelConfig:
    """The model's settings: from the config, the feed-forward width from the tensors."""
    if not isinstance(config, dict) or not isinstance(weights, dict):
        raise UserError(f"{path}: expected its config and model to be dicts")
    if not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise UserError(f"{path}: expected its model to be a dict of tensors")
    for name in _SIZES:
        value = config.get(name)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{path}: expected {name} of 1 or more in its config, got {value!r}")
    if config["tf_n_embd"] % config["tf_n_head"]:
        raise UserError(
            f"{path}: expected tf_n_head to divide tf_n_embd in its config, "
            f"got {config['tf_n_head']} heads and width {config['tf_n_embd']}"
        )
    inner = weights.get("transformer_encoder.layers.0.linear1.weight")
    width = {} if inner is None or inner.dim() == 0 else {"tf_n_inner": inner.shape[0]}
    try:
        return from_dict(ModelConfig, {"tf_dropout": 0.0} | config | width)
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: its config does not describe a model: {error}") from error


def split_of(config: dict[str, Any]) -> dict[str, list[list[int]]]:
    """The goals that existing Dark Room code trained on and held out, as its config implies them.

    The cells of the room, row by row, are shuffled by `random.seed(env_split_seed)`; the first
    `round(cells * train_env_ratio)` are trained on, the rest held out. Goals are in that order.

    Returns:
        `{"train": [[row, col], ...], "test": [...]}`; empty where the config does not tell.
    """
    seed, ratio = config.get("env_split_seed"), config.get("train_env_ratio")
    if not is_dark_room(config) or seed is None or not isinstance(ratio, int | float):
        return {}
    n_cells = config["grid_size"] ** 2
    cells = list(range(n_cells))
    random.Random(seed).shuffle(cells)
    goals = [list(divmod(cell, config["grid_size"])) for cell in cells]
    n_train = round(n_cells * ratio)
    return {"train": goals[:n_train], "test": goals[n_train:]}


def is_dark_room(config: dict[str, Any]) -> bool:
    """Whether a model was trained in the plain Dark Room: a goal a room, the same moves in all."""
    return re.sub(r"[\W_]", "", str(config.get("env", "darkroom"))).lower() == "darkroom"
