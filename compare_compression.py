"""Compare compressed with full history, in the environment.

    python compare_compression.py                       # the latest checkpoint, a quick comparison
    python compare_compression.py --full                # all strategies, more seeds and episodes
    python compare_compression.py --strategies recent rewarded-recent --budgets 10 20 --seeds 16

The model acts on goals that it was not trained on, its history compressed before every decision:
each strategy at each budget, beside full history, an empty one and two controls. Writes
`return_by_budget.png`, `return_by_episode.png`, `results.csv` and `results.json` to
`figs/compression/`, and prints a table that ends in one recommendation. An interrupted comparison
goes on with the same command.
"""

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from adapter.file import load_adapter
from adapter.task import adapter_task
from checkpoint import find_checkpoint, load_checkpoint, pick_device
from comparison import report
from comparison.judgement import FULL, Arm, Study, confirm, judge
from comparison.kept_results import (
    CONFIRMATION,
    PICTURES,
    RESULTS,
    TABLE,
    KeptResults,
    code_digest,
)
from comparison.playing import Plays, fingerprint, n_decisions, plan, play_arms, twin_of
from comparison.task import Task, darkroom_task
from compression import MERGES, STRATEGIES
from config import (
    BUDGETS,
    PAPER_GRADE,
    QUICK,
    CompareConfig,
    UserError,
    add_flags,
    from_flags,
    run_command,
    same_as_default,
)

POSITIONS = {
    "reindexed": "kept transitions are numbered anew (reindexed)",
    "original": "kept transitions stay at their old positions where they fit (original)",
}


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, play, judge, report."""
    config = from_flags(CompareConfig, make_parser().parse_args(argv))
    job = prepare(config)
    kept = KeptResults.open(config.out, fingerprint(job.task, job.plays, code_digest()))
    print(announced(job, kept), flush=True)
    try:
        outcomes = play_arms(job.task, job.arms, job.plays, kept)
        study = judge(outcomes, config.margin, job.task.best, config.seed)
        if config.confirm and study.to_confirm is not None:
            study = confirmed(job, study, kept)
    except KeyboardInterrupt:
        done = sum(arm.key in kept.arms for arm in job.arms)
        print(
            f"\n{done} of {len(job.arms)} arms are kept in {kept.out / RESULTS}: the same command "
            "goes on from there",
            file=sys.stderr,
        )
        raise
    save(job, study, kept)
    print(f"\n{report.table(study)}\n\n{report.advice(study, POSITIONS[config.positions])}")
    more = () if study.confirmation is None else (CONFIRMATION,)
    names = ", ".join((*PICTURES, TABLE, RESULTS, *more))
    print(f"\nIn {kept.out}/: {names}.")


@dataclass(frozen=True)
class Job:
    """What is compared."""

    config: CompareConfig
    source: dict[str, str]  # where the model comes from, for the console
    meta: dict[str, Any]  # the same for results.json
    task: Task
    plays: Plays
    arms: list[Arm]
    left_out: tuple[int, ...]  # default budgets beyond what the model can read


def make_parser() -> argparse.ArgumentParser:
    """The flags, one a setting of `CompareConfig`."""
    parser = argparse.ArgumentParser(
        description="Run an Algorithm Distillation model on compressed history, in the "
        "environment, and say which strategy and budget lose nothing against full history.",
        epilog=f"Strategies: {', '.join(all_strategies())}.",
    )
    add_flags(parser, CompareConfig)
    return parser


def all_strategies() -> list[str]:
    """Names of all strategies and merges that have a budget."""
    kept = [name for name, s in STRATEGIES.items() if s.keeps not in ("all", "none")]
    return [*kept, *MERGES]


def prepare(config: CompareConfig) -> Job:
    """Load and check everything; no file of an earlier run is touched."""
    task, source, meta = load_task(config)
    effort = PAPER_GRADE if config.full else QUICK
    plays = Plays(config.seeds or effort.seeds, config.episodes or effort.episodes, config.seed)
    n_max = task.view.n_max
    if not n_max:
        raise UserError(
            f"{meta['checkpoint']}: its model reads no history: there is nothing to compress"
        )
    usual = [*BUDGETS, n_max]
    budgets = config.budgets or [budget for budget in usual if budget <= n_max]
    left_out = () if config.budgets else tuple(budget for budget in BUDGETS if budget > n_max)
    strategies = config.strategies or effort.strategies or all_strategies()
    arms = plan(task, strategies, budgets, plays)
    return Job(config, source, meta, task, plays, arms, left_out)


def load_task(config: CompareConfig) -> tuple[Task, dict[str, str], dict[str, Any]]:
    """The task that is named, and where it comes from: for the console, and as plain values."""
    device = pick_device(config.device)
    if config.adapter is None:
        choice = find_checkpoint(config.checkpoint)
        checkpoint = load_checkpoint(choice.path, device)
        source = {"Checkpoint": f"{choice.path} ({choice.reason})"}
        meta = {"checkpoint": str(choice.path), "step": checkpoint.step}
        return darkroom_task(checkpoint, config.positions), source, meta
    for name in ("checkpoint", "positions"):
        if not same_as_default(config, name):
            raise UserError(
                f"--{name} has no meaning beside --adapter: its load() chooses the model, and its "
                "act() where a kept transition stands"
            )
    task = adapter_task(load_adapter(config.adapter), config.seed, device)
    return task, {"Adapter": config.adapter}, {"adapter": config.adapter}


def confirmed(job: Job, study: Study, kept: KeptResults) -> Study:
    """Play the most promising arm and full history again, on new seeds, and judge it on those."""
    plays = job.plays.confirming(job.config.confirm)
    arms = [Arm(FULL), study.to_confirm]
    again = kept.confirming(fingerprint(job.task, plays, code_digest()))
    outcomes = play_arms(job.task, arms, plays, again)
    again.finish({"confirms": arms[1].key})
    return confirm(study, *outcomes, job.task.best, job.config.seed)


def announced(job: Job, kept: KeptResults) -> str:
    """What is going to be done, as console text."""
    task, plays = job.task, job.plays
    missing = [a for a in job.arms if a.key not in kept.arms and twin_of(a, task) is None]
    budgets = sorted({arm.n_keep for arm in job.arms if arm.n_keep is not None})
    strategies = list(dict.fromkeys(arm.name for arm in job.arms if arm.n_keep is not None))
    each = n_decisions(task, plays)
    text = {
        **job.source,
        "Task": f"{task.name}; {task.n_goals} test goals",
        "Arms": f"full, empty, controls, and {', '.join(strategies)}",
        "Budgets": f"{', '.join(map(str, budgets))} of up to {task.view.n_max} transitions",
        "Runs": f"{plays.n_seeds} seeds a goal, {plays.n_episodes} episodes of {task.horizon} "
        "steps; the same action noise in every arm",
        "Positions": POSITIONS[task.view.positions],
        "Margin": f"{job.config.margin:.0%} of full history's return",
        "Work": f"{len(missing)} arms x {each:,} decisions = {len(missing) * each:,}",
    }
    if job.config.confirm:
        text["Then"] = (
            "where nothing shorter is shown to be safe, the most promising arm and full history "
            f"again, on {job.config.confirm} new seeds a goal"
        )
    if job.left_out:
        text["Budgets"] += f" (the usual {', '.join(map(str, job.left_out))} exceed that)"
    if kept.note:
        text["Found"] = kept.note
    return report.loaded_block(text)


def save(job: Job, study: Study, kept: KeptResults) -> None:
    """Write the numbers and the pictures."""
    from comparison.figures import Picture, draw_by_budget, draw_by_episode

    task, plays = job.task, job.plays
    n_max, best = task.view.n_max, task.best
    picture = Picture(
        title=task.name,
        subtitle=f"{task.n_goals} goals never trained on x {plays.n_seeds} seeds, "
        f"{plays.n_episodes} episodes of {task.horizon} steps; {POSITIONS[task.view.positions]}",
        best=None if best is None else sum(best) / len(best),
        n_max=n_max,
    )
    draw_by_budget(kept.out / PICTURES[0], study, picture)
    draw_by_episode(kept.out / PICTURES[1], study, picture)
    report.write_csv(kept.out / TABLE, study)
    meta: dict[str, Any] = {
        **job.meta,
        "task": task.name,
        "goals": list(task.goals),
        "best_by_goal": None if best is None else list(best),
        "horizon": task.horizon,
        "n_max": n_max,
        "seeds": plays.n_seeds,
        "episodes": plays.n_episodes,
        "seed": plays.seed,
        "positions": task.view.positions,
    }
    kept.finish(report.summary(study, meta))


if __name__ == "__main__":
    run_command(main)
