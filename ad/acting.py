"""The AD model acting: in-context reinforcement learning (Laskin et al. 2022, section 4).

The encoder is walked by hand, without dropout and what the query does not need. While a context
grows a step costs two tokens: the newest transition, whose keys and values are kept, and the query,
whose are not. When the oldest transition drops out every position shifts, and all is read anew.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from historylens.history import History, HistoryBuffer
from model import ADTransformer

TOKENS_AT_ONCE = 2**12  # on a CPU: what a layer makes of more of them outgrows its cache
Sliding = Literal["step", "episode"]


@torch.inference_mode()
def fast_logits(model: ADTransformer, history: History, positions: Tensor | None = None) -> Tensor:
    """Action logits `(B, A)`, and errors, of `model(*history.inputs, positions)`."""
    tokens = model.embed(*history.inputs, positions=positions)  # (B, T, D)
    size = TOKENS_AT_ONCE // tokens.shape[1] if tokens.device.type == "cpu" else len(tokens)
    return torch.cat([_walk(model, part) for part in tokens.split(max(1, size))])


def _walk(model: ADTransformer, x: Tensor, cache: Tensor | None = None, n_past: int = 0) -> Tensor:
    """Action logits `(B, A)` of the last of embedded tokens `(B, m, D)`, the query.

    `cache` `(2, L, B, H, n, D / H)` keeps keys and values, of `n_past` tokens before these so far.
    """
    layers, n_heads, width = model.transformer_encoder.layers, model.config.tf_n_head, x.shape[2]
    n_tokens = n_past + x.shape[1]
    for number, layer in enumerate(layers):
        weight, bias = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
        both = linear(x, weight[width:], bias[width:]).unflatten(-1, (2, n_heads, -1))
        both = both.permute(2, 0, 3, 1, 4)  # (B, m, 2, H, D / H) -> (2, B, H, m, D / H)
        if cache is not None:
            cache[:, number, :, :, n_past:n_tokens] = both
            both = cache[:, number, :, :, :n_tokens]
        if number == len(layers) - 1:
            x = x[:, -1:]  # of the last layer the query alone is read
        queries = linear(x, weight[:width], bias[:width]).unflatten(-1, (n_heads, -1))
        n_new, mask = x.shape[1], None
        if 1 < n_new < n_tokens:
            mask = x.new_ones(n_new, n_tokens, dtype=torch.bool).tril(n_tokens - n_new)
        options = {"attn_mask": mask, "is_causal": n_new == n_tokens}
        mixed = scaled_dot_product_attention(queries.transpose(1, 2), *both, **options)
        x = layer.norm1(x + layer.self_attn.out_proj(mixed.transpose(1, 2).reshape(x.shape)))
        x = layer.norm2(x + layer.linear2(layer.activation(layer.linear1(x))))
    return model.pred_action(x[:, -1])


class SlidingPolicy:
    """Decides on the latest transitions, as many as fit: a policy of `rollout`, for one buffer.

    `sliding` says what drops out of a full context. "step": the oldest transition at each step, so
    that the context always is as long as can be. "episode": the oldest whole episodes of `horizon`
    steps as an episode begins, as many as make room for it; keys and values then hold for an
    episode, which is several times faster. ValueError: the context does not hold two episodes.
    """

    def __init__(
        self, model: ADTransformer, n_rooms: int, sliding: Sliding = "step", horizon: int = 20
    ) -> None:
        if sliding == "episode" and model.n_context_max < 2 * horizon:
            expected = f"expected a context of two episodes ({2 * horizon} transitions) to drop one"
            raise ValueError(f"{expected}, got {model.n_context_max}")
        config, n_heads, weight = model.config, model.config.tf_n_head, model.pred_action.weight
        self.device, self._model = weight.device, model
        self._shift = 1 if sliding == "step" else horizon  # steps that drop out together
        self._first = self._end = 0  # keys and values are those of steps first .. end - 1
        shape = config.tf_n_layer, n_rooms, n_heads, config.n_transit, config.tf_n_embd // n_heads
        self._cache = weight.new_empty(2, *shape)

    @torch.inference_mode()
    def act(self, buffer: HistoryBuffer, query_states: Tensor) -> Tensor:
        """Action logits `(B, A)`."""
        model, shift, n_max = self._model, self._shift, self._model.n_context_max
        last = buffer.n - buffer.n % shift + shift - 1  # of this episode, or just this step
        first = max(0, -(-(last - n_max) // shift) * shift)
        if first > self._first:  # every position shifts
            self._first = self._end = first
        new = buffer.history(query_states, first=self._end)
        if new.n == n_max:  # nothing kept would hold a step on
            return fast_logits(model, new)
        n_past = self._end - first
        positions = torch.arange(n_past, n_past + new.n + 1, device=new.device)
        tokens = model.embed(*new.inputs, positions=positions.expand(new.size, -1))
        self._end = buffer.n  # the query's own key is overwritten by the next token
        return _walk(model, tokens, self._cache, n_past)
