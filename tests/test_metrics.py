"""The metrics writer: whole lines after kills, TensorBoard events, progress on plain logs."""

import errno
import io
import json
import struct
import sys
import types

import numpy as np
import pytest
from ml_collections import ConfigDict
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event

from uva_jax.runtime import metrics
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.metrics import MetricsWriter, read_metrics


def read_events(folder):
    """Parses event files by tensorboardX's own protocol buffers and checksum."""
    events = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            for checked, at in ((data[:8], 8), (data[12 : 12 + length], 12 + length)):
                crc = crc32c(checked)
                masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
                assert struct.unpack("<I", data[at : at + 4]) == (masked,)
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_a_logged_step_is_one_line_of_json(tmp_path):
    with MetricsWriter(tmp_path, "distill") as writer:
        writer.log(3, loss=np.float32(0.5), lr=1e-4)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record.pop("time") > 1.7e9
    assert record == {"stage": "distill", "step": 3, "loss": 0.5, "lr": 1e-4}


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    with MetricsWriter(tmp_path, "distill") as writer:
        writer.log(1, loss=float("nan"), big=float("inf"), huge=1e300)
    record = read_metrics(tmp_path, "distill")[0]
    assert record["loss"] is None and record["big"] is None and record["huge"] == 1e300


def test_reserved_names_are_refused(tmp_path):
    with MetricsWriter(tmp_path, "distill") as writer, pytest.raises(ValueError, match="time"):
        writer.log(1, time=2.0)


def test_a_torn_last_line_does_not_spoil_the_next_one(tmp_path):
    with MetricsWriter(tmp_path, "distill") as writer:
        writer.log(1, loss=1.0)
        writer.log(2, loss=2.0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-15])
    with MetricsWriter(tmp_path, "distill") as writer:
        writer.log(2, loss=2.5)
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.5)]


def test_a_write_cut_short_by_a_full_disk_is_an_error(tmp_path):
    class Short:
        name = "metrics.jsonl"

        def write(self, data):
            return len(data) - 3

        def close(self):
            pass

    with MetricsWriter(tmp_path, "distill") as writer:
        writer._file.close()
        writer._file = Short()
        with pytest.raises(OSError) as caught:
            writer.log(1, loss=1.0)
    assert caught.value.errno == errno.ENOSPC


def test_the_last_value_of_a_step_wins_and_stages_stay_apart(tmp_path):
    with MetricsWriter(tmp_path, "distill") as writer:
        writer.log(1, loss=1.0)
        writer.log(2, loss=2.0)
        writer.log(2, held_out=7.0)
    with MetricsWriter(tmp_path, "finetune") as writer:
        writer.log(1, loss=9.0)
    with MetricsWriter(tmp_path, "distill") as writer:  # resumed from step 1
        writer.log(2, loss=2.5)
        writer.log(3, loss=3.0)
    records = read_metrics(tmp_path, "distill")
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1.0), (2, 2.5), (3, 3.0)]
    assert records[1]["held_out"] == 7.0
    assert len(read_metrics(tmp_path)) == 4
    assert read_metrics(tmp_path, "capture") == read_metrics(tmp_path / "nowhere") == []


def test_a_fresh_start_hides_what_was_logged_before(tmp_path):
    with MetricsWriter(tmp_path, "distill") as writer:
        writer.log(500, loss=1.0)
    with MetricsWriter(tmp_path, "distill", fresh=True) as writer:
        writer.log(1, loss=2.0)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]
    steps = [e.step for e in read_events(tmp_path / "tensorboard" / "distill")]
    assert 500 not in steps


def test_tensorboard_events_hold_the_scalars_and_mark_the_resumed_step(tmp_path):
    for first in (0, 300):
        with MetricsWriter(tmp_path, "distill") as writer:
            writer.log(first, loss=0.25, huge=1e300)
    events = read_events(tmp_path / "tensorboard" / "distill")
    assert [e.file_version for e in events if e.file_version] == ["brain.Event:2"] * 2
    assert [e.step for e in events if e.HasField("session_log")] == [0, 300]
    values = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert values[0] == (0, "loss", 0.25) and values[2] == (300, "loss", 0.25)
    assert values[1] == (0, "huge", float("inf"))


def test_a_silent_writer_writes_and_prints_nothing(tmp_path, capsys):
    with MetricsWriter(tmp_path, "capture", enabled=False) as writer:
        writer.log(1, loss=1.0)
        writer.say("hello")
        with writer.progress(10) as bar:
            bar.update(10)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


class Clock:
    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def time(self):
        return 1.75e9 + self.now


def plain_lines(tmp_path, monkeypatch, total, seconds, updates, initial=0):
    clock, stream = Clock(), io.StringIO()
    monkeypatch.setattr(metrics, "time", clock)
    with MetricsWriter(tmp_path, "capture", stream=stream) as writer:
        with writer.progress(total, "windows", "teacher", initial=initial) as bar:
            for step in range(updates):
                clock.now += seconds
                if step == 0:
                    writer.log(1, loss=0.125)
                bar.update(1)
    return stream.getvalue().splitlines()


def test_plain_progress_says_count_rate_time_left_and_scalars(tmp_path, monkeypatch):
    lines = plain_lines(tmp_path, monkeypatch, total=100, seconds=2.0, updates=100)
    assert lines[0] == (
        "capture: teacher: 5/100 windows (5 %), 0.5 windows/s, 3:10 left, loss=0.125"
    )
    assert len(lines) == 20  # every 10 seconds
    assert lines[-1].startswith("capture: teacher: 100/100 windows (100 %)")
    assert "took 3:20" in lines[-1]


def test_plain_progress_before_the_first_unit_says_no_time_left(tmp_path, monkeypatch):
    clock, stream = Clock(), io.StringIO()
    monkeypatch.setattr(metrics, "time", clock)
    with MetricsWriter(tmp_path, "evaluate", stream=stream) as writer:
        with writer.progress(6, "episodes") as bar:
            clock.now += 11
            bar.update(0)
    assert stream.getvalue() == "evaluate: 0/6 episodes (0 %)\n"


def test_plain_progress_of_a_quick_loop_is_a_line_each_tenth(tmp_path, monkeypatch):
    lines = plain_lines(tmp_path, monkeypatch, total=100, seconds=0.2, updates=100)
    assert [line.split()[2] for line in lines[:2]] == ["10/100", "20/100"]
    assert len(lines) == 10


def test_plain_progress_of_an_instant_loop_is_one_line(tmp_path, monkeypatch):
    assert len(plain_lines(tmp_path, monkeypatch, total=100, seconds=1e-4, updates=100)) == 1


def test_plain_progress_of_a_resumed_loop_counts_its_own_rate(tmp_path, monkeypatch):
    lines = plain_lines(tmp_path, monkeypatch, total=100, seconds=10.0, updates=1, initial=90)
    assert "91/100 windows (91 %), 0.1 windows/s, 1:30 left" in lines[0]


def test_a_terminal_gets_a_bar(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with MetricsWriter(tmp_path, "capture", stream=stream) as writer:
        with writer.progress(4, "windows", initial=1) as bar:
            bar.update(3, loss=0.5)
            writer.say("a word in between")
    assert "4/4" in stream.getvalue()
    assert "loss=0.5" in stream.getvalue()
    assert "capture: a word in between\n" in stream.getvalue()


def test_wandb_missing_is_told_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = ConfigDict({"wandb": {"project": "grafts"}})
    with pytest.raises(UserError, match="'grafts'.*pip install wandb"):
        MetricsWriter(tmp_path, "distill", config=config)
    MetricsWriter(tmp_path, "distill", config=ConfigDict({"wandb": {"project": ""}})).close()


def test_wandb_gets_the_same_scalars(tmp_path, monkeypatch):
    logged = []

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            logged.append("finished")

    fake = types.ModuleType("wandb")
    fake.init = lambda **given: logged.append((given["project"], given["group"])) or Run()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = ConfigDict({"wandb": {"project": "grafts", "name": "wide heads"}})
    with MetricsWriter(tmp_path, "distill", config=config) as writer:
        writer.log(7, loss=0.5)
    assert logged == [("grafts", "wide heads"), (7, {"loss": 0.5}), "finished"]
