"""A model of the user's through an adapter: what is read, how it acts, and what does not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import CPU, agent_of, home, written  # noqa: F401
from conftest import refused

from historylens.adapter.agent import load, load_acting
from historylens.agent import look
from historylens.capture import capture
from historylens.common.errors import UserError
from visualize_attention import main

AS_INDICES = [("[..., 0]", "[..., 0].long()"), ("query_states[:, 0]", "query_states[:, 0].long()")]


def with_layers(chosen):
    return "def load()", f"def layers(model):\n    return {chosen}\n\n\ndef load()"


def with_samples(gives):
    """Samples that go through a statement, one by one: `one` with number `i`."""
    each = f"def samples(*args):\n    for i, one in enumerate(drawn(*args)):\n        {gives}"
    return "def act(", f"drawn = samples\n\n\n{each}\n\n\ndef act("


def with_n_max(value):  # known once the third sample is drawn
    return with_samples(f"yield one if i < 2 else globals().update(N_MAX={value!r}) or one")


def with_fields(fields):
    return with_samples(f"yield Decision(**vars(one) | dict({fields}))")


def test_what_is_loaded_is_said_in_words():
    agent = agent_of(("in range(n):", "in range(3):"), name="explicit_softmax")
    assert agent.facts == {
        "Adapter": "mine.py",
        "Model": "Model: 2 layers x 2 heads, 10,084 parameters",
        "Context length": "8 to 24 transitions, 25 tokens at most; a transition is one token; "
        "token 0 decides; metrics are of whole transitions",
        "Device": "cpu",
        "Samples": "3 decisions of the adapter, which has no more of the 4 asked for; each counts "
        "as a task of its own",
    }
    told = agent_of(with_fields("task=i"), name="explicit_softmax").facts["Samples"]
    assert told == "4 decisions of the adapter"
    three = "91 tokens at most; a transition is state, action, reward; token 90 decides; "
    assert three in agent_of().facts["Context length"]
    assert agent.title == "Model of mine.py"
    assert [*agent.decisions[0].labels] == ["number"]
    assert agent.meta == {"n_heads": [2, 2], "model": "Model", "rewarded_above": 0}


def test_without_tokens_a_transition_is_one_and_with_them_each_sample_may_have_its_map():
    agent = agent_of(name="rotary_sdpa")
    assert all(one.is_plain for one in agent.tokens(agent.history([0, 1])))
    assert agent.n_tokens == 51
    a_list = [("return Tokens.of(", "return [Tokens.of("), ('rd"))', 'rd"))] * history.size')]
    agent = agent_of(*a_list)
    assert [len(one) for one in agent.tokens(agent.history([0, 1]))] == [91, 91]


@pytest.mark.parametrize("chosen", ["[model.blocks[1]]", "['blocks.1.attention']", "'*.1.*'"])
def test_layers_chooses_the_modules_to_look_into(chosen):
    agent = agent_of(with_layers(chosen))
    assert (agent.layers, agent.n_heads) == (("blocks.1.attention",), (4,))
    assert not agent.sees_all  # all that mixes tokens


def test_a_softmax_of_its_own_shape_is_named_in_the_adapter():
    one_head = [
        (".unflatten(-1, (N_HEADS, -1)).transpose(1, 2)", ""),
        ("[:, None, None]", "[:, None]"),
        ("(weights @ v).transpose(1, 2).flatten(2)", "weights @ v"),  # weights (B, T, T)
    ]
    named = ("def load(", "CAPTURE = {'softmax': '*.softmax', 'heads': 1}\n\n\ndef load(")
    assert agent_of(*one_head, named, name="explicit_softmax").n_heads == (1, 1)
    with pytest.raises(UserError, match=r"mine\.py: act\(\) cannot be looked into.*CAPTURE ="):
        agent_of(*one_head, name="explicit_softmax")


def test_next_states_episodes_and_titles_have_defaults():
    agent = agent_of(with_fields("next_states=None, episodes=None, title=''"))
    history = agent.history([0])
    states = torch.cat([history.states[:, 1:], history.query_states[:, None]], dim=1)
    assert torch.equal(history.next_states, states)
    assert not history.episodes.any()
    assert [one.title for one in agent.decisions[:2]] == ["sample 0", "sample 1"]


def test_states_are_of_one_type_in_every_batch():
    agent = agent_of(with_fields("states=one.states if i % 2 else one.states / 2"), *AS_INDICES)
    for history in map(agent.history, ([0], [1], [0, 1])):
        assert history.states.dtype == history.query_states.dtype == torch.float32


WRITING = """
def scribbled(history):
    for name in ("states", "actions", "rewards", "query_states"):
        getattr(history, name).zero_()

def act(model, history, read=act):
    logits = read(model, history)
    scribbled(history)
    return logits

def tokens(history, of=tokens):
    scribbled(history)
    return of(history)
"""


def test_what_an_adapter_writes_into_a_history_stays_with_it():
    agent = agent_of(WRITING)
    history = agent.history([0, 1])
    before = history.copied()
    agent.act(history)
    agent.tokens(history)
    assert history.states.any()
    for name in ("states", "actions", "rewards", "query_states"):
        assert torch.equal(getattr(history, name), getattr(before, name)), name


def test_a_lack_of_memory_passes_so_that_the_batch_can_be_halved():
    too_much = "torch.empty(2**60) if history.size == 4 else model(states, history.a"
    agent = agent_of(("model(states, history.a", too_much))
    assert agent.act(agent.history([0, 1]).latest(0)).shape == (2, 2)
    with pytest.raises(RuntimeError, match="memory"):
        agent.act(agent.history([0, 1, 2, 0]))


def test_a_look_gives_the_attention_among_transitions():
    agent = agent_of()
    history = agent.history([0, 1, 2])
    found = look(agent, history, ["query_attention", "received", "last_rows"])
    with torch.inference_mode(), capture(agent.model, maps=range(3)) as record:
        agent.act(history)
    whole = sum(layer.maps.nan_to_num().mean(1) for layer in record) / 2  # (3, 91, 91)
    blocks = whole[:, :90, :90].reshape(3, 30, 3, 30, 3).sum(4).mean(2)
    query = whole[:, 90, :90].reshape(3, 30, 3).sum(2)
    torch.testing.assert_close(found.received, blocks.sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.last_rows, blocks[:, -8:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.query_attention, query, rtol=1e-5, atol=1e-6)


def rooms_of(*changes):
    pytest.importorskip("gymnasium")
    agent = load_acting(written(*changes), 0, CPU)
    return agent.environment.make(np.array([0, 1]), [0, 1])


def test_each_room_of_an_environment_has_its_goal():
    rooms = rooms_of()
    rooms.reset()
    rewards = [rooms.step(np.array([0, 1]))[1].tolist() for _ in range(4)]
    assert rewards == [[0, 0]] * 3 + [[1, 1]]


def test_states_of_an_environment_are_of_the_type_of_samples():
    floats = ("spaces.Discrete(LENGTH)", "spaces.Box(0, LENGTH, (1,))")
    assert rooms_of(floats, ("return self.cell,", "return [self.cell],")).reset().dtype == np.int64
    halves = rooms_of(with_fields("states=one.states / 2"), *AS_INDICES)
    assert (halves.reset().dtype, halves.reset().tolist()) == (np.float32, [[4], [4]])


def test_a_model_in_its_environments_knows_what_its_results_depend_on():
    pytest.importorskip("gymnasium")
    first = load_acting(written(), 0, CPU)
    second = load_acting(written(("torch.randn(3", "torch.rand(3")), 0, CPU)
    assert first.environment.goals == ("left end", "right end")
    assert (first.environment.horizon, first.n_max) == (10, 30)
    assert first.identity.keys() == {"adapter", "weights"}
    assert first.identity["weights"] != second.identity["weights"]
    assert load("mine.py", 4, 0, CPU).identity == second.identity
    beside = Path("corridor.py")  # imported as an environment is made
    beside.write_text(beside.read_text() + "# changed\n")
    changed = load_acting("mine.py", 0, CPU).identity
    assert changed["adapter"] != second.identity["adapter"]
    assert changed["weights"] == second.identity["weights"]


NO_ROOMS = [  # what is changed in the adapter, and what is said
    ("def make_env(", "def make(", r"no make_env\(\): to play takes an environment"),
    ("GOALS = (", "NAMES = GOALS = lambda: (", "GOALS: expected a list of names"),
    ("def make_env(", "HORIZON = None\ndef make_env(", "HORIZON: expected a whole number"),
    ("for goal in goals])", "for goal in goals * 2])", r"1 environments, got 2"),
    ("return SyncVectorEnv", "return 3, SyncVectorEnv", "VectorEnv, got a tuple of 2"),
    ("super().reset(", "1 / 0 or super().reset(", r"reset\(\) of make_env.*Zero.*or\.py:24"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "words"), NO_ROOMS)
def test_an_environment_that_does_not_fit_is_one_line(old, new, words):
    with pytest.raises(UserError, match=words):
        rooms_of((old, new)).reset()


WRONG = [  # what is changed in the adapter, and what is said
    ("def act(", "def act((", r"importing it raised SyntaxError.*mine\.py:\d+"),
    ("import torch\n", "import torchy\n", r"No module.*pip install torchy"),
    ("import torch\n", "import torch.nowhere\n",
     r"torch \d\S+ is there, but this version of it has no torch\.nowhere(?!.*pip install)"),
    ("import torch\n", "import csv.a\n", r"csv is there, but this version of it has no csv\.a"),
    ("def load()", "def loader()", r"no load\(\).*def load\(\) -> nn.Module"),
    ("def act(", "def action(", r"no act\(\).*it defines load\(\), samples\(\)"),
    ("def act(", "act = 3\ndef a(", r"act: expected a function act\(model, history\).*got a int"),
    ("return Model()", "Model()", r"load\(\): expected a torch.nn.Module, got nothing"),
    ("samples(n: int, seed: int)", "samples(n)", r"samples\(\) raised TypeError.*2 were given"),
    ("in range(n):", "in range(0):", r"up to 3 decisions, got none"),
    (*with_samples("return one"), r"samples\(\): expected a list.* got a Decision"),
    (*with_samples("yield {}"), r"samples\(\)\[0\]: expected a Decision, got a dict"),
    (*with_samples("yield one if i else Decision([[0, 0]], [0], [0], [0, 0])"),
     r"samples\(\): expected states of one size, got sizes \[1, 2\]"),
    (*with_n_max(29), r"\[0\]: expected at most N_MAX = 29.* got 30"),
    (*with_n_max("30"), r"N_MAX: .*got '30'"),
    (*with_fields("rewards=[]"), r"samples\(\)\[0\]\.rewards.*got \(0,\)"),
    (*with_fields("actions=one.actions[1:]"), r"0\]\.actions: expected .*\(30,\), got \(29,\)"),
    (*with_fields("actions=one.actions / 2"), r"actions: expected whole numbers, got float32"),
    (*with_fields("query_state=[1, 2]"), r"query_state: expected 1 .*\(2,\)"),
    (*with_fields("episodes=-one.episodes"), r"episodes: expected numbers that never fall"),
    (*with_fields("states=None"), r"states: expected an array, got nothing"),
    (*with_fields("states=one.states[1:]"), r"states: expected shape \(30,\) or \(30, S\), as rew"),
    (*with_fields("next_states=3"), r"next_states: expected the shape of states"),
    ("self.norms[0](x)", "self.norms[0](x[..., 1:])", r"act\(\) raised .*\(mine\.py:32\)"),
    ('"reward"))', '"reward")[:2])', r"tokens\(\): expected a map of the 91 .*got one of 61 tok"),
    ("Tokens.of(history.n", "Tokens.of(history.n - 1", r"tokens\(\): expected a map of 30 trans"),
    ("return Tokens.of(",
     "return Tokens([0, 0, *np.arange(history.n).repeat(3)[:-1]], 'x')\n    Tokens.of(",
     r"tokens\(\) has token 47 of transition 15, whose action changes token 46 instead"),
    ("return Tokens.of(", "Tokens.of(", r"tokens\(\): expected a Tokens.*got nothing"),
    ("def tokens(", "def token_map(", r"no tokens\(\), so: .*91 tokens.*one of 31"),
    ("def load()", "CAPTURE = {'mask': 1}\ndef load()", r"CAPTURE: expected a dict with softmax"),
    (*with_layers("None"), r"layers\(\): expected a list of modules or their names, got nothing"),
    (*with_layers("[nn.Linear(1, 1)]"), r"layers\(\): expected modules of the model"),
    (*with_layers("[[1]]"), r"layers\(\): expected modules of the model"),
    (*with_layers("['enc']"), r"layers=\['enc'\]"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "words"), WRONG)
def test_a_mistake_is_one_line_with_its_place(old, new, words):
    with pytest.raises(UserError, match=rf"\Amine\.py: (?=.*{words}).*\Z"):
        agent_of((old, new), n=3)


def test_what_happens_on_an_empty_history_says_that_it_was_empty():
    agent = agent_of(("return model(", "assert history.n\n    return model("))
    history = agent.history([0])
    with pytest.raises(UserError, match=r"py: act\(\) on an empty history \(n = 0\) raised Asser"):
        agent.act(history.latest(0))
    assert agent.act(history).shape == (1, 2)


def test_what_is_no_adapter_is_one_line():
    Path("notes.txt").write_text("text")
    said = {"missing.py": "there is no such file", ".": "is a folder", "notes.txt": r"\(\.py\)$"}
    for path, words in said.items():
        with pytest.raises(UserError, match=words):
            load(path, 1, 0, CPU)


def test_a_mistake_leaves_earlier_results_and_shows_its_traceback_on_demand(capsys, monkeypatch):
    Path("metrics.json").write_text("earlier")
    path = written(("return Model()", "raise KeyError('weights')"))
    said = refused(main, ["--adapter", path, "--out", "."], capsys)
    assert said.startswith("error: mine.py: load() raised KeyError: 'weights' (mine.py:")
    assert Path("metrics.json").read_text() == "earlier"
    monkeypatch.setenv("ADAPTER_TRACEBACK", "1")
    with pytest.raises(UserError):
        load(path, 1, 0, CPU)
    assert "Traceback" in capsys.readouterr().err
