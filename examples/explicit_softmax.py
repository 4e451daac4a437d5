"""Adapter: attention written out, with an `nn.Softmax`; query first, and padding behind.

    python visualize_attention.py --adapter examples/explicit_softmax.py

The model sees its whole input at once, always of the same length: a shorter history is padded.
Yours: your model in place of `Model`, its weights in `load`, your histories in `samples`.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad

from historylens import Decision, History, Tokens

N_CELLS, N_ACTIONS, N_MAX = 16, 4, 24
WIDTH, N_HEADS = 32, 2


class Attention(nn.Module):
    """Scores, softmax and weighted sum. The softmax is a module, so that it can be looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, is_padding: Tensor) -> Tensor:
        """`x (B, T, D)`, `is_padding (B, T)` bool."""
        parts = self.project(x).chunk(3, dim=-1)
        q, k, v = (p.unflatten(-1, (N_HEADS, -1)).transpose(1, 2) for p in parts)  # (B, H, T, d)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        weights = self.softmax(scores.masked_fill(is_padding[:, None, None], -torch.inf))
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """The query, then transitions, then padding; the query's output gives the action."""

    def __init__(self) -> None:
        super().__init__()
        self.state = nn.Embedding(N_CELLS, WIDTH)
        self.rest = nn.Linear(N_ACTIONS + 1, WIDTH)
        self.position = nn.Parameter(torch.randn(N_MAX + 1, WIDTH))
        self.attentions = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(WIDTH, N_ACTIONS)

    def forward(self, query: Tensor, context: list[Tensor], is_padding: Tensor) -> Tensor:
        """Logits `(B, A)` from `query (B,)` and padded `states, actions, rewards (B, N_MAX)`."""
        states, actions, rewards = context
        rest = torch.cat([one_hot(actions, N_ACTIONS), rewards[..., None]], dim=-1)
        x = self.state(states) + self.rest(rest)
        x = torch.cat([self.state(query)[:, None], x], dim=1) + self.position
        for attention in self.attentions:
            x = x + attention(x, pad(is_padding, (1, 0)))
        return self.head(x[:, 0])


def load() -> nn.Module:
    """The model with its weights: here random ones, and yours by `model.load_state_dict(...)`."""
    return Model()


def samples(n: int, seed: int) -> Iterator[Decision]:
    """Decisions after 8, 16 and 24 transitions between random cells."""
    rng = np.random.default_rng(seed)
    for number in range(n):
        size = 8 * (1 + number % 3)
        states = rng.integers(N_CELLS, size=size + 1)
        actions, episodes = rng.integers(N_ACTIONS, size=size), np.arange(size) // 8
        about = {"title": f"decision {number}", "labels": {"number": number}}
        yield Decision(states[:-1], actions, states[1:] == 0, states[-1], None, episodes, **about)


def act(model: nn.Module, history: History) -> Tensor:
    """Action logits `(B, A)`, the history padded to `N_MAX` transitions."""
    parts = history.states[..., 0], history.actions, history.rewards
    padded = [pad(part, (0, N_MAX - history.n)) for part in parts]
    is_padding = torch.arange(N_MAX, device=history.device) >= history.n
    return model(history.query_states[:, 0], padded, is_padding.expand(history.size, -1))


def tokens(history: History) -> Tokens:
    """The query, which decides; a token a transition; padding."""
    n, more = history.n, N_MAX - history.n
    part = ["query", *["transition"] * n, *["padding"] * more]
    return Tokens([-1, *range(n), *[-1] * more], part, decides=0)
