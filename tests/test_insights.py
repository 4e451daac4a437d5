"""Which patterns are read off attention that was planted by hand, and what is said about them."""

from dataclasses import replace

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
    """Exponential decay of attention with a time constant in steps."""
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
    "one position, first": (lambda n: planted(n, [0]), {"focused", "sparse"}, LENGTHS),
    "one, latest": (lambda n: planted(n, [n - 1]), {"recency", "focused", "sparse"}, LENGTHS),
    "five positions, middle": (lambda n: middle(n, 5), {"sparse"}, LENGTHS),
    "five positions, first quarter": (lambda n: planted(n, range(5)), {"sparse"}, LENGTHS[1:]),
    "five latest": (lambda n: planted(n, range(n - 5, n)), {"recency", "sparse"}, LENGTHS),
    "six latest": (lambda n: planted(n, range(n - 6, n)), {"recency"}, LENGTHS),
    "decay over one step": (lambda n: decay(n, 1), {"recency", "focused", "sparse"}, LENGTHS),
    "decay over two steps": (lambda n: decay(n, 2), {"recency", "sparse"}, LENGTHS[1:]),
    "decay over ten steps": (lambda n: decay(n, 10), {"recency", "uniform"}, LONG),
    "last quarter": (lambda n: planted(n, range(n - n // 4, n)), {"recency", "uniform"}, LONG),
    "first quarter": (lambda n: planted(n, range(n // 4)), {"uniform"}, LONG),
    "the query reads itself": (lambda n: planted(n, [n // 2], 0.0), {"focused"}, LENGTHS),
    "six strong positions, faint": (lambda n: middle(n, 6, 0.66), {"focused"}, LENGTHS[1:]),
}
CASES = [(name, n) for name, (_, _, lengths) in PLANTED.items() for n in lengths]
PARTLY_READ = [case for case in CASES if "decay over ten" in case[0] or "quarter" in case[0]]


@pytest.mark.parametrize(("name", "n"), CASES)
def test_planted_attention_is_recognised_and_nothing_else_fires(name, n):
    make, expected, _ = PLANTED[name]
    row = make(n)
    assert row.sum() == pytest.approx(1.0)
    assert found(row) == expected
    assert found(row, row, row) == expected
    assert found(row.astype(np.float32)) == expected


@pytest.mark.parametrize(("name", "n"), PARTLY_READ)
def test_uniform_by_the_rule_alone_is_marked_where_part_of_a_long_context_is_read(name, n):
    make, expected, _ = PLANTED[name]
    doubted = {i.pattern for i in find_patterns(measured(make(n))) if i.by_rule_only}
    assert doubted == expected & {"uniform"}


@pytest.mark.parametrize("name", ["uniform over the context", "five latest"])
def test_clear_cases_carry_no_doubt(name):
    insights = find_patterns(measured(PLANTED[name][0](100)))
    assert insights
    assert all(i.caveat is None and not i.by_rule_only for i in insights)


def test_recency_goes_by_the_median_over_samples():
    even, latest = uniform(20), planted(20, [19])
    rare = np.stack([latest, even, even])[:, None]
    often = np.stack([latest, latest, even])[:, None]
    assert measured(rare).summaries()["recent_distant_ratio"].mean > 1e6
    assert "recency" not in found(rare)
    assert "recency" in found(often)


def test_thresholds_are_strict():
    at = np.array([0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.2, 0.2, 0.2])
    assert "recency" not in found(at)  # the ratio is 2
    assert "recency" in found(at + np.array([0, 0, 0, 0, 0, 0, 0.001, 0, -0.001]))


def test_sparse_needs_the_majority_of_decisions_and_says_the_share():
    even, five = uniform(100), middle(100, 5)
    assert "sparse" not in found(np.stack([even, five])[:, None])
    insights = find_patterns(measured(np.stack([even, five, five])[:, None]))
    sparse = next(insight for insight in insights if insight.pattern == "sparse")
    assert "In 67% of 3 attention rows (3 samples x 1 layer)" in sparse.evidence
    assert sparse.measured["share_of_rows"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(0, 0.0, False), (1, 0.49, False), (1, 0.5, True), (5, 0.9, True), (6, 0.9, False)],
)
def test_sparse_rule_counts_positions_and_their_mass(count, share, expected):
    assert is_sparse({"strong_positions": count, "strong_share": share}) == expected
    rows = {"strong_positions": np.array([count]), "strong_share": np.array([share])}
    assert is_sparse(rows).tolist() == [expected]


# Where the length of the context misleads


def nine_of_a_hundred():
    row = np.zeros(101)
    row[40:49] = 1 / 9  # ln 9 = 2.197 > 2.0, over 100 tokens
    return row


def faint_quarters():
    row = planted(100, [50], 0.999)
    row[-1], row[90] = 0.0, 0.001
    return row


# (row, the pattern, whether only the absolute rule holds, what its caveat says)
CAVEATS = [
    (nine_of_a_hundred(), "uniform", True, "0.48 of the maximum ln n = 4.61"),
    (nine_of_a_hundred(), "uniform", True, "effectively reads 9.0 tokens"),
    (uniform(1), "focused", True, "with one token there is nothing to choose."),
    *[(uniform(n), "focused", True, f"cannot discriminate at n = {n}") for n in range(1, 6)],
    *[(uniform(n), "sparse", True, f"cannot discriminate at n = {n}") for n in range(1, 6)],
    (np.array([0.1, 0.2, 0.7, 0.0]), "recency", False, "At n = 3 a quarter is one token"),
    (planted(8, range(2, 6)), "focused", True, "The context is short: over n = 8 tokens"),
    (planted(8, range(2, 6)), "focused", True, "0.67 of the maximum ln n = 2.08, 4.0 tokens in"),
    (planted(5, [2]), "focused", False, "cannot discriminate at n = 5"),
    (planted(5, [2]), "focused", False, "the history is read selectively"),
    (planted(100, range(100), 0.1), "focused", True, "Only 10% of the attention lies on history"),
    (planted(100, [50], 0.0), "focused", True, "keeps 100.0% of its attention on itself"),
    (middle(100, 6, 0.66), "focused", False, "Only 66% of the attention lies on history"),
    (faint_quarters(), "recency", True, "holds only 0% of the attention on history"),
]


@pytest.mark.parametrize(("row", "pattern", "by_rule_only", "words"), CAVEATS)
def test_a_caveat_says_what_the_length_makes_of_the_rule(row, pattern, by_rule_only, words):
    (insight,) = (i for i in find_patterns(measured(row)) if i.pattern == pattern)
    assert words in insight.caveat
    assert insight.by_rule_only == by_rule_only
    assert insight.headline.endswith("(by the absolute rule only)") == by_rule_only


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (uniform(1), "With one context token there is nothing to choose from"),
        *[(uniform(n), "Uniform attention cannot be recognised") for n in (2, 5, 8)],
        *[(uniform(n), "attention is broad: 1.00 of the maximum") for n in (2, 5, 8)],
        (planted(5, [2]), "attention is narrow"),
        (planted(100, range(100), 0.1), "spread broadly"),
        (uniform(9), ""),
        (planted(100, [50]), ""),
    ],
)
def test_a_remark_says_what_the_rules_cannot(row, words):
    said = remarks(measured(row))
    assert words in said[0] if words else said == []


# Layers and heads


def test_layers_that_differ_are_reported_beside_the_whole():
    even, one = uniform(100), planted(100, [50])
    insights = find_patterns(measured(even, even, even, one, numbers=[0, 1, 2, 5]))
    assert [(i.pattern, i.layer) for i in insights] == [
        ("uniform", None), ("focused", 5), ("sparse", 5),
    ]  # fmt: skip
    assert "It holds in layers 0, 1 and 2, not in layer 5." in insights[0].evidence
    assert insights[1].headline == "💡 INSIGHT: Focused attention detected in layer 5!"


def test_layers_that_agree_are_said_to():
    even = uniform(100)
    assert "It holds in every layer." in find_patterns(measured(even, even))[0].evidence
    assert "layer" not in find_patterns(measured(even))[0].evidence


def test_a_sharp_head_hidden_by_the_head_average_is_named_by_its_number():
    rows = np.full((3, 8, 101), 1 / 101)
    rows[:, 5] = planted(100, [50])
    (insight,) = find_patterns(measured(rows, numbers=[4], heads=[range(10, 18)]))
    assert insight.pattern == "uniform"
    assert "head 15 of layer 4 reads 1.0 in effect" in insight.evidence


# Words and advice


def test_headlines_and_advice_keep_their_wording():
    insights = {i.pattern: i for i in find_patterns(measured(planted(100, [99])))}
    assert insights["recency"].headline == "💡 INSIGHT: Strong recency bias detected!"
    assert insights["recency"].advice == "Consider compressing or removing distant history."
    assert insights["focused"].headline == "💡 INSIGHT: Focused attention detected!"
    assert insights["sparse"].headline == "💡 INSIGHT: Sparse attention detected!"
    assert insights["sparse"].effect is None
    assert replace(insights["sparse"], effect="2% against 11%").effect == "2% against 11%"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("recency", ("latest K", "decay", "older", "last 10 steps")),
        ("uniform", ("Diverse", "K-means", "Careful", "evenly spaced")),
        ("focused", ("most of the attention", "Prune", "Importance sampling", "30%")),
        ("sparse", ("above 0.1", "Top-K", "Landmarks", "5 most attended")),
    ],
)
def test_a_pattern_has_three_strategies_and_an_example_and_measures_what_it_advises(name, words):
    assert list(PATTERNS) == ["recency", "uniform", "focused", "sparse"]
    pattern = PATTERNS[name]
    text = " ".join([*pattern.strategies, pattern.example])
    assert len(pattern.strategies) == 3
    assert all(word in text for word in words)
    assert {pattern.strategy, pattern.headline[0], *pattern.measured} <= set(METHODS)
    assert pattern.headline[0] in pattern.measured
    assert "random" not in pattern.measured
