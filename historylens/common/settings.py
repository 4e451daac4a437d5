"""Settings as dataclasses, and the flags made of them: default, help and type stand once.

@dataclass(frozen=True)
class Config:
    '''What to analyse.'''
    seed: int = setting(0, "seed of the choice of decisions", "N", type=whole)

parser = argparse.ArgumentParser()
add_flags(parser, Config)
config = from_flags(Config, parser.parse_args())
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from historylens.common.errors import UserError

T = TypeVar("T")


def setting(default: Any, help: str, metavar: str | None = None, **flag: Any) -> Any:
    """Declare a dataclass field: its default, its help, and what else its flag needs."""
    flag |= {"help": help} | ({"metavar": metavar} if metavar else {})
    return dataclasses.field(default=default, metadata=flag)


def require(config: Any, **at_least: float) -> None:
    """Check that settings of `config` are not below the given values; UserError where one is."""
    for name, least in at_least.items():
        got = getattr(config, name)
        if not got >= least:
            raise UserError(f"expected {flag_of(name)} of at least {least}, got {got}")


def require_fractions(config: Any, *names: str) -> None:
    """Check that settings of `config` lie between 0 and 1; UserError where one does not."""
    for name in names:
        got = getattr(config, name)
        if not 0 <= got <= 1:
            raise UserError(f"expected {flag_of(name)} between 0 and 1, got {got}")


def flag_of(name: str) -> str:
    """`--tf-n-head` of `tf_n_head`."""
    return "--" + name.replace("_", "-")


def whole(text: str, at_least: int = 0) -> int:
    """Parse a whole number that is not negative."""
    value = int(text)
    if value < at_least:
        raise argparse.ArgumentTypeError(f"expected a whole number >= {at_least}, got {text}")
    return value


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    return whole(text, at_least=1)


def fraction(text: str) -> float:
    """Parse a number between 0 and 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return value


def add_flags(parser: argparse.ArgumentParser, *configs: type) -> None:
    """Add a flag for every `setting` of dataclasses; a name met before is not repeated."""
    known = {action.dest for action in parser._actions}
    for config in configs:
        group = parser.add_argument_group((config.__doc__ or "").split("\n")[0].rstrip("."))
        for field in dataclasses.fields(config):
            if field.name in known or "help" not in field.metadata:
                continue
            known.add(field.name)
            options = dict(field.metadata)
            if options.get("action") is None:
                options.setdefault("type", type(field.default))
                if field.default is not None:
                    options["help"] += " (default: %(default)s)"
            group.add_argument(flag_of(field.name), default=field.default, **options)


def from_flags(config: type[T], flags: argparse.Namespace) -> T:
    """Build a settings object from parsed flags."""
    return from_dict(config, vars(flags))


def from_dict(config: type[T], values: dict[str, Any]) -> T:
    """Build a settings object from a flat dict, which may hold settings of others as well."""
    names = {field.name for field in dataclasses.fields(config)}
    return config(**{name: value for name, value in values.items() if name in names})


def to_dict(*configs: Any) -> dict[str, Any]:
    """Flatten settings objects into one dict of plain values."""
    return {name: value for config in configs for name, value in vars(config).items()}


def names_adapter(argv: Sequence[str]) -> bool:
    """Whether the arguments of a command name a user's adapter."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--adapter", nargs="?", const="")
    try:
        return parser.parse_known_args(argv)[0].adapter is not None
    except argparse.ArgumentError:
        return False
