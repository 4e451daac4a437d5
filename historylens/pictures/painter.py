"""Draw pictures on all cores: several processes that only draw, fed while the model runs.

    with Painter(n_processes=2) as painter:
        painter.draw(line_plot, path, sample, layer=2, heads=range(4), dpi=100)
    # every picture is on the disk here

Pictures are the same bytes however many processes draw them. Processes are forked: they start at
once and share what is imported. Where that cannot be, everything is drawn here.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self

from historylens.common.errors import UserError

MAX_PROCESSES = 8
MIN_PICTURES = 8  # for fewer, starting processes takes longer than it saves
IN_FLIGHT = 3  # pictures waiting for each process: their numbers lie in memory
KILLED = (
    "a process that draws pictures was killed, probably for lack of memory: draw fewer samples "
    "(--num-figures) or analyse fewer layers at once (--layers)"
)


def drawing_processes(n_pictures: int) -> int:
    """How many processes should draw: a process a core, 1 where it does not pay or cannot be."""
    if n_pictures < MIN_PICTURES or "fork" not in multiprocessing.get_all_start_methods():
        return 1
    has_affinity = hasattr(os, "sched_getaffinity")
    n_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(MAX_PROCESSES, n_cores)


class Painter:
    """Draws in order of arrival, with 1 process at once and here; `drawn` is called after each."""

    def __init__(self, n_processes: int, drawn: Callable[[], object] = lambda: None) -> None:
        self._drawn, self._room = drawn, IN_FLIGHT * n_processes
        self._waiting: deque[Future] = deque()
        self._pool = None
        if n_processes > 1:
            fork = multiprocessing.get_context("fork")
            ignore_ctrl_c = signal.signal, (signal.SIGINT, signal.SIG_IGN)  # it is for this process
            self._pool = ProcessPoolExecutor(n_processes, fork, *ignore_ctrl_c)

    def draw(self, function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Draw `function(*args, **kwargs)`, of a module; UserError where a process was killed."""
        if self._pool is None:
            function(*args, **kwargs)
            self._drawn()
            return
        try:
            self._collect(self._room)
            self._waiting.append(self._pool.submit(function, *args, **kwargs))
        except BrokenProcessPool as error:
            raise UserError(KILLED) from error

    def _collect(self, at_most: int) -> None:
        while len(self._waiting) > at_most:
            self._waiting.popleft().result()
            self._drawn()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Wait for the pictures; after an error elsewhere, drop those not begun."""
        try:
            if kind is None:
                self._collect(0)
        except BrokenProcessPool as error:
            raise UserError(KILLED) from error
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
