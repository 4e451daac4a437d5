"""How attention changes while an agent plays and gets better.

    learning = over_learning(play, layers=[0, 1, 2, 3], seed=0)
    print(learning_text(learning))
    learning["by_episode"]["layers"][2]["shares"]["rewarded"]["mean"]           # E numbers

An episode of a rollout counts once, by its mean over steps; intervals are over rollouts. Axes: `R`
rollouts, `E` episodes, `L` layers, `K` kinds of transitions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from historylens.analysis.play import KINDS, Play
from historylens.common.text import counted, wrap
from historylens.effects.measure import Resampled

WORDS = {
    "current episode": "the current episode",
    "last episode": "the last episode",
    "older": "older episodes",
    "rewarded": "rewarded transitions",
    "same state": "transitions that began in the agent's own state",
}
SENTENCES = {
    "over episodes": ("From the first episodes to the last", "there are too few"),
    "at the first reward": (
        "Once the first reward is found",
        "too few rollouts have episodes around it",
    ),
}
SPAN = 5  # episodes at the start and at the end, before and after the first reward, that count
STILL_THERE = 0.25  # of the rollouts: episodes that fewer have are left out


def over_learning(play: Play, layers: Sequence[int], seed: int) -> dict[str, Any]:
    """Reward and shares of attention by episode, and since each rollout's first reward.

    Plain values, None where there is none: mean and 95 % interval over rollouts, beside what
    uniform attention would give, `even`. "since_first_reward" is None where no reward was earned.
    """
    reward, shares, even = _by_episode(play, play.episodes)
    n_rollouts, n_episodes = reward.shape
    rng = np.random.default_rng((seed, 0))
    rewarded = play.rewards > play.rewarded_above  # (R, N)
    having = np.flatnonzero(rewarded.any(1))
    first = play.episodes[having, rewarded[having].argmax(1)]  # episodes of the first reward
    best, above = play.environment.best, play.rewarded_above
    result: dict[str, Any] = {
        "kinds": list(KINDS),
        "n_rollouts": n_rollouts,
        "n_decisions": play.rewards.size,
        "best": None if best is None else float(np.mean(best)),
        "first_reward": {"rollouts": having, "episode": first + 1, "above": above},
        "by_episode": _curves(np.arange(n_episodes) + 1, reward, shares, even, layers, rng),
        "since_first_reward": None,
    }
    if len(having):
        since = play.episodes.copy()
        since[having] -= first[:, None]
        aligned = [values[having] for values in _by_episode(play, since + n_episodes - 1)]
        keep = (~np.isnan(aligned[0])).sum(0) >= max(1, STILL_THERE * len(having))
        numbers = np.flatnonzero(keep) + 1 - n_episodes
        curves = _curves(numbers, *(values[:, keep] for values in aligned), layers, rng)
        result["since_first_reward"] = curves
    n_own, span = (~np.isnan(reward)).sum(1, keepdims=True), min(SPAN, n_episodes // 2)
    episode, at = np.arange(n_episodes), np.full((n_rollouts, 1), 3 * n_episodes)  # of none
    at[having, 0] = first
    parts = {  # (R, E) bool twice
        "over episodes": (episode < np.minimum(span, n_own - span), episode >= n_own - span),
        "at the first reward": (np.abs(at - episode) <= SPAN) & [at > episode, at < episode],
    }
    result["changes"] = {
        name: _change(shares, even, *(one & (episode < n_own) for one in masks), layers, rng)
        for name, masks in parts.items()
    }
    return result


def _by_episode(play: Play, episodes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reward `(R, E)`, shares `(R, E, L, K)` and even ones `(R, E, K)` of numbered episodes.

    `episodes (R, N)` int: the number of each step's, from 0; NaN where a rollout has none of it.
    """
    rows = np.arange(len(episodes))[:, None]

    def summed(values: np.ndarray) -> np.ndarray:
        total = np.zeros((len(episodes), episodes.max() + 1, *values.shape[2:]))
        np.add.at(total, (rows, episodes), values)
        return total

    n_steps = summed(np.ones(episodes.shape))
    n_steps[n_steps == 0] = np.nan
    reward = summed(play.rewards) + 0 * n_steps
    shares = summed(play.shares) / n_steps[:, :, None, None]
    return reward, shares, summed(play.even) / n_steps[:, :, None]


def _curves(
    episodes: np.ndarray, reward: np.ndarray, shares: np.ndarray, even: np.ndarray,
    layers: Sequence[int], rng: np.random.Generator,
) -> dict[str, Any]:  # fmt: skip
    """Means over rollouts of reward `(R, E)`, shares and even ones, with intervals."""
    there = ~np.isnan(reward)
    resampled = Resampled(len(reward), rng)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.nan_to_num(values).sum(0) / there.sum(0)

    def told(values: np.ndarray) -> dict[str, list[float | None]]:  # (R, E)
        low, high = resampled.interval(np.nan_to_num(values), there.astype(float))
        low, high = (np.where(there.sum(0) > 1, end, np.nan) for end in (low, high))
        return {"mean": _plain(mean(values)), "low": _plain(low), "high": _plain(high)}

    return {
        "episode": episodes,
        "rollouts": there.sum(0),
        "reward": told(reward),
        "layers": [
            {"layer": n, "shares": {k: told(shares[:, :, i, j]) for j, k in enumerate(KINDS)}}
            for i, n in enumerate(layers)
        ],
        "even": {kind: _plain(mean(even[:, :, j])) for j, kind in enumerate(KINDS)},
    }


def _plain(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(f"{value:.6g}") for value in values]


def _change(
    shares: np.ndarray, even: np.ndarray, before: np.ndarray, after: np.ndarray,
    layers: Sequence[int], rng: np.random.Generator,
) -> dict[str, Any] | None:  # fmt: skip
    """The layer and the kind whose attention changed most, beyond what uniform attention does.

    Between the episodes `before` and `after`, `(R, E)` bool, of rollouts that have both; None where
    fewer than two have.
    """
    rows = np.flatnonzero(before.any(1) & after.any(1))
    if len(rows) < 2:
        return None

    def mean(values: np.ndarray, episodes: np.ndarray) -> np.ndarray:
        weights = episodes[rows] / episodes[rows].sum(1, keepdims=True)
        return np.einsum("re,re...->r...", weights, np.nan_to_num(values[rows]))

    was, now = mean(shares, before), mean(shares, after)  # (R, L, K)
    was_even, now_even = mean(even, before), mean(even, after)  # (R, K)
    beyond = (now - now_even[:, None]) - (was - was_even[:, None])
    place, kind = np.unravel_index(np.abs(beyond.mean(0)).argmax(), beyond.shape[1:])
    return {
        "layer": layers[place],
        "kind": list(KINDS)[kind],
        "rollouts": len(rows),
        "before": float(was[:, place, kind].mean()),
        "after": float(now[:, place, kind].mean()),
        "even_before": float(was_even[:, kind].mean()),
        "even_after": float(now_even[:, kind].mean()),
        "beyond_even": float(beyond[:, place, kind].mean()),
        "interval": Resampled(len(rows), rng).interval(beyond[:, place, kind]),
    }


def learning_text(learning: Mapping[str, Any]) -> str:
    """Three sentences that say what changed."""
    reward, n_rollouts = learning["by_episode"]["reward"], learning["n_rollouts"]
    last = int(np.flatnonzero(np.equal(learning["by_episode"]["rollouts"], n_rollouts))[-1])
    episodes = counted(len(learning["by_episode"]["episode"]), "episode").upper()
    title = f"OVER {episodes} OF ITS OWN PLAY ({counted(n_rollouts, 'rollout')}, "
    title += f"{counted(learning['n_decisions'], 'decision')})"
    low, high = reward["low"][last], reward["high"][last]
    ends = "" if low is None else f" [{low:.1f}, {high:.1f}]"
    is_last = last + 1 == len(reward["mean"])
    best = "" if learning["best"] is None else f" of {learning['best']:.1f} possible"
    first, above = (learning["first_reward"][name] for name in ("episode", "above"))
    above = f" above {above:g}" if above else ""
    earned = f"Reward an episode: {reward['mean'][0]:.1f} in the first, {reward['mean'][last]:.1f}"
    earned += f"{ends} in {'the last' if is_last else f'episode {last + 1}'}{best}. "
    when = f"The first reward{above} comes in episode "
    when = f"{when}{np.median(first):g} (median)" if len(first) else ""
    never = f"{n_rollouts - len(first)} of {n_rollouts} rollouts earn none{above}"
    earned += "; ".join(filter(None, [when, never if len(first) < n_rollouts else ""])) + "."
    changes = [_sentence(name, change) for name, change in learning["changes"].items()]
    return "\n".join([title, *map(wrap, [earned, *changes])])


def _sentence(name: str, change: Mapping[str, Any] | None) -> str:
    """What changed most, or that nothing did beyond uniform attention."""
    start, lacking = SENTENCES[name]
    if change is None:
        return f"{start}: not known, {lacking}."
    low, high = change["interval"]
    if low <= 0 <= high:
        return f"{start}: no layer changes clearly beyond what uniform attention would."
    share = "from {before:.0%} to {after:.0%}, evenly {even_before:.0%} to {even_after:.0%}"
    return (
        f"{start}: most in layer {change['layer']}, whose attention on {WORDS[change['kind']]} "
        f"goes {share.format(**change)}: {change['beyond_even']:+.0%} beyond that "
        f"[{low:+.0%}, {high:+.0%}]."
    )
