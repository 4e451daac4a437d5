"""Damaged and hostile files, each read by a process of its own with little time and memory.

    python tests/fuzz_files.py --cases 400 --seed 0 --areas own foreign npz hdf5

A case is a valid file after a change of its bytes or of what it holds. It may end in two ways:
the right numbers, those of the unchanged file, or one line on stderr and exit code 2. The bytes of
HDF5 have no checksum, so that any numbers are right there which pass the checks.
"""

import argparse
import collections
import hashlib
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from apart import without_drawing  # noqa: E402
from conftest import make_histories, sharp_model, write_checkpoint  # noqa: E402
from foreign import make_foreign_run  # noqa: E402
from fuzz_changes import CHANGES, FIFO  # noqa: E402

import compare_compression  # noqa: E402
import visualize_attention  # noqa: E402
from ad import agent  # noqa: E402
from config import ActingConfig, ModelConfig, VisualizeConfig  # noqa: E402
from historylens.common.errors import run_command  # noqa: E402
from historylens.history import History  # noqa: E402

SECONDS, MEMORY = 8, 2**30  # of a case, beyond what the process takes before
CPU = torch.device("cpu")
SIZES = {"n_transit": 12, "tf_n_layer": 2, "tf_n_head": 2, "tf_n_embd": 16, "tf_n_inner": 24}


def whole_files(folder):
    """A run of each kind: its checkpoint and its histories, none of them changed."""
    model = sharp_model(ModelConfig(**SIZES, grid_size=5))
    own = write_checkpoint(folder / "own" / "ckpt-5.pt", model, [[0, 1], [2, 2]])
    try:
        from ad.checkpoints import save_checkpoint

        save_checkpoint(own, torch.load(own, weights_only=True))
    except ImportError:
        pass
    make_histories().save(folder / "own" / "histories-test.npz")
    run, file = make_foreign_run(folder, model.state_dict(), n_steps=40)
    return {
        "own": (own, own.with_name("histories-test.npz")),
        "foreign": (next(run.glob("ckpt-*.pt")), file),
    }


def job(checkpoint, histories, thorough):
    """Read both files as the commands do, and what follows from their numbers, as a digest."""
    config = VisualizeConfig(checkpoint=str(checkpoint), histories=str(histories), num_samples=2)
    shown = agent.load_for_analysis(config, CPU)
    parts = [shown.forward(History.of([shown.decisions[0], shown.decisions[1]])).detach().numpy()]
    parts += [np.asarray(vars(shown.decisions.histories)[name], np.float64) for name in
              ("states", "actions", "rewards", "next_states", "goals", "horizon")]  # fmt: skip
    acting = agent.load_for_acting(ActingConfig(checkpoint=str(checkpoint)), CPU)
    room = acting.environment.make(*[np.arange(len(acting.environment.goals))] * 2)
    said = repr((acting.environment.goals, acting.environment.horizon, room.reset().tolist()))
    if thorough:
        without_drawing(pytest.MonkeyPatch())  # pictures take the time, and read nothing
        both = ["--checkpoint", str(checkpoint), "--device", "cpu"]
        few = ["--num-samples", "3", "--num-figures", "0", "--num-effects", "3"]
        with tempfile.TemporaryDirectory() as out:
            visualize_attention.main([*both, "--histories", str(histories), *few, "--out", out])
        few = ["--strategies", "recent", "--budgets", "4", "--seeds", "1", "--episodes", "2"]
        with tempfile.TemporaryDirectory() as out:
            compare_compression.main([*both, *few, "--out", out])
    total = hashlib.sha256(said.encode())
    for part in parts:
        total.update(f"{part.shape}".encode() + np.ascontiguousarray(part).tobytes())
    return total.hexdigest()


def ended(checkpoint, histories, thorough, seconds=SECONDS):
    """How reading ended: `(how, digest or what was said, peak MiB, seconds)`."""
    read, write = os.pipe()
    started = time.monotonic()
    with tempfile.TemporaryFile() as err:
        if (child := os.fork()) == 0:
            _child(write, err, lambda: job(checkpoint, histories, thorough), seconds)
        os.close(write)
        if not select.select([read], [], [], seconds + 3)[0]:
            os.kill(child, signal.SIGKILL)
        found = os.read(read, 64).decode()
        os.close(read)
        _, status, usage = os.wait4(child, 0)
        err.seek(0)
        said = err.read(100_000).decode(errors="replace")
    code, took = os.waitstatus_to_exitcode(status), time.monotonic() - started
    errors = [line for line in said.splitlines(keepends=True) if not line.startswith("note: ")]
    is_one_line = len(errors) == 1 and errors[0].startswith("error: ") and errors[0].endswith("\n")
    is_clean = all(c.isprintable() or c == "\n" for c in said)
    if code in (-signal.SIGKILL, -signal.SIGXCPU):
        how = "hangs"
    elif code < 0:
        how = "crashes"
    elif code == 0:
        how = "numbers"
    elif code == 2:
        how = "a line" if is_one_line and is_clean and len(said) < 4000 else "a bad line"
        how = "memory" if "error: out of memory" in said else how
    else:
        how = "memory" if "MemoryError" in said or "allocate" in said else "traceback"
    return how, found if code == 0 else said, usage.ru_maxrss // 1024, took


def _child(write, err, work, seconds):
    """The process of a case: never returns."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code, digests = 1, []
    try:
        run_command(lambda: digests.append(work()))
        os.write(write, digests[0].encode())
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def run(n_cases, seed, areas=tuple(CHANGES), thorough=0.0, tell=None):
    """Try `n_cases` of each area; gives counts by area, change and end, and the bad ones."""
    if not os.path.exists(FIFO):
        os.mkfifo(FIFO)
    counts, bad = collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = whole_files(folder)
        right = {name: ended(*pair, False) for name, pair in files.items()}
        assert all(how == "numbers" for how, *_ in right.values()), right
        for area in areas:
            name = "foreign" if area in ("foreign", "hdf5") else "own"
            is_checkpoint = area in ("own", "foreign")
            whole = files[name][0 if is_checkpoint else 1]
            data = whole.read_bytes()
            for i in range(n_cases):
                rng = random.Random(f"{seed} {area} {i}")
                torch.manual_seed(i)
                change = list(CHANGES[area])[i % len(CHANGES[area])]
                odd = folder / f"odd{whole.suffix}"
                odd = odd.with_name("ckpt-7.pt") if is_checkpoint else odd
                changed = CHANGES[area][change](data, rng)
                odd.write_bytes(changed)
                pair = (odd, files[name][1]) if is_checkpoint else (files[name][0], odd)
                how, said, mib, took = ended(*pair, rng.random() < thorough)
                may_differ = change == "content" or area == "hdf5" or changed == data
                if how == "numbers" and said != right[name][1] and not may_differ:
                    how = "wrong numbers" if change == "bytes" else "other numbers"
                counts[area, change, how] += 1
                if how not in ("numbers", "a line", "other numbers"):
                    bad.append((area, change, i, how, said.strip().splitlines()[-1:]))
                if tell:
                    tell((area, change, i, how, said.strip()[-300:], mib, round(took, 2)))
    os.unlink(FIFO)
    return counts, bad


def main():
    """Run the fuzz and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=400, help="of each area")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--areas", nargs="+", default=list(CHANGES), choices=list(CHANGES))
    parser.add_argument("--thorough", type=float, default=0.2, help="part run as whole commands")
    parser.add_argument("--verbose", action="store_true", help="a line a case")
    flags = parser.parse_args()
    tell = print if flags.verbose else None
    counts, bad = run(flags.cases, flags.seed, flags.areas, flags.thorough, tell)
    for key, number in sorted(counts.items()):
        print(*key, number, sep="\t")
    for case in bad:
        print("BAD", *case, sep="\t")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
