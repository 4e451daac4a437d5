"""What adapters give: what cannot be held is told in a line; above which reward one counts."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adapters import CPU, agent_of, analysed, home, written  # noqa: F401
from agents import Recorder
from attention_rows import decision
from conftest import refused
from hypothesis import example, given
from hypothesis import strategies as st

from historylens.adapter.agent import load, load_acting
from historylens.adapter.given import GymRooms, read_rewarded, read_tasks
from historylens.common.errors import UserError
from historylens.comparison.policy import CompressedPolicy
from historylens.compression import METHODS, compress_history
from historylens.history import History, HistoryBuffer
from visualize_attention import main

MORE = """
import itertools
first, logits, drawn = next(samples(1, 0)), act, samples


class Mute(BaseException):
    def __str__(self):
        raise ValueError


def decision(**changed):
    return Decision(**vars(first) | changed)


def samples(n, seed):
    return [decision() for _ in range(n)]
"""


def loaded(*more, n=3):
    return agent_of(MORE, *more, n=n)


def test_an_endless_generator_gives_what_is_asked_for():
    more = "def samples(n, seed): return (decision() for _ in itertools.count())"
    assert len(loaded(more, n=7).decisions) == 7


ODD_FIELDS = [
    *(f"labels={{'a': {x}}}" for x in ("10**400", "2**60", "[1]", "float('inf')", "np.zeros(2)")),
    "labels=[1]", "labels={'layer': 1}",
    *(f"task={task}" for task in ("10**30", "1.5", "'a'", "[1]", "float('nan')")),
    "states=np.full(30, 1e300)", "rewards=np.full(30, np.nan)", "rewards=np.full(30, 1e30)",
    "states=np.full(30, 2**64 - 1, np.uint64)", "goal=[1e300]", "actions=np.full(30, 1e30)",
    "query_episode=2**63",
]  # fmt: skip


ODD_LOGITS = [
    *("x.long()", "x.cfloat()", "x.detach().numpy()", "x.to_sparse()", "x * float('nan')"),
    *("None", "x[0]", "x[:, :1]"),
]
ACT = "def act(model, history):\n    x = logits(model, history)\n    return"
ODD = [  # what an adapter has instead of its own, and what is said
    *((f"def {name}({args}): raise {error}(28, 'a')", rf"{name}\(\) raised {error}")
      for error in ("Mute", "SystemExit", "OSError")
      for name, args in (("load", ""), ("samples", "n, seed"), ("act", "model, history"))),
    *((f"def samples(n, seed): return [decision({changed})]",
       rf"samples\(\)\[0\]\.{changed.partition('=')[0]}.*: expected") for changed in ODD_FIELDS),
    *((f"{ACT} {given}", r"act\(\)") for given in ODD_LOGITS),
    *((f"REWARDED_ABOVE = {value}", "REWARDED_ABOVE: expected a finite number")
      for value in ("'high'", "float('nan')", "[1]", "10**400")),
    *((f"def position(state): return {place}", rf"position\(\).*{said}") for place, said in (
        ("state[0]", r": expected a row and a column, whole.*got \d for"),
        ("(0.5, 0)", r": expected .* got \[0\.5, 0\.0\] for \["),
        ("0, state[0] - 5", r"got \[0, -\d\] for"), ("None", "expected .* got None for"),
        ("0, 200", r"whole numbers in 0\.\.199, got \[0, 200\] for"),
        ("float('nan'), 0", r"expected .* got \[nan, 0"),
        ("0, state[1]", r" raised IndexError.*mine\.py:\d+"),
    )),
    ("position = 3", "position: expected a function position.state"),
    ("ROOM = (1, 9)\ndel position", r"ROOM: expected position\(state\) beside it"),
    ("ROOM, samples = (1, 8), drawn", r"ROOM: .*of at least \(1, 9\).* got \(1, 8\)"),
    ("ROOM = 9", r"ROOM: expected \(rows, columns\).*got 9"),
    ("ROOM = (1, 9, 9)", r"ROOM: .*got \(1, 9, 9\)"),
    *((f"def samples(n, seed): return [decision({changed})]", said) for changed, said in (
        ("query_episode=1", "query_episode: expected a whole number from 2"),
        ("query_episode=2.5", "query_episode: .*got 2.5"),
        ("goal=(0, 1)", r"goal: expected 1 numbers, as states, got \(2,\)"),
        ("goal='left'", "goal: expected numbers that .* holds, got a str"),
        ("goal=200", r"position\(\): .*got \[0, 200\] for \[200\]"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("given", "said"), ODD)
def test_what_is_odd_is_one_line(given, said):
    with pytest.raises(UserError, match=rf"\Amine\.py: (?=.*{said}).*\Z"):
        loaded(given)


def test_a_model_of_random_weights_is_the_same_each_time():
    more = """
import random
def load():
    model = Model()
    model.head.bias.data += torch.tensor([np.random.random(), random.random()])
    return model
"""
    one, other = (loaded(more).model.head.bias for _ in range(2))
    assert torch.equal(one, other)


def test_a_task_is_any_whole_number_or_none():
    more = "def samples(n, seed): return [decision(task=x) for x in (None, -5, np.int8(3))]"
    assert [one.task for one in loaded(more).decisions] == [None, -5, 3]


def test_halves_of_characters_are_shown_as_what_can_be_written():
    text = "decision(title='a\\ud800', labels={'b\\ud800': 'c\\udfff', (1, 2): 3})"
    (one,) = loaded(f"def samples(n, seed): return [{text}]").decisions
    assert (one.title, one.labels) == ("a?", {"b?": "c?", "(1, 2)": 3})


def test_logits_are_plain_numbers_of_as_many_actions_in_every_call():
    more = "def act(model, history):\n    x = logits(model, history).clone().requires_grad_()\n"
    more += "    return x.as_subclass(nn.Parameter) if history.n else x.repeat(1, 2)"
    agent = loaded(more)
    found = agent.act(history := agent.history([0]))
    assert (type(found), found.requires_grad) == (torch.Tensor, False)
    with pytest.raises(UserError, match="logits of 2 actions, as many as at first, got 4"):
        agent.act(history.latest(0))


def test_names_of_tasks_can_be_shown_and_written():
    odd = "GOALS, HORIZON = ['a\\nb', '\\x1b[2J', '\\ud800', 7], 5\ndef make_env(goals): ..."
    shown = "a\\nb", "\\x1b[2J", "\\ud800", "7"
    assert read_tasks(loaded(odd).adapter) == (shown, 5)
    with pytest.raises(UserError, match="GOALS raised ValueError"):
        read_tasks(loaded(odd, "GOALS = [Mute()]").adapter)


STATES, REWARDS, NOT = np.zeros((2, 1)), np.zeros(2), np.zeros(2, bool)
NO_STATES, NO_REWARDS = r"make_env\(\): expected states of 1", r"rewards of shape \(2,\), finite"
RAISED = "what .* gives.* raised (Type|Value)Error"
GIVEN = [  # what an environment gives in a step, and what is said
    ((3, 4), "expected states, rewards, .*got a tuple of 2"), (tuple("abcde"), RAISED),
    ((STATES, REWARDS, NOT, NOT, [3]), RAISED), ((STATES, REWARDS, [None, [1]], NOT, {}), RAISED),
    (([[1], [1, 2]], REWARDS, NOT, NOT, {}), RAISED),
    *(((states, REWARDS, NOT, NOT, {}), NO_STATES)
      for states in (np.zeros((2, 3)), np.zeros((3, 1)), np.full((2, 1), 1e300))),
    (([0.5, 1], REWARDS, NOT, NOT, {}), "states of whole numbers"),
    *(((STATES, rewards, NOT, NOT, {}), NO_REWARDS)
      for rewards in (None, 1, np.full(2, np.nan), np.full(2, 1e38), np.full(2, 1j))),
]  # fmt: skip


@pytest.mark.parametrize(("gives", "words"), GIVEN)
def test_what_an_environment_must_not_give_is_told(gives, words):
    adapter = loaded().adapter
    rooms = SimpleNamespace(reset=lambda **_: (STATES, {}), step=lambda _: gives, metadata=None)
    adapter.module.make_env = lambda goals: rooms
    rooms = GymRooms(adapter, np.zeros(1, int), 5, np.zeros(2, int), [0])
    rooms.reset()
    with pytest.raises(UserError, match=rf"mine\.py: .*{words}"):
        rooms.step(np.zeros(2, int))


GRADED = """
def samples(*args, drawn=samples):
    for i, one in enumerate(drawn(*args)):
        yield Decision(**{**vars(one), "rewards": one.next_states / 10 + i // 10})
"""


@given(st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=9), min_size=1, max_size=3))
@example([[-1, -1, 0]])
@example([[-1, 0, 0]])
def test_by_default_it_is_0_for_two_values_if_one_is_above_and_else_the_top_quarter(rewards):
    says_nothing = SimpleNamespace(get={"REWARDED_ABOVE": None}.__getitem__)
    decisions = [replace(decision(len(one)), rewards=np.float32(one)) for one in rewards]
    above, told = read_rewarded(says_nothing, decisions, None)
    drawn = sorted(reward for one in rewards for reward in one)
    is_rare = 2 * drawn.count(drawn[-1]) <= len(drawn)
    if len(set(drawn)) == 2 and drawn[-1] <= 0 and is_rare:  # as -1 a step, 0 at the goal
        assert above == (drawn[0] + drawn[-1]) / 2
        words = f"rewards above {above:.4g}, the higher of those in samples; REWARDED_ABOVE or "
        assert told.startswith(words)
        return
    if len(set(drawn)) <= 2:
        assert (above, told) == (0, "")
        return
    place = 0.75 * (len(drawn) - 1)  # the plain twin, between two of the rewards
    low, high = drawn[int(place)], drawn[min(int(place) + 1, len(drawn) - 1)]
    expected = low + (place - int(place)) * (high - low)
    if expected == drawn[-1]:
        expected = max(reward for reward in drawn if reward < drawn[-1])
        assert "the highest of those in samples" in told
    assert above == pytest.approx(expected)
    assert 0 < sum(reward > above for reward in drawn) < len(drawn)
    assert told.startswith(f"rewards above {above:.4g}, the ")
    assert told.endswith("; REWARDED_ABOVE or --rewarded-above says otherwise")


def test_one_number_travels_from_the_adapter_to_decisions_histories_and_facts():
    agent = load(written(GRADED, "REWARDED_ABOVE = 0.35"), 3, 0, CPU)
    assert agent.facts["Rewarded"] == "rewards above 0.35, as REWARDED_ABOVE says"
    assert agent.rewarded_above == agent.meta["rewarded_above"] == 0.35
    history = agent.history([0, 1])
    shorter = history.take(torch.arange(4).expand(2, 4)).rows(torch.tensor([1]))
    for one, n in ((history, 30), (shorter, 4)):
        assert torch.equal(one.rewarded, one.rewards > 0.35)
        assert one.rewarded.shape[1] == n
    for one in agent.decisions:
        np.testing.assert_array_equal(one.rewarded, one.rewards > np.float32(0.35))
    assert "Rewarded" not in load(written(), 3, 0, CPU).facts
    pytest.importorskip("gymnasium")
    above = {load(written(GRADED), n, 0, CPU).rewarded_above for n in (10, 25)}
    assert above == {load_acting(written(GRADED), 0, CPU).rewarded_above}  # by the same samples
    acting = load_acting(written(GRADED, "REWARDED_ABOVE = 0.35"), 0, CPU, 0)  # the flag before it
    assert acting.facts["Rewarded"] == "rewards above 0, as --rewarded-above says"
    assert acting.meta["rewarded_above"] == 0


def test_metrics_and_what_pictures_show_use_it(capsys, monkeypatch):
    quick = ["--num-samples=4", "--num-figures=1", "--num-effects=0", "--device=cpu"]
    argv = ["--adapter", written(GRADED), *quick]
    said = refused(main, [*argv, "--rewarded-above", "nan"], capsys)
    assert said == "error: expected --rewarded-above as a finite number, got nan"
    monkeypatch.setattr("historylens.analysis.results.draw", lambda *_: 0)
    found = []
    for more, above in (
        ([], "the top quarter of those in samples; REWARDED_ABOVE or --rewarded-above says"),
        (["--rewarded-above=-1"], "Rewarded: rewards above -1, as --rewarded-above says"),
    ):
        main([*argv, *more])
        assert above in " ".join(capsys.readouterr().out.split())
        found.append(json.loads(Path("figs/attention/metrics.json").read_text()))
    some, every = (one["overall"]["mass_rewarded"]["mean"] for one in found)
    assert 0 < some < 0.9 < every
    some, every = (len(one["samples"][0]["rewarded"]) for one in found)
    assert 0 < some < every == 30
    assert found[1]["meta"]["rewarded_above"] == -1


def test_what_keeps_rewarded_transitions_keeps_those_above_it():
    rewards = torch.tensor([[3.0, 1, 1, 1, 1, 1]])
    zeros = torch.zeros(1, 6, dtype=torch.long)
    history = History(zeros[..., None], zeros, rewards, zeros[..., None], rewarded_above=2.0)
    keep = METHODS["rewarded-recent"].compress
    assert keep(history, 2).kept.tolist() == [[0, 5]]
    parts = (part[0] for part in history.inputs[:4])
    kept = compress_history(*parts, None, 2, strategy="rewarded-recent", rewarded_above=2.0)
    assert kept[2].tolist() == [3, 1]
    agent = Recorder(n_max=7)
    agent.rewarded_above = 2.0
    buffer = HistoryBuffer(torch.zeros(1, 1), 6)
    for reward in rewards[0]:
        step = torch.zeros(1, 1), torch.zeros(1), reward[None], torch.zeros(1, 1)
        buffer.append(*step, done=False)
    CompressedPolicy(agent, METHODS["rewarded-recent"], 2).act(buffer, torch.zeros(1, 1))
    assert agent.histories[-1].rewards.tolist() == [[3, 1]]


def test_code_that_changes_the_folder_finds_its_files_there_and_results_stay_here():
    Path("repo").mkdir()
    Path("repo/name.txt").write_text("there")
    more = """
import os
def load():
    os.chdir("repo")
    return model_of()
def samples(n, seed):
    assert open("name.txt").read() == "there"
    return drawn(n, seed)
"""
    path = written(MORE + "model_of = load" + more)
    content, _ = analysed(path, Path("out"), drawn=None)
    assert len(content["samples"]) == 3
    assert {x.name for x in Path.cwd().iterdir()} >= {"repo", "out", "mine.py"}
    assert [x.name for x in Path("repo").iterdir()] == ["name.txt"]
