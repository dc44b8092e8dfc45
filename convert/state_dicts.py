"""The tensors of a checkpoint by the names that the policy's own code gives them.

Wrappers of a model in training (DataParallel, torch.compile, FSDP, activation checkpointing) add
their name to every key; it is removed here. Sharded or compressed weights are not plain tensors;
they raise an error that says what to do.
"""

from __future__ import annotations

from collections.abc import Mapping

from convert import rules
from convert.formats.pickle_records import Global, Record
from convert.formats.torch_file import Checkpoint, LazyTensor
from convert.formats.torch_tensors import described_tensor
from uva_jax.runtime.errors import UserError

WEIGHTS = {"ema": "ema_model", "model": "model"}
# Parts of keys that wrappers add: torch.nn.DataParallel and DeepSpeed, torch.compile, FSDP (of
# torch 1 and 2), torch's activation checkpointing, Lightning.
WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module")
    + ("_forward_module",)
)
# Keys of the state dict in files of Lightning and DeepSpeed.
_BARE = ("ema_model", "model", "state_dict", "module")
# Part of the name of a value's constructor -> what the value is, and how to make it a tensor.
_KINDS = {
    "DTensor": ("a DTensor, sharded over devices", "gather it (tensor.full_tensor())"),
    "ShardedTensor": ("a ShardedTensor", "gather it (FSDP's StateDictType.FULL_STATE_DICT)"),
    "qtensor": ("a quantised tensor", "dequantise it (tensor.dequantize())"),
    "Quantized": ("a quantised tensor", "dequantise it (tensor.dequantize())"),
    "sparse": ("a sparse tensor", "densify it (tensor.to_dense())"),
    "nested": ("a nested tensor", "pad it (tensor.to_padded_tensor(0.0))"),
    "meta_tensor": ("a tensor on the meta device, without data", "load the weights first"),
    "xla": ("a tensor of an XLA device", "move it to the CPU (tensor.cpu())"),
    "device_tensor": ("a tensor of another device", "move it to the CPU (tensor.cpu())"),
}
_SAVED_AGAIN = "and save the checkpoint again"


def plain_name(name: str) -> str:
    """Returns the name without all parts that wrappers have added."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def state_tensors(checkpoint: Checkpoint, weights: str) -> dict[str, LazyTensor]:
    """Returns the tensors of the chosen weights by name, without parts that wrappers have added.

    Args:
      checkpoint: the open file.
      weights: "ema" or "model".

    Raises:
      UserError: the file lacks the weights, they are sharded, compressed or not tensors, or names
        collide.
    """
    if weights not in WEIGHTS:
        raise UserError(f"--weights is {weights!r}; it can be {' or '.join(WEIGHTS)}")
    held = state_dicts(checkpoint)
    if WEIGHTS[weights] not in held:
        there = ", ".join(map(str, held)) or "none at all"
        other = [name for name, key in WEIGHTS.items() if key in held]
        hint = f"try --weights {other[0]}" if other else "give a checkpoint of UVA's training"
        raise UserError(
            f"{checkpoint.path} has no {weights} weights (state dict {WEIGHTS[weights]!r}); its "
            f"state dicts are: {there}; {hint}"
        )
    raw = held[WEIGHTS[weights]]
    if not isinstance(raw, dict):
        raise UserError(
            f"{checkpoint.path}: {WEIGHTS[weights]} is not a state dict; give a checkpoint that "
            "UVA's training saved"
        )
    tensors: dict[str, LazyTensor] = {}
    origin: dict[str, str] = {}
    for name, value in raw.items():
        if not isinstance(name, str):
            raise UserError(
                f"{checkpoint.path}: {name!r} in {WEIGHTS[weights]} is not a tensor's name; the "
                "file is not a UVA checkpoint"
            )
        plain = plain_name(name)
        if plain in tensors:
            raise UserError(
                f"{checkpoint.path} holds {plain} twice, as {origin[plain]!r} and as {name!r}: "
                "it mixes two models; remove one of them"
            )
        tensors[plain], origin[plain] = _tensor(checkpoint, name, value), name
    return tensors


def state_dicts(checkpoint: Checkpoint) -> dict[str, object]:
    """Returns the file's "state_dicts".

    If there are none, a state dict that the file is, or that it holds under a key of other
    programs, is returned as "model" or "ema_model".
    """
    payload = checkpoint.payload
    if not isinstance(payload, dict):
        return {}
    if isinstance(payload.get("state_dicts"), dict):
        return payload["state_dicts"]
    for key in _BARE:
        if _is_policy(payload.get(key)):
            found = {k: payload[k] for k in WEIGHTS.values() if _is_policy(payload.get(k))}
            return found or {"model": payload[key]}
    return {"model": payload} if _is_policy(payload) else {}


def _is_policy(state: object) -> bool:
    """Whether a state dict is that of a UVA policy, and not of an image MAR or a VAE."""
    return isinstance(state, dict) and any(
        isinstance(name, str) and plain_name(name).startswith("model.z_proj_cond.")
        for name in state
    )


def _tensor(checkpoint: Checkpoint, name: str, value: object) -> LazyTensor:
    tensor = described_tensor(value)
    if name.rpartition(".")[2] in ("flat_param", "_flat_param"):
        raise UserError(
            f"{checkpoint.path}: {name} is FSDP's shard of many weights in one: gather them "
            f"(StateDictType.FULL_STATE_DICT) {_SAVED_AGAIN}"
        )
    if tensor is None:
        found = _kind(value)
        if found is None:
            raise UserError(
                f"{checkpoint.path}: entry {name!r} of the state dict is not a tensor; the file is "
                "not a UVA checkpoint"
            )
        what, remedy = found
        raise UserError(f"{checkpoint.path}: {name} is {what}: {remedy} {_SAVED_AGAIN}")
    if tensor.shape == (0,) and rules.ignored(plain_name(name)) is None:
        raise UserError(
            f"{checkpoint.path}: {name} has shape (0,), like the placeholders that DeepSpeed's "
            "ZeRO-3 leaves on each process: gather the weights (zero_to_fp32.py in the "
            f"checkpoint's folder) {_SAVED_AGAIN}"
        )
    return tensor


def _kind(value: object) -> tuple[str, str] | None:
    """Returns what an unsupported value is, and the remedy; None for a tensor."""
    names, pending = [], [value]
    while pending and len(names) < 100:
        part = pending.pop()
        if isinstance(part, Global):
            names.append(str(part))
        elif isinstance(part, Record):
            pending += [part.args, part.function]
        elif isinstance(part, tuple):
            pending += part[:8]
    for piece, kind in _KINDS.items():
        if any(piece in name and name.startswith("torch") for name in names):
            return kind
    if any(name.startswith("torch._") and "_rebuild_" in name for name in names):
        return f"made by {names[0]}, which is not read here", "make it a plain tensor (.clone())"
    return None


def dtype_counts(tensors: Mapping[str, LazyTensor]) -> dict[str, int]:
    """Returns the number of tensors of each dtype."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        counts[tensor.dtype.name] = counts.get(tensor.dtype.name, 0) + 1
    return counts
