"""The optimiser of training and its learning rate.

optimizer = make_optimizer(model, TrainConfig())
lr_sched = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, 200, 4500))
"""

import math

import torch
from torch import nn

from config import TrainConfig


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves biases and norms alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.99))


def lr_factor(step: int, n_warmup: int, n_updates: int) -> float:
    """Part of the peak learning rate: linear warm-up, then half a cosine down to a twentieth."""
    warmup = min(1.0, (step + 1) / max(1, n_warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / n_updates)))
    return warmup * (0.05 + 0.95 * cosine)
