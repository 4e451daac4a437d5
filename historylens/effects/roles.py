"""What each head reads: a role for each, against what uniform attention would read.

    role = roles_of(rows, visible, tokens, history, actions)[0]             # of head 0
    role.name, role.text             # "rewarded", "83% on rewarded transitions, evenly 21%"

A head counts as a mixture of the readings in `ROLES`, each even over its own tokens. Their parts
make the rows likeliest (by expectation maximisation: Dempster, Laird and Rubin 1977). A role has a
part of at least `MAIN`; "uniform" an entropy of `EVENNESS` of that of even reading, too. A head
without any is "mixed". Of readings with the same tokens in all decisions only the first in `ROLES`
counts. Where no role has that part, "same state" has that of "same state and action" as well. Where
a reading has no tokens, or nearly all, its part is left to sink and uniform.

Axes: `B` decisions, `H` heads, `T` tokens, `n` transitions, `C` readings, `U` sets of like tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from historylens.history import History
from historylens.metrics import NAMES, measure
from historylens.tokens import NONE, Tokens, sum_rows, uniform_rows

MAIN = 0.6  # part of all attention
EVENNESS = 0.9  # entropy over that of even reading
NEARLY_ALL = 0.9  # of the tokens: a reading of so many says nothing of a decision
SELDOM = 0.1  # of the decisions: a reading that has tokens in fewer is left out
N_ROUNDS = 150  # of the fit
EPSILON = 1e-12


@dataclass(frozen=True)
class Role:
    """What a head reads, in figures that are means over the decisions that have such tokens."""

    name: str  # of `ROLES`, or "mixed", whose figures are those of its largest part
    share: float  # of all attention; of "uniform" the entropy, of that of even reading
    even: float  # the same of uniform attention
    part: float  # of the mixture, the figure that fired
    text: str  # share and even in words


class Keys:
    """What the queries of `B` decisions may read: the tokens `(B, T)` bool of each kind."""

    def __init__(
        self, visible: np.ndarray, tokens: Sequence[Tokens], history: History, actions: np.ndarray
    ) -> None:
        self.visible, self.tokens, self.n = visible, tokens, history.n
        self.transition = np.stack([one.transition for one in tokens])  # (B, T)
        self.history = visible & (self.transition != NONE)
        self.rewarded = history.rewarded.cpu().numpy()  # (B, n), as what follows
        self.same = history.same_state.cpu().numpy()
        self.acted = history.actions.cpu().numpy() == np.asarray(actions)[:, None]
        known = history.episodes is not None
        self.episodes = history.episodes.cpu().numpy() if known else 0 * self.same

    def of(self, chosen: np.ndarray) -> np.ndarray:
        """Those of transitions `(B, n)` or `(n,)` bool."""
        chosen = np.broadcast_to(chosen, self.same.shape)
        return np.take_along_axis(chosen, self.transition.clip(0), axis=1) & self.history

    def latest(self, divisor: int) -> np.ndarray:
        """Those of the latest `n // divisor` transitions, at least 1."""
        return self.of(np.arange(self.n) >= self.n - max(1, self.n // divisor))

    def first(self) -> np.ndarray:
        """Those of the transition of the first token of history, unless it is the latest."""
        first = np.take_along_axis(self.transition, self.history.argmax(1)[:, None], axis=1)
        return self.history & (self.transition == first) & ~self.latest(self.n)

    def starts(self) -> np.ndarray:
        """Those of the first transition of each episode; of the oldest if no other is longer."""
        starts = np.diff(self.episodes, axis=1, prepend=self.episodes[:, :1]) != 0
        lengths = [np.unique(episodes, return_counts=True)[1] for episodes in self.episodes]
        starts[:, 0] = [len(one) > 1 and one[0] == one.max() for one in lengths]
        return self.of(starts)

    def following(self) -> list[np.ndarray]:
        """Those after a token that holds this state, of the next transition, and if of another."""
        found = np.zeros_like(self.visible)
        for here, same, one in zip(found, self.same, self.tokens, strict=True):
            # The token named so, or the first of its transition, holds its state.
            other = ["state" not in name and "obs" not in name for name in one.part]
            order = np.lexsort((other, one.transition))
            holds = order[np.searchsorted(one.transition[order], range(self.n))]  # (n,)
            time = one.transition.argsort(kind="stable")  # tokens of no transition come first
            after = np.append(time, NONE)[time.argsort()[holds] + 1][same]
            here[after[after != NONE]] = True
        later = self.of(np.pad(self.same[:, :-1], ((0, 0), (1, 0))))
        return [found & self.history, later, later & ~self.of(self.same)]


# Name -> what it reads in words, and the ways of reading it: tokens (B, T) bool each. Its figures
# are those of any of them, np.any(ways, axis=0).
ROLES: dict[str, tuple[str, Callable[[Keys], list[np.ndarray]]]] = {
    "sink": ("on itself or the first transition", lambda k: [k.visible & ~k.history, k.first()]),
    "recency": ("on the latest quarter", lambda k: [k.latest(i) for i in (4, 10, k.n)]),
    "rewarded": ("on rewarded transitions", lambda k: [k.of(k.rewarded)]),
    "same state": ("on transitions from this state", lambda k: [k.of(k.same)]),
    "same state and action": ("on this action in this state", lambda k: [k.of(k.same & k.acted)]),
    "episode start": ("on first transitions of episodes", lambda k: [k.starts()]),
    "induction": ("on what followed this state before", lambda k: k.following()),
    "uniform": ("of the entropy of even reading", lambda k: [k.visible]),
}


def roles_of(
    rows: np.ndarray, visible: np.ndarray, tokens: Sequence[Tokens], history: History, actions: Any
) -> list[Role]:
    """A role for each of `H` heads, from attention rows of the query token `(B, H, T)`.

    What one lacks to 1 lies on keys that are no tokens (learned sinks), and counts as on the query
    token. `visible (B, T)` bool: keys that the mask lets the query see. `history` is without
    padding; `actions (B,)` int are the most likely ones now.
    """
    rows = np.append(rows, uniform_rows(visible)[:, None], axis=1)  # (B, H + 1, T)
    rows[range(len(rows)), :, [one.decides for one in tokens]] += np.clip(1 - rows.sum(-1), 0, 1)
    keys = Keys(visible, tokens, history, actions)
    masks = [np.stack(read(keys)) for _, read in ROLES.values()]
    names = np.repeat(list(ROLES), [len(ways) for ways in masks])  # (C,)
    fitted = _fit(rows, np.concatenate(masks), np.isin(names, ("sink", "uniform")))
    parts = np.stack([fitted[:, names == name].sum(1) for name in ROLES], axis=1)
    held = np.einsum("rbt,bht->bhr", [ways.any(0) for ways in masks], rows)
    says = held[:, -1] > 0  # of uniform attention
    shares = (held * says[:, None]).sum(0) / np.maximum(says.sum(0), 1)  # as parts
    entropy = measure(sum_rows(rows, tokens), False, False)[..., NAMES.index("normalised_entropy")]
    shares[:, -1] = (entropy / np.maximum(entropy[:, -1:], EPSILON)).mean(0)
    return [_role(part, share, shares[-1]) for part, share in zip(parts, shares, strict=True)][:-1]


def _role(part: np.ndarray, share: np.ndarray, even: np.ndarray) -> Role:
    names = list(ROLES)
    state, action = names.index("same state"), names.index("same state and action")
    if part.max() < MAIN:
        part[state], part[action] = part[state] + part[action], 0
    most, second = np.argsort(-part, kind="stable")[:2]
    texts = [f"{share[i]:.0%} {ROLES[names[i]][0]}, evenly {even[i]:.0%}" for i in (most, second)]
    fires = part[most] >= MAIN and (names[most] != "uniform" or share[most] >= EVENNESS)
    name, text = (names[most], texts[0]) if fires else ("mixed", "; ".join(texts))
    return Role(name, float(share[most]), float(even[most]), float(part[most]), text)


def _fit(rows: np.ndarray, masks: np.ndarray, rests: np.ndarray) -> np.ndarray:
    """Parts `(H, C)` of masks `(C, B, T)`, the last of all keys, in rows `(B, H, T)`.

    Those that rest, `(C,)` bool, share in every decision what others leave.
    """
    sizes = masks.sum(-1)  # (C, B)
    says = (sizes > 0) & (rests[:, None] | (sizes < NEARLY_ALL * sizes[-1]))
    masks = masks & (says & (says.mean(1, keepdims=True) >= SELDOM))[..., None]
    first = np.unique(masks.reshape(len(masks), -1), axis=0, return_index=True)[1]
    masks[~np.isin(np.arange(len(masks)), first)] = False
    # Tokens of the same readings count as one: weights (B, H, U), densities (B, C, U).
    codes = np.tensordot(2 ** np.arange(len(masks)), masks, axes=1)  # (B, T)
    sets = np.stack([np.unique(code, return_inverse=True)[1] for code in codes])
    cells = np.eye(sets.max() + 1)[sets]  # (B, T, U)
    weights = (0.999 * rows + 0.001 * uniform_rows(masks[-1])[:, None]) @ cells  # none impossible
    density = (masks.swapaxes(0, 1) @ cells > 0) / np.maximum(sizes.T, 1)[..., None]
    says = masks.any(-1).T[:, None]  # (B, 1, C)
    own = np.tile(np.where(rests, 0, 0.01), (rows.shape[1], 1)) * says.any(0)  # claims little
    idle = np.tile(np.append(0.01 * rests[:-1], 1), (len(own), 1)) * says.any(0)
    for _ in range(N_ROUNDS):
        used = own * says  # (B, H, C)
        left = 1 - used.sum(-1, keepdims=True)
        used = used + idle * left
        got = used * (weights / np.maximum(used @ density, EPSILON) @ density.swapaxes(1, 2))
        spare = (got * rests).sum(-1, keepdims=True) / np.maximum(left, EPSILON)
        own = (np.where(says, got, spare * own) * ~rests).mean(0)
        idle = (got * rests).sum(0)
        idle /= idle.sum(1, keepdims=True)
    return own + idle * (1 - own.sum(1, keepdims=True))
