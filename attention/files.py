"""Numbers -> `metrics.json` and `metrics.csv`, written whole or not at all.

write_json(out / "metrics.json", metrics_json(result, insights, meta, drawn))
write_csv(out / "metrics.csv", result)
"""

import csv
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from attention.insights import Insight, remarks, scopes, verdicts
from attention.metrics import (
    ALL_METRICS,
    DESCRIPTIONS,
    AttentionMetrics,
    as_float64,
    uniform_received,
)
from attention.samples import Sample

SCHEMA_VERSION = 1
LABEL_COLUMNS = ("goal_row", "goal_col", "history", "step", "stride")
DRAWN_DIGITS = 6  # significant digits of drawn arrays; metrics keep all theirs


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
                "per_sample": dict(layer.mean),  # arrays until written: S numbers each
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


def write_atomically(path: str | Path, content: str | bytes | Iterable[str]) -> None:
    """Write a temporary file beside `path`, then rename it: readers never see half a file.

    A long text may come in pieces, so that it never lies in memory as a whole.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                file.writelines([content] if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
