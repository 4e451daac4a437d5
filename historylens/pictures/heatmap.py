"""The heatmap: which token attends to which, a panel a head, the query token's row set apart.

    heatmap("heatmap.png", layer.maps[0], layer.map_rows, layer.map_cols, sample, layer=2)

Weights become colours by a table lookup and are copied to the page, a whole number of pixels a
weight. What pictures of one shape have in common (frames, numbers, legend) is drawn once.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from attention.page import (
    DPI,
    FAINT,
    MAX_EPISODE_LINES,
    SOFT,
    UNIFORM,
    Page,
    history_colours,
    subtitle,
)
from attention.samples import Sample
from attention.tokens import NONE, Tokens

COLOURS = "viridis"  # perceptually uniform, bright = strong
BLANK = 255  # grey level of what may not be seen
SIDES = {1: 560, 2: 440, 3: 320, 4: 280}  # wanted side of a map by panels in a row, page units
SMALL_SIDE = 200
MIN_WIDTH = 740
LEFT, RIGHT, HEADER, FOOTER = 88, 146, 92, 132
HISTORY, QUERY, GAP, PANEL_GAP = 9, 24, 5, 30
BAR_TOP, BAR, BAR_WIDTH = HEADER + 14, 300, 15


def heatmap(
    path: str | Path,
    maps: ArrayLike,
    map_rows: ArrayLike,
    map_cols: ArrayLike,
    sample: Sample,
    *,
    layer: int,
    heads: Sequence[int] | None = None,
    more: str = "",
    scale: tuple[float, float] | None = None,
    dpi: int = DPI,
) -> None:
    """Draw the attention maps of one sample and layer.

    Args:
        path: PNG to write.
        maps: `(H, R, C)` attention weights, NaN where forbidden; the last row is the query token's.
        map_rows: `(R,)` int, token index of each row, ascending.
        map_cols: `(C,)` int, first token index of each column, ascending; a column is the mean
            weight of its tokens.
        sample: names the picture and its tokens.
        layer: number of the layer.
        heads: numbers of the `H` heads; None: 0, 1, 2, ...
        more: what else the heading says, for example which page this is.
        scale: weights at the ends of the colour scale; None: `color_range` of these maps.
        dpi: pixels an inch.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    maps, rows, cols = np.asarray(maps), np.asarray(map_rows), np.asarray(map_cols)
    n_tokens = sample.n_context + 1
    if maps.shape[1:] != (len(rows), len(cols)) or rows[-1] != n_tokens - 1:
        raise ValueError(
            f"expected maps (H, R, C) with a token for each row and column, the last row that of "
            f"token {n_tokens - 1}; got shape {maps.shape}, {len(rows)} rows up to {rows[-1]}, "
            f"{len(cols)} columns"
        )
    rows, cols = rows.astype(np.int64), cols.astype(np.int64)
    has_lines = len(sample.episode_starts) <= MAX_EPISODE_LINES
    numbers = tuple(range(len(maps)) if heads is None else heads)
    layout = _Layout.of(sample)
    sheet = _sheet(numbers, rows.tobytes(), cols.tobytes(), dpi, has_lines, layout)
    sheet.page.restore()
    low, high = color_range(maps, n_tokens) if scale is None else scale
    history = history_colours(sample, sheet.starts)
    for corner, weights in zip(sheet.corners(), maps, strict=True):
        sheet.paste_head(corner, to_colours(_pool(weights, sheet.pooled), low, high), history)
    if has_lines:
        _draw_episodes(sheet, sample.episode_starts)
    _label_bar(sheet, low, high, n_tokens)
    counted = "1 head" if len(maps) == 1 else f"{len(maps)} heads"
    heading = f"Attention heatmap · layer {layer} · {counted}{more}"
    sheet.page.text(LEFT, 22, heading, 14, weight="bold")
    sheet.page.text(LEFT, 46, subtitle(sample), 10.5)
    sheet.page.save(path)


def color_range(maps: np.ndarray, n_tokens: int) -> tuple[float, float]:
    """Weights at the two ends of the logarithmic colour scale, the same for all heads.

    The dark end is a tenth of uniform attention `1 / T`. The bright end is the weight that one
    entry in 200 exceeds, at least ten times `1 / T` and at most 1.
    """
    some_rows = maps[:, :: max(1, maps.shape[1] // 64)]
    high = np.quantile(some_rows[~np.isnan(some_rows)], 0.995)
    return 0.1 / n_tokens, float(min(1.0, max(high, 10 / n_tokens)))


def to_colours(weights: np.ndarray, low: float, high: float) -> np.ndarray:
    """Weights `(...)` as RGB `(..., 3)` uint8 on the logarithmic scale; NaN is blank."""
    clipped = np.clip(weights, low, high)
    place = np.log(clipped / low) * (255 / math.log(high / low))
    index = np.where(np.isnan(place), 256, np.nan_to_num(place) + 0.5).astype(np.int16)
    return _color_table()[index]


@lru_cache(maxsize=1)
def _color_table() -> np.ndarray:
    """`(257, 3)` uint8: the colour map, then the blank of forbidden entries."""
    colours = matplotlib.colormaps[COLOURS](np.arange(256), bytes=True)[:, :3]
    return np.vstack([colours, np.full((1, 3), BLANK, np.uint8)])


def _last_rows(n_rows: int, factor: int) -> np.ndarray:
    """Index of the last row of each group of `factor` rows."""
    return np.minimum(np.arange(factor - 1, n_rows - 1 + factor, factor), n_rows - 1)


def _pool(weights: np.ndarray, factor: int) -> np.ndarray:
    """Mean of `factor` neighbouring columns, in the last of `factor` neighbouring rows."""
    if factor == 1:
        return weights
    n_rows, n_cols = weights.shape
    rows = weights[_last_rows(n_rows, factor)]
    starts = np.arange(0, n_cols, factor)
    n_seen = np.add.reduceat(~np.isnan(rows), starts, axis=1, dtype=float)
    total = np.add.reduceat(np.nan_to_num(rows), starts, axis=1)
    return np.where(n_seen > 0, total / np.maximum(n_seen, 1), np.nan)


@dataclass(frozen=True)
class _Layout:
    """Which tokens the rows and columns are, and how that is said.

    Attributes:
        ticks: `(token, number of its transition)` where the axes have a number.
        unit: what the numbers count.
        order: says what stands in which order.
        query: says which token the enlarged row is of.
    """

    ticks: tuple[tuple[int, int], ...]
    unit: str = "transition"
    order: str = "Token 0 is the oldest."
    query: str = "the last token, whose output is the model's answer; its row is enlarged."

    @classmethod
    def of(cls, sample: Sample) -> "_Layout":
        tokens = sample.tokens
        n = sample.n_context if tokens is None else tokens.n
        locator = MaxNLocator(5, integer=True, steps=[1, 2, 5, 10])
        ticks = sorted({int(t) for t in locator.tick_values(0, n) if 0 <= t <= n})
        if tokens is None:
            return cls(tuple((t, t) for t in ticks))
        first = {t: int(np.flatnonzero(tokens.transition == t)[0]) for t in ticks if t < n}
        return cls(
            tuple((place, t) for t, place in first.items()),
            "number of its transition",
            _order(tokens),
            "the token whose output is the model's answer, shown last whatever its place in the "
            "model; its row is enlarged.",
        )


def _order(tokens: Tokens) -> str:
    """What the tokens of a transition are, and that they stand in the order of time."""
    first = "Those of no transition stand first. " if tokens.transition[0] == NONE else ""
    of = f"Tokens of a transition: {', '.join(tokens.parts)}. " if len(tokens.parts) > 1 else ""
    return f"{of}{first}Transition 0 is the oldest."


class _Sheet:
    """The page of one shape of heatmap: where things are, and what never changes, drawn once."""

    def __init__(
        self,
        heads: tuple[int, ...],
        rows: np.ndarray,
        cols: np.ndarray,
        dpi: int,
        has_lines: bool,
        layout: _Layout,
    ) -> None:
        n_heads = len(heads)
        across = math.ceil(math.sqrt(n_heads))
        wanted = SIDES.get(across, SMALL_SIDE) * dpi / 100  # pixels
        self.pooled = math.ceil(len(cols) / (1.3 * wanted))
        self.starts = cols[:: self.pooled]  # first token of each column drawn
        self._ends = rows[_last_rows(len(rows), self.pooled)]  # last token of each row drawn
        self.zoom = max(1, round(wanted / len(self.starts)))  # pixels a weight
        self.side = len(self.starts) * self.zoom * 100 / dpi
        self.depth = self.side - self.zoom * 100 / dpi  # the query row stands below
        self._grid = n_heads, across
        self._heads, self._layout = heads, layout
        bottom = max(HEADER + math.ceil(n_heads / across) * self._step[1], BAR_TOP + BAR)
        self.bar_left = LEFT + across * self._step[0] - 4
        width = max(self.bar_left - PANEL_GAP + RIGHT, MIN_WIDTH)
        self.page = Page(width, bottom + FOOTER, dpi)
        self._draw_fixed()
        self._draw_legend(bottom + 30, int(np.diff(cols).max(initial=1)) * self.pooled, has_lines)
        self.page.keep()

    @property
    def _step(self) -> tuple[float, float]:
        down = self.depth + 2 * GAP + HISTORY + QUERY + PANEL_GAP
        return self.side + PANEL_GAP, down

    def corners(self) -> Iterator[tuple[float, float]]:
        """Upper left corner of each head's map."""
        n_heads, across = self._grid
        for head in range(n_heads):
            yield LEFT + head % across * self._step[0], HEADER + head // across * self._step[1]

    def strips(self, top: float) -> tuple[float, float]:
        """Tops of the history strip and of the query row below a map."""
        below = top + self.depth + GAP
        return below, below + HISTORY + GAP

    def x(self, token: ArrayLike) -> np.ndarray:
        """Where a token's column begins, page units from the left edge of a map."""
        edges = np.append(self.starts, self._ends[-1] + 1)
        return np.interp(token, edges, np.linspace(0, self.side, len(edges)))

    def y(self, token: ArrayLike) -> np.ndarray:
        """Where a token's row begins, page units from the upper edge of a map."""
        edges = np.append(0, self._ends[:-1] + 1)
        return np.interp(token, edges, np.linspace(0, self.depth, len(edges)))

    def paste_head(
        self, corner: tuple[float, float], colours: np.ndarray, history: np.ndarray
    ) -> None:
        """Copy a head's map, the history below it and the query row to the page."""
        left, top = corner
        below, query = self.strips(top)
        scale = self.page.scale
        enlarged = colours.repeat(self.zoom, axis=1)
        self.page.paste(left, top, enlarged[:-1].repeat(self.zoom, axis=0))
        self.page.paste(left, query, enlarged[-1:].repeat(round(QUERY * scale), axis=0))
        strip = history[None].repeat(self.zoom, axis=1).repeat(round(HISTORY * scale), axis=0)
        self.page.paste(left, below, strip)

    def _draw_fixed(self) -> None:
        n_heads, across = self._grid
        page, n_context = self.page, int(self._ends[-1])
        ticks = self._layout.ticks
        for place, (left, top) in enumerate(self.corners()):
            page.text(left, top - 9, f"head {self._heads[place]}", 10, weight="bold")
            if place % across == 0:
                self._label_rows(left, top, [tick for tick in ticks if tick[0] < n_context])
            if place + across >= n_heads:
                self._label_columns(left, self.strips(top)[1] + QUERY, ticks)
        page.text(self.bar_left, BAR_TOP - 20, "attention weight", 9)
        bar_width = round(BAR_WIDTH * page.scale)
        shades = _color_table()[np.linspace(255, 0, round(BAR * page.scale)).astype(int)]
        page.paste(self.bar_left, BAR_TOP, shades[:, None].repeat(bar_width, axis=1))

    def _label_rows(self, left: float, top: float, ticks: Sequence[tuple[int, int]]) -> None:
        page = self.page
        for token, number in ticks:
            y = top + float(self.y(token) + self.y(token + 1)) / 2
            page.lines([[(left - 4, y), (left, y)]], colors=FAINT, linewidths=0.7)
            page.text(left - 7, y, f"{number}", 8, ha="right")
        name = f"token that attends ({self._layout.unit})"
        name = name if self.depth > 6.2 * len(name) else "token that attends"
        page.text(left - 60, top + self.depth / 2, name, 9, rotation=90, ha="center")
        history, query = self.strips(top)
        page.text(left - 7, history + HISTORY / 2, "history", 8, ha="right")
        page.text(left - 7, query + QUERY / 2, "query", 9, ha="right", weight="bold")

    def _label_columns(self, left: float, bottom: float, ticks: Sequence[tuple[int, int]]) -> None:
        page = self.page
        for token, number in ticks:
            x = left + float(self.x(token) + self.x(token + 1)) / 2
            page.lines([[(x, bottom), (x, bottom + 4)]], colors=FAINT, linewidths=0.7)
            page.text(x, bottom + 12, f"{number}", 8, ha="center")
        page.text(left + self.side / 2, bottom + 28, "token attended to", 9, ha="center")

    def _draw_legend(self, top: float, bin_width: int, has_lines: bool) -> None:
        pixel = "A pixel: how strongly the token of its row attends to the token of its column"
        if bin_width > 1:
            pixel += f" (mean of up to {bin_width} neighbours)"
        episodes = "The episodes are too many to mark."
        if has_lines:
            episodes = "White lines, and the two greys of the history: an episode begins."
        entries = [
            f"{pixel}. {self._layout.order}",
            f"Blank: not visible to the token of the row. {episodes}",
            "Red in the history: rewarded transitions.",
            f"Query: {self._layout.query}",
        ]
        for i, entry in enumerate(entries):
            self.page.text(LEFT, top + 17 * i, entry, 8.5, color=SOFT)


@lru_cache(maxsize=2)
def _sheet(
    heads: tuple[int, ...], rows: bytes, cols: bytes, dpi: int, has_lines: bool, layout: _Layout
) -> _Sheet:
    """The sheet of a shape of heatmap; tokens are given as the bytes of int64 arrays."""
    tokens = np.frombuffer(rows, np.int64), np.frombuffer(cols, np.int64)
    return _Sheet(heads, *tokens, dpi, has_lines, layout)


def _draw_episodes(sheet: _Sheet, starts: np.ndarray) -> None:
    """White lines where an episode begins: down its column and along its row."""
    segments = []
    for left, top in sheet.corners():
        x, y = sheet.x(starts) + left, sheet.y(starts) + top
        for a, b in zip(x, y, strict=True):
            segments += [[(a, b), (a, top + sheet.depth)], [(left, b), (a, b)]]
    sheet.page.lines(segments, colors="white", linewidths=0.5, alpha=0.45)


def _label_bar(sheet: _Sheet, low: float, high: float, n_tokens: int) -> None:
    """Decades of the colour bar, its two ends, and the weight of uniform attention."""
    page, left = sheet.page, sheet.bar_left + BAR_WIDTH

    def y(weight: float) -> float:
        return BAR_TOP + BAR * (1 - math.log(weight / low) / math.log(high / low))

    uniform = 1 / n_tokens
    page.lines([[(left - 19, y(uniform)), (left + 4, y(uniform))]], colors=UNIFORM, linewidths=1.6)
    page.text(left + 7, y(uniform), f"{uniform:.2g} = 1/T", 8.5, color=UNIFORM, weight="bold")
    page.text(left + 7, y(uniform) + 13, "uniform attention", 7.5, color=UNIFORM)
    labels = {high: f"{high:.2g} or more" if high < 1 else "1", low: f"{low:.2g} or less"}
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    labels |= {10.0**e: f"{10.0**e:g}" for e in range(first, last + 1) if 10.0**e not in labels}
    taken = [y(uniform), y(uniform) + 13]
    for weight, label in labels.items():
        if min(abs(y(weight) - other) for other in taken) > 12:
            taken.append(y(weight))
            page.text(left + 6, y(weight), label, 8)
