"""A task whose answer is known, without a trained model: a lever that pays at an episode's end.

The last of `HORIZON` steps pays if the right one of `N_LEVERS` is pulled. The planted model pulls
the lever that was rewarded last, and any where it sees no reward.
"""

import numpy as np
import torch

from historylens.agent import Agent, Environment

N_LEVERS, HORIZON, N_MAX = 4, 6, 30
SURE = 50.0  # a logit that no action noise overcomes


class Levers:
    """`N` rooms with a lever each; the state is the step of the episode."""

    horizon = HORIZON

    def __init__(self, levers, seeds=()):
        self.levers = np.asarray(levers)

    def reset(self):
        self.states = np.zeros((len(self.levers), 2), dtype=int)
        return self.states

    def step(self, actions):
        self.states = self.states + [1, 0]
        last = self.states[0, 0] == HORIZON
        return self.states, ((actions == self.levers) & last).astype(np.int64), last


def rewarded_only(history):
    """Logits `(B, N_LEVERS)` of the model that reads nothing but rewarded transitions."""
    logits = torch.zeros(history.size, N_LEVERS)
    if history.n:
        latest = (history.rewards > 0) * torch.arange(1, history.n + 1)
        chosen = history.actions.gather(1, latest.argmax(dim=1, keepdim=True)).long()
        seen = latest.amax(dim=1, keepdim=True) > 0
        logits.scatter_(1, chosen, seen * SURE)
    return logits


def ignores_history(history):
    return torch.zeros(history.size, N_LEVERS)


class LeversAgent(Agent):
    decisions, n_max, layers, n_heads = (), N_MAX, (), ()
    title, facts, meta = "levers", {"Checkpoint": "planted"}, {"checkpoint": "planted"}

    def __init__(self, logits=rewarded_only, n_levers=3):
        self.model, self.device, self.logits = torch.nn.Identity(), torch.device("cpu"), logits
        self.identity = {"model": logits.__name__}
        names = tuple(f"lever {number}" for number in range(n_levers))
        self.environment = Environment(names, HORIZON, Levers, (1.0,) * n_levers)

    def act(self, history, positions=None):
        return self.logits(history)
