"""A picture as a page of fixed places: a small PNG, drawn at once, or a PDF or SVG of vectors.

    page = Page(900, 400, dpi=100)                          # 9 x 4 inches
    axes = page.plot(60, 60, 380, 280)                      # ordinary matplotlib axes
    page.save("picture.png")                                # or .pdf, .svg

Places are in page units of 1/100 inch from the top left corner. What is drawn is there at once in
pixels; a vector file draws it again, what is pasted as an image. Same content, same bytes.
"""

import struct
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D

from historylens.common.errors import expect
from historylens.common.files import write_atomically

INK, SOFT, FAINT = "#222222", "#444444", "#8a8a8a"
REWARD, UNIFORM = "#e4572e", "#c4007a"
HUES = ("#0173b2", "#de8f05", "#029e73", "#cc78bc", "#ca9161", "#56b4e9")
RULER = RendererAgg(1, 1, 100)  # measures texts, at a pixel a page unit
MARGIN, BAR_WIDTH = 14, 15  # between text and the right edge; of a bar of colours: page units
UNIFORM_LINE = {"colors": UNIFORM, "linewidths": 1.6, "linestyles": "--"}
VECTORS = {
    "pdf.fonttype": 42,  # TrueType: journals refuse type 3, and text can be searched and edited
    "svg.fonttype": "path",  # looks the same where the font is missing: nothing leaves its place
    "svg.hashsalt": "historylens",  # ids that are the same each time
}
UNSAID = {  # by format: what would say when and by which version a file was written
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    "svg": {"Creator": None, "Date": None},
}


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format of the suffix, .png, .pdf or .svg, whole or not at all."""
    form = Path(path).suffix[1:]
    expect(form in UNSAID, f"expected a picture to end in .{', .'.join(UNSAID)}, got {path}")
    with rc_context(VECTORS):
        write_atomically(path, partial(figure.savefig, format=form, metadata=UNSAID[form]))


class _Pasted(Artist):
    def __init__(self, left: float, top: float, colours: np.ndarray, scale: float) -> None:
        super().__init__()
        size = np.array(colours.shape[1::-1]) / scale
        self._box, self._colours = Affine2D().scale(*size).translate(left, top), colours

    def draw(self, renderer: Any) -> None:
        opaque = np.full_like(self._colours[..., :1], 255)
        gc, rgba = renderer.new_gc(), np.dstack([self._colours, opaque])
        renderer.draw_image(gc, 0, 0, rgba, self._box + self.get_transform())
        gc.restore()


class _Shown(Figure):
    """A figure that draws all that its page shows, in that order, and then its axes."""

    shown: Sequence[Artist] = ()

    def draw(self, renderer: Any) -> None:
        height = self.get_figheight()  # inches, which are of other pixels than the page's
        places = Affine2D().scale(0.01, -0.01).translate(0, height) + self.dpi_scale_trans
        for artist in self.shown:
            artist.set_transform(places)
            artist.draw(renderer)
        super().draw(renderer)


class Page:
    """A white page of `width` x `height` page units."""

    def __init__(self, width: float, height: float, dpi: int) -> None:
        self.scale = dpi / 100  # pixels a page unit
        self.figure = _Shown(figsize=(width / 100, height / 100), dpi=dpi, frameon=False)
        self.figure.shown = self._shown = []
        self._size = np.array([width, height, width, height])
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()
        self._canvas = np.asarray(self._renderer.buffer_rgba())
        self._canvas[:] = 255  # white and opaque
        self.pixels = self._canvas[..., :3]  # RGB, a view of what is drawn
        self._places = Affine2D().scale(self.scale, -self.scale).translate(0, len(self.pixels))
        self._draw(Rectangle((0, 0), width, height, color="white", transform=self._places))

    def text(self, x: float, y: float, text: str, size: float = 9, **style: Any) -> None:
        """Write `text` at a place; `style` as for `matplotlib.text.Text`."""
        style = {"size": size, "color": INK, "va": "center", "parse_math": False} | style
        self._draw(Text(x, y, text, transform=self._places, **style))

    def column(
        self, x: float, y: float, texts: Sequence[str], step: float, size: float = 8.5, **style: Any
    ) -> None:
        """Write `texts` below each other, `step` apart."""
        for i, text in enumerate(texts):
            self.text(x, y + step * i, text, size, **style)

    def lines(self, segments: Sequence, **style: Any) -> None:
        """Draw segments `[(x0, y0), (x1, y1), ...]`; `style` as for `LineCollection`."""
        self._draw(LineCollection(segments, transform=self._places, **style))

    def paste(self, left: float, top: float, colours: np.ndarray) -> None:
        """Copy `colours (rows, columns, 3)` uint8 RGB to the page, a pixel each."""
        row, column = round(top * self.scale), round(left * self.scale)
        n_rows, n_columns, _ = colours.shape
        self.pixels[row : row + n_rows, column : column + n_columns] = colours
        self._shown.append(_Pasted(left, top, colours, self.scale))

    def heading(self, left: float, title: str, subtitle: str) -> None:
        """Write the title and the subtitle at the top, made to fit: two lines for the latter."""
        room = float(self._size[0]) - left - MARGIN
        size = 14 * min(1.0, room / text_width(title, 14, "bold"))
        self.text(left, 22, title, size, weight="bold")
        for size in (10.5, 9, 7.5):
            if len(lines := in_lines(subtitle, room, size)) <= 2:
                break
        else:
            lines[1] = f"{lines[1][:-1]}…"
        self.column(left, 46, lines[:2], 16, size)

    @staticmethod
    def numbers(low: int, high: int, most: int) -> list[int]:
        """About `most` round whole numbers of `low` to `high`, for `ticks` to name."""
        values = MaxNLocator(most, integer=True, steps=[1, 2, 5, 10]).tick_values(low, high)
        return [int(value) for value in values if low <= value <= high]

    def ticks(self, names: Mapping, edge: float, side: str, width: float = 0.7) -> None:
        """Name places, `{place: name}`, on the lower ("below") or left ("left") edge of a plot."""
        for place, name in names.items():
            line, at, ha = [(edge - 4, place), (edge, place)], (edge - 7, place), "right"
            if side == "below":
                line, at, ha = [(place, edge), (place, edge + 4)], (place, edge + 12), "center"
            self.lines([line], colors=FAINT, linewidths=width)
            self.text(*at, f"{name}", 8, ha=ha)

    def swatch(self, x: float, y: float, label: str, **style: Any) -> None:
        """An entry of a legend: a piece of a line, and what it stands for."""
        self.lines([[(x, y), (x + 26, y)]], **style)
        self.text(x + 32, y, label, 9)

    def bar(self, left: float, top: float, height: float, shades: np.ndarray, title: str) -> None:
        """A bar of colours `(256, 3)` with its title, the last on top."""
        colours = shades[np.linspace(255, 0, round(height * self.scale)).astype(int)]
        self.paste(left, top, colours[:, None].repeat(round(BAR_WIDTH * self.scale), axis=1))
        self.text(left, top - 20, title, 9)

    def plot(
        self, left: float, top: float, width: float, height: float, x: str = "", y: str = ""
    ) -> Axes:
        """Ordinary axes at a place, `x` and `y` their names; they are drawn by `save`."""
        box = (left, self._size[1] - top - height, width, height) / self._size
        axes = self.figure.add_axes(tuple(box))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8.5)
        axes.set_xlabel(x, fontsize=9)
        axes.set_ylabel(y, fontsize=9)
        return axes

    def keep(self) -> None:
        """Remember the page as it is, for `restore`."""
        self._kept = self._canvas.copy(), len(self._shown)

    def restore(self) -> None:
        """Go back to the page that was kept."""
        canvas, n_shown = self._kept
        np.copyto(self._canvas, canvas)  # whole pixels: a row is one block of memory
        del self._shown[n_shown:]

    def save(self, path: str | Path) -> None:
        """Draw the axes of `plot` and write the page, whole or not at all: see `save_figure`."""
        if Path(path).suffix != ".png":
            return save_figure(self.figure, path)
        if self.figure.axes:
            Figure.draw(self.figure, self._renderer)  # all else is there
        write_atomically(path, png(self.pixels, self.figure.dpi))

    def _draw(self, artist: Artist) -> None:
        artist.set_figure(self.figure)
        artist.draw(self._renderer)
        self._shown.append(artist)


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width of a text in page units, a little more than it takes at any resolution."""
    font = FontProperties(size=size, weight=weight)
    return 1.03 * RULER.get_text_width_height_descent(text, font, False)[0]


def in_lines(text: str, width: float, size: float, weight: str = "normal") -> list[str]:
    """A text in lines of at most `width` page units; a word that is wider is cut."""
    lines = []

    def width_of(end: int) -> float:
        return text_width(text[:end], size, weight)

    text = text if width_of(len(text)) <= width else text.strip(" ")
    while len(text) > 1 and width_of(len(text)) > width:
        fits = max(1, bisect_right(range(1, len(text)), width, key=width_of))
        space = text.rfind(" ", 1, fits + 1)
        cut = fits if space < 0 else space
        lines.append(text[:cut].rstrip(" "))
        text = text[cut:].lstrip(" ")
    return [*lines, text]


def inset(axes: Axes, limit: float) -> None:
    """Move the left edge of a plot in where its names reach beyond `limit`, in page units."""
    figure = axes.get_figure()
    missing = limit * figure.dpi / 100 - axes.yaxis.get_tightbbox().x0  # pixels
    if missing > 0:
        left, bottom, width, height = axes.get_position().bounds
        missing /= figure.bbox.width
        axes.set_position((left + missing, bottom, width - missing, height))


def png(pixels: np.ndarray, dpi: float) -> bytes:
    """`pixels (rows, columns, 3)` uint8 RGB as a PNG file; unfiltered it is smaller, and sooner."""
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
