"""Models whose attention is planted by hand: the command recognises each pattern, and no other."""

import json

import numpy as np
import pytest
import torch
from conftest import write_checkpoint

import visualize_attention
from ad.checkpoints import HISTORIES_NAME
from ad.darkroom import split_goals
from ad.source import learning_histories
from config import EnvConfig, ModelConfig, SourceConfig
from historylens.insights.patterns import PATTERNS
from model import ADTransformer


def planted_model(weights: np.ndarray) -> ADTransformer:
    """A model whose tokens all attend to position j in proportion to `weights[j]`, `(T,)`.

    Tokens carry nothing but log(weights[j]) in their first dimension; the key of each head reads
    it and the query is a constant.
    """
    config = ModelConfig(n_transit=len(weights), tf_n_layer=1, tf_n_head=2, tf_n_embd=8)
    model = ADTransformer(config)
    attention, d_head = model.transformer_encoder.layers[0].self_attn, 4
    with torch.no_grad():
        for part in (model.embed_context, model.embed_query_state, attention):
            for parameter in part.parameters():
                parameter.zero_()
        model.pos_embedding.zero_()
        model.pos_embedding[0, :, 0] = torch.from_numpy(np.log(np.maximum(weights, 1e-12)))
        for head in (0, d_head):
            attention.in_proj_bias[head] = 1.0
            attention.in_proj_weight[8 + head, 0] = d_head**0.5
    return model


FEW = "--num-figures=1", "--num-effects=8"


def analysed(folder, model, histories, *more):
    """Run the command on a model; gives `metrics.json`."""
    checkpoint = write_checkpoint(folder / "run" / "ckpt-1.pt", model, horizon=20)
    histories.save(checkpoint.parent / HISTORIES_NAME)
    argv = ["--checkpoint", folder, "--out", folder / "figs", "--num-figures=0", *more]
    visualize_attention.main([*map(str, argv)])
    return json.loads((folder / "figs" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def histories():
    goals = split_goals(0)["test"]
    return learning_histories(goals, EnvConfig(), SourceConfig(n_source_steps=400), 0, n_streams=1)


@pytest.mark.parametrize(
    ("positions", "expected"),  # of 80 transitions and the query
    [
        (range(73, 80), {"recency"}),
        (range(81), {"uniform"}),
        ([40], {"focused", "sparse"}),
        ([20, 30, 40, 50, 59], {"sparse"}),
    ],
)
@pytest.mark.usefixtures("few_effects", "undrawn")
def test_what_is_planted_is_recognised_alone(positions, expected, histories, tmp_path, capsys):
    weights = np.isin(np.arange(81), positions) / len(positions)
    result = analysed(tmp_path, planted_model(weights), histories, *FEW)
    rows = result["drawn"]["layers"]["0"]["0"]["query_rows"]["mean"]
    np.testing.assert_allclose(rows, weights, atol=2e-5)
    assert {insight["pattern"] for insight in result["insights"]} == expected
    console = capsys.readouterr().out
    titles = {name: f"{pattern.title} detected!" for name, pattern in PATTERNS.items()}
    assert {name for name, title in titles.items() if title in console} == expected
