"""One way to fail: a mistake that its user can mend is one line on stderr and exit code 2."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake that its user can mend: commands show it as one line and exit with 2."""


def expect(ok: object, message: str) -> None:
    """Raise a UserError unless something is as expected."""
    if not ok:
        raise UserError(message)


def run_command(main: Callable[[], None]) -> None:
    """Run a command; a user's mistake ends it with one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def note(text: str) -> None:
    """Tell the user something beside the results."""
    print(f"note: {text}", file=sys.stderr)
