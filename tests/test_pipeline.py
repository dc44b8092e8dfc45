"""The stage engine: skipping, resuming, rerunning, locks, full disks, stop signals and kills."""

import dataclasses
import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from uva_jax.pipeline.engine import Stage, run_pipeline
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]


def make_config(**changes):
    config = ConfigDict({"capture": {"windows": 8}, "distill": {"lr": 0.1, "epochs": 2}, "seed": 0})
    config.update(changes)
    return config


class Recorder:
    """Three stages that write their inputs' text and their own name, and record their calls."""

    def __init__(self, fingerprint=None):
        self.calls = []
        self.before_write = {}  # stage name -> function of the context
        self.stages = (
            self._stage("convert", (), ("seed",), "teacher", fingerprint),
            self._stage("capture", ("convert",), ("capture",), "activations"),
            self._stage("distill", ("capture",), ("distill", "seed"), "operators"),
            self._stage("probe", ("convert",), ("seed",), "probe"),
        )

    def _stage(self, name, needs, keys, folder, fingerprint=None):
        def run(context):
            self.calls.append(name)
            if name in self.before_write:
                self.before_write[name](context)
            text = "".join((path / "out").read_text() for path in context.inputs.values())
            (context.folder / "out").write_text(f"{text}{name} ")
            context.metrics.log(1, loss=0.5)
            return {"loss": 0.5}

        return Stage(name, run, needs, keys, folder, f"makes {folder}", fingerprint)

    def run(self, workdir, config=None, only=None):
        self.calls = []
        return run_pipeline(self.stages, config or make_config(), workdir, only)


def interrupt(context):
    (context.folder / "partial").write_text("half")
    raise RuntimeError("cut off")


def test_stages_run_in_order_and_end_with_done_json(tmp_path):
    recorder = Recorder()
    metrics = recorder.run(tmp_path)
    assert recorder.calls == ["convert", "capture", "distill", "probe"]
    assert metrics["distill"] == {"loss": 0.5}
    assert (tmp_path / "operators" / "out").read_text() == "convert capture distill "
    done = json.loads((tmp_path / "operators" / "done.json").read_text())
    assert done["config"] == {"distill.lr": 0.1, "distill.epochs": 2, "seed": 0}
    assert done.keys() >= {"metrics", "config_hash", "inputs_hash", "seconds", "versions"}
    assert done["peak_memory"] > 10e6
    assert json.loads((tmp_path / "config.json").read_text()) == make_config().to_dict()


def test_finished_stages_are_skipped_with_one_line_each(tmp_path, capsys):
    recorder = Recorder()
    first = recorder.run(tmp_path)
    capsys.readouterr()
    assert recorder.run(tmp_path) == first
    assert recorder.calls == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("capture: skipped, finished ")


def test_a_changed_key_reruns_the_stage_and_its_dependents_and_is_named(tmp_path, capsys):
    recorder = Recorder()
    recorder.run(tmp_path)
    (tmp_path / "activations" / "stale").write_text("old data")
    capsys.readouterr()
    recorder.run(tmp_path, make_config(capture={"windows": 16}))
    assert recorder.calls == ["capture", "distill"]
    out = capsys.readouterr().out
    assert "capture.windows: 8 -> 16" in out
    assert "distill: was finished with other settings or inputs, cleared (input capture)" in out
    assert not (tmp_path / "activations" / "stale").exists()
    assert not list(tmp_path.glob(".activations.*"))


def test_a_key_that_no_stage_reads_reruns_nothing(tmp_path):
    recorder = Recorder()
    recorder.run(tmp_path)
    recorder.run(tmp_path, make_config(capture={"windows": 8}, comment="new"))
    assert recorder.calls == []


def test_a_stage_cut_off_resumes_in_its_folder(tmp_path, capsys):
    recorder = Recorder()
    recorder.before_write["capture"] = interrupt
    with pytest.raises(RuntimeError, match="cut off"):
        recorder.run(tmp_path)
    seen = []
    recorder.before_write["capture"] = lambda c: seen.append((c.folder / "partial").read_text())
    recorder.run(tmp_path)
    assert recorder.calls == ["capture", "distill", "probe"]
    assert seen == ["half"]
    assert "capture: resuming" in capsys.readouterr().out
    assert json.loads((tmp_path / "activations" / "done.json").read_text())["resumed"] is True


def test_a_stage_cut_off_under_another_configuration_starts_afresh_and_says_so(tmp_path, capsys):
    recorder = Recorder()
    recorder.before_write["capture"] = interrupt
    with pytest.raises(RuntimeError):
        recorder.run(tmp_path)
    seen = []
    recorder.before_write["capture"] = lambda c: seen.append((c.folder / "partial").exists())
    recorder.run(tmp_path, make_config(capture={"windows": 9}))
    assert seen == [False]
    assert "capture: was started with other settings" in capsys.readouterr().out


def test_metrics_of_an_earlier_configuration_are_hidden_after_a_rerun(tmp_path):
    recorder = Recorder()
    recorder.before_write["capture"] = lambda c: c.metrics.log(99, loss=9.0)
    recorder.run(tmp_path)
    recorder.before_write = {}
    recorder.run(tmp_path, make_config(capture={"windows": 16}))
    assert [record["step"] for record in read_metrics(tmp_path, "capture")] == [1]


def test_a_changed_external_file_reruns_what_reads_it(tmp_path, capsys):
    checkpoint = tmp_path / "teacher.ckpt"
    checkpoint.write_bytes(b"one")
    recorder = Recorder(fingerprint=lambda config: {"checkpoint": checkpoint})
    recorder.run(tmp_path / "run")
    checkpoint.write_bytes(b"two")
    recorder.run(tmp_path / "run")
    assert recorder.calls == ["convert", "capture", "distill", "probe"]
    assert "cleared (input file checkpoint)" in capsys.readouterr().out


def test_an_external_file_may_be_moved_away_once_it_was_used(tmp_path):
    checkpoint = tmp_path / "teacher.ckpt"
    checkpoint.write_bytes(b"one")
    recorder = Recorder(fingerprint=lambda config: {"checkpoint": checkpoint})
    recorder.run(tmp_path / "run")
    checkpoint.unlink()
    recorder.run(tmp_path / "run")
    assert recorder.calls == []
    with pytest.raises(UserError, match="teacher.ckpt.*does not exist"):
        recorder.run(tmp_path / "other")


def test_one_stage_alone_wants_its_prerequisites(tmp_path):
    recorder = Recorder()
    with pytest.raises(UserError, match="run it first with --stage convert"):
        recorder.run(tmp_path, only=["distill"])
    recorder.run(tmp_path, only=["convert"])
    with pytest.raises(UserError, match="run it first with --stage capture"):
        recorder.run(tmp_path, only=["distill"])
    recorder.run(tmp_path, only=["distill", "capture"])
    assert recorder.calls == ["capture", "distill"]


def test_one_stage_alone_refuses_prerequisites_that_are_out_of_date(tmp_path):
    recorder = Recorder()
    recorder.run(tmp_path)
    with pytest.raises(UserError, match=r"'capture'.*out of date \(capture.windows: 8 -> 16\)"):
        recorder.run(tmp_path, make_config(capture={"windows": 16}), only=["distill"])
    assert recorder.calls == []


def test_stages_on_request_run_only_there_with_those_on_request_that_they_need(tmp_path):
    recorder = Recorder()
    keys = {"convert": False, "capture": True, "distill": True, "probe": True}
    recorder.stages = tuple(
        dataclasses.replace(s, on_request=keys[s.name]) for s in recorder.stages
    )
    recorder.run(tmp_path)
    assert recorder.calls == ["convert"]
    recorder.run(tmp_path, only=["distill"])
    assert recorder.calls == ["capture", "distill"]
    # Stages that do not depend on a changed setting are not rerun.
    recorder.run(tmp_path, make_config(distill={"lr": 0.2, "epochs": 2}), only=["distill"])
    assert recorder.calls == ["distill"]


def test_a_derived_stage_runs_with_its_reader_and_reruns_nothing_that_is_done(tmp_path):
    recorder = Recorder()
    recorder.run(tmp_path)  # before "capture" read what "probe" derives from "convert"
    convert, capture, distill, probe = recorder.stages
    capture = dataclasses.replace(capture, derived=("probe",))
    recorder.stages = (convert, probe, capture, distill)
    recorder.run(tmp_path, only=["capture"])
    assert recorder.calls == []
    recorder.run(tmp_path / "new", only=["convert"])
    recorder.run(tmp_path / "new", only=["capture"])
    assert recorder.calls == ["probe", "capture"]
    assert (
        tmp_path / "new" / "activations" / "out"
    ).read_text() == "convert convert probe capture "


def test_an_unknown_stage_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="no stage 'distil'.*convert, capture, distill, probe"):
        Recorder().run(tmp_path, only=["distil"])


def test_files_that_no_stage_wrote_are_not_removed(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files that no stage wrote"):
        Recorder().run(tmp_path)
    assert (tmp_path / "teacher" / "thesis.tex").exists()


def test_a_stage_folder_that_is_a_link_keeps_its_target_in_use(tmp_path):
    big_disk = tmp_path / "disk" / "cache"
    big_disk.mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "activations").symlink_to(big_disk)
    recorder = Recorder()
    recorder.run(tmp_path / "run")
    recorder.run(tmp_path / "run", make_config(capture={"windows": 16}))
    assert (tmp_path / "run" / "activations").is_symlink()
    assert (big_disk / "done.json").exists()


def run_script(workdir, body, more="", **popen):
    """Starts a process that runs the pipeline with a capture stage made of `body`."""
    body = textwrap.indent(textwrap.dedent(body).strip(), " " * 4)
    script = (
        "import os, signal, sys, time\n"
        "from ml_collections import ConfigDict\n"
        "from uva_jax.pipeline.engine import Stage, run_pipeline\n"
        f"def run(context):\n{body}\n    return {{'ok': 1}}\n"
        "stages = [Stage('capture', run, (), ('n',), 'activations')]\n"
        f"{more}"
        f"run_pipeline(stages, ConfigDict({{'n': 1}}), {str(workdir)!r})\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, text=True, stdout=subprocess.PIPE, **popen
    )


COUNTING = """
    state = context.folder / "rows"
    done = len(state.read_text()) if state.exists() else 0
    for row in range(done, 10):
        with open(state, "a") as file:
            file.write("x")
        context.metrics.log(row, value=row)
        if row == {end} and done == 0:
            os.kill(os.getpid(), signal.{signal})
            time.sleep(30)
"""


def test_kill_9_inside_a_stage_leaves_a_run_that_the_same_command_completes(tmp_path):
    body = COUNTING.format(end=4, signal="SIGKILL")
    killed = run_script(tmp_path, body)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "activations" / "done.json").exists()
    again = run_script(tmp_path, body)  # the lock of the killed run is not in the way
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert "resuming" in out
    assert (tmp_path / "activations" / "rows").read_text() == "x" * 10
    assert [r["step"] for r in read_metrics(tmp_path, "capture")] == list(range(10))


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stop_signal_leaves_cleanly_and_says_how_to_go_on(tmp_path, name, status):
    # A shell's background job ignores SIGINT, and so would this process if the tests were one.
    more = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    body = COUNTING.format(end=4, signal=name)
    process = run_script(tmp_path, body, more=more, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert out.splitlines()[-1].startswith(f"stopped by {name}: run the same command")
    assert err == ""


@pytest.mark.parametrize(
    "safe_point",
    [
        "context.metrics.log(1, loss=1.0)",
        "context.metrics.say('going on')",
        "bar.update()",
        "return {}",  # before the next stage
    ],
)
def test_a_stop_signal_that_a_finalizer_swallows_counts_at_the_next_safe_point(
    tmp_path, safe_point
):
    body = f"""
    class Swallows:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                pass
    with context.metrics.progress(9) as bar:
        Swallows()
        print("still here", flush=True)
        {safe_point}
        time.sleep(30)
    """
    more = "stages.append(Stage('distill', run, (), ('n',), 'operators'))\n"
    process = run_script(tmp_path, body, more=more, stderr=subprocess.DEVNULL)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 143
    assert out.count("still here") == 1
    assert out.splitlines()[-1].startswith("stopped by SIGTERM: run the same command")


def test_a_workdir_in_use_by_a_live_process_is_refused_with_its_holder(tmp_path):
    body = "print('inside', flush=True)\nsys.stdin.readline()"
    holder = run_script(tmp_path, body, stdin=subprocess.PIPE)
    try:
        assert "starting" in holder.stdout.readline()
        assert holder.stdout.readline() == "inside\n"
        with pytest.raises(UserError, match=f"in use by another run.*process {holder.pid} on "):
            Recorder().run(tmp_path)
    finally:
        holder.communicate("\n", timeout=60)
    assert holder.returncode == 0
    Recorder().run(tmp_path)


def test_a_worker_that_outlives_the_run_does_not_keep_the_lock(tmp_path):
    read_end, write_end = os.pipe()
    alive, alive_in_child = os.pipe()

    def leave_a_worker(context):
        child = os.fork()
        if child == 0:
            os.write(alive_in_child, b"x")
            os.read(read_end, 1)
            os._exit(0)
        workers.append(child)

    workers = []
    recorder = Recorder()
    recorder.before_write["convert"] = leave_a_worker
    recorder.run(tmp_path, only=["convert"])
    try:
        os.read(alive, 1)  # a child that has not run yet has closed nothing
        with open(tmp_path / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.write(write_end, b"x")
        os.waitpid(workers[0], 0)
        for end in (read_end, write_end, alive, alive_in_child):
            os.close(end)


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="cannot be used.*give a writable folder"):
        Recorder().run(tmp_path / "run")
    with pytest.raises(UserError, match="cannot be used"):
        Recorder().run(tmp_path / "run" / "below")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("RESOURCE_EXHAUSTED: Failed to write file [OS error: No space left on device]"),
    ],
)
def test_a_full_disk_in_a_stage_is_told_in_a_sentence(tmp_path, error):
    def fill(context):
        raise error

    recorder = Recorder()
    recorder.before_write["capture"] = fill
    with pytest.raises(UserError, match="the disk is full.*free some space"):
        recorder.run(tmp_path)
    recorder.before_write = {}
    recorder.run(tmp_path)
    assert recorder.calls == ["capture", "distill", "probe"]


def test_a_limit_on_the_size_of_files_is_told_in_a_sentence(tmp_path):
    def write(context):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            (context.folder / "large").write_bytes(bytes(1000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    recorder = Recorder()
    recorder.before_write["capture"] = write
    with pytest.raises(UserError, match="no file may grow as large.*raise that limit"):
        recorder.run(tmp_path)


def test_a_full_disk_while_done_json_is_written_leaves_the_stage_unfinished(tmp_path, monkeypatch):
    real = os.fsync
    recorder = Recorder()

    def full(descriptor):
        if recorder.calls == ["convert"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        recorder.run(tmp_path)
    assert sorted(p.name for p in (tmp_path / "teacher").iterdir()) == ["out", "started.json"]


def test_other_errors_of_a_stage_pass_through_unchanged(tmp_path):
    recorder = Recorder()
    recorder.before_write["capture"] = interrupt
    with pytest.raises(RuntimeError, match="^cut off$"):
        recorder.run(tmp_path)


def test_a_secondary_process_runs_stages_but_writes_no_records(tmp_path):
    recorder = Recorder()
    recorder.run(tmp_path)
    snapshot = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json*")}
    barriers = []
    run_pipeline(
        recorder.stages, make_config(), tmp_path, is_primary=False, barrier=barriers.append
    )
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json*")} == snapshot
    assert barriers[0] == "pipeline:ready" and "capture:decided" in barriers


def test_a_table_with_a_stage_before_its_needs_is_refused(tmp_path):
    stages = Recorder().stages
    with pytest.raises(ValueError, match="a place after the stages it needs"):
        run_pipeline(stages[::-1], make_config(), tmp_path)
