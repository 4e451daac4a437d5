"""Weights as colours: one logarithmic scale for a picture, and the bar that explains it.

page.paste(left, top, to_colours(pool(weights, 3), *scale_of(maps, n_tokens)))
"""

import math

import matplotlib
import numpy as np

from historylens.pictures.page import UNIFORM, Page

SHADES = matplotlib.colormaps["viridis"](np.arange(256), bytes=True)[:, :3]  # bright = strong
COLOURS = np.vstack([SHADES, np.full((1, 3), 255, np.uint8)])  # white: what may not be seen
BAR_WIDTH = 15


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
    index = np.where(np.isnan(place), 256, np.nan_to_num(place) + 0.5).astype(np.int16)
    return COLOURS[index]


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
    shades = SHADES[np.linspace(255, 0, round(height * page.scale)).astype(int)]
    page.paste(left, top, shades[:, None].repeat(round(BAR_WIDTH * page.scale), axis=1))
    page.text(left, top - 20, "attention weight", 9)

    def y(weight: float) -> float:
        return top + height * (1 - math.log(weight / low) / math.log(high / low))

    edge, even = left + BAR_WIDTH, 1 / n_tokens
    page.lines([[(edge - 19, y(even)), (edge + 4, y(even))]], colors=UNIFORM, linewidths=1.6)
    page.text(edge + 7, y(even), f"{even:.2g} = 1/T", 8.5, color=UNIFORM, weight="bold")
    page.text(edge + 7, y(even) + 13, "uniform attention", 7.5, color=UNIFORM)
    labels = {high: f"{high:.2g} or more" if high < 1 else "1", low: f"{low:.2g} or less"}
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    labels |= {10.0**e: f"{10.0**e:g}" for e in range(first, last + 1) if 10.0**e not in labels}
    taken = [y(even), y(even) + 13]
    for weight, label in labels.items():
        if min(abs(y(weight) - other) for other in taken) > 12:
            taken.append(y(weight))
            page.text(edge + 6, y(weight), label, 8)
