"""What every method must keep to, whatever it looks at, and the public face of compression."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from compression_cases import generator, histories, make_history, same
from hypothesis import given, settings
from hypothesis import strategies as st

from historylens.compression import METHODS, attention_pattern, compress_history, get_method
from historylens.compression.method import HOW_TO_KNOW
from historylens.history import LOOKS, History

EVERY = [*METHODS, "head-1-2"]
STRATEGIES = [name for name in EVERY if METHODS[name].kind == "strategy"]
COMPRESSING = [name for name in EVERY if METHODS[name].kind != "control"]
CONTROLS = [name for name in EVERY if METHODS[name].kind == "control"]
RANDOM = ["random", "random-recent", "decay", "importance", *CONTROLS]


@pytest.mark.parametrize("name", EVERY)
def test_each_says_what_it_does_and_looks_at_and_refuses_a_wrong_budget_and_what_lacks_it(name):
    method, history = METHODS[name], make_history(size=2, n=6)
    assert (method.name, method.source != "") == (name, True)
    assert f"{method.rule} ".find(". ") == len(method.rule) - 1  # a sentence
    of_query = {"query_attention", "head_attention", "norm", "contribution"}
    assert bool(of_query & {*method.needs}) == (method.looks_at == "query attention")
    for wrong in (-1, 2.5, "3", None):
        with pytest.raises(ValueError, match="n_keep as a whole number"):
            method.compress(history, wrong)
    for field in {*HOW_TO_KNOW} & {*method.needs}:  # the others every history has
        with pytest.raises(ValueError, match=f"'{name}' looks at {field}, which this history lac"):
            method.compress(replace(history, **{field: None}), 3)


@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=6)
@given(data=st.data())
def test_strategies_keep_real_transitions_in_order_as_many_as_asked(name, data):
    history = data.draw(histories())
    n_keep = data.draw(st.integers(0, history.n + 2))
    shorter = METHODS[name].compress(history, n_keep, generator())
    expected = {"all": history.n, "none": 0}.get(METHODS[name].keeps, min(n_keep, history.n))
    if METHODS[name].keeps == "up to n_keep":
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


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("make", [generator, np.random.default_rng])
@settings(max_examples=4)
@given(n=st.integers(0, 20), seed=st.integers(0, 2**31))
def test_the_same_seed_does_the_same_and_changes_nothing_given(name, make, n, seed):
    history = make_history(size=4, n=n, seed=seed)
    first, again = (METHODS[name].compress(history, n // 2, make(seed)) for _ in range(2))
    assert same(first, again)
    assert same(history, make_history(size=4, n=n, seed=seed))


@pytest.mark.parametrize("name", [n for n in COMPRESSING if n not in RANDOM])
def test_no_other_history_of_the_batch_and_no_generator_has_a_say(name):
    history = make_history(size=5, n=23, seed=3)
    together = METHODS[name].compress(history, 9)
    assert same(together, METHODS[name].compress(history, 9, generator()))
    for rows, part in together.by_count():
        for b, row in enumerate(rows.tolist()):
            alone = METHODS[name].compress(history.rows(slice(row, row + 1)), 9)
            for one, other in zip(part.inputs, alone.inputs, strict=True):
                assert torch.equal(one[b], other[0])


@pytest.mark.parametrize("name", RANDOM)
def test_what_is_drawn_follows_the_generator_and_needs_one(name):
    history, method = make_history(size=6, n=60), METHODS[name]
    one, other = (method.compress(history, 20, generator(seed)) for seed in (0, 1))
    assert not same(one, other)
    with pytest.raises(ValueError, match="Generator"):
        method.compress(history, 20)


@pytest.mark.parametrize("name", COMPRESSING)
@pytest.mark.parametrize("n", [0, 1, 7])
def test_a_budget_of_nothing_keeps_nothing_and_enough_gives_the_history_itself(name, n):
    bare = History(*make_history(size=2, n=n).inputs[:4])  # whatever is known of it
    for n_keep in (0, n, n + 1, 1000):
        shorter = METHODS[name].compress(bare, n_keep)
        assert shorter.n == {"full": n, "empty": 0}.get(name, min(n_keep, n))
        assert (shorter is bare) == (shorter.n == n)


def test_an_unknown_method_is_named_with_the_nearest_known():
    for name, words in (
        ("recnt", r"unknown strategy 'recnt': did you mean 'recent'\?"),
        ("other-task", "'other-task': there are: full, empty"),  # a control compresses nothing
        *((f"head-{bad}", f"unknown strategy 'head-{bad}'.*, and head-LAYER-HEAD$")
          for bad in ("1", "1-", "1-3-4", "-1-3", "a-b", "1.0-3")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            get_method(name)
        assert name not in METHODS or name == "other-task"


def test_a_head_that_the_model_lacks_is_refused_in_a_line():
    history = make_history(size=2, n=9)  # two layers of three heads
    words = "Keep the transitions that head 2 of layer 0 attends most."
    assert get_method("head-0-2").rule == words
    for name in ("head-2-0", "head-0-3", "head-10-10"):
        words = rf"^expected a layer in 0\.\.1 and a head in 0\.\.2, got '{name}'$"
        with pytest.raises(ValueError, match=words):
            get_method(name).compress(history, 4)
    history.head_attention[:, 1, 2] = torch.nan  # layer 1 has two
    assert get_method("head-1-1").compress(history, 2).n == 2
    with pytest.raises(ValueError, match="layer 1 has fewer heads: got 'head-1-2'"):
        get_method("head-1-2").compress(history, 2)


def test_even_attention_is_uniform_at_every_length_and_rising_attention_is_recency():
    for n in (2, 3, 8, 500):
        for weight in (1 / (n + 1), 1.0, 0.0):
            assert attention_pattern(torch.full((n,), weight)) == "uniform"
        rising = torch.arange(1, n + 1).double() ** 2
        assert n < 4 or attention_pattern(rising / rising.sum()) == "recency"


WEAK = [2, 3, 4, 30, 31, 32, 56, 57]


@pytest.mark.parametrize(("pattern", "weights", "kept"), [
    ("recency", [2.0**-age for age in range(12, 0, -1)], [8, 9, 10, 11]),
    ("recency", [0.0, 0.1, 0.8], [1, 2]),  # however short
    ("sparse", [0.01, 0.3, *[0.01] * 3, 0.2, 0.01, 0.4, *[0.01] * 4], [1, 5, 7, 11]),
    ("focused", [0.04 if i in WEAK else 1e-4 for i in range(60)], WEAK),
    ("uniform", [1 / 13] * 12, [0, 3, 7, 11]),
])  # fmt: skip
def test_compress_history_keeps_what_the_pattern_of_attention_suggests(pattern, weights, kept):
    assert attention_pattern(torch.tensor(weights)) == pattern
    parts = [part[0] for part in make_history(size=1, n=len(weights)).inputs[:4]]
    for attention in (torch.tensor(weights), [*weights, 0.02]):  # its own last
        shorter = compress_history(*parts, attention, k=len(kept))
        for before, after in zip(parts, shorter, strict=True):
            assert torch.equal(after, before[kept])


@settings(max_examples=60)
@given(histories(), st.integers(0, 30), st.sampled_from([None, *COMPRESSING]), st.booleans())
def test_compress_history_takes_any_method_by_name_for_any_k_and_n(history, k, name, is_float):
    history = history.rows(slice(1))
    history = replace(history, actions=history.actions.float()) if is_float else history
    context = tuple(part[0] for part in history.inputs[:4])
    is_needed = name is None or "query_attention" in METHODS[name].needs  # else it may be unknown
    attention = history.query_attention[0] if is_needed else None
    more = ("query_states", "episodes", *{*LOOKS} - {"query_attention"})
    options = {field: getattr(history, field)[0] for field in more}
    options |= {"strategy": name, "generator": generator()}
    shorter = compress_history(*context, attention, k, **options)
    if name is None:
        assert [len(part) for part in shorter] == [min(k, history.n)] * 4
    else:
        expected = METHODS[name].compress(history, k, generator()).inputs[:4]
        assert all(torch.equal(a, b[0]) for a, b in zip(shorter, expected, strict=True))
    if k >= history.n and name != "empty":
        assert all(a is b for a, b in zip(shorter, context, strict=True))


@pytest.mark.parametrize(("weights", "options", "message"), [
    (torch.ones(5), {}, r"shape \(6,\), or \(7,\)"),
    (None, {}, "name of a strategy"),
    (torch.ones(6), {"strategy": "best"}, "unknown strategy 'best'"),
    (torch.ones(6), {"strategy": "best-episodes"}, "looks at episodes"),
    (torch.tensor([0.1, -1, 0, 0, 0, 0]), {}, "after the softmax"),
    (torch.ones(6), {"episodes": torch.zeros(5)}, r"episodes of shape \(1, 6\)"),
    (torch.ones(6), {"k": -1}, "n_keep as a whole number"),
])  # fmt: skip
def test_compress_history_refuses_wrong_input_with_what_was_expected(weights, options, message):
    context = [part[0] for part in make_history(size=1, n=6).inputs[:4]]
    with pytest.raises(ValueError, match=message):
        compress_history(*context, weights, **{"k": 2, **options})
