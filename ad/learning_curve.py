"""Draw how a model was trained and how it learns in context, from the numbers of `training.json`.

draw_learning_curve(json.loads(Path("checkpoints/RUN/training.json").read_text()), "RUN.png")
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ad.darkroom import TASKS
from historylens.common.files import write_atomically


def draw_learning_curve(result: dict[str, Any], path: str | Path) -> None:
    """Left: return against gradient updates. Right: return against episodes in context."""
    config = result["config"]
    figure = Figure(figsize=(12, 4.8))
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.055, right=0.985, bottom=0.12, top=0.83, wspace=0.16)
    title = f"Algorithm Distillation in {TASKS[config['env']].title}, {config['tf_n_layer']} layers"
    title += f", {config['n_transit']} tokens, seed {config['seed']}"
    figure.suptitle(title, fontsize=13)
    _draw_training(left, result)
    _draw_in_context(right, result["test"], config)
    style = {"format": "png", "dpi": 100, "metadata": {"Software": None}}
    write_atomically(path, lambda file: figure.savefig(file, **style))


def _draw_training(axes: Axes, result: dict[str, Any]) -> None:
    """Return on train and validation goals at each evaluation, as part of the best possible."""
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


def _draw_in_context(axes: Axes, test: dict[str, Any], config: dict[str, Any]) -> None:
    """Reward of each episode of the finished model on goals it has never seen."""
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
