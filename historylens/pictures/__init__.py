"""Which picture lies where in the output folder of an analysis, and of which numbers it is made.

    figs/attention/layer_N/attention_{heatmap,lines}_sampleI_layerN.png     (many heads: _page2 ...)
    figs/attention/layer_N/attention_summary_layerN.png
    figs/attention/attention_layers.png
    figs/attention/deletion_curves.png

A run leaves no picture of an earlier run among its own, and touches no other file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis import Batch
from attention.arranged import Shown, show
from attention.files import drawn_arrays
from attention.metrics import SUMMARY_METRICS, AttentionMetrics
from drawing import Painter
from output import in_the_way, writable_folder

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
        files = [*(out / name for name in NUMBERS), *stale_pictures(out)]
        for path in [*folders, *files]:
            if path.exists() and path.is_dir() != (path in folders):
                raise in_the_way(out, path)
    return out


def stale_pictures(out: Path) -> list[Path]:
    """Pictures of an earlier run in an output folder."""
    names = ("layer_*/attention_*.png", "attention_layers.png", CURVES)
    return [path for name in names for path in out.glob(name)]


def clear_pictures(out: Path) -> None:
    """Remove the pictures of an earlier run, and nothing else."""
    for stale in stale_pictures(out):
        stale.unlink()
    for folder in out.glob("layer_*"):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def n_pictures(n_drawn: int, n_heads: Sequence[int]) -> int:
    """Pictures of an analysis that draws so many samples of layers with so many heads."""
    return sum(n_drawn * (n_pages(n) + 1) + 1 for n in n_heads) + 1


def n_pages(n_heads: int) -> int:
    """Pages of a heatmap of so many heads."""
    return -(-n_heads // HEADS_A_PAGE)


def draw_batch(
    out: Path, batch: Batch, painter: Painter, dpi: int, heads: Sequence[int] | None = None
) -> dict[int, dict[int, Any]]:
    """A heatmap and a line plot for each layer and each sample that comes with a map.

    Args:
        out: the output folder.
        batch: what was captured.
        painter: draws.
        dpi: pixels an inch.
        heads: numbers of the heads in the batch; None: 0, 1, 2, ...

    Returns:
        The numbers in the pictures: layer -> sample -> arrays.
    """
    drawn: dict[int, dict[int, Any]] = {}
    for number, layer in batch.attention.items():
        folder = out / f"layer_{number}"
        folder.mkdir(exist_ok=True)
        drawn[number] = {}
        for m, i in enumerate(batch.drawn):
            sample = batch.samples[i]
            even = None if batch.uniform_rows is None else batch.uniform_rows[i]
            shown = show(layer, sample, i, m, even)
            stem = f"sample{sample.index}_layer{number}"
            numbers = list(range(len(shown.maps)) if heads is None else heads)
            style = {"layer": number, "dpi": dpi}
            _draw_heatmap(painter, folder / f"attention_heatmap_{stem}", shown, numbers, style)
            path = folder / f"attention_lines_{stem}.png"
            curves = shown.query, shown.received
            painter.draw("curve_lines", path, *curves, sample, heads=tuple(numbers), **style)
            rows, received = layer.query_rows[i].numpy(), layer.received[i].numpy()
            drawn[number][sample.index] = drawn_arrays(rows, received, *shown.uniform)
    return drawn


def _draw_heatmap(
    painter: Painter, stem: Path, shown: Shown, heads: Sequence[int], style: Mapping[str, Any]
) -> None:
    """The heatmap of a sample and layer, on as many pages as its heads take, in one scale."""
    from attention.heatmap import color_range  # slow to import

    scale = color_range(shown.maps, shown.sample.n_context + 1)
    total = n_pages(len(heads))
    size = -(-len(heads) // total)  # pages equally full
    for page in range(total):
        chosen = slice(page * size, (page + 1) * size)
        name = f"{stem.name}_page{page + 1}.png" if page else f"{stem.name}.png"
        more = f" of {len(heads)} · page {page + 1} of {total}" if total > 1 else ""
        arrays = shown.maps[chosen], shown.rows, shown.cols, shown.sample
        options = {"heads": tuple(heads[chosen]), "more": more, "scale": scale, **style}
        painter.draw("heatmap", stem.with_name(name), *arrays, **options)


def draw_summaries(out: Path, metrics: AttentionMetrics, painter: Painter, dpi: int) -> None:
    """A summary a layer and the comparison across layers."""
    uniform = metrics.uniform_mean()
    for layer in metrics.layers:
        folder = out / f"layer_{layer.layer}"
        folder.mkdir(exist_ok=True)
        values = {name: layer.mean[name] for name in SUMMARY_METRICS}
        path = folder / f"attention_summary_layer{layer.layer}.png"
        painter.draw("summary", path, values, uniform, layer=layer.layer, dpi=dpi)
    values = {name: metrics.pooled(name) for name in SUMMARY_METRICS}
    numbers = [layer.layer for layer in metrics.layers]
    path = out / "attention_layers.png"
    painter.draw("layers", path, values, uniform, numbers=numbers, dpi=dpi)
