"""Random histories for the tests of compression."""

from dataclasses import fields

import torch
from hypothesis import strategies as st

from historylens.history import Decision, History, episode_ids


def make_history(size=2, n=12, seed=0, horizon=4, window=3):
    """Every field known; few different values, so that there are ties and repeated transitions."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=g)  # noqa: E731
    states = torch.randint(3, (size, n + 1, 2), generator=g)
    weights = (rand(size, n) * 4).round() / 4
    return History(
        states=states[:, :-1],
        actions=torch.randint(3, (size, n), generator=g),
        rewards=(rand(size, n) < 0.3).long(),
        next_states=states[:, 1:],
        query_states=states[:, -1],
        episodes=episode_ids(n, horizon, seed % horizon).expand(size, -1),
        received=(rand(size, n) * 4).round(),
        last_rows=rand(size, min(window, n), n),
        query_attention=weights / weights.sum(1, keepdim=True).clamp(min=1),
        tasks=torch.arange(size) // 2,
    )


@st.composite
def histories(draw, max_n=30):
    return make_history(
        size=draw(st.integers(1, 3)),
        n=draw(st.integers(0, max_n)),
        seed=draw(st.integers(0, 2**20)),
        horizon=draw(st.integers(1, 9)),
        window=draw(st.integers(1, 6)),
    )


def decisions_of(history):
    """The decisions whose histories these are; of no task where none is known."""
    tasks = [None] * history.size if history.tasks is None else history.tasks.tolist()
    names = ("states", "actions", "rewards", "query_states", "next_states")
    parts = [getattr(history, name).numpy() for name in names]
    return [
        Decision(*(part[b] for part in parts), task=task, title=f"decision {b}")
        for b, task in enumerate(tasks)
    ]


def line(cells, actions=None, rewards=None, **known):
    """One history that visits cells (0, c) in the order given."""
    cells = torch.tensor(cells)
    states = torch.stack([torch.zeros_like(cells), cells], dim=1)[None]
    empty = [0] * len(cells)
    return History(
        states,
        torch.tensor([actions or empty]),
        torch.tensor([rewards or empty]),
        states,
        **{name: torch.tensor([value]) for name, value in known.items()},
    )


def known(history):
    """The fields that are not None."""
    return {f.name: v for f in fields(history) if (v := getattr(history, f.name)) is not None}


def same(one, other):
    """Whether two histories know the same, bit for bit."""
    a, b = known(one), known(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
