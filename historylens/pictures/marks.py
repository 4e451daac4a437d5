"""What both pictures of a sample say of it: which decision it is, its episodes and its rewards.

starts, rewarded = on_tokens(decision, tokens)
colours = history_colours(starts, rewarded, cells=np.arange(len(tokens)))    # (T, 3)
"""

import numpy as np

from historylens.history import Decision
from historylens.pictures.page import REWARD
from historylens.tokens import PADDING, Tokens

EPISODE_GREYS = (200, 238)
MAX_EPISODE_LINES = 40  # more boundaries than this hide what they mark


def subtitle(decision: Decision, tokens: Tokens) -> str:
    """The line that says which decision a picture shows, and how long its context is."""
    n_tokens = len(tokens) - tokens.part.count(PADDING)
    query = " and the query: " if tokens.is_plain else ", "
    transitions = "1 transition" if tokens.n == 1 else f"{tokens.n:,} transitions"
    return f"{decision.title} · {transitions}{query}T = {n_tokens:,} tokens"


def on_tokens(decision: Decision, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Where episodes start, and what was rewarded, on tokens in place of transitions.

    Args:
        decision: the decision.
        tokens: in the order of time, the one that decides last.

    Returns:
        `(E,)` int, tokens at which an episode begins, ascending; and `(T - 1,)` bool, rewarded
        tokens, without the one that decides.
    """
    transition = tokens.transition[:-1]
    starts = np.searchsorted(np.maximum.accumulate(transition), decision.episode_starts)
    starts = np.unique(starts[starts < len(transition)])
    return starts, np.append(decision.rewarded, False)[transition]


def history_colours(starts: np.ndarray, rewarded: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Colours of a strip that shows the history: episodes in two greys, rewards in red.

    Args:
        starts: `(E,)` int, tokens at which an episode begins, ascending.
        rewarded: `(N,)` bool, rewarded tokens; the query is token `N`.
        cells: `(C,)` int, first token of each cell of the strip, ascending.

    Returns:
        `(C, 3)` uint8 RGB. A cell of several tokens is as red as their share that was rewarded;
        the query is white. One grey throughout where episodes are too many to tell apart.
    """
    if len(starts) > MAX_EPISODE_LINES:
        starts = starts[:1]
    grey = np.take(EPISODE_GREYS, np.searchsorted(starts, cells, side="right") % 2)
    n_rewarded = np.add.reduceat(np.append(rewarded, False).astype(float), cells)
    share = n_rewarded / np.diff(np.append(cells, len(rewarded) + 1))
    red = np.array(list(bytes.fromhex(REWARD[1:])))
    colours = grey[:, None] + share[:, None] * (red - grey[:, None])
    colours[cells >= len(rewarded)] = 255
    return np.rint(colours).astype(np.uint8)
