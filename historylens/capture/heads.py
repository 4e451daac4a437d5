"""Heads told apart: what each gives, and what a model does when that, or what it reads, is another.

    with heads(model, change={"layers.0": torch.zeros_like}) as seen:
        model(*inputs)
    seen["layers.0"].query_rows                                       # (B, H, T)

It works where the heads' outputs lie side by side before a projection: in `nn.MultiheadAttention`,
with `scaled_dot_product_attention`, and where weights from a softmax are multiplied with values.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from historylens.capture import inputs
from historylens.capture.follow import PRODUCTS
from historylens.capture.record import Options
from historylens.capture.session import Session, without_modes

_PROJECTIONS = {"linear": (0, 1, False), "addmm": (1, 2, True)}  # places of x and W; whether x @ W
Change = Callable[[Tensor], Tensor]  # of what the heads of a layer give, (B, H, Tq, d)


@dataclass(eq=False)
class HeadOutput:
    """What the heads of a layer read and gave. The layer's output is `projection` of all of them.

    Attributes:
        values: `(B, H, Tk, d)`, of which each head's output is the mean by its weights.
        output: `(B, H, Tq, d)`, after any change.
        query_rows: `(B, H, Tk)`, the query token's attention, before any change.
        projection: `(D, H * d)`, the weight that heads side by side are multiplied with; None
            where no linear map followed directly.
    """

    values: Tensor
    output: Tensor
    query_rows: Tensor
    projection: Tensor | None = None

    def added(self) -> Tensor:
        """What the heads together add to the query token for each key, `(B, Tk, D)`: equation 3 of
        Kobayashi et al. 2020. Over all keys it sums to the layer's output, its bias apart.
        """
        weighted = self.query_rows[..., None].to(self.values) * self.values  # (B, H, Tk, d)
        return functional.linear(weighted.transpose(1, 2).flatten(2), self.projection)

    def shares(self) -> tuple[Tensor, Tensor]:
        """How much of what the heads add to the query token is due to each key, `(B, Tk)` each.

        The norm of what is added for it (Kobayashi et al. 2020, arXiv 2004.10102), as a share of
        the sum of these; and its part along the sum `y` of all, `<x_j, y> / <y, y>`, negative where
        a key works against the rest (after Kobayashi et al. 2021, arXiv 2109.07152).
        """
        added = self.added().double()
        whole, norms = added.sum(1, keepdim=True), added.norm(dim=-1)
        along = (added * whole).sum(-1) / whole.square().sum(-1).clamp(min=1e-300)
        return norms / norms.sum(-1, keepdim=True).clamp(min=1e-300), along


class _Heads(Session):
    """Follows attention on to the outputs of its heads, changes them, and hides keys."""

    change: Mapping[str, Change]
    hide: Mapping[str, Tensor]
    heads: dict[str, HeadOutput]

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        output, kwargs = super().__torch_function__(func, types, args, kwargs), kwargs or {}
        name, kernel = self.newest, getattr(func, "__name__", "")
        reader = inputs.reader_of(kernel)
        if not name:
            self._find_projection(kernel, args)
            mixed = self.weights.whole_in(args) if kernel in PRODUCTS else None
            is_wanted = mixed and self._follows(mixed[0])
            return self._of_product(*mixed, output, args) if is_wanted else output
        if not self._follows(name):
            return output
        if reader is inputs.read_sdpa:
            return self._of_sdpa(name, output, inputs.ScaledDot(*args, **kwargs))
        if reader is inputs.read_multi_head:
            return self._of_multi_head(name, output, inputs.MultiHead(*args, **kwargs))
        if name in self.hide:  # a softmax: without them, the others share what they held
            weights = output.reshape(self.weights[output].shape)
            weights = weights.masked_fill(self._hidden(name)[:, None], 0)
            hidden = (weights / weights.sum(-1, keepdim=True)).reshape(output.shape)
            self.weights[hidden] = self.weights[output]
            return hidden
        return output

    def _follows(self, name: str) -> bool:
        """Whether a layer that has attended is wanted, and chosen by `layers`."""
        wanted = {*self.change, *self.hide}
        return (not wanted or name in wanted) and self.record.calls.get(name) is not None

    def _of_product(self, name: str, shape: Sequence[int], output: Tensor, args: tuple) -> Tensor:
        """Of weights that a softmax gave `(B, H, Tq, Tk)`, with values; heads or tokens first."""
        values, (size, n_heads, n_queries, n_keys) = args[-1], shape
        if not isinstance(values, Tensor):
            return output
        if output.shape[:-1] == (size, n_queries, n_heads) and n_heads not in (n_queries, n_keys):
            values = values.transpose(1, 2) if values.shape[1] == n_keys else values
            return self._follow_heads(name, values, output.transpose(1, 2)).transpose(1, 2)
        is_whole = output.shape[:-1].numel() == size * n_heads * n_queries
        if not is_whole or output.shape[-2] != n_queries or values.shape[-2] != n_keys:
            return output  # of other axes
        values = values.reshape(size, -1, *values.shape[-2:])
        heads = self._follow_heads(name, values, output.reshape(*shape[:3], -1))
        return heads.reshape(output.shape)

    def _hidden(self, name: str) -> Tensor:
        """What is hidden `(B, Tq, Tk)` among all keys of a layer, those of no token too."""
        return functional.pad(self.hide[name], self.record.calls[name].extra)

    def _of_sdpa(self, name: str, output: Tensor, given: inputs.ScaledDot) -> Tensor:
        if name in self.hide:
            hidden = self._hidden(name)
            if output.dim() == 3:
                hidden = hidden.repeat_interleave(len(output) // len(hidden), 0)
            hidden = hidden[:, None] if output.dim() == 4 else hidden
            mask = _added(given.attn_mask, hidden, output, allows=True, causal=given.is_causal)
            given = given._replace(attn_mask=mask, is_causal=False)
            output = functional.scaled_dot_product_attention(**given._asdict())
        heads, values = (
            inputs.with_heads(name, x, self.options.heads, what)
            for x, what in ((output, "outputs"), (given.value, "values"))
        )
        return self._follow_heads(name, values, heads).reshape(output.shape)

    def _of_multi_head(self, name: str, output: tuple, given: inputs.MultiHead) -> tuple:
        attend, n_heads = functional.multi_head_attention_forward, given.num_heads
        if name in self.hide:
            hidden = self.hide[name].repeat_interleave(n_heads, 0)  # (B * H, Tq, Tk)
            is_bare = given.is_causal and given.key_padding_mask is None and not given.need_weights
            mask = None if is_bare else given.attn_mask
            mask = _added(mask, hidden, given.query, allows=False, causal=is_bare)
            given = given._replace(attn_mask=mask, is_causal=False)
            output = attend(**given._asdict())
        whole = torch.eye(given.embed_dim_to_check, dtype=output[0].dtype, device=output[0].device)
        bare = given._replace(out_proj_weight=whole, out_proj_bias=None, need_weights=False)
        with without_modes(), torch.random.fork_rng():  # dropout draws as once
            inner = attend(**bare._asdict())[0]
        inner = inner.reshape(len(given.query), -1, n_heads, len(whole) // n_heads)
        values = inputs.projection_of(given).of(given.value, 2)
        values = values.reshape(len(values), -1, *inner.shape[2:]).permute(1, 2, 0, 3)
        heads = self._follow_heads(name, values, inner.permute(1, 2, 0, 3))
        self.heads[name].projection = given.out_proj_weight.detach()
        if name not in self.change:
            return output
        joined = heads.permute(2, 0, 1, 3).flatten(2)  # (T, B, D)
        joined = functional.linear(joined, given.out_proj_weight, given.out_proj_bias)
        return joined.reshape(output[0].shape), *output[1:]

    def _follow_heads(self, name: str, values: Tensor, output: Tensor) -> Tensor:
        if name in self.change:
            output = self.change[name](output).to(output.dtype)
        values = values.repeat_interleave(output.shape[1] // values.shape[1], 1)
        seen = self.record.calls[name]
        if values.shape[2] > sum(seen.passes):  # those of tokens
            values = values[:, :, seen.extra[0] : values.shape[2] - seen.extra[1]]
        self.heads[name] = HeadOutput(values.detach(), output.detach(), seen.layer.query_rows)
        return output

    def _find_projection(self, kernel: str, args: tuple) -> None:
        """Whether this multiplies the heads of the latest layer, side by side, with a weight."""
        latest = next(reversed(self.heads.values()), None)
        if kernel not in _PROJECTIONS or latest is None or latest.projection is not None:
            return
        at_x, at_weight, is_turned = _PROJECTIONS[kernel]
        joined = latest.output.transpose(1, 2).flatten(2)  # (B, T, H * d)
        x = args[at_x] if len(args) > at_weight else None
        if x is None or x.numel() != joined.numel() or x.shape[-1] != joined.shape[-1]:
            return
        if torch.equal(x.reshape(joined.shape), joined):
            weight = args[at_weight].detach()
            latest.projection = weight.T if is_turned else weight


def _added(mask: Tensor | None, hidden: Tensor, like: Tensor, allows: bool, causal: bool) -> Tensor:
    """A mask, of which a bool `allows` or forbids, and what is hidden, as a float to add."""
    added = like.new_zeros(())
    if causal:
        hidden = hidden | torch.ones_like(hidden).triu(1)
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | (~mask if allows else mask)
    elif mask is not None:
        added = mask.to(like.dtype)
    return added.masked_fill(hidden, -torch.inf)


@contextmanager
def heads(
    model: nn.Module,
    *,
    change: Mapping[str, Change] | None = None,
    hide: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Iterator[dict[str, HeadOutput]]:
    """A block in which the heads of a model are told apart; filled, by layer, as they run.

    Args:
        model: what runs inside.
        change: by the name of a layer, what its heads are to give instead of `(B, H, Tq, d)`.
        hide: by the name of a layer, keys that queries are not to see, `(B, Tq, Tk)` bool, beside
            those that its own mask forbids. Each query has to see one.
        options: those of `capture` that say what is attention, and which token is the query.

    Yields:
        Name of a layer -> `HeadOutput`: of all where nothing is changed or hidden, else of these.
        A layer whose heads cannot be told apart is missing, and nothing is changed there.
    """
    wanted = {**(change or {}), **(hide or {})}
    if wanted and not any("#" in name for name in wanted):
        options = options | {"layers": [*wanted]}  # nothing need be read of the others
    session = _Heads(model, Options(received=False, **options))
    session.change, session.hide, session.heads = change or {}, hide or {}, {}
    with session.attached():
        yield session.heads
