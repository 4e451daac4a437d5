"""The one way to write: a file is whole or it is not there, and folders are checked beforehand.

with writable_folder("figs/attention") as out:
    write_json(out / "metrics.json", {"entropy": 1.5})
"""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from historylens.common.errors import UserError

FORMATS, INDEX = ("png", "pdf", "svg"), "index.html"  # of pictures, and the page that shows them
Content = str | bytes | Iterable[str] | Callable[[BinaryIO], object]


def write_atomically(path: str | Path, content: Content) -> None:
    """Write a temporary file beside `path`, then rename it: readers never see half a file.

    `content` is text, bytes, a long text in pieces that never lies in memory as a whole, or what
    writes to an open binary file. OSError where the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if callable(content):
                content(file)
            elif isinstance(content, bytes):
                file.write(content)
            else:
                pieces = [content] if isinstance(content, str) else content
                file.writelines(map(str.encode, pieces))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write plain types, numpy's numbers and arrays, and paths as JSON, all at once or not at all.

    ValueError: NaN or infinity somewhere in it. OSError: the file cannot be written.
    """

    def plain(value: object) -> Any:
        if isinstance(value, np.generic | np.ndarray):
            return value.tolist()
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"expected plain types for JSON, got {type(value).__name__}: {value!r}")

    encoder = json.JSONEncoder(allow_nan=False, default=plain)
    write_atomically(path, itertools.chain(encoder.iterencode(content), "\n"))


@contextlib.contextmanager
def writable_folder(out: str | Path) -> Iterator[Path]:
    """Make an output folder to write to; UserError where it or what the block does is refused."""
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
        yield out
    except OSError as error:
        why = f"({error.strerror}): choose another with --out"
        raise UserError(f"cannot write to the output folder {out} {why}") from error


def in_the_way(out: Path, path: Path) -> UserError:
    """What to say of something that stands where a result is to lie."""
    what = f"{path} is in the way; move it or choose another folder with --out"
    return UserError(f"cannot write to the output folder {out}: {what}")


def rounded(values: np.ndarray, digits: int = 6) -> list[Any]:
    """Nested lists of floats with so many significant digits."""
    if values.ndim > 1:
        return [rounded(row, digits) for row in values]
    return [float(f"{value:.{digits}g}") for value in values]
