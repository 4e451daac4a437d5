"""From returns to verdicts, doubts and one recommendation, on outcomes made by hand."""

import numpy as np
import pytest

from comparison.intervals import late_scores
from comparison.judgement import Arm, Outcome, confirm, judge

N_GOALS, N_SEEDS, N_EPISODES = 4, 6, 8
FULL_TOKENS = 90.0


def outcome(arm, level, tokens=None, slow=0.0, noise=0.05, seed=0, shape=None):
    """An arm that earns `level` at the end and `slow` less in the first half."""
    shape = shape or (N_GOALS, N_SEEDS, N_EPISODES)
    rng = np.random.default_rng((seed, len(arm.key), arm.n_keep or 0))
    late = np.arange(shape[2]) >= shape[2] // 2
    returns = level - slow * ~late + noise * rng.normal(size=shape)
    tokens = tokens if tokens is not None else (arm.n_keep or 0) + 1.0
    cost = {"tokens_per_decision": tokens, "kept_mean": arm.n_keep, "ms_selecting": 0.0,
            "ms_model": 0.0}  # fmt: skip
    return Outcome(arm, returns, cost)


def outcomes(*more, full=10.0, empty=1.0, control=1.0, **kwargs):
    return [
        outcome(Arm("full"), full, FULL_TOKENS, **kwargs),
        outcome(Arm("empty"), empty, **kwargs),
        outcome(Arm("other-task"), control, FULL_TOKENS, **kwargs),
        *more,
    ]


def judged(*more, **kwargs):
    return judge(outcomes(*more, **kwargs), margin_share=0.05)


def test_rows_are_sorted_by_return_with_verdicts_against_full():
    study = judged(
        outcome(Arm("recent", 10), 4.0),
        outcome(Arm("even", 10), 10.5),
        outcome(Arm("random", 10), 9.9),
        outcome(Arm("one-visit", 10), 9.5, noise=2.0),
    )
    assert [row.mean.value for row in study.rows] == sorted(
        (row.mean.value for row in study.rows), reverse=True
    )
    verdicts = {row.arm.key: row.verdict for row in study.rows}
    assert verdicts == {
        "full": None, "empty": "worse", "other-task": "worse", "recent@10": "worse",
        "even@10": "better", "random@10": "safe", "one-visit@10": "inconclusive",
    }  # fmt: skip


def test_margin_is_a_part_of_what_full_history_earns_whatever_its_sign():
    given = outcomes(full=10.0, noise=0.0)
    assert judge(given, 0.05).margin == pytest.approx(0.5)
    given = outcomes(full=-10.0, empty=-50.0, control=-50.0, noise=0.0)
    assert judge(given, 0.1).margin == pytest.approx(1.0)


def test_differences_are_paired_run_by_run():
    rng = np.random.default_rng(0)
    common = 3 * rng.normal(size=(N_GOALS, N_SEEDS, 1))
    full = outcome(Arm("full"), 10.0, FULL_TOKENS)
    arm = outcome(Arm("recent", 10), 10.0)
    paired = [
        Outcome(full.arm, full.returns + common, full.cost),
        Outcome(arm.arm, arm.returns + common, arm.cost),
        outcome(Arm("empty"), 1.0),
    ]
    study = judge(paired, 0.05)
    row = study.row("recent", 10)
    assert row.difference.high - row.difference.low < 0.2
    assert row.mean.high - row.mean.low > 1.0
    assert row.verdict == "safe"
    difference = late_scores(paired[1].returns) - late_scores(paired[0].returns)
    assert row.difference.value == pytest.approx(difference.mean())


def test_slow_adaptation_shows_in_the_area_while_the_end_is_equal():
    row = judged(outcome(Arm("recent", 10), 10.0, slow=4.0)).row("recent", 10)
    assert row.verdict == "safe"
    assert row.adaptation_loss.value == pytest.approx(2.0, abs=0.1)  # 4 in half of the episodes
    assert row.adaptation_loss.low > 1.8
    assert row.by_episode[:4] == pytest.approx([6.0] * 4, abs=0.2)
    assert row.by_episode[4:] == pytest.approx([10.0] * 4, abs=0.2)


def test_parts_of_the_best_weigh_goals_alike():
    levels = np.array([10.0, 5.0, 8.0, 2.0])[:, None, None]
    given = [Outcome(o.arm, o.returns * 0 + levels / 2, o.cost) for o in outcomes()]
    study = judge(given, 0.05, best=levels.ravel().tolist())
    assert study.full.part_of_best.value == pytest.approx(0.5)
    assert study.full.iqm_of_best.value == pytest.approx(0.5)
    assert judge(given, 0.05).full.part_of_best is None
    assert judge(given, 0.05, best=[0, 1, 1, 1]).full.part_of_best is None


# The recommendation


def test_the_smallest_budget_that_is_safe_is_recommended():
    study = judged(
        outcome(Arm("recent", 10), 5.0),
        outcome(Arm("recent", 20), 10.0),
        outcome(Arm("recent", 40), 10.6),
    )
    assert study.recommended.arm == Arm("recent", 20)
    assert study.n_compared == 4  # empty history is compared as well, a control is not
    assert study.stands_corrected


def test_among_equal_budgets_the_highest_return_is_recommended():
    study = judged(
        outcome(Arm("recent", 20), 10.0), outcome(Arm("even", 20), 10.4),
        outcome(Arm("random", 20), 10.2),
    )  # fmt: skip
    assert study.recommended.arm == Arm("even", 20)


def test_what_reads_as_much_as_full_history_is_not_recommended():
    looks_first = outcome(Arm("top-k", 10), 10.0, tokens=FULL_TOKENS + 11)
    assert judged(looks_first).recommended is None
    assert judged(looks_first, outcome(Arm("recent", 40), 10.0)).recommended.arm.n_keep == 40


def test_keeping_nothing_is_recommended_where_that_is_safe():
    study = judged(empty=9.9, control=1.0, noise=0.01)
    assert study.empty.verdict == "safe"
    assert study.recommended.arm == Arm("empty")


def test_a_verdict_that_only_one_comparison_in_many_bears_is_said_not_to_stand():
    barely = outcome(Arm("recent", 10), 9.75, noise=0.7, seed=7)
    alone = judged(barely)
    assert alone.recommended is not None
    assert alone.stands_corrected
    others = [outcome(Arm("even", n), 1.0) for n in range(1, 60)]
    many = judged(barely, *others)
    assert many.recommended.arm == alone.recommended.arm
    assert not many.stands_corrected


# Doubts


def test_a_model_that_earns_no_more_than_without_history_is_doubted():
    study = judged(outcome(Arm("recent", 10), 10.0), empty=10.0)
    assert study.recommended is None
    (doubt,) = study.doubts
    assert doubt.startswith("Full history is not shown to earn more than an empty one")


def test_a_model_that_acts_alike_on_a_control_is_doubted():
    study = judged(outcome(Arm("recent", 10), 10.0), control=10.0)
    assert study.recommended is None
    (doubt,) = study.doubts
    assert doubt.startswith("With the control other-task it earns as much")


def test_full_history_that_earns_nothing_makes_nothing_safe():
    nothing = outcome(Arm("recent", 10), 0.0, noise=0.0)
    study = judged(nothing, full=0.0, empty=0.0, control=0.0, noise=0.0)
    assert study.margin == 0
    assert {row.verdict for row in study.rows} == {None, "inconclusive"}
    assert study.recommended is None
    assert study.doubts


def test_one_seed_decides_nothing():
    shape = (N_GOALS, 1, N_EPISODES)
    study = judged(outcome(Arm("recent", 10), 10.0, shape=shape), shape=shape)
    assert {row.verdict for row in study.rows} == {None, "inconclusive"}
    assert study.recommended is None
    assert study.doubts == ("One seed a goal gives no interval: run at least two (--seeds).",)


def test_missing_baselines_and_other_shapes_are_refused():
    with pytest.raises(ValueError, match="full and empty"):
        judge([outcome(Arm("full"), 1.0)], 0.05)
    odd = outcome(Arm("recent", 10), 1.0, shape=(N_GOALS, N_SEEDS, 3))
    with pytest.raises(ValueError, match="expected returns of shape"):
        judged(odd)


# Confirmation


def unsettled_study():
    """Nothing is safe; `even@10` looks best, then `random@5`."""
    return judged(
        outcome(Arm("recent", 10), 4.0),
        outcome(Arm("random", 5), 9.6, noise=3.0),
        outcome(Arm("even", 10), 10.2, noise=3.0),
        outcome(Arm("top-k", 10), 10.4, noise=3.0, tokens=FULL_TOKENS + 11),
    )


def test_the_most_promising_arm_that_saves_tokens_is_the_one_to_confirm():
    study = unsettled_study()
    assert study.recommended is None
    assert [row.arm.key for row in study.unsettled] == ["even@10", "random@5"]
    assert study.to_confirm == Arm("even", 10)


def test_nothing_is_to_confirm_where_an_arm_is_safe_or_the_model_is_doubted():
    noisy = outcome(Arm("random", 5), 9.6, noise=3.0)
    assert judged(noisy, outcome(Arm("even", 10), 10.0)).to_confirm is None
    assert judged(noisy, control=10.0).to_confirm is None
    assert judged(outcome(Arm("recent", 10), 4.0)).to_confirm is None


@pytest.mark.parametrize(
    ("level", "verdict"), [(10.0, "safe"), (11.0, "better"), (4.0, "worse"), (9.5, "inconclusive")]
)
def test_new_runs_alone_decide_on_the_arm_to_confirm(level, verdict):
    study, shape = unsettled_study(), (N_GOALS, 9, N_EPISODES)
    full = outcome(Arm("full"), 10.0, FULL_TOKENS, shape=shape)
    again = outcome(Arm("even", 10), level, shape=shape, seed=1, noise=0.05 + (level == 9.5))
    found = confirm(study, full, again)
    assert found.confirmation.row.verdict == verdict
    assert found.confirmation.n_seeds == 9
    difference = (late_scores(again.returns) - late_scores(full.returns)).mean()
    assert found.confirmation.row.difference.value == pytest.approx(difference)
    is_good = verdict in ("safe", "better")
    assert (found.recommended is not None) == is_good
    if is_good:
        assert found.recommended.arm == Arm("even", 10)
        assert found.recommended in found.rows
    assert found.rows == study.rows
