"""Imports recordings of Libero, robomimic and UMI as replay buffers:

    python -m uva_jax import --kind libero data/libero_10 --out libero_10.zarr
    python -m uva_jax import --kind robomimic image_abs.hdf5 --out tool_hang.zarr
    python -m uva_jax import --kind zarr cup.zarr.zip --task cup --out cup.zarr

An interrupted run resumes when the command is run again.
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
        help="libero: *_demo.hdf5, one per task; robomimic: image_abs.hdf5; zarr: upstream's own "
        "buffers, whose image codecs need the package imagecodecs",
    )
    parser.add_argument("--out", required=True, type=Path, help="the replay buffer to write")
    parser.add_argument("--limit", type=int, help="import the first LIMIT episodes of every file")
    parser.add_argument(
        "--task", action="append", help="zarr: the task of a SRC as a sentence, once for each SRC"
    )
    parser.add_argument(
        "--vocabulary",
        type=Path,
        help="zarr: folder of CLIP's vocab.json, to decode the sentences of a Libero cache",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; bad input prints one sentence on stderr and returns status 2."""
    args = _parser().parse_args(argv)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}, but must be at least 1")
    if args.kind == "zarr":
        recordings = open_zarr(args.sources, args.task, args.vocabulary, args.limit)
    elif args.task or args.vocabulary:
        raise UserError("--task and --vocabulary need --kind zarr: leave them out")
    else:
        recordings = open_hdf5(args.kind, args.sources, args.limit)
        for note in (note for recording in recordings for note in recording.notes):
            print(note)
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
