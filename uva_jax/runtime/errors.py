"""`UserError`, the exception for bad input, and the exit status of commands."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable
from typing import TextIO


class UserError(ValueError):
    """Bad input that a user can correct.

    The message is one sentence that names the input and what to do. Command lines print it without
    a traceback and exit with status 2.
    """


def exit_status(command: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit status; a UserError is printed and gives 2.

    If the reader of standard output has closed the pipe (`... | head`), the command ends silently
    with the status of a program ended by SIGPIPE.
    """
    try:
        return _run(command)
    except BrokenPipeError:
        if not _reader_is_gone(sys.stdout):
            raise  # another pipe, for example to a worker
        # Python flushes the buffer as it exits and would print a second BrokenPipeError.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(command: Callable[[], int | None]) -> int:
    try:
        status = command() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except SystemExit:  # for example --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return status


def _reader_is_gone(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream.fileno(), 0)  # poll always reports errors and hang-ups
    return bool(poll.poll(0))
