"""Draw how a model was trained and how it learns in context, from the numbers of `training.json`.

draw_learning_curve(json.loads(Path("checkpoints/RUN/training.json").read_text()), "RUN.png")
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from historylens.common.files import write_atomically


def draw_learning_curve(result: dict[str, Any], path: str | Path) -> None:
    """Left: return against gradient updates. Right: return against episodes in context."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8))
    figure.subplots_adjust(left=0.055, right=0.985, bottom=0.12, top=0.83, wspace=0.16)
    config = result["config"]
    figure.suptitle(
        f"Algorithm Distillation in {config['env']}, {config['tf_n_layer']} layers, "
        f"{config['n_transit']} tokens, seed {config['seed']}",
        fontsize=13,
    )
    draw_training(left, result)
    draw_in_context(right, result["test"])
    style = {"format": "png", "dpi": 100, "metadata": {"Software": None}}
    write_atomically(path, lambda file: figure.savefig(file, **style))
    plt.close(figure)


def draw_training(axes: Axes, result: dict[str, Any]) -> None:
    """Return on train and validation goals at each evaluation, as part of the best possible."""
    log, n = result["log"], result["config"]["eval_episodes"]
    steps = [entry["step"] for entry in log]
    for name, colour in (("train", "#4c72b0"), ("validation", "#dd8452")):
        values = [entry[f"{name}_relative"] for entry in log]
        n_goals = len(log[0][f"{name}_goals"])
        axes.plot(steps, values, "o-", ms=4, color=colour, label=f"{n_goals} {name} goals")
    axes.axhline(1, ls="--", color="0.4", lw=1, label="best possible")
    source = result["source_relative_return"]
    axes.axhline(source, ls=":", color="0.4", lw=1.2, label=f"source algorithm ({source:.0%})")
    chosen = result["chosen_step"]
    axes.axvline(chosen, color="#55a868", lw=1.2, label=f"chosen by validation ({chosen:,})")
    axes.set(
        title="While training: the weights change",
        xlabel="gradient updates",
        ylabel=f"reward, episodes {n // 2 + 1} to {n} (part of the best)",
        ylim=(0, 1.05),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)


def draw_in_context(axes: Axes, test: dict[str, Any]) -> None:
    """Reward of each episode of the finished model on goals it has never seen."""
    returns = np.array(test["return_by_episode"])  # (G, E)
    episodes = np.arange(1, returns.shape[1] + 1)
    colours = plt.get_cmap("viridis")(np.arange(len(returns)) / max(1, len(returns) - 1))
    curves = zip(test["goals"], test["possible_by_goal"], returns, colours, strict=True)
    for (row, col), possible, curve, colour in curves:
        label = f"goal ({row}, {col}), best {possible}"
        axes.plot(episodes, curve, lw=1, color=colour, label=label)
    axes.plot(episodes, returns.mean(axis=0), color="black", lw=2.5, label="mean of the goals")
    axes.axhline(test["possible"], ls="--", color="0.4", lw=1, label="best possible, mean")
    axes.set(
        title=f"After training: the weights are fixed, {test['rollouts']} rollouts a test goal",
        xlabel="episode in context",
        ylabel="reward an episode",
        xlim=(1, len(episodes)),
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8, ncols=2)
