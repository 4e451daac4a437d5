"""Rank correlation of attention with leave-one-out effects, beside a plain twin."""

import json

import numpy as np
import pytest
import torch
from agents import ModelAgent
from compression_cases import decisions_of
from conftest import random_window, sharp_model
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from historylens.capture import capture
from historylens.effects.effect import kl_divergence
from historylens.effects.faithfulness import (
    Faithfulness,
    affordable,
    average_ranks,
    mean_defined,
    measure_faithfulness,
    spearman,
)
from historylens.effects.measure import Trial
from historylens.history import History

NAN = float("nan")


def plain_ranks(values):
    """Rank of each value: those below it, and half of its equals."""
    return [sum(b < a for b in values) + (1 + sum(b == a for b in values)) / 2 for a in values]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30))
def test_equal_values_share_the_mean_of_their_ranks(values):
    assert average_ranks(values).tolist() == plain_ranks(values)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=30))
def test_spearman_is_the_correlation_of_the_ranks(pairs):
    x, y = np.array(pairs).T
    if np.ptp(x) and np.ptp(y):
        expected = np.corrcoef(plain_ranks(x), plain_ranks(y))[0, 1]
        assert spearman(x, y) == pytest.approx(expected, abs=1e-12)
        assert spearman(np.exp(x), -y) == pytest.approx(-expected, abs=1e-12)
    else:
        assert np.isnan(spearman(x, y))


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 99]) == 1
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert spearman([1, 2, 3], [1, 3, 2]) == 0.5
    assert np.isnan(spearman([1], [2]))


def test_the_mean_leaves_out_what_is_not_defined():
    values = np.array([[0.5, NAN, NAN], [0.1, 0.2, NAN]])
    np.testing.assert_allclose(mean_defined(values), [0.3, 0.2, NAN])


def test_as_many_decisions_as_the_tokens_allow_and_one_at_least():
    assert affordable(10, 99) == [1, 3, 6, 8]
    assert len(affordable(10, 5000)) == 1
    assert affordable(10, 10) == list(range(10))


@pytest.fixture(scope="module")
def trial(tiny_config):
    agent = ModelAgent(sharp_model(tiny_config))
    context, queries = random_window(tiny_config, n_samples=4, n=11)
    agent.decisions = decisions_of(History(*context, query_states=queries[:, -1]))
    return Trial(agent, range(4), seed=0)


def measured(trial, layers=(0, 1), heads=((0, 1), (0, 1))):
    return measure_faithfulness(trial, layers, heads, tqdm(disable=True))


@pytest.mark.parametrize("max_tokens", [30, 2**14])
def test_effects_and_correlations_equal_a_plain_twin(trial, max_tokens, monkeypatch):
    monkeypatch.setattr("historylens.effects.faithfulness.MAX_TOKENS_ACTING", max_tokens)
    found, agent = measured(trial), trial.agent
    for b in range(4):
        history = agent.history([b])
        with torch.no_grad(), capture(agent.model) as record:
            full = agent.model(*history.inputs)
        others = [[i for i in range(11) if i != left_out] for left_out in range(11)]
        logits = [agent.act(history.take(torch.tensor([kept]))) for kept in others]
        effects = [kl_divergence(full, other).item() for other in logits]
        np.testing.assert_allclose(found.kl[b], effects, atol=1e-5)
        assert found.flips[b] == np.mean(
            [x.argmax().item() != full.argmax().item() for x in logits]
        )
        rows = np.array([layer.query_rows[0, :, :-1].double().numpy() for layer in record])

        def rank(row, effects=effects):
            return np.corrcoef(plain_ranks(row), plain_ranks(effects))[0, 1]

        expected = [[*map(rank, heads), rank(heads.mean(axis=0))] for heads in rows]
        np.testing.assert_allclose(found.correlations[b], expected, atol=1e-6)
        assert found.means[b] == pytest.approx(rank(rows.mean(axis=(0, 1))))
        assert found.recency[b] == pytest.approx(rank(range(11)))


def test_only_the_layers_and_heads_asked_for(trial):
    whole, part = measured(trial), measured(trial, layers=[1], heads=[[1]])
    np.testing.assert_allclose(part.correlations[:, 0, 0], whole.correlations[:, 1, 1])
    np.testing.assert_allclose(part.means, whole.correlations[:, 1, 1])
    assert part.best_head[:2] == (1, 1)
    layer = part.json()["layers"][0]
    assert (layer["layer"], layer["head_numbers"]) == (1, [1])


def made(heads, average=((NAN, NAN), (0.4, 0.2)), overall=0.25):
    """Two decisions; layer 0 has heads 0 and 1, layer 3 has heads 0 and 2."""
    values = np.zeros((2, 2, 3))
    values[:, :, :2] = heads
    values[:, :, 2] = np.array(average).T
    pair = np.array([1.0, 1.0])
    return Faithfulness(
        *([2, 5], [0, 3], [[0, 1], [0, 2]], values, overall * pair, 0.125 * pair),
        kl=np.ones((2, 7)),
        flips=[0.0, 0.5],
    )


def test_the_console_names_the_head_that_ranks_best():
    found = made([[NAN, 0.1], [-0.2, 0.625]])
    assert found.best_head == (3, 2, 0.625)
    text = found.text()
    words = " ".join(text.split())
    assert "layer 3 head 2 ranks transitions most like their measured effect: 0.62" in words
    assert "all layers and heads reaches 0.25" in words
    assert "the latest first, without a look at attention, 0.12" in words
    assert "each of 7 transitions alone causes, mean over 2 decisions" in words
    rows = [line.split() for line in text.splitlines()]
    assert ["3", "0.30", "0.62", "(head", "2)", "-0.20", "(head", "0)"] in rows
    assert ["0", "-", "0.10", "(head", "1)", "0.10", "(head", "1)"] in rows
    assert max(map(len, text.splitlines())) <= 100


def test_what_is_not_defined_is_said_and_is_null_in_the_json():
    found = made([[NAN, NAN], [NAN, NAN]], overall=NAN)
    assert found.best_head is None
    assert "Not defined" in found.text()
    values = json.loads(json.dumps(found.json(), allow_nan=False))
    assert values["overall"] is None
    assert values["layers"][0]["heads"] == [None, None]
    assert values["layers"][1]["head_average"] == pytest.approx(0.3)
    assert values["layers"][1]["head_average_per_sample"] == [0.4, 0.2]
    assert values["recency"] == 0.125
    assert values["leave_one_out"]["flips"] == [0.0, 0.5]
