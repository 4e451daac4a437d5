"""What every method must keep to, whatever it looks at, and the public face of compression."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from compression_cases import histories, known, make_history, same
from hypothesis import given, settings
from hypothesis import strategies as st

from historylens.compression import METHODS, attention_pattern, compress_history, get_method
from historylens.history import History

KINDS = {kind: [n for n, m in METHODS.items() if m.kind == kind] for kind in ("strategy", "merge")}
STRATEGIES, MERGES = KINDS["strategy"], KINDS["merge"]
COMPRESSING = STRATEGIES + MERGES
UP_TO = [name for name in STRATEGIES if METHODS[name].keeps == "up to n_keep"]
DRAWN = ["random", "random-recent", "decay", "importance"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_registry_has_every_method_of_the_field():
    assert list(METHODS) == [
        "full", "empty", "random", "random-recent", "recent", "first-recent", "decay",
        "decay-spaced", "even", "diverse", "k-medoids", "one-visit", "rewarded-recent",
        "last-episodes", "best-episodes", "nearest", "accumulated-recent", "pooled-votes", "top-k",
        "top-30", "threshold", "prune-low", "importance", "landmark", "least-attended",
        "recent-summary", "centroids", "other-task", "shuffled-rewards",
    ]  # fmt: skip
    assert MERGES == ["recent-summary", "centroids"]


@pytest.mark.parametrize("name", METHODS)
def test_each_says_what_it_does_in_one_sentence_and_what_it_looks_at(name):
    method = METHODS[name]
    assert method.name == name
    assert method.rule.endswith(".")
    assert method.rule.count(". ") == 0
    assert method.source
    assert ("query_attention" in method.needs) == (method.looks_at == "query attention")


@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=6)
@given(data=st.data())
def test_strategies_keep_real_transitions_in_order_as_many_as_asked(name, data):
    history = data.draw(histories())
    n_keep = data.draw(st.integers(0, history.n + 2))
    shorter = METHODS[name].compress(history, n_keep, generator())
    expected = {"all": history.n, "none": 0}.get(METHODS[name].keeps, min(n_keep, history.n))
    if name in UP_TO:
        assert (shorter.counts <= expected).all()
        assert shorter.n == shorter.counts.max()
    else:
        assert shorter.counts.tolist() == [expected] * history.size
    if shorter.kept is None:
        assert shorter is history
        return
    assert shorter.kept.dtype == torch.int64
    for b, count in enumerate(shorter.counts.tolist()):
        padding, kept = shorter.kept[b].split([shorter.n - count, count])
        assert (padding == -1).all()
        assert (kept.diff() > 0).all()
        assert ((kept >= 0) & (kept < history.n)).all()
        for part, whole in zip(shorter.inputs[:4], history.inputs, strict=False):
            assert torch.equal(part[b, shorter.n - count :], whole[b, kept])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", [generator, np.random.default_rng])
@settings(max_examples=4)
@given(n=st.integers(0, 20), seed=st.integers(0, 2**31))
def test_the_same_seed_does_the_same_and_changes_nothing_given(name, make, n, seed):
    history = make_history(size=4, n=n, seed=seed)
    before = {key: value.clone() for key, value in known(history).items()}
    first, again = (METHODS[name].compress(history, n // 2, make(seed)) for _ in range(2))
    assert same(first, again)
    assert all(torch.equal(value, getattr(history, key)) for key, value in before.items())


@pytest.mark.parametrize("name", [n for n in COMPRESSING if n not in DRAWN])
def test_no_other_history_of_the_batch_and_no_generator_has_a_say(name):
    history = make_history(size=5, n=23, seed=3)
    together = METHODS[name].compress(history, 9)
    assert same(together, METHODS[name].compress(history, 9, generator()))
    for rows, part in together.by_count():
        for b, row in enumerate(rows.tolist()):
            alone = METHODS[name].compress(history.rows(slice(row, row + 1)), 9)
            for one, other in zip(part.inputs, alone.inputs, strict=True):
                assert torch.equal(one[b], other[0])


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_drawn_follows_the_generator_and_needs_one(name):
    history, method = make_history(size=3, n=60), METHODS[name]
    one, other = (method.compress(history, 20, generator(seed)).kept for seed in (0, 1))
    assert not torch.equal(one, other)
    with pytest.raises(ValueError, match="Generator"):
        method.compress(history, 20)


@pytest.mark.parametrize("name", [n for n in COMPRESSING if n != "empty"])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_enough_budget_gives_the_history_itself_whatever_is_known_of_it(name, n):
    bare = History(*make_history(size=2, n=n).inputs[:4])
    for n_keep in (n, n + 1, 1000):
        assert METHODS[name].compress(bare, n_keep) is bare


@pytest.mark.parametrize("name", [n for n in COMPRESSING if n != "full"])
def test_a_budget_of_nothing_keeps_nothing(name):
    history = make_history(size=2, n=6)
    for n_keep in (0, 1000) if name == "empty" else (0,):
        assert METHODS[name].compress(history, n_keep).kept.shape == (2, 0)


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].needs])
def test_a_history_that_lacks_what_is_looked_at_is_refused(name):
    field = METHODS[name].needs[0]
    lacking = replace(make_history(size=2, n=6), **{field: None})
    with pytest.raises(ValueError, match=f"'{name}' looks at {field}, which this history lacks"):
        METHODS[name].compress(lacking, 3)


@pytest.mark.parametrize("name", ["recent", "full", "centroids", "shuffled-rewards"])
@pytest.mark.parametrize("wrong", [-1, 2.5, "3", None])
def test_a_budget_that_is_no_whole_number_is_refused(name, wrong):
    with pytest.raises(ValueError, match="n_keep as a whole number"):
        METHODS[name].compress(make_history(), wrong)


def test_an_unknown_method_is_named_with_the_nearest_known():
    assert get_method("centroids") is METHODS["centroids"]
    with pytest.raises(ValueError, match=r"unknown strategy 'recnt': did you mean 'recent'\?"):
        get_method("recnt")
    with pytest.raises(ValueError, match="'other-task': There are: full, empty"):
        get_method("other-task")  # a control compresses nothing


class TestAttentionPattern:
    @pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 40, 500])
    def test_even_attention_is_uniform_at_every_length(self, n):
        for weight in (1 / (n + 1), 1.0, 0.0):
            assert attention_pattern(torch.full((n,), weight)) == "uniform"

    @pytest.mark.parametrize("n", [4, 8, 40, 500])
    def test_rising_attention_is_recency(self, n):
        weights = torch.arange(1, n + 1).double() ** 2
        assert attention_pattern(weights / weights.sum()) == "recency"

    def test_a_few_strong_positions_are_sparse(self):
        weights = np.full(60, 0.1 / 57)
        weights[[2, 31, 57]] = 0.3
        assert attention_pattern(weights) == "sparse"

    def test_attention_that_prefers_without_strong_positions_is_focused(self):
        weights = torch.full((60,), 1e-4)
        weights[[2, 3, 4, 30, 31, 32, 56, 57]] = 0.04
        assert attention_pattern(weights) == "focused"


class TestCompressHistory:
    def context(self, n):
        return tuple(part[0] for part in make_history(size=1, n=n, seed=n).inputs[:4])

    @pytest.mark.parametrize(
        ("pattern", "weights", "kept"),
        [
            ("recency", 2.0 ** torch.arange(-12, 0), [8, 9, 10, 11]),
            (
                "sparse",
                torch.tensor([0.01, 0.3, 0.01, 0.01, 0.01, 0.2, 0.01, 0.4] + [0.01] * 4),
                [1, 5, 7, 11],  # the last of equals fills up
            ),
            ("uniform", torch.full((12,), 1 / 13), [0, 3, 7, 11]),
        ],
    )
    def test_keeps_what_the_pattern_of_attention_suggests(self, pattern, weights, kept):
        assert attention_pattern(weights) == pattern
        context = self.context(12)
        own_last = torch.cat([weights, torch.tensor([0.02])])  # the query's own is no transition's
        for given_weights in (weights, own_last, own_last.tolist()):
            shorter = compress_history(*context, given_weights, k=4)
            for before, after in zip(context, shorter, strict=True):
                assert torch.equal(after, before[kept])

    @settings(max_examples=40)
    @given(
        n=st.integers(0, 14),
        k=st.integers(0, 16),
        seed=st.integers(0, 99),
        name=st.sampled_from([None, *(n for n in COMPRESSING if n not in ("full", "empty"))]),
    )
    def test_works_for_any_k_and_n(self, n, k, seed, name):
        history = make_history(size=1, n=n, seed=seed)
        context = tuple(part[0] for part in history.inputs[:4])
        names = ("query_states", "episodes", "received", "last_rows")
        more = {field: getattr(history, field)[0] for field in names}
        weights = history.query_attention[0]
        shorter = compress_history(
            *context, weights, k=k, strategy=name, generator=generator(), **more
        )
        length = len(shorter[1])
        assert length <= min(k, n) if name in UP_TO else length == min(k, n)
        assert shorter[0].shape == shorter[3].shape == (length, 2)
        assert shorter[1].shape == shorter[2].shape == (length,)
        if k >= n:
            assert all(a is b for a, b in zip(shorter, context, strict=True))

    def test_a_method_can_be_chosen_whatever_the_attention(self):
        context = self.context(12)
        for weights in (2.0 ** torch.arange(-12, 0), None):
            shorter = compress_history(*context, weights, k=4, strategy="even")
            assert torch.equal(shorter[0], context[0][[0, 3, 7, 11]])
        assert len(compress_history(*context, None, k=40, strategy="empty")[1]) == 0

    @pytest.mark.parametrize(
        ("weights", "options", "message"),
        [
            (torch.ones(5), {}, r"shape \(6,\), or \(7,\)"),
            (None, {}, "name of a strategy"),
            (torch.ones(6), {"strategy": "best"}, "unknown strategy 'best'"),
            (torch.ones(6), {"strategy": "best-episodes"}, "looks at episodes"),
            (torch.tensor([0.1, -1, 0, 0, 0, 0]), {}, "after the softmax"),
            (torch.ones(6), {"episodes": torch.zeros(5)}, r"episodes of shape \(1, 6\)"),
            (torch.ones(6), {"k": -1}, "n_keep as a whole number"),
        ],
    )
    def test_wrong_input_is_refused_with_what_was_expected(self, weights, options, message):
        with pytest.raises(ValueError, match=message):
            compress_history(*self.context(6), weights, **{"k": 2, **options})
