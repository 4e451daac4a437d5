"""The page to browse: its structure, and what it escapes."""

import base64
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

PNG = png(np.full((20, 30, 3), 200, dtype=np.uint8), 100)  # 30 x 20 pixels
SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="72.4pt" height="36"/>'
HOSTILE = '</title></script>"\'><img src=x onerror="hacked=1"><script>hacked=1</script>{{7*7}}'
WIDE = "=" * 100
LINES = [("📊", "78%"), ("", "Ways: a; b")]
INSIGHTS = [
    {"headline": "First insight", "advice": "Drop it.", "lines": LINES},
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
        one = {"tag": tag, "around": [*self.open], "text": "", **dict(attributes)}
        self.elements.append(one)
        if tag not in VOID:
            self.open.append(one)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for one in self.open:
            one["text"] += data

    def all(self, tag, within=None):
        found = [one for one in self.elements if one["tag"] == tag]
        return [one for one in found if within is None or any(o is within for o in one["around"])]


def picture(out, name, content=PNG):
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def run_figures(out, n_layers=3, n_samples=3, title="goal {}, step {}", kinds=("heatmap", "lines")):
    picture(out, "attention_layers.png")
    for layer in range(n_layers):
        picture(out, f"layer_{layer}/attention_summary_layer{layer}.png")
        for i in range(n_samples):
            for kind in kinds:
                picture(out, f"layer_{layer}/attention_{kind}_sample{i}_layer{layer}.png")
    metrics = Metrics(n_samples, range(n_layers), [[0]] * n_layers)
    metrics.values[:] = 0.5
    decisions = []
    for i in range(n_samples):
        labels = {"goal_row": i % 2, "goal_col": 0}
        decisions.append(Decision([], [], [], 0, title=title.format(i % 2, i), labels=labels))
    return figures_of(out, decisions, metrics)


def written(out, figures=(), **changes):
    given = {"title": "Attention", "facts": {"Model": "2 layers"}, "insights": INSIGHTS}
    return write_page(out, **given | {"tables": TABLES, "figures": figures} | changes)


def page_of(*args, **changes):
    return Page(written(*args, **changes))


def test_insights_come_first_then_tables_then_pictures_by_layer_and_sample(tmp_path):
    page = page_of(tmp_path, run_figures(tmp_path)[::-1])
    said = page.all("main")[0]["text"]
    order = ["Model", "First insight", "Drop it.", "📊", "78%", "Second", "layer  entropy", WIDE]
    places = [said.index(text) for text in order]
    assert places == sorted(places)
    shown = [(f.get("data-layer"), f.get("data-sample")) for f in page.all("figure")]
    by_sample = [(str(n), i) for n in range(3) for i in (None, "0", "0", "1", "1", "2", "2")]
    assert shown == [(None, None), *by_sample]
    ids = [section.get("id") for section in page.all("section")]
    assert ids == [None, "layer0", "layer1", "layer2"]
    assert "Pictures (22)" in said


def test_the_page_is_sound_html_that_a_screen_reader_can_follow(tmp_path):
    page = page_of(tmp_path, run_figures(tmp_path))
    assert page.source.startswith("<!DOCTYPE html>")
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("main")) == len(page.all("h1")) == 1
    levels = [int(one["tag"][1]) for one in page.elements if one["tag"] in ("h1", "h2", "h3", "h4")]
    assert all(b <= a + 1 for a, b in zip([0, *levels], levels, strict=False))
    ids = [one["id"] for one in page.elements if "id" in one]
    assert len(set(ids)) == len(ids)
    assert {a["href"][1:] for a in page.all("a", page.all("nav")[0])} <= set(ids)
    assert all(one["around"][-1]["tag"] == "label" for one in page.all("select"))
    images = page.all("img")
    names = {one["alt"] for one in images}
    assert len(names) == len(images) == 22
    assert "heatmap, layer 1, sample 2" in names
    shapes = {(one["width"], one["height"], one["loading"]) for one in images}
    assert shapes == {("30", "20", "lazy")}
    assert all(one["tabindex"] == "0" and one["aria-label"] for one in page.all("pre"))
    # Nothing comes from the net, and a picture links to its file.
    assert "//" not in "".join(line for line in page.source.splitlines() if "// " not in line)
    assert not page.all("link")
    assert [one.get("src") for one in page.all("script")] == [None]
    for image in images:
        assert image["around"][-1]["href"] == image["src"]
        assert (tmp_path / unquote(image["src"])).exists()


def test_files_of_one_stem_are_one_figure_with_links_to_the_others(tmp_path):
    paths = [picture(tmp_path, f"layer_0/a.{form}", SVG) for form in ("pdf", "svg")]
    paths += [picture(tmp_path, "b.pdf"), tmp_path / "not drawn.png"]
    figures = [Figure(path, "kind", path.stem, 0) for path in paths]

    page = page_of(tmp_path, figures)
    (image,) = page.all("img")
    assert (image["src"], image["width"], image["height"]) == ("layer_0/a.svg", "72", "36")
    found = [
        [(a["href"], a["text"]) for a in page.all("a", figure)] for figure in page.all("figure")
    ]
    alone = [("b.pdf", "kind, layer 0, b as pdf")]
    assert found == [[("layer_0/a.svg", ""), ("layer_0/a.pdf", "pdf")], alone]
    picture(tmp_path, "layer_0/a.png")
    both = [a["href"] for a in page_of(tmp_path, figures).all("a") if "/a." in a["href"]]
    assert both == [f"layer_0/a.{form}" for form in ("png", "pdf", "svg")]


def test_paths_are_relative_and_quoted(tmp_path):
    name = "a folder/50% of #1? & \"so\" 'on' ü.png"
    (image,) = page_of(tmp_path, [Figure(picture(tmp_path, name), "kind", "")]).all("img")
    assert not set(image["src"]) & set(" #?&\"'")
    assert unquote(image["src"]) == name
    with pytest.raises(ValueError, match="elsewhere"):
        written(tmp_path, [Figure(picture(tmp_path.parent, "elsewhere/a.png"), "kind", "")])


def test_a_file_without_a_size_in_its_header_is_shown_without(tmp_path):
    contents = b"", PNG[:20], b"<svg/>"
    paths = [picture(tmp_path, f"{i}.png", content) for i, content in enumerate(contents)]
    images = page_of(tmp_path, [Figure(path, "kind", "") for path in paths]).all("img")
    assert len(images) == 3
    assert not any({"width", "height"} & image.keys() for image in images)


def hostile_page(out):
    told = dict.fromkeys(("headline", "advice"), HOSTILE) | {"lines": [(HOSTILE, HOSTILE)]}
    changes = {"title": HOSTILE, "facts": {HOSTILE: HOSTILE}, "insights": [told]}
    figures = [Figure(picture(out, "b.pdf"), HOSTILE, HOSTILE)]
    for i in range(2):
        of_sample = 0, i, f"{HOSTILE}{i}", {HOSTILE: HOSTILE}
        figures.append(Figure(picture(out, f"{i}.png"), HOSTILE, HOSTILE, *of_sample))
    return written(out, figures, tables=[(HOSTILE, HOSTILE)], **changes)


def test_what_is_told_of_a_picture_stands_beside_it_and_cannot_inject_markup(tmp_path):
    page = Page(hostile_page(tmp_path))
    assert (len(page.all("script")), len(page.all("img"))) == (1, 2)
    assert page.all("title")[0]["text"] == page.all("h1")[0]["text"] == HOSTILE
    one = page.all("figure")[2]
    found = [one[f"data-{name}"] for name in ("kind", "layer", "sample", "goal")]
    assert found == [HOSTILE, "0", "1", f"{HOSTILE}1"]
    parts = [part["text"] for tag in ("p", "dt", "dd") for part in page.all(tag, one)]
    assert parts == [HOSTILE] * 3
    assert page.source.count("onerror=&#34;") == page.source.count("onerror")  # never live
    (link,) = (one for one in page.all("a") if one["href"] == "b.pdf")
    assert link["text"] == f"{HOSTILE}, {HOSTILE} as pdf"
    assert "a lone ? surrogate" in page_of(tmp_path, title="a lone \ud800 surrogate").source


def test_a_single_file_holds_its_pictures(tmp_path):
    figures = run_figures(tmp_path) + [Figure(picture(tmp_path, "b.pdf", b"PDF"), "kind", "")]
    picture(tmp_path, "attention_layers.pdf")
    page = page_of(tmp_path, figures, single_file=True)
    for one in page.all("img"):
        kind, content = one["src"].split(",")
        assert (kind, base64.b64decode(content)) == ("data:image/png;base64", PNG)
    ids = {f"#{one['id']}" for one in page.elements if "id" in one}
    links = [(one["href"], one["download"]) for one in page.all("a") if one["href"] not in ids]
    assert links == [("data:application/pdf;base64,UERG", "b.pdf")]


def test_a_page_of_nothing_has_no_empty_sections(tmp_path):
    page = page_of(tmp_path, insights=[], tables=[])
    assert not page.all("h2") + page.all("form") + page.all("script") + page.all("dialog")


def test_ten_samples_take_less_than_100_kilobytes_and_the_same_bytes_again(tmp_path):
    title = "goal ({}, 4), history 61, episode 123 of 150, step {}, and what else a title may say"
    figures = run_figures(tmp_path, n_layers=4, n_samples=10, title=title)
    assert len(figures) == 85
    first, second = (written(tmp_path, figures).read_bytes() for _ in range(2))
    assert first == second
    assert len(first) < 100_000
    assert not [*tmp_path.glob("*.tmp")]


def test_the_template_is_packaged():
    root = Path(__file__).resolve().parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["historylens.pictures"] == ["*.html"]


def test_pictures_of_samples_come_with_title_goal_and_metrics_of_their_layer(tmp_path):
    heatmap = "attention_heatmap_sample1_layer"
    names = f"layer_1/{heatmap}1", f"layer_4/{heatmap}4", f"layer_4/{heatmap}4_page2"
    more = "attention_map_sample0", "trajectory_2/layer_4/attention_lines_timestep17_layer4"
    for name in names + more:
        picture(tmp_path, f"{name}.png")
    metrics = Metrics(2, [1, 4], [[0, 1]] * 2)
    metrics.values[1, 1, -1] = np.arange(len(NAMES)) + 0.123456
    own = {"recent_distant_ratio": 1000.4, "effective_tokens": 1234.5, "concentration": 0}
    for name, value in own.items():
        metrics.values[1, 1, -1, NAMES.index(name)] = value
    metrics.values[1, 0, -1] = 99.96
    decisions = [Decision([], [], [], 0, title=f"title {i}", task=3 - i) for i in range(2)]
    figures = figures_of(tmp_path, decisions, metrics)
    found = {(one.kind, one.layer, one.caption): one for one in figures}
    shown = {
        "mean attention": "0.123", "concentration": "0.00", "entropy": "2.12",
        "recent/distant": "> 1000", "effective tokens": "1234", "rewarded mass": "13.1",
    }  # fmt: skip
    for caption in ("title 1", "title 1, page 2"):
        one = found["heatmap", 4, caption]
        assert (one.sample, one.goal, one.metrics) == (1, "task 2", shown)
    assert found["heatmap", 1, "title 1"].metrics["recent/distant"] == "100"
    whole = found["map", None, "title 0"]
    assert (whole.goal, whole.metrics) == ("task 3", {})
    assert found["step lines", 4, "trajectory 2, step 17"].sample is None
    assert len(found) == 5


def test_a_goal_is_a_cell_a_task_or_unknown(tmp_path):
    picture(tmp_path, "attention_map_sample0.png")
    cell = {"goal_row": 1, "goal_col": 2, "step": 3}
    goals = {"(1, 2)": {"labels": cell, "task": 9}, "task 0": {"task": 0}, None: {}}
    for goal, given in goals.items():
        (figure,) = figures_of(tmp_path, [Decision([], [], [], 0, **given)], Metrics(1, [0], [[0]]))
        assert figure.goal == goal
