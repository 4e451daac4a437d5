"""What each transition does to the action, by running the model without it.

Exact and expensive: what the strategies can only guess. A transition is left out, not masked: those
after it move one position to the front, as in every compressed history.

    effects = leave_one_out(lambda h: model(*h.inputs), history)
    effects.kl                                                   # (B, n) nats
    indices = ORACLES["greedy"].select(history, 10, lambda h: model(*h.inputs))
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.history import History, keep_best
from compression.strategies import first_sentence, whole_number

Logits = Callable[[History], Tensor]
BATCH_SIZE = 512  # histories in a pass of the model
DECIMALS = 7  # divergences closer than this are equal: noise of float32 logits


@dataclass(frozen=True)
class Effects:
    """What leaving out each transition does to the action.

    Attributes:
        kl: `(B, n)` float64 nats, divergence of the action distribution without the transition
            from the one with it.
        flips: `(B, n)` bool, whether the most likely action changes.
    """

    kl: Tensor
    flips: Tensor


def kl_divergence(full: Tensor, other: Tensor) -> Tensor:
    """KL(full || other) of action distributions from logits `(..., A)`: `(...)` float64 nats."""
    p, q = full.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


def leave_one_out(logits: Logits, history: History, batch_size: int = BATCH_SIZE) -> Effects:
    """Leave out one transition at a time, all of them (Li et al. 2016, arXiv 1612.08220).

    `B * n` histories of `n - 1` transitions, `batch_size` of them in a pass.

    Args:
        logits: from a history of `R` decisions to action logits `(R, A)`; deterministic.
        history: `n` transitions before each of `B` decisions, as many as the model can read.
        batch_size: histories in a pass.
    """
    with torch.no_grad():
        full = logits(history)
        everything = torch.arange(history.n, device=history.device).expand(history.size, -1)
        other = _without_each(logits, history, everything, batch_size)
    full = full[:, None].expand_as(other)
    return Effects(kl_divergence(full, other), full.argmax(-1) != other.argmax(-1))


def _without_each(logits: Logits, history: History, kept: Tensor, batch_size: int) -> Tensor:
    """Action logits `(B, m, A)` without each one of the `m` kept transitions `(B, m)`."""
    size, m = kept.shape
    others = torch.arange(m - 1, device=kept.device).expand(m, -1) if m else kept.new_empty(0, 0)
    others = others + (others >= torch.arange(m, device=kept.device)[:, None])  # (m, m - 1)
    parts = []
    for pairs in torch.arange(size * m, device=kept.device).split(batch_size):
        rows, left_out = pairs // max(m, 1), pairs % max(m, 1)
        indices = kept[rows[:, None], others[left_out]]
        parts.append(logits(history.rows(rows).take(indices)))
    found = torch.cat(parts)
    return found.reshape(size, m, found.shape[-1])


def elimination_order(
    logits: Logits, history: History, n_keep: int = 0, batch_size: int = BATCH_SIZE
) -> Tensor:
    """Drop, again and again, the transition whose loss changes the full action least.

    Greedy backward elimination (Feng et al. 2018, arXiv 1804.07781): about `B * n**2 / 2`
    histories run through the model. Among equals the oldest goes first.

    Args:
        logits: from a history of `R` decisions to action logits `(R, A)`; deterministic.
        history: `n` transitions before each of `B` decisions, as many as the model can read.
        n_keep: transitions that are left in the end.
        batch_size: histories in a pass.

    Returns:
        `(B, n - n_keep)` indices, the first dropped first.
    """
    n_keep = whole_number(n_keep)
    kept = torch.arange(history.n, device=history.device).expand(history.size, -1)
    dropped = []
    with torch.no_grad():
        full = logits(history)
        while kept.shape[1] > n_keep:
            other = _without_each(logits, history, kept, batch_size)
            loss = kl_divergence(full[:, None].expand_as(other), other).round(decimals=DECIMALS)
            least = loss.sort(dim=1, stable=True).indices[:, :1]
            dropped.append(kept.gather(1, least))
            stays = torch.ones_like(kept, dtype=torch.bool).scatter(1, least, False)
            kept = kept[stays].view(history.size, -1)
    return torch.cat([kept[:, :0], *dropped], dim=1)


@dataclass(frozen=True)
class Oracle:
    """A way to choose transitions that asks the model itself.

    Attributes:
        name: key of `ORACLES`.
        rule: what it keeps, in one sentence.
        source: paper that proposed it.
        choose: the rule itself, for `0 < n_keep < n`.
    """

    name: str
    rule: str
    source: str
    choose: Callable[[Logits, History, int], Tensor]
    looks_at: str = "the action without each transition"
    saves_compute: bool = False

    def select(self, history: History, n_keep: int, logits: Logits) -> Tensor:
        """Choose exactly `n_keep` transitions, all of them from `n_keep = n` on.

        Returns:
            `(B, n_keep)` int64, ascending.
        """
        n_keep = whole_number(n_keep)
        if 0 < n_keep < history.n:
            return self.choose(logits, history, n_keep)
        return torch.arange(min(n_keep, history.n), device=history.device).expand(history.size, -1)


def largest_effects(logits: Logits, history: History, n_keep: int) -> Tensor:
    """Keep the transitions that change the action distribution most when each alone is left out."""
    return keep_best(n_keep, leave_one_out(logits, history).kl.round(decimals=DECIMALS))


def greedy(logits: Logits, history: History, n_keep: int) -> Tensor:
    """Drop, again and again, the transition whose loss changes the full action least."""
    kept = torch.ones(history.size, history.n, dtype=torch.bool, device=history.device)
    kept = kept.scatter(1, elimination_order(logits, history, n_keep), False)
    return kept.nonzero()[:, 1].view(history.size, n_keep)


ORACLES = {
    name: Oracle(name, first_sentence(choose), source, choose)
    for name, source, choose in (
        ("leave-one-out", "Li et al. 2016, arXiv 1612.08220 (erasure)", largest_effects),
        ("greedy", "Feng et al. 2018, arXiv 1804.07781 (input reduction)", greedy),
    )
}
