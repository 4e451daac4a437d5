"""One page to browse: insights, tables, and every picture of an output folder, in `index.html`.

It needs no network and no server; without JavaScript only its filter and its large view are
missing. Same content, same bytes.
"""

import base64
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from historylens.common.files import FORMATS, INDEX, write_atomically
from historylens.common.text import cap
from historylens.history import Decision
from historylens.metrics import NAMES, SUMMARY_METRICS, Metrics
from historylens.pictures.names import pictures_in

LABELS = "mean attention", "concentration", "entropy", "recent/distant"
SHOWN = [*zip(SUMMARY_METRICS, LABELS, strict=True), ("effective_tokens", "effective tokens"),
         ("mass_rewarded", "rewarded mass")]  # fmt: skip
MEDIA = {".png": "image/png", ".svg": "image/svg+xml", ".pdf": "application/pdf"}


@dataclass(frozen=True)
class Figure:
    """A picture on the page; those that differ in their layer alone have the same caption."""

    path: Path  # of one of its files, below the folder of the page
    kind: str  # a word to filter by
    caption: str
    layer: int | None = None
    sample: int | None = None
    goal: str | None = None
    metrics: Mapping[str, str] = field(default_factory=dict)  # label -> value, shown below it


def figures_of(out: str | Path, decisions: Sequence[Decision], metrics: Metrics) -> list[Figure]:
    """The pictures of an analysis; of each sample its title, goal, and metrics in the layer."""
    figures = []
    for one in pictures_in(out):
        parts = ("trajectory", one.rollout), ("step", one.step), ("page", one.page)
        caption = [f"{name} {number}" for name, number in parts if number is not None]
        goal, values = None, {}
        if one.sample is not None:
            decision = decisions[one.sample]
            caption, goal = [decision.title, *caption], _goal(decision)
            if one.layer in metrics.layers:
                own = metrics.values[one.sample, metrics.layers.index(one.layer), -1]  # (M,)
                values = {label: _digits(name, own[NAMES.index(name)]) for name, label in SHOWN}
        place = one.layer, one.sample, goal
        figures.append(Figure(one.path, one.kind, ", ".join(caption), *place, values))
    return figures


def _goal(decision: Decision) -> str | None:
    if {"goal_row", "goal_col"} <= decision.labels.keys():
        return "({goal_row}, {goal_col})".format(**decision.labels)
    named = decision.labels.get("task", decision.task)
    return None if named is None else f"task {named}"


def _digits(name: str, value: float) -> str:
    """A metric in three significant digits, without an exponent where it is large."""
    if name == "recent_distant_ratio" and value > 1000:
        return cap(value)
    return f"{value:.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")


def write_page(
    out: str | Path,
    title: str,
    facts: Mapping[str, str],
    insights: Sequence[Mapping[str, Any]],
    tables: Sequence[tuple[str, str]],
    figures: Sequence[Figure],
    single_file: bool = False,
) -> Path:
    """Write `index.html` into an output folder: insights, tables, then figures by layer and sample.

    Insights are `{"headline": str, "advice": str, "lines": [(mark, text), ...]}`, tables `(title,
    console text)`. Files of one stem are one figure: PNG or SVG is shown, the others are links.
    With `single_file` the page holds the pictures. ValueError: a figure outside `out`.
    """
    out = Path(out)
    by_layer = groupby(_files(figures), key=lambda pair: pair[0].layer)
    page = {"title": title, "facts": facts, "insights": insights, "tables": tables, "size": _size}
    page |= {"single_file": single_file, "groups": [(layer, [*own]) for layer, own in by_layer]}
    page["address"] = _data if single_file else lambda path: quote(bytes(path.relative_to(out)))
    how = {"autoescape": True, "trim_blocks": True, "undefined": StrictUndefined}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), **how)
    stream = environment.get_template("browse.html").stream(page)
    write_atomically(out / INDEX, lambda file: stream.dump(file, "utf-8", "replace"))
    return out / INDEX


def _files(figures: Iterable[Figure]) -> list[tuple[Figure, dict[str, Path]]]:
    """Each picture once, with its files by format; what has no layer, or no sample, comes first."""
    found = {}
    for one in sorted(figures, key=lambda f: [-1 if n is None else n for n in (f.layer, f.sample)]):
        paths = {form: one.path.with_suffix(f".{form}") for form in FORMATS}
        files = {form: path for form, path in paths.items() if path.exists()}
        if files:
            found.setdefault(one.path.with_suffix(""), (one, files))
    return list(found.values())


def _data(path: Path) -> str:
    return f"data:{MEDIA[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _size(path: Path) -> tuple[int, int] | None:
    """Width and height, as the header of a PNG or SVG file has them; None where it has none."""
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith(b"\x89PNG") and len(head) >= 24:
        return struct.unpack(">II", head[16:24])
    sides = [re.search(rb'<svg[^>]*\s%b="([\d.]+)' % side, head) for side in (b"width", b"height")]
    return tuple(round(float(side[1])) for side in sides) if all(sides) else None
