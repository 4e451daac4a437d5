"""Learning histories and the windows that a model reads of them (Laskin et al. 2022, section 3).

A window is one decision of a history, with the transitions before as context. With a stride of k
that joins every k-th episode back, so that a few episodes span much of the learning.

    dataset = ADDataset(Histories.load("RUN/histories-test.npz"), n_context=99, max_stride=16)
    dataset.sample(32, np.random.default_rng(0))["states"]                    # (32, 99, 2)
"""

import operator
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZIP_DEFLATED

import numpy as np
import torch
from torch import Tensor

from historylens.common.errors import expect
from historylens.common.files import write_atomically
from historylens.common.reading import checked_zip, reading
from historylens.history import CONTEXT, distinct

Batch, Rng = dict[str, Tensor], np.random.Generator
MAX_REWARD = 1e6  # of a transition: far larger ones overflow what a model makes of them
MAX_STEPS = 2**24  # of a history


@dataclass(frozen=True)
class Histories:
    """`N` learning histories of `S` steps each, whole episodes of `horizon` steps."""

    states: np.ndarray  # (N, S, 2) int
    actions: np.ndarray  # (N, S) int
    rewards: np.ndarray  # (N, S) int or float
    next_states: np.ndarray  # (N, S, 2) int
    goals: np.ndarray  # (N, 2 m) int, (row, column) of the m things hidden from each history
    horizon: int  # steps an episode

    def __post_init__(self) -> None:
        (n, steps), n_numbers = self.actions.shape, 4 if self.goals.shape[1:] == (4,) else 2
        flat, cells = (n, steps), (n, steps, 2)
        expected = {"actions": flat, "rewards": flat, "states": cells, "next_states": cells}
        for name, shape in (expected | {"goals": (n, n_numbers)}).items():
            array = getattr(self, name)
            beside = f"expected {name} of shape {shape} beside actions of shape {flat}"
            expect(array.shape == shape, f"{beside}, got {array.shape}")
            kinds, kind = ("biuf", "a number") if name == "rewards" else ("iu", "an integer")
            is_kind = array.dtype.kind in kinds and array.dtype.itemsize <= 8
            expect(is_kind, f"expected {name} of {kind} type, got {array.dtype}")
        low, high = self.rewards.min(initial=0), self.rewards.max(initial=0)
        what = f"expected finite rewards up to {MAX_REWARD:,.0f}, got {low} to {high}"
        expect(low >= -MAX_REWARD and high <= MAX_REWARD, what)
        what = f"expected histories of {MAX_STEPS:,} steps or fewer, got {steps:,}"
        expect(steps <= MAX_STEPS, what)
        what = f"expected whole episodes of {self.horizon} steps, got {steps} steps a history"
        expect(self.horizon >= 1 and steps % self.horizon == 0, what)

    @property
    def n_steps(self) -> int:
        """Steps of each history `S`."""
        return self.actions.shape[1]

    def episode_returns(self) -> np.ndarray:
        """Sum of rewards of each episode: `(N, S / horizon)`."""
        return self.rewards.reshape(len(self.goals), -1, self.horizon).sum(axis=2)

    def save(self, path: str | Path) -> None:
        """Write an `.npz` file, whole or not at all."""
        write_atomically(path, lambda file: np.savez_compressed(file, **vars(self)))

    @classmethod
    def load(cls, path: str | Path) -> "Histories":
        """Read what `save` wrote; UserError: no such file, not such an `.npz`, or damaged."""
        names = list(cls.__dataclass_fields__)
        kind = "learning histories", f"Expected an .npz file with {', '.join(names)}"
        with reading(path, *kind) as file:
            checked_zip(file, ZIP_DEFLATED)
            with np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in names}
            native = {k: v.astype(v.dtype.newbyteorder("="), copy=False) for k, v in arrays.items()}
            return cls(**native | {"horizon": operator.index(native["horizon"][()])})


def context_steps(step: int, n: int, stride: int, horizon: int) -> np.ndarray:
    """`joined_steps` `(n,)` of every `stride`-th episode back; negative before the first."""
    earlier = step // horizon - stride * (1 + np.arange(-(-n // horizon)))
    return joined_steps(np.array([step]), n, earlier[None], horizon)[0]


def joined_steps(steps: np.ndarray, n: int, earlier: np.ndarray, horizon: int) -> np.ndarray:
    """The `n` steps before decisions at `steps` `(B,)`, in the order of time: `(B, n)` int.

    They are of the decision's own episode, then of the episodes `earlier` `(B, m)`, latest first.
    """
    within = steps[:, None] % horizon
    back = np.arange(n, 0, -1)  # 1 = the transition right before the decision
    older = np.maximum(back - within - 1, 0)  # counted back from the end of the episode before
    episode = np.take_along_axis(earlier, older // horizon, axis=1) if n else older
    before = (episode + 1) * horizon - 1 - older % horizon
    return np.where(back <= within, steps[:, None] - back, before)


def max_stride_of(steps: np.ndarray, n: int, horizon: int) -> np.ndarray:
    """Largest stride, 0 for none, at which decisions at `steps` `(B,)` have `n` steps before."""
    episodes_needed = -(-np.maximum(n - steps % horizon, 0) // horizon)
    reach = steps // horizon // np.maximum(episodes_needed, 1)
    return np.where(episodes_needed > 0, reach, np.iinfo(np.int64).max)


class ADDataset:
    """Windows of learning histories.

    A batch of `B` windows is a dict of tensors: `states (B, n, 2), actions (B, n), rewards (B, n),
    next_states (B, n, 2)`, and for the decisions after the `q` longest prefixes `query_states
    (B, q, 2), target_actions (B, q)`, int64; rewards that are no whole numbers float32. UserError:
    the histories are too short for a single window of `n_context` transitions.
    """

    def __init__(
        self, histories: Histories, n_context: int, max_stride: int = 1, random: float = 0.5
    ) -> None:
        self.histories, self.n_context = histories, n_context
        self.max_stride, self.random = max_stride, random
        what = f"histories too short for the context: expected more than {n_context} steps"
        why = f"so that a decision has {n_context} transitions before it, got {histories.n_steps}"
        expect(histories.n_steps > n_context, f"{what}, {why}")
        arrays = {name: np.ascontiguousarray(vars(histories)[name]) for name in CONTEXT}
        self.tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def sample(self, batch_size: int, rng: Rng) -> Batch:
        """Draw a training batch of `B` windows of `n_context` transitions; `q` is one more."""
        return self.gather(*self.draw(batch_size, self.n_context, rng))

    def draw(self, batch_size: int, n: int, rng: Rng) -> tuple[np.ndarray, ...]:
        """Draw histories `(B,)`, steps of decisions `(B,)`, and those of their contexts `(B, n)`.

        A part `random` of the windows joins episodes drawn at random, more of them from early
        learning: a context without reward of a learner that knows its goal teaches the model to
        head for places where a goal may be. The others join every k-th episode, k uniform in
        `1 .. max_stride`, as far as the history reaches back. Half of each kind begin with an
        episode, as a context that is still growing does, and half anywhere, as a full one does.
        """
        horizon, n_back = self.histories.horizon, -(-n // self.histories.horizon)
        n_episodes = self.histories.n_steps // horizon
        shortest = max(0, n - (n_episodes - 1) * horizon)  # in short histories
        within = rng.integers(shortest, horizon, size=batch_size)
        within = np.where(rng.random(batch_size) < 0.5, n % horizon, within)
        last = (n_episodes - 1) * horizon + within
        reach = np.maximum(max_stride_of(last, n, horizon), 1)
        stride = rng.integers(1, np.minimum(reach, self.max_stride), endpoint=True)
        needed = -(-np.maximum(n - within, 0) // horizon) * stride
        episode = rng.integers(np.minimum(needed, n_episodes - 1), n_episodes)
        earlier = episode[:, None] - stride[:, None] * (1 + np.arange(n_back))
        if n_episodes > n_back:
            spread = (n_episodes ** rng.random((batch_size, n_back + 1))).astype(int) - 1
            spread = distinct(np.sort(spread, axis=1), n_episodes)
            use = rng.random(batch_size) < self.random
            episode = np.where(use, spread[:, -1], episode)
            earlier = np.where(use[:, None], spread[:, -2::-1], earlier)
        rows = rng.integers(len(self.histories.goals), size=batch_size)
        steps = episode * horizon + within
        return rows, steps, joined_steps(steps, n, earlier, horizon)

    def gather(self, rows: np.ndarray, steps: np.ndarray, context: np.ndarray) -> Batch:
        """Decisions at `steps` `(B,)` of histories `rows` `(B,)`, after `context` `(B, n)`."""
        rows, decisions = rows[:, None], np.column_stack([context, steps])
        window = {k: v[rows, context] for k, v in self.tensors.items()}
        window["query_states"] = self.tensors["states"][rows, decisions]
        window["target_actions"] = self.tensors["actions"][rows, decisions]
        return {k: v.float() if v.is_floating_point() else v.long() for k, v in window.items()}
