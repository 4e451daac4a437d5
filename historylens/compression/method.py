"""What a way to compress is, the registry of all of them, and the pieces that they are made of.

    shorter = METHODS["rewarded-recent"].compress(history, n_keep=20)  # shorter.kept is (B, 20)

A *strategy* keeps real transitions, a *merge* makes new tokens of them, and a *control* takes the
history's information away and leaves its shape.
"""

import difflib
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from historylens.common.errors import expect
from historylens.history import LOOKS, PADDING, History

Generator = torch.Generator | np.random.Generator
# Gives indices (B, k) of what is kept, ascending, padding in front; or another history.
Rule = Callable[[History, int, Generator | None], Tensor | History]
HOW_TO_KNOW = {
    "episodes": "episode_ids(n, horizon, steps_taken)",
    "received": "what each transition receives from those after it, summed over them",
    "last_rows": "the attention rows of the last transitions",
    "query_attention": "the query's row of a forward pass over the whole history",
    "head_attention": "the same of each layer and head",
    "norm": "the same, weighed by what the heads add for each transition",
    "contribution": "the same, weighed by how much of the layers' output is due to each transition",
    "query_states": "the states in which to act",
}


@dataclass(frozen=True)
class Method:
    """A way to compress a history."""

    name: str  # key of METHODS
    kind: str  # "strategy", "merge" or "control"
    rule: str  # what it does, in one sentence
    source: str  # paper that proposed it, or what it serves for
    keeps: str  # "n_keep", exactly as many as asked; "up to n_keep", "all" or "none"
    needs: tuple[str, ...] = ()  # fields of History by which it chooses
    apply: Rule | None = None  # only asked where `0 < n_keep < n`, but for controls

    @property
    def looks_at(self) -> str:
        """What has to be known; the query's attention takes a pass over the whole history first."""
        if {*self.needs} & {"received", "last_rows"}:
            return "past attention"
        attention, other = "query attention", "history" if self.needs else "nothing"
        return attention if {*self.needs} & {*LOOKS} else other

    def compress(
        self, history: History, n_keep: int, generator: Generator | None = None
    ) -> History:
        """Compress raw histories to `n_keep` transitions (tokens, of a merge) in the order of time.

        From `n` on the history itself, but by "empty" and by controls. `kept` says which are left,
        unless that is all or they are new. ValueError: `n_keep` is no whole number of at least 0,
        or the history lacks what the method looks at: a field, or another task.
        """
        try:
            asked = operator.index(n_keep)
        except TypeError:
            asked = -1
        if asked < 0:
            raise ValueError(f"expected n_keep as a whole number of at least 0, got {n_keep!r}")
        n_keep = {"all": history.n, "none": 0}.get(self.keeps, asked)
        if self.kind != "control":
            if n_keep >= history.n:
                return history
            if n_keep == 0:
                return history.take(ages(history)[:, :0])
        for field in self.needs:
            if getattr(history, field) is None:
                lacks = f"looks at {field}, which this history lacks: it takes {HOW_TO_KNOW[field]}"
                raise ValueError(f"'{self.name}' {lacks}")
        found = self.apply(history, n_keep, generator)
        return found if isinstance(found, History) else history.take(found)


class Methods(dict[str, Method]):
    """Methods by name. "head-1-3", for any numbers, keeps what head 3 of layer 1 attends most."""

    def __missing__(self, name: str) -> Method:
        if (numbers := re.fullmatch(r"head-(\d+)-(\d+)", name)) is None:
            raise KeyError(name)
        layer, head = map(int, numbers.groups())

        def of_head(history: History, n_keep: int, generator: Generator | None) -> Tensor:
            n_layers, n_heads = history.head_attention.shape[1:3]
            expected = f"a layer in 0..{n_layers - 1} and a head in 0..{n_heads - 1}"
            expect(layer < n_layers and head < n_heads, f"expected {expected}, got '{name}'")
            rows = history.head_attention[:, layer, head]
            expect(not rows.isnan().any(), f"layer {layer} has fewer heads: got '{name}'")
            return keep_best(n_keep, rows)

        rule = f"Keep the transitions that head {head} of layer {layer} attends most."
        source, needs = "Gupta et al. 2021, arXiv 2106.06899, of one head", ("head_attention",)
        return Method(name, "strategy", rule, source, "n_keep", needs, of_head)


METHODS = Methods(  # these two need no rule: compress() answers first
    full=Method(
        "full", "strategy", "Keep the whole history, whatever is asked.", "baseline", "all"
    ),
    empty=Method("empty", "strategy", "Keep nothing, whatever is asked.", "baseline", "none"),
)


def enter(
    source: str, *needs: str, keeps: str = "n_keep", kind: str = "strategy"
) -> Callable[[Rule], Rule]:
    """Enter a rule in `METHODS`: `top_k` is "top-k", and its docstring says what it does."""

    def entered(rule: Rule) -> Rule:
        name, sentence = rule.__name__.replace("_", "-"), " ".join(rule.__doc__.split())
        METHODS[name] = Method(name, kind, sentence, source, keeps, needs, rule)
        return rule

    return entered


def get_method(name: str) -> Method:
    """Look up a strategy or a merge; the message of the ValueError has the names that there are."""
    known = {key: method for key, method in METHODS.items() if method.kind != "control"}
    try:
        return known[name] if name in METHODS else METHODS[name]
    except KeyError:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        there = f"there are: {', '.join(known)}, and head-LAYER-HEAD"
        raise ValueError(f"unknown strategy '{name}': {hint}{there}") from None


def uniform(generator: Generator | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Draw float64 numbers in (0, 1) from either kind of generator; ValueError without one."""
    if isinstance(generator, np.random.Generator):
        drawn = torch.from_numpy(generator.random(shape))
    elif isinstance(generator, torch.Generator):
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    else:
        expected = "a torch or numpy Generator for what is drawn at random"
        raise ValueError(f"expected {expected}, got {generator!r}")
    return drawn.clamp(1e-300, 1 - 1e-16).to(device)


def ages(history: History) -> Tensor:
    """Steps back from the decision: `(B, n)` int, 1 for the latest transition."""
    return torch.arange(history.n, 0, -1, device=history.device).expand(history.size, -1)


def latest_half(history: History, n_keep: int) -> Tensor:
    """Mask `(B, n)` of the latest transitions, for half of the budget, rounded up."""
    return ages(history) <= (n_keep + 1) // 2


def draw(history: History, log_weights: Tensor, n_keep: int, generator: Generator | None) -> Tensor:
    """Draw without replacement by the Gumbel top-k trick (Kool et al. 2019, arXiv 1903.06059)."""
    noise = uniform(generator, (history.size, history.n), history.device)
    return keep_best(n_keep, log_weights - torch.log(-torch.log(noise)))


def best_first(*keys: Tensor) -> Tensor:
    """Indices `(B, n)` by keys `(B, n)`, the most important first; the largest, then the latest."""
    n = keys[0].shape[1]
    order = torch.arange(n - 1, -1, -1, device=keys[0].device).expand_as(keys[0])
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
    return indices[:, (indices != PADDING).any(dim=0)]
