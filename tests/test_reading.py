import numpy as np
import pytest
import torch
from conftest import PlainRoom, sharp_model
from hypothesis import given
from hypothesis import strategies as st
from test_views import plain_maps

from acting.lived import Lived
from acting.reading import (
    CompressedReader,
    Cost,
    ModelView,
    SlidingReader,
    original_positions,
    view,
)
from compression import CONTROLS, MERGES, STRATEGIES, History, Strategy, get_strategy
from config import ModelConfig, UserError
from darkroom import DarkRoom
from rollout import act, rollout

HORIZON = 4
GOALS = np.array([[1, 1], [0, 1], [2, 1], [1, 2]])


@pytest.fixture(scope="module")
def model():
    """Reads up to seven transitions."""
    config = ModelConfig(
        n_transit=8, tf_n_layer=2, tf_n_head=2, tf_n_embd=16, tf_n_inner=24, grid_size=3
    )
    return sharp_model(config, dtype=torch.float64)


def noises(n_rooms, seed=3):
    return [np.random.default_rng((seed, room)) for room in range(n_rooms)]


def play(reader, n_steps=20, goals=GOALS):
    """Rewards `(N, n_steps)` of rooms whose history the reader reads."""
    room = DarkRoom(goals, 3, HORIZON)
    return act(room, reader, n_steps, noises(len(goals)), tasks=np.arange(len(goals)))


def returns(rewards):
    return rewards.reshape(len(rewards), -1, HORIZON).sum(axis=2)


class Noting:
    """Keeps the logits `(B, A)` of every step that another reader gives."""

    device = "cpu"

    def __init__(self, reader):
        self.reader, self.logits = reader, []

    def act(self, lived, query_states):
        self.logits.append(self.reader.act(lived, query_states))
        return self.logits[-1]


class Recorder:
    """A model that keeps what it is given to read; it takes action 0 whatever that is."""

    def __init__(self, n_max=7, positions="reindexed"):
        self.histories, self.positions, self.looked = [], [], []
        self.view = ModelView(n_max, self.logits, self.look, positions)

    def logits(self, history, positions=None):
        self.histories.append(history)
        self.positions.append(positions)
        return torch.tensor([1e9, 0.0]).expand(history.size, -1)

    def look(self, history, wanted):
        self.looked.append((history, list(wanted)))
        time = torch.arange(history.n).expand(history.size, -1)
        return {"query_attention": (time == 1) * 0.5 + (time == 3) * 0.2}


class Counting:
    """An environment whose state is the time; the first reward of all is 1.5, then 0."""

    def __init__(self, n_rooms=2, horizon=HORIZON):
        self.states, self.horizon = np.zeros((n_rooms, 1)), horizon

    def reset(self):
        return self.states

    def step(self, actions):
        reward = np.full(len(self.states), 1.5 * (self.states[0, 0] == 0))
        self.states += 1  # in place, as environments with buffers do
        return self.states, reward, self.states[0, 0] % self.horizon == 0


def count(recorder, strategy, n_keep, n_steps, **more):
    """Read `n_steps` of `Counting`; gives the times `(B, k)` read before the last decision."""
    reader = CompressedReader(recorder.view, strategy, n_keep, **more)
    act(Counting(), reader, n_steps + 1, noises(2))
    return reader, recorder.histories[-1].states[..., 0].tolist()


def plain_compressed(model, goal, n_steps, noise, strategy, n_keep):
    """One room: a python list of transitions, compressed and read anew before every decision."""
    room = PlainRoom(goal, 3, HORIZON)
    past, all_logits, done, n_max = [], [], True, model.n_context_max
    for t in range(n_steps):
        state = room.reset() if done else state  # noqa: F821
        looks = bool({"query_attention", "received", "last_rows"} & set(strategy.needs))
        steps = past[-n_max:] if looks else past
        s, a, r, s_next, episode = (
            torch.tensor([step[k] for step in steps], dtype=torch.int64) for k in range(5)
        )
        parts = s.reshape(1, -1, 2), a[None], r[None], s_next.reshape(1, -1, 2)
        query = torch.tensor([state])
        known = {"query_states": query, "episodes": episode[None]}
        if looks:
            maps, n = torch.from_numpy(plain_maps(model, History(*parts, query), 0)), len(steps)
            known["query_attention"] = maps[None, n, :n]
            known["received"] = maps[None, :n, :n].sum(dim=1)
            known["last_rows"] = maps[None, max(0, n - 8) : n, :n]
        indices = strategy.select(History(*parts, **known), n_keep)
        with torch.no_grad():
            logits = model(*(part[:, indices[0]] for part in parts), query)
        action = int(np.argmax(logits[0].numpy() + noise[t]))
        next_state, reward, done = room.step(action)
        past.append((state, action, reward, next_state, t // HORIZON))
        all_logits.append(logits[0])
        state = next_state
    return [step[2] for step in past], torch.stack(all_logits)


PLAIN = ["recent", "rewarded-recent", "even", "one-visit", "last-episodes", "best-episodes"]
PLAIN += ["nearest", "diverse", "top-k", "threshold", "prune-low", "accumulated-recent"]
PLAIN += ["pooled-votes", "empty"]


@pytest.mark.parametrize("name", PLAIN)
def test_rooms_together_act_as_each_alone_with_its_list_of_transitions(model, name):
    strategy = STRATEGIES[name]
    reader = Noting(CompressedReader(view(model), strategy, n_keep=4))
    goals = GOALS[:2]
    rewards = play(reader, n_steps=14, goals=goals)
    for i, goal in enumerate(goals):
        noise = np.random.default_rng((3, i)).gumbel(size=(14, 5))
        expected, logits = plain_compressed(model, goal, 14, noise, strategy, 4)
        assert rewards[i].tolist() == expected
        found = torch.stack(reader.logits)[:, i]
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("positions", ["reindexed", "original"])
@pytest.mark.parametrize(("name", "n_keep"), [("full", None), ("full", 2), ("recent", 7)])
def test_full_history_acts_as_a_rollout_with_a_sliding_context(model, name, n_keep, positions):
    reader = Noting(CompressedReader(view(model, positions), STRATEGIES[name], n_keep))
    sliding = Noting(SlidingReader(model, len(GOALS)))
    rewards = play(reader)
    assert np.array_equal(rewards, play(sliding))
    for found, expected in zip(reader.logits, sliding.logits, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    expected = rollout(model, GOALS, n_episodes=5, seed=3, horizon=HORIZON)
    assert np.array_equal(returns(rewards), expected)
    assert expected.sum() > 0


def test_a_sliding_reader_acts_as_a_rollout(model):
    for sliding, horizon in (("step", HORIZON), ("episode", 3)):
        reader = SlidingReader(model, 4, sliding, horizon)
        rewards = act(DarkRoom(GOALS, 3, horizon), reader, 24, noises(4))
        expected = rollout(model, GOALS, 24 // horizon, 3, horizon, sliding)
        assert np.array_equal(rewards.reshape(4, -1, horizon).sum(axis=2), expected)


def last_logits(reader):
    """Logits of the last of ten decisions."""
    noting = Noting(reader)
    play(noting, n_steps=10)
    return noting.logits[-1]


def differ(one, other):
    return (one - other).abs().max() > 1e-3


def test_a_smaller_budget_changes_the_logits(model):
    full = last_logits(CompressedReader(view(model), STRATEGIES["full"]))
    assert differ(last_logits(CompressedReader(view(model), STRATEGIES["recent"], 6)), full)


def test_original_positions_change_the_logits(model):
    arms = [
        last_logits(CompressedReader(view(model, where), STRATEGIES["recent"], 3))
        for where in ("reindexed", "original")
    ]
    assert differ(*arms)


def test_strategies_choose_among_everything_lived_through():
    read = count(Recorder(n_max=3), STRATEGIES["best-episodes"], 3, n_steps=12)[1]
    assert read == [[1, 2, 3]] * 2  # the end of the one episode with a reward
    read = count(Recorder(n_max=3), STRATEGIES["rewarded-recent"], 3, n_steps=9)[1]
    assert read == [[0, 7, 8]] * 2


def test_strategies_that_look_at_attention_choose_among_what_the_model_can_look_at():
    recorder = Recorder(n_max=5)
    read = count(recorder, STRATEGIES["top-k"], 2, n_steps=9)[1]
    assert read == [[5, 7]] * 2
    looked, wanted = recorder.looked[-1]
    assert looked.states[0, :, 0].tolist() == [4, 5, 6, 7, 8]
    assert wanted == ["query_attention"]


def test_nothing_is_looked_at_where_everything_is_kept():
    for n_keep in (0, 5):
        recorder = Recorder(n_max=5)
        reader, read = count(recorder, STRATEGIES["top-k"], n_keep, n_steps=9)
        assert recorder.looked == []
        assert read == [[4, 5, 6, 7, 8][:n_keep]] * 2
        assert reader.cost.tokens_looked == 0


@pytest.mark.parametrize("positions", ["reindexed", "original"])
def test_decisions_may_keep_different_counts(positions):
    """Six transitions, of which the model reads the latest four; the states are 1, 10, 100, .."""
    weights = torch.tensor([[0.3, 0.0, 0.2, 0.0], [0.0, 0.9, 0.0, 0.0], [0.0, 0.0, 0.0, 0.3]])
    seen, placed = [], []

    def logits(history, where=None):
        seen.append(history.states[..., 0].tolist())
        placed.append(None if where is None else where.tolist())
        return history.states.sum(dim=(1, 2))[:, None] * torch.tensor([0.0, 1.0])

    lived = Lived(3, 6, 1, state_dtype=torch.float64)
    for t in range(6):
        state = 10.0 ** torch.full((3, 1), t, dtype=torch.float64)
        lived.append(state, torch.zeros(3).long(), torch.zeros(3), state)
    model = ModelView(4, logits, lambda history, wanted: {"query_attention": weights}, positions)
    reader = CompressedReader(model, STRATEGIES["threshold"], 3)
    found = reader.act(lived, torch.zeros(3, 1))
    assert seen == [[[1e3], [1e5]], [[1e2, 1e4]]]
    if positions == "original":
        assert placed == [[[1, 4], [3, 4]], [[0, 2, 4]]]
    assert found[:, 1].tolist() == [10100, 1000, 100000]
    cost = reader.cost
    assert (cost.kept_min, cost.kept_max, cost.kept_sum, cost.over_budget) == (1, 2, 4, 3)
    assert cost.tokens_read == 3 * 5 + 4 + 3


def test_a_control_changes_the_full_sliding_window():
    recorder = Recorder(n_max=3)
    reader = CompressedReader(recorder.view, CONTROLS["shuffled-rewards"], None, rng())
    act(Counting(), reader, 8, noises(2))
    assert [history.n for history in recorder.histories] == [0, 1, 2, 3, 3, 3, 3, 3]
    assert recorder.histories[-1].states[0, :, 0].tolist() == [4, 5, 6]
    assert all(h.rewards.sum() == 3 for h in recorder.histories[1:4])
    assert reader.cost.identical_to_full == 0


def test_a_control_takes_the_history_of_another_task():
    recorder = Recorder(n_max=3)
    reader = CompressedReader(recorder.view, CONTROLS["other-task"], generator=rng())
    lived = Lived(3, 1, 1, tasks=torch.tensor([5, 5, 6]))
    state = torch.tensor([[0], [1], [2]])
    lived.append(state, torch.zeros(3).long(), torch.zeros(3), state)
    reader.act(lived, state)
    others = recorder.histories[0]
    assert others.states[:2, 0, 0].tolist() == [2, 2]
    assert others.states[2, 0, 0] < 2
    assert others.query_states[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", sorted(MERGES))
def test_a_merge_makes_as_many_tokens_as_asked_of_everything(name):
    recorder = Recorder(n_max=4)
    reader = count(recorder, MERGES[name], 2, n_steps=9)[0]
    assert [history.n for history in recorder.histories] == [min(t, 2) for t in range(10)]
    assert recorder.histories[-1].states[:, 0].max() < 4  # of the window, 5 is the first
    assert reader.cost.tokens_per_decision == np.mean([min(t, 2) + 1 for t in range(10)])


@pytest.mark.parametrize("positions", ["reindexed", "original"])
@pytest.mark.parametrize("name", [*STRATEGIES, *MERGES, *CONTROLS])
def test_every_way_to_compress_plays(model, name, positions):
    strategy = CONTROLS[name] if name in CONTROLS else get_strategy(name)
    for n_keep in (0, 3, 7):
        reader = CompressedReader(view(model, positions), strategy, n_keep, rng())
        assert play(reader, n_steps=10).shape == (4, 10)
        assert reader.cost.decisions == 40
        assert reader.cost.identical_to_full == 0
        most = 7 if name in ("full", *CONTROLS) else n_keep
        assert (reader.cost.kept_max or 0) <= most


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("make", [rng, lambda seed: torch.Generator().manual_seed(seed)])
def test_what_is_drawn_depends_on_the_generator_alone(model, make):
    one, same, other = (
        last_logits(CompressedReader(view(model), STRATEGIES["random"], 3, make(seed)))
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert differ(one, other)


def test_drawing_leaves_the_action_noise_alone(model):
    """Where the draw cannot matter, arms that draw act exactly as one that does not."""
    arms = [
        play(CompressedReader(view(model), STRATEGIES[name], 7, rng()), n_steps=8)
        for name in ("random", "decay", "importance", "full")
    ]
    assert all(np.array_equal(arm, arms[0]) for arm in arms)


@pytest.mark.parametrize("n_keep", [-1, 8, 2.5, "4", [1]])
@pytest.mark.parametrize("strategy", [STRATEGIES["recent"], MERGES["centroids"]])
def test_a_budget_that_the_model_cannot_read_is_an_error(model, strategy, n_keep):
    with pytest.raises(UserError, match=r"n_keep as a whole number in 0\.\.7, .*got "):
        CompressedReader(view(model), strategy, n_keep)


def test_a_numpy_budget_is_a_whole_number(model):
    assert CompressedReader(view(model), STRATEGIES["recent"], np.int64(3)).n_keep == 3


def test_a_model_that_cannot_be_looked_into_is_an_error_for_strategies_that_look():
    blind = ModelView(4, lambda history: torch.zeros(history.size, 2))
    CompressedReader(blind, STRATEGIES["recent"], 2)
    with pytest.raises(UserError, match=r"'top-k' looks at query_attention.*cannot be looked into"):
        CompressedReader(blind, STRATEGIES["top-k"], 2)


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
def test_kept_transitions_stand_where_the_full_history_has_them(kept, n_raw, n_max, expected):
    indices = torch.tensor([kept], dtype=torch.int64)
    assert original_positions(indices, n_raw, n_max).tolist() == [expected]


@given(n_raw=st.integers(0, 30), n_max=st.integers(0, 12), data=st.data())
def test_original_positions_rise_and_fit_and_move_only_what_must_move(n_raw, n_max, data):
    n_window = min(n_raw, n_max)
    kept = data.draw(st.sets(st.integers(0, max(0, n_raw - 1)), max_size=n_window).map(sorted))
    found = original_positions(torch.tensor([kept], dtype=torch.int64), n_raw, n_max)[0].tolist()
    assert found[-1] == n_window
    assert found == sorted(set(found))
    assert found[0] >= 0
    for j, (index, position) in enumerate(zip(kept, found, strict=False)):
        in_place = index - (n_raw - n_window)
        assert position == in_place or (in_place < j == position)


def test_the_model_is_told_the_original_positions():
    recorder = Recorder(n_max=5, positions="original")
    count(recorder, STRATEGIES["rewarded-recent"], 3, n_steps=9)
    assert recorder.positions[2].tolist() == [[0, 1, 2]] * 2
    assert recorder.positions[4].tolist() == [[0, 2, 3, 4]] * 2
    assert recorder.positions[9].tolist() == [[0, 3, 4, 5]] * 2
    recorder = Recorder(n_max=5, positions="original")
    count(recorder, STRATEGIES["top-k"], 2, n_steps=9)
    assert recorder.positions[9].tolist() == [[1, 3, 5]] * 2


def test_the_cost_of_a_hand_worked_run():
    """Budget 2 of 4: decisions after 0 .. 6 transitions, in two rooms."""
    cost = count(Recorder(n_max=4), STRATEGIES["recent"], 2, n_steps=6)[0].cost
    assert cost.decisions == 14
    assert cost.tokens_read == 2 * (1 + 2 + 3 * 5)
    assert cost.tokens_looked == 0
    assert cost.over_budget == 8  # after 3, 4, 5 and 6
    assert (cost.kept_min, cost.kept_mean, cost.kept_max) == (2, 2.0, 2)
    assert cost.identical_to_full == 0
    assert cost.seconds_model > 0
    assert cost.seconds_selecting > 0


def test_looking_is_counted_among_what_the_model_reads():
    cost = count(Recorder(n_max=4), STRATEGIES["top-k"], 2, n_steps=6)[0].cost
    assert cost.tokens_looked == 2 * (4 + 3 * 5)  # windows of 3, 4, 4, 4 and the query
    assert cost.tokens_read == 2 * (1 + 2 + 3 * 5) + cost.tokens_looked


def test_a_strategy_that_drops_nothing_is_found_out():
    stubborn = Strategy(
        "stubborn", "keeps the window", "", "nothing", "n_keep", (),
        lambda history, n_keep, generator: STRATEGIES["recent"].select(history, min(history.n, 4)),
    )  # fmt: skip
    cost = count(Recorder(n_max=4), stubborn, 2, n_steps=6)[0].cost
    assert cost.identical_to_full == 8
    assert cost.kept_max == 4


def test_cost_of_a_cached_context():
    model = sharp_model(
        ModelConfig(n_transit=4, tf_n_layer=1, tf_n_head=1, tf_n_embd=8, tf_n_inner=8, grid_size=3)
    )
    reader = SlidingReader(model, 4)
    play(reader, n_steps=6)
    # One token and the query while it grows; after 4 and 5 steps the last three anew
    assert reader.cost.tokens_read == 4 * (1 + 2 + 2 + 2 + 4 + 4)
    assert reader.cost.decisions == 24
    assert (reader.cost.over_budget, reader.cost.kept_mean) == (8, 3.0)
    assert reader.cost.identical_to_full == 0


def test_costs_add_up():
    one = Cost(10, 30, 5, 1.0, 2.0, 4, 8, 1, 3, 0)
    two = Cost(1, 2, 0, 0.5, 0.25, 1, 5, 5, 5, 1)
    assert one + two == Cost(11, 32, 5, 1.5, 2.25, 5, 13, 1, 5, 1)
    assert one + Cost() == Cost() + one == one
    assert one.decisions == 10
    assert (one.kept_mean, one.tokens_per_decision) == (2.0, 3.0)
    assert Cost().kept_mean is None
