"""The line plot: what the query token attends to, and how much attention each position receives.

    lines("lines.png", layer.query_rows[0], layer.received[0], uniform_received(T), sample, layer=2)

Axes: `H` heads, `T` tokens, of which the last is the query token and the others are the history.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from attention.page import (
    DPI,
    FAINT,
    INK,
    MAX_EPISODE_LINES,
    SOFT,
    UNIFORM,
    Page,
    history_colours,
    subtitle,
)
from attention.samples import Sample
from attention.tokens import Curves

HEAD_COLOURS = ("#0173b2", "#de8f05", "#029e73", "#cc78bc", "#ca9161", "#56b4e9")
MANY_HEADS = "#7f9db9"  # one colour for all where there are more heads than colours
MAX_POINTS = 500  # longer histories are averaged in bins
LOG_SPAN = 30.0  # the scale is logarithmic where the peak exceeds uniform attention by more
LOG_FLOOR = 0.03  # lower end of a logarithmic scale, of uniform attention
LEFT, RIGHT, TOP, WIDTH, HEIGHT = 80, 700, 104, 520, 268  # places of the two plots
STRIP_TOP, STRIP = TOP + HEIGHT + 5, 9


def lines(
    path: str | Path,
    query_rows: ArrayLike,
    received: ArrayLike,
    uniform_received: ArrayLike,
    sample: Sample,
    *,
    layer: int,
    heads: Sequence[int] | None = None,
    dpi: int = DPI,
) -> None:
    """Draw what the query token attends to, and how much attention each position receives.

    Args:
        path: PNG to write.
        query_rows: `(H, T)` attention row of the query token.
        received: `(H, T)` average over the queries that may see a position.
        uniform_received: `(T,)` the same where attention is uniform.
        sample: names the picture and its tokens.
        layer: number of the layer.
        heads: numbers of the `H` heads; None: 0, 1, 2, ...
        dpi: pixels an inch.

    Raises:
        ValueError: the number of tokens is not that of the sample.
    """
    query_rows, received = np.asarray(query_rows), np.asarray(received)
    n_heads, n_tokens = len(query_rows), sample.n_context + 1
    if query_rows.shape != (n_heads, n_tokens) or received.shape != (n_heads, n_tokens):
        raise ValueError(
            f"expected query rows and received attention (H, T) = ({n_heads}, {n_tokens}), "
            f"got {query_rows.shape} and {received.shape}"
        )
    even = np.full(n_tokens, 1 / n_tokens), np.asarray(uniform_received)
    panels = [
        Curves((), values[:, :-1], values.mean(0)[:-1], baseline[:-1])
        for values, baseline in zip((query_rows, received), even, strict=True)
    ]
    curve_lines(path, *panels, sample, layer=layer, heads=heads, dpi=dpi)


def curve_lines(
    path: str | Path,
    query: Curves,
    received: Curves,
    sample: Sample,
    *,
    layer: int,
    heads: Sequence[int] | None = None,
    dpi: int = DPI,
) -> None:
    """The same from curves over transitions, for models of several tokens a transition.

    Args:
        path: PNG to write.
        query: what the query attends to.
        received: what each transition receives.
        sample: names the picture and its transitions.
        layer: number of the layer.
        heads: numbers of the heads, where each has a curve; None: 0, 1, 2, ...
        dpi: pixels an inch.
    """
    numbers = range(len(query.values)) if heads is None else heads
    names = query.names or tuple(f"head {number}" for number in numbers)
    has_episodes = len(sample.episode_starts) <= MAX_EPISODE_LINES
    page = _sheet(names, bool(query.names), sample.n_context, dpi, has_episodes)
    page.restore()
    page.text(LEFT, 22, f"Attention lines · layer {layer}", 14, weight="bold")
    page.text(LEFT, 46, subtitle(sample), 10.5)
    for left, panel in ((LEFT, query), (RIGHT, received)):
        if has_episodes:
            _draw_episodes(page, left, sample)
        page.paste(left, STRIP_TOP, _history_strip(sample, page))
        _draw_plot(page, left, panel)
    page.save(path)


class Scale:
    """Vertical scale of a plot: weights to page units, linear, or logarithmic for high peaks.

    Attributes:
        is_log: whether the scale is logarithmic.
        low, high: weights at the lower and upper edge of the plot.
    """

    def __init__(self, values: np.ndarray, baseline: np.ndarray) -> None:
        top = float(max(values.max(), baseline.max()))
        self.is_log = top > LOG_SPAN * float(baseline.mean())
        if self.is_log:
            self.low, self.high = LOG_FLOOR * float(baseline.min()), 1.4 * top
        else:
            self.low, self.high = 0.0, 1.08 * top

    def y(self, weights: ArrayLike) -> np.ndarray:
        """Place of a weight, page units from the top; weights below the plot lie on its edge."""
        weights = np.clip(weights, self.low, self.high)
        if self.is_log:
            share = np.log(weights / self.low) / math.log(self.high / self.low)
        else:
            share = weights / self.high
        return TOP + HEIGHT * (1 - share)

    def ticks(self) -> list[float]:
        """Weights to be named at the edge."""
        if not self.is_log:
            values = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
        else:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            values = 10.0 ** np.arange(first, last + 1)
        return [float(v) for v in values if self.low <= v <= self.high]


def bin_means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of `values (..., n)` over at most `MAX_POINTS` bins, and the first index of each."""
    n = values.shape[-1]
    starts = np.arange(0, n, -(-n // MAX_POINTS))
    return np.add.reduceat(values, starts, axis=-1) / np.diff(np.append(starts, n)), starts


def _x(left: float, positions: np.ndarray, n: int) -> np.ndarray:
    """Place of the middle of a position in the history."""
    return left + WIDTH * (positions + 0.5) / n


def _draw_plot(page: Page, left: float, panel: Curves) -> None:
    """Thin lines of heads or parts, a bold one of their mean or sum, dashed uniform attention."""
    values, mean, baseline = panel.values, panel.whole, panel.uniform
    n_lines, n = values.shape
    scale = Scale(np.vstack([values, mean]), baseline)
    binned, starts = bin_means(np.vstack([values, mean, baseline]))
    middle = (starts + np.append(starts[1:], n) - 1) / 2
    x = _x(left, middle, n)
    if len(starts) < n:
        low, high = (scale.y(f.reduceat(mean, starts)) for f in (np.minimum, np.maximum))
        outline = np.stack([np.append(x, x[::-1]), np.append(low, high[::-1])], 1)
        page.fill(outline, facecolors="#dcdcdc")
    if n == 1:  # a line needs two ends
        x, binned = np.array([left, left + WIDTH]), binned.repeat(2, axis=1)
    curves = [np.stack([x, scale.y(line)], 1) for line in binned]
    colours = [_colour(line, n_lines) for line in range(n_lines)]
    page.lines(curves[:-2], colors=colours, linewidths=1.1 if panel.names else 0.8, alpha=0.8)
    page.lines(curves[-2:-1], colors=INK, linewidths=1.6)
    page.lines(curves[-1:], colors=UNIFORM, linewidths=1.5, linestyles="--")
    for weight in scale.ticks():
        y = float(scale.y(weight))
        page.lines([[(left - 4, y), (left, y)]], colors=FAINT, linewidths=0.8)
        page.text(left - 7, y, f"{weight:.4g}", 8, ha="right")
    name = "attention weight (log scale)" if scale.is_log else "attention weight"
    page.text(left - 62, TOP + HEIGHT / 2, name, 9, rotation=90, ha="center")


def _colour(line: int, n_lines: int) -> str:
    return HEAD_COLOURS[line] if n_lines <= len(HEAD_COLOURS) else MANY_HEADS


def _draw_episodes(page: Page, left: float, sample: Sample) -> None:
    places = _x(left, sample.episode_starts[1:] - 0.5, sample.n_context)
    page.lines([[(x, TOP), (x, TOP + HEIGHT)] for x in places], colors="#dddddd", linewidths=0.8)


def _history_strip(sample: Sample, page: Page) -> np.ndarray:
    """Colours `(rows, columns, 3)` of the history, stretched or squeezed to the plot's width."""
    n_columns, n_rows = round(WIDTH * page.scale), round(STRIP * page.scale)
    n_cells = min(sample.n_context, n_columns)
    starts = np.arange(n_cells) * sample.n_context // n_cells
    cells = history_colours(sample, np.append(starts, sample.n_context))[:-1]
    strip = cells[np.arange(n_columns) * n_cells // n_columns]
    return strip[None].repeat(n_rows, axis=0)


@lru_cache(maxsize=2)
def _sheet(
    names: tuple[str, ...], of_parts: bool, n_context: int, dpi: int, has_episodes: bool
) -> Page:
    """What all line plots of one shape have in common, drawn once."""
    page = Page(1250, 510, dpi)
    unit = "transition" if of_parts else "position"
    page.text(LEFT, 86, f"Attention of the query token to each {unit}", 11, weight="bold")
    page.text(RIGHT, 86, f"Attention that each {unit} receives", 11, weight="bold")
    locator = MaxNLocator(8, integer=True, steps=[1, 2, 5, 10])
    ticks = {int(t) for t in locator.tick_values(0, n_context - 1) if 0 <= t < n_context}
    bottom = STRIP_TOP + STRIP
    for left in (LEFT, RIGHT):
        frame = [(left, TOP), (left, TOP + HEIGHT), (left + WIDTH, TOP + HEIGHT)]
        page.lines([frame], colors=FAINT, linewidths=0.8)
        page.text(left - 7, STRIP_TOP + STRIP / 2, "history", 8, ha="right")
        for tick in sorted(ticks):
            x = float(_x(left, tick, n_context))
            page.lines([[(x, bottom), (x, bottom + 4)]], colors=FAINT, linewidths=0.8)
            page.text(x, bottom + 12, f"{tick}", 8, ha="center")
        name = "position in the history (0 = oldest transition)"
        page.text(left + WIDTH / 2, bottom + 31, name, 9, ha="center")
    _draw_legend(page, names, of_parts, n_context, has_episodes)
    page.keep()
    return page


def _draw_legend(
    page: Page, names: tuple[str, ...], of_parts: bool, n_context: int, has_episodes: bool
) -> None:
    whole = "whole transition (left: sum, right: mean of its tokens)"
    entries = [(whole if of_parts else "mean over heads", {"colors": INK, "linewidths": 2})]
    if len(names) > len(HEAD_COLOURS):
        what = "part" if of_parts else "head"
        label = f"each of the {len(names)} {what}s"
        entries.append((label, {"colors": MANY_HEADS, "linewidths": 1}))
    else:
        for name, colour in zip(names, HEAD_COLOURS, strict=False):
            entries.append((name, {"colors": colour, "linewidths": 1.2}))
    entries.append(
        ("uniform attention", {"colors": UNIFORM, "linewidths": 1.6, "linestyles": "--"})
    )
    x, y = LEFT, 452
    for label, style in entries:
        page.lines([[(x, y), (x + 26, y)]], **style)
        page.text(x + 32, y, label, 9)
        x += 56 + 7 * len(label)
    episodes = "episodes in two greys, " if has_episodes else ""
    notes = f"History strip: {episodes}rewarded transitions in red."
    notes += " Means over heads." if of_parts else ""
    page.text(LEFT, y + 22, notes, 8.5, color=SOFT)
    received = "Average over the queries that may see the position."
    if of_parts:
        received = "Average over the queries that may see the token."
    page.text(RIGHT, y + 22, received, 8.5, color=SOFT)
    width = -(-n_context // MAX_POINTS)
    if width > 1:
        bins = f"A point is the mean of {width} positions; the grey band is their range."
        page.text(LEFT, y + 40, bins, 8.5, color=SOFT)
