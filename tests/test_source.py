"""The source algorithm against plain Q-learning, and what it reaches."""

from dataclasses import replace

import numpy as np
import pytest
from plain_room import PlainRoom

from ad.darkroom import MOVES, TASKS, DarkRoom, all_goals, split_goals
from ad.source import learning_histories, relative_return
from config import DEFAULTS_OF, EnvConfig, SourceConfig
from dataset import Histories
from historylens.common.settings import from_dict

SMALL = EnvConfig(grid_size=3, horizon=4)


def plain_learning(goals, env, source, seed):
    """The slow twin: one room after the other, with the random numbers of the vectorised run."""
    rng = np.random.default_rng(seed)
    n, steps, size, f = len(goals), range(source.n_source_steps), env.grid_size, np.float32
    seeds = np.random.default_rng((seed, 1)).integers(2**40, size=n)
    rooms = DarkRoom(goals, size, env.horizon, env.env, seeds)  # of where episodes start alone
    starts = [rooms.reset() for _ in range(0, len(steps), env.horizon)]
    n_hidden, moves = len(TASKS[env.env].hidden), MOVES.tolist()
    epsilon_start = rng.uniform(source.epsilon_end, source.epsilon_start, size=n)
    noise = [(rng.random((n, 5), dtype=f), rng.integers(5, size=n), rng.random(n)) for _ in steps]
    taken = np.zeros((n, len(steps)), dtype=int)
    for i in range(n):
        room = PlainRoom(goals[i], size, env.horizon, env.env)
        q = {}  # by cell and how much is found, and the action, or by the cell it leads to

        def key(state, action):
            if source.values == "actions":
                return state, action
            moved = zip(state[0], moves[action], strict=True)
            return tuple(min(max(x + d, 0), size - 1) for x, d in moved), state[1]

        def values(state, q=q):
            return [q.get(key(state, action), f(source.initial_value)) for action in range(5)]

        def learn(state, action, reward, after, q=q, values=values):
            future = f(0) if after[1] == n_hidden else max(values(after))
            error = f(reward) + f(source.discount) * future - values(state)[action]
            q[key(state, action)] = values(state)[action] + f(source.step_size) * error

        for t in steps:
            if t % env.horizon == 0:
                state, episode = (room.reset(starts[t // env.horizon][i]), 0), []
            ties, random_action, coin = (draws[i] for draws in noise[t])
            decayed = min(1.0, t / len(steps) / source.epsilon_decay)
            epsilon = epsilon_start[i] * (1 - decayed) + source.epsilon_end * decayed
            ranked = [values(state)[a] + f(1e-5) * ties[a] for a in range(5)]
            if t % env.horizon:
                last = taken[i, t - 1]
                ranked[last] = values(state)[last] + f(2e-5)
            action = random_action if coin < epsilon else ranked.index(max(ranked))
            cell, reward, is_over = room.step(action)
            after = cell, state[1] + reward * TASKS[env.env].is_once
            episode.append((state, action, reward, after))
            learn(*episode[-1])
            for step in [*reversed(episode)] * (source.n_replays * is_over):
                learn(*step)
            taken[i, t], state = action, after
    return taken


@pytest.mark.parametrize("env", TASKS)
@pytest.mark.parametrize("values", ["actions", "afterstates"])
@pytest.mark.parametrize(("step_size", "n_replays"), [(1.0, 0), (0.3, 2)])
def test_vectorised_learning_equals_one_learner_after_the_other(env, values, step_size, n_replays):
    exploring = {"epsilon_start": 0.8, "epsilon_end": 0.1, "n_replays": n_replays, "values": values}
    source = SourceConfig(n_source_steps=160, step_size=step_size, **exploring)
    env = replace(SMALL, env=env, horizon=8)
    goals = all_goals(3, env.env)
    goals = goals[:: len(goals) // 4]
    fast = learning_histories(goals, env, source, seed=5, n_streams=2)
    plain = plain_learning(np.repeat(goals, 2, axis=0), env, source, seed=5)
    assert np.array_equal(fast.actions, plain)


@pytest.mark.parametrize("env", TASKS)
def test_the_source_improves_from_random_play_to_near_the_best_with_its_own_settings(env):
    flags = {"env": env} | DEFAULTS_OF[env]
    room, source = from_dict(EnvConfig, flags), from_dict(SourceConfig, flags)
    goals = split_goals(0, room.grid_size, env=env, n_train=40)["train"]
    learned = learning_histories(goals, room, source, seed=0, n_streams=1)
    assert relative_return(learned, slice(0, 1), room) < 0.3
    assert relative_return(learned, slice(-20, None), room) >= 0.95
    late = learned.episode_returns()[:, -20:].mean(axis=1)
    assert (late < late.max() / 4).mean() <= 0.02  # hardly a learner misses its goal


def test_histories_are_what_a_room_does_in_whole_episodes_streams_of_a_goal_side_by_side(tmp_path):
    source, goals = SourceConfig(n_streams=3, n_source_steps=403), np.array([[0, 0], [2, 1]])
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        learning_histories(goals, SMALL, source, seed).save(tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c
    histories = Histories.load(tmp_path / "a")
    assert histories.n_steps == 400
    assert histories.goals.tolist() == [[0, 0]] * 3 + [[2, 1]] * 3
    assert len({row.tobytes() for row in histories.actions}) == 6
    states, ends = histories.states, histories.next_states
    begins = np.arange(400) % SMALL.horizon == 0
    assert (states[:, begins] == SMALL.grid_size // 2).all()
    assert np.array_equal(states[:, ~begins], ends[:, :-1][:, ~begins[1:]])
    assert np.array_equal(ends, np.clip(states + MOVES[histories.actions], 0, 2))
    assert np.array_equal(histories.rewards, (ends == histories.goals[:, None]).all(axis=2))


def test_returns_and_parts_of_the_best_worked_by_hand():
    # 3 x 3, 4 steps: a corner earns at best 3 an episode, the centre 4
    rewards = np.array([[0, 0, 0, 0, 0, 0, 1, 1], [1, 0, 0, 0, 1, 1, 1, 1]])
    cells, goals = np.zeros((2, 8, 2), dtype=int), np.array([[0, 0], [1, 1]])
    histories = Histories(cells, cells[..., 0], rewards, cells, goals, horizon=4)
    assert histories.episode_returns().tolist() == [[0, 2], [1, 4]]
    assert relative_return(histories, slice(0, 1), SMALL) == pytest.approx(0.5 / 3.5)
    assert relative_return(histories, slice(-1, None), SMALL) == pytest.approx(3 / 3.5)
