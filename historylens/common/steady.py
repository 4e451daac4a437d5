"""Sums of products that are the same, bit for bit, with any number of threads."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

FEW = 64  # rows: MKL sums products of fewer in an order that depends on the number of threads
PRODUCTS = {
    "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum",
    "scaled_dot_product_attention", "multi_head_attention_forward",
}  # fmt: skip


class SteadySums(TorchFunctionMode):
    """Makes products of few rows independent of the number of threads, for up to 8 of them.

    Plain linear maps get further rows, others and single products of other kinds run on one thread.
    Those of more rows, and batches of products, are so under `MKL_CBWR=STRICT`, see
    `historylens.common`. What is compiled or traced is left as it is.
    """

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name not in PRODUCTS or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return func(*args, **kwargs)
        if name == "linear" and not kwargs and _is_plain(*args) and _has_few_rows(args[0]):
            rows = args[0].reshape(-1, args[0].shape[-1])
            mapped = func(functional.pad(rows, (0, 0, 0, FEW - len(rows))), *args[1:])
            return mapped[: len(rows)].view(*args[0].shape[:-1], -1).clone()  # no view, as usual
        given = (x for x in (*args, *kwargs.values()) if _is_usual(x) and x.dim() > 1)
        n_threads, factor = torch.get_num_threads(), next(given, None)
        if n_threads == 1 or factor is None or not _has_few_rows(factor):
            return func(*args, **kwargs)
        is_whole = name in ("linear", "multi_head_attention_forward")
        if not is_whole and factor.shape[:-2].numel() != 1:
            return func(*args, **kwargs)
        torch.set_num_threads(1)
        try:
            return func(*args, **kwargs)
        finally:
            torch.set_num_threads(n_threads)


def _is_usual(x: Any) -> bool:
    """Not of a type that makes something else of a product, nor sparse or nested."""
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and not x.is_nested


def _is_plain(*given: Tensor | None) -> bool:
    """Whether a linear map is of usual tensors that fit, and no gradients run through it."""
    given = [x for x in given if x is not None]
    if not all(map(_is_usual, given)) or [x.dim() for x in given[1:]] not in ([2], [2, 1]):
        return False
    needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return given[0].shape[-1:] == given[1].shape[-1:] and not needs_gradients


def _has_few_rows(x: Tensor) -> bool:
    return x.device.type == "cpu" and 0 < x.numel() < FEW * x.shape[-1]
