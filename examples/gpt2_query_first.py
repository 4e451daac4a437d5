"""Adapter: Hugging Face GPT-2, the query state first, as in Decision-Pretrained Transformers.

    pip install transformers
    python visualize_attention.py --adapter examples/gpt2_query_first.py

The model (Lee et al. 2023, arXiv 2306.14892) reads the query state, then transitions, and its
output at the last of them gives the action in the query state: the last transition decides.
Yours: your model in place of `Model`, its weights in `load`, your histories in `samples`.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from historylens import Decision, History, Tokens

N_ARMS, N_MAX, WIDTH = 5, 40, 32


class Model(nn.Module):
    """GPT-2 on embedded transitions of a bandit whose state is a context of two numbers."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"n_positions": N_MAX + 1, "n_embd": WIDTH, "n_layer": 3, "n_head": 4}
        words = {"vocab_size": 1, "bos_token_id": None, "eos_token_id": None}  # it reads none
        self.embed = nn.Linear(2 + N_ARMS + 1, WIDTH)
        self.gpt2 = GPT2Model(GPT2Config(**sizes, **words, initializer_range=0.3))
        self.head = nn.Linear(WIDTH, N_ARMS)

    def forward(self, states: Tensor, actions: Tensor, rewards: Tensor, query: Tensor) -> Tensor:
        """Logits `(B, A)` from `states (B, n, 2)`, `actions`, `rewards (B, n)`, `query (B, 2)`."""
        arms = nn.functional.one_hot(actions, N_ARMS).float()
        context = torch.cat([states, arms, rewards[..., None]], dim=-1)
        first = nn.functional.pad(query, (0, N_ARMS + 1))[:, None]
        x = self.embed(torch.cat([first, context], dim=1))  # (B, 1 + n, D)
        return self.head(self.gpt2(inputs_embeds=x).last_hidden_state[:, -1])


def load() -> nn.Module:
    """The model with its weights: here random ones, and yours by `model.load_state_dict(...)`."""
    return Model()


def samples(n: int, seed: int) -> Iterator[Decision]:
    """Decisions after 12 to 40 random pulls of contextual bandits, each with its own weights."""
    rng = np.random.default_rng(seed)
    for bandit in range(n):
        size = int(rng.choice([12, 25, N_MAX]))
        states, actions = rng.normal(size=(size, 2)), rng.integers(N_ARMS, size=size)
        means = (states @ rng.normal(size=(2, N_ARMS)))[np.arange(size), actions]
        rewards, query = means + 0.1 * rng.normal(size=size), rng.normal(size=2)
        about = {"title": f"bandit {bandit}", "labels": {"bandit": bandit}}
        yield Decision(states, actions, rewards, query, **about)


def act(model: nn.Module, history: History) -> Tensor:
    """Action logits `(B, A)`."""
    return model(history.states, history.actions, history.rewards, history.query_states)


def tokens(history: History) -> Tokens:
    """The query state, then a token a transition; the last of them decides."""
    return Tokens.of(history.n, query="first", decides=-1)
