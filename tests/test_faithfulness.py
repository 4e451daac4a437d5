"""Rank correlation of attention with leave-one-out effects, beside a plain twin."""

import json
from types import SimpleNamespace

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
from historylens.effects import faithfulness
from historylens.effects.faithfulness import affordable, faithfulness_text, mean_defined, spearman
from historylens.effects.measure import Trial, kl_divergence
from historylens.history import History


def rank_correlation(*pair):
    """By the rank of each value: those below it, and half of its equals."""
    ranks = [[(np.less(v, x) + 0.5 * np.equal(v, x)).sum() for x in v] for v in pair]
    return np.corrcoef(*ranks)[0, 1]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=30))
def test_spearman_is_the_correlation_of_the_ranks(pairs):
    x, y = np.array(pairs).T
    if np.ptp(x) and np.ptp(y):
        assert spearman(x, y) == pytest.approx(rank_correlation(x, y), abs=1e-12)
        assert spearman(np.exp(x), -y) == pytest.approx(-spearman(x, y), abs=1e-12)
    else:
        assert np.isnan(spearman(x, y))
    assert spearman([1, 2, 3], [1, 3, 2]) == 0.5


def test_as_many_decisions_as_the_tokens_allow_and_one_at_least():
    found = [affordable(10, n) for n in (10, 99, 5000)]
    assert found == [[*range(10)], [1, 3, 6, 8], [5]]


@pytest.fixture(scope="module")
def trial(tiny_config):
    agent = ModelAgent(sharp_model(tiny_config))
    context, queries = random_window(tiny_config, n_samples=4, n=11)
    agent.decisions = decisions_of(History(*context, query_states=queries[:, -1]))
    return Trial(agent, 4, seed=0)


def measured(trial, layers=(0, 1), heads=((0, 1), (0, 1))):
    return faithfulness.measure_faithfulness(trial, layers, heads, tqdm(disable=True))


@pytest.mark.parametrize("max_tokens", [30, 2**14])
def test_effects_and_correlations_equal_a_plain_twin(trial, max_tokens, monkeypatch):
    monkeypatch.setattr(faithfulness, "MAX_TOKENS_ACTING", max_tokens)
    found, agent = measured(trial), trial.agent
    for b in range(4):
        history = agent.history([b])
        with torch.no_grad(), capture(agent.model) as record:
            full = agent.model(*history.inputs)
        others = [[[i for i in range(11) if i != left_out]] for left_out in range(11)]
        logits = [agent.act(history.take(torch.tensor(kept))) for kept in others]
        effects = [kl_divergence(full, other).item() for other in logits]
        np.testing.assert_allclose(found["leave_one_out"]["kl"][b], effects, atol=1e-5)
        effects = [kl_divergence(full, other, trial.beta).item() for other in logits]
        reference = found["leave_one_out"]["kl_reference"][b]
        np.testing.assert_allclose(reference, effects, rtol=1e-3, atol=1e-4)
        flips = [x.argmax().item() != full.argmax().item() for x in logits]
        assert found["leave_one_out"]["flips"][b] == np.mean(flips)
        rows = np.array([layer.query_rows[0, :, :-1].double().numpy() for layer in record])
        for layer, heads in zip(found["layers"], rows, strict=True):
            own = [rank_correlation(row, effects) for row in (*heads, heads.mean(axis=0))]
            said = [*layer["heads_per_sample"][b], layer["head_average_per_sample"][b]]
            assert said == pytest.approx(own)
        for name, row in (("overall", rows.mean(axis=(0, 1))), ("recency", range(11))):
            assert found[f"{name}_per_sample"][b] == pytest.approx(rank_correlation(row, effects))
            assert found[name] == pytest.approx(np.mean(found[f"{name}_per_sample"]))


def test_only_the_layers_and_heads_asked_for(trial):
    whole, part = measured(trial), measured(trial, layers=[1], heads=[[1]])
    (layer,) = part["layers"]
    assert (layer["layer"], layer["head_numbers"]) == (1, [1])
    assert layer["heads"] == pytest.approx([whole["layers"][1]["heads"][1]])
    assert part["overall_per_sample"] == pytest.approx([x for (x,) in layer["heads_per_sample"]])
    assert "layer 1 head 1 ranks" in faithfulness_text(part)


def test_what_is_not_defined_is_null_and_left_out_of_means(trial):
    values = np.array([[0.5, np.nan, np.nan], [0.25, 0.2, np.nan]])
    assert mean_defined(values) == [0.375, 0.2, None]
    even = [np.ones_like(layer) for layer in trial.attention]
    same = SimpleNamespace(**vars(trial) | {"attention": even})
    found = json.loads(json.dumps(measured(same), allow_nan=False))
    assert found["layers"][1]["heads"] == [found["overall"], None] == [None, None]
    assert found["layers"][1]["head_average_per_sample"] == [None] * 4
    assert "Not defined" in faithfulness_text(found)


def test_the_console_names_the_head_that_ranks_best():
    layers = [
        {"layer": 0, "head_numbers": [0, 1], "head_average": None, "heads": [None, 0.1]},
        {"layer": 3, "head_numbers": [0, 2], "head_average": 0.3, "heads": [-0.2, 0.625]},
    ]
    guide = {"samples": [2, 5], "leave_one_out": {"kl": [[1.0] * 7] * 2}}
    text = faithfulness_text(guide | {"layers": layers, "overall": 0.25, "recency": 0.125})
    for words in (
        "layer 3 head 2 ranks transitions most like their measured effect: 0.62",
        "all layers and heads reaches 0.25",
        "the latest first, without a look at attention, 0.12",
        "each of 7 transitions alone causes, mean over 2 decisions",
        "3 0.30 0.62 (head 2) -0.20 (head 0)",
        "0 - 0.10 (head 1) 0.10 (head 1)",
    ):
        assert words in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100
