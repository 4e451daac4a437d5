"""A picture as a page of fixed places, drawn at once and written as a small PNG quickly.

    page = Page(900, 400, dpi=100)                          # 9 x 4 inches
    page.text(60, 30, "Attention", size=13, weight="bold")
    axes = page.plot(60, 60, 380, 280)                      # ordinary matplotlib axes
    page.save("picture.png")

Places are in page units of 1/100 inch from the top left corner. Nothing is measured or moved while
drawing (no tight layout), and `keep` and `restore` let pictures of one kind share what they have in
common. The same content gives the same bytes: the file holds no date and no version.
"""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Affine2D

from attention.samples import Sample
from attention.tokens import PADDING

DPI = 100
INK, SOFT, FAINT = "#222222", "#444444", "#8a8a8a"
REWARD, UNIFORM = "#e4572e", "#c4007a"
EPISODE_GREYS = (200, 238)
MAX_EPISODE_LINES = 40  # more boundaries than this hide what they mark


class Page:
    """A white page of `width` x `height` page units.

    Attributes:
        pixels: `(height, width, 3)` uint8 RGB, a view of what is drawn.
    """

    def __init__(self, width: float, height: float, dpi: int) -> None:
        self.height, self.scale = height, dpi / 100
        self.figure = Figure(figsize=(width / 100, height / 100), dpi=dpi, frameon=False)
        self._size = np.array([width, height, width, height])
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()
        self._canvas = np.asarray(self._renderer.buffer_rgba())
        self._canvas[:] = 255  # white and opaque
        self.pixels = self._canvas[..., :3]
        flip = Affine2D().scale(self.scale, -self.scale).translate(0, self.pixels.shape[0])
        self._places = flip
        self._kept = self._canvas.copy()
        self._dpi = dpi

    def text(self, x: float, y: float, text: str, size: float = 9, **style: Any) -> None:
        """Write `text` at a place; `style` as for `matplotlib.text.Text`."""
        style = {"size": size, "color": INK, "va": "center", "parse_math": False} | style
        self._draw(Text(x, y, text, transform=self._places, **style))

    def lines(self, segments: Sequence, **style: Any) -> None:
        """Draw segments `[(x0, y0), (x1, y1), ...]`; `style` as for `LineCollection`."""
        self._draw(LineCollection(segments, transform=self._places, **style))

    def fill(self, corners: np.ndarray, **style: Any) -> None:
        """Fill the polygon with `corners (N, 2)`; `style` as for `PolyCollection`."""
        self._draw(PolyCollection([corners], transform=self._places, **style))

    def paste(self, left: float, top: float, colours: np.ndarray) -> None:
        """Copy `colours (rows, columns, 3)` uint8 RGB to the page, a pixel each."""
        row, column = round(top * self.scale), round(left * self.scale)
        self.pixels[row : row + colours.shape[0], column : column + colours.shape[1]] = colours

    def plot(self, left: float, top: float, width: float, height: float) -> Axes:
        """Ordinary axes at a place; they are drawn by `save`."""
        box = (left, self.height - top - height, width, height) / self._size
        axes = self.figure.add_axes(tuple(box))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8.5)
        return axes

    def keep(self) -> None:
        """Remember the page as it is, for `restore`."""
        self._kept = self._canvas.copy()

    def restore(self) -> None:
        """Go back to the page that was kept."""
        np.copyto(self._canvas, self._kept)  # whole pixels: a row is one block of memory

    def save(self, path: str | Path) -> None:
        """Draw the axes of `plot` and write the page as PNG."""
        if self.figure.axes:
            self.figure.draw(self._renderer)
        Path(path).write_bytes(png(self.pixels, self._dpi))

    def _draw(self, artist: Artist) -> None:
        artist.set_figure(self.figure)
        artist.draw(self._renderer)


def png(pixels: np.ndarray, dpi: int) -> bytes:
    """`pixels (rows, columns, 3)` uint8 RGB as a PNG file.

    Unfiltered rows and the fastest compression: for flat colours and repeated rows less than half
    the time and three quarters of the size of what an adaptive filter gives.
    """
    n_rows, n_columns, _ = pixels.shape
    rows = np.zeros((n_rows, 1 + 3 * n_columns), dtype=np.uint8)  # a leading 0: no filter
    for channel in range(3):  # numpy copies long strided runs faster than triples
        rows[:, 1 + channel :: 3] = pixels[:, :, channel]
    dots_per_metre = round(dpi / 0.0254)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", n_columns, n_rows, 8, 2, 0, 0, 0),
        b"pHYs": struct.pack(">IIB", dots_per_metre, dots_per_metre, 1),
        b"IDAT": zlib.compress(rows, 1),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )


def rgb(colour: str) -> tuple[int, int, int]:
    """`"#rrggbb"` as three numbers in 0..255."""
    return tuple(bytes.fromhex(colour[1:]))


def subtitle(sample: Sample) -> str:
    """The line that says which decision a picture shows, and how long its context is."""
    tokens = sample.tokens
    n = sample.n_context if tokens is None else tokens.n
    transitions = "1 transition" if n == 1 else f"{n:,} transitions"
    if tokens is not None and not tokens.is_plain:
        n_shown = len(tokens) - tokens.part.count(PADDING)
        return f"{sample.title} · {transitions}, T = {n_shown:,} tokens"
    return f"{sample.title} · {transitions} and the query: T = {sample.n_context + 1:,} tokens"


def history_colours(sample: Sample, starts: np.ndarray) -> np.ndarray:
    """Colours of a strip that shows the history: episodes in two greys, rewards in red.

    Args:
        sample: whose tokens they are.
        starts: `(C,)` int, first token of each cell of the strip, ascending.

    Returns:
        `(C, 3)` uint8 RGB. A cell of several tokens is as red as their share that was rewarded;
        the query token is white. One grey throughout where episodes are too many to tell apart.
    """
    episodes = sample.episode_starts
    if len(episodes) > MAX_EPISODE_LINES:
        episodes = episodes[:1]
    grey = np.take(EPISODE_GREYS, np.searchsorted(episodes, starts, side="right") % 2)
    n_rewarded = np.add.reduceat(np.append(sample.rewarded, False).astype(float), starts)
    share = n_rewarded / np.diff(np.append(starts, sample.n_context + 1))
    colours = grey[:, None] + share[:, None] * (np.array(rgb(REWARD)) - grey[:, None])
    colours[starts >= sample.n_context] = 255
    return np.rint(colours).astype(np.uint8)
