"""The source algorithm, tabular Q-learning (Laskin et al. 2022, section 3).

One learner a goal and stream, all of them in one vectorised run. Optimistic initial values make
each learner try every action everywhere. Among equally good actions it keeps to the one it took
last, so that it explores in straight lines, which reach the far corners of the room. Its rate of
exploration decays on the way, and each stream draws its own starting rate, so that the histories
show many ways to explore and to improve.

    histories = learning_histories(goals, EnvConfig(), SourceConfig(), seed=0)
"""

import numpy as np
from tqdm import tqdm

from ad.darkroom import N_ACTIONS, DarkRoom, optimal_return
from config import EnvConfig, SourceConfig
from dataset import Histories


def learning_histories(
    goals: np.ndarray, env: EnvConfig, source: SourceConfig, seed: int, n_streams: int | None = None
) -> Histories:
    """Let a Q-learner learn each goal of `(G, 2)` from scratch, several times.

    Returns:
        `G * n_streams` histories of `n_source_steps` steps cut to whole episodes, those of a goal
        side by side. `n_streams` is that of `source` if left out.
    """
    n_streams = source.n_streams if n_streams is None else n_streams
    room = DarkRoom(np.repeat(goals, n_streams, axis=0), env.grid_size, env.horizon)
    n, n_steps = room.n_rooms, source.n_source_steps - source.n_source_steps % env.horizon
    states, next_states = np.empty((2, n, n_steps + 1, 2), dtype=np.int8)
    actions, rewards = np.empty((2, n, n_steps), dtype=np.int8)
    learner = QLearner(n, env.grid_size**2, N_ACTIONS, source, np.random.default_rng(seed))
    states[:, 0] = room.reset()
    for t in tqdm(range(n_steps), desc="source histories", unit="step", leave=False):
        cell = states[:, t] @ np.array([env.grid_size, 1])
        last = actions[:, t - 1] if t % env.horizon else None
        actions[:, t] = learner.act(cell, t / n_steps, last)
        next_states[:, t], rewards[:, t], done = room.step(actions[:, t])
        learner.learn(cell, actions[:, t], rewards[:, t], next_states[:, t] @ [env.grid_size, 1])
        states[:, t + 1] = room.reset() if done else next_states[:, t]
    states, next_states = states[:, :-1], next_states[:, :-1]
    return Histories(states, actions, rewards, next_states, room.goals, env.horizon)


class QLearner:
    """`N` independent tabular Q-learners over `n_cells` states, acted and updated together."""

    def __init__(
        self, n: int, n_cells: int, n_actions: int, source: SourceConfig, rng: np.random.Generator
    ) -> None:
        self.source, self.rng = source, rng
        self.values = np.full((n, n_cells, n_actions), source.initial_value, dtype=np.float32)
        self.epsilon_start = rng.uniform(source.epsilon_end, source.epsilon_start, size=n)
        self.rows = np.arange(n)

    def act(self, cell: np.ndarray, progress: float, last: np.ndarray | None = None) -> np.ndarray:
        """Epsilon-greedy actions `(N,)` of each learner.

        Args:
            cell: `(N,)` int, where each learner stands.
            progress: part of the run that lies behind, 0 to 1.
            last: `(N,)` int, the action before, which wins ties; None as an episode begins. Other
                ties are broken at random.
        """
        n, n_actions = len(self.rows), self.values.shape[2]
        decayed = min(1.0, progress / max(self.source.epsilon_decay, 1e-9))
        epsilon = self.epsilon_start + (self.source.epsilon_end - self.epsilon_start) * decayed
        tie_break = 1e-5 * self.rng.random((n, n_actions), dtype=np.float32)
        if last is not None:
            tie_break[self.rows, last] = 2e-5
        greedy = (self.values[self.rows, cell] + tie_break).argmax(axis=1)
        random = self.rng.integers(n_actions, size=n)
        return np.where(self.rng.random(n) < epsilon, random, greedy)

    def learn(
        self, cell: np.ndarray, action: np.ndarray, reward: np.ndarray, next_cell: np.ndarray
    ) -> None:
        """One Q-learning update of each learner; all arguments `(N,)`."""
        target = reward + self.source.discount * self.values[self.rows, next_cell].max(axis=1)
        error = target - self.values[self.rows, cell, action]
        self.values[self.rows, cell, action] += self.source.step_size * error


def relative_return(histories: Histories, episodes: slice, grid_size: int) -> float:
    """Mean reward an episode over `episodes` of all histories, as a part of the best possible."""
    returns = histories.episode_returns()[:, episodes].mean()
    best = optimal_return(histories.goals, grid_size, histories.horizon).mean()
    return float(returns / best)
