"""Rollouts of the model, in all modes beside recomputing the whole context at each step.

    python benchmarks/rollout.py                 # 32 rooms, 1,000 steps, 240 tokens

"growing" is the part before the context is full, where "step" and "episode" are the same. The plain
way calls the model on the whole context at each step, once as PyTorch runs it by default (its
inference fast path) and once with that switched off, which gives its fused attention.
"""

import argparse
import time

import numpy as np
import setting
import torch

from ad.acting import rollout_goals
from ad.darkroom import DarkRoom, all_goals
from config import ModelConfig
from model import ADTransformer


@torch.inference_mode()
def plain_rollout(model: ADTransformer, goals: np.ndarray, n_steps: int, fused: bool) -> float:
    """Call the model on the whole context at each step; returns the seconds taken."""
    torch.backends.mha.set_fastpath_enabled(not fused)
    started = time.perf_counter()
    room, n_max = DarkRoom(goals, model.config.grid_size, 20), model.n_context_max
    noise = np.random.default_rng(0)
    past = torch.zeros(len(goals), n_steps, 6, dtype=torch.int64)
    states = room.reset()
    for t in range(n_steps):
        c = past[:, max(0, t - n_max) : t]
        logits = model(c[..., :2], c[..., 2], c[..., 3], c[..., 4:], torch.from_numpy(states))
        actions = (logits.numpy() + noise.gumbel(size=logits.shape)).argmax(axis=1)
        next_states, rewards, done = room.step(actions)
        step = [states, actions[:, None], rewards[:, None], next_states]
        past[:, t] = torch.from_numpy(np.concatenate(step, axis=1))
        states = room.reset() if done else next_states
    return time.perf_counter() - started


def main() -> None:
    """Measure each mode and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n-rooms", type=int, default=32, metavar="N")
    parser.add_argument("--n-steps", type=int, default=1000, metavar="N")
    parser.add_argument("--n-transit", type=int, default=240, metavar="N")
    flags = parser.parse_args()
    torch.manual_seed(0)
    model = ADTransformer(ModelConfig(n_transit=flags.n_transit)).eval()
    goals = all_goals(9)[np.linspace(0, 80, flags.n_rooms).astype(int)]
    n_growing = min(flags.n_steps, flags.n_transit - 1) // 20 * 20
    cases = [("growing", "step", n_growing)]
    cases += [(f"sliding by {mode}", mode, flags.n_steps) for mode in ("step", "episode")]
    rows, plain_seconds = [], {}
    for name, mode, n_steps in cases:
        started = time.perf_counter()
        rollout_goals(model, goals, n_steps // 20, seed=0, sliding=mode)
        ours = time.perf_counter() - started
        row = [name, str(n_steps), f"{ours:.1f}"]
        for fused in (False, True):
            if (n_steps, fused) not in plain_seconds:  # the same for both ways of sliding
                plain_seconds[n_steps, fused] = plain_rollout(model, goals, n_steps, fused)
            plain = plain_seconds[n_steps, fused]
            row += [f"{plain:.1f}", f"{plain / ours:.1f}x"]
        rows.append(row)
    print(f"{flags.n_rooms} rooms, context of {flags.n_transit} tokens")
    header = ["mode", "steps", "ours, s", "plain, s", "/ ours", "plain fused, s", "/ ours"]
    print(setting.table(header, rows))


if __name__ == "__main__":
    main()
