"""Converts checkpoints: `python -m convert inspect | from_torch | to_torch | latents | verify`.

Bad input prints one sentence on stderr and returns status 2; a failed check returns status 1.
"""

from __future__ import annotations

import argparse
import sys

from uva_jax.runtime.errors import UserError, exit_status
from uva_jax.runtime.startup import quiet_libraries

# Each command imports the modules it needs; only `verify CKPT` needs torch.


def _architecture(args: argparse.Namespace):
    from convert.architecture import given_architecture

    return given_architecture(args.like, args.architecture)


def _inspect(args: argparse.Namespace) -> int:
    from convert import describe

    found = describe.describe(args.checkpoint, _architecture(args))
    print(describe.as_json(found) if args.json else describe.as_text(found))
    return 0


def _from_torch(args: argparse.Namespace) -> int:
    from convert.from_torch import from_torch

    config, info = from_torch(
        args.checkpoint, args.out, weights=args.weights, architecture=_architecture(args)
    )
    count = sum(info["dtypes"].values())
    print(f"{args.checkpoint}: {count} tensors of the {info['weights']} weights -> {args.out}")
    for name, why in info["ignored"].items():
        print(f"left out: {name} ({why})")
    for note in info["contradictions"]:
        print(f"note: {note}; the tensors are used")
    if config.action_head is None:
        print("note: it has no action head, so it cannot be grafted; `sample` shows its video")
    return 0


def _to_torch(args: argparse.Namespace) -> int:
    from convert.to_torch import export_policy

    facts = export_policy(args.policy, args.out, format=args.format, base=args.base)
    print(
        f"{args.policy} -> {args.out}: {facts['tensors']} tensors as "
        f"{' and '.join(facts['state_dicts'])}, {facts['bytes'] / 1e6:.1f} MB"
    )
    if "head" in facts:
        print(f"{facts['head']}: its head as a torch module")
    return 0


def _latents(args: argparse.Namespace) -> int:
    from convert.latents import convert_latents

    widths = convert_latents(args.latents, args.out)
    print(f"{args.latents} -> {args.out}: {', '.join(f'{k} ({n})' for k, n in widths.items())}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    if (args.checkpoint is None) == (args.fixtures is None):
        raise UserError("give verify either a checkpoint or --fixtures DIR")
    if args.fixtures is not None:
        from convert.checks.fixtures import verify_folder

        checks = verify_folder(args.fixtures, only=tuple(args.only or ()))
    else:
        from convert.checks.verify import verify_checkpoint

        checks = verify_checkpoint(
            args.checkpoint, weights=args.weights, architecture=_architecture(args)
        )
    return 0 if all(check.ok for check in checks) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert", description="Converts PyTorch checkpoints of UVA."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    unsaid = argparse.ArgumentParser(add_help=False)
    unsaid.add_argument(
        "--like",
        metavar="NAME",
        help="for a file without cfg: the published policy that it equals, such as pusht",
    )
    unsaid.add_argument(
        "--architecture", metavar="FILE", help="for a file without cfg: its policy.json"
    )

    command = commands.add_parser("inspect", parents=[unsaid], help="describe a checkpoint")
    command.add_argument("checkpoint", metavar="CKPT")
    command.add_argument("--json", action="store_true", help="print json")
    command.set_defaults(run=_inspect)

    command = commands.add_parser(
        "from_torch", parents=[unsaid], help="convert a checkpoint to a policy folder"
    )
    command.add_argument("checkpoint", metavar="CKPT")
    command.add_argument("out", metavar="OUT", help="the policy folder to write")
    command.add_argument("--weights", choices=("ema", "model"), default="ema")
    command.set_defaults(run=_from_torch)

    command = commands.add_parser("to_torch", help="convert a policy folder to a checkpoint")
    command.add_argument("policy", metavar="POLICY", help="a policy folder")
    command.add_argument("out", metavar="OUT", help="a .ckpt or .safetensors file to write")
    command.add_argument(
        "--format", choices=("ckpt", "safetensors"), help="by default the suffix of OUT"
    )
    command.add_argument(
        "--base", metavar="CKPT", help="take cfg, pickles, dtypes and language tower from CKPT"
    )
    command.set_defaults(run=_to_torch)

    command = commands.add_parser("latents", help="convert upstream's language_latents.pkl to .npz")
    command.add_argument("latents", metavar="PKL")
    command.add_argument("out", metavar="OUT.npz")
    command.set_defaults(run=_latents)

    command = commands.add_parser(
        "verify",
        parents=[unsaid],
        help="compare the port with PyTorch, or with a folder of reference outputs",
    )
    command.add_argument("checkpoint", metavar="CKPT", nargs="?")
    command.add_argument("--weights", choices=("ema", "model"), default="ema")
    command.add_argument("--fixtures", metavar="DIR", help="a folder in the golden format")
    command.add_argument(
        "--only", metavar="NAME", nargs="+", help="check only these files of the folder"
    )
    command.set_defaults(run=_verify)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""

    def run() -> int:
        args = _parser().parse_args(argv)
        quiet_libraries()
        return args.run(args)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
