"""Adapter: rotary positions, grouped-query heads and `scaled_dot_product_attention`.

    python visualize_attention.py --adapter examples/rotary_sdpa.py

One token a transition and the query last, so the adapter needs no `tokens`; continuous states.
Yours: your model in place of `Model`, its weights in `load`, your histories in `samples`.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, scaled_dot_product_attention

from historylens import Decision, History

STATE, N_ACTIONS, N_MAX = 3, 4, 50
WIDTH, N_HEADS, N_GROUPS = 48, 6, 2
DIM = WIDTH // N_HEADS


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of `x (B, H, T, d)`."""
    half = x.shape[-1] // 2
    speed = 100.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[2], device=x.device)[:, None] * speed  # (T, d / 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


class Attention(nn.Module):
    """Causal attention in which `N_HEADS` heads share the keys and values of `N_GROUPS`."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [N_HEADS * DIM, N_GROUPS * DIM, N_GROUPS * DIM]
        self.project, self.out = nn.Linear(WIDTH, sum(self.sizes)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, T, D)`."""
        parts = self.project(x).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, DIM)).transpose(1, 2) for part in parts)  # (B, H, T, d)
        y = scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Embedded transitions, the query state, three layers of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2 * STATE + N_ACTIONS + 1, WIDTH)
        self.embed_query = nn.Linear(STATE, WIDTH)
        self.attentions = nn.ModuleList(Attention() for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, N_ACTIONS)

    def forward(self, transitions: Tensor, query: Tensor) -> Tensor:
        """Logits `(B, A)` from `transitions (B, n, 2 S + A + 1)` and the `query (B, S)` state."""
        x = torch.cat([self.embed(transitions), self.embed_query(query)[:, None]], dim=1)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(2 * norm(x))
        return self.head(x[:, -1])


def load() -> nn.Module:
    """The model with its weights: here random ones, and yours by `model.load_state_dict(...)`."""
    return Model()


def samples(n: int, seed: int) -> Iterator[Decision]:
    """Decisions in random walks of three numbers, rewarded where the first number is high."""
    rng = np.random.default_rng(seed)
    for walk in range(n):
        states = rng.normal(size=(N_MAX + 1, STATE)).cumsum(axis=0) / 5
        actions, rewards = rng.integers(N_ACTIONS, size=N_MAX), states[1:, 0] > 0.5
        episodes = np.arange(N_MAX) // 25
        about = {"episodes": episodes, "title": f"walk {walk}", "labels": {"walk": walk}}
        yield Decision(states[:-1], actions, rewards, states[-1], **about)


def act(model: nn.Module, history: History) -> Tensor:
    """Action logits `(B, A)`."""
    parts = [history.states, one_hot(history.actions, N_ACTIONS), history.rewards[..., None]]
    return model(torch.cat([*parts, history.next_states], dim=-1), history.query_states)
