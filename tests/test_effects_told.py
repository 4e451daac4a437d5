"""What is told of measured effects: verdicts in words, the lines of insights, JSON and table."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_effects import DRAWN, Told, effects, moved

from historylens.effects.measure import ENOUGH, ENOUGH_FLIPS, enough, has_own_size
from historylens.insights.patterns import PATTERNS


@pytest.fixture(scope="module")
def whole():
    return effects()


@pytest.mark.parametrize(("kl", "draws", "against_random", "words"), [
    (0.1, (0.2, 0.5, 0.4), "better", "Better than each of 3 random draws."),
    (0.2, (0.2, 0.5, 0.4), "alike", "Not clearly better than random: 1 of 3 random draws m"),
    (0.45, (0.2, 0.5, 0.4), "alike", "No better than random: 2 of 3 random draws moved the action "
     "distribution no more. The pattern is no guide to what can go here."),
    (0.6, (0.2, 0.5, 0.4), "worse", "Worse than each of 3 random draws: here the pattern"),
    (1e-4, (1e-4, 1e-3), "alike", "A random choice changes nothing either"),
    (0.2, (0.2 + 1e-7, 0.5, 0.4), "alike", "Not clearly better than random: 1 of 3 random draws m"),
    (0.5 + 1e-7, (0.2, 0.5, 0.4), "alike", "No better than random: 3 of 3 random draws moved"),
])  # fmt: skip
def test_better_than_random_is_better_than_every_draw(kl, draws, against_random, words):
    effect = moved(kl, random=moved(*draws))
    assert effect.against_random == against_random
    assert words in effect.verdict


def test_what_moves_a_model_no_more_than_an_untrained_one_is_named(whole):
    alone = {"empty": replace(whole.controls["empty"], flips=0.5)}
    found = replace(whole, controls=alone, twins=[1.0] * 19)
    said = "over 6 decisions the lack of any history moves the model no more than an untrained one"
    assert said in " ".join(found.text.split())


def test_enough_is_the_size_from_which_on_all_is_well_and_no_action_changes():
    ladder = [moved(x, n_keep=i) for i, x in enumerate((9, 0, 9, ENOUGH, 0))]
    assert [enough(part) for part in (ladder, ladder[:3], ladder[1:2])] == [3, None, 1]
    close, closer = ladder[3:]
    flipping, raw = replace(closer, flips=2 * ENOUGH_FLIPS), replace(close, kl_mean=9.0)
    assert [enough([close, flipping]), enough([flipping, closer])] == [None, 4]
    assert enough([raw, closer]) == 3  # how sharp the policy is says nothing


@pytest.mark.parametrize("pattern", ["recency", "uniform", "sparse"])
def test_the_line_of_an_insight_has_the_numbers_of_the_json(whole, pattern):
    name, n_keep = PATTERNS[pattern].headline
    own, random, worst = (
        next(s for s in whole.json["strategies"][one]["sizes"] if s["n_keep"] == n_keep)
        for one in (name, "random", "least-attended")
    )
    text = whole.line(pattern)
    assert f"{n_keep}" in text.split(" of 24 transitions")[0]
    assert f"action in {own['flips']:.0%} of 6 decisions (KL {own['kl_mean']:.2f}" in text
    assert f"{n_keep} random ones: {random['flips']:.0%} (KL {random['kl_mean']:.2f})" in text
    assert f"the {n_keep} least attended: {worst['flips']:.0%}" in text
    assert whole.at(name, n_keep).verdict in text


def test_the_line_stands_at_the_last_insight_of_a_pattern_and_warns_of_what_was_copied(whole):
    attached = whole.attached([Told("recency"), Told("sparse"), Told("recency")])
    assert [one.effect for one in attached] == [None, whole.line("sparse"), whole.line("recency")]
    assert "the 8 most attended of 24" in whole.line("focused")
    warning = "acts through newer tokens that have read it (KL 0.50 when no token can see it, 0.25"
    for verdict in ("read by the query itself", "not needed", "read through other tokens"):
        one = {"verdict": verdict, "all": {"kl": 0.5}, "query": {"kl": 0.25}}
        told = replace(whole, knockout={"sets": {"older than 10": one}})
        assert (warning in told.line("recency")) == (verdict == "read through other tokens")
        assert told.line("sparse") == whole.line("sparse")


def test_the_json_holds_all_that_the_picture_shows(whole):
    values = json.loads(json.dumps(whole.json, allow_nan=False))
    assert values["settings"]["samples"] == list(range(6))
    assert values["strategies"]["top-k"]["advised_by"] == ["focused", "sparse"]
    for name, curve in whole.curves.items():
        strategy = values["strategies"][name]
        for size, one in zip(strategy["sizes"], curve, strict=True):
            known = {key: x for key, x in vars(one).items() if key not in ("draws", "random")}
            known |= {"against_random": one.against_random}
            assert {key: size.get(key) for key in known} == known
            assert (one.kl_band is not None) == (name in DRAWN)
            assert size.get("random") == (one.random.json() if has_own_size(name) else None)
        assert ("enough" in strategy) != has_own_size(name)
    picture = {"strategies": values["strategies"], "empty": values["controls"]["empty"]}
    assert whole.curves_picture == picture | {"n_context": 24, "worst": "least-attended"}
    assert whole.heads_picture == {"heads": values["heads"]["heads"], "n_decisions": 6}


def test_the_table_fits_the_console_and_starts_with_the_least_harmful(whole):
    lines = whole.text.splitlines()
    assert max(map(len, lines)) <= 100
    curves = {n: curve for n, curve in whole.curves.items() if not has_own_size(n)}
    harm = {n: np.mean([one.kl_reference for one in curve]) for n, curve in curves.items()}
    least = sorted(harm, key=harm.get)  # of equal ones the first measured
    best = [name for name in least if name not in ("random", "least-attended")][:5]
    rows = {line.split()[0]: line for line in lines[2:9]}
    assert [*rows] == [name for name in least if name in (*best, "random", "least-attended")]
    for name, row in rows.items():
        cells = [cell.rstrip("+-") for cell in row.split() if "%" in cell]
        assert cells == [f"{one.flips:.0%}" for one in curves[name]]
    legend = f"decisions whose action changes; 5 of {len(curves) - 2} methods; "
    assert lines[9].startswith(legend)
    said = "on KL <= 0.09, at a reference temperature, and changes <= 25%"
    assert said in " ".join(whole.text.split())
    assert any(line.startswith("prune-low keeps ") for line in lines)
    titles = [part.split()[0] for part in whole.text.split("\n\n")]
    assert titles == ["EFFECT", "HOW", "WHICH", "READ"]
