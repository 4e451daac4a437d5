"""A model of the user's through an adapter: the main job, and what is said if it does not fit."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused

from historylens.adapter.agent import load, load_acting
from historylens.adapter.environment import GymRooms
from historylens.adapter.file import load_adapter
from historylens.agent import look
from historylens.capture import capture
from historylens.common.errors import UserError
from historylens.tokens import sum_rows
from visualize_attention import main

ADAPTER = """
import numpy as np
import torch
from torch import nn

from historylens import Decision, Tokens


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.query = nn.Linear(4, 3 * 16), nn.Linear(2, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, states, actions, rewards, query):
        x = torch.cat([states, actions[..., None], rewards[..., None]], dim=-1)
        x = self.embed(x).view(len(x), -1, 16)  # three tokens a transition
        x = torch.cat([x, self.query(query)[:, None]], dim=1)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.encoder(x, mask, is_causal=True)[:, -1])


def load():
    return Model()


def samples(n, seed):
    rng = np.random.default_rng(seed)
    return [one(rng, 8, i) for i in range(n)]


def one(rng, n, i):
    return Decision(
        rng.normal(size=(n, 2)), rng.integers(3, size=n), rng.random(n) < 0.3, rng.normal(size=2),
        episodes=np.arange(n) // 3, title=f"maze {i}", labels={"maze": i, "kind": "big"},
    )


def act(model, history):
    return model(history.states, history.actions, history.rewards, history.query_states)


def tokens(history):
    return Tokens.of(history.n, parts=("state", "action", "reward"))
"""
ENVIRONMENT = """
import gymnasium

GOALS, HORIZON = ("left", "right"), 4
MODE = gymnasium.vector.AutoresetMode.NEXT_STEP
ENDS = 4


class Room(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, goal):
        self.goal = goal

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        state = np.full(2, self.t / 10, np.float32)
        return state, float(action == self.goal), False, self.t == ENDS, {}


def make_env(goals):
    rooms = [lambda g=g: Room(g) for g in goals]
    return gymnasium.vector.SyncVectorEnv(rooms, autoreset_mode=MODE)
"""


CPU = torch.device("cpu")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(text=ADAPTER, *changes, name="mine.py"):
    """Write an adapter with some of its text changed."""
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    Path(name).write_text(text)
    return name


def analysed(path, *argv, out="out"):
    """Run the main job on three samples, one of them drawn: `metrics.json` and `metrics.csv`."""
    flags = ["--num-samples", "3", "--num-figures", "1", "--num-effects", "0", "--dpi", "20"]
    main(["--adapter", str(path), *flags, "--out", str(out), *argv])
    table = (Path(out) / "metrics.csv").read_text()
    return json.loads((Path(out) / "metrics.json").read_text()), table


def agent_of(*changes, text=ADAPTER, n=4):
    return load(written(text, *changes), n, 0, CPU)


def rows_of(agent, indices):
    """Attention rows `(B, H, T)` of each layer, captured in a pass of their own."""
    with torch.inference_mode(), capture(agent.model) as record:
        agent.act(agent.history(indices))
    return [layer.query_rows.double().numpy() for layer in record]


# The main job


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The adapter, and what the main job writes for it."""
    folder = tmp_path_factory.mktemp("job")
    path = folder / "mine.py"
    path.write_text(ADAPTER)
    return path, *analysed(path, out=folder / "out")


def test_metrics_are_those_of_transitions_whatever_tokens_they_are_cut_into(job):
    path, content, _ = job
    for rows, found in zip(
        rows_of(load(path, 3, 0, CPU), [0, 1, 2]), content["layers"], strict=True
    ):
        whole = rows[..., :24].reshape(3, 4, 8, 3).sum(-1).mean(1)  # rows (3, H, 25)
        ratio = whole[:, -2:].mean(-1) / whole[:, :2].mean(-1)
        each = found["per_sample"]
        np.testing.assert_allclose(each["mean_context_attention"], whole.mean(-1), rtol=1e-5)
        np.testing.assert_allclose(each["recent_distant_ratio"], ratio, rtol=1e-5)
    assert content["uniform"]["mean_context_attention"] == pytest.approx(3 / 25)


def test_labels_of_samples_are_columns_of_the_table(job):
    rows = list(csv.DictReader(job[2].splitlines()))
    assert [*rows[0]][:6] == ["sample", "maze", "kind", "layer", "head", "n_context"]
    assert {row["maze"] for row in rows} == {"0", "1", "2"}


def test_numbers_of_the_pictures_say_what_each_token_is(job):
    content = job[1]
    assert content["samples"][0]["tokens"]["part"][:4] == ["state", "action", "reward", "state"]
    assert content["samples"][0]["tokens"]["decides"] == 24
    drawn = content["drawn"]["layers"]["0"]["0"]
    assert len(drawn["query_rows"]["heads"][0]) == 25
    np.testing.assert_allclose(drawn["uniform_query_row"], 1 / 25, rtol=1e-5)
    assert drawn["uniform_received"][-1] == pytest.approx(1 / 25, rel=1e-5)


def test_the_same_seed_gives_the_same_files(job, home):
    assert analysed(job[0])[1] == job[2]


def test_heads_chooses_heads_and_keeps_their_numbers(job, home):
    path, every, _ = job
    some, table = analysed(path, "--heads", "3", "1", "--layers", "1")
    assert [row["head"] for row in csv.DictReader(table.splitlines())][:3] == ["1", "3", "mean"]
    both = [every["layers"][1]["head_means"]["entropy"][head] for head in (1, 3)]
    assert some["layers"][0]["head_means"]["entropy"] == both
    assert len(some["drawn"]["layers"]["1"]["0"]["query_rows"]["heads"]) == 2


def test_samples_of_several_lengths_equal_those_alone(home):
    path = written(ADAPTER, ("one(rng, 8, i)", "one(rng, (4, 8)[i % 2], i)"))
    content, _ = analysed(path)
    assert [s["n_context"] for s in content["samples"]] == [4, 8, 4]
    agent = load(path, 3, 0, CPU)
    for i in range(3):
        rows = sum_rows(rows_of(agent, [i])[0], agent.tokens(agent.history([i])))
        found = content["layers"][0]["per_sample"]["mean_context_attention"][i]
        assert found == pytest.approx(rows[..., :-1].mean(), rel=1e-5)


def test_many_heads_are_drawn_on_several_pages(job, home):
    assert not list((job[0].parent / "out").glob("layer_0/*page*"))
    path = written(ADAPTER, ("16", "34"), ("Layer(34, 4, 34", "Layer(34, 34, 34"))
    analysed(path, "--layers", "0")
    names = sorted(path.name for path in Path("out").glob("layer_0/attention_heatmap*"))
    assert names == [
        "attention_heatmap_sample0_layer0.png",
        "attention_heatmap_sample0_layer0_page2.png",
        "attention_heatmap_sample0_layer0_page3.png",
    ]


def test_a_mistake_leaves_earlier_results(home, capsys):
    Path("out").mkdir()
    Path("out/metrics.json").write_text("earlier")
    path = written(ADAPTER, ("return Model()", "raise KeyError('weights')"))
    said = refused(main, ["--adapter", path, "--out", "out"], capsys)
    assert said.startswith("error: mine.py: load() raised KeyError: 'weights' (mine.py:3")
    assert Path("out/metrics.json").read_text() == "earlier"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--goal", "0,1"], "--goal has no meaning beside --adapter"),
        (["--checkpoint", "here"], "--checkpoint has no meaning"),
        (["--heads", "4"], "unknown head 4: expected --heads in 0..3"),
        (["--layers", "2"], "unknown layer 2"),
    ],
)
def test_a_flag_without_sense_is_one_line(home, capsys, argv, words):
    assert words in refused(main, ["--adapter", written(), *argv], capsys)


# What an adapter may leave out or choose


def test_what_is_loaded_is_said_in_words(home):
    agent = agent_of(("one(rng, 8, i)", "one(rng, (4, 8)[i % 2], i)"), ("range(n)", "range(3)"))
    assert agent.facts["Adapter"] == "mine.py"
    assert re.fullmatch(r"Model: 2 layers x 4 heads, [\d,]+ parameters", agent.facts["Model"])
    assert agent.facts["Context length"] == (
        "4 to 8 transitions, 25 tokens at most; a transition is state, action, reward; token 24 "
        "decides; metrics are of whole transitions"
    )
    assert agent.facts["Samples"].endswith("3 decisions of the adapter, which has no more of the 4 "
                                           "asked for")  # fmt: skip
    assert agent.title == "Model of mine.py"


def test_without_tokens_a_transition_is_one_and_the_query_last(home):
    agent = agent_of(("3 * 16", "16"), ("def tokens(history)", "def not_used(history)"))
    assert all(one.is_plain for one in agent.tokens(agent.history([0, 1])))
    (row, _) = rows_of(agent, [0])
    assert row.shape[-1] == agent.n_tokens == 9


def test_a_batch_may_have_a_map_for_each_sample(home):
    agent = agent_of(
        ("return Tokens.of(", "return [Tokens.of("), ('"reward"))', '"reward"))] * history.size')
    )
    assert [len(one) for one in agent.tokens(agent.history([0, 1]))] == [25, 25]


@pytest.mark.parametrize("chosen", ["model.encoder.layers[1:]", "['encoder.layers.1']", "'*.1'"])
def test_layers_chooses_the_modules_to_look_into(home, chosen):
    agent = agent_of(text=f"{ADAPTER}\ndef layers(model):\n    return {chosen}\n")
    assert agent.layers == ("encoder.layers.1",)
    assert agent.n_heads == (4,)


def test_a_softmax_of_its_own_shape_is_named_in_the_adapter(home):
    softmax = """
class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        return self.softmax(x @ x.mT) @ x  # one head: (B, T, T)
"""
    changes = [
        ("class Model(", softmax + "\n\nclass Model("),
        ("self.head =", "self.one = Attend()\n        self.head ="),
        ("self.encoder(x, mask, is_causal=True)", "self.one(x)"),
        ("self.encoder =", "unused ="),
    ]
    named = ("def load()", "CAPTURE = {'softmax': 'one', 'heads': 1}\n\n\ndef load()")
    assert agent_of(*changes, named).n_heads == (1,)
    with pytest.raises(UserError, match=r"mine\.py: act\(\) cannot be looked into.*CAPTURE ="):
        agent_of(*changes)


def test_next_states_episodes_and_titles_have_defaults(home):
    agent = agent_of(("episodes=np.arange(n) // 3, ", ""), ('title=f"maze {i}", ', ""))
    history = agent.history([0])
    assert torch.equal(history.next_states[:, :-1], history.states[:, 1:])
    assert torch.equal(history.next_states[:, -1], history.query_states)
    assert not history.episodes.any()
    assert [one.title for one in agent.decisions[:2]] == ["sample 0", "sample 1"]


def test_states_are_of_one_type_in_every_batch(home):
    some_whole = ("rng.normal(size=(n, 2))", "np.zeros((n, 2), int) + (i % 2) / 2")
    agent = agent_of(some_whole)
    types = {agent.history([i]).states.dtype for i in range(4)}
    assert types == {agent.history([0, 1]).query_states.dtype} == {torch.float32}


# Acting on any history


def test_it_acts_as_the_model_on_shorter_history(home):
    agent = agent_of()
    history = agent.history([0, 1])
    kept = torch.tensor([[0, 3, 5], [1, 2, 7]])
    rows = torch.arange(2)[:, None]
    parts = history.states[rows, kept], history.actions[rows, kept], history.rewards[rows, kept]
    expected = agent.model(*parts, history.query_states)
    found = agent.act(history.take(kept))
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-6)
    assert agent.n_max == 8
    assert agent.act(history.take(kept[:, :0])).shape == (2, 3)


def test_a_look_gives_the_attention_among_transitions(home, monkeypatch):
    agent = agent_of()
    history = agent.history([0, 1, 2])
    monkeypatch.setattr("historylens.agent.MAX_WEIGHTS", 10_000)  # it is looked at in pieces
    found = look(agent, history, ["query_attention", "received", "last_rows"])
    with torch.inference_mode(), capture(agent.model, maps=range(3)) as record:
        agent.act(history)
    whole = sum(layer.maps.nan_to_num().mean(1) for layer in record) / 2  # (3, 25, 25)
    blocks = whole[:, :24, :24].reshape(3, 8, 3, 8, 3).sum(4).mean(2)
    query = whole[:, 24, :24].reshape(3, 8, 3).sum(2)
    torch.testing.assert_close(found.received, blocks.sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.last_rows, blocks, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.query_attention, query, rtol=1e-5, atol=1e-6)


def test_lack_of_memory_passes_so_that_a_batch_can_be_halved(home):
    agent = agent_of(("    return model(", "    1 / (history.size < 3)\n    return model("))
    assert agent.act(agent.history([0, 1])).shape == (2, 3)
    with pytest.raises(UserError, match="ZeroDivisionError"):
        agent.act(agent.history([0, 1, 2]))
    agent.adapter.module.act = lambda *_: torch.empty(2**60)
    with pytest.raises(RuntimeError, match="memory"):
        agent.act(agent.history([0]))


# Environments


def rooms_of(*changes, state=np.zeros(2, np.float32)):  # noqa: B008
    pytest.importorskip("gymnasium")
    adapter = load_adapter(written(ADAPTER + ENVIRONMENT, *changes))
    return GymRooms(adapter, [0, 1], 4, state, seed=0)


def test_an_environment_plays_episodes_of_the_horizon(home):
    rooms = rooms_of()
    for _ in range(2):
        assert rooms.reset().tolist() == [[0, 0], [0, 0]]
        ends = [rooms.step(np.array([0, 0])) for _ in range(4)]
        assert [done for *_, done in ends] == [False, False, False, True]
        assert ends[0][1].tolist() == [1.0, 0.0]
        np.testing.assert_allclose(ends[3][0], 0.4)


@pytest.mark.parametrize("mode", ["SAME_STEP", "DISABLED"])
def test_an_environment_that_ends_early_begins_anew(home, mode):
    rooms = rooms_of(("NEXT_STEP", mode), ("ENDS = 4", "ENDS = 2"))
    rooms.reset()
    states = [rooms.step(np.array([0, 0]))[0][0, 0] for _ in range(3)]
    np.testing.assert_allclose(states, [0.1, 0.0, 0.1])


def test_an_early_end_that_costs_a_step_is_refused(home):
    rooms = rooms_of(("ENDS = 4", "ENDS = 2"))
    rooms.reset()
    rooms.step(np.array([0, 0]))
    with pytest.raises(UserError, match=r"after 2 of HORIZON = 4 steps.*SAME_STEP"):
        rooms.step(np.array([0, 0]))


def test_states_of_an_environment_are_of_the_type_of_samples(home):
    rooms = rooms_of(state=np.zeros(2, np.int64))
    assert rooms.reset().dtype == np.int64  # the environment's are floats
    with pytest.raises(UserError, match=r"make_env\(\): expected states of whole numbers, as sam"):
        rooms.step(np.array([0, 0]))
    assert rooms_of(("np.float32), {}", "int), {}")).reset().dtype == np.float32


def test_a_model_in_its_environments_knows_what_its_results_depend_on(home):
    pytest.importorskip("gymnasium")
    first = load_acting(written(ADAPTER + ENVIRONMENT), 0, CPU)
    second = load_acting(written(ADAPTER + ENVIRONMENT, ("std=0.5", "std=0.6")), 0, CPU)
    assert first.environment.goals == ("left", "right")
    assert (first.environment.horizon, first.n_max) == (4, 8)
    assert first.environment.make(np.array([0, 1, 1])).reset().shape == (3, 2)
    assert first.identity.keys() == {"adapter", "weights"}
    assert first.identity["weights"] != second.identity["weights"]
    assert load("mine.py", 4, 0, CPU).identity == second.identity


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            [("def make_env(", "def make(")],
            r"no make_env\(\): a comparison plays in an environment",
        ),
        ([("GOALS, HORIZON =", "NAMES, HORIZON =")], "GOALS: expected a list of names"),
        ([('"right"), 4', '"right"), None')], "HORIZON: expected a whole number"),
        ([("rooms, autoreset", "rooms[:0] or rooms * 2, autoreset")], r"1 environments, got 2"),
        ([("return gymnasium.vector", "return 3 and repr, gymnasium.vector")], "got a tuple of 2"),
        ([("np.zeros(2,", "np.zeros(3,"), ("1.0, (2,)", "1.0, (3,)")], "states of 2 numbers"),
        ([("self.t = 0", "1 / 0")], r"reset\(\) of make_env\(\)'s environment raised Zero.*py:8\d"),
    ],
)
def test_an_environment_that_does_not_fit_is_one_line(home, changes, words):
    pytest.importorskip("gymnasium")
    with pytest.raises(UserError, match=words):
        load_acting(written(ADAPTER + ENVIRONMENT, *changes), 0, CPU)


# What does not fit

WRONG = {
    "syntax": ([("def act(", "def act((")], r"importing it raised SyntaxError.*mine\.py:\d+"),
    "raises as it is imported": ([("class Model(", "1 / 0\n\n\nclass Model(")],
                                 r"ZeroDivisionError: .*mine\.py:9"),
    "missing package": ([("import torch\n", "import torchy\n")], r"No module.*pip install torchy"),
    "no load": ([("def load()", "def loader()")], r"no load\(\).*def load\(\) -> nn.Module"),
    "no act": ([("def act(", "def action(")], r"no act\(\).*it defines load\(\), samples\(\)"),
    "act is no function": ([("def load()", "act = 3\n\n\ndef load()"), ("def act(", "def a(")],
                           r"act: expected a function act\(model, history\).*got a int"),
    "load gives nothing": ([("return Model()", "Model()")],
                           r"load\(\): expected a torch.nn.Module, got nothing"),
    "load raises": ([("return Model()", "raise KeyError('weights')")],
                    r"load\(\) raised KeyError: 'weights' \(mine\.py:\d+\)"),
    "load exits": ([("return Model()", "raise SystemExit(3)")], r"load\(\) raised SystemExit: 3"),
    "samples takes other arguments": ([("def samples(n, seed)", "def samples(n)")],
                                      r"samples\(\) raised TypeError.*2 were given"),
    "no samples": ([("for i in range(n)]", "for i in range(0)]")], r"up to 3 decisions, got none"),
    "samples gives one": ([("return [one(rng, 8, i) for i in range(n)]", "return one(rng, 8, 0)")],
                          r"samples\(\): expected a list of Decision, got a Decision"),
    "a sample is no decision": ([("[one(rng, 8, i) for", "[i for")],
                                r"samples\(\)\[0\]: expected a Decision, got a int"),
    "no history": ([("one(rng, 8, i)", "one(rng, 0, i)")], r"samples\(\)\[0\].rewards.*\(0,\)"),
    "actions too short": ([("rng.integers(3, size=n)", "rng.integers(3, size=n - 1)")],
                          r"samples\(\)\[0\]\.actions: expected shape \(8,\), got \(7,\)"),
    "actions continuous": ([("rng.integers(3, size=n)", "rng.normal(size=n)")],
                           r"actions: expected whole numbers, got float32"),
    "query of another size": ([("< 0.3, rng.normal(size=2)", "< 0.3, rng.normal(size=3)")],
                              r"query_state: expected 2 numbers, as states, got \(3,\)"),
    "episodes out of order": ([("np.arange(n) // 3", "-np.arange(n)")], r"never fall"),
    "states are words": ([("rng.normal(size=(n, 2))", "['a'] * n")], r"states: expected numbers"),
    "act gives nothing": ([("return model(history", "model(history")],
                          r"act\(\): expected action logits of shape \(2, A\).*got nothing"),
    "act gives a tuple": ([("return model(history.states, history.actions, history.rewards, "
                            "history.query_states)", "return 1, 2")], r"got a tuple of 2"),
    "act gives one axis": ([("history.query_states)", "history.query_states)[:, 0]")],
                           r"got Tensor \(2,\) of torch.float32"),
    "act gives no numbers": ([("history.query_states)", "history.query_states) / 0 * 0")],
                             r"act\(\): expected finite logits"),
    "act raises": ([("self.encoder(x, mask", "self.encoder(x[..., 1:], mask")],
                   r"act\(\) raised .*\(mine\.py:\d+\).*ADAPTER_TRACEBACK=1"),
    "tokens too few": ([('("state", "action", "reward"))', '("state", "action"))')],
                       r"tokens\(\): expected a map of the 25 tokens that .*got one of 17 tokens"),
    "tokens of another history": ([("Tokens.of(history.n,", "Tokens.of(history.n - 1,")],
                                  r"tokens\(\): expected a map of 8 transitions"),
    "tokens gives nothing": ([("return Tokens.of(", "Tokens.of(")],
                             r"tokens\(\): expected a Tokens.*got nothing"),
    "tokens raises": ([('parts=("state", "action", "reward"))', 'query="middle")')],
                      r"tokens\(\) raised ValueError: expected query as 'last' or 'first'"),
    "a task is no number": ([("title=f", "task='left', title=f")],
                            r"samples\(\)\[0\]\.task: expected a whole number, got a str"),
    "a label is no value": ([('"maze": i', '"maze": None')],
                            r"labels\['maze'\]: expected a finite number or a string, got nothing"),
    "a label has the name of a column": ([('"maze": i', '"layer": i')], r"labels: .*got 'layer'"),
    "more than the model can read": ([("def load()", "N_MAX = 7\n\n\ndef load()")],
                                     r"samples\(\)\[0\]: expected at most N_MAX = 7 .*got 8"),
    "layers gives nothing": ([("def tokens(", "def layers(model):\n    pass\n\n\ndef tokens(")],
                             r"layers\(\): expected a list of modules or their names, got nothing"),
    "layers gives others": ([("def tokens(", "def layers(model):\n    return [nn.Linear(1, 1)]\n\n"
                                             "\ndef tokens(")], r"expected modules of the model"),
    "layers gives an unknown name": ([("def tokens(", "def layers(model):\n    return ['enc']\n\n"
                                                      "\ndef tokens(")], r"layers=\['enc'\]"),
    "an unknown option": ([("def load()", "CAPTURE = {'mask': 1}\n\n\ndef load()")],
                          r"CAPTURE: expected a dict with softmax and heads"),
    "the map is too long": ([('"reward"))', '"reward", "next"), decides=30)')],
                            r"tokens\(\): expected a map of the 25 tokens .*got one of 33"),
    "no tokens": ([("def tokens(", "def token_map(")], r"no tokens\(\).*25 tokens.*one of 9"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line_with_its_place(home, name):
    changes, words = WRONG[name]
    with pytest.raises(UserError) as error:
        agent_of(*changes, n=3)
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
def test_what_is_no_adapter_is_one_line(home, path, words):
    Path("notes.txt").write_text("text")
    with pytest.raises(UserError, match=words):
        load(path, 1, 0, CPU)


def test_the_place_is_that_in_a_module_beside_the_file(home):
    Path("beside_it.py").write_text("def weights():\n    raise OSError('no disk')\n")
    change = ("return Model()", "import beside_it\n    beside_it.weights()")
    with pytest.raises(UserError, match=r"load\(\) raised OSError: no disk \(beside_it\.py:2\)"):
        agent_of(change)


def test_the_traceback_is_shown_on_demand(home, capsys, monkeypatch):
    monkeypatch.setenv("ADAPTER_TRACEBACK", "1")
    with pytest.raises(UserError):
        agent_of(("return Model()", "raise KeyError('weights')"))
    assert "Traceback" in capsys.readouterr().err
