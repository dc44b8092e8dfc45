"""`inspect`: describes a checkpoint from its file alone.

Only what is printed is loaded: names, shapes, the configuration and the normaliser's numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import numpy as np

from convert.architecture import contradictions, infer_policy
from convert.formats import torch_file
from convert.formats.pickle_records import loads
from convert.formats.torch_file import Checkpoint, LazyTensor
from convert.state_dicts import WEIGHTS, dtype_counts, state_dicts, state_tensors
from uva_jax.models.policy_config import PolicyConfig, to_dict
from uva_jax.runtime.errors import UserError

_PARTS = (
    ("VAE", "vae_model."),
    ("language tower", "text_model."),
    ("video head", "model.diffloss."),
    ("wrist head", "model.diffloss_wrist."),
    ("action head", "model.diffactloss."),
    ("proprioception head", "model.diffproploss."),
    ("transformer", "model."),
    ("normaliser", "normalizer."),
)
_KINDS = {"mlp": "original", "grafted": "grafted export", None: "video-only"}
_STATS = ("min", "max", "mean", "std")


def describe(path: str | os.PathLike, architecture: PolicyConfig | None = None) -> dict:
    """Describes a checkpoint as plain JSON values.

    Args:
      path: the file.
      architecture: for a file without cfg.

    Returns:
      "file", "megabytes", "sha256", "task", "kind" ("original", "video-only" without an action
      head, or "grafted export"), "config_file" (the matching file of configs/), "state_dicts"
      (entries and MB of each), "weights" (the described ones), "dtypes", "parts" (parameters and
      MB of each), "normalizer" (range and statistics of each field), "sampling", "progress" (plain
      values of the pickles), "contradictions" (between cfg and tensors), "architecture".

    Raises:
      UserError: the file is missing, damaged or not a UVA policy.
    """
    checkpoint = torch_file.read(path)
    states = state_dicts(checkpoint)
    if not set(WEIGHTS.values()) & set(states):
        state_tensors(checkpoint, "ema")  # raises an error that lists what the file holds
    weights = "ema" if "ema_model" in states else "model"
    tensors = state_tensors(checkpoint, weights)
    config = infer_policy(checkpoint, tensors, architecture)
    head = config.action_head
    return {
        "file": checkpoint.path.name,
        "megabytes": _megabytes(checkpoint.path.stat().st_size),
        "sha256": checkpoint.sha256(),
        "task": config.task,
        "kind": _KINDS[head and head.kind],
        "config_file": config_file(config),
        "state_dicts": {str(name): _state_size(state) for name, state in states.items()},
        "weights": weights,
        "dtypes": dtype_counts(tensors),
        "parts": _parts(tensors),
        "normalizer": _normalizer(config, tensors),
        "sampling": _sampling(config),
        "progress": _progress(checkpoint),
        "contradictions": contradictions(checkpoint, config),
        "architecture": to_dict(config),
    }


def config_file(config: PolicyConfig) -> str:
    """Returns the file of configs/ that fits a policy's task and size."""
    task = config.task.lower()
    for name in ("libero10", "toolhang"):
        if name in task:
            return f"configs/{name}.py"
    if "umi" in task:
        return "configs/umi_multi.py"
    if "multi" in task or config.mar.text_dim and "pusht" in task:
        return "configs/pusht_multitask.py"
    small = config.mar.encoder_embed_dim < 768  # the narrowest of the original's presets
    return "configs/pusht_tiny.py" if small else "configs/pusht.py"


def config_file_of(path: str | os.PathLike) -> str:
    """Returns the file of configs/ that fits a checkpoint.

    Raises:
      UserError: the file is missing, damaged or not a UVA policy.
    """
    checkpoint = torch_file.read(path)
    weights = "ema" if WEIGHTS["ema"] in state_dicts(checkpoint) else "model"
    return config_file(infer_policy(checkpoint, state_tensors(checkpoint, weights)))


def _megabytes(count: int) -> float:
    return round(count / 1e6, 3)


def _state_size(state: object) -> dict:
    """Returns entries and size of a state dict, counting tensors at any depth."""
    tensors, pending = [], [state]
    while pending:
        value = pending.pop()
        if isinstance(value, LazyTensor):
            tensors.append(value)
        elif isinstance(value, Mapping):
            pending.extend(value.values())
        elif isinstance(value, list | tuple):
            pending.extend(value)
    return {"tensors": len(tensors), "megabytes": _megabytes(sum(t.nbytes for t in tensors))}


def _parts(tensors: Mapping[str, LazyTensor]) -> dict[str, dict]:
    parts: dict[str, dict] = {}
    for name, tensor in tensors.items():
        part = next((part for part, prefix in _PARTS if name.startswith(prefix)), "other")
        entry = parts.setdefault(part, {"parameters": 0, "bytes": 0})
        entry["parameters"] += tensor.size
        entry["bytes"] += tensor.nbytes
    return {
        part: {"parameters": entry["parameters"], "megabytes": _megabytes(entry["bytes"])}
        for part, entry in sorted(parts.items(), key=lambda item: -item[1]["parameters"])
        if entry["parameters"]
    }


def _normalizer(config: PolicyConfig, tensors: Mapping[str, LazyTensor]) -> dict[str, dict]:
    fields = {}
    for name, width in config.normalizer_fields:
        prefix = f"normalizer.params_dict.{name}."
        stats = {
            key: np.asarray(tensors[f"{prefix}input_stats.{key}"].numpy(), np.float64).tolist()
            for key in _STATS
            if f"{prefix}input_stats.{key}" in tensors
        }
        fields[name] = {"width": width} | stats
    return fields


def _sampling(config: PolicyConfig) -> dict:
    heads = {"action": config.action_head, "video": config.video_head}
    steps = {f"{name}_steps": head.sampling_steps for name, head in heads.items() if head}
    return steps | {
        "temperature": config.temperature,
        "rounds": config.num_iter,
        "guidance": config.cfg,
        "guidance_schedule": config.cfg_schedule,
        "observations": config.n_obs_steps,
        "actions_executed": config.n_action_steps,
        "actions_predicted": config.action_head.n_actions if config.action_head else 0,
    }


def _progress(checkpoint: Checkpoint) -> dict:
    """Returns the plain values among the pickles, such as global_step and epoch."""
    pickles = checkpoint.payload.get("pickles")
    found = {}
    for name, data in pickles.items() if isinstance(pickles, Mapping) else ():
        if isinstance(name, str) and isinstance(data, bytes):
            try:
                value = loads(data, name)
            except UserError:
                continue  # it cannot be read without running it
            if isinstance(value, int | float | str):
                found[name] = value
    return found


def as_json(found: Mapping) -> str:
    """Formats the description as json."""
    return json.dumps(found, indent=1)


def as_text(found: Mapping) -> str:
    """Formats the description as text."""
    mar, head = found["architecture"]["mar"], found["architecture"]["action_head"]
    vae, video = found["architecture"]["vae"], found["architecture"]["video_head"]
    lines = [
        f"{found['file']}: {found['kind']} UVA policy for {found['task']}, "
        f"{found['megabytes']:.1f} MB",
        f"sha256        {found['sha256']}",
        f"config        {found['config_file']}",
        f"images        {found['architecture']['image_size']} px, {mar['n_frames']} frames of "
        f"{mar['grid'][0]} x {mar['grid'][1]} tokens",
        f"VAE           base width {vae['ch']}, multipliers {_join(vae['ch_mult'])}, "
        f"{vae['z_channels']} latent channels",
        f"transformer   encoder {_tower(mar, 'encoder')}, decoder {_tower(mar, 'decoder')}",
        f"inputs        {', '.join(_inputs(mar))}",
        f"action head   {_action_head(head)}",
    ]
    if video is not None:
        lines.append(f"video head    {video['depth']} blocks x {video['width']}")
    lines.append(
        "sampling      "
        + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in found["sampling"].items())
    )
    if found["progress"]:
        lines.append("training      " + ", ".join(f"{k} {v}" for k, v in found["progress"].items()))
    lines += [f"note: {note}; the tensors are used" for note in found["contradictions"]]
    lines += ["", f"{'state dict':<22}{'tensors':>12}{'MB':>10}"]
    for name, size in found["state_dicts"].items():
        lines.append(f"{name:<22}{size['tensors']:>12,}{size['megabytes']:>10.2f}")
    if "ema_model" not in found["state_dicts"]:
        lines.append("no EMA weights: convert with --weights model")
    types = ", ".join(f"{count} {name}" for name, count in found["dtypes"].items())
    lines += ["", f"{'part (' + found['weights'] + ')':<22}{'parameters':>12}{'MB':>10}   {types}"]
    for name, size in found["parts"].items():
        lines.append(f"{name:<22}{size['parameters']:>12,}{size['megabytes']:>10.2f}")
    lines += ["", "normaliser fields (columns: smallest .. largest)"]
    for name, field in found["normalizer"].items():
        pairs = zip(field.get("min", ()), field.get("max", ()), strict=True)
        lines.append(f"{name:<22}" + ", ".join(f"{low:g} .. {high:g}" for low, high in pairs))
    if not found["normalizer"]:
        lines.append("none")
    return "\n".join(lines)


def _action_head(head: Mapping | None) -> str:
    if head is None:
        return "none: trained for video alone (python -m uva_jax sample shows its predictions)"
    kind = head["aggregator"] if head["kind"] == "mlp" else f"grafted, {head['cross_attention']}"
    return (
        f"{kind}: {head['depth']} blocks x {head['width']}, {head['n_actions']} actions of "
        f"{head['channels']}"
    )


def _join(values) -> str:
    return " ".join(map(str, values))


def _tower(mar: Mapping, side: str) -> str:
    depth, width, heads = (mar[f"{side}_{k}"] for k in ("depth", "embed_dim", "num_heads"))
    return f"{depth} blocks x {width} ({heads} heads)"


def _inputs(mar: Mapping) -> list[str]:
    return ["images"] + [
        what
        for present, what in (
            (mar["text_dim"], f"language ({mar['text_dim']})"),
            (mar["history_action"], "past actions"),
            (mar["proprio_dim"], f"proprioception ({mar['proprio_dim']})"),
            (mar["proprio_image"] or mar["wrist"], "wrist camera"),
        )
        if present
    ]
