"""A folder that a command writes its results to, checked before any work.

with writable_folder("figs/attention") as out:
    ...                                        # look at what lies there: a failure is one line
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from config import UserError


@contextlib.contextmanager
def writable_folder(out: str | Path) -> Iterator[Path]:
    """Make an output folder and check that files can be written to it, and look into it.

    Raises:
        UserError: they cannot, or the system refuses what the block does.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
        yield out
    except OSError as error:
        raise UserError(
            f"cannot write to the output folder {out} ({error.strerror}): choose another with --out"
        ) from error


def in_the_way(out: Path, path: Path) -> UserError:
    """What to say of something that stands where a result is to lie."""
    return UserError(
        f"cannot write to the output folder {out}: {path} is in the way; move it or choose another "
        "folder with --out"
    )
