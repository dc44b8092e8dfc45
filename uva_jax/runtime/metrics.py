"""The writer of a stage's metrics and messages: console, metrics.jsonl, TensorBoard and wandb.

Every line of metrics.jsonl is written by a single system call, so that a killed run leaves at most
one incomplete line, which readers skip.
"""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from uva_jax.runtime.errors import UserError
from uva_jax.runtime.guards import end_if_stopped
from uva_jax.runtime.tfevents import EventFile

METRICS_FILE = "metrics.jsonl"
_RESERVED = {"time", "stage", "step", "event"}
# Without a terminal, progress is printed as lines:
_LINE_SECONDS = 10.0  # seconds after which a line is due,
_LINE_SHARE = 0.1  # or the share of the work after which one is due,
_LINE_PAUSE = 1.0  # and the least number of seconds between two lines


class Progress(Protocol):
    """What `MetricsWriter.progress` yields: `update` adds `n` units and shows scalars."""

    def update(self, n: int = 1, **scalars: Any) -> None: ...


class MetricsWriter:
    """Writes the metrics of one stage. A context manager that closes its files.

    Args:
      workdir: holds metrics.jsonl and tensorboard/<stage>/.
      stage: name stored with every line and event.
      config: the run's configuration; only `config.wandb` is read (no project: no wandb).
      fresh: the stage starts over: `read_metrics` and TensorBoard no longer show what its earlier
        run logged. Otherwise new lines add to the old ones.
      enabled: False on the processes of a multi-host run that write nothing.
      stream: where progress and `say` print; standard output by default.

    Raises:
      UserError: `config.wandb.project` is set and wandb is not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        stage: str,
        *,
        config: Mapping | None = None,
        fresh: bool = False,
        enabled: bool = True,
        stream: TextIO | None = None,
    ):
        self.stage = stage
        self._workdir = Path(workdir)
        self._events_dir = self._workdir / "tensorboard" / stage
        self._enabled = enabled
        self._stream = stream
        self._latest: dict[str, float] = {}
        self._bar: tqdm | None = None
        self._events: EventFile | None = None
        self._wandb_run = None
        self._config = config
        self._wandb = _import_wandb(config) if enabled else None
        self._file = None
        if enabled:
            self._file = open_for_lines(self._workdir / METRICS_FILE)
            if fresh:
                shutil.rmtree(self._events_dir, ignore_errors=True)
                self._write_line({"time": time.time(), "stage": stage, "event": "start"})

    def log(self, step: int, **scalars: Any) -> None:
        """Records scalars (anything `float()` takes) at a step; a step may be logged repeatedly.

        A value that is not finite is stored as null in metrics.jsonl.

        Raises:
          ValueError: a scalar has the name of a field of metrics.jsonl.
        """
        taken = _RESERVED & scalars.keys()
        if taken:
            raise ValueError(f"a scalar cannot be called {sorted(taken)}: metrics.jsonl uses it")
        end_if_stopped()
        values = {name: float(value) for name, value in scalars.items()}
        self._latest.update(values)
        if not self._enabled:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._write_line({"time": time.time(), "stage": self.stage, "step": int(step), **finite})
        if self._events is None:
            self._events = EventFile(self._events_dir, first_step=int(step))
        self._events.scalars(int(step), values)
        if self._wandb is not None:
            self._log_to_wandb(int(step), values)

    def say(self, text: str) -> None:
        """Prints one line, above the progress bar if there is one."""
        end_if_stopped()
        if not self._enabled:
            return
        line = f"{self.stage}: {text}"
        if self._bar is not None:
            self._bar.write(line, file=self._out)
        else:
            print(line, file=self._out, flush=True)

    @contextmanager
    def progress(
        self, total: int, unit: str = "it", desc: str = "", initial: int = 0
    ) -> Iterator[Progress]:
        """Shows the progress of a loop, with rate, time left and the latest scalars.

        A terminal shows a bar; otherwise a line is printed about every 10 seconds or 10 %.

        Args:
          total: units of work, of which an earlier run did `initial`.
          unit: what is counted, in the plural ("windows", "steps").
          desc: shown after the stage's name.
        """
        title = f"{self.stage}: {desc}" if desc else self.stage
        if not self._enabled:
            yield _Silent()
        elif self._out.isatty():
            with tqdm(
                total=total, initial=initial, unit=f" {unit}", desc=title, file=self._out,
                dynamic_ncols=True, mininterval=0.5,
            ) as bar:  # fmt: skip
                self._bar = bar
                try:
                    yield _Bar(bar, self._latest)
                finally:
                    self._bar = None
        else:
            yield _Lines(self._out, title, unit, total, initial, self._latest)

    @contextmanager
    def late_progress(self, unit: str, desc: str) -> Iterator[Callable[[int, int], None]]:
        """Yields f(units done, total units), whose first call opens the `progress`.

        Nothing is shown for work that was complete beforehand.
        """
        with ExitStack() as opened:
            bar, before = None, 0

            def show(done: int, total: int) -> None:
                nonlocal bar, before
                if bar is None:
                    bar = opened.enter_context(self.progress(total, unit=unit, desc=desc))
                bar.update(done - before)
                before = done

            yield show

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._wandb_run is not None:
            self._wandb_run.finish()
            self._wandb_run = None
        self._enabled = False

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _out(self) -> TextIO:
        return self._stream or sys.stdout

    def _write_line(self, record: Mapping[str, Any]) -> None:
        write_line(self._file, record)

    def _log_to_wandb(self, step: int, values: Mapping[str, float]) -> None:
        if self._wandb_run is None:
            self._wandb_run = self._wandb.init(
                project=self._config.wandb.project,
                group=self._config.wandb.get("name") or self._workdir.resolve().name,
                name=self.stage,
                dir=str(self._workdir),
                config=self._config.to_dict(),
            )
        self._wandb_run.log(dict(values), step=step)


def read_metrics(workdir: str | os.PathLike, stage: str | None = None) -> list[dict[str, Any]]:
    """Reads metrics.jsonl: one record per stage and step, ordered by step within each stage.

    Lines of the same step are merged; the later value of a key wins. Incomplete lines, and lines
    from before a stage last started over, are skipped. Without a file the list is empty.

    Args:
      workdir: the run's folder.
      stage: only this stage; all stages by default.
    """
    stages: dict[str, dict[int, dict[str, Any]]] = {}
    for record in read_lines(Path(workdir) / METRICS_FILE):
        if "stage" not in record:
            continue
        steps = stages.setdefault(record["stage"], {})
        if record.get("event") == "start":
            steps.clear()
        elif "step" in record:
            steps.setdefault(record["step"], {}).update(record)
    chosen = stages if stage is None else {stage: stages.get(stage, {})}
    return [steps[step] for steps in chosen.values() for step in sorted(steps)]


class _Silent:
    def update(self, n: int = 1, **scalars: Any) -> None:
        end_if_stopped()


class _Bar:
    def __init__(self, bar: tqdm, latest: dict[str, float]):
        self._bar, self._latest = bar, latest

    def update(self, n: int = 1, **scalars: Any) -> None:
        end_if_stopped()
        self._latest.update({k: float(v) for k, v in scalars.items()})
        self._bar.set_postfix_str(_scalars_text(self._latest), refresh=False)
        self._bar.update(n)


class _Lines:
    """Progress as whole lines, for logs."""

    def __init__(
        self, out: TextIO, title: str, unit: str, total: int, initial: int, latest: dict[str, float]
    ):
        self._out, self._title, self._unit, self._latest = out, title, unit, latest
        self._total, self._initial, self._count = total, initial, initial
        self._started = self._line_time = time.monotonic()
        self._line_count = initial

    def update(self, n: int = 1, **scalars: Any) -> None:
        end_if_stopped()
        self._latest.update({k: float(v) for k, v in scalars.items()})
        self._count += n
        now = time.monotonic()
        waited = now - self._line_time
        moved = self._count - self._line_count >= _LINE_SHARE * self._total
        finished = self._count >= self._total
        if not (finished or waited >= _LINE_SECONDS or (moved and waited >= _LINE_PAUSE)):
            return
        self._line_time, self._line_count = now, self._count
        rate = (self._count - self._initial) / max(now - self._started, 1e-9)
        parts = [
            f"{self._title}: {self._count}/{self._total} {self._unit} "
            f"({100 * self._count / max(self._total, 1):.0f} %)",
        ]
        if rate:
            parts.append(
                f"{rate:.3g} {self._unit}/s" if rate < 1000 else f"{rate:.0f} {self._unit}/s"
            )
        if finished:
            parts.append(f"took {_duration(now - self._started)}")
        elif rate:  # before the first unit is done, nothing is known of the time left
            parts.append(f"{_duration((self._total - self._count) / rate)} left")
        if self._latest:
            parts.append(_scalars_text(self._latest))
        print(", ".join(parts), file=self._out, flush=True)


def _import_wandb(config: Mapping | None) -> Any:
    project = ((config or {}).get("wandb") or {}).get("project")
    if not project:
        return None
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"config.wandb.project is {project!r}, but the package wandb is not installed: "
            "run `pip install wandb`, or leave config.wandb.project empty"
        ) from error


def open_for_lines(path: Path) -> Any:
    """Opens a file for appending whole lines, unbuffered; first ends an incomplete last line."""
    file = open(path, "ab+", buffering=0)
    if file.seek(0, os.SEEK_END) > 0:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def write_line(file: Any, record: Mapping[str, Any]) -> None:
    """Writes a record as one line to a file of `open_for_lines`, by a single system call."""
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    if file.write(line) != len(line):  # unbuffered: a short write means a full disk
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a file of lines; incomplete lines of a killed run are skipped."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def _scalars_text(scalars: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:.4g}" for name, value in scalars.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
