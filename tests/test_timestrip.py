"""The picture of one play: weights read back from the pixels, steps down, positions across."""

import itertools
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from historylens.pictures import timestrip
from historylens.pictures.heatmap import pool, scale_of, to_colours
from historylens.pictures.page import Page
from historylens.pictures.timestrip import GAP, LEFT, QUERY, STRIP, TOP, Axis, attention_over_time

RED, WHITE, GREYS = [0xE4, 0x57, 0x2E], [255, 255, 255], ([200] * 3, [238] * 3)
TEXTS = {"title": "Attention over time · rollout 0", "subtitle": "goal (2, 7) · 20 steps"}


def play(n_steps, n_max, n_layers=1, seed=0):
    """Random attention of a play that begins without any history."""
    rows = np.random.default_rng(seed).gamma(0.5, size=(n_layers, n_steps, n_max + 1)) + 1e-3
    rows[:, np.arange(n_max, -1, -1) > np.arange(n_steps)[:, None]] = np.nan
    return dict(enumerate(rows / np.nansum(rows, axis=2, keepdims=True)))


def parts(panel, dpi=100):
    """Strip, map and query of the pixels of a panel."""
    strip, gap, query = (round(width * dpi / 100) for width in (STRIP, GAP, QUERY))
    end = panel.shape[1] - query
    assert (panel[:, strip : strip + gap] == 255).all()
    assert (panel[:, end - gap : end] == 255).all()
    return panel[:, :strip], panel[:, strip + gap : end - gap], panel[:, end:]


def drawn(layers, horizon=4, rewarded=(), dpi=100):
    """What each call of a `Page` was given: pasted are the panels in their order, and the bar."""
    n_steps = len(layers[0])
    marks = np.arange(0, n_steps, horizon), np.isin(np.arange(n_steps), rewarded)
    patched = dict.fromkeys(("save", "paste", "text", "lines", "ticks"), mock.DEFAULT)
    with mock.patch.multiple(Page, autospec=True, **patched) as calls:
        attention_over_time("x.png", layers, *marks, **TEXTS, dpi=dpi)
    return {name: [call.args[1:] for call in one.call_args_list] for name, one in calls.items()}


def test_pixels_are_the_weights_blank_before_history_and_the_query_stands_aside(
    tmp_path,
):
    layers, path = play(10, 6, 3), tmp_path / "a.png"
    attention_over_time(path, layers, np.arange(1), np.zeros(10, bool), **TEXTS, dpi=100)
    pixels, zoom = np.asarray(Image.open(path)), timestrip.MAX_CELL
    scale = scale_of(np.stack(list(layers.values())), 7)  # one for all layers
    right = max(timestrip.MIN_PITCH, STRIP + GAP + 6 * zoom + GAP + QUERY + timestrip.BESIDE)
    for number, rows in layers.items():
        left = LEFT + number * right + STRIP + GAP
        x = [*(left + zoom * column + zoom // 2 for column in range(6)), left + 6 * zoom + GAP + 8]
        y = TOP + zoom * np.arange(10) + zoom // 2
        found = pixels[y[:, None], np.array(x)]
        assert (found == to_colours(rows, *scale)).all()
        assert (found[np.isnan(rows)] == WHITE).all()
        assert (found[~np.isnan(rows)] != WHITE).any(-1).all()
        assert pixels[TOP + 5, left + 6 * zoom + 1].tolist() == WHITE  # between map and query


def test_columns_that_no_step_reaches_are_left_out_and_a_first_decision_alone_is_drawn():
    calls, short = drawn(play(4, 50)), drawn({0: play(4, 50)[0][:, -4:]})
    for one, other in zip(calls["paste"], short["paste"], strict=True):
        np.testing.assert_array_equal(one[2], other[2])
    (_, _, panel), _ = drawn(play(1, 1))["paste"]
    _, weights, query = parts(panel)
    assert (weights == 255).all()
    assert (query != 255).any(-1).all()
    assert any("T = 4 tokens" in text[2] for text in calls["text"])


def test_a_column_is_named_by_how_far_back_it_is_and_a_row_by_its_step():
    ticks, left, zoom = drawn(play(30, 10))["ticks"], LEFT + STRIP + GAP, timestrip.MAX_CELL
    names = {side: names.items() for names, _, side in ticks}
    below, steps = ({f"{name}": x for x, name in names[side]} for side in ("below", "left"))
    assert below.pop("query") == left + 10 * zoom + GAP + QUERY / 2
    assert {"10", "2"} <= set(below)
    assert below == {label: left + zoom * (10 - int(label) + 0.5) for label in below}
    assert "0" in steps
    assert steps == {label: TOP + zoom * (int(label) + 0.5) for label in steps}


@given(st.integers(1, 3000), st.integers(40, 900), st.sampled_from([0.5, 1.0, 1.7]))
def test_places_fit_the_room_they_have_however_many_they_are(n, room, scale):
    axis = Axis(n, room, scale)
    n_cells = -(-n // axis.pooled)
    assert axis.length == pytest.approx(n_cells * axis.zoom / scale)
    assert min(room, 24 * n) / 4 < axis.length <= room + 1e-9  # not much smaller than it could be
    assert axis.at(0) == 0
    assert axis.length - axis.zoom / scale < axis.at(n) <= axis.length + 1e-9
    ticks = axis.ticks(0, n - 1)
    assert 1 <= len(ticks) <= 9
    assert all(0 <= tick < n for tick in ticks)


def overlap(one, other):
    return all(one[i] < other[i + 2] and other[i] < one[i + 2] for i in range(2))


@pytest.mark.parametrize(("n_steps", "n_max", "n_layers", "dpi"), [
    (2000, 1000, 1, 100), (5, 1, 13, 100), (700, 210, 24, 50),
])  # fmt: skip
def test_large_plays_are_pooled_and_panels_stay_apart(n_steps, n_max, n_layers, dpi):
    layers = play(n_steps, n_max, n_layers)
    with mock.patch.object(timestrip, "pool", side_effect=pool) as pooled:
        calls = drawn(layers, dpi=dpi)
    across, down = pooled.call_args.args[1:]
    assert (across > 1, down > 1) == (n_max > 200, n_steps > 500)
    *pasted, bar = calls["paste"]
    boxes = []
    for left, top, image in pasted:
        height, width = (side * 100 / dpi for side in image.shape[:2])
        boxes.append((left, top, left + width, top + height))
        assert height <= 900
        assert width <= 420 + STRIP + QUERY + 2 * GAP + 4  # rounded at dpi 50
        assert left + width < bar[0]
    assert len(boxes) == n_layers
    assert not any(overlap(*pair) for pair in itertools.combinations(boxes, 2))
    lowest = max(text[1] for text in calls["text"])
    assert lowest > max(bottom for *_, bottom in boxes)  # the legend stands below
    said = " ".join(text[2] for text in calls["text"])
    assert (f"of {down} steps the last is drawn" in said) == (down > 1)
    assert (f"mean of {across} transitions" in said) == (across > 1)


def test_pooled_rows_are_the_last_of_theirs_also_in_the_column_of_the_query():
    layers, scale = play(2000, 30), 0.5
    (_, _, panel), _ = drawn(layers, dpi=50)["paste"]
    _, weights, query = parts(panel, dpi=50)
    down, zoom = Axis(2000, 900, scale).pooled, Axis(30, timestrip.WIDTHS[1], scale).zoom
    ends = scale_of(np.stack([layers[0][::31]]), 31)
    last = np.minimum(np.arange(down - 1, 2000 + down - 1, down), 1999)
    np.testing.assert_array_equal(weights[:, ::zoom], to_colours(layers[0][last, :-1], *ends))
    np.testing.assert_array_equal(query[:, 0], to_colours(layers[0][last, -1], *ends))


def test_the_strip_shows_episodes_in_two_greys_rewards_in_red_and_white_lines_where_one_begins():
    calls, zoom = drawn(play(12, 3), horizon=5, rewarded=(3, 11)), timestrip.MAX_CELL
    left, top, panel = calls["paste"][0]
    strip, *_ = parts(panel)
    assert (left, top, strip.shape) == (LEFT, TOP, (12 * zoom, STRIP, 3))
    cells = strip[zoom // 2 :: zoom, 0].tolist()
    light, dark = cells[0], cells[5]
    assert sorted([light, dark]) == sorted(GREYS)
    own = [light] * 5 + [dark] * 5 + [light] * 2
    own[3] = own[11] = RED  # the last step, too, wholly
    assert cells == own
    starts = [line[0] for (segments,) in calls["lines"] for line in segments]
    assert [y for x, y in starts if x == LEFT + STRIP + GAP] == [TOP + 5 * zoom, TOP + 10 * zoom]


def test_more_than_forty_episodes_are_marked_while_they_can_be_told_apart():
    for horizon, is_marked in ((18, True), (3, False)):  # 50 and 300 episodes on 900 units
        calls = drawn(play(900, 5), horizon=horizon)
        strip, *_ = parts(calls["paste"][0][2])
        assert len(np.unique(strip)) == 1 + is_marked
        lines = [segment for (segments,) in calls["lines"] for segment in segments]
        assert len(lines) > 49 if is_marked else len(lines) < 3  # the bar has one


def test_one_scale_serves_all_layers_and_does_not_end_where_one_of_them_does():
    even = {0: np.full((100, 101), 1 / 101), 1: np.full((100, 101), 0.5 / 100)}
    even[1][:, 7] = even[1][:, 50] = 0.25  # more than ten times uniform attention
    scale = 0.1 / 101, 0.25
    panels = [parts(panel)[1] for _, _, panel in drawn(even)["paste"][:-1]]
    for panel, rows in zip(panels, even.values(), strict=True):
        zoom = panel.shape[1] // 100
        np.testing.assert_array_equal(panel[5, ::zoom], to_colours(rows[0, :-1], *scale))
