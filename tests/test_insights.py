"""Which patterns are read off attention that was planted by hand, and what is said about them."""

import numpy as np
import pytest
from attention_rows import measured, planted, uniform

from historylens.compression import METHODS
from historylens.insights import find_patterns, remarks
from historylens.insights.patterns import PATTERNS, is_sparse

LENGTHS = (8, 20, 100, 240)
LONG = (100, 240)


def found(*layers):
    return {i.pattern for i in find_patterns(measured(*layers)) if i.layer is None}


def decay(n, n_steps):
    row = np.append(np.exp(-np.arange(n, 0, -1) / n_steps), 0.0)
    return row / row.sum()


def middle(n, width, mass=1.0):
    """Positions clear of the last quarter, and of the first as well where n leaves room."""
    first = 1 if n == 8 else n // 2 - width // 2
    return planted(n, range(first, first + width), mass)


# name -> (n -> row, the patterns that hold by the rules, at which n)
PLANTED = {
    "uniform over all tokens": (uniform, {"uniform"}, (20, 100, 240)),
    "uniform, n = 8: 1.95 nats": (uniform, set(), (8,)),
    "uniform over the context": (lambda n: planted(n, range(n)), {"uniform"}, LENGTHS),
    "one position, middle": (lambda n: planted(n, [n // 2]), {"focused", "sparse"}, LENGTHS),
    "five positions, middle": (lambda n: middle(n, 5), {"sparse"}, LENGTHS),
    "five latest": (lambda n: planted(n, range(n - 5, n)), {"recency", "sparse"}, LENGTHS),
    "six latest": (lambda n: planted(n, range(n - 6, n)), {"recency"}, LENGTHS),
    "decay over two steps": (lambda n: decay(n, 2), {"recency", "sparse"}, LENGTHS[1:]),
    "decay over ten steps": (lambda n: decay(n, 10), {"recency", "uniform"}, LONG),
    "last quarter": (lambda n: planted(n, range(n - n // 4, n)), {"recency", "uniform"}, LONG),
    "first quarter": (lambda n: planted(n, range(n // 4)), {"uniform"}, LONG),
    "the query reads itself": (lambda n: planted(n, [n // 2], 0.0), {"focused"}, LENGTHS),
    "six strong positions, faint": (lambda n: middle(n, 6, 0.66), {"focused"}, LENGTHS[1:]),
}
CASES = [(name, n) for name, (_, _, lengths) in PLANTED.items() for n in lengths]


@pytest.mark.parametrize(("name", "n"), CASES)
def test_planted_attention_is_recognised_and_nothing_else_fires(name, n):
    make, expected, _ = PLANTED[name]
    row = make(n)
    assert row.sum() == pytest.approx(1.0)
    for layers in ((row,), (row, row, row), (row.astype(np.float32),)):
        assert found(*layers) == expected
    if (name, n) in (("uniform over the context", 100), ("five latest", 100)):  # no doubt
        insights = find_patterns(measured(row))
        assert {(i.caveat, i.by_rule_only) for i in insights} == {(None, False)}
    if "decay over ten" in name or "quarter" in name:  # part of a long context is read
        doubted = {i.pattern for i in find_patterns(measured(row)) if i.by_rule_only}
        assert doubted == expected & {"uniform"}


def test_recency_goes_by_the_median_over_samples_strictly_above_the_threshold():
    even, latest = uniform(20), planted(20, [19])
    rare, often = (np.stack([latest, x, even])[:, None] for x in (even, latest))
    assert measured(rare).summaries()["recent_distant_ratio"]["mean"] > 1e6
    at = np.array([0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.2, 0.2, 0.2])  # the ratio is 2
    above = at + np.array([0, 0, 0, 0, 0, 0, 0.001, 0, -0.001])
    assert ["recency" in found(rows) for rows in (rare, often, at, above)] == [False, True] * 2


def test_sparse_needs_few_positions_their_mass_and_the_majority_of_decisions_and_says_the_share():
    even, five = uniform(100), middle(100, 5)
    assert "sparse" not in found(np.stack([even, five])[:, None])
    insights = find_patterns(measured(np.stack([even, five, five])[:, None]))
    sparse = next(insight for insight in insights if insight.pattern == "sparse")
    assert "In 67% of 3 attention rows (3 samples x 1 layer)" in sparse.evidence
    assert sparse.measured["share_of_rows"] == pytest.approx(2 / 3)
    counts, shares = np.array([0, 1, 1, 5, 6]), np.array([0.0, 0.49, 0.5, 0.9, 0.9])
    rows = {"strong_positions": counts, "strong_share": shares}
    assert is_sparse(rows).tolist() == [False, False, True, True, False]


# Nine tokens of a hundred: ln 9 = 2.197 > 2.0. A quarter that holds nearly nothing, ten times over.
NINE, FAINT = planted(100, range(40, 49)), planted(100, [50], 0.999)
FAINT[-1], FAINT[90] = 0.0, 0.001
# (row, the pattern, whether only the absolute rule holds, what its caveat says)
CAVEATS = [
    (NINE, "uniform", True, "0.48 of the maximum ln n = 4.61"),
    (uniform(1), "focused", True, "with one token there is nothing to choose."),
    (uniform(5), "focused", True, "cannot discriminate at n = 5"),
    (uniform(1), "sparse", True, "cannot discriminate at n = 1"),
    (np.array([0.1, 0.2, 0.7, 0.0]), "recency", False, "At n = 3 a quarter is one token"),
    (planted(8, range(2, 6)), "focused", True, "0.67 of the maximum ln n = 2.08, 4.0 tokens in"),
    (planted(5, [2]), "focused", False, "the history is read selectively"),
    (planted(100, range(100), 0.1), "focused", True, "Only 10% of the attention lies on history"),
    (planted(100, [50], 0.0), "focused", True, "keeps 100.0% of its attention on itself"),
    (middle(100, 6, 0.66), "focused", False, "Only 66% of the attention lies on history"),
    (FAINT, "recency", True, "holds only 0% of the attention on history"),
]


@pytest.mark.parametrize(("row", "pattern", "by_rule_only", "words"), CAVEATS)
def test_a_caveat_says_what_the_length_makes_of_the_rule(row, pattern, by_rule_only, words):
    (insight,) = (i for i in find_patterns(measured(row)) if i.pattern == pattern)
    assert words in insight.caveat
    assert insight.by_rule_only == by_rule_only
    assert insight.headline.endswith("(by the absolute rule only)") == by_rule_only


@pytest.mark.parametrize(("row", "words"), [
    (np.ones(1), "Without a history there is nothing to read"),
    (uniform(1), "With one context token there is nothing to choose from"),
    (uniform(2), "Uniform attention cannot be recognised"),
    (uniform(8), "attention is broad: 1.00 of the maximum"),
    (planted(5, [2]), "attention is narrow"),
    (planted(100, range(100), 0.1), "spread broadly"),
    (uniform(9), ""),
    (planted(100, [50]), ""),
])  # fmt: skip
def test_a_remark_says_what_the_rules_cannot(row, words):
    said = remarks(measured(row))
    assert words in said[0] if words else said == []


def test_layers_are_said_to_agree_and_those_that_differ_are_reported_beside_the_whole():
    even, one = uniform(100), planted(100, [50])
    insights = find_patterns(measured(even, even, even, one, numbers=[0, 1, 2, 5]))
    places = [("uniform", None), ("focused", 5), ("sparse", 5)]
    assert [(i.pattern, i.layer) for i in insights] == places
    assert "It holds in layers 0, 1 and 2, not in layer 5." in insights[0].evidence
    titles = "Focused attention", "Sparse attention"
    headlines = [f"💡 INSIGHT: {title} detected in layer 5!" for title in titles]
    assert [insight.headline for insight in insights[1:]] == headlines
    assert "It holds in every layer." in find_patterns(measured(even, even))[0].evidence
    assert "layer" not in find_patterns(measured(even))[0].evidence


def test_a_sharp_head_hidden_by_the_head_average_is_named_by_its_number():
    rows = np.full((3, 8, 101), 1 / 101)
    rows[:, 5] = planted(100, [50])
    (insight,) = find_patterns(measured(rows, numbers=[4], heads=[range(10, 18)]))
    assert insight.pattern == "uniform"
    assert "head 15 of layer 4 reads 1.0 in effect" in insight.evidence


WORDS = {
    "recency": ("latest K", "decay", "older", "last 10 steps"),
    "uniform": ("Diverse", "K-means", "Careful", "evenly spaced"),
    "focused": ("most of the attention", "Prune", "Importance sampling", "30%"),
    "sparse": ("above 0.1", "Top-K", "Landmarks", "5 most attended"),
}


def test_a_pattern_has_three_strategies_and_an_example_and_measures_what_it_advises():
    assert list(PATTERNS) == list(WORDS)
    for name, pattern in PATTERNS.items():
        text = " ".join([*pattern.strategies, pattern.example])
        assert len(pattern.strategies) == 3
        assert all(word in text for word in WORDS[name])
        assert {pattern.strategy, *pattern.measured} <= set(METHODS) - {"random"}
        assert pattern.headline[0] in pattern.measured
