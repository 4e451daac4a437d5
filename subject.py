"""What is analysed: a model, and decisions that it makes after some history.

The analysis, the effects of dropping history and the pictures only know a `Subject`. An AD model
with decisions from learning histories is one:

    subject = ADSubject(model, histories, decisions)
    logits = subject.forward(range(10))                      # (10, A), one pass of the model
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from acting.views import ModelView, view
from attention.capture import capture
from attention.record import LayerAttention
from attention.samples import Sample
from attention.tokens import Tokens
from compression.history import History, episode_ids
from dataset import ADDataset, Histories
from decisions import Decision, describe
from model import ADTransformer


@contextmanager
def fused_attention() -> Iterator[None]:
    """Encoder layers run their fused attention kernel instead of PyTorch's inference fast path.

    On a CPU that path holds `T x T` weights: 3 times the time at 240 tokens, 10 times at 4,096.
    """
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


class Subject(Protocol):
    """A model and `n_samples` decisions, each with a history before it.

    Attributes:
        layers: what attends, in order: modules, or their names.
        n_heads: heads of each layer.
        device: where the model lies.
        n_samples: decisions.
        n_tokens: tokens that the model reads for one decision, at most.
    """

    @property
    def layers(self) -> Sequence[nn.Module | str]: ...  # noqa: D102

    @property
    def n_heads(self) -> Sequence[int]: ...  # noqa: D102

    @property
    def device(self) -> torch.device: ...  # noqa: D102

    @property
    def n_samples(self) -> int: ...  # noqa: D102

    @property
    def n_tokens(self) -> int: ...  # noqa: D102

    def sample(self, index: int) -> Sample:
        """What a reader must know about a decision."""
        ...

    def shape(self, index: int) -> Hashable:
        """Decisions of equal shape can share a pass."""
        ...

    def tokens(self, indices: Sequence[int]) -> Sequence[Tokens] | None:
        """What each token of some of the decisions is; None: a transition each, then the query."""
        ...

    def captured(
        self, layers: Sequence[int], indices: Sequence[int], **wanted: Any
    ) -> AbstractContextManager[list[LayerAttention]]:
        """Capture the attention of some layers while `forward` runs on some of the decisions.

        Args:
            layers: numbers of the layers.
            indices: the decisions.
            wanted: arguments of `attention.capture.capture`.

        Returns:
            A context whose list holds a `LayerAttention` each once the block has ended.
        """
        ...

    def forward(self, indices: Sequence[int]) -> Tensor:
        """Run the model once on some of the decisions: action logits `(B, A)`."""
        ...

    def history(self, indices: Sequence[int]) -> History:
        """What lies before some of the decisions, as compression sees it."""
        ...

    @property
    def view(self) -> ModelView:
        """The model, acting on any history."""
        ...


@dataclass(frozen=True)
class ADSubject:
    """An AD model and decisions of learning histories, each with a full context.

    Attributes:
        model: the model, in evaluation mode.
        histories: the histories that the decisions are of.
        decisions: what to analyse.
    """

    model: ADTransformer
    histories: Histories
    decisions: Sequence[Decision]

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The encoder layers."""
        return list(self.model.transformer_encoder.layers)

    @property
    def n_heads(self) -> Sequence[int]:
        """Heads of each layer."""
        return [self.model.config.tf_n_head] * self.model.config.tf_n_layer

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.pred_action.weight.device

    @property
    def n_samples(self) -> int:
        """Number of decisions."""
        return len(self.decisions)

    @property
    def n_tokens(self) -> int:
        """Tokens of a decision: every position that the model has."""
        return self.model.config.n_transit

    @cached_property
    def view(self) -> ModelView:
        """The model, acting on any history."""
        return view(self.model)

    @cached_property
    def _dataset(self) -> ADDataset:
        return ADDataset(self.histories, self.model.n_context_max)

    def sample(self, index: int) -> Sample:
        """What a reader must know about a decision."""
        return describe(self.histories, self.decisions[index], index, self.model.n_context_max)

    def shape(self, index: int) -> int:
        """Transitions before a decision, the same for all."""
        return self.model.n_context_max

    def tokens(self, indices: Sequence[int]) -> None:
        """A token is a transition, and the query stands last."""
        return None

    @contextmanager
    def captured(
        self, layers: Sequence[int], indices: Sequence[int], **wanted: Any
    ) -> Iterator[list[LayerAttention]]:
        """Capture the attention of some encoder layers in a pass."""
        found: list[LayerAttention] = []
        with capture([self.layers[number] for number in layers], **wanted) as record:
            yield found
        found += record

    def forward(self, indices: Sequence[int]) -> Tensor:
        """Action logits `(B, A)` of some decisions."""
        with fused_attention():
            return self.model(*self._history(indices).inputs)

    def history(self, indices: Sequence[int]) -> History:
        """The contexts of some decisions, with the episodes and tasks of their transitions."""
        chosen = [self.decisions[i] for i in indices]
        goals = self.histories.goals[[d.history for d in chosen]]
        _, tasks = np.unique(goals, axis=0, return_inverse=True)
        taken = np.array([d.step % self.histories.horizon for d in chosen])
        episodes = episode_ids(self.model.n_context_max, self.histories.horizon, taken)
        return self._history(
            indices, episodes=episodes.to(self.device), tasks=torch.from_numpy(tasks).flatten()
        )

    def _history(self, indices: Sequence[int], **more: Tensor) -> History:
        chosen = [self.decisions[i] for i in indices]
        window = self._dataset.windows(
            np.array([d.history for d in chosen]),
            np.array([d.step for d in chosen]),
            np.array([d.stride for d in chosen]),
        )
        names = ("states", "actions", "rewards", "next_states", "query_states")
        return History(**{name: window[name].to(self.device) for name in names}, **more)
