"""The Algorithm Distillation transformer (Laskin et al. 2022, section 3).

A token is one transition. The context `c_1 .. c_n` is followed by one query token, the state in
which to act; the query token's output gives the action logits. Axes: `B` samples, `n` context
tokens, `T = n + 1` tokens with the query, `D` width, `A` actions.

    model = ADTransformer(ModelConfig())
    logits = model(states, actions, rewards, next_states, query_states)       # (B, A)

Training runs a window once with all its `n + 1` queries packed behind the context
(`forward_packed`): the same logits as one pass a prefix, for about twice the cost of a single one.
"""

import torch
from torch import Tensor, nn

from config import ModelConfig


class ADTransformer(nn.Module):
    """Causal transformer from a history of transitions and a query state to action logits.

    Parameter names are those of existing Dark Room code for Algorithm Distillation, so that its
    checkpoints load as they are.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.tf_n_embd
        d_token = 2 * config.dim_states + config.num_actions + 1
        self.embed_context = nn.Linear(d_token, width)
        self.embed_query_state = nn.Embedding(config.grid_size**2, width)
        self.pos_embedding = nn.Parameter(torch.empty(1, config.n_transit, width))
        layer = nn.TransformerEncoderLayer(
            width,
            config.tf_n_head,
            dim_feedforward=config.tf_n_inner,
            dropout=config.tf_dropout,
            activation="gelu",
            batch_first=True,
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
        starts as the sum of what the same cell adds as state and as next state of a transition.
        Positions start as sines and cosines, from which "the token before" is easy to learn.
        """
        # The encoder copies one layer: give each its own weights.
        for layer in self.transformer_encoder.layers:
            for parameter in layer.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        config, weight = self.config, self.embed_context.weight
        middle, spread = (config.grid_size - 1) / 2, max(1.0, config.grid_size / 12**0.5)
        n_states = config.dim_states
        nn.init.normal_(weight, std=0.3)
        weight[:, :n_states] /= spread
        weight[:, -n_states:] /= spread
        weight[:, -n_states - 1] *= 3.0
        of_cell = weight[:, :n_states] + weight[:, -n_states:]  # (D, 2)
        self.embed_context.bias.copy_(-middle * of_cell.sum(dim=1))
        rows, cols = torch.arange(config.grid_size), torch.arange(config.grid_size)
        cells = torch.cartesian_prod(rows, cols) - middle  # (grid * grid, 2)
        noise = 0.1 * torch.randn_like(self.embed_query_state.weight)
        self.embed_query_state.weight.copy_(cells @ of_cell.T + noise)
        self.pos_embedding.copy_(0.7 * sinusoids(config.n_transit, config.tf_n_embd))

    @property
    def n_context_max(self) -> int:
        """Longest context in transitions: the query token takes the last position."""
        return self.config.n_transit - 1

    def embed_transitions(
        self, states: Tensor, actions: Tensor, rewards: Tensor, next_states: Tensor
    ) -> Tensor:
        """Embed transitions without their positions.

        Args:
            states: `(B, n, 2)`, any number type, as are the others.
            actions: `(B, n)`, whole numbers in 0..A-1.
            rewards: `(B, n)`.
            next_states: `(B, n, 2)`.

        Returns:
            `(B, n, D)`.
        """
        dtype = self.embed_context.weight.dtype
        one_hot = nn.functional.one_hot(actions.long(), self.config.num_actions)
        parts = [states, one_hot, rewards.unsqueeze(-1), next_states]
        return self.embed_context(torch.cat([part.to(dtype) for part in parts], dim=-1))

    def embed_queries(self, query_states: Tensor) -> Tensor:
        """Embed query states `(..., 2)` without their positions: `(..., D)`."""
        cells = query_states.long()
        return self.embed_query_state(cells[..., 0] * self.config.grid_size + cells[..., 1])

    def embed(
        self,
        states: Tensor,
        actions: Tensor,
        rewards: Tensor,
        next_states: Tensor,
        query_states: Tensor,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Tokens `(B, n + 1, D)` of a context and the query behind it, with their positions.

        Arguments and errors are those of `forward`.
        """
        n = self._check_length(states)
        context = self.embed_transitions(states, actions, rewards, next_states)
        query = self.embed_queries(query_states).unsqueeze(1)
        tokens = torch.cat([context, query], dim=1)
        if positions is None:
            return tokens + self.pos_embedding[:, : n + 1]
        n_transit = self.config.n_transit
        fits = positions.shape == tokens.shape[:2] and not positions.is_floating_point()
        if not fits or ((positions < 0) | (positions >= n_transit)).any():
            raise ValueError(
                f"expected positions {tuple(tokens.shape[:2])} of whole numbers in "
                f"0..{n_transit - 1}, got {tuple(positions.shape)} of {positions.dtype} with "
                f"{positions.unique().tolist()}"
            )
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

        Args:
            states, actions, rewards, next_states: the context, as in `embed_transitions`, with
                `0 <= n <= n_transit - 1`.
            query_states: `(B, 2)`.
            positions: `(B, n + 1)` int, where each transition and, last, the query stands; None:
                `0 .. n`. A context from which transitions were dropped may keep its old ones.

        Raises:
            ValueError: the context is longer than the positions that the model has, or positions
                are of another shape or outside `0 .. n_transit - 1`.
        """
        tokens = self.embed(states, actions, rewards, next_states, query_states, positions)
        n_tokens = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(n_tokens, tokens.device, tokens.dtype)
        hidden = self.transformer_encoder(tokens, mask=mask, is_causal=True)  # (B, T, D)
        return self.pred_action(hidden[:, -1])  # (B, A)

    def forward_packed(
        self,
        states: Tensor,
        actions: Tensor,
        rewards: Tensor,
        next_states: Tensor,
        query_states: Tensor,
    ) -> Tensor:
        """Action logits for every prefix of a window in one pass.

        The sequence is `[c_1 .. c_n, q_0 .. q_n]`: query `q_j` takes position `j`, where it would
        stand behind the prefix `c_1 .. c_j`, and sees that prefix and itself. No context token
        sees a query, so each output equals that of a separate pass on its prefix.

        Args:
            states, actions, rewards, next_states: the window, as in `embed_transitions`.
            query_states: `(B, q, 2)`, the states to act in after the `q` longest prefixes; after
                every prefix where `q = n + 1`.

        Returns:
            `(B, q, A)`.
        """
        n = self._check_length(states)
        position = self.pos_embedding[:, : n + 1]
        context = self.embed_transitions(states, actions, rewards, next_states) + position[:, :n]
        n_queries = query_states.shape[1]
        queries = self.embed_queries(query_states) + position[:, n + 1 - n_queries :]
        tokens = torch.cat([context, queries], dim=1)  # (B, n + q, D)
        mask = packed_mask(n, n_queries, tokens.device, tokens.dtype)
        hidden = self.transformer_encoder(tokens, mask=mask, is_causal=False)
        return self.pred_action(hidden[:, n:])  # (B, q, A)

    def _check_length(self, states: Tensor) -> int:
        n = states.shape[1]
        if n > self.n_context_max:
            raise ValueError(
                f"expected at most {self.n_context_max} context transitions "
                f"(n_transit {self.config.n_transit}, one position is the query's), got {n}"
            )
        return n


def sinusoids(n_positions: int, width: int) -> Tensor:
    """Sines and cosines of every position, `(n_positions, width)`, as in Vaswani et al. 2017.

    Wavelengths grow from 2 pi to 2000 pi positions.
    """
    n_waves = -(-width // 2)
    frequency = 1000.0 ** (-torch.arange(n_waves) / n_waves)
    angle = torch.arange(n_positions)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width]


def packed_mask(
    n: int,
    n_queries: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Additive attention mask of `[c_1 .. c_n, q_j .. q_n]`, 0 or -inf.

    Square, `n + n_queries` wide: the queries are those after the longest prefixes.
    """
    n_tokens = n + n_queries
    index = torch.arange(n_tokens, device=device)
    is_context = index < n
    # Prefix length after which a token stands: c_i sees c_1 .. c_i, q_j sees c_1 .. c_j.
    sees_up_to = torch.where(is_context, index, index - n_queries)
    allowed = is_context[None, :] & (index[None, :] <= sees_up_to[:, None])
    allowed = allowed | torch.eye(n_tokens, dtype=torch.bool, device=device)
    mask = torch.zeros(n_tokens, n_tokens, dtype=dtype, device=device)
    return mask.masked_fill_(~allowed, float("-inf"))
