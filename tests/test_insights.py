"""Which patterns are read off attention that was planted by hand, and what is said about them."""

from dataclasses import replace

import numpy as np
import pytest

from attention.advice import PATTERNS
from attention.evidence import cap, is_sparse, layer_list
from attention.insights import find_patterns, remarks
from attention.metrics import collect
from attention.samples import Sample

LENGTHS = (8, 20, 100, 240)


def measured(*layers, n_samples=3, n_heads=2):
    """Layers are rows `(T,)`, the same for every sample and head, or whole `(B, H, T)`."""
    rows = [
        np.broadcast_to(r, (n_samples, n_heads, np.shape(r)[-1])) if np.ndim(r) == 1 else r
        for r in layers
    ]
    n = rows[0].shape[-1] - 1
    samples = [
        Sample(i, f"sample {i}", n, np.array([0]), np.zeros(n, bool)) for i in range(len(rows[0]))
    ]
    return collect(rows, samples)


def found(*layers, **kwargs):
    return {i.pattern for i in find_patterns(measured(*layers, **kwargs)) if i.layer is None}


def planted(n, positions, mass=1.0):
    """Mass spread equally over some context tokens; the query keeps the rest."""
    row = np.zeros(n + 1)
    row[list(positions)] = mass / len(list(positions))
    row[n] = 1 - mass
    return row


def decay(n, n_steps):
    """Exponential decay of attention with a time constant in steps."""
    row = np.append(np.exp(-np.arange(n, 0, -1) / n_steps), 0.0)
    return row / row.sum()


def five(n):
    """Five positions clear of the last quarter, and of the first as well where n leaves room."""
    return range(1, 6) if n == 8 else range(n // 2 - 2, n // 2 + 3)


# name -> (n -> row, the patterns that hold by the rules, at which n)
PLANTED = {
    "uniform over all tokens": (lambda n: np.full(n + 1, 1 / (n + 1)), {"uniform"}, (20, 100, 240)),
    "uniform, n = 8: 1.95 nats": (lambda n: np.full(n + 1, 1 / (n + 1)), set(), (8,)),
    "uniform over the context": (lambda n: planted(n, range(n)), {"uniform"}, LENGTHS),
    "one position, middle": (lambda n: planted(n, [n // 2]), {"focused", "sparse"}, LENGTHS),
    "one position, first": (lambda n: planted(n, [0]), {"focused", "sparse"}, LENGTHS),
    "one position, latest": (
        lambda n: planted(n, [n - 1]),
        {"recency", "focused", "sparse"},
        LENGTHS,
    ),
    "five positions, middle": (lambda n: planted(n, five(n)), {"sparse"}, LENGTHS),
    "five positions, first quarter": (lambda n: planted(n, range(5)), {"sparse"}, (20, 100, 240)),
    "five positions, latest": (
        lambda n: planted(n, range(n - 5, n)),
        {"recency", "sparse"},
        LENGTHS,
    ),
    "recency, six latest": (lambda n: planted(n, range(n - 6, n)), {"recency"}, LENGTHS),
    "recency, decay over one step": (
        lambda n: decay(n, 1),
        {"recency", "focused", "sparse"},
        LENGTHS,
    ),
    "recency, decay over two steps": (lambda n: decay(n, 2), {"recency", "sparse"}, (20, 100, 240)),
    "recency, decay over ten steps": (lambda n: decay(n, 10), {"recency", "uniform"}, (100, 240)),
    "recency, last quarter": (
        lambda n: planted(n, range(n - n // 4, n)),
        {"recency", "uniform"},
        (100, 240),
    ),
    "first quarter": (lambda n: planted(n, range(n // 4)), {"uniform"}, (100, 240)),
    "the query reads itself": (lambda n: planted(n, [n // 2], 0.0), {"focused"}, LENGTHS),
    "six strong positions, faint": (
        lambda n: planted(n, range(n // 2 - 3, n // 2 + 3), 0.66),
        {"focused"},
        (20, 100, 240),
    ),
}
CASES = [(name, n) for name, (_, _, lengths) in PLANTED.items() for n in lengths]


@pytest.mark.parametrize(("name", "n"), CASES)
def test_planted_attention_is_recognised_and_nothing_else_fires(name, n):
    make, expected, _ = PLANTED[name]
    row = make(n)
    assert row.sum() == pytest.approx(1.0)
    assert found(row) == expected
    assert found(row, row, row) == expected
    assert found(row.astype(np.float32)) == expected


@pytest.mark.parametrize(
    ("name", "n"), [case for case in CASES if "decay over ten" in case[0] or "quarter" in case[0]]
)
def test_uniform_by_the_rule_alone_is_marked_where_part_of_a_long_context_is_read(name, n):
    make, expected, _ = PLANTED[name]
    doubted = {i.pattern for i in find_patterns(measured(make(n))) if i.by_rule_only}
    assert doubted == expected & {"uniform"}


@pytest.mark.parametrize("name", ["uniform over the context", "five positions, latest"])
def test_clear_cases_carry_no_doubt(name):
    insights = find_patterns(measured(PLANTED[name][0](100)))
    assert insights
    assert all(i.caveat is None and not i.by_rule_only for i in insights)


def test_recency_goes_by_the_median_over_samples():
    even = np.full(21, 1 / 21)
    latest = planted(20, [19])
    rare = np.stack([latest, even, even])[:, None]
    often = np.stack([latest, latest, even])[:, None]
    assert measured(rare).overall()["recent_distant_ratio"].mean > 1e6
    assert "recency" not in found(rare)
    assert "recency" in found(often)


def test_thresholds_are_strict():
    n = 8
    at = np.array([0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.2, 0.2, 0.2])
    ratio = measured(at).overall()["recent_distant_ratio"].median
    assert ratio <= 2.0
    assert "recency" not in found(at)
    above = at + np.array([0, 0, 0, 0, 0, 0, 0.001, 0, -0.001])
    assert "recency" in found(above)
    assert n == at.size - 1


def test_sparse_needs_the_majority_of_decisions_and_says_the_share():
    even, five_rows = np.full(101, 1 / 101), planted(100, five(100))
    half = np.stack([even, five_rows])[:, None]
    most = np.stack([even, five_rows, five_rows])[:, None]
    assert "sparse" not in found(half)
    sparse = next(i for i in find_patterns(measured(most)) if i.pattern == "sparse")
    assert "In 67% of 3 attention rows (3 samples x 1 layer)" in sparse.evidence
    assert sparse.measured["share_of_rows"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(0, 0.0, False), (1, 0.49, False), (1, 0.5, True), (5, 0.9, True), (6, 0.9, False)],
)
def test_sparse_rule_counts_positions_and_their_mass(count, share, expected):
    values = {"strong_positions": np.array([count]), "strong_share": np.array([share])}
    assert is_sparse(values).tolist() == [expected]


def test_uniform_by_the_absolute_rule_says_what_the_length_makes_of_it():
    row = np.append(np.zeros(100), 0.0)
    row[40:49] = 1 / 9  # ln 9 = 2.197 > 2.0, over 100 tokens
    (insight,) = find_patterns(measured(row))
    assert insight.pattern == "uniform"
    assert insight.by_rule_only
    assert "0.48 of the maximum ln n = 4.61" in insight.caveat
    assert "effectively reads 9.0 tokens" in insight.caveat
    assert insight.headline.endswith("(by the absolute rule only)")


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_focused_and_sparse_cannot_discriminate_in_a_short_context(n):
    insights = find_patterns(measured(np.full(n + 1, 1 / (n + 1))))
    assert [i.pattern for i in insights] == ["focused", "sparse"]
    assert all("cannot discriminate at n = " in i.caveat and i.by_rule_only for i in insights)


def test_one_token_leaves_nothing_to_choose():
    focused = find_patterns(measured(np.array([0.5, 0.5])))[0]
    assert focused.caveat.endswith("with one token there is nothing to choose.")


def test_a_quarter_of_one_token_is_a_caveat_of_recency():
    recency = find_patterns(measured(np.array([0.1, 0.2, 0.7, 0.0])))[0]
    assert "At n = 3 a quarter is one token" in recency.caveat
    assert not recency.by_rule_only


def test_most_of_a_short_context_is_no_preference():
    focused = find_patterns(measured(planted(8, range(2, 6))))[0]  # ln 4 = 1.39 of ln 8 = 2.08
    assert focused.by_rule_only
    assert focused.caveat.startswith("The context is short")
    assert "0.67 of the maximum ln n = 2.08, 4.0 tokens in effect" in focused.caveat


def test_one_position_of_five_is_focused_beyond_doubt_of_length():
    focused = find_patterns(measured(planted(5, [2])))[0]
    assert focused.pattern == "focused"
    assert "cannot discriminate" in focused.caveat
    assert "read selectively" in focused.caveat
    assert not focused.by_rule_only


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_a_remark_says_where_uniform_attention_is_out_of_reach(n):
    even = np.full(n + 1, 1 / (n + 1))
    (remark,) = remarks(measured(even))
    assert remark.startswith("With one context" if n == 1 else "Uniform attention cannot be recog")
    if n > 1:
        assert "For its length attention is broad: 1.00 of the maximum" in remark


def test_no_remark_where_the_rules_can_speak():
    assert remarks(measured(np.full(10, 1 / 10))) == []
    assert remarks(measured(planted(100, [50]))) == []


def test_an_even_but_faint_reading_is_remarked_and_not_called_focused_by_length():
    row = planted(100, range(100), 0.1)
    result = measured(row)
    (focused,) = find_patterns(result)
    assert focused.pattern == "focused"
    assert focused.by_rule_only
    assert "Only 10% of the attention lies on history" in focused.caveat
    assert "spread broadly" in remarks(result)[0]


def test_a_history_that_is_hardly_read_is_not_called_a_preference():
    (focused,) = find_patterns(measured(planted(100, [50], 0.0)))
    assert focused.by_rule_only
    assert "keeps 100.0% of its attention on itself" in focused.caveat


def test_half_selective_reading_keeps_its_finding_with_the_mass_in_the_caveat():
    (focused,) = find_patterns(measured(planted(100, range(47, 53), 0.66)))
    assert not focused.by_rule_only
    assert "Only 66% of the attention lies on history" in focused.caveat


def test_a_ratio_of_faint_quarters_is_doubted():
    row = planted(100, [50], 0.999)
    row[-1] = 0.0
    row[90] = 0.001
    recency = find_patterns(measured(row))[0]
    assert recency.pattern == "recency"
    assert recency.by_rule_only
    assert "holds only 0% of the attention on history" in recency.caveat


def test_layers_that_differ_are_reported_beside_the_whole():
    even, one = np.full(101, 1 / 101), planted(100, [50])
    insights = find_patterns(measured(even, even, even, one))
    assert [(i.pattern, i.layer) for i in insights] == [
        ("uniform", None), ("focused", 3), ("sparse", 3),
    ]  # fmt: skip
    assert "It holds in layers 0, 1 and 2, not in layer 3." in insights[0].evidence
    assert insights[1].headline == "💡 INSIGHT: Focused attention detected in layer 3!"


def test_layers_that_agree_are_said_to():
    even = np.full(101, 1 / 101)
    assert "It holds in every layer." in find_patterns(measured(even, even))[0].evidence
    assert "layer" not in find_patterns(measured(even))[0].evidence


def test_a_sharp_head_hidden_by_the_head_average_is_named():
    heads = np.full((3, 8, 101), 1 / 101)
    heads[:, 5] = planted(100, [50])
    (insight,) = find_patterns(measured(heads))
    assert insight.pattern == "uniform"
    assert "head 5 of layer 0 reads 1.0 in effect" in insight.evidence


def test_headlines_and_advice_keep_their_wording():
    insights = {i.pattern: i for i in find_patterns(measured(planted(100, [99])))}
    assert insights["recency"].headline == "💡 INSIGHT: Strong recency bias detected!"
    assert insights["recency"].advice == "Consider compressing or removing distant history."
    assert insights["focused"].headline == "💡 INSIGHT: Focused attention detected!"
    assert insights["sparse"].headline == "💡 INSIGHT: Sparse attention detected!"


def test_every_pattern_has_three_strategies_and_an_example():
    words = {
        "recency": ("latest K", "decay", "older", "last 10 steps"),
        "uniform": ("Diverse", "K-means", "Careful", "evenly spaced"),
        "focused": ("most of the attention", "Prune", "Importance sampling", "30%"),
        "sparse": ("above 0.1", "Top-K", "Landmarks", "5 most attended"),
    }
    assert list(PATTERNS) == list(words)
    for name, expected in words.items():
        text = " ".join([*PATTERNS[name].strategies, PATTERNS[name].example])
        assert all(word in text for word in expected), name


def test_a_measured_effect_can_be_attached():
    insight = find_patterns(measured(planted(100, [99])))[0]
    assert insight.effect is None
    assert replace(insight, effect="2% against 11%").effect == "2% against 11%"


def test_numbers_and_layers_read_as_words():
    assert [cap(x) for x in (3.104, 1000.0, 1000.01, 1e10)] == ["3.10", "1000.00", "> 1000"] + [
        "> 1000"
    ]
    assert [layer_list(x) for x in ([2], [0, 1], [0, 1, 3])] == [
        "layer 2", "layers 0 and 1", "layers 0, 1 and 3",
    ]  # fmt: skip
