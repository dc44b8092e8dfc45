"""Measures the speed of a policy, of the graft's stages and of conversion beside alternatives."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from uva_jax.runtime.errors import exit_status
from uva_jax.storage.atomic import write_json

SIZES = ("pusht", "tiny")
_DTYPES = ("float32", "bfloat16")


def _run(args: argparse.Namespace) -> int:
    module = importlib.import_module(f"uva_jax.cli.bench_{args.what}")
    given = {k: v for k, v in vars(args).items() if k not in ("what", "json")}
    result = getattr(module, f"bench_{args.what}")(**given)
    print(module.table(result))
    if args.json is not None:
        write_json(args.json, result)
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


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
    training.add_argument("--batch", type=_count, default=16, help="windows of a step")
    policy = commands.add_parser("policy", help="act with teacher, graft and shortened graft")
    policy.add_argument("--batch", type=_count, default=1, help="observations of a call")
    policy.add_argument(
        "--sampling-steps", type=_count, help="of teacher and graft (default: the policy's own)"
    )
    finetune = commands.add_parser("finetune", help="run a step of Stage 2")
    finetune.add_argument("--batch", type=_count, default=64, help="windows of a step")
    distill = commands.add_parser("distill", help="run a step of Stage 1 of all operators")
    distill.add_argument("--batch", type=_count, default=64, help="windows of a step")
    capture = commands.add_parser("capture", help="capture the teacher's activations")
    capture.add_argument(
        "--strips", type=_count, help="strips of windows of a step (default: the configuration's)"
    )
    stages = (policy, capture, distill, finetune)
    for command in stages:
        command.add_argument("--dtype", choices=_DTYPES, default="float32", help="of products")
        command.add_argument(
            "--compiled", action="store_true", help="also measure PyTorch with torch.compile"
        )
    for command in (conversion, training, *stages):
        command.add_argument("--size", choices=SIZES, default="pusht")
        command.add_argument("--json", metavar="FILE", type=Path, help="write the results to FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; bad input prints one sentence on stderr and returns status 2."""
    args = _parser().parse_args(argv)
    return exit_status(lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
