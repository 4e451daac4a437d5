"""Train an Algorithm Distillation model in Dark Room (Laskin et al. 2022, sections 3 and 4).

    python train.py --resume            # go on after an interruption: same result as without it

Writes `checkpoints/RUN/`: a `ckpt-STEP.pt` whenever validation goals go as well as at the best so
far (so the highest step is the one to use), `histories-test.npz`, `training.json` with all the
numbers, and until it is finished `resume.pt`. Draws `figs/training/RUN.png`.
"""

import argparse
import contextlib
from pathlib import Path

import historylens.common  # noqa: F401 - first: Ctrl-C while all else loads
from ad import evaluation
from ad.checkpoints import LOG_NAME, RESUME_NAME, checkpoints_in
from ad.preparing import prepare
from ad.training import finish, train
from config import DEFAULTS_OF, EnvConfig, ModelConfig, SourceConfig, TrainConfig
from historylens.common.errors import run_command
from historylens.common.files import writable_folder
from historylens.common.processes import join
from historylens.common.settings import add_flags, given_for


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, train, evaluate, save."""
    parser = argparse.ArgumentParser(
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


if __name__ == "__main__":
    run_command(main)
