"""What compressed history earns in the environment: the whole job, and its settings.

    historylens compare --adapter my_model.py           # or python compare_compression.py
    compare(agent, CompareConfig(strategies=["recent"], budgets=[10, 20]))

Each strategy at each budget acts beside full history, an empty one and two controls. Writes
`return_by_budget.png`, `return_by_episode.png`, `results.csv` and `results.json`, and prints a
table that ends in one recommendation. An interrupted comparison goes on with the same command.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from historylens.agent import Agent, pick_device
from historylens.common.errors import UserError
from historylens.common.settings import add_flags, count, fraction, from_flags, setting, whole
from historylens.common.text import labelled
from historylens.comparison.playing import Plays, fingerprint, missing, plan, play_arms
from historylens.comparison.policy import Positions
from historylens.comparison.report import advice, summary, table, write_csv
from historylens.comparison.results import (
    CONFIRMATION,
    PICTURES,
    RESULTS,
    TABLE,
    ResultsFile,
    open_results,
)
from historylens.comparison.study import FULL, Arm, Study, confirm, judge
from historylens.compression.method import METHODS


class Effort(NamedTuple):
    """Methods, runs a goal and episodes a run, where the flags do not say."""

    strategies: tuple[str, ...]
    seeds: int
    episodes: int


WITH_BUDGET = tuple(
    name for name, method in METHODS.items() if method.keeps in ("n_keep", "up to n_keep")
)
QUICK = Effort(("recent", "first-recent", "even", "random", "rewarded-recent", "top-k"), 4, 24)
PAPER_GRADE = Effort(WITH_BUDGET, 16, 40)
BUDGETS = (10, 20, 40)  # and all that the model can read; of these those that it can read
POSITIONS = {
    "reindexed": "kept transitions are numbered anew (reindexed)",
    "original": "kept transitions stay at their old positions where they fit (original)",
}


@dataclass(frozen=True)
class CompareConfig:
    """Which ways to compress to compare, how thoroughly, and where the results go."""

    adapter: str | None = setting(
        None, "Python file that says how to run a model of your own, and in which environment",
        "FILE", type=str,
    )  # fmt: skip
    strategies: list[str] | None = setting(
        None, "strategies to compare (default: a quick choice, all with --full)", "NAME",
        type=str, nargs="+",
    )  # fmt: skip
    budgets: list[int] | None = setting(
        None, "transitions to keep (default: 10 20 40 and all that the model reads)", "N",
        type=count, nargs="+",
    )  # fmt: skip
    full: bool = setting(
        False, "paper-grade: all strategies, more seeds and episodes", action="store_true"
    )
    seeds: int | None = setting(
        None, f"runs a goal (default: {QUICK.seeds}, {PAPER_GRADE.seeds} with --full)", "N",
        type=count,
    )  # fmt: skip
    episodes: int | None = setting(
        None, "episodes a run, of which the second half counts "
        f"(default: {QUICK.episodes}, {PAPER_GRADE.episodes} with --full)", "N", type=count,
    )  # fmt: skip
    confirm: int = setting(
        32, "new runs a goal of the most promising arm beside full history, where no shorter one "
        "is shown to be safe yet; 0: none", "N", type=whole,
    )  # fmt: skip
    margin: float = setting(
        0.05, "loss that would not matter, as a part of full history's return", "X", type=fraction
    )
    out: str = setting("figs/compression", "folder for pictures and numbers", "DIR")
    device: str = setting("auto", "cpu, cuda, or auto: cuda where there is one", "NAME")
    seed: int = setting(0, "seed of action noise, random choices and bootstrap", "N", type=whole)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse the flags and compare on the model of an adapter; `prog` names the command in usage."""
    from historylens.adapter.agent import load_acting

    parser = make_parser()
    parser.prog = prog or parser.prog
    for name in ("checkpoint", "positions"):  # of checkpoints: refused here
        parser.add_argument(f"--{name}", nargs="+", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    for name in ("checkpoint", "positions"):
        if vars(flags)[name] is not None:
            raise UserError(
                f"--{name} has no meaning beside --adapter: its load() chooses the model, and its "
                "act() where a kept transition stands"
            )
    config = from_flags(CompareConfig, flags)
    if config.adapter is None:
        raise UserError("expected --adapter FILE, a Python file that says how to run your model")
    compare(load_acting(config.adapter, config.seed, pick_device(config.device)), config)


def make_parser(*more: type) -> argparse.ArgumentParser:
    """The flags: one a setting of `CompareConfig`, and of further settings, which come first."""
    parser = argparse.ArgumentParser(
        description="Run an Algorithm Distillation model on compressed history, in the "
        "environment, and say which strategy and budget lose nothing against full history.",
        epilog=f"Strategies: {', '.join(WITH_BUDGET)}.",
    )
    add_flags(parser, *more, CompareConfig)
    return parser


def compare(agent: Agent, config: CompareConfig, positions: Positions = "reindexed") -> None:
    """Play, judge, report.

    Args:
        agent: what to compare on; its `facts` and `meta` say where it comes from.
        config: what to compare.
        positions: where kept transitions stand.

    Raises:
        UserError: the settings do not fit the agent, or the folder cannot be written to; no file
            of an earlier run is touched.
    """
    effort = PAPER_GRADE if config.full else QUICK
    seeds, episodes = config.seeds or effort.seeds, config.episodes or effort.episodes
    plays = Plays(seeds, episodes, config.seed, positions)
    budgets = config.budgets or [n for n in (*BUDGETS, agent.n_max) if n <= agent.n_max]
    arms = plan(agent, config.strategies or effort.strategies, budgets, plays)
    results, note = open_results(config.out, fingerprint(agent, plays))
    job = Job(agent, config, plays, arms, results)
    print(job.announced(note), flush=True)
    try:
        study = job.played()
    except KeyboardInterrupt:
        done = sum(arm.key in results.by_key for arm in arms)
        print(
            f"\n{done} of {len(arms)} arms are kept in {results.path}: the same command goes on "
            "from there",
            file=sys.stderr,
        )
        raise
    job.save(study)
    print(f"\n{table(study)}\n\n{advice(study, POSITIONS[positions])}")
    more = () if study.confirmation is None else (CONFIRMATION,)
    print(f"\nIn {results.path.parent}/: {', '.join((*PICTURES, TABLE, RESULTS, *more))}.")


@dataclass(frozen=True)
class Job:
    """What is compared, how, and where the results are kept."""

    agent: Agent
    config: CompareConfig
    plays: Plays
    arms: list[Arm]
    results: ResultsFile

    def announced(self, note: str) -> str:
        """What is going to be done, as console text; `note` says what was found."""
        agent, config, plays = self.agent, self.config, self.plays
        environment, n_max = agent.environment, agent.n_max
        n_missing = len(missing(agent, self.arms, self.results))
        each = plays.n_decisions(environment)
        with_budget = [arm for arm in self.arms if arm.n_keep is not None]
        names = dict.fromkeys(arm.name for arm in with_budget)
        budgets = ", ".join(map(str, sorted({arm.n_keep for arm in with_budget})))
        too_long = "" if config.budgets else ", ".join(str(n) for n in BUDGETS if n > n_max)
        text = {
            **agent.facts,
            "Task": f"{agent.title}; {len(environment.goals)} test goals",
            "Arms": f"full, empty, controls, and {', '.join(names)}",
            "Budgets": f"{budgets} of up to {n_max} transitions"
            + (f" (the usual {too_long} exceed that)" if too_long else ""),
            "Runs": f"{plays.n_seeds} seeds a goal, {plays.n_episodes} episodes of "
            f"{environment.horizon} steps; the same action noise in every arm",
            "Positions": POSITIONS[plays.positions],
            "Margin": f"{config.margin:.0%} of full history's return",
            "Work": f"{n_missing} arms x {each:,} decisions = {n_missing * each:,}",
        }
        if config.confirm:
            text["Then"] = (
                "where nothing shorter is shown to be safe, the most promising arm and full "
                f"history again, on {config.confirm} new seeds a goal"
            )
        return labelled(text | ({"Found": note} if note else {}))

    def played(self) -> Study:
        """Play all arms and judge them; the one that is worth it once more, on new seeds."""
        agent, config, best = self.agent, self.config, self.agent.environment.best
        results = play_arms(agent, self.arms, self.plays, self.results)
        study = judge(results, config.margin, best, config.seed)
        if not config.confirm or study.to_confirm is None:
            return study
        plays = self.plays.confirming(config.confirm)
        again = ResultsFile(self.results.path.with_name(CONFIRMATION), fingerprint(agent, plays))
        full, arm = play_arms(agent, [Arm(FULL), study.to_confirm], plays, again)
        again.finish({"confirms": arm.arm.key})
        return confirm(study, full, arm, best, config.seed)

    def save(self, study: Study) -> None:
        """Write the numbers and the pictures."""
        from historylens.pictures.returns import Picture, draw_by_budget, draw_by_episode

        agent, plays, environment = self.agent, self.plays, self.agent.environment
        n_goals, best = len(environment.goals), environment.best
        picture = Picture(
            title=agent.title,
            subtitle=f"{n_goals} goals never trained on x {plays.n_seeds} seeds, "
            f"{plays.n_episodes} episodes of {environment.horizon} steps; "
            f"{POSITIONS[plays.positions]}",
            best=None if best is None else sum(best) / n_goals,
            n_max=agent.n_max,
        )
        out, settings = self.results.path.parent, self.results.fingerprint
        draw_by_budget(out / PICTURES[0], study, picture)
        draw_by_episode(out / PICTURES[1], study, picture)
        write_csv(out / TABLE, study)
        meta = {**agent.meta, "task": agent.title}
        meta |= {"goals": list(environment.goals), "best_by_goal": best}
        for name in ("horizon", "n_max", "seeds", "episodes", "seed", "positions"):
            meta[name] = settings[name]
        self.results.finish(meta | summary(study))
