"""Pictures of effects: curves of deletion, and each head's numbers in its row."""

import itertools
from unittest import mock

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image
from test_pictures import axes_of

from historylens.effects.measure import budgets
from historylens.pictures import effectplot
from historylens.pictures.effectplot import MAX_ROWS, ROLE, deletion_curves, head_effects, in_order
from historylens.pictures.page import FAINT, Page, text_width

SIZES, WORST = (1, 5, 20), "least-attended"
OPTIONS = {"n_context": 40, "worst": WORST, "dpi": 50}
NO_HISTORY = {"flips": 0.25, "kl_mean": 0.5}
KINDS = ("mean", "other-task")


def size(n_keep, flips, **more):
    effect = {"flips": flips, "kl_mean": 2 * flips, "n_decisions": 10}
    return {"n_keep": n_keep, "kept_mean": n_keep, **effect, **more}


def entry(flips, rule="Keep some.", advised=(), **more):
    sizes = [size(n, value, **more) for n, value in zip(SIZES, flips, strict=True)]
    return {"rule": rule, "advised_by": list(advised), "sizes": sizes}


def made():
    band = {"flips_band": [0.1, 0.7], "kl_band": [0.2, 1.4]}
    own = size(3, 0.5) | {"kept_mean": 2.6, "random": size(3, 0.9)}
    return {
        "recent": entry((0.4, 0.2, 0.0), "Keep the latest transitions.", ["recency"]),
        "random": entry((0.6, 0.5, 0.3), "Keep any.", **band),
        WORST: entry((1.0, 0.9, 0.8)),
        "threshold": {"rule": "Keep " + "a lot of " * 20, "advised_by": ["sparse"], "sizes": [own]},
    }


def drawn(picture, *args, **options):
    """Panels of a picture, the places of its texts by text, and its subtitle."""
    patched = mock.patch.object(Page, "text"), mock.patch.object(Page, "heading")
    with patched[0] as text, patched[1] as heading:
        panels = axes_of(picture, *args, **{"dpi": 50} | options)
    words = {call.args[2]: call.args for call in text.call_args_list}
    return panels, words, heading.call_args.args[2]


def test_random_draws_and_no_history_are_drawn_and_named_only_where_there_are_any():
    without = {name: one for name, one in made().items() if name != "random"}
    for strategies, empty in ((without, None), (made(), NO_HISTORY)):
        plots, words, about = drawn(deletion_curves, strategies, empty, **OPTIONS)
        expected = strategies is not without
        assert ("band" in about, "No history at all" in words) == (expected, expected)
        assert any(axes.collections for axes in plots) == expected


@pytest.mark.parametrize("n", [2, 30, 300, 5000])
def test_names_of_sizes_do_not_touch_and_the_full_context_is_named(n):
    one = {"recent": {"rule": "", "advised_by": [], "sizes": [size(k, 0.5) for k in budgets(n)]}}
    axes = axes_of(deletion_curves, one, None, **OPTIONS | {"n_context": n})[0]
    FigureCanvasAgg(axes.figure).draw()
    names = axes.get_xticklabels()
    boxes = [name.get_window_extent() for name in names]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    assert names[-1].get_text() == f"{n:,}"


def test_lines_run_to_nothing_at_the_full_context_beside_points_a_band_and_no_history():
    plots = axes_of(deletion_curves, made(), NO_HISTORY, **OPTIONS)
    for axes, scale in zip(plots, (100.0, 2.0), strict=False):  # flips, KL
        empty, *lines, point = (line.get_xydata() for line in axes.lines)
        shares = (0.6, 0.5, 0.3, 0.0), (1.0, 0.9, 0.8, 0.0), (0.4, 0.2, 0.0, 0.0)
        for line, y in zip(lines, shares, strict=True):  # random, the worst, recent
            np.testing.assert_allclose(line, np.stack([(1, 5, 20, 40), scale * np.array(y)], 1))
        np.testing.assert_allclose(point, [(2.6, scale / 2)])  # it keeps as many as it needs
        assert empty[:, 1].tolist() == [0.25 * scale] * 2
        (band,) = axes.collections
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(6).tolist()}
        assert corners == {(40, 0), *((n, round(scale * s, 6)) for n in SIZES for s in (0.1, 0.7))}


def test_every_strategy_is_named_with_its_rule_and_who_advises_it():
    drawn = in_order(made(), WORST)
    rows = {name: (*one["advised_by"], " ".join(one["lines"])) for name, one in drawn.items()}
    assert list(rows) == ["random", WORST, "recent", "threshold"]
    assert rows["recent"] == ("recency", "Keep the latest transitions")
    assert rows["random"] == ("Keep any; band: the middle 90 % of the draws",)
    advised, rule = rows["threshold"]
    assert (advised, rule[-10:]) == ("sparse", "; 2.6 here")


def made_heads(n_layers=2, n_heads=3, kinds=KINDS, text="98% on the latest quarter, evenly 24%"):
    """Entries of heads and of whole layers, no two with the same effect, in no order of it."""
    places = [(layer, head) for layer in range(n_layers) for head in (*range(n_heads), "all")]
    effects = iter(np.random.default_rng(0).permutation(2 * len(places)) / 100 + 0.01)
    heads = []
    for layer, head in places:
        entry = {"layer": layer, "head": head, "role": {"text": f"{text} {layer}-{head}"}}
        for kind in KINDS:
            kl = next(effects)
            entry |= {kind: {"kl": kl, "kl_interval": [kl / 2, 2 * kl]}} if kind in kinds else {}
        heads.append(entry)
    return heads


@pytest.mark.parametrize(
    ("kinds", "n_layers", "n_heads"), [(KINDS, 2, 3), (KINDS[:1], 1, 1), (KINDS[1:], 2, 1)]
)
def test_each_row_shows_the_effect_of_its_head_in_each_panel(kinds, n_layers, n_heads):
    heads = made_heads(n_layers, n_heads, kinds)
    panels, words, _ = drawn(head_effects, heads, 32)
    assert [axes.get_title(loc="left") for axes in panels] == [effectplot.PANELS[k] for k in kinds]
    for axes, kind in zip(panels, kinds, strict=True):
        lines = [line for line in axes.lines if line.get_color() != "#dddddd"]
        for row, (one, bar, dot) in enumerate(zip(heads, lines[::2], lines[1::2], strict=True)):
            name = f"layer {one['layer']} {'' if one['head'] == 'all' else 'head '}{one['head']}"
            assert bar.get_xydata().tolist() == [[x, row] for x in one[kind]["kl_interval"]]
            assert dot.get_xydata().tolist() == [[one[kind]["kl"], row]]
            assert (to_hex(dot.get_color()) == FAINT) == (one["head"] == "all")
            assert words[name][1] == effectplot.HEADS_TOP + effectplot.HEAD_ROW * (row + 0.5)
            assert (one["role"]["text"] in words) == (one["head"] != "all")
        assert axes.get_ylim() == (len(heads) - 0.5, -0.5)
        assert axes.get_xlim() == panels[0].get_xlim()
        largest = max(one[kind]["kl_interval"][1] for one in heads for kind in kinds)
        assert axes.get_xlim() == (0, pytest.approx(1.15 * largest))


def test_heads_without_any_effect_have_an_axis():
    nothing = {kind: {"kl": 0.0, "kl_interval": [0.0, 0.0]} for kind in KINDS}
    panels, *_ = drawn(head_effects, [one | nothing for one in made_heads()], 32)
    assert [axes.get_xlim() for axes in panels] == [(0, 1.15 * effectplot.LINEAR)] * 2


def test_of_many_heads_those_that_act_most_are_drawn_in_their_order_and_the_picture_says_so():
    heads = made_heads(7, 9)
    (_, panel), _, said = drawn(head_effects, heads, 32)
    shown = [line.get_xdata()[0] for line in panel.lines if line.get_marker() in ("o", "D")]
    effects = [one["other-task"]["kl"] for one in heads]
    assert shown == [kl for kl in effects if kl >= sorted(effects)[-MAX_ROWS]]
    assert f"The {MAX_ROWS} of 70 rows with the largest effect" in said


@pytest.mark.parametrize(
    "text", ["wide " * 30, "W" * 90, "59% on one, evenly 1%; " * 4], ids=["words", "word", "parts"]
)
def test_long_role_texts_stay_in_their_column_and_row(text):
    _, words, _ = drawn(head_effects, made_heads(1, 3, text=text), 32)
    _, *roles = (args for args in words.values() if args[0] == ROLE)
    assert roles
    for x, y, shown, size in roles:
        assert x + text_width(shown, size) <= effectplot.PANEL
        offset = (y - effectplot.HEADS_TOP) % effectplot.HEAD_ROW
        assert size / 2 < offset < effectplot.HEAD_ROW - size / 2
        assert shown.endswith("…") == (";" not in text)


def curves_of_nothing(path, dpi):
    nothing = {"flips": 0.0, "kl_mean": 0.0, "flips_band": [0.0, 0.0], "kl_band": [0.0, 0.0]}
    alike = {name: one | {"sizes": [one["sizes"][0] | nothing]} for name, one in made().items()}
    deletion_curves(path, alike, None, **OPTIONS | {"n_context": 2, "dpi": dpi})


def heads_of_nothing(path, dpi):
    nothing = {kind: {"kl": 0.0, "kl_interval": [0.0, 0.0]} for kind in KINDS}
    axes, *_ = axes_of(head_effects, heads := [one | nothing for one in made_heads(1, 2)], 1, dpi=9)
    assert {"0", "0.01"} <= {tick.get_text() for tick in axes.get_xticklabels()}
    head_effects(path, heads, 1, dpi=dpi)


@pytest.mark.parametrize("draw", [curves_of_nothing, heads_of_nothing])
def test_where_nothing_has_an_effect_a_picture_is_drawn_in_the_size_of_dpi(tmp_path, draw):
    sizes = []
    for dpi in (25, 50):
        draw(tmp_path / "a.png", dpi)
        sizes.append(Image.open(tmp_path / "a.png").size)
    assert sizes[1] == pytest.approx([2 * side for side in sizes[0]], abs=2)
