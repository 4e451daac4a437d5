"""Metrics of many samples by 1, 2, ... processes of one thread each, same samples, same numbers.

    python benchmarks/processes.py                                   # the latest checkpoint
    python benchmarks/processes.py --samples 2000 --processes 1 2 --checkpoint checkpoints/RUN

Times the analysis of every sample and the gathering on rank 0, without starting python and loading
the checkpoint, which take the same few seconds in every process; the whole command stands beside.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator

import torch
from setting import ROOT, print_table, read_flags, run_process, seconds_of

from ad.agent import load_for_analysis
from config import VisualizeConfig
from historylens import analysis
from historylens.common.processes import join
from historylens.metrics import Metrics


def main() -> None:
    """Print a table, a row a number of processes."""
    where = str(ROOT / "checkpoints")
    flags = {"checkpoint": where, "samples": 2000, "processes": [1, 2], "repeats": 3}
    options = read_flags(__doc__, **flags, child=False)
    if options.child:
        return measure(options)
    print(f"metrics of {options.samples:,} samples, one thread a process")
    header = ["processes", "seconds", "samples/s", "times", "command", "same"]
    print_table(header, rows_of(options))


def rows_of(options: argparse.Namespace) -> Iterator[list[str]]:
    """A row for each number of processes, from a job of its own."""
    command = [__file__, "--child", "--checkpoint", options.checkpoint]
    command += ["--samples", options.samples, "--repeats", options.repeats]
    first = None
    for n in options.processes:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        process = run_process(*(launcher if n > 1 else []), *command, threads=1)
        found = json.loads(process.said)
        first, seconds = first or found, found["seconds"]
        same = "yes" if found["digest"] == first["digest"] else "NO"
        rates = f"{options.samples / seconds:.0f}", f"{first['seconds'] / seconds:.2f}"
        yield [str(n), f"{seconds:.2f}", *rates, f"{process.wall:.2f}", same]


def measure(options: argparse.Namespace) -> None:
    """One process of a job: its share of the samples, the best of several times."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out, join() as group:
        config = VisualizeConfig(
            checkpoint=options.checkpoint, num_samples=options.samples, num_figures=0, out=out
        )
        agent = load_for_analysis(config, torch.device("cpu"))
        job = analysis.Job.of(agent, config, group)

        def run() -> None:
            nonlocal metrics
            metrics = Metrics(len(agent.decisions), job.layers, job.heads)
            analysis.measure(job, metrics)
            metrics = metrics.gather(group)

        metrics, seconds = None, []
        for _ in range(options.repeats):
            group.barrier()
            seconds += seconds_of(run)
        if metrics is not None:
            digest = hashlib.sha256(metrics.values.tobytes()).hexdigest()
            print(json.dumps({"seconds": min(seconds), "digest": digest}))


if __name__ == "__main__":
    main()
