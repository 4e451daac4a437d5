"""The one way to write: a file is whole or it is not there, and folders are checked beforehand."""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np

from historylens.common.errors import UserError, expect

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMATS, INDEX = ("png", "pdf", "svg"), "index.html"  # of pictures, and the page that shows them
# The file that holds the numbers of each command, and how those that it wrote begin.
NUMBERS = {
    "analysis": ("metrics.json", b'{"schema": "attention-metrics"'),
    "comparison": ("results.json", b'{"schema_version": '),
}
Content = str | bytes | Mapping[str, Any] | Iterable[str] | Callable[[BinaryIO], object]
_WRITTEN = "csv|html|json|npz|pdf|png|pt|svg|txt"
_LEFT = re.compile(rf"\.(?:write-test-|.+\.(?:{_WRITTEN})\.)(\d+)(?:\.tmp)?")


def write_atomically(path: str | Path, content: Content) -> None:
    """Write a temporary file beside `path`, then rename it: readers never see half a file.

    `content`: text, bytes, pieces of a long text, what writes to a file, or plain types, numpy's
    and paths, for JSON; ValueError: NaN or infinity in it.
    """
    with staged({Path(path): content}):
        pass


def csv_lines(rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """Rows as pieces of text for a CSV file."""
    back = SimpleNamespace(write=str)  # a file whose write() gives the text back
    return map(csv.writer(back, lineterminator="\n").writerow, rows)


@contextlib.contextmanager
def staged(contents: Mapping[Path, Content]) -> Iterator[None]:
    """Write several files as one; they take their places once the block has ended well."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            with _named(path), temporary[path].open("wb") as file:
                file.writelines(_pieces(content))
                file.flush()
                os.fsync(file.fileno())
        yield
        for path in contents:
            with _named(path):
                os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno:
            error.filename = str(path)
        raise


def _pieces(content: Content) -> Iterable[bytes]:
    if callable(content):
        content(memory := io.BytesIO())  # of a full disk each library has a tale of its own
        return [memory.getbuffer()]
    if isinstance(content, bytes):
        return [content]
    if isinstance(content, Mapping):
        encoder = json.JSONEncoder(allow_nan=False, default=_plain)
        content = itertools.chain(encoder.iterencode(content), "\n")
    return map(str.encode, [content] if isinstance(content, str) else content)


def _plain(value: object) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"expected plain types for JSON, got {type(value).__name__}: {value!r}")


@contextlib.contextmanager
def writable_folder(out: str | Path, lock: bool = True) -> Iterator[Path]:
    """Make an output folder for a block to write to, alone with `lock`; UserError: refused."""
    out = Path(out)
    with contextlib.ExitStack() as held:
        try:
            out.mkdir(parents=True, exist_ok=True)
            probe = out / f".write-test-{os.getpid()}"
            probe.touch()
            probe.unlink(missing_ok=True)
            number = os.open(out, os.O_RDONLY) if lock and fcntl else None
        except OSError as error:
            why = f"({error.strerror}): choose another"
            raise UserError(f"cannot write to the output folder {out} {why}") from error
        if number is not None:
            held.callback(os.close, number)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                what = f"another run is writing to {out}: wait, or choose another"
                raise UserError(what) from error
            except OSError:  # a network folder without locks
                pass
        _sweep(out)
        yield out


def _sweep(out: Path) -> None:
    """Remove what killed processes left half written, here and one folder deeper."""
    for path in (*out.glob(".*"), *out.glob("*/.*")):
        if match := _LEFT.fullmatch(path.name):
            with contextlib.suppress(PermissionError):  # another user's process lives
                try:
                    os.kill(int(match[1]), 0)
                except (ProcessLookupError, OverflowError):
                    path.unlink(missing_ok=True)


def holds_results(out: Path, command: str) -> bool:
    """Whether a command of `NUMBERS` has written its results to a folder."""
    name, start = NUMBERS[command]
    with contextlib.suppress(OSError), (out / name).open("rb") as file:
        return file.read(len(start)) == start
    return False


def expect_no_results(out: Path, command: str) -> None:
    """UserError where a folder holds the results of a command, in the files of another."""
    what = f"{out} holds results of the {command} ({NUMBERS[command][0]})"
    expect(not holds_results(out, command), f"{what}: choose another folder with --out")


def set_aside(folder: Path, names: Sequence[str]) -> Path | None:
    """Move what there is of `names`, the last one last, to the first `earlier-N` that has none."""
    there = [name for name in names if os.path.lexists(folder / name)]
    numbered, taken = (folder / f"earlier-{n}" for n in itertools.count(1)), {*there, names[-1]}
    aside = next(one for one in numbered if not any(os.path.lexists(one / n) for n in taken))
    for name in there:
        aside.mkdir(exist_ok=True)
        os.replace(folder / name, aside / name)  # what an interruption leaves goes there later
    return aside if there else None


def in_the_way(out: Path, path: Path) -> UserError:
    """What to say of something that stands where a result is to lie."""
    what = f"{path} is in the way; move it or choose another folder with --out"
    return UserError(f"cannot write to the output folder {out}: {what}")


def rounded(values: np.ndarray, nan: float | None = math.nan) -> list[Any]:
    """Nested lists of floats with 6 significant digits, and of `nan` where there is no number."""
    if values.ndim > 1:
        return [rounded(one, nan) for one in values]
    return [nan if np.isnan(value) else float(f"{value:.6g}") for value in values]
