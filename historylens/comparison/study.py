"""From the returns of compressed and of full history to a table, verdicts and one recommendation.

    study = judge(results, margin_share=0.05, best=None, seed=0)
    study.rows, study.doubts, study.recommended

An arm is a method at a budget. All arms acted on the same goals with the same action noise, so
each is compared with full history run by run. The score of a run is its return an episode over the
second half of its episodes; what is lost on the way there is the adaptation loss.

Axes: `G` goals, `R` seeds of each, `E` episodes of a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from historylens.comparison.intervals import Bootstrap, Estimate, Verdict, late_scores, verdict
from historylens.comparison.policy import Cost
from historylens.compression.method import METHODS, Method

FULL, EMPTY, RANDOM, RECENT = "full", "empty", "random", "recent"


@dataclass(frozen=True)
class Arm:
    """A method of `METHODS` by its name, and its budget; None where it has none."""

    name: str
    n_keep: int | None = None

    @property
    def key(self) -> str:
        """How files name it: `recent@20`, `full`."""
        return self.name if self.n_keep is None else f"{self.name}@{self.n_keep}"

    @property
    def method(self) -> Method:
        """What it does to the history."""
        return METHODS[self.name]

    @property
    def is_candidate(self) -> bool:
        """Whether it is a way to compress: neither full history nor a control."""
        return self.name != FULL and self.method.kind != "control"


@dataclass(frozen=True)
class Result:
    """What an arm earned, `returns` `(G, R, E)` reward of each episode, and what it cost."""

    arm: Arm
    returns: np.ndarray
    cost: Cost = field(default_factory=Cost)


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
        cost: of its decisions.
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
    cost: Cost

    @property
    def kept(self) -> float:
        """Transitions really kept, on average, once there is more history than the budget."""
        mean = self.cost.kept_mean
        return float(self.arm.n_keep or 0) if mean is None else mean

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
        stands_corrected: whether the recommended arm's verdict holds at the level that corrects for
            all comparisons with full history (Bonferroni).
        confirmation: what became of the most promising arm, where none was recommended at first.
    """

    rows: tuple[Row, ...]
    full_by_episode: tuple[Estimate, ...]
    margin_share: float
    margin: float
    doubts: tuple[str, ...]
    recommended: Row | None = None
    stands_corrected: bool = False
    confirmation: Confirmation | None = None

    def row(self, name: str, n_keep: int | None = None) -> Row | None:
        """The row of an arm, or None."""
        return next((row for row in self.rows if row.arm == Arm(name, n_keep)), None)

    @property
    def full(self) -> Row:
        """Full history."""
        return self.row(FULL)

    @property
    def empty(self) -> Row:
        """No history."""
        return self.row(EMPTY)

    @property
    def n_compared(self) -> int:
        """Arms that were compared with full history, controls left out."""
        return sum(row.arm.is_candidate for row in self.rows)

    @property
    def candidates(self) -> tuple[Row, ...]:
        """Ways to compress that have a budget, the highest return first."""
        rows = (row for row in self.rows if row.arm.is_candidate)
        return tuple(row for row in rows if row.arm.n_keep is not None)

    @property
    def unsettled(self) -> list[Row]:
        """Candidates that save tokens and whose verdict is open, the most promising first."""
        rows = [row for row in self.candidates if row.verdict == "inconclusive"]
        rows = [row for row in rows if row.cost.tokens < self.full.cost.tokens]
        return sorted(rows, key=lambda row: (-row.difference.value, row.cost.tokens, row.arm.key))

    @property
    def to_confirm(self) -> Arm | None:
        """The arm worth more runs: the most promising one, where nothing is recommended yet."""
        is_settled = self.doubts or self.recommended is not None or not self.unsettled
        return None if is_settled else self.unsettled[0].arm


def judge(
    results: Sequence[Result],
    margin_share: float,
    best: Sequence[float] | None = None,
    seed: int = 0,
) -> Study:
    """Compare every arm with full history.

    Args:
        results: of all arms, "full" and "empty" among them, on the same goals and seeds.
        margin_share: the loss that would not matter, as a part of full history's return (of its
            size, where returns are negative).
        best: `G` best possible returns an episode, where they are known and positive.
        seed: of the bootstrap.
    """
    returns = {result.arm: result.returns for result in results}
    full, empty = returns[Arm(FULL)], returns[Arm(EMPTY)]
    rows, margin, bootstrap = _compared(results, full, margin_share, best, seed)
    rows.sort(key=lambda row: (-row.mean.value, row.kept, row.arm.key))
    study = Study(
        rows=tuple(rows),
        full_by_episode=tuple(map(bootstrap.mean, np.moveaxis(full, 2, 0))),
        margin_share=margin_share,
        margin=margin,
        doubts=tuple(_doubts(rows, bootstrap.mean(late_scores(full) - late_scores(empty)))),
    )
    recommended = None if study.doubts else _recommended(study)
    if recommended is None:
        return study
    difference = late_scores(returns[recommended.arm]) - late_scores(full)
    corrected = verdict(bootstrap.mean(difference, study.n_compared), margin)
    stands = corrected in ("better", "safe")
    return replace(study, recommended=recommended, stands_corrected=stands)


def confirm(
    study: Study,
    full: Result,
    arm: Result,
    best: Sequence[float] | None = None,
    seed: int = 0,
) -> Study:
    """The study with its most promising arm judged on new runs, and recommended if they confirm it.

    One comparison, chosen before its runs were played: nothing has to be corrected for.

    Args:
        study: whose `to_confirm` was played again.
        full, arm: full history and that arm in the new runs, which are of the same goals.
        best, seed: as for `judge`.
    """
    rows, margin, _ = _compared([arm, full], full.returns, study.margin_share, best, seed)
    confirmation = Confirmation(*rows, margin, n_seeds=full.returns.shape[1])
    recommended = study.row(arm.arm.name, arm.arm.n_keep) if rows[0].is_good else None
    return replace(study, confirmation=confirmation, recommended=recommended)


def _compared(
    results: Sequence[Result],
    full: np.ndarray,
    margin_share: float,
    best: Sequence[float] | None,
    seed: int,
) -> tuple[list[Row], float, Bootstrap]:
    """A row of each result, the margin, and the bootstrap that all intervals come from."""
    bootstrap, full_scores = Bootstrap(*full.shape[:2], seed), late_scores(full)
    margin = margin_share * abs(float(full_scores.mean()))
    rows = []
    for result in results:
        scores = late_scores(result.returns)
        difference = bootstrap.mean(scores - full_scores)
        parts = None
        if best is not None and min(best) > 0:
            parts = scores / np.asarray(best, dtype=np.float64)[:, None]
        row = Row(
            arm=result.arm,
            mean=bootstrap.mean(scores),
            iqm=bootstrap.iqm(scores),
            part_of_best=None if parts is None else bootstrap.mean(parts),
            iqm_of_best=None if parts is None else bootstrap.iqm(parts),
            difference=difference,
            verdict=None if result.arm == Arm(FULL) else verdict(difference, margin),
            adaptation_loss=bootstrap.mean((full - result.returns).mean(axis=2)),
            by_episode=result.returns.mean(axis=(0, 1)),
            cost=result.cost,
        )
        rows.append(row)
    return rows, margin, bootstrap


def _doubts(rows: Sequence[Row], gain: Estimate) -> list[str]:
    """Why the model may ignore its history; `gain` is that of full history over an empty one."""
    if gain.is_open:
        return ["One seed a goal gives no interval: run at least two (--seeds)."]
    doubts = []
    if gain.low <= 0:
        doubts.append(
            "Full history is not shown to earn more than an empty one: "
            f"{gain.text('+')} reward an episode."
        )
    return doubts + [
        f"With the control {row.arm.name} it earns as much as with its own history: "
        f"difference {row.difference.text('+')}."
        for row in rows
        if row.arm.method.kind == "control" and row.is_good
    ]


def _recommended(study: Study) -> Row | None:
    able = [row for row in study.rows if row.arm.is_candidate and row.is_good]
    able = [row for row in able if row.cost.tokens < study.full.cost.tokens]
    able.sort(key=lambda row: (row.arm.n_keep or 0, -row.mean.value, row.cost.tokens))
    return able[0] if able else None
