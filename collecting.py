"""Metrics of many samples, gathered batch by batch and process by process, in little memory.

    collected = Collected(n_samples=5000)
    collected.add(batch.metrics)                     # in any order: samples know their place
    metrics = collected.over(group, describe)        # AttentionMetrics on rank 0, None elsewhere

A sample takes `L * (H + 1) * 16` numbers of 8 bytes, and its description in the end.
"""

from collections.abc import Callable

import numpy as np

from attention.metrics import ALL_METRICS, AttentionMetrics, LayerMetrics
from attention.samples import Sample
from parallel import Group


class Collected:
    """Metrics of `S` samples: an array `(M, H + 1, S)` a layer, the head average last.

    Only arrays stay: what else a batch brings would lie scattered over the memory that the next
    batches need.

    Args:
        n_samples: `S`; samples are numbered `0 .. S - 1` by their `index`.
        heads: numbers of the heads measured; None: all.
    """

    def __init__(self, n_samples: int, heads: tuple[int, ...] | None = None) -> None:
        self.heads = heads
        self.added = np.zeros(n_samples, dtype=bool)
        self.layers: dict[int, np.ndarray] = {}
        self.uniform = np.empty((len(ALL_METRICS), n_samples))

    def add(self, metrics: AttentionMetrics) -> None:
        """Put the metrics of a batch in their place."""
        indices = np.array([sample.index for sample in metrics.samples])
        layers = {
            layer.layer: np.stack(
                [
                    np.column_stack([layer.heads[name], layer.mean[name]]).T  # (H + 1, B)
                    for name in ALL_METRICS
                ]
            )
            for layer in metrics.layers
        }
        self._put(indices, layers, np.stack([metrics.uniform[name] for name in ALL_METRICS]))

    def over(self, group: Group, describe: Callable[[int], Sample]) -> AttentionMetrics | None:
        """The metrics that all processes added, on rank 0.

        Args:
            group: the processes.
            describe: gives the sample of an index.

        Raises:
            ValueError: a sample is missing.
        """
        if group.size > 1:
            parts = group.gather(None if group.is_main else self._part())
            if parts is None:
                return None
            for part in parts[1:]:
                self._put(*part)
        if not self.added.all():
            missing = int(np.flatnonzero(~self.added)[0])
            raise ValueError(f"expected every sample to be measured, {missing} is missing")
        return AttentionMetrics(
            tuple(describe(index) for index in range(len(self.added))),
            tuple(
                LayerMetrics(
                    number,
                    {name: values[m, -1] for m, name in enumerate(ALL_METRICS)},
                    {name: values[m, :-1].T for m, name in enumerate(ALL_METRICS)},
                )
                for number, values in sorted(self.layers.items())
            ),
            {name: self.uniform[m] for m, name in enumerate(ALL_METRICS)},
            self.heads,
        )

    def _put(self, indices: np.ndarray, layers: dict[int, np.ndarray], uniform: np.ndarray) -> None:
        for number, values in layers.items():
            if number not in self.layers:
                self.layers[number] = np.empty((*values.shape[:2], len(self.added)))
            self.layers[number][:, :, indices] = values
        self.uniform[:, indices] = uniform
        self.added[indices] = True

    def _part(self) -> tuple[np.ndarray, dict[int, np.ndarray], np.ndarray]:
        """What this process added: indices, and the slices of the arrays."""
        own = np.flatnonzero(self.added)
        layers = {number: values[:, :, own] for number, values in self.layers.items()}
        return own, layers, self.uniform[:, own]
