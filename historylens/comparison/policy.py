"""How a model reads history before every decision: all that fits, or a compressed history.

reader = CompressedReader(view(model), get_strategy("rewarded-recent"), n_keep=20)
rewards = act(DarkRoom(goals), reader, n_steps=800, noises=noises)          # rollout.py
reader.cost.tokens_per_decision, reader.cost.kept_mean
"""

import operator
import time
from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from acting.decoding import CachedContext, fast_logits
from acting.lived import Lived
from acting.views import LOOKS, ModelView, Positions, view
from compression import Control, Generator, History, Merge, Strategy, by_count, kept_counts
from config import UserError
from model import ADTransformer

__all__ = [
    "CompressedReader",
    "Cost",
    "Lived",
    "ModelView",
    "Positions",
    "Reader",
    "Sliding",
    "SlidingReader",
    "original_positions",
    "view",
]

Sliding = Literal["step", "episode"]


@dataclass
class Cost:
    """What deciding cost, summed over decisions. A decision is that of one room at one step.

    Attributes:
        decisions: decisions made.
        tokens_read: tokens that the model ran, queries and looking at attention included.
        tokens_looked: those of them that it ran only to look at attention.
        seconds_selecting: choosing or merging, looking at attention included.
        seconds_model: acting on what is left.
        over_budget: decisions with more history than `n_keep`.
        kept_sum, kept_min, kept_max: transitions kept by the decisions over budget.
        identical_to_full: decisions that kept all of a full sliding window longer than `n_keep`.
    """

    decisions: int = 0
    tokens_read: int = 0
    tokens_looked: int = 0
    seconds_selecting: float = 0.0
    seconds_model: float = 0.0
    over_budget: int = 0
    kept_sum: int = 0
    kept_min: int | None = None
    kept_max: int | None = None
    identical_to_full: int = 0

    @property
    def kept_mean(self) -> float | None:
        """Transitions kept on average by the decisions over budget; None without any."""
        return self.kept_sum / self.over_budget if self.over_budget else None

    @property
    def tokens_per_decision(self) -> float:
        """Tokens that the model ran for a decision, looking included."""
        return self.tokens_read / max(1, self.decisions)

    def record_kept(self, kept: list[int], n_keep: int, n_raw: int, n_full: int) -> None:
        """Count the transitions kept by each decision.

        Args:
            kept: one number a decision.
            n_keep: the budget.
            n_raw: transitions before the decisions.
            n_full: those of them in the full sliding window.
        """
        if n_raw <= n_keep or not kept:
            return
        self += Cost(
            over_budget=len(kept),
            kept_sum=sum(kept),
            kept_min=min(kept),
            kept_max=max(kept),
            identical_to_full=sum(n >= n_full for n in kept) if n_keep < n_full else 0,
        )

    def __iadd__(self, other: "Cost") -> "Cost":
        for field in fields(self):
            mine, its = getattr(self, field.name), getattr(other, field.name)
            if field.name in ("kept_min", "kept_max"):
                known = [value for value in (mine, its) if value is not None]
                extreme = min if field.name == "kept_min" else max
                setattr(self, field.name, extreme(known, default=None))
            else:
                setattr(self, field.name, mine + its)
        return self

    def __add__(self, other: "Cost") -> "Cost":
        total = replace(self)
        total += other
        return total


class Reader(Protocol):
    """Reads what rooms have lived through and gives the logits of their next actions.

    Attributes:
        cost: what it has cost so far.
        device: where it wants the history to lie.
    """

    cost: Cost
    device: torch.device | str

    def act(self, lived: Lived, query_states: Tensor) -> Tensor:
        """Action logits `(B, A)` in `query_states` `(B, S)`."""
        ...


class SlidingReader:
    """Reads the latest transitions, as many as fit; keys and values are kept while they hold.

    One reader follows one `Lived` from its beginning.

    Args:
        model: the model; it acts without dropout.
        n_rooms: rooms `B`.
        sliding: what drops out of a full context: "step", the oldest transition at each step;
            "episode", the oldest whole episodes as an episode begins.
        horizon: steps an episode, for "episode".

    Raises:
        ValueError: `sliding` is "episode" and the context does not hold two episodes.
    """

    def __init__(
        self, model: ADTransformer, n_rooms: int, sliding: Sliding = "step", horizon: int = 20
    ) -> None:
        if sliding == "episode" and model.n_context_max < 2 * horizon:
            raise ValueError(
                f"expected a context of two episodes ({2 * horizon} transitions) to drop one, "
                f"got {model.n_context_max}"
            )
        self.cost = Cost()
        self.device = model.pred_action.weight.device
        self._model, self._context = model, CachedContext(model, n_rooms)
        self._n_max, self._sliding, self._horizon = model.n_context_max, sliding, horizon
        self._first = 0  # oldest step in context

    def act(self, lived: Lived, query_states: Tensor) -> Tensor:
        """Action logits `(B, A)`."""
        started = _seconds(self.device)
        context = self._context
        if dropped := self._n_dropped(lived.n):
            self._first += dropped
            context.clear()
        new = lived.history(query_states, first=self._first + context.n_context)
        if self._sliding == "step" and new.n == self._n_max:  # nothing kept would hold a step on
            logits = fast_logits(self._model, new)
        else:
            logits = context.act(query_states, *new.inputs[:4])
        cost = self.cost
        cost.decisions += new.size
        cost.tokens_read += new.size * (new.n + 1)
        cost.seconds_model += _seconds(self.device) - started
        n_read = min(lived.n - self._first, self._n_max)
        cost.record_kept([n_read] * new.size, self._n_max, lived.n, self._n_max)
        return logits

    def _n_dropped(self, t: int) -> int:
        """How many transitions drop out of the context before step `t`."""
        n = t - self._first
        if self._sliding == "step":
            return max(0, n - self._n_max)
        if t % self._horizon:
            return 0
        # As an episode begins, n is whole episodes; its last step needs horizon - 1 of its own.
        too_many = max(0, n + self._horizon - 1 - self._n_max)
        return -(-too_many // self._horizon) * self._horizon


class CompressedReader:
    """Compresses the raw history before every decision; the model acts on what is left.

    Strategies that look at attention choose among the latest `n_max` transitions, all that the
    model can look at at once; the others and merges among everything lived through. A control
    changes the full sliding window. Tokens of a merge stand at no old position: they are
    re-indexed also where the view's positions are the original ones.

    Args:
        view: the model.
        strategy: what chooses, merges or changes.
        n_keep: transitions to keep, `0 .. view.n_max`; None: `view.n_max`. Controls and the
            strategies "full" and "empty" keep what they keep, whatever is asked.
        generator: for what is drawn; independent of the action noise.

    Raises:
        UserError: `n_keep` is no whole number in `0 .. n_max`, or the strategy looks at attention
            and the model cannot be looked into.
    """

    def __init__(
        self,
        view: ModelView,
        strategy: Strategy | Merge | Control,
        n_keep: int | None = None,
        generator: Generator | None = None,
    ) -> None:
        self.view, self.strategy, self.generator = view, strategy, generator
        self.cost = Cost()
        self.device = view.device
        self.n_keep = _budget(strategy, view.n_max if n_keep is None else n_keep, view.n_max)
        self._looks = [name for name in getattr(strategy, "needs", ()) if name in LOOKS]
        if self._looks and view.look is None:
            raise UserError(
                f"'{strategy.name}' looks at {', '.join(self._looks)}, and this model cannot be "
                "looked into: expected a strategy that does not look at attention"
            )

    @torch.inference_mode()
    def act(self, lived: Lived, query_states: Tensor) -> Tensor:
        """Action logits `(B, A)`."""
        started = _seconds(self.device)
        parts = self._compress(lived, query_states)
        selected = _seconds(self.device)
        logits = torch.cat([self._logits(part, lived.n) for part in parts])
        if len(parts) > 1:
            logits = logits[torch.cat([part.rows for part in parts]).argsort()]
        cost, size = self.cost, len(query_states)
        kept = [part.history.n for part in parts for _ in range(part.history.size)]
        cost.decisions += size
        cost.tokens_read += sum(kept) + size
        cost.seconds_selecting += selected - started
        cost.seconds_model += _seconds(self.device) - selected
        cost.record_kept(kept, self.n_keep, lived.n, min(lived.n, self.view.n_max))
        return logits

    def _compress(self, lived: Lived, query_states: Tensor) -> list["_Part"]:
        """What the model reads, in parts of equal length."""
        strategy, first = self.strategy, max(0, lived.n - self.view.n_max)
        if isinstance(strategy, Control):
            window = lived.history(query_states, first)
            return [_Part(strategy.apply(window, self.generator))]
        if isinstance(strategy, Merge):
            raw = lived.history(query_states)
            return [_Part(strategy.merge(raw, self.n_keep, self.generator))]
        if not self._looks and strategy.keeps != "all":
            first = 0
        history = lived.history(query_states, first)
        if self._looks and 0 < self.n_keep < history.n:
            history = replace(history, **self.view.look(history, self._looks))
            n_looked = history.size * (history.n + 1)
            self.cost.tokens_looked += n_looked
            self.cost.tokens_read += n_looked
        if self.n_keep == 0:
            nothing = torch.empty(history.size, 0, dtype=torch.int64, device=self.device)
            return [_Part(history.take(nothing), nothing)]
        indices = strategy.select(history, self.n_keep, self.generator)
        counts = kept_counts(indices)
        if (counts == indices.shape[1]).all():
            return [_Part(history.take(indices), first + indices)]
        return [
            _Part(part, first + indices[rows, indices.shape[1] - part.n :], rows)
            for rows, part in by_count(history, indices)
        ]

    def _logits(self, part: "_Part", n_raw: int) -> Tensor:
        if self.view.positions == "reindexed":
            return self.view.logits(part.history)
        indices = part.indices
        if indices is None:  # new tokens, or the whole window: one position behind the other
            n_raw = part.history.n
            indices = torch.arange(n_raw, device=self.device).expand(part.history.size, -1)
        return self.view.logits(part.history, original_positions(indices, n_raw, self.view.n_max))


@dataclass(frozen=True)
class _Part:
    """Decisions that read equally many tokens.

    Attributes:
        history: what they read, `(R, k)`.
        indices: `(R, k)` which of the raw transitions that is, None where it is none of them.
        rows: `(R,)` which decisions of the batch they are, None for all.
    """

    history: History
    indices: Tensor | None = None
    rows: Tensor | None = None


def original_positions(indices: Tensor, n_raw: int, n_max: int) -> Tensor:
    """Positions that kept transitions have in the full sliding window, where they fit.

    Position j of the window is that of raw transition `n_raw - n_max + j`, if the window is full.
    A transition from before the window, and one whose place an older one took, moves to the next
    free position, so that the order stays.

    Args:
        indices: `(B, k)` of raw transitions, ascending.
        n_raw: raw transitions before the decision.
        n_max: transitions in a full window.

    Returns:
        `(B, k + 1)` int64, ascending; last the query's, `min(n_raw, n_max)`.
    """
    n_window = min(n_raw, n_max)
    size, k = indices.shape
    shifted = indices - (n_raw - n_window)
    kept = shifted.maximum(torch.arange(k, device=indices.device))
    return torch.cat([kept, kept.new_full((size, 1), n_window)], dim=1)


def _budget(strategy: Strategy | Merge | Control, n_keep: int, n_max: int) -> int:
    """The transitions that a strategy may keep, `0 .. n_max`."""
    try:
        fits = 0 <= operator.index(n_keep) <= n_max
    except TypeError:
        fits = False
    if not fits:
        raise UserError(
            f"expected n_keep as a whole number in 0..{n_max}, the transitions that the model can "
            f"read before a decision, got {n_keep!r}"
        )
    if isinstance(strategy, Control) or getattr(strategy, "keeps", None) == "all":
        return n_max
    return 0 if getattr(strategy, "keeps", None) == "none" else int(n_keep)


def _seconds(device: torch.device | str) -> float:
    """The time now, once the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
