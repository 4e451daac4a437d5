"""The picture of deletion curves: what it draws is what it is given."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from historylens.pictures.curveplot import deletion_curves, draw_curves, legend_rows

SIZES = (1, 5, 20)


def size(n_keep, flips, kl, **more):
    return {"n_keep": n_keep, "kept_mean": n_keep, "flips": flips, "kl_mean": kl,
            "n_decisions": 10, **more}  # fmt: skip


def entry(values, rule="Keep some.", advised=(), **more):
    sizes = [size(n, v, 2 * v, **more) for n, v in zip(SIZES, values, strict=True)]
    return {"rule": rule, "advised_by": list(advised), "sizes": sizes}


def made():
    band = {"flips_band": [0.1, 0.7], "kl_band": [0.2, 1.4]}
    own = size(3, 0.5, 1.0) | {"kept_mean": 2.6, "random": size(3, 0.9, 1.8)}
    return {
        "recent": entry((0.4, 0.2, 0.0), "Keep the latest transitions.", ["recency"]),
        "random": entry((0.6, 0.5, 0.3), "Keep any.", **band),
        "least-attended": entry((1.0, 0.9, 0.8)),
        "threshold": {"rule": "Keep " + "a lot of " * 20, "advised_by": ["sparse"], "sizes": [own]},
    }


def draw(path, strategies, empty=None, n_context=40, dpi=100):
    options = {"n_context": n_context, "worst": "least-attended", "dpi": dpi}
    deletion_curves(path, strategies, empty, **options)
    return path.read_bytes()


@pytest.fixture(params=[("flips", "flips_band", 100), ("kl_mean", "kl_band", 1)])
def drawn(request):
    """A quantity of `made()` on its axes, and how high a flip share of 1 stands there."""
    axes = Figure().add_subplot()
    styles = {name: {"label": name} for name in made()}
    draw_curves(axes, made(), styles, request.param, 0.25, 40)
    return axes, {100: 100.0, 1: 2.0}[request.param[2]]


def test_lines_run_through_what_was_measured_to_nothing_at_the_full_context(drawn):
    axes, scale = drawn
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    for name, y in (
        ("recent", (0.4, 0.2, 0.0, 0.0)),
        ("least-attended", (1.0, 0.9, 0.8, 0.0)),
        ("random", (0.6, 0.5, 0.3, 0.0)),
    ):
        np.testing.assert_allclose(lines[name], np.stack([(1, 5, 20, 40), scale * np.array(y)], 1))


def test_what_keeps_as_many_as_it_needs_is_a_point(drawn):
    axes, scale = drawn
    (point,) = [line for line in axes.lines if line.get_label() == "threshold"]
    np.testing.assert_allclose(point.get_xydata(), [(2.6, scale / 2)])


def test_the_band_is_that_of_the_draws_and_a_level_that_of_no_history(drawn):
    axes, scale = drawn
    (band,) = axes.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(6).tolist()}
    assert corners == {(40, 0), *((n, round(scale * s, 6)) for n in SIZES for s in (0.1, 0.7))}
    assert list(axes.lines[0].get_ydata()) == [0.25, 0.25]


def test_every_strategy_is_named_with_its_rule_and_who_advises_it():
    rows = {name: (advised, " ".join(rule)) for name, advised, rule in legend_rows(made())}
    assert rows["recent"] == ("recency", "Keep the latest transitions")
    assert rows["random"] == ("", "Keep any; band: the middle 90 % of the draws")
    assert rows["threshold"][0] == "sparse"
    assert rows["threshold"][1].endswith("; 2.6 here")
    assert set(rows) == set(made())


def test_no_history_is_in_the_picture_where_it_is_known(tmp_path):
    for empty in (None, {"flips": 1.0, "kl_mean": 2.0}):
        draw(tmp_path / "a.png", made(), empty)
        last_row = np.asarray(Image.open(tmp_path / "a.png"))[-40:, 100:300]  # of the legend
        assert (last_row < 100).any() == (empty is not None)


def test_the_same_numbers_give_the_same_bytes_and_others_do_not(tmp_path):
    first = draw(tmp_path / "a.png", made())
    assert draw(tmp_path / "b.png", made()) == first
    other = made()
    other["recent"]["sizes"][0]["flips"] = 0.5
    assert draw(tmp_path / "b.png", other) != first


def test_dpi_scales_the_page(tmp_path):
    for dpi in (50, 100):
        draw(tmp_path / f"{dpi}.png", made(), dpi=dpi)
    small, large = (Image.open(tmp_path / f"{dpi}.png").size for dpi in (50, 100))
    assert large == pytest.approx([2 * side for side in small], abs=2)


@pytest.mark.parametrize("sizes", [1, 3])
def test_effects_that_are_all_nothing_are_drawn(tmp_path, sizes):
    strategies = made()
    for one in strategies.values():
        one["sizes"] = [part | {"flips": 0.0, "kl_mean": 0.0} for part in one["sizes"][:sizes]]
    for part in strategies["random"]["sizes"]:
        part |= {"flips_band": [0.0, 0.0], "kl_band": [0.0, 0.0]}
    n_context = 2 if sizes == 1 else 40
    assert draw(tmp_path / "a.png", strategies, n_context=n_context).startswith(b"\x89PNG")
