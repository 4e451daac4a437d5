"""What a comparison plays: a model that reads history, and an environment with several goals.

    task = darkroom_task(load_checkpoint(path), "reindexed")
    room = task.make_room(np.array([0, 1, 1]))          # three rooms, two of them of goal 1

Anything with a `ModelView` and rooms that step together can be a `Task`: nothing here or in
`comparison.playing` asks what kind of model or environment it is.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from acting.views import ModelView, Positions, view
from checkpoint import Checkpoint, check_can_act
from config import EnvConfig, UserError, from_dict
from darkroom import DarkRoom, optimal_return
from rollout import Room


@dataclass(frozen=True)
class Task:
    """A model and an environment.

    Attributes:
        name: the model and the environment in a few words, for titles.
        view: the model.
        make_room: from the goal number of each of `N` rooms, `(N,)` int, to the rooms.
        goals: names of the goals, by number; none of them was trained on.
        best: best possible return an episode of each goal, or None where it is not known.
        horizon: steps an episode.
        identity: plain values on which results depend beside these, such as the model's file.
    """

    name: str
    view: ModelView
    make_room: Callable[[np.ndarray], Room]
    goals: tuple[str, ...]
    best: tuple[float, ...] | None
    horizon: int
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def n_goals(self) -> int:
        """Number of goals `G`."""
        return len(self.goals)


def darkroom_task(checkpoint: Checkpoint, positions: Positions) -> Task:
    """An AD model in Dark Room, on the test goals that its checkpoint holds.

    Raises:
        UserError: the checkpoint holds no test goals, or such that its room has not.
    """
    check_can_act(checkpoint)
    goals = checkpoint.goals.get("test") if isinstance(checkpoint.goals, dict) else None
    if not goals:
        raise UserError(
            f"{checkpoint.path} holds no test goals: expected its goals to have a list 'test', "
            "goals that the model was not trained on; train again, or name another --checkpoint"
        )
    model = checkpoint.model
    env = from_dict(EnvConfig, checkpoint.config | {"grid_size": model.config.grid_size})
    try:
        cells = np.array(goals)
        DarkRoom(cells, env.grid_size, env.horizon)
    except ValueError as error:
        raise UserError(f"{checkpoint.path}: its test goals do not fit its room: {error}") from None
    best = optimal_return(cells, env.grid_size, env.horizon)
    return Task(
        name=f"AD in Dark Room, {model.config.tf_n_layer} layers, {model.config.n_transit} tokens",
        view=view(model, positions),
        make_room=lambda numbers: DarkRoom(cells[numbers], env.grid_size, env.horizon),
        goals=tuple(f"({row}, {col})" for row, col in cells.tolist()),
        best=tuple(best.tolist()),
        horizon=env.horizon,
        identity={
            "checkpoint": hashlib.sha256(Path(checkpoint.path).read_bytes()).hexdigest(),
            "grid_size": env.grid_size,
        },
    )
