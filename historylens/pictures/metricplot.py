"""Attention as a whole: summary metrics over samples and over layers, and its course over episodes.

Axes: `S` samples, `L` layers, `E` episodes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

from historylens.common.text import counted
from historylens.pictures.page import FAINT, INK, REWARD, SOFT, UNIFORM, UNIFORM_LINE, Page, inset

BLUE = "#3b7ea1"
BAND = {"colors": BLUE, "alpha": 0.2, "linewidths": 9}  # swatches of the legends
DOTS = {"colors": BLUE, "linewidths": 3, "capstyle": "round", "linestyles": (0, (0.01, 2.5))}
TICKS = {"colors": INK, "linewidths": 9, "linestyles": (0, (0.15, 0.5))}
MAX_MARKED_SAMPLES = 200  # beyond, samples are not marked one by one
ROUNDING = 1e-6  # of a number that was computed from float32 weights, relative to its size
LOG_SPAN = 100.0  # an axis is logarithmic where the values of a ratio span more
METRICS = {  # name -> place, title, meaning, unit, what a line marks
    "mean_context_attention": ((90, 136), "Mean context attention",
        "average weight on a transition of the history", "attention weight", np.mean),
    "concentration": ((590, 136), "Attention concentration",
        "standard deviation over the history; higher: more focused", "attention weight", np.mean),
    "entropy": ((90, 472), "Attention entropy",
        "higher: spread more evenly over the history", "nats", np.mean),
    "recent_distant_ratio": ((590, 472), "Recent/distant ratio",
        "mean weight of the last quarter / first quarter; above 1: recent", "ratio", np.median),
}  # fmt: skip
Values = Mapping[str, Any]  # by the names of METRICS
KINDS = {  # of transitions: colour, marker, which they are
    "current episode": ("#08306b", "o", "transitions of the episode that is being played"),
    "last episode": ("#2f7fc1", "s", "of the episode before it"),
    "older": ("#8ec1e8", "^", "of all episodes before that"),
    "rewarded": (REWARD, "D", "of any episode, that were rewarded"),
    "same state": ("#029e73", "v", "of any episode, begun in the state in which the agent stands"),
}
VIEWS = {  # columns: title, name of the axis
    "by_episode": ("By episode", "episode of the rollout"),
    "since_first_reward": ("Since each rollout's first reward", "episodes since the first reward"),
}
LEFT, WIDTH, BESIDE = 84, 470, 90  # of a column; between the two
PAGE_WIDTH = LEFT + 2 * WIDTH + BESIDE + 36
LEGEND, TOP = 80, 250
REWARDS, PANEL, BELOW = 140, 170, 72  # heights, and what stands between two panels
MAX_MARKED = 120  # episodes; beyond, points are not marked one by one
ENTRIES = {"loc": "upper left", "frameon": False, "fontsize": 9, "borderpad": 0}  # of the legends


def is_one(values: np.ndarray, even: float = 0.0) -> bool:
    """Whether values differ by rounding only, beside their size or that of their uniform value."""
    return bool(np.ptp(values) <= ROUNDING * max(abs(even), np.abs(values).max()))


def summary(
    path: Path, values: Values, uniform: Values, *, layer: int, heads: str, dpi: int
) -> None:
    """Draw the distribution of each metric `(S,)`, its middle, and uniform attention's."""
    import seaborn  # only this picture needs it, and it takes a while to import

    n_samples = len(values["entropy"])
    few = n_samples <= MAX_MARKED_SAMPLES
    more = [("single samples", TICKS)] if few else []
    page, plots = _page(f"Attention summary · layer {layer}", values, heads, more, dpi, y="samples")
    for name, (axes, log) in plots.items():
        drawn, even = values[name], uniform[name]
        mean, middle = drawn.mean(), METRICS[name][-1](drawn)
        numbers = f"mean {_short(mean)} ± {_short(drawn.std())}"
        numbers += f", median {_short(middle)}" * (METRICS[name][-1] is np.median)
        bins = int(np.clip(2 * np.sqrt(n_samples), 6, 40))
        if log:
            drawn = np.maximum(drawn, drawn[drawn > 0].min())
        if is_one(drawn, even):  # one bar of a width that suits the distance to uniform attention
            half = 0.02 * (1.0 if is_one(np.append(drawn, even)) else abs(mean - even))
            drawn, bins = np.full(n_samples, mean), [max(0.0, mean - half), mean + half]
        seaborn.histplot(x=drawn, bins=bins, ax=axes, log_scale=log, color=BLUE, edgecolor="white")
        if few:
            seaborn.rugplot(x=drawn, color=INK, height=0.05, ax=axes)
        axes.axvline(middle, color=INK, lw=2)
        axes.axvline(even, color=UNIFORM, lw=1.6, ls="--")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_locator(LogLocator(numticks=6) if log else MaxNLocator(5))
        if log:
            axes.xaxis.set_major_formatter("{:g}".format)
        axes.set_title(f"{numbers}; uniform {_short(even)}", fontsize=9, loc="left", pad=4)
    page.save(path)


def course(
    path: Path, values: Values, uniform: Values, *, layers: Sequence[int], heads: str, dpi: int
) -> None:
    """Draw each metric `(L, S)` across layers: mean (of ratios median), middle 80 %, samples."""
    n_samples = values["entropy"].shape[1]
    few, several = 1 < n_samples <= MAX_MARKED_SAMPLES, n_samples > 1
    more = [("the middle 80 % of samples", BAND)] * several + [("single samples", DOTS)] * few
    page, plots = _page("Attention across layers", values, heads, more, dpi, x="layer")
    x = np.arange(len(layers))
    shown = x[:: max(1, len(x) // 12)]
    for name, (axes, log) in plots.items():
        drawn, even = values[name], uniform[name]
        axes.fill_between(x, *np.quantile(drawn, [0.1, 0.9], axis=1), color=BLUE, alpha=0.2, lw=0)
        if few:
            axes.plot(x, drawn, "o", color=BLUE, ms=3, alpha=0.5, mew=0)
        axes.plot(x, METRICS[name][-1](drawn, axis=1), "o-", color=INK, lw=2, ms=5)
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
    title: str, values: Values, heads: str, more: Sequence, dpi: int, x: str = "", y: str = ""
) -> tuple[Page, dict[str, tuple[Axes, bool]]]:
    """Axes of each metric, and whether it is to be logarithmic; its unit names the other axis."""
    page = Page(1020, 780, dpi)
    about = f"Attention of the query token to its history, averaged over {heads}"
    page.heading(90, f"{title} · {counted(values['entropy'].shape[-1], 'sample')}", about)
    mean = "mean over samples (ratio: median)", {"colors": INK, "linewidths": 2}
    legend = [mean, ("uniform attention", UNIFORM_LINE), *more]
    for place, (label, style) in zip((90, 395, 565, 805), legend, strict=False):
        page.swatch(place, 752, label, **style)
    plots = {}
    for name, ((left, top), title, meaning, unit, _) in METRICS.items():
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


def attention_over_learning(path: Path, learning: Mapping, *, title: str, dpi: int) -> None:
    """Draw reward and attention over episodes, each with its 95 % interval over rollouts.

    `learning`: `kinds`, which of `KINDS` are known; `n_rollouts`; `n_decisions`; `best` possible
    reward an episode, or None; `first_reward`, whose `above` a reward has to be; `by_episode` and
    `since_first_reward`, None without any reward. These hold lists of `E`, None for a missing
    value: `episode`; `rollouts`, how many are there; `reward` as `{"mean", "low", "high"}`;
    `layers`, each with `layer` and `shares`, kind -> the same three; `even`, kind -> uniform share.
    """
    height = TOP + REWARDS + len(learning["by_episode"]["layers"]) * (BELOW + PANEL) + BELOW - 12
    page = Page(PAGE_WIDTH, height, dpi)
    about = (
        f"{counted(learning['n_rollouts'], 'rollout')}, {learning['n_decisions']:,} decisions: "
        "attention of the query token, mean over heads and an episode. The kinds overlap: current, "
        "last and older episodes (blue) add up to the attention on history, the rest lies on the "
        "query itself; rewarded and same state are among them."
    )
    page.heading(LEFT, title, about)
    rewards, shares, above = [], [], learning["first_reward"]["above"]
    above = f" above {above:g}" if above else ""
    for place, (name, (heading, unit)) in enumerate(VIEWS.items()):
        left, view = LEFT + place * (WIDTH + BESIDE), learning[name]
        page.text(left, TOP - 40, heading + above * (place > 0), 11, weight="bold")
        if view is None:
            page.text(left, TOP + 20, f"No rollout earned a reward{above}.", 10, color=SOFT)
            continue
        rewards.append(_panel(page, (left, TOP, WIDTH, REWARDS), view, unit, "reward an episode"))
        _draw_reward(rewards[-1], view, learning["best"])
        for row, layer in enumerate(view["layers"]):
            place = left, TOP + REWARDS + BELOW + row * (PANEL + BELOW), WIDTH, PANEL
            shares.append(_panel(page, place, view, unit, "share of attention"))
            _draw_shares(shares[-1], view, layer, learning["kinds"])
    for axes in rewards[1:]:
        axes.sharey(rewards[0])
    rewards[0].autoscale_view(scalex=False)
    for axes, x in ((shares[0], LEFT), (rewards[0], LEFT + WIDTH + BESIDE)):
        corner = (x - 10) / PAGE_WIDTH, 1 - LEGEND / height
        page.figure.legend(*axes.get_legend_handles_labels(), bbox_to_anchor=corner, **ENTRIES)
    page.save(path)


def _panel(page: Page, place: tuple, view: Mapping, unit: str, name: str) -> Axes:
    """Axes of episodes, the first reward marked."""
    axes, first, last = page.plot(*place, unit, name), view["episode"][0], view["episode"][-1]
    margin = max(0.5, 0.015 * (last - first))
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="#eeeeee", lw=0.8)
    if first <= 0:
        axes.axvline(0, color=FAINT, lw=1.2, zorder=1)
    return axes


def _draw_reward(axes: Axes, view: Mapping, best: float | None) -> None:
    """Reward an episode, with names of what all panels have in common, and how many rollouts."""
    first = view["episode"][0]
    axes.update_datalim([(first, 0.0), (first, 0.0 if any(view["reward"]["mean"]) else 1.0)])
    band = "95 % interval, where there are at least 2 rollouts"
    _draw_line(axes, view, view["reward"], (INK, "o", "mean over rollouts"), band)
    axes.plot([], [], color=SOFT, lw=1.0, ls="--", label="what uniform attention would give")
    if best is not None:
        axes.axhline(best, color=INK, lw=1.2, ls=":", label=f"best possible reward: {best:.4g}")
    if len(set(view["rollouts"])) > 1:
        style = {"transform": axes.get_xaxis_transform(), "size": 8, "color": SOFT}
        axes.text(axes.get_xlim()[0], 1.06, "rollouts   ", ha="right", **style)
        for tick in set(axes.get_xticks()) & set(view["episode"]):
            axes.text(tick, 1.06, view["rollouts"][int(tick) - first], ha="center", **style)


def _draw_shares(axes: Axes, view: Mapping, layer: Mapping, kinds: Sequence[str]) -> None:
    """Attention of a layer on each kind of transitions, and what it would be if it were even."""
    for kind in kinds:
        (colour, marker, which), even = KINDS[kind], np.array(view["even"][kind], dtype=float)
        style = {"color": colour, "lw": 1.0, "ls": "--", "marker": "_", "ms": 12}
        axes.plot(view["episode"], even, markevery=_alone(even), zorder=2, **style)
        _draw_line(axes, view, layer["shares"][kind], (colour, marker, f"{kind}: {which}"))
    axes.set_title(f"layer {layer['layer']}", loc="left", y=1.0, fontsize=10, fontweight="bold")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(-0.03, 1.03)


def _draw_line(axes: Axes, view: Mapping, own: Mapping, look: tuple, band: str = "") -> None:
    """A mean `(E,)` and its interval, which fewer than two rollouts do not have."""
    (colour, marker, label), x = look, np.array(view["episode"])
    mean, *ends = (np.array(own[name], dtype=float) for name in ("mean", "low", "high"))
    low, high = (np.where(np.array(view["rollouts"]) < 2, np.nan, end) for end in ends)
    alone = _alone(mean)
    axes.fill_between(x, low, high, color=colour, alpha=0.16, lw=0, label=band)
    if bars := [place for place in alone if not np.isnan(low[place])]:
        axes.vlines(x[bars], low[bars], high[bars], color=colour, alpha=0.5, lw=2)
    marked = alone if len(x) > MAX_MARKED else None
    style = {"color": colour, "lw": 1.6, "marker": marker, "ms": 3.2, "markevery": marked}
    axes.plot(x, mean, zorder=3, label=label, **style)


def _alone(values: np.ndarray) -> list[int]:
    """Places of the known values without a known neighbour, through which no line runs."""
    known = np.pad(~np.isnan(values), 1)
    return np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:]).tolist()
