"""CPU seconds of one picture: ours, and the plain way (seaborn heatmap, 300 dpi, tight layout).

    python benchmarks/figures.py

The first picture of a kind also draws what later ones share; both are shown.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Print a table, a row a picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[240, 8192])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-plain", action="store_true", help="leave the plain way out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.heads} heads, CPU seconds of this process (best of {options.repeats})")
    print(f"{'picture':<34} {'first':>8} {'later':>8} {'KiB':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for name, draw in pictures(options):
            path = Path(folder) / "picture.png"
            times = [cpu_seconds(draw, path) for _ in range(1 + options.repeats)]
            size = path.stat().st_size / 1024
            print(f"{name:<34} {times[0]:>8.3f} {min(times[1:]):>8.3f} {size:>6.0f}", flush=True)


def cpu_seconds(draw: Callable[[Path], None], path: Path) -> float:
    """CPU seconds that drawing takes."""
    start = time.process_time()
    draw(path)
    return time.process_time() - start


def pictures(options: argparse.Namespace) -> list[tuple[str, Callable[[Path], None]]]:
    """Name and drawing function of each picture."""
    from attention import figures
    from attention.metrics import SUMMARY_METRICS, uniform_received

    found = []
    for n_tokens in options.tokens:
        maps, rows, cols, query, received = attention_of(options.heads, n_tokens)
        sample = sample_of(n_tokens - 1)
        uniform = uniform_received(n_tokens)
        found += [
            (
                f"heatmap, T = {n_tokens}",
                lambda path, a=(maps, rows, cols, sample): figures.heatmap(path, *a, layer=0),
            ),
            (
                f"lines, T = {n_tokens}",
                lambda path, a=(query, received, uniform, sample): figures.lines(path, *a, layer=0),
            ),
        ]
        if n_tokens <= 512 and not options.no_plain:
            name = f"plain heatmap, T = {n_tokens}"
            found.append((name, lambda path, maps=maps: plain_heatmap(path, maps)))
    rng = np.random.default_rng(0)
    values = {name: rng.gamma(3, size=(4, 10)) for name in SUMMARY_METRICS}
    even = dict.fromkeys(SUMMARY_METRICS, 1.0)
    first = {name: v[0] for name, v in values.items()}
    found += [
        ("summary, 10 samples", lambda path: figures.summary(path, first, even, layer=0)),
        (
            "layers, 10 samples",
            lambda path: figures.layers(path, values, even, numbers=range(4)),
        ),
    ]
    return found


def attention_of(n_heads: int, n_tokens: int) -> tuple:
    """Map, its rows and columns, query row and received attention of random queries and keys."""
    from attention.rows import MapGrid, Mask, last_row, maps, received

    torch.manual_seed(0)
    q, k = torch.randn(2, 1, n_heads, n_tokens, 16).unbind()
    q, mask = q / 4, Mask("causal")
    grid = MapGrid.of(n_tokens, size=512)
    image = maps(q, k, mask, samples=[0], grid=grid)[0]
    row = last_row((q[:, :, -1:] @ k.mT)[:, :, 0], mask)[0]
    return image, grid.rows, grid.cols, row, received(q, k, mask)[0]


def sample_of(n_context: int) -> object:
    """A history of episodes of 20 steps with some rewards."""
    from attention.samples import Sample

    rewarded = np.arange(n_context) % 20 > 12
    title = "goal (2, 7), history 3, step 1240"
    return Sample(0, title, n_context, np.arange(0, n_context, 20), rewarded)


def plain_heatmap(path: Path, maps: torch.Tensor) -> None:
    """The usual way: a seaborn heatmap a head, laid out and cropped while saving."""
    import matplotlib

    matplotlib.use("Agg")
    import seaborn
    from matplotlib import pyplot

    across = (len(maps) + 1) // 2
    figure, axes = pyplot.subplots(2, across, figsize=(8 * across, 14), squeeze=False)
    for head, (weights, axis) in enumerate(zip(maps, axes.flat, strict=False)):
        seaborn.heatmap(weights.nan_to_num().numpy(), cmap="viridis", ax=axis)
        axis.set_title(f"head {head}")
    pyplot.tight_layout()
    figure.savefig(path, dpi=300, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
