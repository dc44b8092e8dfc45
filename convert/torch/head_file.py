"""Reads a grafted head from an exported file with torch alone, without running code in the file.

A checkpoint's payload holds UVA's configuration as objects, which torch.load refuses with
weights_only=True. So an export has a second pickle, `head.pkl`, in the same zip: plain containers
with only the head's tensors, which share the bytes of the payload's.

It is part of the exported `grafted_head.py` (`convert/standalone.py`), so it must run with Python
3.8 and torch 2.0.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path

import torch

PREFIX = "model.diffactloss."
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_head(path: str | os.PathLike) -> tuple[dict, dict[str, torch.Tensor]]:
    """Reads the `action_head` of the architecture, and the head's tensors by name.

    Args:
      path: a .ckpt file; or a .safetensors file, with the .json of the same name in its folder.

    Raises:
      ValueError: the file holds no grafted head that this project exported.
    """
    path = Path(path)
    described, state = (_safetensors if path.suffix == ".safetensors" else _checkpoint)(path)
    config = described.get("policy", {}).get("action_head") or {}
    if config.get("kind") != "grafted":
        raise ValueError(
            f"{path} holds no grafted action head, or was not written by this version: export the "
            "graft again with 'python -m convert to_torch'"
        )
    own = {name[len(PREFIX) :]: v for name, v in state.items() if name.startswith(PREFIX)}
    return config, own


def _checkpoint(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    try:
        payload = torch.load(_plain(path), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # it holds objects, as UVA's own checkpoints do
        return {}, {}
    if not isinstance(payload, dict) or "uva_jax" not in payload:
        return {}, {}
    return json.loads(payload["uva_jax"]), payload["state_dicts"]["ema_model"]


def _plain(path: Path) -> Path | io.BytesIO:
    """Returns the checkpoint with `head.pkl` as its `data.pkl`, or its path if it has none."""
    if not zipfile.is_zipfile(path):
        return path
    part = io.BytesIO()
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(part, "w") as copy:
        names = whole.namelist()
        pickles = [name for name in names if name.endswith("/head.pkl")]
        if not pickles:
            return path
        root = pickles[0][: -len("head.pkl")]
        pickled = whole.read(pickles[0])
        copy.writestr(root + "data.pkl", pickled)
        # The texts of a pickle include the names of its storages.
        texts = {value for _, value, _ in pickletools.genops(pickled) if isinstance(value, str)}
        wanted = {"version", "byteorder"} | {"data/" + text for text in texts}
        for name in names:
            if name[len(root) :] in wanted:
                copy.writestr(name, whole.read(name))
    part.seek(0)
    return part


def _safetensors(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    state = {}
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(size))
        for name, entry in entries.items():
            if name.startswith(PREFIX):
                start, end = entry["data_offsets"]
                file.seek(8 + size + start)
                values = torch.frombuffer(
                    bytearray(file.read(end - start)), dtype=_DTYPES[entry["dtype"]]
                )
                state[name] = values.reshape(entry["shape"])
    return described, state
