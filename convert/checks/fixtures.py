"""`verify --fixtures`: checks the port against a folder of reference outputs, file by file.

Sizes and configurations come from the folder's json files, so folders with other sizes work too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import jax

from convert.checks import fixtures_data, fixtures_mar, fixtures_parts, fixtures_video
from convert.checks.compare import HEADER, Check, Checks
from convert.checks.golden import Golden
from uva_jax.runtime.errors import UserError


def _is_output(key: str) -> bool:
    """Whether an array is an output, and not an input or a parameter."""
    return not {"in", "param", "params"} & set(key.split("/"))


def _end_to_end(golden: Golden, checks: Checks) -> None:
    found = sorted(golden.folder.glob("*_fixture.ckpt"))
    if not found:
        raise UserError(
            f"{golden.folder} has {golden.name}.npz, but no *_fixture.ckpt: add the checkpoint"
        )
    fixtures_parts.end_to_end(golden, checks, found[0])


def _checker(name: str) -> Callable[[Golden, Checks], None] | None:
    if name.startswith("mar_"):
        return fixtures_mar.check
    if name.startswith("vae_"):
        return fixtures_parts.vae
    return {
        "action_heads": fixtures_parts.action_heads,
        "data_path": fixtures_data.check,
        "diffusion_schedules": fixtures_parts.diffusion_schedules,
        "e2e_pusht": _end_to_end,
        "fvd": fixtures_video.check,
    }.get(name)


def verify_folder(
    folder: str | os.PathLike, *, show: Callable[[str], None] = print, only: tuple[str, ...] = ()
) -> list[Check]:
    """Checks every .npz of a folder and shows one line per output, then a summary.

    Args:
      folder: in the golden format.
      show: is called with each line.
      only: names of files (without .npz) to check; all by default.

    Returns:
      all checks; those that are not `ok` have failed.

    Raises:
      UserError: the folder holds no file that can be checked.
    """
    folder = Path(folder)
    names = [path.stem for path in sorted(folder.glob("*.npz"))]
    if unknown := set(only) - set(names):
        raise UserError(f"{folder} has no {', '.join(sorted(unknown))}; it has {', '.join(names)}")
    names = [name for name in names if not only or name in only]
    if not any(map(_checker, names)):
        raise UserError(f"{folder} holds no .npz file in the golden format; give another folder")
    everything, left_out, summaries = Checks(), {}, []
    with jax.default_matmul_precision("highest"):
        for name in names:
            checker, golden = _checker(name), Golden(folder, name)
            show(f"== {name}")
            if checker is None:
                left_out[name] = sum(map(_is_output, golden.arrays.files))
                show("not covered: this project has no code for it")
                continue
            show(HEADER)
            checks = Checks(show)
            checker(golden, checks)
            unread = [k for k in golden.arrays.files if k not in golden.used and _is_output(k)]
            if unread:
                left_out[name] = len(unread)
            summaries.append(f"{name}: {checks.summary()}")
            everything.results += checks.results
            jax.clear_caches()  # the next file does not use the compiled programs
    show("")
    for line in summaries:
        show(line)
    if left_out:
        counts = ", ".join(f"{count} in {name}" for name, count in left_out.items())
        show(f"not covered, {sum(left_out.values())} arrays: {counts}")
    show(f"all: {everything.summary()}")
    return everything.results
