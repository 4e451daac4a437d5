"""How attention changes while an agent plays and gets better.

    learning = over_learning(play, layers=[0, 1, 2, 3], seed=0)
    print(learning_text(learning))
    learning["by_episode"]["layers"][2]["shares"]["rewarded"]["mean"]           # E numbers

An episode of a rollout counts once, by its mean over steps; intervals are over rollouts. Axes: `R`
rollouts, `E` episodes, `L` layers (shares have one more: uniform attention), `K` kinds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.random import Generator, default_rng

from historylens.analysis.play import KINDS, Play
from historylens.common.files import rounded
from historylens.common.text import counted, wrap
from historylens.effects.measure import Resampled

WORDS = {
    "current episode": "the current episode",
    "last episode": "the last episode",
    "older": "older episodes",
    "rewarded": "rewarded transitions",
    "same state": "transitions that began in the agent's own state",
}
OVER, FIRST = "over episodes", "at the first reward"  # names of changes
SPAN = 5  # episodes at the start and at the end, before and after the first reward, that count
STILL_THERE = 0.25  # of the rollouts: episodes that fewer have are left out


def over_learning(play: Play, layers: Sequence[int], seed: int) -> dict[str, Any]:
    """Reward and shares of attention by episode, and since each rollout's first reward, if any.

    Plain values, None where there is none: mean and 95 % interval over rollouts, beside `even`,
    what uniform attention would give.
    """
    reward, shares = _by_episode(play, play.episodes)
    n_rollouts, n_episodes = reward.shape
    rng, best = default_rng((seed, 0)), play.environment.best
    rewarded = play.rewards > play.rewarded_above  # (R, N)
    having = np.flatnonzero(rewarded.any(1))
    first = play.episodes[having, rewarded[having].argmax(1)]  # episodes of the first reward
    by_episode = _curves(np.arange(n_episodes) + 1, reward, shares, layers, rng)
    since_first = None
    if len(having):
        since = play.episodes.copy()
        since[having] -= first[:, None]
        aligned = [values[having] for values in _by_episode(play, since + n_episodes - 1)]
        keep = (~np.isnan(aligned[0])).sum(0) >= max(1, STILL_THERE * len(having))
        numbers = np.flatnonzero(keep) + 1 - n_episodes
        since_first = _curves(numbers, *(values[:, keep] for values in aligned), layers, rng)
    n_own, span = (~np.isnan(reward)).sum(1, keepdims=True), min(SPAN, n_episodes // 2)
    episode, at = np.arange(n_episodes), np.full((n_rollouts, 1), 3 * n_episodes)  # of none
    at[having, 0] = first
    parts = {  # (R, E) bool twice
        OVER: (episode < np.minimum(span, n_own - span), episode >= n_own - span),
        FIRST: (np.abs(at - episode) <= SPAN) & [at > episode, at < episode],
    }
    return {
        "kinds": list(KINDS),
        "n_rollouts": n_rollouts,
        "n_decisions": play.rewards.size,
        "best": None if best is None else float(np.mean(best)),
        "first_reward": {"rollouts": having, "episode": first + 1, "above": play.rewarded_above},
        "by_episode": by_episode,
        "since_first_reward": since_first,
        "changes": {
            name: _change(shares, *(one & (episode < n_own) for one in masks), layers, rng)
            for name, masks in parts.items()
        },
    }


def _by_episode(play: Play, episodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reward `(R, E)` and shares `(R, E, L + 1, K)`, NaN where a rollout has no such episode.

    `episodes (R, N)` int: the number of each step's, from 0.
    """
    rows = np.arange(len(episodes))[:, None]

    def summed(values: np.ndarray) -> np.ndarray:
        total = np.zeros((len(episodes), episodes.max() + 1, *values.shape[2:]))
        np.add.at(total, (rows, episodes), values)
        return total

    n_steps = summed(np.ones(episodes.shape))
    n_steps[n_steps == 0] = np.nan
    shares = np.concatenate([summed(play.shares), summed(play.even)[:, :, None]], axis=2)
    return summed(play.rewards) + 0 * n_steps, shares / n_steps[:, :, None, None]


def _curves(
    episodes: np.ndarray, reward: np.ndarray, shares: np.ndarray,
    layers: Sequence[int], rng: Generator,
) -> dict[str, Any]:  # fmt: skip
    """Means over rollouts of reward `(R, E)` and shares, with intervals."""
    there, resampled = ~np.isnan(reward), Resampled(len(reward), rng)
    n_there = there.sum(0)

    def mean(values: np.ndarray) -> list[float | None]:  # (R, E)
        return rounded(np.nan_to_num(values).sum(0) / n_there, None)

    def told(values: np.ndarray) -> dict[str, list[float | None]]:
        ends = resampled.interval(np.nan_to_num(values), there.astype(float))
        low, high = rounded(np.where(n_there > 1, ends, np.nan), None)
        return {"mean": mean(values), "low": low, "high": high}

    return {
        "episode": episodes,
        "rollouts": n_there,
        "reward": told(reward),
        "layers": [
            {"layer": n, "shares": {k: told(shares[:, :, i, j]) for j, k in enumerate(KINDS)}}
            for i, n in enumerate(layers)
        ],
        "even": {kind: mean(shares[:, :, -1, j]) for j, kind in enumerate(KINDS)},
    }


def _change(
    shares: np.ndarray, before: np.ndarray, after: np.ndarray, layers: Sequence[int], rng: Generator
) -> dict[str, Any] | None:
    """The layer and the kind that changed most, beyond what uniform attention does.

    Between episodes `(R, E)` bool, of rollouts that have both; None where fewer than two have.
    """
    rows = np.flatnonzero(before.any(1) & after.any(1))
    if len(rows) < 2:
        return None

    def mean(episodes: np.ndarray) -> np.ndarray:
        weights = episodes[rows] / episodes[rows].sum(1, keepdims=True)
        return np.einsum("re,re...->r...", weights, np.nan_to_num(shares[rows]))

    was, now = mean(before), mean(after)  # (R, L + 1, K)
    beyond = (now[:, :-1] - now[:, -1:]) - (was[:, :-1] - was[:, -1:])
    place, kind = np.unravel_index(np.abs(beyond.mean(0)).argmax(), beyond.shape[1:])
    return {
        "layer": layers[place],
        "kind": list(KINDS)[kind],
        "rollouts": len(rows),
        "before": float(was[:, place, kind].mean()),
        "after": float(now[:, place, kind].mean()),
        "even_before": float(was[:, -1, kind].mean()),
        "even_after": float(now[:, -1, kind].mean()),
        "beyond_even": float(beyond[:, place, kind].mean()),
        "interval": Resampled(len(rows), rng).interval(beyond[:, place, kind]),
    }


def learning_text(learning: Mapping[str, Any]) -> str:
    """Three sentences that say what changed."""
    curves, n_rollouts = learning["by_episode"], learning["n_rollouts"]
    reward, n_episodes = curves["reward"], len(curves["episode"])
    last = int(np.flatnonzero(np.equal(curves["rollouts"], n_rollouts))[-1])
    title = f"OVER {counted(n_episodes, 'episode').upper()} OF ITS OWN PLAY ("
    title += f"{counted(n_rollouts, 'rollout')}, {counted(learning['n_decisions'], 'decision')})"
    low, high = reward["low"][last], reward["high"][last]
    ends = "" if low is None else f" [{low:.1f}, {high:.1f}]"
    where = "the last" if last + 1 == n_episodes else f"episode {last + 1}"
    best = "" if learning["best"] is None else f" of {learning['best']:.1f} possible"
    first, above = (learning["first_reward"][name] for name in ("episode", "above"))
    above = f" above {above:g}" if above else ""
    earned = f"Reward an episode: {reward['mean'][0]:.1f} in the first, {reward['mean'][last]:.1f}"
    when = f"The first reward{above} comes in episode"
    told = [f"{when} {np.median(first):g} (median)"] if len(first) else []
    if len(first) < n_rollouts:
        told.append(f"{n_rollouts - len(first)} of {n_rollouts} rollouts earn none{above}")
    start, since = "From the first episodes to the last", "Once the first reward is found"
    sentences = [
        f"{earned}{ends} in {where}{best}. {'; '.join(told)}.",
        _sentence(start, learning["changes"][OVER], "there are too few"),
        _sentence(since, learning["changes"][FIRST], "too few rollouts have episodes around it"),
    ]
    return "\n".join([title, *map(wrap, sentences)])


def _sentence(start: str, change: Mapping[str, Any] | None, lacking: str) -> str:
    """What changed most, or that nothing did beyond uniform attention."""
    if change is None:
        return f"{start}: not known, {lacking}."
    low, high = change["interval"]
    if low <= 0 <= high:
        return f"{start}: no layer changes clearly beyond what uniform attention would."
    share = "from {before:.0%} to {after:.0%}, evenly {even_before:.0%} to {even_after:.0%}"
    return (
        f"{start}: most in layer {change['layer']}, whose attention on {WORDS[change['kind']]} "
        f"goes {share.format(**change)}: {change['beyond_even']:+.0%} beyond that "
        f"[{low:+.0%}, {high:+.0%}], over {counted(change['rollouts'], 'rollout')}."
    )
