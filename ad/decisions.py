"""Decisions of learning histories: spread over goals, histories and stages of learning.

A decision is one step of a learning history: the state the learner stood in, and as context the `n`
transitions before it.

    places = choose_decisions(histories, n_context=99, n_samples=10, seed=0)
    HistoryDecisions(histories, places, 99)[0]                                    # a Decision
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dataset import Histories, context_steps, max_stride_of
from historylens.common.errors import UserError
from historylens.history import Decision


class Place(NamedTuple):
    """Step `step` of history `history`, whose context joins every `stride`-th episode back."""

    history: int
    step: int
    stride: int = 1


@dataclass(frozen=True)
class HistoryDecisions(Sequence[Decision]):
    """Decisions of learning histories, each made as it is asked for: many take no memory.

    Attributes:
        histories: where they come from.
        places: which they are.
        n_context: transitions before each.
    """

    histories: Histories
    places: Sequence[Place]
    n_context: int

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Decision:
        histories, place = self.histories, self.places[index]
        history, step, stride = place
        horizon = histories.horizon
        context = context_steps(step, self.n_context, stride, horizon)
        row, col = histories.goals[history].tolist()
        joined = "" if stride == 1 else f", one episode in {stride}"
        return Decision(
            states=histories.states[history, context],
            actions=histories.actions[history, context],
            rewards=histories.rewards[history, context],
            query_state=histories.states[history, step],
            next_states=histories.next_states[history, context],
            episodes=context // horizon,
            title=f"goal ({row}, {col}), history {history}, episode {step // horizon + 1} of "
            f"{histories.n_steps // horizon}, step {step}{joined}",
            labels={"goal_row": row, "goal_col": col, **place._asdict()},
            task=int(self._tasks[history]),
        )

    @cached_property
    def _tasks(self) -> np.ndarray:
        """`(N,)` int, numbers of the goals of all histories."""
        return np.unique(self.histories.goals, axis=0, return_inverse=True)[1].ravel()


@dataclass(frozen=True)
class Filter:
    """Which decisions may be chosen; None: all.

    Attributes:
        goals: (row, column) of the goals whose histories count.
        histories: numbers of histories in the file.
        steps: first and last step of a history.
    """

    goals: Sequence[tuple[int, int]] | None = None
    histories: Sequence[int] | None = None
    steps: tuple[int, int] | None = None


def choose_decisions(
    histories: Histories,
    n_context: int,
    n_samples: int,
    seed: int,
    stride: int = 1,
    only: Filter | None = None,
) -> list[Place]:
    """Spread `n_samples` decisions evenly over goals, their histories, and stages of learning.

    Goals take turns, and so do the histories of each goal. The stages divide the eligible steps
    into `n_samples` equal parts, one decision from each, dealt out to the goals in random order.

    Args:
        histories: where the decisions come from.
        n_context: transitions before a decision `n`.
        n_samples: decisions wanted. Where fewer are eligible, all of them are taken.
        seed: seed of the choice; the same seed chooses the same decisions.
        stride: join every so many episodes.
        only: what is eligible.

    Raises:
        UserError: nothing is eligible.
    """
    rng = np.random.default_rng(seed)
    by_goal = _eligible_histories(histories, only or Filter(), rng)
    steps = _eligible_steps(histories, n_context, stride, only or Filter())
    n_eligible = len(steps) * sum(map(len, by_goal))
    if n_samples >= n_eligible:
        return [Place(int(h), int(t), stride) for rows in by_goal for h in rows for t in steps]
    turns = _take_turns(by_goal, n_samples, capacity=len(steps))  # (n_samples,) histories
    stages = (rng.permutation(n_samples) + rng.random(n_samples)) / n_samples
    chosen = np.empty(n_samples, dtype=int)
    for history in np.unique(turns):
        own = np.flatnonzero(turns == history)
        own = own[np.argsort(stages[own])]
        chosen[own] = steps[_distinct((stages[own] * len(steps)).astype(int), len(steps))]
    return [Place(int(h), int(t), stride) for h, t in zip(turns, chosen, strict=True)]


def _eligible_histories(
    histories: Histories, only: Filter, rng: np.random.Generator
) -> list[np.ndarray]:
    """Numbers of the eligible histories, one shuffled array a goal, goals in random order."""
    rows = np.arange(histories.n_histories)
    if only.histories is not None:
        unknown = sorted(set(only.histories) - set(rows.tolist()))
        if unknown:
            raise UserError(
                f"expected histories in 0..{histories.n_histories - 1}, got {unknown[0]}"
            )
        rows = np.unique(only.histories)
    goals = [tuple(goal) for goal in histories.goals.tolist()]
    if only.goals is not None:
        unknown = [goal for goal in only.goals if tuple(goal) not in goals]
        if unknown:
            there = ", ".join(f"{row},{col}" for row, col in dict.fromkeys(goals))
            raise UserError(
                f"no history of goal {unknown[0][0]},{unknown[0][1]}: expected one of {there}"
            )
        rows = np.array([row for row in rows if goals[row] in set(map(tuple, only.goals))])
    if not len(rows):
        raise UserError("no decision passes the filter: no history is of a goal asked for")
    by_goal: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        by_goal.setdefault(goals[row], []).append(int(row))
    groups = [rng.permutation(group) for group in by_goal.values()]
    return [groups[i] for i in rng.permutation(len(groups))]


def _eligible_steps(histories: Histories, n_context: int, stride: int, only: Filter) -> np.ndarray:
    """Steps that have a full context and lie in the range asked for, ascending."""
    steps = np.arange(histories.n_steps)
    steps = steps[max_stride_of(steps, n_context, histories.horizon) >= stride]
    if not steps.size:
        raise UserError(
            f"histories too short for the context: expected {n_context} transitions before a "
            f"decision (stride {stride}), got histories of {histories.n_steps} steps"
        )
    if only.steps is not None:
        first, last = only.steps
        inside = steps[(steps >= first) & (steps <= last)]
        if not inside.size:
            raise UserError(
                f"no decision passes the filter: expected steps between {steps[0]} (the first "
                f"with {n_context} transitions before it) and {steps[-1]}, got {first}:{last}"
            )
        steps = inside
    return steps


def _take_turns(by_goal: list[np.ndarray], n_turns: int, capacity: int) -> np.ndarray:
    """Deal out turns to the goals, and each goal's to its histories, `capacity` at most to each."""
    queues = [list(rows) * capacity for rows in by_goal]
    turns: list[int] = []
    for n_round in range(max(map(len, queues))):
        turns += [queue[n_round] for queue in queues if n_round < len(queue)]
        if len(turns) >= n_turns:
            break
    return np.array(turns[:n_turns])


def _distinct(indices: np.ndarray, size: int) -> np.ndarray:
    """Ascending indices below `size`, moved as little as it takes to make them distinct."""
    order = np.arange(len(indices))
    forward = np.maximum.accumulate(indices - order) + order
    return np.minimum(forward, size - len(indices) + order)
