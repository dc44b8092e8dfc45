"""Estimates memory, FLOPs, traffic and time of a configuration on a TPU slice:

    python -m uva_jax plan --config configs/pusht.py --topology v5e:4x4

The TPU compiler (`pip install 'uva_jax[plan]'`) compiles the capture, the condition fit of Stage 1,
the step of Stage 2 and the policy call from shapes alone; chip, weights and data are not needed.
`--topology cpu:8` compiles for simulated devices instead. The estimates leave out reading data and
waiting for other hosts, and real kernels may be slower than the compiler assumes.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags
from jax.experimental import topologies
from ml_collections import config_flags

from uva_jax.cli import programs
from uva_jax.cli.plan_costs import Cost, Traffic, measure, with_loop
from uva_jax.envs.workers import usable_cores
from uva_jax.models.architectures import ARCHITECTURES
from uva_jax.models.policy_config import PolicyConfig
from uva_jax.runtime import settings as settings
from uva_jax.runtime.errors import UserError, exit_status
from uva_jax.runtime.startup import do_without_tpu

TOPOLOGIES = (
    "v4:2x2x1 v4:2x2x4 v5e:2x4 v5e:4x4 v5e:16x16 v5p:2x2x1 v5p:4x4x4 v6e:2x4 v6e:4x4"
).split()
HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # GiB per chip
GIB = 2**30


class Slice(NamedTuple):
    """The devices to compile for."""

    name: str
    devices: Sequence[jax.Device]
    hbm: float | None  # GiB per chip


def open_slice(name: str) -> Slice:
    """Returns the devices of a slice such as "v5e:4x4", or of "cpu:8", simulated devices.

    Raises:
      UserError: there is no such slice, or no compiler for it.
    """
    if match := re.fullmatch(r"cpu:([1-9]\d*)", name):
        jax.config.update("jax_num_cpu_devices", int(match[1]))
        return Slice(name, jax.devices("cpu"), None)
    family = name.split(":")[0]
    unknown = UserError(
        f"--topology {name!r} is not a slice that the compiler supports: give one of "
        f"{', '.join(TOPOLOGIES)}, or cpu:N for N simulated devices"
    )
    if family not in HBM:
        raise unknown
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"compiling for {name} needs libtpu, which is not installed: pip install "
            "'uva_jax[plan]', or give --topology cpu:8 to compile for simulated devices"
        )
    # On v4 and v5p the two cores of a chip are one device, as on real machines.
    options = {"chip_config_name": "megacore"} if family in ("v4", "v5p") else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise unknown from error
    return Slice(name, found.devices, HBM[family])


def architecture(config, name: str | None) -> PolicyConfig:
    """Returns the teacher's architecture: by name, or from its checkpoint or published file.

    Raises:
      UserError: the name is unknown, or there is neither a name nor a file.
    """
    checkpoint = config.teacher.checkpoint
    if name is None and not Path(checkpoint).is_file() and Path(checkpoint).stem in ARCHITECTURES:
        name = Path(checkpoint).stem
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if name is not None:
        raise UserError(f"--architecture is {name!r}; it can be {', '.join(ARCHITECTURES)}")
    from convert.architecture import check_graftable, infer_policy
    from convert.formats import torch_file
    from convert.state_dicts import state_tensors
    from uva_jax.pipeline.inputs import teacher_checkpoint

    found = torch_file.read(teacher_checkpoint(config))
    policy = infer_policy(found, state_tensors(found, config.teacher.weights))
    check_graftable(policy, str(found.path))
    return policy


PROGRAMS = {
    "capture": programs.capture_step,
    "distill": programs.condition_fit,
    "finetune": programs.finetune_step,
    "policy": programs.policy_call,
}

# ---- the table ----


def table(rows: Sequence[tuple[programs.Program, Cost]], hbm: float | None) -> str:
    """Formats the costs, with one column per program."""
    lines = [["", *(p.name for p, _ in rows)], ["chips", *(str(p.chips) for p, _ in rows)]]

    def line(label, show):
        lines.append([label, *(show(p, c) for p, c in rows)])

    for name in ("arguments", "outputs", "temporaries", "code"):
        line(f"{name}, MiB per chip", lambda p, c, n=name: _number(c.memory.get(n), 2**20))
    line("memory in total, GiB per chip", lambda p, c: _number(c.total, GIB))
    if hbm is not None:
        line("  share of the chip's", lambda p, c: f"{c.total / GIB / hbm:.0%}")
    line("TFLOP per chip", lambda p, c: _number(c.flops, 1e12))
    line("TFLOP on all chips", lambda p, c: _number(c.flops, 1e12 / p.chips))
    kinds = sorted({kind for _, cost in rows for kind in cost.traffic})
    for kind in kinds:
        line(f"{kind}, count", lambda p, c, k=kind: str(c.traffic.get(k, Traffic(0, 0)).count))
        line("  MiB per chip", lambda p, c, k=kind: _number(c.traffic.get(k, (0, 0))[1], 2**20))
    if not kinds:
        line("collectives", lambda p, c: "-" if c.needed else "none")
    line("ms at best", lambda p, c: _number(c.seconds, 1e-3))
    line("steps of the stage", lambda p, c: f"{p.steps:,}" if p.steps else "-")
    line("stage at best", lambda p, c: _duration(c.seconds and p.steps and c.seconds * p.steps))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in lines
    )


def _number(value: float | None, unit: float) -> str:
    if value is None:
        return "-"
    value /= unit
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float | None) -> str:
    if not seconds:
        return "-"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.3g} s"


def hints(rows: Sequence[tuple[programs.Program, Cost]], hbm: float | None) -> list[str]:
    """Returns a sentence for every program that does not fit, or hardly fits."""
    found = []
    for program, cost in rows:
        share = cost.total / GIB / hbm if hbm else 0
        if cost.needed is None and share <= 0.9:
            continue
        said = "does not fit" if cost.needed is not None or share > 1 else "hardly fits"
        change = "; or ".join(program.advice) or "a slice with more memory per chip"
        found.append(
            f"{program.name} {said}: it needs {cost.total / GIB:.1f} of {hbm} GiB per chip. "
            f"Change: {change}."
        )
    return found


# ---- the command ----


class Row(NamedTuple):
    """A program of `PROGRAMS`, its cost, and the seconds of its compilation."""

    key: str
    program: programs.Program
    cost: Cost
    seconds: float


def compile_all(keys: Sequence[str], jobs: int, *facts) -> Iterator[Row]:
    """Compiles programs and yields each when it is compiled.

    Args:
      keys: of `PROGRAMS`.
      jobs: programs compiled at a time; the compiler uses about two cores for each.
      facts: arguments of the functions in `PROGRAMS`.
    """

    def compile_one(key: str) -> Row:
        start = time.monotonic()
        program = PROGRAMS[key](*facts)
        cost = functools.reduce(with_loop, program.loops, measure(program.lowered))
        return Row(key, program, cost, time.monotonic() - start)

    with futures.ThreadPoolExecutor(jobs) as pool:
        # The longest compilation starts first, so that a short one ends last.
        order = sorted(keys, key=["finetune", "capture", "policy", "distill"].index)
        running = [pool.submit(compile_one, key) for key in order]
        try:
            yield from (done.result() for done in futures.as_completed(running))
        finally:
            pool.shutdown(cancel_futures=True)


def run(config, topology: str, name: str | None, only: Sequence[str], jobs: int = 1) -> None:
    """Compiles programs of a configuration and prints their costs.

    Args:
      config: the configuration.
      topology: a slice, see `open_slice`.
      name: of a published architecture, or None for that of the configuration's checkpoint.
      only: keys of `PROGRAMS`; empty: all.
      jobs: programs compiled at a time.

    Raises:
      UserError: an argument is unknown, or the configuration does not fit the slice.
    """
    from uva_jax.pipeline import inputs

    config = settings.check(config)
    if unknown := [x for x in only if x not in PROGRAMS]:
        raise UserError(f"--only names {unknown[0]!r}; it can be {', '.join(PROGRAMS)}")
    where, teacher = open_slice(topology), architecture(config, name)
    on_cpu = where.hbm is None
    dtype = inputs.compute_dtype(config, where.devices[0].platform)
    products = "float32" if dtype is None else "bfloat16"
    hosts = len({d.process_index for d in where.devices})
    memory = "" if on_cpu else f", {where.hbm} GiB each"
    print(f"{topology}: {len(where.devices)} chips on {hosts} host(s){memory}; {products} products")
    print(
        f"{teacher.task}: {programs.parameters(teacher) / 1e6:.1f} M parameters, "
        f"{teacher.image_size} px, {teacher.mar.n_tokens} tokens per window\n"
    )
    # With cross_attention="residual", or without a graft, there is no condition to fit.
    fitted = config.head.replace and config.head.cross_attention == "condition"
    keys = list(dict.fromkeys(only)) or [k for k in PROGRAMS if fitted or k != "distill"]
    print(f"compiling {', '.join(keys)}", flush=True)
    found = {}
    for key, program, cost, seconds in compile_all(
        keys, jobs, config, teacher, where.devices, dtype
    ):
        found[key] = (program, cost)
        print(f"compiled {program.name} ({program.about}): {seconds:.0f} s", flush=True)
    rows = [found[key] for key in keys]
    print(f"\n{table(rows, where.hbm)}\n")
    print(
        "FLOPs and times are the compiler's estimates, without input and waiting for collectives; "
        "Stage 1 also fits the blocks."
    )
    for hint in hints(rows, where.hbm):
        print(hint)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; bad input prints one sentence on stderr and returns status 2."""
    # An existing chip is not used, because another process may be using it.
    do_without_tpu()
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    jax.config.update("jax_platforms", "cpu")
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file(
        "config", None, "Configuration file (see configs/).", flag_values=values
    )
    topology = flags.DEFINE_string(
        "topology", None, f"Slice: {', '.join(TOPOLOGIES)} or cpu:N.", flag_values=values
    )
    name = flags.DEFINE_string(
        "architecture",
        None,
        f"Published architecture, in place of a checkpoint: {', '.join(ARCHITECTURES)}.",
        flag_values=values,
    )
    only = flags.DEFINE_list("only", [], f"Programs: {', '.join(PROGRAMS)}.", flag_values=values)
    jobs = flags.DEFINE_integer(
        "jobs",
        max(1, usable_cores() // 2),
        "Programs compiled at a time; the compiler uses about two cores for each.",
        lower_bound=1,
        flag_values=values,
    )
    try:
        rest = values(["plan", *(sys.argv[1:] if argv is None else argv)])[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        print(f"error: {error} (python -m uva_jax settings lists every setting)", file=sys.stderr)
        return 2

    def command() -> None:
        if rest or config.value is None or topology.value is None:
            raise UserError(
                "say what to plan and for what: --config configs/pusht.py --topology v5e:4x4"
            )
        run(config.value, topology.value, name.value, only.value, jobs.value)

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
