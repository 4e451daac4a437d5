"""Which picture lies where in the output folder of an analysis, and how they are drawn.

    figs/attention/layer_N/attention_{heatmap,lines}_sampleI_layerN.png     (many heads: _page2 ...)
    figs/attention/layer_N/attention_summary_layerN.png
    figs/attention/attention_layers.png
    figs/attention/deletion_curves.png

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
NUMBERS = ("metrics.json", "metrics.csv")
CURVES = "deletion_curves.png"


def prepare_output(out: Path, layers: Sequence[int]) -> Path:
    """Make the output folder and check that files can be written where they will lie.

    Raises:
        UserError: they cannot.
    """
    with writable_folder(out):
        folders = [out / f"layer_{layer}" for layer in layers]
        files = [*(out / name for name in NUMBERS), *_stale_pictures(out)]
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
    names = ("layer_*/attention_*.png", "attention_layers.png", CURVES)
    return [path for name in names for path in out.glob(name)]


def n_pictures(n_drawn: int, n_heads: Sequence[int]) -> int:
    """Pictures of an analysis that draws so many samples of layers with so many heads."""
    return sum(n_drawn * (_n_pages(n) + 1) + 1 for n in n_heads) + 1


def _n_pages(n_heads: int) -> int:
    return -(-n_heads // HEADS_A_PAGE)


def draw_batch(out: Path, batch: Any, painter: Painter, dpi: int) -> dict[int, dict[int, Any]]:
    """A heatmap and a line plot for each layer and each sample that comes with a map.

    Args:
        out: the output folder.
        batch: what one forward pass showed, an `analysis.Batch`.
        painter: draws.
        dpi: pixels an inch.

    Returns:
        The numbers in the pictures: layer -> sample -> `SampleAttention.numbers()`.
    """
    numbers: dict[int, dict[int, Any]] = {}
    for layer, attention in batch.attention.items():
        folder = out / f"layer_{layer}"
        folder.mkdir(exist_ok=True)
        numbers[layer] = {}
        for m, i in enumerate(batch.drawn):
            # states stay here: they may be images
            decision = replace(batch.decisions[m], states=None, next_states=None, query_state=None)
            tokens, uniform_row = batch.tokens[i], batch.uniform_rows[i]
            sample = SampleAttention.of(decision, tokens, attention, i, m, uniform_row)
            numbers[layer][batch.indices[i]] = sample.numbers()
            stem = f"sample{batch.indices[i]}_layer{layer}"
            style = {"layer": layer, "dpi": dpi}
            heads, scale = batch.heads[layer], color_range(sample)
            for page, chosen, more in _pages(len(heads)):
                path = folder / f"attention_heatmap_{stem}{page}.png"
                part = replace(sample, maps=sample.maps[chosen])
                options = {"heads": heads[chosen], "scale": scale, "more": more}
                painter.draw(heatmap, path, part, **options, **style)
            path = folder / f"attention_lines_{stem}.png"
            painter.draw(line_plot, path, replace(sample, maps=None), heads=heads, **style)
    return numbers


def _pages(n_heads: int) -> Iterator[tuple[str, slice, str]]:
    """Pages of a heatmap, equally full: end of the file's name, which heads, what it says."""
    n_pages = _n_pages(n_heads)
    size = -(-n_heads // n_pages)
    for page in range(n_pages):
        more = f" of {n_heads} · page {page + 1} of {n_pages}" if n_pages > 1 else ""
        yield f"_page{page + 1}" if page else "", slice(page * size, (page + 1) * size), more


def draw_summaries(out: Path, metrics: Metrics, painter: Painter, dpi: int) -> None:
    """A summary a layer and the comparison across layers."""
    values = {name: metrics.of(name) for name in SUMMARY_METRICS}  # (L, S) each
    uniform = metrics.uniform_mean()
    for i, layer in enumerate(metrics.layers):
        folder = out / f"layer_{layer}"
        folder.mkdir(exist_ok=True)
        path = folder / f"attention_summary_layer{layer}.png"
        own = {name: rows[i] for name, rows in values.items()}
        painter.draw(summary, path, own, uniform, layer=layer, dpi=dpi)
    path = out / "attention_layers.png"
    painter.draw(course, path, values, uniform, layers=metrics.layers, dpi=dpi)
