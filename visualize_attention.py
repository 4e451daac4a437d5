"""Show which history an AD model uses, and say how much of it can go.

    python visualize_attention.py                       # the latest checkpoint, 64 decisions
    python visualize_attention.py --adapter my_model.py # a model of your own

Writes pictures, and every number in `metrics.json` and `metrics.csv`, to `figs/attention/`.
"""

from collections.abc import Sequence

from historylens import analysis
from historylens.common.errors import run_command
from historylens.common.settings import Parser, add_flags, given_for


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and analyse a checkpoint's model, or that of an adapter."""
    if given_for("adapter", argv) is not None:
        return analysis.main(argv)  # of the AD half nothing is imported: its names are the user's
    from ad.agent import load_for_analysis
    from config import VisualizeConfig

    parser = Parser(
        description="Show which history an Algorithm Distillation model attends to, in pictures "
        "and numbers, and say how the history may be compressed.",
        epilog="Without flags: the latest checkpoint under checkpoints/, 64 decisions from the "
        "learning histories of its test goals, pictures under figs/attention/.",
    )
    add_flags(parser, VisualizeConfig)
    analysis.run(argv, parser, VisualizeConfig, load_for_analysis)


if __name__ == "__main__":
    run_command(main)
