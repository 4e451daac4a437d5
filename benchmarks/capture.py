"""Seconds and peak memory of a forward pass: plain, with capture, and with eager attention weights.

    python benchmarks/capture.py                                  # all context lengths, minutes
    python benchmarks/capture.py --tokens 256 4096 --threads 2

Every variant runs in a process of its own on the same input; memory is the process's peak beyond
what it held before its first forward pass. The eager way is what the fused kernels save: each layer
returns its whole attention through `need_weights`.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VARIANTS = {
    "plain": "plain forward, fused attention",
    "metrics": "capture, query rows only",
    "received": "capture, and received attention",
    "maps": "capture, received attention and a map",
    "eager": "all weights through need_weights",
}


def main() -> None:
    """Print a table, a row a context length and variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--layers", type=int, default=4, help="encoder layers (default 4)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on a variant")
    parser.add_argument(
        "--eager-tokens", type=int, default=8192, help="longest context run eagerly"
    )
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options)))
        return
    print(f"1 sample, {options.layers} layers, 4 heads, width 64, {options.threads} thread(s), CPU")
    print(f"{'T':>6}  {'variant':<40} {'seconds':>9} {'/ plain':>8} {'extra peak MiB':>15}")
    for n_tokens in options.tokens:
        plain = None
        for variant, title in VARIANTS.items():
            if variant == "eager" and n_tokens > options.eager_tokens:
                continue
            found = run_child(variant, n_tokens, options)
            plain = plain or found
            ratio, extra = found["seconds"] / plain["seconds"], found["mib"] - plain["mib"]
            line = (
                f"{n_tokens:>6}  {title:<40} {found['seconds']:>9.4f} {ratio:>8.2f} {extra:>15.0f}"
            )
            print(line, flush=True)


def run_child(variant: str, n_tokens: int, options: argparse.Namespace) -> dict[str, float]:
    """Measure a variant in a process of its own."""
    command = [sys.executable, __file__, "--child", variant, "--tokens", str(n_tokens)]
    for name in ("layers", "threads", "seconds"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(variant: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the fastest of several passes, and the peak memory they add, MiB."""
    torch.set_num_threads(options.threads)
    torch.backends.mha.set_fastpath_enabled(False)  # on a CPU it holds T x T and is slower
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 256, 0.0, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, options.layers, enable_nested_tensor=False).eval()
    n_tokens = options.tokens[0]
    x = torch.randn(1, n_tokens, 64)
    mask = torch.full((n_tokens, n_tokens), -torch.inf).triu_(1)
    run = forward_of(variant, encoder, x, mask)
    before = peak_mib()
    best, spent = float("inf"), 0.0
    with torch.no_grad():
        while spent < options.seconds or best == float("inf"):
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            best, spent = min(best, seconds), spent + seconds
    return {"seconds": best, "mib": peak_mib() - before}


def forward_of(
    variant: str, encoder: nn.TransformerEncoder, x: torch.Tensor, mask: torch.Tensor
) -> Callable[[], object]:
    """The forward pass of a variant."""
    from historylens.capture import capture

    if variant == "plain":
        return lambda: encoder(x, mask=mask, is_causal=True)
    if variant == "eager":
        return lambda: eager(encoder, x, mask)
    settings = {
        "metrics": {"received": False},
        "received": {"received": True},
        "maps": {"received": True, "maps": [0]},
    }[variant]

    def captured() -> None:
        with capture(encoder, **settings):
            encoder(x, mask=mask, is_causal=True)

    return captured


def eager(encoder: nn.TransformerEncoder, x: torch.Tensor, mask: torch.Tensor) -> list:
    """Query row, column means and a full map of every layer, from whole attention matrices."""
    found = []
    for layer in encoder.layers:
        attended, weights = layer.self_attn(
            x, x, x, attn_mask=mask, need_weights=True, average_attn_weights=False
        )
        received = weights.sum(2) / torch.arange(x.shape[1], 0, -1)
        found.append((weights[:, :, -1], received, weights))
        x = layer.norm1(x + attended)
        x = layer.norm2(x + layer.linear2(layer.activation(layer.linear1(x))))
    return found


def peak_mib() -> float:
    """Largest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
