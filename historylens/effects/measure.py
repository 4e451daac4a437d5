"""What dropping history does to the action: strategies at a few sizes, beside random drops.

Attention suggests what can go; only the model, run on what is left, shows it. Some decisions of a
subject are made again on compressed history, and the action distribution is compared with the one
on the full context: how often the most likely action changes (flips), and KL(full || compressed).
Controls come first: a model that another task's history leaves unmoved cannot be judged this way.

    effects = measure_effects(subject, patterns=["recency"], n_samples=10, seed=0)
    effects.ignores_history
    effects.curves["recent"][0].kl_mean, effects.random_of("recent", 0).band("kl")

Axes: `B` decisions, `n` transitions before each, `D` draws of what is random (else 1), `A` actions.
"""

import zlib
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from attention.advice import PATTERNS
from compression import (
    CONTROLS,
    MERGES,
    STRATEGIES,
    Strategy,
    compressed_logits,
    get_strategy,
    kept_counts,
)
from compression.history import keep_where, uniform
from config import UserError
from effects.outcomes import UNMOVED, Outcome, compare
from subject import Subject

# For each pattern, in the order of its strategies and then its example: what is measured for it.
ADVISED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "recency": (("recent",), ("recent", "recent-summary"), ("decay",), ("recent-summary",)),
    "uniform": (("diverse",), ("centroids", "k-medoids"), ("random",), ("even",)),
    "focused": (("top-k",), ("prune-low",), ("importance",), ("top-30",)),
    "sparse": (("threshold",), ("top-k",), ("landmark",), ("top-k",)),
}
WORST = "least-attended"
STANDARD = ("recent", "even", "top-k", "rewarded-recent", WORST)
N_DRAWS = 20  # of random transitions
DRAWN = {"random": N_DRAWS, "decay": 5, "importance": 5}  # draws of what is drawn at random
LADDER = (1, 2, 5)  # sizes, times powers of ten
LARGEST = 0.6  # of the context: beyond, little is saved
SHARE = 0.3  # of the context: the size that the focused pattern advises
UNMOVED_EMPTY = 0.5  # nats, without history; untrained models reach 0.1 to 0.4
MAX_TOKENS = 2**14  # in a pass of the model


@dataclass(frozen=True)
class Effects:
    """Everything that was measured on some decisions.

    Attributes:
        samples: numbers of the decisions, `B` of them.
        n: transitions before each; decisions with another number were left out.
        seed: of everything drawn.
        advised: pattern -> the strategies measured for it.
        controls: name -> what it did: of "empty" and `CONTROLS` those that could be run.
        not_run: control or strategy -> why it could not be run.
        ignores_history: the history can be exchanged and the actions stay: nothing else is
            measured then.
        curves: strategy -> outcomes at `budgets(n)`; "random" is always among them.
        own_size: strategy that keeps as many as it needs -> its outcome, and that of random draws
            of as many transitions from every decision.
    """

    samples: tuple[int, ...]
    n: int
    seed: int
    advised: Mapping[str, tuple[str, ...]]
    controls: Mapping[str, Outcome]
    not_run: Mapping[str, str]
    ignores_history: bool
    curves: Mapping[str, tuple[Outcome, ...]] = field(default_factory=dict)
    own_size: Mapping[str, tuple[Outcome, Outcome]] = field(default_factory=dict)

    def at(self, name: str, n_keep: int) -> tuple[Outcome, Outcome] | None:
        """A strategy's outcome and that of random draws of its size; None where not measured."""
        if name in self.own_size:
            return self.own_size[name]
        pairs = zip(self.curves.get(name, ()), self.curves.get("random", ()), strict=False)
        return next((pair for pair in pairs if pair[0].n_keep == n_keep), None)


def advised_by(pattern: str) -> tuple[str, ...]:
    """The strategies that a pattern advises, each once; random is measured in any case."""
    names = dict.fromkeys(name for group in ADVISED[pattern] for name in group)
    return tuple(name for name in names if name != "random")


def budgets(n: int) -> tuple[int, ...]:
    """Sizes at which strategies are measured on `n` transitions: 1, 2, 5, 10, ... and 30 %."""
    tens = (10**power for power in range(len(str(n))))
    ladder = (step * ten for ten in tens for step in LADDER)
    sizes = {size for size in ladder if size <= max(1, LARGEST * n)} | {share_of(n)}
    return tuple(sorted(size for size in sizes if size < n))


def share_of(n: int) -> int:
    """30 % of `n`, rounded up, as "top-30" does."""
    return -(-n * round(100 * SHARE) // 100)


def alike_in_shape(subject: Subject) -> list[int]:
    """The decisions that can share a pass: those of the shape that most have, the first of them."""
    groups: dict[Hashable, list[int]] = {}
    for index in range(subject.n_samples):
        groups.setdefault(subject.shape(index), []).append(index)
    return max(groups.values(), key=len)


def spread(n_samples: int, n_wanted: int) -> list[int]:
    """`n_wanted` of the numbers `0 .. n_samples - 1`, evenly spaced; all where they are fewer."""
    n_wanted = min(n_samples, n_wanted)
    return [(2 * i + 1) * n_samples // (2 * n_wanted) for i in range(n_wanted)]


def n_steps(n: int, patterns: Collection[str]) -> int:
    """How often `measure_effects` reports progress, at most."""
    names = {name for pattern in patterns for name in advised_by(pattern)}
    return 1 + len(budgets(n)) + sum(map(_has_own_size, names))


@torch.inference_mode()
def measure_effects(
    subject: Subject,
    patterns: Collection[str],
    n_samples: int,
    seed: int,
    step: Callable[[], object] = lambda: None,
) -> Effects:
    """Make some decisions again on compressed history.

    Args:
        subject: a model and its decisions.
        patterns: keys of `PATTERNS`, whose advice is measured.
        n_samples: decisions, chosen evenly among those of the length that most have.
        seed: of everything drawn.
        step: called after each part of the work, for a progress bar.
    """
    candidates = alike_in_shape(subject)
    indices = [candidates[i] for i in spread(len(candidates), n_samples)]
    trial = Trial(subject, indices, seed)
    controls, not_run = run_controls(trial)
    advised = {pattern: advised_by(pattern) for pattern in PATTERNS if pattern in patterns}
    ignores = ignores_history(controls)
    step()
    found = Effects(tuple(indices), trial.n, seed, advised, controls, not_run, ignores)
    if ignores:
        return found
    wanted = dict.fromkeys([*STANDARD, *(name for names in advised.values() for name in names)])
    missing = {name: "the model cannot be looked into" for name in wanted if trial.lacks(name)}
    names = [name for name in wanted if name not in missing]
    on_curves = ["random", *(name for name in names if not _has_own_size(name))]
    rows = []
    for n_keep in budgets(trial.n):
        rows.append(trial.at_size(on_curves, n_keep))
        step()
    curves = {name: tuple(row[name] for row in rows) for name in on_curves}
    own_size = {}
    for name in names if trial.n > 1 else ():
        if _has_own_size(name):
            try:
                own_size[name] = trial.at_own_size(name)
            except UserError as error:  # it may keep nothing of some history
                missing[name] = str(error)
            step()
    return Effects(
        *(found.samples, found.n, seed, advised, controls, not_run | missing, ignores),
        curves=curves,
        own_size=own_size,
    )


def run_controls(trial: "Trial") -> tuple[dict[str, Outcome], dict[str, str]]:
    """What another history does to the actions; and why a control could not be run."""
    history, n = trial.history, trial.n
    controls, not_run = {}, {}
    try:
        controls["empty"] = trial.at_size(["empty"], 0)["empty"]
    except UserError as error:  # not every model can act without history
        not_run["empty"] = str(error)
    for name, control in CONTROLS.items():
        rows = torch.arange(history.size, device=history.device)
        if name == "shuffled-rewards":  # says nothing where all rewards are equal
            rows = rows[(history.rewards != history.rewards[:, :1]).any(dim=1)]
            reason = "no decision has different rewards before it"
        else:
            tasks = rows if history.tasks is None else history.tasks
            rows = rows if n and (tasks != tasks[0]).any() else rows[:0]
            reason = "all decisions are of one task"
        if not len(rows):
            not_run[name] = reason
            continue
        changed = control.apply(history.rows(rows), trial.generator(name))
        logits = trial.subject.view.logits(changed)
        controls[name] = compare(trial.full[rows], logits[None], n, [n] * len(rows))
    return controls, not_run


def ignores_history(controls: Mapping[str, Outcome]) -> bool:
    """Whether the history can be exchanged or left out and the actions stay as they are.

    The divergence decides, not the flips: an untrained model hardly prefers any action, and flips
    at a breath. Without history it moves further than with another one, for want of tokens; where
    no other task's history is at hand, the empty one has to stay as close.
    """
    limits = dict.fromkeys(CONTROLS, UNMOVED)
    limits["empty"] = UNMOVED_EMPTY if "other-task" in controls else UNMOVED
    moved = [outcome.kl_mean > limits[name] for name, outcome in controls.items()]
    return bool(moved) and not any(moved)


class Trial:
    """Decisions that are made again on compressed history.

    Args:
        subject: a model and its decisions.
        indices: the decisions.
        seed: of everything drawn. Each strategy and size draws from a stream of its own, so that
            what else is measured changes nothing.
    """

    def __init__(self, subject: Subject, indices: Sequence[int], seed: int) -> None:
        self.subject, self.seed = subject, seed
        history, view = subject.history(indices), subject.view
        if history.tasks is not None:
            history = replace(history, tasks=history.tasks.to(history.device))
        if history.n > view.n_max:  # the full context is what the model can read
            latest = torch.arange(history.n - view.n_max, history.n, device=history.device)
            history = history.take(latest.expand(history.size, -1))
        self.n = history.n
        self.full = view.logits(history)  # (B, A)
        if view.look is not None and self.n:
            history = replace(history, **view.look(history, ["query_attention"]))
        self.history = history

    def generator(self, name: str, n_keep: int = 0) -> np.random.Generator:
        """What a strategy draws from at one size."""
        return np.random.default_rng((self.seed, zlib.crc32(name.encode()), n_keep))

    def lacks(self, name: str) -> bool:
        """Whether the histories lack what a strategy looks at."""
        needs = getattr(get_strategy(name), "needs", ())
        return any(getattr(self.history, field) is None for field in needs)

    def at_size(self, names: Sequence[str], n_keep: int) -> dict[str, Outcome]:
        """What strategies and merges do that keep `n_keep` transitions; all in few passes."""
        rows, indices = {}, {}
        for name in names:
            if name in STRATEGIES:
                rows[name] = self._rows(DRAWN.get(name, 1))
                chosen = self.history.rows(rows[name])
                indices[name] = STRATEGIES[name].select(
                    chosen, n_keep, self.generator(name, n_keep)
                )
        found = {}
        if rows:
            logits = self._act(torch.cat([*rows.values()]), torch.cat([*indices.values()]))
            parts = logits.split([len(part) for part in rows.values()])
            for name, part in zip(rows, parts, strict=True):
                found[name] = self._compare(part, n_keep, kept_counts(indices[name]))
        for name in names:
            if name in MERGES:
                shorter = MERGES[name].merge(self.history, n_keep)
                counts = torch.full((self.history.size,), shorter.n)
                found[name] = self._compare(self.subject.view.logits(shorter), n_keep, counts)
        return {name: found[name] for name in names}

    def at_own_size(self, name: str) -> tuple[Outcome, Outcome]:
        """What a strategy does that keeps as many as it needs, and what random draws of as many."""
        n_keep = self.n - 1
        indices = STRATEGIES[name].select(self.history, n_keep)
        counts = kept_counts(indices)  # (B,)
        own = self._compare(self._act(self._rows(1), indices), n_keep, counts)
        rows = self._rows(N_DRAWS)
        drawn = uniform(
            self.generator(f"random as {name}"), (len(rows), self.n), self.history.device
        )
        places = drawn.argsort(dim=1).argsort(dim=1)
        indices = keep_where(places < counts[rows][:, None])
        return own, self._compare(self._act(rows, indices), n_keep, kept_counts(indices))

    def _rows(self, n_draws: int) -> Tensor:
        """Every decision `n_draws` times: `(D * B,)`."""
        return torch.arange(self.history.size, device=self.history.device).repeat(n_draws)

    def _act(self, rows: Tensor, indices: Tensor) -> Tensor:
        """Logits `(R, A)` of decisions `rows (R,)` on the transitions `indices (R, k)`."""
        size = max(1, MAX_TOKENS // (indices.shape[1] + 1))
        logits = self.subject.view.logits
        return torch.cat(
            [
                compressed_logits(logits, self.history.rows(some), kept)
                for some, kept in zip(rows.split(size), indices.split(size), strict=True)
            ]
        )

    def _compare(self, logits: Tensor, n_keep: int, kept: Tensor) -> Outcome:
        """Outcome of logits `(D * B, A)`."""
        shape = (-1, self.history.size)
        return compare(self.full, logits.view(*shape, logits.shape[-1]), n_keep, kept.view(shape))


def _has_own_size(name: str) -> bool:
    """Whether a strategy keeps as many as it needs, whatever the budget."""
    chosen = get_strategy(name)
    return isinstance(chosen, Strategy) and chosen.keeps == "up to n_keep"
