"""What dropping history does to the action, as a picture: a line a strategy, beside chance.

    deletion_curves("deletion_curves.png", strategies, empty, n_context=99, worst="least-attended")

Left how often the most likely action changes, right how far the action distribution moves, both
against the number of transitions kept. Axes are logarithmic but for that of flips; KL has a zero.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from historylens.pictures.page import FAINT, INK, REWARD, SOFT, Page

Strategies = Mapping[str, Mapping[str, Any]]
Styles = Mapping[str, Mapping[str, Any]]
BAND = "#dfdfdf"
COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c510a", "#5e3c99", "#01665e",
    "#b8860b", "#d95f9b", "#4d4d4d", "#7fbc41",
)  # fmt: skip
MARKERS = "osD^vPX<>ph*"
WIDTH, HEIGHT, TOP = 470, 300, 112
LEFT, RIGHT = 84, 652
MAX_TICKS = 9
LEGEND, ROW, MORE = TOP + HEIGHT + 92, 20, 16  # place, height of a row, of a second line in it
COLUMNS = (50, 178, 300)  # of the legend: name, advised by, rule
RULE_WIDTH = 118  # characters
LINEAR_BELOW = 0.01  # nats: the logarithmic axis has a zero


def deletion_curves(
    path: str | Path,
    strategies: Strategies,
    empty: Mapping[str, float] | None,
    *,
    n_context: int,
    worst: str,
    dpi: int,
) -> None:
    """Draw effect against transitions kept.

    Args:
        path: PNG to write.
        strategies: name -> `{"rule", "advised_by", "sizes"}`; sizes are mappings with `n_keep`,
            `kept_mean`, `flips`, `kl_mean` and `n_decisions`. A strategy that has `random` beside
            them keeps as many as it needs and is a point. The one called "random" has
            `flips_band` and `kl_band` as well, low and high.
        empty: `flips` and `kl_mean` with no history at all, if they are known.
        n_context: transitions of the full context, where every line ends at nothing.
        worst: name of the strategy that keeps what attention says matters least.
        dpi: pixels an inch.
    """
    styles = _styles(strategies, worst)
    legend = legend_rows({name: strategies[name] for name in styles})
    height = sum(ROW + MORE * (len(rule) - 1) for _, _, rule in legend)
    page = Page(1180, LEGEND + height + ROW + 14, dpi)
    n_decisions = strategies["random"]["sizes"][0]["n_decisions"]
    decisions = "1 decision" if n_decisions == 1 else f"{n_decisions:,} decisions"
    about = (
        f"Decisions made again on part of their {n_context:,} transitions, against all of them. "
        "Lower is better; below the grey band: better than chance"
    )
    page.heading(LEFT, f"Effect of dropping history · {decisions}", about)
    nothing = (None, None) if empty is None else (100 * empty["flips"], empty["kl_mean"])
    page.text(LEFT, TOP - 24, "Decisions whose most likely action changes", 11, weight="bold")
    axes = page.plot(LEFT, TOP, WIDTH, HEIGHT)
    draw_curves(axes, strategies, styles, ("flips", "flips_band", 100), nothing[0], n_context)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(bottom=0.0)
    axes.set_ylabel("% of decisions", fontsize=9)
    page.text(RIGHT, TOP - 24, "How far the action distribution moves", 11, weight="bold")
    axes = page.plot(RIGHT, TOP, WIDTH, HEIGHT)
    draw_curves(axes, strategies, styles, ("kl_mean", "kl_band", 1), nothing[1], n_context)
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
    axes.yaxis.set_major_formatter(lambda value, _place: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0.0)
    axes.set_ylabel("mean KL(full || compressed), nats (log scale)", fontsize=9)
    legend += [("empty", "", ["No history at all"])] if empty is not None else []
    _draw_legend(page, strategies, styles, legend)
    page.save(path)


def _styles(strategies: Strategies, worst: str) -> Styles:
    """Line, colour and marker of each strategy, in the order of the legend."""
    styles: dict[str, dict[str, Any]] = {"random": {"color": FAINT, "marker": "."}}
    if worst in strategies:
        styles[worst] = {"color": REWARD, "marker": "x"}
    others = [name for name in strategies if name not in styles]
    for i, name in enumerate(others):
        styles[name] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
    for name, style in styles.items():
        style |= {"ms": 4.5, "lw": 2.2 if strategies[name]["advised_by"] else 1.3}
        if _is_point(strategies[name]):
            style |= {"ls": "none", "ms": 8, "mec": INK}
    return styles


def draw_curves(
    axes: Axes,
    strategies: Strategies,
    styles: Styles,
    quantity: tuple[str, str, float],
    empty: float | None,
    n_context: int,
) -> None:
    """One quantity: the band of random draws, then a line or a point a strategy."""
    name_of_value, name_of_band, scale = quantity
    if empty is not None:
        axes.axhline(empty, color=INK, lw=1.2, ls=":", zorder=2)
    sizes = strategies["random"]["sizes"]
    kept = [*(size["n_keep"] for size in sizes), n_context]
    low, high = scale * np.array([*(size[name_of_band] for size in sizes), (0.0, 0.0)]).T
    axes.fill_between(kept, low, high, color=BAND, lw=0, zorder=1)
    for name, style in styles.items():
        sizes = strategies[name]["sizes"]
        x = [size["kept_mean"] for size in sizes]
        y = [scale * size[name_of_value] for size in sizes]
        if _is_point(strategies[name]):
            axes.plot(np.maximum(x, kept[0]), y, zorder=5, clip_on=False, **style)
        else:
            axes.plot([*x, n_context], [*y, 0.0], zorder=3, clip_on=False, **style)
    axes.set_xscale("log")
    axes.set_xlim(kept[0] * 0.93, n_context)
    ticks = kept[:: -(-len(kept) // MAX_TICKS)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"transitions kept of {n_context:,} (log scale)", fontsize=9)
    axes.grid(axis="y", color="#eeeeee", lw=0.8)
    axes.set_axisbelow(True)


def legend_rows(strategies: Strategies) -> list[tuple[str, str, list[str]]]:
    """Name of each strategy, what it is advised for, and its rule in lines."""
    rows = []
    for name, entry in strategies.items():
        rule = entry["rule"].rstrip(".")
        if name == "random":
            rule += "; band: the middle 90 % of the draws"
        if _is_point(entry):
            rule += f"; {entry['sizes'][0]['kept_mean']:.1f} here"
        rows.append((name, ", ".join(entry["advised_by"]), textwrap.wrap(rule, RULE_WIDTH)))
    return rows


def _draw_legend(
    page: Page, strategies: Strategies, styles: Styles, rows: Sequence[tuple[str, str, list[str]]]
) -> None:
    name_at, advised_at, rule_at = (LEFT + offset for offset in COLUMNS)
    y = LEGEND
    for x, text in ((name_at, "strategy"), (advised_at, "advised for"), (rule_at, "rule")):
        page.text(x, y - ROW, text, 8.5, color=SOFT)
    for name, advised, rule in rows:
        if name in strategies:
            axes = page.plot(LEFT, y - ROW / 2, 40, ROW)
            axes.set_axis_off()
            axes.set_xlim(0, 2)
            axes.set_ylim(-1, 1)
            if name == "random":
                axes.fill_between([0, 2], -0.7, 0.7, color=BAND, lw=0)
            x = [1] if _is_point(strategies[name]) else [0, 1, 2]
            axes.plot(x, [0] * len(x), markevery=[len(x) // 2], **styles[name])
        else:  # the level of no history
            page.lines([[(LEFT, y), (LEFT + 40, y)]], colors=INK, linewidths=1.2, linestyles=":")
        page.text(name_at, y, name, 9, weight="bold")
        page.text(advised_at, y, advised, 9)
        for i, line in enumerate(rule):
            page.text(rule_at, y + MORE * i, line, 9, color=SOFT)
        y += ROW + MORE * (len(rule) - 1)


def _is_point(entry: Mapping[str, Any]) -> bool:
    """Whether a strategy keeps as many as it needs: one size, with random draws of the same."""
    return "random" in entry["sizes"][0]
