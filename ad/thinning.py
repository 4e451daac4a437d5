"""History dropout: training windows whose history is thinned, as compression thins it.

A long history is thinned by a method of `historylens.compression`, a few real transitions follow,
and the loss is that of the decisions from the thinning on. Prefixes of what was kept are no
decisions to learn from: a transition that is kept because of what came later, as one of a good
episode, would teach the actions of a selection, not of the learner.
"""

import numpy as np
import torch
from torch import Tensor

from dataset import CONTEXT, ADDataset, Batch, Rng
from historylens.compression import METHODS
from historylens.compression.method import Method
from historylens.history import History, episode_ids

# Methods that look at nothing but the history, keep exactly what is asked, and are fast.
TRAINED_ON = (
    "random", "random-recent", "recent", "first-recent", "decay", "decay-spaced", "even",
    "one-visit", "rewarded-recent", "best-episodes", "nearest",
)  # fmt: skip
FEWEST_READ = 5  # transitions, unless the model reads no more than fewer
MOST_FOLLOWING = 9  # transitions between the thinning and the last decision
N_THINNINGS = 8  # in one batch, each of a method and a length of its own
MOST_TIMES = 8  # more windows than in other batches


def draw_batch(dataset: ADDataset, batch_size: int, history_dropout: float, rng: Rng) -> Batch:
    """Draw a training batch, one of thinned histories with a chance of `history_dropout`."""
    if history_dropout and rng.random() < history_dropout:  # at 0 nothing is drawn for it
        return sample_thinned(dataset, batch_size, rng)
    return dataset.sample(batch_size, rng)


def sample_thinned(dataset: ADDataset, batch_size: int, rng: Rng) -> Batch:
    """Draw a training batch of thinned histories, with the decisions from the thinning on.

    The model reads `n` transitions in all of them, `n` log-uniform up to the longest context; the
    last few, at most half, lie between the thinning and the last decision. What is thinned is
    log-uniformly long, up to a whole learning history. Shorter windows come in larger batches, 1 to
    8 times `batch_size`, of about as many tokens as full windows with all their queries.
    """
    longest = dataset.n_context
    n_read = _log_uniform(min(FEWEST_READ, longest), longest, rng)
    n_following = int(rng.integers(min(MOST_FOLLOWING, n_read // 2), endpoint=True))
    times = round((2 * longest + 1) / (n_read + n_following + 1))
    n_windows = batch_size * min(max(times, 1), MOST_TIMES)
    n_keep, horizon, parts = n_read - n_following, dataset.histories.horizon, []
    for rows in np.array_split(np.arange(n_windows), min(N_THINNINGS, n_windows)):
        method = METHODS[TRAINED_ON[rng.integers(len(TRAINED_ON))]]
        n_past = _log_uniform(n_keep, dataset.histories.n_steps - 1 - n_following, rng)
        histories, steps, context = dataset.draw(len(rows), n_past + n_following, rng)
        episodes = episode_ids(n_past + n_following, horizon, steps % horizon)
        window = dataset.gather(histories, steps, context)
        parts.append(thin(window, episodes, method, n_keep, n_following, rng))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def thin(
    window: Batch, episodes: Tensor, method: Method, n_keep: int, n_following: int, rng: Rng
) -> Batch:
    """Thin the history of windows `n_following` transitions before their decision.

    Of the `m` transitions in windows of `ADDataset.gather`, of `episodes` `(B, m)`, a `method` like
    `TRAINED_ON` keeps `n_keep` of the first `m - n_following`; the others all stay.
    """
    n_past = window["actions"].shape[1] - n_following
    past = (window[name][:, :n_past] for name in CONTEXT)
    history = History(*past, window["query_states"][:, n_past], episodes[:, :n_past])
    kept = method.compress(history, n_keep, rng)
    thinned = {name: values[:, n_past:] for name, values in window.items()}
    return thinned | {k: torch.cat([getattr(kept, k), thinned[k]], dim=1) for k in CONTEXT}


def _log_uniform(low: int, high: int, rng: Rng) -> int:
    return int(low * ((high + 1) / low) ** rng.random())
