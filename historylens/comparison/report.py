"""A judged comparison as console text, `results.csv` and the summary in `results.json`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from historylens.common.files import csv_lines, write_atomically
from historylens.common.text import aligned, counted, wrap
from historylens.comparison.intervals import LEVEL, Estimate
from historylens.comparison.study import OPEN, Row, Study

UNITS = {
    "return": "reward an episode, mean over runs, second half of the episodes",
    "iqm": "the same, mean of the middle half of the runs",
    "part_of_best": "mean over runs of return / best possible return of the goal",
    "iqm_of_best": "the same, mean of the middle half of the runs",
    "runs": "that the arm has, fewer where it stopped; compared with the same of full history",
    "difference": "reward an episode, arm minus full history, paired",
    "collapsed": "of `runs`: the arm alone lost more than half of full history's mean there",
    "full_collapsed": "of `runs`: full history alone did",
    "collapse_bound": "share of runs above which collapses, net of full history's, are ruled out",
    "adaptation_loss": "reward an episode, full history minus arm, all episodes: the area between",
    "by_episode": "reward, mean over runs, of each in-context episode",
    "kept": "transitions kept, mean over decisions with more history than the budget",
    "tokens_per_decision": "tokens that the model read, looking at attention and query included",
    "ms_selecting": "milliseconds a new decision, choosing what to keep, any look at attention too",
    "ms_model": "milliseconds a new decision, acting on what is kept",
}


def table(study: Study) -> str:
    """All arms, the highest return first, and what the columns mean."""
    lines = [("strategy", "kept", "runs", "return", "difference to full", "verdict", "collapsed",
              "area", "tokens")]  # fmt: skip
    for row in study.rows:
        difference, area = row.difference.text("+"), f"{row.adaptation_loss.value:+.2f}"
        lines.append((
            row.arm.key,
            "all" if row.arm.method.keeps == "all" else f"{row.kept:.1f}".removesuffix(".0"),
            f"{row.collapses.n_runs}",
            f"{row.mean.value:.2f}",
            *((difference, row.verdict, row.collapses.text(), area) if row.verdict else [""] * 4),
            f"{row.cost.tokens:.1f}",
        ))  # fmt: skip
    legend = (
        "return: reward an episode over the second half of the episodes (intervals, interquartile "
        "means, times: results.csv); difference: paired, with the 95 % interval of this arm; "
        "collapsed: of its runs, those in which the arm alone lost more than half "
        "of what full history earns on the goal, minus those of full history alone, and the rate "
        "above which is ruled out; area: reward an episode lost on the way, over all episodes; "
        "kept: mean, once there is more; tokens: read a decision, looking at attention included"
    )
    return "\n".join(["COMPRESSED AGAINST FULL HISTORY", *aligned(lines, (0, 5, 6)), wrap(legend)])


def advice(study: Study, positions: str) -> str:
    """The margin, how verdicts are to be read, and one recommendation or why there is none."""
    verdicts = (
        f"Margin, stated beforehand: {study.margin_share:.0%} of full history's return, "
        f"{study.margin:.2f} reward an episode. better: gains; safe: loses less than the margin, "
        f"both for {counted(study.n_compared, 'arm')} of the study together (Bonferroni), with "
        "collapses that would cost the margin ruled out; safe so far: safe by its own interval, "
        "but not yet for the whole study, or collapses not ruled out; worse: loses more than the "
        "margin, by its own interval; inconclusive: neither. More seeds settle it. "
        f"{positions[0].upper()}{positions[1:]}. Intervals hold for these goals and new seeds."
    )
    if study.n_saved:
        runs = [row.collapses.n_runs for row in study.rows]
        n_early, n_all = sum(n < max(runs) for n in runs), max(runs) * len(runs)
        verdicts += f" Racing: {counted(n_early, 'arm')} stopped before the end, shown worse or "
        verdicts += f"saving no tokens: {study.n_saved:,} of {n_all:,} runs were saved."
    parts = [wrap(verdicts), wrap(recommendation(study), "=> ", "   ")]
    if whole := [row.arm.key for row in study.candidates if row.cost.identical_to_full]:
        parts.insert(0, wrap(f"NOT COMPRESSED in some decisions: {', '.join(whole)}."))
    return "\n\n".join(parts)


def recommendation(study: Study) -> str:
    """One strategy and budget for this checkpoint and why, or why there is none."""
    unsettled, again = study.unsettled, study.confirmation
    if study.doubts:
        said = "The model ignores its history, or is not shown to use it: no compression can be "
        return f"{said}judged on it. {' '.join(study.doubts)}"
    if study.recommended is not None:
        return _one_recommended(study)
    said = "No recommendation: no strategy that reads fewer tokens than full history is shown to "
    said += f"lose less than {study.margin_share:.0%} of its return at these budgets."
    if not unsettled:
        return said
    row, n = unsettled[0], len(unsettled)
    said += f" {n} {'is' if n == 1 else 'are'} not settled, the most promising {row.arm.key}, "
    said += f"{row.verdict}: {_evidence(row)}."
    if again is not None:
        said += f" Played again on {counted(again.n_seeds, 'new seed')} a goal it is "
        said += f"{again.row.verdict}: {_evidence(again.row)}."
    if again is None or again.row.verdict in OPEN:
        said += f" More runs may settle it: --strategies {row.arm.name} --budgets {row.arm.n_keep} "
        said += f"--seeds {4 * max(study.n_seeds, again.n_seeds if again else 8)}, or --full."
    return said


def _evidence(row: Row) -> str:
    """What a verdict rests on."""
    return f"{row.difference.text('+')}; {row.collapses.sentence()}"


def _one_recommended(study: Study) -> str:
    again = study.confirmation  # if any, the recommendation rests on it
    best, full = (again.row, again.full) if again else (study.recommended, study.full)
    margin, loss, slower = again.margin if again else study.margin, best.adaptation_loss, ""
    budget = "" if best.arm.n_keep is None else f" with {best.arm.n_keep} transitions"
    said = f"Recommended for this checkpoint: {best.arm.name}{budget} ({best.verdict}). "
    said += best.arm.method.rule
    reads = f"reads {best.cost.tokens:.1f} tokens a decision instead of {full.cost.tokens:.1f}."
    if not loss.is_open and loss.low > margin:
        slower = f" But it adapts more slowly: {loss.text()} reward an episode over all episodes."
    if again is not None:
        return (
            f"{said} It was the most promising arm above, and was played again beside full "
            f"history, on {counted(again.n_seeds, 'new seed')} a goal: it earns "
            f"{best.mean.text()} reward an episode there, full history {full.mean.text()}; paired, "
            f"{best.difference.text('+')}, with a margin of {margin:.2f}; "
            f"{best.collapses.sentence()}. It {reads}{slower}"
        )
    said += f" It earns {best.mean.value:.2f} reward an episode, full history "
    said += f"{full.mean.value:.2f}: {_evidence(best)}. It is the smallest budget that is safe or "
    said += f"better and saves tokens: it {reads}"
    rivals = [row for row in study.candidates if row.is_good and row is not best]
    equal = [row for row in rivals if row.arm.n_keep == best.arm.n_keep and study.saves(row)]
    if also := ", ".join(row.arm.key for row in equal):
        said += f" At that budget it earns most of these; also safe or better: {also}."
    said += slower
    if rivals and rivals[0] is study.rows[0]:
        said += f" Most reward: {rivals[0].arm.key}, {rivals[0].mean.text()}."
    return f"{said} The verdict holds for all {study.n_compared} arms together (Bonferroni)."


def _record(row: Row) -> dict[str, Any]:
    """A row of `results.csv`, plain values; None where unknown."""
    record = {"strategy": row.arm.name, "budget": row.arm.n_keep}
    record |= {"kept": row.kept if row.verdict else None, "verdict": row.verdict}
    names = ("mean", "iqm", "part_of_best", "iqm_of_best", "difference", "adaptation_loss")
    for name, each in {name: getattr(row, name) or Estimate(None) for name in names}.items():
        name = "return" if name == "mean" else name
        record |= {name: each.value, f"{name}_low": each.low, f"{name}_high": each.high}
    runs, cost = row.collapses, row.cost
    record |= {"runs": runs.n_runs, "collapsed": runs.arm, "full_collapsed": runs.full}
    record |= {"collapse_bound": runs.bound(), "tokens_per_decision": cost.tokens}
    return record | {
        "ms_selecting": 1000 * cost.seconds_selecting / max(1, cost.selected_anew),
        "ms_model": 1000 * cost.seconds_model / max(1, cost.acted_anew),
    }


def write_csv(path: str | Path, study: Study) -> None:
    """Write one row an arm, whole or not at all."""
    names, *_ = rows = [_record(row) for row in study.rows]
    write_atomically(path, csv_lines([names, *(row.values() for row in rows)]))


def summary(study: Study) -> dict[str, Any]:
    """Everything in the pictures and in the table, as plain values."""
    best, confirmed = study.recommended, None
    if again := study.confirmation:
        rows = [_record(again.full), _record(again.row)]
        confirmed = {"seeds": again.n_seeds, "margin": again.margin, "rows": rows}
    return {
        "level": LEVEL,
        "margin_share": study.margin_share,
        "margin": study.margin,
        "units": UNITS,
        "rows": [_record(row) | {"by_episode": row.by_episode.tolist()} for row in study.rows],
        "full_by_episode": [asdict(estimate) for estimate in study.full_by_episode],
        "doubts": list(study.doubts),
        "recommended": None if best is None else best.arm.key,
        "recommendation": recommendation(study),
        "n_compared": study.n_compared,
        "runs_saved": study.n_saved,
        "confirmation": confirmed,
    }
