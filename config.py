"""Every setting of the AD model that comes with the tool: defaults, help and flags, once."""

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Any

from historylens.analysis import AnalysisConfig
from historylens.common.errors import expect
from historylens.common.settings import DEVICE, Settings, setting

DEFAULTS_OF: dict[str, dict[str, Any]] = {  # what differs from the defaults below
    "darkroom": {"values": "afterstates", "epsilon_start": 0.2},
    "darkroom-hard": {
        "grid_size": 17, "initial_value": 0.03, "epsilon_start": 0.2, "n_replays": 1,
        "n_source_steps": 6000, "n_streams": 12, "lr": 3e-3, "eval_episodes": 100,
        "eval_rollouts": 12, "final_rollouts": 16, "n_updates": 5000, "eval_every": 1000,
    },
    "key-to-door": {
        "horizon": 50, "n_transit": 200, "initial_value": 0.03, "epsilon_start": 0.2,
        "n_replays": 1, "n_source_steps": 6000, "n_train_goals": 2000, "n_streams": 2,
        "lr": 4e-3, "eval_rollouts": 12, "final_rollouts": 8, "n_updates": 5000, "eval_every": 1000,
    },
}  # fmt: skip


_WHERE = "checkpoint file, run, or folder of runs: the latest in it"
count, part = partial(setting, at_least=1), partial(setting, fraction=True)


@dataclass(frozen=True)
class EnvConfig(Settings):
    """The task, a Dark Room, and which of its goals are kept from training."""

    env: str = setting(
        "darkroom", "task of Laskin et al. 2022; other defaults follow it", choices=[*DEFAULTS_OF]
    )
    grid_size: int = setting(9, "rows and columns of the room", at_least=2)
    horizon: int = count(20, "steps an episode")
    n_test_goals: int = count(8, "goals that neither training nor its choices see")
    n_validation_goals: int = count(6, "goals not trained on, by which the checkpoint is chosen")
    n_train_goals: int | None = count(None, "goals to train on (default: all that are left)")
    goal_seed: int = setting(0, "seed of the split of the goals", at_least=0)


@dataclass(frozen=True)
class SourceConfig(Settings):
    """The source algorithm, tabular Q-learning, whose learning histories are distilled."""

    n_streams: int = count(60, "learning histories a training goal")
    n_source_steps: int = count(3000, "environment steps of each learning history")
    values: str = setting(
        "actions", "what it learns the value of: actions in a state, or afterstates, the cells to "
        "which they lead, by which it explores faster", choices=("actions", "afterstates"),
    )  # fmt: skip
    discount: float = part(0.9, "discount of the Q-learner")
    step_size: float = part(1.0, "step size of the Q-learner")
    n_replays: int = setting(
        0, "times that each episode is learned from again once it is over, backwards", at_least=0
    )
    initial_value: float = setting(1.0, "optimistic initial action value")
    epsilon_start: float = part(
        0.5, "highest exploration rate at the start; each history draws its own below it"
    )
    epsilon_end: float = part(0.0, "exploration rate once it has decayed")
    epsilon_decay: float = part(0.6, "part of the steps over which it decays")


@dataclass(frozen=True)
class ModelConfig(Settings):
    """The transformer. Names are those of existing Dark Room code for Algorithm Distillation."""

    n_transit: int = count(100, "tokens the model reads: n_transit - 1 transitions, a query")
    tf_n_layer: int = count(4, "transformer layers")
    tf_n_head: int = count(4, "attention heads a layer")
    tf_n_embd: int = count(64, "width of the model")
    tf_n_inner: int = count(256, "width of the feed-forward part")
    tf_dropout: float = part(0.1, "dropout outside attention")
    dim_states: int = 2  # of Dark Room: no flags, but checkpoints name them
    num_actions: int = count(5, None)
    grid_size: int = setting(9, "rows and columns of the room", at_least=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        what = f"expected dim_states 2, a row and a column, got {self.dim_states}"
        expect(self.dim_states == 2, what)
        width, n_heads = self.tf_n_embd, self.tf_n_head
        what = "expected --tf-n-embd to be a multiple of --tf-n-head, got"
        expect(width % n_heads == 0, f"{what} {width} and {n_heads}")


# What is read from the config of a checkpoint, whoever wrote it: its type, and the least and the
# most that it may be, of a text its length. All else in a config is never looked at.
READ_FROM_CHECKPOINTS = {
    "n_transit": (int, 1, 2**14), "tf_n_layer": (int, 1, 2**8), "tf_n_head": (int, 1, 2**10),
    "tf_n_embd": (int, 1, 2**14), "tf_n_inner": (int, 1, 2**16), "tf_dropout": (float, 0, 1),
    "dim_states": (int, 2, 2), "num_actions": (int, 1, 2**10), "grid_size": (int, 2, 2**10),
    "horizon": (int, 1, 2**14), "env": (str, 0, 100), "env_split_seed": (int, -(2**63), 2**63),
    "train_env_ratio": (float, 0, 1),
}  # fmt: skip
NEEDED = ("n_transit", "tf_n_layer", "tf_n_head", "tf_n_embd", "grid_size")  # the rest may be None


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How the model is trained, evaluated on the way, and where it is kept."""

    seed: int = setting(0, "seed of weights, windows and evaluation", at_least=0)
    n_updates: int = count(4500, "gradient updates")
    batch_size: int = count(32, "windows an update")
    lr: float = setting(2e-3, "peak learning rate", at_least=0)
    n_warmup: int = setting(200, "updates of linear warm-up before the cosine decay", at_least=0)
    weight_decay: float = setting(0.1, "weight decay of matrices", at_least=0)
    max_grad_norm: float = setting(
        1.0, "gradient norm above which gradients are scaled down", at_least=0
    )
    ema_decay: float = part(0.998, "decay of the running average of the weights")
    max_stride: int = count(
        16, "windows join every k-th episode of a history, k drawn from 1 to this"
    )
    random_episodes: float = part(
        0.8, "part of the windows that join episodes drawn at random, more of them early ones"
    )
    history_dropout: float = part(
        0.0, "part of the updates made on thinned histories, so that the model can read such; it "
        "grows evenly from none to this",
    )  # fmt: skip
    eval_every: int = count(1500, "updates between evaluations and checkpoints")
    eval_episodes: int = setting(40, "episodes a rollout; its second half counts", at_least=2)
    eval_rollouts: int = count(24, "rollouts a validation goal while training")
    final_rollouts: int = count(32, "rollouts a test goal at the end")
    device: str = DEVICE()


def numbers(between: str, counts: tuple[int, ...], expected: str, text: str) -> tuple[int, ...]:
    """Parse whole numbers, as many as one of `counts`, and the sign between them."""
    try:
        values = tuple(map(int, text.split(between)))
    except ValueError:
        values = ()
    if len(values) not in counts:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return values


@dataclass(frozen=True)
class CheckpointConfig(Settings):
    """Which checkpoint to look at, and which decisions of its learning histories."""

    checkpoint: str = setting("checkpoints", _WHERE, "PATH")
    histories: str | None = setting(
        None, "learning histories, .npz or .hdf5 (default: those beside the checkpoint)", "FILE"
    )
    goal: list[tuple[int, ...]] | None = setting(
        None, "only histories of these goals; of Key-to-Door ROW,COL,ROW,COL", "ROW,COL",
        type=partial(numbers, ",", (2, 4), "ROW,COL, for example 0,5"),
    )  # fmt: skip
    history: list[int] | None = setting(None, "only these histories, by their number in the file")
    steps: tuple[int, int] | None = setting(
        None, "only decisions at these steps of a history", "FIRST:LAST",
        type=partial(numbers, ":", (2,), "FIRST:LAST, for example 1000:1999"),
    )  # fmt: skip
    stride: int = count(1, "the context joins every so many episodes back")


@dataclass(frozen=True)
class ActingConfig(Settings):
    """Which checkpoint to act with, and where kept transitions stand."""

    checkpoint: str = setting("checkpoints", _WHERE, "PATH")
    positions: str = setting(
        "reindexed", "where a kept transition stands: right behind the one kept before it, or as "
        "in the full history where that fits", choices=("reindexed", "original"),
    )  # fmt: skip


@dataclass(frozen=True)
class VisualizeConfig(AnalysisConfig, CheckpointConfig):
    """What to analyse, and where the pictures go."""
