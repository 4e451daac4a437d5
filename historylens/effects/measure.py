"""Decisions made again on compressed history: methods at a few sizes, beside random drops.

Controls come first: a model that another task's history leaves unmoved cannot be judged this way.

    trial = Trial(agent, choose_samples(agent, n_wanted=10), seed=0)
    controls, not_run = run_controls(trial)
    curves = run_methods(trial, ["recent", "top-k"], not_run, tqdm())

Axes: `B` decisions, `n` transitions before each, `D` draws of what is random (else 1), `A` actions.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from historylens.agent import Agent, act_in_parts, attend
from historylens.common.batches import alike
from historylens.common.errors import UserError
from historylens.compression import METHODS
from historylens.compression.method import keep_where, uniform
from historylens.effects.effect import UNMOVED, UNMOVED_EMPTY, Effect, budgets, has_own_size
from historylens.history import History
from historylens.tokens import sum_rows

N_DRAWS = 20  # of random transitions
DRAWN = {"random": N_DRAWS, "decay": 5, "importance": 5}  # draws of what is drawn at random


def choose_samples(agent: Agent, n_wanted: int) -> list[int]:
    """Decisions that can share a pass, evenly among those of the length that most have."""
    groups = alike((i, agent.length(i)) for i in range(len(agent.decisions)))
    most = max(groups, key=len)
    return [most[i] for i in spread(len(most), n_wanted)]


def spread(n_samples: int, n_wanted: int) -> list[int]:
    """`n_wanted` of the numbers `0 .. n_samples - 1`, evenly spaced; all where they are fewer."""
    n_wanted = min(n_samples, n_wanted)
    return [(2 * i + 1) * n_samples // (2 * n_wanted) for i in range(n_wanted)]


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
        self.n, self.full = history.n, agent.act(history)
        tokens, layers = agent.tokens(history), attend(agent, history)[1]
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

    def effect(self, shorter: History, n_keep: int, random: Effect | None = None) -> Effect:
        """What compressed histories of the decisions do, draw after draw."""
        logits = act_in_parts(self.agent, shorter)
        return replace(Effect.of(self.full, logits, n_keep, shorter.counts), random=random)

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


@torch.inference_mode()
def run_controls(trial: Trial) -> tuple[dict[str, Effect], dict[str, str]]:
    """What another history does to the actions, or none; and why a control could not be run."""
    controls, not_run = {}, {}
    for name in ("empty", *(name for name, one in METHODS.items() if one.kind == "control")):
        try:
            controls[name] = trial.control(name)
        except UserError as error:  # not every model can act without history
            not_run[name] = str(error)
    return controls, not_run


@torch.inference_mode()
def run_methods(
    trial: Trial, names: Sequence[str], not_run: dict[str, str], bar: tqdm
) -> dict[str, list[Effect]]:
    """What methods do at `budgets(n)`, or at their own size.

    Args:
        trial: the decisions.
        names: the methods; "random" comes before them in any case.
        not_run: is told why a method of own size could not be run.
        bar: progress bar, moved on by 1 for each size, and each method of own size.

    Raises:
        UserError: the model cannot be run on less history.
    """
    curves = {name: [] for name in ("random", *names) if not has_own_size(name)}
    for n_keep in budgets(trial.n):
        random = None
        for name, curve in curves.items():
            curve.append(trial.at_size(name, n_keep, random))
            random = curves["random"][-1]
        bar.update()
    for name in filter(has_own_size, names if trial.n > 1 else ()):
        try:
            curves[name] = [trial.at_own_size(name)]
        except UserError as error:  # it may keep nothing of some history
            not_run[name] = str(error)
        bar.update()
    return curves


def ignores_history(controls: Mapping[str, Effect]) -> bool:
    """Whether the history can be exchanged or left out and the actions stay as they are.

    The divergence decides, not the flips: an untrained model hardly prefers any action, and flips
    at a breath. Without history it moves further than with another one, for want of tokens; where
    no other task's history is at hand, the empty one has to stay as close.
    """
    empty = UNMOVED_EMPTY if "other-task" in controls else UNMOVED
    limits = {name: empty if name == "empty" else UNMOVED for name in controls}
    return bool(controls) and all(one.kl_mean <= limits[name] for name, one in controls.items())
