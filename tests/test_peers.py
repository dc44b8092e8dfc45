"""If one process of a run fails or is killed, the others exit with a message that names it."""

import signal
import socket

import pytest
from conftest import python

_RUN = """
import os, resource, signal, sys
from pathlib import Path
import jax
import numpy as np
from jax.experimental import multihost_utils
from uva_jax.runtime import parallel, peers
from uva_jax.runtime.guards import full_disk_as_user_error
from uva_jax.runtime.sections import DistributedOptions
from uva_jax.storage.checkpoint import Checkpoints

number, address, what, folder = int(sys.argv[1]), *sys.argv[2:]
peers._SILENCE, peers._INTERVAL = 4.0, 0.5
parallel.initialize_distributed(DistributedOptions(False, address, 2, number))
with peers.exit_together(address):
    parallel.barrier("begun")
    if number == int(what[-1]):
        if what.startswith("breaks"):
            raise KeyError("a fault")
        if what.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if what.startswith("leaves"):
            os._exit(3)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    elif what.startswith("leaves"):
        multihost_utils.process_allgather(np.ones(3))  # fails with the other side
    with full_disk_as_user_error(Path(folder)), Checkpoints(folder) as checkpoints:
        for step in range(3):
            checkpoints.save(step, [np.random.rand(100, 1000)])
    parallel.barrier("never")
print("over", flush=True)
"""


def run_two(what: str, folder):
    """Returns (status, stdout, stderr) of both processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [python(_RUN, number, address, what, folder) for number in (0, 1)]
    try:
        said = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *text) for p, text in zip(processes, said, strict=True)]


@pytest.mark.parametrize(
    "what, status, sentence",
    [
        ("fills in 0", 2, "error: process 0 has failed (no file may grow as large as"),
        ("breaks in 1", 1, "error: process 1 has failed (KeyError: 'a fault')"),
        ("killed in 0", -signal.SIGKILL, "error: process 0 is gone"),
        ("leaves in 1", 3, "error: process 1 is gone"),
        ("killed in 1", -signal.SIGKILL, "error: process 1 is gone"),
    ],
)
def test_if_one_process_ends_the_other_exits_with_a_message(tmp_path, what, status, sentence):
    number = int(what[-1])
    results = run_two(what, tmp_path)
    assert results[number][0] == status
    other, out, error = results[1 - number]
    assert other not in (0, None) and "over" not in out
    told = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and told[0].startswith(sentence)
    assert "run the same command again in all processes" in told[0]


def test_processes_that_finish_exit_with_status_0(tmp_path):
    results = run_two("nothing in 2", tmp_path)
    assert [status for status, _, _ in results] == [0, 0]
    assert all("over" in out and not error for _, out, error in results)
