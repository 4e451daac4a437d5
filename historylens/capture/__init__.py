"""Capture the attention of every layer of a PyTorch transformer during one forward pass.

    with capture(model, maps=[0]) as record:
        model(*inputs)
    record.names                                           # as the layers ran
    record[0].query_rows                                   # (B, H, T) of the first layer

Fused kernels return no attention weights. So capture reads what each attention is computed from,
computes the rows once more, and keeps what analysis needs, never a T x T matrix of its own. Forward
hooks name the module that runs, and a `TorchFunctionMode` sees its calls of attention functions.

While a mode is on, PyTorch leaves the fast path of its own layers. So the outputs are, bit for bit,
those with `torch.backends.mha.set_fastpath_enabled(False)`. (The fast path differs in the last
digits and at padded positions, and takes a float mask for a bool one: ALiBi is lost there.)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from historylens.capture.inputs import CaptureError
from historylens.capture.record import LayerAttention, Options, Record
from historylens.capture.session import Session

__all__ = ["CaptureError", "LayerAttention", "Record", "capture", "record_attention"]


@contextmanager
def capture(
    model_or_layers: nn.Module | Sequence[nn.Module],
    *,
    received: bool = True,
    maps: Sequence[int] | None = None,
    map_size: int = 512,
    query: int | Tensor = -1,
    padding: Tensor | None = None,
    layers: Sequence[str | int] | None = None,
    softmax: str | Sequence[str] = (),
    heads: int | None = None,
    inputs: bool = False,
) -> Iterator[Record]:
    """Record the attention of one forward pass that runs inside the `with` block.

    Several passes count as one where each reads on: its keys are those before, cached, and its own.

    Args:
        model_or_layers: a model, whose attention is found, or its layers one by one.
        received: also the attention that each position receives, which needs every row.
        maps: samples of the batch whose maps are kept, none by default.
        map_size: largest number of rows and of columns of a map, at least 8.
        query: position of the query token, whose row is kept, for all samples or `(B,)` whole
            numbers; negative from the end. In a padded batch: `lengths - 1`.
        padding: `(B, T)` bool, True where a token is padding, whose query is left out of received
            attention; for models whose mask does not tell (a `key_padding_mask` does).
        layers: names (of what is below them too, or with wildcards) or numbers, in the order in
            which they run, of the layers to capture; all by default.
        softmax: names of modules, with wildcards, whose softmax over the last axis is attention
            whatever its shape. One over `(B, H, T, T)` is without being named.
        heads: `H`, for attention that comes as `(B * H, T, T)` or from queries `(B * H, T, d)`.
        inputs: also what each token feeds into its query and key.

    Yields:
        The record, filled when the forward has run. Hooks and mode are gone when the block ends.

    Raises:
        CaptureError: there is no attention, a layer's cannot be read, did not run or ran twice, or
            an argument does not fit.
    """
    options = Options(received, maps, map_size, query, padding, layers, softmax, heads, inputs)
    with Session(model_or_layers, options).attached() as session:
        yield session.record
    session.check_complete()


def record_attention(name: str, weights: Tensor, mask: Tensor | None = None) -> None:
    """Hand the weights of an attention that cannot be read to the captures that are on.

    To be called in the forward of the module that attends: after a kernel, for which the weights
    are computed once more, or where they come from no softmax. Without a capture it does nothing.

    Args:
        name: the layer's name in the record, by which `layers=` chooses it.
        weights: `(B, H, Tq, Tk)`, 0 or more; rows that do not sum to 1 are divided by their sum.
        mask: which keys a query may see, as for `scaled_dot_product_attention`. By default all, or
            all up to the query's own position where no weight lies behind that.

    Raises:
        CaptureError: weights below 0, or an option of the capture does not fit.
    """
    for session in _get_current_function_mode_stack():
        if isinstance(session, Session) and session.running:
            session.take_weights(name, weights, mask)
