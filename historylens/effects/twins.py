"""How far the same model is moved with its weights shuffled.

An untrained model is moved by another history as well. One that uses its history is moved more than
each of its twins, in which the entries of every weight matrix are permuted (the parameter
randomisation of Adebayo et al. 2018, arXiv 1810.03292).
"""

import torch

from historylens.agent import Agent, act_in_parts
from historylens.common.errors import expect
from historylens.effects.measure import action_changes, sharpness
from historylens.history import History

N_TWINS = 19  # an untrained model is moved more than all of them once in 20 times
MIN_TWINS = 4  # fewer say nothing
MAX_WEIGHTS = 200_000_000  # permuted for all of them: none of models of more than 50 million


@torch.inference_mode()
def moved_twins(agent: Agent, history: History, other: History, seed: int) -> list[float]:
    """Share of actions that `other` histories change in each twin, as `Effect.changed`.

    UserError: there is nothing to shuffle, or too much. What the model raises with such weights is
    passed on; its own are put back in any case, bit for bit.
    """
    matrices = [p for p in agent.model.parameters() if p.dim() > 1 and p.is_floating_point()]
    n_weights = sum(p.numel() for p in matrices)
    expect(n_weights, "it has no weight matrices")
    n_twins = min(N_TWINS, MAX_WEIGHTS // n_weights)  # two passes each, less than a curve takes
    expect(n_twins >= MIN_TWINS, f"it has too many weights ({n_weights:,})")
    own, full, moved = [p.clone() for p in matrices], act_in_parts(agent, history), []
    generator = torch.Generator().manual_seed(seed)
    try:
        for _ in range(n_twins):
            for matrix, values in zip(matrices, own, strict=True):
                order = torch.randperm(values.numel(), generator=generator).to(values.device)
                matrix.copy_(values.flatten()[order].reshape(values.shape))
            logits, others = act_in_parts(agent, history), act_in_parts(agent, other)
            expect(not torch.equal(logits, full), "act() is the same whatever its model's weights")
            moved.append(float(action_changes(logits, others, sharpness(logits)).mean()))
    finally:
        for matrix, values in zip(matrices, own, strict=True):
            matrix.copy_(values)
    return moved
