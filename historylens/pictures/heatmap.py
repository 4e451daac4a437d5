"""The heatmap: which token attends to which, a panel a head, the query token's row set apart.

Weights become colours by a table lookup and are copied to the page, whole pixels each.
"""

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import matplotlib
import numpy as np

from historylens.common.text import counted
from historylens.pictures.order import MAX_STARTS, SampleAttention, history_strip, subtitle
from historylens.pictures.page import BAR_WIDTH, MARGIN, SOFT, UNIFORM, Page, in_lines
from historylens.tokens import NONE

SIDES = {1: 560, 2: 440, 3: 320, 4: 280}  # wanted side of a map by panels in a row, page units
SMALL_SIDE, MAX_CELL = 200, 120  # the latter of a weight, at most
MIN_WIDTH = 740
LEFT, RIGHT, HEADER, FOOTER = 88, 146, 92, 132
HISTORY, QUERY, GAP, PANEL_GAP = 9, 24, 5, 30
LINE_ALPHA = 0.65  # of the white line where an episode begins
BAR_TOP, BAR = HEADER + 14, 300
SHADES = matplotlib.colormaps["viridis"](np.arange(256), bytes=True)[:, :3]  # bright = strong
COLOURS = np.vstack([SHADES, np.full((1, 3), 255, np.uint8)])  # white: what may not be seen


def heatmap(
    path: Path, sample: SampleAttention, *, layer: int, heads: Sequence[int],
    scale: tuple[float, float], dpi: int, more: str = "",
) -> None:  # fmt: skip
    """Draw the maps of one sample, `scale` its `color_range`; `more` ends the heading."""
    title = f"Attention heatmap · layer {layer} · {counted(len(heads), 'head')}{more}"
    if sample.tokens.n == 0:
        return draw_no_history(path, title, sample, dpi)
    starts, owned, rewarded = sample.on_tokens
    has_lines = len(starts) <= MAX_STARTS
    shape = tuple(heads), tuple(sample.rows), tuple(sample.cols)
    sheet = Sheet(*shape, dpi, words(sample, has_lines))
    page, zoom = sheet.page, sheet.zoom
    page.restore()
    history = history_strip(starts, owned, rewarded, sheet.starts)[None].repeat(zoom, axis=1)
    history = history.repeat(round(HISTORY * page.scale), axis=0)
    starts = starts[(starts == 0) | owned[starts - 1]]  # nothing ends before the first
    episodes = []  # white lines where one begins: down its column and along its row
    for (left, top), weights in zip(sheet.corners, sample.maps, strict=True):
        below, query = sheet.strips(top)
        colours = to_colours(pool(weights, sheet.pooled), *scale).repeat(zoom, axis=1)
        page.paste(left, top, colours[:-1].repeat(zoom, axis=0))
        page.paste(left, query, colours[-1:].repeat(round(QUERY * page.scale), axis=0))
        page.paste(left, below, history)
        for x, y in zip(sheet.x(starts) + left, sheet.y(starts) + top, strict=True):
            episodes += [[(x, y), (x, top + sheet.depth)], [(left, y), (x, y)]]
    if has_lines:
        # Thinner than a token, half of it on either side: what a line crosses can still be read.
        width = min(0.5, 0.25 * zoom / page.scale * 0.72)  # points
        page.lines(episodes, colors="white", linewidths=width, alpha=LINE_ALPHA, snap=False)
    color_bar(page, (sheet.bar_left, BAR_TOP), BAR, scale, len(sample.shown))
    page.heading(LEFT, title, subtitle(sample.decision, sample.shown))
    page.save(path)


def draw_no_history(path: Path, title: str, sample: SampleAttention, dpi: int) -> None:
    """The picture of a decision before which there is no transition: it says so in words."""
    page = Page(760, 130, dpi)
    page.heading(30, title, subtitle(sample.decision, sample.tokens))
    page.text(30, 94, "No history yet: the query token has nothing to attend to but itself.", 11)
    page.save(path)


def color_range(sample: SampleAttention) -> tuple[float, float]:
    """Weights at the two ends of the colour scale, the same for all heads."""
    return scale_of(sample.maps, len(sample.shown))


def scale_of(maps: np.ndarray, n_tokens: int) -> tuple[float, float]:
    """Weights at the two ends of the logarithmic colour scale of maps `(..., R, C)`.

    The dark end is a tenth of uniform attention `1 / T`. The bright end is the weight that one
    entry in 200 exceeds, at least ten times `1 / T` and at most 1.
    """
    some_rows = maps[..., :: max(1, maps.shape[-2] // 64), :]
    high = np.quantile(some_rows[~np.isnan(some_rows)], 0.995)
    return 0.1 / n_tokens, float(min(1.0, max(high, 10 / n_tokens)))


def to_colours(weights: np.ndarray, low: float, high: float) -> np.ndarray:
    """Weights `(...)` as RGB `(..., 3)` uint8 on the logarithmic scale; NaN is blank."""
    place = np.log(np.clip(weights, low, high) / low) * (255 / math.log(high / low))
    return COLOURS[np.where(np.isnan(place), 256, np.nan_to_num(place) + 0.5).astype(np.int16)]


def last_rows(n_rows: int, factor: int) -> np.ndarray:
    """Index of the last row of each group of `factor` rows."""
    return np.minimum(np.arange(factor - 1, n_rows - 1 + factor, factor), n_rows - 1)


def pool(weights: np.ndarray, factor: int, down: int = 0) -> np.ndarray:
    """Mean of `factor` neighbouring columns, in the last of `down` rows (0: as many)."""
    down = down or factor
    if factor == down == 1:
        return weights
    rows = weights[last_rows(len(weights), down)]
    starts = np.arange(0, rows.shape[1], factor)
    n_seen = np.add.reduceat(~np.isnan(rows), starts, axis=1, dtype=float)
    total = np.add.reduceat(np.nan_to_num(rows), starts, axis=1)
    return np.where(n_seen > 0, total / np.maximum(n_seen, 1), np.nan)


def color_bar(page: Page, corner: tuple, height: float, scale: tuple, n_tokens: int) -> None:
    """Draw the colour scale: decades, its two ends, and the weight of uniform attention."""
    (left, top), (low, high) = corner, scale
    page.bar(left, top, height, SHADES, "attention weight")

    def y(weight: float) -> float:
        return top + height * (1 - math.log(weight / low) / math.log(high / low))

    edge, even = left + BAR_WIDTH, 1 / n_tokens
    page.lines([[(edge - 19, y(even)), (edge + 4, y(even))]], colors=UNIFORM, linewidths=1.6)
    page.text(edge + 7, y(even), f"{even:.2g} = 1/T", 8.5, color=UNIFORM, weight="bold")
    page.text(edge + 7, y(even) + 13, "uniform attention", 7.5, color=UNIFORM)
    labels = {high: f"{high:.2g} or more" if high < 1 else "1", low: f"{low:.2g} or less"}
    decades = [10.0**e for e in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    labels |= {weight: f"{weight:g}" for weight in decades if weight not in labels}
    taken = [y(even), y(even) + 13]
    for weight, label in labels.items():
        if min(abs(y(weight) - other) for other in taken) > 12:
            taken.append(y(weight))
            page.text(edge + 6, y(weight), label, 8)


def words(sample: SampleAttention, has_lines: bool) -> tuple[tuple, str, tuple[str, ...]]:
    """`(token, number)` at ticks, what the numbers count, the legend: order, episodes, query."""
    tokens, transition = sample.tokens, sample.shown.transition
    numbers = Page.numbers(0, tokens.n, 5)
    marked = "White lines, and the two greys of the history: an episode begins."
    episodes = marked if has_lines else "The episodes are too many to mark."
    answers = "whose output is the model's answer"
    if tokens.is_plain:
        order, query = "Token 0 is the oldest.", f"the last token, {answers}"
        return tuple((t, t) for t in numbers), "transition", (order, episodes, query)
    order = "Transition 0 is the oldest."
    if transition[0] == NONE:
        order = f"Those of no transition stand first. {order}"
    if np.flatnonzero(transition[:-1] != NONE).max(initial=-1) < len(transition) - 2:
        order = f"Those of the current step stand before the query. {order}"
    if len(tokens.parts) > 1:
        order = f"Tokens of a transition: {', '.join(tokens.parts)}. {order}"
    query = f"the token {answers}, shown last whatever its place in the model"
    ticks = tuple((int(np.argmax(transition == t)), t) for t in numbers if t < tokens.n)
    return ticks, "number of its transition", (order, episodes, query)


@lru_cache(maxsize=2)
class Sheet:
    """The page of one shape of heatmap: where things are, and what never changes, drawn once."""

    def __init__(self, heads: tuple, rows: tuple, cols: tuple, dpi: int, about: tuple) -> None:
        ticks, unit, (order, episodes, query) = about
        across = math.ceil(math.sqrt(len(heads)))
        wanted = SIDES.get(across, SMALL_SIDE) * dpi / 100  # pixels
        self.pooled = math.ceil(len(cols) / (1.3 * wanted))  # columns, and rows, that share a pixel
        self.starts = np.array(cols[:: self.pooled])  # (C,) first token of each column drawn
        wanted = min(wanted, MAX_CELL * dpi / 100 * len(self.starts))
        self.zoom = max(1, round(wanted / len(self.starts)))  # pixels a weight
        self.side = len(self.starts) * self.zoom * 100 / dpi  # width of a map, page units
        self.depth = self.side - self.zoom * 100 / dpi  # its height: the query row stands below
        ends = np.array(rows)[last_rows(len(rows), self.pooled)] + 1
        # Where a token's column, and its row, begins: page units from the corner of a map.
        edges = (self.side, np.append(self.starts, ends[-1])), (self.depth, np.append(0, ends[:-1]))
        self.x, self.y = (
            partial(np.interp, xp=tokens, fp=np.linspace(0, length, len(tokens)))
            for length, tokens in edges
        )
        right, n_down = self.side + PANEL_GAP, math.ceil(len(heads) / across)
        down = self.depth + 2 * GAP + HISTORY + QUERY + PANEL_GAP
        places = (divmod(i, across) for i in range(len(heads)))
        self.corners = [(LEFT + column * right, HEADER + row * down) for row, column in places]
        bottom = max(HEADER + n_down * down, BAR_TOP + BAR)
        self.bar_left = LEFT + across * right - 4
        width = max(self.bar_left - PANEL_GAP + RIGHT, MIN_WIDTH)
        columns = int(np.diff(cols).max(initial=1)) * self.pooled
        mean = f" (mean of up to {columns} neighbours)" if columns > 1 else ""
        pixel = f"how strongly the token of its row attends to the token of its column{mean}"
        legend = (
            f"A pixel: {pixel}. {order}",
            f"Blank: not visible to the token of the row. {episodes}",
            "Red in the history: rewarded transitions.",
            f"Query: {query}; its row is enlarged.",
        )
        lines = [line for text in legend for line in in_lines(text, width - LEFT - MARGIN, 8.5)]
        self.page = Page(width, bottom + FOOTER + 17 * max(0, len(lines) - 4), dpi)
        for i, (left, top) in enumerate(self.corners):
            self.page.text(left, top - 9, f"head {heads[i]}", 10, weight="bold")
            if i % across == 0:
                self._label_rows(left, top, [one for one in ticks if one[0] < rows[-1]], unit)
            if i + across >= len(heads):
                self._label_columns(left, top, ticks)
        self.page.column(LEFT, bottom + 30, lines, 17, color=SOFT)
        self.page.keep()

    def strips(self, top: float) -> tuple[float, float]:
        """Tops of the history strip and of the query row below a map."""
        below = top + self.depth + GAP
        return below, below + HISTORY + GAP

    def _label_rows(self, left: float, top: float, ticks: Sequence, unit: str) -> None:
        numbers = {top + np.mean(self.y([token, token + 1])): number for token, number in ticks}
        self.page.ticks(numbers, left, "left")
        name = f"token that attends ({unit})"
        name = name if self.depth > 6.2 * len(name) else "token that attends"
        self.page.text(left - 60, top + self.depth / 2, name, 9, rotation=90, ha="center")
        history, query = self.strips(top)
        self.page.text(left - 7, history + HISTORY / 2, "history", 8, ha="right")
        self.page.text(left - 7, query + QUERY / 2, "query", 9, ha="right", weight="bold")

    def _label_columns(self, left: float, top: float, ticks: Sequence) -> None:
        numbers = {left + np.mean(self.x([token, token + 1])): n for token, n in ticks}
        edge = self.strips(top)[1] + QUERY
        self.page.ticks(numbers, edge, "below")
        self.page.text(left + self.side / 2, edge + 28, "token attended to", 9, ha="center")
