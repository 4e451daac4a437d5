"""Which picture lies where in the output folder of an analysis, and how they are drawn.

    figs/attention/layer_N/attention_{heatmap,lines}_sampleI_layerN.png     (many heads: _page2 ...)
    figs/attention/layer_N/attention_summary_layerN.png
    figs/attention/attention_layers.png
    figs/attention/deletion_curves.png, head_effects.png

A run leaves no picture of an earlier run among its own, and touches no other file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from historylens.common.files import in_the_way, writable_folder
from historylens.metrics import SUMMARY_METRICS, Metrics
from historylens.pictures.heatmap import color_range, heatmap
from historylens.pictures.lineplot import line_plot
from historylens.pictures.metricplot import course, summary
from historylens.pictures.order import SampleAttention
from historylens.pictures.painter import Painter

HEADS_A_PAGE = 16  # a heatmap has so many panels at most
CURVES, HEADS = "deletion_curves.png", "head_effects.png"


def prepare_output(out: Path, layers: Sequence[int]) -> Path:
    """Make the output folder; UserError where files cannot be written to where they will lie."""
    with writable_folder(out):
        folders = [out / f"layer_{layer}" for layer in layers]
        files = [out / "metrics.json", out / "metrics.csv", *_stale_pictures(out)]
        for path in [*folders, *files]:
            if path.exists() and path.is_dir() != (path in folders):
                raise in_the_way(out, path)
    return out


def clear_pictures(out: Path) -> None:
    """Remove the pictures of an earlier run, and nothing else."""
    for stale in _stale_pictures(out):
        stale.unlink()
    for folder in out.glob("layer_*"):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _stale_pictures(out: Path) -> list[Path]:
    names = ("layer_*/attention_*.png", "attention_layers.png", CURVES, HEADS)
    return [path for name in names for path in out.glob(name)]


def n_pictures(n_drawn: int, n_heads: Sequence[int]) -> int:
    """Pictures of an analysis that draws so many samples of layers with so many heads."""
    return sum(n_drawn * (len(_pages(n)) + 1) + 1 for n in n_heads) + 1


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
            own = attention, i, m, batch.uniform_rows[i]
            yield layer, batch.indices[i], SampleAttention.of(decision, batch.tokens[i], *own)


def draw_batch(out: Path, batch: Any, painter: Painter, dpi: int) -> None:
    """A heatmap and a line plot for each layer and each of the `samples` of a batch."""
    for layer, index, sample in samples(batch):
        heads, style = batch.heads[layer], {"layer": layer, "dpi": dpi}
        pages, scale = _pages(len(heads)), color_range(sample)
        stem = f"sample{index}_layer{layer}"
        for page, chosen in enumerate(pages, start=1):
            end = f"_page{page}" if page > 1 else ""
            more = f" of {len(heads)} · page {page} of {len(pages)}" if len(pages) > 1 else ""
            path = out / f"layer_{layer}" / f"attention_heatmap_{stem}{end}.png"
            part = replace(sample, maps=sample.maps[chosen])
            own = {"heads": heads[chosen], "scale": scale, "more": more}
            painter.draw(heatmap, path, part, **own, **style)
        path = path.with_name(f"attention_lines_{stem}.png")
        painter.draw(line_plot, path, replace(sample, maps=None), heads=heads, **style)


def draw_summaries(out: Path, metrics: Metrics, painter: Painter, dpi: int) -> None:
    """A summary a layer and the comparison across layers."""
    values = {name: metrics.of(name) for name in SUMMARY_METRICS}  # (L, S) each
    uniform = metrics.uniform_mean()
    for i, layer in enumerate(metrics.layers):
        path = out / f"layer_{layer}" / f"attention_summary_layer{layer}.png"
        own = {name: rows[i] for name, rows in values.items()}
        painter.draw(summary, path, own, uniform, layer=layer, dpi=dpi)
    path = out / "attention_layers.png"
    painter.draw(course, path, values, uniform, layers=metrics.layers, dpi=dpi)
