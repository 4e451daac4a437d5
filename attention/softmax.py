"""Read attention off a softmax that a module computes itself.

A softmax over the last of 4 axes is attention `(B, H, Tq, Tk)` if it is square or if its module was
named. One over fewer axes has to be named.

    call = read_softmax("blocks.0.attn", softmax_scores(args, kwargs), n_heads=None)
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attention.calls import pick, wide
from attention.masks import Mask
from attention.sdpa import with_heads


@dataclass(frozen=True)
class ScoreCall:
    """A call that was given its scores.

    Attributes:
        scores: `(B, H, Tq, Tk)`, the mask included.
        mask: of kind "scores".
    """

    scores: Tensor
    mask: Mask = Mask("scores")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(B, H, Tq, Tk)`."""
        return tuple(self.scores.shape)

    def row_scores(self, query: int | Tensor) -> Tensor:
        """Scores `(B, H, Tk)` of one query a sample."""
        return wide(pick(self.scores, query))

    def queries_and_keys(self) -> tuple[Tensor, None]:
        """The scores, in place of queries."""
        return self.scores, None


def softmax_scores(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The input of a softmax over its last axis; None if it is over another axis."""
    scores = args[0] if args else kwargs.get("input", kwargs.get("self"))
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(dim, int) or dim not in (-1, scores.dim() - 1):
        return None
    return scores


def is_square(scores: Tensor) -> bool:
    """Whether a softmax of these is taken for attention without being asked to: `(B, H, T, T)`."""
    return scores.dim() == 4 and scores.shape[-1] == scores.shape[-2]


def read_softmax(name: str, scores: Tensor, n_heads: int | None = None) -> ScoreCall:
    """Attention whose weights are the softmax of `scores`.

    Args:
        name: of the module that computes it, for errors.
        scores: `(B, H, Tq, Tk)`, or with 3 axes `(B * H, Tq, Tk)`.
        n_heads: `H`, needed for 3 axes.

    Raises:
        CaptureError: 3 axes and no `n_heads`.
    """
    return ScoreCall(with_heads(name, scores, n_heads, "scores"))
