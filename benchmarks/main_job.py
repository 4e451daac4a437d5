"""The main job as a whole process, ours beside the plain way: same model, same samples, same run.

python benchmarks/main_job.py                # 10 samples, 4 layers, 4 heads, 240 tokens
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from setting import random_run, run_process, table


def main() -> None:
    """Run both in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n-transit", type=int, default=240, metavar="N", help="tokens")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = random_run(Path(folder) / "run", flags.n_transit)
        ours = [
            *(sys.executable, "visualize_attention.py", "--checkpoint", str(checkpoint)),
            *("--out", f"{folder}/ours"),
        ]
        plain = [
            *(sys.executable, "benchmarks/plain_main_job.py", str(checkpoint)),
            f"{folder}/plain",
        ]
        measured: dict[str, list[tuple[float, float, float]]] = {"ours": [], "plain": []}
        for _ in range(flags.repeats):
            measured["ours"].append(run_process(ours))
            measured["plain"].append(run_process(plain))
    rows = []
    for name, runs in measured.items():
        wall, cpu, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        rows.append([name, f"{wall:.1f}", f"{cpu:.1f}", f"{peak:.0f}"])
    wall_ratio = [p[0] / o[0] for o, p in zip(measured["ours"], measured["plain"], strict=True)]
    cpu_ratio = [p[1] / o[1] for o, p in zip(measured["ours"], measured["plain"], strict=True)]
    rows.append(
        [
            "plain / ours",
            f"{statistics.median(wall_ratio):.1f}x",
            f"{statistics.median(cpu_ratio):.1f}x",
            "",
        ]
    )
    print(f"main job, T = {flags.n_transit}, whole process, median of {flags.repeats}")
    print(table(["way", "wall seconds", "CPU seconds", "peak MiB"], rows))


if __name__ == "__main__":
    main()
