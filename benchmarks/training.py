"""Training steps and targets a second: packed queries beside one target a window."""

import statistics
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from setting import print_table, read_flags, seconds_of
from torch import Tensor
from torch.optim import Optimizer

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
        logits = self.model(*map(batch.get, CONTEXT), batch["query_states"][:, -1])
        return torch.nn.functional.cross_entropy(logits, batch["target_actions"][:, -1])


def train_step(objective: PackedLoss, optimizer: Optimizer, batch: dict[str, Tensor]) -> None:
    """One update of the weights."""
    optimizer.zero_grad(set_to_none=True)
    objective(batch).backward()
    optimizer.step()


def rows_of(batch: dict[str, Tensor], repeats: int, device: str) -> Iterator[tuple]:
    """Way, training steps and targets a second, by the median step, the first one not counted."""
    batch_size, n_context = batch["actions"].shape
    ways = ("packed queries", PackedLoss, n_context + 1), ("one target", SingleLoss, 1)
    for name, loss, n_targets in ways:
        torch.manual_seed(0)
        objective = loss(ADTransformer(ModelConfig()).to(device))
        optimizer = make_optimizer(objective.model, TrainConfig())
        seconds = seconds_of(partial(train_step, objective, optimizer, batch), repeats + 1)
        rate = 1 / statistics.median(seconds[1:])
        yield name, rate, rate * n_targets * batch_size


if __name__ == "__main__":
    flags = read_flags(__doc__, repeats=20, device="cpu")
    goals = split_goals(0)["train"][:4]
    histories = learning_histories(goals, EnvConfig(), SourceConfig(), 0, n_streams=2)
    n_context, batch_size = ModelConfig().n_transit - 1, TrainConfig().batch_size
    batch = ADDataset(histories, n_context, 4).sample(batch_size, np.random.default_rng(0))
    batch = {name: values.to(flags.device) for name, values in batch.items()}
    print(f"batches of {batch_size} windows of {n_context} transitions, {flags.device}")
    header = "| way | steps a second | targets a second |"
    print_table(header, "| {} | {:.2f} | {:,.0f} |", rows_of(batch, flags.repeats, flags.device))
