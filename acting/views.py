"""A model as compression sees it: something that acts on a history, and can be looked into.

view = view(model)                                   # an AD transformer
logits = view.logits(history)                        # (B, A), equal to model(*history.inputs)
known = view.look(history, ["query_attention"])      # fields of a History
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from acting.decoding import attend, fast_logits, keys_and_values, queries
from compression import History
from config import UserError
from model import ADTransformer

Positions = Literal["reindexed", "original"]
LOOKS = ("query_attention", "received", "last_rows")  # fields of a History that a look gives
N_LAST_ROWS = 8  # transitions whose attention rows are in last_rows: those that vote
MAX_SCORES = 2**22  # attention scores held at once by a look


@dataclass(frozen=True)
class ModelView:
    """A model that acts on a `History`, whatever kind of model it is.

    Attributes:
        n_max: transitions that it can read at once.
        logits: from a history of up to `n_max` transitions to action logits `(B, A)`; where
            `positions` is "original", from a history and positions `(B, n + 1)` int64.
        look: from a history of up to `n_max` transitions and the wanted ones of `LOOKS` to a dict
            of those fields of `History`, means over layers and heads. None: the model cannot be
            looked into.
        positions: where a kept transition stands: "reindexed", right behind the one kept before
            it, or "original", where the full history has it.
        device: where histories have to lie.
    """

    n_max: int
    logits: Callable[..., Tensor]
    look: Callable[[History, Collection[str]], dict[str, Tensor]] | None = None
    positions: Positions = "reindexed"
    device: torch.device | str = "cpu"


def view(model: ADTransformer, positions: Positions = "reindexed") -> ModelView:
    """The view of an AD transformer, without dropout in whatever mode the model is.

    Raises:
        UserError: there are no such positions.
    """
    if positions not in get_args(Positions):
        raise UserError(f"expected positions as one of {get_args(Positions)}, got {positions!r}")
    return ModelView(
        n_max=model.n_context_max,
        logits=partial(fast_logits, model),
        look=partial(look, model),
        positions=positions,
        device=model.pred_action.weight.device,
    )


@torch.inference_mode()
def look(model: ADTransformer, history: History, wanted: Collection[str]) -> dict[str, Tensor]:
    """Attention to a history, averaged over layers and heads, from one pass over it.

    Never holds all scores of a long history: what is summed is summed in blocks of rows. The last
    layer's output is not computed.

    Args:
        model: the model.
        history: up to `n_context_max` transitions before each of `B` decisions.
        wanted: some of `LOOKS`.

    Returns:
        Of `query_attention (B, n)`, `received (B, n)` and `last_rows (B, min(8, n), n)` those that
        are wanted, as `History` takes them.
    """
    layers = model.transformer_encoder.layers
    hidden = model.embed(*history.inputs)  # (B, n + 1, D)
    n, total = history.n, {}
    for number, layer in enumerate(layers):
        keys, values = keys_and_values(layer, hidden)
        for name, value in _look_at(layer, hidden, keys, wanted).items():
            total[name] = total.get(name, 0) + value
        if number < len(layers) - 1:
            hidden = attend(layer, hidden, keys, values)
    return {name: value[..., :n] / len(layers) for name, value in total.items()}


def _look_at(
    layer: nn.TransformerEncoderLayer, x: Tensor, keys: Tensor, wanted: Collection[str]
) -> dict[str, Tensor]:
    """What is wanted of one layer's attention, over all `T = n + 1` tokens."""
    n = x.shape[1] - 1
    found = {}
    if "query_attention" in wanted:
        found["query_attention"] = attention_rows(layer, x, keys, n, n + 1)[:, 0]
    if "last_rows" in wanted:
        found["last_rows"] = attention_rows(layer, x, keys, max(0, n - N_LAST_ROWS), n)
    if "received" in wanted:
        received = x.new_zeros(x.shape[:2])
        step = max(1, MAX_SCORES // keys[..., 0].numel())
        for start in range(0, n, step):
            rows = attention_rows(layer, x, keys, start, min(start + step, n))
            received += rows.sum(dim=1)
        found["received"] = received
    return found


def attention_rows(
    layer: nn.TransformerEncoderLayer, x: Tensor, keys: Tensor, start: int, stop: int
) -> Tensor:
    """Causal attention of the tokens `start .. stop - 1`, mean over heads: `(B, stop - start, T)`.

    Args:
        layer: an encoder layer.
        x: `(B, T, D)`, its input.
        keys: `(B, H, T, D / H)`.
        start, stop: rows wanted.
    """
    q = queries(layer, x[:, start:stop]) / keys.shape[-1] ** 0.5
    scores = q @ keys.mT  # (B, H, R, T)
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(start + 1)
    return scores.masked_fill_(ahead, -torch.inf).softmax(-1).mean(dim=1)
