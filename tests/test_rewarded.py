"""Above which reward a transition counts as rewarded: one number, wherever it is used."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from agents import Recorder
from conftest import refused
from hypothesis import example, given
from hypothesis import strategies as st

from historylens.adapter.agent import load, load_acting
from historylens.adapter.given import read_rewarded
from historylens.common.errors import UserError
from historylens.comparison.policy import CompressedPolicy
from historylens.compression import METHODS, compress_history
from historylens.history import Decision, History, HistoryBuffer
from visualize_attention import main

SAR = Path(__file__).resolve().parents[1] / "examples" / "sar_mha.py"
CORRIDOR = SAR.with_name("corridor.py").read_text()
CPU = torch.device("cpu")
GRADED = """

def samples(*args, drawn=samples):
    for i, one in enumerate(drawn(*args)):
        yield Decision(**{**vars(one), "rewards": one.next_states / 10 + i // 10})
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("corridor.py").write_text(CORRIDOR)


def written(more="", graded=True):
    Path("mine.py").write_text(SAR.read_text() + GRADED * graded + more)
    return "mine.py"


def says(above=None):
    """An adapter that says so much."""

    def check(is_fit, *_):
        assert is_fit

    return SimpleNamespace(get={"REWARDED_ABOVE": above}.__getitem__, check=check)


def decision(rewards):
    zeros = np.zeros(len(rewards), dtype=int)
    return Decision(zeros, zeros, np.array(rewards, dtype=np.float32), 0)


@given(st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=9), min_size=1, max_size=3))
@example([[-1, -1, 0]])
@example([[-1, 0, 0]])
def test_by_default_it_is_0_for_two_values_if_one_is_above_and_else_the_top_quarter(rewards):
    above, told = read_rewarded(says(), [decision(one) for one in rewards], None)
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


def test_the_adapter_says_it_and_the_flag_before_it():
    decisions = [decision([0, 1, 2, 3])]
    told = "rewards above 0.5, as REWARDED_ABOVE says"
    assert read_rewarded(says(0.5), decisions, None) == (0.5, told)
    told = "rewards above 0, as --rewarded-above says"
    assert read_rewarded(says(0.5), decisions, 0) == (0, told)


def test_one_number_travels_from_the_adapter_to_decisions_histories_and_facts():
    agent = load(written("\nREWARDED_ABOVE = 0.35\n"), 3, 0, CPU)
    assert agent.facts["Rewarded"] == "rewards above 0.35, as REWARDED_ABOVE says"
    assert agent.rewarded_above == agent.meta["rewarded_above"] == 0.35
    history = agent.history([0, 1])
    shorter = history.take(torch.arange(4).expand(2, 4)).rows(torch.tensor([1]))
    for one, n in ((history, 30), (shorter, 4)):
        assert torch.equal(one.rewarded, one.rewards > 0.35)
        assert one.rewarded.shape[1] == n
    for one in agent.decisions:
        np.testing.assert_array_equal(one.rewarded, one.rewards > np.float32(0.35))
    assert "Rewarded" not in load(written(graded=False), 3, 0, CPU).facts
    pytest.importorskip("gymnasium")
    above = {load(written(), n, 0, CPU).rewarded_above for n in (10, 25)}
    assert above == {load_acting(written(), 0, CPU).rewarded_above}  # by the same samples
    acting = load_acting(written(), 0, CPU, 0.2)
    assert acting.facts["Rewarded"] == "rewards above 0.2, as --rewarded-above says"
    assert acting.meta["rewarded_above"] == 0.2


@pytest.mark.parametrize("value", ["'high'", "float('nan')", "[1]"])
def test_what_is_no_reward_is_one_line(value, capsys):
    with pytest.raises(UserError, match=r"mine\.py: REWARDED_ABOVE: expected a finite number"):
        load(written(f"\nREWARDED_ABOVE = {value}\n"), 3, 0, CPU)
    said = refused(main, ["--adapter", written(), "--rewarded-above", "nan"], capsys)
    assert said == "error: expected --rewarded-above as a finite number, got nan"


def mass_rewarded(*flags):
    quick = ["--num-samples=4", "--num-figures=1", "--num-effects=0", "--device=cpu"]
    main(["--adapter", written(), *quick, *flags])
    meta = json.loads(Path("figs/attention/metrics.json").read_text())
    with Path("figs/attention/metrics.csv").open() as file:
        mass = np.mean([float(row["mass_rewarded"]) for row in csv.DictReader(file)])
    return mass, meta


def test_metrics_and_what_pictures_show_use_it(capsys, monkeypatch):
    monkeypatch.setattr("historylens.analysis.results.draw", lambda *_: 0)
    some, some_json = mass_rewarded()
    said = " ".join(capsys.readouterr().out.split())
    assert "the top quarter of those in samples; REWARDED_ABOVE or --rewarded-above says" in said
    every, every_json = mass_rewarded("--rewarded-above", "-1")
    said = " ".join(capsys.readouterr().out.split())
    assert "Rewarded: rewards above -1, as --rewarded-above says" in said
    assert 0 < some < 0.9 < every
    counts = [len(one["samples"][0]["rewarded"]) for one in (some_json, every_json)]
    assert 0 < counts[0] < counts[1] == 30
    assert every_json["meta"]["rewarded_above"] == -1


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
