"""The main job: which history an agent attends to, and what happens to its actions without it.

    historylens --adapter my_model.py                        # also: python visualize_attention.py
    historylens compare --adapter my_model.py                # `historylens.comparison`

Decisions, with `--play` those of own play, go through a forward pass with capture; what it shows
stands in `metrics.json` and `metrics.csv`, in pictures (`historylens.pictures` has their names),
and in `index.html` to browse them.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from historylens.agent import Agent, pick_device
from historylens.analysis.job import Job
from historylens.common import settings
from historylens.common.errors import expect, run_command
from historylens.common.files import writable_folder
from historylens.common.processes import join
from historylens.common.settings import Parser, Settings, add_flags, from_dict, setting
from historylens.common.text import counted, labelled


@dataclass(frozen=True)
class AnalysisConfig(Settings):
    """What to analyse, and where the pictures go."""

    adapter: str | None = setting(
        None, "Python file that says how to run a model of your own, see examples/", "FILE"
    )
    num_samples: int = setting(64, "decisions to analyse", at_least=1)
    num_figures: int = setting(10, "decisions to draw, the first of them", at_least=0)
    num_effects: int = setting(
        64, "decisions on which the effect of dropping history is measured; 0: none", at_least=0
    )
    layers: list[int] | None = setting(None, "layers to analyse, from 0 (default: all)")
    heads: list[int] | None = setting(
        None, "heads to analyse and to average over, from 0 (default: all)"
    )
    rewarded_above: float | None = settings.REWARDED_ABOVE()
    play: bool = setting(
        False, "analyse the model's own play on its tasks instead: weights fixed, actions sampled",
        action="store_true",
    )  # fmt: skip
    episodes: int = setting(40, "episodes of own play a rollout", at_least=1)
    rollouts: int = setting(2, "rollouts of own play a task", at_least=1)
    trajectory: int | None = setting(
        None, "--play, and this rollout of it, from 0, drawn step by step", "I", at_least=0
    )
    every: int = setting(10, "steps between pictures of --trajectory", at_least=1)
    out: str = setting("figs/attention", "folder for pictures and numbers", "DIR")
    format: list[str] | None = settings.FORMAT()
    single_file: bool = setting(
        False, "put the pictures into index.html, to be sent as one file", action="store_true"
    )
    device: str = settings.DEVICE()
    precision: str = setting(
        "float32", "of the model's forward pass; metrics are float64 whatever it is",
        choices=("float32", "bfloat16"),
    )  # fmt: skip
    seed: int = setting(0, "seed of the choice of decisions", at_least=0)
    dpi: int = setting(100, "pixels an inch of the pictures", at_least=10, at_most=1000)

    @property
    def plays(self) -> bool:
        """Whether decisions are those of own play."""
        return self.play or self.trajectory is not None


PLAY_FLAGS = "episodes", "rollouts", "every"
CHECKPOINT_FLAGS = ("checkpoint", "histories", "goal", "history", "steps", "stride")
Load = Callable[[Any, torch.device], Agent]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and analyse the model of an adapter; `compare` is a command of its own."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["compare"]:
        from historylens.comparison import main as compare

        return compare(argv[1:], prog="historylens compare")
    parser = Parser(
        description="Show which history an in-context reinforcement learner attends to, in "
        "pictures and numbers, and say how the history may be compressed.",
        epilog="`historylens compare` runs the model on compressed history in its environment.",
    )
    add_flags(parser, AnalysisConfig)
    for name in CHECKPOINT_FLAGS:  # refused
        parser.add_argument(f"--{name}", nargs="+", help=argparse.SUPPRESS)
    run(argv, parser, AnalysisConfig, load_adapter)


def load_adapter(config: Any, device: torch.device) -> Agent:
    """The model and the decisions of an adapter; UserError where it does not fit."""
    from historylens.adapter.agent import load

    wanted = config.num_samples, config.seed, device, config.rewarded_above
    return load(config.adapter, *wanted, config.plays)


def run(argv: Sequence[str], parser: Parser, kind: type, load: Load) -> None:
    """Parse the flags, load the agent, analyse it, with all processes that torchrun started.

    `parser` has a flag for every setting of `kind`, an `AnalysisConfig`; `load` gives the agent
    from settings and device.
    """
    with join() as group, ExitStack() as held:
        with group.told_once():
            flags = parser.parse_args(argv)
        with group.together(), group.told_once():
            why = "its load() chooses the model and its samples() the decisions"
            for name in CHECKPOINT_FLAGS:
                is_own = flags.adapter is None or vars(flags)[name] is None
                expect(is_own, f"--{name} has no meaning beside --adapter: {why}")
            config = from_dict(kind, vars(flags))
            for name in PLAY_FLAGS:
                is_own = config.plays or vars(config)[name] == vars(AnalysisConfig)[name]
                expect(is_own, f"--{name} is of the model's own play; give --play as well")
            agent = load(config, group.device(pick_device(config.device)))
            job = Job.of(agent, config, group)
            if group.is_main:
                held.enter_context(writable_folder(job.out))
        facts = {**agent.facts, **_samples(job)}
        if config.heads:
            which = ", ".join(map(str, job.heads[0]))
            facts["Heads"] = f"{which}: metrics, insights and pictures are of these alone"
        if group.is_main:
            told = f", {group.size} processes" if group.size > 1 else ""
            print(labelled(facts | {"Device": facts["Device"] + told}), flush=True)
        from historylens.analysis.results import analyse  # with what draws: slow to import

        analyse(job, facts)


def _samples(job: Job) -> dict[str, str]:
    """What is going to be looked at, and played before, in words."""
    config = job.config
    if not config.plays:
        return {"Samples": f"{job.agent.facts['Samples']}; {job.n_drawn} drawn"}
    environment = job.agent.environment
    n = len(environment.goals) * config.rollouts * config.episodes * environment.horizon
    n_samples, n_drawn = min(n, config.num_samples), min(n, config.num_samples, config.num_figures)
    return {
        "Own play": f"{environment} x {counted(config.rollouts, 'rollout')}, "
        f"{counted(config.episodes, 'episode')} of {counted(environment.horizon, 'step')}; actions "
        f"are drawn from the policy, seed {config.seed}",
        "Samples": f"{n_samples:,} of {counted(n, 'decision')}; {n_drawn} drawn",
    }


command = partial(run_command, main)  # `historylens`

if __name__ == "__main__":
    command()
