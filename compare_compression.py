"""Compare compressed with full history, in the environment.

    python compare_compression.py                       # the latest checkpoint, a quick comparison
    python compare_compression.py --adapter my_model.py # a model and an environment of your own

The model acts on goals that it was not trained on, its history compressed before every decision.
Writes pictures, `results.csv` and `results.json` to `figs/compression/`, and prints a table that
ends in one recommendation.
"""

import argparse
from collections.abc import Sequence

from historylens import comparison
from historylens.agent import Agent
from historylens.common.errors import run_command
from historylens.common.settings import from_dict, given_for


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and compare on a checkpoint's model, or on that of an adapter."""
    if given_for("adapter", argv) is not None:
        return comparison.main(argv)  # of the AD half nothing is imported: its names are the user's
    import torch  # not before `historylens`, which lets Ctrl-C end what loads

    from ad.agent import load_for_acting
    from config import ActingConfig

    def load(flags: argparse.Namespace, device: torch.device) -> tuple[Agent, str]:
        acting = from_dict(ActingConfig, vars(flags))
        agent = load_for_acting(acting, device)
        agent.rewarded_above = flags.rewarded_above or 0.0
        return agent, acting.positions

    comparison.run(argv, comparison.make_parser(ActingConfig), load)


if __name__ == "__main__":
    run_command(main)
