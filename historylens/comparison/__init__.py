"""What compressed history earns in the environment: the whole job, and its settings.

    historylens compare --adapter my_model.py           # or python compare_compression.py
    compare(agent, CompareConfig(strategies=["recent"], budgets=[10, 20]))

All processes that torchrun started share the work; rank 0 writes and prints. An interrupted
comparison goes on with the same command.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch

from historylens.agent import Agent, pick_device
from historylens.common import settings
from historylens.common.batches import expect_memory
from historylens.common.errors import expect, note
from historylens.common.files import FORMATS, writable_folder
from historylens.common.processes import ALONE, Group, join
from historylens.common.settings import Parser, Settings, add_flags, from_dict, setting
from historylens.common.text import counted, labelled, wrap
from historylens.comparison.intervals import N_RESAMPLES, looks
from historylens.comparison.playing import Plays, fingerprint, missing, plan, play_arms
from historylens.comparison.policy import POSITIONS
from historylens.comparison.report import advice, recommendation, summary, table, write_csv
from historylens.comparison.results import CONFIRMATION, DRAWN, FILES, ResultsFile
from historylens.comparison.study import FULL, Arm, Study, confirm, going_on, judge, undecided
from historylens.compression.method import METHODS

WITH_BUDGET = tuple(name for name, each in METHODS.items() if each.keeps not in ("all", "none"))
QUICK = ("recent", "first-recent", "even", "random", "rewarded-recent", "top-k")
STRATEGIES, SEEDS, EPISODES = (QUICK, WITH_BUDGET), (4, 16), (24, 40)  # without and with --full
CONFIRMING = 10**9  # between the seed of a comparison and that of the runs that confirm it
BUDGETS = (10, 20, 40, 100)  # and all that the model can read; of these those that it can read


@dataclass(frozen=True)
class CompareConfig(Settings):
    """Which ways to compress to compare, how thoroughly, and where the results go."""

    adapter: str | None = setting(
        None, "Python file that says how to run a model of your own, and in which environment",
        "FILE",
    )  # fmt: skip
    strategies: list[str] | None = setting(
        None, "strategies to compare (default: a quick choice, all with --full)", "NAME"
    )
    budgets: list[int] | None = setting(
        None, "transitions to keep (default: 10 20 40 100 and all that the model reads)", at_least=1
    )
    full: bool = setting(
        False, "paper-grade: all strategies, more seeds and episodes", action="store_true"
    )
    seeds: int | None = setting(
        None, "runs a goal (default: {}, {} with --full)".format(*SEEDS), at_least=1
    )
    episodes: int | None = setting(
        None, "episodes a run, of which the second half counts "
        "(default: {}, {} with --full)".format(*EPISODES), at_least=1,
    )  # fmt: skip
    no_racing: bool = setting(
        False, "play every arm to the end, also one that is shown worse or saves no tokens",
        action="store_true",
    )  # fmt: skip
    confirm: int = setting(
        128, "at most so many new runs a goal of the most promising arm beside full history, where "
        "no shorter one is shown to be safe yet; 0: none", at_least=0,
    )  # fmt: skip
    margin: float = setting(
        0.05, "loss that would not matter, as a part of full history's return", fraction=True
    )
    rewarded_above: float | None = settings.REWARDED_ABOVE()
    out: str = setting("figs/compression", "folder for pictures and numbers", "DIR")
    format: list[str] | None = settings.FORMAT()
    device: str = settings.DEVICE()
    seed: int = setting(0, "seed of action noise, random choices and bootstrap", at_least=0)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse the flags and compare on the model of an adapter; `prog` names the command in usage."""
    from historylens.adapter.agent import load_acting

    parser = make_parser()
    parser.prog = prog or parser.prog
    of_checkpoints = ("checkpoint", "positions")
    for name in of_checkpoints:
        parser.add_argument(f"--{name}", nargs="+", help=argparse.SUPPRESS)

    def load(flags: argparse.Namespace, device: torch.device) -> tuple[Agent, str]:
        why = "its load() chooses the model, and its act() where a kept transition stands"
        for name in of_checkpoints:
            expect(vars(flags)[name] is None, f"--{name} has no meaning beside --adapter: {why}")
        return load_acting(flags.adapter, flags.seed, device, flags.rewarded_above), "reindexed"

    run(argv, parser, load)


def make_parser(*more: type) -> Parser:
    """The flags: one a setting of `CompareConfig`, and of further settings, which come first."""
    parser = Parser(
        description="Run an Algorithm Distillation model on compressed history, in the "
        "environment, and say which strategy and budget lose nothing against full history.",
        epilog=f"Strategies: {', '.join(WITH_BUDGET)}, and head-LAYER-HEAD.",
    )
    add_flags(parser, *more, CompareConfig)
    return parser


Load = Callable[[argparse.Namespace, torch.device], tuple[Agent, str]]


def run(argv: Sequence[str] | None, parser: Parser, load: Load) -> None:
    """Parse the flags, `load` the agent and where its kept transitions stand, and compare."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # threads only wait for each other on batches as small as these
    with join() as group:
        with group.told_once():
            flags = parser.parse_args(argv)
        with group.together(), group.told_once():
            config = from_dict(CompareConfig, vars(flags))
            agent, positions = load(flags, group.device(pick_device(config.device)))
        compare(agent, config, positions, group)


def compare(
    agent: Agent, config: CompareConfig, positions: str = "reindexed", group: Group = ALONE
) -> None:
    """Play, judge, report; `positions`, of `POSITIONS`, is where kept transitions stand.

    UserError, and no file touched: the settings do not fit the agent, or the folder is refused.
    """
    sizes = config.seeds or SEEDS[config.full], config.episodes or EPISODES[config.full]
    facts, results = {}, None  # rank 0 has them
    with ExitStack() as held:
        with group.together(), group.told_once():
            plays = Plays(agent, *sizes, config.seed, positions)
            budgets = config.budgets or [n for n in (*BUDGETS, agent.n_max) if n <= agent.n_max]
            arms = plan(plays, config.strategies or STRATEGIES[config.full], budgets)
            most = max(plays.n_seeds, config.confirm)
            n_numbers = most * (2 * N_RESAMPLES * len(agent.environment.goals) + plays.n_decisions)
            expect_memory(8 * n_numbers, "--seeds, --episodes or --confirm")
            if group.is_main:
                out = held.enter_context(writable_folder(config.out))
                results = ResultsFile(out, fingerprint(plays))
        if results is not None:
            facts = announced(config, plays, arms, results)
            more = {"Processes": f"{group.size} share the work"} if group.size > 1 else {}
            print(labelled(facts | more), flush=True)
        try:
            study = play_and_judge(config, plays, arms, results, group)
        except KeyboardInterrupt:
            if results is not None and results.blocks:
                kept = f"{counted(len(results.blocks), 'block')} of runs are kept in {results.path}"
                print(f"\n{kept}: the same command goes on from there", file=sys.stderr)
            raise
        if study is not None:
            finish(config, study, plays, results, facts)


def play_and_judge(
    config: CompareConfig, plays: Plays, arms: list[Arm], results: ResultsFile | None, group: Group
) -> Study | None:
    """The judged study, with its confirmation where there is one; None but on rank 0."""
    best, study, arm, again = plays.agent.environment.best, None, None, None
    of_look = {"margin_share": config.margin, "seed": plays.seed}
    race = None if config.no_racing else partial(going_on, **of_look)
    played = play_arms(plays, arms, results, race, group)
    if results is not None:
        study = judge(played, config.margin, best, config.seed)
        arm = study.unsettled[0].arm if config.confirm and study.unsettled else None
        of_look["least"] = study.least
    if (arm := group.broadcast(arm)) is None:
        return study
    new = replace(plays, n_seeds=config.confirm, seed=plays.seed + CONFIRMING)
    with group.together():
        if results is not None:
            again = ResultsFile(results.path.parent, fingerprint(new), CONFIRMATION)
            if again.why and again.found:
                note(again.found)
    until = None if config.no_racing else partial(undecided, **of_look)
    played = play_arms(new, [Arm(FULL), arm], again, until, group)
    if again is None:
        return None
    again.write({"confirms": arm.key})
    share = looks(config.confirm)[played[0].returns.shape[1]] if until else 1.0
    return confirm(study, *played, best, config.seed, share)


def announced(
    config: CompareConfig, plays: Plays, arms: list[Arm], results: ResultsFile
) -> dict[str, str]:
    """What is going to be done, and what was found, in words."""
    agent, environment, n_max = plays.agent, plays.agent.environment, plays.agent.n_max
    todo = missing(plays, arms, results)
    n_arms, n_runs = len({arm for arm, _ in todo}), sum(len(seeds) for _, seeds in todo)
    early = list(looks(plays.n_seeds))[:-1]
    is_racing = early and not config.no_racing
    names = ", ".join(dict.fromkeys(arm.name for arm in arms if arm.n_keep))
    budgets = ", ".join(map(str, sorted({arm.n_keep for arm in arms if arm.n_keep})))
    usual = "" if config.budgets else ", ".join(str(n) for n in BUDGETS if n > n_max)
    too_long = f" (the usual {usual} exceed that)" if usual else ""
    then = "where nothing shorter is shown to be safe, the most promising arm and full history "
    most = "up to " * (not config.no_racing) + counted(config.confirm, "new seed")
    text = {
        **agent.facts,
        "Task": f"{agent.title}; {environment}",
        "Arms": f"full, empty, controls, and {names}",
        "Budgets": f"{budgets} of up to {n_max} transitions{too_long}",
        "Runs": f"{counted(plays.n_seeds, 'seed')} a goal, "
        f"{counted(plays.n_episodes, 'episode')} of {environment.horizon} "
        "steps; the same action noise in every arm",
        "Positions": POSITIONS[plays.positions],
        "Margin": f"{config.margin:.0%} of full history's return",
        "Racing": f"after {', '.join(map(str, early))} seeds of all goals, what is shown worse or "
        "saves no tokens stops" if is_racing else "",
        "Work": f"{counted(n_arms, 'arm')}, {'at most ' if is_racing else ''}"
        f"{n_runs * plays.n_decisions:,} decisions",
        "Then": f"{then}again, on {most} a goal" if config.confirm else "",
        "Found": results.found,
        "Episodes": counting(plays, results),
    }  # fmt: skip
    return {name: told for name, told in text.items() if told}


def counting(plays: Plays, results: ResultsFile, study: Study | None = None) -> str:
    """How returns are counted where runs, of a `study` or all, ended episodes early; else empty."""
    blocks, environment = list(results.blocks.values()), plays.agent.environment
    if study is not None:
        runs = {row.arm: row.collapses.n_runs for row in study.rows}
        goals = len(environment.goals)
        blocks = [one for one in blocks if one.first * goals < runs.get(one.arm, 0)]
    n_early, block = sum(one.n_early for one in blocks), f"{environment.horizon} steps"
    said = f"{n_early:,} episodes ended before {block} were over, and the next began at once: a "
    said += f"return is the reward of {block} divided by the episodes in them, the last one cut."
    return said if n_early else ""


def finish(
    config: CompareConfig, study: Study, plays: Plays, results: ResultsFile,
    facts: Mapping[str, str],
) -> None:  # fmt: skip
    """Draw the pictures, write the numbers and the page, and print what it comes to."""
    from historylens.pictures.browse import Figure, write_page
    from historylens.pictures.painter import Painter
    from historylens.pictures.returns import Picture, draw_by_budget, draw_by_episode

    agent, environment, positions = plays.agent, plays.agent.environment, POSITIONS[plays.positions]
    best, early, goals = environment.best, counting(plays, results, study), list(environment.goals)
    blocks = counted(plays.n_episodes, "block" if early else "episode")
    subtitle = f"{environment} x {counted(plays.n_seeds, 'seed')}, {blocks} of "
    subtitle += f"{environment.horizon} steps; {positions}"
    mean_best = None if best is None else sum(best) / len(goals)
    picture = Picture(agent.title, subtitle, mean_best, agent.n_max)
    results.write()
    formats = tuple(dict.fromkeys(config.format or FORMATS[:1]))
    with Painter(1, f"all numbers are in {results.path}", formats=formats) as painter:
        for name, function in zip(DRAWN, (draw_by_budget, draw_by_episode), strict=True):
            painter.draw(function, results.path.with_name(name), study, picture)
    write_csv(results.path.with_suffix(".csv"), study)
    meta = {**agent.meta, "task": agent.title, "goals": goals, "best_by_goal": best}
    names = ("horizon", "n_max", "seeds", "episodes", "seed", "positions")
    meta |= {name: results.fingerprint[name] for name in names}
    meta |= {"returns": early} if early else {}
    results.write(meta | summary(study))  # it says that all numbers are there

    told = {"headline": "Recommendation", "advice": recommendation(study), "lines": []}
    arms, verdicts = table(study), advice(study, positions)
    tables = [arms.partition("\n")[::2], ("VERDICTS", verdicts)]
    figures = [Figure(results.path.with_name(f"{n}.png"), n.replace("_", " "), "") for n in DRAWN]
    passing = ("Work", "Found", "Episodes")
    lasting = {name: text for name, text in facts.items() if name not in passing}
    lasting |= {"Episodes": early} if early else {}
    out, title = results.path.parent, f"Compressed history: {agent.title}"
    write_page(out, title, lasting, [told], tables, figures)
    more = () if study.confirmation is None else (CONFIRMATION,)
    there = ", ".join(name for name in (*FILES, *more) if (out / name).exists())
    if early:
        print(f"\n{wrap(early)}")
    print(f"\n{arms}\n\n{verdicts}\n\nIn {out}/: {there}.")
