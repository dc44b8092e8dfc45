"""Measures the speed of conversion and of training steps, and compares it with alternatives."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from uva_jax.cli import bench_conversion, bench_training
from uva_jax.runtime.errors import exit_status
from uva_jax.storage.atomic import write_json


def _run(args: argparse.Namespace) -> int:
    if args.what == "training":
        result = bench_training.bench_training(args.size, args.batch)
        text = bench_training.table(result)
    else:
        result = bench_conversion.bench_conversion(args.size, args.out)
        text = bench_conversion.table(result)
    print(text)
    if args.json is not None:
        write_json(args.json, result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m uva_jax bench", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    conversion = commands.add_parser(
        "conversion", help="convert a whole policy in both directions and copy its file"
    )
    conversion.add_argument(
        "--out", metavar="DIR", type=Path, help="folder for temporary files (5 GB for pusht)"
    )
    training = commands.add_parser(
        "training", help="run a training step here and of the same model in PyTorch"
    )
    training.add_argument("--batch", type=int, default=16, help="windows of a step")
    for command in (conversion, training):
        command.add_argument("--size", choices=bench_conversion.SIZES, default="pusht")
        command.add_argument("--json", metavar="FILE", type=Path, help="write the results to FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; bad input prints one sentence on stderr and returns status 2."""
    args = _parser().parse_args(argv)
    return exit_status(lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
