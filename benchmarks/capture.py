"""Seconds and peak memory of a forward pass: plain, with capture, and with eager attention weights.

    python benchmarks/capture.py --tokens 256 4096 --threads 2    # without flags: minutes
    python benchmarks/capture.py --device cuda --samples 32

Every variant runs in a process of its own on the same input; memory is its peak beyond what it held
before its first pass. The eager way: each layer returns its whole attention by `need_weights`.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from setting import eager_weights, peak_mib, print_table, read_flags, seconds_of
from torch import nn

from historylens.capture import capture

PLAIN, EAGER = "plain forward, fused attention", "all weights through need_weights"
CAPTURED = {  # variant -> arguments of `capture`
    "capture, query rows only": {"received": False},
    "capture, and received attention": {},
    "capture, received attention and a map": {"maps": [0]},
}


def rows_of(options: argparse.Namespace) -> Iterator[tuple]:
    """A row for each context length and variant, from a process of its own."""
    for n_tokens in options.tokens:
        for variant in (PLAIN, *CAPTURED, *[EAGER] * (n_tokens <= options.eager_tokens)):
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                seconds, mib = alone.submit(measure, variant, n_tokens, options).result()
            if variant == PLAIN:
                plain_seconds, plain_mib = seconds, mib
            yield n_tokens, variant, seconds, seconds / plain_seconds, mib - plain_mib


def measure(variant: str, n_tokens: int, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of the fastest of several passes, and the peak memory they add, MiB."""
    torch.set_num_threads(options.threads)
    torch.backends.mha.set_fastpath_enabled(False)  # on a CPU it holds T x T and is slower
    torch.manual_seed(0)
    with torch.device(options.device):  # as a default it would see every call, like a capture
        layer = nn.TransformerEncoderLayer(64, 4, 256, 0.0, activation="gelu", batch_first=True)
        encoder = nn.TransformerEncoder(layer, options.layers, enable_nested_tensor=False).eval()
        x = torch.randn(options.samples, n_tokens, 64)
        mask = torch.full((n_tokens, n_tokens), -torch.inf).triu_(1)
        count = torch.arange(n_tokens, 0, -1)

    def run() -> object:
        if variant == PLAIN:
            return encoder(x, mask=mask, is_causal=True)
        if variant == EAGER:  # the same: query rows, received attention and maps
            weights = eager_weights(encoder, x, mask)
            return [(each[:, :, -1], each.sum(2) / count, each) for each in weights]
        with capture(encoder, **CAPTURED[variant]):
            return encoder(x, mask=mask, is_causal=True)

    before, seconds = peak_mib(options.device), []
    with torch.no_grad():
        while not seconds or sum(seconds) < options.seconds:
            seconds += seconds_of(run)
    return min(seconds), peak_mib(options.device) - before


if __name__ == "__main__":
    sizes = {"tokens": [256, 1024, 4096, 16384], "samples": 1, "layers": 4, "threads": 1}
    flags = read_flags(__doc__, **sizes, seconds=3.0, eager_tokens=8192, device="cpu")
    print(f"{flags.samples} sample(s), {flags.layers} layers, 4 heads, width 64", end=", ")
    print(f"{flags.threads} thread(s), {flags.device}")
    columns = "T | variant | seconds:.4f | / plain:.2f | extra peak MiB:.0f"
    print_table(columns, rows_of(flags))
