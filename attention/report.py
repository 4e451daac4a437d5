"""Numbers -> console text, `metrics.json` and `metrics.csv`.

Console blocks are returned as strings of at most 100 columns; printing is the command's affair.

    print(layer_table(result)); print(overall_block(result)); print(insight_blocks(insights))
    write_json(out / "metrics.json", metrics_json(result, insights, meta, drawn))
    write_csv(out / "metrics.csv", result)
"""

import csv
import io
import itertools
import json
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from attention.advice import PATTERNS
from attention.console import WIDTH, aligned, columns, wrap
from attention.evidence import (
    FOCUSED_ENTROPY,
    RECENCY_RATIO,
    SPARSE_MAJORITY,
    UNIFORM_ENTROPY,
    cap,
    layer_list,
)
from attention.insights import Insight, remarks, scopes, verdicts
from attention.metrics import (
    ALL_METRICS,
    DESCRIPTIONS,
    SUMMARY_METRICS,
    AttentionMetrics,
    Summary,
    as_float64,
    uniform_received,
)
from attention.samples import Sample

SCHEMA_VERSION = 1
LABEL_COLUMNS = ("goal_row", "goal_col", "history", "step", "stride")
PARTED = 0.1  # mean and median differ by more than this share: the median is shown as well
DRAWN_DIGITS = 6  # significant digits of drawn arrays; metrics keep all theirs


def loaded_block(lines: Mapping[str, str]) -> str:
    """`label: text` lines with the texts aligned; long texts wrap below themselves."""
    width = max(columns(label) for label in lines) + 2
    return "\n".join(
        wrap(text, f"{label}:" + " " * (width - columns(label) - 1), " " * width)
        for label, text in lines.items()
    )


def layer_table(metrics: AttentionMetrics) -> str:
    """The metrics of every layer: mean ± std over samples, uniform attention in the last row."""
    n = scopes(metrics)[0].length
    title = f"METRICS PER LAYER (mean ± std over samples; {n} context tokens, "
    title += f"{len(metrics.samples)} sample{'' if len(metrics.samples) == 1 else 's'})"
    names = ("mean attention", "concentration", "entropy", "/ ln n", "tokens", "recent/distant")
    table = [("layer", *names, "median")]
    table += [(str(layer.layer), *_table_cells(layer.summary())) for layer in metrics.layers]
    even = metrics.uniform_mean()
    table.append(
        (
            "uniform",
            *(f"{even[name]:.4f}".ljust(len("0.0000 ± 0.0000")) for name in SUMMARY_METRICS[:3]),
            f"{even['normalised_entropy']:.2f}",
            f"{even['effective_tokens']:.1f}",
            f"{even['recent_distant_ratio']:.2f}".ljust(len("0.00 ± 0.00")),
            "",
        )
    )
    legend = (
        "entropy in nats; / ln n: entropy of the context part over its maximum; tokens: read in "
        "effect, exp(entropy); recent/distant: last quarter of the context over the first, and the "
        "median where it differs; uniform: what reading every token equally would show"
    )
    return "\n".join([title, *aligned(table), *textwrap.wrap(legend, WIDTH)])


def _table_cells(summary: Mapping[str, Summary]) -> tuple[str, ...]:
    return (
        *(_plus_minus(summary[name], 4) for name in SUMMARY_METRICS[:3]),
        f"{summary['normalised_entropy'].mean:.2f}",
        f"{summary['effective_tokens'].mean:.1f}",
        *_ratio(summary),
    )


def overall_block(metrics: AttentionMetrics) -> str:
    """The four metrics over all layers and samples, mean ± std.

    The median stands beside the ratio where it parts from the mean.
    """
    overall = metrics.overall()
    ratio, median = _ratio(overall)
    return "\n".join(
        [
            "OVERALL ATTENTION STATISTICS",
            "=" * 36,
            f"Mean context attention: {_plus_minus(overall['mean_context_attention'], 4)}",
            f"Attention concentration (std): {_plus_minus(overall['concentration'], 4)}",
            f"Attention entropy: {_plus_minus(overall['entropy'], 4)}",
            f"Recent/Distant ratio: {ratio}" + (f" (median {median})" if median else ""),
        ]
    )


def pattern_table(metrics: AttentionMetrics) -> str:
    """Which pattern holds in which layer, each with the figure that its rule looks at."""
    table = [
        ("", *PATTERNS),
        ("figure", "median ratio", "mean entropy", "mean entropy", "sparse rows"),
        (
            "rule",
            f"> {RECENCY_RATIO}",
            f"> {UNIFORM_ENTROPY}",
            f"< {FOCUSED_ENTROPY}",
            f"> {SPARSE_MAJORITY:.0%}",
        ),
    ]
    overall, *per_layer = scopes(metrics)
    for scope in [*per_layer, overall] if len(per_layer) > 1 else per_layer:
        cells = [
            f"{'yes' if holds else 'no':>3} {f'{x:.0%}' if name == 'sparse' else cap(x):>7}"
            for name, (x, holds) in verdicts(scope).items()
        ]
        table.append(("all" if scope.layer is None else f"layer {scope.layer}", *cells))
    return "\n".join(["PATTERNS PER LAYER", *aligned(table)])


def insight_blocks(insights: Sequence[Insight], metrics: AttentionMetrics) -> str:
    """Insights with evidence, caveat and strategies: the whole model, then layers that differ."""
    whole = [insight for insight in insights if insight.layer is None]
    blocks = [_insight_block([insight]) for insight in whole]
    if not whole:
        blocks.append(
            "💡 INSIGHT: No single pattern over all layers together.\n"
            "   Measure before compressing: neither place nor weight says what can go."
        )
    blocks += [wrap(text, "   ℹ️  ", "      ") for text in remarks(metrics)]
    in_layers = [insight for insight in insights if insight.layer is not None]
    if in_layers:
        blocks.append("WHERE LAYERS DIFFER FROM THE WHOLE")
    for name in PATTERNS:
        same = [insight for insight in in_layers if insight.pattern == name]
        if same:
            blocks.append(_insight_block(same))
    return "\n\n".join(blocks)


def _insight_block(insights: Sequence[Insight]) -> str:
    """One pattern: of the whole model, or of one or more layers, whose advice is the same."""
    first = insights[0]
    headline = first.headline
    if len(insights) > 1:
        layers = layer_list([i.layer for i in insights])
        headline = f"💡 INSIGHT: {PATTERNS[first.pattern].title} detected in {layers}!"
        doubted = [i.layer for i in insights if i.by_rule_only]
        if doubted:
            where = "" if len(doubted) == len(insights) else f"in {layer_list(doubted)} "
            headline += f" ({where}by the absolute rule only)"
    lines = [headline, f"   {first.advice}", wrap(first.meaning, "   ")]
    for insight in insights:
        where = f"Layer {insight.layer}: " if len(insights) > 1 else ""
        lines.append(wrap(f"{where}{insight.evidence}", "   📊 ", "      "))
        if insight.caveat:
            lines.append(wrap(insight.caveat, "   ⚠️  ", "      "))
        if insight.effect:
            lines.append(wrap(insight.effect, "   🧪 ", "      "))
    lines.append("   Strategies:")
    lines += [wrap(strategy, "   - ", "     ") for strategy in first.strategies]
    lines.append(wrap(f"Example: {first.example}", "   - ", "     "))
    return "\n".join(lines)


def metrics_json(
    metrics: AttentionMetrics,
    insights: Sequence[Insight],
    meta: Mapping[str, Any],
    drawn: Mapping[int, Mapping[int, Mapping[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Everything that was measured, as plain numbers: the content of `metrics.json`.

    Args:
        metrics: the measured metrics.
        insights: as `find_patterns` returns them.
        meta: settings of the run (checkpoint, step, seed, ...), as plain types.
        drawn: layer -> sample index -> `drawn_arrays(...)`, for the samples in pictures.

    Returns:
        `schema`, `version`, `meta`, `definitions`, `samples`, `layers` (aggregates over samples,
        per-head means, every sample's values), `overall`, `uniform`, `insights`, `remarks`,
        `drawn`. Whole attention maps are left out (`T * T` numbers a head would make the file
        unreadable): their last row is in `drawn`, the rest in the heatmaps alone.
    """
    drawn = drawn or {}
    shown = {index for samples in drawn.values() for index in samples}
    return {
        "schema": "attention-metrics",
        "version": SCHEMA_VERSION,
        "meta": dict(meta),
        "definitions": DESCRIPTIONS,
        "samples": [_sample_json(sample, sample.index in shown) for sample in metrics.samples],
        "layers": [
            {
                "layer": layer.layer,
                "over_samples": {name: asdict(s) for name, s in layer.summary().items()},
                "head_means": {name: list(v) for name, v in layer.head_means().items()},
                "per_sample": {name: list(v) for name, v in layer.mean.items()},
                "patterns": [name for name, (_, holds) in verdicts(scope).items() if holds],
            }
            for layer, scope in zip(metrics.layers, scopes(metrics)[1:], strict=True)
        ],
        "overall": {name: asdict(summary) for name, summary in metrics.overall().items()},
        "uniform": metrics.uniform_mean(),
        "insights": [asdict(insight) for insight in insights],
        "remarks": remarks(metrics),
        "drawn": {
            "note": "whole maps are not stored: their last row is query_rows, the rest is in "
            "the heatmaps alone",
            "uniform_received": {
                str(n + 1): rounded(uniform_received(n + 1))
                for n in sorted(
                    {s.n_context for s in metrics.samples if s.index in shown and s.tokens is None}
                )
            },
            "layers": {
                str(layer): {str(index): dict(arrays) for index, arrays in samples.items()}
                for layer, samples in drawn.items()
            },
        },
    }


def _sample_json(sample: Sample, is_drawn: bool) -> dict[str, Any]:
    entry = {
        "sample": sample.index,
        "title": sample.title,
        "n_context": sample.n_context,
        **sample.labels,
    }
    if is_drawn:
        entry["episode_starts"] = list(sample.episode_starts)
        entry["rewarded"] = list(np.flatnonzero(sample.rewarded))
        if (tokens := sample.tokens) is not None:
            parts = {"part": list(tokens.part), "decides": tokens.decides}
            entry["tokens"] = {"transition": list(tokens.transition), **parts}
    return entry


def drawn_arrays(
    query_rows: ArrayLike,
    received: ArrayLike | None = None,
    uniform_query_row: ArrayLike | None = None,
    uniform_received: ArrayLike | None = None,
) -> dict[str, Any]:
    """What the pictures of one sample and layer show, rounded to 6 significant digits.

    Args:
        query_rows: `(H, T)`, the query token's attention row of every head.
        received: `(H, T)`, average attention each position receives, or None; NaN where there is
            none becomes 0.
        uniform_query_row, uniform_received: `(T,)`, both under uniform attention, where that is not
            the plain case of a causal mask with the query last.

    Returns:
        `query_rows` and `received`, each `{"mean": T numbers, "heads": H lists of T}`; then what is
        given of the uniform ones, `T` numbers each.
    """
    arrays = {"query_rows": query_rows, "received": received}
    found = {
        name: {
            "mean": rounded(np.nan_to_num(as_float64(a)).mean(0)),
            "heads": rounded(np.nan_to_num(as_float64(a))),
        }
        for name, a in arrays.items()
        if a is not None
    }
    even = {"uniform_query_row": uniform_query_row, "uniform_received": uniform_received}
    return found | {name: rounded(row) for name, row in even.items() if row is not None}


def rounded(values: ArrayLike, digits: int = DRAWN_DIGITS) -> list[Any]:
    """Nested lists of floats with so many significant digits."""
    values = as_float64(values)
    if values.ndim > 1:
        return [rounded(row, digits) for row in values]
    return [float(f"{value:.{digits}g}") for value in values]


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON: plain finite numbers only, all at once or not at all.

    Raises:
        ValueError: NaN or infinity somewhere in it.
        OSError: the file cannot be written.
    """
    encoder = json.JSONEncoder(allow_nan=False, default=_plain)
    write_atomically(path, itertools.chain(encoder.iterencode(content), "\n"))


def _plain(value: object) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"expected plain types for metrics.json, got {type(value).__name__}: {value!r}")


def write_csv(
    path: str | Path, metrics: AttentionMetrics, label_columns: Sequence[str] = LABEL_COLUMNS
) -> None:
    """Write one row a sample, layer and head (a number or `mean`), all at once or not at all.

    Columns: `sample`, `label_columns` (empty where a sample has no such label), `layer`, `head`,
    `n_context`, the metrics, then labels that are not among `label_columns`.
    """
    write_atomically(path, _csv_lines(metrics, label_columns))


def _csv_lines(metrics: AttentionMetrics, label_columns: Sequence[str]) -> Iterator[str]:
    others = {key: None for s in metrics.samples for key in s.labels if key not in label_columns}
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")

    def written(values: Sequence[Any]) -> str:
        line.seek(0)
        line.truncate()
        writer.writerow(values)
        return line.getvalue()

    yield written(["sample", *label_columns, "layer", "head", "n_context", *ALL_METRICS, *others])
    for row in metrics.rows():
        sample = row["sample"]
        labels = [sample.labels.get(key, "") for key in (*label_columns, *others)]
        own, rest = labels[: len(label_columns)], labels[len(label_columns) :]
        values = [row[name] for name in ALL_METRICS]
        place = [row["layer"], row["head"], sample.n_context]
        yield written([sample.index, *own, *place, *values, *rest])


def write_atomically(path: str | Path, text: str | Iterable[str]) -> None:
    """Write a temporary file beside `path`, then rename it: readers never see half a file.

    A long text may come in pieces, so that it never lies in memory as a whole.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.writelines([text] if isinstance(text, str) else text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _plus_minus(summary: Summary, decimals: int) -> str:
    return f"{_fixed(summary.mean, decimals)} ± {_fixed(summary.std, decimals)}"


def _fixed(value: float, decimals: int) -> str:
    """Fixed decimals without a negative zero."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def _ratio(summary: Mapping[str, Summary]) -> tuple[str, str]:
    """The recent/distant ratio, and its median where that tells another story, else ""."""
    ratio = summary["recent_distant_ratio"]
    parted = abs(ratio.mean - ratio.median) > PARTED * min(ratio.mean, ratio.median)
    parted = parted and cap(ratio.mean) != cap(ratio.median)
    return f"{cap(ratio.mean)} ± {cap(ratio.std)}", cap(ratio.median) if parted else ""
