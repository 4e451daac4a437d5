"""No checkpoint breaks the tool: each kind of damage and each trap ends in one line."""

import itertools
import os
import pickle
import re
import struct
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import acting, refusal, shown, zipped

from ad import pickles
from ad.checkpoints import HISTORIES_NAME, load_checkpoint, read_file, save_checkpoint
from ad.histories import read_histories
from dataset import Histories
from historylens.common.errors import UserError
from historylens.common.reading import printable
from historylens.history import History

ROOT = Path(__file__).parents[1]
READERS = {"checkpoint": (load_checkpoint, "ckpt-5.pt"), "npz": (Histories.load, HISTORIES_NAME)}


@pytest.fixture
def path(run_file):
    return run_file


@pytest.fixture
def content(path):
    return torch.load(path, weights_only=True)


def saved(path, content, **changes) -> Path:
    torch.save(content | changes, path)
    return path


@pytest.mark.parametrize("kind", READERS)
def test_no_flipped_bit_of_any_member_is_read(path, kind):
    read, name = READERS[kind]
    path = path.with_name(name)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    for member in members:
        name, extra = struct.unpack("<2H", whole[member.header_offset + 26 :][:4])
        start = member.header_offset + 30 + name + extra
        damaged = bytearray(whole)
        damaged[start + rng.integers(member.compress_size)] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        assert "cannot be read as" in refusal(path, read), member.filename


def test_own_checkpoints_have_a_digest_of_all_that_they_hold(path, content):
    save_checkpoint(path, content)
    kept = torch.load(path, weights_only=True)
    assert read_file(path).keys() == content.keys()
    weights = kept["model"] | {"pred_action.bias": kept["model"]["pred_action.bias"] + 2**-10}
    config = kept["config"] | {"tf_dropout": 0.2}
    changed = {"model": weights, "config": config, "goals": {"test": [[0, 1]]}, "optimizer": [0]}
    for name, value in [*changed.items(), ("digest", "0" * 64), ("digest", 5)]:
        said = refusal(saved(path, kept, **{name: value}))
        assert "is damaged: its digest is not that of what it holds" in said


def test_a_digest_tells_values_types_shapes_and_order_apart():
    one, other = torch.zeros(2, 3), torch.zeros(3, 2)
    different = [
        [one], [other], [one.int()], [one, one], [[one], one], [-one], [1], [1.0], ["1"], [True],
        [None], {"a": 1, "b": 2}, {"b": 2, "a": 1}, [torch.device("cpu")], [torch.zeros(0)],
    ]  # fmt: skip
    assert len({pickles.digest(value) for value in different}) == len(different)
    assert pickles.digest([one.T]) == pickles.digest([other])  # however it lies in memory
    assert pickles.digest([np.float64(0.1)]) == pickles.digest([0.1])


@pytest.mark.parametrize(("sizes", "said"), [
    ({"tf_n_layer": 256}, "too many for"), ({"n_transit": 16384}, "too many for"),
    ({"grid_size": 128}, "too many for"), ({"num_actions": 1024}, "too many for"),
    ({"tf_n_layer": 2**31}, "to be a whole number in"),
], ids=str)  # fmt: skip
def test_a_model_that_the_file_cannot_hold_is_not_built(path, content, sizes, said, monkeypatch):
    monkeypatch.setattr("ad.checkpoints.ADTransformer", lambda _: pytest.fail("it was built"))
    assert said in refusal(saved(path, content, config=content["config"] | sizes))


@pytest.mark.parametrize("goals", [
    [[0, 1]], "goals", {"test": 5}, {"test": "ab"}, {"test": [[0]]}, {"test": [[0, 5]]},
    {"test": [[-1, 0]]}, {"test": [[0.0, 1.0]]}, {"test": [[True, 0]]}, {"test": [[2**70, 0]]},
    {"test": torch.zeros(2, 2)}, {"test": [[0, 1]] * 100}, {1: [[7, 7]]}, torch.zeros(2, 2),
    {"test": [[0, 1], [2, 2], [0, 1]]}, {"train": [[0, 1]], "test": [[2, 2], [0, 1]]},
], ids=str)  # fmt: skip
def test_goals_are_cells_of_the_room_and_test_goals_their_own(path, content, goals):
    assert load_checkpoint(saved(path, content, goals=[])).goals == {}
    said = refusal(saved(path, content, goals=goals))
    assert re.search("expected .*goal.*, got|cannot be read", said)


@pytest.mark.filterwarnings("ignore")
def test_weights_are_dense_floats_of_a_trained_size(path, content):
    x = content["model"][name := "pred_action.weight"]
    quantized = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    for expected, tensors in {
        "is not finite or beyond 10000: the training diverged": [x * 1e20, x * float("nan")],
        "expected pred_action.weight of floating-point numbers, got torch.": [x.long()],
        "expected dense tensors and plain": [x.to_sparse(), quantized, x.to("meta"), x.cfloat()],
        "claim more numbers than the file": [torch.zeros(1).expand(2**40)],
    }.items():
        for tensor in tensors:
            saved(path, content, model=content["model"] | {name: tensor})
            assert expected in refusal(path, acting)
    saved(path, content, model=content["model"] | {name: x * 1e20})
    assert "beyond 10000: the training diverged" in refusal(path, shown)
    assert load_checkpoint(path).step == 5  # what training has made so far can be evaluated
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = {k: v.to(dtype) for k, v in content["model"].items()}
        found = load_checkpoint(saved(path, content, model=model)).model.pred_action.weight
        assert torch.equal(found, model[name].float())


@pytest.mark.parametrize(("protocol", "got"), [(1, "0 or 1"), (4, "4")])
def test_a_pickle_of_another_protocol_is_told(path, content, protocol, got):
    torch.save(content, path, pickle_protocol=3)
    assert load_checkpoint(path).step == 5
    torch.save(content, path, pickle_protocol=protocol)
    assert f"expected pickle protocol 2 or 3, got {got}: save it with" in refusal(path)


def test_numbers_that_are_not_finite_end_in_a_line(path):
    agent = shown(path)
    history = History.of([agent.decisions[0]])
    agent.model.pred_action.bias.data.fill_(float("inf"))
    for decide in (agent.act, agent.forward):
        with pytest.raises(UserError, match="has diverged: it gives actions no finite numbers"):
            decide(history)


def test_a_checkpoint_that_unpacks_to_more_than_it_is_is_refused_before_it_does(path):
    zipped(path, lambda m: m | {"ckpt-5.pt/data/0": bytes(10**8)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**6
    assert "expected nothing compressed as" in refusal(path)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_file_that_two_programs_may_read_as_two_is_refused(path, kind):
    read, name = READERS[kind]
    path = path.with_name(name)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        first = archive.namelist()[0]
    for data in (b"x" * 9 + whole, whole[:-2] + b"\3\0abc", whole + b"more"):
        path.write_bytes(data)
        refusal(path, read)
    for name in (first, first.upper()):
        path.write_bytes(whole)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, b"x")
        assert "a name each and nothing around" in refusal(path, read)


def pickled(path, *ops: bytes) -> Path:
    """A checkpoint with a pickle of its own, and a right checksum."""

    def change(members):
        (name,) = (name for name in members if name.endswith("data.pkl"))
        return members | {name: b"\x80\x02" + b"".join(ops) + b"."}

    return zipped(path, change)


def test_pickles_that_take_hours_or_memory_are_refused_at_once(path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_VALUES", 2**15)
    put, get = (lambda i: b"r" + struct.pack("<L", i)), (lambda i: b"j" + struct.pack("<L", i))
    nest = [get(i) + get(i) + b"\x86" + put(i + 1) for i in range(40)]  # 2**40 in one tuple
    assert "values" in refusal(pickled(path, b"}", b"N\x85", put(0), *nest, b"Ns"))
    nest = [b"](" + get(i) * 9 + b"e" + put(i + 1) for i in range(40)]  # 9**40 in a list
    assert "values" in refusal(pickled(path, b"}X\1\0\0\0a](]", put(0), *nest, b"es"))
    big = (pickle.encode_long(k * (2**61 - 1)) for k in range(2000))  # of one hash
    ops = (b"\x8a" + bytes([len(n)]) + n + b"N" for n in big)
    assert "values" in refusal(pickled(path, b"}(", *ops, b"u"))
    assert "values" in refusal(pickled(path, b"(", b"]" * 2**15, b"t"))
    text = struct.pack("<L", 10**6) + b"a" * 10**6
    for name in (b"punycode", "!ü Idna".encode(), b"-Puny_code-"):
        code = b"X" + struct.pack("<L", len(name)) + name
        said = refusal(pickled(path, b"c_codecs\nencode\n", b"X", text, code, b"\x86R"))
        assert "expected no text" in said
    deep = refusal(pickled(path, b"]" * 10**4, b"a" * (10**4 - 1)))
    assert "cannot be read" in deep or "is not a checkpoint" in deep


@pytest.mark.parametrize("name", ["V2000000000", "f8,f8", "(9999,9999)f8", "O", "f4 "])
def test_numbers_of_numpy_are_plain_ones(path, name):
    text = b"X" + struct.pack("<L", len(name)) + name.encode()
    dtype = b"cnumpy\ndtype\n" + text + b"\x89\x88\x87R"
    scalar = b"cnumpy._core.multiarray\nscalar\n" + dtype + b"N\x86R"
    said = refusal(pickled(path, b"}", b"X\4\0\0\0step", scalar, b"s"))
    assert "expected plain numbers of numpy" in said


@pytest.mark.parametrize("name", [
    "os.system", "builtins.set", "torch._utils._rebuild_sparse_tensor", "x.\x1b[2J",
    "torch._utils._rebuild_meta_tensor_no_storage", "argparse.Namespace",
])  # fmt: skip
def test_a_pickle_names_only_what_plain_values_and_dense_tensors_need(path, name):
    module, _, what = name.rpartition(".")
    said = refusal(pickled(path, f"c{module}\n{what}\n".encode()))
    why = "which is not loaded because it could run code; where you trust it, save without it"
    assert f"expected dense tensors and plain values, got a {printable(name)}, {why}" in said


def test_tensors_that_share_or_overrun_their_bytes(path, content):
    big = torch.zeros(10_000)
    many = {"model": {f"x{i}": big for i in range(100)}}
    assert "claim more numbers than the file holds" in refusal(saved(path, content, **many))
    with zipfile.ZipFile(saved(path, content)) as archive:
        whole = archive.read("ckpt-5/data.pkl")
    pid = re.search(rb"cpuq.K(.)tq.Q", whole)  # of a storage: its number of elements
    end = pid.start(1)
    for op in (b"J" + struct.pack("<l", 2**20), b"J" + struct.pack("<l", -1)):
        changed = whole[: end - 1] + op + whole[end + 1 :]
        pickled(path, changed[2:-1])
        assert "cannot be read" in refusal(path)


def test_only_regular_files_are_opened(path):
    link, fifo = path.with_name("link.pt"), path.with_name("ckpt-9.pt")
    link.symlink_to("/dev/zero")
    os.mkfifo(fifo)
    folder = path.with_name("ckpt-10.pt")
    folder.mkdir()
    for odd, read in itertools.product((fifo, link, folder), (load_checkpoint, Histories.load)):
        assert "there is no file" in refusal(odd, read)
    with pytest.raises(UserError, match="there is no file"):
        read_histories(fifo, load_checkpoint(path))


def test_pytorch_with_known_holes_reads_no_checkpoint(path, monkeypatch):
    for version, is_safe in {"2.9.1+cu128": False, "2.10.0": True, "2.13.0": True}.items():
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        if is_safe:
            assert load_checkpoint(path).step == 5
        else:
            said = refusal(path)
            assert f"expected PyTorch {pickles.SAFE_TORCH} or newer" in said
            assert version in said


def test_no_pytorch_with_known_holes_is_installed_with_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"torch>={pickles.SAFE_TORCH}" in project["dependencies"]
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M)[1]
    assert torch.torch_version.TorchVersion(pinned) >= pickles.SAFE_TORCH
