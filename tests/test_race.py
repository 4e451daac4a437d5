"""Racing: when looks are, what they spend, what stops at one, and how often studies are wrong."""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from levers import LeversAgent
from test_study import result

from historylens.comparison import playing
from historylens.comparison.intervals import looks, shown_worse
from historylens.comparison.playing import Plays, fingerprint, missing, plan, play, play_arms
from historylens.comparison.policy import CompressedPolicy
from historylens.comparison.results import ResultsFile
from historylens.comparison.study import Arm, Result, going_on, undecided

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from false_verdicts import SETTINGS, rates

FULL, EMPTY = Arm("full"), Arm("empty")


@given(st.integers(1, 200))
def test_looks_are_after_an_eighth_a_quarter_a_half_and_all_and_together_spend_the_level(n_seeds):
    places = {max(2, math.ceil(n_seeds / part)) for part in (8, 4, 2, 1)}
    spent = list(looks(n_seeds).values())
    assert list(looks(n_seeds)) == (sorted(places) if n_seeds > 1 else [1])
    assert min(spent) > 0
    assert sum(spent) == pytest.approx(1)
    first = next(iter(looks(n_seeds))) / n_seeds
    assert spent[0] == pytest.approx(math.log(1 + (math.e - 1) * first))


@pytest.mark.usefixtures("few_resamples")
def test_a_look_is_a_test_at_what_it_spends():
    """Of arms that lose the margin, as many are shown worse; normal noise, 8 goals of 8 seeds."""
    rng, full = np.random.default_rng(0), np.full((8, 8), 10.0)
    arms = full - 0.5 + rng.normal(size=(4000, 8, 8))
    found = [shown_worse(arms, full, 0.05, share) for share in (1.0, 0.4)]
    for worse, level in zip(found, (0.025, 0.01), strict=True):
        assert 0.4 * level < worse.mean() < 1.3 * level
    assert (found[0] >= found[1]).all()
    assert not shown_worse(arms[:, :, :1], full[:, :1], 0.05, 1.0).any()


def test_what_is_shown_worse_or_saves_no_tokens_stops_and_full_history_never_does():
    going = [result("full", 10, 90), result("recent@10", 9.9), result("even@10", 9.6),
             result("shuffled-rewards", 10, 90)]  # fmt: skip
    stopping = [result("random@10", 8.0), result("top-k@10", 11, 101),
                result("first-recent@99", 11, 90), result("empty", 1),
                result("other-task", 1, 90)]  # fmt: skip
    every = [*stopping[:3], *going, *stopping[3:]]
    assert going_on(every, 0.5, 0.05) == [each.arm for each in going]
    assert going_on([*every, result("even@3", 9.4, noise=9.0)], 0.5, 0.05)[-1].n_keep == 3


def test_the_runs_that_confirm_an_arm_end_once_it_is_good_or_worse():
    arm, rng, full = Arm("recent", 10), np.random.default_rng(0), np.full((8, 16, 6), 10.0)

    def go_on(level, noise=0.1):
        each = Result(arm, level + noise * rng.normal(size=full.shape))
        both = [undecided([Result(FULL, full), each], share, 0.05) for share in (1.0, 0.3)]
        assert all(one in ([], [FULL, arm]) for one in both)
        return [len(one) > 0 for one in both]

    assert go_on(10.0) == go_on(11.0) == go_on(9.0) == [False, False]
    assert go_on(9.5) == [True, True]
    found = [go_on(10.0, noise) for noise in np.linspace(3, 9, 40)]  # at the edge
    assert {(False, False), (False, True), (True, True)} == set(map(tuple, found))


PLAYS = Plays(LeversAgent(), n_seeds=8, n_episodes=6)
ARMS = plan(PLAYS, ["rewarded-recent", "recent", "random", "even"], [4, 30])


def raced(folder, margin, plays=PLAYS, arms=ARMS):
    results, race = ResultsFile(folder, fingerprint(plays)), margin
    if margin is not None:
        race = partial(going_on, margin_share=margin, seed=plays.seed)
    return {each.arm: each for each in play_arms(plays, arms, results, race)}, results


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return [raced(tmp_path_factory.mktemp("race"), margin) for margin in (0.05, None)]


def test_an_arm_has_the_same_numbers_in_a_race_as_without_up_to_where_it_stopped(both):
    (race, kept), (whole, _) = both
    n_runs = {arm: each.returns.shape[1] for arm, each in race.items()}
    assert set(n_runs.values()) == {2, 4, 8}
    assert n_runs[FULL] == n_runs[Arm("rewarded-recent", 4)] == 8
    assert n_runs[Arm("even", 30)] == 2  # saves no tokens
    assert n_runs[EMPTY] < 8
    assert n_runs[Arm("recent", 30)] == 8  # it is full history
    for arm, each in race.items():
        np.testing.assert_array_equal(each.returns, whole[arm].returns[:, : n_runs[arm]])
        assert each.cost.decisions == each.returns.size * 6
        if n_runs[arm] == 8:
            timeless = {"seconds_model": 0.0, "seconds_selecting": 0.0}
            assert replace(each.cost, **timeless) == replace(whole[arm].cost, **timeless)
    own = [arm for arm in race if arm != Arm("recent", 30)]
    assert len(kept.blocks) == sum({2: 1, 4: 2, 8: 3}[n_runs[arm]] for arm in own)
    np.testing.assert_array_equal(whole[FULL].returns, play(PLAYS, FULL).returns)


def test_a_race_that_was_broken_off_or_played_to_the_end_ends_the_same(both, tmp_path, monkeypatch):
    """Progress counts what is left, once arms have stopped."""
    (race, kept), (_, complete) = both
    n_left, blocks, bars, make = 7, [*kept.blocks.values()], [], playing.tqdm
    results = ResultsFile(tmp_path, fingerprint(PLAYS))
    for block in blocks[:n_left]:
        results.add(block)
    again = mock.Mock(side_effect=play)
    monkeypatch.setattr(playing, "play", again)
    monkeypatch.setattr(playing, "tqdm", lambda **how: bars.append(make(**how)) or bars[-1])
    found, results = raced(tmp_path, 0.05)
    assert again.call_count == len(blocks) - n_left
    left = sum(block.returns.shape[1] for block in blocks[n_left:])
    assert bars[0].total == left * PLAYS.n_decisions
    assert results.blocks.keys() == kept.blocks.keys()
    monkeypatch.setattr(playing, "play", None)
    for other in (found, raced(complete.path.parent, 0.05)[0]):
        assert other.keys() == race.keys()
        for arm, each in race.items():
            np.testing.assert_array_equal(other[arm].returns, each.returns)


def test_blocks_end_at_looks_and_what_takes_longest_is_played_first(tmp_path, monkeypatch):
    assert PLAYS.blocks == [range(2), range(2, 4), range(4, 8)]
    monkeypatch.setattr(playing, "MAX_ROOMS", 9)  # three seeds of three goals
    assert PLAYS.blocks == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    results = ResultsFile(tmp_path, fingerprint(PLAYS))
    todo = missing(PLAYS, ARMS, results, 4)
    assert {seeds.stop for _, seeds in todo} == {2, 4}
    sizes = [30 if arm.n_keep is None else arm.n_keep for arm, _ in todo if arm != EMPTY]
    assert sizes == sorted(sizes, reverse=True)
    assert todo[-1][0] == EMPTY


def test_a_block_draws_from_a_stream_of_its_own_as_it_would_alone(both, monkeypatch):
    (_, (whole, _)), arm = both, Arm("random", 4)
    policy = mock.Mock(side_effect=CompressedPolicy)
    monkeypatch.setattr(playing, "CompressedPolicy", policy)
    for seeds in PLAYS.blocks:
        part = whole[arm].returns[:, seeds.start : seeds.stop]
        np.testing.assert_array_equal(play(PLAYS, arm, seeds).returns, part)
    drawn = {call.args[3].initial_seed() for call in policy.call_args_list}
    assert len(drawn) == len(PLAYS.blocks)


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("name", SETTINGS)
def test_studies_are_hardly_ever_wrong_about_any_of_their_arms(name):
    """The large version, of 1,000 studies of each setting, is `benchmarks/false_verdicts.py`."""
    false, stopped, true, saved = rates(12, 24, 5, *SETTINGS[name])
    assert false <= 2 / 12  # more are rarer than 1 in 300 at 2.5 %
    assert stopped <= 0.07
    assert saved > 0.3 or "eight" not in name
    assert true > 0.8 or name != "half lose it by collapses"


@pytest.mark.usefixtures("few_resamples")
def test_an_arm_without_loss_is_confirmed_early_and_one_with_loss_hardly_ever():
    *_, true, saved = rates(12, 128, 1, *SETTINGS["none loses"])
    assert true > 0.3  # 0.7 in the large version
    assert saved > 0
    assert rates(12, 128, 1, *SETTINGS["all lose it"])[0] <= 2 / 12
