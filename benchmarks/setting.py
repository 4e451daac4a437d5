"""What the benchmarks share: flags, measuring, child processes, tables, and eager attention."""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the benchmarks, which import this first


def read_flags(doc: str, **defaults: object) -> argparse.Namespace:
    """The command line: a flag for each default, of its type; False is a switch, a list a list."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name, value in defaults.items():
        kind = {"type": type(value)}
        if isinstance(value, list):
            kind = {"type": type(value[0]), "nargs": "+"}
        elif value is False:
            kind = {"action": "store_true"}
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, default=value, help="default: %(default)s", **kind)
    return parser.parse_args()


def seconds_of(
    run: Callable[[], object], repeats: int = 1, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Seconds of each of several calls."""
    seconds = []
    for _ in range(repeats):
        started = clock()
        run()
        seconds.append(clock() - started)
    return seconds


def peak_mib() -> float:
    """Largest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Process(NamedTuple):
    """What a process took, seconds and MiB, and the last line that it printed."""

    wall: float
    cpu: float
    peak: float
    said: str


def run_process(*arguments: object, threads: int | None = None) -> Process:
    """Run python with such arguments to its end, in the root of the project."""
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, *map(str, arguments)]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)
        said = process.stdout.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            sys.exit(errors.read())
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Process(wall, cpu, usage.ru_maxrss / 1024, said[-1] if said else "")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table, each row as soon as it is there."""
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def eager_weights(encoder: nn.TransformerEncoder, x: Tensor, mask: Tensor) -> Iterator[Tensor]:
    """The whole attention `(B, H, T, T)` of one layer after another, through `need_weights`."""
    for layer in encoder.layers:
        mixed, weights = layer.self_attn(
            x, x, x, attn_mask=mask, need_weights=True, average_attn_weights=False
        )
        yield weights
        x = layer.norm1(x + mixed)
        x = layer.norm2(x + layer.linear2(layer.activation(layer.linear1(x))))
