"""The one table of patterns: what each looks at, says, advises, and has measured.

    figure = PATTERNS["recency"].figure(scope)               # what the rule looks at
    text, measured = PATTERNS["recency"].evidence(scope)     # what was measured, in words
    caveat, by_rule_only = PATTERNS["recency"].caveat(scope)  # what the absolute rule does not see

A `Scope` is what such a statement is about: the attention rows of one layer, or of all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from historylens.common.text import cap, counted
from historylens.metrics import STRONG_WEIGHT, TOLERANCE

RECENCY_RATIO = 2.0  # recency: median recent/distant ratio above
UNIFORM_ENTROPY = 2.0  # uniform: mean entropy above, nats
FOCUSED_ENTROPY = 1.5  # focused: mean entropy below, nats
SPARSE_POSITIONS = 5  # sparse: at most so many positions above STRONG_WEIGHT ...
SPARSE_MASS = 0.5  # ... that hold at least this share of the context mass ...
SPARSE_MAJORITY = 0.5  # ... in more than this share of the decisions
BROAD_SHARE = 0.5  # even for its length: the tokens read in effect are at least this share of n
FAINT_MASS = 0.05  # below this weight on the whole context the history is hardly read


@dataclass(frozen=True)
class Scope:
    """The `K` attention rows that a statement is about: one layer's, or those of all layers."""

    layer: int | None  # its number; None for all
    values: dict[str, np.ndarray]  # name -> (K,), metrics of the head-averaged rows
    uniform: dict[str, np.ndarray]  # name -> (K,), the same under uniform attention
    n: np.ndarray  # (K,), context tokens
    source: str  # where the rows come from, in words

    def mean(self, name: str) -> float:
        """Mean of a metric over the rows."""
        return float(self.values[name].mean())

    @property
    def context_mass(self) -> np.ndarray:
        """`(K,)`: weight on the whole context."""
        return self.values["mean_context_attention"] * self.n

    @property
    def is_broad(self) -> bool:
        """Whether the rows are even for their length, however long that is."""
        return bool((self.values["effective_tokens"] / self.n).mean() >= BROAD_SHARE)

    @property
    def length(self) -> str:
        """`n` in words."""
        low, high = int(self.n.min()), int(self.n.max())
        return f"n = {low}" if low == high else f"n = {low} to {high}"

    @property
    def normalised(self) -> str:
        """The length-normalised entropy in words."""
        if self.n.max() == 1:
            return "with one token there is nothing to choose"
        return (
            f"{self.mean('normalised_entropy'):.2f} of the maximum "
            f"ln n = {np.log(self.n).mean():.2f}"
        )


def is_sparse(values: Mapping[str, ArrayLike]) -> np.ndarray:
    """Rows `(K,)` with 1 to 5 positions above 0.1 that hold at least half of the context mass."""
    held = np.asarray(values["strong_share"]) >= SPARSE_MASS - TOLERANCE  # so there is one
    return (np.asarray(values["strong_positions"]) <= SPARSE_POSITIONS) & held


def _recency_evidence(scope: Scope) -> tuple[str, dict[str, float]]:
    ratio = scope.values["recent_distant_ratio"]
    median, mean = float(np.median(ratio)), float(ratio.mean())
    held, even = _last_quarter(scope)
    text = (
        f"The median recent/distant ratio is {cap(median)} (mean {cap(mean)}), above "
        f"{RECENCY_RATIO}: the last quarter of the context holds {held:.0%} of the attention on "
        f"history, where even reading would give it {even:.0%}."
    )
    measured = {"median_ratio": median, "mean_ratio": mean, "last_quarter_share": held}
    return text, measured | {"threshold": RECENCY_RATIO}


def _recency_caveat(scope: Scope) -> tuple[str | None, bool]:
    held, even = _last_quarter(scope)
    if held < even:
        return (
            f"Both quarters are faint: the ratio compares small numbers, and the last quarter "
            f"holds only {held:.0%} of the attention on history. Most of it lies elsewhere.",
            True,
        )
    if scope.n.max() >= 4:
        return None, False
    return (
        f"At {scope.length} a quarter is one token: the ratio only compares the latest "
        "transition with the first.",
        False,
    )


def _last_quarter(scope: Scope) -> tuple[float, float]:
    """Share of the context mass in the last quarter: measured, and under even reading."""
    mass = scope.context_mass
    last = scope.values["mass_last_quarter"]
    held = np.divide(last, mass, out=np.zeros_like(mass), where=mass > 0).mean()
    return float(held), float((scope.uniform["mass_last_quarter"] * (scope.n + 1) / scope.n).mean())


def _entropy_evidence(side: str, threshold: float, scope: Scope) -> tuple[str, dict[str, float]]:
    names = ("entropy", "normalised_entropy", "effective_tokens", "tokens_for_90_percent")
    measured = {name: scope.mean(name) for name in names}
    text = (
        f"The mean entropy is {measured['entropy']:.2f} nats, {side} {threshold}: in effect "
        f"{measured['effective_tokens']:.1f} of {scope.n.mean():.0f} tokens are read, and "
        f"{measured['tokens_for_90_percent']:.1f} tokens hold 90% of the attention on history."
    )
    return text, measured | {"threshold": threshold}


def _uniform_caveat(scope: Scope) -> tuple[str | None, bool]:
    if scope.is_broad:
        return None, False
    return (
        f"Entropy > {UNIFORM_ENTROPY} nats calls this uniform, but over {scope.length} tokens it "
        f"is {scope.normalised}: the model effectively reads "
        f"{scope.mean('effective_tokens'):.1f} tokens, so it does pick from its history.",
        True,
    )


def _focused_caveat(scope: Scope) -> tuple[str | None, bool]:
    mass = float(scope.context_mass.mean())
    read = scope.mean("effective_tokens")
    if mass < FAINT_MASS:
        return (
            f"The query keeps {1 - mass:.1%} of its attention on itself: the entropy is low "
            "because the history is hardly read here, not because the model picks from it.",
            True,
        )
    even = float(scope.uniform["entropy"].mean())
    if even < FOCUSED_ENTROPY:
        spread = "read broadly" if scope.is_broad else "read selectively"
        return (
            f"The threshold cannot discriminate at {scope.length}: even uniform attention has an "
            f"entropy of {even:.2f} nats. For its length the history is {spread}: "
            f"{scope.normalised}.",
            scope.is_broad,
        )
    alone = float(np.log(np.maximum(scope.values["effective_tokens"], 1)).mean())
    if alone >= FOCUSED_ENTROPY:
        return (
            f"Only {mass:.0%} of the attention lies on history. That part alone has an entropy of "
            f"{alone:.2f} nats, not below {FOCUSED_ENTROPY}: {read:.1f} tokens in effect, "
            f"{scope.normalised}.",
            scope.is_broad,
        )
    if scope.is_broad:
        return (
            f"The context is short: over {scope.length} tokens the entropy is "
            f"{scope.normalised}, {read:.1f} tokens in effect, which is most of them.",
            True,
        )
    return None, False


def _sparse_evidence(scope: Scope) -> tuple[str, dict[str, float]]:
    sparse = is_sparse(scope.values)
    share = float(sparse.mean())
    count = float(scope.values["strong_positions"][sparse].mean())
    held = float(scope.values["strong_share"][sparse].mean())
    text = (
        f"In {share:.0%} of {counted(sparse.size, 'attention row')} ({scope.source}) at most "
        f"{SPARSE_POSITIONS} positions are above {STRONG_WEIGHT} and hold at least half of the "
        f"attention on history; there, {count:.1f} positions hold {held:.0%} of it on average."
    )
    measured = {"share_of_rows": share, "strong_positions": count, "strong_share": held}
    return text, measured | {"threshold": SPARSE_MAJORITY}


def _sparse_caveat(scope: Scope) -> tuple[str | None, bool]:
    if is_sparse(scope.uniform).mean() <= SPARSE_MAJORITY:
        return None, False
    return (
        f"The rule cannot discriminate at {scope.length}: uniform attention, too, has at most "
        f"{SPARSE_POSITIONS} positions above {STRONG_WEIGHT}. For its length the "
        f"entropy says: {scope.normalised}.",
        scope.is_broad,
    )


@dataclass(frozen=True)
class Pattern:
    """A way in which attention may lie, how it shows, and what follows."""

    title: str
    advice: str
    meaning: str
    figure: Callable[[Scope], float]  # what the rule looks at
    figure_name: str
    rule: Callable[[float], bool]  # whether the figure says that it holds
    rule_text: str
    evidence: Callable[[Scope], tuple[str, dict[str, float]]]  # what was measured
    caveat: Callable[[Scope], tuple[str | None, bool]]  # where the rule misleads; only it holds
    strategies: tuple[str, ...]  # ways to compress that fit, in words
    example: str
    strategy: str  # the one that compress_history takes
    measured: tuple[str, ...]  # methods whose effect is measured for it, beside random choice
    # The one that the line of effects is about, at how many transitions; None: 30 % of the context.
    headline: tuple[str, int | None]


PATTERNS = {
    "recency": Pattern(
        title="Strong recency bias",
        advice="Consider compressing or removing distant history.",
        meaning="The model leans on what happened last and hardly reads what lies far back.",
        figure=lambda scope: float(np.median(scope.values["recent_distant_ratio"])),
        figure_name="median ratio",
        rule=lambda ratio: ratio > RECENCY_RATIO,
        rule_text=f"> {RECENCY_RATIO}",
        evidence=_recency_evidence,
        caveat=_recency_caveat,
        strategies=(
            "Recent K: keep the latest K transitions untouched",
            "Drop or compress what is older than that",
            "Exponential decay: the further back, the fewer transitions stay",
        ),
        example="keep the last 10 steps and replace everything older by a summary",
        strategy="recent",
        measured=("recent", "recent-summary", "decay"),
        headline=("recent", 10),
    ),
    "uniform": Pattern(
        title="Uniform attention",
        advice="Consider sampling that covers the whole history; compress with care.",
        meaning="The model reads broadly: no stretch of its history stands out.",
        figure=lambda scope: scope.mean("entropy"),
        figure_name="mean entropy",
        rule=lambda entropy: entropy > UNIFORM_ENTROPY,
        rule_text=f"> {UNIFORM_ENTROPY}",
        evidence=partial(_entropy_evidence, "above", UNIFORM_ENTROPY),
        caveat=_uniform_caveat,
        strategies=(
            "Diverse sampling: keep transitions that differ, so that nothing is left uncovered",
            "K-means or k-medoids: one representative for each cluster of transitions",
            "Careful with hard compression: every transition dropped was being read",
        ),
        example="keep transitions at evenly spaced points of the history",
        strategy="even",
        measured=("diverse", "centroids", "k-medoids", "even"),
        headline=("even", 10),
    ),
    "focused": Pattern(
        title="Focused attention",
        advice="Consider keeping the most attended positions and pruning the rest.",
        meaning="The model has clear preferences among the transitions it could read.",
        figure=lambda scope: scope.mean("entropy"),
        figure_name="mean entropy",
        rule=lambda entropy: entropy < FOCUSED_ENTROPY,
        rule_text=f"< {FOCUSED_ENTROPY}",
        evidence=partial(_entropy_evidence, "below", FOCUSED_ENTROPY),
        caveat=_focused_caveat,
        strategies=(
            "Keep the positions that receive most of the attention",
            "Prune positions with little attention, and prune hard",
            "Importance sampling: draw transitions with their attention as probability",
        ),
        example="keep the 30% of positions that are attended most",
        strategy="top-k",
        measured=("top-k", "prune-low", "importance", "top-30"),
        headline=("top-30", None),
    ),
    "sparse": Pattern(
        title="Sparse attention",
        advice="Consider keeping only the few positions that carry the decision.",
        meaning="A handful of positions receives most of what the history is given.",
        figure=lambda scope: float(is_sparse(scope.values).mean()),
        figure_name="sparse rows",
        rule=lambda share: share > SPARSE_MAJORITY,
        rule_text=f"> {SPARSE_MAJORITY:.0%}",
        evidence=_sparse_evidence,
        caveat=_sparse_caveat,
        strategies=(
            "Threshold: keep positions with a weight above 0.1",
            "Top-K: for every query keep the K positions it attends most",
            "Landmarks: keep the few positions that query after query comes back to",
        ),
        example="keep the 5 most attended positions and the query",
        strategy="top-k",
        measured=("threshold", "top-k", "landmark"),
        headline=("top-k", 5),
    ),
}
