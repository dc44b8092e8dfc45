"""`python -m uva_jax bench`: what conversion and a training step cost, beside the alternatives."""

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
        "conversion", help="a whole policy both ways, beside a plain copy of its file"
    )
    conversion.add_argument(
        "--out", metavar="DIR", type=Path, help="where to work (5 GB for pusht); removed afterwards"
    )
    training = commands.add_parser(
        "training", help="a training step beside the same model's in PyTorch"
    )
    training.add_argument("--batch", type=int, default=16, help="windows of that step")
    for command in (conversion, training):
        command.add_argument("--size", choices=bench_conversion.SIZES, default="pusht")
        command.add_argument("--json", metavar="FILE", type=Path, help="write the figures there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: bad input is one sentence on stderr and exit status 2."""
    args = _parser().parse_args(argv)
    return exit_status(lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
