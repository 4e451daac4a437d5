"""The first decisions of a play: no history, one transition, two, from capture to the pictures."""

from unittest import mock

import numpy as np
import pytest
import torch
from attention_rows import PARTS, decision, measured
from conftest import ad_agent
from test_order import of_matrix
from test_pictures import colour_near, draw, has_white_border, sheet_of

from historylens.agent import attend
from historylens.history import Decision, History
from historylens.metrics import NAMES, measure, measure_one
from historylens.pictures import lineplot
from historylens.pictures.heatmap import MAX_CELL, heatmap
from historylens.pictures.lineplot import LEFT, RIGHT, WIDTH, line_plot
from historylens.pictures.order import subtitle
from historylens.pictures.page import Page
from historylens.tokens import Tokens, order_of_time, sum_rows

ALONE = {name: float(name == "mass_self") for name in NAMES}


@pytest.fixture
def agent(tiny_model, tiny_histories):
    return ad_agent(tiny_model, tiny_histories)


def test_without_history_the_query_reads_itself_in_every_layer(agent):
    none, cells = np.zeros(0, int), np.zeros((0, 2), int)
    one = Decision(cells, none, none, np.array([2, 2]), cells, none)
    history = History.of([one] * 2)
    logits, layers = attend(agent, history, received=True, maps=[1])
    torch.testing.assert_close(logits, agent.act(history), atol=1e-5, rtol=1e-5)
    assert len(layers) == len(agent.layers)
    for layer in layers:
        assert layer.visible.all()
        assert layer.query_rows.tolist() == layer.received.tolist() == [[[1.0]] * 2] * 2
        assert layer.maps.tolist() == [[[[1.0]]] * 2]


def test_tokens_without_a_transition_are_the_query_alone_or_what_else_is_read_before_it():
    alone, first = Tokens.of(0), Tokens.of(0, PARTS, query="first")
    for tokens in (alone, first):
        assert (len(tokens), tokens.n, tokens.decides, tokens.parts) == (1, 0, 0, ())
        assert tokens.is_plain
        assert order_of_time(tokens).tolist() == [0]
        assert sum_rows(np.full((2, 3, 1), 0.7), [tokens] * 2).tolist() == [[[0.7]] * 3] * 2
    previous = Tokens.of(0, ("previous action", "state"))
    assert (previous.transition.tolist(), previous.n, previous.decides) == ([-1, -1], 0, 1)
    assert order_of_time(previous).tolist() == [0, 1]
    assert not previous.is_plain
    padded = Tokens([-1, -1, -1], ("padding", "padding", "query"))
    assert order_of_time(padded).tolist() == [2]


def test_without_a_context_every_metric_is_0_but_the_weight_on_the_query():
    assert measure_one([1.0]) == ALONE
    assert measure_one([0.25])["mass_self"] == 0.25  # the rest lies on keys that are no tokens
    none = np.zeros((2, 1, 0), bool)
    values = measure(np.ones((2, 3, 1)), none, none)
    assert values.tolist() == [[list(ALONE.values())] * 3] * 2
    for row in ([1.5], [-0.1], [np.nan]):
        with pytest.raises(ValueError, match="softmax"):
            measure_one(row)
    metrics = measured(np.ones((3, 2, 1)), decisions=[decision(0)] * 3)
    assert metrics.n_context.tolist() == [0, 0, 0]
    assert metrics.uniform_mean() == ALONE
    for name, expected in ALONE.items():
        assert (metrics.of(name) == expected).all()


def sample_of(n, tokens=None, seed=0):
    """Random causal attention of two heads before a decision after so many transitions."""
    tokens = tokens or Tokens.of(n)
    causal = np.tri(len(tokens), dtype=bool)
    weights = np.random.default_rng(seed).gamma(1.0, size=(2, *causal.shape)) * causal + 1e-6
    weights = np.where(causal, weights / (weights * causal).sum(-1, keepdims=True), np.nan)
    return of_matrix(weights.astype(np.float32), tokens, np.ones(len(tokens)))


@pytest.mark.parametrize("picture", [heatmap, line_plot])
@pytest.mark.parametrize("tokens", [Tokens.of(0), Tokens.of(0, ("previous action", "state"))])
def test_a_picture_of_a_decision_without_history_says_so_in_words(tmp_path, picture, tokens):
    sample = sample_of(0, tokens)
    with mock.patch.object(Page, "text", autospec=True, side_effect=Page.text) as text:
        pixels = draw(picture, tmp_path / "x.png", sample)
    said = [call.args[3] for call in text.call_args_list]
    assert said[0].startswith("Attention") and "layer 2" in said[0]  # noqa: PT018
    assert any(text.startswith("No history yet") for text in said)
    assert has_white_border(pixels)
    assert (pixels.max(-1) - pixels.min(-1)).max() < 60  # no bar, no map: black on white
    drawn = draw(picture, tmp_path / "x.png", sample_of(1))
    assert drawn.shape != pixels.shape


def test_numbers_of_a_sample_without_history_are_the_query_alone():
    numbers = sample_of(0).numbers()
    assert numbers["query_rows"] == {"mean": [1.0], "heads": [[1.0], [1.0]]}
    assert numbers["received"] == {"mean": [1.0], "heads": [[1.0], [1.0]]}
    query, received = sample_of(0).curves()
    assert query.values.shape == received.values.shape == (2, 0)
    said = subtitle(decision(0, title="step 0"), Tokens.of(0))
    assert said == "step 0 · 0 transitions and the query: T = 1 token"


@pytest.mark.parametrize("n", [1, 2])
def test_weights_of_short_maps_are_not_drawn_as_large_as_there_is_room(n):
    sheet = sheet_of(sample_of(n))
    assert sheet.zoom == MAX_CELL
    assert sheet.side == MAX_CELL * (n + 1)
    assert sheet.depth == MAX_CELL * n
    assert sheet_of(sample_of(30)).zoom < MAX_CELL


@pytest.mark.parametrize("n", [1, 2])
def test_lines_of_one_and_two_transitions_run_where_their_weights_are(tmp_path, n):
    sample = sample_of(n)
    pixels = draw(line_plot, tmp_path / "lines.png", sample)
    for left, curves in zip((LEFT, RIGHT), sample.curves(), strict=True):
        y = lineplot.scale_of(np.vstack([curves.values, curves.whole]), curves.uniform)[0]
        places = np.array([0.0, 1.0]) if n == 1 else (np.arange(n) + 0.5) / n  # one: all across
        for x in np.linspace(*places, 9)[1:-1]:
            height = np.interp(x, places, np.broadcast_to(y(curves.whole), 2))
            assert colour_near(pixels, left + WIDTH * x, height).max() < 100
