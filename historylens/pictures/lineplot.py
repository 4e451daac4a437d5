"""The line plot: what the query token attends to, and how much attention each position receives."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from historylens.pictures.heatmap import draw_no_history
from historylens.pictures.order import MAX_STARTS, Curves, SampleAttention, history_strip, subtitle
from historylens.pictures.page import FAINT, HUES, INK, SOFT, UNIFORM_LINE, Page, text_width

RANGE = "#dcdcdc"
MANY_HEADS = "#7f9db9"  # one colour for all where there are more lines than colours
MAX_POINTS = 500  # longer histories are averaged in bins
LOG_SPAN = 30.0  # the scale is logarithmic where the peak exceeds uniform attention by more
LOG_FLOOR = 0.03  # lower end of a logarithmic scale, of uniform attention
LEFT, RIGHT, TOP, WIDTH, HEIGHT = 80, 700, 104, 520, 268  # places of the two plots
STRIP_TOP, STRIP = TOP + HEIGHT + 9, 9
LEGEND, PAGE_WIDTH = 452, 1250


def line_plot(
    path: Path, sample: SampleAttention, *, layer: int, heads: Sequence, dpi: int
) -> None:
    """Draw a sample, whose maps are not needed and whose heads are numbered `heads`."""
    title = f"Attention lines · layer {layer}"
    if sample.tokens.n == 0:
        return draw_no_history(path, title, sample, dpi)
    query, received = sample.curves()
    n, starts = sample.decision.n, sample.decision.episode_starts
    names = query.names or tuple(f"head {number}" for number in heads)
    has_episodes = len(starts) <= MAX_STARTS
    page = _sheet(names, bool(query.names), n, dpi, has_episodes)
    page.restore()
    page.heading(LEFT, title, subtitle(sample.decision, sample.tokens))
    n_columns, n_rows = round(WIDTH * page.scale), round(STRIP * page.scale)
    n_cells = min(n, n_columns)
    cells = np.append(np.arange(n_cells) * n // n_cells, n)  # the last is the query's
    strip = history_strip(starts, np.ones(n, bool), sample.decision.rewarded, cells)
    strip = strip[np.arange(n_columns) * n_cells // n_columns]
    for left, curves in ((LEFT, query), (RIGHT, received)):
        if has_episodes:
            edges = [[(x, TOP), (x, TOP + HEIGHT)] for x in _x(left, starts[1:] - 0.5, n)]
            page.lines(edges, colors="#dddddd", linewidths=0.8)
        page.paste(left, STRIP_TOP, strip[None].repeat(n_rows, axis=0))
        _draw_plot(page, left, curves)
    page.save(path)


def scale_of(
    values: np.ndarray, baseline: np.ndarray
) -> tuple[Callable[[ArrayLike], np.ndarray], list[float], bool]:
    """Places of weights inside the plot; ticks; whether it is logarithmic, from the first tick."""
    top = float(max(values.max(), baseline.max()))
    is_log = top > LOG_SPAN * float(baseline.mean())
    if is_log:  # where the query may not look, the baseline is 0
        low, high = LOG_FLOOR * float(baseline[baseline > 0].min()), 1.4 * top
        ticks = 10.0 ** np.arange(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    else:
        low, high = 0.0, 1.08 * top or 1.0  # where nothing may be seen, all is 0
        ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)

    def place(weights: ArrayLike) -> np.ndarray:
        weights = np.clip(weights, low, high)
        share = np.log(weights / low) / math.log(high / low) if is_log else weights / high
        return TOP + HEIGHT * (1 - share)

    return place, [low] * is_log + [float(x) for x in ticks if 1.6 * low <= x <= high], is_log


def bin_means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of `values (..., n)` over at most `MAX_POINTS` bins, and the first index of each."""
    n = values.shape[-1]
    starts = np.arange(0, n, -(-n // MAX_POINTS))
    return np.add.reduceat(values, starts, axis=-1) / np.diff(np.append(starts, n)), starts


def _x(left: float, positions: ArrayLike, n: int) -> np.ndarray:
    return left + WIDTH * (positions + 0.5) / n


def _draw_plot(page: Page, left: float, curves: Curves) -> None:
    lines = np.vstack([curves.values, curves.whole, curves.uniform])
    n_lines, n = curves.values.shape
    y, ticks, is_log = scale_of(lines[:-1], curves.uniform)
    binned, starts = bin_means(lines)
    x = _x(left, (starts + np.append(starts[1:], n) - 1) / 2, n)
    if len(starts) < n:
        low, high = (y(f.reduceat(curves.whole, starts)) for f in (np.minimum, np.maximum))
        outline = np.stack([np.append(x, x[::-1]), np.append(low, high[::-1])], 1)
        page.lines([outline], facecolors=RANGE, colors="none")
    if n == 1:  # a line needs two ends
        x, binned = np.array([left, left + WIDTH]), binned.repeat(2, axis=1)
    *thin, whole, uniform = (np.stack([x, y(line)], 1) for line in binned)
    colours = list(HUES[:n_lines]) if n_lines <= len(HUES) else MANY_HEADS
    page.lines(thin, colors=colours, linewidths=1.1 if curves.names else 0.8, alpha=0.8)
    page.lines([whole], colors=INK, linewidths=1.6)
    page.lines([uniform], **UNIFORM_LINE | {"linewidths": 1.5})
    labels = [f"{'≤ ' * (is_log and not i)}{weight:.3g}" for i, weight in enumerate(ticks)]
    page.ticks(dict(zip(y(ticks).tolist(), labels, strict=True)), left, "left", 0.8)
    name = "attention weight (log scale)" if is_log else "attention weight"
    page.text(left - 62, TOP + HEIGHT / 2, name, 9, rotation=90, ha="center")


@lru_cache(maxsize=2)
def _sheet(names: tuple[str, ...], of_parts: bool, n: int, dpi: int, has_episodes: bool) -> Page:
    """What all line plots of one shape have in common, drawn once."""
    *_, (_, y, *_) = entries = _legend(names, of_parts)
    page, bottom = Page(PAGE_WIDTH, 510 + y - LEGEND, dpi), STRIP_TOP + STRIP
    unit = "transition" if of_parts else "position"
    ticks = Page.numbers(0, n - 1, 8)
    titles = f"Attention of the query token to each {unit}", f"Attention that each {unit} receives"
    for left, title in zip((LEFT, RIGHT), titles, strict=True):
        page.text(left, 86, title, 11, weight="bold")
        frame = [(left, TOP), (left, TOP + HEIGHT), (left + WIDTH, TOP + HEIGHT)]
        page.lines([frame], colors=FAINT, linewidths=0.8)
        page.text(left - 7, STRIP_TOP + STRIP / 2, "history", 8, ha="right")
        page.ticks({float(_x(left, tick, n)): tick for tick in ticks}, bottom, "below", 0.8)
        name = "position in the history (0 = oldest transition)"
        page.text(left + WIDTH / 2, bottom + 31, name, 9, ha="center")
    for *entry, style in entries:
        page.swatch(*entry, **style)
    strip = "episodes in two greys, " * has_episodes + "rewarded transitions in red."
    strip += " Means over heads." * of_parts
    page.text(LEFT, y + 22, f"History strip: {strip}", 8.5, color=SOFT)
    average = f"Average over the queries that may see the {'token' if of_parts else unit}."
    page.text(RIGHT, y + 22, average, 8.5, color=SOFT)
    width = -(-n // MAX_POINTS)
    if width > 1:
        bins = f"A point is the mean of {width} positions; the grey band is their range."
        page.swatch(LEFT, y + 42, bins, colors=RANGE, linewidths=9)
    page.keep()
    return page


def _legend(names: tuple[str, ...], of_parts: bool) -> list[tuple[float, float, str, dict]]:
    """Place, label and style of each entry, in as many rows as they need."""
    parts = "whole transition (left: sum, right: mean of its tokens)"
    whole, many = (parts, "parts") if of_parts else ("mean over heads", "heads")
    each = [(f"each of the {len(names)} {many}", {"colors": MANY_HEADS, "linewidths": 1})]
    if len(names) <= len(HUES):
        each = zip(names, ({"colors": hue, "linewidths": 1.2} for hue in HUES), strict=False)
    entries, x, y = [], LEFT, LEGEND
    bold = whole, {"colors": INK, "linewidths": 2}
    for label, style in (bold, *each, ("uniform attention", UNIFORM_LINE)):
        if x + 46 + text_width(label, 9) > PAGE_WIDTH:
            x, y = LEFT, y + 20
        entries.append((x, y, label, style))
        x += 56 + 7 * len(label)
    return entries
