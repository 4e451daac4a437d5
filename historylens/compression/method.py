"""What a way to compress is, the registry of all of them, and the pieces that they are made of.

    method = METHODS["rewarded-recent"]
    shorter = method.compress(history, n_keep=20)               # a History
    shorter.kept                                                # (B, 20), which transitions

A *strategy* keeps real transitions, a *merge* makes new tokens of them, a *control* takes the
history's information away and leaves its shape. All have one call shape, and work on raw history,
never on one that was compressed before.
"""

import difflib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from historylens.history import PADDING, History

Generator = torch.Generator | np.random.Generator
Rule = Callable[[History, int, Generator | None], Any]
Kind = Literal["strategy", "merge", "control"]
LooksAt = Literal["nothing", "history", "past attention", "query attention"]
Keeps = Literal["n_keep", "up to n_keep", "all", "none"]
HOW_TO_KNOW = {
    "episodes": "episode_ids(n, horizon, steps_taken)",
    "received": "what each transition receives from those after it, summed over them",
    "last_rows": "the attention rows of the last transitions",
    "query_attention": "the query's row of a forward pass over the whole history",
    "query_states": "the states in which to act",
}


@dataclass(frozen=True)
class Method:
    """A way to compress a history."""

    name: str  # key of METHODS
    kind: Kind
    rule: str  # what it does, in one sentence
    source: str  # paper that proposed it, or what it serves for
    looks_at: LooksAt  # the query's attention takes a pass over the whole history first
    keeps: Keeps  # exactly as many as asked, or what it keeps instead
    needs: tuple[str, ...]  # optional fields of History that it reads
    apply: Rule  # to a History; only where `0 < n_keep < n`, but for controls

    def compress(
        self, history: History, n_keep: int, generator: Generator | None = None
    ) -> History:
        """Compress raw histories. Nothing is changed, and nothing is kept between calls.

        Args:
            history: the raw history, never one that was compressed before.
            n_keep: transitions (tokens, of a merge) wanted. From `n` on the history is returned as
                it is, by every method but "empty" and the controls.
            generator: for what is drawn; the same state of it, the same result.

        Returns:
            A history of `n_keep` transitions in the order of time. Its `kept` says which they are,
            unless nothing was left out or they are new; where `keeps` is "up to n_keep" it is
            padded. A control's has the shape of the given one.

        Raises:
            ValueError: `n_keep` is no whole number or negative, or the history lacks what the
                method looks at.
        """
        n_keep = {"all": history.n, "none": 0}.get(self.keeps, whole_number(n_keep))
        if self.kind != "control":
            if n_keep >= history.n:
                return history
            if n_keep == 0:
                return history.take(ages(history)[:, :0])
        for field in self.needs:
            if getattr(history, field) is None:
                raise ValueError(
                    f"'{self.name}' looks at {field}, which this history lacks: "
                    f"it takes {HOW_TO_KNOW[field]}"
                )
        return self.apply(history, n_keep, generator)


METHODS: dict[str, Method] = {}


def enter(
    name: str,
    source: str,
    looks_at: LooksAt = "nothing",
    *needs: str,
    keeps: Keeps = "n_keep",
    kind: Kind = "strategy",
    finish: Callable[[History, Any], History] = History.take,
) -> Callable[[Rule], Rule]:
    """Enter a rule in `METHODS`; the first paragraph of its docstring says what it does.

    `finish` makes a history of the given one and what the rule gives: of a strategy, the indices
    `(B, k)` of what it keeps, ascending. What looks at the query's attention needs that field.
    """

    def entered(rule: Rule) -> Rule:
        def apply(history: History, n_keep: int, generator: Generator | None) -> History:
            return finish(history, rule(history, n_keep, generator))

        sentence = " ".join(rule.__doc__.split("\n\n")[0].split())
        fields = ("query_attention",) if looks_at == "query attention" else needs
        METHODS[name] = Method(name, kind, sentence, source, looks_at, keeps, fields, apply)
        return rule

    return entered


def get_method(name: str) -> Method:
    """Look up a strategy or a merge; the message of the ValueError has the names that there are."""
    known = {key: method for key, method in METHODS.items() if method.kind != "control"}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ValueError(f"unknown strategy '{name}': {hint}There are: {', '.join(known)}")
    return known[name]


def whole_number(n_keep: int) -> int:
    """`n_keep` as an int; ValueError where it is no whole number, or negative."""
    try:
        value = operator.index(n_keep)
    except TypeError:
        value = -1
    if value < 0:
        raise ValueError(f"expected n_keep as a whole number of at least 0, got {n_keep!r}")
    return value


def uniform(generator: Generator | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Draw float64 numbers in (0, 1) from either kind of generator; ValueError without one."""
    if isinstance(generator, np.random.Generator):
        drawn = torch.from_numpy(generator.random(shape))
    elif isinstance(generator, torch.Generator):
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    else:
        raise ValueError(
            f"expected a torch or numpy Generator for what is drawn at random, got {generator!r}"
        )
    return drawn.clamp(1e-300, 1 - 1e-16).to(device)


def ages(history: History) -> Tensor:
    """Steps back from the decision: `(B, n)` int, 1 for the latest transition."""
    return torch.arange(history.n, 0, -1, device=history.device).expand(history.size, -1)


def latest(history: History, n_latest: int) -> Tensor:
    """Mask `(B, n)` of the latest transitions."""
    return ages(history) <= n_latest


def half(n_keep: int) -> int:
    """Half of a budget, rounded up: what the recent part of a mixed strategy gets."""
    return n_keep - n_keep // 2


def draw(history: History, log_weights: Tensor, n_keep: int, generator: Generator | None) -> Tensor:
    """Draw without replacement by the Gumbel top-k trick (Kool et al. 2019, arXiv 1903.06059)."""
    noise = uniform(generator, (history.size, history.n), history.device)
    return keep_best(n_keep, log_weights - torch.log(-torch.log(noise)))


def best_first(*keys: Tensor) -> Tensor:
    """Order transitions by keys `(B, n)`, the largest first, the most important key first.

    `(B, n)` indices; where all keys are equal, the more recent transition comes first.
    """
    size, n = keys[0].shape
    order = torch.arange(n - 1, -1, -1, device=keys[0].device).expand(size, n)
    for key in reversed(keys):
        key = key.byte() if key.dtype == torch.bool else key
        ranks = key.gather(1, order).sort(dim=1, descending=True, stable=True).indices
        order = order.gather(1, ranks)
    return order


def keep_best(n_keep: int, *keys: Tensor) -> Tensor:
    """Indices `(B, n_keep)` of the first `n_keep` of `best_first`, in the order of time."""
    return best_first(*keys)[:, :n_keep].sort(dim=1).values


def keep_where(mask: Tensor) -> Tensor:
    """Indices of a mask `(B, n)` in the order of time: `(B, most kept)`, padding in front."""
    indices = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    indices = indices.masked_fill(~mask, PADDING).sort(dim=1).values
    most = int(mask.sum(dim=1).max()) if len(mask) else 0
    return indices[:, indices.shape[1] - most :]
