"""`python -m uva_jax import`: recordings of Libero, robomimic and UMI as replay buffers.

    python -m uva_jax import --kind libero data/libero_10 --out libero_10.zarr
    python -m uva_jax import --kind robomimic image_abs.hdf5 --out tool_hang.zarr
    python -m uva_jax import --kind zarr cup.zarr.zip --task cup --out cup.zarr

An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from uva_jax.data.import_recordings import LAYOUTS, open_hdf5, write_recordings
from uva_jax.data.import_zarr import open_zarr
from uva_jax.runtime.errors import UserError, exit_status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m uva_jax import",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="SRC", help="files or folders")
    parser.add_argument(
        "--kind",
        required=True,
        choices=(*LAYOUTS, "zarr"),
        help="libero: *_demo.hdf5, one a task; robomimic: image_abs.hdf5; zarr: upstream's own "
        "buffers, whose images have codecs that only Python's imagecodecs reads",
    )
    parser.add_argument("--out", required=True, type=Path, help="the replay buffer to write")
    parser.add_argument("--limit", type=int, help="take the first LIMIT episodes of every file")
    parser.add_argument(
        "--task", action="append", help="zarr: a file's task as a sentence, once for every SRC"
    )
    parser.add_argument(
        "--vocabulary",
        type=Path,
        help="zarr: the folder of CLIP's vocab.json, to read the sentences of a Libero cache",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; bad input is one sentence and status 2."""
    args = _parser().parse_args(argv)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}, but at least one episode is needed")
    if args.kind == "zarr":
        recordings = open_zarr(args.sources, args.task, args.vocabulary, args.limit)
    elif args.task or args.vocabulary:
        raise UserError("--task and --vocabulary go with --kind zarr only")
    else:
        recordings = open_hdf5(args.kind, args.sources, args.limit)
    with tqdm(unit="step", unit_scale=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        buffer = write_recordings(args.out, recordings, progress=show)
    arrays = ", ".join(f"{k} {buffer.shape(k)[1:]}" for k in buffer.keys)
    print(f"{args.out}: {buffer.n_episodes} episodes, {buffer.n_steps} steps of {arrays}")
    for number, task in enumerate(buffer.tasks):
        print(f"  {int((buffer.episode_task == number).sum())} episodes: {task}")


if __name__ == "__main__":
    sys.exit(main())
