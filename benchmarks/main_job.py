"""The main job as a whole process, ours beside the plain way: same model, same samples, same run.

10 samples, 4 layers, 4 heads. The weights are random: speed does not depend on what they learned.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from setting import print_table, read_flags, run_process

from ad.checkpoints import HISTORIES_NAME, save_checkpoint
from ad.darkroom import split_goals
from ad.source import learning_histories
from config import EnvConfig, ModelConfig, SourceConfig
from historylens.common.settings import to_dict
from model import ADTransformer


def random_run(folder: Path, n_transit: int) -> Path:
    """Write a checkpoint with random weights and test histories; returns the checkpoint's path."""
    torch.manual_seed(0)
    config, goals, path = ModelConfig(n_transit=n_transit), split_goals(0)["test"], folder / "0.pt"
    content = {"step": 0, "config": to_dict(EnvConfig(), config), "goals": {"test": goals.tolist()}}
    save_checkpoint(path, content | {"model": ADTransformer(config).state_dict()})
    histories = learning_histories(goals, EnvConfig(), SourceConfig(), seed=0, n_streams=8)
    histories.save(folder / HISTORIES_NAME)
    return path


if __name__ == "__main__":
    flags = read_flags(__doc__, n_transit=240, repeats=3, device="cpu", precision="float32")
    ours, plain = [], []
    with tempfile.TemporaryDirectory() as folder:
        run = random_run(Path(folder), flags.n_transit)
        command = ["visualize_attention.py", "--checkpoint", run, "--out", f"{folder}/ours"]
        command += ["--device", flags.device, "--precision", flags.precision]
        for _ in range(flags.repeats):
            ours.append(run_process(*command)[0])
            plain.append(run_process("benchmarks/plain_main_job.py", run, f"{folder}/plain")[0])
    print(f"main job, T = {flags.n_transit}, whole process, median of {flags.repeats}", end=", ")
    print(f"ours on {flags.device} in {flags.precision}, the plain way on cpu")
    rows = [(name, *np.median(took, axis=0)) for name, took in (("ours", ours), ("plain", plain))]
    print_table("way | wall seconds:.1f | CPU seconds:.1f | peak MiB:.0f", rows)
    ratios = np.median(np.divide(plain, ours), axis=0)
    print("| plain / ours | {:.1f}x | {:.1f}x |  |".format(*ratios))
