"""Models whose attention is planted by hand: the command recognises each pattern, and no other."""

import json

import numpy as np
import pytest
import torch

import visualize_attention
from ad.checkpoints import HISTORIES_NAME, save_checkpoint
from ad.darkroom import split_goals
from ad.source import learning_histories
from config import EnvConfig, ModelConfig, SourceConfig
from historylens.common.settings import to_dict
from model import ADTransformer

N_TRANSIT = 81  # 80 transitions and the query


def planted_model(weights: np.ndarray) -> ADTransformer:
    """A model whose tokens all attend to position j in proportion to `weights[j]`, `(T,)`.

    Tokens carry nothing but log(weights[j]) in their first dimension; the key of each head reads
    it and the query is a constant.
    """
    config = ModelConfig(n_transit=len(weights), tf_n_layer=1, tf_n_head=2, tf_n_embd=8)
    model = ADTransformer(config)
    with torch.no_grad():
        for parameter in (*model.embed_context.parameters(), model.embed_query_state.weight):
            parameter.zero_()
        model.pos_embedding.zero_()
        model.pos_embedding[0, :, 0] = torch.from_numpy(np.log(np.maximum(weights, 1e-12)))
        attention = model.transformer_encoder.layers[0].self_attn
        attention.in_proj_weight.zero_()
        attention.in_proj_bias.zero_()
        d_head = 4
        for head in range(2):
            attention.in_proj_bias[head * d_head] = 1.0
            attention.in_proj_weight[8 + head * d_head, 0] = d_head**0.5
    return model


def on_positions(positions: range | list[int]) -> np.ndarray:
    weights = np.zeros(N_TRANSIT)
    weights[list(positions)] = 1 / len(positions)
    return weights


CASES = {
    "recency: the latest seven": (on_positions(range(73, 80)), {"recency"}),
    "uniform": (np.full(N_TRANSIT, 1 / N_TRANSIT), {"uniform"}),
    "one position": (on_positions([40]), {"focused", "sparse"}),
    "five positions": (on_positions([20, 30, 40, 50, 59]), {"sparse"}),
}


@pytest.fixture(scope="module")
def histories():
    goals = split_goals(0)["test"]
    return learning_histories(goals, EnvConfig(), SourceConfig(n_source_steps=400), 0, n_streams=1)


@pytest.mark.parametrize("case", CASES)
def test_the_planted_pattern_is_recognised_and_no_other(case, histories, tmp_path, capsys):
    weights, expected = CASES[case]
    model = planted_model(weights)
    content = {
        "step": 1,
        "config": to_dict(EnvConfig(), model.config),
        "model": model.state_dict(),
        "goals": {},
    }
    save_checkpoint(tmp_path / "run" / "ckpt-1.pt", content)
    histories.save(tmp_path / "run" / HISTORIES_NAME)
    out = tmp_path / "figs"
    arguments = ["--checkpoint", str(tmp_path), "--out", str(out), "--num-figures", "1"]
    visualize_attention.main(arguments)

    result = json.loads((out / "metrics.json").read_text())
    rows = result["drawn"]["layers"]["0"]["0"]["query_rows"]["mean"]
    np.testing.assert_allclose(rows, weights, atol=2e-5)
    assert {insight["pattern"] for insight in result["insights"]} == expected
    console = capsys.readouterr().out
    titles = {
        "recency": "Strong recency bias detected!",
        "uniform": "Uniform attention detected!",
        "focused": "Focused attention detected!",
        "sparse": "Sparse attention detected!",
    }
    assert {name for name, title in titles.items() if title in console} == expected
