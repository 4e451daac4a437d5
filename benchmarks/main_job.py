"""The main job as a whole process, ours beside the plain way: same model, same samples, same run.

    python benchmarks/main_job.py                # 10 samples, 4 layers, 4 heads, 240 tokens

The weights are random: speed does not depend on what they have learned.
"""

import tempfile
from pathlib import Path
from statistics import median

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
    config, goals = ModelConfig(n_transit=n_transit), split_goals(0)["test"]
    content = {"step": 0, "config": to_dict(EnvConfig(), config), "goals": {"test": goals.tolist()}}
    path = folder / "ckpt-0.pt"
    save_checkpoint(path, content | {"model": ADTransformer(config).state_dict()})
    histories = learning_histories(goals, EnvConfig(), SourceConfig(), seed=0, n_streams=8)
    histories.save(folder / HISTORIES_NAME)
    return path


def main() -> None:
    """Run both in turn and print the table."""
    flags = read_flags(__doc__, n_transit=240, repeats=3)
    ours, plain = [], []
    with tempfile.TemporaryDirectory() as folder:
        run = random_run(Path(folder) / "run", flags.n_transit)
        command = "visualize_attention.py", "--checkpoint", run, "--out", f"{folder}/ours"
        for _ in range(flags.repeats):
            ours.append(run_process(*command))
            plain.append(run_process("benchmarks/plain_main_job.py", run, f"{folder}/plain"))
    rows = []
    for name, took in (("ours", ours), ("plain", plain)):
        wall, cpu, peak = (median(each[i] for each in took) for i in range(3))
        rows.append([name, f"{wall:.1f}", f"{cpu:.1f}", f"{peak:.0f}"])
    pairs = list(zip(ours, plain, strict=True))
    ratios = [median(p[i] / o[i] for o, p in pairs) for i in range(2)]
    rows.append(["plain / ours", *(f"{ratio:.1f}x" for ratio in ratios), ""])
    print(f"main job, T = {flags.n_transit}, whole process, median of {flags.repeats}")
    print_table(["way", "wall seconds", "CPU seconds", "peak MiB"], rows)


if __name__ == "__main__":
    main()
