"""A judged comparison as console text, `results.csv` and the summary in `results.json`.

print(table(study)); print(advice(study, setting))
write_csv("figs/compression/results.csv", study)
"""

import csv
import io
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attention.files import write_atomically
from attention.report import loaded_block
from comparison.intervals import LEVEL, Estimate
from comparison.judgement import Confirmation, Row, Study
from compression import CONTROLS, MERGES, STRATEGIES

__all__ = [
    "advice",
    "interval",
    "loaded_block",
    "recommendation",
    "records",
    "summary",
    "table",
    "write_csv",
]

WIDTH = 100
INTERVALS = {
    "return": "mean",
    "iqm": "iqm",
    "part_of_best": "part_of_best",
    "iqm_of_best": "iqm_of_best",
    "difference": "difference",
    "adaptation_loss": "adaptation_loss",
}
UNITS = {
    "return": "reward an episode, mean over runs, second half of the episodes",
    "iqm": "the same, mean of the middle half of the runs",
    "part_of_best": "mean over runs of return / best possible return of the goal",
    "iqm_of_best": "the same, mean of the middle half of the runs",
    "difference": "reward an episode, arm minus full history, paired",
    "adaptation_loss": "reward an episode, full history minus arm, all episodes: the area between",
    "by_episode": "reward, mean over runs, of each in-context episode",
    "kept": "transitions kept, mean over decisions with more history than the budget",
    "tokens_per_decision": "tokens that the model read, looking at attention and query included",
    "ms_selecting": "milliseconds a decision, choosing what to keep, looking at attention included",
    "ms_model": "milliseconds a decision, acting on what is kept",
}


def table(study: Study) -> str:
    """All arms, the highest return first, and what the columns mean."""
    heads = ("strategy", "kept", "return [95 % CI]", "IQM", "difference to full", "verdict",
             "area", "tokens", "ms")  # fmt: skip
    lines = [heads, *(_cells(row) for row in study.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {0, 5}  # columns of words
    text = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    legend = (
        "return, IQM: reward an episode over the second half of the episodes, mean and "
        "interquartile mean over runs; difference: paired, with its 95 % interval; area: reward "
        "an episode between full history and the arm over all episodes, positive where adapting "
        "is slower; kept: mean, once there is more; tokens: read a decision, looking at attention "
        "included; ms: a decision, selecting included, in batches"
    )
    return "\n".join(["COMPRESSED AGAINST FULL HISTORY", *text, *textwrap.wrap(legend, WIDTH)])


def _cells(row: Row) -> tuple[str, ...]:
    cost = row.cost
    is_full = row.verdict is None
    return (
        row.arm.key,
        "all" if is_full or row.arm.name in CONTROLS else f"{row.kept:.1f}".removesuffix(".0"),
        interval(row.mean),
        f"{row.iqm.value:.2f}",
        "" if is_full else interval(row.difference, "+"),
        row.verdict or "",
        "" if is_full else f"{row.adaptation_loss.value:+.2f}",
        f"{row.tokens:.1f}",
        f"{cost['ms_selecting'] + cost['ms_model']:.2f}",
    )


def interval(estimate: Estimate, sign: str = "") -> str:
    """`12.34 [12.00, 12.70]`; the value alone where there is no interval."""
    value, *ends = (
        f"{round(number, 2) + 0.0:{sign}.2f}"  # no negative zero
        for number in (estimate.value, estimate.low, estimate.high)
        if number is not None
    )
    return f"{value} [{', '.join(ends)}]" if ends else value


def advice(study: Study, positions: str) -> str:
    """The margin, how verdicts are to be read, and one recommendation or why there is none."""
    share = f"{study.margin_share:.0%}"
    verdicts = (
        f"Margin, stated beforehand: {share} of full history's return, "
        f"{study.margin:.2f} reward an episode. better: gains; safe: loses less than the margin; "
        f"worse: loses more, each with its {LEVEL:.0%} interval; inconclusive: more seeds are "
        f"needed. {positions[0].upper()}{positions[1:]}. {study.n_compared} arms are compared "
        "with full history, each at this level. Intervals hold for these goals and new seeds."
    )
    parts = [_wrapped(verdicts), _wrapped(recommendation(study), "=> ", "   ")]
    uncompressed = [row.arm.key for row in study.candidates if row.cost.get("identical_to_full")]
    if uncompressed:
        parts.insert(0, _wrapped(f"NOT COMPRESSED in some decisions: {', '.join(uncompressed)}."))
    return "\n\n".join(parts)


def recommendation(study: Study) -> str:
    """One strategy and budget for this checkpoint and why, or why there is none."""
    if study.doubts:
        return (
            "The model ignores its history, or is not shown to use it: no compression can be "
            f"judged on it. {' '.join(study.doubts)}"
        )
    best = study.recommended
    if best is None:
        return _nothing_found(study)
    if study.confirmation is not None:
        return _confirmed(study.confirmation)
    full = study.full
    also = [
        row.arm.key
        for row in study.candidates
        if row.arm.n_keep == best.arm.n_keep and row.is_good and row is not best
        and row.tokens < full.tokens
    ]  # fmt: skip
    text = (
        f"Recommended for this checkpoint: {best.arm.name}"
        + (f" with {best.arm.n_keep} transitions" if best.arm.n_keep is not None else "")
        + f" ({best.verdict}). {rule_of(best)} It earns {best.mean.value:.2f} reward an episode, "
        f"full history {full.mean.value:.2f}: {interval(best.difference, '+')}. "
        f"It is the smallest budget with a verdict safe or better, and reads {best.tokens:.1f} "
        f"tokens a decision instead of {full.tokens:.1f}."
    )
    if also:
        text += f" At that budget it earns most; also safe or better: {', '.join(also)}."
    loss = best.adaptation_loss
    if loss.low is not None and loss.low > study.margin:
        text += f" But it adapts more slowly: {interval(loss)} reward an episode over all episodes."
    most = study.rows[0]
    if most.arm.is_candidate and most.is_good and most is not best:
        text += f" Most reward: {most.arm.key}, {interval(most.mean)}."
    stands = "holds" if study.stands_corrected else "does not hold; confirm it with more --seeds"
    return f"{text} Corrected for {study.n_compared} comparisons (Bonferroni) the verdict {stands}."


def _nothing_found(study: Study) -> str:
    unsettled, tried = study.unsettled, study.confirmation
    text = (
        "No recommendation: no strategy that reads fewer tokens than full history is shown to "
        f"lose less than {study.margin_share:.0%} of its return at these budgets."
    )
    if not unsettled:
        return text
    row, n = unsettled[0], len(unsettled)
    text += (
        f" {n} {'is' if n == 1 else 'are'} inconclusive, the most promising {row.arm.key}: "
        f"{interval(row.difference, '+')}."
    )
    if tried is not None:
        text += (
            f" Played again on {tried.n_seeds} new seeds a goal it is {tried.row.verdict}: "
            f"{interval(tried.row.difference, '+')}."
        )
    if tried is None or tried.row.verdict == "inconclusive":
        text += (
            f" More runs may settle it: --strategies {row.arm.name} --budgets {row.arm.n_keep} "
            f"--seeds {4 * (tried.n_seeds if tried else 8)}, or --full."
        )
    return text


def _confirmed(found: Confirmation) -> str:
    """A recommendation that rests on runs of its own."""
    row, full = found.row, found.full
    text = (
        f"Recommended for this checkpoint: {row.arm.name} with {row.arm.n_keep} transitions "
        f"({row.verdict}). {rule_of(row)} It was the most promising arm above, and was played "
        f"again beside full history, on {found.n_seeds} new seeds a goal: it earns "
        f"{interval(row.mean)} reward an episode there, full history {interval(full.mean)}; "
        f"paired, {interval(row.difference, '+')}, with a margin of {found.margin:.2f}. It reads "
        f"{row.tokens:.1f} tokens a decision instead of {full.tokens:.1f}."
    )
    loss = row.adaptation_loss
    if loss.low is not None and loss.low > found.margin:
        text += f" But it adapts more slowly: {interval(loss)} reward an episode over all episodes."
    return text


def rule_of(row: Row) -> str:
    """What the strategy of a row does, in one sentence."""
    known = STRATEGIES | MERGES | CONTROLS
    rule = " ".join(known[row.arm.name].rule.split())
    return rule if rule.endswith(".") else f"{rule}."


def _wrapped(text: str, first: str = "", then: str = "") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=then)


def records(study: Study) -> list[dict[str, Any]]:
    """A flat dict of plain values a row: what `results.csv` holds; None where unknown."""
    return [_record(row) for row in study.rows]


def _record(row: Row) -> dict[str, Any]:
    record: dict[str, Any] = {"strategy": row.arm.name, "budget": row.arm.n_keep}
    record |= {"kept": row.kept if row.verdict else None, "verdict": row.verdict}
    for name, attribute in INTERVALS.items():
        estimate = getattr(row, attribute) or Estimate(None, None, None)
        record |= {name: estimate.value, f"{name}_low": estimate.low}
        record[f"{name}_high"] = estimate.high
    costs = ("tokens_per_decision", "ms_selecting", "ms_model")
    return record | {name: row.cost[name] for name in costs}


def write_csv(path: str | Path, study: Study) -> None:
    """Write one row an arm, whole or not at all."""
    rows = records(study)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def summary(study: Study, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in the pictures and in the table, as plain values."""
    rows = [
        record | {"by_episode": row.by_episode.tolist()}
        for record, row in zip(records(study), study.rows, strict=True)
    ]
    best, tried = study.recommended, study.confirmation
    confirmation = tried and {
        "seeds": tried.n_seeds,
        "margin": tried.margin,
        "rows": [_record(tried.full), _record(tried.row)],
    }
    return {
        **meta,
        "level": LEVEL,
        "margin_share": study.margin_share,
        "margin": study.margin,
        "units": UNITS,
        "rows": rows,
        "full_by_episode": [asdict(estimate) for estimate in study.full_by_episode],
        "doubts": list(study.doubts),
        "recommended": None if best is None else best.arm.key,
        "recommendation": recommendation(study),
        "n_compared": study.n_compared,
        "stands_corrected": study.stands_corrected,
        "confirmation": confirmation,
    }
