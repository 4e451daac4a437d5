"""Racing: at looks, arms stop that are shown worse, or that cannot be recommended.

    for seeds, share in zip(looks(16), shares(16)):              # after 2, 4, 8 and 16 runs a goal
        arms = going_on(results_of(arms, seeds), share, 0.05)

Maron and Moore 1993 (Hoeffding races) stop what is shown to be worse, and the runs go to the rest.
Each look may be wrong. The level of all looks, that of one end of an interval, is therefore spent
over them (Lan and DeMets 1983, in the way of Pocock 1977): after a part `t` of the runs,
`ln(1 + (e - 1) t)` of it. Each look is a test at what was spent since the one before; whatever
their dependence, an arm that loses less than the margin is stopped as worse in at most 2.5 %.
What stops can only be worse: `safe` and `better` are said once, when the race is over. Runs that
confirm one arm have the same looks, and end at the first at which it is good or worse.
"""

import math
from collections.abc import Sequence

import numpy as np

from historylens.comparison.intervals import Bootstrap, late_scores
from historylens.comparison.study import FULL, GOOD, Arm, Result, judged, least_of, margin_of


def looks(n_seeds: int) -> list[int]:
    """Runs of each goal after which arms may stop: an eighth, a quarter, a half, and all."""
    early = (max(2, -(-n_seeds // part)) for part in (8, 4, 2))
    return sorted({*(min(n, n_seeds) for n in early), n_seeds})


def shares(n_seeds: int) -> list[float]:
    """The part of the level that each look spends; 1 in all."""
    spent = [math.log1p((math.e - 1) * n / n_seeds) for n in looks(n_seeds)]
    return np.diff(spent, prepend=0).tolist()


def going_on(
    results: Sequence[Result], share: float, margin_share: float, seed: int = 0
) -> list[Arm]:
    """The arms that go on after a look, of `results` of the same runs, full history among them.

    Full history does, controls until they are shown worse, others if they also save tokens. The
    look has a part `share` of the level.
    """
    full = next(result for result in results if result.arm == Arm(FULL))
    scores = np.stack([late_scores(result.returns) for result in results])  # (N, G, r)
    bootstrap = Bootstrap(*scores.shape[1:], seed)
    worse = shown_worse(scores, late_scores(full.returns), margin_share, share, bootstrap)
    saves = [result.cost.tokens < full.cost.tokens for result in results]
    may = [each.arm.method.kind == "control" or saves[i] for i, each in enumerate(results)]
    return [each.arm for i, each in enumerate(results) if each is full or (may[i] and not worse[i])]


def undecided(
    results: Sequence[Result], share: float, margin_share: float, seed: int = 0, least: float = 0.0
) -> list[Arm]:
    """Full history and the arm to confirm, unless this look shows the arm to be good or worse.

    `least` is that of the study that chose the arm.
    """
    full, arm = (late_scores(result.returns) for result in results)
    bootstrap = Bootstrap(*full.shape, seed)
    least = least_of(results, least)
    [(_, _, said)] = judged(arm[None], full, margin_share, 1 / share, bootstrap, least)
    is_over = said in GOOD or shown_worse(arm[None], full, margin_share, share, bootstrap)[0]
    return [] if is_over else [result.arm for result in results]


def shown_worse(
    arms: np.ndarray, full: np.ndarray, margin_share: float, share: float, bootstrap: Bootstrap
) -> np.ndarray:
    """Which `(N,)` bool of arms' scores `(N, G, r)` lose more than the margin against full's.

    At a part `share` of the level: the same as one of `1 / share` comparisons.
    """
    if full.shape[1] == 1:
        return np.zeros(len(arms), dtype=bool)
    highest = bootstrap.bounds(arms - full, 1 / share)[:, 1]
    return highest < -margin_of(full, margin_share)
