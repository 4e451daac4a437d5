"""The four summary metrics as pictures: their distribution over samples, their course over layers.

    summary("summary.png", {"entropy": values, ...}, {"entropy": 5.4, ...}, layer=2, dpi=100)
    course("layers.png", {"entropy": values, ...}, {"entropy": 5.4, ...}, layers=[0, 1], dpi=100)

Axes: `S` samples, `L` layers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator

from historylens.common.text import counted
from historylens.pictures.page import INK, SOFT, UNIFORM, UNIFORM_LINE, Page, inset

BLUE = "#3b7ea1"
BAND = {"colors": BLUE, "alpha": 0.2, "linewidths": 9}  # swatches of the legends
DOTS = {"colors": BLUE, "linewidths": 3, "capstyle": "round", "linestyles": (0, (0.01, 2.5))}
TICKS = {"colors": INK, "linewidths": 9, "linestyles": (0, (0.15, 0.5))}
MAX_MARKED_SAMPLES = 200  # beyond, samples are not marked one by one
ROUNDING = 1e-6  # of a number that was computed from float32 weights, relative to its size
LOG_SPAN = 100.0  # an axis is logarithmic where the values of a ratio span more
METRICS = {  # name -> place, title, meaning, unit
    "mean_context_attention": ((90, 136), "Mean context attention",
        "average weight on a transition of the history", "attention weight"),
    "concentration": ((590, 136), "Attention concentration",
        "standard deviation over the history; higher: more focused", "attention weight"),
    "entropy": ((90, 472), "Attention entropy",
        "higher: spread more evenly over the history", "nats"),
    "recent_distant_ratio": ((590, 472), "Recent/distant ratio",
        "mean weight of the last quarter / first quarter; above 1: recent", "ratio"),
}  # fmt: skip
Values = Mapping[str, Any]  # by the names of METRICS


def is_one(values: np.ndarray, even: float = 0.0) -> bool:
    """Whether values differ by rounding only, beside their size or that of their uniform value."""
    return bool(np.ptp(values) <= ROUNDING * max(abs(even), np.abs(values).max()))


def summary(path: str | Path, values: Values, uniform: Values, *, layer: int, dpi: int) -> None:
    """Draw the distribution of each metric `(S,)`, its mean, and its value if all were uniform."""
    import seaborn  # only this picture needs it, and it takes a while to import

    n_samples = len(values["entropy"])
    few = n_samples <= MAX_MARKED_SAMPLES
    more = [("single samples", TICKS)] if few else []
    page, plots = _page(f"Attention summary · layer {layer}", values, more, dpi, y="samples")
    for name, (axes, log) in plots.items():
        drawn, even = values[name], uniform[name]
        mean, spread, median = drawn.mean(), drawn.std(), np.median(drawn)
        numbers = f"mean {_short(mean)} ± {_short(spread)}"
        bins = int(np.clip(2 * np.sqrt(n_samples), 6, 40))
        if log:
            drawn = np.maximum(drawn, drawn[drawn > 0].min())
            numbers += f", median {_short(median)}"
        if is_one(drawn, even):  # one bar of a width that suits the distance to uniform attention
            half = 0.02 * (1.0 if is_one(np.append(drawn, even)) else abs(mean - even))
            drawn, bins = np.full(n_samples, mean), [max(0.0, mean - half), mean + half]
        style = {"log_scale": log, "color": BLUE, "edgecolor": "white"}
        seaborn.histplot(x=drawn, bins=bins, ax=axes, **style)
        if few:
            seaborn.rugplot(x=drawn, color=INK, height=0.05, ax=axes)
        axes.axvline(mean, color=INK, lw=2)
        axes.axvline(even, color=UNIFORM, lw=1.6, ls="--")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_locator(LogLocator(numticks=6) if log else MaxNLocator(5))
        if log:
            axes.xaxis.set_major_formatter("{:g}".format)
        axes.set_title(f"{numbers}; uniform {_short(even)}", fontsize=9, loc="left", pad=4)
    page.save(path)


def course(
    path: str | Path, values: Values, uniform: Values, *, layers: Sequence[int], dpi: int
) -> None:
    """Draw each metric `(L, S)` across layers: mean, middle 80 %, samples where they are few."""
    n_samples = values["entropy"].shape[1]
    few, several = 1 < n_samples <= MAX_MARKED_SAMPLES, n_samples > 1
    more = [("the middle 80 % of samples", BAND)] * several + [("single samples", DOTS)] * few
    page, plots = _page("Attention across layers", values, more, dpi, x="layer")
    x = np.arange(len(layers))
    shown = x[:: max(1, len(x) // 12)]
    for name, (axes, log) in plots.items():
        drawn, even = values[name], uniform[name]
        axes.fill_between(x, *np.quantile(drawn, [0.1, 0.9], axis=1), color=BLUE, alpha=0.2, lw=0)
        if few:
            axes.plot(x, drawn, "o", color=BLUE, ms=3, alpha=0.5, mew=0)
        axes.plot(x, drawn.mean(1), "o-", color=INK, lw=2, ms=5)
        axes.axhline(even, color=UNIFORM, lw=1.6, ls="--")
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{:g}".format)
            axes.minorticks_off()
        else:
            low, high = min(drawn.min(), even), max(drawn.max(), even)
            margin = 0.5 if is_one(np.append(drawn, even)) else 0.06 * (high - low)
            axes.set_ylim(max(low - margin, -0.06 * (high + margin)), high + margin)  # none is < 0
        axes.set_xlim(-0.4, len(layers) - 0.6)
        axes.set_xticks(shown, [str(layers[i]) for i in shown])
        inset(axes, METRICS[name][0][0] - 84)
    page.save(path)


def _page(
    title: str, values: Values, more: Sequence, dpi: int, x: str = "", y: str = ""
) -> tuple[Page, dict[str, tuple[Axes, bool]]]:
    """Axes of each metric, and whether it is to be logarithmic; its unit names the other axis."""
    page = Page(1020, 780, dpi)
    samples = counted(values["entropy"].shape[-1], "sample")
    about = "Attention of the query token to its history, averaged over heads"
    page.heading(90, f"{title} · {samples}", about)
    mean = "mean over samples", {"colors": INK, "linewidths": 2}
    legend = [mean, ("uniform attention", UNIFORM_LINE), *more]
    for place, (label, style) in zip((90, 270, 450, 700), legend, strict=False):
        page.swatch(place, 752, label, **style)
    plots = {}
    for name, ((left, top), title, meaning, unit) in METRICS.items():
        page.text(left, top - 50, title, 11, weight="bold")
        page.text(left, top - 32, meaning, 8.5, color=SOFT)
        positive = values[name][values[name] > 0]
        log = name == "recent_distant_ratio" and positive.size > 0
        log = log and bool(positive.max() > LOG_SPAN * positive.min())
        unit += " (log scale)" if log else ""
        axes = page.plot(left, top, 400, 200, x or unit, y or unit)
        axes.minorticks_off()
        axes.ticklabel_format(useOffset=False)
        plots[name] = axes, log
    return page, plots


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
