"""Objects that live in Python processes of their own, called by method name.

Nothing here imports jax or flax: a worker should start in a second and never touch an accelerator.
"""

import importlib
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from multiprocessing.connection import Connection
from pathlib import Path


def usable_cores() -> int:
    """The cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class WorkerError(RuntimeError):
    """A worker process ended although it still had work."""


class WorkerProcess:
    """An object that lives in a Python process of its own, called by method name.

    The process is a fresh interpreter that imports the object's module alone. Unlike
    multiprocessing's spawn it does not import the main script again, which would load jax (and
    run an unguarded script twice). A worker that dies, for whatever reason, closes its end of the
    socket, so that `receive` raises WorkerError with the worker's last words at once.
    """

    def __init__(self, target: str, *args):
        """Starts the process; `target` is "module:Class", `args` go to its constructor."""
        ours, theirs = socket.socketpair()
        paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
        }
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        code = f"from {__name__} import serve; serve({theirs.fileno()}, {target!r})"
        with warnings.catch_warnings():
            # jax warns of any fork; this one is followed by exec at once, so it cannot deadlock.
            warnings.filterwarnings("ignore", message=r"os\.fork\(\)", category=RuntimeWarning)
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=self._words,
                stderr=self._words,
            )
        theirs.close()
        self.connection = Connection(ours.detach())
        self.send("__init__", *args)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, method: str, *args) -> None:
        """Asks for a call; the answer is fetched with `receive`, in order."""
        try:
            self.connection.send((method, args))
        except OSError as error:
            raise self._obituary() from error

    def receive(self):
        """The answer to the oldest call that was not answered yet."""
        try:
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._obituary() from error

    def close(self) -> None:
        """Ends the process: it leaves when its connection closes, and is killed if it does not."""
        self.connection.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._words.close()

    def _obituary(self) -> WorkerError:
        status = self._process.wait()
        self._words.seek(0)
        words = self._words.read().decode(errors="replace").strip()[-2000:]
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return WorkerError(
            f"the worker process {self.pid} {how} in the middle of its work"
            + (f"; its last words:\n{words}" if words else " (out of memory?)")
        )


def serve(descriptor: int, target: str) -> None:
    """The worker's side of `WorkerProcess`: answers calls until the other side hangs up."""
    connection = Connection(descriptor)
    module, name = target.split(":")
    served = None
    while True:
        try:
            method, args = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        if method == "__init__":
            served = getattr(importlib.import_module(module), name)(*args)
            continue
        connection.send(getattr(served, method)(*args))
