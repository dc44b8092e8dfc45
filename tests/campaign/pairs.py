"""Runs of two processes, of which one is killed or finds its disk full."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.campaign.disks import Limit, Tmpfs
from tests.campaign.kills import Reference
from tests.campaign.results import all_digests, differing
from tests.campaign.runs import Command, Failed, Place

_MINUTE = 60.0  # seconds within which a process must end after the other has died


@dataclass
class Losses:
    """The results of processes whose peer died.

    Attributes:
      lost: number of such processes.
      told: of these, those that ended within a minute with a sentence that names the other, or
        says that the disk, which both use, is full.
      seconds: until each ended.
      equal: whether every run was completed with an undisturbed pair's bits.
    """

    lost: int = 0
    told: int = 0
    seconds: list[float] = field(default_factory=list)
    equal: bool = False
    problems: list[str] = field(default_factory=list)


class Pair:
    """The two processes of one command."""

    def __init__(
        self, arguments: list[str], place: Place, before: Callable[[], None] | None = None
    ):
        """Starts the processes; `before` is called in the first, before the command."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        where = [f"--config.distributed.coordinator_address=127.0.0.1:{port}"]
        where.append("--config.distributed.num_processes=2")
        self.processes = [
            Command(
                [*arguments, *where, f"--config.distributed.process_id={i}"],
                place.environment(),
                before=before if i == 0 else None,
            )
            for i in (0, 1)
        ]

    @property
    def first(self) -> Command:
        return self.processes[0]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def complete(self) -> None:
        """Waits until both end.

        Raises:
          Failed: one ends with another status than 0.
        """
        for number, process in enumerate(self.processes):
            if (status := process.wait()) != 0:
                self.kill()
                raise Failed(f"process {number} of two ended with {status}:\n{process.tail()}")


def undisturbed_pair(place: Place, name: str) -> Reference:
    """Runs both commands in two processes without disturbance."""
    workdir, seconds = place.root / name, {}
    for arguments in place.commands(workdir):
        pair, begun = Pair(arguments, place), {}
        while not pair.first.ended():
            begun.setdefault(pair.first.stage, pair.first.stage_begun)
            time.sleep(0.05)
        pair.complete()
        ends = [*list(begun.values())[1:], time.monotonic()]
        seconds |= {s: e - b for (s, b), e in zip(begun.items(), ends, strict=True)}
    return Reference(workdir, all_digests(workdir, place.stages), seconds)


def lose_processes(
    place: Place, disk: Tmpfs | Limit, reference: Reference, rng: random.Random, *, losses: int
) -> Losses:
    """Runs two processes; in a number of stages one of them is killed.

    In one of these stages the disk of the first process is full before that.
    """
    found, workdir = Losses(), disk.folder / "pair"
    chosen = set(rng.sample(place.stages, min(losses, len(place.stages))))
    full = rng.choice(place.commands(workdir))
    try:
        for arguments in place.commands(workdir):
            if arguments == full:
                _fill(arguments, place, disk, reference, found)
            while True:
                pair, victim = Pair(arguments, place), rng.randrange(2)
                if not _killed(pair, victim, chosen, reference.seconds, rng):
                    break
                _see(pair.processes[1 - victim], victim, found)
                pair.kill()
            pair.complete()
        bits = all_digests(workdir, place.stages)
        bad = [name for s in place.stages for name in differing(bits[s], reference.digests[s])]
        if bad:
            found.problems.append(f"the pair's results differ: {', '.join(bad)}")
        found.equal = not bad
    except Failed as failed:
        found.problems.append(str(failed))
    return found


def _fill(
    arguments: list[str], place: Place, disk: Tmpfs | Limit, reference: Reference, found: Losses
) -> None:
    """Ends the first process by a full disk, which the other must notice."""
    disk.leave(0.3, reference.workdir, "vae" if "vae" in arguments[-1] else "capture")
    pair = Pair(arguments, place, before=disk.before)
    pair.first.wait()
    _see(pair.processes[1], 0, found, disk.told)
    if not any(x.startswith("error: ") and disk.told in x for x in pair.first.lines):
        found.problems.append(f"a full disk in one of two is not told:\n{pair.first.tail()}")
    pair.kill()
    disk.free()


def _killed(
    pair: Pair,
    victim: int,
    chosen: set[str],
    seconds: Mapping[str, float],
    rng: random.Random,
) -> bool:
    """Kills one process at a random moment of a stage, which is not chosen again."""
    stage, moment = None, 0.0
    while not pair.first.ended():
        now = pair.first.stage
        if stage is None and now in chosen:
            stage, moment = now, pair.first.stage_begun + rng.random() * seconds[now]
            chosen.discard(now)
        if stage is not None and time.monotonic() >= moment:
            pair.processes[victim].kill()
            return True
        time.sleep(0.01)
    return False


def _see(other: Command, victim: int, found: Losses, full: str = "") -> None:
    """Waits until the remaining process ends; `full` is what it says if its disk is full too."""
    begun, status = time.monotonic(), other.wait(_MINUTE)
    found.lost += 1
    found.seconds.append(time.monotonic() - begun)
    named = any(
        x.startswith(f"error: process {victim} ") or full and x.startswith("error: ") and full in x
        for x in other.lines
    )
    found.told += bool(status) and named
    if not (status and named):
        found.problems.append(
            f"process {1 - victim}, as process {victim} had died, ended with {status} after "
            f"{found.seconds[-1]:.0f} s:\n{other.tail()}"
        )
