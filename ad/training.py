"""What a training run is asked for: its settings, its flags and the folder it lives in.

settings, run, device = prepare(make_parser().parse_args(["--seed", "1"]))
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ad.checkpoints import checkpoints_in, pick_device, read_file
from config import (
    EnvConfig,
    ModelConfig,
    SourceConfig,
    TrainConfig,
    UserError,
    add_flags,
    from_flags,
    to_dict,
)
from parallel import ALONE, Group

RESUME_NAME = "resume.pt"


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on."""

    env: EnvConfig
    source: SourceConfig
    model: ModelConfig
    train: TrainConfig

    def to_dict(self) -> dict[str, Any]:
        """All settings in one flat dict, as checkpoints hold them."""
        return to_dict(self.env, self.source, self.model, self.train)


# What a run was begun with that does not name a setting, as it is older than the setting.
_DEFAULTS = Settings(EnvConfig(), SourceConfig(), ModelConfig(), TrainConfig()).to_dict()


def make_parser() -> argparse.ArgumentParser:
    """The flags: one a setting of `config.py`, and where the run lives."""
    parser = argparse.ArgumentParser(
        description="Train an Algorithm Distillation model in Dark Room: learning histories of a "
        "source algorithm, a transformer that imitates them, and its evaluation in context.",
    )
    parser.add_argument("--run", metavar="NAME", help="name of the run (default: AD-ENV-seedSEED)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument(
        "--checkpoints", metavar="DIR", default="checkpoints", help="where runs lie"
    )
    parser.add_argument("--figs", metavar="DIR", default="figs", help="where pictures go")
    add_flags(parser, TrainConfig, SourceConfig, EnvConfig, ModelConfig)
    return parser


def prepare(flags: argparse.Namespace, group: Group = ALONE) -> tuple[Settings, Path, torch.device]:
    """Settings, folder and device of a run, checked before any work.

    Raises:
        UserError: the settings cannot work, or the folder holds another run.
    """
    settings = Settings(*(from_flags(c, flags) for c in Settings.__annotations__.values()))
    group.equal_slice(settings.train.batch_size)
    if settings.train.history_dropout and settings.model.n_transit < 2:
        raise UserError("expected --n-transit of at least 2 for --history-dropout to thin, got 1")
    device = group.device(pick_device(flags.device))
    run = Path(flags.checkpoints) / (flags.run or f"AD-{flags.env}-seed{flags.seed}")
    if group.is_main:
        check_folder(run, settings, flags.resume)
        check_writable(run, "--checkpoints")
        check_writable(Path(flags.figs) / "training", "--figs")
    return settings, run, device


def check_folder(run: Path, settings: Settings, resume: bool) -> None:
    """Refuse to overwrite a run, and to go on with one that there is not or that differs."""
    begun = (run / RESUME_NAME).exists()
    if resume and not begun:
        raise UserError(f"nothing to resume: {run} holds no interrupted run")
    if not resume and (begun or checkpoints_in(run)):
        raise UserError(
            f"{run} holds a run already, which is not overwritten: "
            f"{'go on with it by --resume, or ' if begun else ''}name another with --run"
        )
    if resume:
        saved = _DEFAULTS | read_file(run / RESUME_NAME)["config"]
        changed = [k for k, v in settings.to_dict().items() if saved[k] != v]
        if changed:
            raise UserError(
                f"--resume goes on with the settings of {run}: expected "
                f"--{changed[0].replace('_', '-')} {saved[changed[0]]}, "
                f"got {settings.to_dict()[changed[0]]}"
            )


def check_writable(folder: Path, flag: str) -> None:
    """Refuse a folder that cannot be made or written, without making it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: choose another folder with {flag}")
