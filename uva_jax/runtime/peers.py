"""Failure detection between the processes of a distributed run.

A process that waits in a barrier or a collective does not notice that another one is gone. Each
process therefore writes a heartbeat to the key-value store of JAX's coordination service and reads
those of the others. If one fails, or its heartbeat stops, the others print which one and exit.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import jax
from orbax.checkpoint import multihost

from uva_jax.runtime.errors import UserError

_INTERVAL = 2.0  # seconds between two heartbeats
_SILENCE = 30.0  # seconds without a heartbeat after which a process counts as gone
_ACKNOWLEDGE = 10.0  # seconds that a failing process waits for the others to read its message
_STORE = "uva_jax/peers"  # prefix of the keys
# How the messages of XLA's errors begin, which JAX raises as RuntimeError or ValueError.
_XLA_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")
_RESTART = "run the same command again in all processes to resume"

# Without process 0, which hosts the coordination service, JAX aborts the other processes at once.
# This program outlives its process and prints the message that the process no longer can.
_REPORTER = """
import socket, sys
message, host, port = sys.argv[1:]
if not sys.stdin.read():
    try:
        socket.create_connection((host, int(port)), 2).close()
    except OSError:
        sys.exit(message)
"""


@contextmanager
def exit_together(coordinator: str = "") -> Iterator[None]:
    """While the block runs, exits with a message if another process of the run fails or is gone.

    An exception in the block is printed as `exit_status` prints it, reported to the other
    processes, and ends this one here: JAX's own shutdown would wait for the others. With a single
    process this does nothing.

    Args:
      coordinator: "host:port" of process 0, where known.
    """
    if jax.process_count() == 1:
        yield
        return
    peers = _Peers(coordinator)
    try:
        yield
    except UserError as error:
        peers.fail(str(error), f"error: {error}", 2)
    except SystemExit as error:
        peers.fail("it was stopped", "", error.code if isinstance(error.code, int) else 1)
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError) or _XLA_STATUS.match(str(error)):
            # Collectives and barriers fail so if another process is gone. Then the thread that
            # watches heartbeats ends this process meanwhile.
            time.sleep(_SILENCE + 3 * _INTERVAL)
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        peers.fail(what, traceback.format_exc().rstrip(), 1)
    peers.finish()


class _Peers:
    """The heartbeat thread of this process, and the values it shares with the others."""

    def __init__(self, coordinator: str):
        self._client = multihost.get_jax_distributed_client()
        self._own, self._count = jax.process_index(), jax.process_count()
        self._stopped = threading.Event()
        self._last: dict[int, tuple[str, float]] = {}  # process -> its heartbeat, when it changed
        self._reporter = self._start_reporter(coordinator)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Ends the watch after a block that ended well."""
        self._stop_watching()
        self._set("finished", "")
        self._dismiss_reporter()

    def fail(self, what: str, printed: str, status: int) -> NoReturn:
        """Prints, reports the failure to the others, and exits."""
        self._stop_watching()
        if printed:
            print(printed, file=sys.stderr, flush=True)
        with suppress(jax.errors.JaxRuntimeError):  # process 0 may be gone, and the store with it
            self._set("failed", what)
            others = {str(i) for i in range(self._count)} - {str(self._own)}
            until = time.monotonic() + _ACKNOWLEDGE
            while others - self._get("acknowledged").keys() and time.monotonic() < until:
                time.sleep(0.1)
        self._exit(status)

    def _stop_watching(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        beat = 0
        while not self._stopped.wait(_INTERVAL):
            beat += 1
            try:
                self._set("alive", str(beat))
                if message := self._find_failure():
                    self._set("acknowledged", "")
            except jax.errors.JaxRuntimeError:
                message = _gone(0)
            if message:
                print(f"error: {message}", file=sys.stderr, flush=True)
                if self._own == 0:
                    time.sleep(2 * _INTERVAL)  # until the others have read the store
                self._exit(2)

    def _find_failure(self) -> str | None:
        """A message about a process that has failed or is gone, if there is one."""
        for process, what in self._get("failed").items():
            if process != str(self._own):
                return f"process {process} has failed ({what}); {_RESTART}"
        alive, finished, now = self._get("alive"), self._get("finished"), time.monotonic()
        for process in set(range(self._count)) - {self._own, *map(int, finished)}:
            beat = alive.get(str(process), "")
            if self._last.setdefault(process, (beat, now))[0] != beat:
                self._last[process] = (beat, now)
            if now - self._last[process][1] > _SILENCE:
                return _gone(process)
        return None

    def _set(self, kind: str, value: str) -> None:
        self._client.key_value_set(f"{_STORE}/{kind}/{self._own}", value, allow_overwrite=True)

    def _get(self, kind: str) -> dict[str, str]:
        """Values by process."""
        found = self._client.key_value_dir_get(f"{_STORE}/{kind}/")
        return {key.rsplit("/", 1)[1]: value for key, value in found}

    def _start_reporter(self, coordinator: str) -> subprocess.Popen | None:
        host, _, port = coordinator.rpartition(":")
        if self._own == 0 or not host:
            return None
        message = f"error: {_gone(0)}"
        return subprocess.Popen(
            [sys.executable, "-S", "-c", _REPORTER, message, host.strip("[]"), port],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C does not end it
        )

    def _dismiss_reporter(self) -> None:
        if self._reporter is not None:
            with suppress(OSError):
                self._reporter.communicate(b"nothing to report")

    def _exit(self, status: int) -> NoReturn:
        self._dismiss_reporter()
        sys.stdout.flush()
        os._exit(status)


def _gone(process: int) -> str:
    return (
        f"process {process} is gone (killed, or its host is down; its own output may tell more); "
        f"{_RESTART}"
    )
