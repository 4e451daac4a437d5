"""Training steps and targets a second: packed queries beside one target a window.

python benchmarks/training.py                # batches of 32 windows of 99 transitions
"""

import statistics

import numpy as np
import torch
from setting import print_table, read_flags, seconds_of
from torch import Tensor

from ad.darkroom import split_goals
from ad.source import learning_histories
from ad.training import PackedLoss, make_optimizer
from config import EnvConfig, ModelConfig, SourceConfig, TrainConfig
from dataset import CONTEXT, ADDataset
from model import ADTransformer


class SingleLoss(PackedLoss):
    """Cross-entropy of the action after the whole window, the one target that it has."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Loss of a batch of windows."""
        logits = self.model(*map(batch.get, CONTEXT), batch["query_states"])
        return torch.nn.functional.cross_entropy(logits, batch["target_actions"])


def step_seconds(loss: type[PackedLoss], batch: dict[str, Tensor], repeats: int) -> float:
    """Median seconds of a training step, the first one not counted."""
    torch.manual_seed(0)
    objective = loss(ADTransformer(ModelConfig()))
    optimizer = make_optimizer(objective.model, TrainConfig())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        objective(batch).backward()
        optimizer.step()

    return statistics.median(seconds_of(step, repeats + 1)[1:])


def main() -> None:
    """Measure both and print the table."""
    flags = read_flags(__doc__, repeats=20)
    goals = split_goals(0)["train"][:4]
    histories = learning_histories(goals, EnvConfig(), SourceConfig(), 0, n_streams=2)
    n_context, batch_size = ModelConfig().n_transit - 1, TrainConfig().batch_size
    batch = ADDataset(histories, n_context, 4).sample(batch_size, np.random.default_rng(0))
    rows = []
    cases = [("packed queries", PackedLoss, n_context + 1), ("one target", SingleLoss, 1)]
    for name, loss, n_targets in cases:
        rate = 1 / step_seconds(loss, batch, flags.repeats)
        rows.append([name, f"{rate:.2f}", f"{rate * n_targets * batch_size:,.0f}"])
    print(f"batches of {batch_size} windows of {n_context} transitions")
    print_table(["way", "steps a second", "targets a second"], rows)


if __name__ == "__main__":
    main()
