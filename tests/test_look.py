"""One pass that looks at attention: means over layers and heads, against a slow plain twin."""

import numpy as np
import pytest
import torch
from agents import ModelAgent, Recorder
from conftest import random_window, sharp_model
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_model import encoder_layer
from wired import BROUGHT, OWN, REWARDED, Layer, WiredAgent, latest, rewarded

from config import ModelConfig
from historylens import agent as agents
from historylens.agent import Unreadable, look
from historylens.common.errors import UserError
from historylens.history import LOOKS, History

CONFIG = {"n_transit": 14, "tf_n_inner": 24, "grid_size": 5}
SHAPES = [(1, 1), (2, 2), (3, 1)]  # layers, heads
CONFIGS = [ModelConfig(tf_n_layer=x, tf_n_head=h, tf_n_embd=8 * h, **CONFIG) for x, h in SHAPES]
AGENTS = dict(zip(SHAPES, [ModelAgent(sharp_model(one)) for one in CONFIGS], strict=True))


def random_history(n_samples, n):
    context, queries = random_window(CONFIGS[0], n_samples, n)
    return History(*context, queries[:, n])


def plain_look(model, history, sample):
    """What a look gives of one sample, token by token in float64, by the name of the field."""
    tensors = {name: t.double().numpy() for name, t in model.state_dict().items()}
    x = model.embed(*history.inputs)[sample].detach().double().numpy()
    n, n_heads, width = history.n, model.config.tf_n_head, x.shape[1]
    maps, norms, along = [], [], []
    for number in range(model.config.tf_n_layer):
        own = f"transformer_encoder.layers.{number}.self_attn"
        w, b = tensors[f"{own}.in_proj_weight"], tensors[f"{own}.in_proj_bias"]
        out = tensors[f"{own}.out_proj.weight"]
        values = x @ w[2 * width :].T + b[2 * width :]
        x, weights = encoder_layer(tensors, number, x, n_heads)
        shares = weights[:, n].repeat(width // n_heads, axis=0).T  # (T, D)
        added = [out @ read for read in shares * values]  # to the query, for each token
        whole, lengths = sum(added), [np.sqrt(v @ v) for v in added]
        norms.append([length / sum(lengths) for length in lengths[:n]])
        along.append([v @ whole / (whole @ whole) for v in added[:n]])
        maps.append(weights)
    mean = np.mean(maps, axis=(0, 1))  # (T, T), the query last
    return {
        "query_attention": mean[n, :n],
        "head_attention": np.stack(maps)[:, :, n, :n],
        "norm": np.mean(norms, axis=0),
        "contribution": np.mean(along, axis=0),
        "received": mean[:n, :n].sum(axis=0),
        "last_rows": mean[max(0, n - 8) : n, :n],
    }


@settings(max_examples=12)
@given(shape=st.sampled_from(list(AGENTS)), n=st.integers(1, 13), data=st.data())
def test_a_look_equals_the_attention_computed_token_by_token(shape, n, data):
    wanted = data.draw(st.sets(st.sampled_from(LOOKS)))
    history = random_history(2, n)
    looked = look(AGENTS[shape], history, [*wanted, "episodes"]).checked()
    assert {name for name in LOOKS if vars(looked)[name] is not None} == wanted
    for sample in range(2):
        expected = plain_look(AGENTS[shape].model, history, sample)
        for name in wanted:
            value = vars(looked)[name][sample].numpy()
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=2e-6)


def test_a_look_is_one_pass_and_a_second_only_for_whole_maps_beside_heads():
    agent = ModelAgent(sharp_model(CONFIGS[1]))
    history, n_passes = random_history(2, 9), []
    agent.model.register_forward_hook(lambda *_: n_passes.append(1))
    whole, heads = {"received", "last_rows"}, {"norm", "contribution"}
    for wanted in ([*LOOKS[:4]], ["query_attention", "norm"], [*whole], ["norm"], [*LOOKS]):
        look(agent, history, wanted)
        assert len(n_passes) == 1 + bool({*wanted} & whole and {*wanted} & heads), wanted
        n_passes.clear()


def test_a_look_in_parts_is_the_same(monkeypatch):
    history = random_history(5, 13)
    whole = look(AGENTS[2, 2], history, LOOKS)
    for n_weights in (1, 1000):
        monkeypatch.setattr(agents, "MAX_WEIGHTS", n_weights)
        parts = look(AGENTS[2, 2], history, LOOKS)
        for name in LOOKS:
            torch.testing.assert_close(vars(parts)[name], vars(whole)[name], rtol=0, atol=1e-6)


def test_layers_of_fewer_heads_have_no_attention_in_the_others():
    agent = WiredAgent(Layer((latest, OWN, BROUGHT)), Layer(*[(rewarded, OWN, BROUGHT)] * 2))
    shown = look(agent, agent.history([0, 1]), ["head_attention"]).head_attention
    assert shown.shape == (2, 2, 2, 20)
    assert shown[:, 0, 1].isnan().all()
    torch.testing.assert_close(shown[:, 1, 0, list(REWARDED)], torch.full((2, 3), 1 / 3))


def test_a_model_that_does_not_show_a_field_says_what_was_expected():
    agent, history = Recorder(), random_history(2, 4)
    for name in ("norm", "contribution"):
        with pytest.raises(Unreadable, match=r"tiny: expected heads side by side .* none$") as e:
            look(agent, history, ["query_attention", name])
        assert isinstance(e.value, UserError)
    assert look(agent, history, ["head_attention"]).head_attention.shape == (2, 1, 1, 4)
    assert look(agent, history, ["episodes"]) is history
