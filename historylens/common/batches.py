"""How much goes through a model at once, and how work is cut to that."""

import itertools
import os
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from historylens.common.errors import expect

T = TypeVar("T")
MAX_TOKENS = 2**12  # in a captured pass without maps: as fast as more, and easily shared out
MAX_DRAWN = 16  # decisions with maps in one pass: a map takes R x C numbers a head
MAX_DRAWN_TOKENS = 2**15
MAX_TOKENS_ACTING = 2**14  # in a pass that only acts, on compressed histories
MAX_WEIGHTS = 2**25  # attention weights held at once: all layers, heads, rows and columns
MAX_ROOMS = 64  # environments that step together on a CPU: more of them outgrow its cache


def even_parts(start: int, stop: int, size: int) -> list[range]:
    """`start .. stop - 1` in as few parts of at most `size` as there can be, about equally long."""
    n_parts = -(-(stop - start) // size)
    ends = [start + (stop - start) * i // n_parts for i in range(n_parts + 1)] if n_parts else []
    return [range(*pair) for pair in itertools.pairwise(ends)]


def alike(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Items in groups of one key, such as a length to share a pass, in order of appearance."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def expect_memory(n_bytes: float, lower: str) -> None:
    """UserError, before it starts, where a job needs more memory than this machine has."""
    if hasattr(os, "sysconf"):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        need, have = (f"{n / 2**30:,.0f} GiB" for n in (n_bytes, there))
        what = f"about {need} of memory are needed, {have} are here: lower {lower}"
        expect(n_bytes < there, what)
