import numpy as np
import pytest
import torch
from conftest import random_window, sharp_model
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_model import encoder_layer

from acting import views
from acting.views import LOOKS, look, view
from compression import History
from config import ModelConfig, UserError
from model import ADTransformer

MODELS = {
    (n_layers, n_heads): sharp_model(
        ModelConfig(
            n_transit=14,
            tf_n_layer=n_layers,
            tf_n_head=n_heads,
            tf_n_embd=8 * n_heads,
            tf_n_inner=24,
            grid_size=5,
        )
    )
    for n_layers, n_heads in [(1, 1), (2, 2), (3, 1)]
}
models = st.sampled_from(sorted(MODELS)).map(MODELS.get)


def random_history(model, n_samples, n, seed=0) -> History:
    context, queries = random_window(model.config, n_samples, n, seed)
    return History(*context, queries[:, n])


def plain_maps(model, history, sample):
    """Attention `(T, T)` of one sample, mean over layers and heads, token by token in float64."""
    tensors = {name: t.detach().double().numpy() for name, t in model.state_dict().items()}
    with torch.no_grad():
        x = model.embed(*history.inputs)[sample].double().numpy()
    maps = []
    for number in range(model.config.tf_n_layer):
        x, weights = encoder_layer(tensors, number, x, model.config.tf_n_head)
        maps.append(weights.mean(axis=0))
    return np.mean(maps, axis=0)


@settings(max_examples=12)
@given(model=models, n_samples=st.integers(1, 3), n=st.integers(0, 13), seed=st.integers(0, 9))
def test_logits_are_those_of_the_models_own_forward(model, n_samples, n, seed):
    history = random_history(model, n_samples, n, seed)
    with torch.inference_mode():
        expected = model(*history.inputs)
    torch.testing.assert_close(view(model).logits(history), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=12)
@given(model=models, data=st.data(), n=st.integers(0, 13))
def test_logits_at_positions_are_those_of_the_models_own_forward(model, data, n):
    history = random_history(model, 2, n)
    rows = st.permutations(range(14)).map(lambda order: sorted(order[: n + 1]))
    positions = torch.tensor([data.draw(rows), data.draw(rows)])
    with torch.inference_mode():
        expected = model(*history.inputs, positions)
    found = view(model, "original").logits(history, positions)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=12)
@given(model=models, n_samples=st.integers(1, 2), n=st.integers(0, 13), data=st.data())
def test_a_look_equals_the_attention_computed_token_by_token(model, n_samples, n, data):
    wanted = data.draw(st.sets(st.sampled_from(LOOKS)))
    history = random_history(model, n_samples, n)
    found = look(model, history, wanted)
    assert set(found) == wanted
    for sample in range(n_samples):
        maps = plain_maps(model, history, sample)  # (T, T), the query last
        expected = {
            "query_attention": maps[n, :n],
            "received": maps[:n, :n].sum(axis=0),
            "last_rows": maps[max(0, n - 8) : n, :n],
        }
        for name, value in found.items():
            np.testing.assert_allclose(value[sample].numpy(), expected[name], rtol=0, atol=2e-6)


def test_blocks_of_rows_change_nothing(monkeypatch):
    model = MODELS[2, 2]
    history = random_history(model, 2, 13)
    whole = look(model, history, ["received"])["received"]
    for n_scores in (1, 150, 300):
        monkeypatch.setattr(views, "MAX_SCORES", n_scores)
        blocks = look(model, history, ["received"])["received"]
        torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-6)


def test_a_history_takes_what_a_look_gives():
    history = random_history(MODELS[2, 2], 2, 9)
    parts = dict(zip(("states", "actions", "rewards", "next_states"), history.inputs, strict=False))
    seen = History(**parts, **look(MODELS[2, 2], history, LOOKS))
    assert seen.last_rows.shape == (2, 8, 9)
    assert (seen.query_attention.sum(dim=1) < 1).all()


def test_dropout_is_off_and_the_mode_is_left_alone():
    config = ModelConfig(**vars(MODELS[2, 2].config) | {"tf_dropout": 0.9})
    model = sharp_model(config)
    history = random_history(model, 2, 6)
    calm = view(model).logits(history), look(model, history, LOOKS)
    model.train()
    assert torch.equal(view(model).logits(history), calm[0])
    noisy = look(model, history, LOOKS)
    assert all(torch.equal(noisy[name], calm[1][name]) for name in LOOKS)
    assert all(part.training for part in model.modules())


def test_a_history_longer_than_the_positions_is_an_error(tiny_config):
    model = ADTransformer(tiny_config)
    history = random_history(model, 1, 12)
    for run in (view(model).logits, lambda h: look(model, h, LOOKS)):
        with pytest.raises(ValueError, match=r"at most 11 context transitions.*got 12"):
            run(history)


def test_unknown_positions_are_an_error(tiny_model):
    with pytest.raises(UserError, match=r"'reindexed', 'original'.*got 'old'"):
        view(tiny_model, "old")


def test_a_view_knows_how_much_fits(tiny_model):
    assert view(tiny_model).n_max == 11
