"""Playing arms and keeping what they earned, on a task whose answer is planted (`levers.py`)."""

import json
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from agents import ModelAgent
from levers import HORIZON, LeversAgent, ignores_history

from ad.darkroom import DarkRoom
from historylens.agent import Environment, rollout
from historylens.common.errors import UserError
from historylens.comparison import counting, playing
from historylens.comparison.intervals import Estimate, late_scores
from historylens.comparison.playing import Plays, fingerprint, plan, play, play_arms
from historylens.comparison.policy import CompressedPolicy, Cost
from historylens.comparison.report import recommendation
from historylens.comparison.results import FILES, ResultsFile
from historylens.comparison.study import Arm, Result, judge
from historylens.compression.method import METHODS

PLAYS = Plays(LeversAgent(), n_seeds=2, n_episodes=3, seed=0)
FULL, REWARDED = Arm("full"), Arm("rewarded-recent", 4)
ONES = Result(FULL, np.ones((3, 2, 3)))
*TOLD, RESULTS = FILES


def arms(*names, budgets=(4,), agent=PLAYS.agent):
    return plan(replace(PLAYS, agent=agent), names, budgets)


def opened(folder, **change):
    return ResultsFile(folder, fingerprint(replace(PLAYS, **change)))


def test_what_a_block_draws_from_generators_that_all_share_is_its_own(monkeypatch):
    def drawn(_rooms, _policy, n_steps, noises, *_):
        return np.random.random((len(noises), n_steps)), np.ones((len(noises), n_steps), bool)

    monkeypatch.setattr(playing, "rollout", drawn)
    one, same, other = (play(PLAYS, REWARDED, range(i, i + 1)).returns for i in (0, 0, 1))
    assert (one == same).all()
    assert (one != other).all()


def test_baselines_and_controls_come_first_then_each_strategy_at_each_budget():
    assert [arm.key for arm in arms("even", "full", "recent", "even", budgets=(8, 4, 8))] == [
        "full", "empty", "other-task", "shuffled-rewards", "even@4", "even@8", "recent@4",
        "recent@8",
    ]  # fmt: skip
    assert Arm("other-task") not in arms("recent", agent=LeversAgent(n_levers=1))


def test_a_history_as_short_as_the_budget_and_a_model_without_any_are_refused():
    assert arms("recent", budgets=(3 * HORIZON - 1,))
    with pytest.raises(UserError, match="shorter than the budget: 3 episodes of 6 steps"):
        arms("recent", budgets=(3 * HORIZON,))
    forgetful = LeversAgent()
    forgetful.n_max = 0
    with pytest.raises(UserError, match="there is nothing to compress"):
        arms("recent", agent=forgetful)


def test_episodes_that_ended_early_are_counted_in_the_runs_of_the_study_alone(tmp_path):
    results, empty = opened(tmp_path), replace(ONES, arm=Arm("empty"), n_early=2)
    judged = [replace(ONES, n_early=3), empty]
    for one in (*judged, replace(empty, first=2, n_early=10), replace(ONES, arm=REWARDED)):
        results.add(replace(one, n_early=one.n_early or 100))
    assert counting(PLAYS, results).startswith("115 episodes ended before 6 steps")
    assert counting(PLAYS, results, judge(judged, 0.05)).startswith("5 episodes ended")


@pytest.mark.parametrize(("most", "made"), [(9, [[0, 1, 2] * 2]), (4, [[0, 1, 2]] * 2)])
def test_rooms_in_batches_earn_what_each_earns_alone_goal_by_seed(monkeypatch, most, made):
    agent, n_tokens = LeversAgent(), 0
    environment, make = agent.environment, mock.Mock(side_effect=agent.environment.make)
    agent.environment = replace(environment, make=make)
    monkeypatch.setattr(playing, "MAX_ROOMS", most)
    result = play(replace(PLAYS, agent=agent, n_episodes=8, seed=5), REWARDED)
    goals, seeds = zip(*(call.args for call in make.call_args_list), strict=True)
    assert [numbers.tolist() for numbers in goals] == made
    assert np.concatenate(seeds).tolist() == [5, 6, 7, 8, 9, 10]  # the study's first, one a room
    assert result.returns.shape == (3, 2, 8)
    assert result.returns.flags.c_contiguous  # sums of it are those of what a file holds
    for room in range(6):
        policy = CompressedPolicy(agent, METHODS[REWARDED.name], REWARDED.n_keep)
        alone = environment.make(np.array([room % 3]), [room])
        rewards, _ = rollout(alone, policy, 8 * HORIZON, [np.random.default_rng((5, room))])
        expected = rewards.reshape(8, HORIZON).sum(axis=1)
        np.testing.assert_array_equal(result.returns[room % 3, room // 3], expected)
        n_tokens += policy.cost.tokens_read
    assert (result.cost.decisions, result.cost.tokens_read) == (3 * 2 * 8 * HORIZON, n_tokens)


def test_arms_share_their_action_noise_and_draw_their_own_choices():
    plays, random = replace(PLAYS, n_episodes=10), Arm("random", 4)
    one, same, other, again = (play(plays, arm).returns for arm in (REWARDED, FULL, random, random))
    np.testing.assert_array_equal(one, same)
    np.testing.assert_array_equal(other, again)
    assert (one != other).any()
    assert (play(replace(plays, seed=1), FULL).returns != same).any()


ALL_OF_IT = ["recent", *(m.name for m in METHODS.values() if m.looks_at.endswith("attention"))]


@pytest.mark.parametrize("name", ALL_OF_IT)
def test_what_keeps_the_whole_context_is_full_history_and_not_played_again(
    name, tiny_model, tmp_path
):
    goals = np.array([[0, 1], [4, 3]])
    rooms = Environment(("a", "b"), 5, lambda numbers, seeds: DarkRoom(goals[numbers], 5, 5))
    plays = Plays(ModelAgent(tiny_model, rooms), n_seeds=1, n_episodes=3)
    less, whole = (Arm(name, n_keep) for n_keep in (plays.agent.n_max - 1, plays.agent.n_max))
    wanted = [FULL, whole, less, Arm("even", plays.agent.n_max)]
    results = ResultsFile(tmp_path, fingerprint(plays))
    full, same, *_ = play_arms(plays, wanted, results)
    assert {key for key, _ in results.blocks} == {arm.key for arm in wanted if arm != whole}
    assert same.arm == whole
    np.testing.assert_array_equal(same.returns, full.returns)
    np.testing.assert_array_equal(play(plays, whole).returns, full.returns)


def test_returns_survive_the_file_exactly_and_a_new_arm_replaces_what_told_of_fewer(tmp_path):
    returns = np.random.default_rng(0).normal(size=(3, 2, 3))
    given = Result(FULL, returns, Cost(decisions=7, seconds_model=0.1))
    opened(tmp_path).add(given)
    opened(tmp_path).write({"recommended": None})
    for name in TOLD:
        (tmp_path / name).write_text(name)
    (result,) = play_arms(PLAYS, [FULL], opened(tmp_path))
    np.testing.assert_array_equal(result.returns, returns)
    assert result.cost == given.cost
    assert all((tmp_path / name).exists() for name in FILES)
    opened(tmp_path).add(replace(ONES, arm=Arm("empty")))
    assert [path.name for path in tmp_path.iterdir()] == [RESULTS]
    assert "summary" not in json.loads((tmp_path / RESULTS).read_text())


@pytest.mark.parametrize(("why", "change"), [
    ("other seed", {"seed": 1}),
    ("other seeds", {"n_seeds": 3}),
    ("other episodes", {"n_episodes": 4}),
    ("other positions", {"positions": "original"}),
    ("other goals", {"agent": LeversAgent(n_levers=2)}),
    ("other model", {"agent": LeversAgent(ignores_history)}),
])  # fmt: skip
def test_results_of_other_settings_or_code_are_moved_aside(tmp_path, monkeypatch, why, change):
    (tmp_path / "notes.txt").write_text("mine")
    for number in (1, 2):
        opened(tmp_path).add(ONES)
        for name in TOLD:
            (tmp_path / name).write_text(name)
        before = {name: (tmp_path / name).read_bytes() for name in FILES}
        results, aside = opened(tmp_path, **change), tmp_path / f"earlier-{number}"
        assert f"({why}" in results.found
        assert str(aside) in results.found
        assert results.blocks == {}
        assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
        assert not any((tmp_path / name).exists() for name in FILES)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    opened(tmp_path).add(ONES)
    monkeypatch.setattr(playing, "CODE", playing.CODE[:-1])
    assert "(other code)" in opened(tmp_path).found


@pytest.mark.parametrize(("where", "name", "value"), [
    ((), "returns", [[[0.5] * 3] * 2] * 3), ((), "first_seed", True), ((), "ended_early", 2),
    (("cost",), "tokens_read", 8), (("seconds",), "seconds_model", 1e308),
])  # fmt: skip
def test_no_number_is_taken_up_that_was_changed_since_it_had_a_digest(tmp_path, where, name, value):
    opened(tmp_path).add(ONES)
    content = json.loads((tmp_path / RESULTS).read_text())
    earlier = {key: part for key, part in content.items() if key != "digest"}
    (tmp_path / RESULTS).write_text(json.dumps(earlier))  # of a version that had none
    assert len(opened(tmp_path).blocks) == len(content) - len(earlier) == 1
    (part,) = content["arms"]["full"]["blocks"]
    for key in where:
        part = part[key]
    part[name] = value
    (tmp_path / RESULTS).write_text(json.dumps(content))
    found = opened(tmp_path)
    assert ("a damaged results.json" in found.found, found.blocks) == (True, {})
    assert json.loads((tmp_path / "earlier-1" / RESULTS).read_text()) == content


SHORT = HORIZON - 2  # shorter than the way from one reward to the next decision that counts
KEEP_REWARDS, FORGET = ("rewarded-recent", "best-episodes"), ("recent", "last-episodes")


def test_on_the_planted_task_what_keeps_rewards_loses_nothing_and_what_forgets_them_all(tmp_path):
    plays = replace(PLAYS, n_seeds=8, n_episodes=16)
    wanted = [*plan(plays, KEEP_REWARDS + FORGET, [SHORT]), Arm("recent", HORIZON)]
    results = play_arms(plays, wanted, ResultsFile(tmp_path, fingerprint(plays)))
    returns = {each.arm.key: each.returns for each in results}
    # A margin that 24 runs of 7 arms can hold: without a collapse they rule out more than 21 %.
    study = judge(results, 0.25)
    assert late_scores(returns["full"]).mean() > 0.95
    for name, n_keep in [*((name, SHORT) for name in KEEP_REWARDS), ("recent", HORIZON)]:
        np.testing.assert_array_equal(returns[f"{name}@{n_keep}"], returns["full"])
        row = study.row(name, n_keep)
        assert row.verdict == "safe"
        assert row.difference == row.adaptation_loss == Estimate(0, 0, 0)
    for name in FORGET:  # recency that is too short
        np.testing.assert_array_equal(returns[f"{name}@{SHORT}"], returns["empty"])
        assert study.row(name, SHORT).verdict == "worse"
    for name in ("other-task", "shuffled-rewards"):
        assert study.row(name).verdict == "worse"
        assert study.row(name).mean.value < 0.6
    assert study.doubts == ()
    assert study.recommended.arm.name in KEEP_REWARDS
    text = recommendation(study)
    assert f"{study.recommended.arm.name} with {SHORT} transitions (safe)" in text
    assert f"instead of {study.full.cost.tokens:.1f}" in text
