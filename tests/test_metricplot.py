"""Pictures of metrics and learning hold their numbers, told in full inside the page."""

import itertools
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from matplotlib.colors import to_hex
from test_pictures import axes_of, draw, sample_of

from historylens.metrics import Metrics
from historylens.pictures import draw_summaries, metricplot, page
from historylens.pictures.lineplot import line_plot
from historylens.pictures.metricplot import KINDS, METRICS, attention_over_learning, course, summary
from historylens.pictures.page import INK, Page

UNIFORM = dict(zip(METRICS, (1 / 31, 0.0, 3.3, 1.0), strict=True))
OPTIONS = {"title": "Attention over learning · a model", "dpi": 50}


def metric_values(*shape):
    rng = np.random.default_rng(0)
    values = {name: rng.gamma(3, 0.01, shape) for name in METRICS}
    return values | {"recent_distant_ratio": np.exp(rng.normal(0, 3, shape))}


@pytest.mark.parametrize(("n_layers", "n_samples"), [(1, 1), (3, 12), (48, 300)])
def test_summaries_hold_every_sample_the_mean_of_every_layer_and_uniform(n_layers, n_samples):
    values, layers = metric_values(n_layers, n_samples), range(5, 5 + n_layers)
    first = {name: rows[0] for name, rows in values.items()}
    distributions = axes_of(summary, first, UNIFORM, layer=0, heads="heads 0 and 2", dpi=100)
    courses = axes_of(course, values, UNIFORM, layers=layers, heads="heads 0 and 2", dpi=100)
    for name, axes, over in zip(METRICS, distributions, courses, strict=True):
        own, even = first[name], UNIFORM[name]
        is_log = name == "recent_distant_ratio" and own.max() > 100 * own.min()
        assert (axes.get_xscale() == "log") == ("log scale" in axes.get_xlabel()) == is_log
        assert sum(bar.get_height() for bar in axes.patches) == n_samples
        middle = np.median if name == "recent_distant_ratio" else np.mean
        assert {middle(own), even} <= {line.get_xdata()[0] for line in axes.lines}
        lines = [line.get_ydata() for line in over.lines]
        for expected in (middle(values[name], axis=1), [even] * 2):
            assert any(np.array_equal(line, expected) for line in lines)
        assert over.get_xticklabels()[0].get_text() == "5"


def test_values_that_are_nearly_equal_are_told_in_full_inside_the_page():
    values = {name: 0.31 + 1e-7 * np.arange(18).reshape(2, 9) for name in METRICS}
    first, even = {name: rows[0] for name, rows in values.items()}, dict.fromkeys(METRICS, 0.31)
    courses = axes_of(course, values, even, layers=[0, 1], heads="heads 0 and 2", dpi=100)
    for drawn in (courses, axes_of(summary, first, even, layer=0, heads="heads 0 and 2", dpi=100)):
        drawn[0].figure.canvas.draw()
        for axes in drawn:
            assert not axes.yaxis.get_offset_text().get_text()
            assert not axes.xaxis.get_offset_text().get_text()
            assert axes.yaxis.get_tightbbox().x0 >= 0


def test_no_axis_reaches_far_below_zero_and_a_ratio_may_be_zero_and_huge():
    zero = dict.fromkeys(METRICS, 0.0)
    one, four = (dict.fromkeys(METRICS, np.zeros(shape)) for shape in ((1, 1), 4))
    over, *_ = axes_of(course, one, zero, layers=[0], heads="heads 0 and 2", dpi=50)
    odd = four | {"recent_distant_ratio": np.array([0.0, 1.0, 1e6, 1e9])}
    axes, *_, ratio = axes_of(summary, odd, zero, layer=0, heads="heads 0 and 2", dpi=50)
    axes.figure.canvas.draw()
    assert -0.1 < over.get_ylim()[0] <= 0
    assert axes.patches[0].get_x() == 0
    assert sum(bar.get_height() for bar in ratio.patches) == 4  # the zero, too


def test_legends_have_a_swatch_for_single_samples_bands_and_ranges(tmp_path):
    with mock.patch.object(page.Page, "swatch") as swatch:
        axes_of(course, metric_values(2, 9), UNIFORM, layers=[0, 1], heads="heads 0 and 2", dpi=100)
        axes_of(summary, metric_values(9), UNIFORM, layer=0, heads="heads 0 and 2", dpi=100)
        axes_of(course, metric_values(2, 1), UNIFORM, layers=[0, 1], heads="head 0", dpi=100)
        draw(line_plot, tmp_path / "lines.png", sample_of(n=701))
    said = [call.args[2] for call in swatch.call_args_list]
    assert said.count("single samples") == 2
    assert said.count("the middle 80 % of samples") == 1
    assert said[-1] == "A point is the mean of 2 positions; the grey band is their range."


@pytest.mark.parametrize(("heads", "told"), [
    ([[0], [1]], ["head 0", "head 1", "heads"]), ([[0, 2]] * 2, ["heads 0 and 2"] * 3),
])  # fmt: skip
def test_the_heads_that_are_averaged_are_named(heads, told):
    metrics, said = Metrics(9, [3, 5], heads), []
    metrics.values[:] = metrics.uniform[:] = 0.5
    with mock.patch.object(page.Page, "heading", lambda *texts: said.append(texts[-1])):
        painter = mock.Mock(draw=lambda kind, _, *args, **own: axes_of(kind, *args, **own, dpi=50))
        draw_summaries(Path("out"), metrics, painter)
    assert said == [f"Attention of the query token to its history, averaged over {x}" for x in told]


def three(rng, n, scale=1.0):
    mean = scale * rng.uniform(0.2, 0.8, n)
    return {"mean": mean.tolist(), "low": (0.9 * mean).tolist(), "high": (1.1 * mean).tolist()}


def view(episodes, rollouts, n_layers, kinds, seed=0):
    rng, n = np.random.default_rng(seed), len(episodes)
    layers = [
        {"layer": 2 * i, "shares": {k: three(rng, n) for k in kinds}} for i in range(n_layers)
    ]
    even = {kind: rng.uniform(0.2, 0.8, n).tolist() for kind in kinds}
    own = {"reward": three(rng, n, 10.0), "layers": layers, "even": even}
    return {"episode": list(episodes), "rollouts": list(rollouts), **own}


def made(n=6, n_layers=2, kinds=tuple(KINDS), best=12.5, since=True, above=0.0):
    after = view(range(-2, n), [4, 6, *[8] * (n - 1), 1], n_layers, kinds, 1) if since else None
    return {
        "kinds": list(kinds), "n_rollouts": 8, "n_decisions": 4800, "best": best,
        "first_reward": {"above": above},
        "by_episode": view(range(1, n + 1), [8] * n, n_layers, kinds), "since_first_reward": after,
    }  # fmt: skip


def columns(learning):
    """Panels from top to bottom, left and right."""
    panels = axes_of(attention_over_learning, learning, **OPTIONS)
    n = 1 + len(learning["by_episode"]["layers"])
    return panels[:n], panels[n:]


def words(learning):
    """Texts of a picture, those of the legends included."""
    with mock.patch.object(Page, "text") as text, mock.patch.object(Page, "heading") as heading:
        axes = axes_of(attention_over_learning, learning, **OPTIONS)
    said = [call.args[2] for call in text.call_args_list] + [*heading.call_args.args[1:]]
    return said + [text.get_text() for one in axes[0].figure.legends for text in one.get_texts()]


def lines_of(axes, colour):
    return [one for one in axes.lines if one.get_color() == colour]


def band(axes, line):
    (shade,) = (c for c in axes.collections if to_hex(c.get_facecolor()[0]) == line.get_color())
    return {tuple(corner) for path in shade.get_paths() for corner in path.vertices.round(6)}


def assert_drawn(axes, line, own, x):
    np.testing.assert_array_equal(line.get_xdata(), x)
    np.testing.assert_array_equal(line.get_ydata(), own["mean"])
    ends = zip(x * 2, own["low"] + own["high"], strict=True)
    assert {(episode, round(end, 6)) for episode, end in ends} <= band(axes, line)


def test_every_panel_shows_the_mean_of_each_kind_its_interval_and_what_uniform_attention_gives():
    learning = made()
    learning["since_first_reward"]["rollouts"] = [2] * 8
    for panels, name in zip(columns(learning), metricplot.VIEWS, strict=True):
        own = learning[name]
        reward, *others = panels
        line, best = lines_of(reward, INK)
        assert_drawn(reward, line, own["reward"], own["episode"])
        assert best.get_ydata() == [12.5] * 2
        assert best.get_linestyle() == ":"
        for axes, layer in zip(others, own["layers"], strict=True):
            assert axes.get_title(loc="left") == f"layer {layer['layer']}"
            for kind, (colour, marker, _) in KINDS.items():
                even, line = lines_of(axes, colour)
                assert (even.get_linestyle(), line.get_linestyle()) == ("--", "-")
                np.testing.assert_array_equal(even.get_ydata(), own["even"][kind])
                assert line.get_marker() == marker
                assert_drawn(axes, line, layer["shares"][kind], own["episode"])


def test_the_right_column_counts_from_the_first_reward_marked_and_says_how_many_rollouts_it_has():
    left, right = columns(made())
    assert {axes.get_xlabel() for axes in left} == {"episode of the rollout"}
    assert {axes.get_xlabel() for axes in right} == {"episodes since the first reward"}
    for axes in right:
        assert [list(line.get_xdata()) for line in axes.lines].count([0, 0]) == 1
    assert not any(list(line.get_xdata()) == [0, 0] for axes in left for line in axes.lines)
    assert not left[0].texts  # nobody is missing
    name, *numbers = right[0].texts
    assert name.get_text().strip() == "rollouts"
    numbers = {text.get_position()[0]: text.get_text() for text in numbers}
    assert numbers == {-2: "4", -1: "6", 0: "8", 1: "8", 2: "8", 3: "8", 4: "8", 5: "1"}
    many = made()
    many["since_first_reward"] = view(range(-40, 360), range(400, 0, -1), 2, KINDS)
    *_, numbers = columns(many)
    numbers = [text.get_position() + (text.get_text(),) for text in numbers[0].texts[1:]]
    assert 4 <= len(numbers) <= 9  # they do not touch
    assert all(float(text) == 360 - x for x, _, text in numbers)


def test_missing_values_are_gaps_and_fewer_than_two_rollouts_have_no_interval():
    learning = made(since=False)
    own = learning["by_episode"]
    own["rollouts"] = [8, 8, 8, 1, 8, 8]
    shares = own["layers"][0]["shares"]["older"]
    for values in (*shares.values(), own["even"]["older"]):
        values[:2] = [None, None]
    (_, axes, _), _ = columns(learning)
    even, line = lines_of(axes, KINDS["older"][0])
    for drawn in (even, line):
        assert np.isnan(drawn.get_ydata()).tolist() == [True] * 2 + [False] * 4
    assert {x for x, _ in band(axes, line)} == {3, 5, 6}
    assert line.get_ydata()[2:].tolist() == shares["mean"][2:]  # the mean of one rollout is there


@pytest.mark.parametrize("n_rollouts", [1, 5])
def test_one_episode_is_a_point_with_a_bar_where_there_are_several_rollouts(n_rollouts):
    learning = made(n=1, since=False)
    learning["by_episode"]["rollouts"] = [n_rollouts]
    reward = learning["by_episode"]["reward"]
    (axes, *others), _ = columns(learning)
    line = lines_of(axes, INK)[0]
    assert line.get_xydata().tolist() == [[1, reward["mean"][0]]]
    assert line.get_marker() == "o"
    bars = [c.get_segments() for c in axes.collections if hasattr(c, "get_segments")]
    expected = [[1, reward["low"][0]], [1, reward["high"][0]]]
    found = [bar.tolist() for one in bars for bar in one if np.isfinite(bar).all()]
    assert found == [expected] * (n_rollouts > 1)
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]
    for one in others:  # a dashed line needs two ends: a dash
        assert {line.get_marker() for line in one.lines if line.get_linestyle() == "--"} == {"_"}
        assert {tuple(line.get_markevery()) for line in one.lines[::2]} == {(0,)}


@pytest.mark.parametrize(("n", "is_marked"), [(120, True), (121, False)])
def test_many_episodes_have_no_markers_but_where_a_point_stands_alone(n, is_marked):
    learning = made(n=n, since=False)
    mean = learning["by_episode"]["reward"]["mean"]
    mean[5] = mean[7] = None
    (axes, *_), _ = columns(learning)
    assert lines_of(axes, INK)[0].get_markevery() == (None if is_marked else [6])


def test_without_any_reward_the_right_column_says_so_and_without_a_best_nothing_is_dotted():
    learning = made(since=False, best=None)
    left, right = columns(learning)
    assert not right
    assert ":" not in {line.get_linestyle() for line in left[0].lines}
    for said, has_any in ((words(learning), False), (words(made()), True)):
        assert ("No rollout earned a reward." in said) != has_any
        assert ("best possible reward: 12.5" in said) == has_any
    said = words(made(since=False, above=5.0))
    assert "No rollout earned a reward above 5." in said
    assert "Since each rollout's first reward above 5" in said


def test_shares_have_one_scale_from_0_to_1_at_most_and_rewards_one_of_their_own():
    learning = made()
    learning["by_episode"]["layers"][1]["shares"]["older"]["high"][0] = 3.0  # of two rollouts
    learning["by_episode"]["layers"][1]["shares"]["older"]["low"][0] = -2.0
    left, right = columns(learning)
    assert {axes.get_ylim() for axes in [*left[1:], *right[1:]]} == {(-0.03, 1.03)}
    (low, high), other = left[0].get_ylim(), right[0].get_ylim()
    assert (low, high) == other
    assert -1 < low < 0
    assert 12.5 < high < 14
    for values in learning["by_episode"]["reward"].values():
        values[:] = [0.0] * len(values)
    (axes, *_), _ = columns(learning | {"best": None, "since_first_reward": None})
    assert axes.get_ylim() == pytest.approx((-0.05, 1.05))  # nothing was earned: no tiny numbers
    learning["by_episode"]["reward"]["mean"][0] = -5.0
    (axes, *_), _ = columns(learning)
    assert axes.get_ylim()[0] < -5


def test_only_kinds_that_are_known_are_drawn_and_named_each_with_what_it_is():
    learning = made(kinds=[kind for kind in KINDS if kind != "same state"])
    said = words(learning)
    expected = [f"{kind}: {KINDS[kind][2]}" for kind in learning["kinds"]]
    assert [text for text in said if text.split(":")[0] in KINDS] == expected
    for more in ("The kinds overlap", "what uniform attention would give", "95 % interval"):
        assert any(more in text for text in said)
    (_, axes, _), _ = columns(learning)
    assert KINDS["same state"][0] not in {line.get_color() for line in axes.lines}


@pytest.mark.parametrize("n_layers", [1, 9])
def test_the_page_grows_with_the_layers_and_no_panel_touches_another(n_layers):
    for panels in columns(made(n=3, n_layers=n_layers, kinds=("older",))):
        boxes = [axes.get_position() for axes in panels]
        assert len(boxes) == 1 + n_layers
        assert all(above.y0 > below.y1 for above, below in itertools.pairwise(boxes))
        assert 0 < boxes[-1].y0 < boxes[0].y1 < 1
    grown = (n_layers - 1) * (metricplot.PANEL + metricplot.BELOW)
    assert panels[0].figure.get_figheight() * 100 == pytest.approx(692 + grown)
