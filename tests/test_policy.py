"""Deciding on compressed history: what is read, where it stands, what it costs."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from agents import ModelAgent, Recorder
from conftest import sharp_model
from hypothesis import given
from hypothesis import strategies as st
from plain_room import PlainRoom, plain_play
from test_history import plain_look

from ad.darkroom import DarkRoom
from config import ModelConfig
from historylens.agent import rollout
from historylens.comparison import policy as module
from historylens.comparison.policy import CompressedPolicy, Cost
from historylens.compression.method import METHODS
from historylens.history import LOOKS, PADDING, History, HistoryBuffer

HORIZON = 4
GOALS = np.array([[1, 1], [0, 1]])


@pytest.fixture(scope="module")
def model():
    size = {"tf_n_layer": 2, "tf_n_head": 2, "tf_n_embd": 16, "tf_n_inner": 24}
    return sharp_model(ModelConfig(n_transit=8, grid_size=3, **size), dtype=torch.float64)


def policy_of(agent, name, n_keep=None, *more):
    return CompressedPolicy(agent, METHODS[name], n_keep, *more)


def play(policy, n_steps):
    """Rewards `(2, n_steps)` and logits `(n_steps, 2, A)` of rooms in which a policy acts."""
    logits, act = [], policy.act
    policy.device, policy.act = "cpu", lambda *seen: (logits.append(act(*seen)), logits[-1])[1]
    noises = [np.random.default_rng((3, room)) for room in range(2)]
    rooms = DarkRoom(GOALS, 3, HORIZON)
    return rollout(rooms, policy, n_steps, noises, tasks=np.arange(2))[0], torch.stack(logits)


class Counting:
    """An environment whose state is the time; the first reward of all is 1.5, then 0."""

    horizon = HORIZON

    def __init__(self):
        self.states, self.rewards = np.zeros((2, 1)), np.zeros(2)

    def reset(self):
        return self.states

    def step(self, actions):
        self.rewards[:] = 1.5 * (self.states[0, 0] == 0)
        self.states += 1  # in place, as environments with buffers do
        return self.states, self.rewards, False


def count(agent, name, n_keep, n_steps, *more):
    """Cost of `n_steps` in `Counting` and one more, and the times `(B, k)` read before the last."""
    policy, noises = policy_of(agent, name, n_keep, *more), [np.random.default_rng(0)] * 2
    rewards, ends = rollout(Counting(), policy, n_steps + 1, noises, tasks=np.array([3, 8]))
    assert rewards.tolist() == [[1.5] + [0] * n_steps] * 2
    assert np.flatnonzero(ends[1]).tolist() == [*range(HORIZON - 1, n_steps + 1, HORIZON)]
    assert agent.histories[-1].tasks.tolist() == [3, 8]
    return policy.cost, agent.histories[-1].states[..., 0].tolist()


def plain_shown(model, method, n_keep, history):
    looks = {*LOOKS} & {*method.needs}
    if looks or method.keeps == "all":
        history = history.latest(model.n_context_max)
    if looks:
        known = plain_look(model, history, 0).items()
        history = replace(history, **{name: torch.from_numpy(x)[None] for name, x in known})
    return method.compress(history, n_keep)


@pytest.mark.parametrize("name", [
    "full", "empty", "recent", "best-episodes", "nearest", "threshold", "accumulated-recent",
    "pooled-votes", "norm", "contribution", "head-1-0",
])  # fmt: skip
def test_rooms_together_act_as_each_alone_with_its_list_of_transitions(model, name):
    rewards, logits = play(policy_of(ModelAgent(model), name, 4), n_steps=11)
    for i, goal in enumerate(GOALS):
        noise = np.random.default_rng((3, i)).gumbel(size=(11, 5))
        shown = partial(plain_shown, model, METHODS[name], 4)
        expected, alone = plain_play(model, PlainRoom(goal, 3, HORIZON), noise, shown)
        assert rewards[i].tolist() == expected
        torch.testing.assert_close(logits[:, i], alone, rtol=0, atol=1e-9)


def test_the_model_is_told_the_original_positions_of_what_is_not_one_behind_the_other():
    agent = Recorder(n_max=5)
    assert count(agent, "rewarded-recent", 3, 9, None, "original")[1] == [[0, 7, 8]] * 2
    assert agent.positions[2] is None
    told = [agent.positions[t].tolist() for t in (4, 9)]
    assert told == [[[0, 2, 3, 4]] * 2, [[0, 3, 4, 5]] * 2]
    count(agent, "top-k", 2, 9, None, "original")
    assert agent.positions[-1].tolist() == [[1, 3, 5]] * 2


@pytest.mark.parametrize(("positions", "placed"), [
    ("reindexed", [None, None]), ("original", [[[1, 4], [3, 4]], [[0, 2, 4]]]),
])  # fmt: skip
def test_decisions_may_keep_different_counts(positions, placed):
    weights = torch.tensor([[0.3, 0, 0.2, 0], [0, 0.9, 0, 0], [0, 0, 0, 0.3]])
    buffer = HistoryBuffer(torch.empty(3, 1, dtype=torch.float64), 6)
    for t in range(6):  # of which the model reads the latest four
        state = 10.0 ** torch.full((3, 1), t, dtype=torch.float64)
        buffer.append(state, torch.zeros(3).long(), torch.zeros(3), state, done=False)
    agent = Recorder(4, lambda h: h.states.sum(dim=1) * torch.tensor([0.0, 1.0]), lambda h: weights)
    policy = policy_of(agent, "threshold", 3, None, positions)
    assert policy.act(buffer, torch.zeros(3, 1))[:, 1].tolist() == [10100, 1000, 100000]
    assert [h.states[..., 0].tolist() for h in agent.histories] == [[[1e3], [1e5]], [[1e2, 1e4]]]
    assert [None if where is None else where.tolist() for where in agent.positions] == placed
    cost = policy.cost
    assert (cost.kept_min, cost.kept_max, cost.kept_sum, cost.over_budget) == (1, 2, 4, 3)
    assert cost.tokens_read == 3 * 5 + 4 + 3
    cost = Cost.sum([cost, Cost(kept_min=3, kept_max=3), Cost()])
    assert (cost.kept_min, cost.kept_max) == (1, 3)


def test_a_control_changes_the_full_sliding_window_and_a_merge_makes_as_many_tokens_as_asked():
    agent = Recorder(n_max=3)
    cost, times = count(agent, "shuffled-rewards", None, 7, np.random.default_rng(0))
    assert [history.n for history in agent.histories] == [0, 1, 2, 3, 3, 3, 3, 3]
    assert times[0] == [4, 5, 6]
    assert all(h.rewards.sum() == 3 for h in agent.histories[1:4])
    assert cost.identical_to_full == 0
    for name in (name for name, each in METHODS.items() if each.kind == "merge"):
        agent = Recorder(n_max=4)
        cost, _ = count(agent, name, 2, n_steps=9)
        assert agent.histories[-1].states[:, 0].max() < 4  # of the window, 5 is the first
        assert cost.tokens == np.mean([min(t, 2) + 1 for t in range(10)])


@pytest.mark.parametrize("name", [*METHODS, "head-0-1"])
def test_a_decision_takes_one_pass_over_what_is_kept_and_a_look_one_over_the_window(model, name):
    passes, method = [], METHODS[name]
    looks = {*LOOKS} & {*method.needs}
    hook = model.register_forward_pre_hook(lambda _, args: passes.append(args[1].shape[1]))
    for n_keep, positions in ((0, "reindexed"), (3, "original"), (3, "reindexed"), (7, "original")):
        policy = policy_of(ModelAgent(model), name, n_keep, np.random.default_rng(0), positions)
        act = policy.act

        def counting(buffer, query_states, act=act, n_keep=n_keep):
            passes.clear()
            logits = act(buffer, query_states)
            n_window = min(buffer.n, 7)
            n_looks = int(0 < n_keep < n_window and bool(looks))
            assert passes[:n_looks] == [n_window] * n_looks
            kept = passes[n_looks:]
            assert len(kept) == len({*kept})  # one for all that keep equally many
            whole = {"all": n_window, "none": 0, "n_keep": min(n_keep, n_window)}
            assert kept == [whole.get(method.keeps)] or method.keeps == "up to n_keep"
            return logits

        policy.act = counting
        play(policy, n_steps=11)
        assert (policy.cost.decisions, policy.cost.identical_to_full) == (22, 0)
        assert (policy.cost.kept_max or 0) <= (7 if method.keeps == "all" else n_keep)
    hook.remove()


@pytest.mark.parametrize(
    ("name", "limit"), [*((name, 2**25) for name in METHODS), ("recent", 40), ("top-k", 40)]
)
def test_what_is_remembered_is_what_would_be_run_again(model, name, limit, monkeypatch):
    monkeypatch.setattr(module, "MAX_WEIGHTS", limit)
    agent, anew = ModelAgent(model), {"acted_anew", "selected_anew"}
    for n_keep, positions in ((0, "reindexed"), (2, "original"), (3, "reindexed")):
        played, costs = {}, {}
        for agent.reads_inputs_alone in (False, True):
            policy = policy_of(agent, name, n_keep, torch.Generator().manual_seed(0), positions)
            played[agent.reads_inputs_alone] = play(policy, n_steps=16)
            costs[agent.reads_inputs_alone] = vars(policy.cost)
        assert np.array_equal(played[True][0], played[False][0])
        assert torch.allclose(played[True][1], played[False][1], rtol=0, atol=1e-12)
        times = {"seconds_model", "seconds_selecting"}
        same = [{k: x for k, x in each.items() if k not in anew | times} for each in costs.values()]
        assert same[0] == same[1]
        assert [costs[False][field] for field in anew] == [32, 32]
        assert all(0 < costs[True][field] <= 32 for field in anew)
        # Without history what is read is the cell, one of nine.
        assert costs[True]["acted_anew"] <= 9 or n_keep > 0 or METHODS[name].keeps == "all"


def test_a_history_is_run_once_and_padding_told_apart_until_too_much_is_kept(monkeypatch):
    times = torch.arange(3).expand(3, 3)
    raw = History(times[..., None], times, times.float(), times[..., None], torch.zeros(3, 1))
    padded = raw.take(torch.tensor([[PADDING, 0, 2], [PADDING, PADDING, 2], [PADDING, 0, 2]]))
    assert torch.equal(padded.actions[0], padded.actions[1])
    memory = module.Memory(keeps=True)
    for n_new, limit in ((2, 2), (0, 1), (2, 1)):  # numbers that may be kept
        monkeypatch.setattr(module, "MAX_WEIGHTS", limit)
        [values], found = memory.recall(lambda some: [some.counts], padded)
        assert (values.tolist(), found) == ([2, 1, 2], n_new)


@given(n_raw=st.integers(0, 30), n_max=st.integers(0, 12), data=st.data())
def test_kept_transitions_stand_where_full_history_has_them_or_next_to_it(n_raw, n_max, data):
    n_window = min(n_raw, n_max)
    kept = data.draw(st.sets(st.integers(0, max(0, n_raw - 1)), max_size=n_window).map(sorted))
    padding = [PADDING] * data.draw(st.integers(0, 2))
    placed = module.original_positions(torch.tensor([padding + kept]).long(), n_raw, n_max)
    expected, free = [], 0
    for index in kept:
        expected.append(max(index - (n_raw - n_window), free))  # in place, if that is free
        free = expected[-1] + 1
    assert placed[0, len(padding) :].tolist() == [*expected, n_window]
    assert free <= n_window


def test_the_cost_of_a_hand_worked_run_and_of_a_method_that_drops_nothing(monkeypatch):
    """Budget 2 of 4: decisions after 0 .. 6 transitions, in two rooms."""
    for name, looked in (("recent", 0), ("top-k", 2 * (4 + 3 * 5))):  # windows, the query
        cost, _ = count(Recorder(n_max=4), name, 2, n_steps=6)
        assert (cost.decisions, cost.over_budget) == (14, 8)  # over after 3, 4, 5 and 6
        assert (cost.tokens_read, cost.tokens_looked) == (2 * (1 + 2 + 3 * 5) + looked, looked)
        assert (cost.kept_min, cost.kept_sum, cost.kept_max) == (2, 16, 2)
        assert cost.identical_to_full == 0
        assert min(cost.seconds_model, cost.seconds_selecting) > 0
    stubborn = replace(METHODS["top-k"], apply=lambda history, *_: history)
    monkeypatch.setitem(METHODS, "stubborn", stubborn)
    cost, _ = count(Recorder(n_max=4), "stubborn", 2, n_steps=6)
    assert (cost.identical_to_full, cost.kept_max) == (8, 4)
