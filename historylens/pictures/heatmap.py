"""The heatmap: which token attends to which, a panel a head, the query token's row set apart.

    heatmap("heatmap.png", sample, layer=2, heads=range(4), scale=color_range(sample), dpi=100)

Weights become colours by a table lookup and are copied to the page, a whole number of pixels a
weight. What pictures of one shape have in common (frames, numbers, legend) is drawn once.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from historylens.common.text import counted
from historylens.pictures.order import MAX_STARTS, SampleAttention, history_strip, subtitle
from historylens.pictures.page import MARGIN, SOFT, Page, in_lines
from historylens.pictures.shades import color_bar, last_rows, pool, scale_of, to_colours
from historylens.tokens import NONE

SIDES = {1: 560, 2: 440, 3: 320, 4: 280}  # wanted side of a map by panels in a row, page units
SMALL_SIDE, MAX_CELL = 200, 120  # the latter of a weight, at most
MIN_WIDTH = 740
LEFT, RIGHT, HEADER, FOOTER = 88, 146, 92, 132
HISTORY, QUERY, GAP, PANEL_GAP = 9, 24, 5, 30
LINE_ALPHA = 0.65  # of the white line where an episode begins
BAR_TOP, BAR = HEADER + 14, 300
Ints = tuple[int, ...]
Words = tuple[tuple[tuple[int, int], ...], str, tuple[str, ...]]  # ticks, their unit, legend


def heatmap(
    path: str | Path, sample: SampleAttention, *, layer: int, heads: Sequence[int],
    scale: tuple[float, float], dpi: int, more: str = "",
) -> None:  # fmt: skip
    """Draw the attention maps of one sample and layer, whose heads are numbered `heads`.

    `scale`: weights at the ends of the colour scale (`color_range`); `more`: ends the heading.
    """
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


def draw_no_history(path: str | Path, title: str, sample: SampleAttention, dpi: int) -> None:
    """The picture of a decision before which there is no transition: it says so in words."""
    page = Page(760, 130, dpi)
    page.heading(30, title, subtitle(sample.decision, sample.tokens))
    page.text(30, 94, "No history yet: the query token has nothing to attend to but itself.", 11)
    page.save(path)


def color_range(sample: SampleAttention) -> tuple[float, float]:
    """Weights at the two ends of the colour scale, the same for all heads."""
    return scale_of(sample.maps, len(sample.shown))


def words(sample: SampleAttention, has_lines: bool) -> Words:
    """`(token, number)` at ticks, what the numbers count, the legend: order, episodes, query."""
    tokens, transition = sample.tokens, sample.shown.transition
    locator = MaxNLocator(5, integer=True, steps=[1, 2, 5, 10])
    numbers = [int(t) for t in locator.tick_values(0, tokens.n) if 0 <= t <= tokens.n]
    marked = "White lines, and the two greys of the history: an episode begins."
    episodes = marked if has_lines else "The episodes are too many to mark."
    answers = "whose output is the model's answer"
    ticks, unit, order = [(t, t) for t in numbers], "transition", "Token 0 is the oldest."
    query = f"the last token, {answers}"
    if not tokens.is_plain:
        ticks = [(int(np.argmax(transition == t)), t) for t in numbers if t < tokens.n]
        unit, order = "number of its transition", "Transition 0 is the oldest."
        if transition[0] == NONE:
            order = f"Those of no transition stand first. {order}"
        if np.flatnonzero(transition[:-1] != NONE).max(initial=-1) < len(transition) - 2:
            order = f"Those of the current step stand before the query. {order}"
        if len(tokens.parts) > 1:
            order = f"Tokens of a transition: {', '.join(tokens.parts)}. {order}"
        query = f"the token {answers}, shown last whatever its place in the model"
    return tuple(ticks), unit, (order, episodes, f"{query}; its row is enlarged.")


def entries(width: int, order: str, episodes: str, query: str) -> tuple[str, ...]:
    """The legend, for pixels that are the mean of up to `width` columns."""
    pixel = "how strongly the token of its row attends to the token of its column"
    pixel += f" (mean of up to {width} neighbours)" if width > 1 else ""
    return (
        f"A pixel: {pixel}. {order}",
        f"Blank: not visible to the token of the row. {episodes}",
        "Red in the history: rewarded transitions.",
        f"Query: {query}",
    )


@lru_cache(maxsize=2)
class Sheet:
    """The page of one shape of heatmap: where things are, and what never changes, drawn once."""

    def __init__(self, heads: Ints, rows: Ints, cols: Ints, dpi: int, about: Words) -> None:
        ticks, unit, legend = about
        across = math.ceil(math.sqrt(len(heads)))
        wanted = SIDES.get(across, SMALL_SIDE) * dpi / 100  # pixels
        self.pooled = math.ceil(len(cols) / (1.3 * wanted))  # columns, and rows, that share a pixel
        self.starts = np.array(cols[:: self.pooled])  # (C,) first token of each column drawn
        ends = np.array(rows)[last_rows(len(rows), self.pooled)] + 1
        self._edges = np.append(self.starts, ends[-1]), np.append(0, ends[:-1])
        wanted = min(wanted, MAX_CELL * dpi / 100 * len(self.starts))
        self.zoom = max(1, round(wanted / len(self.starts)))  # pixels a weight
        self.side = len(self.starts) * self.zoom * 100 / dpi  # width of a map, page units
        self.depth = self.side - self.zoom * 100 / dpi  # its height: the query row stands below
        right = self.side + PANEL_GAP
        down = self.depth + 2 * GAP + HISTORY + QUERY + PANEL_GAP
        places = [divmod(i, across) for i in range(len(heads))]
        self.corners = [(LEFT + column * right, HEADER + row * down) for row, column in places]
        bottom = max(HEADER + (places[-1][0] + 1) * down, BAR_TOP + BAR)
        self.bar_left = LEFT + across * right - 4
        width = max(self.bar_left - PANEL_GAP + RIGHT, MIN_WIDTH)
        columns = int(np.diff(cols).max(initial=1)) * self.pooled
        room = width - LEFT - MARGIN
        lines = [line for entry in entries(columns, *legend) for line in in_lines(entry, room, 8.5)]
        self.page = Page(width, bottom + FOOTER + 17 * max(0, len(lines) - 4), dpi)
        for i, (left, top) in enumerate(self.corners):
            self.page.text(left, top - 9, f"head {heads[i]}", 10, weight="bold")
            if i % across == 0:
                self._label_rows(left, top, ticks, f"token that attends ({unit})")
            if i + across >= len(heads):
                self._label_columns(left, self.strips(top)[1] + QUERY, ticks)
        for i, line in enumerate(lines):
            self.page.text(LEFT, bottom + 30 + 17 * i, line, 8.5, color=SOFT)
        self.page.keep()

    def strips(self, top: float) -> tuple[float, float]:
        """Tops of the history strip and of the query row below a map."""
        below = top + self.depth + GAP
        return below, below + HISTORY + GAP

    def x(self, token: ArrayLike) -> np.ndarray:
        """Where a token's column begins, page units from the map's left edge."""
        return np.interp(token, self._edges[0], np.linspace(0, self.side, len(self._edges[0])))

    def y(self, token: ArrayLike) -> np.ndarray:
        """Where a token's row begins, page units from the upper edge of a map."""
        return np.interp(token, self._edges[1], np.linspace(0, self.depth, len(self._edges[1])))

    def _label_rows(self, left: float, top: float, ticks: Sequence, name: str) -> None:
        for token, number in ticks:
            if token < self._edges[0][-1] - 1:  # the query's row has a name
                y = top + float(self.y(token) + self.y(token + 1)) / 2
                self.page.tick(y, left, f"{number}", 0.7, "left")
        name = name if self.depth > 6.2 * len(name) else "token that attends"
        self.page.text(left - 60, top + self.depth / 2, name, 9, rotation=90, ha="center")
        history, query = self.strips(top)
        self.page.text(left - 7, history + HISTORY / 2, "history", 8, ha="right")
        self.page.text(left - 7, query + QUERY / 2, "query", 9, ha="right", weight="bold")

    def _label_columns(self, left: float, bottom: float, ticks: Sequence) -> None:
        for token, number in ticks:
            x = left + float(self.x(token) + self.x(token + 1)) / 2
            self.page.tick(x, bottom, f"{number}", 0.7, "below")
        self.page.text(left + self.side / 2, bottom + 28, "token attended to", 9, ha="center")
