"""The model acting in Dark Room: in-context reinforcement learning (Laskin et al. 2022, section 4).

No weight changes. The model reads what it has lived through, draws an action, and the transition is
appended; once the context is full, its oldest transition drops out.

    returns = rollout(model, np.repeat(goals, 16, axis=0), n_episodes=40, seed=0)   # (8 * 16, 40)
"""

import numpy as np
import torch
from tqdm import tqdm

from darkroom import DarkRoom
from model import ADTransformer


@torch.inference_mode()
def rollout(
    model: ADTransformer,
    goals: np.ndarray,
    n_episodes: int,
    seed: int,
    horizon: int = 20,
    progress: str | None = None,
) -> np.ndarray:
    """Act for many episodes in many rooms at once, with actions drawn from the model's policy.

    Args:
        model: the model; its dropout is off while it acts.
        goals: `(N, 2)` int, one room each; repeat a goal for several rollouts of it.
        n_episodes: episodes in a row, the history growing through all of them.
        seed: seed of the action noise. Each room has its own stream of it.
        horizon: steps an episode.
        progress: label of a progress bar, if one is wanted.

    Returns:
        `(N, n_episodes)` int, the reward of each episode.
    """
    device = model.pred_action.weight.device
    room = DarkRoom(goals, model.config.grid_size, horizon)
    n_rooms, n_max = room.n_rooms, model.n_context_max
    noise = np.random.default_rng(seed)
    past = torch.zeros(n_rooms, n_episodes * horizon, 6, dtype=torch.int64)
    returns = np.zeros((n_rooms, n_episodes), dtype=np.int64)
    was_training = model.training
    model.eval()
    states = room.reset()
    for t in tqdm(range(n_episodes * horizon), desc=progress, disable=not progress, leave=False):
        context = past[:, max(0, t - n_max) : t].to(device)
        logits = model(
            context[..., :2],
            context[..., 2],
            context[..., 3],
            context[..., 4:],
            torch.from_numpy(states).to(device),
        )
        actions = gumbel_argmax(logits, noise)
        next_states, rewards, done = room.step(actions)
        step = np.concatenate([states, actions[:, None], rewards[:, None], next_states], axis=1)
        past[:, t] = torch.from_numpy(step)
        returns[:, t // horizon] += rewards
        states = room.reset() if done else next_states
    model.train(was_training)
    return returns


def gumbel_argmax(logits: torch.Tensor, noise: np.random.Generator) -> np.ndarray:
    """Draw one action a row from the softmax of `(N, A)` logits: `(N,)` int."""
    gumbel = noise.gumbel(size=tuple(logits.shape))
    return (logits.double().cpu().numpy() + gumbel).argmax(axis=1)
