"""What stands behind a pattern, in words and numbers, and where the length of the context misleads.

    text, measured = EVIDENCE["recency"](scope)          # what was measured
    caveat, by_rule_only = CAVEATS["uniform"](scope)     # what the absolute rule does not see

A `Scope` is what such a statement is about: the attention rows of one layer, or of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attention.metrics import STRONG_WEIGHT, TOLERANCE

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
    """The `K` attention rows that a statement is about: one layer's, or those of all layers.

    Attributes:
        layer: number of the layer, or None for all.
        values: name -> `(K,)`, metrics of the head-averaged rows.
        uniform: name -> `(K,)`, the same metrics under uniform causal attention.
        n: `(K,)`, context tokens.
        source: where the rows come from, in words.
    """

    layer: int | None
    values: dict[str, np.ndarray]
    uniform: dict[str, np.ndarray]
    n: np.ndarray
    source: str

    def mean(self, name: str) -> float:
        """Mean of a metric over the rows."""
        return float(self.values[name].mean())

    @property
    def context_mass(self) -> np.ndarray:
        """`(K,)`: weight on the whole context."""
        return self.values["mean_context_attention"] * self.n

    @property
    def share_read(self) -> float:
        """Tokens read in effect over `n`, mean over the rows."""
        return float((self.values["effective_tokens"] / self.n).mean())

    @property
    def is_broad(self) -> bool:
        """Whether the rows are even for their length, however long that is."""
        return self.share_read >= BROAD_SHARE

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


def is_sparse(values: dict[str, np.ndarray]) -> np.ndarray:
    """Rows `(K,)` with 1 to 5 positions above 0.1 that hold at least half of the context mass."""
    count = values["strong_positions"]
    held = values["strong_share"] >= SPARSE_MASS - TOLERANCE  # so there is at least one
    return (count <= SPARSE_POSITIONS) & held


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
    if scope.n.max() < 4:
        return (
            f"At {scope.length} a quarter is one token: the ratio only compares the latest "
            "transition with the first.",
            False,
        )
    return None, False


def _last_quarter(scope: Scope) -> tuple[float, float]:
    """Share of the context mass in the last quarter: measured, and under even reading."""
    mass = scope.context_mass
    last = scope.values["mass_last_quarter"]
    held = np.divide(last, mass, out=np.zeros_like(mass), where=mass > 0).mean()
    return float(held), float((scope.uniform["mass_last_quarter"] * (scope.n + 1) / scope.n).mean())


def _uniform_evidence(scope: Scope) -> tuple[str, dict[str, float]]:
    text = f"The mean entropy is {scope.mean('entropy'):.2f} nats, above {UNIFORM_ENTROPY}: "
    return text + _tokens_read(scope), _entropy_measured(scope, UNIFORM_ENTROPY)


def _uniform_caveat(scope: Scope) -> tuple[str | None, bool]:
    if scope.is_broad:
        return None, False
    return (
        f"Entropy > {UNIFORM_ENTROPY} nats calls this uniform, but over {scope.length} tokens it "
        f"is {scope.normalised}: the model effectively reads "
        f"{scope.mean('effective_tokens'):.1f} tokens, so it does pick from its history.",
        True,
    )


def _focused_evidence(scope: Scope) -> tuple[str, dict[str, float]]:
    text = f"The mean entropy is {scope.mean('entropy'):.2f} nats, below {FOCUSED_ENTROPY}: "
    return text + _tokens_read(scope), _entropy_measured(scope, FOCUSED_ENTROPY)


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


EVIDENCE = {
    "recency": _recency_evidence,
    "uniform": _uniform_evidence,
    "focused": _focused_evidence,
    "sparse": _sparse_evidence,
}
CAVEATS = {
    "recency": _recency_caveat,
    "uniform": _uniform_caveat,
    "focused": _focused_caveat,
    "sparse": _sparse_caveat,
}


def _tokens_read(scope: Scope) -> str:
    return (
        f"in effect {scope.mean('effective_tokens'):.1f} of {scope.n.mean():.0f} tokens are read, "
        f"and {scope.mean('tokens_for_90_percent'):.1f} tokens hold 90% of the attention on "
        "history."
    )


def _entropy_measured(scope: Scope, threshold: float) -> dict[str, float]:
    names = ("entropy", "normalised_entropy", "effective_tokens", "tokens_for_90_percent")
    return {name: scope.mean(name) for name in names} | {"threshold": threshold}


def cap(value: float, limit: float = 1000.0, decimals: int = 2) -> str:
    """A ratio for people to read: a denominator near zero makes it huge and its digits noise."""
    return f"> {limit:.0f}" if value > limit else f"{value:.{decimals}f}"


def layer_list(layers: Sequence[int]) -> str:
    """`layer 1`, `layers 1 and 2`, `layers 0, 1 and 3`."""
    *first, last = [str(layer) for layer in layers]
    return f"layers {', '.join(first)} and {last}" if first else f"layer {last}"


def counted(number: int, noun: str) -> str:
    """`1 layer`, `4 layers`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
