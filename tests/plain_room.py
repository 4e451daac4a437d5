"""One room in plain python, and a model that acts in it alone: the slow twins of acting."""

import numpy as np
import torch

from historylens.history import History


class PlainRoom:
    """The rules of each task, as the paper states them."""

    def __init__(self, goal, size, horizon, env="darkroom"):
        self.goal, self.size, self.horizon, self.env = tuple(goal), size, horizon, env

    def reset(self, start=None):
        self.t, self.has_key, self.is_done = 0, False, False
        self.cell = tuple(start) if start is not None else (self.size // 2, self.size // 2)
        return self.cell

    def reward(self):
        if self.env == "darkroom":
            return int(self.cell == self.goal)
        if self.is_done:
            return 0
        if self.env == "darkroom-hard":
            self.is_done = self.cell == self.goal
            return int(self.is_done)
        key, door = self.goal[:2], self.goal[2:]
        if not self.has_key:
            self.has_key = self.cell == key
            return int(self.has_key)
        self.is_done = self.cell == door
        return int(self.is_done)

    def step(self, action):
        move = [(1, 0), (-1, 0), (0, 1), (0, -1), (0, 0)][action]
        row, col = (min(max(x + d, 0), self.size - 1) for x, d in zip(self.cell, move, strict=True))
        self.cell = (row, col)
        self.t += 1
        return self.cell, self.reward(), self.t == self.horizon


@torch.no_grad()
def plain_play(model, room, noises, shown):
    """Rewards and logits of steps, one a row of `noises`, each after all before it read anew.

    `shown` makes what is read of the whole history, a python list of transitions here.
    """
    past, logits, done = [], [], True
    for t, noise in enumerate(noises):
        state = room.reset() if done else room.cell
        parts = [torch.tensor([step[k] for step in past], dtype=torch.int64) for k in range(5)]
        states, actions, rewards, reached, episodes = (part[None] for part in parts)
        shape, query = (1, t, 2), torch.tensor([state])
        history = History(states.view(shape), actions, rewards, reached.view(shape),
                          query_states=query, episodes=episodes)  # fmt: skip
        logits.append(model(*shown(history).inputs)[0])
        action = int(np.argmax(logits[-1].numpy() + noise))
        reached, reward, done = room.step(action)
        past.append((state, action, reward, reached, t // room.horizon))
    return [step[2] for step in past], torch.stack(logits)
