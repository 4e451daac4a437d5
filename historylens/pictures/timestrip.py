"""One play in one look: what the deciding query attends to at every step, a panel a layer.

A row of pixels is a step, a column a number of transitions back. Axes: `N` steps, `E` episodes.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from historylens.pictures.heatmap import color_bar, last_rows, pool, scale_of, to_colours
from historylens.pictures.order import history_strip
from historylens.pictures.page import MARGIN, SOFT, Page, in_lines

WIDTHS = {1: 420, 2: 420, 3: 340, 4: 260, 5: 210, 6: 180}  # of maps at most, by those in a row
HEIGHTS = {1: 900, 2: 600, 3: 440, 4: 340}  # at most, by rows of panels
MAX_CELL, MIN_WIDTH, MIN_PITCH = 24, 760, 150
LEFT, TOP, RIGHT, FOOTER, BELOW, BESIDE = 84, 122, 140, 30, 74, 34
STRIP, QUERY, GAP = 9, 16, 4
MIN_EPISODE, LINE_ALPHA = 6, 0.6  # height from which on episodes are marked; their white lines


class Axis:
    """`n` places on at most `room` page units of `scale` pixels."""

    def __init__(self, n: int, room: float, scale: float) -> None:
        self.n, self.scale = n, scale
        self.pooled = math.ceil(n / max(1, room * scale))  # places that share a cell
        n_cells = math.ceil(n / self.pooled)
        self.zoom = max(1, int(min(room / n_cells, MAX_CELL) * scale))  # pixels a cell
        self.length = n_cells * self.zoom / scale  # page units

    def at(self, place: float | np.ndarray) -> float | np.ndarray:
        """Where a place begins, page units from the first."""
        return place / self.pooled * self.zoom / self.scale

    def ticks(self, first: int, last: int) -> list[int]:
        """Numbers to name, of `first` to `last`."""
        return Page.numbers(first, last, min(8, max(1, int(self.length / 34))))


def attention_over_time(
    path: Path, layers: Mapping[int, np.ndarray], episode_starts: np.ndarray,
    rewards: np.ndarray, *, title: str, subtitle: str, dpi: int,
) -> None:  # fmt: skip
    """Draw one play.

    `layers`: number -> `(N, n_max + 1)` float, row t the query's attention at step t: to itself in
    the last column, to the latest transition before it; NaN where there is no history yet.
    `episode_starts (E,)` int, `rewards (N,)` bool: steps that begin an episode, that were rewarded.
    """
    n_down = math.ceil(len(layers) / (4 if len(layers) <= 12 else 6))
    across = math.ceil(len(layers) / n_down)
    known = np.logical_or.reduce([~np.isnan(rows).all(axis=0) for rows in layers.values()])
    n = max(1, len(known) - 1 - int(known.argmax()))  # transitions of the longest history
    back = Axis(n, WIDTHS[min(across, 6)], dpi / 100)
    steps = Axis(len(rewards), HEIGHTS[min(n_down, 4)], dpi / 100)
    right = max(MIN_PITCH, back.length + STRIP + QUERY + 2 * GAP + BESIDE)
    down = steps.length + BELOW
    width, bottom = max(MIN_WIDTH, LEFT + across * right + RIGHT), TOP + max(160, n_down * down)
    caption, room = _caption(back, steps), width - LEFT - MARGIN
    lines = [line for text in caption for line in in_lines(text, room, 8.5)]
    page = Page(width, bottom + 17 * len(lines) + FOOTER, dpi)
    page.heading(LEFT, title, subtitle)
    starts = episode_starts[: None if len(episode_starts) * MIN_EPISODE <= steps.length else 1]
    some = [rows[:: max(1, len(rows) // 64), -n - 1 :] for rows in layers.values()]
    scale = scale_of(np.stack(some), n + 1)
    for place, (layer, rows) in enumerate(layers.items()):
        left, top = LEFT + place % across * right, TOP + place // across * down
        page.text(left, top - 12, f"layer {layer}", 10, weight="bold")
        page.paste(left, top, _panel(rows[:, -n - 1 :], starts, rewards, back, steps, scale))
        _mark(page, left, top, back, steps, starts)
    corner = LEFT + across * right - 4, TOP + 14
    color_bar(page, corner, min(300, bottom - TOP - 40), scale, n + 1)
    page.column(LEFT, bottom, lines, 17, color=SOFT)
    page.save(path)


def _panel(
    rows: np.ndarray, starts: np.ndarray, rewards: np.ndarray, back: Axis, steps: Axis, scale: tuple
) -> np.ndarray:
    """Pixels: the strip of episodes and rewards, the map of the history, the query's own column."""
    cells = np.append(np.arange(0, steps.n, steps.pooled), steps.n)  # the last is of no step
    strip = history_strip(starts, np.ones(steps.n, bool), rewards, cells, len(starts))[:-1]
    weights = to_colours(pool(rows[:, :-1], back.pooled, steps.pooled), *scale)
    own = to_colours(rows[last_rows(steps.n, steps.pooled), -1], *scale)

    def wide(colours: np.ndarray, width: float) -> np.ndarray:  # (C, 3) of cells
        return colours[:, None].repeat(round(width * steps.scale), axis=1)

    gap, weights = wide(np.full_like(strip, 255), GAP), weights.repeat(back.zoom, axis=1)
    parts = wide(strip, STRIP), gap, weights, gap, wide(own, QUERY)
    return np.hstack(parts).repeat(steps.zoom, axis=0)


def _mark(page: Page, left: float, top: float, back: Axis, steps: Axis, starts: np.ndarray) -> None:
    """Name steps and transitions of a panel, and mark where an episode begins."""
    if left == LEFT:
        numbers = {top + steps.at(number + 0.5): number for number in steps.ticks(0, steps.n - 1)}
        page.ticks(numbers, left - 2, "left")
        page.text(left - 56, top + steps.length / 2, "step", 9, rotation=90, ha="center")
    left, bottom = left + STRIP + GAP, top + steps.length
    query = left + back.length + GAP + QUERY / 2
    names = {left + back.at(back.n - number + 0.5): number for number in back.ticks(1, back.n)}
    names = {query: "query"} | {x: name for x, name in names.items() if x < query - 23}  # clear
    page.ticks(names, bottom, "below")
    page.text(left + back.length / 2, bottom + 28, "transitions back", 9, ha="center")
    lines = [[(left, y), (query + QUERY / 2, y)] for y in top + steps.at(np.asarray(starts[1:]))]
    width = min(0.5, 0.36 * steps.zoom / steps.scale)  # points: thinner than a step
    page.lines(lines, colors="white", linewidths=width, alpha=LINE_ALPHA, snap=False)


def _caption(back: Axis, steps: Axis) -> tuple[str, ...]:
    every = "" if steps.pooled == 1 else f" (of {steps.pooled} steps the last is drawn)"
    mean = "" if back.pooled == 1 else f" A pixel is the mean of {back.pooled} transitions."
    return (
        f"A row: attention of the query token that decides at this step{every}, mean over heads. A "
        f"column: the transition so many steps back; query: itself.{mean} Blank: no history yet.",
        "Diagonals, down to the left: one transition, seen growing older. Vertical lines: a fixed "
        "age. Strip: rewarded steps in red. Its two greys, and white lines: episodes, unless they "
        "are too many to tell apart.",
        f"1/T: uniform attention over the longest context, T = {back.n + 1:,} tokens. While the "
        "history is still short, uniform attention is brighter than that.",
    )
