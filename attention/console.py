"""Laying out text for the console: wrapped paragraphs and aligned tables of at most 100 columns.

print(wrap("a long text ...", "   - ", "     "))
for line in aligned([("layer", "entropy"), ("0", "4.47")]): print(line)
"""

import textwrap
import unicodedata
from collections.abc import Sequence

WIDTH = 100


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, its columns right-aligned."""
    widths = [max(map(columns, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(" " * (w - columns(c)) + c for c, w in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def wrap(text: str, first: str = "", then: str | None = None) -> str:
    """A text in lines that begin with `first`, and from the second on with `then`, if given."""
    width = WIDTH - (columns(first) - len(first))  # textwrap counts characters
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=first if then is None else then
    )


def columns(text: str) -> int:
    """Console columns of a text: wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
