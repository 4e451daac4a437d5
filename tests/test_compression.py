"""What every strategy must keep to, whatever it looks at, and the public face of compression."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from compression_cases import histories, make_history
from hypothesis import given, settings
from hypothesis import strategies as st

from compression import (
    MERGES,
    STRATEGIES,
    History,
    attention_pattern,
    by_count,
    compress_history,
    compressed_logits,
    episode_ids,
    get_strategy,
    kept_counts,
    past_attention,
)

EXACT = [name for name, s in STRATEGIES.items() if s.keeps == "n_keep"]
UP_TO = [name for name, s in STRATEGIES.items() if s.keeps == "up to n_keep"]
DRAWN = ["random", "random-recent", "decay", "importance"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_registry_has_every_strategy_of_the_field():
    assert set(STRATEGIES) == {
        "full", "empty", "random", "random-recent", "least-attended",
        "recent", "first-recent", "decay", "decay-spaced", "even",
        "diverse", "k-medoids", "one-visit", "rewarded-recent", "last-episodes", "best-episodes",
        "nearest", "accumulated-recent", "pooled-votes",
        "top-k", "top-30", "threshold", "prune-low", "importance", "landmark",
    }  # fmt: skip
    assert set(MERGES) == {"recent-summary", "centroids"}


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_says_what_it_keeps_in_one_sentence_and_whether_it_saves_compute(name):
    strategy = STRATEGIES[name]
    assert strategy.name == name
    assert strategy.rule.endswith(".")
    assert strategy.rule.count(". ") == 0
    assert strategy.source
    needs_pass = strategy.looks_at == "query attention" or name == "full"
    assert strategy.saves_compute == (not needs_pass)
    assert ("query_attention" in strategy.needs) == (strategy.looks_at == "query attention")


@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_choices_are_sorted_unique_in_range_and_of_the_asked_size(name, data):
    history = data.draw(histories())
    n_keep = data.draw(st.integers(0, history.n + 2))
    indices = STRATEGIES[name].select(history, n_keep, generator())
    counts = kept_counts(indices)
    assert indices.dtype == torch.int64
    assert indices.shape[0] == history.size
    for row, count in zip(indices, counts.tolist(), strict=True):
        kept = row[len(row) - count :]
        assert (row[: len(row) - count] == -1).all()
        assert (kept.diff() > 0).all()
        assert ((kept >= 0) & (kept < history.n)).all()
    expected = {"all": history.n, "none": 0}.get(STRATEGIES[name].keeps, min(n_keep, history.n))
    if name in UP_TO and n_keep < history.n:
        assert (counts <= expected).all()
        assert indices.shape[1] == counts.max()
    else:
        assert (counts == expected).all()


@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=4, deadline=None)
@given(history=histories(), seed=st.integers(0, 2**31))
def test_the_same_seed_makes_the_same_choice_and_changes_nothing(name, history, seed):
    before = {f.name: getattr(history, f.name).clone() for f in fields(history)}
    n_keep = history.n // 2
    first = STRATEGIES[name].select(history, n_keep, generator(seed))
    again = STRATEGIES[name].select(history, n_keep, generator(seed))
    assert torch.equal(first, again)
    assert all(torch.equal(value, getattr(history, k)) for k, value in before.items())
    numpy_drawn = [
        STRATEGIES[name].select(history, n_keep, np.random.default_rng(seed)) for _ in range(2)
    ]
    assert torch.equal(*numpy_drawn)


@pytest.mark.parametrize("name", [n for n in STRATEGIES if n not in DRAWN])
def test_no_other_history_of_the_batch_has_a_say(name):
    history = make_history(size=5, n=23, seed=3)
    together = STRATEGIES[name].select(history, 9)
    for row in range(5):
        alone = STRATEGIES[name].select(history.rows(torch.tensor([row])), 9)
        assert together[row][together[row] >= 0].tolist() == alone[0].tolist()


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_drawn_follows_the_generator_and_needs_one(name):
    history = make_history(size=3, n=60)
    strategy = STRATEGIES[name]
    assert not torch.equal(
        strategy.select(history, 20, generator(0)), strategy.select(history, 20, generator(1))
    )
    with pytest.raises(ValueError, match="Generator"):
        strategy.select(history, 20)


@pytest.mark.parametrize("name", [n for n in STRATEGIES if n not in DRAWN])
def test_what_is_not_drawn_takes_no_generator(name):
    history = make_history(size=3, n=20)
    with_one = STRATEGIES[name].select(history, 7, generator())
    assert torch.equal(STRATEGIES[name].select(history, 7), with_one)


@pytest.mark.parametrize("name", [*STRATEGIES, *MERGES])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_enough_budget_leaves_the_history_as_it_is_bit_for_bit(name, n):
    history = make_history(size=2, n=n)
    bare = History(history.states, history.actions, history.rewards, history.next_states)
    for n_keep in (n, n + 1, 1000):
        if name == "empty":
            assert STRATEGIES[name].select(bare, n_keep).shape == (2, 0)
        elif name in MERGES:
            assert MERGES[name].merge(bare, n_keep) is bare
        else:  # knows nothing of attention: none is needed where nothing is dropped
            assert bare.take(STRATEGIES[name].select(bare, n_keep)) is bare


@pytest.mark.parametrize("name", [n for n in STRATEGIES if n != "full"])
def test_a_budget_of_nothing_keeps_nothing(name):
    history = make_history(size=2, n=6)
    assert STRATEGIES[name].select(history, 0, generator()).shape == (2, 0)


@pytest.mark.parametrize("name", [n for n in STRATEGIES if STRATEGIES[n].needs])
def test_a_history_that_lacks_what_is_looked_at_is_refused(name):
    history = make_history(size=2, n=6)
    field = STRATEGIES[name].needs[0]
    with pytest.raises(ValueError, match=f"'{name}' looks at {field}"):
        STRATEGIES[name].select(replace(history, **{field: None}), 3)


@pytest.mark.parametrize("name", ["recent", "full"])
@pytest.mark.parametrize("wrong", [-1, 2.5, "3", None])
def test_a_budget_that_is_no_whole_number_is_refused(name, wrong):
    with pytest.raises(ValueError, match="n_keep as a whole number"):
        STRATEGIES[name].select(make_history(), wrong)


def test_an_unknown_strategy_is_named_with_the_nearest_known():
    assert get_strategy("centroids") is MERGES["centroids"]
    with pytest.raises(ValueError, match=r"unknown strategy 'recnt': did you mean 'recent'\?"):
        get_strategy("recnt")


class TestHistory:
    def test_take_keeps_every_field_of_the_chosen_transitions(self):
        history = make_history(size=2, n=5)
        shorter = history.take(torch.tensor([[0, 3], [2, 4]]))
        for b, kept in enumerate([[0, 3], [2, 4]]):
            for name in ("states", "actions", "rewards", "next_states", "episodes", "received"):
                assert torch.equal(getattr(shorter, name)[b], getattr(history, name)[b, kept])
            assert torch.equal(shorter.query_attention[b], history.query_attention[b, kept])
            assert torch.equal(shorter.last_rows[b], history.last_rows[b][:, kept])
        assert torch.equal(shorter.query_states, history.query_states)
        assert torch.equal(shorter.tasks, history.tasks)

    @pytest.mark.parametrize(
        ("indices", "message"),
        [
            ([[0, 5], [1, 2]], "0..4"),
            ([[-1, 2], [1, 2]], "by_count"),
            ([[1, 0], [1, 2]], "ascending"),
            ([[1, 1], [1, 2]], "none twice"),
            ([[1, 2]], r"\(2, k\)"),
        ],
    )
    def test_take_refuses_what_is_no_choice(self, indices, message):
        with pytest.raises(ValueError, match=message):
            make_history(size=2, n=5).take(torch.tensor(indices))

    def test_shapes_that_do_not_fit_are_refused(self):
        history = make_history(size=2, n=5)
        for field in ("states", "rewards", "next_states", "query_states", "episodes", "last_rows"):
            with pytest.raises(ValueError, match=field):
                replace(history, **{field: getattr(history, field)[..., :1]})

    @pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf")])
    def test_attention_before_the_softmax_is_refused(self, wrong):
        with pytest.raises(ValueError, match="query_attention after the softmax"):
            replace(make_history(size=1, n=2), query_attention=torch.tensor([[0.5, wrong]]))

    def test_from_batch_reads_a_batch_of_windows(self):
        history = make_history(size=2, n=5)
        names = ("states", "actions", "rewards", "next_states", "query_states")
        batch = {name: getattr(history, name).numpy() for name in names}
        batch["target_actions"] = np.zeros(2)
        read = History.from_batch(batch, tasks=history.tasks)
        assert all(torch.equal(a, b) for a, b in zip(read.inputs, history.inputs, strict=True))
        assert torch.equal(read.tasks, history.tasks)


def test_histories_that_keep_unequal_counts_run_in_groups():
    history = make_history(size=4, n=6)
    indices = torch.tensor([[-1, 2], [0, 5], [-1, -1], [-1, 4]])
    assert kept_counts(indices).tolist() == [1, 2, 0, 1]
    groups = {part.n: rows.tolist() for rows, part in by_count(history, indices)}
    assert groups == {0: [2], 1: [0, 3], 2: [1]}

    def logits(part):  # sum of what is kept, and how much
        return torch.stack([part.rewards.sum(1).float(), torch.full((part.size,), part.n)], 1)

    found = compressed_logits(logits, history, indices)
    rewards = history.rewards.float()
    assert found[:, 0].tolist() == [rewards[0, 2], rewards[1, 0] + rewards[1, 5], 0, rewards[3, 4]]
    assert found[:, 1].tolist() == [1, 2, 0, 1]


def test_episode_ids_count_back_from_the_episode_of_the_decision():
    ids = episode_ids(7, horizon=3, steps_taken=torch.tensor([0, 1, 2]))
    assert ids.tolist() == [[0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 1, 2, 2]]
    assert episode_ids(0, horizon=3, steps_taken=0).shape == (1, 0)


def test_past_attention_sums_what_each_transition_received():
    maps = torch.tensor([[[1, float("nan"), 9], [0.25, 0.75, 9], [0.5, 0.125, 0.375]]])
    found = past_attention(maps, window=2)
    assert found["received"].tolist() == [[1.75, 0.875, 0.375]]
    assert found["last_rows"].tolist() == [[[0.25, 0.75, 0], [0.5, 0.125, 0.375]]]


class TestAttentionPattern:
    @pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 40, 500])
    def test_even_attention_is_uniform_at_every_length(self, n):
        assert attention_pattern(torch.full((n,), 1 / (n + 1))) == "uniform"
        assert attention_pattern(torch.ones(n)) == "uniform"
        assert attention_pattern(torch.zeros(n)) == "uniform"

    @pytest.mark.parametrize("n", [4, 8, 40, 500])
    def test_rising_attention_is_recency(self, n):
        weights = torch.arange(1, n + 1).double() ** 2
        assert attention_pattern(weights / weights.sum()) == "recency"

    def test_a_few_strong_positions_are_sparse(self):
        weights = torch.full((60,), 0.1 / 57)
        weights[[2, 31, 57]] = 0.3
        assert attention_pattern(weights) == "sparse"

    def test_attention_that_prefers_without_strong_positions_is_focused(self):
        weights = torch.full((60,), 1e-4)
        weights[[2, 3, 4, 30, 31, 32, 56, 57]] = 0.04
        assert attention_pattern(weights) == "focused"


class TestCompressHistory:
    def context(self, n):
        history = make_history(size=1, n=n, seed=n)
        return tuple(part[0] for part in history.inputs[:4])

    @pytest.mark.parametrize(
        ("weights", "kept"),
        [
            ("recency", [8, 9, 10, 11]),
            ("sparse", [1, 5, 7, 11]),  # the last of equals fills up
            ("uniform", [0, 3, 7, 11]),
        ],
    )
    def test_keeps_what_the_pattern_of_attention_suggests(self, weights, kept):
        given_weights = {
            "recency": 2.0 ** torch.arange(-12, 0),
            "sparse": torch.tensor([0.01, 0.3, 0.01, 0.01, 0.01, 0.2, 0.01, 0.4] + [0.01] * 4),
            "uniform": torch.full((12,), 1 / 13),
        }[weights]
        assert attention_pattern(given_weights) == weights
        context = self.context(12)
        shorter = compress_history(*context, given_weights, k=4)
        for before, after in zip(context, shorter, strict=True):
            assert torch.equal(after, before[kept])
        own_last = torch.cat([given_weights, torch.tensor([0.02])])
        again = compress_history(*context, own_last, k=4)
        assert all(torch.equal(a, b) for a, b in zip(again, shorter, strict=True))

    @settings(max_examples=40, deadline=None)
    @given(
        n=st.integers(0, 14),
        k=st.integers(0, 16),
        seed=st.integers(0, 99),
        strategy=st.sampled_from([None, *EXACT, *UP_TO, *MERGES]),
    )
    def test_works_for_any_k_and_n(self, n, k, seed, strategy):
        history = make_history(size=1, n=n, seed=seed)
        context = tuple(part[0] for part in history.inputs[:4])
        known = {
            name: getattr(history, name)[0]
            for name in ("query_states", "episodes", "received", "last_rows")
        }
        shorter = compress_history(
            *context,
            history.query_attention[0],
            k=k,
            strategy=strategy,
            generator=generator(),
            **known,
        )
        length = len(shorter[1])
        assert length <= min(k, n) if strategy in UP_TO else length == min(k, n)
        assert shorter[0].shape == shorter[3].shape == (length, 2)
        assert shorter[1].shape == shorter[2].shape == (length,)
        if k >= n:
            assert all(a is b for a, b in zip(shorter, context, strict=True))

    def test_a_strategy_can_be_chosen_whatever_the_attention(self):
        context = self.context(12)
        recency = 2.0 ** torch.arange(-12, 0)
        shorter = compress_history(*context, recency, k=4, strategy="even")
        assert torch.equal(shorter[0], context[0][[0, 3, 7, 11]])
        without = compress_history(*context, None, k=4, strategy="even")
        assert torch.equal(without[0], shorter[0])
        assert len(compress_history(*context, None, k=40, strategy="empty")[1]) == 0

    def test_wrong_input_is_refused_with_what_was_expected(self):
        context = self.context(6)
        with pytest.raises(ValueError, match=r"shape \(6,\), or \(7,\)"):
            compress_history(*context, torch.ones(5), k=2)
        with pytest.raises(ValueError, match="name of a strategy"):
            compress_history(*context, None, k=2)
        with pytest.raises(ValueError, match="unknown strategy 'best'"):
            compress_history(*context, torch.ones(6), k=2, strategy="best")
        with pytest.raises(ValueError, match="looks at episodes"):
            compress_history(*context, torch.ones(6), k=2, strategy="best-episodes")
        with pytest.raises(ValueError, match="after the softmax"):
            compress_history(*context, torch.tensor([0.1, -1, 0, 0, 0, 0]), k=2)
