"""One pass that looks at attention: means over layers and heads, against a slow plain twin."""

import numpy as np
import torch
from agents import ModelAgent, mean_map
from conftest import random_window, sharp_model
from hypothesis import given, settings
from hypothesis import strategies as st

from config import ModelConfig
from historylens import agent as agents
from historylens.agent import LOOKS, look
from historylens.history import History

CONFIG = {"n_transit": 14, "tf_n_inner": 24, "grid_size": 5}
SHAPES = [(1, 1), (2, 2), (3, 1)]  # layers, heads
CONFIGS = [ModelConfig(tf_n_layer=x, tf_n_head=h, tf_n_embd=8 * h, **CONFIG) for x, h in SHAPES]
AGENTS = dict(zip(SHAPES, [ModelAgent(sharp_model(one)) for one in CONFIGS], strict=True))


def random_history(agent, n_samples, n):
    context, queries = random_window(agent.model.config, n_samples, n)
    return History(*context, queries[:, n])


@settings(max_examples=12)
@given(shape=st.sampled_from(list(AGENTS)), n=st.integers(1, 13), data=st.data())
def test_a_look_equals_the_attention_computed_token_by_token(shape, n, data):
    wanted = data.draw(st.sets(st.sampled_from(LOOKS)))
    history = random_history(AGENTS[shape], 2, n)
    looked = look(AGENTS[shape], history, [*wanted, "episodes"]).checked()
    assert {name for name in LOOKS if vars(looked)[name] is not None} == wanted
    for sample in range(2):
        attention = mean_map(AGENTS[shape].model, history, sample)  # (T, T), the query last
        expected = {
            "query_attention": attention[n, :n],
            "received": attention[:n, :n].sum(axis=0),
            "last_rows": attention[max(0, n - 8) : n, :n],
        }
        for name in wanted:
            value = vars(looked)[name][sample].numpy()
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=2e-6)


def test_a_look_in_parts_is_the_same(monkeypatch):
    history = random_history(AGENTS[2, 2], 5, 13)
    whole = look(AGENTS[2, 2], history, LOOKS)
    for n_weights in (1, 1000):
        monkeypatch.setattr(agents, "MAX_WEIGHTS", n_weights)
        parts = look(AGENTS[2, 2], history, LOOKS)
        for name in LOOKS:
            torch.testing.assert_close(vars(parts)[name], vars(whole)[name], rtol=0, atol=1e-6)
