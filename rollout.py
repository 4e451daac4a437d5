"""The model acting in Dark Room: in-context reinforcement learning (Laskin et al. 2022, section 4).

No weight changes. The model reads what it has lived through, draws an action, and the transition is
appended. What it reads is an `acting.reading.Reader`'s affair: by default all that fits, and once
the context is full, old transitions drop out.

    returns = rollout(model, np.repeat(goals, 16, axis=0), n_episodes=40, seed=0)   # (8 * 16, 40)
    rewards = act(DarkRoom(goals), reader, n_steps=800, noises=noises)              # (8, 800)
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from acting.lived import Lived
from acting.reading import Reader, Sliding, SlidingReader
from darkroom import DarkRoom
from model import ADTransformer

MAX_ROOMS = 64  # rooms in one pass on a CPU: more of them outgrow its cache


class Room(Protocol):
    """`B` environments that step together, all of their episodes ending at once."""

    def reset(self) -> np.ndarray:
        """Begin an episode; returns states `(B, S)`."""
        ...

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Take actions `(B,)`; returns next states `(B, S)`, rewards `(B,)`, episode's end."""
        ...


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
        model: the model; it acts without dropout, whatever mode it is in.
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
    n_steps = n_episodes * horizon
    blocks = np.array_split(np.arange(len(goals)), max(1, -(-len(goals) // MAX_ROOMS)))
    bar = tqdm(total=n_steps * len(goals), desc=progress, disable=not progress, leave=False)
    with bar:
        parts = [
            act(
                DarkRoom(goals[rooms], model.config.grid_size, horizon),
                SlidingReader(model, len(rooms), sliding, horizon),
                n_steps,
                [np.random.default_rng((seed, room)) for room in rooms],
                bar,
            )
            for rooms in blocks
        ]
    rewards = np.concatenate(parts)  # (N, n_steps)
    return rewards.reshape(len(goals), n_episodes, horizon).sum(axis=2)


def act(
    room: Room,
    reader: Reader,
    n_steps: int,
    noises: Sequence[np.random.Generator],
    bar: tqdm | None = None,
    tasks: np.ndarray | None = None,
) -> np.ndarray:
    """Act for `n_steps` in `B` rooms together.

    Args:
        room: the rooms.
        reader: gives the logits of the actions; on its device the history lies.
        n_steps: steps, through as many episodes as that takes.
        noises: `B` generators of the action noise, one a room.
        bar: progress bar, moved on by `B` decisions a step.
        tasks: `(B,)` int, equal where two rooms are of the same task.

    Returns:
        `(B, n_steps)` rewards, of the type that the rooms give.
    """
    states = _tensor(room.reset(), reader)
    n_rooms, state_size = states.shape
    lived = Lived(n_rooms, n_steps, state_size, reader.device, states.dtype, tasks)
    rewards = []
    for t in range(n_steps):
        logits = reader.act(lived, states)  # (B, A)
        if t == 0:
            noise = np.stack([rng.gumbel(size=(n_steps, logits.shape[1])) for rng in noises])
        # The largest of logits and Gumbel noise is a draw from their softmax.
        actions = (logits.double().cpu().numpy() + noise[:, t]).argmax(axis=1)
        next_states, earned, done = room.step(actions)
        rewards.append(np.array(earned))
        next_states = _tensor(next_states, reader)
        lived.append(states, _tensor(actions, reader), _tensor(earned, reader), next_states, done)
        states = _tensor(room.reset(), reader) if done else next_states
        if bar is not None:
            bar.update(n_rooms)
    return np.stack(rewards, axis=1) if rewards else np.zeros((n_rooms, 0), dtype=np.int64)


def _tensor(values: np.ndarray, reader: Reader) -> torch.Tensor:
    """A copy on the reader's device: a room may use its arrays again."""
    return torch.tensor(np.asarray(values), device=reader.device)
