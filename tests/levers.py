"""A task whose answer is known, without a trained model: a lever that pays at an episode's end.

An episode is `HORIZON` steps; only the last pays, and only if the right one of `N_LEVERS` is
pulled. The planted model looks at rewarded transitions alone: it pulls the lever that was rewarded
last, and any lever where it sees no reward.
"""

import numpy as np
import torch

from historylens.agent import Agent, Environment

N_LEVERS, HORIZON, N_MAX = 4, 6, 30
SURE = 50.0  # a logit that no action noise overcomes


class Levers:
    """`N` rooms with a lever each; the state is the step of the episode."""

    def __init__(self, levers):
        self.levers = np.asarray(levers)

    def reset(self):
        self.t = 0
        return self._states()

    def step(self, actions):
        last = self.t == HORIZON - 1
        self.t += 1
        return self._states(), ((actions == self.levers) & last).astype(np.int64), last

    def _states(self):
        return np.full((len(self.levers), 2), [self.t, 0])


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
    """Logits that do not depend on the history."""
    return torch.zeros(history.size, N_LEVERS)


class LeversAgent(Agent):
    """The planted model, a goal a lever."""

    decisions, n_max, layers, n_heads, label_columns = (), N_MAX, (), (), ()
    title, facts, meta = "levers", {"Checkpoint": "planted"}, {"checkpoint": "planted"}

    def __init__(self, logits=rewarded_only, n_levers=3):
        self.model, self.device, self.logits = torch.nn.Identity(), torch.device("cpu"), logits
        self.identity = {"model": logits.__name__}
        names = tuple(f"lever {number}" for number in range(n_levers))
        self.environment = Environment(names, HORIZON, Levers, (1.0,) * n_levers)

    def act(self, history, positions=None):
        return self.logits(history)
