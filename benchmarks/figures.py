"""CPU seconds of one picture: ours, and the plain way (seaborn heatmap, 300 dpi, tight layout).

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


def rows_of(options: argparse.Namespace) -> Iterator[tuple]:
    """A row for each picture."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        for name, draw in pictures(options):
            first, *later = seconds_of(partial(draw, path), 1 + options.repeats, time.process_time)
            yield name, first, min(later), path.stat().st_size / 1024


def pictures(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Name and drawing function of each picture."""
    style = {"layer": 0, "heads": tuple(range(options.heads)), "dpi": 100}
    for n in options.tokens:
        sample = sample_of(options.heads, n)
        own = {"sample": sample, "scale": color_range(sample)}
        yield f"heatmap, T = {n}", partial(heatmap, **own, **style)
        yield f"lines, T = {n}", partial(line_plot, sample=sample, **style)
        if n <= 512 and not options.no_plain:
            yield f"plain heatmap, T = {n}", partial(plain_heatmap, maps=sample.maps)
    rng, about = np.random.default_rng(0), {"dpi": 100}
    about["uniform"] = dict.fromkeys(SUMMARY_METRICS, 1.0)
    values = {name: rng.gamma(3, size=(4, 10)) for name in SUMMARY_METRICS}
    first = {name: rows[0] for name, rows in values.items()}
    yield "summary, 10 samples", partial(summary, values=first, layer=0, **about)
    yield "layers, 10 samples", partial(course, values=values, layers=range(4), **about)


def sample_of(n_heads: int, n_tokens: int) -> SampleAttention:
    """Attention of random queries and keys over episodes of 20 steps with some rewards."""
    torch.manual_seed(0)
    model, steps = torch.nn.Module(), np.arange(n_tokens - 1)
    model.forward = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    q, k = torch.randn(2, 1, n_heads, n_tokens, 16).unbind()
    with capture(model, maps=[0]) as record:
        model(q, k, k)
    about = {"episodes": steps // 20, "title": "goal (2, 7), history 3, step 1240"}
    decision = Decision(None, steps, (steps % 20 > 12).astype(float), None, **about)
    even = np.full(n_tokens, 1 / n_tokens)
    return SampleAttention.of(decision, Tokens.of(n_tokens - 1), record[0], 0, 0, even)


def plain_heatmap(path: Path, maps: np.ndarray) -> None:
    """The usual way: a seaborn heatmap a head, laid out and cropped while saving."""
    across = (len(maps) + 1) // 2
    figure, axes = plt.subplots(2, across, figsize=(8 * across, 14), squeeze=False)
    for head, weights in enumerate(maps):
        sns.heatmap(np.nan_to_num(weights), cmap="viridis", ax=axes.flat[head])
        axes.flat[head].set_title(f"head {head}")
    save(figure, path)


if __name__ == "__main__":
    flags = read_flags(__doc__, tokens=[240, 8192], heads=4, repeats=5, no_plain=False)
    torch.set_num_threads(1)
    print(f"{flags.heads} heads, CPU seconds of this process (best of {flags.repeats})")
    print_table("picture | first:.3f | later:.3f | KiB:.0f", rows_of(flags))
