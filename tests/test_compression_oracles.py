"""Oracles beside brute force, and on a model whose answer is known."""

from itertools import combinations

import numpy as np
import pytest
import torch
from compression_cases import make_history
from hypothesis import given, settings
from hypothesis import strategies as st

from compression import ORACLES, History, elimination_order, kl_divergence, leave_one_out


def random_model(seed):
    """Logits from all that a history holds and from where in it each transition stands."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(7, 4, generator=g, dtype=torch.float64)
    position = torch.rand(32, 1, generator=g, dtype=torch.float64)
    bias = torch.randn(4, generator=g, dtype=torch.float64)

    def logits(history):
        parts = [
            history.states,
            history.actions[..., None],
            history.rewards[..., None],
            history.next_states,
            torch.ones_like(history.rewards)[..., None],
        ]
        tokens = torch.cat([part.double() for part in parts], dim=2) @ weights
        return (tokens.sin() * position[: history.n]).sum(dim=1) + bias

    return logits


def reward_model(history):
    """Looks at rewarded transitions alone: how often each of three actions was rewarded."""
    return (
        torch.nn.functional.one_hot(history.actions, 3).mul(history.rewards[..., None]).sum(1) * 1.5
    )


def by_hand(logits, history, b, kept):
    """KL of the action with only `kept` from the full one, without any batching, and the action."""
    row = history.rows(torch.tensor([b]))
    full = logits(row)[0].numpy().astype(float)
    part = History(*(x[:, list(kept)] for x in row.inputs[:4]), row.query_states)
    other = logits(part)[0].numpy().astype(float)
    p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (full, other))
    return (p * np.log(p / q)).sum(), full.argmax() != other.argmax()


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(0, 10),
    size=st.integers(1, 3),
    seed=st.integers(0, 1000),
    batch_size=st.integers(1, 40),
)
def test_leaving_one_out_equals_brute_force(n, size, seed, batch_size):
    history, logits = make_history(size=size, n=n, seed=seed), random_model(seed)
    effects = leave_one_out(logits, history, batch_size)
    assert effects.kl.shape == effects.flips.shape == (size, n)
    for b in range(size):
        for i in range(n):
            kl, flips = by_hand(logits, history, b, [j for j in range(n) if j != i])
            assert effects.kl[b, i].item() == pytest.approx(kl, abs=1e-9)
            assert effects.flips[b, i].item() == flips


@settings(max_examples=15, deadline=None)
@given(n=st.integers(0, 10), size=st.integers(1, 2), seed=st.integers(0, 1000), data=st.data())
def test_greedy_elimination_equals_brute_force(n, size, seed, data):
    history, logits = make_history(size=size, n=n, seed=seed), random_model(seed)
    n_keep = data.draw(st.integers(0, n))
    order = elimination_order(logits, history, n_keep, batch_size=7)
    chosen = ORACLES["greedy"].select(history, n_keep, logits)
    for b in range(size):
        kept, dropped = list(range(n)), []
        while len(kept) > n_keep:
            losses = [by_hand(logits, history, b, [j for j in kept if j != i])[0] for i in kept]
            dropped.append(kept.pop(int(np.argmin(np.round(losses, 7)))))
        assert order[b].tolist() == dropped
        assert chosen[b].tolist() == kept


@pytest.mark.parametrize("name", ORACLES)
def test_oracles_keep_exactly_what_is_asked(name):
    history, logits = make_history(size=3, n=8), random_model(0)
    for n_keep in range(11):
        indices = ORACLES[name].select(history, n_keep, logits)
        assert indices.shape == (3, min(n_keep, 8))
        assert (indices.diff(dim=1) > 0).all()
    assert history.take(ORACLES[name].select(history, 9, logits)) is history
    with pytest.raises(ValueError, match="whole number"):
        ORACLES[name].select(history, -1, logits)


def planted():
    history = make_history(size=2, n=9, seed=5)
    rewards = torch.zeros(2, 9, dtype=torch.long)
    rewards[0, [1, 4]], rewards[1, [0, 6, 7]] = 1, 1
    actions = torch.tensor([[0, 2, 1, 1, 2, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 1, 1, 2]])
    return History(history.states, actions, rewards, history.next_states, history.query_states)


def test_only_rewarded_transitions_matter_to_a_model_that_reads_nothing_else():
    history = planted()
    effects = leave_one_out(reward_model, history)
    assert torch.equal(effects.kl > 1e-9, history.rewards > 0)
    assert not effects.flips.any()
    for oracle in ORACLES.values():
        assert oracle.select(history, 3, reward_model)[0].tolist() == [1, 4, 8]  # 8 is the latest
        assert oracle.select(history, 3, reward_model)[1].tolist() == [0, 6, 7]


def test_greedy_is_the_best_choice_where_effects_add_up():
    history = planted()
    greedy = ORACLES["greedy"].select(history, 2, reward_model)
    for b in range(2):
        losses = {
            kept: by_hand(reward_model, history, b, kept)[0] for kept in combinations(range(9), 2)
        }
        assert losses[tuple(greedy[b].tolist())] == pytest.approx(min(losses.values()), abs=1e-9)


def test_noise_of_the_logits_leaves_ties_to_time():
    history = planted()

    def noisy(part):
        noise = torch.rand(part.size, 3, generator=torch.Generator().manual_seed(part.size))
        return reward_model(part) + 1e-6 * noise

    assert ORACLES["greedy"].select(history, 5, noisy)[0].tolist() == [1, 4, 6, 7, 8]
    assert ORACLES["leave-one-out"].select(history, 5, noisy)[0].tolist() == [1, 4, 6, 7, 8]


def test_the_divergence_of_a_known_pair():
    full, other = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log() + 3
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert kl_divergence(full, other).item() == pytest.approx(expected, abs=1e-6)
    assert kl_divergence(full, full).item() == 0
