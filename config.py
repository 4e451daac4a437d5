"""Every setting of the AD model that comes with the tool: defaults, help and flags, once.

The settings of an analysis and of a comparison stand in `historylens.analysis` and
`historylens.comparison`; here are those that name a checkpoint for them.
"""

import argparse
from dataclasses import dataclass
from functools import partial

from historylens.analysis import AnalysisConfig
from historylens.common.errors import UserError
from historylens.common.settings import count, require, require_fractions, setting


@dataclass(frozen=True)
class EnvConfig:
    """The task: a Dark Room, and which of its goals are kept from training."""

    env: str = "darkroom"  # the only one, so that no flag names it
    grid_size: int = setting(9, "rows and columns of the room", "N")
    horizon: int = setting(20, "steps an episode", "N")
    n_test_goals: int = setting(8, "goals that neither training nor its choices see", "N")
    n_validation_goals: int = setting(
        6, "goals not trained on, by which the checkpoint is chosen", "N"
    )
    goal_seed: int = setting(0, "seed of the split of the goals", "N")

    def __post_init__(self) -> None:
        require(self, grid_size=2, horizon=1, n_test_goals=1, n_validation_goals=1, goal_seed=0)


@dataclass(frozen=True)
class SourceConfig:
    """The source algorithm, tabular Q-learning, whose learning histories are distilled."""

    n_streams: int = setting(60, "learning histories a training goal", "N")
    n_source_steps: int = setting(3000, "environment steps of each learning history", "N")
    discount: float = setting(0.9, "discount of the Q-learner", "X")
    step_size: float = setting(1.0, "step size of the Q-learner", "X")
    initial_value: float = setting(1.0, "optimistic initial action value", "X")
    epsilon_start: float = setting(
        0.5, "highest exploration rate at the start; each history draws its own below it", "X"
    )
    epsilon_end: float = setting(0.0, "exploration rate once it has decayed", "X")
    epsilon_decay: float = setting(0.6, "part of the steps over which it decays", "X")

    def __post_init__(self) -> None:
        require(self, n_streams=1, n_source_steps=1, epsilon_end=0, epsilon_decay=0)
        names = ("discount", "step_size", "epsilon_start", "epsilon_end", "epsilon_decay")
        require_fractions(self, *names)


@dataclass(frozen=True)
class ModelConfig:
    """The transformer. Names are those of existing Dark Room code for Algorithm Distillation."""

    n_transit: int = setting(100, "tokens the model reads: n_transit - 1 transitions, a query", "N")
    tf_n_layer: int = setting(4, "transformer layers", "N")
    tf_n_head: int = setting(4, "attention heads a layer", "N")
    tf_n_embd: int = setting(64, "width of the model", "N")
    tf_n_inner: int = setting(256, "width of the feed-forward part", "N")
    tf_dropout: float = setting(0.1, "dropout outside attention", "X")
    dim_states: int = 2  # of Dark Room: no flags, but checkpoints name them
    num_actions: int = 5
    grid_size: int = setting(9, "rows and columns of the room", "N")

    def __post_init__(self) -> None:
        require(self, n_transit=1, tf_n_layer=1, tf_n_head=1, tf_n_embd=1, tf_n_inner=1)
        require(self, num_actions=1, grid_size=2)
        require_fractions(self, "tf_dropout")
        if self.dim_states != 2:
            raise UserError(f"expected dim_states 2, a row and a column, got {self.dim_states}")
        if self.tf_n_embd % self.tf_n_head:
            raise UserError(
                f"expected --tf-n-embd to be a multiple of --tf-n-head, got {self.tf_n_embd} and "
                f"{self.tf_n_head}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained, evaluated on the way, and where it is kept."""

    seed: int = setting(0, "seed of weights, windows and evaluation", "N")
    n_updates: int = setting(5000, "gradient updates", "N")
    batch_size: int = setting(32, "windows an update", "N")
    lr: float = setting(2e-3, "peak learning rate", "X")
    n_warmup: int = setting(200, "updates of linear warm-up before the cosine decay", "N")
    weight_decay: float = setting(0.1, "weight decay of matrices", "X")
    max_grad_norm: float = setting(1.0, "gradient norm above which gradients are scaled down", "X")
    ema_decay: float = setting(0.998, "decay of the running average of the weights", "X")
    max_stride: int = setting(
        16, "windows join every k-th episode of a history, k drawn from 1 to this", "N"
    )
    history_dropout: float = setting(
        0.0, "part of the updates made on thinned histories, so that the model can read such", "X"
    )
    eval_every: int = setting(500, "updates between evaluations and checkpoints", "N")
    eval_episodes: int = setting(40, "episodes a rollout; its second half counts", "N")
    eval_rollouts: int = setting(24, "rollouts a validation goal while training", "N")
    final_rollouts: int = setting(32, "rollouts a test goal at the end", "N")
    device: str = setting("auto", "cpu, cuda, or auto: cuda where there is one", "NAME")

    def __post_init__(self) -> None:
        require(self, seed=0, n_updates=1, batch_size=1, lr=0, n_warmup=0, weight_decay=0)
        require(self, max_grad_norm=0, ema_decay=0, max_stride=1, eval_every=1)
        require(self, eval_episodes=2, eval_rollouts=1, final_rollouts=1)
        require_fractions(self, "ema_decay", "history_dropout")


def two_numbers(text: str, between: str, expected: str) -> tuple[int, int]:
    """Parse two whole numbers and the sign between them."""
    try:
        first, second = (int(part) for part in text.split(between))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None
    return first, second


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoint to look at, and which decisions of its learning histories."""

    checkpoint: str = setting(
        "checkpoints", "checkpoint file, run, or folder of runs: the latest in it", "PATH"
    )
    histories: str | None = setting(
        None, "learning histories, .npz or .hdf5 (default: those beside the checkpoint)", "FILE",
        type=str,
    )  # fmt: skip
    goal: list[tuple[int, int]] | None = setting(
        None, "only histories of these goals", "ROW,COL", nargs="+",
        type=partial(two_numbers, between=",", expected="ROW,COL, for example 0,5"),
    )  # fmt: skip
    history: list[int] | None = setting(
        None, "only these histories, by their number in the file", "N", type=int, nargs="+"
    )
    steps: tuple[int, int] | None = setting(
        None, "only decisions at these steps of a history", "FIRST:LAST",
        type=partial(two_numbers, between=":", expected="FIRST:LAST, for example 1000:1999"),
    )  # fmt: skip
    stride: int = setting(1, "the context joins every so many episodes back", "N", type=count)


@dataclass(frozen=True)
class ActingConfig:
    """Which checkpoint to act with, and where kept transitions stand."""

    checkpoint: str = setting(
        "checkpoints", "checkpoint file, run, or folder of runs: the latest in it", "PATH"
    )
    positions: str = setting(
        "reindexed", "where a kept transition stands: right behind the one kept before it, or as "
        "in the full history where that fits", choices=("reindexed", "original"),
    )  # fmt: skip


@dataclass(frozen=True)
class VisualizeConfig(AnalysisConfig, CheckpointConfig):
    """What to analyse, and where the pictures go."""
