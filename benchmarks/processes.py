"""Metrics of many samples by 1, 2, ... processes of one thread each, same samples, same numbers.

    python benchmarks/processes.py                                   # the latest checkpoint
    python benchmarks/processes.py --samples 2000 --processes 1 2 --checkpoint checkpoints/RUN

Times the analysis of every sample and the gathering on rank 0, without starting python and loading
the checkpoint, which take the same few seconds in every process; the whole command stands beside.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Print a table, a row a number of processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=str(ROOT / "checkpoints"))
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.result:
        measure(options)
        return
    print(f"metrics of {options.samples:,} samples, one thread a process")
    print(
        f"{'processes':>9} {'seconds':>8} {'samples/s':>10} {'times':>6} {'command':>8} {'same':>5}"
    )
    first = None
    for n in options.processes:
        found = run(n, options)
        first = first or found
        print(
            f"{n:>9} {found['seconds']:>8.2f} {options.samples / found['seconds']:>10.0f} "
            f"{first['seconds'] / found['seconds']:>6.2f} {found['command']:>8.2f} "
            f"{'yes' if found['overall'] == first['overall'] else 'NO':>5}",
            flush=True,
        )


def run(n_processes: int, options: argparse.Namespace) -> dict:
    """Numbers of one row, from a job of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, *(launcher if n_processes > 1 else []), __file__]
        command += ["--checkpoint", options.checkpoint, "--samples", str(options.samples)]
        command += ["--repeats", str(options.repeats), "--result", str(result)]
        started = time.perf_counter()
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        seconds = time.perf_counter() - started
        return json.loads(result.read_text()) | {"command": seconds}


def measure(options: argparse.Namespace) -> None:
    """One process of a job: its share of the samples, the best of several times."""
    import torch

    from ad.agent import load_for_analysis
    from config import VisualizeConfig
    from historylens import analysis
    from historylens.common.processes import join
    from historylens.metrics import SUMMARY_METRICS, Metrics

    torch.set_num_threads(1)
    result = Path(options.result)
    config = VisualizeConfig(
        checkpoint=options.checkpoint,
        num_samples=options.samples,
        num_figures=0,
        out=str(result.parent / "figs"),
    )
    agent = load_for_analysis(config, torch.device("cpu"))
    seconds = []
    with join() as group:
        job = analysis.Job.of(agent, config, group)
        for _ in range(options.repeats):
            group.barrier()
            started = time.perf_counter()
            metrics = Metrics(len(agent.decisions), job.layers, job.heads)
            analysis.measure(job, metrics)
            metrics = metrics.gather(group)
            seconds.append(time.perf_counter() - started)
    if metrics is not None:
        overall = {name: metrics.summary(name).mean for name in SUMMARY_METRICS}
        result.write_text(json.dumps({"seconds": min(seconds), "overall": overall}))


if __name__ == "__main__":
    main()
