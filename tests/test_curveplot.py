"""The picture of deletion curves: what it draws is what it is given."""

import pytest
from matplotlib.axes import Axes
from PIL import Image

from historylens.pictures import page
from historylens.pictures.curveplot import deletion_curves

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
    deletion_curves(path, strategies, empty, n_context=n_context, worst="least-attended", dpi=dpi)
    return path.read_bytes()


@pytest.fixture
def drawn(monkeypatch):
    """What reaches matplotlib: lines as (x, y), bands as (low, high), words."""
    seen = {"lines": [], "bands": [], "words": []}
    plot, fill, text = Axes.plot, Axes.fill_between, page.Page.text

    def spy(name, function, picked):
        def called(self, *args, **kwargs):
            seen[name].append(picked(args))
            return function(self, *args, **kwargs)

        return called

    points = lambda args: [list(map(float, part)) for part in args[:2]]  # noqa: E731
    monkeypatch.setattr(Axes, "plot", spy("lines", plot, points))
    monkeypatch.setattr(Axes, "fill_between", spy("bands", fill, lambda args: args))
    monkeypatch.setattr(page.Page, "text", spy("words", text, lambda args: args[2]))
    return seen


def test_lines_run_through_what_was_measured_to_nothing_at_the_full_context(drawn, tmp_path):
    draw(tmp_path / "a.png", made())
    x = [1.0, 5.0, 20.0, 40.0]
    for y in ([40.0, 20.0, 0.0, 0.0], [100.0, 90.0, 80.0, 0.0], [60.0, 50.0, 30.0, 0.0]):
        assert any(line == [x, pytest.approx(y)] for line in drawn["lines"])
        assert any(line == [x, pytest.approx([v / 50 for v in y])] for line in drawn["lines"])


def test_what_keeps_as_many_as_it_needs_is_a_point(drawn, tmp_path):
    draw(tmp_path / "a.png", made())
    assert [[2.6], [50.0]] in drawn["lines"]
    assert [[2.6], [1.0]] in drawn["lines"]


def test_the_band_is_that_of_the_draws(drawn, tmp_path):
    draw(tmp_path / "a.png", made())
    flips, kl = drawn["bands"][:2]
    assert [list(part) for part in flips[:3]] == [
        [1, 5, 20, 40],
        pytest.approx([10, 10, 10, 0]),
        pytest.approx([70, 70, 70, 0]),
    ]
    assert [list(part) for part in kl[1:3]] == [[0.2] * 3 + [0], [1.4] * 3 + [0]]


def test_every_strategy_is_named_with_its_rule_and_who_advises_it(drawn, tmp_path):
    draw(tmp_path / "a.png", made(), {"flips": 1.0, "kl_mean": 2.0})
    words = drawn["words"]
    assert {"recent", "random", "least-attended", "threshold", "empty"} <= set(words)
    assert {"recency", "sparse", "Keep the latest transitions"} <= set(words)
    assert any("10 decisions" in text for text in words)
    assert any("2.6 here" in text for text in words)
    drawn["words"].clear()
    draw(tmp_path / "a.png", made())
    assert "empty" not in drawn["words"]


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
