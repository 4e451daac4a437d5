"""The source algorithm, tabular Q-learning (Laskin et al. 2022, section 3).

One learner a goal and stream, all in one vectorised run. Optimistic initial values make it try
what it does not know; among equally good actions it keeps to the one it took last: straight lines
reach far corners. Exploration decays, from a rate that each stream draws, so that histories show
many ways to explore and to improve.

It learns what each action is worth in each state, or of afterstates (Sutton and Barto 2018, section
6.8): an action is worth what the cell is to which it leads, and need not be tried everywhere.
"""

import numpy as np
from tqdm import tqdm

from ad.darkroom import MOVES, N_ACTIONS, DarkRoom, all_goals
from ad.evaluation import possible
from config import EnvConfig, SourceConfig
from dataset import Histories


def learning_histories(
    goals: np.ndarray, env: EnvConfig, source: SourceConfig, seed: int, n_streams: int | None = None
) -> Histories:
    """Let a Q-learner learn each goal of `(G, 2 m)` from scratch, several times.

    Gives `N = G * n_streams` histories of whole episodes, those of a goal side by side.
    """
    goals = np.repeat(goals, n_streams or source.n_streams, axis=0)
    seeds = np.random.default_rng((seed, 1)).integers(2**40, size=len(goals))
    room = DarkRoom(goals, env.grid_size, env.horizon, env.env, seeds)
    n, n_steps = room.n_rooms, source.n_source_steps - source.n_source_steps % env.horizon
    states, next_states = np.empty((2, n, n_steps + 1, 2), dtype=np.int8)
    actions, rewards = np.empty((2, n, n_steps), dtype=np.int8)
    rng, to_cell = np.random.default_rng(seed), np.array([env.grid_size, 1])
    n_cells, n_hidden = env.grid_size**2, len(room.task.hidden)  # a state: a cell and what is found
    worth = _worth(env.grid_size, n_hidden, source.values)
    values = np.full((n, worth.max() + 1), source.initial_value, np.float32)
    epsilon_start = rng.uniform(source.epsilon_end, source.epsilon_start, size=n)
    states[:, 0] = room.reset()
    cells = np.empty((n, env.horizon + 1), dtype=np.int64)  # of this episode, with what is found
    for t in tqdm(range(n_steps), desc="source histories", unit="step", leave=False):
        k = t % env.horizon
        if k == 0:
            cells[:, 0] = states[:, t] @ to_cell
        decayed = min(1.0, t / n_steps / max(source.epsilon_decay, 1e-9))
        epsilon = epsilon_start + (source.epsilon_end - epsilon_start) * decayed
        greedy = _greedy(values, worth[cells[:, k]], actions[:, t - 1] if k else None, rng)
        random = rng.integers(N_ACTIONS, size=n)
        actions[:, t] = np.where(rng.random(n) < epsilon, random, greedy)
        next_states[:, t], rewards[:, t], done = room.step(actions[:, t])
        cells[:, k + 1] = next_states[:, t] @ to_cell + n_cells * room.n_found
        # As it happens, and again once the episode is over, from its end to its beginning.
        again = [*range(k, -1, -1)] * source.n_replays if done else []
        for i in [k, *again]:
            step = actions[:, t - k + i], rewards[:, t - k + i]
            _learn(values, worth, cells[:, i : i + 2], *step, n_hidden * n_cells, source)
        states[:, t + 1] = room.reset() if done else next_states[:, t]
    return Histories(states[:, :-1], actions, rewards, next_states[:, :-1], goals, env.horizon)


def _worth(size: int, n_hidden: int, of: str) -> np.ndarray:
    """Number `(states, A)` of the value that an action has in a state: a cell and what is found."""
    n_cells, n_found = size**2, np.arange(n_hidden + 1)[:, None, None]
    if of == "actions":
        return np.arange(n_found.size * n_cells * N_ACTIONS).reshape(-1, N_ACTIONS)
    reached = np.clip(all_goals(size)[:, None] + MOVES, 0, size - 1) @ [size, 1]  # (cells, A)
    return (n_found * n_cells + reached).reshape(-1, N_ACTIONS)


def _greedy(
    values: np.ndarray, worth: np.ndarray, before: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """Best actions `(N,)` by the numbers `worth (N, A)` of `values (N, V)`; of equals `before`."""
    rows, ties = np.arange(len(worth)), 1e-5 * rng.random(worth.shape, np.float32)
    if before is not None:
        ties[rows, before] = 2e-5
    return (values[rows[:, None], worth] + ties).argmax(axis=1)


def _learn(
    values: np.ndarray, worth: np.ndarray, cells: np.ndarray, actions: np.ndarray,
    rewards: np.ndarray, n_open: int, source: SourceConfig,
) -> None:  # fmt: skip
    """Learn `values (N, V)`, numbered by `worth (states, A)`, from steps between `cells (N, 2)`.

    From cell `n_open` on all is found, and there is no more to earn.
    """
    rows, (before, after) = np.arange(len(cells)), cells.T
    best = values[rows[:, None], worth[after]].max(axis=1) * (after < n_open)
    own = worth[before, actions]
    error = rewards + source.discount * best - values[rows, own]
    values[rows, own] += source.step_size * error  # float32


def relative_return(histories: Histories, episodes: slice, env: EnvConfig) -> float:
    """Mean reward an episode over `episodes` of all histories, as a part of the best possible."""
    returns = histories.episode_returns()[:, episodes].mean()
    return float(returns / possible(env, histories.goals).mean())
