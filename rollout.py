"""The model acting in Dark Room: in-context reinforcement learning (Laskin et al. 2022, section 4).

No weight changes. The model reads what it has lived through, draws an action, and the transition is
appended. Once the context is full, old transitions drop out.

    returns = rollout(model, np.repeat(goals, 16, axis=0), n_episodes=40, seed=0)   # (8 * 16, 40)
"""

from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from darkroom import DarkRoom
from decoding import CachedContext
from model import ADTransformer

MAX_ROOMS = 64  # rooms in one pass on a CPU: more of them outgrow its cache
Sliding = Literal["step", "episode"]


def rollout(
    model: ADTransformer,
    goals: np.ndarray,
    n_episodes: int,
    seed: int,
    horizon: int = 20,
    sliding: Sliding = "step",
    progress: str | None = None,
) -> np.ndarray:
    """Act for many episodes in many rooms at once, with actions drawn from the model's policy.

    Args:
        model: the model; its dropout is off while it acts.
        goals: `(N, 2)` int, one room each; repeat a goal for several rollouts of it.
        n_episodes: episodes in a row, the history growing through all of them.
        seed: seed of the action noise. Room i's noise depends on `seed` and i alone.
        horizon: steps an episode.
        sliding: what drops out of a full context. "step": the oldest transition at each step, so
            that the context always is as long as can be. "episode": the oldest whole episodes as
            an episode begins, as many as make room for it; keys and values then live for an
            episode, which is several times faster.
        progress: label of a progress bar, if one is wanted.

    Returns:
        `(N, n_episodes)` int, the reward of each episode.

    Raises:
        ValueError: `sliding` is "episode" and the context does not hold two episodes.
    """
    if sliding == "episode" and model.n_context_max < 2 * horizon:
        raise ValueError(
            f"expected a context of two episodes ({2 * horizon} transitions) to drop one, "
            f"got {model.n_context_max}"
        )
    was_training = model.training
    model.eval()
    try:
        blocks = np.array_split(np.arange(len(goals)), max(1, -(-len(goals) // MAX_ROOMS)))
        n_steps = n_episodes * horizon
        bar = tqdm(total=n_steps * len(blocks), desc=progress, disable=not progress, leave=False)
        with bar:
            parts = [
                _act(model, DarkRoom(goals[rooms], model.config.grid_size, horizon), n_steps,
                     [np.random.default_rng((seed, room)) for room in rooms], sliding, bar)
                for rooms in blocks
            ]  # fmt: skip
    finally:
        model.train(was_training)
    rewards = np.concatenate(parts)  # (N, n_steps)
    return rewards.reshape(len(goals), n_episodes, horizon).sum(axis=2)


def _act(
    model: ADTransformer,
    room: DarkRoom,
    n_steps: int,
    noises: list[np.random.Generator],
    sliding: Sliding,
    bar: tqdm,
) -> np.ndarray:
    """Rewards `(N, n_steps)` of one block of rooms."""
    device = model.pred_action.weight.device
    context = CachedContext(model, room.n_rooms)
    past = torch.zeros(room.n_rooms, n_steps, 6, dtype=torch.int64)
    noise = np.stack([rng.gumbel(size=(n_steps, model.config.num_actions)) for rng in noises])
    rewards = np.zeros((room.n_rooms, n_steps), dtype=np.int64)
    states = room.reset()
    first = 0  # oldest step in context
    for t in range(n_steps):
        dropped = _n_dropped(t, t - first, model.n_context_max, room.horizon, sliding)
        if dropped:
            first += dropped
            context.clear()
        new = past[:, first + context.n_context : t].to(device)
        query = torch.from_numpy(states).to(device)
        logits = context.act(query, new[..., :2], new[..., 2], new[..., 3], new[..., 4:])
        # The largest of logits and Gumbel noise is a draw from their softmax.
        actions = (logits.double().cpu().numpy() + noise[:, t]).argmax(axis=1)
        next_states, rewards[:, t], done = room.step(actions)
        step = [states, actions[:, None], rewards[:, t, None], next_states]
        past[:, t] = torch.from_numpy(np.concatenate(step, axis=1))
        states = room.reset() if done else next_states
        bar.update()
    return rewards


def _n_dropped(t: int, n: int, n_max: int, horizon: int, sliding: Sliding) -> int:
    """How many of `n` transitions drop out of the context before step `t`."""
    if sliding == "step":
        return max(0, n - n_max)
    if t % horizon:
        return 0
    # As an episode begins, n is whole episodes; its last step needs horizon - 1 of its own.
    return -(-max(0, n + horizon - 1 - n_max) // horizon) * horizon
