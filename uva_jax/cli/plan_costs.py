"""The compiler's estimates of a program's cost: memory, operations, collectives and time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax

from uva_jax.cli import programs


class Traffic(NamedTuple):
    """Collectives of one kind: their number, and the bytes of their results on each chip."""

    count: int
    size: int


class Cost(NamedTuple):
    """The cost of a compiled program on each chip; memory in bytes, `seconds` is an estimate.

    If the program does not fit, `needed` is the memory that the compiler asked for, and the other
    fields are unknown.
    """

    memory: Mapping[str, int] = {}
    flops: float | None = None
    seconds: float | None = None
    traffic: Mapping[str, Traffic] = {}
    needed: float | None = None

    @property
    def total(self) -> float:
        """Bytes in use at once; a result that reuses an argument's memory counts once."""
        if self.needed is not None:
            return self.needed
        return sum(self.memory.values())


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_OUT_OF_MEMORY = (
    r"\(([\d.]+)([KMGT]?)\) exceeds available HBM",
    r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm",
)
_COLLECTIVE = re.compile(
    r" = (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def collectives(text: str) -> dict[str, Traffic]:
    """Returns the collectives of a program by kind, from its HLO text; a loop's count once."""
    found: dict[str, Traffic] = {}
    for line in text.splitlines():
        if not (match := _COLLECTIVE.search(line)):
            continue
        result, kind, started = match.groups()
        sizes = [
            math.prod(map(int, dims.split(","))) * max(8, int(bits or 8)) // 8
            for _, bits, dims in _SHAPE.findall(result)
            if dims  # scalars are flags of the asynchronous form
        ]
        if started and kind != "all-reduce":  # (operands, results)
            sizes = sizes[len(sizes) // 2 :]
        before = found.get(kind, Traffic(0, 0))
        found[kind] = Traffic(before.count + 1, before.size + sum(sizes))
    return found


def measure(lowered: jax.stages.Lowered) -> Cost:
    """Compiles a program and returns the compiler's estimates."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        for pattern in _OUT_OF_MEMORY:
            if match := re.search(pattern, str(error)):
                return Cost(needed=float(match[1]) * _UNITS[match[2]])
        raise
    stats, counted = compiled.memory_analysis(), compiled.cost_analysis() or {}
    seconds = counted.get("optimal_seconds", 0)
    return Cost(
        memory={
            "arguments": stats.argument_size_in_bytes,
            "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
            "code": stats.generated_code_size_in_bytes,
        },
        flops=counted.get("flops"),
        seconds=seconds if seconds > 0 else None,
        traffic=collectives(compiled.as_text()),
    )


def with_loop(cost: Cost, loop: programs.Loop) -> Cost:
    """Returns the cost with the loop's further iterations added."""
    if cost.needed is not None:
        return cost
    body = measure(loop.body)

    def add(one, more):
        return None if one is None or more is None else one + loop.more * more

    return cost._replace(flops=add(cost.flops, body.flops), seconds=add(cost.seconds, body.seconds))
