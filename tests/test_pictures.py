"""Pictures show the numbers they are given: weights read back from the pixels, and fixed places."""

import io
import re
from dataclasses import replace
from unittest import mock

import matplotlib
import numpy as np
import pytest
from attention_rows import decision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_tokens import of_matrix

from historylens.pictures import lineplot, page
from historylens.pictures.heatmap import MAX_CELL, Sheet, color_range, heatmap, pool, words
from historylens.pictures.lineplot import HEIGHT, LEFT, RIGHT, TOP, WIDTH, line_plot
from historylens.pictures.order import history_strip, subtitle
from historylens.tokens import Tokens

RED, WHITE = [0xE4, 0x57, 0x2E], [255, 255, 255]
SAR = ("s", "a", "r")  # parts of a transition


def sample_of(n_heads=1, n=30, episode=10, rewarded=(4, 5, 29), parts=("transition",), seed=0):
    """Random causal attention of one decision, whose map is the matrix itself."""
    tokens = Tokens.of(n, parts)
    size, causal = len(tokens), np.tri(len(tokens), dtype=bool)
    weights = np.random.default_rng(seed).gamma(0.3, size=(n_heads, size, size)) * causal
    weights += np.eye(size) * 1e-6
    weights = np.where(causal, weights / weights.sum(-1, keepdims=True), np.nan)
    marks = {"episodes": np.arange(n) // episode, "rewarded": rewarded}
    return of_matrix(weights.astype(np.float32), tokens, np.ones(size), **marks)


def draw(picture, path, sample, dpi=100):
    scale = {"scale": color_range(sample)} if picture is heatmap else {}
    picture(path, sample, layer=2, heads=range(len(sample.query_rows)), dpi=dpi, **scale)
    return np.asarray(Image.open(path))


def axes_of(picture, *args, **options):
    with mock.patch.object(page.Page, "save", autospec=True) as save:
        picture("picture.png", *args, **options)
    return save.call_args.args[0].figure.axes


def sheet_of(sample, dpi=100):
    shape = range(len(sample.maps)), tuple(sample.rows), tuple(sample.cols)
    return Sheet(*shape, dpi, words(sample, has_lines=True))


def cells(pixels, sheet, corner, n_tokens):
    """The colour in the middle of each weight of a head: map rows, history, then the query row."""
    places = np.array([*corner, *sheet.strips(corner[1])]) * sheet.page.scale
    left, top, history, query = np.rint(places).astype(int)
    middle = sheet.zoom // 2 + sheet.zoom * np.arange(n_tokens)
    rows = [*(top + middle[:-1]), history + 4, query + 9]
    return pixels[np.array(rows)[:, None], left + middle]


@pytest.mark.parametrize(("n_heads", "n", "dpi", "parts"), [(1, 1, 100, "t"), (3, 9, 80, SAR)])
def test_heatmap_pixels_are_the_weights(tmp_path, n_heads, n, dpi, parts):
    sample = sample_of(n_heads, n, episode=100, parts=parts)
    pixels, (low, high) = draw(heatmap, tmp_path / "map.png", sample, dpi), color_range(sample)
    sheet = sheet_of(sample, dpi)
    for weights, corner in zip(sample.maps, sheet.corners, strict=True):
        *rows, _, query = cells(pixels, sheet, corner, len(sample.tokens))
        drawn, seen = np.stack([*rows, query]), ~np.isnan(weights)
        shade = np.log(np.clip(weights, low, high) / low) / np.log(high / low)
        index = np.rint(np.nan_to_num(shade) * 255).astype(int)
        expected = matplotlib.colormaps["viridis"](index, bytes=True)[..., :3]
        assert np.abs(drawn[seen].astype(int) - expected[seen]).max() <= 4
        assert (drawn[~seen] == 255).all()


@settings(max_examples=10)
@given(n=st.integers(1, 40), n_heads=st.integers(1, 3), seed=st.integers(0, 9))
def test_the_colour_scale_shows_uniform_attention(n, n_heads, seed):
    low, high = color_range(sample_of(n_heads, n, seed=seed))
    assert low < 0.5 / (n + 1)
    assert min(1.0, 10 / (n + 1)) <= high <= 1.0


def test_heatmap_marks_shares_of_rewards_and_episodes_unless_they_are_too_many(tmp_path):
    sample = sample_of()
    pixels, sheet = draw(heatmap, tmp_path / "map.png", sample), sheet_of(sample)
    left, top = sheet.corners[0]
    *_, strip, _ = cells(pixels, sheet, (left, top), 31)
    assert np.flatnonzero((strip == RED).all(-1)).tolist() == [4, 5, 29]
    assert strip[0, 0] == strip[9, 0] == strip[20, 0] != strip[10, 0] == strip[19, 0]
    assert strip[30].tolist() == WHITE  # the query token is no transition
    without = draw(heatmap, tmp_path / "plain.png", sample_of(episode=100))
    at = round(left) + 10 * sheet.zoom
    line, plain = (image[round(top) + 290, at - 1 : at + 2].sum() for image in (pixels, without))
    assert line > plain  # a white line where the second episode begins
    every, none = np.arange(100), np.zeros(100, dtype=bool)
    assert len(np.unique(history_strip(every[::2], ~none, none, every))) == 1
    rewarded, cells_of_two = np.array([True, False, True, True]), np.array([0, 2, 4])
    half, whole, query = history_strip(every[:1], ~none[:4], rewarded, cells_of_two)
    assert (whole.tolist(), query.tolist()) == (RED, WHITE)
    assert whole[1] < half[1] < 238


def test_a_query_that_comes_first_is_of_no_episode_and_none_begins_behind_it(tmp_path):
    tokens, marks = Tokens.of(12, query="first", decides=-1), {"episodes": np.arange(12) // 6}
    weights = np.where(np.tri(13, dtype=bool), 0.05, np.nan)[None]
    sample = of_matrix(weights, tokens, np.ones(13), **marks)
    with mock.patch.object(page.Page, "lines", autospec=True) as lines:
        draw(heatmap, tmp_path / "map.png", sample)
    (episodes,) = (call.args[1] for call in lines.call_args_list if "alpha" in call.kwargs)
    sheet = sheet_of(sample)
    left, top = sheet.corners[0]
    starts = [(left + sheet.x(7), top + sheet.y(7)), (left, top + sheet.y(7))]
    assert [line[0] for line in episodes] == starts
    one, some = (history_strip(*sample.on_tokens, cells)[:, 0] for cells in (range(13), [0, 2, 4]))
    assert one.tolist() == [255] + [238] * 6 + [200] * 5 + [255]
    assert some.tolist() == [238] * 3  # a cell of some transitions is theirs


@pytest.mark.parametrize(("tokens", "ticks", "order"), [
    (Tokens.of(4), {(0, 0), (2, 2), (4, 4)}, "Token"),
    (Tokens.of(4, SAR), {(0, 0), (6, 2)}, "Tokens of a transition: s, a, r. Transition"),
    (Tokens.of(4, query="first", decides=-1), {(1, 0), (3, 2)},
     "Those of no transition stand first. Transition"),
])  # fmt: skip
def test_a_heatmap_says_what_its_tokens_are(tokens, ticks, order):
    sample = replace(sample_of(n=4), tokens=tokens)
    shown, unit, (first, _, query) = words(sample, has_lines=True)
    assert ticks <= set(shown)
    assert (unit == "transition") == tokens.is_plain == ("whatever its place" not in query)
    assert first == f"{order} 0 is the oldest."
    assert "too many" in words(sample, has_lines=False)[2][1]


def test_the_subtitle_counts_transitions_and_tokens():
    padded = Tokens([-1, 0, 0, -1], ("padding", "state", "action", "query"))
    for tokens, said in (
        (Tokens.of(0), "0 transitions and the query: T = 1 token"),
        (Tokens.of(1), "1 transition and the query: T = 2 tokens"),
        (padded, "1 transition, T = 3 tokens"),
    ):
        assert subtitle(decision(tokens.n, title="step 3"), tokens) == f"step 3 · {said}"


def test_squeezed_maps_keep_uniform_attention_and_binned_ones_lie_where_their_tokens_are():
    rows = 1 / np.arange(1, 11)[:, None]
    pooled = pool(np.where(np.tri(10, dtype=bool), rows, np.nan), 3)
    expected = np.where(np.tri(4, dtype=bool), rows[[2, 5, 8, 9]], np.nan)  # the last of three
    np.testing.assert_allclose(pooled, expected)
    shape = (0,), (0, 4, 9, 14, 20), (0, 1, 5, 10, 15)
    sheet = Sheet(*shape, 100, words(sample_of(n=20), has_lines=True))
    cell = sheet.side / 5
    np.testing.assert_allclose(sheet.x([0, 1, 5, 10, 15, 21, 3]) / cell, [*range(6), 1.5])
    np.testing.assert_allclose(sheet.y([0, 1, 5, 10, 15]) / cell, range(5))


@pytest.mark.parametrize(("n_heads", "n", "dpi"), [(1, 1, 100), (16, 80, 60), (3, 700, 100)])
def test_every_shape_of_heatmap_and_line_plot_fits_its_page(tmp_path, n_heads, n, dpi):
    sample, path = sample_of(n_heads, n), tmp_path / "x.png"
    assert has_white_border(draw(heatmap, path, sample, dpi))
    draw(line_plot, path, sample, dpi)
    assert Image.open(path).size == (round(12.5 * dpi), round(5.1 * dpi))
    assert Image.open(path).info["dpi"] == pytest.approx((dpi, dpi), abs=0.1)


@pytest.mark.parametrize("title", ["the eleventh warehouse with shuffled shelf " * 3, "仓库" * 30])
def test_words_of_any_length_fit_the_page(tmp_path, title):
    names = ("state", "action", "reward", "next state", "end")
    sample = sample_of(1, 20, parts=[f"{name} that was there" for name in names])
    sample = replace(sample, decision=replace(sample.decision, title=title))
    for picture in (heatmap, line_plot):
        pixels = draw(picture, tmp_path / "x.png", sample)
        assert (pixels[:, -3:] == 255).all()
        assert (pixels[-3:] == 255).all()
    assert pixels.shape == (530, 1250, 3)  # the legend takes a second row


@given(st.text("ab \u4ed3", max_size=60))
@example("aaaaaaaaaa  bb")
def test_lines_hold_the_text_and_are_no_wider_than_they_may(text):
    lines = page.in_lines(text, 60, 9)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert lines == [text] or all(line and line == line.strip(" ") for line in lines)
    words = text.split()  # cut where they alone are wider
    wide = sum(page.text_width(word, 9) > 60 for word in words)
    assert wide or " ".join(lines).split() == words
    assert all(page.text_width(line, 9) <= 60 for line in lines)
    assert page.in_lines(text, 1e4, 9) == [text]


@pytest.mark.parametrize(("n", "zoom"), [(239, 2), (400, 1)])
def test_the_line_where_an_episode_begins_hides_no_token(tmp_path, n, zoom):
    sample, other = (sample_of(1, n, episode=episode) for episode in (20, 500))
    drawn, plain = (draw(heatmap, tmp_path / "a.png", x).astype(int) for x in (sample, other))
    sheet = sheet_of(sample)
    assert sheet.zoom == zoom
    left, top = (round(place) for place in sheet.corners[0])
    size = zoom * n
    off = np.abs(drawn - plain)[top : top + size, left : left + size].max(-1)
    assert off.max() > 5  # there is a line
    assert off.reshape(n, zoom, n, zoom).min(axis=(1, 3)).max() <= (0 if zoom > 1 else 60)  # of 255


@pytest.mark.parametrize("picture", [heatmap, line_plot])
@pytest.mark.parametrize("parts", ["transition", ("previous action", "state")])
def test_a_picture_of_a_decision_without_history_says_so_in_words(tmp_path, picture, parts):
    with mock.patch.object(page.Page, "text", autospec=True, side_effect=page.Page.text) as text:
        pixels = draw(picture, tmp_path / "x.png", sample_of(2, 0, parts=parts))
    first, *others = [call.args[3] for call in text.call_args_list]
    assert re.match("Attention.*layer 2", first)
    assert any(text.startswith("No history yet") for text in others)
    assert has_white_border(pixels)
    assert (pixels.max(-1) - pixels.min(-1)).max() < 60  # no bar, no map: black on white
    assert draw(picture, tmp_path / "x.png", sample_of(2, 1)).shape != pixels.shape


@pytest.mark.parametrize("n", [1, 2])
def test_weights_of_short_maps_are_not_drawn_as_large_as_there_is_room(n):
    sheet = sheet_of(sample_of(2, n))
    assert (sheet.zoom, sheet.side, sheet.depth) == (MAX_CELL, MAX_CELL * (n + 1), MAX_CELL * n)
    assert sheet_of(sample_of(2)).zoom < MAX_CELL


def has_white_border(pixels):
    edges = pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]
    return all((edge == 255).all() for edge in edges)


def colour_near(pixels, x, y):
    """The darkest pixel within one of a place."""
    near = pixels[round(float(y)) - 1 : round(float(y)) + 2, round(x)].astype(int)
    return near[near.sum(-1).argmin()]


@pytest.mark.parametrize(("n", "parts"), [(1, "t"), (2, "t"), (30, "t"), (30, ("state", "action"))])
def test_bold_lines_run_where_means_and_sums_are(tmp_path, n, parts):
    sample = sample_of(2, n, parts=parts)
    pixels = draw(line_plot, tmp_path / "lines.png", sample)
    for left, curves in zip((LEFT, RIGHT), sample.curves(), strict=True):
        y = lineplot.scale_of(np.vstack([curves.values, curves.whole]), curves.uniform)[0]
        places = (np.arange(n) + 0.5) / n if n > 1 else np.array([0.1, 0.9])  # one: all across
        for x in np.linspace(places[0], places[-1], 9)[1:-1] if n < 3 else places:
            height = np.interp(x, places, np.broadcast_to(y(curves.whole), len(places)))
            dark = colour_near(pixels, left + WIDTH * x, height).max()
            assert dark < (100 if n < 3 else 200)


def test_parts_of_transitions_are_drawn_as_lines_of_their_own(tmp_path):
    sample, levels = sample_of(1, 20, episode=100, parts=SAR), (0.004, 0.012, 0.025)
    row = np.append(np.tile(levels, 20), 1 - 20 * sum(levels))
    sample = replace(sample, query_rows=row[None])
    pixels = draw(line_plot, tmp_path / "lines.png", sample)
    query, _ = sample.curves()
    y = lineplot.scale_of(np.vstack([query.values, query.whole]), query.uniform)[0]
    for height, colour in zip(y(levels), page.HUES, strict=False):
        there = 255 - colour_near(pixels, LEFT + WIDTH * 0.37, height)
        own = 255 - np.array(list(bytes.fromhex(colour[1:])))
        assert there @ own > 0.98 * np.linalg.norm(there) * np.linalg.norm(own)  # one hue


def test_a_scale_is_linear_or_logarithmic_from_below_what_may_be_seen():
    bottom = TOP + HEIGHT
    y, _, is_log = lineplot.scale_of(np.array([[0.1, 0.5]]), np.array([0.3, 0.3]))
    assert not is_log
    np.testing.assert_allclose(y([0.0, 0.54]), [bottom, TOP])
    y, _, is_log = lineplot.scale_of(*np.zeros((2, 1, 2)))  # nothing may be seen
    assert (y(0.0), is_log) == (bottom, False)
    for baseline, lowest in (([0.01, 0.01], 0.03 * 0.01), ([0.0, 0.02], 0.03 * 0.02)):
        y, ticks, is_log = lineplot.scale_of(np.array([[0.0, 0.9]]), np.array(baseline))
        assert is_log
        ends = lowest, 1.4 * 0.9  # a zero weight lies on the lower edge
        np.testing.assert_allclose(y([0.0, *ends]), [bottom, bottom, TOP])
        np.testing.assert_allclose(y(np.sqrt(np.prod(ends))), TOP + HEIGHT / 2)
        assert ticks == pytest.approx([lowest, 0.001, 0.01, 0.1, 1.0])


def test_what_lies_below_a_logarithmic_scale_is_named_at_its_end(tmp_path):
    sample = sample_of(1, 99)
    row = np.where(np.arange(100) == 90, 1.0, 0.0)
    with mock.patch.object(page.Page, "ticks") as ticks:
        draw(line_plot, tmp_path / "lines.png", replace(sample, query_rows=row[None]))
    names = [[*call.args[0].values()] for call in ticks.call_args_list if call.args[2] == "left"]
    assert names[0] == ["≤ 0.0003", "0.001", "0.01", "0.1", "1"]
    assert not any("≤" in name for name in names[1])


@settings(max_examples=20)
@given(n=st.integers(1, 3000))
def test_binned_lines_keep_the_mass(n):
    values = np.random.default_rng(n).random((2, n))
    means, starts = lineplot.bin_means(values)
    assert len(starts) <= lineplot.MAX_POINTS
    np.testing.assert_allclose((means * np.diff(np.append(starts, n))).sum(1), values.sum(1))


@settings(max_examples=10)
@given(st.integers(1, 40), st.integers(1, 40))
def test_png_holds_exactly_the_pixels(height, width):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO(page.png(pixels, 100))
    Image.open(file).verify()
    assert np.array_equal(np.asarray(Image.open(file)), pixels)
