"""What the benchmarks share: flags, measuring, tables, and eager attention."""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the benchmarks, which import this first


def read_flags(doc: str, **defaults: object) -> argparse.Namespace:
    """The command line: a flag for each default, of its type; False is a switch, a list a list."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name, value in defaults.items():
        kind = {"type": type(value)} if value is not False else {"action": "store_true"}
        if isinstance(value, list):
            kind = {"type": type(value[0]), "nargs": "+"}
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, default=value, help="default: %(default)s", **kind)
    return parser.parse_args()


def clock() -> float:
    """Seconds on the wall, once a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(run: Callable, repeats: int = 1, clock: Callable = clock) -> list[float]:
    """Seconds of each of several calls."""
    return timeit.repeat(run, "import gc; gc.enable()", clock, repeats, number=1)


def peak_mib(device: str) -> float:
    """Most memory held so far: on a GPU by tensors, else by this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_process(*arguments: object) -> tuple[tuple[float, float, float], str]:
    """Run python here to its end: its wall and CPU seconds, peak MiB, and the last line printed."""
    command, started = [sys.executable, *map(str, arguments)], time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors)
        said = process.stdout.read().decode().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            sys.exit(errors.read())
    wall, cpu = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    return (wall, cpu, usage.ru_maxrss / 1024), said[-1] if said else ""


def print_table(columns: str, rows: Iterable[Iterable[object]]) -> None:
    """Print a Markdown table of columns `name:format | ...`, each row as soon as it is there."""
    names, _, formats = zip(*(each.partition(":") for each in columns.split(" | ")), strict=True)
    print("|", " | ".join(names), "|\n" + "|" + " --- |" * len(names))
    for values in rows:
        print("|", " | ".join(map(format, values, formats)), "|", flush=True)


def eager_weights(encoder: nn.TransformerEncoder, x: Tensor, mask: Tensor) -> Iterator[Tensor]:
    """The whole attention `(B, H, T, T)` of one layer after another, through `need_weights`."""
    whole = {"need_weights": True, "average_attn_weights": False}
    for layer in encoder.layers:
        mixed, weights = layer.self_attn(x, x, x, attn_mask=mask, **whole)
        yield weights
        x = layer.norm1(x + mixed)
        x = layer.norm2(x + layer.linear2(layer.activation(layer.linear1(x))))
