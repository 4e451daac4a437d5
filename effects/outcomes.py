"""What one way of compressing did to the actions of some decisions, beside what chance does.

    outcome = compare(full_logits, logits[None], n_keep=10, kept=[10] * len(full_logits))
    outcome.flip_share, outcome.kl_mean, against_random(outcome, random)

Axes: `B` decisions, `D` draws of what is random (else 1), `A` actions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compression import kl_divergence

BAND = (5, 95)  # percentiles of the draws
UNMOVED = 0.1  # nats: below, one who sees the actions needs some 30 to tell the histories apart


@dataclass(frozen=True)
class Outcome:
    """What one way of compressing did to the actions.

    Attributes:
        n_keep: transitions asked for.
        kept: `(D, B)` int, transitions really kept (tokens, of a merge).
        kl: `(D, B)` float64, KL(full || compressed) of the action distributions, nats.
        flips: `(D, B)` bool, whether the most likely action is another one.
    """

    n_keep: int
    kept: np.ndarray
    kl: np.ndarray
    flips: np.ndarray

    @property
    def flip_share(self) -> float:
        """Share of decisions whose most likely action changes."""
        return float(self.flips.mean())

    @property
    def kl_mean(self) -> float:
        """Mean divergence, nats."""
        return float(self.kl.mean())

    @property
    def kl_p95(self) -> float:
        """95th percentile of the divergence, nats."""
        return float(np.percentile(self.kl, 95))

    @property
    def kept_mean(self) -> float:
        """Transitions kept on average."""
        return float(self.kept.mean())

    def band(self, name: str) -> tuple[float, float]:
        """The middle 90 % of the draws: of their mean "kl", or of their share of "flips"."""
        low, high = np.percentile(getattr(self, name).mean(axis=1), BAND)
        return float(low), float(high)


def against_random(outcome: Outcome, random: Outcome) -> str:
    """Whether a mean KL is "better" or "worse" than that of each random draw, or "alike".

    Better (worse) than all of 20 draws happens to a random choice once in 21 times.
    """
    draws = random.kl.mean(axis=1)
    if outcome.kl_mean < draws.min():
        return "better"
    return "worse" if outcome.kl_mean > draws.max() else "alike"


def enough(outcomes: Sequence[Outcome]) -> int | None:
    """Fewest transitions from which on the KL stays within `UNMOVED`; None: more than measured."""
    found = None
    for outcome in reversed(outcomes):
        if outcome.kl_mean > UNMOVED:
            break
        found = outcome.n_keep
    return found


def compare(full: Tensor, logits: Tensor, n_keep: int, kept: Tensor | Sequence[int]) -> Outcome:
    """Outcome of action logits `(D, B, A)` beside those on the full context `(B, A)`."""
    full = full.expand_as(logits)
    flips = full.argmax(-1) != logits.argmax(-1)
    kept = np.broadcast_to(torch.as_tensor(kept).cpu().numpy(), flips.shape)
    kl = kl_divergence(full, logits)
    return Outcome(n_keep, kept, kl.cpu().numpy(), flips.cpu().numpy())
