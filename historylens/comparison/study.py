"""From the returns of compressed and of full history to a table, verdicts and one recommendation.

All arms acted on the same goals with the same action noise, so each is compared with full history
run by run, over the runs that it has: the first `r` of the `R` seeds of each of `G` goals. The
score of a run is its return an episode over the second half of its `E` episodes.

A race (Maron and Moore 1993) stops, at looks, what is shown worse or cannot be recommended; `safe`
and `better` are said once, when it is over.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from historylens.comparison import intervals
from historylens.comparison.intervals import GOOD, SO_FAR, Collapses, Estimate, late_scores
from historylens.comparison.policy import Cost
from historylens.compression.method import METHODS, Method

FULL, EMPTY, RECENT = "full", "empty", "recent"
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
    """What an arm earned, `returns` `(G, r, E)` reward of each episode, and what it cost."""

    arm: Arm
    returns: np.ndarray
    cost: Cost = field(default_factory=Cost)
    n_early: int = 0  # ends of environments before the horizon; then `returns` are of blocks of it
    first: int = 0  # of the seeds that these runs are of


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
    verdict: str | None  # on these two, strict for all arms; None for full history itself
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
    """A judged comparison."""

    rows: tuple[Row, ...]  # of all arms, the highest return first
    full: Row
    empty: Row
    full_by_episode: tuple[Estimate, ...]  # E of them, of full history
    margin_share: float  # the loss that would not matter, a part of full history's return
    margin: float  # the same in reward an episode
    n_compared: int  # arms that were compared with full history, controls left out
    n_seeds: int  # runs of each goal, of what played to the end
    least: float  # score that a run of some arm had; 0 where none was below
    confirmation: Confirmation | None = None  # of the most promising arm, with none recommended

    def row(self, name: str, n_keep: int | None = None) -> Row | None:
        """The row of an arm, or None."""
        return next((row for row in self.rows if row.arm == Arm(name, n_keep)), None)

    @property
    def candidates(self) -> list[Row]:
        """Ways to compress that have a budget, the highest return first."""
        return [row for row in self.rows if row.arm.is_candidate and row.arm.n_keep is not None]

    @property
    def n_saved(self) -> int:
        """Runs that were not played, because their arms had stopped."""
        return sum(self.full.collapses.n_runs - row.collapses.n_runs for row in self.rows)

    def saves(self, row: Row) -> bool:
        """Whether an arm reads fewer tokens than full history."""
        return row.cost.tokens < self.full.cost.tokens

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why no compression can be judged on this model."""
        doubts, lost = [], self.empty.difference
        if lost.is_open:
            doubts.append("One seed a goal gives no interval: run at least two (--seeds).")
        elif lost.high >= 0:
            gain = Estimate(-lost.value, -lost.high, -lost.low).text("+")
            said = "Full history is not shown to earn more than an empty one"
            doubts.append(f"{said}: {gain} reward an episode.")
        for row in self.rows:
            is_same = row.difference.low == row.difference.high == 0  # as of rewards that are equal
            is_told = row.arm.name == "shuffled-rewards" and is_same
            if row.arm.method.kind == "control" and row.verdict in (*GOOD, SO_FAR) and not is_told:
                said = f"With the control {row.arm.name} it loses less than the margin"
                doubts.append(f"{said}: difference {row.difference.text('+')}.")
        return tuple(doubts)

    @property
    def recommended(self) -> Row | None:
        """The smallest budget that is safe or better and saves tokens, or what new runs confirm."""
        if self.confirmation is not None:
            again = self.confirmation.row
            return self.row(again.arm.name, again.arm.n_keep) if again.is_good else None
        good = (row for row in self.rows if row.arm.is_candidate and row.is_good)
        able = [row for row in good if self.saves(row)]
        if self.doubts or not able:
            return None
        return min(able, key=lambda row: (row.arm.n_keep or 0, -row.mean.value, row.cost.tokens))

    @property
    def unsettled(self) -> list[Row]:
        """Open arms that save tokens, with none recommended, the most promising first.

        Safe so far, by budget; then at most a margin behind the best, by budget; then the others.
        """
        if self.doubts or self.recommended is not None:
            return []
        rows = [row for row in self.candidates if row.verdict in OPEN and self.saves(row)]
        near = max((row.difference.value for row in rows), default=0.0) - self.margin

        def rank(row: Row) -> tuple:
            is_near = row.verdict == SO_FAR or row.difference.value >= near
            order = row.arm.n_keep if is_near else np.inf, -row.difference.value, row.cost.tokens
            return row.verdict != SO_FAR, *order, row.arm.key

        return sorted(rows, key=rank)


def judge(results: list[Result], margin_share: float, best: Best = None, seed: int = 0) -> Study:
    """Compare every arm, "full" and "empty" among them; `seed` is that of the bootstrap.

    That any arm which loses the margin is called safe or better has a chance of 2.5 %.
    """
    full = next(result.returns for result in results if result.arm == Arm(FULL))
    n_compared, least = sum(result.arm.is_candidate for result in results), least_of(results)
    rows = _compared(results, full, margin_share, n_compared, best, seed, least)
    rows.sort(key=lambda row: (-row.mean.value, row.kept, row.arm.key))
    both = [next(row for row in rows if row.arm == Arm(name)) for name in (FULL, EMPTY)]
    margin, ends = margin_share * abs(both[0].mean.value), _earnable(results, best)
    by_episode = tuple(intervals.mean(one, seed).within(*ends) for one in np.moveaxis(full, 2, 0))
    told = by_episode, margin_share, margin, n_compared, full.shape[1], least
    return Study(tuple(rows), *both, *told)


def confirm(
    study: Study, full: Result, arm: Result, best: Best = None, seed: int = 0, share: float = 1.0
) -> Study:
    """The study with its most promising arm judged on new runs of it and of full history.

    It was chosen before they were played: it alone has the other 2.5 %, or a `share` of it.
    """
    least = least_of([arm, full], study.least)
    seen = full.returns, study.margin_share, 1 / share, best, seed, least
    rows, n_seeds = _compared([arm, full], *seen), full.returns.shape[1]
    margin = study.margin_share * abs(rows[1].mean.value)
    return replace(study, confirmation=Confirmation(*rows, margin, n_seeds))


def going_on(
    results: Sequence[Result], share: float, margin_share: float, seed: int = 0
) -> list[Arm]:
    """Full history, and what is not shown worse at `share` of the level: controls, token savers."""
    full = next(result for result in results if result.arm == Arm(FULL))
    scores = np.stack([late_scores(result.returns) for result in results])  # (N, G, r)
    worse = intervals.shown_worse(scores, late_scores(full.returns), margin_share, share, seed)
    may = [x.arm.method.kind == "control" or x.cost.tokens < full.cost.tokens for x in results]
    return [x.arm for i, x in enumerate(results) if x is full or (may[i] and not worse[i])]


def undecided(
    results: Sequence[Result], share: float, margin_share: float, seed: int = 0, least: float = 0.0
) -> list[Arm]:
    """Full history and the arm to confirm, unless this look shows the arm to be good or worse."""
    full, arm = (late_scores(result.returns) for result in results)
    seen = arm[None], full, margin_share
    [(_, _, said)] = intervals.judged(*seen, 1 / share, seed, least_of(results, least))
    is_over = said in GOOD or intervals.shown_worse(*seen, share, seed)[0]
    return [] if is_over else [result.arm for result in results]


def least_of(results: Sequence[Result], least: float = 0.0) -> float:
    """The least score of a run of any arm, `least` where none is below that."""
    return min(least, *(float(late_scores(result.returns).min()) for result in results))


def _compared(
    results: list[Result], full: np.ndarray, margin_share: float, n_compared: float, best: Best,
    seed: int, least: float,
) -> list[Row]:  # fmt: skip
    """A row of each result, of as many runs as it has."""
    (low, high), rows = _earnable(results, best), []

    def estimated(of: Callable, values: np.ndarray | None, high: float) -> Estimate | None:
        return None if values is None else of(values, seed).within(low, high)

    for result in results:
        scores, paired = late_scores(result.returns), full[:, : result.returns.shape[1]]
        seen = scores[None], late_scores(paired), margin_share, n_compared, seed, least
        [(difference, collapses, said)] = intervals.judged(*seen)
        has_best = best is not None and min(best) > 0
        parts = scores / np.asarray(best, dtype=np.float64)[:, None] if has_best else None
        rows.append(
            Row(
                arm=result.arm,
                mean=estimated(intervals.mean, scores, high),
                iqm=estimated(intervals.iqm, scores, np.inf if best is None else max(best)),
                part_of_best=estimated(intervals.mean, parts, 1.0),
                iqm_of_best=estimated(intervals.iqm, parts, 1.0),
                difference=difference,
                collapses=collapses,
                verdict=None if result.arm == Arm(FULL) else said,
                adaptation_loss=intervals.mean((paired - result.returns).mean(axis=2), seed),
                by_episode=result.returns.mean(axis=(0, 1)),
                cost=result.cost,
            )
        )
    return rows


def _earnable(results: Sequence[Result], best: Best) -> tuple[float, float]:
    """Ends of what a mean return can be: the best possible one, and 0 where all lies on a side."""
    is_gain = all((result.returns >= 0).all() for result in results)
    is_cost = all((result.returns <= 0).all() for result in results)
    most = float(np.mean(best)) if best is not None else 0.0 if is_cost else np.inf
    return 0.0 if is_gain else -np.inf, most
