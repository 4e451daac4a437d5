"""The Dark Room tasks of Laskin et al. 2022 (section 4), for many goals at once.

An agent walks in a square room and sees its own position alone: what it looks for is hidden, and
only the reward tells where it is. Episodes have a fixed length and go on when all is found.

- `darkroom`: 9 x 9, 20 steps from the centre; reward 1 on every step on the goal.
- `darkroom-hard`: 17 x 17, 20 steps from the centre; reward 1 exactly once an episode.
- `key-to-door`: 9 x 9, 50 steps from a cell drawn at random; reward 1 once for the key, which must
  be found first, and 1 once for the door, which takes another step where both are one cell.

In some public code an episode ends with the last reward, or `key-to-door` starts in the centre.

    room = DarkRoom(goals=all_goals(9))     # 81 rooms side by side
    states, rewards, done = room.step(np.full(81, 2))   # everyone one column to the right
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from historylens.common.errors import expect

# Change of (row, column) for each action, 4 stays. A move into a wall stays as well.
MOVES = np.array([[1, 0], [-1, 0], [0, 1], [0, -1], [0, 0]], dtype=np.int64)
N_ACTIONS = len(MOVES)


@dataclass(frozen=True)
class Task:
    """What tells one task from another."""

    title: str
    hidden: tuple[str, ...] = ("goal",)  # what is looked for, in this order: a cell of each
    is_once: bool = True  # each pays once an episode, when it is its turn; else on every step
    starts_anywhere: bool = False  # in a cell drawn for each episode; else in the centre

    @property
    def columns(self) -> list[str]:
        """Names of the `2 m` numbers of a goal: `goal_row`, `goal_col`."""
        return [f"{name}_{part}" for name in self.hidden for part in ("row", "col")]

    def titled(self, goal: Sequence[int]) -> str:
        """A goal `(2 m,)` in words: `goal (2, 7)`, or `key (2, 7), door (0, 1)`."""
        pairs = zip(self.hidden, goal[::2], goal[1::2], strict=True)
        return ", ".join(f"{name} ({row}, {col})" for name, row, col in pairs)

    def name(self, goal: Sequence[int]) -> str:
        """The same without "goal" where there is nothing else: `(2, 7)`."""
        return self.titled(goal).removeprefix("goal ")


TASKS = {
    "darkroom": Task("Dark Room", is_once=False),
    "darkroom-hard": Task("Dark Room Hard"),
    "key-to-door": Task("Dark Key-to-Door", ("key", "door"), starts_anywhere=True),
}


class DarkRoom:
    """`N` rooms of `grid_size**2` cells stepped together, one goal of `(N, 2 m)` int each.

    A goal is (row, column) of each of the `m` hidden things of `TASKS[env]`. An episode has
    `horizon` steps. Where it starts by chance, that depends on the room's own of `seeds` `(N,)`.
    """

    def __init__(
        self,
        goals: np.ndarray,
        grid_size: int = 9,
        horizon: int = 20,
        env: str = "darkroom",
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.goals, self.grid_size, self.horizon = np.asarray(goals), grid_size, horizon
        self.n_rooms, self.task = len(self.goals), TASKS[env]
        if self.task.starts_anywhere:
            seeds = range(self.n_rooms) if seeds is None else seeds
            self._chance = [np.random.default_rng((int(seed), 1)) for seed in seeds]
        self.reset()

    def reset(self) -> np.ndarray:
        """Put every agent where an episode starts; returns `(N, 2)` states."""
        self.n_steps = 0
        self.n_found = np.zeros(self.n_rooms, dtype=np.int64)  # hidden things, of this episode
        self.states = np.full((self.n_rooms, 2), self.grid_size // 2)
        if self.task.starts_anywhere:
            drawn = [rng.integers(self.grid_size, size=2) for rng in self._chance]
            self.states = np.array(drawn).reshape(-1, 2)
        return self.states

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Act once in every room, by actions `(N,)` int in 0..4.

        Gives states reached `(N, 2)`, rewards `(N,)` of 0 or 1, and whether the episode ends here.
        """
        if self.n_steps >= self.horizon:
            raise RuntimeError(f"the episode ended after {self.horizon} steps: call reset() first")
        self.states = np.clip(self.states + MOVES[actions], 0, self.grid_size - 1)
        self.n_steps += 1
        cells = self.goals.reshape(-1, len(self.task.hidden), 2)
        wanted = np.minimum(self.n_found, cells.shape[1] - 1)  # the one whose turn it is
        is_there = (self.states == cells[np.arange(self.n_rooms), wanted]).all(axis=1)
        rewards = (is_there & (self.n_found < cells.shape[1])).astype(np.int64)
        self.n_found = self.n_found + rewards * self.task.is_once
        return self.states, rewards, self.n_steps == self.horizon


def all_goals(grid_size: int, env: str = "darkroom") -> np.ndarray:
    """Every goal of a task, row by row: `(grid_size ** (2 m), 2 m)` int."""
    n_numbers = 2 * len(TASKS[env].hidden)
    return np.indices((grid_size,) * n_numbers).reshape(n_numbers, -1).T


def optimal_return(
    goals: np.ndarray, grid_size: int = 9, horizon: int = 20, env: str = "darkroom"
) -> np.ndarray:
    """Best possible reward an episode for each goal `(N, 2 m)`, the mean over all starts: `(N,)`.

    A goal `d` steps away, at the start 1, earns on the steps `d .. horizon`, or once.
    """
    task, goals = TASKS[env], np.asarray(goals)
    cells = goals.reshape(-1, len(task.hidden), 2)
    starts = all_goals(grid_size) if task.starts_anywhere else np.full((1, 2), grid_size // 2)
    steps = np.abs(cells[:, None, 0] - starts).sum(axis=2).clip(1)  # (N, starts)
    if not task.is_once:
        return (horizon + 1 - steps[:, 0]).clip(0)
    between = np.abs(np.diff(cells, axis=1)).sum(axis=2).clip(1).cumsum(axis=1)  # (N, m - 1)
    arrivals = np.concatenate([steps[:, None], steps[:, None] + between[:, :, None]], axis=1)
    return (arrivals <= horizon).sum(axis=1).mean(axis=1)


def split_goals(
    seed: int, grid_size: int = 9, n_test: int = 8, n_validation: int = 6,
    env: str = "darkroom", n_train: int | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Split the goals of a task at random into those to train on, to validate on and to test on.

    The test goals depend on `seed` and `n_test` alone. Each part is `(N, 2 m)`, row by row; to
    train on there are `n_train`, or all that are left. UserError: too few of them.
    """
    goals = all_goals(grid_size, env)
    n_train = len(goals) - n_test - n_validation if n_train is None else n_train
    ends = np.cumsum([n_test, n_validation, n_train])
    what = f"a room of {grid_size**2} cells has {len(goals)} goals: they cannot be split into"
    parts = f"{n_test} test goals, {n_validation} validation goals and"
    others = f"{n_train if n_train > 0 else 'at least one'} to train on"
    is_room = min(n_test, n_validation, n_train) >= 1 and ends[-1] <= len(goals)
    expect(is_room, f"{what} {parts} {others}")
    order = np.random.default_rng(seed).permutation(len(goals))
    test, validation, train, _ = (goals[np.sort(part)] for part in np.split(order, ends))
    return {"train": train, "validation": validation, "test": test}
