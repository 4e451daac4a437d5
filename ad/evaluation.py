"""How well a model learns in context: its rollouts, their numbers as text, and as a picture.

returns = rollout_goals(model, np.repeat(goals, 16, axis=0), n_episodes=40, seed=0)  # (128, 40)
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from ad.acting import SlidingPolicy, fast_logits
from ad.darkroom import TASKS, DarkRoom, optimal_return
from config import EnvConfig
from historylens.agent import rollout
from historylens.common.batches import MAX_ROOMS
from historylens.common.processes import ALONE, Group
from historylens.common.text import aligned
from historylens.comparison.policy import CompressedPolicy
from historylens.compression.method import METHODS
from model import ADTransformer

COMPRESSION = METHODS["rewarded-recent"], 10  # transitions, of which a model reads as many as fit
Reads = Literal["step", "episode", "compressed"]


def _compressed_policy(model: ADTransformer) -> CompressedPolicy:
    method, n_keep = COMPRESSION
    agent = SimpleNamespace(n_max=model.n_context_max, rewarded_above=0.0, reads_inputs_alone=True)
    agent.device, agent.act = model.pred_action.weight.device, partial(fast_logits, model)
    return CompressedPolicy(agent, method, min(n_keep, agent.n_max))


def rollout_goals(
    model: ADTransformer,
    goals: np.ndarray,
    n_episodes: int,
    seed: int,
    horizon: int = 20,
    reads: Reads = "step",
    progress: str | None = None,
    env: str = "darkroom",
    group: Group = ALONE,
) -> np.ndarray:
    """Rewards `(N, n_episodes)` int of episodes in many rooms at once, actions drawn by the model.

    The history grows through all episodes of `horizon` steps. `goals` `(N, 2 m)` int of the task
    `env` may repeat. What happens by chance in room i depends on `seed` and i alone. `reads` is how
    a `SlidingPolicy` slides, with its errors, or "compressed": the model reads what `COMPRESSION`
    leaves. `progress` labels a progress bar, if one is wanted. Processes share the rooms.
    """
    n_steps, parts = n_episodes * horizon, []
    n_blocks = max(1, -(-len(goals) // (MAX_ROOMS * group.size))) * group.size
    blocks = np.array_split(np.arange(len(goals)), min(n_blocks, len(goals)))
    own, is_told = [blocks[i] for i in group.share(len(blocks))], progress and group.is_main
    total = n_steps * sum(map(len, own))
    with tqdm(total=total, desc=progress, disable=not is_told, leave=False) as bar:
        for rooms in own:
            room = model.config.grid_size, horizon, env, seed + rooms
            if reads == "compressed":
                policy = _compressed_policy(model)
            else:
                policy = SlidingPolicy(model, len(rooms), reads, horizon)
            noises = [np.random.default_rng((seed, room)) for room in rooms]
            parts.append(rollout(DarkRoom(goals[rooms], *room), policy, n_steps, noises, bar)[0])
    rewards = np.concatenate(group.all_of(len(blocks), parts))
    return rewards.reshape(len(goals), n_episodes, horizon).sum(axis=2)


def possible(env: EnvConfig, goals: np.ndarray) -> np.ndarray:
    """Best possible reward an episode for each goal, `(G,)`; 0: it is out of reach."""
    return optimal_return(goals, env.grid_size, env.horizon, env.env)


def score(env: EnvConfig, goals: np.ndarray, returns: np.ndarray) -> dict[str, Any]:
    """Plain numbers of an evaluation on goals `(G, 2 m)`; the second half of its episodes counts.

    From the reward of each of `E` episodes of `R` rollouts a goal, `(G, R, E)`: the mean `return`
    and the best `possible`, their quotient with its standard error over rollouts, and by goal.
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
    rows = [["goal", "possible", f"episodes {n // 2 + 1} to {n}", "part"]]
    by_goal = zip(names, test["possible_by_goal"], test["return_by_goal"], strict=True)
    for name, best, reached in by_goal:
        part = f"{reached / best:.0%}" if best else "-"  # out of reach
        rows.append([name, f"{best:.4g}", f"{reached:.2f}", part])
    means = f"{test['possible']:.2f}", f"{test['return']:.2f}", f"{test['relative']:.0%}"
    lines = [
        f"\nTEST GOALS (never trained or chosen on), {test['rollouts']} rollouts a goal",
        *aligned([*rows, ["mean", *means]]),
        "",
    ]
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


def draw_learning_curve(result: dict[str, Any], path: str | Path) -> None:
    """Draw a `training.json`: return against updates, and against episodes in context."""
    from matplotlib.figure import Figure  # takes a second to import

    from historylens.pictures.page import save_figure

    config = result["config"]
    figure = Figure(figsize=(12, 4.8))
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.055, right=0.985, bottom=0.12, top=0.83, wspace=0.16)
    title = f"Algorithm Distillation in {TASKS[config['env']].title}, {config['tf_n_layer']} layers"
    title += f", {config['n_transit']} tokens, seed {config['seed']}"
    figure.suptitle(title, fontsize=13)
    _draw_training(left, result)
    _draw_in_context(right, result["test"], config)
    save_figure(figure, path)


def _draw_training(axes: Any, result: dict[str, Any]) -> None:
    log, n = result["log"], result["config"]["eval_episodes"]
    source, chosen = result["source_relative_return"], result["chosen_step"]
    steps = [entry["step"] for entry in log]
    for name, colour in (("train", "#4c72b0"), ("validation", "#dd8452")):
        values, n_goals = [entry[f"{name}_relative"] for entry in log], len(log[0][f"{name}_goals"])
        axes.plot(steps, values, "o-", ms=4, color=colour, label=f"{n_goals} {name} goals")
    axes.axhline(1, ls="--", color="0.4", lw=1, label="best possible")
    axes.axhline(source, ls=":", color="0.4", lw=1.2, label=f"source algorithm ({source:.0%})")
    axes.axvline(chosen, color="#55a868", lw=1.2, label=f"chosen by validation ({chosen:,})")
    reward = f"reward, episodes {n // 2 + 1} to {n} (part of the best)"
    axes.set(title="While training: the weights change", ylim=(0, 1.05))
    axes.set(xlabel="gradient updates", ylabel=reward)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)


def _draw_in_context(axes: Any, test: dict[str, Any], config: dict[str, Any]) -> None:
    from matplotlib import colormaps

    returns = np.array(test["return_by_episode"])  # (G, E)
    episodes = np.arange(1, returns.shape[1] + 1)
    colours = colormaps["viridis"](np.arange(len(returns)) / max(1, len(returns) - 1))
    names = map(TASKS[config["env"]].titled, test["goals"])
    curves = zip(names, test["possible_by_goal"], returns, colours, strict=True)
    for name, best, curve, colour in curves:
        axes.plot(episodes, curve, lw=1, color=colour, label=f"{name}, best {best:.4g}")
    axes.plot(episodes, returns.mean(axis=0), color="black", lw=2.5, label="mean of the goals")
    axes.axhline(test["possible"], ls="--", color="0.4", lw=1, label="best possible, mean")
    title = f"After training: the weights are fixed, {test['rollouts']} rollouts a test goal"
    axes.set(title=title, xlabel="episode in context", ylabel="reward an episode")
    axes.set(xlim=(1, len(episodes)), ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8, ncols=2)
