"""Damaged and hostile files, each read by a process of its own with little time and memory.

    FUZZ_CASES=400 FUZZ_SEED=2 python -m pytest -n 0 tests/test_fuzz_files.py

A case is a valid file after a change of its bytes or of what it holds; what has a table of its own
in the tests of hostile files is not drawn again. It may end in two ways: the right numbers, those
of the unchanged file, or one line on stderr and exit code 2. The bytes of HDF5 have no checksum, so
that any numbers are right there which pass the checks.
"""

import copy
import hashlib
import io
import os
import random
import re
import resource
import signal
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from apart import run_apart
from conftest import make_histories, sharp_model, without_drawing, write_checkpoint
from foreign import held_out, make_foreign_run
from hostile import acting, in_zip

import compare_compression
import visualize_attention
from ad.agent import load_for_analysis
from ad.checkpoints import save_checkpoint
from config import ModelConfig, VisualizeConfig
from historylens.history import History

N_CASES, SEED = int(os.environ.get("FUZZ_CASES", "12")), int(os.environ.get("FUZZ_SEED", "1"))
NAMES = {"own": "ckpt-7.pt", "foreign": "ckpt-7.pt", "npz": "odd.npz", "hdf5": "odd.hdf5"}
SECONDS, MEMORY = 8, 2**30  # of a case, beyond what the process takes before
ODD = [
    "9", "", "\x1b[31m", b"9", None, True, -1, 0, 1, 3, 2**31, 2**63, 10**400, 0.5, -1e308,
    float("nan"), float("inf"), [], [5], (5,), {"a": 5}, torch.tensor(5), torch.zeros(3),
    torch.device("cpu"),
]  # fmt: skip


def flipped(data, rng):
    """Some bytes of a file changed, cut, doubled or left out."""
    start, n = rng.randrange(len(data)), rng.choice([1, 2, 4, 8, 64, 1000])
    before, part, after = data[:start], data[start : start + n], data[start + n :]
    bit = bytes([part[0] ^ 1 << rng.randrange(8), *part[1:]])
    others = rng.choice([rng.randbytes(len(part)), b"\xff" * len(part), b"\0" * len(part)])
    changed = rng.choice([bit, bit, bit, others, part * 2, b"", None])
    return before if changed is None else before + changed + after


def odd_checkpoint(data, rng):
    """A checkpoint with something else in it, as `torch.save` writes it."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    content = {key: copy.copy(value) for key, value in content.items() if key != "digest"}
    part = rng.choice(["config", "config", "model", "model", "goals", "top"])
    if part == "model":
        name = rng.choice(list(content["model"]))
        tensor = content["model"].pop(name)
        odd = [tensor.half(), tensor.byte(), tensor * 1e20, tensor / 0, tensor[..., :-1]]
        odd += [torch.zeros(1).expand(tensor.shape), torch.empty(0).expand(2**20, 0), *ODD]
        content["model"][rng.choice([name, name, name, f"x\x1b[2J{name}"])] = rng.choice(odd)
    else:
        place = content if part == "top" else content.get(part) or content  # not all have goals
        place[rng.choice(list(place))] = rng.choice(ODD)
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def odd_members(data, rng):
    """A zip file whose members are changed, swapped, gone or more, with right checksums.

    Every other time it is the pickle of a checkpoint.
    """

    def change(members):
        names = list(members)
        one = rng.choice(names + len(names) * [x for x in names if x.endswith("data.pkl")])
        other = rng.choice(names)
        flip = {one: flipped(members[one] or b"x", rng)}
        swap = {one: members[other], other: members[one]}
        changed = members | rng.choice([flip, flip, swap, {"\x1b[31mx": b"x"}, {one: None}])
        return {name: content for name, content in changed.items() if content is not None}

    return in_zip(data, change)


def odd_arrays(data, rng):
    """Histories with an array of another type, shape or range."""
    arrays = dict(np.load(io.BytesIO(data)))
    name = rng.choice(list(arrays))
    arrays[name] = odd_array(arrays[name], rng)
    out = io.BytesIO()
    rng.choice([np.savez, np.savez_compressed])(out, **arrays)
    return out.getvalue()


def odd_array(array, rng):
    """An array of another type, shape or range, or the same in other bytes."""
    array, kind = np.array(array), rng.choice(["type", "type", "value", "shape", "scalar"])
    if kind == "type":
        return array.astype(rng.choice([">i8", "<u2", "f2", ">f8", "?", "S3", "M8[s]", "c16"]))
    if kind == "value" and array.size:
        worst = [-1, 99, 2**31, 2**62], [np.nan, np.inf, 1e38, -1e300, 0.5, -1, 99, 2**40]
        values, dtype = rng.choice([*zip(worst, (int, float), strict=True)])
        array = array.astype(dtype)
        array.flat[rng.randrange(array.size)] = rng.choice(values)
        return array
    if kind == "shape" and array.ndim:
        return rng.choice([array[..., :-1], array[None], array.reshape(-1), array[:0]])
    return np.array(rng.choice([0, -1, 5, 2**40, np.nan, 2.5]))


def odd_hdf5(data, rng):
    """An HDF5 file with a group or dataset that is another or nowhere."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.hdf5"
        path.write_bytes(data)
        with h5py.File(path, "r+") as file:
            cell = rng.choice([*map(str, held_out(0, 0.9, 25))] * 20 + list(file))
            name = rng.choice(["states", "actions", "rewards", "next_states", "dones"])
            place, array = rng.choice([cell, f"{cell}/{name}"]), file[f"{cell}/{name}"][()]
            del file[place]
            if rng.random() < 0.9:
                odd = odd_array(array, rng)
                odd = odd if odd.dtype.kind not in "UMm" else np.zeros(3, "S1")
                file[place if "/" in place else f"{place}/x"] = odd
        return path.read_bytes()


CHANGES = {
    "own": {"bytes": flipped, "content": odd_checkpoint, "zip": odd_members},
    "npz": {"bytes": flipped, "content": odd_arrays, "zip": odd_members},
    "hdf5": {"bytes": flipped, "content": odd_hdf5},
}
CHANGES["foreign"] = CHANGES["own"]


def job(checkpoint, histories, thorough):
    """Read both files as the commands do, and what follows from their numbers, as a digest."""
    config = VisualizeConfig(checkpoint=str(checkpoint), histories=str(histories), num_samples=2)
    shown = load_for_analysis(config, torch.device("cpu"))
    environment = acting(checkpoint).environment
    room = environment.make(*[np.arange(len(environment.goals))] * 2)
    found = [environment.goals, environment.horizon, room.reset().tolist()]
    found += [shown.forward(History.of([shown.decisions[0], shown.decisions[1]])).tolist()]
    names = "states", "actions", "rewards", "next_states", "goals", "horizon"
    of_histories = vars(shown.decisions.histories)
    found += [np.asarray(of_histories[name], np.float64).tolist() for name in names]
    if thorough:
        without_drawing(pytest.MonkeyPatch())  # pictures take the time, and read nothing
        both = [f"--checkpoint={checkpoint}", "--device=cpu"]
        shown = [f"--histories={histories}", "--num-samples=3", "--num-figures=0"]
        played = ["--strategies=recent", "--budgets=4", "--seeds=1", "--episodes=2"]
        with tempfile.TemporaryDirectory() as out:
            visualize_attention.main([*both, *shown, "--num-effects=3", f"--out={out}/a"])
            compare_compression.main([*both, *played, f"--out={out}/b"])
    return hashlib.sha256(repr(found).encode()).hexdigest()


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
    assert re.fullmatch("error: (?!.*MemoryError|.*allocate|out of memory).*\n", line)
    assert len(end.err) < 4000
    assert all(c.isprintable() or c == "\n" for c in end.err)
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
    data, kinds, n_lines = pair[place].read_bytes(), list(CHANGES[area]), 0
    pair[place] = tmp_path / NAMES[area]
    for i in range(N_CASES):
        rng, kind = random.Random(f"{SEED} {area} {i}"), kinds[i % len(kinds)]
        changed = CHANGES[area][kind](data, rng)
        pair[place].write_bytes(changed)
        found, line = read_apart(*pair, tmp_path / f"{kind} {i}", thorough=rng.random() < 0.1)
        n_lines += line is not None
        if kind == "bytes" and area != "hdf5" and changed != data:
            assert line or found == right, (kind, i)
    assert n_lines > N_CASES / 5
