"""The room as a map: where in it the query's attention lies, a panel a layer or a head."""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.patheffects import withStroke

from historylens.common.text import counted
from historylens.pictures.page import BAR_WIDTH, FAINT, INK, REWARD, SOFT, Page, text_width

END = 16  # times what is uniform, at the bright end of the colours; a 16th at the dark one
RATIOS = f"x{END} or more", "x4", "1, as if uniform", "1/4", f"1/{END} or less"
SHADES = matplotlib.colormaps["cividis"](np.arange(256), bytes=True)[:, :3]  # blue, grey, yellow
COLOURS = np.vstack([SHADES, np.full((1, 3), 255, np.uint8)])  # white: nothing to attend to
BOX = np.array([(-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5), (-0.5, -0.5)])  # of a cell
# Strokes across a cell, which go on in the next.
HATCH = np.array([[(-0.5, 0), (0, -0.5)], [(0.5, -0.5), (-0.5, 0.5)], [(0.5, 0), (0, 0.5)]])
DOT = np.array([(0, 0), (0.01, 0.01)])  # a line of no length is not drawn
SIDES, SMALLEST, LARGEST = {1: 420, 2: 320, 3: 270}, 16, 56  # of maps by panels in a row; of cells
LEFT, TOP, RIGHT, GAP, BETWEEN, BELOW = 66, 100, 164, 28, 40, 58
BAR, ICON, LINE = 190, 30, 16
CAPTION = (  # lines
    "A cell's colour: the query's attention on transitions that ended there (their next state),",
    "divided by what uniform attention would put on them. Yellow: chosen; dark blue: ignored;",
    "grey: as if uniform. A panel is the mean over a layer's heads, or a head where one is named.",
)
LEGEND = (  # in the order in which they are drawn
    "no transition that the model reads ended here: nothing to attend to",
    "a step of the current episode, as far back as the model reads",
    "steps of the current episode that stayed in place: here 3",
    "where the agent is now: the state in which it acts",
    "the goal, where it is known; 1, 2: in this order",
    "rewarded transitions ended here",
)


class Grid(NamedTuple):
    """Cells on a page: places are (row, column), whole in the middle of a cell, row 0 on top."""

    page: Page
    left: float
    top: float
    cell: float  # page units

    def at(self, places: Any) -> np.ndarray:
        """The page's x and y `(..., 2)` of places `(..., 2)`."""
        return (np.asarray(places)[..., ::-1] + 0.5) * self.cell + (self.left, self.top)

    def lines(self, paths: Sequence, colour: str, width: float, edge: str = "") -> None:
        """Draw paths `(points, 2)` so many cells wide, within an edge of another colour if any."""
        for shade, wide in ((edge, width + 0.06), (colour, width)):
            if shade and len(paths):
                style = {"colors": shade, "linewidths": 0.72 * self.cell * wide}
                self.page.lines([self.at(path) for path in paths], capstyle="round", **style)


def room_map(
    path: Path, room: Any, names: Sequence[str], title: str, subtitle: str, *,
    across: int | None = None, dpi: int,
) -> None:  # fmt: skip
    """Draw an `analysis.room.RoomMap`, its panels called `names`, `across` of them in a row."""
    n = int(room.visits.sum())
    page, grids = _sheet(tuple(names), room.even.shape, across, dpi)
    page.restore()
    page.heading(LEFT, title, f"{subtitle} · {counted(n, 'transition') if n else 'no history yet'}")
    masses = room.attention.sum(axis=(1, 2))
    for grid, name, ratio, mass in zip(grids, names, room.ratio, masses, strict=True):
        name += f" · {mass:.0%} on history" if n else ""
        page.text(grid.left, grid.top - 11, name, 9, weight="bold")
        _draw_cells(grid, ratio)
        steps = np.stack([room.path[:-1], room.path[1:]], axis=1)
        _draw_marks(grid, steps, room.path[-1:], room.goals, np.argwhere(room.rewarded))
    page.save(path)


@lru_cache(maxsize=2)
def _sheet(
    names: tuple[str, ...], shape: tuple[int, int], across: int | None, dpi: int
) -> tuple[Page, list[Grid]]:
    """What all maps of one room have in common, drawn once."""
    n_rows, n_columns = shape
    across = across or min(len(names), math.ceil(math.sqrt(len(names) * n_rows / n_columns)))
    wanted, most = np.array([SIDES.get(across, 230), 500]) / max(n_rows, n_columns)
    wanted = min(max(wanted, SMALLEST), most, LARGEST)
    cell = math.ceil(wanted * dpi / 100) * 100 / dpi  # a whole number of pixels
    widths = [text_width(f"{name} · 100% on history", 9, "bold") for name in names]
    right = max(n_columns * cell, *widths) + GAP
    down, n_down = n_rows * cell + BETWEEN, math.ceil(len(names) / across)
    end = TOP + max(n_down * down - BETWEEN, BAR) + BELOW
    width = max(LEFT + across * right + RIGHT, 740)
    below = end + LINE * len(CAPTION) + 6
    page, grids = Page(width, below + ICON * len(LEGEND) + 20, dpi), []
    for i in range(len(names)):
        grids.append(Grid(page, LEFT + i % across * right, TOP + i // across * down, cell))
        _number(grids[i], shape, i % across == 0, i + across >= len(names))
    bar = LEFT + across * right
    page.bar(bar, TOP, BAR, SHADES, "attention / uniform")
    page.column(bar + BAR_WIDTH + 8, TOP, RATIOS, BAR / 4)
    page.column(LEFT, end, CAPTION, LINE, color=SOFT)
    icons = Grid(page, LEFT, below, ICON)  # a line a mark, drawn as on the maps
    _draw_cells(icons, np.array([[np.nan], *[[1]] * (len(LEGEND) - 1)]))
    steps = np.array([[(1, -0.5), (1, 0.5)], *[[(2, 0), (2, 0)]] * 3])
    _draw_marks(icons, steps, *(np.array([(row, 0)]) for row in (3, 4, 5)))
    page.column(LEFT + ICON + 10, below + ICON / 2, LEGEND, ICON, color=SOFT)
    page.keep()
    return page, grids


def _draw_cells(grid: Grid, ratio: np.ndarray) -> None:
    """Colours of ratios `(R, C)`; NaN is hatched."""
    place = np.log(np.clip(ratio, 1 / END, END)) / math.log(END)  # -1 to 1
    shades = np.nan_to_num(np.rint(place * 127.5 + 127.5), nan=256).astype(int)
    zoom, shape, is_blank = round(grid.cell * grid.page.scale), np.array(ratio.shape), shades == 256
    grid.page.paste(grid.left, grid.top, COLOURS[shades].repeat(zoom, 0).repeat(zoom, 1))
    blank = np.argwhere(is_blank)[:, None, None]
    grid.lines((blank + HATCH).reshape(-1, 2, 2), "#b4b4b4", 0.03)
    grid.lines(np.argwhere(~is_blank)[:, None] + BOX, "white", 0.02)
    grid.page.lines([grid.at(BOX * shape + (shape - 1) / 2)], colors=FAINT, linewidths=0.8)


def _draw_marks(
    grid: Grid, steps: np.ndarray, agent: np.ndarray, goals: np.ndarray, paid: np.ndarray
) -> None:
    """Draw steps `(K, 2, 2)`, from and to, and what is in cells `(N, 2)`."""
    grid.lines(goals[:, None] + 0.88 * BOX, REWARD, 0.08, "white")
    size = min(9, 0.28 * grid.cell)
    edge = [withStroke(linewidth=size / 4, foreground=INK)]
    style = {"ha": "center", "weight": "bold", "color": "white", "path_effects": edge}
    length = np.hypot(*(steps[:, 1] - steps[:, 0]).T)
    moves, stays = steps[length > 0], steps[length == 0, 0]
    along = (moves[:, 1] - moves[:, 0]) / length[length > 0, None]
    side = 0.13 * along[:, ::-1] * (1, -1)  # to its right: the way back has a lane of its own
    begin, tip = moves[:, 0] + 0.2 * along + side, moves[:, 1] - 0.2 * along + side
    back = tip - 0.17 * along
    heads = np.stack([back - side, tip, back + side], axis=1)
    grid.lines([*np.stack([begin, tip], axis=1), *heads], "white", 0.07, INK)
    for colour, width in (("white", 0.34), (INK, 0.12)):
        grid.lines(agent[:, None] + DOT - 0.06, colour, width, INK)
    grid.lines(paid[:, None] + DOT + (-0.28, 0.28), REWARD, 0.2, "white")
    for place, count in zip(*np.unique(stays, axis=0, return_counts=True), strict=True):
        text = f"↻{count}" if count > 1 else "↻"
        grid.page.text(*grid.at(place + (0.27, 0.14)), text, size, **style)
    for i, place in enumerate(goals if len(goals) > 1 else ()):  # two may be in one cell
        grid.page.text(*grid.at(place + (-0.27, 0.25 * i - 0.28)), f"{i + 1}", size, **style)


def _number(grid: Grid, shape: tuple[int, int], has_rows: bool, has_columns: bool) -> None:
    """Number the rows on the left and the columns below, as many as there is space for."""
    page, step = grid.page, next(s for s in (1, 2, 5, 10, 20, 50) if s * grid.cell >= 18)
    bottom, (x, y) = grid.top + shape[0] * grid.cell, grid.at(np.subtract(shape, 1) / 2)
    rows, columns = range(0, shape[0] * has_rows, step), range(0, shape[1] * has_columns, step)
    page.ticks({grid.at((i, i))[1]: i for i in rows}, grid.left, "left")
    page.ticks({grid.at((i, i))[0]: i for i in columns}, bottom, "below")
    page.text(grid.left - 38, y, "row" * has_rows, 9, rotation=90, ha="center")
    page.text(x, bottom + 27, "column" * has_columns, 9, ha="center")
