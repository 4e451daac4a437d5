"""What a model decides on compressed history, and what deciding costs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import torch
from torch import Tensor

from historylens.agent import Agent, act_in_parts, look
from historylens.common.batches import MAX_WEIGHTS
from historylens.compression.method import Generator, Method
from historylens.history import LOOKS, PADDING, History, HistoryBuffer

POSITIONS = {
    "reindexed": "kept transitions are numbered anew (reindexed)",
    "original": "kept transitions stay at their old positions where they fit (original)",
}


@dataclass
class Cost:
    """What deciding cost, summed over decisions, each of one environment at one step."""

    decisions: int = 0
    tokens_read: int = 0  # that the model ran, queries and looking at attention included
    tokens_looked: int = 0  # those of them that it ran only to look at attention
    seconds_selecting: float = 0.0  # choosing or merging, looking at attention included
    seconds_model: float = 0.0  # acting on what is left
    selected_anew: int = 0  # decisions that these took: what had been met was not run again
    acted_anew: int = 0
    over_budget: int = 0  # decisions with more history than `n_keep`
    kept_sum: int = 0  # transitions kept by these, and the fewest and the most that one kept
    kept_min: int | None = None
    kept_max: int | None = None
    identical_to_full: int = 0  # decisions that kept all of a window longer than `n_keep`

    @classmethod
    def sum(cls, costs: Sequence["Cost"]) -> "Cost":
        """What all of them cost together."""
        how = {"kept_min": min, "kept_max": max}
        values = {name: [vars(one)[name] for one in costs] for name in vars(costs[0])}
        known = {name: [x for x in each if x is not None] for name, each in values.items()}
        return cls(**{name: how.get(name, sum)(each) for name, each in known.items() if each})

    @property
    def tokens(self) -> float:
        """Tokens that the model ran for a decision, looking included."""
        return self.tokens_read / max(1, self.decisions)


class Memory:
    """What was made of histories before: a model that has learned repeats itself.

    Without `keeps` nothing is kept, for models that read more of a history than its `inputs`.
    """

    def __init__(self, keeps: bool) -> None:
        self._keeps, self._n_numbers = keeps, 0
        self._rows: dict[bytes, tuple[Tensor, ...]] = {}

    def recall(
        self, run: Callable[..., Sequence[Tensor]], history: History, *more: Tensor
    ) -> tuple[Sequence[Tensor], int]:
        """What `run(history, *more)` gives, tensors of `B` rows, and how many rows were run anew.

        Rows are told apart by `History.inputs`, how many of them count, and `more` `(B, ...)`.
        """
        if not self._keeps:
            return run(history, *more), history.size
        read = (*history.inputs, history.counts[:, None], *more)
        read = torch.cat([x.flatten(1).double() for x in read], dim=1).cpu().numpy()
        keys = [blake2b(row, digest_size=16).digest() for row in read]
        new = {key: number for number, key in enumerate(keys) if key not in self._rows}
        if new:
            rows = torch.tensor([*new.values()], device=history.device)
            given = run(history.rows(rows), *(x[rows] for x in more))
            self._rows |= zip(new, zip(*given, strict=True), strict=True)
            self._n_numbers += sum(values.numel() for values in given)
        values = [torch.stack(x) for x in zip(*map(self._rows.get, keys), strict=True)]
        if self._n_numbers > MAX_WEIGHTS:
            self._rows, self._n_numbers = {}, 0
        return values, len(new)


@dataclass
class CompressedPolicy:
    """Compresses the raw history before every decision; the model acts on what is left.

    What looks at attention chooses among the latest `n_max` transitions, all that the model can
    look at at once; a control changes those, and "full" keeps them. Everything else chooses among
    all transitions so far. The tokens of a merge, which have no old position, are numbered anew.
    """

    agent: Agent
    method: Method
    n_keep: int | None = None  # at most n_max, None: n_max; what keeps all or nothing does so
    generator: Generator | None = None  # of what is drawn; independent of the action noise
    positions: str = "reindexed"  # of POSITIONS: where kept transitions stand
    cost: Cost = field(default_factory=Cost)  # so far

    def __post_init__(self) -> None:
        n_keep = self.agent.n_max if self.n_keep is None else self.n_keep
        self.n_keep = {"all": self.agent.n_max, "none": 0}.get(self.method.keeps, n_keep)
        self.device = self.agent.device
        self._looks = [name for name in LOOKS if name in self.method.needs]
        self._looked, self._acted = (Memory(self.agent.reads_inputs_alone) for _ in range(2))

    def act(self, buffer: HistoryBuffer, query_states: Tensor) -> Tensor:
        """Action logits `(B, A)` in `query_states` `(B, S)`."""
        agent, n_keep, n_max, n_looked = self.agent, self.n_keep, self.agent.n_max, 0
        started = _seconds(self.device)
        only_window = self._looks or self.method.keeps == "all"
        history = buffer.history(query_states, max(0, buffer.n - n_max) if only_window else 0)
        history = replace(history, rewarded_above=agent.rewarded_above)
        selected_anew = history.size
        if self._looks and 0 < n_keep < history.n:
            values, selected_anew = self._looked.recall(self._look, history)
            history = replace(history, **dict(zip(self._looks, values, strict=True)))
            n_looked = history.size * (history.n + 1)
        shorter = self.method.compress(history, n_keep, self.generator)
        selected, places = _seconds(self.device), ()
        if self.positions == "original" and shorter.kept is not None:
            places = (original_positions(shorter.kept, history.n, n_max),)
        [logits], acted_anew = self._acted.recall(self._run, shorter, *places)
        acted, kept = _seconds(self.device), shorter.counts.tolist()
        over = kept if buffer.n > n_keep else []
        cost = Cost(
            decisions=len(kept),
            tokens_read=n_looked + sum(kept) + len(kept),
            tokens_looked=n_looked,
            seconds_selecting=selected - started,
            seconds_model=acted - selected,
            selected_anew=selected_anew,
            acted_anew=acted_anew,
            over_budget=len(over),
            kept_sum=sum(over),
            kept_min=min(over, default=None),
            kept_max=max(over, default=None),
            identical_to_full=sum(n_keep < min(buffer.n, n_max) <= n for n in over),
        )
        self.cost = Cost.sum([self.cost, cost])
        return logits

    def _look(self, history: History) -> list[Tensor]:
        seen = look(self.agent, history, self._looks)
        return [getattr(seen, name) for name in self._looks]

    def _run(self, history: History, *places: Tensor) -> list[Tensor]:
        return [act_in_parts(self.agent, history, *places)]


def original_positions(kept: Tensor, n_raw: int, n_max: int) -> Tensor:
    """Positions `(B, k + 1)` int64 of `History.kept` `(B, k)` in the full sliding window.

    A transition from before the window, and one whose place an older one took, moves to the next
    free one; any number where `kept` is padding; last the query's, `min(n_raw, n_max)`.
    """
    n_window = min(n_raw, n_max)
    n_before = (kept != PADDING).cumsum(dim=1) - 1  # kept transitions in front of each
    placed = (kept - (n_raw - n_window)).maximum(n_before)
    return torch.nn.functional.pad(placed, (0, 1), value=n_window)


def _seconds(device: torch.device | str) -> float:
    if torch.device(device).type == "cuda":  # it has yet to do what it was given
        torch.cuda.synchronize(device)
    return time.perf_counter()
