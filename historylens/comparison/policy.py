"""What a model decides on compressed history, and what deciding costs.

policy = CompressedPolicy(agent, METHODS["rewarded-recent"], n_keep=20)
rewards = rollout(agent.environment.make(tasks), policy, n_steps=800, noises=noises)
policy.cost.tokens, policy.cost.kept_mean
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from historylens.agent import LOOKS, Agent, act_in_parts, look
from historylens.common.errors import UserError
from historylens.compression.method import Generator, Method
from historylens.history import PADDING, HistoryBuffer

Positions = Literal["reindexed", "original"]


@dataclass
class Cost:
    """What deciding cost, summed over decisions. A decision is that of one environment at one step.

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
    def tokens(self) -> float:
        """Tokens that the model ran for a decision, looking included."""
        return self.tokens_read / max(1, self.decisions)

    def count(self, kept: list[int], n_keep: int, n_raw: int, n_max: int) -> None:
        """Count decisions of one step.

        Args:
            kept: transitions that each decision was made on.
            n_keep: the budget.
            n_raw: transitions before the decisions.
            n_max: transitions that a full sliding window holds.
        """
        self.decisions += len(kept)
        self.tokens_read += sum(kept) + len(kept)
        if n_raw <= n_keep:
            return
        self.over_budget += len(kept)
        self.kept_sum += sum(kept)
        self.kept_min = min(kept if self.kept_min is None else [self.kept_min, *kept])
        self.kept_max = max(kept if self.kept_max is None else [self.kept_max, *kept])
        n_full = min(n_raw, n_max)
        self.identical_to_full += sum(n_keep < n_full <= n for n in kept)


class CompressedPolicy:
    """Compresses the raw history before every decision; the model acts on what is left.

    What looks at attention chooses among the latest `n_max` transitions, all that the model can
    look at at once; a control changes those, and "full" keeps them. Everything else chooses among
    all transitions so far. The tokens of a merge stand at no old position: they are numbered anew
    also where positions are the original ones.

    Args:
        agent: what decides.
        method: what chooses, merges or changes.
        n_keep: transitions to keep, `0 .. n_max` of the agent; None: `n_max`. What keeps all or
            nothing does so, whatever is asked.
        generator: for what is drawn; independent of the action noise.
        positions: where a kept transition stands: "reindexed", right behind the one kept before
            it, or "original", where the full history has it.

    Attributes:
        cost: what it has cost so far.

    Raises:
        UserError: `n_keep` is no whole number in `0 .. n_max`.
    """

    def __init__(
        self,
        agent: Agent,
        method: Method,
        n_keep: int | None = None,
        generator: Generator | None = None,
        positions: Positions = "reindexed",
    ) -> None:
        n_max = agent.n_max
        n_keep = n_max if n_keep is None else n_keep
        if n_keep not in range(n_max + 1):
            raise UserError(
                f"expected n_keep as a whole number in 0..{n_max}, the transitions that the model "
                f"can read before a decision, got {n_keep!r}"
            )
        self.agent, self.method, self.generator = agent, method, generator
        self.device, self.positions, self.cost = agent.device, positions, Cost()
        self.n_keep = {"all": n_max, "none": 0}.get(method.keeps, int(n_keep))
        self._looks = bool({*LOOKS} & {*method.needs})

    def act(self, buffer: HistoryBuffer, query_states: Tensor) -> Tensor:
        """Action logits `(B, A)` in `query_states` `(B, S)`."""
        agent, cost, n_max = self.agent, self.cost, self.agent.n_max
        started = _seconds(self.device)
        only_window = self._looks or self.method.keeps == "all"
        history = buffer.history(query_states, max(0, buffer.n - n_max) if only_window else 0)
        if self._looks and 0 < self.n_keep < history.n:
            history = look(agent, history, self.method.needs)
            cost.tokens_looked += history.size * (history.n + 1)
            cost.tokens_read += history.size * (history.n + 1)
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

    Args:
        kept: `(B, k)` numbers of raw transitions as in `History.kept`.
        n_raw: transitions that they were chosen from.
        n_max: transitions in a full window.

    Returns:
        `(B, k + 1)` int64, ascending; last the query's, `min(n_raw, n_max)`. Any number where
        `kept` is padding.
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
