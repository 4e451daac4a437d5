"""A transformer wired by hand: what each head reads, and what it adds, is known.

The stream of a token: the action taken (3), the action that a head brings (3), and a copy (3).
"""

import torch
from torch import nn
from torch.nn import functional

from historylens.agent import Agent
from historylens.history import Decision

OWN, BROUGHT, COPY, ELSEWHERE = slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12)
WIDTH, N, REWARDED = 12, 20, (2, 5, 6)


def rewarded(history, n_tokens):
    """Every token reads the rewarded transitions."""
    wanted = functional.pad(history.rewarded.double(), (0, 1))
    return wanted[:, None].expand(-1, n_tokens, -1)


def latest(history, n_tokens):
    """Every token reads the one before it."""
    return torch.eye(n_tokens).roll(-1, 1).expand(history.size, -1, -1).double()


def rewarded_but_the_query(history, n_tokens):
    """The query reads itself, and all others the rewarded transitions."""
    wanted = rewarded(history, n_tokens).clone()
    wanted[:, -1] = torch.eye(n_tokens)[-1]
    return wanted


class Layer(nn.Module):
    """Heads of `(what is read, from which part of the stream, to which part)`."""

    def __init__(self, *heads):
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(3 * len(heads), WIDTH, bias=False)
        with torch.no_grad():
            self.project.weight.zero_()
            for i, (_, _, into) in enumerate(heads):
                self.project.weight[into, 3 * i : 3 * i + 3] = torch.eye(3)

    def forward(self, x, history):
        n_tokens = x.shape[1]
        values = torch.stack([x[..., part] for _, part, _ in self.heads], 1)  # (B, H, T, 3)
        ahead = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1)
        read = torch.stack([rule(history, n_tokens) for rule, _, _ in self.heads], 1)
        mask = (read + 1e-9).log().masked_fill(ahead, -torch.inf).float()
        zeros = torch.zeros_like(values)
        y = functional.scaled_dot_product_attention(zeros, zeros, values, attn_mask=mask)
        return x + self.project(y.transpose(1, 2).flatten(2))


class Wired(nn.Module):
    """Layers, then the logits: 8 times what `decide` makes of the query's stream."""

    def __init__(self, *layers, decide=lambda stream: stream[:, BROUGHT]):
        super().__init__()
        self.layers, self.decide = nn.ModuleList(layers), decide

    def forward(self, history):
        x = torch.zeros(history.size, history.n + 1, WIDTH)
        x[:, :-1, OWN] = functional.one_hot(history.actions, 3).float()
        for layer in self.layers:
            x = layer(x, history)
        return 8 * self.decide(x[:, -1])


class WiredAgent(Agent):
    """Six decisions of three tasks; of task `g` the rewarded transitions took action `g`."""

    facts, meta = {}, {}
    title, device, n_max = "wired", torch.device("cpu"), N

    def __init__(self, *layers, n_decisions=6, **options):
        self.model = Wired(*layers, **options).eval()
        self.layers = [f"layers.{i}" for i in range(len(layers))]
        self.n_heads = [len(layer.heads) for layer in layers]
        g = torch.Generator().manual_seed(0)
        self.decisions = [self.decision(i % 3, g) for i in range(n_decisions)]

    def decision(self, task, g):
        rewards = torch.zeros(N, dtype=torch.int64)
        rewards[list(REWARDED)] = 1
        actions = torch.randint(3, (N,), generator=g)
        actions[list(REWARDED)], actions[-1] = task, (task + 1) % 3
        states = torch.randint(4, (N + 1, 2), generator=g)
        parts = [x.numpy() for x in (states[:-1], actions, rewards, states[-1], states[1:])]
        return Decision(*parts, task=task)

    @torch.inference_mode()
    def act(self, history, positions=None):
        return self.model(history)


def one_decides(**options):
    """Head 0 brings the rewarded action; head 1 reads the latest transition, to no effect."""
    return WiredAgent(Layer((rewarded, OWN, BROUGHT), (latest, OWN, ELSEWHERE)), **options)


def backed_up(**options):
    """Either head suffices: the larger of what both bring decides."""
    heads = (rewarded, OWN, BROUGHT), (rewarded, OWN, ELSEWHERE)
    both = lambda x: torch.maximum(x[:, BROUGHT], x[:, ELSEWHERE])  # noqa: E731
    return WiredAgent(Layer(*heads), decide=both, **options)


def copied(**options):
    """Layer 0 copies the rewarded action to all other tokens; the query reads the latest copy."""
    first = Layer((rewarded_but_the_query, OWN, COPY))
    return WiredAgent(first, Layer((latest, COPY, BROUGHT)), **options)
