"""Vector files show what the PNG shows, as programs that are not ours read them."""

import inspect
import itertools
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest
import test_effectplot
import test_metricplot
import test_timestrip
from levers import LeversAgent
from PIL import Image
from test_metricplot import UNIFORM, metric_values
from test_pictures import cells, has_white_border, sample_of, sheet_of
from test_room_map import agent_of, uniform, walk
from test_study import judged, result

from historylens import comparison
from historylens.analysis.room import RoomMap
from historylens.common.errors import UserError
from historylens.common.files import FORMATS
from historylens.comparison import CompareConfig, compare
from historylens.pictures import returns
from historylens.pictures.effectplot import deletion_curves, head_effects
from historylens.pictures.heatmap import Sheet, color_range, heatmap
from historylens.pictures.lineplot import line_plot
from historylens.pictures.metricplot import attention_over_learning, course, summary
from historylens.pictures.page import Page, save_figure
from historylens.pictures.painter import Painter
from historylens.pictures.roommap import room_map
from historylens.pictures.timestrip import attention_over_time

TOOL = Path(returns.__file__).parents[1]
SVG = "{http://www.w3.org/2000/svg}"
SAMPLE = sample_of(2)
STYLE = {"layer": 2, "heads": (0, 1), "dpi": 100}
STUDY = judged(result("recent@10", 9.0), result("random@5", 4.0, noise=2.0))
ABOUT = STUDY, returns.Picture("a model in a room", "4 goals x 6 seeds", 12.0, n_max=99)
ROOM = RoomMap.of(agent_of(3, 3), walk([(0, 0), (0, 1), (1, 1)]), uniform(2)[None], uniform(2))
CURVES = partial(deletion_curves, n_context=40, worst=test_effectplot.WORST, dpi=100)
KINDS = {  # function, its numbers, its title, how many images are pasted
    "heatmap": (partial(heatmap, scale=color_range(SAMPLE), **STYLE), (SAMPLE,),
                "Attention heatmap · layer 2 · 2 heads", 7),
    "lines": (partial(line_plot, **STYLE), (SAMPLE,), "Attention lines · layer 2", 2),
    "summary": (partial(summary, layer=2, heads="heads", dpi=100), (metric_values(12), UNIFORM),
                "Attention summary · layer 2 · 12 samples", 0),
    "layers": (partial(course, layers=[0, 1, 2], heads="heads", dpi=100),
               (metric_values(3, 12), UNIFORM),
               "Attention across layers · 12 samples", 0),
    "curves": (CURVES, (test_effectplot.made(), test_effectplot.NO_HISTORY),
               "Effect of dropping history · 10 decisions", 0),
    "heads": (partial(head_effects, dpi=100), (test_effectplot.made_heads(1, 2), 32),
              "Which heads act, and what they read", 0),
    "map": (partial(room_map, dpi=100), (ROOM, ["layer 0"], "Attention in the room", "one"),
            "Attention in the room", 3),
    "learning": (partial(attention_over_learning, dpi=100, title="Attention over learning"),
                 (test_metricplot.made(3, 1),), "Attention over learning", 0),
    "time": (partial(attention_over_time, dpi=100, **test_timestrip.TEXTS),
             ({0: test_timestrip.play(20, 12)[0]}, np.array([0, 10]), np.arange(20) > 15),
             "Attention over time · rollout 0", 2),
    "by budget": (returns.draw_by_budget, ABOUT,
                  "What compressed history earns · a model in a room", 0),
    "by episode": (returns.draw_by_episode, ABOUT, "How fast it adapts · a model in a room", 0),
}  # fmt: skip
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with every picture in every format, and the shapes of what was pasted."""
    folder, pasted, ticks = tmp_path_factory.mktemp("drawn"), {}, []
    Sheet.cache_clear()
    with Painter(1, drawn=lambda: ticks.append(1), formats=FORMATS) as painter:
        for kind, (function, args, *_) in KINDS.items():
            with mock.patch.object(Page, "paste", autospec=True, side_effect=Page.paste) as paste:
                painter.draw(function, folder / f"{kind}.png", *args)
            pasted[kind] = {one.args[3].shape[1::-1] for one in paste.call_args_list}
    assert painter.n_drawn == len(ticks) == len(KINDS) * len(FORMATS)
    return folder, pasted


def ask(program, *args):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    return subprocess.run([program, *map(str, args)], check=True, capture_output=True).stdout


def pixels_of(path, folder):
    """A vector file as 100 pixels an inch, by a program that is not ours."""
    to = folder / "raster"
    if path.suffix == ".pdf":
        ask("pdftoppm", "-r", 100, "-png", "-singlefile", path, to)
    else:
        ask("rsvg-convert", "--dpi-x", 100, "--dpi-y", 100, "-o", to.with_suffix(".png"), path)
    return np.asarray(Image.open(to.with_suffix(".png")).convert("RGB"))


@each_kind
def test_the_title_of_a_pdf_can_be_found_and_its_fonts_are_embedded_and_not_of_type_3(drawn, kind):
    path = drawn[0] / f"{kind}.pdf"
    assert KINDS[kind][2] in ask("pdftotext", "-layout", path, "-").decode()
    _, _, *fonts = ask("pdffonts", path).decode().splitlines()
    assert fonts
    for font in fonts:
        assert "TrueType" in font
        assert font.split()[-5] == "yes"  # embedded


@each_kind
@pytest.mark.parametrize("form", ["pdf", "svg"])
def test_a_vector_file_looks_like_the_png(drawn, tmp_path, kind, form):
    png = np.asarray(Image.open(drawn[0] / f"{kind}.png").convert("RGB")).astype(int)
    vectors = pixels_of(drawn[0] / f"{kind}.{form}", tmp_path).astype(int)
    assert np.abs(np.subtract(png.shape, vectors.shape)).max() <= 1  # of a page of half a pixel
    height, width = (side // 20 for side in png.shape[:2])  # of blocks: edges are drawn otherwise
    blurred = [
        one[: 20 * height, : 20 * width].reshape(height, 20, width, 20, 3).mean((1, 3))
        for one in (png, vectors)
    ]
    differ = np.abs(blurred[0] - blurred[1])
    assert differ.mean() < 3
    assert differ.max() < 40


@pytest.mark.parametrize("form", ["pdf", "svg"])
def test_each_weight_of_a_map_has_the_colour_that_it_has_in_the_png(drawn, tmp_path, form):
    png = np.asarray(Image.open(drawn[0] / "heatmap.png").convert("RGB"))
    vectors, sheet = pixels_of(drawn[0] / f"heatmap.{form}", tmp_path), sheet_of(SAMPLE)
    for corner in sheet.corners:
        own = (cells(pixels, sheet, corner, 31) for pixels in (png, vectors))
        np.testing.assert_array_equal(*own)


@each_kind
def test_what_is_pasted_is_an_image_of_all_its_pixels_and_a_pdf_has_no_other(drawn, kind):
    folder, pasted = drawn
    _, _, *rows = ask("pdfimages", "-list", folder / f"{kind}.pdf").decode().splitlines()
    assert {tuple(map(int, row.split()[3:5])) for row in rows} == pasted[kind]
    assert len(rows) == KINDS[kind][3]


@each_kind
def test_an_svg_is_of_the_pages_size_needs_no_font_and_has_as_images_what_is_pasted(drawn, kind):
    (folder, pasted), sides = drawn, ("width", "height")
    root = ElementTree.parse(folder / f"{kind}.svg").getroot()
    assert root.tag == f"{SVG}svg"
    assert len(list(root.iter(f"{SVG}path"))) > 20
    assert not list(root.iter(f"{SVG}text"))
    images = list(root.iter(f"{SVG}image"))
    assert {tuple(int(one.get(side)) for side in sides) for one in images} == pasted[kind]
    assert len(images) == KINDS[kind][3]
    assert all("pixelated" in one.get("style") for one in images)
    size = [float(root.get(side).removesuffix("pt")) / 0.72 for side in sides]
    png = Image.open(folder / f"{kind}.png").convert("RGB")
    assert size == pytest.approx(png.size, abs=1)
    assert has_white_border(np.asarray(png))


@pytest.mark.parametrize("kind", ["heatmap", "curves", "map", "by budget", "by episode"])
@pytest.mark.parametrize("form", FORMATS)
def test_the_same_numbers_give_the_same_bytes_without_a_date(drawn, tmp_path, kind, form):
    function, args, *_ = KINDS[kind]
    function(tmp_path / f"a.{form}", *args)
    content = (drawn[0] / f"{kind}.{form}").read_bytes()
    assert content == (tmp_path / f"a.{form}").read_bytes()
    assert not any(word in content for word in (b"Date", b"dc:date", b"Matplotlib v"))


def page_of(path, *dropped):
    """A page that keeps a word, drops others and ends with a line, an image and axes."""
    page = Page(300, 200, dpi=100)
    page.text(20, 20, "stays")
    page.keep()
    for word in dropped:
        page.text(20, 60, word)
        page.lines([[(0, 0), (300, 200)]], colors="red")
        page.paste(10, 100, np.zeros((30, 20, 3), np.uint8))
        page.restore()
    page.paste(200, 20, np.full((7, 5, 3), 99, np.uint8))
    page.plot(60, 100, 200, 60).plot([1, 3, 2])
    page.save(path)
    return path.read_bytes(), page


@pytest.mark.parametrize("form", FORMATS)
def test_restore_drops_all_that_was_drawn_since_keep_and_one_file_leaves_the_next(tmp_path, form):
    path = tmp_path / f"a.{form}"
    content, page = page_of(path, "goes", "goes too")
    assert content == page_of(path)[0]
    assert form != "svg" or b"stays" in content
    if form != "png":  # which draws axes onto the page
        page.save(tmp_path / "b.png")
        assert (tmp_path / "b.png").read_bytes() == page_of(tmp_path / "c.png")[0]


def page_of_text(path, dpi=100):
    page = Page(300, 200, dpi)
    page.text(20, 20, "Some text, …")
    page.save(path)
    return path.read_bytes()


def test_a_vector_file_is_the_same_at_any_dpi_and_by_another_process(tmp_path):
    code = f"""if True:
        import sys, types
        from pathlib import Path
        for name in ("historylens", "historylens.pictures"):  # torch takes a while to import
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(Path({str(TOOL)!r}, *name.split(".")[1:]))]
        from historylens.pictures.page import Page, save_figure
    """
    code += f"\n{inspect.getsource(page_of_text)}for path in sys.argv[1:]: page_of_text(Path(path))"
    environment = os.environ | {"PYTHONHASHSEED": "1"}  # here it is another one
    paths = [tmp_path / f"other.{form}" for form in ("pdf", "svg")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, env=environment)
    for path, dpi in itertools.product(paths, (50, 300)):
        assert page_of_text(tmp_path / f"own{path.suffix}", dpi) == path.read_bytes()


def test_a_page_is_drawn_in_the_order_of_the_calls_with_its_axes_on_top(tmp_path):
    page = Page(100, 100, dpi=100)
    page.lines([[(0, 30), (100, 30)]], colors="red", linewidths=20)
    page.paste(0, 0, np.full((60, 50, 3), 200, np.uint8))
    page.lines([[(25, 0), (25, 100)]], colors="blue", linewidths=6)
    page.plot(60, 0, 40, 100).set_facecolor("lime")
    for form in ("pdf", "svg"):
        page.save(tmp_path / f"a.{form}")
        pixels = pixels_of(tmp_path / f"a.{form}", tmp_path)
        places = {(30, 10): [200] * 3, (30, 25): [0, 0, 255], (30, 80): [0, 255, 0]}
        for place, colour in {(30, 55): [255, 0, 0], (90, 5): [255] * 3, **places}.items():
            assert pixels[place].tolist() == colour


def test_texts_of_a_column_stand_below_each_other_in_their_size_and_colour():
    column, texts = Page(100, 100, dpi=100), Page(100, 100, dpi=100)
    column.column(10, 20, ["one", "two"], 30, color="red")
    for text, y in (("one", 20), ("two", 50)):
        texts.text(10, y, text, 8.5, color="red")
    assert (column.pixels == texts.pixels).all()


def test_a_file_is_whole_or_as_it_was_and_other_formats_are_refused_by_name(tmp_path):
    content, page = page_of(tmp_path / "a.pdf")
    with (
        mock.patch.object(page.figure.canvas, "print_figure", side_effect=OSError("full")),
        pytest.raises(OSError, match="full"),
    ):
        page.save(tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes() == content
    with pytest.raises(UserError, match=r"end in \.png, \.pdf, \.svg, got .*a\.jpg"):
        save_figure(page.figure, tmp_path / "a.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pdf"]


def test_a_comparison_draws_the_formats_asked_for_and_no_others(tmp_path, monkeypatch, capsys):
    for name in ("draw_by_budget", "draw_by_episode"):
        monkeypatch.setattr(returns, name, lambda path, *_: path.write_text(path.suffix))
    config = {"strategies": ["recent"], "budgets": [3], "seeds": 2, "episodes": 3, "confirm": 0}
    for formats in (None, ["pdf", "svg"], ["svg", "svg"], ["png"]):
        compare(LeversAgent(), CompareConfig(**config, out=str(tmp_path), format=formats))
        forms = [form for form in FORMATS if form in (formats or ["png"])]
        names = [f"return_by_{what}.{form}" for form in forms for what in ("budget", "episode")]
        assert {path.name for path in tmp_path.glob("return*")} == set(names)
        said = " ".join(capsys.readouterr().out.split()).partition(f"In {tmp_path}/: ")[2]
        assert said == f"index.html, {', '.join(names)}, results.csv, results.json."
        for path in tmp_path.glob("return*"):
            assert path.read_text() == path.suffix


def test_formats_that_there_are_not_are_refused(capsys):
    with pytest.raises(UserError, match="expected --format of png, pdf, svg, got jpg"):
        CompareConfig(format=["png", "jpg"])
    with pytest.raises(SystemExit, match="2"):
        comparison.main(["--format", "png", "jpg"])
    assert "--format: invalid choice: 'jpg'" in capsys.readouterr().err
