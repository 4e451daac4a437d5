"""Damaged and hostile files, each read by a process of its own with little time and memory.

    FUZZ_CASES=400 FUZZ_SEED=2 python -m pytest -n 0 tests/test_fuzz_files.py

A case is a valid file after a change of its bytes or of what it holds. It may end in two ways:
the right numbers, those of the unchanged file, or one line on stderr and exit code 2. The bytes of
HDF5 have no checksum, so that any numbers are right there which pass the checks.
"""

import collections
import hashlib
import os
import random
import resource
import select
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_histories, sharp_model, without_drawing, write_checkpoint
from foreign import make_foreign_run
from fuzz_changes import CHANGES
from hostile import acting

import compare_compression
import visualize_attention
from ad.agent import load_for_analysis
from ad.checkpoints import save_checkpoint
from config import ModelConfig, VisualizeConfig
from historylens.common.errors import expect, run_command
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


def ended(checkpoint, histories, thorough=False, seconds=SECONDS):
    """How reading ended, and its digest or what was said."""
    read, write = os.pipe()
    with tempfile.TemporaryFile() as err:
        if (child := os.fork()) == 0:
            work_apart(write, err, lambda: job(checkpoint, histories, thorough), seconds)
        os.close(write)
        if not select.select([read], [], [], 30 * seconds)[0]:  # many do their work beside it
            os.kill(child, signal.SIGKILL)
        found = os.read(read, 64).decode()
        os.close(read)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        err.seek(0)
        said = err.read(100_000).decode(errors="replace")
    if code == 0:
        return "numbers", found
    if code in (-signal.SIGKILL, -signal.SIGXCPU):
        return "hangs", said
    if code < 0:
        return "crashes", said
    if any(words in said for words in ("MemoryError", "allocate", "error: out of memory")):
        return "memory", said
    if code != 2:
        return "traceback", said
    errors = [line for line in said.splitlines(keepends=True) if not line.startswith("note: ")]
    is_one_line = len(errors) == 1 and errors[0].startswith("error: ") and errors[0].endswith("\n")
    is_clean = len(said) < 4000 and all(c.isprintable() or c == "\n" for c in said)
    return "a line" if is_one_line and is_clean else "a bad line", said


def work_apart(write, err, work, seconds):
    """The process of a case: never returns."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
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
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


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
    ends = [ended(*pair) for pair in pairs]
    assert [how for how, _ in ends] == ["numbers"] * 2, ends
    own, foreign = ((*pair, digest) for pair, (_, digest) in zip(pairs, ends, strict=True))
    return {"own": own, "npz": own, "foreign": foreign, "hdf5": foreign}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("area", CHANGES)
def test_a_damaged_file_ends_in_the_right_numbers_or_in_a_line(area, whole, tmp_path):
    *pair, right = whole[area]
    place = 0 if NAMES[area].endswith(".pt") else 1
    data, kinds = pair[place].read_bytes(), list(CHANGES[area])
    pair[place] = tmp_path / NAMES[area]
    n_ended = collections.Counter()
    for i in range(N_CASES):
        rng, kind = random.Random(f"{SEED} {area} {i}"), kinds[i % len(kinds)]
        changed = CHANGES[area][kind](data, rng)
        pair[place].write_bytes(changed)
        how, said = ended(*pair, thorough=rng.random() < 0.1)
        assert how in ("numbers", "a line"), (kind, i, said)
        if kind == "bytes" and area != "hdf5" and changed != data:
            assert how == "a line" or said == right, (kind, i)
        n_ended[how] += 1
    assert n_ended["a line"] > N_CASES / 5


@pytest.mark.parametrize(("work", "expected"), [
    (lambda: "digest", "numbers"),
    (lambda: [].pop(), "traceback"),
    (lambda: np.ones(2**40), "memory"),
    (lambda: os.abort(), "crashes"),
    (lambda: any(iter(int, 1)), "hangs"),
    (lambda: expect(False, "a line"), "a line"),
    (lambda: expect(False, "a\x1b[2J line"), "a line"),
    (lambda: sys.exit(print("error: a\x1b[2J line", file=sys.stderr) or 2), "a bad line"),
])  # fmt: skip
def test_the_ends_are_told_apart(tmp_path, monkeypatch, work, expected):
    monkeypatch.setattr(sys.modules[__name__], "job", lambda *_: work())
    assert ended(tmp_path, tmp_path, seconds=1)[0] == expected
