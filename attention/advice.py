"""What each attention pattern means, and which ways of compressing history it suggests.

from attention.advice import PATTERNS
PATTERNS["recency"].strategies
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """What a pattern means and which ways of compressing history it suggests."""

    title: str
    advice: str
    meaning: str
    strategies: tuple[str, ...]
    example: str


PATTERNS = {
    "recency": Pattern(
        "Strong recency bias",
        "Consider compressing or removing distant history.",
        "The model leans on what happened last and hardly reads what lies far back.",
        (
            "Recent K: keep the latest K transitions untouched",
            "Drop or compress what is older than that",
            "Exponential decay: the further back, the fewer transitions stay",
        ),
        "keep the last 10 steps and replace everything older by a summary",
    ),
    "uniform": Pattern(
        "Uniform attention",
        "Consider sampling that covers the whole history; compress with care.",
        "The model reads broadly: no stretch of its history stands out.",
        (
            "Diverse sampling: keep transitions that differ, so that nothing is left uncovered",
            "K-means or k-medoids: one representative for each cluster of transitions",
            "Careful with hard compression: every transition dropped was being read",
        ),
        "keep transitions at evenly spaced points of the history",
    ),
    "focused": Pattern(
        "Focused attention",
        "Consider keeping the most attended positions and pruning the rest.",
        "The model has clear preferences among the transitions it could read.",
        (
            "Keep the positions that receive most of the attention",
            "Prune positions with little attention, and prune hard",
            "Importance sampling: draw transitions with their attention as probability",
        ),
        "keep the 30% of positions that are attended most",
    ),
    "sparse": Pattern(
        "Sparse attention",
        "Consider keeping only the few positions that carry the decision.",
        "A handful of positions receives most of what the history is given.",
        (
            "Threshold: keep positions with a weight above 0.1",
            "Top-K: for every query keep the K positions it attends most",
            "Landmarks: keep the few positions that query after query comes back to",
        ),
        "keep the 5 most attended positions and the query",
    ),
}
