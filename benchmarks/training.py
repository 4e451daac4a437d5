"""Training steps and targets a second: packed queries beside one target a window."""

import argparse
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

N_CONTEXT, BATCH_SIZE = ModelConfig().n_transit - 1, TrainConfig().batch_size


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


def rows_of(flags: argparse.Namespace) -> Iterator[tuple]:
    """Way, training steps and targets a second, by the median step, the first one not counted."""
    goals = split_goals(0)["train"][:4]
    histories = learning_histories(goals, EnvConfig(), SourceConfig(), 0, n_streams=2)
    batch = ADDataset(histories, N_CONTEXT, 4).sample(BATCH_SIZE, np.random.default_rng(0))
    batch = {name: values.to(flags.device) for name, values in batch.items()}
    ways = ("packed queries", PackedLoss, N_CONTEXT + 1), ("one target", SingleLoss, 1)
    for name, loss, n_targets in ways:
        torch.manual_seed(0)
        objective = loss(ADTransformer(ModelConfig()).to(flags.device))
        step = partial(train_step, objective, make_optimizer(objective.model, TrainConfig()), batch)
        rate = 1 / statistics.median(seconds_of(step, flags.repeats + 1)[1:])
        yield name, rate, rate * n_targets * BATCH_SIZE


if __name__ == "__main__":
    flags = read_flags(__doc__, repeats=20, device="cpu")
    print(f"batches of {BATCH_SIZE} windows of {N_CONTEXT} transitions, {flags.device}")
    print_table("way | steps a second:.2f | targets a second:,.0f", rows_of(flags))
