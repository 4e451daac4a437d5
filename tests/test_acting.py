"""The AD model acting, as its own forward pass would and each room alone; its score in numbers."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import random_window, sharp_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plain_room import PlainRoom, plain_play

from ad import acting, evaluation
from ad.acting import SlidingPolicy, fast_logits
from ad.darkroom import DarkRoom, all_goals
from ad.evaluation import rollout_goals, score
from ad.training import Settings, Trainer
from config import EnvConfig, ModelConfig
from historylens.compression.method import METHODS
from historylens.history import History, HistoryBuffer

SHAPES = [(12, 1, 1, 8), (12, 2, 2, 16), (20, 3, 4, 16), (2, 2, 1, 8)]  # T, L, H, D
MODELS = {
    shape: sharp_model(ModelConfig(*shape, tf_n_inner=24, grid_size=5), dtype=torch.float64)
    for shape in SHAPES
}


def random_steps(model, n_rooms, n):
    """From two steps to the transitions between them, and the query state at the second."""
    window, queries = random_window(model.config, n_rooms, n)
    return lambda first, last: History(
        *(part[:, first:last] for part in window), query_states=queries[:, last]
    )


@torch.inference_mode()
def assert_read(found, model, history, *positions):
    expected = model(*history.inputs, *positions)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@settings(max_examples=10)
@example(shape=SHAPES[1], n_rooms=3, asked=[0, 0, 3, 3, 11, 12, 12, 13, 30], horizon=1)
@example(shape=SHAPES[1], n_rooms=2, asked=[2, 5, 9, 10, 10, 14, 24, 25], horizon=5)
@given(
    shape=st.sampled_from(SHAPES), n_rooms=st.integers(1, 3),
    asked=st.lists(st.integers(0, 30), max_size=9).map(sorted), horizon=st.integers(1, 9),
)  # fmt: skip
def test_a_policy_reads_its_context_as_one_forward_pass_would(shape, n_rooms, asked, horizon):
    model = MODELS[shape]
    sliding = "episode" if 1 < horizon <= model.n_context_max // 2 else "step"
    together = horizon if sliding == "episode" else 1  # steps that drop out together
    policy = SlidingPolicy(model, n_rooms, sliding, horizon)
    steps = random_steps(model, n_rooms, 30)
    buffer, first = HistoryBuffer(steps(0, 0).query_states, 30), 0
    for t in asked:
        while buffer.n < t:
            *new, _ = steps(buffer.n, buffer.n + 1).inputs
            buffer.append(*(part[:, 0] for part in new), done=False)
        last = t - t % together + together - 1
        while last - first > model.n_context_max:
            first += together
        expected = steps(first, t)
        assert_read(policy.act(buffer, expected.query_states), model, expected)


@given(st.sampled_from([1, 25, 10_000]), st.sampled_from(SHAPES), st.integers(1, 7), st.data())
def test_fast_logits_are_those_of_the_own_forward_at_any_positions(at_once, shape, size, data):
    """`at_once`: tokens, how a large batch is cut."""
    model = MODELS[shape]
    n = data.draw(st.integers(0, model.n_context_max))
    history = random_steps(model, size, n)(0, n)
    places = st.lists(st.integers(0, shape[0] - 1), min_size=n + 1, max_size=n + 1, unique=True)
    positions = torch.tensor([sorted(data.draw(places)) for _ in range(size)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acting, "TOKENS_AT_ONCE", at_once)
        assert_read(fast_logits(model, history), model, history)
        assert_read(fast_logits(model, history, positions), model, history, positions)


def plain_shown(reads, n_max, horizon, history):
    """What a model reads of a history."""
    if reads == "compressed":
        return METHODS["rewarded-recent"].compress(history, 10)
    n_own = history.n % horizon if reads == "episode" else history.n
    n_before = history.n - n_own
    while n_before > 0 and n_before + horizon - 1 > n_max:  # as the own episode will fill up
        n_before -= horizon
    return history.latest(min(n_before + n_own, n_max))


CASES = [("step", *case) for case in ((12, 5, 6), (1, 4, 5), (2, 4, 5), (40, 3, 6))]
CASES += [("episode", *case) for case in ((12, 5, 5), (11, 5, 5), (13, 6, 4), (12, 14, 1))]
CASES += [("compressed", 12, 6, 10)]


@pytest.mark.parametrize(("reads", "n_transit", "n_episodes", "horizon"), CASES)
def test_rooms_together_act_as_each_alone(tiny_config, reads, n_transit, n_episodes, horizon):
    model = sharp_model(replace(tiny_config, n_transit=n_transit, grid_size=3), dtype=torch.float64)
    goals = np.array([[1, 1], [0, 1], [2, 1], [1, 2]])
    returns = rollout_goals(model, goals, n_episodes, seed=3, horizon=horizon, reads=reads)
    for i, goal in enumerate(goals):
        noise = np.random.default_rng((3, i)).gumbel(size=(n_episodes * horizon, 5))
        shown = partial(plain_shown, reads, n_transit - 1, horizon)
        rewards, _ = plain_play(model, PlainRoom(goal, 3, horizon), noise, shown)
        assert returns[i].tolist() == np.reshape(rewards, (n_episodes, horizon)).sum(1).tolist()
    assert returns.sum() > 0


def test_a_context_too_short_or_too_long_is_an_error(tiny_model):
    with pytest.raises(ValueError, match=r"two episodes \(12 transitions\).*got 11"):
        rollout_goals(tiny_model, np.array([[2, 2]]), 1, seed=0, horizon=6, reads="episode")
    with pytest.raises(ValueError, match="at most 11 context transitions"):
        fast_logits(tiny_model, random_steps(tiny_model, 1, 12)(0, 12))


def test_returns_are_whole_rewards_seeded_by_room_whatever_rooms_are_beside_it(tiny_config):
    model = sharp_model(tiny_config, dtype=torch.float64)
    goals = np.tile(all_goals(5), (3, 1))  # more than step together at once
    many, other = (rollout_goals(model, goals, 3, seed, horizon=8) for seed in (0, 1))
    assert (many.shape, many.dtype) == ((75, 3), np.int64)
    assert np.array_equal(rollout_goals(model, goals[:30], 3, seed=0, horizon=8), many[:30])
    assert not np.array_equal(many, other)
    assert not np.array_equal(many[:25], many[25:50])  # the same goals
    assert rollout_goals(model, goals, n_episodes=0, seed=0).shape == (75, 0)


def test_acting_leaves_the_model_as_it_was_and_uses_no_dropout(tiny_config):
    model = sharp_model(replace(tiny_config, tf_dropout=0.9))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calm = rollout_goals(model, all_goals(5), 2, seed=0, horizon=8)
    assert not any(part.training for part in model.modules())
    assert np.array_equal(calm, rollout_goals(model.train(), all_goals(5), 2, 0, horizon=8))
    assert all(part.training for part in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_each_room_starts_by_a_chance_of_its_own(tiny_model, monkeypatch):
    made = mock.Mock(side_effect=DarkRoom)
    monkeypatch.setattr(evaluation, "DarkRoom", made)
    goals = np.tile([0, 1, 2, 3], (3, 1))
    rollout_goals(tiny_model, goals, 2, seed=7, horizon=5, env="key-to-door")
    assert made.call_args.args[-1].tolist() == [7, 8, 9]


def test_a_checkpoint_is_kept_unless_it_is_a_standard_error_below_the_best_so_far():
    trainer = SimpleNamespace(
        step=9, losses=[1.0], goals={"train": np.zeros((3, 2)), "validation": np.zeros((1, 2))},
        settings=Settings(), slidings=["step"],
    )  # fmt: skip
    # Runs begun before there was a score have those of validation goals.
    cases = (0.4, 0, True), (0.5, 0, True), (0.6, 0, False), (0.6, 0.12, True), (0.6, 0.08, False)
    for before, error, kept in cases:
        trainer.log = [{"validation_relative": 0.1}, {"validation_relative": before}]
        numbers = {"relative": 0.5, "relative_error": error}
        trainer.evaluate = lambda *_, numbers=numbers: numbers
        assert Trainer.validate(trainer)["best"] == kept
    trainer.log, trainer.losses = [{"validation_relative": 0.1}], [np.nan]  # better, but diverged
    assert not Trainer.validate(trainer)["best"]
    trainer.log = []
    assert Trainer.validate(trainer)["best"]


def test_the_standard_error_of_a_return_is_that_over_rollouts_within_goals():
    goals, returns = np.array([[0, 0], [2, 2]]), np.zeros((2, 3, 4))
    returns[..., 2:] = [[[1, 1], [2, 2], [3, 3]], [[0, 2], [1, 1], [1, 1]]]  # (1, 2, 3), (1, 1, 1)
    env = EnvConfig(grid_size=3, horizon=5)
    numbers = score(env, goals, returns)
    assert numbers["relative"] == pytest.approx(1.5 / numbers["possible"])
    # Variances 1 and 0 of 3 rollouts each: that of the mean of both goals is (1 / 3 + 0) / 4.
    assert numbers["relative_error"] == pytest.approx(np.sqrt(1 / 12) / numbers["possible"])
    assert score(env, goals, returns[:, :1])["relative_error"] == 0
