"""One way to fail: whatever ends a command is one line on stderr, and an exit code."""

import contextlib
import errno
import io
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator

WHOLE = "what lay there before is whole: mend that, and run the same again (train.py: --resume)"
STOPS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
if hasattr(signal, "SIGHUP"):  # the terminal is gone
    STOPS[signal.SIGHUP] = "hung up"
_LOST: list[OSError] = []  # why text did not get to the console


class UserError(ValueError):
    """A mistake that its user can mend: commands show it as one line and exit with 2."""


def expect(ok: object, message: str) -> None:
    """Raise a UserError unless something is as expected."""
    if not ok:
        raise UserError(message)


def told(error: BaseException) -> str:
    """An exception in a line: its type, and what it says."""
    said = ""
    with contextlib.suppress(Exception):  # its own __str__ may fail
        said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory left: numpy, PyTorch on a GPU and on a CPU say it differently."""
    signs = ["DefaultCPUAllocator", "not enough memory"]
    signs += ["CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory"]
    is_told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    # torch.OutOfMemoryError by its name: torch is slow to import.
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or is_told


def run_command(main: Callable[[], None]) -> None:
    """Run a command, and exit as it ended: 1: unexpected, with a traceback in a file.

    2: a user's mistake, or the system refused something, memory too; 128 + a number of `STOPS`.
    """
    _set_up_console()
    os.environ["MPLBACKEND"] = "agg"  # pictures are files
    code, line = 0, ""
    with _on_stops(_stop):
        try:
            main()
            if any(error.errno != errno.EPIPE for error in _LOST):
                code, line = 1, "error: the console could not show all text; the files are whole"
        except UserError as error:
            code, line = 2, f"error: {error}"
        except KeyboardInterrupt as error:
            number = error.args[0] if error.args else signal.SIGINT
            code, line = 128 + number, STOPS[number]
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            code, line = 2, f"error: {where}{error.strerror or told(error)}; {WHOLE}"
        except BaseException as error:
            if isinstance(error, SystemExit) and isinstance(error.code, int | None):
                code = error.code
            elif is_out_of_memory(error):
                code, line = 2, f"error: out of memory: {told(error)}; {WHOLE}"
            else:
                code, line = 1, _unexpected(error)
    if line:
        print("".join(c if c.isprintable() else " " for c in line), file=sys.stderr)
    if code:
        sys.exit(code)


def _stop(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Put Ctrl-C off until the block is done, so that what it changes is changed as a whole."""
    pressed: list[int] = []
    with _on_stops(lambda number, _: pressed.append(number)):
        yield
    if pressed:
        raise KeyboardInterrupt(pressed[0])


@contextlib.contextmanager
def _on_stops(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Have a block's `STOPS` handled, but for those that are to be ignored, as `nohup` asks."""
    heard = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier or signal.SIG_DFL)


def _unexpected(error: BaseException) -> str:
    options = {"prefix": "historylens-", "suffix": ".txt", "delete": False, "errors": "replace"}
    details = "no room for its details"
    with contextlib.suppress(Exception), tempfile.NamedTemporaryFile("w", **options) as file:
        traceback.print_exception(error, file=file)
        details = f"details in {file.name}"
    return f"unexpected: {told(error)}; {details}"


class _Console(io.FileIO):
    """A stream that drops what is not taken: by a pipe that is closed, a disk that is full."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError as error:
            _LOST.append(error)
            return len(data)


def _set_up_console() -> None:
    """Let stdout and stderr take any text; where one is closed, no file may get its place."""
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, io.TextIOWrapper(_Console(os.devnull, "wb")))
        elif stream is getattr(sys, f"__{name}__"):
            raw = io.BufferedWriter(_Console(stream.fileno(), "wb", closefd=False))
            shown = io.TextIOWrapper(raw, stream.encoding, "replace", line_buffering=True)
            setattr(sys, name, shown)


def note(text: str) -> None:
    """Tell the user something beside the results."""
    print(f"note: {text}", file=sys.stderr)
