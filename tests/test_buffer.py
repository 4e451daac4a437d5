"""What environments have been through: the store that grows, and acting in any environment."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from historylens.agent import rollout
from historylens.history import HistoryBuffer, episode_ids


def transitions(n_steps, n_rooms=2, state_size=3, dtype=torch.int64, seed=0):
    """`n_steps` random transitions of every room: a list of (s, a, r, s')."""
    g = torch.Generator().manual_seed(seed)

    def draw(high, *shape):
        return torch.randint(high, (n_rooms, *shape), generator=g)

    return [
        (draw(9, state_size).to(dtype), draw(5), draw(2) / 4, draw(9, state_size).to(dtype))
        for _ in range(n_steps)
    ]


def filled(steps, n_steps=12, dtype=torch.int64, horizon=4, **more):
    n_rooms = len(steps[0][1]) if steps else 2
    buffer = HistoryBuffer(torch.empty(n_rooms, 3, dtype=dtype), n_steps, **more)
    for t, step in enumerate(steps):
        buffer.append(*step, done=t % horizon == horizon - 1)
    return buffer


@given(
    n_steps=st.integers(0, 12),
    dtype=st.sampled_from([torch.int64, torch.float32]),
    data=st.data(),
)
def test_the_history_is_what_was_appended(n_steps, dtype, data):
    first = data.draw(st.integers(0, n_steps))
    steps, query = transitions(n_steps, dtype=dtype), torch.ones(2, 3)
    buffer = filled(steps, dtype=dtype)
    history = buffer.history(query, first)
    assert (history.size, history.n, buffer.n) == (2, n_steps - first, n_steps)
    assert history.states.dtype == history.next_states.dtype == dtype
    assert history.rewards.dtype == torch.float32
    assert torch.equal(history.query_states, query)
    assert history.kept is None
    for t, step in enumerate(steps[first:]):
        for part, value in zip(history.inputs, step, strict=False):
            assert torch.equal(part[:, t], value)


def test_episodes_are_numbered_by_their_ends():
    buffer = filled(transitions(11))
    history = buffer.history(torch.zeros(2, 3))
    assert torch.equal(history.episodes, episode_ids(11, 4, 3).expand(2, -1))
    assert buffer.history(torch.zeros(2, 3), first=7).episodes[0].tolist() == [1, 2, 2, 2]


def test_a_history_is_a_view_that_later_transitions_leave_as_it_is():
    steps = transitions(6)
    buffer = filled(steps[:4])
    early = buffer.history(torch.zeros(2, 3))
    before = [part.clone() for part in early.inputs]
    for step in steps[4:]:
        buffer.append(*step, done=False)
    late = buffer.history(torch.zeros(2, 3))
    assert all(torch.equal(x, y) for x, y in zip(early.inputs, before, strict=True))
    assert late.states.data_ptr() == early.states.data_ptr()
    assert late.rewards.data_ptr() == early.rewards.data_ptr()


def test_tasks_are_handed_on():
    buffer = HistoryBuffer(torch.empty(3, 1), 1, torch.tensor([4, 4, 7]))
    assert buffer.history(torch.zeros(3, 1)).tasks.tolist() == [4, 4, 7]


# Acting


class Reused:
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
    """A policy without preferences that keeps the histories."""

    device = "cpu"

    def __init__(self):
        self.histories = []

    def act(self, buffer, query_states):
        self.histories.append(buffer.history(query_states))
        return torch.zeros(len(query_states), 3)


def test_any_environment_is_acted_in_as_it_is():
    listener = Listener()
    noises = [np.random.default_rng(room) for room in range(2)]
    rewards = rollout(Reused(2), listener, 5, noises, tasks=np.array([3, 8]))
    last = listener.histories[-1]
    assert last.states[0, :, 0].tolist() == [0.25, 1.25, 0.25, 1.25]
    assert last.next_states[0, :, 0].tolist() == [1.25, 2.25, 1.25, 2.25]
    assert last.query_states[0].tolist() == [0.25] * 3
    assert last.episodes[0].tolist() == [0, 0, 1, 1]
    assert last.tasks.tolist() == [3, 8]
    assert torch.equal(last.rewards, 0.5 * last.actions)
    assert np.array_equal(rewards[:, :4], last.rewards.numpy())
    expected = [np.random.default_rng(room).gumbel(size=(5, 3)).argmax(axis=1) for room in range(2)]
    assert np.array_equal(last.actions, np.stack(expected)[:, :4])


def test_no_steps_give_no_rewards():
    assert rollout(Reused(2), Listener(), 0, []).shape == (2, 0)
