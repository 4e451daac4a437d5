"""The one way to read a file that others may have made: what is wrong with it is one line."""

import contextlib
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from historylens.common.errors import UserError, expect


@contextlib.contextmanager
def reading(path: str | Path, what: str, advice: str) -> Iterator[BinaryIO]:
    """Open a regular file, `what`, for a block; all that fails in the block is a UserError."""
    path, size = Path(path), 0
    try:
        expect(path.is_file(), f"No {what.removeprefix('a ')} found: there is no file {path}")
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            size = os.fstat(file.fileno()).st_size
            yield file
    except UserError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise UserError(printable(where + str(error), 2000)) from error
    except BlockingIOError as error:  # HDF5 locks its files
        raise UserError(f"{path} is open for writing elsewhere: wait until it is closed") from error
    except Exception as error:  # each library raises other types, and other ones for each damage
        why = str(error) if 0 < len(str(error)) < 100 else type(error).__name__
        said = f"{path} ({size:,} bytes) cannot be read as {what}: it is truncated, damaged or of "
        raise UserError(printable(f"{said}another kind ({why}). {advice}", 2000)) from error


def most_unpacked(path: str | Path) -> int:
    """Bytes that a file may unpack to: far more than real ones do, and no more than fit memory."""
    most = max(2**28, 64 * os.stat(path).st_size)
    with contextlib.suppress(OSError):  # where the machine tells what is left
        found = re.findall(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
        most = min([most, *(1024 * int(n_kib) for n_kib in found)])
    return most


def checked_zip(file: BinaryIO, *compression: int) -> zipfile.ZipFile:
    """Open a zip file of members stored, or compressed by one of `compression`, and not damaged.

    UserError: they unpack to too much, or two programs may find other things in it.
    """
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    file.seek(-22, os.SEEK_END)  # the record at the end, behind which nothing is added
    is_plain = file.read(4) == b"PK\5\6" and min(m.header_offset for m in members) == 0
    is_plain &= len({m.filename.lower() for m in members}) == len(members) < 2**16
    expect(is_plain, "expected a zip file of members with a name each and nothing around them")
    odd = [m.filename for m in members if m.compress_type not in (zipfile.ZIP_STORED, *compression)]
    expect(not odd, f"expected nothing compressed as {odd[:1]} is")
    total, most = sum(m.file_size for m in members), most_unpacked(file.name)
    expect(total <= most, f"it unpacks to {total:,} bytes: expected at most {most:,}")
    for member in members:
        with archive.open(member) as content:
            while content.read(2**20):  # held against checksums
                pass
    file.seek(0)
    return archive


def printable(text: str, longest: int = 100) -> str:
    """Text of a file for a terminal: without control characters, and not too long."""
    text = text if len(text) <= longest else text[:longest] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
