"""What a checkpoint may hold, plain values and dense tensors: `load_plain(file)`, `digest(...)`."""

import hashlib
import json
import os
import pickletools
import re
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from historylens.common.errors import UserError, expect
from historylens.common.reading import checked_zip

SAFE_TORCH = "2.10"  # before it a file could do harm in spite of weights_only=True
MAX_VALUES = 2**20  # in a pickle, written out in full
_STORAGES = "Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"
_SCALARS = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]  # numpy 1 and 2
_NAMES = {f"torch.{kind}Storage" for kind in _STORAGES} | {"torch.Size", "torch.device"}
_NAMES |= {f"torch._utils._rebuild_{what}" for what in ("tensor_v2", "parameter")}
_SLOW = b"punycode", b"idna"  # encodings that take hours for a long text
_NAMES |= {"collections.OrderedDict", "_codecs.encode", "numpy.dtype", *_SCALARS}


def _dtype(name: str, *_: object) -> np.dtype:
    expect(re.fullmatch("[iu][1248]|f[248]|b1", name), "expected plain numbers of numpy")
    return np.dtype(name)


def _number(dtype: np.dtype, data: bytes) -> int | float | bool:
    return np.frombuffer(data, dtype)[0].item()


_NUMPY = [(_dtype, "numpy.dtype"), *((_number, name) for name in _SCALARS)]
_NUMPY += [type(np.dtype(kind)) for kind in "?bhilBHILefd"]


def load_plain(file: BinaryIO) -> Any:
    """What `torch.save` wrote, never executed; UserError: more than that, or another digest."""
    why = f"as files can do harm in older ones (CVE-2026-24747), got {torch.__version__}"
    expect(torch.__version__ >= SAFE_TORCH, f"expected PyTorch {SAFE_TORCH} or newer, {why}")
    size = os.fstat(file.fileno()).st_size
    archive = checked_zip(file)
    for name in archive.namelist():
        if name.lower().endswith(".pkl"):
            _check_pickle(archive.read(name))
    file.seek(0)
    with torch.serialization.safe_globals(_NUMPY):
        content = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(content, dict):
        content = dict(dict.items(content))
        written, found = content.pop("digest", None), digest(content, 4 * size)
        expect(written in (None, found), "it is damaged: its digest is not that of what it holds")
    return content


def _check_pickle(pickle: bytes) -> None:
    """UserError, before anything is made of it, where a pickle names other things or is a trap."""
    protocol = pickle[1] if pickle.startswith(b"\x80") else "0 or 1"
    how = "save it with torch.save(..., pickle_protocol=2), the default"
    expect(protocol in (2, 3), f"expected pickle protocol 2 or 3, got {protocol}: {how}")
    sizes, marks, memo, n_values = [], [], {}, 0  # sizes: of what is on the stack, in full
    for op, arg, _ in pickletools.genops(pickle):
        n_values += 2048 if op.name == "LONG1" else 1  # many of them may share a hash
        if op.name == "GLOBAL" and (name := arg.replace(" ", ".")) not in _NAMES:
            how = "is not loaded because it could run code; where you trust it, save without it"
            raise UserError(f"expected dense tensors and plain values, got a {name}, which {how}")
        text = arg.encode("ascii", "ignore") if isinstance(arg, str) else b""
        is_slow = text and re.sub(rb"[^a-z]", b"", text.lower()) in _SLOW
        expect(not is_slow, f"expected no text {arg}")
        if "PUT" in op.name:
            memo[arg] = sizes[-1]
        elif op.name == "MARK":
            marks.append(len(sizes))
        else:
            start = len(sizes) - len(op.stack_before)
            if pickletools.stackslice in op.stack_before:
                start = marks.pop() + 2 - len(op.stack_before)
            size = memo[arg] if "GET" in op.name else 1 + sum(sizes[start:])
            sizes[start:] = [size] * len(op.stack_after)
            expect(max(size, n_values) < MAX_VALUES, f"expected at most {MAX_VALUES:,} values")


def digest(content: Any, n_bytes: int = 2**63) -> str:
    """SHA-256 of nested plain values, and of tensors by type, shape and bytes, in their order.

    UserError: there is something else, or more than `MAX_VALUES` values or `n_bytes` of tensors.
    """

    def described(value: object) -> str:
        nonlocal n_bytes
        if isinstance(value, bytes | torch.device):
            return str(value)
        expect(isinstance(value, Tensor), f"expected plain values, got a {type(value).__name__}")
        n_bytes -= value.numel() * value.element_size()
        expect(n_bytes >= 0, "its tensors claim more numbers than the file holds")
        flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(flat).hexdigest()}"

    sha = hashlib.sha256()
    for n_values, piece in enumerate(json.JSONEncoder(default=described).iterencode(content)):
        expect(n_values < 2 * MAX_VALUES, f"expected at most {MAX_VALUES:,} values")
        sha.update(piece.encode())
    return sha.hexdigest()
