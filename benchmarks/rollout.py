"""Rollouts of the model, in all modes beside recomputing the whole context at each step.

"growing" is the part before the context is full, where "step" and "episode" are the same. The plain
way calls the model on the whole context at each step, once as PyTorch runs it by default (its
inference fast path) and once with that switched off, which gives its fused attention.
"""

import argparse
from collections.abc import Iterator
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import torch
from setting import print_table, read_flags, seconds_of
from torch import Tensor

from ad.darkroom import DarkRoom, all_goals
from ad.evaluation import rollout_goals
from config import ModelConfig
from historylens.agent import rollout
from historylens.history import HistoryBuffer
from model import ADTransformer


def rows_of(flags: argparse.Namespace) -> Iterator[tuple]:
    """A row for each mode, its seconds beside those of both plain ways."""
    torch.manual_seed(0)
    model = ADTransformer(ModelConfig(n_transit=flags.n_transit)).eval().to(flags.device)
    goals = all_goals(9)[np.linspace(0, 80, flags.n_rooms).astype(int)]

    @torch.inference_mode()
    def act(buffer: HistoryBuffer, states: Tensor) -> Tensor:
        return model(*buffer.history(states, max(0, buffer.n - model.n_context_max)).inputs)

    @cache  # the same for both ways of sliding
    def plain_seconds(n_steps: int, fused: bool) -> float:
        torch.backends.mha.set_fastpath_enabled(not fused)
        rooms, noises = DarkRoom(goals, 9, 20), [*map(np.random.default_rng, range(len(goals)))]
        policy = SimpleNamespace(act=act, device=flags.device)
        return seconds_of(partial(rollout, rooms, policy, n_steps, noises))[0]

    n_growing = min(flags.n_steps, flags.n_transit - 1) // 20 * 20
    modes = [("growing", "step", n_growing), ("sliding by step", "step", flags.n_steps)]
    if flags.n_transit > 40:  # whole episodes are dropped of two or more
        modes.append(("sliding by episode", "episode", flags.n_steps))
    for name, mode, n_steps in [mode for mode in modes if mode[2] >= 20]:
        run = partial(rollout_goals, model, goals, n_steps // 20, seed=0, reads=mode)
        (ours,) = seconds_of(run)
        plain, fused = (plain_seconds(n_steps, fused) for fused in (False, True))
        yield name, n_steps, ours, plain, f"{plain / ours:.1f}x", fused, f"{fused / ours:.1f}x"


if __name__ == "__main__":
    flags = read_flags(__doc__, n_rooms=32, n_steps=1000, n_transit=240, device="cpu")
    print(f"{flags.n_rooms} rooms, context of {flags.n_transit} tokens, {flags.device}")
    columns = "mode | steps | ours, s:.1f | plain, s:.1f | / ours | plain fused, s:.1f | / ours"
    print_table(columns, rows_of(flags))
