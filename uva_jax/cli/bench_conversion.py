"""`bench conversion`: measures time and memory of converting a whole policy.

The comparison is a plain copy of its file, a checkpoint with random weights in the original's
layout. It holds one state dict, `ema_model`; a training checkpoint with `model` and the optimiser's
state would only make the copy slower. Every step runs in a separate process, because peak memory is
counted per process.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert import rules
from convert.formats import torch_file
from convert.to_torch import plain_cfg
from uva_jax import assets
from uva_jax.cli.bench_turns import apart
from uva_jax.models import surgery
from uva_jax.models.policy_config import PolicyConfig
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.memory import resident

WARM_RUNS = 3


def architecture(size: str) -> PolicyConfig:
    """Returns the architecture of the published PushT policy or of the embedded one."""
    if size == "tiny":
        from convert.architecture import infer_policy
        from convert.state_dicts import state_tensors

        checkpoint = torch_file.read(assets.POLICY)
        return infer_policy(checkpoint, state_tensors(checkpoint, "ema"))
    from uva_jax.models.architectures import ARCHITECTURES

    return ARCHITECTURES[size]


def torch_shapes(config: PolicyConfig) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every tensor in the original's state dict of a policy."""
    found = {}
    for path, leaf in surgery.shapes(surgery.abstract_policy(config)).items():
        name, layout = rules.to_torch(path)
        found[name] = layout.inverse(np.broadcast_to(np.float32(0), leaf.shape)).shape
    return found


def make(path: Path, size: str, seed: int = 0) -> None:
    """Writes a checkpoint with random float32 weights in the original's layout."""
    config = architecture(size)
    shapes = torch_shapes(config)
    largest = max(int(np.prod(shape)) for shape in shapes.values())
    rng = np.random.default_rng(seed)
    # All tensors are slices of the same numbers, so that making the file takes little memory.
    pool = rng.standard_normal(2 * largest, np.float32) * np.float32(0.02)
    state = {"_dummy_variable": np.zeros(0, np.float32)}
    for name, shape in shapes.items():
        start, length = rng.integers(largest), int(np.prod(shape))
        state[name] = pool[start : start + length].reshape(shape)
    progress = {"_output_dir": "random", "global_step": 0, "epoch": 0}
    payload = {
        "cfg": torch_file.records_from_dict(plain_cfg(config)),
        "state_dicts": {"ema_model": state},
        "pickles": {name: pickle.dumps(value) for name, value in progress.items()},
    }
    torch_file.write(path, payload)


def _step(name: str, source: Path, out: Path) -> dict:
    """Runs one step and returns its time, and its memory beyond that of a process with jax."""
    if name == "make":
        make(out, str(source))
        return {}
    run = _steps()[name]
    before, start = resident("VmRSS"), time.perf_counter()
    run(source, out)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": resident("VmHWM") - before}


def _steps() -> dict[str, Callable[[Path, Path], object]]:
    import jax

    from convert.from_torch import from_torch
    from convert.to_torch import export_policy

    jax.devices()
    return {"copy": _copy, "from_torch": from_torch, "to_torch": export_policy}


def _copy(source: Path, out: Path) -> None:
    subprocess.run(["cp", source, out], check=True)
    with open(out, "rb") as file:
        os.fsync(file.fileno())  # as the conversions do


def _forget(path: Path) -> None:
    """Removes a file, or a folder's files, from the system's page cache, if it supports that."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and hasattr(os, "posix_fadvise"):
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _touch_memory(folder: Path, size: int) -> None:
    """Writes and removes a file of `size` bytes.

    A virtual machine's host can take back unused memory, and the first use of it then takes several
    times as long as a copy. So no measured step should be the first.
    """
    scratch, block = folder / "scratch", bytes(1 << 24)
    with open(scratch, "wb") as file:
        for _ in range(-(-size // len(block))):
            file.write(block)
    scratch.unlink()


def _apart(name: str, source: object, out: Path) -> dict:
    return apart("uva_jax.cli.bench_conversion", f"the step {name}", name, source, out)


def bench(size: str, folder: Path) -> dict:
    """Measures a copy and both conversions, first with an empty page cache, then with a warm one.

    Args:
      size: one of `SIZES`.
      folder: for the files.

    Returns:
      "size", "parameters", "kept" (bytes of the policy in float32), "file" (bytes), and "steps":
      for each of "copy", "from_torch" and "to_torch" its "cold" and "warm" seconds (warm: median
      of `WARM_RUNS`) and "peak" bytes of memory.

    Raises:
      UserError: a step failed.
    """
    source, policy = folder / "made.ckpt", folder / "policy"
    outputs = {"copy": folder / "copy.ckpt", "from_torch": policy, "to_torch": folder / "back.ckpt"}
    _apart("make", size, source)
    runs: dict[str, list[dict]] = {name: [] for name in outputs}
    for number in range(1 + WARM_RUNS):
        for name, out in outputs.items():
            taken = policy if name == "to_torch" else source
            _touch_memory(folder, 2 * source.stat().st_size)
            if number == 0:
                _forget(taken)
            runs[name].append(_apart(name, taken, out))
            if name == "copy" or number == WARM_RUNS:
                _remove(out if name != "from_torch" else outputs["copy"])
    parameters = sum(int(np.prod(shape)) for shape in torch_shapes(architecture(size)).values())
    result = {"size": size, "parameters": parameters, "kept": 4 * parameters}
    result["file"] = source.stat().st_size
    _remove(source)
    _remove(policy)
    return result | {
        "steps": {
            name: {
                "cold": found[0]["seconds"],
                "warm": float(np.median([run["seconds"] for run in found[1:]])),
                "peak": max(run["peak"] for run in found),
            }
            for name, found in runs.items()
        }
    }


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def table(result: dict) -> str:
    """Formats the result of `bench`."""
    lines = [
        f"{result['size']}: {result['parameters']:,} parameters, {result['file'] / 1e6:,.0f} MB, "
        "random weights; cold: the source is not in the page cache; all files are synced",
        f"{'step':<12}{'cold s':>8}{'x copy':>8}{'MB/s':>8}{'warm s':>8}{'x copy':>8}{'MB/s':>8}"
        f"{'peak MB':>9}{'x tensors':>11}",
    ]
    copy = result["steps"]["copy"]
    for name, step in result["steps"].items():
        cells = [f"{name:<12}"]
        for kind in ("cold", "warm"):
            seconds = step[kind]
            cells.append(f"{seconds:>8.2f}{seconds / copy[kind]:>8.2f}")
            cells.append(f"{result['file'] / 1e6 / seconds:>8.0f}")
        if name == "copy":
            cells.append(f"{'-':>9}{'-':>11}")
        else:
            cells.append(f"{step['peak'] / 1e6:>9.0f}{step['peak'] / result['kept']:>11.2f}")
        lines.append("".join(cells))
    return "\n".join(lines)


def bench_conversion(size: str, out: Path | None) -> dict:
    """Runs `bench` in a temporary folder, inside `out` if that is given.

    Raises:
      UserError: `out` is not a folder, or a step failed.
    """
    if out is not None and not out.is_dir():
        raise UserError(f"--out {out} is not a folder: make it, or leave out --out")
    with tempfile.TemporaryDirectory(prefix="bench", dir=out) as folder:
        return bench(size, Path(folder))


if __name__ == "__main__":
    print(json.dumps(_step(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
