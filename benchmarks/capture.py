"""Seconds and peak memory of a forward pass: plain, with capture, and with eager attention weights.

    python benchmarks/capture.py                                  # all context lengths, minutes
    python benchmarks/capture.py --tokens 256 4096 --threads 2

Every variant runs in a process of its own on the same input; memory is the process's peak beyond
what it held before its first forward pass. The eager way is what the fused kernels save: each layer
returns its whole attention through `need_weights`.
"""

import argparse
import json
from collections.abc import Iterator

import torch
from setting import eager_weights, peak_mib, print_table, read_flags, run_process, seconds_of
from torch import nn

from historylens.capture import capture

CAPTURED = {  # name -> title, arguments of `capture`
    "metrics": ("capture, query rows only", {"received": False}),
    "received": ("capture, and received attention", {}),
    "maps": ("capture, received attention and a map", {"maps": [0]}),
}
VARIANTS = {
    "plain": "plain forward, fused attention",
    **{name: title for name, (title, _) in CAPTURED.items()},
    "eager": "all weights through need_weights",
}


def main() -> None:
    """Print a table, a row a context length and variant."""
    sizes = {"tokens": [256, 1024, 4096, 16384], "layers": 4, "threads": 1}
    options = read_flags(__doc__, **sizes, seconds=3.0, eager_tokens=8192, child="")
    if options.child:
        return print(json.dumps(measure(options.child, options)))
    print(f"1 sample, {options.layers} layers, 4 heads, width 64, {options.threads} thread(s), CPU")
    print_table(["T", "variant", "seconds", "/ plain", "extra peak MiB"], rows_of(options))


def rows_of(options: argparse.Namespace) -> Iterator[list[str]]:
    """A row for each context length and variant, from a process of its own."""
    shared = [("--" + name, vars(options)[name]) for name in ("layers", "threads", "seconds")]
    shared = [part for pair in shared for part in pair]
    for n_tokens in options.tokens:
        plain = None
        for variant, title in VARIANTS.items():
            if variant == "eager" and n_tokens > options.eager_tokens:
                continue
            done = run_process(__file__, "--child", variant, "--tokens", n_tokens, *shared)
            seconds, mib = json.loads(done.said)
            plain = plain or (seconds, mib)
            more = f"{seconds / plain[0]:.2f}", f"{mib - plain[1]:.0f}"
            yield [str(n_tokens), title, f"{seconds:.4f}", *more]


def measure(variant: str, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of the fastest of several passes, and the peak memory they add, MiB."""
    torch.set_num_threads(options.threads)
    torch.backends.mha.set_fastpath_enabled(False)  # on a CPU it holds T x T and is slower
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 256, 0.0, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, options.layers, enable_nested_tensor=False).eval()
    n_tokens = options.tokens[0]
    x = torch.randn(1, n_tokens, 64)
    mask = torch.full((n_tokens, n_tokens), -torch.inf).triu_(1)

    def run() -> object:
        if variant == "plain":
            return encoder(x, mask=mask, is_causal=True)
        if variant == "eager":  # the same: query rows, received attention and maps
            count = torch.arange(n_tokens, 0, -1)
            weights = eager_weights(encoder, x, mask)
            return [(each[:, :, -1], each.sum(2) / count, each) for each in weights]
        with capture(encoder, **CAPTURED[variant][1]):
            return encoder(x, mask=mask, is_causal=True)

    before, seconds = peak_mib(), []
    with torch.no_grad():
        while not seconds or sum(seconds) < options.seconds:
            seconds += seconds_of(run)
    return min(seconds), peak_mib() - before


if __name__ == "__main__":
    main()
