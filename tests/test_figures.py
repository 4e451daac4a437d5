"""Pictures show the numbers they are given: weights read back from the pixels, and fixed places."""

import hashlib

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from attention import heatmap as heatmap_module
from attention import lineplot, metricplot, page
from attention.figures import heatmap, layers, lines, summary
from attention.samples import Sample

RED = np.array(page.rgb(page.REWARD))
UNIFORM = {
    "mean_context_attention": 1 / 31,
    "concentration": 0.0,
    "entropy": 3.3,
    "recent_distant_ratio": 1.0,
}


def make_sample(n=30, episode=10, rewarded=(4, 5, 29)):
    flags = np.zeros(n, dtype=bool)
    flags[[i for i in rewarded if i < n]] = True
    return Sample(0, "goal (2, 7), history 3, step 60", n, np.arange(0, n, episode), flags)


def make_maps(n_heads, n_tokens, seed=0):
    weights = np.tril(np.random.default_rng(seed).gamma(0.3, size=(n_heads, n_tokens, n_tokens)))
    weights += np.eye(n_tokens) * 1e-6
    weights /= weights.sum(-1, keepdims=True)
    weights[:, ~np.tri(n_tokens, dtype=bool)] = np.nan
    return weights.astype(np.float32)


def draw(path, maps, sample, dpi=100):
    tokens = np.arange(maps.shape[1])
    heatmap(path, maps, tokens, tokens, sample, layer=2, dpi=dpi)
    return np.asarray(Image.open(path))


def sheet_of(maps, dpi=100, has_lines=True):
    tokens = np.arange(maps.shape[1], dtype=np.int64).tobytes()
    layout = heatmap_module._Layout.of(make_sample(maps.shape[1] - 1))
    return heatmap_module._sheet(tuple(range(len(maps))), tokens, tokens, dpi, has_lines, layout)


def cells(pixels, sheet, corner, n_tokens):
    """The colour in the middle of each weight of a head: map rows, then the query row."""
    scale, zoom = sheet.page.scale, sheet.zoom
    left, top = (round(place * scale) for place in corner)
    middle = zoom // 2 + zoom * np.arange(n_tokens)
    query = round((sheet.strips(corner[1])[1] + heatmap_module.QUERY / 2) * scale)
    rows = np.append(top + middle[:-1], query)
    return pixels[rows[:, None], left + middle]


@pytest.mark.parametrize(("n_heads", "n_tokens", "dpi"), [(1, 2, 100), (4, 31, 100), (3, 31, 80)])
def test_heatmap_pixels_are_the_weights(tmp_path, n_heads, n_tokens, dpi):
    maps = make_maps(n_heads, n_tokens)
    sample = make_sample(n_tokens - 1, episode=100)
    pixels = draw(tmp_path / "map.png", maps, sample, dpi)
    low, high = heatmap_module.color_range(maps, n_tokens)
    colours = matplotlib.colormaps["viridis"]
    sheet = sheet_of(maps, dpi)
    for weights, corner in zip(maps, sheet.corners(), strict=True):
        found = cells(pixels, sheet, corner, n_tokens)
        shade = np.log(np.clip(weights, low, high) / low) / np.log(high / low)
        expected = colours(np.rint(np.nan_to_num(shade) * 255).astype(int), bytes=True)[..., :3]
        seen = ~np.isnan(weights)
        assert np.abs(found[seen].astype(int) - expected[seen]).max() <= 4
        assert (found[~seen] == 255).all()


def test_forbidden_is_blank_and_a_zero_weight_is_dark():
    colours = heatmap_module.to_colours(np.array([np.nan, 0.0, 1.0]), 0.01, 1.0)
    assert colours[0].tolist() == [255, 255, 255]
    assert colours[1].sum() < 200  # the dark end of the scale
    assert colours[2].sum() > 400  # the bright end


def test_brightness_grows_with_the_weight():
    shades = heatmap_module.to_colours(np.geomspace(0.001, 1, 50), 0.001, 1.0)
    luminance = shades @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > 0).all()


@settings(max_examples=30, deadline=None)
@given(n_tokens=st.integers(2, 60), sharpness=st.floats(0.01, 40), n_heads=st.integers(1, 3))
def test_color_scale_shows_uniform_attention(n_tokens, sharpness, n_heads):
    scores = np.random.default_rng(0).normal(size=(n_heads, n_tokens, n_tokens)) * sharpness
    scores[:, ~np.tri(n_tokens, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    weights[:, ~np.tri(n_tokens, dtype=bool)] = np.nan
    low, high = heatmap_module.color_range(weights, n_tokens)
    assert low < 0.5 / n_tokens
    assert min(1.0, 10 / n_tokens) <= high <= 1.0


def test_heatmap_marks_rewards_and_episodes(tmp_path):
    maps, sample = make_maps(1, 31), make_sample()
    pixels = draw(tmp_path / "map.png", maps, sample)
    sheet = sheet_of(maps)
    left, top = next(iter(sheet.corners()))
    row = round(sheet.strips(top)[0]) + heatmap_module.HISTORY // 2
    strip = pixels[row, round(left) + sheet.zoom // 2 + sheet.zoom * np.arange(31)]
    is_red = (strip == RED).all(-1)
    assert np.flatnonzero(is_red).tolist() == [4, 5, 29]
    greys = {index: strip[index, 0] for index in (0, 9, 10, 19, 20)}
    assert greys[0] == greys[9] == greys[20] != greys[10] == greys[19]
    assert strip[30].tolist() == [255, 255, 255]  # the query token is no transition
    without = draw(tmp_path / "plain.png", maps, make_sample(episode=100))
    at = round(left) + 10 * sheet.zoom
    line, plain = (image[round(top) + 290, at - 1 : at + 2].sum() for image in (pixels, without))
    assert line > plain  # a white line where the second episode begins


def test_squeezed_maps_keep_uniform_attention_uniform():
    weights = np.where(np.tri(10, dtype=bool), 0.1, np.nan)
    pooled = heatmap_module._pool(weights, 3)
    assert pooled.shape == (4, 4)
    np.testing.assert_allclose(pooled[~np.isnan(pooled)], 0.1)
    assert np.isnan(pooled).tolist() == (~np.tri(4, dtype=bool)).tolist()
    assert heatmap_module._last_rows(10, 3).tolist() == [2, 5, 8, 9]


@pytest.mark.parametrize(("n_heads", "n_tokens"), [(1, 2), (2, 3), (5, 40), (12, 300), (32, 80)])
def test_every_shape_of_heatmap_fits_its_page(tmp_path, n_heads, n_tokens):
    maps = make_maps(n_heads, n_tokens)
    pixels = draw(tmp_path / "map.png", maps, make_sample(n_tokens - 1))
    border = np.concatenate([pixels[:3].ravel(), pixels[-3:].ravel(), pixels[:, :3].ravel()])
    assert (border == 255).all()
    assert (pixels[:, -3:] == 255).all()


def test_pooled_map_of_a_long_context(tmp_path):
    rows, cols = np.array([0, 4, 9, 14, 20]), np.array([0, 1, 5, 10, 15])
    maps = np.where(np.tri(5, dtype=bool), 0.05, np.nan)[None]
    heatmap(tmp_path / "map.png", maps, rows, cols, make_sample(20), layer=0)
    layout = heatmap_module._Layout.of(make_sample(20))
    sheet = heatmap_module._sheet((0,), rows.tobytes(), cols.tobytes(), 100, True, layout)
    cell = sheet.side / 5
    np.testing.assert_allclose(sheet.x([0, 1, 5, 10, 15, 21]), cell * np.arange(6))
    np.testing.assert_allclose(sheet.x(3), 1.5 * cell)
    np.testing.assert_allclose(sheet.y([0, 1, 5, 10, 15]), cell * np.arange(5))


@pytest.mark.parametrize(
    ("shape", "n_rows", "last"), [((1, 4, 4), 4, 2), ((1, 4, 5), 4, 3), ((1, 3, 4), 4, 3)]
)
def test_a_map_that_does_not_fit_its_tokens_is_an_error(tmp_path, shape, n_rows, last):
    tokens = np.arange(n_rows) + last - (n_rows - 1)
    with pytest.raises(ValueError, match="expected maps"):
        heatmap(tmp_path / "x.png", np.ones(shape), tokens, tokens, make_sample(3), layer=0)


def line_inputs(n_heads=2, n=30):
    maps = make_maps(n_heads, n + 1)
    received = np.nansum(maps, 1) / np.arange(n + 1, 0, -1)
    return maps[:, -1], received, np.linspace(0.2, 0.03, n + 1)


def test_lines_are_drawn_where_their_values_are(tmp_path, monkeypatch):
    drawn = []
    keep = page.Page.lines
    monkeypatch.setattr(page.Page, "lines", lambda *a, **k: drawn.append(a[1]) or keep(*a, **k))
    query, received, uniform = line_inputs()
    lines(tmp_path / "lines.png", query, received, uniform, make_sample(), layer=1)
    curves = [np.asarray(line) for lot in drawn for line in lot if np.shape(line) == (30, 2)]
    baseline = np.full(31, 1 / 31)
    expected = [(v, b) for v, b in ((query, baseline), (received, uniform))]
    curves = iter(curves)
    for left, (values, base) in zip((lineplot.LEFT, lineplot.RIGHT), expected, strict=True):
        scale = lineplot.Scale(values[:, :-1], base[:-1])
        for curve in (*values, values.mean(0), base):
            found = next(curves)
            np.testing.assert_allclose(found[:, 1], scale.y(curve[:-1]), rtol=1e-6)
            x = left + lineplot.WIDTH * (np.arange(30) + 0.5) / 30
            np.testing.assert_allclose(found[:, 0], x)


def test_scale_by_hand():
    linear = lineplot.Scale(np.array([[0.1, 0.5]]), np.array([0.3, 0.3]))
    assert not linear.is_log
    bottom = lineplot.TOP + lineplot.HEIGHT
    assert linear.y(0.0) == bottom
    np.testing.assert_allclose(linear.y(0.54), lineplot.TOP)
    log = lineplot.Scale(np.array([[0.0, 0.9]]), np.array([0.01, 0.01]))
    assert log.is_log
    assert log.y(0.0) == bottom  # a zero weight lies on the lower edge
    middle = np.sqrt(log.low * log.high)
    np.testing.assert_allclose(log.y(middle), lineplot.TOP + lineplot.HEIGHT / 2)
    assert log.ticks() == pytest.approx([0.001, 0.01, 0.1, 1.0])


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 3000))
def test_binned_lines_keep_the_mass(n):
    values = np.random.default_rng(n).random((2, n))
    means, starts = lineplot.bin_means(values)
    assert len(starts) <= lineplot.MAX_POINTS
    counts = np.diff(np.append(starts, n))
    np.testing.assert_allclose((means * counts).sum(1), values.sum(1))


@pytest.mark.parametrize(("n_heads", "n"), [(1, 1), (2, 2), (9, 50), (3, 1500)])
def test_every_shape_of_line_plot_is_drawn(tmp_path, n_heads, n):
    query, received, uniform = line_inputs(n_heads, n)
    sample = make_sample(n)
    lines(tmp_path / "lines.png", query, received, uniform, sample, layer=0)
    assert Image.open(tmp_path / "lines.png").size == (1250, 510)


def test_line_plot_refuses_the_wrong_number_of_tokens(tmp_path):
    query, received, uniform = line_inputs()
    with pytest.raises(ValueError, match=r"expected query rows .* \(2, 21\)"):
        lines(tmp_path / "x.png", query, received, uniform, make_sample(20), layer=0)


def metric_values(n_layers=3, n_samples=12, seed=0):
    rng = np.random.default_rng(seed)
    shape = (n_layers, n_samples)
    return {
        "mean_context_attention": rng.uniform(0.02, 0.033, shape),
        "concentration": rng.gamma(3, 0.01, shape),
        "entropy": rng.normal(2, 0.3, shape),
        "recent_distant_ratio": np.exp(rng.normal(0, 3, shape)),
    }


@pytest.mark.parametrize("n_samples", [1, 2, 12, 300])
def test_summary_draws_every_sample_its_mean_and_uniform(tmp_path, monkeypatch, n_samples):
    pages = []
    keep = page.Page.save
    monkeypatch.setattr(page.Page, "save", lambda p, path: pages.append(p) or keep(p, path))
    values = {name: v[0] for name, v in metric_values(1, n_samples).items()}
    summary(tmp_path / "summary.png", values, UNIFORM, layer=0)
    for axes, (name, found) in zip(pages[0].figure.axes, values.items(), strict=True):
        assert sum(bar.get_height() for bar in axes.patches) == n_samples
        upright = [line.get_xdata()[0] for line in axes.lines]
        assert found.mean() in upright
        assert UNIFORM[name] in upright
        log = name == "recent_distant_ratio" and found.max() > 100 * found.min()
        assert axes.get_xscale() == ("log" if log else "linear")
        assert axes.get_xlabel()
        assert axes.get_ylabel()


def test_summary_of_equal_and_of_zero_values(tmp_path):
    values = {name: np.full(4, value) for name, value in UNIFORM.items()}
    values["recent_distant_ratio"] = np.array([0.0, 1.0, 1e6, 1e9])
    summary(tmp_path / "summary.png", values, UNIFORM, layer=0)
    assert Image.open(tmp_path / "summary.png").size == (1020, 780)


@pytest.mark.parametrize(("n_layers", "n_samples"), [(1, 1), (3, 12), (48, 300)])
def test_layers_draws_the_mean_of_every_layer(tmp_path, monkeypatch, n_layers, n_samples):
    pages = []
    keep = page.Page.save
    monkeypatch.setattr(page.Page, "save", lambda p, path: pages.append(p) or keep(p, path))
    values = metric_values(n_layers, n_samples)
    layers(tmp_path / "layers.png", values, UNIFORM, numbers=range(5, 5 + n_layers))
    for axes, (name, found) in zip(pages[0].figure.axes, values.items(), strict=True):
        courses = [line.get_ydata() for line in axes.lines]
        assert any(np.array_equal(course, found.mean(1)) for course in courses)
        assert any(np.array_equal(course, [UNIFORM[name]] * 2) for course in courses)
        assert axes.get_xticklabels()[0].get_text() == "5"


def test_all_metric_texts_have_a_place():
    assert len(metricplot.METRIC_TEXTS) == len(metricplot.PLACES)


def write_all(folder):
    folder.mkdir()
    maps, sample = make_maps(2, 31), make_sample()
    draw(folder / "map.png", maps, sample)
    lines(folder / "lines.png", *line_inputs(), sample, layer=1)
    values = metric_values()
    summary(folder / "summary.png", {k: v[0] for k, v in values.items()}, UNIFORM, layer=0)
    layers(folder / "layers.png", values, UNIFORM, numbers=[0, 1, 2])
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    first = write_all(tmp_path / "a")
    other = make_maps(2, 31, seed=1)
    draw(tmp_path / "other.png", other, make_sample(rewarded=(1,)))
    assert write_all(tmp_path / "b") == first


def test_pixel_size_follows_dpi(tmp_path):
    lines(tmp_path / "lines.png", *line_inputs(), make_sample(), layer=1, dpi=60)
    image = Image.open(tmp_path / "lines.png")
    assert image.size == (750, 306)
    assert image.info["dpi"] == pytest.approx((60, 60), abs=0.1)


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_png_holds_exactly_the_pixels(tmp_path_factory, height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("png") / "x.png"
    path.write_bytes(page.png(pixels, 100))
    with Image.open(path) as image:
        image.verify()
    assert np.array_equal(np.asarray(Image.open(path)), pixels)
