"""The two pictures of a comparison: return against transitions kept, and against episodes.

A few strategies have a colour, the same in both pictures; the others are grey. `study` is a
`comparison.study.Study`, whose `rows` are arms in numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullLocator

from historylens.common.batches import alike
from historylens.pictures.page import FAINT, HUES, INK, SOFT, UNIFORM, in_lines, inset, save_figure

N_COLOURED = 4  # strategies with a colour of their own, beside recent and random
GREY, FULL_COLOUR = "#c4c4c4", "#0b6e4f"
PANEL = 4.75  # inches from one row of panels to the next, names below them included
ASIDE = 0.006  # between intervals of strategies at one budget, of the width of the plot
LABEL_GAP = 0.036  # between labels, of the height of the plot
RING = {"marker": "o", "ms": 15, "mec": FULL_COLOUR, "mfc": "none", "mew": 1.6, "zorder": 5}
ABOVE_LEGEND = 0.09  # lowest place of a label, of the height of the plot


@dataclass(frozen=True)
class Picture:
    """What a picture says beside the numbers."""

    title: str  # the model and the task in a few words
    subtitle: str  # goals, seeds, episodes and how kept transitions are numbered
    best: float | None  # mean best possible return an episode
    n_max: int  # transitions that the model can read


def draw_by_budget(path: Path, study: Any, picture: Picture) -> None:
    """Return over the second half of the episodes, against transitions kept; a line a strategy."""
    figure = _figure((11.5, 7.2), "What compressed history earns", picture, study)
    share = 7.2 / figure.get_figheight()
    axes = figure.add_axes((0.065, 0.115 * share, 0.655, 0.735 * share))
    lines, colours = _strategies(study)
    _set_scales(axes, study, picture, colours)
    _draw_levels(axes, study, picture)
    if (best := study.recommended) is not None:
        axes.plot(best.kept, best.mean.value, **RING)
    chance = [row for row in lines.get("random", []) if not row.mean.is_open]
    if len(chance) > 1:  # what a strategy has to beat
        edges = zip(*((row.kept, row.mean.low, row.mean.high) for row in chance), strict=True)
        axes.fill_between(*edges, color=UNIFORM, alpha=0.13, lw=0, zorder=1.2)
    for name in sorted(lines, key=lambda name: name in colours):
        aside = list(colours).index(name) - (len(colours) - 1) / 2 if name in colours else None
        _draw_line(axes, lines[name], colours.get(name, GREY), aside)
    axes.set_xlabel("transitions kept of each history (a square-root scale)", fontsize=10.5)
    axes.set_ylabel("reward an episode, second half of the episodes", fontsize=10.5)
    inset(axes, 2)
    _label_lines(axes, lines, colours)
    _explain_markers(figure, study, share)
    save_figure(figure, path)


def draw_by_episode(path: Path, study: Any, picture: Picture) -> None:
    """Return of each in-context episode: a panel a budget, full and empty history in each."""
    _, colours = _strategies(study)
    budgets = sorted({row.arm.n_keep for row in study.candidates})
    n_columns = min(4, max(1, len(budgets)))
    n_rows = max(1, -(-len(budgets) // n_columns))
    size = max(9.0, 0.8 + 3.6 * n_columns), 1.15 + PANEL * n_rows
    note = "In brackets: adaptation loss, the reward an episode lost against full history over all "
    note += "episodes (the area between the lines); the band is full history's 95 % interval"
    figure = _figure(size, "How fast it adapts", picture, study, note)
    width, height = figure.get_size_inches()
    shared, step = None, (width - 0.7) / n_columns
    for i, budget in enumerate(budgets):
        row, column = divmod(i, n_columns)
        left, bottom = 0.6 + column * step, (n_rows - 1 - row) * PANEL + 1.5
        box = (left / width, bottom / height, (step - 0.22) / width, (PANEL - 1.95) / height)
        axes = figure.add_axes(box, sharey=shared)
        shared = shared or axes
        _draw_panel(axes, study, budget, colours, picture.best)
        axes.set_xlabel("episode in context", fontsize=9.5)
        if column == 0:
            axes.set_ylabel("reward an episode", fontsize=9.5)
            inset(axes, 2)
        else:
            axes.tick_params(labelleft=False)
    save_figure(figure, path)


def _figure(size: tuple, what: str, picture: Picture, study: Any, *notes: str) -> Figure:
    """A figure in inches, higher by what its heading takes beyond a line a text."""
    width, height = size
    runs, subtitle = [row.collapses.n_runs for row in study.rows], picture.subtitle
    if min(runs) < max(runs):
        subtitle += f"; stopped arms: at least {min(runs)} of {max(runs)} runs"
    texts = [(f"{what} · {picture.title}", INK, 14, "bold"), (subtitle, INK, 10, "normal")]
    texts += [(finding(study), FULL_COLOUR, 10, "normal")]
    texts += [(note, INK, 10, "normal") for note in notes]
    lines, y = [], 0.3
    for text, colour, size, weight in texts:
        for line in in_lines(text, 100 * width - 80, size, weight):
            lines.append((y, line, {"color": colour, "size": size, "weight": weight}))
            y += 0.28 if size > 10 else 0.25
    height += 0.25 * (len(lines) - len(texts))
    figure = Figure(figsize=(width, height), dpi=100)
    for y, line, style in lines:
        figure.text(0.6 / width, 1 - y / height, line, va="center", **style)
    return figure


def finding(study: Any) -> str:
    """What the comparison found, in a line."""
    if study.doubts:
        return "The model is not shown to use its history: no compression can be judged on it."
    row, full, where, share = study.recommended, study.full, "", f"{study.margin_share:.0%}"
    if row is None:
        return f"No shorter history is shown to lose less than {share} of full history's return."
    if study.confirmation is not None:
        row, full = study.confirmation.row, study.confirmation.full
        where = f" in {study.confirmation.n_seeds} new runs a goal"
    budget = "" if row.arm.n_keep is None else f", {row.arm.n_keep} transitions"
    return (
        f"Recommended: {row.arm.name}{budget}: {row.mean.value:.2f} against {full.mean.value:.2f}"
        f"{where}, difference {row.difference.text('+')} ({row.verdict}); "
        f"{row.collapses.sentence()}"
    )


def _strategies(study: Any) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Rows of each strategy, smallest budget first, and the colours of those that stand out."""
    rows = sorted(study.candidates, key=lambda row: row.arm.n_keep)
    lines = {own[0].arm.name: own for own in alike(rows, lambda row: row.arm.name)}
    average = {name: np.mean([row.mean.value for row in rows]) for name, rows in lines.items()}
    best = sorted(average.keys() - {"recent", "random"}, key=lambda name: (-average[name], name))
    if study.recommended is not None:
        best.sort(key=lambda name: name != study.recommended.arm.name)
    colours = dict(zip(best[:N_COLOURED], HUES, strict=False))
    own = ("random", UNIFORM), ("recent", INK)
    return lines, colours | {name: colour for name, colour in own if name in lines}


def _draw_levels(axes: Axes, study: Any, picture: Picture) -> None:
    full = study.full.mean, f"full history (up to {picture.n_max} transitions)", FULL_COLOUR, "left"
    for mean, name, colour, side in (full, (study.empty.mean, "empty history", FAINT, "right")):
        _name_level(axes, mean.value, f"{name}: {mean.value:.2f}", colour, side)
        axes.axhline(mean.value, color=colour, lw=1.6, ls="--", zorder=1.5)
        if not mean.is_open:
            axes.axhspan(mean.low, mean.high, color=colour, alpha=0.16, lw=0, zorder=1)
    if picture.best is not None:
        axes.axhline(picture.best, color=FAINT, lw=1, ls=":", zorder=1)
        _name_level(axes, picture.best, f"best possible: {picture.best:.2f}", SOFT, "right")


def _name_level(axes: Axes, height: float, name: str, colour: str, side: str) -> None:
    place = (0.08 if side == "left" else 0.99, height)  # beside a ring
    how = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "zorder": 6}
    how["path_effects"] = [withStroke(linewidth=2.5, foreground="white")]  # over lines
    axes.annotate(name, place, (0, 4), ha=side, color=colour, fontsize=9.5, **how)


def _draw_line(axes: Axes, rows: Sequence[Any], colour: str, aside: float | None) -> None:
    """A strategy, filled where it is shown safe; `aside` of it the intervals, if it stands out."""
    width, size, order = (1.0, 4, 2) if aside is None else (2.0, 6.5, 4)
    style, places = {"color": colour, "zorder": order}, [(row.kept, row.mean.value) for row in rows]
    axes.plot(*zip(*places, strict=True), lw=width, **style)
    for row, place in zip(rows, places, strict=True):
        if aside is not None and not row.mean.is_open:
            left, right = np.sqrt(axes.get_xlim())
            x = max(0.0, row.kept**0.5 + ASIDE * aside * (right - left)) ** 2
            axes.plot([x, x], [row.mean.low, row.mean.high], lw=1.1, alpha=0.7, **style)
        axes.plot(*place, "o", ms=size, mec=colour, mew=1.4,
                  mfc=colour if row.is_good else "white", zorder=order + 0.5)  # fmt: skip


def _set_scales(axes: Axes, study: Any, picture: Picture, colours: dict[str, str]) -> None:
    """A square-root scale: small budgets stand apart, and nothing kept has a place."""
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    budgets = sorted({row.arm.n_keep for row in study.candidates})
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    kept = [row.kept for row in study.candidates] or [0, 1]
    low, high = np.sqrt(min(kept)), np.sqrt(max(kept))
    pad = 0.06 * (high - low) or 0.5
    axes.set_xlim(max(0.0, low - pad) ** 2, (high + pad) ** 2)
    axes.xaxis.set_minor_locator(NullLocator())
    means = [row.mean for row in study.candidates if row.arm.name in colours]  # with an interval
    ends = [
        x for mean in (*means, study.full.mean, study.empty.mean) for x in (mean.low, mean.high)
    ]
    values = [row.mean.value for row in study.rows] + [x for x in ends if x is not None]
    low, high = min(0.0, *values), max([*values, picture.best or -np.inf])
    axes.set_ylim(low - 0.03 * (high - low), high + 0.06 * (high - low or 1))
    axes.grid(axis="x", color="#eeeeee", lw=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9.5)


def _label_lines(axes: Axes, lines: dict[str, list[Any]], colours: dict[str, str]) -> None:
    """Names in a column beside the plot, in the order of the lines' ends, with leaders to them."""
    bottom, top = axes.get_ylim()
    ends = {name: (rows[-1].mean.value - bottom) / (top - bottom) for name, rows in lines.items()}
    names = sorted(ends, key=lambda name: (ends[name], name))
    heights = spread([ends[name] for name in names], LABEL_GAP, ABOVE_LEGEND)
    for name, height in zip(names, heights, strict=True):
        colour, last = colours.get(name), lines[name][-1]
        leader = {"arrowstyle": "-", "color": colour or GREY, "lw": 0.7, "shrinkA": 1, "shrinkB": 4}
        axes.annotate(
            name, (last.kept, last.mean.value), xytext=(1.045, height), textcoords="axes fraction",
            color=colour or "#777777", fontsize=9.5, weight="bold" if colour else "normal",
            va="center", annotation_clip=False, arrowprops={**leader, "relpos": (0, 0.5)},
        )  # fmt: skip


def spread(places: Sequence[float], gap: float, low: float = 0.0) -> list[float]:
    """Move ascending `places` to `low`..1, at least `gap` apart, with least moves; else evenly."""
    n, highest = len(places), 1 - (len(places) - 1) * gap
    if highest <= low:
        return list(np.linspace(low, 1, n))
    less = np.array(places) - gap * np.arange(n)  # isotonic regression, by the min-max formula
    moved = []
    for i in range(n):
        means = (min(less[j:k].mean() for k in range(i + 1, n + 1)) for j in range(i + 1))
        moved.append(float(min(max(low, *means), highest)) + i * gap)
    return moved


def _explain_markers(figure: Figure, study: Any, share: float) -> None:
    """The legend of what is there, in boxes of `share` of the usual height."""
    axes = figure.add_axes((0.735, 0.025 * share, 0.26, 0.145 * share))
    axes.set(xlim=(0, 1), ylim=(4.5, -0.5))
    axes.axis("off")
    texts = [f"shown to lose less than {study.margin_share:.0%}"]
    texts += ["of full history (safe or better)", "not shown in these runs"]
    for y, fill in ((0, SOFT), (2, "white")):
        axes.plot(0.05, y, "o", ms=6.5, mec=SOFT, mfc=fill, mew=1.4)
    if study.recommended is not None:
        texts += ["recommended" + ": shown in new runs" * (study.confirmation is not None)]
        axes.plot(0.05, len(texts) - 1, **RING | {"ms": 9})
    if not study.full.mean.is_open:
        y = len(texts)
        texts += ["95 % intervals over seeds: lines, bands"]
        axes.plot([0.02, 0.02], [y - 0.4, y + 0.4], color=SOFT, lw=1.2)
        axes.fill_between([0.045, 0.09], y - 0.35, y + 0.35, color=SOFT, alpha=0.25, lw=0)
    for i, text in enumerate(texts):
        axes.text(0.12, i, text, size=8.5, color=SOFT, va="center")


def _draw_panel(axes: Axes, study: Any, budget: int, colours: dict, best: float | None) -> None:
    n_episodes = len(study.full.by_episode)
    draw = partial(axes.plot, np.arange(1, n_episodes + 1))
    low, high = zip(*((e.low, e.high) for e in study.full_by_episode), strict=True)
    if None not in low:
        axes.fill_between(range(1, n_episodes + 1), low, high, color=FULL_COLOUR, alpha=0.16, lw=0)
    draw(study.full.by_episode, color=FULL_COLOUR, lw=2.2, ls="--", zorder=5, label="full history")
    rows = [row for row in study.candidates if row.arm.n_keep == budget]
    others = iter(["other strategies"])  # named once
    for row in sorted(rows, key=lambda row: row.arm.name not in colours):
        if colour := colours.get(row.arm.name):
            label = f"{row.arm.name} ({row.adaptation_loss.value:+z.1f})"
            draw(row.by_episode, color=colour, lw=1.6, zorder=4, label=label)
        else:
            draw(row.by_episode, color=GREY, lw=0.8, zorder=2, label=next(others, None))
    label = f"empty history ({study.empty.adaptation_loss.value:+z.1f})"
    draw(study.empty.by_episode, color=FAINT, lw=1.6, ls=":", zorder=3, label=label)
    if best is not None:
        axes.axhline(best, color=FAINT, lw=1, ls=":")
        _name_level(axes, best, "best possible", SOFT, "right")
    if n_episodes == 1:  # a line needs two ends
        for line in axes.lines:
            line.set_marker("o")
    axes.set_title(f"{budget} transitions kept", fontsize=10.5, loc="left", color=INK)
    axes.set_xticks(episode_ticks(n_episodes))
    axes.set_xlim(1, max(2, n_episodes))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.legend(fontsize=8.5, frameon=False, loc="upper left", bbox_to_anchor=(-0.03, -0.17),
                ncols=2, columnspacing=1.0, handlelength=1.4, borderpad=0)  # fmt: skip


def episode_ticks(n_episodes: int) -> list[int]:
    """Numbers of episodes to name: the first, and others evenly spaced."""
    ticks = MaxNLocator(5, integer=True, steps=[1, 2, 4, 5, 10]).tick_values(1, n_episodes)
    step = int(ticks[1] - ticks[0]) or 1
    if step <= 2:
        return list(range(1, n_episodes + 1, step))
    return [1, *range(step, n_episodes + 1, step)]
