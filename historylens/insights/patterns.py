"""The one table of patterns: what each looks at, says, advises, and has measured.

evidence, measured, caveat, by_rule_only = PATTERNS["recency"].read(scope)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

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
    """The attention rows that a statement is about: one layer's `(S,)`, or all layers' `(L, S)`."""

    layer: int | None  # its number; None for all
    values: dict[str, np.ndarray]  # name -> metrics of the head-averaged rows
    uniform: dict[str, np.ndarray]  # name -> (S,), the same under uniform attention
    n: np.ndarray  # (S,), context tokens

    def mean(self, name: str) -> float:
        """Mean of a metric over the rows."""
        return float(self.values[name].mean())

    @property
    def context_mass(self) -> np.ndarray:
        """Weight on the whole context, of each row."""
        return self.values["mean_context_attention"] * self.n

    @property
    def is_broad(self) -> bool:
        """Whether the rows are even for their length, however long that is."""
        return bool((self.values["effective_tokens"] / np.maximum(self.n, 1)).mean() >= BROAD_SHARE)

    @property
    def length(self) -> str:
        """`n` in words."""
        return "n = " + " to ".join(f"{n}" for n in dict.fromkeys((self.n.min(), self.n.max())))

    @property
    def normalised(self) -> str:
        """The length-normalised entropy in words."""
        if self.n.max() <= 1:
            return "with one token there is nothing to choose"
        evenness, most = self.mean("normalised_entropy"), np.log(np.maximum(self.n, 1)).mean()
        return f"{evenness:.2f} of the maximum ln n = {most:.2f}"


def is_sparse(values: Mapping[str, np.ndarray]) -> np.ndarray:
    """Rows with 1 to 5 positions above 0.1 that hold at least half of the context mass."""
    held = values["strong_share"] >= SPARSE_MASS - TOLERANCE  # so there is one
    return (values["strong_positions"] <= SPARSE_POSITIONS) & held


# Evidence, its numbers, where the rule misleads, and whether the figures for the length contradict.
Reading = tuple[str, dict[str, float], str | None, bool]


def _recency(scope: Scope) -> Reading:
    ratio, mass = scope.values["recent_distant_ratio"], scope.context_mass
    median, mean = float(np.median(ratio)), float(ratio.mean())
    last = scope.values["mass_last_quarter"]
    held = float(np.divide(last, mass, out=np.zeros_like(mass), where=mass > 0).mean())
    even = float((scope.uniform["mass_last_quarter"] * (1 + 1 / np.maximum(scope.n, 1))).mean())
    evidence = f"The median recent/distant ratio is {cap(median)} (mean {cap(mean)}), above "
    evidence += f"{RECENCY_RATIO}: the last quarter of the context holds {held:.0%} of the "
    evidence += f"attention on history, evenly {even:.0%}."
    measured = {"median_ratio": median, "mean_ratio": mean, "last_quarter_share": held}
    caveat = None
    if held < even:
        caveat = "Both quarters are faint: the ratio compares small numbers, and the last quarter "
        caveat += f"holds only {held:.0%} of the attention on history. Most of it lies elsewhere."
    elif scope.n.max() < 4:
        caveat = f"At {scope.length} a quarter is one token: the ratio only compares the latest "
        caveat += "transition with the first."
    return evidence, measured | {"threshold": RECENCY_RATIO}, caveat, held < even


def _entropy(side: str, threshold: float, scope: Scope) -> tuple[str, dict[str, float]]:
    """Evidence of an entropy below or above a threshold, and the numbers in it."""
    names = ("entropy", "normalised_entropy", "effective_tokens", "tokens_for_90_percent")
    measured = {name: scope.mean(name) for name in names} | {"threshold": threshold}
    entropy, _, read, most, _ = measured.values()
    evidence = f"The mean entropy is {entropy:.2f} nats, {side} {threshold}: in effect {read:.1f} "
    evidence += f"of {scope.n.mean():.0f} tokens are read, and {most:.1f} tokens hold 90% of the "
    return evidence + "attention on history.", measured


def _uniform(scope: Scope) -> Reading:
    evidence, measured = _entropy("above", UNIFORM_ENTROPY, scope)
    if scope.is_broad:
        return evidence, measured, None, False
    read = scope.mean("effective_tokens")
    caveat = f"Entropy > {UNIFORM_ENTROPY} nats calls this uniform, but over {scope.length} tokens "
    caveat += f"it is {scope.normalised}: the model effectively reads {read:.1f} tokens, so it "
    return evidence, measured, caveat + "does pick from its history.", True


def _focused(scope: Scope) -> Reading:
    mass, read = float(scope.context_mass.mean()), scope.mean("effective_tokens")
    even = float(scope.uniform["entropy"].mean())
    alone = float(np.log(np.maximum(scope.values["effective_tokens"], 1)).mean())
    caveat = None
    if mass < FAINT_MASS:
        caveat = f"The query keeps {1 - mass:.1%} of its attention on itself: the entropy is low "
        caveat += "because the history is hardly read here, not because the model picks from it."
    elif even < FOCUSED_ENTROPY:
        spread = "broadly" if scope.is_broad else "selectively"
        caveat = f"The threshold cannot discriminate at {scope.length}: even uniform attention has "
        caveat += f"an entropy of {even:.2f} nats. For its length the history is read {spread}: "
        caveat += f"{scope.normalised}."
    elif alone >= FOCUSED_ENTROPY:
        caveat = f"Only {mass:.0%} of the attention lies on history. That part alone has an "
        caveat += f"entropy of {alone:.2f} nats, not below {FOCUSED_ENTROPY}: {read:.1f} tokens in "
        caveat += f"effect, {scope.normalised}."
    elif scope.is_broad:
        caveat = f"The context is short: over {scope.length} tokens the entropy is "
        caveat += f"{scope.normalised}, {read:.1f} tokens in effect, which is most of them."
    return *_entropy("below", FOCUSED_ENTROPY, scope), caveat, mass < FAINT_MASS or scope.is_broad


def _sparse(scope: Scope) -> Reading:
    sparse = is_sparse(scope.values)
    names = ("strong_positions", "strong_share")
    count, held = (float(scope.values[name][sparse].mean()) for name in names)
    share, rows = float(sparse.mean()), counted(sparse.size, "attention row")
    source = " x ".join(map(counted, sparse.shape[::-1], ("sample", "layer")))
    evidence = f"In {share:.0%} of {rows} ({source}) at most {SPARSE_POSITIONS} positions "
    evidence += f"are above {STRONG_WEIGHT} and hold at least half of the attention on history; "
    evidence += f"there, {count:.1f} positions hold {held:.0%} of it on average."
    measured = {"share_of_rows": share, "strong_positions": count, "strong_share": held}
    measured["threshold"] = SPARSE_MAJORITY
    if is_sparse(scope.uniform).mean() <= SPARSE_MAJORITY:
        return evidence, measured, None, False
    caveat = f"The rule cannot discriminate at {scope.length}: uniform attention, too, has at most "
    caveat += f"{SPARSE_POSITIONS} positions above {STRONG_WEIGHT}. For its length the entropy "
    return evidence, measured, f"{caveat}says: {scope.normalised}.", scope.is_broad


@dataclass(frozen=True)
class Pattern:
    """A way in which attention may lie, how it shows, and what follows."""

    title: str
    advice: str
    meaning: str
    rule: Callable[[Scope], bool]  # whether it holds
    read: Callable[[Scope], Reading]
    strategies: tuple[str, ...]  # ways to compress that fit, in words
    example: str
    strategy: str  # the one that compress_history takes
    measured: tuple[str, ...]  # methods whose effect is measured for it, beside random choice
    headline: tuple[str, int]  # that the line of effects is about, and how many it keeps at most


PATTERNS = {
    "recency": Pattern(
        title="Strong recency bias",
        advice="Consider compressing or removing distant history.",
        meaning="The model leans on what happened last and hardly reads what lies far back.",
        rule=lambda scope: np.median(scope.values["recent_distant_ratio"]) > RECENCY_RATIO,
        read=_recency,
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
        rule=lambda scope: scope.mean("entropy") > UNIFORM_ENTROPY,
        read=_uniform,
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
        rule=lambda scope: scope.mean("entropy") < FOCUSED_ENTROPY,
        read=_focused,
        strategies=(
            "Keep the positions that receive most of the attention",
            "Prune positions with little attention, and prune hard",
            "Importance sampling: draw transitions with their attention as probability",
        ),
        example="keep the 30% of positions that are attended most",
        strategy="top-k",
        measured=("top-k", "prune-low", "importance", "top-30"),
        headline=("top-30", 30),
    ),
    "sparse": Pattern(
        title="Sparse attention",
        advice="Consider keeping only the few positions that carry the decision.",
        meaning="A handful of positions receives most of what the history is given.",
        rule=lambda scope: is_sparse(scope.values).mean() > SPARSE_MAJORITY,
        read=_sparse,
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
