"""Full disks: a small tmpfs if one can be mounted, otherwise a limit on the size of files."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.campaign import results
from tests.campaign.kills import Reference
from tests.campaign.runs import STAGES, Command, Place

_SIZE = 512 << 20  # bytes of the tmpfs, which uses memory only for written data
_IN_A_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


class Tmpfs:
    """A small file system, mounted at `folder`."""

    kind = "tmpfs"
    told = "the disk is full"
    before: Callable[[], None] | None = None

    def __init__(self, folder: Path):
        self.folder = folder

    def leave(self, share: float, reference: Path, stage: str) -> None:
        """Fills the disk, except for a share of what the stage wrote in the reference run."""
        left, space = int(share * results.size(reference, stage)), os.statvfs(self.folder)
        with open(self.folder / "filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, space.f_bavail * space.f_bsize - left))

    def free(self) -> None:
        """Frees the disk."""
        (self.folder / "filler").unlink()


class Limit:
    """A limit on the size of files, which needs no privileges (RLIMIT_FSIZE, `ulimit -f`)."""

    kind = "RLIMIT_FSIZE"
    told = "no file may grow"
    before: Callable[[], None] | None = None

    def __init__(self, folder: Path):
        self.folder = folder

    def leave(self, share: float, reference: Path, stage: str) -> None:
        size = int(share * results.largest_file(reference, stage))
        self.before = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def free(self) -> None:
        self.before = None


@contextmanager
def small_disk(folder: Path, *, mount: bool = True) -> Iterator[Tmpfs | Limit]:
    """Yields a disk at `folder`, which is removed at the end."""
    folder.mkdir(parents=True)
    mounted = mount and _works(["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "none", str(folder)])
    try:
        yield Tmpfs(folder) if mounted else Limit(folder)
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
        shutil.rmtree(folder)


def enter_a_namespace() -> None:
    """Restarts this program in a namespace that permits mounting, if that is possible."""
    if os.geteuid() != 0 and _works([*_IN_A_NAMESPACE, "mount", "-t", "tmpfs", "none", "/tmp"]):
        module = [sys.executable, "-m", "tests.kill_campaign", *sys.argv[1:]]
        os.execvp(_IN_A_NAMESPACE[0], [*_IN_A_NAMESPACE, *module])


def _works(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@dataclass
class Fills:
    """The results of runs with full disks, by stage.

    Attributes:
      kind: type of the disk.
      filled: number of runs with too little space.
      told: of these, those that ended with one sentence, status 2 and nothing half-written.
      equal: stages that the same command then completed with the reference's bits.
    """

    kind: str = ""
    filled: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    told: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    equal: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    problems: list[str] = field(default_factory=list)


def fill_in_every_stage(
    place: Place,
    disk: Tmpfs | Limit,
    reference: Reference,
    rng: random.Random,
    *,
    times: int,
) -> Fills:
    """Runs the stages one by one; the disk of each is full a number of times and then freed."""
    fills, workdir = Fills(disk.kind), disk.folder / "run"
    for stage in place.stages:
        command = place.command(workdir, stage)
        for number in range(times):
            # The first time within the stage's work, the second time before it.
            disk.leave(0.0 if number % 2 else 0.6 * rng.random(), reference.workdir, stage)
            running = Command(command, place.environment(), before=disk.before)
            status = running.wait()
            running.kill()
            disk.free()
            fills.filled[stage] += 1
            bad = _not_as_it_should(running, status, disk.told)
            bad += results.half_written(workdir, stage, reference.digests[stage])
            if (workdir / results.FOLDERS[stage] / "done.json").exists():
                bad.append("the stage counts as done")
            fills.told[stage] += not bad
            if bad:
                problem = f"full disk in {stage}: {', '.join(bad)}:\n{running.tail()}"
                fills.problems.append(problem)
        running = Command(command, place.environment())
        if (status := running.wait()) != 0:
            running.kill()
            fills.problems.append(f"{stage} with room again ended with {status}:\n{running.tail()}")
            return fills
        found = results.digests(workdir, stage)
        if bad := results.differing(found, reference.digests[stage]):
            fills.problems.append(f"{stage} after a full disk differs: {', '.join(bad)}")
        fills.equal[stage] += not bad
    return fills


def _not_as_it_should(running: Command, status: int | None, told: str) -> list[str]:
    """Returns what is wrong with the end of a command on a full disk."""
    errors = [line for line in running.lines if line.startswith("error: ")]
    bad = [] if status == 2 else [f"exit status {status}"]
    if len(errors) != 1 or told not in errors[0]:
        bad.append("not one sentence that says so")
    if any(line.startswith("Traceback") for line in running.lines):
        bad.append("a traceback")
    return bad
