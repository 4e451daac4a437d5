"""Draw pictures on all cores: several processes that only draw, fed while the model runs.

with Painter(2, "all numbers are in metrics.json", dpi=100) as painter:
    painter.draw(line_plot, path, sample, layer=2, heads=range(4))
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from historylens.common.errors import STOPS, note, told

MAX_PROCESSES = 8
MIN_PICTURES = 8  # for fewer, starting processes takes longer than it saves
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
BOXES = "Glyph .* missing from|Matplotlib currently does not support"  # what a font lacks is a box
IN_FLIGHT = 3  # pictures waiting for each process: their numbers lie in memory
KILLED = (
    "the process that drew it was killed, probably for lack of memory: draw fewer samples "
    "(--num-figures) or analyse fewer layers at once (--layers)"
)


def drawing_processes(n_pictures: int) -> int:
    """How many processes should draw: a process a core, 1 where it does not pay or cannot be."""
    if n_pictures < MIN_PICTURES or "fork" not in multiprocessing.get_all_start_methods():
        return 1
    try:
        multiprocessing.get_context("fork").Lock()
    except OSError as error:  # of /dev/shm
        note(f"one process draws the pictures: several cannot be fed here ({told(error)})")
        return 1
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return min(MAX_PROCESSES, len(cores(0)))


class Painter(AbstractContextManager):
    """Draws in order of arrival, with 1 process at once and here; `drawn` is called after each.

    A picture is drawn in each of `formats`, all in the same `style`, such as a `dpi`. One that
    cannot be drawn costs no other: it is a note that ends in `kept`, what there is all the same.
    `n_drawn` counts the others.
    """

    def __init__(
        self, n_processes: int, kept: str = "", drawn: Callable[[], object] = lambda: None,
        formats: Sequence[str] = ("png",), **style: Any,
    ) -> None:  # fmt: skip
        self.n_drawn, self._kept, self._drawn, self._style = 0, kept, drawn, style
        self._n_processes, self._formats = n_processes, formats
        warnings.filterwarnings("ignore", BOXES, UserWarning)
        self._waiting: deque[tuple[Path, Callable[[], object], Future]] = deque()
        self._pool = _pool(n_processes) if n_processes > 1 else None

    def draw(self, function: Callable[..., object], path: Path, *args: Any, **kwargs: Any) -> None:
        """Draw `function(path, *args, **kwargs)`, of a module; folder and suffixes are made."""
        for form in self._formats:
            own = path.with_suffix(f".{form}")
            task = partial(_draw, function, own, *args, **self._style, **kwargs)
            if self._pool is None:
                self._finish(own, task)
            else:
                self._collect(IN_FLIGHT * self._n_processes)
                self._waiting.append((own, task, self._submit(task)))

    def _submit(self, task: Callable[[], object]) -> Future:
        try:
            return self._pool.submit(task)
        except BrokenProcessPool:
            self._collect(0)  # what waits was lost with the processes
            self._pool = _pool(self._n_processes)
            return self._pool.submit(task)

    def _collect(self, at_most: int) -> None:
        while len(self._waiting) > at_most:
            path, task, future = self._waiting.popleft()
            if isinstance(future.exception(), BrokenProcessPool):
                with _pool(1) as alone:  # perhaps another picture was to blame
                    future = alone.submit(task)
            self._finish(path, future.result)

    def _finish(self, path: Path, result: Callable[[], object]) -> None:
        try:
            result()
            self.n_drawn += 1
        except OSError:  # a full disk, a folder that is gone: so would be the others
            raise
        except Exception as error:  # whatever it is, the other pictures are drawn
            reason = KILLED if isinstance(error, BrokenProcessPool) else told(error)
            end = f"; {self._kept}" if self._kept else ""
            tqdm.write(f"note: {path} could not be drawn ({reason}){end}", file=sys.stderr)
        self._drawn()

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Wait for the pictures; after an error elsewhere, drop those not begun."""
        try:
            if kind is None:
                self._collect(0)
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)


def _pool(n_processes: int) -> ProcessPoolExecutor:
    fork = multiprocessing.get_context("fork")  # starts at once, and shares what is imported
    return ProcessPoolExecutor(n_processes, fork, _begin, (os.getpid(),))


def _begin(parent: int) -> None:
    """End when the process dies that draws here; Ctrl-C is for that one."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(1)


def _draw(function: Callable[..., object], path: Path, *args: Any, **kwargs: Any) -> None:
    path.unlink(missing_ok=True)  # a picture that fails leaves none of an earlier run
    path.parent.mkdir(parents=True, exist_ok=True)
    function(path, *args, **kwargs)
