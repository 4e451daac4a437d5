"""Damaged and hostile files, each read by a process of its own with little time and memory.

    FUZZ_CASES=400 FUZZ_SEED=2 python -m pytest -n 0 tests/test_fuzz_files.py

A case is a valid file after a change of its bytes or of what it holds. It may end in two ways:
the right numbers, those of the unchanged file, or one line on stderr and exit code 2. The bytes of
HDF5 have no checksum, so that any numbers are right there which pass the checks.
"""

import hashlib
import os
import random
import re
import resource
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from apart import run_apart
from conftest import make_histories, sharp_model, without_drawing, write_checkpoint
from foreign import make_foreign_run
from fuzz_changes import CHANGES
from hostile import acting

import compare_compression
import visualize_attention
from ad.agent import load_for_analysis
from ad.checkpoints import save_checkpoint
from config import ModelConfig, VisualizeConfig
from historylens.history import History

N_CASES, SEED = int(os.environ.get("FUZZ_CASES", "12")), int(os.environ.get("FUZZ_SEED", "1"))
NAMES = {"own": "ckpt-7.pt", "foreign": "ckpt-7.pt", "npz": "odd.npz", "hdf5": "odd.hdf5"}
SECONDS, MEMORY = 8, 2**30  # of a case, beyond what the process takes before


def job(checkpoint, histories, thorough):
    """Read both files as the commands do, and what follows from their numbers, as a digest."""
    config = VisualizeConfig(checkpoint=str(checkpoint), histories=str(histories), num_samples=2)
    shown = load_for_analysis(config, torch.device("cpu"))
    parts = [shown.forward(History.of([shown.decisions[0], shown.decisions[1]])).detach().numpy()]
    parts += [np.asarray(vars(shown.decisions.histories)[name], np.float64) for name in
              ("states", "actions", "rewards", "next_states", "goals", "horizon")]  # fmt: skip
    environment = acting(checkpoint).environment
    room = environment.make(*[np.arange(len(environment.goals))] * 2)
    said = repr((environment.goals, environment.horizon, room.reset().tolist()))
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


def read_apart(checkpoint, histories, folder, thorough=False):
    """What a process of little time and memory makes of both files; its one line if it cannot.

    It may not end in another way.
    """

    def main(_):
        signal.alarm(30 * SECONDS)  # many do their work beside it
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        print(f"\n{job(checkpoint, histories, thorough)}")

    folder.mkdir(exist_ok=True)
    end = run_apart(main, [], folder)
    said = [line for line in end.err.splitlines(keepends=True) if not line.startswith("note: ")]
    assert end.code in (0, 2), (end.code, end.err[-5000:])
    if end.code == 0:
        return end.out.splitlines()[-1], None
    (line,) = said
    assert line.startswith("error: ")
    assert line.endswith("\n")
    assert len(end.err) < 4000
    assert all(c.isprintable() or c == "\n" for c in end.err)
    assert not re.search("MemoryError|allocate|error: out of memory", line)
    return None, line


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """By area: checkpoint and histories of a run that nothing changed, and their digest."""
    folder, sizes = tmp_path_factory.mktemp("whole"), {"tf_n_embd": 16, "tf_n_inner": 24}
    model = sharp_model(ModelConfig(12, 2, 2, **sizes, grid_size=5))
    own = write_checkpoint(folder / "ckpt-5.pt", model, [[0, 1], [2, 2]])
    save_checkpoint(own, torch.load(own, weights_only=True))
    make_histories().save(folder / "histories-test.npz")
    run, hdf5 = make_foreign_run(folder, model.state_dict(), n_steps=40)
    pairs = (own, folder / "histories-test.npz"), (next(run.glob("ckpt-*.pt")), hdf5)
    own, foreign = ((*pair, read_apart(*pair, folder / "home")[0]) for pair in pairs)
    return {"own": own, "npz": own, "foreign": foreign, "hdf5": foreign}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("area", CHANGES)
def test_a_damaged_file_ends_in_the_right_numbers_or_in_a_line(area, whole, tmp_path):
    *pair, right = whole[area]
    place = 0 if NAMES[area].endswith(".pt") else 1
    data, kinds = pair[place].read_bytes(), list(CHANGES[area])
    pair[place] = tmp_path / NAMES[area]
    n_lines = 0
    for i in range(N_CASES):
        rng, kind = random.Random(f"{SEED} {area} {i}"), kinds[i % len(kinds)]
        changed = CHANGES[area][kind](data, rng)
        pair[place].write_bytes(changed)
        found, line = read_apart(*pair, tmp_path / f"{kind} {i}", thorough=rng.random() < 0.1)
        n_lines += line is not None
        if kind == "bytes" and area != "hdf5" and changed != data:
            assert line or found == right, (kind, i)
    assert n_lines > N_CASES / 5
