"""One job in several processes: each takes its share of the work, rank 0 writes and prints.

Gloo carries python objects and CPU tensors, NCCL what lies on GPUs. One process sends nothing.
"""

import contextlib
import io
import itertools
import os
import pickle
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from historylens.common.errors import UserError, expect
from historylens.common.steady import SteadySums

FINDING = timedelta(minutes=2)  # that processes have to find each other
TIMEOUT = timedelta(hours=1)  # longer than rank 0 ever works while the others wait
PAUSE = 0.02  # seconds between two looks at what other processes have finished
FAILED = 2**40  # no item has a number as high: nobody takes another one


@dataclass(frozen=True)
class Group:
    """The processes of a job, seen from one of them; by default there is only this one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # number of this process on its machine
    store: Any = field(default_factory=torch.distributed.HashStore, compare=False)  # all share it
    _numbers: Iterator[int] = field(default_factory=itertools.count, compare=False)  # of spreads

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, n_items: int) -> range:
        """Numbers of `0 .. n_items - 1` for this process: every `size`-th from `rank` on."""
        return range(self.rank, n_items, self.size)

    def equal_slice(self, n_items: int) -> slice:
        """The part of `n_items` for this process, as long as that of every other, or UserError."""
        n_own, rest = divmod(n_items, self.size)
        what = f"expected a batch size that {self.size} processes can share evenly"
        expect(not rest, f"{what}, got {n_items}")
        return slice(self.rank * n_own, (self.rank + 1) * n_own)

    def device(self, device: torch.device) -> torch.device:
        """The device of this process: with several, "cuda" means a GPU for each, or UserError."""
        if self.size == 1 or device.type != "cuda":
            return device
        what = f"expected --device cuda, a GPU for each of {self.size} processes"
        expect(device.index is None, f"{what}, got {device}")
        n_gpus, least = torch.cuda.device_count(), self.local_rank + 1
        what = f"expected at most {n_gpus} processes on this machine, one a GPU"
        expect(least <= n_gpus, f"{what}, got {least} or more: lower --nproc-per-node")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all processes by rank, on rank 0; None on the others."""
        values = [value] * self.size if self.is_main else None
        if self.size > 1:
            torch.distributed.gather_object(value, values)
        return values

    def all_of(self, n_items: int, own: Sequence[Any]) -> list[Any]:
        """On all processes, in order, what they made of `n_items`: each gives that of its share."""
        of_rank = self.broadcast(self.gather(own))
        return [of_rank[i % self.size][i // self.size] for i in range(n_items)]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all processes."""
        values = [value]
        if self.size > 1:
            torch.distributed.broadcast_object_list(values)
        return values[0]

    def spread(
        self, items: Sequence[Any], work: Callable[..., Any], keep: Callable[[Any], None]
    ) -> None:
        """Do `work(item, see)` on all items: each process takes the next one as it has finished.

        Rank 0 calls `keep` with what is there whenever `work` calls `see`. A UserError stops all.
        """
        name, n_kept = f"spread {next(self._numbers)}", 0

        def see() -> None:
            nonlocal n_kept
            while self.is_main and self.store.check([f"{name} {n_kept + 1}"]):
                n_kept += 1
                keep(pickle.loads(self.store.get(f"{name} {n_kept}")))

        with self.together():
            try:
                while (number := self.store.add(name, 1)) <= len(items):
                    given = pickle.dumps(work(items[number - 1], see))
                    self.store.set(f"{name} {self.store.add(f'{name} done', 1)}", given)
                    see()
            except UserError:
                self.store.add(name, FAILED)
                raise
            while self.is_main and n_kept < len(items) and self.store.add(name, 0) < FAILED:
                time.sleep(PAUSE)
                see()

    def mean(self, value: float) -> float:
        """Mean of a number over all processes, on all of them."""
        total = torch.tensor(value, dtype=torch.float64)
        if self.size > 1:
            torch.distributed.all_reduce(total)
        return float(total) / self.size

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.mean(0.0)

    def averaging(self, module: nn.Module, device: torch.device) -> nn.Module:
        """`module` with gradients that are averaged over all processes as it runs backward."""
        if self.size == 1:
            return module
        device_ids = None if device.type == "cpu" else [device]
        return nn.parallel.DistributedDataParallel(module, device_ids=device_ids)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block at whose end all go on, or stop with code 2: the first of a mistake tells it."""
        mistake = said = None
        try:
            yield
        except UserError as error:
            mistake, said = error, str(error)
        mistakes = [said] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(mistakes, said)
        if mistake and mistakes.index(said) == self.rank:
            raise mistake
        if any(mistakes):
            sys.exit(2)

    @contextlib.contextmanager
    def told_once(self) -> Iterator[None]:
        """A block whose console text is the same on all processes: only rank 0's is shown."""
        out, err = (sys.stdout, sys.stderr) if self.is_main else (io.StringIO(), io.StringIO())
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield


ALONE = Group()


@contextlib.contextmanager
def join() -> Iterator[Group]:
    """Join the processes that torchrun started beside this one; UserError: they are not found.

    A process that loses another says so in one line and exits with code 1, as torchrun then does.
    Sums are the same in all of them, and with any number of threads.
    """
    group = _started_by_torchrun()
    if group.size == 1:
        with SteadySums():
            yield group
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # who waits for a dead process hears nothing else
    torch.set_num_threads(1)  # processes share the cores already
    on_gpus = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    try:
        store, *_ = next(torch.distributed.rendezvous("env://", timeout=FINDING))
        own = {"store": store, "rank": group.rank, "world_size": group.size}
        torch.distributed.init_process_group(backend, timeout=TIMEOUT, **own)
    except (RuntimeError, ValueError) as error:
        lost = f"the {group.size} processes of this job did not find each other"
        raise UserError(f"{lost}: {_brief(error)}") from error
    try:
        with SteadySums():
            yield replace(group, store=store)
    except (UserError, SystemExit):
        torch.distributed.destroy_process_group()  # its threads may not outlive the interpreter
        raise
    except RuntimeError as error:  # gloo raises a bare one that names its source file
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error).lower():
            raise
        lost = f"rank {group.rank} lost another of the {group.size} processes of this job"
        end = f"which died or hangs; nothing more is written ({_brief(error)})"
        print(f"error: {lost}, {end}", file=sys.stderr, flush=True)
        os._exit(1)  # what would tidy up waits for the process that is gone
    torch.distributed.destroy_process_group()


def _started_by_torchrun() -> Group:
    if (size := os.environ.get("WORLD_SIZE") or "1") == "1":
        return ALONE
    instead = "start several processes with `torchrun --nproc-per-node N`, or unset WORLD_SIZE"
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        expect(name in os.environ, f"WORLD_SIZE is {size}, but {name} is not set: {instead}")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        is_fit = re.fullmatch("[0-9]{1,5}", number := os.environ[name])
        is_fit = is_fit and ("RANK" not in name or int(number) < int(size))
        expect(is_fit, f"{name} is {number!r} and WORLD_SIZE {size!r}: {instead}")
    return Group(int(os.environ["RANK"]), int(size), int(os.environ["LOCAL_RANK"]))


def _brief(error: Exception) -> str:
    """First sentence of a message, without the source line it begins with."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.rpartition("] ")[2].split(". ")[0]
