"""Work that `test_cli_bench.py` has timed in other processes."""

import time

from uva_jax.cli.bench_turns import Work


def build(backend, *, dtype, name):
    if name == "broken":
        raise ValueError("no such example")
    return {"sleep": Work(lambda: time.sleep(0.06 if name == "slow" else 0.001), 0.0)}
