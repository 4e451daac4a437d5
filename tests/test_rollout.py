import numpy as np
import pytest
import torch
from conftest import PlainRoom, sharp_model

from config import ModelConfig
from darkroom import all_goals
from model import ADTransformer
from rollout import act, rollout


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


def assert_equals_plain(config, n_episodes, horizon, sliding):
    """Returns of four rooms together equal those of each alone; gives lengths of its contexts."""
    model = sharp_model(config, dtype=torch.float64)
    goals = np.array([[1, 1], [0, 1], [2, 1], [1, 2]])
    returns = rollout(model, goals, n_episodes, seed=3, horizon=horizon, sliding=sliding)
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
    config = ModelConfig(**vars(tiny_config) | {"n_transit": n_transit, "grid_size": 3})
    lengths = assert_equals_plain(config, n_episodes, horizon, "step")
    assert lengths == [min(t, n_transit - 1) for t in range(n_episodes * horizon)]


@pytest.mark.parametrize(
    ("n_transit", "n_episodes", "horizon"), [(12, 6, 5), (11, 6, 5), (13, 7, 4), (12, 20, 1)]
)
def test_dropping_whole_episodes_equals_a_list_that_drops_them(
    tiny_config, n_transit, n_episodes, horizon
):
    config = ModelConfig(**vars(tiny_config) | {"n_transit": n_transit, "grid_size": 3})
    lengths = assert_equals_plain(config, n_episodes, horizon, "episode")
    assert all(length % horizon == t % horizon for t, length in enumerate(lengths))
    assert n_transit - 1 - horizon < max(lengths) < n_transit


def test_a_context_of_less_than_two_episodes_cannot_drop_one(tiny_model):
    with pytest.raises(ValueError, match=r"two episodes \(12 transitions\).*got 11"):
        rollout(tiny_model, np.array([[2, 2]]), 1, seed=0, horizon=6, sliding="episode")


def test_returns_are_whole_rewards_of_every_episode(tiny_model):
    returns = rollout(tiny_model, all_goals(5), n_episodes=3, seed=0, horizon=7)
    assert returns.shape == (25, 3)
    assert returns.dtype == np.int64
    assert returns.min() >= 0
    assert returns.max() <= 7


def test_a_rollout_is_seeded(tiny_model):
    goals = all_goals(5)
    one, same, other = (rollout(tiny_model, goals, 2, seed, horizon=8) for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_rooms_of_the_same_goal_act_differently(tiny_model):
    returns = rollout(tiny_model, np.tile([[2, 3]], (30, 1)), 3, seed=0, horizon=8)
    assert len({tuple(row) for row in returns.tolist()}) > 1


def test_a_room_acts_the_same_whatever_rooms_are_beside_it(tiny_config):
    model = sharp_model(tiny_config, dtype=torch.float64)
    goals = all_goals(5)
    many = rollout(model, goals, n_episodes=3, seed=0, horizon=8)
    few = rollout(model, goals[:10], n_episodes=3, seed=0, horizon=8)
    assert np.array_equal(few, many[:10])


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_came_in(tiny_config, training):
    model = ADTransformer(tiny_config).train(training)
    rollout(model, np.array([[2, 2]]), n_episodes=1, seed=0, horizon=2)
    assert all(part.training == training for part in model.modules())


def test_the_mode_is_restored_after_an_error_as_well(tiny_config):
    model = ADTransformer(tiny_config).train()
    with pytest.raises(ValueError, match="expected goals"):
        rollout(model, np.array([[99, 0]]), n_episodes=1, seed=0)
    assert model.training


def test_dropout_is_off_while_the_model_acts(tiny_config):
    model = sharp_model(ModelConfig(**vars(tiny_config) | {"tf_dropout": 0.9}))
    calm = rollout(model, all_goals(5), n_episodes=2, seed=0, horizon=8)
    assert np.array_equal(calm, rollout(model.train(), all_goals(5), 2, seed=0, horizon=8))


def test_no_weight_changes_and_no_gradient_is_kept(tiny_model):
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    rollout(tiny_model, np.array([[2, 2]]), n_episodes=2, seed=0, horizon=4)
    assert all(torch.equal(before[k], v) for k, v in tiny_model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in tiny_model.parameters())


def test_a_goal_outside_the_models_room_is_an_error(tiny_model):
    with pytest.raises(ValueError, match=r"entries 0\.\.4"):
        rollout(tiny_model, np.array([[5, 0]]), n_episodes=1, seed=0)


def test_actions_are_drawn_from_the_softmax_of_the_logits(tiny_config):
    model = ADTransformer(ModelConfig(**vars(tiny_config) | {"grid_size": 3}))
    probabilities = [0.5, 0.25, 0.2, 0.05, 0.0]
    with torch.no_grad():
        model.pred_action.weight.zero_()
        model.pred_action.bias.copy_(torch.tensor(probabilities).log())
    # One step from the centre: each goal is reached by one action alone
    goals = np.repeat([[2, 1], [0, 1], [1, 2], [1, 0], [1, 1]], 800, axis=0)
    reached = rollout(model, goals, n_episodes=1, seed=0, horizon=1).reshape(5, 800).mean(axis=1)
    np.testing.assert_allclose(reached, probabilities, atol=0.05)
    assert reached[4] == 0


class Buffered:
    """An environment with float states and rewards that uses its arrays again and again."""

    def __init__(self, n_rooms):
        self.states, self.rewards = np.zeros((n_rooms, 3)), np.zeros(n_rooms)

    def reset(self):
        self.states[:] = 0.25
        return self.states

    def step(self, actions):
        self.states += 1
        self.rewards[:] = 0.5 * actions
        return self.states, self.rewards, self.states[0, 0] > 2


class Listener:
    """A reader that keeps the histories."""

    device = "cpu"

    def __init__(self):
        self.histories = []

    def act(self, lived, query_states):
        self.histories.append(lived.history(query_states))
        return torch.zeros(len(query_states), 3)


def test_any_environment_is_lived_through_as_it_is():
    reader = Listener()
    noises = [np.random.default_rng(room) for room in range(2)]
    rewards = act(Buffered(2), reader, 5, noises)
    last = reader.histories[-1]
    assert last.states[0, :, 0].tolist() == [0.25, 1.25, 0.25, 1.25]
    assert last.next_states[0, :, 0].tolist() == [1.25, 2.25, 1.25, 2.25]
    assert last.query_states[0].tolist() == [0.25] * 3
    assert last.episodes[0].tolist() == [0, 0, 1, 1]
    assert torch.equal(last.rewards, 0.5 * last.actions)
    assert np.array_equal(rewards[:, :4], last.rewards.numpy())
    expected = [np.random.default_rng(room).gumbel(size=(5, 3)).argmax(axis=1) for room in range(2)]
    assert np.array_equal(last.actions, np.stack(expected)[:, :4])


def test_no_steps_give_no_rewards(tiny_model):
    assert rollout(tiny_model, np.array([[2, 2]]), n_episodes=0, seed=0).shape == (1, 0)
