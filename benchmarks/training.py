"""Training steps and targets a second: packed queries beside one target a window.

python benchmarks/training.py                # batches of 32 windows of 99 transitions
"""

import argparse
import statistics
import time

import numpy as np
import setting
import torch
from torch import Tensor

from ad.darkroom import split_goals
from ad.source import learning_histories
from ad.training import PackedLoss, make_optimizer
from config import EnvConfig, ModelConfig, SourceConfig, TrainConfig
from dataset import ADDataset
from model import ADTransformer


class SingleLoss(PackedLoss):
    """Cross-entropy of the action after the whole window, the one target that it has."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Loss of a batch of windows."""
        names = ("states", "actions", "rewards", "next_states", "query_states")
        logits = self.model(*(batch[name] for name in names))
        return torch.nn.functional.cross_entropy(logits, batch["target_actions"])


def seconds_of(loss: type[PackedLoss], batch: dict[str, Tensor], repeats: int) -> float:
    """Median seconds of a training step."""
    torch.manual_seed(0)
    objective = loss(ADTransformer(ModelConfig()))
    optimizer = make_optimizer(objective.model, TrainConfig())
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        objective(batch).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def main() -> None:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="steps of each")
    flags = parser.parse_args()
    goals, source = split_goals(0)["train"][:4], SourceConfig()
    histories = learning_histories(goals, EnvConfig(), source, 0, n_streams=2)
    n_context, batch_size = ModelConfig().n_transit - 1, TrainConfig().batch_size
    batch = ADDataset(histories, n_context, 4).sample(batch_size, np.random.default_rng(0))
    rows = []
    cases = [("packed queries", PackedLoss, n_context + 1), ("one target", SingleLoss, 1)]
    for name, loss, targets in cases:
        seconds = seconds_of(loss, batch, flags.repeats)
        rate = targets * batch_size / seconds
        rows.append([name, f"{1 / seconds:.2f}", f"{rate:,.0f}"])
    print(f"batches of {batch_size} windows of {n_context} transitions")
    print(setting.table(["way", "steps a second", "targets a second"], rows))


if __name__ == "__main__":
    main()
