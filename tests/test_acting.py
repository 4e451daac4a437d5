"""The AD model acting: as its own forward pass would, rooms together as each alone."""

import numpy as np
import pytest
import torch
from conftest import PlainRoom, random_window, sharp_model
from hypothesis import example, given
from hypothesis import strategies as st

from ad import acting
from ad.acting import CachedContext, fast_logits, rollout_goals
from ad.darkroom import all_goals
from config import ModelConfig
from historylens.history import History
from model import ADTransformer

SHAPES = [(12, 1, 1, 8), (12, 2, 2, 16), (20, 3, 4, 16), (2, 2, 1, 8)]  # T, L, H, D


def make_model(n_transit, n_layers, n_heads, width) -> ADTransformer:
    sizes = {"tf_n_layer": n_layers, "tf_n_head": n_heads, "tf_n_embd": width, "tf_n_inner": 24}
    config = ModelConfig(n_transit=n_transit, grid_size=5, **sizes)
    return sharp_model(config, dtype=torch.float64)


MODELS = {shape: make_model(*shape) for shape in SHAPES}
MODEL = MODELS[12, 2, 2, 16]


def random_steps(model, n_rooms, n):
    """From two steps to the transitions between them, and the query state at the second."""
    window, queries = random_window(model.config, n_rooms, n)
    return lambda first, last: History(
        *(part[:, first:last] for part in window), query_states=queries[:, last]
    )


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@torch.inference_mode()
def forward(model, history, *positions):
    return model(*history.inputs, *positions)


# Logits


@example(shape=SHAPES[1], n_rooms=3, cuts=[0.0, 0.0, 0.3, 0.3])
@given(
    shape=st.sampled_from(SHAPES),
    n_rooms=st.integers(1, 3),
    cuts=st.lists(st.floats(0, 1), max_size=6).map(sorted),
)
def test_any_chunks_and_repeated_queries_give_the_logits_of_one_forward_pass(shape, n_rooms, cuts):
    model = MODELS[shape]
    n, begin = model.n_context_max, 0
    steps, context = random_steps(model, n_rooms, n), CachedContext(model, n_rooms)
    for end in [*(int(cut * n) for cut in cuts), n]:
        assert_close(context.act(steps(begin, end)), forward(model, steps(0, end)))
        assert context.n_context == end
        begin = end


@pytest.mark.parametrize("n_before", [0, 5, 11])
def test_outgrowing_the_positions_is_an_error_that_leaves_the_context_usable(n_before):
    steps, context = random_steps(MODEL, 1, 12), CachedContext(MODEL, 1)
    context.act(steps(0, n_before))
    with pytest.raises(ValueError, match="at most 11 transitions in context, got 12"):
        context.act(steps(n_before, 12))
    assert_close(context.act(steps(n_before, 11)), forward(MODEL, steps(0, 11)))


@pytest.mark.parametrize("tokens_at_once", [1, 12, 25, 10_000])
def test_a_large_batch_in_parts_gives_the_logits_of_one_pass(monkeypatch, tokens_at_once):
    history = random_steps(MODEL, 7, 11)(0, 11)
    monkeypatch.setattr(acting, "TOKENS_AT_ONCE", tokens_at_once)
    assert_close(fast_logits(MODEL, history), forward(MODEL, history))


@given(shape=st.sampled_from(SHAPES), n_samples=st.integers(1, 3), data=st.data())
def test_fast_logits_are_those_of_the_models_own_forward_at_any_positions(shape, n_samples, data):
    model = MODELS[shape]
    n = data.draw(st.integers(0, model.n_context_max))
    history = random_steps(model, n_samples, n)(0, n)
    places = st.lists(st.integers(0, shape[0] - 1), min_size=n + 1, max_size=n + 1, unique=True)
    positions = torch.tensor([sorted(data.draw(places)) for _ in range(n_samples)])
    assert_close(fast_logits(model, history), forward(model, history))
    assert_close(fast_logits(model, history, positions), forward(model, history, positions))


def test_a_history_longer_than_the_positions_is_an_error():
    with pytest.raises(ValueError, match="at most 11 context transitions"):
        fast_logits(MODEL, random_steps(MODEL, 1, 12)(0, 12))


# Rollouts


def plain_rollout(model, goal, n_episodes, horizon, noise, sliding="step"):
    """One room: a python list of transitions, and everything computed anew at every step."""
    room = PlainRoom(goal, model.config.grid_size, horizon)
    context, returns, lengths = [], [], []
    for episode in range(n_episodes):
        state, done = room.reset(), False
        returns.append(0)
        while sliding == "episode" and len(context) + horizon - 1 > model.n_context_max:
            del context[:horizon]
        while not done:
            while len(context) > model.n_context_max:
                del context[0]
            lengths.append(len(context))
            s, a, r, s_next = (
                torch.tensor([step[k] for step in context], dtype=torch.int64) for k in range(4)
            )
            inputs = s.reshape(1, -1, 2), a[None], r[None], s_next.reshape(1, -1, 2)
            with torch.no_grad():
                logits = model(*inputs, torch.tensor([state]))
            action = int(np.argmax(logits[0].numpy() + noise[episode * horizon + room.t]))
            next_state, reward, done = room.step(action)
            context.append((state, action, reward, next_state))
            returns[-1] += reward
            state = next_state
    return returns, lengths


def assert_equals_plain(config, n_transit, n_episodes, horizon, sliding):
    """Returns of four rooms together equal those of each alone; gives lengths of its contexts."""
    config = ModelConfig(**vars(config) | {"n_transit": n_transit, "grid_size": 3})
    model = sharp_model(config, dtype=torch.float64)
    goals = np.array([[1, 1], [0, 1], [2, 1], [1, 2]])
    returns = rollout_goals(model, goals, n_episodes, seed=3, horizon=horizon, sliding=sliding)
    for i, goal in enumerate(goals):
        noise = np.random.default_rng((3, i)).gumbel(size=(n_episodes * horizon, 5))
        plain, lengths = plain_rollout(model, goal, n_episodes, horizon, noise, sliding)
        assert returns[i].tolist() == plain
    assert returns.sum() > 0
    return lengths


@pytest.mark.parametrize(
    ("n_transit", "n_episodes", "horizon"),
    [(12, 5, 6), (12, 2, 4), (7, 6, 5), (1, 4, 5), (2, 4, 5), (40, 6, 6)],
)
def test_rooms_together_act_as_each_alone_with_its_list_of_transitions(
    tiny_config, n_transit, n_episodes, horizon
):
    lengths = assert_equals_plain(tiny_config, n_transit, n_episodes, horizon, "step")
    assert lengths == [min(t, n_transit - 1) for t in range(n_episodes * horizon)]


@pytest.mark.parametrize(
    ("n_transit", "n_episodes", "horizon"), [(12, 6, 5), (11, 6, 5), (13, 7, 4), (12, 20, 1)]
)
def test_dropping_whole_episodes_equals_a_list_that_drops_them(
    tiny_config, n_transit, n_episodes, horizon
):
    lengths = assert_equals_plain(tiny_config, n_transit, n_episodes, horizon, "episode")
    assert all(length % horizon == t % horizon for t, length in enumerate(lengths))
    assert n_transit - 1 - horizon < max(lengths) < n_transit


def test_a_context_of_less_than_two_episodes_cannot_drop_one(tiny_model):
    with pytest.raises(ValueError, match=r"two episodes \(12 transitions\).*got 11"):
        rollout_goals(tiny_model, np.array([[2, 2]]), 1, seed=0, horizon=6, sliding="episode")


def test_a_goal_outside_the_models_room_is_an_error_that_leaves_its_mode(tiny_config):
    model = ADTransformer(tiny_config).train()
    with pytest.raises(ValueError, match=r"expected goals .* entries 0\.\.4"):
        rollout_goals(model, np.array([[5, 0]]), n_episodes=1, seed=0)
    assert model.training


def test_returns_are_whole_rewards_of_every_episode(tiny_model):
    returns = rollout_goals(tiny_model, all_goals(5), n_episodes=3, seed=0, horizon=7)
    assert (returns.shape, returns.dtype) == ((25, 3), np.int64)
    assert 0 <= returns.min() <= returns.max() <= 7
    assert rollout_goals(tiny_model, np.array([[2, 2]]), n_episodes=0, seed=0).shape == (1, 0)


def test_a_rollout_is_seeded_and_rooms_of_one_goal_act_differently(tiny_model):
    goals = np.repeat(all_goals(5), 2, axis=0)
    one, same, other = (rollout_goals(tiny_model, goals, 3, seed, horizon=8) for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[::2], one[1::2])


def test_a_room_acts_the_same_whatever_rooms_are_beside_it(tiny_config):
    model = sharp_model(tiny_config, dtype=torch.float64)
    goals = np.tile(all_goals(5), (3, 1))  # more than step together at once
    many, few = (rollout_goals(model, some, 3, seed=0, horizon=8) for some in (goals, goals[:10]))
    assert np.array_equal(few, many[:10])


@pytest.mark.parametrize("training", [True, False])
def test_acting_leaves_the_model_as_it_was_and_uses_no_dropout(tiny_config, training):
    model = sharp_model(ModelConfig(**vars(tiny_config) | {"tf_dropout": 0.9}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calm = rollout_goals(model.eval(), all_goals(5), 2, seed=0, horizon=8)
    assert np.array_equal(calm, rollout_goals(model.train(training), all_goals(5), 2, 0, horizon=8))
    assert all(part.training == training for part in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_actions_are_drawn_from_the_softmax_of_the_logits(tiny_config):
    model = ADTransformer(ModelConfig(**vars(tiny_config) | {"grid_size": 3}))
    chances = [0.5, 0.25, 0.2, 0.05, 0.0]
    with torch.no_grad():
        model.pred_action.weight.zero_()
        model.pred_action.bias.copy_(torch.tensor(chances).log())
    # One step from the centre: each goal is reached by one action alone
    goals = np.repeat([[2, 1], [0, 1], [1, 2], [1, 0], [1, 1]], 800, axis=0)
    reached = rollout_goals(model, goals, 1, seed=0, horizon=1).reshape(5, 800).mean(axis=1)
    np.testing.assert_allclose(reached, chances, atol=0.05)
    assert reached[4] == 0
