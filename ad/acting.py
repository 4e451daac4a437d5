"""Act step by step without reading the whole context again: keys and values are kept.

While a context grows, what earlier tokens computed does not change, so a step costs two tokens: the
newest transition, which is kept, and the query, which is not. When the oldest transition drops out
every position shifts and the cache is void; reading the context anew is the same call from empty.

    context = CachedContext(model, n_rooms=128)
    logits = context.act(query_states)                            # (128, A), nothing lived through
    logits = context.act(query_states, states, actions, rewards, next_states)   # m new transitions
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from compression import History
from model import ADTransformer

TOKENS_AT_ONCE = (
    2**12
)  # in one pass on a CPU: what a layer makes of more of them outgrows its cache


class CachedContext:
    """Keys and values `(L, B, H, n, D / H)` of the `n` transitions that each of `B` rooms lived."""

    def __init__(self, model: ADTransformer, n_rooms: int) -> None:
        self.model = model
        self.n_rooms = n_rooms
        self.n_context = 0
        config, weight = model.config, model.pred_action.weight
        n_layers, n_heads = config.tf_n_layer, config.tf_n_head
        shape = (n_layers, n_rooms, n_heads, config.n_transit, config.tf_n_embd // n_heads)
        self.keys = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.empty_like(self.keys)

    def clear(self) -> None:
        """Forget everything."""
        self.n_context = 0

    @torch.inference_mode()
    def act(
        self,
        query_states: Tensor,
        states: Tensor | None = None,
        actions: Tensor | None = None,
        rewards: Tensor | None = None,
        next_states: Tensor | None = None,
    ) -> Tensor:
        """Append `m` transitions, then give the logits of the action in the query states.

        Args:
            query_states: `(B, 2)`.
            states, actions, rewards, next_states: `(B, m, 2)`, `(B, m)`, `(B, m)`, `(B, m, 2)`;
                left out where there is nothing new.

        Returns:
            `(B, A)`, equal to `model(context, query_states)` on the whole context.

        Raises:
            ValueError: the context would outgrow the model's positions.
        """
        tokens = self.model.embed_queries(query_states).unsqueeze(1)  # (B, 1, D)
        if states is not None:
            new = self.model.embed_transitions(states, actions, rewards, next_states)
            tokens = torch.cat([new, tokens], dim=1)  # (B, m + 1, D)
        end = self.n_context + tokens.shape[1]
        if end > self.model.config.n_transit:
            raise ValueError(
                f"expected at most {self.model.n_context_max} transitions in context, got {end - 1}"
            )
        hidden = tokens + self.model.pos_embedding[:, self.n_context : end]
        layers = self.model.transformer_encoder.layers
        for number, layer in enumerate(layers):
            keys, values = self._remember(number, layer, hidden)
            if number == len(layers) - 1:
                hidden = hidden[:, -1:]
            hidden = attend(layer, hidden, keys, values)
        self.n_context = end - 1  # the query's own key is overwritten by the next token
        return self.model.pred_action(hidden[:, -1])

    def _remember(
        self, number: int, layer: nn.TransformerEncoderLayer, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens `(B, m, D)`; gives all, `(B, H, n + m, D / H)`."""
        end = self.n_context + x.shape[1]
        keys, values = self.keys[number, :, :, :end], self.values[number, :, :, :end]
        new_keys, new_values = keys_and_values(layer, x)
        keys[:, :, self.n_context :] = new_keys
        values[:, :, self.n_context :] = new_values
        return keys, values


@torch.inference_mode()
def fast_logits(model: ADTransformer, history: History, positions: Tensor | None = None) -> Tensor:
    """Action logits `(B, A)` of one pass over a history: `model(*history.inputs, positions)`.

    Faster by what only the query needs of the last layer, and by going through a large batch in
    parts that fit the processor's cache. There is no dropout in it.

    Args:
        model: the model.
        history: up to `n_context_max` transitions before each of `B` decisions.
        positions: `(B, n + 1)` int, as in `ADTransformer.forward`.

    Raises:
        ValueError: the history is longer than the model's positions, or positions do not fit.
    """
    tokens = model.embed(*history.inputs, positions)  # (B, T, D)
    size = len(tokens)
    if tokens.device.type == "cpu":
        size = max(1, TOKENS_AT_ONCE // tokens.shape[1])
    return torch.cat([_logits(model, part) for part in tokens.split(max(1, size))])


def _logits(model: ADTransformer, hidden: Tensor) -> Tensor:
    """Action logits `(B, A)` from embedded tokens `(B, T, D)`."""
    layers = model.transformer_encoder.layers
    for number, layer in enumerate(layers):
        keys, values = keys_and_values(layer, hidden)
        if number == len(layers) - 1:
            hidden = hidden[:, -1:]
        hidden = attend(layer, hidden, keys, values)
    return model.pred_action(hidden[:, -1])


def keys_and_values(layer: nn.TransformerEncoderLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `(B, H, m, D / H)` of tokens `(B, m, D)`."""
    weight, bias, width = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias, x.shape[2]
    keys, values = linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
    return split_heads(layer, keys), split_heads(layer, values)


def queries(layer: nn.TransformerEncoderLayer, x: Tensor) -> Tensor:
    """Queries `(B, H, m, D / H)` of tokens `(B, m, D)`, not scaled."""
    weight, bias, width = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias, x.shape[2]
    return split_heads(layer, linear(x, weight[:width], bias[:width]))


def attend(layer: nn.TransformerEncoderLayer, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One post-norm layer on the latest `m` of `T` tokens: `(B, m, D)` to `(B, m, D)`.

    `keys` and `values` `(B, H, T, D / H)` are those of all tokens. There is no dropout.
    """
    n_queries, n_tokens = x.shape[1], keys.shape[2]
    if n_queries == n_tokens:
        mixed = scaled_dot_product_attention(queries(layer, x), keys, values, is_causal=True)
    else:
        mask = None
        if n_queries > 1:
            mask = torch.ones(n_queries, n_tokens, dtype=torch.bool, device=x.device)
            mask = mask.tril(n_tokens - n_queries)
        mixed = scaled_dot_product_attention(queries(layer, x), keys, values, attn_mask=mask)
    return feed(layer, x, mixed)


def feed(layer: nn.TransformerEncoderLayer, x: Tensor, mixed: Tensor) -> Tensor:
    """What a post-norm layer makes of its input `(B, m, D)` and its heads `(B, H, m, D / H)`."""
    x = layer.norm1(x + layer.self_attn.out_proj(mixed.transpose(1, 2).reshape(x.shape)))
    return layer.norm2(x + layer.linear2(layer.activation(layer.linear1(x))))


def split_heads(layer: nn.TransformerEncoderLayer, x: Tensor) -> Tensor:
    """`(B, m, D)` -> `(B, H, m, D / H)`."""
    return x.unflatten(-1, (layer.self_attn.num_heads, -1)).transpose(1, 2)
