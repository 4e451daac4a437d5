"""Text for the console: wrapped paragraphs, aligned tables, numbers and lists in words."""

import textwrap
import unicodedata
from collections.abc import Collection, Mapping, Sequence

WIDTH = 100


def aligned(table: Sequence[Sequence[str]], left: Collection[int] = ()) -> list[str]:
    """Lines of a table, its columns right-aligned but for those of the numbers `left`."""
    widths = [max(map(columns, column)) for column in zip(*table, strict=True)]

    def padded(cell: str, i: int) -> str:
        space = " " * (widths[i] - columns(cell))
        return cell + space if i in left else space + cell

    return ["  ".join(padded(cell, i) for i, cell in enumerate(row)).rstrip() for row in table]


def wrap(text: str, first: str = "", then: str | None = None) -> str:
    """A text in lines that begin with `first`, and from the second on with `then`, if given."""
    width = WIDTH - (columns(first) - len(first))  # textwrap counts characters
    then = first if then is None else then
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=then)


def labelled(lines: Mapping[str, str]) -> str:
    """`label: text` lines with the texts aligned; long texts wrap below themselves."""
    width = max(columns(label) for label in lines) + 2
    return "\n".join(
        wrap(text, f"{label}:" + " " * (width - columns(label) - 1), " " * width)
        for label, text in lines.items()
    )


def columns(text: str) -> int:
    """Console columns of a text: wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def cap(value: float) -> str:
    """A ratio for people to read: a denominator near zero makes it huge and its digits noise."""
    return "> 1000" if value > 1000 else f"{value:.2f}"


def counted(number: int, noun: str) -> str:
    """`1 layer`, `4,000 layers`, `2 histories`."""
    many = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else many}"


def listed(numbers: Sequence[int], noun: str = "layer") -> str:
    """`layer 1`, `layers 1 and 2`, `layers 0, 1 and 3`."""
    *first, last = [str(number) for number in numbers]
    return f"{noun}s {', '.join(first)} and {last}" if first else f"{noun} {last}"
