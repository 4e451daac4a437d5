"""Sums of products that are the same, bit for bit, with any number of threads."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

FEW = 64  # rows: MKL sums products of fewer in an order that depends on the number of threads
PRODUCTS = {
    "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum",
    "scaled_dot_product_attention",
}  # fmt: skip


class SteadySums(TorchFunctionMode):
    """Makes products of few rows independent of the number of threads, for up to 8 of them.

    Linear maps get further rows, single products of other kinds run on one thread. Those of more
    rows, and batches of products, are so under `MKL_CBWR=STRICT`, see `historylens.common`.
    """

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "linear" and len(args) > 1 and args[1].dim() == 2 and _has_few_rows(args[0]):
            rows = args[0].reshape(-1, args[0].shape[-1])
            more = functional.pad(rows, (0, 0, 0, FEW - len(rows)))
            mapped = func(more, *args[1:], **kwargs)
            return mapped[: len(rows)].view(*args[0].shape[:-1], -1)
        is_whole = name == "multi_head_attention_forward"
        n_threads = torch.get_num_threads()
        if n_threads == 1 or not (is_whole or name in PRODUCTS):
            return func(*args, **kwargs)
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 1)
        factor = next(given, None)
        is_few = factor is not None and _has_few_rows(factor)
        if not is_few or not (is_whole or factor.shape[:-2].numel() == 1):
            return func(*args, **kwargs)
        torch.set_num_threads(1)
        try:
            return func(*args, **kwargs)
        finally:
            torch.set_num_threads(n_threads)


def _has_few_rows(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.is_nested:
        return False
    return 0 < x.numel() < FEW * x.shape[-1]
