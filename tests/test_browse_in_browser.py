"""The page to browse, in a browser: filters, the large view, keys, widths, and no script."""

import shutil

import pytest
from test_browse import HOSTILE, hostile_page, picture, run_figures, written

from historylens.pictures.browse import Figure


@pytest.fixture(scope="module")
def chromium():
    playwright, path = pytest.importorskip("playwright.sync_api"), shutil.which("chromium")
    if path is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens a page in a window of its own; nothing may go wrong in it, or come from elsewhere."""
    contexts, wrong = [], []

    def failed(request):  # what the window still loads as it closes may
        if request.failure != "net::ERR_ABORTED":
            wrong.append(f"{request.url[:80]} {request.failure}")

    def visit(path, width=1280, **settings):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 844}, **settings))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("requestfailed", failed)
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


def names(tab, images):
    return [one.get_attribute("alt") for one in tab.locator(images).all()]


def seen(tab):
    """Names of the figures that are not filtered out."""
    return names(tab, "figure:visible img")


def enlarge(tab, name):
    tab.locator(f'main img[alt="{name}"]').click()


def choice(tab, name):
    return tab.get_by_role("combobox", name=name, exact=True)


def press(tab, *keys):
    """Names of the pictures in the large view then."""
    for key in keys:
        tab.keyboard.press(key)
    return names(tab, "dialog img")


def close(tab):
    tab.keyboard.press("Escape")
    assert not tab.locator("dialog").is_visible()


def test_filters_show_what_fits_all_of_them_and_say_how_many(run, visit):
    tab = visit(run)
    said = tab.locator(".filter output")
    assert said.inner_text() == f"{len(seen(tab))} of 22 pictures" == "22 of 22 pictures"
    choice(tab, "layer").select_option("1")
    assert said.inner_text() == f"{len(seen(tab))} of 22 pictures" == "7 of 22 pictures"
    assert tab.locator("h3:visible").all_inner_texts()[-1] == "Layer 1"
    assert not tab.locator("#layer0").is_visible()
    choice(tab, "kind").select_option("lines")
    choice(tab, "goal").select_option("(0, 0)")
    assert seen(tab) == ["lines, layer 1, sample 0", "lines, layer 1, sample 2"]
    enlarge(tab, "lines, layer 1, sample 0")
    assert press(tab, "ArrowRight") == ["lines, layer 1, sample 2"]  # keys stay within
    close(tab)
    choice(tab, "sample").select_option("2")
    assert seen(tab) == ["lines, layer 1, sample 2"]
    tab.get_by_role("button", name="Show all").click()
    tab.wait_for_function("shown.length === 22")
    assert len(seen(tab)) == 22


def test_a_filter_of_one_choice_is_not_offered_and_numbers_stand_in_their_order(tmp_path, visit):
    figures = run_figures(tmp_path, n_layers=1, n_samples=11)
    tab = visit(written(tmp_path, figures))
    assert not tab.locator("select[name=layer]").is_visible()
    options = choice(tab, "sample").locator("option").all_inner_texts()
    assert options == ["all", *map(str, range(11))]


def test_keys_go_through_samples_and_layers_and_escape_closes(run, visit):
    tab = visit(run)
    enlarge(tab, "heatmap, layer 0, sample 0")
    assert press(tab) == ["heatmap, layer 0, sample 0"]
    assert tab.locator("dialog dd").count() == 6
    assert press(tab, "ArrowRight") == ["heatmap, layer 0, sample 1"]
    assert press(tab, "ArrowDown") == ["heatmap, layer 1, sample 1"]
    assert press(tab, "ArrowRight", "ArrowRight") == ["heatmap, layer 1, sample 0"]  # and round
    assert press(tab, "ArrowUp", "ArrowUp", "ArrowLeft") == ["heatmap, layer 2, sample 2"]
    tab.get_by_role("button", name="Previous layer").click()
    assert press(tab) == ["heatmap, layer 1, sample 2"]
    close(tab)
    tab.wait_for_function("document.activeElement.firstChild.alt === 'heatmap, layer 1, sample 2'")
    assert press(tab, "Enter", "ArrowUp") == ["heatmap, layer 0, sample 2"]  # without a mouse
    close(tab)
    enlarge(tab, "layers")  # a kind without samples or layers: to the next figure
    assert press(tab, "ArrowRight") == ["summary, layer 0"]
    assert press(tab, "ArrowDown") == ["summary, layer 1"]
    assert press(tab, "ArrowLeft") == ["lines, layer 0, sample 2"]


def test_keys_stay_on_the_page_of_heads(tmp_path, visit):
    for layer in range(2):
        picture(tmp_path, f"layer_{layer}/attention_heatmap_sample0_layer{layer}_page2.png")
    tab = visit(written(tmp_path, run_figures(tmp_path, n_layers=2)))
    tab.locator("#layer0 figure", has_text="page 2").locator("img").click()
    assert press(tab, "ArrowDown") == ["heatmap, layer 1, sample 0"]
    assert "page 2" in tab.locator("dialog figcaption").inner_text()


def test_two_layers_or_samples_stand_side_by_side_and_keys_move_both(run, visit):
    tab = visit(run)
    enlarge(tab, "lines, layer 0, sample 1")
    beside = choice(tab, "beside it")
    samples = ["sample 0: goal 0, step 0", "sample 2: goal 0, step 2"]
    expected = ["nothing", "layer 1", "layer 2", *samples]
    assert beside.locator("option").all_inner_texts() == expected
    beside.select_option("layer 2")
    assert press(tab) == ["lines, layer 0, sample 1", "lines, layer 2, sample 1"]
    left, right = (one.bounding_box() for one in tab.locator("dialog img").all())
    assert left["x"] + left["width"] <= right["x"]
    assert left["y"] == right["y"]
    assert press(tab, "ArrowRight") == ["lines, layer 0, sample 2", "lines, layer 2, sample 2"]
    assert press(tab, "ArrowDown") == ["lines, layer 1, sample 2", "lines, layer 0, sample 2"]
    assert beside.locator("option:checked").inner_text() == "layer 0"
    beside.select_option(samples[0])
    assert press(tab) == ["lines, layer 1, sample 2", "lines, layer 1, sample 0"]
    beside.select_option("nothing")
    assert press(tab) == ["lines, layer 1, sample 2"]


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_but_a_table_is_wider_than_the_window(width, tmp_path, visit):
    figures = run_figures(tmp_path, title="an_unbroken_word" * 20)
    long = {"facts": {"Checkpoint": "folder/" * 40}, "title": "T" * 200}
    tab = visit(written(tmp_path, figures, **long), width)
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


def test_without_javascript_only_controls_are_missing(run, visit):
    tab = visit(run, java_script_enabled=False)
    assert len(seen(tab)) == 22
    assert not tab.locator(".filter").is_visible()
    assert not tab.locator("dialog").is_visible()
    for text in ("First insight", "layer  entropy", "Pictures (22)"):
        assert text in tab.locator("main").inner_text()
    enlarge(tab, "heatmap, layer 1, sample 0")
    assert tab.url.endswith("layer_1/attention_heatmap_sample0_layer1.png")


def test_hostile_titles_do_nothing_anywhere(tmp_path, visit):
    tab = visit(hostile_page(tmp_path))
    assert tab.title() == HOSTILE
    choice(tab, "goal").select_option(f"{HOSTILE}1")
    assert tab.locator("figure:visible").count() == 1
    choice(tab, "goal").select_option("")
    tab.locator("figure img").first.click()
    choice(tab, "beside it").select_option(index=1)
    assert len(press(tab)) == 2
    assert tab.evaluate("typeof hacked") == "undefined"
    assert tab.locator("script").count() == 1


def test_a_single_file_needs_nothing_beside_it(tmp_path, visit):
    path = written(tmp_path / "run", run_figures(tmp_path / "run"), single_file=True)
    tab = visit(path.rename(tmp_path / "report.html"))
    enlarge(tab, "heatmap, layer 0, sample 0")
    tab.wait_for_function("document.querySelector('dialog img').naturalWidth === 30")
    assert tab.locator("dialog a").count() == 0


def test_a_pdf_alone_is_opened_by_its_link_and_passed_over_by_keys(tmp_path, visit):
    files = ("a.png", "b.pdf", "c.png")
    figures = [Figure(picture(tmp_path, name), "returns", name) for name in files]
    tab = visit(written(tmp_path, figures))
    assert tab.locator("figure:visible").count() == 3
    enlarge(tab, "returns, a.png")
    assert press(tab, "ArrowRight") == ["returns, c.png"]
