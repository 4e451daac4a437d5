"""How well a model learns in context: numbers of its rollouts, and the same as console text."""

from pathlib import Path
from typing import Any

import numpy as np

from ad.darkroom import TASKS, optimal_return
from config import EnvConfig


def possible(env: EnvConfig, goals: np.ndarray) -> np.ndarray:
    """Best possible reward an episode for each goal, `(G,)`; 0: it is out of reach."""
    return optimal_return(goals, env.grid_size, env.horizon, env.env)


def score(env: EnvConfig, goals: np.ndarray, returns: np.ndarray) -> dict[str, Any]:
    """Numbers of an evaluation on goals `(G, 2 m)`; the second half of its episodes counts.

    From the reward of each of `E` episodes of `R` rollouts a goal, `(G, R, E)`, plain numbers:
    `return` and `possible`, the mean reward an episode reached and the best there is, `relative`,
    their quotient, with its standard error over rollouts, and the same by goal and by episode.
    """
    best = possible(env, goals)
    by_rollout = returns[:, :, returns.shape[2] // 2 :].mean(axis=2)
    late, n = by_rollout.mean(axis=1), by_rollout.shape[1]
    variance = by_rollout.var(axis=1, ddof=min(1, n - 1)).sum() / n / len(goals) ** 2
    return {
        "goals": goals.tolist(),
        "possible": float(best.mean()),
        "return": float(late.mean()),
        "relative": float(late.mean() / best.mean()),
        "relative_error": float(np.sqrt(variance) / best.mean()),
        "first_episode": float(returns[:, :, 0].mean()),
        "possible_by_goal": best.tolist(),
        "return_by_goal": late.tolist(),
        "return_by_episode": returns.mean(axis=1).tolist(),
        "rollouts": returns.shape[1],
    }


def progress_line(entry: dict[str, Any], n_episodes: int) -> str:
    """One entry of `log` in `training.json`, an evaluation while training, as console text."""
    compressed = entry.get("compressed_return")
    compressed = "" if compressed is None else f", on compressed history {compressed:.2f}"
    return (
        f"update {entry['step']:>6,}  loss {entry['loss']:.3f}  reward an episode, episodes "
        f"{n_episodes // 2 + 1} to {n_episodes}: train goals {entry['train_return']:.2f} of "
        f"{entry['train_possible']:.2f}, validation goals {entry['validation_return']:.2f} of "
        f"{entry['validation_possible']:.2f}{compressed}{'  (kept)' if entry['best'] else ''}"
    )


def describe(result: dict[str, Any], checkpoint: Path) -> str:
    """The final numbers of a run, those of `training.json`, and its checkpoint as console text."""
    test, config, n = result["test"], result["config"], result["config"]["eval_episodes"]
    names = [TASKS[config["env"]].name(goal) for goal in test["goals"]]
    wide = max(8, *map(len, names))
    lines = [
        f"\nTEST GOALS (never trained or chosen on), {test['rollouts']} rollouts a goal",
        f"{'goal':>{wide}}  {'possible':>8}  {f'episodes {n // 2 + 1} to {n}':>17}  {'part':>5}",
    ]
    by_goal = zip(names, test["possible_by_goal"], test["return_by_goal"], strict=True)
    for name, best, reached in by_goal:
        part = f"{reached / best:.0%}" if best else "-"  # out of reach
        lines.append(f"{name:>{wide}}  {best:>8.4g}  {reached:>17.2f}  {part:>5}")
    mean = f"{test['possible']:>8.2f}  {test['return']:>17.2f}  {test['relative']:>5.0%}"
    lines.append(f"{'mean':>{wide}}  {mean}\n")
    if (whole := result["test_by_sliding"].get("episode")) is not None:
        lines.append(f"The same with whole episodes dropped from a full context: {whole:.2f}")
    lines += [
        f"Reward in episode 1: {test['first_episode']:.2f}. The source algorithm ended at "
        f"{result['source_relative_return']:.1%} of the best possible on its own goals.",
        f"Chosen by validation goals: update {result['chosen_step']:,} of {config['n_updates']:,}; "
        f"training and evaluating took {result['seconds'] / 60:.0f} minutes.",
        f"Checkpoint: {checkpoint}",
    ]
    return "\n".join(lines)
