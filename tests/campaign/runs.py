"""The pipeline's commands as processes that can be watched and killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("config.py")
TRAINING = ("vae", "encode", "pretrain")
GRAFTING = ("convert", "capture", "distill", "assemble", "finetune", "evaluate", "export")
STAGES = TRAINING + GRAFTING
START_UP = "start-up"  # the time before a command's first stage
_BEGINS = re.compile(r"(\w+): (starting|resuming)")
_PATIENCE = 600  # limit of a command's time in seconds


@dataclass(frozen=True)
class Place:
    """The folders and stages of a campaign.

    Attributes:
      root: folder of runs and compiled programs.
      data: folder of rendered frames.
      stages: the stages to run, in order.
      teacher: the checkpoint to graft; None: the one that the stages train.
    """

    root: Path
    data: Path
    stages: tuple[str, ...] = STAGES
    teacher: Path | None = None

    def environment(self) -> dict[str, str]:
        return os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.root / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # most of the time is compilation
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "PYTHONPATH": str(REPO),
            "PYTHONUNBUFFERED": "1",
        }

    def command(self, workdir: Path, *stages: str) -> list[str]:
        """Returns the command for stages that all train or all graft."""
        teacher = self.teacher or workdir / "pretrain" / "policy.ckpt"
        found = [sys.executable, "-m", "uva_jax.main", "--config", CONFIG, "--workdir", workdir]
        found += [f"--config.data.cache={self.data}", "--stage", ",".join(stages)]
        # Training comes before there is a teacher.
        found += [] if stages[0] in TRAINING else [f"--config.teacher.checkpoint={teacher}"]
        return [*map(str, found)]

    def commands(self, workdir: Path) -> list[list[str]]:
        """Returns the two commands that train a policy and graft it."""
        parts = ([s for s in self.stages if (s in TRAINING) == trains] for trains in (True, False))
        return [self.command(workdir, *part) for part in parts if part]


class Command:
    """A command in a separate process group, whose output is read line by line.

    Attributes:
      stage: the current stage, by its output; "start-up" before the first.
      lines: of its stdout and stderr.
    """

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        before: Callable[[], None] | None = None,
    ):
        """Starts the command; `before` is called in the new process before it."""
        self.begun = time.monotonic()
        self.stage, self.stage_begun, self.lines = START_UP, self.begun, []
        self._process = subprocess.Popen(
            command,
            cwd=REPO,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=before,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))
            if found := _BEGINS.match(line):
                self.stage_begun, self.stage = time.monotonic(), found[1]

    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self, seconds: float = _PATIENCE) -> int | None:
        """Returns the exit status, or None if the command still runs after `seconds`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
            self._reader.join(10)  # a worker that outlives the run may hold the pipe
            return self._process.returncode
        return None

    def kill(self) -> None:
        """Sends SIGKILL to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(10)

    def tail(self, count: int = 15) -> str:
        return "\n".join(f"    | {line[:300]}" for line in self.lines[-count:])


class Failed(Exception):
    """A failure that a campaign looks for."""
