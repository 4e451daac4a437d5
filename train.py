"""Train an Algorithm Distillation model in Dark Room (Laskin et al. 2022, sections 3 and 4).

    python train.py --resume            # go on after an interruption: same result as without it

Writes `checkpoints/RUN/`: a `ckpt-STEP.pt` whenever validation goals go as well as at the best so
far (so the highest step is the one to use), `histories-test.npz`, `training.json` with all the
numbers, and until it is finished `resume.pt`. Draws `figs/training/RUN.png`.
"""

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

import historylens.common  # noqa: F401 - first: Ctrl-C while all else loads
from ad import evaluation
from ad.checkpoints import LOG_NAME, RESUME_NAME, checkpoints_in, read_file
from ad.darkroom import N_ACTIONS, TASKS
from ad.training import Settings, finish, goals_of, train
from config import DEFAULTS_OF, EnvConfig, ModelConfig, SourceConfig, TrainConfig
from historylens.agent import pick_device
from historylens.common.batches import expect_memory
from historylens.common.errors import expect, run_command
from historylens.common.files import writable_folder
from historylens.common.processes import Group, join
from historylens.common.reading import printable
from historylens.common.settings import Parser, add_flags, flag_of, from_dict, given_for, to_dict


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, train, evaluate, save."""
    parser = Parser(
        description="Train an Algorithm Distillation model in Dark Room: learning histories of a "
        "source algorithm, a transformer that imitates them, and its evaluation in context."
    )
    flag = parser.add_argument
    flag("--run", metavar="NAME", help="name of the run (default: AD-ENV-seedSEED)")
    flag("--resume", action="store_true", help="go on with an interrupted run")
    flag("--checkpoints", metavar="DIR", default="checkpoints", help="where runs lie")
    flag("--figs", metavar="DIR", default="figs", help="where pictures go")
    add_flags(parser, TrainConfig, SourceConfig, EnvConfig, ModelConfig)
    with join() as group, contextlib.ExitStack() as held:
        with group.told_once():
            parser.set_defaults(**DEFAULTS_OF.get(given_for("env", argv) or EnvConfig.env, {}))
            flags = parser.parse_args(argv)
        with group.together():
            settings, run, device = prepare(flags, group)
            if group.is_main:
                held.enter_context(writable_folder(run))
        result = finish(train(settings, run, device, flags.resume, group), run)
        if group.is_main:
            picture = Path(flags.figs) / "training" / f"{run.name}.png"
            with writable_folder(picture.parent, lock=False):
                evaluation.draw_learning_curve(result, picture)
            (run / RESUME_NAME).unlink(missing_ok=True)  # last: until here a resume does the rest
            print(evaluation.describe(result, checkpoints_in(run)[-1]))
            print(f"All numbers: {run / LOG_NAME}, learning curves: {picture}")


def prepare(flags: argparse.Namespace, group: Group) -> tuple[Settings, Path, Any]:
    """Settings, folder and device of a run; UserError before any work where they cannot be."""
    settings = Settings(*(from_dict(type(default), vars(flags)) for default in Settings()))
    group.equal_slice(settings.train.batch_size)
    _check_fit(*settings)
    device = group.device(pick_device(flags.device))
    name = f"AD-{settings.env.env}-seed{flags.seed}" if flags.run is None else flags.run
    is_plain = name.isprintable() and name not in ("", ".", "..") and not {*"/\\"} & {*name}
    what = "expected --run to be the plain name of a folder, of at most 200 bytes, got"
    expect(is_plain and len(name.encode()) <= 200, f"{what} {printable(repr(name), 300)}")
    expect(flags.checkpoints and flags.figs, "expected --checkpoints and --figs not to be empty")
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
        expect(not begun and not checkpoints_in(run), f"{what} {how}")
        return
    expect(begun, f"nothing to resume: {run} holds no interrupted run")
    try:  # what is damaged, `train` sets aside; it may be older than a setting
        saved = to_dict(*Settings()) | read_file(run / RESUME_NAME)["config"]
    except Exception:
        return
    what = f"--resume goes on with the settings of {run}: expected"
    for name, value in to_dict(*settings).items():
        expect(saved[name] == value, f"{what} {flag_of(name)} {saved[name]}, got {value}")


def _check_fit(
    env: EnvConfig, source: SourceConfig, model: ModelConfig, train: TrainConfig
) -> None:
    """UserError: settings that no memory holds, or under which nothing can be learned."""
    thins = train.history_dropout and model.n_transit < 2
    expect(not thins, "expected --n-transit of at least 2 for --history-dropout to thin, got 1")
    expect_memory(n_bytes(env, source, model, train), "the sizes")
    what = f"expected --epsilon-start of at least --epsilon-end {source.epsilon_end}"
    expect(source.epsilon_start >= source.epsilon_end, f"{what}, got {source.epsilon_start}")
    n_steps, n_context = source.n_source_steps // env.horizon * env.horizon, model.n_transit - 1
    what = f"expected --n-source-steps of more than {n_context} steps"
    what = f"histories too short for the context: {what}, got {source.n_source_steps}"
    expect(n_steps > n_context, f"{what} ({n_steps} in whole episodes of {env.horizon})")
    for name, goals in goals_of(env).items():
        is_near = evaluation.possible(env, goals).any()
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


if __name__ == "__main__":
    run_command(main)
