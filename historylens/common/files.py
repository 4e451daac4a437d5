"""The one way to write: a file is whole or it is not there, and folders are checked beforehand.

with writable_folder("figs/attention") as out:
    write_json(out / "metrics.json", {"entropy": 1.5})

A full disk is an OSError that names the file; `run_command` makes a line of it.
"""

import contextlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
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
_LEFT = re.compile(
    r"\.(?:write-test-|.+\.(?:csv|html|json|npz|pdf|png|pt|svg|txt)\.)(\d+)(?:\.tmp)?"
)


def write_atomically(path: str | Path, content: Content) -> None:
    """Write a temporary file beside `path`, then rename it: readers never see half a file.

    `content` is text, bytes, a long text in pieces that never lies in memory as a whole, plain
    types for JSON, or what writes to an open binary file. OSError where it cannot be written.
    """
    with staged({Path(path): content}):
        pass


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
    texts = _json(content) if isinstance(content, Mapping) else content
    return map(str.encode, [texts] if isinstance(texts, str) else texts)


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write plain types, numpy's numbers and arrays, and paths as JSON, all at once or not at all.

    ValueError: NaN or infinity somewhere in it. OSError: the file cannot be written.
    """
    write_atomically(path, content)


def _json(content: Mapping[str, Any]) -> Iterable[str]:
    def plain(value: object) -> Any:
        if isinstance(value, np.generic | np.ndarray):
            return value.tolist()
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"expected plain types for JSON, got {type(value).__name__}: {value!r}")

    encoder = json.JSONEncoder(allow_nan=False, default=plain)
    return itertools.chain(encoder.iterencode(content), "\n")


@contextlib.contextmanager
def writable_folder(out: str | Path, lock: bool = True) -> Iterator[Path]:
    """Make an output folder for a block to write to, alone with `lock`; UserError: it is refused.

    What killed processes left half written, here and one folder deeper, is removed.
    """
    out, number = Path(out), None
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)
        number = os.open(out, os.O_RDONLY) if lock and fcntl else None
    except OSError as error:
        why = f"({error.strerror}): choose another"
        raise UserError(f"cannot write to the output folder {out} {why}") from error
    try:
        is_taken = number is not None and _is_taken(number)
        expect(not is_taken, f"another run is writing to {out}: wait, or choose another")
        _sweep(out)
        yield out
    finally:
        if number is not None:
            os.close(number)


def _is_taken(folder: int) -> bool:
    """Whether another process holds the lock of an open folder; else it is ours until closed."""
    with contextlib.suppress(OSError):  # a network folder without locks
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _sweep(out: Path) -> None:
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
    """Move what there is of `names`, the last one last, to the first `earlier-N` that has none.

    So what an interrupted move left goes where the rest is.
    """
    there = [name for name in names if os.path.lexists(folder / name)]
    numbered = (folder / f"earlier-{number}" for number in itertools.count(1))
    taken = {*there, names[-1]}
    aside = next(one for one in numbered if not any(os.path.lexists(one / n) for n in taken))
    for name in there:
        aside.mkdir(exist_ok=True)
        os.replace(folder / name, aside / name)
    return aside if there else None


def in_the_way(out: Path, path: Path) -> UserError:
    """What to say of something that stands where a result is to lie."""
    what = f"{path} is in the way; move it or choose another folder with --out"
    return UserError(f"cannot write to the output folder {out}: {what}")


def rounded(values: np.ndarray, digits: int = 6) -> list[Any]:
    """Nested lists of floats with so many significant digits."""
    if values.ndim > 1:
        return [rounded(row, digits) for row in values]
    return [float(f"{value:.{digits}g}") for value in values]
