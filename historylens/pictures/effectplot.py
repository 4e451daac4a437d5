"""What the action rests on, as pictures: effects of dropping history, and of exchanging heads."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from historylens.common.text import counted
from historylens.pictures.page import FAINT, HUES, INK, REWARD, SOFT, Page, in_lines, text_width

LINEAR = 0.01  # nats: a logarithmic axis is linear below, for KL has a zero
BAND = "#dfdfdf"
COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c510a", "#5e3c99", "#01665e",
    "#b8860b", "#d95f9b", "#4d4d4d", "#7fbc41",
)  # fmt: skip
MARKERS = "osD^vPX<>ph*"
LEFT, TOP, WIDTH, HEIGHT = 84, 112, 470, 300
PLOTS = (  # place, title, unit; of the sizes what is drawn, its band, what both are multiplied by
    (LEFT, "Decisions whose most likely action changes", "% of decisions",
     ("flips", "flips_band", 100)),
    (652, "How far the action distribution moves", "mean KL(full || compressed), nats (log scale)",
     ("kl_mean", "kl_band", 1)),
)  # fmt: skip
LEGEND, ROW, MORE = TOP + HEIGHT + 92, 20, 16  # place, height of a row, of a second line in it
COLUMNS = {"strategy": LEFT + 50, "advised for": LEFT + 178, "rule": LEFT + 300}
PANELS = {  # of the picture of heads
    "mean": "exchanged for its mean over decisions",
    "other-task": "exchanged for that under another task's history",
}
NAME, ROLE, PANEL = 20, 124, 452  # places of a row's two texts, and of the first panel
HEADS_TOP, PANEL_WIDTH, GAP, HEAD_ROW, BELOW = 116, 374, 24, 26, 56
MAX_ROWS = 60  # of heads; beyond, those that move the action most


def deletion_curves(
    path: Path, strategies: Mapping[str, Mapping[str, Any]],
    empty: Mapping[str, float] | None, *, n_context: int, worst: str, dpi: int,
) -> None:  # fmt: skip
    """Draw effect against transitions kept, of `n_context`, where every line ends at nothing.

    `strategies`: name -> `{"rule", "advised_by", "sizes"}`; a size has `n_keep`, `kept_mean`,
    `flips`, `kl_mean`, `n_decisions`; of "random" also `flips_band` and `kl_band`, low and high. A
    strategy whose size has `random` keeps as many as it needs: a point. `empty`: `flips` and
    `kl_mean` with no history, if known. `worst` keeps what attention says matters least.
    """
    strategies = in_order(strategies, worst)
    height = sum(ROW + MORE * (len(one["lines"]) - 1) for one in strategies.values())
    page = Page(1180, LEGEND + height + ROW + 14, dpi)
    chance = next(iter(strategies.values()))["sizes"]
    about = f"Decisions made again on part of their {n_context:,} transitions, against all of them."
    better = "; below the grey band: better than chance" if "random" in strategies else ""
    title = f"Effect of dropping history · {counted(chance[0]['n_decisions'], 'decision')}"
    page.heading(LEFT, title, f"{about} Lower is better{better}")
    kept = [*(size["n_keep"] for size in chance), n_context]
    for left, title, unit, quantity in PLOTS:
        page.text(left, TOP - 24, title, 11, weight="bold")
        name = f"transitions kept of {n_context:,} (log scale)"
        axes = page.plot(left, TOP, WIDTH, HEIGHT, name, unit)
        _draw_curves(axes, strategies, quantity, empty, kept)
    _draw_legend(page, strategies, empty is not None)
    page.save(path)


def in_order(strategies: Mapping[str, Mapping], worst: str) -> dict[str, dict[str, Any]]:
    """Strategies in the order of the legend, with rules in `lines`, and how they are drawn."""
    looks = {"random": (FAINT, "."), worst: (REWARD, "x")}
    others = [name for name in strategies if name not in looks]
    looks |= zip(others, itertools.cycle(zip(COLOURS, MARKERS, strict=True)), strict=False)
    drawn = {}
    for name in [name for name in looks if name in strategies]:
        (colour, marker), entry = looks[name], strategies[name]
        rule, width = entry["rule"].rstrip("."), 2.2 if entry["advised_by"] else 1.3
        style = {"color": colour, "marker": marker, "ms": 4.5, "lw": width}
        if name == "random":
            rule += "; band: the middle 90 % of the draws"
        if is_point := "random" in entry["sizes"][0]:
            rule += f"; {entry['sizes'][0]['kept_mean']:.1f} here"
            style |= {"ls": "none", "ms": 8, "mec": INK}
        own = {"lines": textwrap.wrap(rule, width=118), "style": style, "point": is_point}
        drawn[name] = {**entry, **own}
    return drawn


def _draw_curves(
    axes: Axes, strategies: Mapping[str, Mapping], quantity: tuple, empty: Any, kept: list[int]
) -> None:
    """One quantity: the band of random draws, then a line or a point a strategy."""
    value, band, scale = quantity
    if empty is not None:
        axes.axhline(scale * empty[value], color=INK, lw=1.2, ls=":", zorder=2)
    if "random" in strategies:
        sizes = strategies["random"]["sizes"]
        low, high = scale * np.array([*(size[band] for size in sizes), (0.0, 0.0)]).T
        axes.fill_between(kept, low, high, color=BAND, lw=0, zorder=1)
    for one in strategies.values():
        x = [size["kept_mean"] for size in one["sizes"]]
        y = [scale * size[value] for size in one["sizes"]]
        x, y = (np.maximum(x, kept[0]), y) if one["point"] else ([*x, kept[-1]], [*y, 0.0])
        axes.plot(x, y, zorder=5 if one["point"] else 3, clip_on=False, **one["style"])
    axes.set_xscale("log")
    axes.set_xlim(kept[0] * 0.93, kept[-1])
    ticks = apart(kept)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="#eeeeee", lw=0.8)
    axes.set_axisbelow(True)
    if value == "flips":
        axes.yaxis.set_major_locator(MaxNLocator(5))
    else:
        axes.set_yscale("symlog", linthresh=LINEAR)
        axes.yaxis.set_major_formatter("{:g}".format)
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0.0)


def apart(kept: Sequence[int]) -> list[int]:
    """Those of ascending sizes whose names do not touch on the axis, the last among them."""
    scale = WIDTH / np.log(kept[-1] / kept[0])
    ticks = [kept[-1]]
    for size in kept[-2::-1]:
        room = (text_width(f"{size:,} ", 8.5) + text_width(f"{ticks[-1]:,} ", 8.5)) / 2
        ticks += [size] if scale * np.log(ticks[-1] / size) > room else []
    return ticks[::-1]


def _draw_legend(page: Page, strategies: Mapping[str, Mapping], has_empty: bool) -> None:
    (name_at, advised_at, rule_at), y = COLUMNS.values(), LEGEND
    for text, x in COLUMNS.items():
        page.text(x, y - ROW, text, 8.5, color=SOFT)
    for name, one in strategies.items():
        axes = page.plot(LEFT, y - ROW / 2, 40, ROW)
        axes.set_axis_off()
        axes.set(xlim=(0, 2), ylim=(-1, 1))
        if name == "random":
            axes.fill_between([0, 2], -0.7, 0.7, color=BAND, lw=0)
        x = [1] if one["point"] else [0, 1, 2]
        axes.plot(x, [0] * len(x), markevery=[len(x) // 2], **one["style"])
        page.text(name_at, y, name, 9, weight="bold")
        page.text(advised_at, y, ", ".join(one["advised_by"]), 9)
        page.column(rule_at, y, one["lines"], MORE, 9, color=SOFT)
        y += ROW + MORE * (len(one["lines"]) - 1)
    if has_empty:
        page.lines([[(LEFT, y), (LEFT + 40, y)]], colors=INK, linewidths=1.2, linestyles=":")
        page.text(name_at, y, "empty", 9, weight="bold")
        page.text(rule_at, y, "No history at all", 9, color=SOFT)


def head_effects(path: Path, heads: Sequence[Mapping], n_decisions: int, *, dpi: int) -> None:
    """Draw effects of heads, entries of "heads" as `effects.measure_heads` gives them."""
    kinds = [kind for kind in PANELS if kind in heads[0]]
    largest = np.argsort([-one[kinds[-1]]["kl"] for one in heads], kind="stable")[:MAX_ROWS]
    drawn = [heads[i] for i in sorted(largest)]
    height = HEAD_ROW * len(drawn)
    page = Page(PANEL + len(kinds) * (PANEL_WIDTH + GAP), HEADS_TOP + height + BELOW, dpi)
    about = (
        f"{counted(n_decisions, 'decision')}, made again with a head's output exchanged at all "
        "tokens. The further right, the more the action rests on this head. Bars: 95 % interval. "
        "Grey: all heads of a layer at once"
    )
    if len(drawn) < len(heads):
        about += f". The {len(drawn)} of {len(heads)} rows with the largest effect"
    page.heading(NAME, "Which heads act, and what they read", about)
    page.text(NAME, HEADS_TOP - 13, "head", 9, color=SOFT)
    page.text(ROLE, HEADS_TOP - 13, "reads (evenly: what even reading would give)", 9, color=SOFT)
    colours = [FAINT if one["head"] == "all" else HUES[one["layer"] % len(HUES)] for one in drawn]
    largest = max(one[kind]["kl_interval"][1] for one in drawn for kind in kinds)
    unit = "mean KL(full || exchanged), nats (log scale)"
    for place, kind in enumerate(kinds):
        axes = page.plot(PANEL + place * (PANEL_WIDTH + GAP), HEADS_TOP, PANEL_WIDTH, height, unit)
        _draw_panel(axes, drawn, kind, colours)
        axes.set_xlim(0, 1.15 * max(LINEAR, largest))
        axes.set_title(PANELS[kind], fontsize=10, loc="left", fontweight="bold")
    for row, (one, colour) in enumerate(zip(drawn, colours, strict=True)):
        y, is_all = HEADS_TOP + HEAD_ROW * (row + 0.5), one["head"] == "all"
        name = f"layer {one['layer']} {'' if is_all else 'head '}{one['head']}"
        page.text(NAME, y, name, 8.5, color=SOFT if is_all else colour)
        parts = [] if is_all else one["role"]["text"].split("; ")[:2]  # of a mixture the largest
        for i, part in enumerate(parts):
            text, *rest = in_lines(part, PANEL - ROLE - 22, 8)
            page.text(ROLE, y + 12 * (i - (len(parts) - 1) / 2), text + "…" * bool(rest), 8)
    page.save(path)


def _draw_panel(axes: Axes, drawn: Sequence[Mapping], kind: str, colours: Sequence[str]) -> None:
    """Points and intervals of one way to exchange, the first head on top."""
    for row, (one, colour) in enumerate(zip(drawn, colours, strict=True)):
        is_all = one["head"] == "all"
        interval = np.clip(one[kind]["kl_interval"], 0, None)
        axes.plot(interval, [row, row], color=colour, lw=2.2, solid_capstyle="butt")
        marker = "D" if is_all else "o"
        axes.plot(one[kind]["kl"], row, marker, color=colour, ms=5, mec=INK, mew=0.5)
        if is_all and row + 1 < len(drawn):
            axes.axhline(row + 0.5, color="#dddddd", lw=0.8)
    axes.set_xscale("symlog", linthresh=LINEAR)
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter("{:g}".format)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color="#eeeeee", lw=0.8)
    axes.set_axisbelow(True)
