"""Playing arms and keeping what they earned, with an agent in no Dark Room."""

import json
from dataclasses import replace

import numpy as np
import pytest
from agents import ModelAgent
from levers import HORIZON, N_MAX, LeversAgent, ignores_history

from ad.darkroom import DarkRoom
from historylens.agent import Environment, rollout
from historylens.common.errors import UserError
from historylens.comparison import playing
from historylens.comparison.playing import Plays, fingerprint, plan, play, play_arms, played_as
from historylens.comparison.policy import CompressedPolicy, Cost
from historylens.comparison.results import FILES, open_results
from historylens.comparison.study import Arm, Result
from historylens.compression.method import METHODS

PLAYS = Plays(n_seeds=2, n_episodes=3, seed=0)
LONGER = Plays(n_seeds=2, n_episodes=10, seed=0)
ONES = Result(Arm("full"), np.ones((3, 2, 3)))


def arms(*names, budgets=(4,), agent=None):
    return plan(agent or LeversAgent(), names, budgets, PLAYS)


def opened(folder, agent=None, plays=PLAYS):
    return open_results(folder, fingerprint(agent or LeversAgent(), plays))


def content(folder):
    return json.loads((folder / "results.json").read_text())


def noting():
    """An agent, and the goals of the rooms that it is put into."""
    agent, goals = LeversAgent(), []

    def make(numbers):
        goals.append(numbers.tolist())
        return environment.make(numbers)

    environment = agent.environment
    agent.environment = replace(environment, make=make)
    return agent, goals


# The plan


def test_baselines_and_controls_come_first_then_each_strategy_at_each_budget():
    assert [arm.key for arm in arms("even", "recent", "even", budgets=(8, 4, 8))] == [
        "full", "empty", "other-task", "shuffled-rewards", "even@4", "even@8", "recent@4",
        "recent@8",
    ]  # fmt: skip


def test_full_and_empty_take_no_budget():
    assert arms("full", "empty", "recent") == arms("recent")


def test_with_one_goal_there_is_no_other_task():
    assert Arm("other-task") not in arms("recent", agent=LeversAgent(n_levers=1))


def test_a_history_shorter_than_the_budget_is_refused():
    assert arms("recent", budgets=(3 * HORIZON - 1,))
    with pytest.raises(UserError, match="history shorter than the budget: 3 episodes of 6 steps"):
        arms("recent", budgets=(3 * HORIZON,))


def test_a_control_is_no_strategy():
    with pytest.raises(UserError, match="unknown strategy 'other-task'"):
        arms("other-task")


def test_a_model_that_reads_no_history_is_refused():
    agent = LeversAgent()
    agent.n_max = 0
    with pytest.raises(UserError, match="there is nothing to compress"):
        arms("recent", agent=agent)


# Playing


def test_returns_are_goal_by_seed_by_episode_each_what_its_own_room_earned():
    """Room i plays goal i % G: compared with each room played alone."""
    agent, goals = noting()
    result = play(agent, Arm("full"), Plays(n_seeds=2, n_episodes=8, seed=5))
    assert goals == [[0, 1, 2, 0, 1, 2]]
    assert result.returns.shape == (3, 2, 8)
    assert result.returns.flags.c_contiguous  # sums of it are those of what a file holds
    assert result.cost.decisions == 3 * 2 * 8 * HORIZON
    for room in range(6):
        policy = CompressedPolicy(agent, METHODS["full"])
        rooms = agent.environment.make(np.array([room % 3]))
        noise = np.random.default_rng((5, room))
        expected = rollout(rooms, policy, 8 * HORIZON, [noise]).reshape(8, HORIZON).sum(axis=1)
        np.testing.assert_array_equal(result.returns[room % 3, room // 3], expected)


def test_arms_share_their_action_noise_and_draw_their_own_choices():
    agent, random = LeversAgent(), Arm("random", 4)
    one, same, other, again = (
        play(agent, arm, LONGER).returns
        for arm in (Arm("rewarded-recent", 4), Arm("full"), random, random)
    )
    np.testing.assert_array_equal(one, same)
    np.testing.assert_array_equal(other, again)
    assert (one != other).any()
    for plays in (replace(LONGER, seed=1), LONGER.confirming(2)):
        assert (play(agent, Arm("full"), plays).returns != same).any()
    assert LONGER.confirming(7).n_seeds == 7


def test_batches_of_rooms_change_nothing(monkeypatch):
    agent, goals = noting()
    whole = play(agent, Arm("rewarded-recent", 4), PLAYS)
    monkeypatch.setattr(playing, "MAX_ROOMS", 4)
    parts = play(agent, Arm("rewarded-recent", 4), PLAYS)
    assert goals == [[0, 1, 2, 0, 1, 2], [0, 1, 2], [0, 1, 2]]
    np.testing.assert_array_equal(whole.returns, parts.returns)
    clocks = {"seconds_selecting": 0, "seconds_model": 0}
    assert replace(whole.cost, **clocks) == replace(parts.cost, **clocks)


def test_recency_at_the_whole_context_is_full_history_and_not_played_again(tmp_path):
    agent, goals = noting()
    results, _ = opened(tmp_path, plays=LONGER)
    whole = Arm("recent", N_MAX)
    wanted = plan(agent, ["recent"], [N_MAX], LONGER)
    by_arm = {each.arm: each for each in play_arms(agent, wanted, LONGER, results)}
    assert len(goals) == len(wanted) - 1
    np.testing.assert_array_equal(by_arm[whole].returns, by_arm[Arm("full")].returns)
    np.testing.assert_array_equal(by_arm[whole].returns, play(agent, whole, LONGER).returns)


ATTENTIVE = [name for name, each in METHODS.items() if each.looks_at.endswith("attention")]


@pytest.mark.parametrize("name", ATTENTIVE)
def test_at_the_whole_context_attention_has_no_choice_and_full_history_counts(name, tiny_model):
    goals = np.array([[0, 1], [4, 3]])
    environment = Environment(("a", "b"), 5, lambda numbers: DarkRoom(goals[numbers], 5, 5))
    agent = ModelAgent(tiny_model, environment)
    whole, less = Arm(name, agent.n_max), Arm(name, agent.n_max - 1)
    assert played_as(whole, agent) == Arm("full")
    assert played_as(less, agent) == less
    plays = Plays(n_seeds=2, n_episodes=4, seed=0)
    own, expected = (play(agent, arm, plays).returns for arm in (whole, Arm("full")))
    np.testing.assert_array_equal(own, expected)


# Keeping


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"plays": replace(PLAYS, seed=1)}, "other seed"),
        ({"plays": replace(PLAYS, n_seeds=3)}, "other seeds"),
        ({"plays": replace(PLAYS, n_episodes=4)}, "other episodes"),
        ({"plays": replace(PLAYS, positions="original")}, "other positions"),
        ({"agent": LeversAgent(n_levers=2)}, "other goals"),
        ({"agent": LeversAgent(ignores_history)}, "other model"),
    ],
)
def test_results_of_other_settings_are_moved_aside(tmp_path, change, why):
    (tmp_path / "notes.txt").write_text("mine")
    for number in (1, 2):
        opened(tmp_path)[0].add(ONES)
        for name in FILES[1:]:
            (tmp_path / name).write_text(name)
        before = {name: (tmp_path / name).read_bytes() for name in FILES}
        results, note = opened(tmp_path, **change)
        aside = tmp_path / f"earlier-{number}"
        assert f"({why})" in note
        assert str(aside) in note
        assert results.by_key == {}
        assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
        assert not any((tmp_path / name).exists() for name in FILES)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "damaged", ["", "{", "[]", "{}", '{"schema_version": 1, "fingerprint": {}, "arms": {"a": 3}}']
)
def test_a_damaged_file_is_moved_aside(tmp_path, damaged):
    (tmp_path / "results.json").write_text(damaged)
    results, note = opened(tmp_path)
    assert results.by_key == {}
    assert "damaged" in note
    assert (tmp_path / "earlier-1" / "results.json").read_text() == damaged


def test_what_tells_of_fewer_arms_goes_with_the_first_new_one(tmp_path):
    results, _ = opened(tmp_path)
    results.add(ONES)
    results.finish({"recommended": None})
    for name in FILES[1:]:
        (tmp_path / name).write_text(name)
    results, _ = opened(tmp_path)
    assert (tmp_path / FILES[1]).exists()
    results.add(replace(ONES, arm=Arm("empty")))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert "summary" not in content(tmp_path)


def test_returns_survive_the_file_exactly(tmp_path):
    returns = np.random.default_rng(0).normal(size=(3, 2, 3))
    given = Result(Arm("full"), returns, Cost(decisions=7, seconds_model=0.1))
    opened(tmp_path)[0].add(given)
    (result,) = play_arms(LeversAgent(), [Arm("full")], PLAYS, opened(tmp_path)[0])
    np.testing.assert_array_equal(result.returns, returns)
    assert result.cost == given.cost


def test_changed_code_plays_anew(tmp_path, monkeypatch):
    opened(tmp_path)[0].add(ONES)
    monkeypatch.setattr(playing, "CODE", playing.CODE[:-1])
    assert "(other code)" in opened(tmp_path)[1]
