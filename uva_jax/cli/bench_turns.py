"""Times work of several frameworks in processes that take turns, and prints it as a table.

Every row of a bench is a process of its own, because thread pools of two frameworks disturb each
other. It prepares its work, warms it up and then waits for its turns; one process works at a time,
and all have turns in every round, so that a slow minute of the machine meets all of them. Times are
medians over all calls.

Operations are those of matrix products and convolutions: counted in JAX's traced program
(`flops.py`) and by torch's own counter. Shares are of the fastest product of two large matrices
in any of the processes, measured after the turns.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from uva_jax.envs.workers import WorkerError, WorkerProcess, usable_cores
from uva_jax.runtime import memory
from uva_jax.runtime.errors import UserError

_ROUNDS = 5
_TURN = 0.3  # seconds of a turn for each part, at least one call
_ENOUGH = 20.0  # seconds of calls after which a row that has had two turns skips the others
TORCH, COMPILED, OURS = "torch", "torch.compile", "uva_jax"
ROUNDED = ", bfloat16 products"  # end of the name of a row with `matmul_precision="bfloat16"`


class Work(NamedTuple):
    """Some work to be timed.

    Attributes:
      run: does it to its end.
      flops: operations of doing it once.
      count: how often `run` does it.
      before: is called before every run and not timed.
    """

    run: Callable[[], object]
    flops: float
    count: int = 1
    before: Callable[[], object] = lambda: None


class Row(NamedTuple):
    """A row of a bench: its name, framework, and the arguments of the module's `build`."""

    name: str
    backend: str  # OURS, TORCH or COMPILED
    options: Mapping

    @property
    def label(self) -> str:
        """The framework and the name."""
        return f"{self.backend} {self.name}".strip()


class Runner:
    """The side of a row's process: called by `measure`."""

    def __init__(self, module: str, backend: str, options: Mapping):
        """Builds the work: `module` has `build(backend, **options)` -> {part: Work}."""
        self._backend, self._bfloat16 = backend, options["dtype"] == "bfloat16"
        if backend != OURS:
            _torch_tools().use_threads(usable_cores())
        self._parts = importlib.import_module(module).build(backend, **options)
        self._calls: dict[str, int] = {}

    def warm(self) -> dict[str, float]:
        """Does all work twice; returns the operations of each part."""
        for name, part in self._parts.items():
            _seconds(part)
            self._calls[name] = max(1, min(50, round(_TURN / _seconds(part))))
        return {name: part.flops for name, part in self._parts.items()}

    def turn(self) -> dict[str, list[float]]:
        """Times each part; returns the seconds of every call."""
        found = {}
        for name, part in self._parts.items():
            found[name] = [_seconds(part) / part.count for _ in range(self._calls[name])]
        return found

    def memory(self) -> int:
        """Returns the most bytes in use: of the accelerator's memory, or of the process."""
        if self._backend == OURS:
            import jax

            return memory.peak(jax.local_devices())
        return _torch_tools().memory() or memory.resident()

    def peak(self) -> float:
        """Returns the operations per second of a product of two large matrices."""
        find = _jax_product if self._backend == OURS else _torch_tools().product
        run, count = find(self._bfloat16)
        return count / fastest(run)


def _seconds(part: Work) -> float:
    part.before()
    start = time.perf_counter()
    part.run()
    return time.perf_counter() - start


def apart(module: str, what: str, *arguments: object, environment: Mapping | None = None):
    """Runs a module in a process of its own.

    Args:
      module: prints JSON as its last line.
      what: it does, for the error.
      arguments: of the command.
      environment: of the process; None: this one's.

    Returns:
      what the module printed.

    Raises:
      UserError: the process failed.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise UserError(f"bench: {what} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _torch_tools():
    from convert.torch import timing

    return timing


def _jax_product(bfloat16: bool) -> tuple[Callable[[], object], float]:
    import jax
    import jax.numpy as jnp

    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), jnp.bfloat16 if bfloat16 else jnp.float32)
    product = jax.jit(jnp.dot)
    return lambda: jax.block_until_ready(product(x, x)), 2.0 * size**3


def fastest(run: Callable[[], object], calls: int = 10) -> float:
    """Returns the seconds of the fastest of some calls after two others."""
    times = []
    for _ in range(calls + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[2:])


def measure(module: str, rows: Sequence[Row]) -> dict:
    """Times rows in turns.

    Args:
      module: has `build(backend, **options)`, which returns {part: Work}.
      rows: what to build; the options name at least the "dtype", float32 or bfloat16.

    Returns:
      {"peak": operations per second, "rows": [{"name", "backend", "memory", "parts": {part:
      {"seconds", "flops"}}}]}.

    Raises:
      UserError: a row's process ended before its work.
    """
    # As the training commands advise: huge pages. Accelerator memory is taken as it is needed,
    # because the processes share it.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with ExitStack() as stack:
        workers = []
        for row in rows:
            worker = WorkerProcess(f"{__name__}:Runner", module, row.backend, dict(row.options))
            stack.callback(worker.close)
            workers.append(worker)
            # One after the other, so that none compiles or makes weights while another is warmed.
            row_flops = _ask(worker, row, "warm")
            worker.flops = row_flops
        times = [{name: [] for name in worker.flops} for worker in workers]
        for number in range(_ROUNDS):
            for row, worker, mine in zip(rows, workers, times, strict=True):
                spent = sum(sum(calls) for calls in mine.values())
                if number < 2 or spent < _ENOUGH:
                    for name, calls in _ask(worker, row, "turn").items():
                        mine[name] += calls
        used = [_ask(w, row, "memory") for row, w in zip(rows, workers, strict=True)]
        peak = max(_ask(w, row, "peak") for row, w in zip(rows, workers, strict=True))
    found = []
    for row, worker, mine, most in zip(rows, workers, times, used, strict=True):
        parts = {
            name: {"seconds": float(np.median(calls)), "flops": worker.flops[name]}
            for name, calls in mine.items()
        }
        found.append({"name": row.name, "backend": row.backend, "memory": most, "parts": parts})
    return {"peak": peak, "rows": found}


def _ask(worker: WorkerProcess, row: Row, method: str):
    try:
        worker.send(method)
        return worker.receive()
    except WorkerError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"bench: the process of {row.label} failed: {reason}") from error


def torch_backends(compiled: bool) -> tuple[str, ...]:
    """Returns PyTorch, and `torch.compile` if that is measured too."""
    return (TORCH, COMPILED) if compiled else (TORCH,)


def row_of(result: Mapping, backend: str, name: str) -> Mapping:
    """Returns a row of `measure`'s result."""
    (found,) = (r for r in result["rows"] if (r["backend"], r["name"]) == (backend, name))
    return found


def seconds(row: Mapping, part: str) -> float:
    """Returns the seconds of a part of a row of `measure`'s result."""
    return row["parts"][part]["seconds"]


def lines(result: Mapping, reference: Mapping[str, float]) -> list[str]:
    """Formats the result of `measure`.

    Args:
      result: of `measure`.
      reference: seconds by part; the last column says how many times as fast a part is.
    """
    found = [
        f"peak: {result['peak'] / 1e9:,.0f} GFLOP/s, the fastest product of two large matrices",
        f"{'':<64}{'ms':>10}{'GFLOP':>10}{'of peak':>9}{'MB':>8}{'speed':>8}",
    ]
    for row in result["rows"]:
        for number, (name, part) in enumerate(row["parts"].items()):
            label = Row(row["name"], row["backend"], {}).label
            share = part["flops"] / part["seconds"] / result["peak"]
            most = f"{row['memory'] / 1e6:,.0f}" if number == 0 else ""
            ratio = f"x{reference[name] / part['seconds']:.2f}" if name in reference else ""
            found.append(
                f"{label + ', ' + name:<64}{1e3 * part['seconds']:>10,.2f}"
                f"{part['flops'] / 1e9:>10,.2f}{share:>9.1%}{most:>8}{ratio:>8}"
            )
    return found
