"""Settings as dataclasses, and flags made of them: type, default, help and bounds stand once."""

import argparse
import dataclasses
import math
import types
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar, get_args, get_origin

from historylens.common.errors import expect
from historylens.common.files import FORMATS

T = TypeVar("T")
MOST = 2**53  # of any number: beyond it floats skip whole ones
BOUNDS = ("at_least", "at_most", "fraction")


def setting(default: Any, help: str | None, metavar: str | None = None, **flag: Any) -> Any:
    """Declare a dataclass field: its default, its help, and what else its flag needs.

    The type is that of the annotation, or of its entries. `Settings` checks the bounds `at_least`,
    `at_most` and `fraction` (between 0 and 1), and `choices`. Without help it has no flag.
    """
    told = {"help": help, "metavar": metavar} | flag
    told = {name: value for name, value in told.items() if value is not None}
    return dataclasses.field(default=default, metadata=told)


# What several commands ask for.
DEVICE = partial(setting, "auto", "cpu, cuda, or auto: cuda where there is one", "NAME")
FORMAT = partial(setting, None, "png, pdf, svg, or several of them (default: png)", choices=FORMATS)
REWARDED_ABOVE = partial(
    setting, None, "rewards above it count as rewarded (default: 0; where those in an adapter's "
    "samples are of more than two values the top quarter, of two not above 0 the higher)",
)  # fmt: skip


class Settings:
    """Base of settings of which some have bounds; UserError where one is beyond them."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, told = getattr(self, field.name), field.metadata
            least, most = told.get("at_least", -MOST), told.get("at_most", MOST)
            expected = f"expected {flag_of(field.name)}"
            if value is None is field.default:
                continue
            for got in value if isinstance(value, list) else [value]:
                expect(got != "", f"{expected} not to be empty")
                is_finite = not isinstance(got, float) or math.isfinite(got)
                expect(is_finite, f"{expected} as a finite number, got {got}")
                if isinstance(got, int | float):
                    expect(got >= least, f"{expected} of at least {least}, got {got}")
                    expect(got <= most, f"{expected} of at most {most}, got {got}")
                if "fraction" in told:
                    is_in = 0 <= got <= 1 and math.copysign(1, got) > 0  # -0.0 is below others
                    expect(is_in, f"{expected} between 0 and 1, got {got}")
                choices = told.get("choices", [got])
                expect(got in choices, f"{expected} of {', '.join(map(str, choices))}, got {got}")


class Parser(argparse.ArgumentParser):
    """Of the flags of a command: a mistake in them is one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        """End the command with what is wrong."""
        self.exit(2, f"error: {message}; --help names what there is\n")


def flag_of(name: str) -> str:
    """`--tf-n-head` of `tf_n_head`."""
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, *configs: type) -> None:
    """Add a flag for every `setting` of dataclasses; a name met before is not repeated."""
    known = {action.dest for action in parser._actions}
    for config in configs:
        group = parser.add_argument_group((config.__doc__ or "").split("\n")[0].rstrip("."))
        for field in dataclasses.fields(config):
            if field.name in known or "help" not in field.metadata:
                continue
            known.add(field.name)
            options = {k: v for k, v in field.metadata.items() if k not in BOUNDS}
            if "action" not in options:
                options = _of_type(field.type) | options
                if field.default is not None:
                    options["help"] += " (default: %(default)s)"
            group.add_argument(flag_of(field.name), default=field.default, **options)


def _of_type(kind: Any) -> dict[str, Any]:
    """What a flag takes for a setting of a type, of that or None, or of a list of them."""
    if isinstance(kind, types.UnionType):
        kind = get_args(kind)[0]
    more = {}
    if get_origin(kind) is list:
        kind, more = get_args(kind)[0], {"nargs": "+"}
    return {"type": kind, "metavar": {int: "N", float: "X"}.get(kind), **more}


def from_dict(config: type[T], values: dict[str, Any]) -> T:
    """Build a settings object from a flat dict, which may hold settings of others as well."""
    return config(**{k: v for k, v in values.items() if k in config.__dataclass_fields__})


def to_dict(*configs: Any) -> dict[str, Any]:
    """Flatten settings objects into one dict of plain values."""
    return {name: value for config in configs for name, value in vars(config).items()}


def given_for(name: str, argv: Sequence[str] | None) -> str | None:
    """What the arguments of a command give for a flag; None: nothing, "" where it has no value."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument(flag_of(name), nargs="?", const="", dest="given")
    try:
        return parser.parse_known_args(argv)[0].given
    except argparse.ArgumentError:
        return None
