"""Guards around a run: one run a workdir, full disks told in a sentence, stops that leave cleanly.

They know nothing of stages; `pipeline/engine.py` puts them around everything it does.
"""

from __future__ import annotations

import errno
import fcntl
import os
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
_held_locks: set[int] = set()


@contextmanager
def locked(workdir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Makes the workdir and holds its .lock. The kernel lets go of it when the holder dies.

    Raises:
      UserError: the workdir cannot be written in, or another run holds it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / ".lock", "a+")
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise
        raise UserError(
            f"--workdir {workdir} cannot be used ({error.strerror}): "
            "give a folder that can be written in"
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
            say(f"{workdir} is on a file system without locks: let only one run use it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}\n")
        file.flush()
        _held_locks.add(file.fileno())
        try:
            yield
        finally:
            _held_locks.discard(file.fileno())


def _drop_locks_in_child() -> None:
    # a forked worker that outlives a killed run must not hold the run's lock
    for descriptor in _held_locks:
        os.close(descriptor)
    _held_locks.clear()


os.register_at_fork(after_in_child=_drop_locks_in_child)


@contextmanager
def full_disk_is_told(workdir: Path) -> Iterator[None]:
    """Turns "no space left", from whichever library it comes, into a UserError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if not _means_full_disk(error):
            raise
        raise UserError(
            f"the disk is full ({workdir} has {_free_text(workdir)} left): free some space and "
            "give the same command again, it resumes; or choose a --workdir on another disk"
        ) from error


def _means_full_disk(error: BaseException | None) -> bool:
    # tensorstore and orbax report it as ValueError or RuntimeError with the system's words
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        if any(os.strerror(code) in str(error) for code in _DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _free_text(workdir: Path) -> str:
    return f"{shutil.disk_usage(workdir).free / 2**20:.0f} MB" if workdir.exists() else "nothing"


_stops: list[int] = []  # the signal that has asked this process to stop, if any


@contextmanager
def stops_are_told(say: Callable[[str], None]) -> Iterator[None]:
    """Turns SIGTERM and SIGINT into SystemExit, with a line that says how to go on.

    A signal may arrive inside a finalizer or a callback of the garbage collector, where Python
    drops exceptions; `end_if_stopped` raises it again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # what nohup or a shell's background job ignores stays ignored
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
            say(f"stopped by {name}: the same command goes on where this one ended")
        raise
    finally:
        _stops.clear()
        for number in signals:
            signal.signal(number, before[number])


def end_if_stopped() -> None:
    """Raises SystemExit if a signal has asked for it before. Called wherever work can be ended:
    at every line that is logged, every step of a progress bar, and between stages."""
    if _stops and threading.current_thread() is threading.main_thread():
        raise SystemExit(128 + _stops[0])
