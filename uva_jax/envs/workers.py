"""Objects in separate Python processes whose methods are called over a socket.

The module does not import jax, so that a worker starts within a second and uses no accelerator.
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

from uva_jax.runtime.errors import UserError


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class WorkerError(RuntimeError):
    """A worker process ended before it answered a call."""


class WorkerProcess:
    """An object in a separate Python process.

    The process is a new interpreter that imports only the object's module. Unlike
    multiprocessing's spawn it does not import the main script again, which would load jax and run
    an unguarded script twice. When a worker dies, its end of the socket closes, and `receive`
    raises WorkerError with the worker's last output at once.
    """

    def __init__(self, target: str, *args):
        """Starts the process; `target` is "module:Class", `args` go to its constructor."""
        ours, theirs = socket.socketpair()
        # The parent's path, for simulators that users bring.
        paths = [str(Path(__file__).resolve().parents[2]), *sys.path]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
        }
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        code = f"from {__name__} import serve; serve({theirs.fileno()}, {target!r})"
        with warnings.catch_warnings():
            # jax warns of any fork; exec follows this one at once, so it cannot deadlock.
            warnings.filterwarnings("ignore", message=r"os\.fork\(\)", category=RuntimeWarning)
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
            )
        theirs.close()
        self.connection = Connection(ours.detach())
        self.send("__init__", *args)

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def send(self, method: str, *args) -> None:
        """Starts a call; `receive` returns the results in order.

        Raises:
          WorkerError: the process has ended.
        """
        try:
            self.connection.send((method, args))
        except OSError as error:
            raise self._death() from error

    def receive(self):
        """Returns the result of the oldest call that has not been received.

        Raises:
          WorkerError: the process has ended.
          UserError: the call, or the object's constructor, raised it.
        """
        try:
            result = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(result, UserError):
            raise result
        return result

    def close(self) -> None:
        """Ends the process by closing its connection, and kills it if that takes 5 s."""
        self.connection.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def _death(self) -> WorkerError:
        status = self._process.wait()
        self._output.seek(0)
        output = self._output.read().decode(errors="replace").strip()[-2000:]
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return WorkerError(
            f"the worker process {self.pid} {how} before it finished its work"
            + (f"; its last output:\n{output}" if output else " (out of memory?)")
        )


def serve(descriptor: int, target: str) -> None:
    """Runs the worker's side of `WorkerProcess`: answers calls until the connection closes."""
    connection = Connection(descriptor)
    module, name = target.split(":")
    served = refused = None
    while True:
        try:
            method, args = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            if method == "__init__":
                served = getattr(importlib.import_module(module), name)(*args)
                continue
            result = refused or getattr(served, method)(*args)
        except UserError as error:
            result = error
            if method == "__init__":  # which has no answer: the calls that follow get it
                refused = error
                continue
        connection.send(result)
