"""Playing arms and keeping what they earned, with a task that is no Dark Room."""

import json
from pathlib import Path

import numpy as np
import pytest
from levers import HORIZON, N_MAX, levers_task

from acting.reading import Cost
from acting.views import view
from checkpoint import Checkpoint
from comparison import playing as comparison
from comparison.judgement import Arm
from comparison.kept_results import FILES, KeptResults, code_digest
from comparison.playing import Plays, fingerprint, n_decisions, plan, play, play_arms
from comparison.task import Task, darkroom_task
from compression import STRATEGIES
from config import UserError
from darkroom import DarkRoom

PLAYS = Plays(n_seeds=2, n_episodes=3, seed=0)


def arms(*strategies, budgets=(4,), task=None, plays=PLAYS):
    return plan(task or levers_task(), strategies, budgets, plays)


def opened(folder, task=None, plays=PLAYS, code="code"):
    return KeptResults.open(folder, fingerprint(task or levers_task(), plays, code))


def content(folder):
    return json.loads((folder / "results.json").read_text())


# The plan


def test_baselines_and_controls_come_first_then_each_strategy_at_each_budget():
    found = arms("even", "recent", "even", budgets=(8, 4, 8))
    assert [arm.key for arm in found] == [
        "full", "empty", "other-task", "shuffled-rewards", "even@4", "even@8", "recent@4",
        "recent@8",
    ]  # fmt: skip


def test_full_and_empty_take_no_budget():
    assert arms("full", "empty", "recent") == arms("recent")


def test_with_one_goal_there_is_no_other_task():
    assert Arm("other-task") not in arms("recent", task=levers_task(n_levers=1))


@pytest.mark.parametrize("budget", [0, -3, N_MAX + 1])
def test_a_budget_beyond_what_the_model_reads_is_refused(budget):
    with pytest.raises(UserError, match=f"expected --budgets in 1..{N_MAX}.*got {budget}"):
        arms("recent", budgets=(4, budget))


def test_a_history_shorter_than_the_budget_is_refused():
    assert arms("recent", budgets=(3 * HORIZON - 1,))
    with pytest.raises(UserError, match="history shorter than the budget: 3 episodes of 6 steps"):
        arms("recent", budgets=(3 * HORIZON,))


def test_an_unknown_strategy_is_refused_with_a_hint():
    with pytest.raises(UserError, match="did you mean 'rewarded-recent'"):
        arms("reward-recent")


def test_a_strategy_that_looks_at_attention_needs_a_model_that_can_be_looked_into():
    with pytest.raises(UserError, match="'top-k' looks at query_attention"):
        arms("top-k")


# Playing


def test_returns_are_goal_by_seed_by_episode():
    seen = []
    task = levers_task()

    def make_room(goals):
        seen.extend(goals.tolist())
        return levers_task().make_room(goals)

    returns, cost = play(levers_task_with(task, make_room), Arm("full"), PLAYS)
    assert returns.shape == (3, 2, 3)
    assert seen == [0, 1, 2, 0, 1, 2]
    assert cost.decisions == n_decisions(task, PLAYS) == 3 * 2 * 3 * HORIZON


def levers_task_with(task, make_room):
    from dataclasses import replace

    return replace(task, make_room=make_room)


def test_each_run_earns_what_its_own_room_earned():
    """Room i plays goal i % G: compared with each room played alone."""
    from rollout import act

    task, plays = levers_task(), Plays(n_seeds=2, n_episodes=8, seed=5)
    returns, _ = play(task, Arm("full"), plays)
    for room in range(6):
        reader = comparison.CompressedReader(task.view, comparison.method_of(Arm("full")))
        goal = np.array([room % 3])
        noise = [np.random.default_rng((5, room))]
        alone = act(task.make_room(goal), reader, 8 * HORIZON, noise)
        expected = alone.reshape(8, HORIZON).sum(axis=1)
        np.testing.assert_array_equal(returns[room % 3, room // 3], expected)


def test_arms_share_their_action_noise_and_draw_their_own_choices():
    task, plays = levers_task(), Plays(n_seeds=2, n_episodes=10, seed=0)
    one, same, other = (
        play(task, arm, plays)[0]
        for arm in (Arm("rewarded-recent", 4), Arm("full"), Arm("random", 4))
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(other, play(task, Arm("random", 4), plays)[0])
    reseeded = play(task, Arm("full"), Plays(n_seeds=2, n_episodes=10, seed=1))[0]
    assert not np.array_equal(same, reseeded)


def test_blocks_of_rooms_change_nothing(monkeypatch):
    task = levers_task()
    whole, cost = play(task, Arm("rewarded-recent", 4), PLAYS)
    monkeypatch.setattr(comparison, "MAX_ROOMS", 4)
    parts, cost_of_parts = play(task, Arm("rewarded-recent", 4), PLAYS)
    np.testing.assert_array_equal(whole, parts)
    assert cost.tokens_read == cost_of_parts.tokens_read


def test_recency_at_the_whole_context_is_full_history_and_not_played_again(tmp_path, monkeypatch):
    played = []
    task, plays = levers_task(), Plays(n_seeds=2, n_episodes=6, seed=0)
    real = comparison.play
    monkeypatch.setattr(
        comparison, "play", lambda t, arm, *a: played.append(arm) or real(t, arm, *a)
    )
    wanted = plan(task, ["recent"], [N_MAX], plays)
    found = play_arms(task, wanted, plays, opened(tmp_path, plays=plays), progress=False)
    assert Arm("recent", N_MAX) not in played
    outcomes = {outcome.arm: outcome for outcome in found}
    copied = outcomes[Arm("recent", N_MAX)]
    np.testing.assert_array_equal(copied.returns, outcomes[Arm("full")].returns)
    np.testing.assert_array_equal(copied.returns, real(task, Arm("recent", N_MAX), plays)[0])


ATTENTIVE = [name for name, s in STRATEGIES.items() if s.looks_at.endswith("attention")]


@pytest.mark.parametrize("name", ATTENTIVE)
def test_at_the_whole_context_attention_has_no_choice_and_full_history_counts(name, tiny_model):
    goals = np.array([[0, 1], [4, 3]])
    n_max = tiny_model.n_context_max
    task = Task(
        "tiny", view(tiny_model), lambda n: DarkRoom(goals[n], 5, 5), ("a", "b"), None, 5
    )  # fmt: skip
    plays = Plays(n_seeds=2, n_episodes=4, seed=0)
    assert comparison.twin_of(Arm(name, n_max), task) == Arm("full")
    assert comparison.twin_of(Arm(name, n_max - 1), task) is None
    found, expected = (play(task, arm, plays)[0] for arm in (Arm(name, n_max), Arm("full")))
    np.testing.assert_array_equal(found, expected)


def test_costs_are_a_decision_s():
    task = levers_task()
    _, cost = play(task, Arm("recent", 4), PLAYS)
    # Steps 0, 1, 2, 3 read that many transitions, all others 4; and the query.
    n_steps = 3 * HORIZON
    assert cost.tokens_read == 6 * (0 + 1 + 2 + 3 + 4 * (n_steps - 4) + n_steps)
    assert cost.kept_mean == 4
    assert cost.identical_to_full == 0


# Keeping


def test_finished_arms_are_on_disk_and_not_played_again(tmp_path, monkeypatch):
    task, wanted = levers_task(), arms("recent", "even")
    first = play_arms(task, wanted[:3], PLAYS, opened(tmp_path), progress=False)
    assert list(content(tmp_path)["arms"]) == [arm.key for arm in wanted[:3]]
    assert content(tmp_path)["complete"] is False
    played = []
    real = comparison.play
    monkeypatch.setattr(
        comparison, "play", lambda t, arm, *a: played.append(arm) or real(t, arm, *a)
    )
    kept = opened(tmp_path)
    assert kept.note == f"{tmp_path / 'results.json'} has 3 finished arms of these settings"
    again = play_arms(task, wanted, PLAYS, kept, progress=False)
    assert played == wanted[3:]
    for one, other in zip(first, again[:3], strict=True):
        np.testing.assert_array_equal(one.returns, other.returns)
        assert one.cost == other.cost


def test_an_interrupt_loses_the_arm_that_was_playing_and_no_other(tmp_path, monkeypatch):
    task, wanted = levers_task(), arms("recent")
    real = comparison.play

    def interrupted(task, arm, *more):
        if arm == wanted[2]:
            raise KeyboardInterrupt
        return real(task, arm, *more)

    monkeypatch.setattr(comparison, "play", interrupted)
    with pytest.raises(KeyboardInterrupt):
        play_arms(task, wanted, PLAYS, opened(tmp_path), progress=False)
    assert list(content(tmp_path)["arms"]) == [arm.key for arm in wanted[:2]]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"plays": Plays(2, 3, seed=1)}, "other seed"),
        ({"plays": Plays(3, 3, seed=0)}, "other seeds"),
        ({"plays": Plays(2, 4, seed=0)}, "other episodes"),
        ({"task": levers_task(n_levers=2)}, "other goals"),
        ({"task": levers_task(positions="original")}, "other positions"),
        ({"code": "changed"}, "other code"),
    ],
)
def test_results_of_other_settings_are_moved_aside(tmp_path, change, why):
    (tmp_path / "notes.txt").write_text("mine")
    for number in (1, 2):
        kept = opened(tmp_path)
        kept.add(Arm("full"), np.ones((3, 2, 3)), Cost())
        for name in FILES[1:]:
            (tmp_path / name).write_text(name)
        before = {name: (tmp_path / name).read_bytes() for name in FILES}
        other = opened(tmp_path, **change)
        aside = tmp_path / f"earlier-{number}"
        assert f"({why})" in other.note
        assert str(aside) in other.note
        assert other.arms == {}
        assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
        assert not any((tmp_path / name).exists() for name in FILES)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "damaged", ["", "{", "[]", "{}", '{"schema_version": 1, "fingerprint": {}, "arms": {"a": 3}}']
)
def test_a_damaged_file_is_moved_aside(tmp_path, damaged):
    (tmp_path / "results.json").write_text(damaged)
    kept = opened(tmp_path)
    assert kept.arms == {}
    assert "damaged" in kept.note
    assert (tmp_path / "earlier-1" / "results.json").read_text() == damaged


def test_what_tells_of_fewer_arms_goes_with_the_first_new_one(tmp_path):
    kept = opened(tmp_path)
    kept.add(Arm("full"), np.ones((3, 2, 3)), Cost())
    kept.finish({"recommended": None})
    for name in FILES[1:]:
        (tmp_path / name).write_text(name)
    kept = opened(tmp_path)
    assert (tmp_path / FILES[1]).exists()
    kept.add(Arm("empty"), np.zeros((3, 2, 3)), Cost())
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert "summary" not in content(tmp_path)


def test_returns_survive_the_file_exactly(tmp_path):
    task = levers_task()
    returns = np.random.default_rng(0).normal(size=(3, 2, 3))
    opened(tmp_path).add(Arm("full"), returns, Cost(decisions=7, seconds_model=0.1))
    (found,) = play_arms(task, [Arm("full")], PLAYS, opened(tmp_path), progress=False)
    np.testing.assert_array_equal(found.returns, returns)
    assert found.cost["ms_model"] == pytest.approx(100 / 7)


def test_the_digest_follows_the_code(tmp_path, monkeypatch):
    from comparison import kept_results

    before = code_digest()
    assert before == code_digest()
    monkeypatch.setattr(kept_results, "CODE", kept_results.CODE[:-1])
    assert code_digest() != before


def test_a_model_of_another_environment_is_not_played_in_dark_room(tiny_model):
    config = {"env": "darkroompermuted", "horizon": 5}
    checkpoint = Checkpoint(Path("a.pt"), 0, config, tiny_model, {"test": [[0, 1]]})
    with pytest.raises(UserError, match=r"expected a model of env 'darkroom'.*'darkroompermuted'"):
        darkroom_task(checkpoint, "reindexed")


def test_runs_that_confirm_have_action_noise_of_their_own():
    task, arm = levers_task(), Arm("random", 4)
    first = play(task, arm, PLAYS)[0]
    again = play(task, arm, PLAYS.confirming(PLAYS.n_seeds))[0]
    assert first.shape == again.shape
    assert (first != again).any()
    assert PLAYS.confirming(7).n_seeds == 7
