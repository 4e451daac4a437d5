"""Which heads act, as a picture: a row a head, how far the action moves and what the head reads.

    head_effects("head_effects.png", measured["heads"], n_decisions=32, dpi=100)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import NullLocator

from historylens.common.text import counted
from historylens.pictures.page import FAINT, HUES, INK, SOFT, Page, in_lines

PANELS = {
    "mean": "exchanged for its mean over decisions",
    "other-task": "exchanged for that under another task's history",
}
LEFT, TOP, WIDTH, GAP, ROW, BELOW = 452, 116, 374, 24, 26, 56
MAX_ROWS = 60  # of heads; beyond, those that move the action most
NAME, ROLE = 20, 124  # places of a row's two texts
LINEAR = 0.01  # nats: the axis is linear below, for KL has a zero


def head_effects(
    path: str | Path, heads: Sequence[Mapping[str, Any]], n_decisions: int, *, dpi: int
) -> None:
    """Draw effects of heads, entries of "heads" as `effects.heads.measure_heads` gives them."""
    kinds = [kind for kind in PANELS if kind in heads[0]]
    largest = np.argsort([-one[kinds[-1]]["kl"] for one in heads], kind="stable")[:MAX_ROWS]
    drawn = [heads[i] for i in sorted(largest)]
    height = ROW * len(drawn)
    page = Page(LEFT + len(kinds) * (WIDTH + GAP), TOP + height + BELOW, dpi)
    about = (
        f"{counted(n_decisions, 'decision')}, made again with a head's output exchanged at all "
        "tokens. The further right, the more the action rests on this head. Bars: 95 % interval. "
        "Grey: all heads of a layer at once"
    )
    if len(drawn) < len(heads):
        about += f". The {len(drawn)} of {len(heads)} rows with the largest effect"
    page.heading(NAME, "Which heads act, and what they read", about)
    page.text(NAME, TOP - 13, "head", 9, color=SOFT)
    page.text(ROLE, TOP - 13, "reads (evenly: what even reading would give)", 9, color=SOFT)
    colours = {one["layer"]: HUES[one["layer"] % len(HUES)] for one in drawn}
    for place, kind in enumerate(kinds):
        axes = page.plot(LEFT + place * (WIDTH + GAP), TOP, WIDTH, height)
        _draw_panel(axes, drawn, kind, colours)
        axes.set_title(PANELS[kind], fontsize=10, loc="left", fontweight="bold")
    for row, one in enumerate(drawn):
        y, is_all = TOP + ROW * (row + 0.5), one["head"] == "all"
        name = f"layer {one['layer']} all" if is_all else f"layer {one['layer']} head {one['head']}"
        page.text(NAME, y, name, 8.5, color=SOFT if is_all else colours[one["layer"]])
        parts = [] if is_all else one["role"]["text"].split("; ")[:2]  # of a mixture the largest
        for i, part in enumerate(parts):
            text, *rest = in_lines(part, LEFT - ROLE - 22, 8)
            text += "…" if rest else ""
            page.text(ROLE, y + 12 * (i - (len(parts) - 1) / 2), text, 8)
    page.save(path)


def _draw_panel(axes: Any, drawn: Sequence[Mapping[str, Any]], kind: str, colours: Mapping) -> None:
    """Points and intervals of one way to exchange, the first head on top."""
    largest = max(one[k]["kl_interval"][1] for one in drawn for k in PANELS if k in one)
    for row, one in enumerate(drawn):
        is_all = one["head"] == "all"
        colour = FAINT if is_all else colours[one["layer"]]
        low, high = np.clip(one[kind]["kl_interval"], 0, None)
        axes.plot([low, high], [row, row], color=colour, lw=2.2, solid_capstyle="butt")
        marker = "D" if is_all else "o"
        axes.plot(one[kind]["kl"], row, marker, color=colour, ms=5, mec=INK, mew=0.5)
        if is_all and row + 1 < len(drawn):
            axes.axhline(row + 0.5, color="#dddddd", lw=0.8)
    axes.set_xscale("symlog", linthresh=LINEAR)
    axes.set_xlim(0, 1.15 * max(LINEAR, largest))
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter("{:g}".format)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color="#eeeeee", lw=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("mean KL(full || exchanged), nats (log scale)", fontsize=9)
