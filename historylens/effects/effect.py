"""What one way of compressing did to the actions of some decisions, beside what chance does.

effect = Effect.of(full_logits, logits, n_keep=10, kept=torch.full((len(logits),), 10))
effect.flips, effect.kl_mean, effect.against_random
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
from torch import Tensor

from historylens.compression import METHODS
from historylens.compression.strategies import TOP_PERCENT

BAND = (5, 95)  # percentiles of the draws
UNMOVED = 0.1  # nats: below, one who sees the actions needs some 30 to tell the histories apart
UNMOVED_EMPTY = 0.5  # nats, without history; untrained models reach 0.1 to 0.4
LADDER = (1, 2, 5)  # sizes, times powers of ten
LARGEST = 0.6  # of the context: beyond, little is saved


@dataclass(frozen=True)
class Effect:
    """What one way of compressing did to the actions of `B` decisions, in each of `D` draws.

    Attributes:
        n_keep: transitions asked for.
        kept_mean, kept_min, kept_max: transitions really kept (tokens, of a merge).
        n_decisions: `B`.
        flips: share of the decisions whose most likely action changes.
        kl_mean, kl_p95: mean and 95th percentile of KL(full || compressed) of the action
            distributions, nats.
        flips_band, kl_band: middle 90 % of the draws, low and high, where there are several.
        draws: `(D,)` float64, mean KL of each.
        random: the effect of random draws of as many transitions; None of what is random itself,
            and of controls.
    """

    n_keep: int
    kept_mean: float
    kept_min: int
    kept_max: int
    n_decisions: int
    flips: float
    kl_mean: float
    kl_p95: float
    flips_band: list[float] | None
    kl_band: list[float] | None
    draws: np.ndarray
    random: "Effect | None" = None

    @classmethod
    def of(cls, full: Tensor, logits: Tensor, n_keep: int, kept: Tensor) -> "Effect":
        """The effect that logits show.

        Args:
            full: `(B, A)` action logits on the full context.
            logits: `(D * B, A)` on what is left of it, draw after draw.
            n_keep: transitions asked for.
            kept: `(D * B,)` int, transitions really kept.
        """
        size = len(full)
        full = full.repeat(len(logits) // size, 1)
        kl = kl_divergence(full, logits).cpu().numpy()
        flips = (full.argmax(-1) != logits.argmax(-1)).cpu().numpy()
        by_draw = flips.reshape(-1, size).mean(axis=1), kl.reshape(-1, size).mean(axis=1)
        bands = [np.percentile(draws, BAND).tolist() for draws in by_draw]
        return cls(
            *(n_keep, float(kept.double().mean()), int(kept.min()), int(kept.max()), size),
            *(float(flips.mean()), float(kl.mean()), float(np.percentile(kl, 95))),
            *(bands if len(by_draw[0]) > 1 else (None, None)),
            draws=by_draw[1],
        )

    @property
    def against_random(self) -> str | None:
        """Whether the mean KL is "better" or "worse" than that of each random draw, or "alike".

        Better (worse) than all of 20 draws happens to a random choice once in 21 times.
        """
        if self.random is None:
            return None
        if self.kl_mean < self.random.draws.min():
            return "better"
        return "worse" if self.kl_mean > self.random.draws.max() else "alike"

    def json(self) -> dict[str, Any]:
        """As plain values."""
        known = vars(self) | {"draws": None, "random": None, "against_random": self.against_random}
        return {name: value for name, value in known.items() if value is not None}


def enough(curve: Sequence[Effect]) -> int | None:
    """Fewest transitions from which on the KL stays within `UNMOVED`; None: more than measured."""
    unmoved = [*takewhile(lambda effect: effect.kl_mean <= UNMOVED, reversed(curve))]
    return unmoved[-1].n_keep if unmoved else None


def kl_divergence(full: Tensor, other: Tensor) -> Tensor:
    """KL(full || other) of action distributions from logits `(..., A)`: `(...)` float64 nats."""
    p, q = full.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


def budgets(n: int) -> list[int]:
    """Sizes at which methods are measured on `n` transitions: 1, 2, 5, 10, ... and 30 %."""
    ladder = {step * 10**power for power in range(len(str(n))) for step in LADDER}
    sizes = {size for size in ladder if size <= max(1, LARGEST * n)} | {share_of(n)}
    return sorted(size for size in sizes if size < n)


def share_of(n: int) -> int:
    """30 % of `n`, rounded up, as "top-30" keeps."""
    return -(-n * TOP_PERCENT // 100)


def has_own_size(name: str) -> bool:
    """Whether a method keeps as many as it needs, whatever the budget."""
    return METHODS[name].keeps == "up to n_keep"
