"""The page to browse: its structure, what it escapes, and how it behaves in a browser."""

import base64
import shutil
import time
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from historylens.history import Decision
from historylens.metrics import NAMES, Metrics
from historylens.pictures.browse import Figure, figures_of, write_page
from historylens.pictures.page import png

CHROMIUM = shutil.which("chromium")
PNG = png(np.full((20, 30, 3), 200, dtype=np.uint8), 100)  # 30 x 20 pixels
SVG = (
    b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="72.4pt" height="36pt"/>'
)
HOSTILE = (
    '</title></script>"\'><img src=x onerror="window.hacked=1"><script>hacked=1</script>{{7*7}}'
)
WIDE = "=" * 100
INSIGHTS = [
    {
        "headline": "First insight",
        "advice": "Drop it.",
        "lines": [("📊", "78%"), ("", "Ways: a; b")],
    },
    {"headline": "Second insight", "advice": "Keep it.", "lines": []},
]
TABLES = [("Metrics per layer", f"layer  entropy\n    0     3.22\n{WIDE}")]
VOID = {"meta", "img", "link", "br", "input"}


class Page(HTMLParser):
    """Elements in order: tag, attributes, tags around it, and all text within."""

    def __init__(self, path):
        super().__init__()
        self.source, self.elements, self.open = path.read_text(encoding="utf-8"), [], []
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)  # none twice
        one = {"tag": tag, "in": [o["tag"] for o in self.open], "text": "", **dict(attributes)}
        one["around"] = list(self.open)
        self.elements.append(one)
        if tag not in VOID:
            self.open.append(one)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for one in self.open:
            one["text"] += data

    def all(self, tag, **wanted):
        found = [one for one in self.elements if one["tag"] == tag]
        return [one for one in found if wanted.items() <= one.items()]

    def within(self, tag, outer):
        return [one for one in self.all(tag) if any(o is outer for o in one["around"])]


def picture(out, name, content=PNG):
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def run_figures(out, n_layers=3, n_samples=3, title="goal {}, step {}", kinds=("heatmap", "lines")):
    """Pictures of a run, and its figures."""
    picture(out, "attention_layers.png")
    for layer in range(n_layers):
        picture(out, f"layer_{layer}/attention_summary_layer{layer}.png")
        for i in range(n_samples):
            for kind in kinds:
                picture(out, f"layer_{layer}/attention_{kind}_sample{i}_layer{layer}.png")
    metrics = Metrics(n_samples, range(n_layers), [[0]] * n_layers)
    metrics.values[:] = 0.5
    decisions = [
        Decision(
            [], [], [], 0, title=title.format(i % 2, i), labels={"goal_row": i % 2, "goal_col": 0}
        )
        for i in range(n_samples)
    ]
    return figures_of(out, decisions, metrics)


def written(out, figures=(), **changes):
    given = {"title": "Attention", "facts": {"Model": "2 layers"}, "insights": INSIGHTS}
    return write_page(out, **given | {"tables": TABLES, "figures": figures} | changes)


# what is in it


def test_insights_come_first_then_tables_then_pictures_by_layer_and_sample(tmp_path):
    page = Page(written(tmp_path, run_figures(tmp_path)[::-1]))
    said = page.all("main")[0]["text"]
    order = ["Model", "First insight", "Drop it.", "📊", "78%", "Second", "layer  entropy", WIDE]
    places = [said.index(text) for text in [*order, "Layer 0", "Layer 1", "Layer 2"]]
    assert places[:-3] == sorted(places[:-3])  # (the layers are in the navigation as well)
    shown = [(f.get("data-layer"), f.get("data-sample")) for f in page.all("figure")]
    by_sample = [(str(n), i) for n in range(3) for i in (None, "0", "0", "1", "1", "2", "2")]
    assert shown == [(None, None), *by_sample]
    assert [section.get("id") for section in page.all("section")] == [
        None,
        *(f"layer{n}" for n in range(3)),
    ]
    assert "Pictures (22)" in said


def test_the_page_is_sound_html_that_a_screen_reader_can_follow(tmp_path):
    page = Page(written(tmp_path, run_figures(tmp_path)))
    assert page.source.startswith("<!DOCTYPE html>")
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("main")) == len(page.all("h1")) == 1
    levels = [int(one["tag"][1]) for one in page.elements if one["tag"] in ("h1", "h2", "h3", "h4")]
    assert all(b <= a + 1 for a, b in zip([0, *levels], levels, strict=False))
    ids = [one["id"] for one in page.elements if "id" in one]
    assert len(set(ids)) == len(ids)
    assert {a["href"][1:] for a in page.within("a", page.all("nav")[0])} <= set(ids)
    assert all("label" in one["in"] for one in page.all("select"))
    images = page.all("img")
    assert len({one["alt"] for one in images}) == len(images) == 22
    assert "heatmap, layer 1, sample 2" in {one["alt"] for one in images}
    for one in images:
        assert (one["width"], one["height"], one["loading"]) == ("30", "20", "lazy")
    assert all(one["tabindex"] == "0" and one["aria-label"] for one in page.all("pre"))


def test_a_picture_has_its_caption_goal_and_metrics(tmp_path):
    figure = Figure(picture(tmp_path, "a.png"), "map", "late", 4, 7, "(1, 2)", {"entropy": "3.22"})
    page = Page(written(tmp_path, [figure]))
    (one,) = page.all("figure")
    assert [one[f"data-{k}"] for k in ("kind", "layer", "sample", "goal")] == [
        "map",
        "4",
        "7",
        "(1, 2)",
    ]
    assert [d["text"] for d in page.within("dt", one) + page.within("dd", one)] == [
        "entropy",
        "3.22",
    ]
    assert page.all("figcaption")[0]["text"].startswith("late")


def test_nothing_comes_from_the_net_and_without_javascript_only_controls_are_missing(tmp_path):
    page = Page(written(tmp_path, run_figures(tmp_path)))
    assert "//" not in "".join(line for line in page.source.splitlines() if "// " not in line)
    assert not page.all("link")
    assert [one.get("src") for one in page.all("script")] == [None]
    filters, _ = page.all("form")
    assert "hidden" in filters
    assert "dialog" in page.all("form")[1]["in"]  # closed until the script opens it
    for image, around in ((i, i["around"][-1]) for i in page.all("img")):
        assert around["href"] == image["src"]  # a picture links to its file
        assert (tmp_path / unquote(image["src"])).exists()


def test_files_of_one_stem_are_one_figure_with_links_to_the_others(tmp_path):
    paths = [picture(tmp_path, f"layer_0/a.{form}", SVG) for form in ("pdf", "svg")]
    paths.append(picture(tmp_path, "b.pdf"))
    figures = [Figure(path, "kind", path.stem, 0) for path in [*paths, tmp_path / "not drawn.png"]]
    page = Page(written(tmp_path, figures))
    both, alone = page.all("figure")
    (image,) = page.all("img")
    assert (image["src"], image["width"], image["height"]) == ("layer_0/a.svg", "72", "36")
    links = [(one["href"], one["text"]) for one in page.within("a", both)]
    assert links == [("layer_0/a.svg", ""), ("layer_0/a.pdf", "pdf")]
    assert [(one["href"], one["text"]) for one in page.within("a", alone)] == [
        ("b.pdf", "kind, layer 0, b as pdf")
    ]
    picture(tmp_path, "layer_0/a.png")
    page = Page(written(tmp_path, figures))
    assert [one["href"] for one in page.within("a", page.all("figure")[0])] == [
        f"layer_0/a.{f}" for f in ("png", "pdf", "svg")
    ]


def test_paths_are_relative_and_quoted(tmp_path):
    name = "a folder/50% of #1? & \"so\" 'on' ü.png"
    page = Page(written(tmp_path, [Figure(picture(tmp_path, name), "kind", "")]))
    (image,) = page.all("img")
    assert not set(image["src"]) & set(" #?&\"'")
    assert unquote(image["src"]) == name
    with pytest.raises(ValueError, match="elsewhere"):
        written(tmp_path, [Figure(picture(tmp_path.parent, "elsewhere/a.png"), "kind", "")])


def test_a_file_without_a_size_in_its_header_is_shown_without(tmp_path):
    for i, content in enumerate((b"", PNG[:20], b"<svg/>")):
        page = Page(written(tmp_path, [Figure(picture(tmp_path, f"{i}.png", content), "kind", "")]))
        assert not {"width", "height"} & page.all("img")[0].keys()


def test_titles_and_labels_cannot_inject_markup(tmp_path):
    hostile = dict.fromkeys(("headline", "advice"), HOSTILE) | {"lines": [(HOSTILE, HOSTILE)]}
    of_figure = {"goal": HOSTILE, "metrics": {HOSTILE: HOSTILE}, "layer": 0}
    figures = [Figure(picture(tmp_path, "a.png"), HOSTILE, HOSTILE, **of_figure)]
    figures.append(Figure(picture(tmp_path, "b.pdf"), HOSTILE, HOSTILE))
    changes = {"title": HOSTILE, "facts": {HOSTILE: HOSTILE}, "insights": [hostile]}
    page = Page(written(tmp_path, figures, tables=[(HOSTILE, HOSTILE)], **changes))
    assert len(page.all("script")) == len(page.all("img")) == 1
    assert page.all("title")[0]["text"] == page.all("h1")[0]["text"] == HOSTILE
    assert page.all("figure")[1]["data-goal"] == page.all("figure")[1]["data-kind"] == HOSTILE
    assert page.source.count("onerror=&#34;") == page.source.count("onerror")  # never live
    assert page.all("a", href="b.pdf")[0]["text"] == f"{HOSTILE}, {HOSTILE} as pdf"
    lone = {"title": "a lone \ud800 surrogate"}
    assert "a lone ? surrogate" in Page(written(tmp_path, figures, **lone)).source


def test_a_single_file_holds_its_pictures(tmp_path):
    figures = run_figures(tmp_path) + [Figure(picture(tmp_path, "b.pdf", b"PDF"), "kind", "")]
    picture(tmp_path, "attention_layers.pdf")
    page = Page(written(tmp_path, figures, single_file=True))
    for one in page.all("img"):
        kind, content = one["src"].split(",")
        assert (kind, base64.b64decode(content)) == ("data:image/png;base64", PNG)
    ids = {f"#{one['id']}" for one in page.elements if "id" in one}
    links = [one for one in page.all("a") if one["href"] not in ids]
    assert [(one["href"], one["download"]) for one in links] == [
        ("data:application/pdf;base64,UERG", "b.pdf")
    ]


def test_the_same_content_gives_the_same_bytes(tmp_path):
    first, second = (written(tmp_path, run_figures(tmp_path)).read_bytes() for _ in range(2))
    assert first == second
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_a_page_of_nothing_has_no_empty_sections(tmp_path):
    page = Page(written(tmp_path, insights=[], tables=[]))
    assert not page.all("h2") + page.all("form") + page.all("script") + page.all("dialog")


def test_ten_samples_take_less_than_300_kilobytes(tmp_path):
    title = "goal ({}, 4), history 61, episode 123 of 150, step {}, and what else a title may say"
    figures = run_figures(tmp_path, n_layers=4, n_samples=10, title=title)
    assert len(figures) == 85
    assert written(tmp_path, figures).stat().st_size < 300_000 / 3


def test_the_template_is_packaged():
    root = Path(__file__).resolve().parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["historylens.pictures"] == ["*.html"]


# figures of an analysis


def test_pictures_of_samples_come_with_title_goal_and_metrics_of_their_layer(tmp_path):
    for layer in (1, 4):
        picture(tmp_path, f"layer_{layer}/attention_heatmap_sample1_layer{layer}.png")
    picture(tmp_path, "layer_4/attention_heatmap_sample1_layer4_page2.png")
    picture(tmp_path, "attention_map_sample0.png")
    picture(tmp_path, "trajectory_2/layer_4/attention_lines_timestep17_layer4.png")
    metrics = Metrics(2, [1, 4], [[0, 1]] * 2)
    metrics.values[1, 1, -1] = np.arange(len(NAMES)) + 0.123456
    own = {"recent_distant_ratio": 1000.4, "effective_tokens": 1234.5, "concentration": 0}
    for name, value in own.items():
        metrics.values[1, 1, -1, NAMES.index(name)] = value
    metrics.values[1, 0, -1] = 99.96
    decisions = [Decision([], [], [], 0, title=f"title {i}", task=3 - i) for i in range(2)]
    found = {(f.kind, f.layer, f.caption): f for f in figures_of(tmp_path, decisions, metrics)}
    page_1, page_2 = (found["heatmap", 4, f"title 1{more}"] for more in ("", ", page 2"))
    assert (page_1.sample, page_1.goal) == (page_2.sample, page_2.goal) == (1, "task 2")
    assert page_1.metrics == page_2.metrics == {
        "mean attention": "0.123", "concentration": "0.00", "entropy": "2.12",
        "recent/distant": "> 1000", "effective tokens": "1234", "rewarded mass": "13.1",
    }  # fmt: skip
    assert found["heatmap", 1, "title 1"].metrics["recent/distant"] == "100"
    assert (found["map", None, "title 0"].goal, found["map", None, "title 0"].metrics) == (
        "task 3",
        {},
    )
    assert found["step lines", 4, "trajectory 2, step 17"].sample is None
    assert len(found) == 5


def test_a_goal_is_a_cell_a_task_or_unknown(tmp_path):
    picture(tmp_path, "attention_map_sample0.png")
    cell = {"goal_row": 1, "goal_col": 2, "step": 3}
    for given, goal in (
        ({"labels": cell, "task": 9}, "(1, 2)"),
        ({"task": 0}, "task 0"),
        ({}, None),
    ):
        (figure,) = figures_of(tmp_path, [Decision([], [], [], 0, **given)], Metrics(1, [0], [[0]]))
        assert figure.goal == goal


# in a browser


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens a page in a window of its own; nothing may go wrong in it, or come from elsewhere."""
    contexts, wrong = [], []

    def visit(path, width=1280, **settings):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 844}, **settings))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("requestfailed", lambda request: wrong.append(request.url[:80]))
        tab.on("request", lambda r: r.url.startswith(("file:", "data:")) or wrong.append(r.url))
        tab.goto(path.as_uri())
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return written(out, run_figures(out))


def seen(tab):
    """Names of the figures that are not filtered out."""
    return [one.get_attribute("alt") for one in tab.locator("figure:visible img").all()]


def large(tab):
    """Names of the pictures in the large view."""
    return [one.get_attribute("alt") for one in tab.locator("dialog img").all()]


def enlarge(tab, name):
    tab.locator(f'main img[alt="{name}"]').click()


def choice(tab, name):
    return tab.get_by_role("combobox", name=name, exact=True)


def press(tab, *keys):
    for key in keys:
        tab.keyboard.press(key)
    return large(tab)


def test_filters_show_what_fits_all_of_them_and_say_how_many(run, visit):
    tab = visit(run)
    said = tab.locator(".filter output")
    assert said.inner_text() == "22 of 22 pictures"
    choice(tab, "layer").select_option("1")
    assert said.inner_text() == f"{len(seen(tab))} of 22 pictures" == "7 of 22 pictures"
    assert tab.locator("h3:visible").all_inner_texts()[-1] == "Layer 1"
    assert not tab.locator("#layer0").is_visible()
    choice(tab, "kind").select_option("lines")
    choice(tab, "goal").select_option("(0, 0)")
    assert seen(tab) == ["lines, layer 1, sample 0", "lines, layer 1, sample 2"]
    choice(tab, "sample").select_option("2")
    assert seen(tab) == ["lines, layer 1, sample 2"]
    tab.get_by_role("button", name="Show all").click()
    tab.wait_for_function("shown.length === 22")
    assert len(seen(tab)) == 22


def test_a_filter_of_one_choice_is_not_offered_and_numbers_stand_in_their_order(tmp_path, visit):
    figures = run_figures(tmp_path, n_layers=1, n_samples=11)
    tab = visit(written(tmp_path, figures))
    assert not tab.locator("select[name=layer]").is_visible()
    options = tab.locator("select[name=sample] option").all_inner_texts()
    assert options == ["all", *map(str, range(11))]


def test_keys_go_through_samples_and_layers_and_escape_closes(run, visit):
    tab = visit(run)
    enlarge(tab, "heatmap, layer 0, sample 0")
    assert large(tab) == ["heatmap, layer 0, sample 0"]
    assert tab.locator("dialog dd").count() == 6
    assert press(tab, "ArrowRight") == ["heatmap, layer 0, sample 1"]
    assert press(tab, "ArrowDown") == ["heatmap, layer 1, sample 1"]
    assert press(tab, "ArrowRight", "ArrowRight") == ["heatmap, layer 1, sample 0"]  # and round
    assert press(tab, "ArrowUp", "ArrowUp", "ArrowLeft") == ["heatmap, layer 2, sample 2"]
    tab.get_by_role("button", name="Previous layer").click()
    assert large(tab) == ["heatmap, layer 1, sample 2"]
    tab.keyboard.press("Escape")
    assert not tab.locator("dialog").is_visible()
    focused = tab.evaluate("document.activeElement.firstChild.alt")
    assert focused == "heatmap, layer 1, sample 2"
    assert press(tab, "Enter", "ArrowUp") == ["heatmap, layer 0, sample 2"]  # without a mouse


def test_where_a_kind_has_no_samples_or_layers_keys_go_to_the_next_figure(run, visit):
    tab = visit(run)
    enlarge(tab, "layers")
    assert press(tab, "ArrowRight") == ["summary, layer 0"]
    assert press(tab, "ArrowDown") == ["summary, layer 1"]
    assert press(tab, "ArrowLeft") == ["lines, layer 0, sample 2"]


def test_keys_stay_within_the_filter_and_on_the_page_of_heads(tmp_path, visit):
    for layer in range(2):
        for i in range(3):
            picture(tmp_path, f"layer_{layer}/attention_heatmap_sample{i}_layer{layer}_page2.png")
    tab = visit(written(tmp_path, run_figures(tmp_path, n_layers=2)))
    pages = tab.locator('#layer0 figure[data-sample="0"]', has_text="page 2")
    pages.locator("img").click()
    assert press(tab, "ArrowDown") == ["heatmap, layer 1, sample 0"]
    assert "page 2" in tab.locator("dialog figcaption").inner_text()
    tab.keyboard.press("Escape")
    choice(tab, "goal").select_option("(0, 0)")
    enlarge(tab, "lines, layer 0, sample 0")
    assert press(tab, "ArrowRight") == ["lines, layer 0, sample 2"]


def test_two_layers_or_samples_stand_side_by_side_and_keys_move_both(run, visit):
    tab = visit(run)
    enlarge(tab, "lines, layer 0, sample 1")
    beside = choice(tab, "beside it")
    names = [
        "nothing",
        "layer 1",
        "layer 2",
        "sample 0: goal 0, step 0",
        "sample 2: goal 0, step 2",
    ]
    assert beside.locator("option").all_inner_texts() == names
    beside.select_option("layer 2")
    assert large(tab) == ["lines, layer 0, sample 1", "lines, layer 2, sample 1"]
    left, right = (one.bounding_box() for one in tab.locator("dialog img").all())
    assert left["x"] + left["width"] <= right["x"]
    assert left["y"] == right["y"]
    assert press(tab, "ArrowRight") == ["lines, layer 0, sample 2", "lines, layer 2, sample 2"]
    assert press(tab, "ArrowDown") == ["lines, layer 1, sample 2", "lines, layer 0, sample 2"]
    assert beside.locator("option:checked").inner_text() == "layer 0"
    beside.select_option("sample 0: goal 0, step 0")
    assert large(tab) == ["lines, layer 1, sample 2", "lines, layer 1, sample 0"]
    beside.select_option("nothing")
    assert large(tab) == ["lines, layer 1, sample 2"]


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_but_a_table_is_wider_than_the_window(width, tmp_path, visit):
    figures = run_figures(tmp_path, title="an_unbroken_word" * 20)
    facts = {"Checkpoint": "folder/" * 40}
    tab = visit(written(tmp_path, figures, facts=facts, title="T" * 200), width)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    table = tab.locator("pre").evaluate("box => [box.scrollWidth, box.clientWidth]")
    assert (table[0] > table[1]) == (width == 390)
    enlarge(tab, "heatmap, layer 0, sample 0")
    choice(tab, "beside it").select_option("layer 1")
    assert tab.evaluate("dialog.scrollWidth") <= width


def test_light_and_dark_follow_the_system(run, visit):
    def colours(scheme):
        style = "(({ backgroundColor: b, color: c }) => [b, c])(getComputedStyle(document.body))"
        found = visit(run, color_scheme=scheme).evaluate(style)
        return [sum(map(int, c[4:-1].split(","))) / 3 for c in found]

    (paper, ink), (dark_paper, dark_ink) = colours("light"), colours("dark")
    assert paper - ink > 180
    assert dark_ink - dark_paper > 180


def test_all_is_there_with_javascript_disabled(run, visit):
    tab = visit(run, java_script_enabled=False)
    assert len(seen(tab)) == 22
    assert not tab.locator(".filter").is_visible()
    assert not tab.locator("dialog").is_visible()
    for text in ("First insight", "layer  entropy", "Pictures (22)"):
        assert text in tab.locator("main").inner_text()
    enlarge(tab, "heatmap, layer 1, sample 0")
    assert tab.url.endswith("layer_1/attention_heatmap_sample0_layer1.png")


def test_hostile_titles_do_nothing_anywhere(tmp_path, visit):
    paths = [picture(tmp_path, f"{i}.png") for i in range(2)]
    figures = [
        Figure(p, HOSTILE, HOSTILE, 0, i, f"{HOSTILE}{i}", {HOSTILE: HOSTILE})
        for i, p in enumerate(paths)
    ]
    tab = visit(written(tmp_path, figures, title=HOSTILE, tables=[(HOSTILE, HOSTILE)]))
    assert tab.title() == HOSTILE
    choice(tab, "goal").select_option(f"{HOSTILE}1")
    assert tab.locator("figure:visible").count() == 1
    tab.locator("select[name=goal]").select_option("")
    tab.locator("figure img").first.click()
    choice(tab, "beside it").select_option(index=1)
    assert len(large(tab)) == 2
    assert tab.evaluate("typeof hacked") == "undefined"
    assert tab.locator("script").count() == 1


def test_a_single_file_needs_nothing_beside_it(tmp_path, visit):
    figures = run_figures(tmp_path / "run")
    path = written(tmp_path / "run", figures, single_file=True)
    (tmp_path / "mail").mkdir()
    tab = visit(path.rename(tmp_path / "mail" / "report.html"))
    enlarge(tab, "heatmap, layer 0, sample 0")
    assert press(tab, "ArrowRight") == ["heatmap, layer 0, sample 1"]
    tab.wait_for_function("document.querySelector('dialog img').naturalWidth === 30")
    assert tab.locator("dialog a").count() == 0


def test_a_pdf_alone_is_opened_by_its_link_and_passed_over_by_keys(tmp_path, visit):
    names = ("a.png", "b.pdf", "c.png")
    figures = [Figure(picture(tmp_path, name), "returns", name) for name in names]
    tab = visit(written(tmp_path, figures))
    assert tab.locator("figure:visible").count() == 3
    enlarge(tab, "returns, a.png")
    assert press(tab, "ArrowRight") == ["returns, c.png"]


def test_five_hundred_samples_do_not_hang_the_browser(tmp_path, visit):
    figures = run_figures(tmp_path, n_layers=2, n_samples=500, kinds=["heatmap"])
    path = written(tmp_path, figures)
    start = time.perf_counter()
    tab = visit(path)
    opened = time.perf_counter() - start
    loaded = tab.evaluate("[...document.images].filter(one => one.naturalWidth).length")
    enlarge(tab, "layers")
    press(tab, "ArrowRight", "ArrowRight", "ArrowRight")
    choice(tab, "beside it").select_option("layer 1")
    last = press(tab, "ArrowLeft")
    took = time.perf_counter() - start
    print(f"{len(figures)} figures, {path.stat().st_size:,} bytes: opened in {opened:.1f} s")
    assert last == ["heatmap, layer 0, sample 0", "heatmap, layer 1, sample 0"]
    assert loaded < 100  # what is near the window
    assert path.stat().st_size < 4_000_000
    assert took < 60
