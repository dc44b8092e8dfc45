"""A command whose reader ends first (`... | head`) ends quietly."""

import os
import subprocess
import sys

from uva_jax import assets

COMMANDS = {
    "inspect": ("convert", "inspect", str(assets.POLICY)),
    "from_torch": ("convert", "from_torch", str(assets.POLICY), "policy"),
    "to_torch": ("convert", "to_torch", "policy", "again.ckpt"),
    "usage": ("uva_jax",),
    "sample": ("uva_jax", "sample", "--policy", "embedded", "--obs", "seen.npz", "--help"),
    "pipeline": ("uva_jax.main", "--help"),
}


def without_reader(folder, *arguments) -> tuple[int, str]:
    """Returns status and stderr of `python -m ...` whose output pipe is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr


def test_every_command_ends_quietly_when_its_reader_is_gone(tmp_path):
    for name, arguments in COMMANDS.items():
        status, said = without_reader(tmp_path, *arguments)
        # argparse ignores errors while it prints its help, unless it is longer than the buffer.
        assert status in ((0, 141) if name == "sample" else (141,)) and not said, name
    # Files that a command writes are complete.
    assert (tmp_path / "policy" / "policy.json").exists() and (tmp_path / "again.ckpt").exists()


def test_an_error_is_still_told_when_the_reader_is_gone(tmp_path):
    status, said = without_reader(tmp_path, "convert", "inspect", "nowhere.ckpt")
    assert status == 2 and said.startswith("error: nowhere.ckpt does not exist")


def test_another_broken_pipe_is_no_reason_to_be_quiet():
    code = (
        "from uva_jax.runtime.errors import exit_status\n"
        "def command():\n    raise BrokenPipeError('a worker is gone')\n"
        "exit_status(command)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "a worker is gone" in done.stderr
