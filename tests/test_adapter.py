"""A model of the user's through an adapter: what is read, how it acts, and what does not fit.

Adapters are those of examples/ with some of their text changed.
"""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused

from historylens.adapter.agent import load, load_acting
from historylens.agent import look
from historylens.capture import capture
from historylens.common.errors import UserError
from visualize_attention import main

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A folder to work in, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "corridor", raising=False)


def written(*changes, name="sar_mha"):
    """Write an example, and the environment beside it, as `mine.py` with some text changed."""
    texts = {"mine.py": EXAMPLES / f"{name}.py", "corridor.py": EXAMPLES / "corridor.py"}
    texts = {file: path.read_text() for file, path in texts.items()}
    for old, new in changes:
        assert any(old in text for text in texts.values()), old
        texts = {file: text.replace(old, new) for file, text in texts.items()}
    for file, text in texts.items():
        Path(file).write_text(text)
    return "mine.py"


def agent_of(*changes, name="sar_mha", n=4):
    return load(written(*changes, name=name), n, 0, CPU)


def acting(*changes):
    pytest.importorskip("gymnasium")
    return load_acting(written(*changes), 0, CPU)


# What an adapter may leave out or choose


def test_what_is_loaded_is_said_in_words():
    agent = agent_of(("for i in range(n)]", "for i in range(3)]"), name="explicit_softmax")
    assert agent.facts == {
        "Adapter": "mine.py",
        "Model": "Model: 2 layers x 2 heads, 10,084 parameters",
        "Context length": "8 to 24 transitions, 25 tokens at most; a transition is one token; "
        "token 0 decides; metrics are of whole transitions",
        "Device": "cpu",
        "Samples": "3 decisions of the adapter, which has no more of the 4 asked for",
    }
    assert agent.title == "Model of mine.py"
    assert agent.label_columns == ("number",)
    assert agent.meta == {"n_heads": [2, 2], "model": "Model"}


def test_without_tokens_a_transition_is_one_and_the_query_last():
    agent = agent_of(name="rotary_sdpa")
    assert all(one.is_plain for one in agent.tokens(agent.history([0, 1])))
    assert agent.n_tokens == 51


def test_a_batch_may_have_a_map_for_each_sample():
    agent = agent_of(("return Tokens.of(history.n", "return [Tokens.of(history.n"),
                     ('"reward"))', '"reward"))] * history.size'))  # fmt: skip
    assert [len(one) for one in agent.tokens(agent.history([0, 1]))] == [91, 91]


@pytest.mark.parametrize("chosen", ["[model.blocks[1]]", "['blocks.1.attention']", "'*.1.*'"])
def test_layers_chooses_the_modules_to_look_into(chosen):
    layers = f"def layers(model):\n    return {chosen}\n\n\ndef load("
    agent = agent_of(("def load(", layers))
    assert agent.layers == ("blocks.1.attention",)
    assert agent.n_heads == (4,)


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
    agent = agent_of(
        ("        next_states=next_states,\n", ""),
        ("        episodes=np.arange(N_MAX) // HORIZON,\n", ""),
        ('        title=f"{goal} pays",\n', ""),
    )
    history = agent.history([0])
    assert torch.equal(history.next_states[:, :-1], history.states[:, 1:])
    assert torch.equal(history.next_states[:, -1], history.query_states)
    assert not history.episodes.any()
    assert [one.title for one in agent.decisions[:2]] == ["sample 0", "sample 1"]


def test_states_are_of_one_type_in_every_batch():
    half = ("states=states,", 'states=states / 2 if goal == "left end" else states,')
    agent = agent_of(half, ("history.states[..., 0]", "history.states[..., 0].long()"),
                     ("query_states[:, 0]", "query_states[:, 0].long()"))  # fmt: skip
    parts = [agent.history(indices) for indices in ([0], [1], [0, 1])]
    assert {part.states.dtype for part in parts} == {torch.float32}
    assert {part.query_states.dtype for part in parts} == {torch.float32}


# Acting on any history


def test_it_acts_as_the_model_on_shorter_history():
    agent = agent_of()
    history = agent.history([0, 1])
    kept = torch.tensor([[0, 3, 5], [1, 2, 7]])
    rows = torch.arange(2)[:, None]
    parts = history.states[rows, kept], history.actions[rows, kept], history.rewards[rows, kept]
    expected = agent.model(parts[0][..., 0], *parts[1:], history.query_states[:, 0])
    found = agent.act(history.take(kept))
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-6)
    assert agent.n_max == 30
    assert agent.act(history.take(kept[:, :0])).shape == (2, 2)


def test_a_look_gives_the_attention_among_transitions(monkeypatch):
    agent = agent_of()
    history = agent.history([0, 1, 2])
    monkeypatch.setattr("historylens.agent.MAX_WEIGHTS", 100_000)  # it is looked at in pieces
    found = look(agent, history, ["query_attention", "received", "last_rows"])
    with torch.inference_mode(), capture(agent.model, maps=range(3)) as record:
        agent.act(history)
    whole = sum(layer.maps.nan_to_num().mean(1) for layer in record) / 2  # (3, 91, 91)
    blocks = whole[:, :90, :90].reshape(3, 30, 3, 30, 3).sum(4).mean(2)
    query = whole[:, 90, :90].reshape(3, 30, 3).sum(2)
    torch.testing.assert_close(found.received, blocks.sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.last_rows, blocks[:, -8:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.query_attention, query, rtol=1e-5, atol=1e-6)


def test_lack_of_memory_passes_so_that_a_batch_can_be_halved():
    too_much = "torch.empty(2**60) if history.size == 3 else model(states, history.a"
    agent = agent_of(("model(states, history.a", too_much))
    with pytest.raises(RuntimeError, match="memory"):
        agent.act(agent.history([0, 1, 2]))


# Environments


def rooms_of(*changes):
    """Two rooms, in which all episodes are four steps."""
    shorter = ("HORIZON = 10", "HORIZON = 4"), ("HORIZON = 9, 10", "HORIZON = 9, 4")
    return acting(*shorter, *changes).environment.make(np.array([0, 1]))


ENDS = ("n_steps == HORIZON", "n_steps == 2")
MODE = ("for goal in goals])", "for goal in goals], autoreset_mode=Mode.MODE)")
IMPORT = ("import SyncVectorEnv", "import AutoresetMode as Mode, SyncVectorEnv")


def test_an_environment_plays_episodes_of_the_horizon():
    rooms = rooms_of()
    for _ in range(2):
        assert rooms.reset().tolist() == [[4], [4]]
        ends = [rooms.step(np.array([0, 1])) for _ in range(4)]
        assert [done for *_, done in ends] == [False, False, False, True]
        assert ends[3][0].tolist() == [[0], [8]]
        assert [rewards.tolist() for _, rewards, _ in ends[2:]] == [[0, 0], [1, 1]]


@pytest.mark.parametrize("mode", ["SAME_STEP", "DISABLED"])
def test_an_environment_that_ends_early_begins_anew(mode):
    rooms = rooms_of(ENDS, (MODE[0], MODE[1].replace("MODE", mode)), IMPORT)
    rooms.reset()
    assert [rooms.step(np.array([0, 0]))[0][0, 0] for _ in range(3)] == [3, 4, 3]


def test_an_early_end_that_costs_a_step_is_refused():
    rooms = rooms_of(ENDS)
    rooms.reset()
    rooms.step(np.array([0, 0]))
    with pytest.raises(UserError, match=r"after 2 of HORIZON = 4 steps.*SAME_STEP"):
        rooms.step(np.array([0, 0]))


def test_states_of_an_environment_are_of_the_type_of_samples():
    floats = ("spaces.Discrete(LENGTH)", "spaces.Box(0, LENGTH, (1,))")
    rooms = rooms_of(floats, ("return self.cell,", "return [self.cell + self.n_steps / 2],"))
    assert rooms.reset().dtype == np.int64
    with pytest.raises(UserError, match=r"make_env\(\): expected states of whole numbers, as sam"):
        rooms.step(np.array([0, 0]))
    halves = ("states=states,", "states=states / 2,"), ("states[..., 0],", "states[..., 0].long(),")
    query = ("query_states[:, 0]", "query_states[:, 0].long()")
    assert rooms_of(*halves, query).reset().dtype == np.float32


def test_a_model_in_its_environments_knows_what_its_results_depend_on():
    first, second = acting(), acting(("torch.randn(3", "torch.rand(3"))
    assert first.environment.goals == ("left end", "right end")
    assert (first.environment.horizon, first.n_max) == (10, 30)
    assert first.environment.make(np.array([0, 1, 1])).reset().shape == (3, 1)
    assert first.identity.keys() == {"adapter", "weights"}
    assert first.identity["weights"] != second.identity["weights"]
    assert load("mine.py", 4, 0, CPU).identity == second.identity


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("def make_env(", "def make(", r"no make_env\(\): a comparison plays in an environment"),
        ("GOALS = (", "NAMES = GOALS = lambda: (", "GOALS: expected a list of names"),
        ("HORIZON = 10", "HORIZON = None", "HORIZON: expected a whole number"),
        ("for goal in goals])", "for goal in goals * 2])", r"1 environments, got 2"),
        ("return SyncVectorEnv", "return 3, SyncVectorEnv", "got a tuple of 2"),
        ("return self.cell, {}", "return (self.cell, 0), {}\n    observation_space = "
         "gymnasium.spaces.MultiDiscrete([9, 9])", "states of 1 numbers, as samples"),
        ("super().reset(", "1 / 0 or super().reset(", r"reset\(\) of make_env.*Zero.*or\.py:24"),
    ],
)  # fmt: skip
def test_an_environment_that_does_not_fit_is_one_line(old, new, words):
    with pytest.raises(UserError, match=words):
        acting((old, new))


# What does not fit

WRONG = [  # what is changed in the adapter, and what is said
    ("def act(", "def act((", r"importing it raised SyntaxError.*mine\.py:\d+"),
    ("class Model(", "1 / 0\nclass Model(", r"ZeroDivisionError: .*mine\.py:36"),
    ("import torch\n", "import torchy\n", r"No module.*pip install torchy"),
    ("def load()", "def loader()", r"no load\(\).*def load\(\) -> nn.Module"),
    ("def act(", "def action(", r"no act\(\).*it defines load\(\), samples\(\)"),
    ("def act(", "act = 3\ndef a(", r"act: expected a function act\(model, history\).*got a int"),
    ("return Model()", "Model()", r"load\(\): expected a torch.nn.Module, got nothing"),
    ("return Model()", "return 1 / 0", r"load\(\) raised ZeroDiv.* \(mine\.py:\d+\); ADAPTER_TRAC"),
    ("return Model()", "raise SystemExit(3)", r"load\(\) raised SystemExit: 3"),
    ("samples(n: int, seed: int)", "samples(n)", r"samples\(\) raised TypeError.*2 were given"),
    ("i in range(n)]", "i in range(0)]", r"up to 3 decisions, got none"),
    ("return [random_play(rng,", "return random_play(rng, 'left end') or [random_play(rng,",
     r"samples\(\): expected a list of Decision, got a Decision"),
    ("[random_play(rng, ", "[str(", r"samples\(\)\[0\]: expected a Decision, got a str"),
    ("rewards=next_states == (", "rewards=[] == (", r"samples\(\)\[0\]\.rewards.*got \(\)"),
    ("actions=actions", "actions=actions[1:]", r"0\]\.actions: expected .*\(30,\), got \(29,\)"),
    ("actions=actions", "actions=actions / 2", r"actions: expected whole numbers, got float32"),
    ("query_state=N_CELLS", "query_state=[1, 2] or N_CELLS", r"query_state: expected 1 .*\(2,\)"),
    ("episodes=np", "episodes=-np", r"episodes: expected numbers that never fall"),
    ("states=states", "states=['a'] * 30", r"states: expected numbers"),
    ("states=states", "states=None", r"states: expected an array, got nothing"),
    ("states=states", "states=states[1:]", r"states: expected shape \(30,\) or \(30, S\), as rew"),
    ("next_states=next_", "next_states=3 or next_", r"next_states: expected the shape of states"),
    ("task=GOALS.index(goal)", "task=goal", r"task: expected a whole number, got a str"),
    ('"goal": goal}', '"goal": None}', r"labels\['goal'\]: expected a finite number or a string"),
    ('"goal": goal}', '"layer": goal}', r"labels: .*got 'layer'"),
    ("return model(", "model(", r"act\(\): expected action logits of shape \(2, A\).*got nothing"),
    ("return model(", "return 1, model(", r"act\(\): .*got a tuple of 2"),
    ("rewards, query)", "rewards, query)[:, 0]", r"got Tensor \(2,\) of torch.float32"),
    ("rewards, query)", "rewards, query) / 0 * 0", r"act\(\): expected finite logits"),
    ("self.norms[0](x)", "self.norms[0](x[..., 1:])", r"act\(\) raised .*\(mine\.py:\d+\)"),
    ('"reward"))', '"reward")[:2])', r"tokens\(\): expected a map of the 91 .*got one of 61 tok"),
    ('"reward"))', '"reward", "next"), decides=99)', r"expected a map of the 91 .*got one of 121"),
    ("Tokens.of(history.n", "Tokens.of(history.n - 1", r"tokens\(\): expected a map of 30 trans"),
    ("return Tokens.of(", "Tokens.of(", r"tokens\(\): expected a Tokens.*got nothing"),
    ("of(history.n, ", "of(history.n, query='middle', ", r"tokens\(\) raised ValueError: expected"),
    ("def tokens(", "def token_map(", r"no tokens\(\), so: .*91 tokens.*one of 31"),
    ("in range(n)]", "in range(n)] + (globals().update(N_MAX=29) or [])",
     r"samples\(\)\[0\]: expected at most N_MAX = 29 transitions, got 30"),
    ("in range(n)]", "in range(n)] + (globals().update(N_MAX='30') or [])", r"N_MAX: .*got '30'"),
    ("def load()", "CAPTURE = {'mask': 1}\ndef load()", r"CAPTURE: expected a dict with softmax"),
    *(
        ("def load()", f"def layers(model):\n    return {layers}\ndef load()", words)
        for layers, words in [
            ("None", r"layers\(\): expected a list of modules or their names, got nothing"),
            ("[nn.Linear(1, 1)]", r"layers\(\): expected modules of the model"),
            ("['enc']", r"layers=\['enc'\]"),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "words"), WRONG)
def test_a_mistake_is_one_line_with_its_place(old, new, words):
    with pytest.raises(UserError) as error:
        agent_of((old, new), n=3)
    said = str(error.value)
    assert re.search(words, said), said
    assert said.startswith("mine.py: ")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("missing.py", "there is no such file"),
        (".", "is a folder"),
        ("notes.txt", r"expected --adapter to name a Python file \(.py\)"),
    ],
)
def test_what_is_no_adapter_is_one_line(path, words):
    Path("notes.txt").write_text("text")
    with pytest.raises(UserError, match=words):
        load(path, 1, 0, CPU)


def test_a_mistake_leaves_earlier_results(capsys):
    Path("out").mkdir()
    Path("out/metrics.json").write_text("earlier")
    path = written(("return Model()", "raise KeyError('weights')"))
    said = refused(main, ["--adapter", path, "--out", "out"], capsys)
    assert said.startswith("error: mine.py: load() raised KeyError: 'weights' (mine.py:")
    assert Path("out/metrics.json").read_text() == "earlier"


def test_the_traceback_is_shown_on_demand(capsys, monkeypatch):
    monkeypatch.setenv("ADAPTER_TRACEBACK", "1")
    with pytest.raises(UserError):
        agent_of(("return Model()", "raise KeyError('weights')"))
    assert "Traceback" in capsys.readouterr().err
