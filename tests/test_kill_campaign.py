"""A short kill campaign: two of the stages, a few kills, one full disk. The whole one is a command,

python -m tests.kill_campaign
"""

import dataclasses
import random
import shutil

import pytest

from tests.campaign import disks, kills
from tests.campaign.runs import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory, shared, checkpoint, buffer) -> Place:
    root = tmp_path_factory.mktemp("campaign")
    return Place(root, shared / "cache", ("convert", "capture"), checkpoint)


@pytest.fixture(scope="module")
def reference(place) -> kills.Reference:
    return kills.undisturbed(place, "reference")


def test_killed_runs_are_completed_with_the_bits_of_an_undisturbed_one(place, reference):
    tally = kills.Tally()
    rng = random.Random(0)
    runs = 0
    while (left := 2 - sum(tally.kills.values())) and runs < 5:  # a fast run may end unharmed
        runs += 1
        kills.killed_run(place, f"killed{runs}", reference, tally, rng, kills=left, per_stage=2)
    assert not tally.problems
    assert sum(tally.kills.values()) == 2 and tally.resumed == tally.equal == tally.kills


def test_a_full_disk_is_told_and_the_same_command_completes(place, reference):
    place = dataclasses.replace(place, stages=("capture",))
    with disks.small_disk(place.root / "disk") as disk:
        # The result of the other stage, which reads the same checkpoint.
        shutil.copytree(reference.workdir / "teacher", disk.folder / "run" / "teacher")
        fills = disks.fill_in_every_stage(place, disk, reference, random.Random(1), times=1)
    assert not fills.problems
    assert fills.told == fills.filled and fills.equal["capture"] == 1
