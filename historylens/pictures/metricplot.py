"""The four summary metrics as pictures: their distribution over samples, their course over layers.

    summary("summary.png", {"entropy": values, ...}, {"entropy": 5.4, ...}, layer=2, dpi=100)
    course("layers.png", {"entropy": values, ...}, {"entropy": 5.4, ...}, layers=[0, 1], dpi=100)

Axes: `S` samples, `L` layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from historylens.pictures.page import INK, SOFT, UNIFORM, UNIFORM_LINE, Page

BLUE = "#3b7ea1"
MAX_MARKED_SAMPLES = 200  # beyond, samples are not marked one by one
LOG_SPAN = 100.0  # an axis is logarithmic where the values of a ratio span more
WIDTH, HEIGHT = 400, 200
PLACES = ((90, 136), (590, 136), (90, 472), (590, 472))
METRICS = {  # name -> title, meaning, unit
    "mean_context_attention": (
        "Mean context attention",
        "average weight on a transition of the history",
        "attention weight",
    ),
    "concentration": (
        "Attention concentration",
        "standard deviation over the history; higher: more focused",
        "attention weight",
    ),
    "entropy": ("Attention entropy", "higher: spread more evenly over the history", "nats"),
    "recent_distant_ratio": (
        "Recent/distant ratio",
        "mean weight of the last quarter / first quarter; above 1: recent",
        "ratio",
    ),
}


def summary(
    path: str | Path,
    values: Mapping[str, np.ndarray],
    uniform: Mapping[str, float],
    *,
    layer: int,
    dpi: int,
) -> None:
    """Draw the distribution of each metric over samples, at `dpi` pixels an inch.

    `values` are `(S,)` by the names of `METRICS`, `uniform` the same under uniform attention.
    """
    n_samples = len(values["entropy"])
    note = "short ticks: single samples" if n_samples <= MAX_MARKED_SAMPLES else ""
    page = _page(f"Attention summary · layer {layer}", n_samples, dpi, note)
    for name, axes, unit, log in _plots(page, values):
        axes.set_xlabel(unit, fontsize=9)
        axes.set_ylabel("samples", fontsize=9)
        draw_distribution(axes, values[name], uniform[name], log)
    page.save(path)


def draw_distribution(axes: Axes, values: np.ndarray, uniform: float, log: bool) -> None:
    """Histogram of `values (S,)` with its mean and the value under uniform attention."""
    import seaborn  # only this picture needs it, and it takes a while to import

    drawn = np.maximum(values, values[values > 0].min()) if log else values
    style = {"color": BLUE, "edgecolor": "white", "ax": axes}
    if np.ptp(drawn) > 0:
        n_bins = int(np.clip(2 * np.sqrt(len(values)), 6, 40))
        seaborn.histplot(x=drawn, bins=n_bins, log_scale=log, **style)
    else:  # one bar of a width that suits the distance to uniform attention
        half = 0.02 * (abs(drawn[0] - uniform) or 1.0)
        seaborn.histplot(x=drawn, bins=[drawn[0] - half, drawn[0] + half], **style)
    if len(values) <= MAX_MARKED_SAMPLES:
        seaborn.rugplot(x=drawn, color=INK, height=0.05, ax=axes)
    axes.axvline(values.mean(), color=INK, lw=2)
    axes.axvline(uniform, color=UNIFORM, lw=1.6, ls="--")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    numbers = f"mean {_short(values.mean())} ± {_short(values.std())}"
    if log:
        axes.xaxis.set_major_formatter(_plain)
        numbers += f", median {_short(np.median(values))}"
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_title(f"{numbers}; uniform {_short(uniform)}", fontsize=9, loc="left", pad=4)


def course(
    path: str | Path,
    values: Mapping[str, np.ndarray],
    uniform: Mapping[str, float],
    *,
    layers: Sequence[int],
    dpi: int,
) -> None:
    """Draw each metric across `layers`, `L` numbers, at `dpi` pixels an inch.

    `values` are `(L, S)` by the names of `METRICS`, `uniform` the same under uniform attention.
    """
    n_samples = values["entropy"].shape[1]
    note = "band: the middle 80 % of samples"
    if n_samples <= MAX_MARKED_SAMPLES:
        note += "; dots: single samples"
    page = _page("Attention across layers", n_samples, dpi, note)
    for name, axes, unit, log in _plots(page, values):
        draw_course(axes, values[name], uniform[name], layers, log)
        axes.set_xlabel("layer", fontsize=9)
        axes.set_ylabel(unit, fontsize=9)
    page.save(path)


def draw_course(
    axes: Axes, values: np.ndarray, uniform: float, layers: Sequence[int], log: bool
) -> None:
    """`values (L, S)`: the middle 80 % of samples, every sample where they are few, the mean."""
    x = np.arange(len(layers))
    low, high = np.quantile(values, [0.1, 0.9], axis=1)
    axes.fill_between(x, low, high, color=BLUE, alpha=0.2, lw=0)
    if values.shape[1] <= MAX_MARKED_SAMPLES:
        axes.plot(x, values, "o", color=BLUE, ms=3, alpha=0.5, mew=0)
    axes.plot(x, values.mean(1), "o-", color=INK, lw=2, ms=5)
    axes.axhline(uniform, color=UNIFORM, lw=1.6, ls="--")
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain)
        axes.minorticks_off()
    else:
        ends = min(values.min(), uniform), max(values.max(), uniform)
        margin = 0.06 * (ends[1] - ends[0]) or 0.5
        axes.set_ylim(ends[0] - margin, ends[1] + margin)
    axes.set_xlim(-0.4, len(layers) - 0.6)
    shown = x[:: max(1, len(x) // 12)]
    axes.set_xticks(shown, [str(layers[i]) for i in shown])


def _page(title: str, n_samples: int, dpi: int, note: str) -> Page:
    page = Page(1020, 780, dpi)
    samples = "1 sample" if n_samples == 1 else f"{n_samples:,} samples"
    about = "Attention of the query token to its history, averaged over heads"
    page.heading(90, f"{title} · {samples}", about)
    page.swatch(90, 752, "mean over samples", colors=INK, linewidths=2)
    page.swatch(270, 752, "uniform attention", **UNIFORM_LINE)
    page.text(450, 752, note, 9)
    return page


def _plots(page: Page, values: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Axes, str, bool]]:
    """Name, axes and unit of each metric, its title written, and whether its axis is to be log."""
    for (name, (title, meaning, unit)), (left, top) in zip(METRICS.items(), PLACES, strict=True):
        page.text(left, top - 50, title, 11, weight="bold")
        page.text(left, top - 32, meaning, 8.5, color=SOFT)
        axes = page.plot(left, top, WIDTH, HEIGHT)
        axes.minorticks_off()
        log = name == "recent_distant_ratio" and spans_decades(values[name])
        yield name, axes, f"{unit} (log scale)" if log else unit, log


def spans_decades(values: np.ndarray) -> bool:
    """Whether values need a logarithmic axis, their zeros left out."""
    positive = values[values > 0]
    return bool(positive.size and positive.max() > LOG_SPAN * positive.min())


def _plain(value: float, _place: int) -> str:
    return f"{value:g}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
