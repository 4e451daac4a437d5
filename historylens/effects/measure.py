"""Decisions made again on compressed history: methods at a few sizes, beside random drops.

    trial = Trial(agent, n_wanted=10, seed=0, bar=tqdm())    # the bar moves on by 1 a step
    trial.curves(["recent", "top-k"])["recent"][0].against_random

Axes: `B` decisions, `n` transitions before each, `D` draws of what is random (else 1), `A` actions.
"""

import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from historylens.agent import Agent, Unreadable, act_in_parts, look
from historylens.common.batches import alike
from historylens.common.errors import UserError, expect
from historylens.compression import METHODS
from historylens.compression.method import keep_where, uniform
from historylens.compression.strategies import TOP_PERCENT
from historylens.history import History

N_DRAWS = 20  # of random transitions
DRAWN = {"random": N_DRAWS, "decay": 5, "importance": 5}  # draws of what is drawn at random
BAND = (5, 95)  # percentiles of the draws
ENOUGH, ENOUGH_FLIPS = 0.09, 0.25  # nats at the reference temperature, share of decisions
ROUNDING = 1e-6  # of the largest: logits that differ by less are equal
NOTHING = 1e-3  # nats: below, an action is as it was
ALIKE = 1e-3  # of a random draw's divergence: one that differs by less is equal, but for rounding
N_RESAMPLES = 2_000  # of the bootstrap over decisions
UNMOVED = 0.05  # share of actions that change: as few count as none
LARGEST = 0.6  # of the context: beyond, little is saved


@dataclass(frozen=True)
class Effect:
    """What one way of compressing did to the actions of `B` decisions, in each of `D` draws.

    KL is KL(full || compressed), in nats; of the reference temperature see `sharpness`.
    """

    n_keep: int  # transitions asked for
    kept_mean: float  # transitions really kept (tokens, of a merge)
    kept_min: int
    kept_max: int
    n_decisions: int  # B
    flips: float  # share of the decisions whose most likely action changes
    kl_mean: float
    kl_p95: float  # 95th percentile
    flips_band: list[float] | None  # middle 90 % of the draws: low, high; None of a single draw
    kl_band: list[float] | None
    changed: float  # share of actions drawn that change, at the reference temperature
    kl_reference: float  # mean KL there
    draws: np.ndarray  # (D,) float64, mean KL of each draw there
    random: Self | None = None  # of as many drawn at random; None of these, and of controls

    @property
    def against_random(self) -> str | None:
        """Whether "better" or "worse" than all random draws (by chance 1 in 21), or "alike"."""
        if self.random is None:
            return None
        signs = self._beside_draws
        return "better" if signs.min() > 0 else "worse" if signs.max() < 0 else "alike"

    @property
    def _beside_draws(self) -> np.ndarray:
        """`(D,)` of the random draws: 1 where one moved actions more, -1 less, 0 as much."""
        more = self.random.draws - self.kl_reference
        return np.sign(more) * (abs(more) > ALIKE * np.maximum(self.random.draws, NOTHING))

    @property
    def verdict(self) -> str:
        """Whether it is better than chance at its size, in a sentence."""
        n, n_less = len(self.random.draws), int((self._beside_draws <= 0).sum())
        if n_less == 0:
            return f"Better than each of {n} random draws."
        if self.against_random == "worse":
            return f"Worse than each of {n} random draws: here the pattern misleads."
        if max(self.kl_reference, self.random.draws.max()) <= NOTHING:
            return "A random choice changes nothing either: at this size nothing is lost."
        less = f"{n_less} of {n} random draws moved the action distribution no more."
        if n_less < n / 2:
            return f"Not clearly better than random: {less}"
        return f"No better than random: {less} The pattern is no guide to what can go here."

    @property
    def kept(self) -> str:
        """`kept_mean`, with a decimal where it needs one."""
        return f"{self.kept_mean:.{0 if self.kept_mean.is_integer() else 1}f}"

    def __str__(self) -> str:
        return f"{self.flips:.0%} (KL {nats(self.kl_mean)})"

    def json(self) -> dict[str, Any]:
        """As plain values, without what is None."""
        known = vars(self) | {"draws": None, "random": None, "against_random": self.against_random}
        return {name: value for name, value in known.items() if value is not None}


class Resampled:
    """Bootstrap over `B` decisions, with the same draws for all that is measured on them."""

    def __init__(self, n_decisions: int, generator: np.random.Generator) -> None:
        even = np.full(n_decisions, 1 / n_decisions)
        self._weights = generator.multinomial(n_decisions, even, N_RESAMPLES) / n_decisions

    def interval(self, values: np.ndarray, per: np.ndarray | None = None) -> np.ndarray:
        """95 % interval `(2, ...)` of the mean of `values (B, ...)`, over that of `per`; or NaN."""
        means = np.tensordot(self._weights, values, 1)
        if per is not None:
            per = np.tensordot(self._weights, per, 1)
            means = np.divide(means, per, out=np.full_like(means, np.nan), where=per != 0)
        return np.nanquantile(means, [0.025, 0.975], axis=0)


def moved(full: Tensor, other: Tensor, resampled: Resampled, beta: float) -> dict[str, Any]:
    """`kl`, `flips` and `changed` as in an `Effect`, from logits `(B, A)`, with their intervals."""
    kl, flips = kl_divergence(full, other), (full.argmax(-1) != other.argmax(-1)).double()
    measured = {"kl": kl, "flips": flips, "changed": action_changes(full, other, beta)}
    found = {}
    for name, values in measured.items():
        interval = resampled.interval(values := values.cpu().numpy()).tolist()
        found |= {name: float(values.mean()), f"{name}_interval": interval}
    return found


def nats(value: float) -> str:
    """A divergence with the digits that matter."""
    if value < NOTHING:
        return "0" if value == 0 else f"< {NOTHING}"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def kl_divergence(full: Tensor, other: Tensor, beta: float = 1.0) -> Tensor:
    """KL(full || other) from `beta` times action logits `(..., A)`: `(...)` float64 nats."""
    p, q = ((logits.double() * beta).log_softmax(-1) for logits in (full, other))
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


def sharpness(full: Tensor) -> float:
    """Factor that takes logits `(B, A)` to the reference temperature: mean entropy half of `ln A`.

    Decisions without any preference, up to rounding, have no say; 0: none has one.
    """
    z = full.double()
    span = z.amax(-1) - z.amin(-1)
    z, target = z[span > ROUNDING * z.abs().amax(-1)], 0.5 * math.log(z.shape[-1])
    if not len(z):
        return 0.0
    low, high = -60.0, 60.0  # of the logarithm
    for _ in range(60):
        middle = (low + high) / 2
        entropy = torch.special.entr((z * math.exp(middle)).softmax(-1)).sum(-1).mean()
        low, high = (middle, high) if entropy > target else (low, middle)
    return math.exp(low)


def action_changes(full: Tensor, other: Tensor, beta: float) -> Tensor:
    """Share of actions drawn that have to change (total variation), as `kl_divergence`."""
    p, q = ((logits.double() * beta).softmax(-1) for logits in (full, other))
    return (p - q).abs().sum(-1) / 2


def enough(curve: Sequence[Effect]) -> int | None:
    """Fewest transitions from which on no more than `ENOUGH` changes; None: none measured."""
    well = (one.kl_reference <= ENOUGH and one.flips <= ENOUGH_FLIPS for one in reversed(curve))
    n_well = sum(itertools.takewhile(bool, well))
    return curve[-n_well].n_keep if n_well else None


def budgets(n: int) -> list[int]:
    """Sizes at which methods are measured on `n` transitions: 1, 2, 5, 10, ... and 30 %."""
    ladder = {step * 10**power for power in range(len(str(n))) for step in (1, 2, 5)}
    sizes = {size for size in ladder if size <= max(1, LARGEST * n)} | {-(-n * TOP_PERCENT // 100)}
    return sorted(size for size in sizes if size < n)


def has_own_size(name: str) -> bool:
    """Whether a method keeps as many as it needs, whatever the budget."""
    return METHODS[name].keeps == "up to n_keep"


def spread(n_samples: int, n_wanted: int) -> list[int]:
    """`n_wanted` of the numbers `0 .. n_samples - 1`, evenly spaced; all where they are fewer."""
    n_wanted = min(n_samples, n_wanted)
    return [(2 * i + 1) * n_samples // (2 * n_wanted) for i in range(n_wanted)]


class Trial:
    """Decisions of an agent that are made again on compressed history.

    Up to `n_wanted`, of the length that most have. Each method and size draws from its own stream.
    """

    def __init__(self, agent: Agent, n_wanted: int, seed: int, bar: tqdm) -> None:
        having = filter(agent.length, range(len(agent.decisions)))
        most = max(alike(having, agent.length), key=len)
        self.samples = [most[i] for i in spread(len(most), n_wanted)]
        self.agent, self.seed, self.bar = agent, seed, bar
        self.not_run: dict[str, str] = {}  # control or method -> why it could not be run
        history = agent.history(self.samples).latest(agent.n_max)
        self.n, self.full = history.n, agent.act(history)  # (B, A) action logits
        self.beta = sharpness(self.full)
        self.history = look(agent, history, ("query_attention", "head_attention"))
        try:
            self.history = look(agent, self.history, ("norm", "contribution"))
        except Unreadable as error:
            self.not_run["norm and contribution"] = str(error)

    def decisions(self, n_wanted: int) -> Tensor:
        """Places `(R,)` of `n_wanted` of the decisions, evenly spaced; all where they are fewer."""
        return torch.tensor(spread(len(self.samples), n_wanted), device=self.history.device)

    def generator(self, name: str, n_keep: int = 0) -> np.random.Generator:
        """The random stream of something that is measured."""
        return np.random.default_rng((self.seed, zlib.crc32(name.encode()), n_keep))

    def effect(
        self, full: Tensor, shorter: History, n_keep: int, random: Effect | None = None
    ) -> Effect:
        """What `D * B` shorter histories do, draw after draw, beside logits `(B, A)` on all."""
        logits, kept, size = act_in_parts(self.agent, shorter), shorter.counts, len(full)
        full = full.repeat(len(logits) // size, 1)  # (D * B, A)
        kl, reference = (kl_divergence(full, logits, x).cpu().numpy() for x in (1.0, self.beta))
        flips = (full.argmax(-1) != logits.argmax(-1)).cpu().numpy()
        changed = float(action_changes(full, logits, self.beta).mean())
        by_draw = [x.reshape(-1, size).mean(axis=1) for x in (flips, kl, reference)]
        bands = [np.percentile(x, BAND).tolist() if len(x) > 1 else None for x in by_draw[:2]]
        counts = float(kept.double().mean()), int(kept.min()), int(kept.max())
        means = float(flips.mean()), float(kl.mean()), float(np.percentile(kl, 95))
        moved = changed, float(reference.mean()), by_draw[2]
        return Effect(n_keep, *counts, size, *means, *bands, *moved, random)

    def controls(self) -> dict[str, Effect]:
        """What another history does to the actions, or none, where the model can run on it."""
        controls = {}
        for name in ("empty", *(name for name, one in METHODS.items() if one.kind == "control")):
            try:
                rows, changed = self.exchanged(name)
                controls[name] = self.effect(self.full[rows], changed, changed.n)
            except UserError as error:  # not every model can act without history
                self.not_run[name] = str(error)
        return controls

    def exchanged(self, name: str, some: Tensor | None = None) -> tuple[Tensor, History]:
        """Those of `some` decisions that a control can change, and changed; UserError: none."""
        history = self.history if some is None else self.history.rows(some)
        rows = torch.arange(history.size, device=history.device)
        if name == "shuffled-rewards":  # says nothing where all rewards are equal
            rows = rows[(history.rewards != history.rewards[:, :1]).any(dim=1)]
            expect(len(rows), "no decision has different rewards before it")
        elif name == "other-task":
            tasks = rows if history.tasks is None else history.tasks
            expect((tasks != tasks[0]).any(), "all decisions are of one task")
        return rows, METHODS[name].compress(history.rows(rows), 0, self.generator(name))

    def curves(self, names: Sequence[str]) -> dict[str, list[Effect]]:
        """What methods, and "random" before them, do at `budgets(n)` or their own size.

        UserError: the model cannot be run on less history.
        """
        curves = {name: [] for name in ("random", *names) if not has_own_size(name)}
        for n_keep in budgets(self.n):
            random = None
            for name in [*curves]:
                history = self._drawn(DRAWN.get(name, 1))
                shorter = METHODS[name].compress(history, n_keep, self.generator(name, n_keep))
                try:
                    curves[name].append(self.effect(self.full, shorter, n_keep, random))
                except UserError as error:  # means of states may be none that the model knows
                    if METHODS[name].kind != "merge":
                        raise
                    self.not_run[name] = str(error)
                    del curves[name]
                random = curves["random"][-1]
            self.bar.update()
        for name in filter(has_own_size, names if self.n > 1 else ()):
            shorter = METHODS[name].compress(self.history, self.n - 1)
            history, generator = self._drawn(N_DRAWS), self.generator(f"random as {name}")
            ranks = uniform(generator, history.rewards.shape, history.device).argsort(1).argsort(1)
            as_many = history.take(keep_where(ranks < shorter.counts.repeat(N_DRAWS)[:, None]))
            try:
                random = self.effect(self.full, as_many, self.n - 1)
                curves[name] = [self.effect(self.full, shorter, self.n - 1, random)]
            except UserError as error:  # it may keep nothing of some history
                self.not_run[name] = str(error)
            self.bar.update()
        return curves

    def _drawn(self, n_draws: int) -> History:
        """Every decision `n_draws` times, draw after draw."""
        rows = torch.arange(self.history.size, device=self.history.device)
        return self.history.rows(rows.repeat(n_draws))
