"""Rank correlation of attention with leave-one-out effects, beside a plain twin."""

import json

import numpy as np
import pytest
import torch
from conftest import make_histories, sharp_model
from hypothesis import given
from hypothesis import strategies as st

from analysis import Analysis
from attention.capture import capture
from compression import kl_divergence
from decisions import Decision
from effects import faithfulness as module
from effects.content import faithfulness_json
from effects.faithfulness import (
    Faithfulness,
    affordable,
    average_ranks,
    mean_defined,
    measure_faithfulness,
    spearman,
)
from effects.report import faithfulness_block
from subject import ADSubject

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
    samples = list(range(0, 20, 2))
    assert affordable(samples, 99) == [2, 6, 12, 16]
    assert len(affordable(samples, 5000)) == 1
    assert affordable(samples, 10) == samples


@pytest.fixture(scope="module")
def analysis(tiny_config):
    histories = make_histories(n_episodes=12)
    decisions = [Decision(i % 3, 20 + 5 * i) for i in range(4)]
    return Analysis(ADSubject(sharp_model(tiny_config), histories, decisions), layers=[0, 1])


def test_correlations_equal_a_plain_twin(analysis):
    found = measure_faithfulness(analysis, [0, 3])
    subject = analysis.subject
    for b, index in enumerate((0, 3)):
        history = subject.history([index])
        with torch.no_grad(), capture(subject.model) as record:
            full = subject.model(*history.inputs)
        effects = []
        for left_out in range(history.n):
            kept = [i for i in range(history.n) if i != left_out]
            with torch.no_grad():
                other = subject.model(*history.take(torch.tensor([kept])).inputs)
            effects.append(kl_divergence(full, other).item())
        np.testing.assert_allclose(found.kl[b], effects, atol=1e-5)
        rows = [layer.query_rows[0, :, :-1].double().numpy() for layer in record]

        def rank(row, effects=effects):
            return np.corrcoef(plain_ranks(row), plain_ranks(effects))[0, 1]

        for layer in (0, 1):
            for head in (0, 1):
                expected = rank(rows[layer][head])
                assert found.heads[layer][b, head] == pytest.approx(expected, abs=1e-6)
            assert found.layer_means[layer, b] == pytest.approx(rank(rows[layer].mean(0)))
        assert found.means[b] == pytest.approx(rank(np.mean(rows, axis=(0, 1))))
        assert found.recency[b] == pytest.approx(rank(range(history.n)))


def test_batches_and_company_change_no_number(analysis, monkeypatch):
    both = measure_faithfulness(analysis, [0, 3])
    monkeypatch.setattr(module, "MAX_TOKENS", 30)
    alone = measure_faithfulness(analysis, [3])
    np.testing.assert_allclose(alone.kl[0], both.kl[1], atol=1e-6)


def test_only_the_layers_and_heads_asked_for(analysis):
    whole = measure_faithfulness(analysis, [1])
    part = measure_faithfulness(Analysis(analysis.subject, layers=[1], heads=(1,)), [1])
    assert (part.layers, part.head_numbers) == ((1,), ((1,),))
    assert part.heads[0][0, 0] == pytest.approx(whole.heads[1][0, 1])
    assert part.means == pytest.approx(whole.heads[1][:, 1])
    assert part.best_head[:2] == (1, 1)


def made(heads, overall=0.25):
    heads = tuple(np.array([values, values]) for values in heads)
    return Faithfulness(
        samples=(2, 5),
        layers=(0, 3),
        head_numbers=((0, 1), (0, 1)),
        heads=heads,
        layer_means=np.array([[NAN, NAN], [0.4, 0.2]]),
        means=np.array([overall, overall]),
        recency=np.array([0.125, 0.125]),
        kl=np.ones((2, 7)),
        flips=np.zeros((2, 7), dtype=bool),
    )


def test_the_console_names_the_head_that_ranks_best():
    found = made([[NAN, 0.1], [0.625, -0.2]])
    assert found.best_head == (3, 0, 0.625)
    text = faithfulness_block(found)
    words = " ".join(text.split())
    assert "layer 3 head 0 ranks transitions most like their measured effect: 0.62" in words
    assert "all layers and heads reaches 0.25" in words
    assert "the latest first, without a look at attention, 0.12" in words
    assert "each of 7 transitions alone causes, mean over 2 decisions" in words
    rows = [line.split() for line in text.splitlines()]
    assert ["3", "0.30", "0.62", "(head", "0)", "-0.20", "(head", "1)"] in rows
    assert ["0", "-", "0.10", "(head", "1)", "0.10", "(head", "1)"] in rows
    assert max(map(len, text.splitlines())) <= 100


def test_what_is_not_defined_is_said_and_is_null_in_the_json():
    found = made([[NAN, NAN], [NAN, NAN]], overall=NAN)
    assert found.best_head is None
    assert "Not defined" in faithfulness_block(found)
    content = json.loads(json.dumps(faithfulness_json(found), allow_nan=False))
    assert content["overall"] is None
    assert content["layers"][0]["heads"] == [None, None]
    assert content["layers"][1]["head_average"] == pytest.approx(0.3)
    assert content["recency"] == 0.125
    assert faithfulness_json(None) is None
    assert "Not measured" in faithfulness_block(None)
