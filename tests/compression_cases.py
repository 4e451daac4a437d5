"""Histories, random and worked out by hand, for the tests of compression."""

import torch
from hypothesis import strategies as st

from historylens.history import Decision, History, episode_ids


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_history(size=2, n=12, seed=0, horizon=4, window=3):
    """Every field known; few different values, so that there are ties and repeated transitions."""
    g = generator(seed)
    rand = lambda *shape: torch.rand(*shape, generator=g)  # noqa: E731
    states = torch.randint(3, (size, n + 1, 2), generator=g)
    weights = (rand(size, n) * 4).round() / 4
    more = generator(seed + 1)  # of what came later
    heads = torch.rand(size, 2, 3, n, generator=more)
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
        head_attention=heads / heads.sum(-1, keepdim=True),
        norm=torch.rand(size, n, generator=more),
        contribution=torch.randn(size, n, generator=more),
        tasks=torch.arange(size) // 2,
        query_episodes=torch.arange(size) + 9,
    )


def histories():
    """Of any size, length, episodes and attention rows."""
    sizes = {"size": (1, 3), "n": (0, 30), "seed": (0, 2**20), "horizon": (1, 9), "window": (1, 6)}
    return st.builds(make_history, **{name: st.integers(*ends) for name, ends in sizes.items()})


def decisions_of(history):
    """The decisions whose histories these are; of no task where none is known."""
    tasks = [None] * history.size if history.tasks is None else history.tasks.tolist()
    names = ("states", "actions", "rewards", "query_states", "next_states")
    rows = zip(*(getattr(history, name).numpy() for name in names), tasks, strict=True)
    return [Decision(*row, task=task, title=f"decision {b}") for b, (*row, task) in enumerate(rows)]


def line(cells, actions=None, rewards=None, **known):
    """One history that visits cells (0, c) in the order given."""
    states = torch.tensor([[[0, cell] for cell in cells]])
    known |= {"actions": actions or [0] * len(cells), "rewards": rewards or [0] * len(cells)}
    tensors = {name: torch.tensor([value]) for name, value in known.items()}
    return History(states=states, next_states=states, **tensors)


def known(history):
    """The fields of transitions that are not None."""
    return {name: value for name, value in vars(history).items() if isinstance(value, torch.Tensor)}


def same(one, other):
    """Whether two histories know the same, bit for bit."""
    a, b = known(one), known(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
