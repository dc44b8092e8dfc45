"""The exception that means "the input is wrong, and here is the way out", and how it is told."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable
from typing import TextIO


class UserError(ValueError):
    """Bad input that a user can mend.

    Command lines print the message as one sentence, without a traceback, and exit with status 2.
    """


def exit_status(command: Callable[[], int | None]) -> int:
    """Runs a command: its exit status, or 2 after one sentence on stderr about bad input.

    A command whose reader has closed the pipe (`... | head`) ends at once and in silence, with the
    status that a shell gives to a program that SIGPIPE has ended.
    """
    try:
        return _told(command)
    except BrokenPipeError:
        if not _reader_is_gone(sys.stdout):
            raise  # another pipe: a worker's, say
        # What is still in the buffer would be written, in vain and aloud, as Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _told(command: Callable[[], int | None]) -> int:
    try:
        status = command() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except SystemExit:  # --help, for one
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return status


def _reader_is_gone(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream.fileno(), 0)  # errors and hang-ups are always told
    return bool(poll.poll(0))
