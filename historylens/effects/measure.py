"""What dropping history does to the action: methods at a few sizes, beside random drops.

Attention suggests what can go; only the model, run on what is left, shows it. Controls come first:
a model that another task's history leaves unmoved cannot be judged this way.

    effects = compress_decisions(Trial(agent, samples=[0, 5, 7], seed=0), ["recency"], tqdm())
    effects.curves["recent"][0].kl_mean, effects.curves["recent"][0].random.kl_band

Axes: `B` decisions, `n` transitions before each, `D` draws of what is random (else 1), `A` actions.
"""

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from historylens.agent import Agent, act_in_parts, attend
from historylens.common.batches import alike
from historylens.common.errors import UserError
from historylens.compression import METHODS
from historylens.compression.attention import TOP_PERCENT
from historylens.compression.method import keep_where, uniform
from historylens.effects.effect import BAND, UNMOVED, Effect, enough
from historylens.history import History
from historylens.insights import PATTERNS
from historylens.tokens import sum_rows

WORST = "least-attended"
STANDARD = ("recent", "even", "top-k", "rewarded-recent", WORST)
N_DRAWS = 20  # of random transitions
DRAWN = {"random": N_DRAWS, "decay": 5, "importance": 5}  # draws of what is drawn at random
LADDER = (1, 2, 5)  # sizes, times powers of ten
LARGEST = 0.6  # of the context: beyond, little is saved
MAX_LEFT_OUT_TOKENS = 40_000  # tokens run for leave-one-out, if that does for one decision
UNMOVED_EMPTY = 0.5  # nats, without history; untrained models reach 0.1 to 0.4
DEFINITIONS = {
    "flips": "share of decisions whose most likely action changes",
    "kl": "KL(full || compressed) of the action distributions, nats",
    "band": "percentiles of the draws, each a mean over decisions",
    "against_random": "mean KL below (better) or above (worse) that of every draw",
    "enough": "fewest transitions from which on the mean KL stays within unmoved_nats",
}


@dataclass(frozen=True)
class Effects:
    """Everything that was measured on some decisions.

    Attributes:
        samples: numbers of the decisions, `B` of them.
        n: transitions before each; decisions with another number were left out.
        seed: of everything drawn.
        patterns: whose advice was measured.
        controls: name -> what it did: of "empty" and the controls those that could be run.
        not_run: control or method -> why it could not be run.
        ignores_history: the history can be exchanged and the actions stay: nothing else is
            measured then.
        curves: method -> effects at `budgets(n)`, "random" always among them; of one that keeps as
            many as it needs, the one effect of that, beside random draws of as many from every
            decision.
    """

    samples: Sequence[int]
    n: int
    seed: int
    patterns: Sequence[str]
    controls: Mapping[str, Effect]
    not_run: Mapping[str, str]
    ignores_history: bool
    curves: Mapping[str, Sequence[Effect]] = field(default_factory=dict)

    def at(self, name: str, n_keep: int) -> Effect | None:
        """A method's effect at a size; None where it was not measured."""
        curve = self.curves.get(name, ())
        return next((one for one in curve if has_own_size(name) or one.n_keep == n_keep), None)

    def json(self) -> dict[str, Any]:
        """Everything that was measured, as plain values."""
        strategies = {}
        for name, curve in self.curves.items():
            strategies[name] = {
                "rule": METHODS[name].rule,
                "looks_at": METHODS[name].looks_at,
                "advised_by": [p for p in self.patterns if name in PATTERNS[p].measured],
                "n_draws": DRAWN.get(name, 1),
                "sizes": [one.json() for one in curve],
            }
            if has_own_size(name):
                strategies[name]["sizes"][0]["random"] = curve[0].random.json()
            else:
                strategies[name]["enough"] = enough(curve)
        return {
            "settings": {
                "samples": list(self.samples),
                "n_context": self.n,
                "budgets": list(budgets(self.n)),
                "n_random_draws": N_DRAWS,
                "band_percentiles": list(BAND),
                "seed": self.seed,
                "unmoved_nats": UNMOVED,
                "unmoved_empty_nats": UNMOVED_EMPTY,
            },
            "definitions": DEFINITIONS,
            "ignores_history": self.ignores_history,
            "controls": {name: one.json() for name, one in self.controls.items()},
            "not_run": self.not_run,
            "strategies": strategies,
        }


def budgets(n: int) -> tuple[int, ...]:
    """Sizes at which methods are measured on `n` transitions: 1, 2, 5, 10, ... and 30 %."""
    tens = (10**power for power in range(len(str(n))))
    ladder = (step * ten for ten in tens for step in LADDER)
    sizes = {size for size in ladder if size <= max(1, LARGEST * n)} | {share_of(n)}
    return tuple(sorted(size for size in sizes if size < n))


def has_own_size(name: str) -> bool:
    """Whether a method keeps as many as it needs, whatever the budget."""
    return METHODS[name].keeps == "up to n_keep"


def share_of(n: int) -> int:
    """30 % of `n`, rounded up, as "top-30" keeps."""
    return -(-n * TOP_PERCENT // 100)


def choose_samples(agent: Agent, n_wanted: int) -> list[int]:
    """Decisions that can share a pass, evenly among those of the length that most have."""
    groups = alike((i, agent.length(i)) for i in range(len(agent.decisions)))
    most = max(groups, key=len)
    return [most[i] for i in spread(len(most), n_wanted)]


def spread(n_samples: int, n_wanted: int) -> list[int]:
    """`n_wanted` of the numbers `0 .. n_samples - 1`, evenly spaced; all where they are fewer."""
    n_wanted = min(n_samples, n_wanted)
    return [(2 * i + 1) * n_samples // (2 * n_wanted) for i in range(n_wanted)]


def affordable(n_samples: int, n: int) -> list[int]:
    """Which of some decisions on `n` transitions leave-one-out takes: one at least, evenly."""
    return spread(n_samples, max(1, MAX_LEFT_OUT_TOKENS // (n * n)))


class Trial:
    """Decisions that are made again on compressed history.

    Args:
        agent: what decides.
        samples: numbers of the decisions, equally long.
        seed: of everything drawn. Each method and size draws from a stream of its own, so that
            what else is measured changes nothing.

    Attributes:
        history: of these decisions, the latest `n` transitions that the model can read.
        full: `(B, A)` action logits on it.
        attention: of the query token to transitions, an array `(B, H, n)` float64 a layer; the
            history has its mean over layers and heads.
    """

    @torch.inference_mode()
    def __init__(self, agent: Agent, samples: Sequence[int], seed: int) -> None:
        self.agent, self.samples, self.seed = agent, samples, seed
        history = agent.history(samples).latest(agent.n_max)
        self.n = history.n
        self.full = agent.act(history)
        tokens = agent.tokens(history)
        layers = attend(agent, history)[1]
        self.attention = [sum_rows(layer.query_rows, tokens)[..., :-1] for layer in layers]
        mean = np.mean([heads.mean(axis=1) for heads in self.attention], axis=0)  # (B, n)
        known = torch.from_numpy(mean).float().to(history.device)
        self.history = replace(history, query_attention=known)

    def generator(self, name: str, n_keep: int = 0) -> np.random.Generator:
        """What a method draws from at one size."""
        return np.random.default_rng((self.seed, zlib.crc32(name.encode()), n_keep))

    def drawn(self, n_draws: int) -> History:
        """Every decision `n_draws` times, draw after draw."""
        rows = torch.arange(self.history.size, device=self.history.device)
        return self.history.rows(rows.repeat(n_draws))

    def at_size(self, name: str, n_keep: int, random: Effect | None = None) -> Effect:
        """What a method does that keeps `n_keep` transitions, beside random draws of as many."""
        history = self.drawn(DRAWN.get(name, 1))
        shorter = METHODS[name].compress(history, n_keep, self.generator(name, n_keep))
        return self.effect(shorter, n_keep, random)

    def at_own_size(self, name: str) -> Effect:
        """What a method does that keeps as many as it needs, beside random draws of as many."""
        n_keep = self.n - 1
        shorter = METHODS[name].compress(self.history, n_keep)
        history, generator = self.drawn(N_DRAWS), self.generator(f"random as {name}")
        ranks = uniform(generator, history.rewards.shape, history.device).argsort(1).argsort(1)
        as_many = history.take(keep_where(ranks < shorter.counts.repeat(N_DRAWS)[:, None]))
        return self.effect(shorter, n_keep, self.effect(as_many, n_keep))

    def control(self, name: str) -> Effect:
        """What another history does, or none, to the decisions that it can show something of.

        Raises:
            UserError: there are none of these, or the model cannot run on it.
        """
        history = self.history
        rows = torch.arange(history.size, device=history.device)
        if name == "shuffled-rewards":  # says nothing where all rewards are equal
            rows = rows[(history.rewards != history.rewards[:, :1]).any(dim=1)]
            if not len(rows):
                raise UserError("no decision has different rewards before it")
        elif name == "other-task":
            tasks = rows if history.tasks is None else history.tasks
            if (tasks == tasks[0]).all():
                raise UserError("all decisions are of one task")
        changed = METHODS[name].compress(history.rows(rows), 0, self.generator(name))
        logits = act_in_parts(self.agent, changed)
        return Effect.of(self.full[rows], logits, changed.n, changed.counts)

    def effect(self, shorter: History, n_keep: int, random: Effect | None = None) -> Effect:
        """What compressed histories of the decisions do, draw after draw."""
        logits = act_in_parts(self.agent, shorter)
        return replace(Effect.of(self.full, logits, n_keep, shorter.counts), random=random)


@torch.inference_mode()
def compress_decisions(trial: Trial, patterns: Collection[str], bar: tqdm) -> Effects:
    """Make decisions again on history that is compressed as some patterns advise.

    Args:
        trial: the decisions.
        patterns: keys of `PATTERNS`.
        bar: progress bar, whose total is set for this and for `measure_faithfulness`.

    Raises:
        UserError: the model cannot be run on less history.
    """
    patterns = [pattern for pattern in PATTERNS if pattern in patterns]
    names = dict.fromkeys([*STANDARD, *(name for p in patterns for name in PATTERNS[p].measured)])
    of_any_size = [name for name in names if not has_own_size(name)]
    of_own_size, sizes = [name for name in names if has_own_size(name)], budgets(trial.n)
    bar.total = 1 + len(sizes) + len(of_own_size) + len(affordable(len(trial.samples), trial.n))

    controls, not_run = {}, {}
    for name in ("empty", *(name for name, one in METHODS.items() if one.kind == "control")):
        try:
            controls[name] = trial.control(name)
        except UserError as error:  # not every model can act without history
            not_run[name] = str(error)
    bar.update()
    ignores = ignores_history(controls)
    effects = Effects(trial.samples, trial.n, trial.seed, patterns, controls, not_run, ignores)
    if ignores:
        return effects
    curves = {name: [] for name in ("random", *of_any_size)}
    for n_keep in sizes:
        random = trial.at_size("random", n_keep)
        curves["random"].append(random)
        for name in of_any_size:
            curves[name].append(trial.at_size(name, n_keep, random))
        bar.update()
    for name in of_own_size if trial.n > 1 else ():
        try:
            curves[name] = [trial.at_own_size(name)]
        except UserError as error:  # it may keep nothing of some history
            not_run[name] = str(error)
        bar.update()
    return replace(effects, curves=curves)


def ignores_history(controls: Mapping[str, Effect]) -> bool:
    """Whether the history can be exchanged or left out and the actions stay as they are.

    The divergence decides, not the flips: an untrained model hardly prefers any action, and flips
    at a breath. Without history it moves further than with another one, for want of tokens; where
    no other task's history is at hand, the empty one has to stay as close.
    """
    empty = UNMOVED_EMPTY if "other-task" in controls else UNMOVED
    limits = {name: empty if name == "empty" else UNMOVED for name in controls}
    return bool(controls) and all(one.kl_mean <= limits[name] for name, one in controls.items())
