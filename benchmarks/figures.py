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
from typing import Any

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
    from historylens.metrics import SUMMARY_METRICS
    from historylens.pictures.heatmap import color_range, heatmap
    from historylens.pictures.lineplot import line_plot
    from historylens.pictures.metricplot import course, summary

    kinds = []
    style = {"layer": 0, "heads": tuple(range(options.heads)), "dpi": 100}
    for n_tokens in options.tokens:
        sample = sample_of(options.heads, n_tokens)

        def draw_map(path: Path, sample: Any = sample) -> None:
            heatmap(path, sample, scale=color_range(sample), **style)

        def draw_lines(path: Path, sample: Any = sample) -> None:
            line_plot(path, sample, **style)

        kinds += [(f"heatmap, T = {n_tokens}", draw_map), (f"lines, T = {n_tokens}", draw_lines)]
        if n_tokens <= 512 and not options.no_plain:
            name = f"plain heatmap, T = {n_tokens}"
            kinds.append((name, lambda path, maps=sample.maps: plain_heatmap(path, maps)))
    rng = np.random.default_rng(0)
    values = {name: rng.gamma(3, size=(4, 10)) for name in SUMMARY_METRICS}
    even = dict.fromkeys(SUMMARY_METRICS, 1.0)
    first = {name: v[0] for name, v in values.items()}
    return [
        *kinds,
        ("summary, 10 samples", lambda path: summary(path, first, even, layer=0, dpi=100)),
        (
            "layers, 10 samples",
            lambda path: course(path, values, even, layers=range(4), dpi=100),
        ),
    ]


def sample_of(n_heads: int, n_tokens: int) -> Any:
    """Attention of random queries and keys over episodes of 20 steps with some rewards."""
    from historylens.capture import capture
    from historylens.history import Decision
    from historylens.pictures.order import SampleAttention
    from historylens.tokens import Tokens

    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True)

    torch.manual_seed(0)
    model, steps = Attention(), np.arange(n_tokens - 1)
    with capture(model, maps=[0]) as record:
        model(*torch.randn(2, 1, n_heads, n_tokens, 16).unbind())
    rewards = (steps % 20 > 12).astype(float)
    title = "goal (2, 7), history 3, step 1240"
    decision = Decision(None, steps, rewards, None, episodes=steps // 20, title=title)
    even = np.full(n_tokens, 1 / n_tokens)
    return SampleAttention.of(decision, Tokens.of(n_tokens - 1), record[0], 0, 0, even)


def plain_heatmap(path: Path, maps: np.ndarray) -> None:
    """The usual way: a seaborn heatmap a head, laid out and cropped while saving."""
    import matplotlib

    matplotlib.use("Agg")
    import seaborn
    from matplotlib import pyplot

    across = (len(maps) + 1) // 2
    figure, axes = pyplot.subplots(2, across, figsize=(8 * across, 14), squeeze=False)
    for head, (weights, axis) in enumerate(zip(maps, axes.flat, strict=False)):
        seaborn.heatmap(np.nan_to_num(weights), cmap="viridis", ax=axis)
        axis.set_title(f"head {head}")
    pyplot.tight_layout()
    figure.savefig(path, dpi=300, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
