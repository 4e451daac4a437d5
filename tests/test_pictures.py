"""Pictures show the numbers they are given: weights read back from the pixels, and fixed places."""

import hashlib
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from historylens.capture import LayerAttention
from historylens.history import Decision
from historylens.pictures import lineplot, metricplot, page
from historylens.pictures.heatmap import (
    HISTORY,
    QUERY,
    Sheet,
    color_range,
    heatmap,
    last_rows,
    pool,
    to_colours,
    words,
)
from historylens.pictures.lineplot import line_plot
from historylens.pictures.metricplot import course, summary
from historylens.pictures.order import SampleAttention
from historylens.tokens import Tokens

RED = np.array([0xE4, 0x57, 0x2E])
UNIFORM = {
    "mean_context_attention": 1 / 31,
    "concentration": 0.0,
    "entropy": 3.3,
    "recent_distant_ratio": 1.0,
}


def causal_maps(n_heads, n_tokens, seed=0):
    weights = np.tril(np.random.default_rng(seed).gamma(0.3, size=(n_heads, n_tokens, n_tokens)))
    weights += np.eye(n_tokens) * 1e-6
    weights /= weights.sum(-1, keepdims=True)
    weights[:, ~np.tri(n_tokens, dtype=bool)] = np.nan
    return weights.astype(np.float32)


def sample_of(n_heads=1, n=30, episode=10, rewarded=(4, 5, 29), parts=("transition",), seed=0):
    """Random causal attention of one decision, whose map is the matrix itself."""
    tokens = Tokens.of(n, parts)
    maps = causal_maps(n_heads, len(tokens), seed)
    order = torch.arange(len(tokens))
    received = np.nansum(maps, 1) / np.arange(len(tokens), 0, -1)
    parts = (maps[None, :, -1], received[None], maps[None])
    rows, received, maps = (torch.from_numpy(np.nan_to_num(x, nan=np.nan)) for x in parts)
    seen = torch.ones(1, len(tokens), dtype=torch.bool)
    layer = LayerAttention("layer", rows, seen, received.float(), maps, order, order)
    rewards = np.isin(np.arange(n), rewarded).astype(float)
    decision = Decision(None, np.zeros(n), rewards, None, episodes=np.arange(n) // episode,
                        title="goal (2, 7), history 3, step 60")  # fmt: skip
    return SampleAttention.of(decision, tokens, layer, 0, 0, np.full(len(tokens), 1 / len(tokens)))


def heads_of(sample):
    return tuple(range(len(sample.query_rows)))


def draw(path, sample, dpi=100):
    heatmap(path, sample, layer=2, heads=heads_of(sample), scale=color_range(sample), dpi=dpi)
    return np.asarray(Image.open(path))


def sheet_of(sample, dpi=100):
    shape = heads_of(sample), tuple(sample.rows), tuple(sample.cols)
    return Sheet(*shape, dpi, *words(sample, has_lines=True))


def cells(pixels, sheet, corner, n_tokens):
    """The colour in the middle of each weight of a head: map rows, then the query row."""
    scale, zoom = sheet.page.scale, sheet.zoom
    left, top = (round(place * scale) for place in corner)
    middle = zoom // 2 + zoom * np.arange(n_tokens)
    query = round((sheet.strips(corner[1])[1] + QUERY / 2) * scale)
    rows = np.append(top + middle[:-1], query)
    return pixels[rows[:, None], left + middle]


# Heatmap


@pytest.mark.parametrize(
    ("n_heads", "n", "dpi", "parts"),
    [(1, 1, 100, "t"), (4, 30, 100, "t"), (3, 30, 80, "t"), (2, 9, 100, ("s", "a", "r"))],
)
def test_heatmap_pixels_are_the_weights(tmp_path, n_heads, n, dpi, parts):
    sample = sample_of(n_heads, n, episode=100, parts=parts)
    pixels, (low, high) = draw(tmp_path / "map.png", sample, dpi), color_range(sample)
    sheet, n_tokens = sheet_of(sample, dpi), len(sample.tokens)
    for weights, corner in zip(sample.maps, sheet.corners, strict=True):
        drawn = cells(pixels, sheet, corner, n_tokens)
        shade = np.log(np.clip(weights, low, high) / low) / np.log(high / low)
        index = np.rint(np.nan_to_num(shade) * 255).astype(int)
        expected = matplotlib.colormaps["viridis"](index, bytes=True)[..., :3]
        seen = ~np.isnan(weights)
        assert np.abs(drawn[seen].astype(int) - expected[seen]).max() <= 4
        assert (drawn[~seen] == 255).all()


def test_forbidden_is_blank_and_brightness_grows_with_the_weight():
    blank, dark, bright = to_colours(np.array([np.nan, 0.0, 1.0]), 0.01, 1.0)
    assert blank.tolist() == [255, 255, 255]
    assert dark.sum() < 200
    assert bright.sum() > 400
    luminance = to_colours(np.geomspace(0.001, 1, 50), 0.001, 1.0) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > 0).all()


@settings(max_examples=20)
@given(n=st.integers(1, 40), n_heads=st.integers(1, 3), seed=st.integers(0, 9))
def test_the_colour_scale_shows_uniform_attention(n, n_heads, seed):
    low, high = color_range(sample_of(n_heads, n, seed=seed))
    assert low < 0.5 / (n + 1)
    assert min(1.0, 10 / (n + 1)) <= high <= 1.0


def test_heatmap_marks_rewards_and_episodes(tmp_path):
    sample = sample_of()
    pixels, sheet = draw(tmp_path / "map.png", sample), sheet_of(sample)
    left, top = sheet.corners[0]
    row = round(sheet.strips(top)[0]) + HISTORY // 2
    strip = pixels[row, round(left) + sheet.zoom // 2 + sheet.zoom * np.arange(31)]
    assert np.flatnonzero((strip == RED).all(-1)).tolist() == [4, 5, 29]
    greys = {index: strip[index, 0] for index in (0, 9, 10, 19, 20)}
    assert greys[0] == greys[9] == greys[20] != greys[10] == greys[19]
    assert strip[30].tolist() == [255, 255, 255]  # the query token is no transition
    without = draw(tmp_path / "plain.png", sample_of(episode=100))
    at = round(left) + 10 * sheet.zoom
    line, plain = (image[round(top) + 290, at - 1 : at + 2].sum() for image in (pixels, without))
    assert line > plain  # a white line where the second episode begins


def test_the_history_strip_shows_shares_of_rewards_and_leaves_out_too_many_episodes():
    rewarded = np.array([True, False, True, True])
    half, whole, query = page.history_colours(np.array([0]), rewarded, np.array([0, 2, 4]))
    assert whole.tolist() == RED.tolist()
    assert whole[1] < half[1] < 238
    assert query.tolist() == [255, 255, 255]
    every, none = np.arange(100), np.zeros(100, dtype=bool)
    assert len(np.unique(page.history_colours(every[::2], none, every))) == 1


@pytest.mark.parametrize(
    ("tokens", "ticks", "order"),
    [
        (Tokens.of(4), {(0, 0), (2, 2), (4, 4)}, "Token 0 is the oldest."),
        (
            Tokens.of(4, ("s", "a", "r")), {(0, 0), (6, 2)},
            "Tokens of a transition: s, a, r. Transition 0 is the oldest.",
        ),
        (
            Tokens.of(4, query="first", decides=-1), {(1, 0), (3, 2)},
            "Those of no transition stand first. Transition 0 is the oldest.",
        ),
    ],
)  # fmt: skip
def test_a_heatmap_says_what_its_tokens_are(tokens, ticks, order):
    sample = replace(sample_of(n=4), tokens=tokens)
    shown, unit, (first, _, query) = words(sample, has_lines=True)
    assert ticks <= set(shown)
    assert (unit == "transition") == tokens.is_plain == ("whatever its place" not in query)
    assert first == order
    assert "too many" in words(sample, has_lines=False)[2][1]


def test_the_subtitle_counts_transitions_and_tokens():
    padded = Tokens([-1, 0, 0, -1], ("padding", "state", "action", "query"))
    one = Decision(None, [0], [0], None, title="step 3")
    assert page.subtitle(one, Tokens.of(1)) == "step 3 · 1 transition and the query: T = 2 tokens"
    assert page.subtitle(one, padded) == "step 3 · 1 transition, T = 3 tokens"


def test_squeezed_maps_keep_uniform_attention_uniform():
    weights = np.where(np.tri(10, dtype=bool), 0.1, np.nan)
    pooled = pool(weights, 3)
    np.testing.assert_allclose(pooled[~np.isnan(pooled)], 0.1)
    assert np.isnan(pooled).tolist() == (~np.tri(4, dtype=bool)).tolist()
    assert last_rows(10, 3).tolist() == [2, 5, 8, 9]


@pytest.mark.parametrize(("n_heads", "n"), [(1, 1), (2, 2), (5, 39), (12, 300), (16, 80)])
def test_every_shape_of_heatmap_fits_its_page(tmp_path, n_heads, n):
    pixels = draw(tmp_path / "map.png", sample_of(n_heads, n))
    border = (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:])
    assert all((edge == 255).all() for edge in border)


def test_rows_and_columns_of_a_binned_map_lie_where_their_tokens_are():
    shape = (0,), (0, 4, 9, 14, 20), (0, 1, 5, 10, 15)
    sheet = Sheet(*shape, 100, *words(sample_of(n=20), has_lines=True))
    cell = sheet.side / 5
    np.testing.assert_allclose(sheet.x([0, 1, 5, 10, 15, 21]), cell * np.arange(6))
    np.testing.assert_allclose(sheet.x(3), 1.5 * cell)
    np.testing.assert_allclose(sheet.y([0, 1, 5, 10, 15]), cell * np.arange(5))


# Line plot


def colour_near(pixels, x, y):
    """The darkest pixel within one of a place."""
    near = pixels[round(float(y)) - 1 : round(float(y)) + 2, round(x)].astype(int)
    return near[near.sum(-1).argmin()]


def drawn_lines(path, sample):
    line_plot(path, sample, layer=1, heads=heads_of(sample), dpi=100)
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("parts", ["transition", ("state", "action")])
def test_bold_lines_run_where_means_and_sums_are(tmp_path, parts):
    sample = sample_of(2, parts=parts)
    pixels = drawn_lines(tmp_path / "lines.png", sample)
    panels = (lineplot.LEFT, sample.query_curves), (lineplot.RIGHT, sample.received_curves)
    for left, curves in panels:
        scale = lineplot.Scale(np.vstack([curves.values, curves.whole]), curves.uniform)
        for t, weight in enumerate(curves.whole):
            x = left + lineplot.WIDTH * (t + 0.5) / 30
            assert colour_near(pixels, x, scale.y(weight)).max() < 200


def test_parts_of_transitions_are_drawn_as_lines_of_their_own(tmp_path):
    sample, levels = sample_of(1, 20, episode=100, parts=("s", "a", "r")), (0.004, 0.012, 0.025)
    row = np.append(np.tile(levels, 20), 1 - 20 * sum(levels))
    sample = replace(sample, query_rows=row[None])
    pixels, curves = drawn_lines(tmp_path / "lines.png", sample), sample.query_curves
    scale = lineplot.Scale(np.vstack([curves.values, curves.whole]), curves.uniform)
    for level, colour in zip(levels, page.HEAD_COLOURS, strict=False):
        there = colour_near(pixels, lineplot.LEFT + lineplot.WIDTH * 0.37, scale.y(level))
        there, own = 255 - there, 255 - np.array(list(bytes.fromhex(colour[1:])))
        assert there @ own > 0.98 * np.linalg.norm(there) * np.linalg.norm(own)  # one hue


def test_scale_by_hand():
    linear = lineplot.Scale(np.array([[0.1, 0.5]]), np.array([0.3, 0.3]))
    bottom = lineplot.TOP + lineplot.HEIGHT
    assert not linear.is_log
    assert linear.y(0.0) == bottom
    np.testing.assert_allclose(linear.y(0.54), lineplot.TOP)
    log = lineplot.Scale(np.array([[0.0, 0.9]]), np.array([0.01, 0.01]))
    assert log.is_log
    assert log.y(0.0) == bottom  # a zero weight lies on the lower edge
    middle = np.sqrt(log.low * log.high)
    np.testing.assert_allclose(log.y(middle), lineplot.TOP + lineplot.HEIGHT / 2)
    assert log.ticks() == pytest.approx([0.001, 0.01, 0.1, 1.0])


@settings(max_examples=20)
@given(n=st.integers(1, 3000))
def test_binned_lines_keep_the_mass(n):
    values = np.random.default_rng(n).random((2, n))
    means, starts = lineplot.bin_means(values)
    assert len(starts) <= lineplot.MAX_POINTS
    np.testing.assert_allclose((means * np.diff(np.append(starts, n))).sum(1), values.sum(1))


@pytest.mark.parametrize(("n_heads", "n", "dpi"), [(1, 1, 100), (9, 50, 60), (3, 700, 100)])
def test_every_shape_of_line_plot_is_drawn(tmp_path, n_heads, n, dpi):
    sample = sample_of(n_heads, n)
    line_plot(tmp_path / "x.png", sample, layer=0, heads=heads_of(sample), dpi=dpi)
    image = Image.open(tmp_path / "x.png")
    assert image.size == (round(12.5 * dpi), round(5.1 * dpi))
    assert image.info["dpi"] == pytest.approx((dpi, dpi), abs=0.1)


# Summaries


def metric_values(n_layers=3, n_samples=12, seed=0):
    rng, shape = np.random.default_rng(seed), (n_layers, n_samples)
    return {
        "mean_context_attention": rng.uniform(0.02, 0.033, shape),
        "concentration": rng.gamma(3, 0.01, shape),
        "entropy": rng.normal(2, 0.3, shape),
        "recent_distant_ratio": np.exp(rng.normal(0, 3, shape)),
    }


@pytest.mark.parametrize("n_samples", [1, 2, 12, 300])
def test_a_distribution_holds_every_sample_its_mean_and_uniform(n_samples):
    for name, values in metric_values(1, n_samples).items():
        values, axes = values[0], Figure().add_subplot()
        log = name == "recent_distant_ratio" and metricplot.spans_decades(values)
        assert log == (name == "recent_distant_ratio" and values.max() > 100 * values.min())
        metricplot.draw_distribution(axes, values, UNIFORM[name], log)
        assert sum(bar.get_height() for bar in axes.patches) == n_samples
        upright = [line.get_xdata()[0] for line in axes.lines]
        assert values.mean() in upright
        assert UNIFORM[name] in upright


@pytest.mark.parametrize(("n_layers", "n_samples"), [(1, 1), (3, 12), (48, 300)])
def test_a_course_has_the_mean_of_every_layer(n_layers, n_samples):
    for name, values in metric_values(n_layers, n_samples).items():
        axes = Figure().add_subplot()
        metricplot.draw_course(axes, values, UNIFORM[name], range(5, 5 + n_layers), False)
        courses = [line.get_ydata() for line in axes.lines]
        assert any(np.array_equal(line, values.mean(1)) for line in courses)
        assert any(np.array_equal(line, [UNIFORM[name]] * 2) for line in courses)
        assert axes.get_xticklabels()[0].get_text() == "5"


def test_equal_and_zero_values_are_drawn_and_every_metric_has_a_place(tmp_path):
    values = {name: np.full(4, value) for name, value in UNIFORM.items()}
    values["recent_distant_ratio"] = np.array([0.0, 1.0, 1e6, 1e9])
    summary(tmp_path / "summary.png", values, UNIFORM, layer=0, dpi=100)
    assert Image.open(tmp_path / "summary.png").size == (1020, 780)
    assert len(metricplot.METRICS) == len(metricplot.PLACES)


# Files


def write_all(folder):
    folder.mkdir()
    sample = sample_of(2)
    draw(folder / "map.png", sample)
    line_plot(folder / "lines.png", sample, layer=1, heads=(0, 1), dpi=100)
    values = metric_values()
    first = {name: v[0] for name, v in values.items()}
    summary(folder / "summary.png", first, UNIFORM, layer=0, dpi=50)
    course(folder / "layers.png", values, UNIFORM, layers=[0, 1, 2], dpi=50)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    first = write_all(tmp_path / "a")
    draw(tmp_path / "other.png", sample_of(2, rewarded=(1,), seed=1))
    assert write_all(tmp_path / "b") == first


@settings(max_examples=20)
@given(height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_png_holds_exactly_the_pixels(tmp_path_factory, height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("png") / "x.png"
    path.write_bytes(page.png(pixels, 100))
    with Image.open(path) as image:
        image.verify()
    assert np.array_equal(np.asarray(Image.open(path)), pixels)
