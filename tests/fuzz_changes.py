"""Changes of files, of their bytes and of what they hold, for `tests/test_fuzz_files.py`.

A change takes the bytes of a valid file and a `random.Random`, and gives other bytes. What has a
table of its own in the tests of hostile files is not drawn here again.
"""

import copy
import io
import tempfile
from pathlib import Path

import h5py
import numpy as np
import torch
from foreign import held_out
from hostile import in_zip

ODD = [
    "9", "", "\x1b[31m", b"9", None, True, -1, 0, 1, 3, 2**31, 2**63, 10**400, 0.5, -1e308,
    float("nan"), float("inf"), [], [5], (5,), {"a": 5}, torch.tensor(5), torch.zeros(3),
    torch.device("cpu"),
]  # fmt: skip


def flipped(data, rng):
    """Some bytes of a file changed, cut, doubled or left out."""
    data, kind = bytearray(data), rng.choice(["bit", "bit", "bit", "bytes", "cut", "twice", "out"])
    start, n = rng.randrange(len(data)), rng.choice([1, 2, 4, 8, 64, 1000])
    if kind == "bit":
        data[start] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        n = min(n, len(data) - start)
        data[start : start + n] = rng.choice([rng.randbytes(n), b"\xff" * n, b"\0" * n])
    elif kind == "cut":
        del data[start:]
    elif kind == "twice":
        data[start:start] = data[start : start + n]
    else:
        del data[start : start + n]
    return bytes(data)


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


def odd_pickle(data, rng):
    """A checkpoint whose pickle is changed, with a right checksum."""

    def change(members):
        name = next(name for name in members if name.endswith("data.pkl"))
        return members | {name: flipped(members[name], rng)}

    return in_zip(data, change)


def odd_members(data, rng):
    """A zip file whose members are changed, swapped, gone or more, with right checksums."""

    def change(members):
        one, other = rng.choice(list(members)), rng.choice(list(members))
        kind = rng.choice(["flip", "swap", "gone", "new"])
        if kind == "flip":
            members[one] = flipped(members[one], rng) if members[one] else b"x"
        elif kind == "swap":
            members[one], members[other] = members[other], members[one]
        elif kind == "gone":
            del members[one]
        else:
            members["\x1b[31mx"] = b"x"
        return members

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
    "own": {"bytes": flipped, "content": odd_checkpoint, "pickle": odd_pickle, "zip": odd_members},
    "npz": {"bytes": flipped, "content": odd_arrays, "zip": odd_members},
    "hdf5": {"bytes": flipped, "content": odd_hdf5},
}
CHANGES["foreign"] = CHANGES["own"]
