"""A model planted by hand looks at rewarded transitions alone: insights and effects say so.

What it does is known: it takes the action of the rewarded transitions, whichever are left, and
action 0 where none is. Rewards lie early, so that recency loses them.
"""

import json

import numpy as np
import pytest
import torch
from conftest import without_drawing, write_checkpoint

import visualize_attention
from ad.checkpoints import HISTORIES_NAME
from config import ModelConfig
from dataset import Histories
from historylens.effects.guide import guide_text
from historylens.effects.measure import budgets
from model import ADTransformer


def analysed(folder, model):
    checkpoint = write_checkpoint(folder / "run" / "ckpt-1.pt", model, horizon=20)
    early_rewards().save(checkpoint.parent / HISTORIES_NAME)
    argv = ["--checkpoint", folder, "--out", folder / "figs", "--num-figures=0"]
    visualize_attention.main([*map(str, argv)])
    return json.loads((folder / "figs" / "metrics.json").read_text())


N, REWARDED = 40, (3, 4, 5, 8, 11)
GOALS = ((0, 1), (2, 2), (4, 3), (1, 4))  # goal g is reached by action g + 1


def model_of_rewards() -> ADTransformer:
    """One layer, one head: attention falls on rewarded tokens, and brings their actions along."""
    config = ModelConfig(n_transit=N + 1, tf_n_layer=1, tf_n_head=1, tf_n_embd=8, grid_size=5)
    model = ADTransformer(config).eval()
    layer, width = model.transformer_encoder.layers[0], config.tf_n_embd
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (layer.norm1, layer.norm2):
            norm.weight.fill_(1)
        model.embed_query_state.weight[:, 6] = 1  # not all numbers of the query are the same
        model.embed_context.weight[0, 2 + config.num_actions] = 1  # token[0]: the reward
        for action in range(config.num_actions):
            model.embed_context.weight[1 + action, 2 + action] = 1  # token[1 + a]: action a
        attention = layer.self_attn
        attention.in_proj_bias[0] = 1  # every query asks for token[0]
        attention.in_proj_weight[width, 0] = 40 * width**0.5
        for i in range(1, 1 + config.num_actions):
            attention.in_proj_weight[2 * width + i, i] = 1  # values: the actions
            attention.out_proj.weight[i, i] = 1
            model.pred_action.weight[i - 1, i] = 8
    return model


def early_rewards() -> Histories:
    """Two histories a goal, one decision long: action 0 but at the steps `REWARDED`."""
    goals = np.repeat(GOALS, 2, axis=0)
    shape = (len(goals), N + 1)
    states = np.random.default_rng(0).integers(5, size=(*shape, 2)).astype(np.int8)
    actions, rewards = np.zeros(shape, np.int8), np.zeros(shape, np.int8)
    rewards[:, REWARDED] = 1
    actions[:, REWARDED] = 1 + np.arange(len(goals))[:, None] // 2
    return Histories(states, actions, rewards, states, goals, horizon=N + 1)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        without_drawing(patch)
        return analysed(tmp_path_factory.mktemp("planted"), model_of_rewards())


def test_keeping_rewards_loses_nothing_and_recency_loses_all(planted):
    assert len(planted["effects"]["twins"]) == 19  # it moves more than each of them
    strategies = planted["effects"]["strategies"]
    found = ("top-k", "norm", "contribution", "head-0-0")
    assert [strategies[name]["enough"] for name in (*found, "rewarded-recent")] == [1, 1, 1, 1, 2]
    sizes = {name: one["sizes"] for name, one in strategies.items()}
    for size in sum(map(sizes.get, found), sizes["rewarded-recent"][1:]):  # 1: the latest alone
        assert size["flips"] == 0
        assert size["kl_mean"] < 1e-4
    reaches = N - max(REWARDED)
    assert budgets(N)[-2] < reaches
    for size in sizes["recent"]:
        assert size["flips"] == (1 if size["n_keep"] < reaches else 0)
        assert size["kl_mean"] > 1 or size["flips"] == 0
    worst = [*sizes["least-attended"], planted["effects"]["controls"]["empty"]]
    assert all(size["flips"] == 1 for size in worst)


def test_random_drops_lose_as_often_as_they_miss_every_reward(planted):
    for size in planted["effects"]["strategies"]["random"]["sizes"]:
        kept = size["n_keep"]
        missed = np.prod([(N - kept - i) / (N - i) for i in range(len(REWARDED))])
        assert size["flips"] == pytest.approx(missed, abs=0.12)


def test_attention_leads_all_the_way_and_recency_nowhere(planted):
    guide = planted["effects"]["guide"]
    for question, low, high in (("keep", -1, -0.3), ("drop", 0, 0)):  # random ones hold some
        for place in ("renumbered", "in place"):
            readings = guide[question][place]["readings"]
            share = {name: x["overall"]["share"] for name, x in readings.items()}
            assert low <= share.pop("recency") <= high
            assert [*share.values()] == pytest.approx([1] * len(share), abs=1e-3)
    said = " ".join(guide_text(guide).split())
    assert "Keeping the most attended transitions goes 100% of the way from random ones" in said
    assert planted["effects"]["heads"]["heads"][0]["role"]["name"] == "rewarded"
    hidden = planted["effects"]["knockout"]["sets"]["rewarded"]
    assert (hidden["query"]["flips"], hidden["verdict"]) == (1, "read by the query itself")
    (effect,) = (one["effect"] for one in planted["insights"] if one["pattern"] == "sparse")
    assert effect.startswith("Keeping the 5 most attended of 40 transitions changes the most")
    assert "Better than each of 20 random draws." in effect


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("ignores", [True, False])
def test_a_model_that_ignores_its_history_or_was_not_trained_is_told_so(tmp_path, ignores, capsys):
    if ignores:
        model = model_of_rewards()
        model.pred_action.weight.data.zero_()
        model.pred_action.bias.data[2] = 1
    else:
        torch.manual_seed(0)
        model = ADTransformer(ModelConfig(n_transit=N + 1, tf_n_layer=2, grid_size=5)).eval()
    found = analysed(tmp_path, model)
    assert found["effects"]["ignores_history"] is True
    assert found["effects"]["strategies"] == {}
    assert {found["effects"][name] for name in ("guide", "heads", "knockout")} == {None}
    why = "another task's history moves the model no more than an untrained one"
    why = "the model ignores its history" if ignores else why
    assert all(why in one["effect"] for one in found["insights"])
    console = " ".join(capsys.readouterr().out.split())
    assert f"No compression can be judged: over 8 decisions {why}" in console
    for name in ("deletion_curves", "head_effects"):
        assert not (tmp_path / "figs" / f"{name}.png").exists()
