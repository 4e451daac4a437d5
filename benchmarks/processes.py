"""Metrics of many samples by 1, 2, ... processes of one thread each, same samples, same numbers.

    python benchmarks/processes.py --samples 2000 --processes 1 2 --checkpoint checkpoints/RUN

Times the analysis of every sample and the gathering on rank 0, without starting python and loading
the checkpoint, which take the same few seconds in every process; the whole command stands beside.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator

import torch
from setting import ROOT, clock, print_table, read_flags, run_process

from ad.agent import load_for_analysis
from config import VisualizeConfig
from historylens.analysis.job import Job
from historylens.analysis.results import measure
from historylens.common.processes import join
from historylens.metrics import Metrics


def rows_of(options: argparse.Namespace) -> Iterator[tuple]:
    """A row for each number of processes, from a job of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"
    first = None
    for n in options.processes:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        command = [*launcher * (n > 1), __file__, "--child", *sys.argv[1:]]
        (wall, _, _), said = run_process(*command)
        seconds, digest = json.loads(said)
        first = first or (seconds, digest)
        same = "yes" if digest == first[1] else "NO"
        yield n, seconds, options.samples / seconds, first[0] / seconds, wall, same


def run_child(options: argparse.Namespace) -> None:
    """One process of a job: its share of the samples, the best of several times."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out, join() as group:
        wanted = {"checkpoint": options.checkpoint, "num_samples": options.samples}
        config = VisualizeConfig(**wanted, num_figures=0, out=out)
        agent = load_for_analysis(config, group.device(torch.device(options.device)))
        job, seconds = Job.of(agent, config, group), []
        for _ in range(options.repeats):
            group.barrier()
            started = clock()
            metrics = Metrics(len(agent.decisions), job.layers, job.heads)
            measure(job, metrics)
            metrics = metrics.gather(group)
            seconds.append(clock() - started)
        if group.is_main:
            digest = hashlib.sha256(metrics.values.tobytes()).hexdigest()
            print(json.dumps([min(seconds), digest]))


if __name__ == "__main__":
    defaults = {"checkpoint": str(ROOT / "checkpoints"), "samples": 2000, "processes": [1, 2]}
    flags = read_flags(__doc__, **defaults, device="cpu", repeats=3, child=False)
    if flags.child:
        run_child(flags)
    else:
        print(f"metrics of {flags.samples:,} samples, one thread a process")
        columns = "processes | seconds:.2f | samples/s:.0f | times:.2f | command:.2f | same"
        print_table(columns, rows_of(flags))
