"""Checks that the same command completes runs after kills, full disks and lost processes.

    python -m tests.kill_campaign --kills 200

A policy is trained from random weights, grafted, evaluated and exported in seconds. The results of
every disturbed run must equal those of an undisturbed one to the bit. XLA's results on a CPU depend
on the number of usable cores: do not change the affinity of the processes meanwhile.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.campaign import disks, kills, pairs
from tests.campaign.results import differing
from tests.campaign.runs import STAGES, Failed, Place

_PER_STAGE = 3  # kills of a stage in one run
_GIVE_UP = 5  # problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs in all")
    parser.add_argument("--fills", type=int, default=2, help="full disks in every stage")
    parser.add_argument("--losses", type=int, default=10, help="stages in which one of two dies")
    parser.add_argument("--seed", type=int, default=0, help="of all moments")
    parser.add_argument("--no-mount", action="store_true", help="full disks by RLIMIT_FSIZE alone")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    options = parser.parse_args()
    if not options.no_mount:
        disks.enter_a_namespace()
    own = options.folder is None
    folder = Path(tempfile.mkdtemp(prefix="kill_campaign_")) if own else options.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _campaign(Place(folder.absolute(), folder.absolute() / "data"), options)
    except Failed as failed:
        print(f"error: {failed}", file=sys.stderr)
        return 1
    finally:
        if own:
            shutil.rmtree(folder)


def _campaign(place: Place, options: argparse.Namespace) -> int:
    rng, clock = random.Random(options.seed), time.monotonic()

    def say(text: str) -> None:
        print(f"[{(time.monotonic() - clock) / 60:5.1f} min] {text}", flush=True)

    first = kills.undisturbed(place, "first")
    say("first run: all programs are compiled")
    reference = kills.undisturbed(place, "reference")
    problems = [
        f"two undisturbed runs differ in {', '.join(bad)}"
        for stage in STAGES
        if (bad := differing(first.digests[stage], reference.digests[stage]))
    ]
    shutil.rmtree(first.workdir)
    say(f"undisturbed, in {sum(reference.seconds.values()):.0f} s")
    tally = _kill(place, reference, options.kills, rng, say)
    fills = disks.Fills()
    if options.fills:
        with disks.small_disk(place.root / "disk", mount=not options.no_mount) as disk:
            fills = disks.fill_in_every_stage(place, disk, reference, rng, times=options.fills)
        say(f"full disks: {sum(fills.filled.values())}, by {fills.kind}")
    losses = pairs.Losses()
    if options.losses:
        two = pairs.undisturbed_pair(place, "pair")
        say(f"two processes, undisturbed, in {sum(two.seconds.values()):.0f} s")
        with disks.small_disk(place.root / "disk", mount=not options.no_mount) as disk:
            losses = pairs.lose_processes(place, disk, two, rng, losses=options.losses)
        say("two processes, of which one dies")
    problems += tally.problems + fills.problems + losses.problems
    for problem in problems:
        print(f"\nproblem: {problem}")
    print(f"\n{_table(tally, fills, losses)}")
    print(f"{len(problems)} problems, {(time.monotonic() - clock) / 60:.0f} minutes")
    return 1 if problems else 0


def _kill(place: Place, reference: kills.Reference, count: int, rng, say) -> kills.Tally:
    tally, runs = kills.Tally(), 0
    while (left := count - sum(tally.kills.values())) > 0 and len(tally.problems) < _GIVE_UP:
        name, before = f"run_{runs}", len(tally.problems)
        kills.killed_run(place, name, reference, tally, rng, kills=left, per_stage=_PER_STAGE)
        if len(tally.problems) == before:  # else it stays, to be looked at
            shutil.rmtree(place.root / name)
        runs += 1
        say(f"{sum(tally.kills.values())} kills in {runs} runs, {len(tally.problems)} problems")
    return tally


def _table(tally: kills.Tally, fills: disks.Fills, losses: pairs.Losses) -> str:
    rows = [("stage", "kills", "resumed", "equal bits", "full disks", "told", "completed")]
    for row in kills.ROWS:
        filled = [str(x[row]) if row in STAGES else "" for x in (fills.filled, fills.told)]
        completed = ("yes" if fills.equal[row] else "no") if row in STAGES else ""
        counts = (tally.kills[row], tally.resumed[row], tally.equal[row])
        rows.append((row, *map(str, counts), *filled, completed))
    sums = (tally.kills, tally.resumed, tally.equal, fills.filled, fills.told)
    rows.append(("all", *(str(sum(x.values())) for x in sums), ""))
    lines = [row[0].ljust(12) + "".join(cell.rjust(12) for cell in row[1:]) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    seconds = f", after {max(losses.seconds):.0f} s at most" if losses.seconds else ""
    lines.append(
        f"\nfull disks by {fills.kind or '-'}; of two processes {losses.lost} lost the other, "
        f"{losses.told} of them ended with a sentence{seconds}; "
        f"then completed with equal bits: {'yes' if losses.equal else 'no'}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
