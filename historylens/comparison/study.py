"""From the returns of compressed and of full history to a table, verdicts and one recommendation.

    study = judge(results, margin_share=0.05)     # .rows, .doubts, .recommended

All arms, a method at a budget each, acted on the same goals with the same action noise, so each is
compared with full history run by run. The score of a run is its return an episode over the second
half of its `E` episodes; what is lost on the way is the adaptation loss. `G` goals, `R` seeds each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from historylens.comparison.intervals import Bootstrap, Collapses, Estimate, late_scores, verdict
from historylens.comparison.policy import Cost
from historylens.compression.method import METHODS, Method

FULL, EMPTY, RECENT = "full", "empty", "recent"
GOOD = ("better", "safe")  # verdicts: shown to lose less than the margin
SO_FAR = "safe so far"  # verdict: the same, but collapses that would cost it are not ruled out
OPEN = (SO_FAR, "inconclusive")  # verdicts that more runs may settle
Best = Sequence[float] | None  # G best possible returns an episode; parts of them where positive


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
    """What an arm earned, `returns` `(G, R, E)` reward of each episode, and what it cost.

    Where environments ended early `n_early` times, an entry is the mean reward of the episodes of a
    block of the horizon's steps.
    """

    arm: Arm
    returns: np.ndarray
    cost: Cost = field(default_factory=Cost)
    n_early: int = 0


@dataclass(frozen=True)
class Row:
    """An arm in numbers; rewards are an episode's, over the second half unless said otherwise."""

    arm: Arm
    mean: Estimate  # over runs
    iqm: Estimate  # the mean of the middle half of the runs
    part_of_best: Estimate | None  # mean of each run's part of its goal's best possible return
    iqm_of_best: Estimate | None  # None where that return is not known
    difference: Estimate  # paired, of the arm's return to full history's
    collapses: Collapses  # of the same runs
    verdict: str | None  # on these two; None for full history itself
    adaptation_loss: Estimate  # full history minus arm, all episodes: the area between the curves
    by_episode: np.ndarray  # (E,), mean over runs
    cost: Cost

    @property
    def kept(self) -> float:
        """Transitions really kept, on average, once there is more history than the budget."""
        n = self.cost.over_budget
        return self.cost.kept_sum / n if n else float(self.arm.n_keep or 0)

    @property
    def is_good(self) -> bool:
        """Whether it is shown to lose less than the margin."""
        return self.verdict in GOOD


@dataclass(frozen=True)
class Confirmation:
    """The most promising arm once more beside full history, on runs that did not choose it."""

    row: Row  # the arm, judged on these runs alone
    full: Row
    margin: float  # reward an episode, the same part of full history's return as in the study
    n_seeds: int


@dataclass(frozen=True)
class Study:
    """A judged comparison.

    Recommended is, of the arms that are safe or better and save tokens, the smallest budget, and
    among equal budgets the highest return; nothing where there is a doubt.
    """

    rows: tuple[Row, ...]  # of all arms, the highest return first
    full: Row
    empty: Row
    full_by_episode: tuple[Estimate, ...]  # E of them, of full history
    margin_share: float  # the loss that would not matter, a part of full history's return
    margin: float  # the same in reward an episode
    doubts: tuple[str, ...]  # why no compression can be judged on this model
    recommended: Row | None = None
    stands_corrected: bool = False  # whether its verdict holds corrected for all comparisons
    confirmation: Confirmation | None = None  # of the most promising arm, with none recommended

    def row(self, name: str, n_keep: int | None = None) -> Row | None:
        """The row of an arm, or None."""
        return next((row for row in self.rows if row.arm == Arm(name, n_keep)), None)

    @property
    def n_compared(self) -> int:
        """Arms that were compared with full history, controls left out."""
        return sum(row.arm.is_candidate for row in self.rows)

    @property
    def candidates(self) -> list[Row]:
        """Ways to compress that have a budget, the highest return first."""
        return [row for row in self.rows if row.arm.is_candidate and row.arm.n_keep is not None]

    def saves(self, row: Row) -> bool:
        """Whether an arm reads fewer tokens than full history."""
        return row.cost.tokens < self.full.cost.tokens

    @property
    def unsettled(self) -> list[Row]:
        """Open arms that save tokens, with none recommended: safe so far by budget, then others."""
        if self.doubts or self.recommended is not None:
            return []
        rows = [row for row in self.candidates if row.verdict in OPEN and self.saves(row)]
        rows.sort(key=lambda row: (-row.difference.value, row.cost.tokens, row.arm.key))
        return sorted(rows, key=lambda row: row.arm.n_keep if row.verdict == SO_FAR else np.inf)


def judge(results: list[Result], margin_share: float, best: Best = None, seed: int = 0) -> Study:
    """Compare every arm with full history; `seed` is that of the bootstrap.

    `results` are of all arms, "full" and "empty" among them, on the same goals and seeds. The
    margin is a share of the size of full history's return.
    """
    returns = {result.arm: result.returns for result in results}
    full, empty = returns[Arm(FULL)], returns[Arm(EMPTY)]
    rows, margin, bootstrap = _compared(results, full, margin_share, best, seed)
    rows.sort(key=lambda row: (-row.mean.value, row.kept, row.arm.key))
    ends = earnable(results, best)
    by_episode = tuple(bootstrap.mean(one).within(*ends) for one in np.moveaxis(full, 2, 0))
    doubts, gain = [], bootstrap.mean(late_scores(full) - late_scores(empty))
    if gain.is_open:
        doubts.append("One seed a goal gives no interval: run at least two (--seeds).")
    elif gain.low <= 0:
        said = "Full history is not shown to earn more than an empty one"
        doubts.append(f"{said}: {gain.text('+')} reward an episode.")
    for row in rows:
        if row.arm.method.kind == "control" and row.verdict in (*GOOD, SO_FAR):
            said = f"With the control {row.arm.name} it earns as much as with its own history"
            doubts.append(f"{said}: difference {row.difference.text('+')}.")
    baselines = (next(row for row in rows if row.arm == Arm(name)) for name in (FULL, EMPTY))
    study = Study(tuple(rows), *baselines, by_episode, margin_share, margin, tuple(doubts))
    able = [row for row in rows if row.arm.is_candidate and row.is_good and study.saves(row)]
    if doubts or not able:
        return study
    chosen = min(able, key=lambda row: (row.arm.n_keep or 0, -row.mean.value, row.cost.tokens))
    difference = late_scores(returns[chosen.arm]) - late_scores(full)
    at_risk = chosen.collapses.bound(study.n_compared) * abs(study.full.mean.value)
    corrected = verdict(bootstrap.mean(difference, study.n_compared), margin, at_risk)
    return replace(study, recommended=chosen, stands_corrected=corrected in GOOD)


def confirm(study: Study, full: Result, arm: Result, best: Best = None, seed: int = 0) -> Study:
    """The study with its most promising arm judged on new runs, and recommended if they confirm it.

    `full` and `arm`, the first of `study.unsettled`, are of these runs, on the same goals. This one
    comparison was chosen before its runs were played: nothing has to be corrected for.
    """
    rows, margin, _ = _compared([arm, full], full.returns, study.margin_share, best, seed)
    confirmation = Confirmation(*rows, margin, n_seeds=full.returns.shape[1])
    recommended = study.row(arm.arm.name, arm.arm.n_keep) if rows[0].is_good else None
    return replace(study, confirmation=confirmation, recommended=recommended)


def _compared(
    results: list[Result], full: np.ndarray, margin_share: float, best: Best, seed: int
) -> tuple[list[Row], float, Bootstrap]:
    """A row of each result, the margin, and the bootstrap that all intervals come from."""
    bootstrap, full_scores = Bootstrap(*full.shape[:2], seed), late_scores(full)
    level = abs(float(full_scores.mean()))
    margin = margin_share * level
    has_best = best is not None and min(best) > 0
    (low, high), rows = earnable(results, best), []
    of_best = low, 1.0  # 0 is 0 of any return
    for result in results:
        scores = late_scores(result.returns)
        parts = scores / np.asarray(best, dtype=np.float64)[:, None] if has_best else None
        difference = bootstrap.mean(scores - full_scores)
        collapses = Collapses.of(scores, full_scores)
        judged = verdict(difference, margin, collapses.bound() * level)
        row = Row(
            arm=result.arm,
            mean=bootstrap.mean(scores).within(low, high),
            iqm=bootstrap.iqm(scores).within(low, np.inf if best is None else max(best)),
            part_of_best=bootstrap.mean(parts).within(*of_best) if has_best else None,
            iqm_of_best=bootstrap.iqm(parts).within(*of_best) if has_best else None,
            difference=difference,
            collapses=collapses,
            verdict=None if result.arm == Arm(FULL) else judged,
            adaptation_loss=bootstrap.mean((full - result.returns).mean(axis=2)),
            by_episode=result.returns.mean(axis=(0, 1)),
            cost=result.cost,
        )
        rows.append(row)
    return rows, margin, bootstrap


def earnable(results: Sequence[Result], best: Best) -> tuple[float, float]:
    """Ends between which a mean return can lie: no interval of one goes on beyond them.

    The best possible return where it is known, and 0 where no episode of any arm went below it, as
    where rewards are never negative, or above it.
    """
    least = min(float(result.returns.min()) for result in results)
    most = max(float(result.returns.max()) for result in results)
    known = np.inf if best is None else float(np.mean(best))
    return 0.0 if least >= 0 else -np.inf, 0.0 if most <= 0 and best is None else known
