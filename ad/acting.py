"""The AD model acting: in-context reinforcement learning (Laskin et al. 2022, section 4).

No weight changes. The model reads the transitions before a decision, draws an action, and the new
transition is appended; once the context is full, old transitions drop out.

    returns = rollout_goals(model, np.repeat(goals, 16, axis=0), n_episodes=40, seed=0)  # (128, 40)
    logits = fast_logits(model, history)              # (B, A), as model(*history.inputs)

The encoder is walked by hand, which leaves out what the query does not need. While a context
grows, what earlier tokens computed does not change, so that a step costs two tokens: the newest
transition, whose keys and values are kept, and the query, whose are not. When the oldest transition
drops out every position shifts, and all is read anew. There is no dropout in any of it.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from tqdm import tqdm

from ad.darkroom import DarkRoom
from historylens.agent import rollout
from historylens.common.batches import MAX_ROOMS
from historylens.history import History, HistoryBuffer
from model import ADTransformer

TOKENS_AT_ONCE = 2**12  # on a CPU: what a layer makes of more of them outgrows its cache

Sliding = Literal["step", "episode"]
Keep = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.inference_mode()
def fast_logits(model: ADTransformer, history: History, positions: Tensor | None = None) -> Tensor:
    """Action logits `(B, A)` of one pass over a history: `model(*history.inputs, positions)`.

    Raises:
        ValueError: the history is longer than the model's positions, or positions do not fit.
    """
    tokens = model.embed(*history.inputs, positions=positions)  # (B, T, D)
    size = TOKENS_AT_ONCE // tokens.shape[1] if tokens.device.type == "cpu" else len(tokens)
    return torch.cat([_walk(model, part) for part in tokens.split(max(1, size))])


class CachedContext:
    """Keys and values `(L, B, H, n, D / H)` of the transitions before `B` decisions.

    context = CachedContext(model, n_rooms=128)
    logits = context.act(new)                         # (128, A), after the transitions of `new`

    Attributes:
        n_context: transitions in context; 0 forgets them.
    """

    def __init__(self, model: ADTransformer, n_rooms: int) -> None:
        config, n_heads = model.config, model.config.tf_n_head
        shape = (n_rooms, n_heads, config.n_transit, config.tf_n_embd // n_heads)
        self.n_context = 0
        self._model = model
        self._keys = model.pred_action.weight.new_empty(config.tf_n_layer, *shape)
        self._values = torch.empty_like(self._keys)

    @torch.inference_mode()
    def act(self, new: History) -> Tensor:
        """Append the `m` transitions of `new`, then give the logits in its query states.

        Returns:
            `(B, A)`, equal to `model(*context.inputs)` on the whole context.

        Raises:
            ValueError: the context would outgrow the model's positions.
        """
        model, first, end = self._model, self.n_context, self.n_context + new.n + 1
        if end > model.config.n_transit:
            raise ValueError(
                f"expected at most {model.n_context_max} transitions in context, got {end - 1}"
            )

        def keep(number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            self._keys[number, :, :, first:end] = keys
            self._values[number, :, :, first:end] = values
            return self._keys[number, :, :, :end], self._values[number, :, :, :end]

        positions = torch.arange(first, end, device=new.device).expand(new.size, -1)
        logits = _walk(model, model.embed(*new.inputs, positions=positions), keep)
        self.n_context = end - 1  # the query's own key is overwritten by the next token
        return logits


def _walk(model: ADTransformer, x: Tensor, keep: Keep | None = None) -> Tensor:
    """Action logits `(B, A)` of the last of embedded tokens `(B, m, D)`, the query.

    `keep` takes the number of a layer and the new tokens' keys and values, and gives those of all
    `T` tokens in context.
    """

    def heads(x: Tensor) -> Tensor:  # (B, m, D) -> (B, H, m, D / H)
        return x.unflatten(-1, (model.config.tf_n_head, -1)).transpose(1, 2)

    layers, width = model.transformer_encoder.layers, x.shape[2]
    for number, layer in enumerate(layers):
        weight, bias = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
        keys, values = map(heads, linear(x, weight[width:], bias[width:]).chunk(2, dim=-1))
        if keep is not None:
            keys, values = keep(number, keys, values)  # (B, H, T, D / H)
        if number == len(layers) - 1:
            x = x[:, -1:]
        queries = heads(linear(x, weight[:width], bias[:width]))
        mixed = _mix(queries, keys, values).transpose(1, 2).reshape(x.shape)
        x = layer.norm1(x + layer.self_attn.out_proj(mixed))
        x = layer.norm2(x + layer.linear2(layer.activation(layer.linear1(x))))
    return model.pred_action(x[:, -1])


def _mix(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the latest `m` of `T` tokens: `(B, H, m, D / H)`."""
    n_new, n_tokens = queries.shape[2], keys.shape[2]
    mask = None
    if 1 < n_new < n_tokens:
        mask = torch.ones(n_new, n_tokens, dtype=torch.bool, device=keys.device)
        mask = mask.tril(n_tokens - n_new)
    is_causal = n_new == n_tokens
    return scaled_dot_product_attention(queries, keys, values, mask, is_causal=is_causal)


class SlidingPolicy:
    """Decides on the latest transitions, as many as fit: a policy of `rollout`.

    One policy follows one `HistoryBuffer` from its beginning. It acts without dropout, whatever
    mode the model is in.

    Args:
        model: the model.
        n_rooms: environments `B`.
        sliding: what drops out of a full context. "step": the oldest transition at each step, so
            that the context always is as long as can be. "episode": the oldest whole episodes as
            an episode begins, as many as make room for it; keys and values then hold for an
            episode, which is several times faster.
        horizon: steps an episode, for "episode".

    Raises:
        ValueError: `sliding` is "episode" and the context does not hold two episodes.
    """

    def __init__(
        self, model: ADTransformer, n_rooms: int, sliding: Sliding = "step", horizon: int = 20
    ) -> None:
        if sliding == "episode" and model.n_context_max < 2 * horizon:
            raise ValueError(
                f"expected a context of two episodes ({2 * horizon} transitions) to drop one, "
                f"got {model.n_context_max}"
            )
        self.device = model.pred_action.weight.device
        self._model, self._context = model, CachedContext(model, n_rooms)
        self._n_max, self._sliding, self._horizon = model.n_context_max, sliding, horizon
        self._first = 0  # oldest step in context

    def act(self, buffer: HistoryBuffer, query_states: Tensor) -> Tensor:
        """Action logits `(B, A)`."""
        if n_dropped := self._n_dropped(buffer.n):
            self._first += n_dropped
            self._context.n_context = 0
        new = buffer.history(query_states, first=self._first + self._context.n_context)
        if self._sliding == "step" and new.n == self._n_max:  # nothing kept would hold a step on
            return fast_logits(self._model, new)
        return self._context.act(new)

    def _n_dropped(self, t: int) -> int:
        """How many transitions drop out of the context before step `t`."""
        n = t - self._first
        if self._sliding == "step":
            return max(0, n - self._n_max)
        if t % self._horizon:
            return 0
        # As an episode begins, n is whole episodes; its last step needs horizon - 1 of its own.
        too_many = max(0, n + self._horizon - 1 - self._n_max)
        return -(-too_many // self._horizon) * self._horizon


def rollout_goals(
    model: ADTransformer,
    goals: np.ndarray,
    n_episodes: int,
    seed: int,
    horizon: int = 20,
    sliding: Sliding = "step",
    progress: str | None = None,
) -> np.ndarray:
    """Act for many episodes in many rooms at once, with actions drawn from the model's policy.

    The history grows through all episodes. `sliding` and errors are those of `SlidingPolicy`.

    Args:
        model: the model.
        goals: `(N, 2)` int, one room each; repeat a goal for several rollouts of it.
        n_episodes: episodes in a row.
        seed: seed of the action noise. Room i's noise depends on `seed` and i alone.
        horizon: steps an episode.
        sliding: what drops out of a full context.
        progress: label of a progress bar, if one is wanted.

    Returns:
        `(N, n_episodes)` int, the reward of each episode.
    """
    n_steps, n_blocks = n_episodes * horizon, max(1, -(-len(goals) // MAX_ROOMS))
    parts = []
    with tqdm(total=n_steps * len(goals), desc=progress, disable=not progress, leave=False) as bar:
        for rooms in np.array_split(np.arange(len(goals)), n_blocks):
            environment = DarkRoom(goals[rooms], model.config.grid_size, horizon)
            policy = SlidingPolicy(model, len(rooms), sliding, horizon)
            noises = [np.random.default_rng((seed, room)) for room in rooms]
            parts.append(rollout(environment, policy, n_steps, noises, bar))
    return np.concatenate(parts).reshape(len(goals), n_episodes, horizon).sum(axis=2)
