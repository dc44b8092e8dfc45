"""Context managers around a run: lock of the workdir, full disks, stop signals.

They do not depend on stages; `pipeline/engine.py` enters them around the whole run.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from uva_jax.runtime.errors import UserError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_ROOM = _DISK_FULL | {errno.EFBIG}  # the last: a limit on the size of files
_held_locks: set[int] = set()


@contextmanager
def locked(workdir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Makes the workdir and locks its .lock file. The kernel releases the lock if the process dies.

    Raises:
      UserError: the workdir is not writable, or another run holds the lock.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / ".lock", "a+")
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise
        raise UserError(
            f"--workdir {workdir} cannot be used ({error.strerror}): give a writable folder"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{workdir} is in use by another run ({file.read().strip() or 'unknown'}): "
                "wait for it, stop it, or choose another --workdir"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            say(f"{workdir} is on a file system without locks: start only one run in it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}\n")
        file.flush()
        _held_locks.add(file.fileno())
        try:
            yield
        finally:
            _held_locks.discard(file.fileno())


def _drop_locks_in_child() -> None:
    # A forked worker that outlives a killed run must not hold the run's lock.
    for descriptor in _held_locks:
        os.close(descriptor)
    _held_locks.clear()


os.register_at_fork(after_in_child=_drop_locks_in_child)


@contextmanager
def full_disk_as_user_error(workdir: Path) -> Iterator[None]:
    """Turns "no space left on device" of any library into a UserError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        code = _no_room(error)
        if code is None:
            raise
        if code == errno.EFBIG:
            raise UserError(
                f"no file may grow as large as this run needs in {workdir} (`ulimit -f` is "
                f"{_largest_text()}): raise that limit and run the same command again to resume"
            ) from error
        raise UserError(
            f"the disk is full ({workdir} has {_free_text(workdir)} left): free some space and "
            "run the same command again to resume, or choose a --workdir on another disk"
        ) from error


def _no_room(error: BaseException | None) -> int | None:
    """The errno of what kept a file from growing; None for any other error."""
    # tensorstore and orbax raise ValueError or RuntimeError with the system's message.
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return error.errno
        if found := [code for code in _NO_ROOM if os.strerror(code) in str(error)]:
            return found[0]
        error = error.__cause__ or error.__context__
    return None


def _largest_text() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return "without limit" if limit == resource.RLIM_INFINITY else f"{limit} bytes"


def _free_text(workdir: Path) -> str:
    return f"{shutil.disk_usage(workdir).free / 2**20:.0f} MB" if workdir.exists() else "nothing"


_stops: list[int] = []  # the stop signal that this process has received, if any


@contextmanager
def stop_signals(say: Callable[[str], None]) -> Iterator[None]:
    """Turns SIGTERM and SIGINT into SystemExit and prints how to resume.

    A signal may arrive inside a finalizer or a callback of the garbage collector, where Python
    drops exceptions; `end_if_stopped` raises it again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # Signals that nohup or a background shell ignores stay ignored.
    signals = [n for n, handler in before.items() if handler not in (None, signal.SIG_IGN)]

    def stop(number: int, frame: Any) -> None:
        for each in signals:  # a second signal ends the process at once
            signal.signal(each, signal.SIG_DFL)
        _stops.append(number)
        raise SystemExit(128 + number)

    for number in signals:
        signal.signal(number, stop)
    try:
        yield
    except SystemExit:
        if _stops:
            name = signal.Signals(_stops[0]).name
            say(f"stopped by {name}: run the same command again to resume")
        raise
    finally:
        _stops.clear()
        for number in signals:
            signal.signal(number, before[number])


def end_if_stopped() -> None:
    """Raises SystemExit if a stop signal has arrived.

    It is called at every logged line, at every progress update and between stages.
    """
    if _stops and threading.current_thread() is threading.main_thread():
        raise SystemExit(128 + _stops[0])
