"""Which transitions of a history to keep, by the attention they receive.

Past attention lies in the passes that the model has run already. The query's own attention takes a
pass over the whole history first: it shows what could go, and saves no compute.

    METHODS["top-k"].compress(history, n_keep=20)               # history.query_attention is known
"""

import torch
from torch import Tensor

from historylens.compression.method import (
    Generator,
    ages,
    best_first,
    draw,
    half,
    keep_best,
    keep_where,
    latest,
    strategy,
)
from historylens.history import History
from historylens.metrics import MASS_SHARE, STRONG_WEIGHT, TOLERANCE

POOL_WIDTH = 5  # neighbouring transitions that share votes, as in SnapKV
BLOCK = 5  # transitions behind one landmark
TOP_PERCENT = 30  # of the history, kept by "top-30"


@strategy("accumulated-recent", "Zhang et al. 2023, arXiv 2306.14048 (H2O)", "past attention",
          needs=("received",))  # fmt: skip
def accumulated_recent(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the latest transitions for half of the budget, and older ones that have received most
    attention so far.
    """
    return keep_best(n_keep, latest(history, half(n_keep)), history.received)


@strategy("pooled-votes", "Li et al. 2024, arXiv 2404.14469 (SnapKV)", "past attention",
          needs=("last_rows",))  # fmt: skip
def pooled_votes(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the last transitions (as many as vote, at most half of the budget), and the older ones
    that those attend most, averaged over 5 neighbours.
    """
    votes = history.last_rows.double().mean(dim=1)
    pooled = torch.nn.functional.avg_pool1d(
        votes[:, None], POOL_WIDTH, stride=1, padding=POOL_WIDTH // 2
    )[:, 0]
    n_latest = min(history.last_rows.shape[1], half(n_keep))
    return keep_best(n_keep, latest(history, n_latest), pooled)


@strategy("top-k", "Gupta et al. 2021, arXiv 2106.06899 (top-k attention)", "query attention",
          needs=("query_attention",))  # fmt: skip
def top_k(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the transitions that the query attends most."""
    return keep_best(n_keep, history.query_attention)


@strategy("top-30", "Goyal et al. 2020, arXiv 2001.08950 (PoWER-BERT)", "query attention",
          keeps="up to n_keep", needs=("query_attention",))  # fmt: skip
def top_30(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the 30 % of the transitions that the query attends most, rounded up."""
    n_top = -(-history.n * TOP_PERCENT // 100)
    return keep_best(min(n_keep, n_top), history.query_attention)


@strategy("threshold", "Kim et al. 2021, arXiv 2107.00910 (learned token pruning)",
          "query attention", keeps="up to n_keep", needs=("query_attention",))  # fmt: skip
def threshold(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the transitions with an attention weight above 0.1."""
    strong = history.query_attention > STRONG_WEIGHT + TOLERANCE
    return keep_where(strong & (_ranks(history.query_attention) < n_keep))


@strategy("prune-low", "Lin et al. 2025, arXiv 2502.02770 (top-p pruning)", "query attention",
          keeps="up to n_keep", needs=("query_attention",))  # fmt: skip
def prune_low(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the fewest transitions that hold 90 % of the attention on history, and drop the rest."""
    mass = history.query_attention.double().sum(dim=1, keepdim=True)
    shares = history.query_attention.double() / torch.where(mass > 0, mass, torch.ones_like(mass))
    held = shares.sort(dim=1, descending=True).values.cumsum(dim=1)
    n_needed = ((held < MASS_SHARE - TOLERANCE).sum(dim=1, keepdim=True) + 1) * (mass > 0)
    return keep_where(_ranks(shares) < n_needed.clamp(max=n_keep))


def _ranks(scores: Tensor) -> Tensor:
    """Place of each transition in `best_first`: `(B, n)`, 0 for the best."""
    return best_first(scores).argsort(dim=1)


@strategy("importance", "Kool et al. 2019, arXiv 1903.06059 (Gumbel top-k)", "query attention",
          needs=("query_attention",))  # fmt: skip
def importance(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Draw transitions with the query's attention as their chance."""
    return draw(history, history.query_attention.double().log(), n_keep, generator)


@strategy("landmark", "Mohtashami and Jaggi 2023, arXiv 2305.16300 (landmark attention)",
          "query attention", needs=("query_attention",))  # fmt: skip
def landmark(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the blocks of 5 transitions whose most attended one, the landmark, is attended most, and
    of a block that fits only in part its most attended ones.
    """
    block = (ages(history) - 1) // BLOCK  # 0 is the latest
    weights = history.query_attention
    marks = torch.zeros_like(weights).scatter_reduce(1, block, weights, "amax").gather(1, block)
    return keep_best(n_keep, marks, -block, weights)


@strategy("least-attended", "baseline: the worst choice, if attention says what matters",
          "query attention", needs=("query_attention",))  # fmt: skip
def least_attended(history: History, n_keep: int, generator: Generator | None) -> Tensor:
    """Keep the transitions that the query attends least."""
    return keep_best(n_keep, -history.query_attention)
