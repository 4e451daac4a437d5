"""The table, the recommendation, csv and json of a judged comparison, and its pictures."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_study import N_EPISODES, N_GOALS, judged, result, results

from historylens.comparison import report
from historylens.comparison.study import Arm, judge
from historylens.pictures.returns import Picture, draw_by_budget, draw_by_episode, finding, spread

PICTURE = Picture("a model in a room", "4 goals x 6 seeds", best=12.0, n_max=99)


@pytest.fixture(scope="module")
def study():
    return judge(
        results(
            result(Arm("recent", 10), 4.0),
            result(Arm("recent", 20), 10.0),
            result(Arm("random", 10), 3.0),
            result(Arm("random", 20), 5.0),
            result(Arm("rewarded-recent", 10), 9.0, noise=3.0),
            result(Arm("rewarded-recent", 20), 11.0),
            result(Arm("top-k", 20), 10.0, tokens=111),
        ),
        0.05,
        best=[12.0] * N_GOALS,
    )


# Console


def test_the_table_has_a_line_an_arm_the_highest_return_first(study):
    _, heads, *lines = report.table(study).splitlines()
    assert " ".join(heads.split()) == (
        "strategy kept return [95 % CI] IQM difference to full verdict area tokens ms"
    )
    keys = [line.split()[0] for line in lines[: len(study.rows)]]
    assert keys == [row.arm.key for row in study.rows]
    row = study.rows[0]
    cells = [
        "rewarded-recent@20", "20", row.mean.text(), f"{row.iqm.value:.2f}",
        row.difference.text("+"), "better", f"{row.adaptation_loss.value:+.2f}", "21.0", "0.00",
    ]  # fmt: skip
    assert " ".join(lines[0].split()) == " ".join(cells)


def test_the_advice_states_margin_positions_and_number_of_comparisons(study):
    text = " ".join(report.advice(study, "numbered anew").split())
    assert f"5% of full history's return, {study.margin:.2f} reward an episode" in text
    assert "Numbered anew." in text
    assert "8 arms are compared with full history" in text
    assert "Intervals hold for these goals and new seeds" in text


def test_an_arm_that_kept_everything_though_asked_for_less_is_named():
    given = results(result(Arm("recent", 10), 5.0), result(Arm("even", 10), 5.0))
    given[-1] = replace(given[-1], cost=replace(given[-1].cost, identical_to_full=3))
    assert "NOT COMPRESSED in some decisions: even@10." in report.advice(judge(given, 0.05), "p")
    assert "NOT COMPRESSED" not in report.advice(judge(given[:-1], 0.05), "p")


def test_the_recommendation_says_which_why_and_what_else(study):
    text = report.recommendation(study)
    assert "Recommended for this checkpoint: rewarded-recent with 20 transitions (better)" in text
    assert "Keep the latest transitions for half of the budget" in text
    assert "reads 21.0 tokens a decision instead of 90.0" in text
    assert "also safe or better: recent@20." in text
    assert "top-k" not in text

    text = report.recommendation(judged(result(Arm("recent", 10), 10.0, slow=4.0)))
    assert "But it adapts more slowly: 1.99 [1.9" in text


def test_without_a_safe_arm_it_says_so_and_what_may_settle_it():
    text = report.recommendation(judged(result(Arm("recent", 10), 9.4, noise=3.0)))
    assert text.startswith("No recommendation")
    assert "1 is inconclusive, the most promising recent@10: " in text
    assert "--strategies recent --budgets 10 --seeds 32, or --full" in text
    assert "inconclusive" not in report.recommendation(judged(result(Arm("recent", 10), 1.0)))


# Files


def test_csv_and_summary_hold_the_numbers_of_the_study(study, tmp_path):
    report.write_csv(tmp_path / "results.csv", study)
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
    table = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    summary = json.loads(json.dumps(report.summary(study), allow_nan=False))
    for line, record, row in zip(table, summary["rows"], study.rows, strict=True):
        assert record["by_episode"] == row.by_episode.tolist()
        assert (record["strategy"], record["budget"]) == (row.arm.name, row.arm.n_keep)
        assert (record["return_low"], record["return_high"]) == (row.mean.low, row.mean.high)
        assert record["difference"] == row.difference.value
        assert record["iqm_of_best_high"] == row.iqm_of_best.high
        assert record["kept"] == (row.kept if row.verdict else None)
        assert line == {
            name: str(record[name] if record[name] is not None else "") for name in line
        }
        assert record.keys() == line.keys() | {"by_episode"}
    assert summary["recommended"] == "rewarded-recent@20"
    assert summary["margin"] == study.margin
    assert len(summary["full_by_episode"]) == N_EPISODES
    assert summary["units"].keys() <= record.keys()


# Pictures


def drawn(study, folder, picture=PICTURE):
    folder.mkdir(exist_ok=True)
    draw_by_budget(folder / "budget.png", study, picture)
    draw_by_episode(folder / "episode.png", study, picture)
    return [(folder / name).read_bytes() for name in ("budget.png", "episode.png")]


def test_pictures_are_the_same_bytes_for_the_same_study_and_follow_it(study, tmp_path):
    one, again = drawn(study, tmp_path / "one"), drawn(study, tmp_path / "two")
    assert one == again
    assert all(png.startswith(b"\x89PNG") for png in one)
    changed = judge(results(result(Arm("recent", 10), 9.0), result(Arm("recent", 20), 3.0)), 0.05)
    for before, after in zip(one, drawn(changed, tmp_path / "one"), strict=True):
        assert before != after


ONE = (N_GOALS, 1, 1)
UNUSUAL = {
    "no arm": judged(),
    "one seed": judged(result(Arm("random", 1), 3.0, shape=ONE), shape=ONE),
    "many budgets": judged(*(result(Arm("even", n), 5.0) for n in (1, 2, 3, 5, 8))),
    "losses": judged(result(Arm("random", 4), -30.0), full=-10.0, empty=-50.0, control=-50.0),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_studies_are_drawn(kind, tmp_path):
    drawn(UNUSUAL[kind], tmp_path, replace(PICTURE, best=None if kind == "losses" else 12.0))


def test_the_line_below_the_title_says_what_was_found(study):
    assert finding(study).startswith("Recommended: rewarded-recent, 20 transitions: ")
    assert "(better)" in finding(study)
    assert "No shorter history is shown" in finding(judged(result(Arm("recent", 10), 1.0)))
    assert "not shown to use its history" in finding(judged(empty=10.0))


@settings(max_examples=20)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.001, 0.1))
def test_labels_keep_their_order_and_their_distance(places, gap):
    places = sorted(places)
    moved = spread(places, gap)
    steps = np.diff(moved)
    if (len(places) - 1) * gap < 1:
        assert (steps >= gap - 1e-9).all()
    assert min(moved) >= -1e-9
    assert max(moved) <= 1 + 1e-9
    if len(places) == 1 or np.diff(places).min() >= gap:
        assert moved == pytest.approx(places)
