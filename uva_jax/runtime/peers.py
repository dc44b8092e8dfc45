"""The other processes of a run: each tells the rest that it is at work, and why it ends.

A process in a barrier or a collective waits for hours for one that is gone. So every process keeps
a note of its own where JAX's processes meet, renews it while it works, and looks at the others'.
Where one has failed, or has been silent for long, the rest end with a sentence that names it.
"""

from __future__ import annotations

import os
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

_EVERY = 2.0  # seconds between two looks
_SILENCE = 30.0  # seconds after which a process that renews nothing counts as gone
_HEARING = 10.0  # seconds that a process which fails waits for the others to read why
_NOTES = "uva_jax/peers"
_AGAIN = "start all processes again with the same command to resume"

# JAX ends a process at once, by a signal, when process 0 is gone, so that another has to say it.
_TELLER = """
import socket, sys
sentence, host, port = sys.argv[1:]
if not sys.stdin.read():
    try:
        socket.create_connection((host, int(port)), 2).close()
    except OSError:
        sys.exit(sentence)
"""


@contextmanager
def watched(coordinator: str = "") -> Iterator[None]:
    """While the block runs, ends this process with a sentence once another one has failed.

    What the block raises ends this process here, once the others know of it: as `exit_status`
    does, but without JAX's farewell, which would wait for them. A single process is left alone.

    Args:
      coordinator: "host:port" of process 0, if that was given.
    """
    if jax.process_count() == 1:
        yield
        return
    peers = _Peers(coordinator)
    try:
        yield
    except UserError as error:
        peers.end(str(error), f"error: {error}", 2)
    except SystemExit as error:
        peers.end("it was stopped", "", error.code if isinstance(error.code, int) else 1)
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            peers.wait_for_a_cause()  # what lost its other side fails like this
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        peers.end(what, traceback.format_exc().rstrip(), 1)
    peers.leave_well()


class _Peers:
    def __init__(self, coordinator: str):
        self._client = multihost.get_jax_distributed_client()
        self._own, self._count = jax.process_index(), jax.process_count()
        self._stopped = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}  # process -> its note, when it was new
        self._teller = self._start_teller(coordinator)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def leave_well(self) -> None:
        self._stop_watching()
        self._note("ended", "well")
        self._dismiss_teller()

    def wait_for_a_cause(self) -> None:
        """Gives the watch the time to find out that another process is gone, and to end this."""
        time.sleep(_SILENCE + 3 * _EVERY)

    def end(self, what: str, printed: str, status: int) -> NoReturn:
        """Prints, lets the others know what happened, and ends this process."""
        self._stop_watching()
        if printed:
            print(printed, file=sys.stderr, flush=True)
        with suppress(jax.errors.JaxRuntimeError):  # the meeting place may be gone
            self._note("failed", what)
            others = {str(i) for i in range(self._count)} - {str(self._own)}
            until = time.monotonic() + _HEARING
            while others - self._notes("heard").keys() and time.monotonic() < until:
                time.sleep(0.1)
        self._exit(status)

    def _stop_watching(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        beat = 0
        while not self._stopped.wait(_EVERY):
            beat += 1
            try:
                self._note("alive", str(beat))
                if sentence := self._what_happened():
                    self._note("heard", "")
            except jax.errors.JaxRuntimeError:
                sentence = _lost(0)
            if sentence:
                print(f"error: {sentence}", file=sys.stderr, flush=True)
                if self._own == 0:
                    time.sleep(2 * _EVERY)  # the others read the notes here
                self._exit(2)

    def _what_happened(self) -> str | None:
        for process, what in self._notes("failed").items():
            if process != str(self._own):
                return f"process {process} has ended ({what}), so this one ends too: {_AGAIN}"
        alive, ended, now = self._notes("alive"), self._notes("ended"), time.monotonic()
        for process in set(range(self._count)) - {self._own, *map(int, ended)}:
            note = alive.get(str(process), "")
            if self._seen.setdefault(process, (note, now))[0] != note:
                self._seen[process] = (note, now)
            if now - self._seen[process][1] > _SILENCE:
                return _lost(process)
        return None

    def _note(self, kind: str, value: str) -> None:
        self._client.key_value_set(f"{_NOTES}/{kind}/{self._own}", value, allow_overwrite=True)

    def _notes(self, kind: str) -> dict[str, str]:
        found = self._client.key_value_dir_get(f"{_NOTES}/{kind}/")
        return {key.rsplit("/", 1)[1]: value for key, value in found}

    def _start_teller(self, coordinator: str) -> subprocess.Popen | None:
        host, _, port = coordinator.rpartition(":")
        if self._own == 0 or not host:
            return None
        sentence = f"error: {_lost(0)}"
        return subprocess.Popen(
            [sys.executable, "-S", "-c", _TELLER, sentence, host.strip("[]"), port],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is not for it
        )

    def _dismiss_teller(self) -> None:
        if self._teller is not None:
            with suppress(OSError):
                self._teller.communicate(b"all is said")

    def _exit(self, status: int) -> NoReturn:
        self._dismiss_teller()
        sys.stdout.flush()
        os._exit(status)


def _lost(process: int) -> str:
    return (
        f"process {process} is gone (killed, or its machine is lost; its own output may say more), "
        f"so this one ends too: {_AGAIN}"
    )
