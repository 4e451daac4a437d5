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

from model import ADTransformer


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
        for number, layer in enumerate(self.model.transformer_encoder.layers):
            hidden = self._layer(number, layer, hidden)
        self.n_context = end - 1  # the query's own key is overwritten by the next token
        return self.model.pred_action(hidden[:, -1])

    def _layer(self, number: int, layer: nn.TransformerEncoderLayer, x: Tensor) -> Tensor:
        """One post-norm encoder layer on new tokens `(B, m, D)`; the last, on the query alone."""
        attention = layer.self_attn
        weight, bias, width = attention.in_proj_weight, attention.in_proj_bias, x.shape[2]
        end = self.n_context + x.shape[1]
        new_keys, new_values = linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
        keys, values = self.keys[number, :, :, :end], self.values[number, :, :, :end]
        keys[:, :, self.n_context :] = self._heads(new_keys)
        values[:, :, self.n_context :] = self._heads(new_values)
        if number == self.model.config.tf_n_layer - 1:
            x = x[:, -1:]
        n_queries = x.shape[1]
        queries = self._heads(linear(x, weight[:width], bias[:width]))  # (B, H, m, D / H)
        if n_queries == end:
            mixed = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        else:
            mask = None
            if n_queries > 1:
                mask = torch.ones(n_queries, end, dtype=torch.bool, device=x.device)
                mask = mask.tril(end - n_queries)
            mixed = scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        x = layer.norm1(x + attention.out_proj(mixed.transpose(1, 2).reshape(x.shape)))
        return layer.norm2(x + layer.linear2(layer.activation(layer.linear1(x))))

    def _heads(self, x: Tensor) -> Tensor:
        """`(B, m, D)` -> `(B, H, m, D / H)`."""
        return x.unflatten(-1, (self.model.config.tf_n_head, -1)).transpose(1, 2)
