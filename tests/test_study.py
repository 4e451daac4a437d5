"""From returns made by hand to verdicts, doubts, one recommendation, its words, files, pictures."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from historylens.comparison import report
from historylens.comparison.intervals import late_scores
from historylens.comparison.policy import Cost
from historylens.comparison.study import Arm, Result, confirm, judge
from historylens.pictures.returns import finding

pytestmark = pytest.mark.usefixtures("few_resamples")
SHAPE = N_GOALS, N_SEEDS, N_EPISODES = 4, 48, 8
FULL_TOKENS = 90


def result(key, level, tokens=None, slow=0.0, noise=0.05, seed=0, shape=SHAPE):
    """An arm, as `recent@10`, that earns `level` at the end and `slow` less in the first half."""
    name, _, budget = key.partition("@")
    n_keep = int(budget or 0)
    rng = np.random.default_rng((seed, len(key), n_keep))
    late = np.arange(shape[2]) >= shape[2] // 2
    returns = level - slow * ~late + noise * rng.normal(size=shape)
    cost = Cost(1, tokens or n_keep + 1, over_budget=1, kept_sum=n_keep)
    return Result(Arm(name, n_keep or None), returns, cost)


def judged(*more, full=10.0, empty=1.0, control=1.0, margin=0.05, best=None, **kwargs):
    given = [result("full", full, FULL_TOKENS, **kwargs), result("empty", empty, **kwargs)]
    control = result("other-task", control, FULL_TOKENS, **kwargs)
    return judge([*given, control, *more], margin, best)


LIKE_FULL, NOISY = result("recent@10", 10.0), result("random@5", 9.6, noise=12.0)


def test_rows_are_sorted_by_return_with_verdicts_by_a_part_of_what_full_history_earns():
    levels = {"recent@10": 4.0, "even@10": 10.5, "random@10": 9.9}
    arms = [result(key, level) for key, level in levels.items()]
    study = judged(result("one-visit@10", 9.5, noise=2.0), *arms)
    means = [row.mean.value for row in study.rows]
    assert means == sorted(means, reverse=True)
    assert {row.arm.key: row.verdict for row in study.rows} == {
        "full": None, "empty": "worse", "other-task": "worse", "recent@10": "worse",
        "even@10": "better", "random@10": "safe", "one-visit@10": "inconclusive",
    }  # fmt: skip
    assert study.margin == pytest.approx(0.5, rel=0.01)
    assert judged(full=-10.0, noise=0.0, margin=0.1).margin == pytest.approx(1.0)


def test_differences_are_paired_run_by_run():
    common = 3 * np.random.default_rng(0).normal(size=(N_GOALS, N_SEEDS, 1))
    arms = [result("full", 10.0, FULL_TOKENS), LIKE_FULL]
    full, arm = (replace(each, returns=each.returns + common) for each in arms)
    row = judge([full, arm, result("empty", 1.0)], 0.05).row("recent", 10)
    assert row.difference.high - row.difference.low < 0.2
    assert row.mean.high - row.mean.low > 0.7
    difference = late_scores(arm.returns) - late_scores(full.returns)
    assert (row.verdict, row.difference.value) == ("safe", pytest.approx(difference.mean()))


def test_slow_adaptation_shows_in_the_area_while_the_end_is_equal():
    study = judged(result("recent@10", 10.0, slow=4.0))
    row = study.row("recent", 10)
    assert row.verdict == "safe"
    assert row.adaptation_loss.value == pytest.approx(2.0, abs=0.1)  # 4 in half of the episodes
    assert row.adaptation_loss.low > 1.8
    assert row.by_episode == pytest.approx([6.0] * 4 + [10.0] * 4, abs=0.2)
    assert "But it adapts more slowly: 2.00 [2.00, 2.0" in report.recommendation(study)


def test_parts_of_the_best_weigh_goals_alike():
    levels = np.array([10.0, 5.0, 8.0, 2.0])
    earned = np.broadcast_to(levels[:, None, None] / 2, SHAPE)
    arms = [Result(Arm(name), earned) for name in ("full", "empty")]
    full = judge(arms, 0.05, best=levels.tolist()).full
    assert (full.part_of_best.value, full.iqm_of_best.value) == pytest.approx((0.5, 0.5))
    for unknown in (None, [0, 1, 1, 1]):
        assert judge(arms, 0.05, best=unknown).full.part_of_best is None


def test_the_smallest_budget_that_is_safe_and_saves_tokens_is_recommended():
    study = judged(result("recent@10", 5.0), result("recent@20", 10.0), result("recent@40", 10.6))
    assert study.recommended.arm == Arm("recent", 20)
    assert study.n_compared == 4  # empty history is compared as well, a control is not
    assert "Most reward: recent@40, 10.6" in report.recommendation(study)
    equal = judged(result("recent@20", 10.0), result("even@20", 10.4), result("random@20", 10.2))
    assert equal.recommended.arm == Arm("even", 20)  # the highest return
    looks_first = result("top-k@10", 10.0, tokens=FULL_TOKENS + 11)
    assert judged(looks_first).recommended is None
    assert judged(looks_first, result("recent@40", 10.0)).recommended.arm.n_keep == 40
    assert judged(empty=9.9, noise=0.01).recommended.arm == Arm("empty")  # nothing kept


def test_a_verdict_that_only_one_comparison_in_many_bears_is_safe_so_far():
    others = [result(f"even@{n}", 1.0) for n in range(1, 60)]
    barely = result("recent@10", 9.06, noise=0.7, seed=7)  # its interval; else what may collapse
    for arm, margin in ((barely, 0.1), (LIKE_FULL, 0.03)):
        alone, many = (judged(arm, *more, margin=margin) for more in ((), others))
        assert alone.recommended.arm == arm.arm
        assert (many.recommended, many.unsettled[0].arm) == (None, arm.arm)
        rows = [study.row("recent", 10) for study in (alone, many)]
        assert [row.verdict for row in rows] == ["safe", "safe so far"]
        assert rows[0].difference == rows[1].difference  # what is shown is each arm's own
    assert "The verdict holds for all 2 arms together" in report.recommendation(alone)


def test_an_arm_that_stopped_is_compared_over_the_runs_that_it_has():
    whole = [result("random@10", 4.0), LIKE_FULL, result("even@10", 9.9)]
    stopped, *few = (replace(each, returns=each.returns[:, :12]) for each in (
        whole[0], result("full", 10.0, FULL_TOKENS), result("empty", 1.0)))  # fmt: skip
    study, played = judged(stopped, *whole[1:]), judged(*whole)
    row, alone = (each.row("random", 10) for each in (study, judge([*few, stopped], 0.05)))
    assert row.collapses.n_runs == N_GOALS * 12
    for name in ("mean", "iqm", "difference", "adaptation_loss", "verdict"):
        assert vars(row)[name] == vars(alone)[name], name
    assert (study.n_saved, played.n_saved) == (N_GOALS * 36, 0)
    for other in (("even", 10), ("full",)):
        assert study.row(*other).mean == played.row(*other).mean
    text = " ".join(report.advice(study, "p").split())
    assert "Racing: 1 arm stopped before the end" in text
    assert f": {N_GOALS * 36} of {6 * N_GOALS * N_SEEDS:,} runs were saved" in text
    assert "Racing" not in report.advice(played, "p")


def test_rewards_whose_shuffling_changes_no_run_say_nothing_of_the_model():
    full, arms = result("full", 10.0, FULL_TOKENS), (LIKE_FULL, result("empty", 1.0))
    for shuffled, n_doubts in ((full, 0), (result("shuffled-rewards", 10.0, FULL_TOKENS), 1)):
        shuffled = replace(shuffled, arm=Arm("shuffled-rewards"))
        assert len(judge([full, *arms, shuffled], 0.05, None).doubts) == n_doubts


def test_nothing_is_recommended_where_the_model_is_not_shown_to_use_its_history():
    no_gain = "Full history is not shown to earn more than an empty one: "
    one_seed = judged(shape=(N_GOALS, 1, N_EPISODES))
    nothing = judged(full=0.0, empty=0.0, control=0.0, noise=0.0)
    for study, doubt in (
        (judged(LIKE_FULL, empty=10.2, noise=1.0), f"{no_gain}-0.20 [-0.30, -0.10]"),
        (nothing, f"{no_gain}+0.00 [+0.00, +0.00]"),
        (judged(LIKE_FULL, control=10.0), "With the control other-task it loses less than"),
        (one_seed, "One seed a goal gives no interval: run at least two (--seeds)."),
    ):  # fmt: skip
        assert study.recommended is None
        assert [said.startswith(doubt) for said in study.doubts] == [True]
        said = report.recommendation(study)
        assert said.startswith("The model ignores its history, or is not shown to use it: no comp")
        assert said.endswith(study.doubts[0])
        assert "not shown to use its history" in finding(study)
    for study in (one_seed, nothing):
        assert {row.verdict for row in study.rows} == {None, "inconclusive"}


@pytest.fixture(scope="module")
def unsettled():
    even = result("even@10", 10.2, noise=12.0)
    looks_first = result("top-k@10", 10.4, 101, noise=12.0)
    return judged(result("recent@10", 4.0), NOISY, even, looks_first)


def test_open_arms_that_save_tokens_are_worth_more_runs_unless_all_is_decided(unsettled):
    assert unsettled.recommended is None
    assert [row.arm.key for row in unsettled.unsettled] == ["even@10", "random@5"]
    text = report.recommendation(unsettled)
    assert text.startswith("No recommendation")
    assert "2 are not settled, the most promising even@10, inconclusive: " in text
    assert "--strategies even --budgets 10 --seeds 192, or --full" in text
    worse = judged(result("recent@10", 4.0))
    for study in (judged(NOISY, LIKE_FULL), judged(NOISY, control=10.0), worse):
        assert study.unsettled == []
        assert "not settled" not in report.recommendation(study)
    assert "No shorter history is shown" in finding(worse)


@pytest.mark.parametrize(
    ("level", "verdict"), [(10.0, "safe"), (11.0, "better"), (4.0, "worse"), (9.5, "inconclusive")]
)
def test_new_runs_alone_decide_on_the_arm_to_confirm(unsettled, level, verdict):
    shape = (N_GOALS, 40, N_EPISODES)
    full = result("full", 10.0, FULL_TOKENS, shape=shape)
    again = result("even@10", level, shape=shape, seed=1, noise=0.05 + (level == 9.5))
    confirmed, is_good = confirm(unsettled, full, again), verdict in ("safe", "better")
    row = confirmed.confirmation.row
    assert (row.verdict, confirmed.confirmation.n_seeds) == (verdict, 40)
    difference = (late_scores(again.returns) - late_scores(full.returns)).mean()
    assert row.difference.value == pytest.approx(difference)
    assert confirmed.recommended is (unsettled.row("even", 10) if is_good else None)
    assert confirmed.rows == unsettled.rows
    text = report.recommendation(confirmed)
    assert (f"on 40 new seeds a goal: it earns {row.mean.text()} reward" in text) == is_good
    assert (f"Played again on 40 new seeds a goal it is {verdict}: " in text) != is_good
    assert ("--seeds 192, or --full" in text) == (verdict == "inconclusive")
    ruled_out = "no collapse in 160 runs: more than 1.9 % is ruled out (95 %)"
    assert (ruled_out in text) == (level > 5)


def test_of_arms_that_a_margin_does_not_tell_apart_the_smallest_is_the_most_promising():
    best, small = (result(key, 10.4, noise=12.0) for key in ("recent@20", "even@10"))
    for behind, first in ((0.4, "even@10"), (0.6, "recent@20")):  # the margin is 0.5
        study = judged(best, replace(small, returns=best.returns - behind))
        assert study.unsettled[0].arm.key == first
        assert {row.verdict for row in study.unsettled} == {"inconclusive"}


FEW = {"shape": (N_GOALS, 6, N_EPISODES)}


def test_few_runs_are_safe_so_far_and_the_smallest_such_budget_is_confirmed_first():
    levels = {"recent@20": (10.1, 0.05), "even@10": (10.0, 0.05), "random@5": (10.5, 20.0)}
    arms = [result(key, level, noise=noise, **FEW) for key, (level, noise) in levels.items()]
    study = judged(*arms, **FEW)
    assert [(row.arm.key, row.verdict) for row in study.unsettled] == [
        ("even@10", "safe so far"), ("recent@20", "safe so far"), ("random@5", "inconclusive")
    ]  # fmt: skip
    text = report.recommendation(study)
    assert "3 are not settled, the most promising even@10, safe so far: " in text
    assert "; no collapse in 24 runs: more than 11.8 % is ruled out (95 %). More runs" in text
    full, again = result("full", 10.0, FULL_TOKENS), result("even@10", 10.0)
    assert confirm(study, full, again).recommended == study.row("even", 10)
    full, again = (result(key, 10.0, **FEW) for key in ("full", "even@10"))
    text = report.recommendation(confirm(study, full, again))
    assert "new seeds a goal it is safe so far: " in text
    assert "--strategies even --budgets 10 --seeds 24, or" in text
    gains = judged(result("recent@10", 14.0, **FEW), **FEW)  # more than collapses may cost
    assert gains.recommended.verdict == "better"
    [doubt] = judged(control=10.0, **FEW).doubts  # of a control so far is enough
    assert doubt.startswith("With the control other-task it loses less than the margin")


def test_an_arm_that_gains_and_collapses_is_not_recommended():
    arm = result("recent@10", 10.6)
    arm.returns[0, :5, N_EPISODES // 2 :] = [[4.9], [4.9], [0.0], [0.0], [5.1]]  # halves: 4 of 5
    study = judged(arm)
    row = study.row("recent", 10)
    assert vars(row.collapses) == {"arm": 4, "full": 0, "n_runs": 192}
    assert row.difference.low > -study.margin
    assert (row.verdict, study.recommended) == ("safe so far", None)
    assert "4 of 192 runs collapsed: more than 4.8 % is ruled out" in report.recommendation(study)


@pytest.fixture(scope="module")
def study():
    levels = {"recent@10": 4.0, "recent@20": 10.0, "random@10": 3.0, "random@20": 5.0}
    more = [result(key, level) for key, level in {**levels, "rewarded-recent@20": 11.0}.items()]
    more += [result("rewarded-recent@10", 9.0, noise=3.0), result("top-k@20", 10.0, tokens=111)]
    return judged(*more, best=[12.0] * N_GOALS)


def test_the_table_has_a_line_an_arm_and_the_advice_all_that_a_reader_has_to_know(study):
    table, row = report.table(study).splitlines(), study.rows[0]
    _, heads, *lines = (" ".join(line.split()) for line in table)
    assert heads == "strategy kept runs return difference to full verdict collapsed area tokens"
    assert max(map(len, table)) <= 100
    keys = [row.arm.key for row in study.rows]
    assert [line.split()[0] for line in lines[: len(keys)]] == keys
    cells = (
        "rewarded-recent@20", "20", "192", f"{row.mean.value:.2f}", row.difference.text("+"),
        "better", "0, < 1.6%", f"{row.adaptation_loss.value:+.2f}", "21.0",
    )  # fmt: skip
    assert lines[0] == " ".join(cells)
    text = " ".join(report.advice(study, "numbered anew").split())
    for said in (
        f"5% of full history's return, {study.margin:.2f} reward an episode", "Numbered anew.",
        "for 8 arms of the study together (Bonferroni)",
        "Intervals hold for these goals and new seeds",
        "Recommended for this checkpoint: rewarded-recent with 20 transitions (better)",
        "Keep the latest transitions for half of the budget",
        "reads 21.0 tokens a decision instead of 90.0", "also safe or better: recent@20.",
    ):  # fmt: skip
        assert said in text
    assert "top-k" not in text
    assert "NOT COMPRESSED" not in text
    more = judged(LIKE_FULL, result("top-k@5", 11.0, tokens=101))  # better, and saves nothing
    text = " ".join(report.recommendation(more).split())
    assert "recent with 10 transitions (safe)" in text
    assert "the smallest budget that is safe or better and saves tokens" in text
    assert finding(study).startswith("Recommended: rewarded-recent, 20 transitions: ")
    assert "(better)" in finding(study)
    arm = result("even@10", 5.0)
    arm.cost.identical_to_full = 3  # though asked for less
    assert "NOT COMPRESSED in some decisions: even@10." in report.advice(judged(arm), "p")


def test_csv_and_summary_hold_the_numbers_of_the_study(study, tmp_path):
    report.write_csv(tmp_path / "results.csv", study)
    table = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    summary = json.loads(json.dumps(report.summary(study), allow_nan=False))
    for line, record, row in zip(table, summary["rows"], study.rows, strict=True):
        assert record.pop("by_episode") == row.by_episode.tolist()
        assert record.items() >= {
            "strategy": row.arm.name, "budget": row.arm.n_keep, "difference": row.difference.value,
            "return_low": row.mean.low, "return_high": row.mean.high, "iqm": row.iqm.value,
            "iqm_of_best_high": row.iqm_of_best.high, "kept": row.kept if row.verdict else None,
            "collapsed": row.collapses.arm, "full_collapsed": row.collapses.full,
            "runs": N_GOALS * N_SEEDS, "collapse_bound": row.collapses.bound(),
        }.items()  # fmt: skip
        assert line == {name: "" if x is None else str(x) for name, x in record.items()}
    told = summary["recommended"], summary["margin"], len(summary["full_by_episode"])
    assert told == ("rewarded-recent@20", study.margin, N_EPISODES)
    assert summary["units"].keys() - record.keys() == {"by_episode"}
