"""Changes of files, of their bytes and of what they hold, for `tests/fuzz_files.py`.

A change takes the bytes of a valid file and a `random.Random`, and gives other bytes.
"""

import copy
import io
import os
import tempfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import torch
from foreign import held_out

FIFO = os.path.join(tempfile.gettempdir(), f"fuzz-fifo-{os.getuid()}")
ODD = [
    "9", "", "\x1b[31m", b"9", None, True, -1, 0, 1, 3, 2**31, 2**63, 10**400, 0.5, -1e308,
    float("nan"), float("inf"), [], [5], (5,), {"a": 5}, torch.tensor(5), torch.zeros(3),
    torch.device("cpu"),
]  # fmt: skip


def in_zip(data, change):
    """A zip file after `change` of its members, `{name: bytes}`, with right checksums."""
    old, out = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    members = {info.filename: (old.read(info), info.compress_type) for info in old.infolist()}
    contents = change({name: content for name, (content, _) in members.items()})
    with zipfile.ZipFile(out, "w") as new:
        for name, content in contents.items():
            new.writestr(name, content, members.get(name, (0, 0))[1])
    return out.getvalue()


def flipped(data, rng, where=None):
    """Some bytes of a file changed, cut, doubled or left out."""
    data, kind = bytearray(data), rng.choice(["bit", "bit", "bit", "bytes", "cut", "twice", "out"])
    start = rng.randrange(len(data)) if where is None else where(rng, len(data))
    n = rng.choice([1, 2, 4, 8, 64, 1000])
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


def odd_tensor(tensor, rng):
    """Something else in the place of a tensor."""
    kinds = [torch.float16, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
    kinds += [torch.float8_e4m3fn, torch.uint8]
    return rng.choice([
        lambda: tensor.to(rng.choice(kinds)),
        lambda: tensor * rng.choice([1e6, 1e10, 1e20, 1e30, float("nan"), float("inf")]),
        lambda: tensor.reshape(1, -1).to_sparse(),
        lambda: tensor.reshape(1, -1).to_sparse_csr(),
        lambda: tensor.to("meta"),
        lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([tensor]),
        lambda: torch.empty(0).expand(2**20, 0),
        lambda: torch.zeros(1).expand(2**40),
        lambda: torch.zeros(1).expand(tensor.shape),
        lambda: tensor[..., :-1],
        lambda: tensor.reshape(-1),
        lambda: torch.zeros(()),
        lambda: rng.choice(ODD),
    ])()  # fmt: skip


def odd_checkpoint(data, rng):
    """A checkpoint with something else in it, as `torch.save` writes it."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    content = {key: copy.copy(value) for key, value in content.items() if key != "digest"}
    part, odd = rng.choice(["config", "config", "model", "model", "goals", "step", "top"]), None
    if part == "config":
        content["config"][rng.choice(list(content["config"]))] = rng.choice(ODD)
    elif part == "model":
        names = list(content["model"])
        name = rng.choice(names)
        odd = odd_tensor(content["model"].pop(name), rng)
        if rng.random() < 0.9:
            content["model"][rng.choice([name, name, name, "x\x1b[2J" + name])] = odd
    elif part == "goals":
        cells = rng.choice(
            [
                [],
                [[0]],
                [[0, 0, 0]],
                [[9, 9]],
                [[-1, 0]],
                [["a", "b"]],
                [[0.5, 1]],
                [[True, 1]],
                7,
                "goals",
                [[2**70, 1]],
                torch.zeros(2, 2),
                {"a": 1},
            ]
        )
        content["goals"] = rng.choice([{"train": [], "test": cells}, {"test": cells}, cells])
    elif part == "step":
        content["step"] = rng.choice(ODD)
    else:
        content[rng.choice(list(content))] = rng.choice(ODD)
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
    """A zip file whose members are changed, swapped, gone or compressed, with right checksums."""

    def change(members):
        names = list(members)
        one, other = rng.choice(names), rng.choice(names)
        kind = rng.choice(["flip", "swap", "gone", "empty", "new"])
        if kind == "flip":
            members[one] = flipped(members[one], rng) if members[one] else b"x"
        elif kind == "swap":
            members[one], members[other] = members[other], members[one]
        elif kind == "gone":
            del members[one]
        elif kind == "empty":
            members[one] = b""
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
    kinds = [">i8", ">i2", "<u2", "u8", "f2", ">f8", "?", "S3", "U2", "M8[s]", "m8[s]", "c16", "V4"]
    kinds += ["longdouble", [("a", "i4"), ("b", "f8")]]
    array, kind = np.array(array), rng.choice(["type", "type", "value", "shape", "scalar"])
    if kind == "type":
        kind = rng.choice(kinds)
        return array.astype(kind) if isinstance(kind, str) and kind != "V4" else np.zeros(
            array.shape, kind)  # fmt: skip
    if kind == "value" and array.size:
        array = array.astype(rng.choice([float, float, int]))
        worst = [np.nan, np.inf, -np.inf, 1e38, -1e38, 1e300, 0.5, -1, 99, 2**40]
        worst = worst if array.dtype.kind == "f" else [-1, 99, 2**62, -(2**63), 2**31]
        array.flat[rng.randrange(array.size)] = rng.choice(worst)
        return array
    if kind == "shape":
        return rng.choice([array[..., :-1] if array.ndim else array[None], array[None],
                           array.reshape(-1), array[:0] if array.ndim else array])  # fmt: skip
    return np.array(rng.choice([0, -1, 5, 2**40, np.nan, 2.5]))


def odd_hdf5(data, rng):
    """An HDF5 file with a group or dataset that is another, elsewhere or nowhere."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.hdf5"
        path.write_bytes(data)
        with h5py.File(path, "r+") as file:
            cell = rng.choice([*map(str, held_out(0, 0.9, 25))] * 20 + list(file))
            name = rng.choice(["states", "actions", "rewards", "next_states", "dones"])
            place = rng.choice([cell, f"{cell}/{name}", f"{cell}/{name}"])
            shape, array = file[f"{cell}/{name}"].shape, file[f"{cell}/{name}"][()]
            del file[place]
            kinds = "array array soft loop external huge chunk gone vlen outside virtual name"
            kind = rng.choice(kinds.split())
            if kind == "array":
                place = place if "/" in place else f"{place}/x"
                odd = odd_array(array, rng)
                file[place] = odd if odd.dtype.kind not in "UMm" else np.zeros(3, "S1")
            elif kind == "soft":
                file[place] = h5py.SoftLink(rng.choice(["/1", "/nowhere", f"/{place}"]))
            elif kind == "loop":
                file[place] = file["/"]
            elif kind == "external":
                target = rng.choice(["/dev/zero", "/etc/passwd", "nowhere.h5", FIFO])
                file[place] = h5py.ExternalLink(target, "/1")
            elif kind in ("huge", "chunk") and "/" in place:
                chunks = (1024, *shape[1:]) if kind == "huge" else (2**24, *shape[1:])
                n_steps = 10**12 if kind == "huge" else shape[0]
                options = {"chunks": chunks, "maxshape": (None, *shape[1:])}
                options["compression"] = rng.choice([None, "gzip"])
                file.create_dataset(place, (n_steps, *shape[1:]), "f4", **options)
            elif kind == "vlen" and "/" in place:
                file.create_dataset(place, shape, h5py.string_dtype())
            elif kind == "outside" and "/" in place:
                size = int(np.prod(shape)) * 4
                external = [(rng.choice(["/dev/zero", "/etc/passwd", FIFO]), 0, size)]
                file.create_dataset(place, shape, "f4", external=external)
            elif kind == "virtual" and "/" in place:
                layout = h5py.VirtualLayout(shape, "f4")
                layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape)
                file.create_virtual_dataset(place, layout)
            elif kind == "name":
                file[rng.choice(["\x1b[31m", "9" * 5000, "٣", "07", "99"])] = array
        return path.read_bytes()


CHANGES = {
    "own": {"bytes": flipped, "content": odd_checkpoint, "pickle": odd_pickle, "zip": odd_members},
    "npz": {"bytes": flipped, "content": odd_arrays, "zip": odd_members},
    "hdf5": {"bytes": flipped, "content": odd_hdf5},
}
CHANGES["foreign"] = CHANGES["own"]
