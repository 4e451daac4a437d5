"""The environment of the examples: a corridor of which one end pays. Needs `pip install gymnasium`.

env = gymnasium.vector.SyncVectorEnv([lambda: Corridor("left end")])
"""

from typing import Any

import gymnasium

LENGTH, HORIZON = 9, 10


class Corridor(gymnasium.Env):
    """Cells in a row. Action 0 goes left, 1 right; each step on the end that pays earns 1."""

    observation_space = gymnasium.spaces.Discrete(LENGTH)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, goal: str) -> None:
        self.paying = 0 if goal == "left end" else LENGTH - 1

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict]:
        """Begin an episode in the middle."""
        super().reset(seed=seed)
        self.cell, self.n_steps = LENGTH // 2, 0
        return self.cell, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        """Take a step; the episode is cut after `HORIZON` of them."""
        self.cell = min(max(self.cell + (1 if action else -1), 0), LENGTH - 1)
        self.n_steps += 1
        return self.cell, float(self.cell == self.paying), False, self.n_steps == HORIZON, {}
