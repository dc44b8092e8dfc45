"""Digests of a run's artifacts, for comparing two runs.

Times and paths, which differ between runs, and resumable states are left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from tests.campaign.runs import STAGES
from uva_jax.runtime.metrics import read_metrics
from uva_jax.storage.policy_arrays import read as read_arrays

FOLDERS = dict(zip(STAGES, STAGES, strict=True)) | {
    **{"encode": "latents", "convert": "teacher", "capture": "activations"},
    **{"distill": "operators", "assemble": "grafted", "evaluate": "eval"},
}
_STORES = ("latents", "activations")  # written chunk by chunk under their final names
_RECORDS = {"done.json", "started.json", "report.html"}
_STATES = ("states", "states_decoder", "cross_attn_state", "blocks_state", "phase0")
_OF_THE_RUN = {
    "seconds",
    "policy_seconds",
    "simulator_seconds",
    "peak_memory",
    "time",
    "source",
    "file",
}


def digests(workdir: Path, stage: str) -> dict[str, str]:
    """Returns the SHA-256 of each artifact of a stage by name."""
    folder = workdir / FOLDERS[stage]
    found = {str(path.relative_to(workdir)): _digest(path) for path in _artifacts(folder)}
    lines = [_without(line) for line in read_metrics(workdir, stage)]
    return found | {f"metrics.jsonl of {stage}": _sha(json.dumps(lines).encode())}


def all_digests(workdir: Path, stages: Sequence[str]) -> dict[str, dict[str, str]]:
    return {stage: digests(workdir, stage) for stage in stages}


def differing(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Returns the names of artifacts that are missing, unexpected or different."""
    return sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))


def half_written(workdir: Path, stage: str, wanted: Mapping[str, str]) -> list[str]:
    """Returns the artifacts of an unfinished stage that have their final names but are incomplete.

    Stores that are written chunk by chunk record that they are unfinished.
    """
    folder = workdir / FOLDERS[stage]
    if folder.name in _STORES:
        return []
    found = {str(p.relative_to(workdir)): p for p in _artifacts(folder)}
    bad = []
    for name in found.keys() & wanted.keys():
        try:
            if _digest(found[name]) != wanted[name]:
                bad.append(name)
        except Exception as error:  # readers raise various errors for half a file
            bad.append(f"{name} ({type(error).__name__})")
    return bad


def size(workdir: Path, stage: str) -> int:
    """Returns the bytes of a stage's folder on disk."""
    paths = (workdir / FOLDERS[stage]).rglob("*")
    return sum(p.stat().st_blocks * 512 for p in paths if p.is_file())


def largest_file(workdir: Path, stage: str) -> int:
    return max(p.stat().st_size for p in (workdir / FOLDERS[stage]).rglob("*") if p.is_file())


def _artifacts(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if path.name in _RECORDS or path.name in _STATES or path.name.startswith("."):
            continue
        if path.is_dir() and path.name != "params":
            yield from _artifacts(path)
        else:
            yield path


def _digest(path: Path) -> str:
    if path.is_dir():
        digest = hashlib.sha256()
        for name, array in sorted(read_arrays(path).items()):
            values = np.asarray(array.load())
            digest.update(f"{name} {values.dtype} {values.shape}".encode() + values.tobytes())
        return digest.hexdigest()
    if path.suffix == ".json":
        return _sha(json.dumps(_without(json.loads(path.read_text()))).encode())
    return _sha(path.read_bytes())


def _without(value):
    """Returns a JSON value without what differs between runs."""
    if isinstance(value, dict):
        return {k: _without(v) for k, v in sorted(value.items()) if k not in _OF_THE_RUN}
    return [_without(v) for v in value] if isinstance(value, list) else value


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
