"""Run an AD model on decisions of learning histories and measure where its attention goes.

    for batch in analyse(model, histories, decisions, layers=[0, 1, 2, 3], n_drawn=10):
        batch.metrics, batch.drawn

Nothing is kept between batches, so memory does not grow with the number of decisions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from attention.capture import LayerAttention, capture
from attention.metrics import AttentionMetrics, collect
from attention.samples import Sample
from dataset import ADDataset, Histories
from decisions import Decision, describe
from model import ADTransformer

MAX_DRAWN = 16  # decisions with maps in one pass: a map takes R x C numbers a head
MAX_TOKENS = 2**16  # tokens in one pass without maps


@dataclass(frozen=True)
class Batch:
    """What one forward pass showed.

    Attributes:
        samples: the `B` decisions.
        metrics: their metrics.
        logits: `(B, A)` action logits.
        attention: layer number -> attention of the batch, with maps if they are to be drawn.
    """

    samples: tuple[Sample, ...]
    metrics: AttentionMetrics
    logits: torch.Tensor
    attention: dict[int, LayerAttention]

    @property
    def has_maps(self) -> bool:
        """Whether the samples of this batch come with maps."""
        return all(layer.maps is not None for layer in self.attention.values())


def analyse(
    model: ADTransformer,
    histories: Histories,
    decisions: Sequence[Decision],
    layers: Sequence[int],
    n_drawn: int,
) -> Iterator[Batch]:
    """Forward passes over all decisions; the first `n_drawn` come with received attention and maps.

    Args:
        model: the model, in evaluation mode.
        histories: the histories that the decisions are of.
        decisions: what to analyse, each with a full context.
        layers: numbers of the layers to capture.
        n_drawn: how many of the decisions are to be drawn.
    """
    dataset = ADDataset(histories, model.n_context_max)
    size = max(1, MAX_TOKENS // model.config.n_transit)
    drawn = [range(i, min(i + MAX_DRAWN, n_drawn)) for i in range(0, n_drawn, MAX_DRAWN)]
    rest = [range(i, min(i + size, len(decisions))) for i in range(n_drawn, len(decisions), size)]
    for indices in [*drawn, *rest]:
        chosen = [decisions[i] for i in indices]
        samples = tuple(
            describe(histories, decision, i, model.n_context_max)
            for i, decision in zip(indices, chosen, strict=True)
        )
        yield _run(model, dataset, chosen, samples, layers, with_maps=indices.start < n_drawn)


@torch.inference_mode()
def _run(
    model: ADTransformer,
    dataset: ADDataset,
    decisions: Sequence[Decision],
    samples: tuple[Sample, ...],
    layers: Sequence[int],
    with_maps: bool,
) -> Batch:
    """One forward pass, each layer captured as it runs."""
    window = dataset.windows(
        np.array([d.history for d in decisions]),
        np.array([d.step for d in decisions]),
        np.array([d.stride for d in decisions]),
    )
    device = model.pred_action.weight.device
    names = ("states", "actions", "rewards", "next_states", "query_states")
    inputs = [window[name].to(device) for name in names]
    modules = [model.transformer_encoder.layers[number] for number in layers]
    maps = range(len(samples)) if with_maps else None
    with capture(modules, received=with_maps, maps=maps) as record:
        logits = model(*inputs)
    metrics = collect([layer.query_rows for layer in record], samples, layers)
    return Batch(samples, metrics, logits.cpu(), dict(zip(layers, record, strict=True)))
