"""The Algorithm Distillation transformer (Laskin et al. 2022, section 3).

A token is one transition. The context `c_1 .. c_n` is followed by one query token, the state in
which to act; the query token's output gives the action logits. Axes: `B` samples, `n` context
tokens, `T = n + 1` tokens with the query, `D` width, `A` actions.

    logits = ADTransformer(ModelConfig())(states, actions, rewards, next_states, query_states)
"""

import torch
from torch import Tensor, nn

from config import ModelConfig


class ADTransformer(nn.Module):
    """Causal transformer from a history of transitions and a query state to action logits.

    Parameters are named as in existing Dark Room code, whose checkpoints load as they are.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, width = config, config.tf_n_embd
        self.n_context_max = config.n_transit - 1  # transitions: the query takes the last position
        self.embed_context = nn.Linear(2 * config.dim_states + config.num_actions + 1, width)
        self.embed_query_state = nn.Embedding(config.grid_size**2, width)
        self.pos_embedding = nn.Parameter(torch.empty(1, config.n_transit, width))
        layer = nn.TransformerEncoderLayer(
            width, config.tf_n_head, config.tf_n_inner, config.tf_dropout, "gelu", batch_first=True
        )
        self.transformer_encoder = nn.TransformerEncoder(
            layer, config.tf_n_layer, enable_nested_tensor=False
        )
        for layer in self.transformer_encoder.layers:
            layer.self_attn.dropout = 0.0  # dropout on the weights would rule out the fused kernel
        self.pred_action = nn.Linear(width, config.num_actions)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Start with comparable parts, which saves most of the updates before anything is learned.

        Coordinates enter as if standardised, so that they do not drown the reward. A query state
        starts as the sum of what the same cell adds as state and as next state of a transition,
        positions as sines and cosines (Vaswani et al. 2017) of 2 pi to 2000 pi positions.
        """
        # The encoder copies one layer: give each its own weights.
        for parameter in self.transformer_encoder.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        config, weight, n_states = self.config, self.embed_context.weight, self.config.dim_states
        middle, spread = (config.grid_size - 1) / 2, max(1.0, config.grid_size / 12**0.5)
        nn.init.normal_(weight, std=0.3)
        weight[:, :n_states] /= spread
        weight[:, -n_states:] /= spread
        weight[:, -n_states - 1] *= 3.0
        of_cell = weight[:, :n_states] + weight[:, -n_states:]  # (D, 2)
        self.embed_context.bias.copy_(-middle * of_cell.sum(dim=1))
        side = torch.arange(config.grid_size)
        cells = torch.cartesian_prod(side, side) - middle  # (grid * grid, 2)
        noise = 0.1 * torch.randn_like(self.embed_query_state.weight)
        self.embed_query_state.weight.copy_(cells @ of_cell.T + noise)
        n_waves = -(-config.tf_n_embd // 2)
        frequency = 1000.0 ** (-torch.arange(n_waves) / n_waves)
        angle = torch.arange(config.n_transit)[:, None] * frequency  # (T, waves)
        waves = torch.cat([angle.sin(), angle.cos()], dim=1)
        self.pos_embedding.copy_(0.7 * waves[:, : config.tf_n_embd])

    def embed(self, *inputs: Tensor, positions: Tensor | None = None) -> Tensor:
        """Tokens `(B, n + q, D)` of a context and the queries behind it, with their positions.

        Arguments and errors are those of `forward`, but for `query_states` `(B, 2)` or `(B, q, 2)`:
        without `positions` they stand behind the `q` longest prefixes of the context.
        """
        states, actions, rewards, next_states, query_states = inputs
        config, n = self.config, states.shape[1]
        if n > (most := self.n_context_max):
            why = f"(n_transit {config.n_transit}, one position is the query's)"
            raise ValueError(f"expected at most {most} context transitions {why}, got {n}")
        one_hot = nn.functional.one_hot(actions.long(), config.num_actions)
        parts = [states, one_hot, rewards.unsqueeze(-1), next_states]
        dtype = self.embed_context.weight.dtype
        context = self.embed_context(torch.cat([part.to(dtype) for part in parts], dim=-1))
        cells = query_states.long() if query_states.dim() == 3 else query_states.long()[:, None]
        queries = self.embed_query_state(cells[..., 0] * config.grid_size + cells[..., 1])
        if positions is None:  # added apart: gradients are summed over samples, in one order
            place = self.pos_embedding[:, : n + 1]
            behind = place[:, n + 1 - queries.shape[1] :]
            return torch.cat([context + place[:, :n], queries + behind], dim=1)
        tokens = torch.cat([context, queries], dim=1)
        fits = positions.shape == tokens.shape[:2] and not positions.is_floating_point()
        if not fits or ((positions < 0) | (positions >= config.n_transit)).any():
            expected = f"{tuple(tokens.shape[:2])} of whole numbers in 0..{config.n_transit - 1}"
            got = (
                f"{tuple(positions.shape)} of {positions.dtype} with {positions.unique().tolist()}"
            )
            raise ValueError(f"expected positions {expected}, got {got}")
        return tokens + self.pos_embedding[0, positions.long()]

    def forward(
        self,
        states: Tensor,
        actions: Tensor,
        rewards: Tensor,
        next_states: Tensor,
        query_states: Tensor,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Action logits `(B, A)` for query states `(B, 2)` after a context of `n` transitions.

        States are `(B, n, 2)`, actions in 0..A-1 and rewards `(B, n)`, of any number type.
        `positions` `(B, n + 1)` int are where each transition and, last, the query stands; None:
        `0 .. n`. A context from which transitions were dropped may keep its old ones. ValueError:
        the context is longer than the positions that the model has, or positions are of another
        shape or outside `0 .. n_transit - 1`.
        """
        inputs = states, actions, rewards, next_states, query_states
        tokens = self.embed(*inputs, positions=positions)  # (B, T, D)
        causal = nn.Transformer.generate_square_subsequent_mask
        mask = causal(tokens.shape[1], tokens.device, tokens.dtype)
        hidden = self.transformer_encoder(tokens, mask=mask, is_causal=True)  # (B, T, D)
        return self.pred_action(hidden[:, -1])  # (B, A)

    def forward_packed(self, *inputs: Tensor) -> Tensor:
        """Action logits `(B, q, A)` after the `q` longest prefixes of a window in one pass.

        Of `[c_1 .. c_n, q_0 .. q_n]` query `q_j` takes position `j`, as behind the prefix
        `c_1 .. c_j`, and sees that prefix and itself. No context token sees a query, so each output
        equals that of a separate pass on its prefix, for about twice the cost of a single one.
        Arguments are those of `embed`.
        """
        tokens = self.embed(*inputs)  # (B, n + q, D)
        n, n_queries = inputs[0].shape[1], inputs[-1].shape[1]
        index = torch.arange(n + n_queries, device=tokens.device)
        position = torch.where(index < n, index, index + 1 - n_queries)  # where each stands
        before = (index < n) & (index < position[:, None])
        allowed = before | (index == index[:, None])
        mask = torch.where(allowed, 0.0, float("-inf")).to(tokens.dtype)
        hidden = self.transformer_encoder(tokens, mask=mask, is_causal=False)
        return self.pred_action(hidden[:, n:])  # (B, q, A)
