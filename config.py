"""Every setting of the project, once: defaults, help and the flags made of them.

parser = argparse.ArgumentParser()
add_flags(parser, TrainConfig)
config = from_flags(TrainConfig, parser.parse_args())
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def setting(default: Any, help: str, metavar: str | None = None, **flag: Any) -> Any:
    """Declare a dataclass field: its default, its help, and what else its flag needs."""
    flag |= {"help": help} | ({"metavar": metavar} if metavar else {})
    return dataclasses.field(default=default, metadata=flag)


class UserError(ValueError):
    """A mistake that its user can mend: commands show it as one line and exit with 2."""


def require(config: Any, **at_least: float) -> None:
    """Check that settings of `config` are not below the given values.

    Raises:
        UserError: one is.
    """
    for name, least in at_least.items():
        value = getattr(config, name)
        if not value >= least:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"expected {flag} of at least {least}, got {value}")


def require_fractions(config: Any, *names: str) -> None:
    """Check that settings of `config` lie between 0 and 1.

    Raises:
        UserError: one does not.
    """
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"expected {flag} between 0 and 1, got {getattr(config, name)}")


@dataclass(frozen=True)
class EnvConfig:
    """The task: a Dark Room, and which of its goals are kept from training."""

    env: str = setting("darkroom", "environment", choices=("darkroom",))
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
    dim_states: int = setting(2, "numbers that describe a state", "N")
    num_actions: int = setting(5, "number of actions", "N")
    grid_size: int = setting(9, "rows and columns of the room", "N")

    def __post_init__(self) -> None:
        require(self, n_transit=1, tf_n_layer=1, tf_n_head=1, tf_n_embd=1, tf_n_inner=1)
        require(self, num_actions=1, grid_size=2)
        require_fractions(self, "tf_dropout")
        if self.dim_states != 2:
            raise UserError(f"expected --dim-states 2, a row and a column, got {self.dim_states}")
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


def goal(text: str) -> tuple[int, int]:
    """Parse `ROW,COL`."""
    return _two_numbers(text, ",", "ROW,COL, for example 0,5")


def step_range(text: str) -> tuple[int, int]:
    """Parse `FIRST:LAST`."""
    return _two_numbers(text, ":", "FIRST:LAST, for example 1000:1999")


def _two_numbers(text: str, between: str, expected: str) -> tuple[int, int]:
    try:
        first, second = (int(part) for part in text.split(between))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None
    return first, second


def whole(text: str, at_least: int = 0) -> int:
    """Parse a whole number that is not negative."""
    value = int(text)
    if value < at_least:
        raise argparse.ArgumentTypeError(f"expected a whole number >= {at_least}, got {text}")
    return value


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    return whole(text, at_least=1)


@dataclass(frozen=True)
class VisualizeConfig:
    """What to analyse, and where the pictures go."""

    checkpoint: str = setting(
        "checkpoints", "checkpoint file, run, or folder of runs: the latest in it", "PATH"
    )
    histories: str | None = setting(
        None,
        "learning histories, .npz or .hdf5 (default: those beside the checkpoint)",
        "FILE",
        type=str,
    )
    adapter: str | None = setting(
        None,
        "Python file that says how to run a model of your own, see examples/",
        "FILE",
        type=str,
    )
    num_samples: int = setting(10, "decisions to analyse", "N", type=count)
    num_figures: int | None = setting(
        None, "decisions to draw (default: all, 50 at most)", "N", type=whole
    )
    num_effects: int = setting(
        10,
        "decisions on which the effect of dropping history is measured; 0: none",
        "N",
        type=whole,
    )
    layers: list[int] | None = setting(
        None, "layers to analyse, from 0 (default: all)", "N", type=int, nargs="+"
    )
    heads: list[int] | None = setting(
        None,
        "heads to analyse and to average over, from 0 (default: all)",
        "N",
        type=int,
        nargs="+",
    )
    goal: list[tuple[int, int]] | None = setting(
        None, "only histories of these goals", "ROW,COL", type=goal, nargs="+"
    )
    history: list[int] | None = setting(
        None, "only these histories, by their number in the file", "N", type=int, nargs="+"
    )
    steps: tuple[int, int] | None = setting(
        None, "only decisions at these steps of a history", "FIRST:LAST", type=step_range
    )
    stride: int = setting(1, "the context joins every so many episodes back", "N", type=count)
    out: str = setting("figs/attention", "folder for pictures and numbers", "DIR")
    device: str = setting("auto", "cpu, cuda, or auto: cuda where there is one", "NAME")
    precision: str = setting(
        "float32",
        "of the model's forward pass; metrics are float64 whatever it is",
        choices=("float32", "bfloat16"),
    )
    seed: int = setting(0, "seed of the choice of decisions", "N", type=whole)
    dpi: int = setting(100, "pixels an inch of the pictures", "N", type=count)


def fraction(text: str) -> float:
    """Parse a number between 0 and 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return value


@dataclass(frozen=True)
class Effort:
    """How much a comparison plays where the flags do not say.

    Attributes:
        strategies: names in `compression`; None: all of them.
        seeds: runs a goal.
        episodes: episodes a run.
    """

    strategies: tuple[str, ...] | None
    seeds: int
    episodes: int


QUICK = Effort(
    strategies=("recent", "first-recent", "even", "random", "rewarded-recent", "top-k"),
    seeds=4,
    episodes=24,
)
PAPER_GRADE = Effort(strategies=None, seeds=16, episodes=40)
BUDGETS = (10, 20, 40)  # and all that the model can read; of these those that it can read


@dataclass(frozen=True)
class CompareConfig:
    """Which ways to compress to compare, how thoroughly, and where the results go."""

    checkpoint: str = setting(
        "checkpoints", "checkpoint file, run, or folder of runs: the latest in it", "PATH"
    )
    adapter: str | None = setting(
        None,
        "Python file that says how to run a model of your own, and in which environment",
        "FILE",
        type=str,
    )
    strategies: list[str] | None = setting(
        None, "strategies to compare (default: a quick choice, all with --full)", "NAME",
        type=str, nargs="+",
    )  # fmt: skip
    budgets: list[int] | None = setting(
        None, "transitions to keep (default: 10 20 40 and all that the model reads)", "N",
        type=count, nargs="+",
    )  # fmt: skip
    full: bool = setting(
        False, "paper-grade: all strategies, more seeds and episodes", action="store_true"
    )
    positions: str = setting(
        "reindexed",
        "where a kept transition stands: right behind the one kept before it, or as in the full "
        "history where that fits",
        choices=("reindexed", "original"),
    )
    seeds: int | None = setting(
        None,
        f"runs a goal (default: {QUICK.seeds}, {PAPER_GRADE.seeds} with --full)",
        "N",
        type=count,
    )
    episodes: int | None = setting(
        None,
        "episodes a run, of which the second half counts "
        f"(default: {QUICK.episodes}, {PAPER_GRADE.episodes} with --full)",
        "N",
        type=count,
    )
    confirm: int = setting(
        32,
        "new runs a goal of the most promising arm beside full history, where no shorter one is "
        "shown to be safe yet; 0: none",
        "N",
        type=whole,
    )
    margin: float = setting(
        0.05, "loss that would not matter, as a part of full history's return", "X", type=fraction
    )
    out: str = setting("figs/compression", "folder for pictures and numbers", "DIR")
    device: str = setting("auto", "cpu, cuda, or auto: cuda where there is one", "NAME")
    seed: int = setting(0, "seed of action noise, random choices and bootstrap", "N", type=whole)


def add_flags(parser: argparse.ArgumentParser, *configs: type) -> None:
    """Add a flag for every setting of the given dataclasses; a name met before is not repeated."""
    known = {action.dest for action in parser._actions}
    for config in configs:
        group = parser.add_argument_group((config.__doc__ or "").split("\n")[0].rstrip("."))
        for field in dataclasses.fields(config):
            if field.name in known:
                continue
            known.add(field.name)
            options = dict(field.metadata)
            if options.get("action") is None:
                options.setdefault("type", type(field.default))
                if field.default is not None:
                    options["help"] += " (default: %(default)s)"
            group.add_argument(
                "--" + field.name.replace("_", "-"), default=field.default, **options
            )


def from_flags(config: type[T], flags: argparse.Namespace) -> T:
    """Build a settings object from parsed flags."""
    names = [field.name for field in dataclasses.fields(config)]
    return config(**{name: getattr(flags, name) for name in names if hasattr(flags, name)})


def same_as_default(config: Any, name: str) -> bool:
    """Whether a setting has the value that it has unless a flag gives another."""
    default = next(field.default for field in dataclasses.fields(config) if field.name == name)
    return getattr(config, name) == default


def from_dict(config: type[T], values: dict[str, Any]) -> T:
    """Build a settings object from a flat dict, which may hold settings of others as well."""
    names = {field.name for field in dataclasses.fields(config)}
    return config(**{name: value for name, value in values.items() if name in names})


def to_dict(*configs: Any) -> dict[str, Any]:
    """Flatten settings objects into one dict of plain values."""
    return {name: value for config in configs for name, value in vars(config).items()}


def run_command(main: Callable[[], None]) -> None:
    """Run a command; a user's mistake ends it with one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
