"""The picture of deletion curves: what it draws is what it is given."""

import itertools
from unittest import mock

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from test_pictures import axes_of

from historylens.effects.measure import budgets
from historylens.pictures.effectplot import deletion_curves, in_order
from historylens.pictures.page import Page

SIZES, WORST = (1, 5, 20), "least-attended"
OPTIONS = {"n_context": 40, "worst": WORST, "dpi": 50}
NO_HISTORY = {"flips": 0.25, "kl_mean": 0.5}


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


def test_without_random_draws_there_is_no_band_and_none_is_named():
    strategies = {name: one for name, one in made().items() if name != "random"}
    for axes in axes_of(deletion_curves, strategies, NO_HISTORY, **OPTIONS):
        assert not axes.collections
    with mock.patch.object(Page, "heading") as heading:
        axes_of(deletion_curves, strategies, None, **OPTIONS)
        axes_of(deletion_curves, made(), None, **OPTIONS)
    assert ["band" in call.args[2] for call in heading.call_args_list] == [False, True]


@pytest.mark.parametrize("n", [2, 30, 199, 300, 5000])
def test_names_of_sizes_do_not_touch_and_the_full_context_is_named(n):
    one = {"recent": {"rule": "", "advised_by": [], "sizes": [size(k, 0.5) for k in budgets(n)]}}
    axes = axes_of(deletion_curves, one, None, **OPTIONS | {"n_context": n})[0]
    FigureCanvasAgg(axes.figure).draw()
    names = axes.get_xticklabels()
    boxes = [name.get_window_extent() for name in names]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    assert names[-1].get_text() == f"{n:,}"


def draw(path, strategies, empty=None, **options):
    deletion_curves(path, strategies, empty, **OPTIONS | options)
    return path.read_bytes()


@pytest.mark.parametrize(("place", "scale"), [(0, 100.0), (1, 2.0)], ids=["flips", "kl"])
def test_lines_run_to_nothing_at_the_full_context_beside_points_a_band_and_no_history(place, scale):
    axes = axes_of(deletion_curves, made(), NO_HISTORY, **OPTIONS)[place]
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


def test_the_file_has_no_history_where_known_and_the_size_of_dpi(tmp_path):
    path = tmp_path / "a.png"
    for empty in (None, NO_HISTORY):
        draw(path, made(), empty)
        last_row = np.asarray(Image.open(path))[-20:, 50:150]  # of the legend
        assert (last_row < 100).any() == (empty is not None)
    large = Image.open(path).size
    draw(path, made(), NO_HISTORY, dpi=25)
    assert large == pytest.approx([2 * side for side in Image.open(path).size], abs=2)


@pytest.mark.parametrize(("sizes", "n_context"), [(1, 2), (3, 40)])
def test_effects_that_are_all_nothing_are_drawn(tmp_path, sizes, n_context):
    strategies = made()
    nothing = {"flips": 0.0, "kl_mean": 0.0, "flips_band": [0.0, 0.0], "kl_band": [0.0, 0.0]}
    for one in strategies.values():
        one["sizes"] = [part | nothing for part in one["sizes"][:sizes]]
    assert draw(tmp_path / "a.png", strategies, n_context=n_context).startswith(b"\x89PNG")
