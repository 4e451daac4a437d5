"""Adapter: three tokens a transition (state, action, reward) and `nn.MultiheadAttention`.

    python visualize_attention.py --adapter examples/sar_mha.py
    python compare_compression.py --adapter examples/sar_mha.py      # pip install gymnasium

Yours: your model in place of `Model`, its weights in `load`, your histories in `samples`.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from historylens import Decision, History, Tokens

N_CELLS, WIDTH, N_HEADS = 9, 32, 4
N_MAX = 30  # transitions that the model can read


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, N_HEADS, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x (B, T, D)`."""
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.feed(self.norms[1](x))


class Model(nn.Module):
    """Reads s, a, r, s, a, r, ..., s and gives the logits of the next action."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.action = nn.Embedding(N_CELLS, WIDTH), nn.Embedding(2, WIDTH)
        self.reward = nn.Linear(1, WIDTH)
        self.position = nn.Parameter(torch.randn(3 * N_MAX + 1, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, states: Tensor, actions: Tensor, rewards: Tensor, query: Tensor) -> Tensor:
        """Logits `(B, A)` from `states`, `actions`, `rewards (B, n)` and the `query (B,)` state."""
        parts = [self.state(states), self.action(actions), self.reward(rewards[..., None])]
        x = torch.stack(parts, dim=2).flatten(1, 2)  # (B, 3 n, D)
        x = torch.cat([x, self.state(query)[:, None]], dim=1)  # (B, T, D)
        x = x + self.position[: x.shape[1]]
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x[:, -1])


def load() -> nn.Module:
    """The model with its weights: here random ones, and yours by `model.load_state_dict(...)`."""
    return Model()


def samples(n: int, seed: int) -> Iterator[Decision]:
    """Decisions after three episodes of random play in a corridor of which one end pays."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        actions, task = rng.integers(2, size=N_MAX), i % len(GOALS)
        states, next_states = np.zeros((2, N_MAX), dtype=int)
        for t in range(N_MAX):
            states[t] = N_CELLS // 2 if t % HORIZON == 0 else next_states[t - 1]
            next_states[t] = np.clip(states[t] + 2 * actions[t] - 1, 0, N_CELLS - 1)
        rewards, episodes = next_states == task * (N_CELLS - 1), np.arange(N_MAX) // HORIZON
        about = {"title": f"{GOALS[task]} pays", "labels": {"goal": GOALS[task]}, "task": task}
        yield Decision(states, actions, rewards, N_CELLS // 2, next_states, episodes, **about)


def act(model: nn.Module, history: History) -> Tensor:
    """Action logits `(B, A)`; a discrete state is the one column of `states (B, n, 1)`."""
    states, query = history.states[..., 0], history.query_states[:, 0]
    return model(states, history.actions, history.rewards, query)


def tokens(history: History) -> Tokens:
    """Three tokens a transition, then the query, which decides."""
    return Tokens.of(history.n, parts=("state", "action", "reward"))


def position(state: np.ndarray) -> tuple[int, int]:
    """The corridor is a room of one row: for a map of where in it the attention lies."""
    return 0, int(state[0])


# For compare_compression.py: the tasks, the steps of an episode, and environments for tasks.
GOALS = ("left end", "right end")
HORIZON = 10


def make_env(goals: list[int]):  # noqa: ANN201 - needs gymnasium only when it is called
    """Environments that step together; entry i plays the task `GOALS[goals[i]]`."""
    from corridor import Corridor
    from gymnasium.vector import SyncVectorEnv

    return SyncVectorEnv([lambda goal=goal: Corridor(GOALS[goal]) for goal in goals])
