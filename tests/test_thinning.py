"""Windows of thinned histories: what is kept, what follows, which decisions are learned from."""

import numpy as np
import pytest
import torch
from conftest import make_histories, sharp_model
from hypothesis import assume, given
from hypothesis import strategies as st
from test_dataset import numbered

from ad import thinning
from ad.thinning import CONTEXT, TRAINED_ON, draw_batch, sample_thinned, thin
from ad.training import PackedLoss
from dataset import ADDataset
from historylens.compression import METHODS
from historylens.history import History


def window_of(histories, n, rows, steps):
    """Decisions of histories after the `n` steps right before them, and their episodes."""
    context = np.array(steps)[:, None] + np.arange(-n, 0)
    window = ADDataset(histories, n).gather(np.array(rows), np.array(steps), context)
    return window, torch.from_numpy(context // histories.horizon)


@pytest.mark.parametrize(("n_following", "n_keep"), [(0, 6), (5, 6), (0, 14)])
@pytest.mark.parametrize("name", TRAINED_ON)
def test_a_thinned_window_is_what_the_method_keeps_and_then_what_follows(name, n_following, n_keep):
    window, episodes = window_of(make_histories(), 14, [0, 1, 2], [14, 17, 23])
    method, n_past = METHODS[name], 14 - n_following
    found = thin(window, episodes, method, n_keep, n_following, np.random.default_rng(3))
    queries, actions = window["query_states"][:, n_past:], window["target_actions"][:, n_past:]
    past = (window[part][:, :n_past] for part in CONTEXT)
    history = History(*past, queries[:, 0], episodes[:, :n_past])
    kept = method.compress(history, n_keep, np.random.default_rng(3)).kept
    kept = [range(14)] * 3 if kept is None else kept.tolist()
    for row in range(3):
        expected = [*kept[row], *range(n_past, 14)]
        for part in CONTEXT:
            assert torch.equal(found[part][row], window[part][row][expected])
    assert torch.equal(found["query_states"], queries)
    assert torch.equal(found["target_actions"], actions)
    assert (method.kind, method.keeps) == ("strategy", "n_keep")  # and it needs no model
    assert set(method.needs) <= {"episodes", "query_states", "states", "actions", "rewards"}


def test_episodes_are_ranked_as_they_lie_before_the_thinning_by_hand():
    window, _ = window_of(numbered(1, 2, 6), 6, [0], [6])
    window["rewards"] = torch.tensor([[0, 2, 0, 0, 1, 0]])
    episodes = torch.tensor([[0, 0, 1, 1, 1, 2]])
    found = thin(window, episodes, METHODS["best-episodes"], 2, 1, np.random.default_rng(0))
    assert found["states"][0, :, 0].tolist() == [0, 1, 5]


@given(*(st.integers(*ends) for ends in ((1, 20), (1, 6), (1, 30), (1, 5), (0, 999))))
def test_thinned_windows_are_past_and_in_order(n_context, horizon, n_episodes, batch_size, seed):
    assume(n_episodes * horizon > n_context)
    dataset = ADDataset(numbered(3, n_episodes, horizon), n_context, max_stride=4)
    batch = sample_thinned(dataset, batch_size, np.random.default_rng(seed))
    (size, n), q = batch["actions"].shape, batch["target_actions"].shape[1]
    assert size in range(batch_size, 8 * batch_size + 1, batch_size)
    assert min(5, n_context) <= n <= n_context
    assert 1 <= q <= min(9, n // 2) + 1
    marks, decisions = batch["actions"] - 100_000, batch["target_actions"] - 100_000
    assert torch.equal(batch["states"], torch.stack([marks, marks], dim=2))
    assert torch.equal(batch["rewards"], marks + 200_000)
    assert torch.equal(batch["next_states"], torch.stack([marks + 300_000, marks + 400_000], dim=2))
    assert torch.equal(batch["query_states"], torch.stack([decisions, decisions], dim=2))
    steps = torch.cat([marks, decisions[:, -1:]], dim=1)
    assert (steps // 1000 == steps[:, :1] // 1000).all()
    assert (steps.diff(dim=1) > 0).all()
    assert torch.equal(steps[:, n + 1 - q :], decisions)


@pytest.fixture(scope="module")
def drawn():
    """100 batches of 2 of a model that reads up to 40 of 900 transitions, and their thinnings."""
    dataset, thinnings = ADDataset(numbered(2, 90, 10), 40, max_stride=8), []

    def watched(window, episodes, method, n_keep, n_following, rng):
        thinnings.append((method.name, window["actions"].shape[1] - n_following, n_keep))
        of_step = (window["actions"] - 100_000) % 1000 // 10
        assert torch.equal(episodes.diff(dim=1) > 0, of_step.diff(dim=1) > 0)
        return thin(window, episodes, method, n_keep, n_following, rng)

    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thinning, "thin", watched)
        return [sample_thinned(dataset, 2, rng) for _ in range(100)], thinnings


def test_methods_are_drawn_equally_often_several_thinnings_of_one_length_a_batch(drawn):
    names, n_past, n_keep = map(np.array, zip(*drawn[1], strict=True))
    counts = np.array([(names == name).sum() for name in TRAINED_ON])
    np.testing.assert_allclose(counts / len(names), 1 / len(TRAINED_ON), atol=0.03)
    per_batch = [min(8, len(batch["actions"])) for batch in drawn[0]]
    assert sum(per_batch) == len(n_keep)
    assert {len(set(part)) for part in np.split(n_keep, np.cumsum(per_batch)[:-1])} == {1}
    # What is thinned is log-uniformly long, up to a whole history.
    reach = np.log(n_past / n_keep) / np.log(900 / n_keep)
    assert n_past.max() > 850
    np.testing.assert_allclose(np.quantile(reach, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.05)


def test_lengths_read_are_log_uniform_and_shorter_windows_come_in_larger_batches(drawn):
    sizes, lengths = np.array([batch["actions"].shape for batch in drawn[0]]).T
    assert (lengths.min(), lengths.max()) == (5, pytest.approx(40, abs=3))
    edges = np.ceil(5 * (41 / 5) ** (np.arange(1, 4) / 4))
    shares = [(lengths < edge).mean() for edge in edges]
    np.testing.assert_allclose(shares, np.log(edges / 5) / np.log(41 / 5), atol=0.08)
    n_tokens = sizes * (lengths + [batch["target_actions"].shape[1] for batch in drawn[0]])
    part = n_tokens / (2 * (2 * 40 + 1))  # of those of full windows
    assert part.max() <= 4 / 3
    assert part[sizes < 2 * 8].min() >= 2 / 3
    assert {4, 8, 16} <= set(sizes) <= set(range(2, 17))


def test_the_longest_context_is_read_and_a_shorter_one_than_5_only_where_none_is_longer():
    for longest, expected in ((3, {3}), (5, {5}), (7, {5, 6, 7})):
        dataset, rng = ADDataset(numbered(1, 3, 4), longest), np.random.default_rng(0)
        batches = [sample_thinned(dataset, 1, rng) for _ in range(30)]
        assert {batch["actions"].shape[1] for batch in batches} == expected


def test_thinned_batches_are_seeded_and_without_history_dropout_none_is_drawn():
    dataset = ADDataset(make_histories(n_episodes=20), 11, max_stride=3)
    a, b, c = (sample_thinned(dataset, 4, np.random.default_rng(seed)) for seed in (0, 0, 1))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(a["states"], c["states"])
    rng, plain = np.random.default_rng(0), np.random.default_rng(0)
    found, expected = draw_batch(dataset, 4, 0.0, rng), dataset.sample(4, plain)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert rng.bit_generator.state == plain.bit_generator.state


@pytest.mark.parametrize(("share", "tolerance", "n"), [(0.3, 0.06, 300), (1.0, 0, 30)])
def test_history_dropout_is_the_share_of_thinned_batches(share, tolerance, n):
    dataset, rng = ADDataset(make_histories(n_episodes=4), 6), np.random.default_rng(0)
    batches = [draw_batch(dataset, 1, share, rng) for _ in range(n)]
    thinned = [batch["target_actions"].shape[1] <= batch["actions"].shape[1] for batch in batches]
    assert np.mean(thinned) == pytest.approx(share, abs=tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_of_a_thinned_batch_is_that_of_a_pass_a_decision(tiny_config, seed):
    dataset = ADDataset(make_histories(n_episodes=30), 11, max_stride=3)
    model = sharp_model(tiny_config, dtype=torch.float64)
    batch = sample_thinned(dataset, 2, np.random.default_rng(seed))
    n, q = batch["actions"].shape[1], batch["target_actions"].shape[1]
    losses = []
    for j in range(q):
        prefix = (batch[name][:, : n + 1 - q + j] for name in CONTEXT)
        chances = model(*prefix, batch["query_states"][:, j]).softmax(dim=1)
        losses += (-chances.gather(1, batch["target_actions"][:, j, None]).log())[:, 0].tolist()
    assert PackedLoss(model)(batch).item() == pytest.approx(np.mean(losses), rel=1e-9)
