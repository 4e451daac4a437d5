"""The room as a map: the query's attention on the transitions that ended in each cell.

    room = RoomMap.of(agent, decision, rows, uniform_row)     # rows (P, n + 1): a panel a layer
    room.ratio                                                # (P, R, C)

Axes: `P` panels, `R` rows and `C` columns of the room, `n` transitions, `K` of this episode.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from historylens.agent import Agent
from historylens.analysis.job import Batch, Job
from historylens.common.errors import UserError
from historylens.common.files import rounded
from historylens.history import Decision


@dataclass(frozen=True)
class RoomMap:
    """One decision in its room."""

    attention: np.ndarray  # (P, R, C) on transitions that ended in a cell
    even: np.ndarray  # (R, C) what uniform attention puts on them
    visits: np.ndarray  # (R, C) int, how many they are
    rewarded: np.ndarray  # (R, C) int, how many of them were rewarded
    path: np.ndarray  # (K + 1, 2) int, cells of the current episode; the agent is in the last
    goals: np.ndarray  # (m, 2) int, in the order in which they count; none where not known

    @classmethod
    def of(
        cls, agent: Agent, decision: Decision, rows: np.ndarray, uniform_row: np.ndarray
    ) -> "RoomMap":
        """Put `rows (P, n + 1)` of attention on the map, and `uniform_row (n + 1,)`.

        The path is that of the episode of the query; where nothing says which it is, the latest if
        that leads to the query state, else one that has just begun. UserError: `position()` gives
        what is no cell of the room.
        """
        n, query = decision.n, np.reshape(decision.query_state, (1, -1))
        moved = decision.states, decision.next_states
        states, reached = (np.reshape(x, (n, query.size)) for x in moved)
        episodes = np.zeros(n) if decision.episodes is None else np.asarray(decision.episodes)
        number = decision.query_episode
        if number is None:
            number = episodes[-1] if np.array_equal(query, reached[-1:]) else np.nan  # of none
        ends, goal = _cells(agent, reached), [] if decision.goal is None else decision.goal

        def summed(weights: np.ndarray) -> np.ndarray:  # (..., n) -> (..., R, C)
            total = np.zeros((*weights.shape[:-1], *agent.room), dtype=weights.dtype)
            np.add.at(total, (..., *ends.T), weights)
            return total

        return cls(
            attention=summed(np.asarray(rows, dtype=np.float64)[:, :-1]),
            even=summed(np.asarray(uniform_row, dtype=np.float64)[:-1]),
            visits=summed(np.ones(n, dtype=int)),
            rewarded=summed(decision.rewarded.astype(int)),
            path=_cells(agent, np.concatenate([states[episodes == number], query])),
            goals=_cells(agent, np.reshape(goal, (-1, query.size))),
        )

    @property
    def ratio(self) -> np.ndarray:
        """`(P, R, C)` attention over what is even; NaN where the query reads no transition."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.even > 0, self.attention / self.even, np.nan)

    def numbers(self) -> dict[str, Any]:
        """Plain values, one a visited cell, row by row; a ratio to nothing is None."""
        seen = self.visits > 0
        return {
            "room": list(self.even.shape),
            "goals": self.goals.tolist(),
            "path": self.path.tolist(),
            "cells": np.argwhere(seen).tolist(),
            "visits": self.visits[seen].tolist(),
            "rewarded": self.rewarded[seen].tolist(),
            "even": rounded(self.even[seen]),
            "attention": rounded(self.attention[:, seen]),
            "ratio": rounded(self.ratio[:, seen], None),
        }


def room_maps(job: Job, batch: Batch) -> Iterator[tuple[int, RoomMap, list[str]]]:
    """Number, map, and names of the panels (layers, or with --heads heads) of what is drawn."""
    if job.agent.room is None:
        return
    names = [f"layer {layer}" for layer in batch.attention]
    if job.config.heads:
        pairs = zip(names, job.heads, strict=True)
        names = [f"{name} head {head}" for name, heads in pairs for head in heads]
    for place, decision in zip(batch.drawn, batch.decisions, strict=True):
        heads = [layer[place] for layer in batch.rows]
        panels = np.concatenate(heads) if job.config.heads else np.stack([x.mean(0) for x in heads])
        room = RoomMap.of(job.agent, decision, panels, batch.even[place])
        yield batch.indices[place], room, names


def _cells(agent: Agent, states: np.ndarray) -> np.ndarray:
    """Row and column `(N, 2)` int64 of states `(N, S)`; UserError: outside the room, or no cell."""
    given, (n_rows, n_columns) = np.asarray(agent.position(states)), agent.room
    inside = (given >= 0) & (given < agent.room) & (given == np.round(given))  # NaN: not inside
    for cell in given[~inside.all(axis=1)].tolist():
        what = f"a row in 0..{n_rows - 1} and a column in 0..{n_columns - 1}, whole numbers"
        size = "ROOM = (rows, columns) says how large the room is"
        raise UserError(f"position(): expected {what}, got {cell}; {size}")
    return given.astype(np.int64)
