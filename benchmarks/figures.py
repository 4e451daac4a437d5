"""CPU seconds of one picture: ours, and the plain way (seaborn heatmap, 300 dpi, tight layout).

    python benchmarks/figures.py

The first picture of a kind also draws what later ones share; both are shown.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from plain_main_job import plt, save, sns
from setting import print_table, read_flags, seconds_of

from historylens.capture import capture
from historylens.history import Decision
from historylens.metrics import SUMMARY_METRICS
from historylens.pictures.heatmap import color_range, heatmap
from historylens.pictures.lineplot import line_plot
from historylens.pictures.metricplot import course, summary
from historylens.pictures.order import SampleAttention
from historylens.tokens import Tokens


def main() -> None:
    """Print a table, a row a picture."""
    options = read_flags(__doc__, tokens=[240, 8192], heads=4, repeats=5, no_plain=False)
    torch.set_num_threads(1)
    print(f"{options.heads} heads, CPU seconds of this process (best of {options.repeats})")
    print_table(["picture", "first", "later", "KiB"], rows_of(options))


def rows_of(options: argparse.Namespace) -> Iterator[list[str]]:
    """A row for each picture."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        for name, draw in pictures(options):
            run = partial(draw, path)
            first, *later = seconds_of(run, 1 + options.repeats, clock=time.process_time)
            size = path.stat().st_size / 1024
            yield [name, f"{first:.3f}", f"{min(later):.3f}", f"{size:.0f}"]


def pictures(options: argparse.Namespace) -> list[tuple[str, Callable[[Path], None]]]:
    """Name and drawing function of each picture."""
    kinds, style = [], {"layer": 0, "heads": tuple(range(options.heads)), "dpi": 100}
    for n_tokens in options.tokens:
        sample = sample_of(options.heads, n_tokens)
        scaled = {**style, "scale": color_range(sample)}
        kinds.append((f"heatmap, T = {n_tokens}", partial(heatmap, sample=sample, **scaled)))
        kinds.append((f"lines, T = {n_tokens}", partial(line_plot, sample=sample, **style)))
        if n_tokens <= 512 and not options.no_plain:
            plain = partial(plain_heatmap, maps=sample.maps)
            kinds.append((f"plain heatmap, T = {n_tokens}", plain))
    rng = np.random.default_rng(0)
    values = {name: rng.gamma(3, size=(4, 10)) for name in SUMMARY_METRICS}
    even = dict.fromkeys(SUMMARY_METRICS, 1.0)
    first = {name: rows[0] for name, rows in values.items()}
    one = partial(summary, values=first, uniform=even, layer=0, dpi=100)
    every = partial(course, values=values, uniform=even, layers=range(4), dpi=100)
    return [*kinds, ("summary, 10 samples", one), ("layers, 10 samples", every)]


class Attention(torch.nn.Module):
    """Causal attention, and nothing else."""

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """`(B, H, T, D)` each."""
        return torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True)


def sample_of(n_heads: int, n_tokens: int) -> SampleAttention:
    """Attention of random queries and keys over episodes of 20 steps with some rewards."""
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
    across = (len(maps) + 1) // 2
    figure, axes = plt.subplots(2, across, figsize=(8 * across, 14), squeeze=False)
    for head, (weights, axis) in enumerate(zip(maps, axes.flat, strict=False)):
        sns.heatmap(np.nan_to_num(weights), cmap="viridis", ax=axis)
        axis.set_title(f"head {head}")
    save(figure, path)


if __name__ == "__main__":
    main()
