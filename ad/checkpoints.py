"""Save, find and load trained runs: `load_checkpoint(find_checkpoint("checkpoints")[0])`.

A checkpoint, `ckpt-STEP.pt` in the folder of its run, is a dict of plain types and tensors `{step,
config, model, optimizer, lr_sched, goals}`, read with `weights_only=True` only. Those of existing
Dark Room code for Algorithm Distillation (`runs/AD-darkroom-seed0/`) load as they are. They hold no
`goals`: which ones were held out follows from the config (`split_of`).
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ad.darkroom import TASKS, Task
from ad.pickles import digest, load_plain
from config import NEEDED, READ_FROM_CHECKPOINTS, ModelConfig
from historylens.common.errors import UserError, expect
from historylens.common.files import write_atomically
from historylens.common.reading import printable, reading
from historylens.common.settings import from_dict
from model import ADTransformer

HISTORIES_NAME, LOG_NAME, RESUME_NAME = "histories-test.npz", "training.json", "resume.pt"
KIND = "a checkpoint", "Choose another with --checkpoint, or train again"
MAX_WEIGHT = 1e4  # of a model to look at: those of use are far smaller, larger ones overflow
_OTHER = Task("a grid world")
_SMALL_LLAMA = re.compile(r"(^|\.)transformer\.blocks\.\d+\.")
_WRAPPERS = re.compile(r"(module\.|_orig_mod\.)*")  # of torch.compile and data-parallel training


@dataclass(frozen=True)
class Checkpoint:
    """A trained model and what it was trained on."""

    path: Path
    step: int  # gradient updates behind it
    config: dict[str, Any]  # every setting of its training, flat
    model: ADTransformer  # in evaluation mode
    goals: dict[str, list[list[int]]]  # "train", "validation", "test": those that are known

    @property
    def task(self) -> Task:
        """The task that it was trained on; of one that is not in `TASKS` a goal is a cell."""
        return TASKS.get(task_of(self.config), _OTHER)


def checkpoints_in(run: Path) -> list[Path]:
    """Files `ckpt-STEP.pt` of a run, ascending by step as a number: 10000 comes after 9000."""
    files = {path: re.fullmatch(r"ckpt-(\d+)\.pt", path.name) for path in run.glob("ckpt-*.pt")}
    return sorted(filter(files.get, files), key=lambda path: int(files[path][1]))


def find_checkpoint(where: str | Path) -> tuple[Path, str]:
    """A checkpoint, and why it is the one: `where` is a file, a run, or a folder of runs.

    Of runs it is the one last written to, of a run the highest step. UserError: there is none.
    """
    where = Path(where)
    if where.is_file():
        return where, "the file asked for"
    if own := checkpoints_in(where):
        return own[-1], f"highest step of {len(own)} in the run asked for"
    runs = [files for run in sorted(where.glob("*")) if (files := checkpoints_in(run))]
    what = f"No checkpoint found: expected ckpt-STEP.pt in {where} or in a folder of it."
    how = "Train your model first using `python train.py`, or name one with --checkpoint."
    expect(runs, f"{what} {how}")
    latest = max(runs, key=lambda files: max(path.stat().st_mtime_ns for path in files))
    which = "the only run" if len(runs) == 1 else f"last written of {len(runs)} runs"
    return latest[-1], f"{which}, highest step of {len(latest)}"


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a dict of plain types and tensors with its digest, whole or not at all."""
    content = content | {"digest": digest(content)}
    write_atomically(path, lambda file: torch.save(content, file))


def read_file(path: str | Path) -> dict[str, Any]:
    """Plain content of a checkpoint file, never executed; UserError: it is none, or damaged."""
    with reading(path, *KIND) as file:
        content = load_plain(file)
        keys = list(map(str, content)) if isinstance(content, dict) else []
        got = f"one with {', '.join(keys[:8])}" if keys else type(content).__name__
        what = f"{path} is not a checkpoint of an AD model: expected a dict with"
        expect({"step", "config", "model"} <= set(keys), f"{what} step, config, model, got {got}")
        config, step = content["config"], content["step"]
        are_dicts = isinstance(config, dict) and isinstance(content["model"], dict)
        expect(are_dicts, "expected its config and model to be dicts")
        content["config"] = config = dict(dict.items(config))  # a plain one, whatever it was
        _check("its step", step, int, 0, 2**63)
        for name, bounds in READ_FROM_CHECKPOINTS.items():
            if config.get(name) is not None:
                _check(f"{name} in its config", config[name], *bounds)
    return content


def _check(what: str, value: object, kind: type, least: float, most: float) -> None:
    is_kind = type(value) is kind or (kind is float and type(value) is int)
    is_in = is_kind and least <= (len(value) if kind is str else value) <= most
    expected = {int: "a whole number", float: "a number", str: "a text of a length"}[kind]
    what = f"expected {what} to be {expected} in {least}..{most}, got {printable(repr(value))}"
    expect(is_in, what)


def load_checkpoint(
    path: str | Path, device: torch.device | str = "cpu", largest: float = 3e38
) -> Checkpoint:
    """Read a checkpoint and build its model, in evaluation mode on `device`.

    UserError: it cannot be read, its parts do not fit each other, or a weight is beyond `largest`.
    """
    with reading(path, *KIND):
        content = read_file(path)
        config, weights = content["config"], dict(dict.items(content["model"]))
        are_tensors = all(isinstance(tensor, Tensor) for tensor in weights.values())
        expect(are_tensors, "expected its model to be a dict of tensors")
        weights.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel, a wrapper too
        wrapper = min((_WRAPPERS.match(str(name))[0] for name in weights), key=len, default="")
        weights = {str(name).removeprefix(wrapper): tensor for name, tensor in weights.items()}
        kind = config.get("model")  # of the code that the existing format comes from
        if kind in ("AD", "DPT", "IDT") and any(map(_SMALL_LLAMA.search, weights)):
            is_read = kind != "IDT" and "grid_size" in config
            how = "reads it" if is_read else "(AD and DPT in grid worlds) is a pattern for one"
            what = f"expected the AD model of train.py, got {kind} on a small Llama of"
            why = f"the adapter examples/dicp.py {how}, see docs/your-own-model.md"
            raise UserError(f"{what} jaehyeon-son/dicp: {why}")
        model = _model_of(config, weights, Path(path).stat().st_size)
        how = "the training diverged. Choose an earlier checkpoint, or train with a lower --lr"
        for name, tensor in model.state_dict().items():
            is_sane = tensor.abs().max() <= largest  # NaN is not
            expect(is_sane, f"{name} is not finite or beyond {largest:g}: {how}")
        goals = content.get("goals")
        goals = goals if isinstance(goals, Tensor) or goals else split_of(config)
        is_dict = isinstance(goals, dict)
        expect(is_dict, f"expected its goals to be a dict of lists, got a {type(goals).__name__}")
        goals = _checked_goals(goals, config)
    return Checkpoint(Path(path), content["step"], config, model.to(device).eval(), goals)


def _model_of(config: dict[str, Any], weights: dict[str, Tensor], size: int) -> ADTransformer:
    """The model of a config, made where a file of `size` bytes can hold as much."""
    missing = [name for name in NEEDED if config.get(name) is None]
    expect(not missing, f"expected {', '.join(missing)} in its config, got none")
    config = {"tf_dropout": 0.0} | {k: v for k, v in config.items() if v is not None}
    inner = weights.get("transformer_encoder.layers.0.linear1.weight")
    if inner is not None and inner.dim():  # the feed-forward width is that of the tensors
        config["tf_n_inner"] = len(inner)
    made = from_dict(ModelConfig, config)
    rows = made.tf_n_layer * (4 * made.tf_n_embd + 2 * made.tf_n_inner)  # of tf_n_embd numbers
    rows += made.n_transit + made.grid_size**2 + 2 * made.num_actions
    unfit = "its tensors do not fit its config:"
    what = f"{unfit} that describes {rows * made.tf_n_embd:,} numbers, too many for {size:,} bytes"
    expect(rows * made.tf_n_embd <= size, what)
    model = ADTransformer(made)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if wrong := [name for name in expected | found if expected.get(name) != found.get(name)]:
        name, more = wrong[0], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        shape, got = expected.get(name, "none"), found.get(name, "none")
        raise UserError(f"{unfit} expected {printable(name)} of shape {shape}, got {got}{more}")
    for name, tensor in weights.items():
        is_float = tensor.is_floating_point()
        expect(is_float, f"expected {name} of floating-point numbers, got {tensor.dtype}")
    model.load_state_dict(weights)
    return model


def _checked_goals(goals: dict[str, Any], config: dict[str, Any]) -> dict[str, list[list[int]]]:
    """The same in plain lists; UserError unless they are of a config's task, test goals apart."""
    size, hidden = config["grid_size"], TASKS.get(task_of(config), _OTHER).hidden
    parts = {name: [[*goal] for goal in goals] for name, goals in dict.items(goals)}
    goals = [goal for part in parts.values() for goal in part]
    n, what = 2 * len(hidden), "its goals do not fit its room: expected"
    each = ", ".join(f"row and column of the {name}" for name in hidden)
    for goal in goals:
        if len(goal) != n or not all(type(x) is int and 0 <= x < size for x in goal):
            got = printable(repr(goal))
            raise UserError(f"{what} [{each}] with entries 0..{size - 1}, got {got}")
    expect(len(goals) <= 3 * size**n, f"{what} at most {3 * size**n:,} goals, got {len(goals):,}")
    seen = {(*goal,) for name, part in parts.items() if name != "test" for goal in part}
    what = "expected each of its test goals once, and none that it was trained or chosen on"
    for goal in parts.get("test", []):
        expect((*goal,) not in seen, f"{what}, got {goal} again")
        seen.add((*goal,))
    return parts


def split_of(config: dict[str, Any]) -> dict[str, list[list[int]]]:
    """The goals that existing Dark Room code trained on and held out, as its config implies them.

    The cells of the room, row by row, are shuffled by `random.seed(env_split_seed)`; the first
    `round(cells * train_env_ratio)` are "train", the rest "test". Empty: the config does not tell.
    """
    seed, ratio = config.get("env_split_seed"), config.get("train_env_ratio")
    if task_of(config) != "darkroom" or seed is None or ratio is None:
        return {}
    goals = [list(divmod(cell, config["grid_size"])) for cell in range(config["grid_size"] ** 2)]
    random.Random(seed).shuffle(goals)
    n_train = round(len(goals) * ratio)
    return {"train": goals[:n_train], "test": goals[n_train:]}


def task_of(config: dict[str, Any]) -> str | None:
    """The name in `TASKS` of a model's task, the plain one in any spelling; None: another."""
    env = "darkroom" if config.get("env") is None else str(config["env"])
    is_plain = re.sub(r"[\W_]", "", env).lower() == "darkroom"
    return "darkroom" if is_plain else env if env in TASKS else None
