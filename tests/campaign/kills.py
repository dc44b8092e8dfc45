"""Kills runs at random moments of every stage, and repeats them until they are complete."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.campaign.results import all_digests, differing
from tests.campaign.runs import STAGES, START_UP, Command, Failed, Place

ROWS = (START_UP, *STAGES)
_START_UP_SHARE = 1 / (len(ROWS) + 1)  # of the kills


@dataclass
class Reference:
    """An undisturbed run: its results, and seconds by stage (and of the start-up)."""

    workdir: Path
    digests: Mapping[str, Mapping[str, str]]
    seconds: Mapping[str, float]


@dataclass
class Tally:
    """The results of kills, by stage.

    Attributes:
      kills: number of SIGKILLs in the stage.
      resumed: of these, those after which the same command did not fail.
      equal: of these, those in runs whose results of the stage equal the reference's.
      problems: descriptions of failures.
    """

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROWS, 0))
    resumed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROWS, 0))
    equal: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROWS, 0))
    problems: list[str] = field(default_factory=list)


def undisturbed(place: Place, name: str) -> Reference:
    """Runs both commands without disturbance."""
    workdir, seconds = place.root / name, {}
    for arguments in place.commands(workdir):
        running = Command(arguments, place.environment())
        status, begun = None, {}
        while status is None and time.monotonic() - running.begun < 1200:
            status = running.wait(0.05)
            begun.setdefault(running.stage, running.stage_begun)
        if status != 0:
            running.kill()
            raise Failed(f"the undisturbed run ended with {status}:\n{running.tail()}")
        ends = [*list(begun.values())[1:], time.monotonic()]
        seconds |= {s: e - b for (s, b), e in zip(begun.items(), ends, strict=True)}
    return Reference(workdir, all_digests(workdir, place.stages), seconds)


def killed_run(
    place: Place,
    name: str,
    reference: Reference,
    tally: Tally,
    rng: random.Random,
    *,
    kills: int,
    per_stage: int,
) -> None:
    """Kills a run up to `kills` times, up to `per_stage` times in a stage; compares its results."""
    workdir, landed = place.root / name, dict.fromkeys(ROWS, 0)
    try:
        for arguments in place.commands(workdir):
            killed_in = None
            while True:
                left = kills - sum(landed.values())
                running = Command(arguments, place.environment())
                killed = left > 0 and _killed(running, reference, landed, per_stage, rng)
                status = None if killed else running.wait()
                if not killed and status != 0:
                    running.kill()
                    after = f", after a kill in {killed_in}" if killed_in else ""
                    raise Failed(f"{name} ended with {status}{after}:\n{running.tail()}")
                if killed_in:
                    tally.resumed[killed_in] += 1
                if not killed:
                    break
                killed_in = running.stage
                landed[killed_in] += 1
                tally.kills[killed_in] += 1
        found = all_digests(workdir, place.stages)
    except Failed as failed:
        tally.problems.append(str(failed))
        return
    bad = {s: differing(found[s], reference.digests[s]) for s in place.stages}
    tally.problems += [f"{name}, {s} differs: {', '.join(x)}" for s, x in bad.items() if x]
    for row in ROWS:
        tally.equal[row] += landed[row] if not bad.get(row) else 0


def _killed(
    running: Command,
    reference: Reference,
    landed: Mapping[str, int],
    per_stage: int,
    rng: random.Random,
) -> bool:
    """Kills a command at a random moment of its start-up or of a stage with too few kills.

    Returns whether it was killed before it ended.
    """
    target, moment = None, math.inf
    spares_start_up = rng.random() >= _START_UP_SHARE
    while not running.ended():
        stage, begun = running.stage, running.stage_begun
        if stage != target:  # a moment beyond the end of its stage is drawn anew in the next
            spared = spares_start_up if stage == START_UP else landed[stage] >= per_stage
            later = math.inf if spared else rng.random() * reference.seconds[stage]
            target, moment = stage, begun + later
        if time.monotonic() >= moment:
            running.kill()
            return running.wait() != 0
        time.sleep(0.01)
    return False
