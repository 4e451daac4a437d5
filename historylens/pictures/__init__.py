"""Which picture lies where in the output folder of an analysis (`names.KINDS`), and who draws it.

A run leaves no picture of an earlier run among its own, and touches no file of the user.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from historylens.common import files
from historylens.common.errors import note
from historylens.common.files import INDEX, write_atomically
from historylens.common.text import listed
from historylens.metrics import SUMMARY_METRICS, Metrics
from historylens.pictures.effectplot import deletion_curves, head_effects
from historylens.pictures.heatmap import color_range, heatmap
from historylens.pictures.lineplot import line_plot
from historylens.pictures.metricplot import attention_over_learning, course, summary
from historylens.pictures.names import pictures_in
from historylens.pictures.order import SampleAttention
from historylens.pictures.painter import Painter
from historylens.pictures.roommap import room_map
from historylens.pictures.timestrip import attention_over_time

HEADS_A_PAGE = 16  # a heatmap has so many panels at most
FILES = (INDEX, "metrics.csv", "metrics.json")
ROWS = "attention_over_time.npz"
INCOMPLETE = "INCOMPLETE.txt"  # there from when an earlier run is cleared until all is drawn


def prepare_output(out: Path, layers: Sequence[int], followed: Path | None = None) -> None:
    """Make the output folder; UserError where files cannot be written to where they will lie."""
    with files.writable_folder(out, lock=False):
        inside = [out] if followed is None else [out, followed]
        folders = [*inside[1:], *(one / f"layer_{layer}" for one in inside for layer in layers)]
        pictures = (one.path for one in pictures_in(out))
        for path in (*folders, *(out / name for name in FILES), *pictures):
            is_fit = path.is_dir() == (path in folders) and os.access(path, os.W_OK)
            if os.path.lexists(path) and not is_fit:
                raise files.in_the_way(out, path)
        files.expect_no_results(out, "comparison")


def clear_pictures(out: Path) -> None:
    """Remove an earlier run's pictures and page; set aside what has its names, but is not of it."""
    is_ours = (out / INCOMPLETE).exists() or files.holds_results(out, "analysis")
    if not is_ours and (aside := files.set_aside(out, FILES)):
        note(f"{out} held files of no analysis under its names: moved to {aside}")
    why = "A run began to write here and has not ended: run its command again."
    write_atomically(out / INCOMPLETE, f"{why}\n")
    pictures = (one.path for one in pictures_in(out))
    for path in (*pictures, out / INDEX, *out.glob(f"trajectory_*/{ROWS}")):
        path.unlink(missing_ok=True)
    for pattern in ("trajectory_*/layer_*", "trajectory_*", "layer_*"):
        for folder in out.glob(pattern):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def n_pictures(n_drawn: int, n_heads: Sequence[int]) -> int:
    """Heatmaps and line plots of so many decisions in layers with so many heads."""
    return n_drawn * sum(len(_pages(n)) + 1 for n in n_heads)


def _pages(n_heads: int) -> list[slice]:
    """The heads on each page of a heatmap, pages equally full."""
    n_pages = -(-n_heads // HEADS_A_PAGE)
    size = -(-n_heads // n_pages)
    return [slice(first, first + size) for first in range(0, n_heads, size)]


def samples(batch: Any) -> Iterator[tuple[int, int, SampleAttention]]:
    """Layer, number and attention of each sample of an `analysis.Batch` that comes with a map."""
    for layer, attention in batch.attention.items():
        for m, i in enumerate(batch.drawn):
            # states stay here: they may be images
            decision = replace(batch.decisions[m], states=None, next_states=None, query_state=None)
            own = decision, batch.tokens[i], attention, i, m, batch.uniform_rows[i]
            yield layer, batch.indices[i], SampleAttention.of(*own)


def draw_batch(
    out: Path, batch: Any, painter: Painter, rooms: Iterable[Any] = (), *,
    name: str = "sample", every: int = 1,
) -> None:  # fmt: skip
    """A heatmap and a line plot a layer and sample, called `name` and its index times `every`.

    Then a map for each of the `rooms` of `analysis.room.room_maps`.
    """
    for layer, index, sample in samples(batch):
        heads, stem = batch.heads[layer], f"{name}{index * every}_layer{layer}"
        pages, scale = _pages(len(heads)), color_range(sample)
        for page, chosen in enumerate(pages, start=1):
            end = f"_page{page}" if page > 1 else ""
            more = f" of {len(heads)} · page {page} of {len(pages)}" if len(pages) > 1 else ""
            path = out / f"layer_{layer}" / f"attention_heatmap_{stem}{end}.png"
            own = {"heads": heads[chosen], "scale": scale, "more": more, "layer": layer}
            painter.draw(heatmap, path, replace(sample, maps=sample.maps[chosen]), **own)
        path = path.with_name(f"attention_lines_{stem}.png")
        painter.draw(line_plot, path, replace(sample, maps=None), heads=heads, layer=layer)
    for (index, room, names), decision in zip(rooms, batch.decisions, strict=False):
        about = room, names, "Attention in the room", decision.title
        across = None if len(names) == len(batch.attention) else len(names) // len(batch.attention)
        path = out / f"attention_map_{name}{index}.png"
        painter.draw(room_map, path, *about, across=across)


def draw_summaries(out: Path, metrics: Metrics, painter: Painter) -> None:
    """A summary a layer and the comparison across layers."""
    values = {name: metrics.of(name) for name in SUMMARY_METRICS}  # (L, S) each
    uniform, heads = metrics.uniform_mean(), [listed(own, "head") for own in metrics.heads]
    for i, layer in enumerate(metrics.layers):
        path = out / f"layer_{layer}" / f"attention_summary_layer{layer}.png"
        own = {name: rows[i] for name, rows in values.items()}
        painter.draw(summary, path, own, uniform, layer=layer, heads=heads[i])
    path = out / "attention_layers.png"
    named = heads[0] if len({*heads}) == 1 else "heads"
    painter.draw(course, path, values, uniform, layers=metrics.layers, heads=named)


def alone(effects: Any, learning: Mapping[str, Any] | None, title: str) -> dict[str, Any]:
    """Name -> what draws a picture that there is once, and its arguments, if it was measured."""
    own = {"learning": learning, "title": f"Attention over learning · {title}"}
    pictures = {
        "attention_over_learning.png": (attention_over_learning, learning and own),
        "deletion_curves.png": (deletion_curves, effects.curves_picture),
        "head_effects.png": (head_effects, effects.heads_picture),
    }
    return {name: one for name, one in pictures.items() if one[1]}


def draw_play(out: Path, play: Any, number: int, layers: Sequence[int], painter: Painter) -> None:
    """The rollout of a play that is followed, in one look, and its numbers."""
    out.mkdir(exist_ok=True)
    rows, rewarded = play.rows.swapaxes(0, 1), play.rewards[number] > play.rewarded_above
    starts = np.flatnonzero(np.diff(play.episodes[number], prepend=-1))
    numbers = {"rows": play.rows, "layers": layers, "rewarded": rewarded, "episode_starts": starts}
    write_atomically(out / ROWS, lambda file: np.savez_compressed(file, **numbers))
    task = play.environment.goals[play.tasks[number]]
    about = f"own play: {play.environment.named[0]} {task}, rollout {number}"
    own = {"episode_starts": starts, "rewards": rewarded, "title": "Attention over time"}
    by_layer, path = dict(zip(layers, rows, strict=True)), out / "attention_over_time.png"
    painter.draw(attention_over_time, path, by_layer, **own, subtitle=about)
