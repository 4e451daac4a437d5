"""What a model decides on compressed history, and what deciding costs.

policy = CompressedPolicy(agent, METHODS["rewarded-recent"], n_keep=20)
rewards = rollout(agent.environment.make(tasks, seeds), policy, n_steps=800, noises=noises)
policy.cost.tokens, policy.cost.kept_sum / policy.cost.over_budget
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from historylens.agent import Agent, act_in_parts, look
from historylens.common.errors import expect
from historylens.compression.method import Generator, Method
from historylens.history import LOOKS, PADDING, HistoryBuffer

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
    over_budget: int = 0  # decisions with more history than `n_keep`
    kept_sum: int = 0  # transitions kept by these, and the fewest and the most that one kept
    kept_min: int | None = None
    kept_max: int | None = None
    identical_to_full: int = 0  # decisions that kept all of a window longer than `n_keep`

    @classmethod
    def sum(cls, costs: Sequence["Cost"]) -> "Cost":
        """What all of them cost together."""
        how = {"kept_min": partial(min, default=None), "kept_max": partial(max, default=None)}
        values = {name: [vars(one)[name] for one in costs] for name in vars(costs[0])}
        known = {name: [x for x in each if x is not None] for name, each in values.items()}
        return cls(**{name: how.get(name, sum)(each) for name, each in known.items()})

    @property
    def tokens(self) -> float:
        """Tokens that the model ran for a decision, looking included."""
        return self.tokens_read / max(1, self.decisions)

    def count(self, kept: list[int], n_keep: int, n_raw: int, n_max: int) -> None:
        """Count decisions of one step: transitions kept of `n_raw`, a full window has `n_max`."""
        self.decisions += len(kept)
        self.tokens_read += sum(kept) + len(kept)
        if n_raw <= n_keep:
            return
        self.over_budget += len(kept)
        self.kept_sum += sum(kept)
        known = [] if self.kept_min is None else [self.kept_min, self.kept_max]
        self.kept_min, self.kept_max = min(known + kept), max(known + kept)
        n_full = min(n_raw, n_max)
        self.identical_to_full += sum(n_keep < n_full <= n for n in kept)


@dataclass
class CompressedPolicy:
    """Compresses the raw history before every decision; the model acts on what is left.

    What looks at attention chooses among the latest `n_max` transitions, all that the model can
    look at at once; a control changes those, and "full" keeps them. Everything else chooses among
    all transitions so far. The tokens of a merge, which have no old position, are numbered anew.

    UserError: `n_keep` is no whole number in `0 .. n_max` of the agent.
    """

    agent: Agent
    method: Method
    n_keep: int | None = None  # None: n_max; what keeps all or nothing does so whatever is asked
    generator: Generator | None = None  # of what is drawn; independent of the action noise
    positions: str = "reindexed"  # of POSITIONS: where kept transitions stand
    cost: Cost = field(default_factory=Cost)  # so far

    def __post_init__(self) -> None:
        n_max, n_keep = self.agent.n_max, self.n_keep
        n_keep = n_max if n_keep is None else n_keep
        where = f"0..{n_max}, the transitions that the model can read before a decision"
        is_readable = n_keep in range(n_max + 1)
        expect(is_readable, f"expected n_keep as a whole number in {where}, got {n_keep!r}")
        self.n_keep = {"all": n_max, "none": 0}.get(self.method.keeps, int(n_keep))
        self.device = self.agent.device
        self._looks = bool({*LOOKS} & {*self.method.needs})

    def act(self, buffer: HistoryBuffer, query_states: Tensor) -> Tensor:
        """Action logits `(B, A)` in `query_states` `(B, S)`."""
        agent, cost, n_max = self.agent, self.cost, self.agent.n_max
        started = _seconds(self.device)
        only_window = self._looks or self.method.keeps == "all"
        history = buffer.history(query_states, max(0, buffer.n - n_max) if only_window else 0)
        history = replace(history, rewarded_above=agent.rewarded_above)
        if self._looks and 0 < self.n_keep < history.n:
            history = look(agent, history, self.method.needs)
            n_tokens = history.size * (history.n + 1)
            cost.tokens_looked += n_tokens
            cost.tokens_read += n_tokens
        shorter = self.method.compress(history, self.n_keep, self.generator)
        selected = _seconds(self.device)
        positions = None
        if self.positions == "original" and shorter.kept is not None:
            positions = original_positions(shorter.kept, history.n, n_max)
        logits = act_in_parts(agent, shorter, positions)
        cost.seconds_selecting += selected - started
        cost.seconds_model += _seconds(self.device) - selected
        cost.count(shorter.counts.tolist(), self.n_keep, buffer.n, n_max)
        return logits


def original_positions(kept: Tensor, n_raw: int, n_max: int) -> Tensor:
    """Positions that kept transitions have in the full sliding window, where they fit.

    Position j of the window is that of raw transition `n_raw - n_max + j`, if the window is full.
    A transition from before the window, and one whose place an older one took, moves to the next
    free position, so that the order stays.

    `kept` `(B, k)` are numbers of raw transitions as in `History.kept`. Gives `(B, k + 1)` int64,
    ascending, any number where `kept` is padding; last the query's, `min(n_raw, n_max)`.
    """
    n_window = min(n_raw, n_max)
    n_before = (kept != PADDING).cumsum(dim=1) - 1  # kept transitions in front of each
    placed = (kept - (n_raw - n_window)).maximum(n_before)
    return torch.nn.functional.pad(placed, (0, 1), value=n_window)


def _seconds(device: torch.device | str) -> float:
    """The time now, once the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
