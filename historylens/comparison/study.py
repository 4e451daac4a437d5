"""From the returns of compressed and of full history to a table, verdicts and one recommendation.

    study = judge(outcomes, margin_share=0.05, best=None, seed=0)
    study.rows, study.doubts, study.recommended

An arm is a strategy at a budget. All arms acted on the same goals with the same action noise, so
each is compared with full history run by run. The score of a run is its return an episode over the
second half of its episodes; what is lost on the way there is the adaptation loss.

Axes: `G` goals, `R` seeds of each, `E` episodes of a run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from comparison.intervals import LEVEL, Bootstrap, Estimate, Verdict, late_scores, verdict
from compression import CONTROLS

FULL, EMPTY, RANDOM, RECENT = "full", "empty", "random", "recent"


@dataclass(frozen=True, order=True)
class Arm:
    """A strategy, merge or control by its name, and its budget; None where it has none."""

    name: str
    n_keep: int | None = None

    @property
    def key(self) -> str:
        """How files name it: `recent@20`, `full`."""
        return self.name if self.n_keep is None else f"{self.name}@{self.n_keep}"

    @property
    def is_candidate(self) -> bool:
        """Whether it is a way to compress: neither full history nor a control."""
        return self.name != FULL and self.name not in CONTROLS


@dataclass(frozen=True)
class Outcome:
    """What an arm earned and cost.

    Attributes:
        arm: the arm.
        returns: `(G, R, E)` reward of each episode.
        cost: plain numbers, those of `acting.reading.Cost` (see `playing.cost_of`).
    """

    arm: Arm
    returns: np.ndarray
    cost: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """An arm in numbers; rewards are an episode's, over the second half unless said otherwise.

    Attributes:
        arm: the arm.
        mean, iqm: over runs.
        part_of_best, iqm_of_best: the same of each run's part of its goal's best possible return;
            None where that is not known.
        difference: paired, of the arm's return to full history's.
        verdict: on that difference; None for full history itself.
        adaptation_loss: full history's reward minus the arm's over all episodes: the area between
            their curves, an episode.
        by_episode: `(E,)` mean over runs.
        cost: as in `Outcome`.
    """

    arm: Arm
    mean: Estimate
    iqm: Estimate
    part_of_best: Estimate | None
    iqm_of_best: Estimate | None
    difference: Estimate
    verdict: Verdict | None
    adaptation_loss: Estimate
    by_episode: np.ndarray
    cost: Mapping[str, Any]

    @property
    def kept(self) -> float:
        """Transitions really kept, on average, once there is more history than the budget."""
        kept = self.cost.get("kept_mean")
        return float(self.arm.n_keep or 0) if kept is None else float(kept)

    @property
    def tokens(self) -> float:
        """Tokens read for a decision, looking at attention included."""
        return float(self.cost["tokens_per_decision"])

    @property
    def is_good(self) -> bool:
        """Whether it is shown to lose less than the margin."""
        return self.verdict in ("better", "safe")


@dataclass(frozen=True)
class Confirmation:
    """The most promising arm once more beside full history, on runs that did not choose it.

    Attributes:
        row: the arm, judged on these runs alone.
        full: full history in the same runs.
        margin: reward an episode, the same part of full history's return as in the study.
        n_seeds: runs of each goal.
    """

    row: Row
    full: Row
    margin: float
    n_seeds: int


@dataclass(frozen=True)
class Study:
    """A judged comparison.

    Attributes:
        rows: all arms, the highest return first.
        full_by_episode: E intervals of full history's return in each episode.
        margin_share: the loss that would not matter, a part of full history's return.
        margin: the same in reward an episode.
        doubts: why no compression can be judged on this model; empty where it can.
        recommended: the smallest budget that is safe or better and saves tokens, among equal
            budgets the highest return; None where there is none, or a doubt.
        n_compared: arms that were compared with full history, controls left out.
        stands_corrected: whether the recommended arm's verdict holds at the level that corrects for
            all these comparisons (Bonferroni).
        confirmation: what became of the most promising arm, where none was recommended at first.
    """

    rows: tuple[Row, ...]
    full_by_episode: tuple[Estimate, ...]
    margin_share: float
    margin: float
    doubts: tuple[str, ...]
    recommended: Row | None
    n_compared: int
    stands_corrected: bool
    confirmation: Confirmation | None = None

    def row(self, name: str, n_keep: int | None = None) -> Row | None:
        """The row of an arm, or None."""
        arm = Arm(name, n_keep)
        return next((row for row in self.rows if row.arm == arm), None)

    @property
    def full(self) -> Row:
        """Full history."""
        return self.row(FULL)

    @property
    def empty(self) -> Row:
        """No history."""
        return self.row(EMPTY)

    @property
    def candidates(self) -> tuple[Row, ...]:
        """Ways to compress that have a budget, the highest return first."""
        rows = (row for row in self.rows if row.arm.is_candidate)
        return tuple(row for row in rows if row.arm.n_keep is not None)

    @property
    def unsettled(self) -> tuple[Row, ...]:
        """Candidates that save tokens and whose verdict is open, the most promising first."""
        rows = (r for r in self.candidates if r.verdict == "inconclusive")
        saving = (row for row in rows if row.tokens < self.full.tokens)
        return tuple(sorted(saving, key=lambda r: (-r.difference.value, r.tokens, r.arm.key)))

    @property
    def to_confirm(self) -> Arm | None:
        """The arm worth more runs: the most promising one, where nothing is recommended yet."""
        if self.doubts or self.recommended is not None or not self.unsettled:
            return None
        return self.unsettled[0].arm


def judge(
    outcomes: Sequence[Outcome],
    margin_share: float,
    best: Sequence[float] | None = None,
    seed: int = 0,
) -> Study:
    """Compare every arm with full history.

    Args:
        outcomes: of all arms, "full" and "empty" among them, on the same goals and seeds.
        margin_share: the loss that would not matter, as a part of full history's return (of its
            size, where returns are negative).
        best: `G` best possible returns an episode, where they are known and positive.
        seed: of the bootstrap.

    Raises:
        ValueError: "full" or "empty" is missing, or the returns differ in shape.
    """
    by_arm = {outcome.arm: outcome for outcome in outcomes}
    if not {Arm(FULL), Arm(EMPTY)} <= by_arm.keys():
        raise ValueError("expected the arms full and empty among the outcomes")
    full = by_arm[Arm(FULL)].returns
    n_goals, n_seeds, n_episodes = full.shape
    if any(outcome.returns.shape != full.shape for outcome in outcomes):
        raise ValueError(f"expected returns of shape {full.shape} of every arm")
    bootstrap = Bootstrap(n_goals, n_seeds, seed)
    margin = margin_share * abs(float(late_scores(full).mean()))
    rows = [_row(outcome, full, margin, best, bootstrap) for outcome in by_arm.values()]
    rows.sort(key=lambda row: (-row.mean.value, row.kept, row.arm.key))
    doubts = tuple(_doubts(rows, full, by_arm[Arm(EMPTY)].returns, bootstrap))
    recommended = None if doubts else _recommended(rows)
    n_compared = sum(row.arm.is_candidate for row in rows)
    stands = False
    if recommended is not None:
        difference = late_scores(by_arm[recommended.arm].returns) - late_scores(full)
        level = 1 - (1 - LEVEL) / n_compared
        stands = verdict(bootstrap.mean(difference, level), margin) in ("better", "safe")
    return Study(
        rows=tuple(rows),
        full_by_episode=tuple(bootstrap.mean(full[:, :, e]) for e in range(n_episodes)),
        margin_share=margin_share,
        margin=margin,
        doubts=doubts,
        recommended=recommended,
        n_compared=n_compared,
        stands_corrected=stands,
    )


def confirm(
    study: Study,
    full: Outcome,
    arm: Outcome,
    best: Sequence[float] | None = None,
    seed: int = 0,
) -> Study:
    """The study with its most promising arm judged on new runs, and recommended if they confirm it.

    One comparison, chosen before its runs were played: nothing has to be corrected for.

    Args:
        study: whose `to_confirm` was played again.
        full, arm: full history and that arm in the new runs, which are of the same goals.
        best: as for `judge`.
        seed: of the bootstrap.
    """
    bootstrap = Bootstrap(*full.returns.shape[:2], seed)
    margin = study.margin_share * abs(float(late_scores(full.returns).mean()))
    rows = [_row(each, full.returns, margin, best, bootstrap) for each in (full, arm)]
    found = Confirmation(rows[1], rows[0], margin, full.returns.shape[1])
    recommended = study.row(arm.arm.name, arm.arm.n_keep) if found.row.is_good else None
    return replace(study, confirmation=found, recommended=recommended)


def _row(
    outcome: Outcome,
    full: np.ndarray,
    margin: float,
    best: Sequence[float] | None,
    bootstrap: Bootstrap,
) -> Row:
    scores = late_scores(outcome.returns)
    difference = bootstrap.mean(scores - late_scores(full))
    parts = None
    if best is not None and min(best) > 0:
        parts = scores / np.asarray(best, dtype=np.float64)[:, None]
    return Row(
        arm=outcome.arm,
        mean=bootstrap.mean(scores),
        iqm=bootstrap.iqm(scores),
        part_of_best=None if parts is None else bootstrap.mean(parts),
        iqm_of_best=None if parts is None else bootstrap.iqm(parts),
        difference=difference,
        verdict=None if outcome.arm == Arm(FULL) else verdict(difference, margin),
        adaptation_loss=bootstrap.mean((full - outcome.returns).mean(axis=2)),
        by_episode=outcome.returns.mean(axis=(0, 1)),
        cost=outcome.cost,
    )


def _doubts(
    rows: Sequence[Row], full: np.ndarray, empty: np.ndarray, bootstrap: Bootstrap
) -> list[str]:
    """Why the model may ignore its history; nothing where it is shown to use it."""
    gain = bootstrap.mean(late_scores(full) - late_scores(empty))
    if gain.is_open:
        return ["One seed a goal gives no interval: run at least two (--seeds)."]
    doubts = []
    if gain.low <= 0:
        doubts.append(
            "Full history is not shown to earn more than an empty one: "
            f"{_interval(gain)} reward an episode."
        )
    for row in rows:
        if row.arm.name in CONTROLS and row.is_good:
            doubts.append(
                f"With the control {row.arm.name} it earns as much as with its own history: "
                f"difference {_interval(row.difference)}."
            )
    return doubts


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def _recommended(rows: Sequence[Row]) -> Row | None:
    full = next(row for row in rows if row.arm == Arm(FULL))
    able = [
        row for row in rows if row.arm.is_candidate and row.is_good and row.tokens < full.tokens
    ]
    budget = min((row.arm.n_keep or 0 for row in able), default=math.inf)
    smallest = [row for row in able if (row.arm.n_keep or 0) == budget]
    return max(smallest, key=lambda row: (row.mean.value, -row.tokens), default=None)
