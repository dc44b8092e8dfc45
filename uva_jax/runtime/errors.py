"""The exception that means "the input is wrong, and here is the way out", and how it is told."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input that a user can mend.

    Command lines print the message as one sentence, without a traceback, and exit with status 2.
    """


def exit_status(command: Callable[[], int | None]) -> int:
    """Runs a command: its exit status, or 2 after one sentence on stderr about bad input."""
    try:
        return command() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
