"""Deciding on compressed history: what is read, where it stands, what it costs."""

import numpy as np
import pytest
import torch
from agents import ModelAgent, Recorder, mean_map
from conftest import PlainRoom, sharp_model
from hypothesis import given
from hypothesis import strategies as st

from ad.acting import SlidingPolicy
from ad.darkroom import DarkRoom
from config import ModelConfig
from historylens.agent import rollout
from historylens.common.errors import UserError
from historylens.comparison.policy import CompressedPolicy, original_positions
from historylens.compression.method import METHODS, Method
from historylens.history import PADDING, History, HistoryBuffer

HORIZON = 4
GOALS = np.array([[1, 1], [0, 1], [2, 1], [1, 2]])
MERGES = [name for name, method in METHODS.items() if method.kind == "merge"]


@pytest.fixture(scope="module")
def model():
    """Reads up to seven transitions."""
    config = ModelConfig(
        n_transit=8, tf_n_layer=2, tf_n_head=2, tf_n_embd=16, tf_n_inner=24, grid_size=3
    )
    return sharp_model(config, dtype=torch.float64)


@pytest.fixture(scope="module")
def agent(model):
    return ModelAgent(model)


def policy_of(agent, name, n_keep=None, *more):
    return CompressedPolicy(agent, METHODS[name], n_keep, *more)


def rng(seed=0):
    return np.random.default_rng(seed)


def noises(n_rooms):
    return [np.random.default_rng((3, room)) for room in range(n_rooms)]


class Noting:
    """Keeps the logits `(B, A)` of every step that another policy gives."""

    device = "cpu"

    def __init__(self, policy):
        self.policy, self.logits = policy, []

    def act(self, buffer, query_states):
        self.logits.append(self.policy.act(buffer, query_states))
        return self.logits[-1]


def play(policy, n_steps=20, goals=GOALS):
    """Rewards `(N, n_steps)` and logits `(n_steps, N, A)` of rooms in which a policy acts."""
    rooms, noting, tasks = DarkRoom(goals, 3, HORIZON), Noting(policy), np.arange(len(goals))
    rewards = rollout(rooms, noting, n_steps, noises(len(goals)), tasks=tasks)
    return rewards, torch.stack(noting.logits)


class Counting:
    """An environment whose state is the time; the first reward of all is 1.5, then 0."""

    def __init__(self):
        self.states = np.zeros((2, 1))

    def reset(self):
        return self.states

    def step(self, actions):
        reward = np.full(2, 1.5 * (self.states[0, 0] == 0))
        self.states += 1  # in place, as environments with buffers do
        return self.states, reward, self.states[0, 0] % HORIZON == 0


def count(agent, name, n_keep, n_steps, *more):
    """Act `n_steps` in `Counting` and once more; gives the policy's cost, and the times `(B, k)`
    that it read before the last decision.
    """
    policy = policy_of(agent, name, n_keep, *more)
    rollout(Counting(), policy, n_steps + 1, noises(2))
    return policy.cost, agent.histories[-1].states[..., 0].tolist()


# What it acts on


def plain_policy(model, goal, n_steps, noise, method, n_keep):
    """One room: a python list of transitions, compressed and read anew before every decision."""
    room = PlainRoom(goal, 3, HORIZON)
    past, all_logits, done, n_max = [], [], True, model.n_context_max
    looks = bool({"query_attention", "received", "last_rows"} & set(method.needs))
    for t in range(n_steps):
        state = room.reset() if done else state  # noqa: F821
        steps = past[-n_max:] if looks or method.keeps == "all" else past
        s, a, r, s_next, episode = (
            torch.tensor([step[k] for step in steps], dtype=torch.int64)[None] for k in range(5)
        )
        n, query = len(steps), torch.tensor([state])
        parts = s.view(1, n, 2), a, r, s_next.view(1, n, 2)
        known = {"query_states": query, "episodes": episode}
        if looks:
            maps = torch.from_numpy(mean_map(model, History(*parts, query), 0))
            known["query_attention"] = maps[None, n, :n]
            known["received"] = maps[None, :n, :n].sum(dim=1)
            known["last_rows"] = maps[None, max(0, n - 8) : n, :n]
        shorter = method.compress(History(*parts, **known), n_keep)
        with torch.no_grad():
            logits = model(*shorter.inputs)
        action = int(np.argmax(logits[0].numpy() + noise[t]))
        next_state, reward, done = room.step(action)
        past.append((state, action, reward, next_state, t // HORIZON))
        all_logits.append(logits[0])
        state = next_state
    return [step[2] for step in past], torch.stack(all_logits)


PLAIN = ["full", "recent", "rewarded-recent", "even", "one-visit", "last-episodes", "best-episodes"]
PLAIN += ["nearest", "diverse", "top-k", "threshold", "prune-low", "accumulated-recent"]
PLAIN += ["pooled-votes", "empty"]


@pytest.mark.parametrize("name", PLAIN)
def test_rooms_together_act_as_each_alone_with_its_list_of_transitions(model, agent, name):
    rewards, logits = play(policy_of(agent, name, 4), n_steps=14, goals=GOALS[:2])
    for i, goal in enumerate(GOALS[:2]):
        noise = np.random.default_rng((3, i)).gumbel(size=(14, 5))
        expected, alone = plain_policy(model, goal, 14, noise, METHODS[name], 4)
        assert rewards[i].tolist() == expected
        torch.testing.assert_close(logits[:, i], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("positions", ["reindexed", "original"])
@pytest.mark.parametrize(("name", "n_keep"), [("full", None), ("full", 2), ("recent", 7)])
def test_full_history_acts_as_a_sliding_context(model, agent, name, n_keep, positions):
    rewards, logits = play(policy_of(agent, name, n_keep, None, positions))
    expected, sliding = play(SlidingPolicy(model, len(GOALS)))
    assert np.array_equal(rewards, expected)
    torch.testing.assert_close(logits, sliding, rtol=0, atol=1e-9)
    assert rewards.sum() > 0


@pytest.mark.parametrize(
    ("name", "n_steps", "expected"),
    [
        ("best-episodes", 12, [1, 2, 3]),  # the end of the one episode with a reward
        ("rewarded-recent", 9, [0, 7, 8]),
    ],
)
def test_strategies_choose_among_all_transitions_so_far(name, n_steps, expected):
    assert count(Recorder(n_max=3), name, 3, n_steps)[1] == [expected] * 2


def test_strategies_that_look_at_attention_choose_among_what_the_model_can_look_at():
    agent = Recorder(n_max=5)
    assert count(agent, "top-k", 2, n_steps=9)[1] == [[5, 7]] * 2
    assert agent.looked[-1].states[0, :, 0].tolist() == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("n_keep", [0, 5])
def test_nothing_is_looked_at_where_nothing_or_everything_is_kept(n_keep):
    agent = Recorder(n_max=5)
    cost, times = count(agent, "top-k", n_keep, n_steps=9)
    assert times == [[4, 5, 6, 7, 8][:n_keep]] * 2
    assert agent.looked == []
    assert cost.tokens_looked == 0


@pytest.mark.parametrize("positions", ["reindexed", "original"])
def test_decisions_may_keep_different_counts(positions):
    """Six transitions, of which the model reads the latest four; the states are 1, 10, 100, .."""
    weights = torch.tensor([[0.3, 0.0, 0.2, 0.0], [0.0, 0.9, 0.0, 0.0], [0.0, 0.0, 0.0, 0.3]])

    def logits(history):
        return history.states.sum(dim=(1, 2))[:, None] * torch.tensor([0.0, 1.0])

    buffer = HistoryBuffer(torch.empty(3, 1, dtype=torch.float64), 6)
    for t in range(6):
        state = 10.0 ** torch.full((3, 1), t, dtype=torch.float64)
        buffer.append(state, torch.zeros(3).long(), torch.zeros(3), state, False)
    agent = Recorder(4, logits, lambda history: weights)
    policy = policy_of(agent, "threshold", 3, None, positions)
    action_logits = policy.act(buffer, torch.zeros(3, 1))
    assert [h.states[..., 0].tolist() for h in agent.histories] == [[[1e3], [1e5]], [[1e2, 1e4]]]
    assert action_logits[:, 1].tolist() == [10100, 1000, 100000]
    placed = [None if where is None else where.tolist() for where in agent.positions]
    is_original = positions == "original"
    assert placed == ([[[1, 4], [3, 4]], [[0, 2, 4]]] if is_original else [None, None])
    cost = policy.cost
    assert (cost.kept_min, cost.kept_max, cost.kept_sum, cost.over_budget) == (1, 2, 4, 3)
    assert cost.tokens_read == 3 * 5 + 4 + 3


def test_a_control_changes_the_full_sliding_window():
    agent = Recorder(n_max=3)
    cost, times = count(agent, "shuffled-rewards", None, 7, rng())
    assert [history.n for history in agent.histories] == [0, 1, 2, 3, 3, 3, 3, 3]
    assert times[0] == [4, 5, 6]
    assert all(h.rewards.sum() == 3 for h in agent.histories[1:4])
    assert cost.identical_to_full == 0


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_makes_as_many_tokens_as_asked_of_all_transitions(name):
    agent = Recorder(n_max=4)
    cost, _ = count(agent, name, 2, n_steps=9)
    assert [history.n for history in agent.histories] == [min(t, 2) for t in range(10)]
    assert agent.histories[-1].states[:, 0].max() < 4  # of the window, 5 is the first
    assert cost.tokens == np.mean([min(t, 2) + 1 for t in range(10)])


@pytest.mark.parametrize("positions", ["reindexed", "original"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_plays(agent, name, positions):
    for n_keep in (0, 3, 7):
        policy = policy_of(agent, name, n_keep, rng(), positions)
        assert play(policy, n_steps=10)[0].shape == (4, 10)
        assert policy.cost.decisions == 40
        assert policy.cost.identical_to_full == 0
        most = 7 if METHODS[name].keeps == "all" else n_keep
        assert (policy.cost.kept_max or 0) <= most


@pytest.mark.parametrize("n_keep", [-1, 8, 2.5, "4", [1]])
@pytest.mark.parametrize("name", ["recent", "centroids"])
def test_a_budget_that_the_model_cannot_read_is_an_error(agent, name, n_keep):
    with pytest.raises(UserError, match=r"n_keep as a whole number in 0\.\.7, .*got "):
        policy_of(agent, name, n_keep)
    assert policy_of(agent, name, np.int64(3)).n_keep == 3


# Positions


@pytest.mark.parametrize(
    ("kept", "n_raw", "n_max", "expected"),
    [
        ([0, 2, 3], 5, 7, [0, 2, 3, 5]),  # nothing slid out yet: each where it was
        ([5, 8, 9], 10, 5, [0, 3, 4, 5]),
        ([0, 1, 9], 10, 5, [0, 1, 4, 5]),  # two from before the window: the first places
        ([0, 5, 6], 10, 5, [0, 1, 2, 5]),  # the place of 5 is taken, so it and 6 move on
        ([0, 1, 2, 3, 4], 10, 5, [0, 1, 2, 3, 4, 5]),
        ([], 10, 5, [5]),
        ([], 0, 5, [0]),
    ],
)
@pytest.mark.parametrize("n_padding", [0, 2])
def test_kept_transitions_stand_where_the_full_history_has_them(
    kept, n_raw, n_max, expected, n_padding
):
    padded = torch.tensor([[PADDING] * n_padding + kept], dtype=torch.int64)
    assert original_positions(padded, n_raw, n_max)[0, n_padding:].tolist() == expected


@given(n_raw=st.integers(0, 30), n_max=st.integers(0, 12), data=st.data())
def test_original_positions_rise_and_fit_and_move_only_what_must_move(n_raw, n_max, data):
    n_window = min(n_raw, n_max)
    kept = data.draw(st.sets(st.integers(0, max(0, n_raw - 1)), max_size=n_window).map(sorted))
    placed = original_positions(torch.tensor([kept], dtype=torch.int64), n_raw, n_max)[0].tolist()
    assert placed[-1] == n_window
    assert placed == sorted(set(placed))
    assert placed[0] >= 0
    for j, (index, position) in enumerate(zip(kept, placed, strict=False)):
        in_place = index - (n_raw - n_window)
        assert position == in_place or (in_place < j == position)


@pytest.mark.parametrize(
    ("name", "n_keep", "expected"),
    [
        ("rewarded-recent", 3, {2: [0, 1, 2], 4: [0, 2, 3, 4], 9: [0, 3, 4, 5]}),
        ("top-k", 2, {9: [1, 3, 5]}),
    ],
)
def test_the_model_is_told_the_original_positions(name, n_keep, expected):
    agent = Recorder(n_max=5)
    count(agent, name, n_keep, 9, None, "original")
    for t, positions in expected.items():
        told = agent.positions[t]  # None: one behind the other
        assert told is None or told.tolist() == [positions] * 2
        assert told is not None or positions == list(range(len(positions)))


# Cost


@pytest.mark.parametrize(
    ("name", "looked"),
    [("recent", 0), ("top-k", 2 * (4 + 3 * 5))],  # windows of 3, 4, 4, 4 and the query
)
def test_the_cost_of_a_hand_worked_run(name, looked):
    """Budget 2 of 4: decisions after 0 .. 6 transitions, in two rooms."""
    cost, _ = count(Recorder(n_max=4), name, 2, n_steps=6)
    assert cost.decisions == 14
    assert (cost.tokens_read, cost.tokens_looked) == (2 * (1 + 2 + 3 * 5) + looked, looked)
    assert cost.over_budget == 8  # after 3, 4, 5 and 6
    assert (cost.kept_min, cost.kept_mean, cost.kept_max) == (2, 2.0, 2)
    assert cost.identical_to_full == 0
    assert min(cost.seconds_model, cost.seconds_selecting) > 0


def test_a_method_that_drops_nothing_is_noticed(monkeypatch):
    def latest_four(history, n_keep, generator):
        return METHODS["recent"].compress(history, min(history.n, 4))

    stubborn = Method("stubborn", "strategy", "", "", "nothing", "n_keep", (), latest_four)
    monkeypatch.setitem(METHODS, "stubborn", stubborn)
    cost, _ = count(Recorder(n_max=4), "stubborn", 2, n_steps=6)
    assert cost.identical_to_full == 8
    assert cost.kept_max == 4
