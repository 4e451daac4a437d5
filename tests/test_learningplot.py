"""The picture of attention over learning: it draws its numbers, and says what there is none of."""

import itertools
from unittest import mock

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from test_pictures import axes_of, has_white_border

from historylens.pictures import metricplot
from historylens.pictures.metricplot import KINDS, attention_over_learning
from historylens.pictures.page import INK, Page

OPTIONS = {"title": "Attention over learning · a model", "dpi": 50}


def three(rng, n, scale=1.0):
    mean = scale * rng.uniform(0.2, 0.8, n)
    return {"mean": mean.tolist(), "low": (0.9 * mean).tolist(), "high": (1.1 * mean).tolist()}


def view(episodes, rollouts, n_layers, kinds, seed=0):
    rng, n = np.random.default_rng(seed), len(episodes)
    layers = [
        {"layer": 2 * i, "shares": {k: three(rng, n) for k in kinds}} for i in range(n_layers)
    ]
    even = {kind: rng.uniform(0.2, 0.8, n).tolist() for kind in kinds}
    reward = three(rng, n, 10.0)
    return {
        "episode": list(episodes), "rollouts": list(rollouts), "reward": reward, "layers": layers,
        "even": even,
    }  # fmt: skip


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


def band(collection):
    """Corners of a band."""
    return {tuple(corner) for path in collection.get_paths() for corner in path.vertices.round(6)}


def assert_drawn(axes, line, own, x):
    np.testing.assert_array_equal(line.get_xdata(), x)
    np.testing.assert_array_equal(line.get_ydata(), own["mean"])
    (shade,) = (c for c in axes.collections if to_hex(c.get_facecolor()[0]) == line.get_color())
    corners = band(shade)
    for episode, low, high in zip(x, own["low"], own["high"], strict=True):
        assert {(episode, round(low, 6)), (episode, round(high, 6))} <= corners


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
    shades = [c for c in axes.collections if to_hex(c.get_facecolor()[0]) == line.get_color()]
    assert {x for x, _ in band(shades[0])} == {3, 5, 6}
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
    kinds = tuple(kind for kind in KINDS if kind != "same state")
    said = words(made(kinds=kinds))
    expected = [f"{kind}: {KINDS[kind][2]}" for kind in kinds]
    assert [text for text in said if text.split(":")[0] in KINDS] == expected
    for more in ("The kinds overlap", "what uniform attention would give", "95 % interval"):
        assert any(more in text for text in said)
    (_, axes, _), _ = columns(made(kinds=kinds))
    assert KINDS["same state"][0] not in {line.get_color() for line in axes.lines}


@pytest.mark.parametrize("n_layers", [1, 9])
def test_the_page_grows_with_the_layers_and_no_panel_touches_another(n_layers):
    both = columns(made(n=3, n_layers=n_layers, kinds=("older",)))
    for panels in both:
        boxes = [axes.get_position() for axes in panels]
        assert len(boxes) == 1 + n_layers
        assert all(above.y0 > below.y1 for above, below in itertools.pairwise(boxes))
        assert 0 < boxes[-1].y0 < boxes[0].y1 < 1
    height = both[0][0].figure.get_figheight() * 100
    grown = (n_layers - 1) * (metricplot.PANEL + metricplot.BELOW)
    assert height == pytest.approx(692 + grown)


def test_the_file_fits_its_page_and_has_the_bytes_of_its_numbers(tmp_path):
    def written(learning):
        attention_over_learning(tmp_path / "a.png", learning, **OPTIONS)
        return (tmp_path / "a.png").read_bytes()

    learning = made(n_layers=1, n=3, kinds=("rewarded",))
    first = written(learning)
    assert has_white_border(np.asarray(Image.open(tmp_path / "a.png")))
    assert written(learning) == first
    learning["by_episode"]["layers"][0]["shares"]["rewarded"]["mean"][2] = 0.1
    assert written(learning) != first
