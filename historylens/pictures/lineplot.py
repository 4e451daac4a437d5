"""The line plot: what the query token attends to, and how much attention each position receives.

    line_plot("lines.png", sample, layer=2, heads=range(4), dpi=100)

A thin line a head, or a part of transitions, a bold one of their mean or sum, and a dashed one of
uniform attention.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from historylens.pictures.order import Curves, SampleAttention
from historylens.pictures.page import (
    FAINT,
    HEAD_COLOURS,
    INK,
    MAX_EPISODE_LINES,
    SOFT,
    UNIFORM,
    UNIFORM_LINE,
    Page,
    history_colours,
    subtitle,
)

MANY_HEADS = "#7f9db9"  # one colour for all where there are more lines than colours
MAX_POINTS = 500  # longer histories are averaged in bins
LOG_SPAN = 30.0  # the scale is logarithmic where the peak exceeds uniform attention by more
LOG_FLOOR = 0.03  # lower end of a logarithmic scale, of uniform attention
LEFT, RIGHT, TOP, WIDTH, HEIGHT = 80, 700, 104, 520, 268  # places of the two plots
STRIP_TOP, STRIP = TOP + HEIGHT + 5, 9
LEGEND = 452


def line_plot(
    path: str | Path, sample: SampleAttention, *, layer: int, heads: Sequence[int], dpi: int
) -> None:
    """Draw what the query token attends to, and how much attention each position receives.

    `heads` are `H` numbers, `dpi` pixels an inch. The sample's maps are not needed.
    """
    query, received = sample.query_curves, sample.received_curves
    n, starts = sample.decision.n, sample.decision.episode_starts
    names = query.names or tuple(f"head {number}" for number in heads)
    has_episodes = len(starts) <= MAX_EPISODE_LINES
    page = _sheet(names, bool(query.names), n, dpi, has_episodes)
    page.restore()
    title = f"Attention lines · layer {layer}"
    page.heading(LEFT, title, subtitle(sample.decision, sample.tokens))
    n_columns, n_rows = round(WIDTH * page.scale), round(STRIP * page.scale)
    n_cells = min(n, n_columns)
    cells = np.append(np.arange(n_cells) * n // n_cells, n)  # the last is the query's
    strip = history_colours(starts, sample.decision.rewarded, cells)
    strip = strip[np.arange(n_columns) * n_cells // n_columns]
    for left, curves in ((LEFT, query), (RIGHT, received)):
        if has_episodes:
            edges = [[(x, TOP), (x, TOP + HEIGHT)] for x in _x(left, starts[1:] - 0.5, n)]
            page.lines(edges, colors="#dddddd", linewidths=0.8)
        page.paste(left, STRIP_TOP, strip[None].repeat(n_rows, axis=0))
        _draw_plot(page, left, curves)
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


def _draw_plot(page: Page, left: float, curves: Curves) -> None:
    lines = np.vstack([curves.values, curves.whole, curves.uniform])
    n_lines, n = curves.values.shape
    scale = Scale(lines[:-1], curves.uniform)
    binned, starts = bin_means(lines)
    x = _x(left, (starts + np.append(starts[1:], n) - 1) / 2, n)
    if len(starts) < n:
        low, high = (scale.y(f.reduceat(curves.whole, starts)) for f in (np.minimum, np.maximum))
        outline = np.stack([np.append(x, x[::-1]), np.append(low, high[::-1])], 1)
        page.fill(outline, facecolors="#dcdcdc")
    if n == 1:  # a line needs two ends
        x, binned = np.array([left, left + WIDTH]), binned.repeat(2, axis=1)
    *thin, whole, uniform = (np.stack([x, scale.y(line)], 1) for line in binned)
    few = n_lines <= len(HEAD_COLOURS)
    colours = list(HEAD_COLOURS[:n_lines]) if few else MANY_HEADS
    page.lines(thin, colors=colours, linewidths=1.1 if curves.names else 0.8, alpha=0.8)
    page.lines([whole], colors=INK, linewidths=1.6)
    page.lines([uniform], colors=UNIFORM, linewidths=1.5, linestyles="--")
    for weight in scale.ticks():
        page.tick(float(scale.y(weight)), left, f"{weight:.4g}", 0.8, "left")
    name = "attention weight (log scale)" if scale.is_log else "attention weight"
    page.text(left - 62, TOP + HEIGHT / 2, name, 9, rotation=90, ha="center")


@lru_cache(maxsize=2)
def _sheet(names: tuple[str, ...], of_parts: bool, n: int, dpi: int, has_episodes: bool) -> Page:
    """What all line plots of one shape have in common, drawn once."""
    page = Page(1250, 510, dpi)
    unit = "transition" if of_parts else "position"
    page.text(LEFT, 86, f"Attention of the query token to each {unit}", 11, weight="bold")
    page.text(RIGHT, 86, f"Attention that each {unit} receives", 11, weight="bold")
    locator = MaxNLocator(8, integer=True, steps=[1, 2, 5, 10])
    ticks = {int(t) for t in locator.tick_values(0, n - 1) if 0 <= t < n}
    bottom = STRIP_TOP + STRIP
    for left in (LEFT, RIGHT):
        frame = [(left, TOP), (left, TOP + HEIGHT), (left + WIDTH, TOP + HEIGHT)]
        page.lines([frame], colors=FAINT, linewidths=0.8)
        page.text(left - 7, STRIP_TOP + STRIP / 2, "history", 8, ha="right")
        for tick in sorted(ticks):
            page.tick(float(_x(left, tick, n)), bottom, f"{tick}", 0.8, "below")
        name = "position in the history (0 = oldest transition)"
        page.text(left + WIDTH / 2, bottom + 31, name, 9, ha="center")
    _draw_legend(page, names, of_parts)
    strip = "History strip: episodes in two greys, " if has_episodes else "History strip: "
    means = " Means over heads." if of_parts else ""
    seen = "token" if of_parts else "position"
    page.text(LEFT, LEGEND + 22, f"{strip}rewarded transitions in red.{means}", 8.5, color=SOFT)
    average = f"Average over the queries that may see the {seen}."
    page.text(RIGHT, LEGEND + 22, average, 8.5, color=SOFT)
    width = -(-n // MAX_POINTS)
    if width > 1:
        bins = f"A point is the mean of {width} positions; the grey band is their range."
        page.text(LEFT, LEGEND + 40, bins, 8.5, color=SOFT)
    page.keep()
    return page


def _draw_legend(page: Page, names: tuple[str, ...], of_parts: bool) -> None:
    whole = "whole transition (left: sum, right: mean of its tokens)"
    entries = [(whole if of_parts else "mean over heads", {"colors": INK, "linewidths": 2})]
    if len(names) > len(HEAD_COLOURS):
        label = f"each of the {len(names)} {'part' if of_parts else 'head'}s"
        entries.append((label, {"colors": MANY_HEADS, "linewidths": 1}))
    else:
        styles = ({"colors": colour, "linewidths": 1.2} for colour in HEAD_COLOURS)
        entries += zip(names, styles, strict=False)
    x = LEFT
    for label, style in [*entries, ("uniform attention", UNIFORM_LINE)]:
        page.swatch(x, LEGEND, label, **style)
        x += 56 + 7 * len(label)
