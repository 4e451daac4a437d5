"""From returns to verdicts, doubts and one recommendation, on results made by hand."""

import numpy as np
import pytest

from historylens.comparison.intervals import late_scores
from historylens.comparison.policy import Cost
from historylens.comparison.study import Arm, Result, confirm, judge

N_GOALS, N_SEEDS, N_EPISODES = 4, 6, 8
FULL_TOKENS = 90


def result(arm, level, tokens=None, slow=0.0, noise=0.05, seed=0, shape=None):
    """An arm that earns `level` at the end and `slow` less in the first half."""
    shape = shape or (N_GOALS, N_SEEDS, N_EPISODES)
    rng = np.random.default_rng((seed, len(arm.key), arm.n_keep or 0))
    late = np.arange(shape[2]) >= shape[2] // 2
    returns = level - slow * ~late + noise * rng.normal(size=shape)
    n_keep = arm.n_keep or 0
    tokens = n_keep + 1 if tokens is None else tokens
    return Result(arm, returns, Cost(1, tokens, over_budget=1, kept_sum=n_keep))


def results(*more, full=10.0, empty=1.0, control=1.0, **kwargs):
    return [
        result(Arm("full"), full, FULL_TOKENS, **kwargs),
        result(Arm("empty"), empty, **kwargs),
        result(Arm("other-task"), control, FULL_TOKENS, **kwargs),
        *more,
    ]


def judged(*more, **kwargs):
    return judge(results(*more, **kwargs), margin_share=0.05)


def test_rows_are_sorted_by_return_with_verdicts_against_full():
    study = judged(
        result(Arm("recent", 10), 4.0),
        result(Arm("even", 10), 10.5),
        result(Arm("random", 10), 9.9),
        result(Arm("one-visit", 10), 9.5, noise=2.0),
    )
    means = [row.mean.value for row in study.rows]
    assert means == sorted(means, reverse=True)
    assert {row.arm.key: row.verdict for row in study.rows} == {
        "full": None, "empty": "worse", "other-task": "worse", "recent@10": "worse",
        "even@10": "better", "random@10": "safe", "one-visit@10": "inconclusive",
    }  # fmt: skip


def test_margin_is_a_part_of_what_full_history_earns_whatever_its_sign():
    losses = results(full=-10.0, empty=-50.0, control=-50.0, noise=0.0)
    assert judge(results(full=10.0, noise=0.0), 0.05).margin == pytest.approx(0.5)
    assert judge(losses, 0.1).margin == pytest.approx(1.0)


def test_differences_are_paired_run_by_run():
    common = 3 * np.random.default_rng(0).normal(size=(N_GOALS, N_SEEDS, 1))
    arms = [result(Arm("full"), 10.0, FULL_TOKENS), result(Arm("recent", 10), 10.0)]
    full, arm = (Result(each.arm, each.returns + common, each.cost) for each in arms)
    row = judge([full, arm, result(Arm("empty"), 1.0)], 0.05).row("recent", 10)
    assert row.difference.high - row.difference.low < 0.2
    assert row.mean.high - row.mean.low > 1.0
    assert row.verdict == "safe"
    difference = late_scores(arm.returns) - late_scores(full.returns)
    assert row.difference.value == pytest.approx(difference.mean())


def test_slow_adaptation_shows_in_the_area_while_the_end_is_equal():
    row = judged(result(Arm("recent", 10), 10.0, slow=4.0)).row("recent", 10)
    assert row.verdict == "safe"
    assert row.adaptation_loss.value == pytest.approx(2.0, abs=0.1)  # 4 in half of the episodes
    assert row.adaptation_loss.low > 1.8
    assert row.by_episode == pytest.approx([6.0] * 4 + [10.0] * 4, abs=0.2)


def test_parts_of_the_best_weigh_goals_alike():
    levels = np.array([10.0, 5.0, 8.0, 2.0])[:, None, None]
    given = [Result(o.arm, o.returns * 0 + levels / 2, o.cost) for o in results()]
    full = judge(given, 0.05, best=levels.ravel().tolist()).full
    assert full.part_of_best.value == pytest.approx(0.5)
    assert full.iqm_of_best.value == pytest.approx(0.5)
    for unknown in (None, [0, 1, 1, 1]):
        assert judge(given, 0.05, best=unknown).full.part_of_best is None


# The recommendation


def test_the_smallest_budget_that_is_safe_is_recommended():
    study = judged(
        result(Arm("recent", 10), 5.0),
        result(Arm("recent", 20), 10.0),
        result(Arm("recent", 40), 10.6),
    )
    assert study.recommended.arm == Arm("recent", 20)
    assert study.n_compared == 4  # empty history is compared as well, a control is not
    assert study.stands_corrected


def test_among_equal_budgets_the_highest_return_is_recommended():
    levels = {"recent": 10.0, "even": 10.4, "random": 10.2}
    study = judged(*(result(Arm(name, 20), level) for name, level in levels.items()))
    assert study.recommended.arm == Arm("even", 20)


def test_what_reads_as_much_as_full_history_is_not_recommended():
    looks_first = result(Arm("top-k", 10), 10.0, tokens=FULL_TOKENS + 11)
    assert judged(looks_first).recommended is None
    assert judged(looks_first, result(Arm("recent", 40), 10.0)).recommended.arm.n_keep == 40


def test_keeping_nothing_is_recommended_where_that_is_safe():
    study = judged(empty=9.9, control=1.0, noise=0.01)
    assert study.empty.verdict == "safe"
    assert study.recommended.arm == Arm("empty")


def test_a_verdict_that_only_one_comparison_in_many_bears_is_said_not_to_stand():
    barely = result(Arm("recent", 10), 9.75, noise=0.7, seed=7)
    alone = judged(barely)
    many = judged(barely, *(result(Arm("even", n), 1.0) for n in range(1, 60)))
    assert alone.recommended.arm == many.recommended.arm == barely.arm
    assert alone.stands_corrected
    assert not many.stands_corrected


# Doubts


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ({"empty": 10.0}, "Full history is not shown to earn more than an empty one"),
        ({"control": 10.0}, "With the control other-task it earns as much"),
    ],
)
def test_a_model_that_earns_as_much_without_its_history_is_doubted(levels, words):
    study = judged(result(Arm("recent", 10), 10.0), **levels)
    assert study.recommended is None
    (doubt,) = study.doubts
    assert doubt.startswith(words)


def test_full_history_that_earns_nothing_makes_nothing_safe():
    nothing = result(Arm("recent", 10), 0.0, noise=0.0)
    study = judged(nothing, full=0.0, empty=0.0, control=0.0, noise=0.0)
    assert study.margin == 0
    assert {row.verdict for row in study.rows} == {None, "inconclusive"}
    assert study.recommended is None
    assert study.doubts


def test_one_seed_decides_nothing():
    shape = (N_GOALS, 1, N_EPISODES)
    study = judged(result(Arm("recent", 10), 10.0, shape=shape), shape=shape)
    assert {row.verdict for row in study.rows} == {None, "inconclusive"}
    assert study.recommended is None
    assert study.doubts == ("One seed a goal gives no interval: run at least two (--seeds).",)


# Confirmation


def unsettled_study():
    """Nothing is safe; `even@10` looks best, then `random@5`."""
    return judged(
        result(Arm("recent", 10), 4.0),
        result(Arm("random", 5), 9.6, noise=3.0),
        result(Arm("even", 10), 10.2, noise=3.0),
        result(Arm("top-k", 10), 10.4, noise=3.0, tokens=FULL_TOKENS + 11),
    )


def test_the_most_promising_arm_that_saves_tokens_is_the_one_to_confirm():
    study = unsettled_study()
    assert study.recommended is None
    assert [row.arm.key for row in study.unsettled] == ["even@10", "random@5"]
    assert study.to_confirm == Arm("even", 10)


def test_nothing_is_to_confirm_where_an_arm_is_safe_or_the_model_is_doubted():
    noisy = result(Arm("random", 5), 9.6, noise=3.0)
    assert judged(noisy, result(Arm("even", 10), 10.0)).to_confirm is None
    assert judged(noisy, control=10.0).to_confirm is None
    assert judged(result(Arm("recent", 10), 4.0)).to_confirm is None


@pytest.mark.parametrize(
    ("level", "verdict"), [(10.0, "safe"), (11.0, "better"), (4.0, "worse"), (9.5, "inconclusive")]
)
def test_new_runs_alone_decide_on_the_arm_to_confirm(level, verdict):
    study, shape = unsettled_study(), (N_GOALS, 9, N_EPISODES)
    full = result(Arm("full"), 10.0, FULL_TOKENS, shape=shape)
    again = result(Arm("even", 10), level, shape=shape, seed=1, noise=0.05 + (level == 9.5))
    confirmed = confirm(study, full, again)
    confirmation, recommended = confirmed.confirmation, confirmed.recommended
    assert confirmation.row.verdict == verdict
    assert confirmation.n_seeds == 9
    difference = (late_scores(again.returns) - late_scores(full.returns)).mean()
    assert confirmation.row.difference.value == pytest.approx(difference)
    is_good = verdict in ("safe", "better")
    assert recommended is (study.row("even", 10) if is_good else None)
    assert confirmed.rows == study.rows
