"""What the benchmarks share: a run of a given size with random weights, and measuring processes.

Speed does not depend on what the weights have learned, so no benchmark needs training.
"""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ad.checkpoints import HISTORIES_NAME, save_checkpoint
from ad.darkroom import split_goals
from ad.source import learning_histories
from config import EnvConfig, ModelConfig, SourceConfig
from historylens.common.settings import to_dict
from model import ADTransformer

ROOT = Path(__file__).resolve().parent.parent


def random_run(folder: Path, n_transit: int, n_streams: int = 8) -> Path:
    """Write a checkpoint with random weights and test histories; returns the checkpoint's path."""
    torch.manual_seed(0)
    config = ModelConfig(n_transit=n_transit)
    goals = split_goals(0)
    content = {
        "step": 0,
        "config": to_dict(EnvConfig(), config),
        "model": ADTransformer(config).state_dict(),
        "optimizer": None,
        "lr_sched": None,
        "goals": {name: cells.tolist() for name, cells in goals.items()},
    }
    path = folder / "ckpt-0.pt"
    save_checkpoint(path, content)
    histories = learning_histories(goals["test"], EnvConfig(), SourceConfig(), 0, n_streams)
    histories.save(folder / HISTORIES_NAME)
    return path


def run_process(command: list[str], threads: int | None = None) -> tuple[float, float, float]:
    """Run a command to its end: wall seconds, CPU seconds and peak memory in MiB of it.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=error)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, usage.ru_maxrss / 1024


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
