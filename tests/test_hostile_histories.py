"""No file of learning histories breaks the tool: damage and traps end in one line each."""

import io
import os
import shutil
import struct
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import make_histories, sharp_model
from foreign import make_foreign_run
from hostile import refusal, shown, zipped

from ad.checkpoints import HISTORIES_NAME, load_checkpoint
from ad.histories import read_histories
from dataset import CONTEXT, Histories
from historylens.common.errors import UserError
from historylens.common.reading import printable, reading
from historylens.history import History


@pytest.fixture
def npz(run_file):
    return run_file.with_name(HISTORIES_NAME)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_histories_are_refused_that_unpack_to_more_than_memory_or_another_way(npz, method):
    whole = npz.read_bytes()
    place = whole.index(b"PK\1\2") + 24  # of the declared size of the first member
    npz.write_bytes(whole[:place] + struct.pack("<L", 2**31) + whole[place + 4 :])
    assert "bytes: expected at most" in refusal(npz, Histories.load)
    npz.write_bytes(whole)
    zipped(npz, lambda members: members, method)
    assert "expected nothing compressed as" in refusal(npz, Histories.load)


@pytest.mark.parametrize("shape", [(10**12,), (3, 29), (3, 31), (10**6,) * 3, (-3, -30), ()])
def test_arrays_are_as_large_as_their_headers_say(npz, shape):
    file, odd = io.BytesIO(), {"descr": "|i1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, odd)
    zipped(npz, lambda members: members | {"actions.npy": file.getvalue() + bytes(90)})
    refusal(npz, Histories.load)


@pytest.fixture(scope="module")
def foreign_run(tmp_path_factory, tiny_config):
    weights = sharp_model(tiny_config).state_dict()
    return make_foreign_run(tmp_path_factory.mktemp("foreign"), weights, n_steps=40)


@pytest.fixture
def hdf5(foreign_run, tmp_path):
    """Histories of other code, and what reads them beside a checkpoint of it, group 13 too."""
    run, file = foreign_run
    checkpoint = load_checkpoint(next(run.glob("*.pt")))
    return Path(shutil.copy(file, tmp_path)), partial(read_histories, checkpoint=checkpoint)


LAYOUT = h5py.VirtualLayout((40, 2), "f4")
LAYOUT[:] = h5py.VirtualSource("/etc/passwd", "x", (40, 2))
TRAPS = {
    "soft link": (lambda file, at: file.__setitem__(at, h5py.SoftLink("/1/rewards")), "SoftLink"),
    "elsewhere": (lambda file, at: file.__setitem__(at, h5py.ExternalLink("FIFO", "/")), "Ext"),
    "itself": (lambda file, at: file.__setitem__(at, file["/"]), "expected a dataset rewards"),
    "virtual": (lambda file, at: file.create_virtual_dataset(at, LAYOUT), "it lies in another"),
    "outside": (lambda file, at: file.create_dataset(
        at, (40, 2), "f4", external=[("FIFO", 0, 320)]), "it lies in another"),
    "10^12 steps": (lambda file, at: [file.create_dataset(
        f"{at}/{name}", (10**12, 2, 2)[: 3 if "states" in name else 2], "i1", chunks=True)
        for name in CONTEXT], "its arrays are 12,000"),
    "a chunk of 2 GB": (lambda file, at: file.create_dataset(
        at, (40, 2), "f4", chunks=(2**28, 2), maxshape=(None, 2)), "its arrays are 2,1"),
    "texts": (lambda file, at: file.create_dataset(at, (40, 2), h5py.string_dtype()), "object"),
    "nothing": (lambda file, at: file.create_dataset(at, data=h5py.Empty("f4")), "HDF5 file"),
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_hdf5_files_are_read_from_themselves_alone_and_not_beyond_their_size(hdf5, trap):
    path, read = hdf5
    make, expected = TRAPS[trap]
    os.mkfifo(path.with_name("FIFO"))
    places = {"10^12 steps": ["13"]}.get(trap, ["13/rewards"])
    for at in [*places, "13"] if trap in ("soft link", "elsewhere") else places:
        with h5py.File(path, "r+") as file:
            del file[at]
            make(file, at)
        assert expected in refusal(path, read)


def test_names_of_an_hdf5_file_reach_no_terminal_as_they_are(hdf5):
    path, read = hdf5
    checkpoint = read.keywords["checkpoint"]
    for name in ("\x1b[31m\n", "9" * 5000, "٣", "07", b"\xff\xfe"):
        with h5py.File(path, "w") as file:
            file.create_group(name)
        every = partial(read, checkpoint=replace(checkpoint, goals={}))
        assert "named 0 to 24 row by row, got" in refusal(path, every)
    with h5py.File(path, "w") as file:
        file.create_group("13/\x1b[2J")
    named = partial(read, checkpoint=replace(checkpoint, goals={"test": [[2, 3]]}))
    assert r"got \x1b[2J" in refusal(path, named)


@pytest.mark.parametrize(("name", "kind", "is_read"), [
    ("states", ">i8", True), ("actions", ">u2", True), ("rewards", ">f4", True),
    ("rewards", "f2", True), ("goals", ">i4", True), ("rewards", "?", True),
    ("rewards", "S3", False), ("rewards", "M8[s]", False), ("rewards", "V4", False),
    ("rewards", "c16", False), ("rewards", "longdouble", False), ("goals", "f8", False),
    ("states", "?", False), ("horizon", "f8", False), ("horizon", ">i2", True),
], ids=str)  # fmt: skip
def test_numbers_of_any_kind_are_read_and_nothing_else(run_file, npz, name, kind, is_read):
    read = partial(read_histories, checkpoint=load_checkpoint(run_file))
    arrays = vars(make_histories())
    odd = np.array(arrays[name])
    odd = odd.astype(kind) if kind != "V4" else np.zeros(odd.shape, kind)
    np.savez(npz, **arrays | {name: odd})
    if not is_read:
        refusal(npz, read)
        return
    found = read(npz)
    for each, values in arrays.items():
        expected = values.astype(bool) if kind == "?" and each == name else values
        np.testing.assert_array_equal(getattr(found, each), expected)
        assert getattr(getattr(found, each), "dtype", np.dtype(int)).isnative
    agent = shown(run_file)
    assert agent.forward(History.of([agent.decisions[0]])).isfinite().all()


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e7])
def test_rewards_are_finite_and_of_a_size_that_a_model_can_read(npz, hdf5, value):
    np.savez(npz, **vars(make_histories()) | {"rewards": np.full((3, 30), value)})
    assert "expected finite rewards up to 1,000,000, got" in refusal(npz, Histories.load)
    file, read = hdf5
    with h5py.File(file, "r+") as opened:
        opened["13/rewards"][5, 1] = value
    assert "finite" in refusal(file, read)


def test_goals_of_histories_are_cells_of_the_room(run_file, npz):
    read = partial(read_histories, checkpoint=load_checkpoint(run_file))
    for goals in (np.full((3, 2), 5), np.full((3, 2), -1), np.zeros((3, 3), int)):
        np.savez(npz, **vars(make_histories()) | {"goals": goals})
        assert "goals" in refusal(npz, read)
    np.savez(npz, **vars(make_histories()) | {"goals": np.zeros((3, 4), int)})  # a key, a door
    assert "does not fit the checkpoint: expected goals of 2 numbers" in refusal(npz, read)


def test_episodes_of_another_length_than_the_model_was_trained_on_are_told(run_file, npz, capsys):
    checkpoint = load_checkpoint(run_file)
    for horizon in (5, 6, None):
        config = checkpoint.config | {"horizon": horizon}
        read_histories(npz, replace(checkpoint, config=config))
    said = f"note: {npz} has episodes of 5 steps; the checkpoint was trained on 6\n"
    assert capsys.readouterr().err == said


def test_what_is_said_of_a_file_is_one_printable_line(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    errors = ValueError("a\nb\x1b[2J\udcff"), MemoryError(), OSError("x" * 999), KeyError(1)
    for error in errors:
        with pytest.raises(UserError) as caught, reading(path, "a thing", "Do"):
            raise error
        said = str(caught.value)
        assert said.isprintable()
        assert said.startswith(f"{path} (3 bytes) cannot be read as a thing: ")
    assert printable("é\n\x9b\u202e" + "x" * 200) == r"é\n\x9b\u202e" + "x" * 96 + "..."
    with pytest.raises(KeyboardInterrupt), reading(path, "a thing", "Do"):
        raise KeyboardInterrupt
