"""Rollouts of the model, in all modes beside recomputing the whole context at each step.

"growing" is the part before the context is full, where "step" and "episode" are the same. The plain
way calls the model on the whole context at each step, once as PyTorch runs it by default (its
inference fast path) and once with that switched off, which gives its fused attention.
"""

import argparse
from collections.abc import Iterator
from functools import cache, partial

import numpy as np
import torch
from setting import print_table, read_flags, seconds_of

from ad.acting import rollout_goals
from ad.darkroom import DarkRoom, all_goals
from config import ModelConfig
from model import ADTransformer


@torch.inference_mode()
def plain_rollout(model: ADTransformer, goals: np.ndarray, n_steps: int) -> None:
    """Call the model on the whole context at each step."""
    room, n_max = DarkRoom(goals, model.config.grid_size, 20), model.n_context_max
    noise = np.random.default_rng(0)
    device = model.pos_embedding.device
    past = torch.zeros(len(goals), n_steps, 6, dtype=torch.int64, device=device)
    states = room.reset()
    for t in range(n_steps):
        c = past[:, max(0, t - n_max) : t]
        query = torch.from_numpy(states).to(device)
        logits = model(c[..., :2], c[..., 2], c[..., 3], c[..., 4:], query).cpu().numpy()
        actions = (logits + noise.gumbel(size=logits.shape)).argmax(axis=1)
        next_states, rewards, done = room.step(actions)
        step = [states, actions[:, None], rewards[:, None], next_states]
        past[:, t] = torch.from_numpy(np.concatenate(step, axis=1))
        states = room.reset() if done else next_states


def rows_of(flags: argparse.Namespace) -> Iterator[tuple]:
    """A row for each mode, its seconds beside those of both plain ways."""
    torch.manual_seed(0)
    model = ADTransformer(ModelConfig(n_transit=flags.n_transit)).eval().to(flags.device)
    goals = all_goals(9)[np.linspace(0, 80, flags.n_rooms).astype(int)]

    @cache  # the same for both ways of sliding
    def plain_seconds(n_steps: int, fused: bool) -> float:
        torch.backends.mha.set_fastpath_enabled(not fused)
        return seconds_of(partial(plain_rollout, model, goals, n_steps))[0]

    n_growing = min(flags.n_steps, flags.n_transit - 1) // 20 * 20
    modes = [("growing", "step", n_growing), ("sliding by step", "step", flags.n_steps)]
    if flags.n_transit > 40:  # whole episodes are dropped of two or more
        modes.append(("sliding by episode", "episode", flags.n_steps))
    for name, mode, n_steps in [mode for mode in modes if mode[2] >= 20]:
        act = partial(rollout_goals, model, goals, n_steps // 20, seed=0, reads=mode)
        (ours,) = seconds_of(act)
        plain, fused = (plain_seconds(n_steps, fused) for fused in (False, True))
        yield name, n_steps, ours, plain, plain / ours, fused, fused / ours


if __name__ == "__main__":
    flags = read_flags(__doc__, n_rooms=32, n_steps=1000, n_transit=240, device="cpu")
    print(f"{flags.n_rooms} rooms, context of {flags.n_transit} tokens, {flags.device}")
    header = "| mode | steps | ours, s | plain, s | / ours | plain fused, s | / ours |"
    row = "| {} | {} | {:.1f} | {:.1f} | {:.1f}x | {:.1f} | {:.1f}x |"
    print_table(header, row, rows_of(flags))
