"""Pictures of metrics and of returns: they hold their numbers, told in full inside the page."""

from unittest import mock

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from test_pictures import axes_of, draw, sample_of
from test_study import judged, result

from historylens.pictures import page, returns
from historylens.pictures.lineplot import line_plot
from historylens.pictures.metricplot import METRICS, course, summary
from historylens.pictures.returns import episode_ticks, spread

UNIFORM = dict(zip(METRICS, (1 / 31, 0.0, 3.3, 1.0), strict=True))


@pytest.mark.parametrize("n", range(1, 61))
def test_episodes_are_named_evenly_from_the_first_and_none_is_skipped_where_all_fit(n):
    ticks = episode_ticks(n)
    assert ticks[0] == 1
    assert all(isinstance(tick, int) and 1 <= tick <= n for tick in ticks)
    assert len(ticks) <= 9
    if n <= 5:
        assert ticks == list(range(1, n + 1))
    assert len(set(np.diff(ticks[1:]))) <= 1


def metric_values(*shape):
    rng = np.random.default_rng(0)
    values = {name: rng.gamma(3, 0.01, shape) for name in METRICS}
    return values | {"recent_distant_ratio": np.exp(rng.normal(0, 3, shape))}


@pytest.mark.parametrize(("n_layers", "n_samples"), [(1, 1), (3, 12), (48, 300)])
def test_summaries_hold_every_sample_the_mean_of_every_layer_and_uniform(n_layers, n_samples):
    values, layers = metric_values(n_layers, n_samples), range(5, 5 + n_layers)
    first = {name: rows[0] for name, rows in values.items()}
    distributions = axes_of(summary, first, UNIFORM, layer=0, dpi=100)
    courses = axes_of(course, values, UNIFORM, layers=layers, dpi=100)
    for name, axes, over in zip(METRICS, distributions, courses, strict=True):
        own, even = first[name], UNIFORM[name]
        is_log = name == "recent_distant_ratio" and own.max() > 100 * own.min()
        assert (axes.get_xscale() == "log") == ("log scale" in axes.get_xlabel()) == is_log
        assert sum(bar.get_height() for bar in axes.patches) == n_samples
        assert {own.mean(), even} <= {line.get_xdata()[0] for line in axes.lines}
        lines = [line.get_ydata() for line in over.lines]
        for expected in (values[name].mean(1), [even] * 2):
            assert any(np.array_equal(line, expected) for line in lines)
        assert over.get_xticklabels()[0].get_text() == "5"


def test_values_that_are_nearly_equal_are_told_in_full_inside_the_page():
    values = {name: 0.31 + 1e-7 * np.arange(18).reshape(2, 9) for name in METRICS}
    first, even = {name: rows[0] for name, rows in values.items()}, dict.fromkeys(METRICS, 0.31)
    courses = axes_of(course, values, even, layers=[0, 1], dpi=100)
    for drawn in (courses, axes_of(summary, first, even, layer=0, dpi=100)):
        drawn[0].figure.canvas.draw()
        for axes in drawn:
            assert not axes.yaxis.get_offset_text().get_text()
            assert not axes.xaxis.get_offset_text().get_text()
            assert axes.yaxis.get_tightbbox().x0 >= 0


def test_no_axis_reaches_far_below_zero():
    zero = dict.fromkeys(METRICS, 0.0)
    first, second = (dict.fromkeys(METRICS, np.zeros(shape)) for shape in ((1, 1), 1))
    over, *_ = axes_of(course, first, zero, layers=[0], dpi=50)
    axes, *_ = axes_of(summary, second, zero, layer=0, dpi=50)
    assert -0.1 < over.get_ylim()[0] <= 0
    assert axes.patches[0].get_x() == 0


def test_legends_have_a_swatch_for_single_samples_bands_and_ranges(tmp_path):
    values = metric_values(2, 9)
    with mock.patch.object(page.Page, "swatch") as swatch:
        axes_of(course, values, UNIFORM, layers=[0, 1], dpi=100)
        axes_of(summary, metric_values(9), UNIFORM, layer=0, dpi=100)
        axes_of(course, metric_values(2, 1), UNIFORM, layers=[0, 1], dpi=100)  # its mean is it
        draw(line_plot, tmp_path / "lines.png", sample_of(n=701))
    said = [call.args[2] for call in swatch.call_args_list]
    assert said.count("single samples") == 2
    assert said.count("the middle 80 % of samples") == 1
    assert said[-1] == "A point is the mean of 2 positions; the grey band is their range."


def test_names_of_returns_stay_in_the_page_beside_long_numbers_and_clear_of_the_legend():
    names, level = ("recent", "random", "even", "decay", "diverse", "nearest"), -40000.0
    arms = [result(f"{name}@5", level - i) for i, name in enumerate(names)]
    study = judged(*arms, full=-10000.0, empty=level, control=level)
    with mock.patch.object(returns, "save_figure") as save:
        for picture in (returns.draw_by_budget, returns.draw_by_episode):
            picture("x.png", study, returns.Picture("a model", "a task", None, 99))
    (plot, legend), panels = (call.args[0].axes for call in save.call_args_list)
    assert min(axes.yaxis.get_tightbbox().x0 for axes in (plot, *panels)) >= 0
    FigureCanvasAgg(plot.figure).draw()
    labels = [Text.get_window_extent(x).y0 for x in plot.texts if x.get_text() in names]
    assert len(labels) == len(names)
    assert min(labels) > max(text.get_window_extent().y1 for text in legend.texts)


@pytest.mark.parametrize("level", [9.6, 9.9, 10.0, 10.01, 10.2, 10.6, 11.2, 14.0])
def test_the_recommended_arm_is_named_clear_of_the_name_of_full_history(level):
    study = judged(result("even@10", level), result("recent@10", 3.0), result("even@40", 3.0))
    assert study.recommended.arm.key == "even@10"
    with mock.patch.object(returns, "save_figure") as save:
        returns.draw_by_budget("x.png", study, returns.Picture("a model", "a task", None, 99))
    FigureCanvasAgg(figure := save.call_args.args[0]).draw()
    texts = {x.get_text()[:12]: Text.get_window_extent(x) for x in figure.axes[0].texts}
    assert not texts["recommended"].overlaps(texts["full history"])


def test_labels_that_touch_move_apart_around_their_middle():
    assert spread([0.1, 0.5, 0.5, 1.0], 0.1) == pytest.approx([0.1, 0.45, 0.55, 1.0])


def test_equal_zero_and_far_apart_numbers_can_be_drawn(tmp_path):
    odd = {name: np.full(4, value) for name, value in UNIFORM.items()}
    odd["recent_distant_ratio"] = np.array([0.0, 1.0, 1e6, 1e9])
    summary(tmp_path / "summary.png", odd, UNIFORM, layer=0, dpi=50)
    assert Image.open(tmp_path / "summary.png").size == (510, 390)
