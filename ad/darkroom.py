"""Dark Room, the grid world of Laskin et al. 2022 (section 4), for many goals at once.

An agent starts in the centre of a square room and sees its own position alone: the goal is hidden,
and only the reward, 1 on every step spent on it, tells where it is. Episodes have a fixed length.

    room = DarkRoom(goals=all_goals(9))                 # 81 rooms side by side
    states, rewards, done = room.step(np.full(81, 2))   # everyone one column to the right
"""

import numpy as np

from historylens.common.errors import expect

# Change of (row, column) for each action, 4 stays. A move into a wall stays as well.
MOVES = np.array([[1, 0], [-1, 0], [0, 1], [0, -1], [0, 0]], dtype=np.int64)
N_ACTIONS = len(MOVES)


class DarkRoom:
    """`N` rooms of `grid_size**2` cells stepped together, one goal (row, column) of `(N, 2)` each.

    The start is the cell in the centre; an episode has `horizon` steps.
    """

    def __init__(self, goals: np.ndarray, grid_size: int = 9, horizon: int = 20) -> None:
        self.goals, self.grid_size, self.horizon = np.asarray(goals), grid_size, horizon
        if self.goals.shape[1:] != (2,) or not _are_below(self.goals, grid_size):
            expected = f"expected goals of shape (N, 2) with entries 0..{grid_size - 1}"
            raise ValueError(f"{expected}, got {self.goals.tolist()}")
        self.n_rooms = len(self.goals)
        self.reset()

    def reset(self) -> np.ndarray:
        """Put every agent in the centre; returns `(N, 2)` states."""
        self.n_steps = 0
        self.states = np.tile(start_state(self.grid_size), (self.n_rooms, 1))
        return self.states

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Act once in every room, by actions `(N,)` int in 0..4.

        Gives next states `(N, 2)`, rewards `(N,)` of 0 or 1, and whether the episode ends here. The
        next state of the last step is the one reached, not that of the coming reset.
        """
        if self.n_steps >= self.horizon:
            raise RuntimeError(f"the episode ended after {self.horizon} steps: call reset() first")
        actions = np.asarray(actions)
        if actions.shape != (self.n_rooms,) or not _are_below(actions, N_ACTIONS):
            expected = f"expected {self.n_rooms} actions in 0..{N_ACTIONS - 1}"
            raise ValueError(f"{expected}, got {actions.tolist()}")
        self.states = np.clip(self.states + MOVES[actions], 0, self.grid_size - 1)
        self.n_steps += 1
        rewards = (self.states == self.goals).all(axis=1).astype(np.int64)
        return self.states, rewards, self.n_steps == self.horizon


def _are_below(values: np.ndarray, n: int) -> bool:
    """Whether all are whole numbers `0 .. n - 1`."""
    return values.dtype.kind in "iu" and bool(((values >= 0) & (values < n)).all())


def start_state(grid_size: int) -> np.ndarray:
    """(row, column) of the cell in which every episode starts: `(2,)` int."""
    return np.full(2, grid_size // 2)


def all_goals(grid_size: int) -> np.ndarray:
    """Every cell of the room, row by row: `(grid_size**2, 2)` int."""
    return np.stack(np.divmod(np.arange(grid_size**2), grid_size), axis=1)


def optimal_return(goals: np.ndarray, grid_size: int = 9, horizon: int = 20) -> np.ndarray:
    """Best possible reward an episode for each goal, `(N,)` for goals `(N, 2)`.

    The first step already earns where the goal is the start or a neighbour of it, so a goal
    `d >= 1` steps away earns on the steps `d .. horizon`.
    """
    distance = np.abs(np.asarray(goals) - start_state(grid_size)).sum(axis=1)
    return np.maximum(horizon + 1 - np.maximum(distance, 1), 0)


def split_goals(
    seed: int, grid_size: int = 9, n_test: int = 8, n_validation: int = 6
) -> dict[str, np.ndarray]:
    """Split the cells of the room at random into goals to train on, to validate on and to test on.

    The test goals depend on `seed` and `n_test` alone, so that runs which validate on more or
    fewer goals still share them. Each part is `(N, 2)`, row by row. UserError: too few cells.
    """
    n_cells = grid_size**2
    expect(
        min(n_test, n_validation) >= 1 and n_test + n_validation < n_cells,
        f"a room of {n_cells} cells cannot be split into {n_test} test goals, "
        f"{n_validation} validation goals and at least one to train on",
    )
    order = np.random.default_rng(seed).permutation(n_cells)
    test, validation, train = np.split(order, [n_test, n_test + n_validation])
    cells, parts = all_goals(grid_size), {"train": train, "validation": validation, "test": test}
    return {name: cells[np.sort(part)] for name, part in parts.items()}
