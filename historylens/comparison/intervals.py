"""How sure a comparison of returns is: bootstrap intervals and non-inferiority verdicts.

Mean and interquartile mean (IQM) over runs with stratified bootstrap intervals, as Agarwal et al.
2021 (rliable, arXiv 2108.13264) ask for. Scores are `(G, R)`: `G` goals, the strata, and `R` seeds
(runs) of each, which are drawn anew.

    [(difference, collapses, said)] = judged(arm[None], full, margin_share=0.05, n_compared=18)

The plain bootstrap is too narrow for few seeds. Its deviations are therefore scaled by
`sqrt(R / (R - 1))`, as a sample's variance is, and by Student's quantile over the normal one. The
intervals speak of the goals at hand and of new seeds, not of goals never tried.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

LEVEL = 0.95  # of every interval
N_RESAMPLES = 10_000
N_RESAMPLES_IQM = 2_000  # these cost more
TRIM = 0.25  # share of the runs that the IQM leaves out at either end
MANY = 1000  # degrees of freedom from which Student's t counts as normal
MAX_SKEWNESS = 0.5  # of a mean over runs: what is estimated beyond it is noise of few seeds
GOOD = ("better", "safe")  # verdicts: shown to lose less than the margin
SO_FAR = "safe so far"  # verdict: so by its own interval, but not yet for all arms together
COLLAPSE = 0.5  # a run has collapsed that loses more than this share of full history's return


@dataclass(frozen=True)
class Estimate:
    """A number and its interval; no interval (None) where there is only one seed."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is no interval."""
        return self.low is None

    def within(self, low: float, high: float) -> "Estimate":
        """The same, its interval cut to what is possible: what it covers there it still covers."""
        if self.is_open:
            return self
        low, high = max(self.low, min(low, self.value)), min(self.high, max(high, self.value))
        return Estimate(self.value, low, high)

    def text(self, sign: str = "") -> str:
        """`12.34 [12.00, 12.70]`; the value alone where there is no interval."""
        ends = () if self.is_open else (self.low, self.high)
        value, *ends = (f"{number:{sign}z.2f}" for number in (self.value, *ends))
        return f"{value} [{', '.join(ends)}]" if ends else value


def mean(scores: np.ndarray, seed: int = 0) -> Estimate:
    """Mean over all runs of `scores (G, R)`, with its interval."""
    return means(scores[None], seed)[0]


def means(scores: np.ndarray, seed: int = 0, n_compared: float = 1) -> list[Estimate]:
    """The same of `N` studies, `scores (N, G, R)`; intervals are for one of `n_compared`."""
    (_, n_goals, n_seeds), values = scores.shape, scores.mean(axis=(1, 2))
    if n_seeds == 1:
        return [Estimate(value) for value in values.tolist()]
    runs, tail = scores.reshape(-1, n_goals * n_seeds), (1 - LEVEL) / 2 / n_compared
    resampled = runs @ _resamples(n_goals, n_seeds, seed).T / runs.shape[1]  # (N, resamples)
    ends = _ends(values, resampled, scores, tail)
    ends += skew_shift(scores, NormalDist().inv_cdf(1 - tail))[:, None]
    return [
        Estimate(value, *pair) for value, pair in zip(values.tolist(), ends.tolist(), strict=True)
    ]


def iqm(scores: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of the middle half of all runs of `scores (G, R)`, with its interval."""
    order = scores.ravel().argsort(kind="stable")
    values, n_cut = scores.ravel()[order], int(TRIM * scores.size)
    drawn = _resamples(*scores.shape, seed)[:N_RESAMPLES_IQM, order]
    within = np.vstack([np.ones(scores.size), drawn]).cumsum(axis=1)
    within = within.clip(n_cut, scores.size - n_cut)
    kept = np.diff(within, axis=1, prepend=n_cut)  # draws of each run between the two cuts
    found = kept @ values / (scores.size - 2 * n_cut)
    if scores.shape[1] == 1:
        return Estimate(float(found[0]))
    ends = _ends(found[:1], found[None, 1:], scores[None], (1 - LEVEL) / 2)
    return Estimate(float(found[0]), *ends[0].tolist())


@lru_cache(maxsize=4)
def _resamples(n_goals: int, n_seeds: int, seed: int) -> np.ndarray:
    """How often each run is drawn: a resample is a row of weights, `(resamples, G * R)`."""
    even, size = np.full(n_seeds, 1 / n_seeds), (N_RESAMPLES, n_goals)
    counts = np.random.default_rng(seed).multinomial(n_seeds, even, size)
    return counts.reshape(N_RESAMPLES, -1).astype(np.float64)


def _ends(values: np.ndarray, resampled: np.ndarray, scores: np.ndarray, tail: float) -> np.ndarray:
    """Scaled percentile intervals `(N, 2)` of `values (N,)`, resampled `(N, resamples)`."""
    n_seeds, freedom = scores.shape[2], (degrees_of_freedom(scores) + 1e-9).astype(int).tolist()
    scale = np.array([student_quantile(1 - tail, each) for each in freedom])  # of it rounded down
    scale *= math.sqrt(n_seeds / (n_seeds - 1)) / NormalDist().inv_cdf(1 - tail)
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=1) - values
    ends = np.stack([np.minimum(low, 0), np.maximum(high, 0)], axis=1)
    return values[:, None] + scale[:, None] * ends


def degrees_of_freedom(scores: np.ndarray) -> np.ndarray:
    """Satterthwaite's `(N,)`: `G (R - 1)` where goals vary alike, `R - 1` where only one does."""
    variances = scores.var(axis=2, ddof=1)  # (N, G)
    largest = variances.max(axis=1, keepdims=True)
    # Relative to the largest: no overflow. Without any variance all strata count alike.
    variances = np.divide(variances, largest, out=np.ones_like(variances), where=largest > 0)
    return variances.sum(axis=1) ** 2 / (variances**2).sum(axis=1) * (scores.shape[2] - 1)


def skew_shift(scores: np.ndarray, z: float) -> np.ndarray:
    """How far percentile intervals of the means of `scores (N, G, R)` have to move: `(N,)`.

    With the mean's standard error `s` and skewness `g`, one that is right to second order lies
    `g s (1 + 2 z^2) / 6` beside the symmetric one (Johnson 1978), of which the percentile interval
    has gone `g s (z^2 - 1) / 6`. Two seeds show no skew.
    """
    n_studies, n_goals, n = scores.shape
    if n < 3:
        return np.zeros(n_studies)
    deviations = scores - scores.mean(axis=2, keepdims=True)
    error = np.sqrt((deviations**2).sum(axis=(1, 2)) / (n * (n - 1))) / n_goals
    third = (deviations**3).sum(axis=(1, 2)) / (n * (n - 1) * (n - 2)) / n_goals**3
    skewness = np.divide(third, error**3, out=np.zeros_like(third), where=error**3 > 0)
    return skewness.clip(-MAX_SKEWNESS, MAX_SKEWNESS) * error * (z**2 + 2) / 6


@lru_cache(maxsize=4096)
def student_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t, which is `sqrt(freedom) tan(angle)`, for `0.5 < p < 1`."""
    if freedom >= MANY:
        return NormalDist().inv_cdf(p)
    angle = bisected(lambda angle: _student_cdf(angle, freedom) < p, 0.0, math.pi / 2)
    return math.sqrt(freedom) * math.tan(angle)


def bisected(is_below: Callable[[float], bool], low: float, high: float) -> float:
    """Where between `low` and `high` what holds for smaller numbers ceases to hold."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return low


def _student_cdf(angle: float, freedom: int) -> float:
    """P(T <= sqrt(freedom) tan(angle)), Abramowitz and Stegun 26.7.3 and 26.7.4."""
    sine, cosine, odd = math.sin(angle), math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + inside / 2


@dataclass(frozen=True)
class Collapses:
    """Runs in which one of a pair collapsed and the other did not, of `n_runs`."""

    arm: int
    full: int
    n_runs: int

    @classmethod
    def of(cls, arm: np.ndarray, full: np.ndarray) -> "Collapses":
        """Those of paired scores `(G, R)`: below half of what full history earns on the goal."""
        usual = full.mean(axis=1, keepdims=True)
        fails, full_fails = (each < usual - COLLAPSE * np.abs(usual) for each in (arm, full))
        return cls(int((fails > full_fails).sum()), int((full_fails > fails).sum()), arm.size)

    def bound(self, n_compared: float = 1) -> float:
        """The rate, net of full history's, above which is ruled out for one of `n_compared`."""
        n, tail = self.n_runs, (1 - LEVEL) / n_compared
        arm, full = self.arm / n, self.full / n
        above = largest_rate(self.arm, n, tail) - arm
        below = full - (1 - largest_rate(n - self.full, n, tail))
        # Newcombe 1998; Zou and Donner 2008; at least that of no collapse at all.
        return max(arm - full + math.hypot(above, below), largest_rate(0, n, tail))

    @property
    def percent(self) -> str:
        """The bound, rounded up."""
        return f"{math.ceil(1000 * self.bound() - 1e-9) / 10:.3g}"

    def text(self) -> str:
        """`0, < 1.2%`; `13-12, < 4.5%` where full history alone collapsed in 12."""
        return f"{self.arm}{f'-{self.full}' if self.full else ''}, < {self.percent}%"

    def sentence(self) -> str:
        """`no collapse in 256 runs: more than 1.2 % is ruled out (95 %)`."""
        said = f"{self.arm} of {self.n_runs} runs collapsed"
        said += f", and {self.full} others of full history: net" if self.full else ":"
        said = said if self.arm else f"no collapse in {self.n_runs} runs:"
        return f"{said} more than {self.percent} % is ruled out ({100 * LEVEL:.0f} %)"


@lru_cache(maxsize=4096)
def largest_rate(n: int, n_runs: int, tail: float) -> float:
    """Clopper and Pearson 1934: at a higher rate `n` or fewer of `n_runs` are rarer than `tail`."""

    def is_likely(rate: float) -> bool:
        log, total = n_runs * math.log1p(-rate), 0.0  # of P(none)
        for k in range(n + 1):
            total += math.exp(log)
            log += math.log((n_runs - k) / (k + 1) * rate / (1 - rate))
        return total > tail

    return 1.0 if n == n_runs else bisected(is_likely, n / n_runs, 1.0)


def verdict(own: Estimate, strict: Estimate, margin: float, at_risk: float) -> str:
    """Judge an arm by its paired difference to full history, arm minus full.

    `own` has its 95 % interval, `strict` one for all arms of the study together; `at_risk` is what
    collapses not ruled out for all may cost. `safe`: both lie above `-margin`, and `at_risk` is no
    more than margin or gain. `better`: so, and `strict` lies above 0. `safe so far`: `own` alone
    lies above `-margin`. `worse`: `own` lies below it. Otherwise `inconclusive`.
    """
    if own.is_open or not (own.low > -margin or own.high < -margin):  # no number is neither
        return "inconclusive"
    if own.high < -margin:
        return "worse"
    if not (strict.low > -margin and at_risk <= max(margin, strict.low)):
        return SO_FAR
    return "better" if strict.low > 0 else "safe"


def late_scores(returns: np.ndarray) -> np.ndarray:
    """Mean over the second half of the episodes, a middle one included: `(G, R)` of `(G, R, E)`."""
    return np.asarray(returns, dtype=np.float64)[..., returns.shape[-1] // 2 :].mean(axis=-1)


def judged(
    arms: np.ndarray, full: np.ndarray, margin_share: float, n_compared: float, seed: int = 0,
    least: float = 0.0,
) -> list[tuple[Estimate, Collapses, str]]:  # fmt: skip
    """Of `N` arms' scores `(N, G, r)`, paired with `full`: difference, collapses, verdict.

    Verdicts are for `n_compared` arms. A run that collapses may cost as much as lies, on any goal,
    between what full history earns and the `least` score of any run, or 0.
    """
    differences, margin = arms - full, margin_share * abs(float(full.mean()))
    both = zip(means(differences, seed), means(differences, seed, n_compared), strict=True)
    usual, told = full.mean(axis=1), []
    stake = float(np.maximum(usual - least, np.abs(usual)).max())
    for arm, (own, strict) in zip(arms, both, strict=True):
        collapses = Collapses.of(arm, full)
        at_risk = collapses.bound(2 * n_compared) * stake  # at 2.5 %, as `strict`
        told.append((own, collapses, verdict(own, strict, margin, at_risk)))
    return told


def shown_worse(
    arms: np.ndarray, full: np.ndarray, margin_share: float, share: float, seed: int = 0
) -> np.ndarray:
    """Which arms `(N,)`, of scores `(N, G, r)`, lose more than the margin at `share` of a level."""
    margin = margin_share * abs(float(full.mean()))
    highest = (each.high for each in means(arms - full, seed, 1 / share))  # None: of one seed
    return np.array([high is not None and high < -margin for high in highest], dtype=bool)


def looks(n_seeds: int) -> dict[int, float]:
    """Runs of each goal after which arms may stop, and the part of the level that each look spends.

    What is spent after `t` of the runs is `ln(1 + (e - 1) t)` (Lan and DeMets 1983, in the way of
    Pocock 1977): what loses less than the margin stops in at most 2.5 %.
    """
    early = (max(2, -(-n_seeds // part)) for part in (8, 4, 2))
    ends = sorted({*(min(n, n_seeds) for n in early), n_seeds})
    spent = [math.log1p((math.e - 1) * n / n_seeds) for n in ends]
    return dict(zip(ends, np.diff(spent, prepend=0).tolist(), strict=True))
