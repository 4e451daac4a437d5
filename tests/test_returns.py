"""Pictures of what compressed history earns: names and legends told in full inside the page."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from test_study import judged, result

from historylens.comparison import WITH_BUDGET
from historylens.pictures import returns
from historylens.pictures.returns import episode_ticks, spread

ABOUT = returns.Picture("a model", "a task", None, 99)


def test_episodes_are_named_evenly_from_the_first_and_none_is_skipped_where_all_fit():
    for n in range(1, 61):
        ticks = episode_ticks(n)
        assert ticks[0] == 1
        assert all(isinstance(tick, int) and 1 <= tick <= n for tick in ticks)
        assert len(ticks) <= 9
        assert len(set(np.diff(ticks[1:]))) <= 1
        assert n > 5 or ticks == list(range(1, n + 1))


def drawn_returns(picture, study, about=ABOUT):
    with mock.patch.object(returns, "save_figure") as save:
        picture("x.png", study, about)
    FigureCanvasAgg(figure := save.call_args.args[0]).draw()
    return figure.axes


def test_names_of_returns_stay_in_the_page_beside_long_numbers_and_clear_of_the_legend():
    names, level = ("recent", "random", "even", "decay", "diverse", "nearest"), -40000.0
    arms = [result(f"{name}@5", level - i) for i, name in enumerate(names)]
    study = judged(*arms, full=-10000.0, empty=level, control=level)
    plot, legend = drawn_returns(returns.draw_by_budget, study)
    panels = drawn_returns(returns.draw_by_episode, study)
    assert min(axes.yaxis.get_tightbbox().x0 for axes in (plot, *panels)) >= 0
    labels = [Text.get_window_extent(x).y0 for x in plot.texts if x.get_text() in names]
    assert len(labels) == len(names)
    assert min(labels) > max(text.get_window_extent().y1 for text in legend.texts)


def test_a_ring_marks_the_recommended_arm_and_the_heading_tells_of_stopped_ones():
    study = judged(result("even@10", 10.0), result("recent@10", 3.0), result("even@40", 3.0))
    stopped = judged(result("even@10", 10.0), result("recent@10", 3.0, shape=(4, 24, 8)))
    for each, n_subtitles in ((study, 0), (stopped, 1)):
        plot, legend = drawn_returns(returns.draw_by_budget, each)
        (ring,) = (line for line in plot.lines if line.get_ms() == returns.RING["ms"])
        assert (ring.get_xydata() == [[10, each.recommended.mean.value]]).all()
        assert "recommended" in [text.get_text() for text in legend.texts]
        heading = " ".join(text.get_text() for text in plot.figure.texts)
        assert heading.count("stopped arms: at least 96 of 192 runs") == n_subtitles


@pytest.mark.parametrize("budgets", [(10,), (10, 11), (5, 10, 40), (1, 100)])
def test_intervals_stand_beside_their_points_inside_the_plot_and_only_they_set_its_height(budgets):
    shown = "recent", "random", "even", "decay", "diverse", "nearest"
    arms = [result(f"{name}@{n}", 3.0) for name in shown for n in budgets]
    wide = result("top-k@10", -6.0, noise=20.0, shape=(4, 2, 8))  # grey: its interval is not drawn
    plot, _ = drawn_returns(returns.draw_by_budget, judged(*arms, wide))
    places = np.sqrt([line.get_xdata()[0] for line in plot.lines if line.get_lw() == 1.1])
    low, high = np.sqrt(plot.get_xlim())
    assert len(places) == len(arms)
    assert low < places.min() <= places.max() < high
    gaps = np.abs(places[:, None] - np.sqrt(budgets)).min(1)
    assert gaps.max() < 0.02 * (high - low)
    assert plot.get_ylim()[1] < 12


def test_the_legend_names_what_is_there_and_the_heading_fits():
    intervals = ["95 % intervals over seeds: lines, bands"]
    long = "a task that is told in more words than one line takes " * 4, "a name " * 30
    one_seed = judged(result("random@1", 3.0, shape=(4, 1, 1)), shape=(4, 1, 1))
    for arms, about, there in (
        (["even@20", "random@10"], ABOUT, intervals),
        (["recent@10"], replace(ABOUT, title=long[0], subtitle=long[1]), intervals),
        ([f"{name}@10" for name in WITH_BUDGET], ABOUT, intervals),
        ([], ABOUT, []),
    ):
        study = judged(*(result(key, 3.0) for key in arms)) if arms else one_seed
        plot, legend = drawn_returns(returns.draw_by_budget, study, about)
        curves, *_ = drawn_returns(returns.draw_by_episode, study, about)
        assert [text.get_text() for text in legend.texts][3:] == there
        for axes in (plot, curves):
            for extent in map(Text.get_window_extent, axes.figure.texts):
                assert extent.x1 <= axes.figure.bbox.x1
                assert extent.y0 >= axes.get_window_extent().y1
        names = [text.get_text() for text in curves.get_legend().texts]
        is_grey = [line.get_color() == returns.GREY for line in curves.lines]
        assert names.count("other strategies") == any(is_grey) == (len(arms) > 2)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30).map(sorted), st.floats(0.001, 0.1))
def test_labels_keep_their_order_and_their_distance(places, gap):
    assert spread([0.1, 0.5, 0.5, 1.0], 0.1) == pytest.approx([0.1, 0.45, 0.55, 1.0])
    moved = spread(places, gap)
    if (len(places) - 1) * gap < 1:
        assert (np.diff(moved) >= gap - 1e-9).all()
    assert -1e-9 <= min(moved) <= max(moved) <= 1 + 1e-9
    if len(places) == 1 or np.diff(places).min() >= gap:
        assert moved == pytest.approx(places)
