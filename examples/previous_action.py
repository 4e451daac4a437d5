"""Adapter: steps of (previous action, previous reward, state), as recurrent meta-RL reads them.

    python visualize_attention.py --adapter examples/previous_action.py

What a transition brought stands in the step that follows, so its own state and its action are two
or more tokens apart, and the query's step holds the last action and reward before its state. The
model (RL^2, Duan et al. 2016, arXiv 1611.02779, as a transformer) is PyTorch's own encoder.
Yours: your model in place of `Model`, its weights in `load`, your histories in `samples`.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from historylens import Decision, History, Tokens

N_ARMS, N_MAX, WIDTH = 4, 20, 24


class Model(nn.Module):
    """Three tokens a step; the first step has a start token for the action, and reward 0."""

    def __init__(self) -> None:
        super().__init__()
        self.action, self.reward = nn.Embedding(N_ARMS + 1, WIDTH), nn.Linear(1, WIDTH)
        self.state = nn.Linear(2, WIDTH)
        self.position = nn.Parameter(torch.randn(3 * (N_MAX + 1), WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, N_ARMS)

    def forward(self, states: Tensor, actions: Tensor, rewards: Tensor, query: Tensor) -> Tensor:
        """Logits `(B, A)` from `states (B, n, 2)`, `actions`, `rewards (B, n)`, `query (B, 2)`."""
        before = nn.functional.pad(actions, (1, 0), value=N_ARMS)  # (B, n + 1)
        gained = nn.functional.pad(rewards.float(), (1, 0))[..., None]
        now = torch.cat([states, query[:, None]], dim=1).float()
        parts = [self.action(before), self.reward(gained), self.state(now)]
        x = torch.stack(parts, dim=2).flatten(1, 2)  # (B, T, D), T = 3 (n + 1)
        x = x + self.position[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.head(self.encoder(x, mask, is_causal=True)[:, -1])


def load() -> nn.Module:
    """The model with its weights: here random ones, and yours by `model.load_state_dict(...)`."""
    return Model()


def samples(n: int, seed: int) -> Iterator[Decision]:
    """Decisions after 20 random pulls of a bandit of which one arm pays, in changing contexts."""
    rng = np.random.default_rng(seed)
    for task in range(n):
        states, actions = rng.normal(size=(N_MAX, 2)), rng.integers(N_ARMS, size=N_MAX)
        rewards = actions == task % N_ARMS
        title = f"arm {task % N_ARMS} pays"
        yield Decision(states, actions, rewards, rng.normal(size=2), title=title, task=task)


def act(model: nn.Module, history: History) -> Tensor:
    """Action logits `(B, A)`."""
    return model(history.states, history.actions, history.rewards, history.query_states)


def tokens(history: History) -> Tokens:
    """The last state decides; the action and reward before it are still of a transition."""
    return Tokens.of(history.n, parts=("previous action", "previous reward", "state"))
