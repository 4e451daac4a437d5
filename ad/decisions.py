"""Decisions of learning histories: spread over goals, histories and stages of learning.

places = choose_decisions(histories, n_context=99, n_samples=10, seed=0)
HistoryDecisions(histories, places, 99)[0]                                        # a Decision
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ad.darkroom import TASKS, Task
from dataset import CONTEXT, Histories, context_steps, max_stride_of
from historylens.common.batches import alike
from historylens.common.errors import UserError, expect
from historylens.history import Decision, spread_decisions


class Place(NamedTuple):
    """Step `step` of history `history`, whose context joins every `stride`-th episode back."""

    history: int
    step: int
    stride: int = 1


@dataclass(frozen=True)
class HistoryDecisions(Sequence[Decision]):
    """Decisions at `places`, `n_context` transitions before each, made as they are asked for."""

    histories: Histories
    places: Sequence[Place]
    n_context: int
    rewarded_above: float = 0.0
    task: Task = TASKS["darkroom"]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Decision:
        histories, horizon = self.histories, self.histories.horizon
        history, step, stride = place = self.places[index]
        context = context_steps(step, self.n_context, stride, horizon)
        goal = histories.goals[history]
        joined = "" if stride == 1 else f", one episode in {stride}"
        return Decision(
            **{name: getattr(histories, name)[history, context] for name in CONTEXT},
            query_state=histories.states[history, step],
            episodes=context // horizon,
            title=f"{self.task.titled(goal)}, history {history}, episode {step // horizon + 1} of "
            f"{histories.n_steps // horizon}, step {step}{joined}",
            labels=dict(zip(self.task.columns, goal.tolist(), strict=True)) | place._asdict(),
            task=int(self._tasks[history]),
            query_episode=step // horizon,
            goal=goal.reshape(-1, 2),
            rewarded_above=self.rewarded_above,
        )

    @cached_property
    def _tasks(self) -> np.ndarray:  # (N,) int, numbers of the goals of all histories
        return np.unique(self.histories.goals, axis=0, return_inverse=True)[1].ravel()


def choose_decisions(
    histories: Histories,
    n_context: int,
    n_samples: int,
    seed: int,
    stride: int = 1,
    goals: Sequence[tuple[int, ...]] | None = None,
    rows: Sequence[int] | None = None,
    bounds: tuple[int, int] | None = None,
) -> list[Place]:
    """Spread `n_samples` decisions evenly over goals, their histories, and stages of learning.

    As `spread_decisions` does, of `goals`, of histories `rows` by their number, from the first to
    the last step of `bounds`; None: any. UserError where there are none.
    """
    rng = np.random.default_rng(seed)
    groups = [rng.permutation(group) for group in _eligible_histories(histories, goals, rows)]
    by_goal = [groups[i] for i in rng.permutation(len(groups))]
    steps = np.arange(histories.n_steps)
    steps = steps[max_stride_of(steps, n_context, histories.horizon) >= stride]
    what = f"expected {n_context} transitions before a decision (stride {stride})"
    got = f"got histories of {histories.n_steps} steps"
    expect(steps.size, f"histories too short for the context: {what}, {got}")
    first, last = bounds or (steps[0], steps[-1])
    inside = steps[(steps >= first) & (steps <= last)]
    least = f"{steps[0]} (the first with {n_context} transitions before it)"
    what = f"expected steps between {least} and {steps[-1]}, got {first}:{last}"
    expect(inside.size, f"no decision passes the filter: {what}")
    chosen = spread_decisions(by_goal, inside, n_samples, rng)
    return [Place(history, step, stride) for history, step in chosen]


def _eligible_histories(
    histories: Histories, wanted: Sequence[tuple[int, ...]] | None, rows: Sequence[int] | None
) -> list[list[int]]:
    goals = [tuple(goal) for goal in histories.goals.tolist()]
    rows = range(len(goals)) if rows is None else sorted(set(rows))
    for row in rows:
        expect(row in range(len(goals)), f"expected histories in 0..{len(goals) - 1}, got {row}")
    known = dict.fromkeys(goals)
    wanted = known if wanted is None else dict.fromkeys(map(tuple, wanted))
    if unknown := [goal for goal in wanted if goal not in known]:
        goal, *there = (",".join(map(str, one)) for one in (unknown[0], *known))
        raise UserError(f"no history of goal {goal}: expected one of {'; '.join(there)}")
    groups = alike([row for row in rows if goals[row] in wanted], goals.__getitem__)
    expect(groups, "no decision passes the filter: no history is of a goal asked for")
    return groups
