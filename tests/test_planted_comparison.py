"""A model that looks only at rewarded transitions: the comparison says so, and nothing else."""

import numpy as np
import pytest
from levers import HORIZON, LeversAgent, ignores_history

from historylens.comparison.intervals import Estimate, late_scores
from historylens.comparison.playing import Plays, fingerprint, plan, play_arms
from historylens.comparison.report import recommendation
from historylens.comparison.results import open_results
from historylens.comparison.study import Arm, judge

PLAYS = Plays(n_seeds=4, n_episodes=16, seed=0)
SHORT = HORIZON - 2  # shorter than the way from one reward to the next decision that counts
STRATEGIES = (
    "rewarded-recent", "best-episodes", "recent", "first-recent", "last-episodes", "recent-summary",
    "random",
)  # fmt: skip


def compared(agent, folder, strategies=STRATEGIES, budgets=(SHORT,), plays=PLAYS):
    arms = plan(agent, strategies, budgets, plays)
    kept, _ = open_results(folder, fingerprint(agent, plays))
    results = play_arms(agent, arms, plays, kept)
    return {each.arm: each.returns for each in results}, judge(results, 0.05)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return compared(LeversAgent(), tmp_path_factory.mktemp("planted"))


def test_strategies_that_keep_rewards_lose_nothing(planted):
    returns, study = planted
    assert late_scores(returns[Arm("full")]).mean() > 0.95
    for name in ("rewarded-recent", "best-episodes"):
        np.testing.assert_array_equal(returns[Arm(name, SHORT)], returns[Arm("full")])
        row = study.row(name, SHORT)
        assert row.verdict == "safe"
        assert row.difference == row.adaptation_loss == Estimate(0, 0, 0)


def test_recency_loses_all(planted):
    returns, study = planted
    for name in ("recent", "first-recent", "last-episodes"):
        np.testing.assert_array_equal(returns[Arm(name, SHORT)], returns[Arm("empty")])
        assert study.row(name, SHORT).verdict == "worse"


def test_controls_without_the_information_earn_no_more_than_chance(planted):
    _, study = planted
    assert study.doubts == ()
    for name in ("other-task", "shuffled-rewards"):
        assert study.row(name).verdict == "worse"
        assert study.row(name).mean.value < 0.5


def test_a_strategy_that_keeps_rewards_is_recommended(planted):
    _, study = planted
    assert study.recommended.arm.name in ("rewarded-recent", "best-episodes")
    assert study.recommended.arm.n_keep == SHORT
    assert study.stands_corrected
    text = recommendation(study)
    assert f"{study.recommended.arm.name} with {SHORT} transitions (safe)" in text
    assert f"instead of {study.full.cost.tokens:.1f}" in text


def test_recency_over_more_than_an_episode_loses_nothing(tmp_path):
    returns, study = compared(LeversAgent(), tmp_path, ["recent"], [SHORT, HORIZON])
    assert study.row("recent", SHORT).verdict == "worse"
    assert study.row("recent", HORIZON).verdict == "safe"
    assert study.recommended.arm == Arm("recent", HORIZON)
    np.testing.assert_array_equal(returns[Arm("recent", HORIZON)], returns[Arm("full")])


def test_on_a_model_that_ignores_its_history_nothing_is_recommended(tmp_path):
    plays = Plays(n_seeds=2, n_episodes=4, seed=0)
    _, study = compared(LeversAgent(ignores_history), tmp_path, ["recent"], plays=plays)
    assert study.recommended is None
    text = recommendation(study)
    assert text.startswith("The model ignores its history")
    assert "no compression can be judged on it" in text
    assert "an empty one: +0.00 [+0.00, +0.00]" in text
    for control in ("other-task", "shuffled-rewards"):
        assert f"With the control {control} it earns as much" in text
