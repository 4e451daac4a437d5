"""One pass that looks at attention: means over layers and heads, against a slow plain twin."""

import numpy as np
import pytest
import torch
from agents import ModelAgent, mean_map
from conftest import random_window, sharp_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ad.acting import fast_logits
from config import ModelConfig
from historylens import agent as agents
from historylens.agent import LOOKS, look
from historylens.history import History

CONFIG = {"n_transit": 14, "tf_n_inner": 24, "grid_size": 5}
MODELS = {
    (n_layers, n_heads): sharp_model(
        ModelConfig(tf_n_layer=n_layers, tf_n_head=n_heads, tf_n_embd=8 * n_heads, **CONFIG)
    )
    for n_layers, n_heads in [(1, 1), (2, 2), (3, 1)]
}
models = st.sampled_from(sorted(MODELS)).map(MODELS.get)


def random_history(model, n_samples, n, seed=0):
    context, queries = random_window(model.config, n_samples, n, seed)
    return History(*context, queries[:, n])


@settings(max_examples=12)
@given(model=models, n_samples=st.integers(1, 3), n=st.integers(0, 13), data=st.data())
def test_logits_are_those_of_the_models_own_forward_at_any_positions(model, n_samples, n, data):
    history = random_history(model, n_samples, n)
    rows = st.permutations(range(14)).map(lambda order: sorted(order[: n + 1]))
    drawn = torch.tensor([data.draw(rows) for _ in range(n_samples)])
    for positions in (None, drawn):
        with torch.inference_mode():
            expected = model(*history.inputs, positions)
        torch.testing.assert_close(
            fast_logits(model, history, positions), expected, rtol=1e-5, atol=1e-5
        )


@settings(max_examples=12)
@given(model=models, n_samples=st.integers(1, 2), n=st.integers(1, 13), data=st.data())
def test_a_look_equals_the_attention_computed_token_by_token(model, n_samples, n, data):
    wanted = data.draw(st.sets(st.sampled_from(LOOKS)))
    history = random_history(model, n_samples, n)
    looked = look(ModelAgent(model), history, [*wanted, "episodes"])
    assert {name for name in LOOKS if vars(looked)[name] is not None} == wanted
    for sample in range(n_samples):
        attention = mean_map(model, history, sample)  # (T, T), the query last
        expected = {
            "query_attention": attention[n, :n],
            "received": attention[:n, :n].sum(axis=0),
            "last_rows": attention[max(0, n - 8) : n, :n],
        }
        for name in wanted:
            value = vars(looked)[name][sample].numpy()
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("n_weights", [1, 1000])
def test_a_look_in_parts_is_the_same(monkeypatch, n_weights):
    agent = ModelAgent(MODELS[2, 2])
    history = random_history(agent.model, 5, 13)
    whole = look(agent, history, LOOKS)
    monkeypatch.setattr(agents, "MAX_WEIGHTS", n_weights)
    parts = look(agent, history, LOOKS)
    for name in LOOKS:
        torch.testing.assert_close(vars(parts)[name], vars(whole)[name], rtol=0, atol=1e-6)


def test_a_history_with_what_a_look_gives_is_whole():
    agent = ModelAgent(MODELS[2, 2])
    looked = look(agent, random_history(agent.model, 2, 9), LOOKS).checked()
    assert looked.last_rows.shape == (2, 8, 9)
    assert (looked.query_attention.sum(dim=1) < 1).all()


def test_dropout_is_off_and_the_mode_is_left_alone():
    model = sharp_model(ModelConfig(**vars(MODELS[2, 2].config) | {"tf_dropout": 0.9}))
    history = random_history(model, 2, 6)
    calm = fast_logits(model, history)
    model.train()
    assert torch.equal(fast_logits(model, history), calm)
    assert all(part.training for part in model.modules())


def test_a_history_longer_than_the_positions_is_an_error(tiny_model):
    history = random_history(tiny_model, 1, 12)
    for run in (fast_logits, lambda model, h: look(ModelAgent(model), h, LOOKS)):
        with pytest.raises(ValueError, match=r"at most 11 context transitions.*got 12"):
            run(tiny_model, history)
