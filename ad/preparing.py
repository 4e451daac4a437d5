"""What a training run depends on, and can it be? `settings, run, device = prepare(flags)` tells."""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ad.checkpoints import RESUME_NAME, checkpoints_in, read_file
from ad.darkroom import N_ACTIONS, TASKS, split_goals
from ad.evaluation import possible
from config import EnvConfig, ModelConfig, SourceConfig, TrainConfig
from historylens.agent import pick_device
from historylens.common.batches import expect_memory
from historylens.common.errors import expect
from historylens.common.processes import ALONE, Group
from historylens.common.reading import printable
from historylens.common.settings import flag_of, from_flags, to_dict


class Settings(NamedTuple):
    """Everything that a run depends on."""

    env: EnvConfig = EnvConfig()
    source: SourceConfig = SourceConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()


def prepare(flags: argparse.Namespace, group: Group = ALONE) -> tuple[Settings, Path, torch.device]:
    """Settings, folder and device of a run; UserError before any work where they cannot be."""
    settings = Settings(*(from_flags(type(default), flags) for default in Settings()))
    group.equal_slice(settings.train.batch_size)
    thins = settings.train.history_dropout and settings.model.n_transit < 2
    expect(not thins, "expected --n-transit of at least 2 for --history-dropout to thin, got 1")
    _check_sizes(*settings)
    device = group.device(pick_device(flags.device))
    name = f"AD-{settings.env.env}-seed{flags.seed}" if flags.run is None else flags.run
    is_plain = name.isprintable() and name not in ("", ".", "..") and not {*"/\\"} & {*name}
    what = "expected --run to be the plain name of a folder, of at most 200 bytes, got"
    expect(is_plain and len(name.encode()) <= 200, f"{what} {printable(repr(name), 300)}")
    is_named = flags.checkpoints and flags.figs
    expect(is_named, "expected --checkpoints and --figs not to be empty")
    run = Path(flags.checkpoints) / name
    if group.is_main:
        _check_run(run, settings, flags.resume)
        for folder, flag in ((run, "--checkpoints"), (Path(flags.figs) / "training", "--figs")):
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            is_ours = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
            expect(is_ours, f"cannot write to {folder}: choose another folder with {flag}")
    return settings, run, device


def _check_run(run: Path, settings: Settings, resume: bool) -> None:
    """Refuse to overwrite a run, and to go on with one that there is not or that differs."""
    begun = (run / RESUME_NAME).exists()
    if not resume:
        what = f"{run} holds a run already, which is not overwritten:"
        how = f"{'go on with it by --resume, or ' if begun else ''}name another with --run"
        return expect(not begun and not checkpoints_in(run), f"{what} {how}")
    expect(begun, f"nothing to resume: {run} holds no interrupted run")
    try:
        saved = read_file(run / RESUME_NAME)["config"]
    except Exception:  # damaged: `train` sets it aside
        return None
    saved = to_dict(*Settings()) | saved  # it may be older than a setting
    what = f"--resume goes on with the settings of {run}: expected"
    for name, value in to_dict(*settings).items():
        expect(saved[name] == value, f"{what} {flag_of(name)} {saved[name]}, got {value}")
    return None


def goals_of(env: EnvConfig) -> dict[str, np.ndarray]:
    """The goals to train on, to validate on and to test on, as `split_goals` gives them."""
    sizes = env.grid_size, env.n_test_goals, env.n_validation_goals
    return split_goals(env.goal_seed, *sizes, env.env, env.n_train_goals)


def _check_sizes(
    env: EnvConfig, source: SourceConfig, model: ModelConfig, train: TrainConfig
) -> None:
    """UserError: settings that no memory holds, or under which nothing can be learned."""
    expect_memory(n_bytes(env, source, model, train), "the sizes")
    what = f"expected --epsilon-start of at least --epsilon-end {source.epsilon_end}"
    is_falling = source.epsilon_start >= source.epsilon_end
    expect(is_falling, f"{what}, got {source.epsilon_start}")
    n_steps, n_context = source.n_source_steps // env.horizon * env.horizon, model.n_transit - 1
    what = (
        f"histories too short for the context: expected --n-source-steps of more than {n_context}"
    )
    expect(n_steps > n_context, f"{what} steps in whole episodes of {env.horizon}, got {n_steps}")
    for name, goals in goals_of(env).items():
        is_near = possible(env, goals).any()
        expect(is_near, f"no {name} goal can be reached within --horizon {env.horizon}")


def n_bytes(env: EnvConfig, source: SourceConfig, model: ModelConfig, train: TrainConfig) -> float:
    """Memory that a run takes at the least: histories, weights six times, a batch, rollouts."""
    cells, tokens, n_hidden = env.grid_size**2, 2 * model.n_transit, len(TASKS[env.env].hidden)
    layers = model.tf_n_layer * (4 * model.tf_n_embd + 2 * model.tf_n_inner)  # numbers a token
    weights = model.tf_n_embd * (layers + tokens + cells)
    n_rooms = max(train.final_rollouts * env.n_test_goals, train.eval_rollouts)
    n_learners = (env.n_train_goals or cells**n_hidden) * source.n_streams
    steps = n_learners * (source.n_source_steps + (n_hidden + 1) * cells * N_ACTIONS)
    steps += n_rooms * train.eval_episodes * env.horizon
    return 8.0 * steps + 24.0 * weights + train.batch_size * tokens * layers
