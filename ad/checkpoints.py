"""Save, find and load trained runs: `load_checkpoint(find_checkpoint("checkpoints").path)`.

A run is a folder `checkpoints/RUN/` with one `ckpt-STEP.pt` or more and, beside them, the learning
histories of the test goals in `histories-test.npz`. A checkpoint is a dict of plain types and
tensors `{step, config, model, optimizer, lr_sched, goals}`, read with `weights_only=True` only.
Those of existing Dark Room code for Algorithm Distillation (`runs/AD-darkroom-seed0/`) load as they
are. They hold no `goals`: which ones were held out follows from the config (`split_of`).
"""

import random
import re
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from config import ModelConfig
from historylens.common.errors import UserError, expect
from historylens.common.files import write_atomically
from historylens.common.settings import from_dict
from model import ADTransformer

HISTORIES_NAME = "histories-test.npz"
_REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed global|but got <class '([^']+)'>")
_SMALL_LLAMA = re.compile(r"(^|\.)transformer\.blocks\.\d+\.")
_WRAPPERS = re.compile(r"(module\.|_orig_mod\.)*")  # of torch.compile and data-parallel training
# What torch must know to read numbers of numpy 1 and 2, which can run nothing.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS = [np.dtype, *(type(np.dtype(kind)) for kind in "?bhilqBHILQefd")]
_NUMBERS += [(_SCALAR, f"{module}.multiarray.scalar") for module in ("numpy.core", "numpy._core")]


class Choice(NamedTuple):
    """A checkpoint file, and why it is the one."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Checkpoint:
    """A trained model and what it was trained on.

    `goals` is `{"train": [[row, col], ...], "validation": [...], "test": [...]}`: without
    "validation" in those of other code, and empty where the split is not known.
    """

    path: Path
    step: int  # gradient updates behind it
    config: dict[str, Any]  # every setting of its training, flat
    model: ADTransformer  # in evaluation mode
    goals: dict[str, list[list[int]]]


def checkpoint_step(path: Path) -> int | None:
    """The step in the name `ckpt-STEP.pt`, or None if the file is not named so."""
    match = re.fullmatch(r"ckpt-(\d+)\.pt", path.name)
    return int(match[1]) if match else None


def checkpoints_in(run: Path) -> list[Path]:
    """Checkpoints of a run, ascending by step as a number: 10000 comes after 9000."""
    files = [path for path in run.glob("ckpt-*.pt") if checkpoint_step(path) is not None]
    return sorted(files, key=checkpoint_step)


def find_checkpoint(where: str | Path) -> Choice:
    """Choose a checkpoint: `where` is a file, a run, or a folder of runs.

    Of a folder of runs it is the run last written to, of a run the highest step. UserError where
    there is none.
    """
    where = Path(where)
    if where.is_file():
        return Choice(where, "the file asked for")
    if own := checkpoints_in(where):
        return Choice(own[-1], f"highest step of {len(own)} in the run asked for")
    runs = [files for run in sorted(where.glob("*")) if (files := checkpoints_in(run))]
    expect(
        runs,
        f"No checkpoint found: expected ckpt-STEP.pt in {where} or in a folder of it. "
        "Train your model first using `python train.py`, or name one with --checkpoint.",
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

    UserError where it is not there, not a checkpoint, or damaged.
    """
    path, what = Path(path), "cannot be read as a checkpoint: expected"
    expect(path.is_file(), f"No checkpoint found: there is no file {path}")
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for each kind of damage
        if refused := _REFUSED.search(str(error)):
            raise UserError(
                f"{path} {what} tensors and plain values, got a {refused[1] or refused[2]}, which "
                "is not loaded because it could run code; where you trust the file, save it again "
                "without that"
            ) from error
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) {what} a whole file written by train.py, got "
            f"one that is truncated or of another kind ({type(error).__name__}). Choose another "
            "with --checkpoint or train again."
        ) from error
    keys = list(map(str, content)) if isinstance(content, dict) else []
    expect(
        {"step", "config", "model"} <= set(keys),
        f"{path} is not a checkpoint of an AD model: expected a dict with step, config, model, got "
        + (f"one with {', '.join(keys[:8])}" if keys else type(content).__name__),
    )
    if isinstance(config := content["config"], dict):
        numpy = {name: v.item() for name, v in config.items() if isinstance(v, np.generic)}
        content["config"] = config | numpy
    return content


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint and build its model, in evaluation mode on `device`.

    UserError where it cannot be read, or its tensors do not fit its config.
    """
    content = read_file(path)
    step, config, weights = (content[key] for key in ("step", "config", "model"))
    is_whole = isinstance(step, Integral)
    expect(is_whole, f"{path}: expected a whole number as its step, got {type(step).__name__}")
    are_dicts = isinstance(config, dict) and isinstance(weights, dict)
    expect(are_dicts, f"{path}: expected its config and model to be dicts")
    are_tensors = all(isinstance(tensor, torch.Tensor) for tensor in weights.values())
    expect(are_tensors, f"{path}: expected its model to be a dict of tensors")
    wrapper = min((_WRAPPERS.match(str(name))[0] for name in weights), key=len, default="")
    weights = {str(name).removeprefix(wrapper): tensor for name, tensor in weights.items()}
    kind = config.get("model")  # of the code that the existing format comes from
    if kind in ("AD", "DPT", "IDT") and any(map(_SMALL_LLAMA.search, weights)):
        is_read = kind != "IDT" and "grid_size" in config
        how = "reads it" if is_read else "(AD and DPT in grid worlds) is a pattern for one"
        raise UserError(
            f"{path}: expected the AD model of train.py, got {kind} on a small Llama of "
            f"jaehyeon-son/dicp: the adapter examples/dicp.py {how}, see docs/your-own-model.md"
        )
    model = ADTransformer(_model_config(path, config, weights))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if wrong := [name for name in expected | found if expected.get(name) != found.get(name)]:
        name, more = wrong[0], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(
            f"{path}: its tensors do not fit its config: expected {name} of shape "
            f"{expected.get(name, 'none')}, got {found.get(name, 'none')}{more}"
        )
    if diverged := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"{path}: {diverged[0]} is not finite: the training diverged. Choose an earlier "
            "checkpoint with --checkpoint, or train with a lower --lr"
        )
    model.load_state_dict(weights)
    goals = content.get("goals") or split_of(config)
    return Checkpoint(Path(path), int(step), config, model.to(device).eval(), goals)


def _model_config(path: str | Path, config: dict[str, Any], weights: dict[str, Any]) -> ModelConfig:
    """The model's settings: from the config, the feed-forward width from the tensors."""
    for name in ("n_transit", "tf_n_layer", "tf_n_head", "tf_n_embd", "grid_size"):
        got = config.get(name)
        is_size = isinstance(got, int) and got >= 1
        expect(is_size, f"{path}: expected {name} of 1 or more in its config, got {got!r}")
    n_heads, width = config["tf_n_head"], config["tf_n_embd"]
    what = f"{path}: expected tf_n_head to divide tf_n_embd in its config"
    expect(width % n_heads == 0, f"{what}, got {n_heads} heads and width {width}")
    inner = weights.get("transformer_encoder.layers.0.linear1.weight")
    if inner is not None and inner.dim():
        config = config | {"tf_n_inner": len(inner)}
    try:
        return from_dict(ModelConfig, {"tf_dropout": 0.0} | config)
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: its config does not describe a model: {error}") from error


def split_of(config: dict[str, Any]) -> dict[str, list[list[int]]]:
    """The goals that existing Dark Room code trained on and held out, as its config implies them.

    The cells of the room, row by row, are shuffled by `random.seed(env_split_seed)`: the first
    `round(cells * train_env_ratio)` are "train", `[[row, col], ...]` in that order, the rest are
    "test". Empty where the config does not tell.
    """
    seed, ratio = config.get("env_split_seed"), config.get("train_env_ratio")
    if not is_dark_room(config) or seed is None or not isinstance(ratio, int | float):
        return {}
    cells = list(range(config["grid_size"] ** 2))
    random.Random(seed).shuffle(cells)
    goals = [list(divmod(cell, config["grid_size"])) for cell in cells]
    n_train = round(len(cells) * ratio)
    return {"train": goals[:n_train], "test": goals[n_train:]}


def is_dark_room(config: dict[str, Any]) -> bool:
    """Whether a model was trained in the plain Dark Room: a goal a room, the same moves in all."""
    return re.sub(r"[\W_]", "", str(config.get("env", "darkroom"))).lower() == "darkroom"
