"""What a model does with its history is told from its actions, not from how sharp its policy is."""

import functools

import numpy as np
import pytest
import torch
from conftest import ad_agent, sharp_model
from hypothesis import given
from hypothesis import strategies as st
from test_effects import BAR, one_hot, reading
from test_effects import agent as agent_of
from test_planted import early_rewards, model_of_rewards
from torch import nn

from ad.agent import load_for_analysis
from config import ModelConfig, VisualizeConfig
from historylens.effects import measure_effects, moved_twins
from historylens.effects.measure import Trial, action_changes, enough, kl_divergence, sharpness
from model import ADTransformer

TEMPERATURES = (0.01, 100)
pytestmark = pytest.mark.usefixtures("few_effects")


def ignoring(history):
    return one_hot(history.query_states[:, 0])


def attending_to_rewards():
    """A transformer that reads them; the one decision of each of eight histories."""
    return ad_agent(model_of_rewards(), early_rewards(), [(i, 40, 1) for i in range(8)])


def shipped():
    """On the latest part of its context, which is enough to be told from its twins."""
    agent = load_for_analysis(VisualizeConfig(num_samples=6), torch.device("cpu"))
    agent.n_max = 40
    return agent


def untrained():
    """The shipped run's decisions, made by a model as PyTorch initialises it."""
    agent = shipped()
    torch.manual_seed(0)
    agent.model = ADTransformer(ModelConfig()).eval()
    for module in agent.model.modules():
        getattr(module, "reset_parameters", getattr(module, "_reset_parameters", int))()
    nn.init.normal_(agent.model.pos_embedding, std=0.02)
    return agent


def times(agent, factor):
    """The same agent at another temperature."""
    if hasattr(agent, "logits"):
        own = agent.logits
        agent.logits = lambda history: own(history) * factor
    else:
        with torch.no_grad():
            for parameter in agent.model.pred_action.parameters():
                parameter.mul_(factor)
    return agent


def found_of(agent):
    return measure_effects(agent, [0], [[0]], [], 10, 0, BAR)


def verdict(found):
    order = [line.split()[0] for line in found.text.splitlines()[2:9] if found.curves]
    marks = {n: [one.against_random for one in curve] for n, curve in found.curves.items()}
    column = {name: enough(curve) for name, curve in found.curves.items()}
    if found.ignores_history:
        return True, found.guide, found.heads, found.knockout, []
    heads, sets = found.heads["heads"], found.knockout["sets"]
    guide = [found.guide[q]["renumbered"]["readings"] for q in ("keep", "drop")]
    ranks = [x["overall"]["share"] for readings in guide for x in readings.values()]
    ranks += [one[kind]["changed"] for one in heads for kind in ("mean", "other-task")]
    said = [one["verdict"] for one in sets.values()], [one.get("role") for one in heads]
    return False, order, marks, column, said, ranks


MODELS = {  # name: (agent, whether it ignores its history, twins: of those with weights)
    "ignoring": (lambda: agent_of(logits=ignoring), True, 0),
    "reading": (lambda: agent_of(logits=reading), False, 0),
    "attending to rewards": (attending_to_rewards, False, 19),
    "shipped": (shipped, False, 19),
    "untrained": (untrained, True, 19),
}


@functools.cache
def found_at_its_own(name):
    return found_of(MODELS[name][0]())


@pytest.mark.parametrize("name", MODELS)
def test_verdict_order_marks_and_enough_are_the_same_at_every_temperature(name):
    make, ignores, n_twins = MODELS[name]
    *own, ranks = verdict(found_at_its_own(name))
    assert own[0] == ignores
    for factor in TEMPERATURES:
        found = found_of(times(make(), factor))
        *others, close = verdict(found)
        assert others == own, factor
        assert close == pytest.approx(ranks, abs=0.02)
        assert len(found.twins) == n_twins


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 99), st.floats(-4, 4))
def test_at_the_reference_temperature_the_mean_entropy_is_half_of_the_largest(n, size, seed, log10):
    logits = torch.randn(size, n, generator=torch.Generator().manual_seed(seed)).double()
    beta = sharpness(logits)
    p = torch.softmax(logits * beta, -1).numpy()
    assert -(p * np.log(p + 1e-300)).sum(-1).mean() == pytest.approx(np.log(n) / 2, rel=1e-6)
    assert sharpness(logits * 10**log10) == pytest.approx(beta / 10**log10, rel=1e-6)
    alike = torch.full((3, n), 7.0, dtype=torch.float64) + 1e-7 * torch.rand(3, n)
    assert sharpness(torch.cat([logits, alike])) == pytest.approx(beta)  # these have no say
    assert sharpness(alike) == 0


@given(st.integers(1, 5), st.integers(0, 99), st.sampled_from([0.0, 0.3, 2.0]))
def test_what_changes_of_actions_drawn_is_the_least_that_has_to(n, seed, beta):
    a, b = torch.randn(2, 4, n, generator=torch.Generator().manual_seed(seed)).double()
    p, q = ((x * beta).softmax(-1).numpy() for x in (a, b))
    overlap = np.minimum(p, q).sum(-1)
    np.testing.assert_allclose(action_changes(a, b, beta), 1 - overlap, atol=1e-12)
    plain = [(x * np.log(x / y)).sum() for x, y in zip(p, q, strict=True)]
    np.testing.assert_allclose(kl_divergence(a, b, beta), plain, atol=1e-12)


@torch.no_grad()
def test_twins_have_the_same_numbers_moved_and_weights_are_put_back(tiny_config, tiny_histories):
    def small():
        return ad_agent(sharp_model(tiny_config), tiny_histories, [(i, 20, 1) for i in range(3)])

    agent, sets = small(), []
    agent.model.embed_context.weight[0, 0] = -0.0  # other bits than 0
    trial, act = Trial(agent, 5, 0, BAR), agent.act

    def noted(history, positions=None):
        sets.append({n: t.clone() for n, t in agent.model.state_dict().items()})
        return act(history, positions)

    agent.act = noted
    assert len(moved_twins(trial, "other-task")) == 19
    first, *others = sets  # its own, and two passes of each twin
    for name, tensor in agent.model.state_dict().items():
        mine = first[name]
        assert torch.equal(tensor.view(torch.int32), mine.view(torch.int32))
        for one, same, two in zip(others[:-2:2], others[1::2], others[2::2], strict=False):
            assert torch.equal(one[name], same[name])
            assert torch.equal(one[name], two[name]) == (tensor.dim() < 2)
            assert torch.equal(one[name].flatten().sort()[0], mine.flatten().sort()[0])
    twice = [moved_twins(Trial(small(), 5, seed, BAR), "other-task") for seed in (0, 0, 1)]
    assert twice[0] == twice[1] != twice[2]


def test_weights_are_put_back_after_an_error_and_the_actions_alone_decide():
    agent = attending_to_rewards()
    own = {name: tensor.clone() for name, tensor in agent.model.state_dict().items()}
    act, state = agent.act, agent.model.state_dict()

    def failing(history, positions=None):
        if not all(torch.equal(state[name], own[name]) for name in own):
            raise RuntimeError("broken weights\nand more")
        return act(history, positions)

    agent.act = failing
    found = found_of(agent)
    assert all(torch.equal(state[name], own[name]) for name in own)
    assert (found.twins, found.ignores_history) == ([], False)
    assert found.not_run["twins"] == "broken weights"
    assert "model with its weights shuffled: could not be run, broken weights." in found.text


@pytest.mark.parametrize(("parameter", "reason"), [
    (torch.zeros(3), "it has no weight matrices"),
    (torch.eye(3), "act() is the same whatever its model's weights"),
    (torch.zeros(1).expand(10_000, 6_000), "it has too many weights (60,000,000)"),
])  # fmt: skip
@torch.no_grad()
def test_why_weights_cannot_be_shuffled_is_said(parameter, reason):
    agent = agent_of(logits=reading)
    agent.model.weight = nn.Parameter(parameter)
    trial = Trial(agent, 6, 0, BAR)
    assert moved_twins(trial, "other-task") == []
    assert trial.not_run["twins"] == reason


def test_the_console_says_what_the_verdict_rests_on():
    texts = {name: " ".join(found_at_its_own(name).text.split()) for name in MODELS}
    about = "Of actions drawn at a reference temperature another task's history changes"
    for words in (about, "in 19 models with these weights shuffled", "untrained ones move as much"):
        assert words not in texts["shipped"]
        assert words in texts["untrained"]
    assert "For comparison: no history at all" in texts["shipped"]
    assert f"{about} 0%: 5% count as nothing, 30% without history." in texts["ignoring"]
