"""Converts a policy to a checkpoint that the original PyTorch code loads, or to .safetensors.

A checkpoint has the original's layout (`cfg`, `state_dicts`, `pickles`) and `uva_jax`, a json text
with the architecture, which the original ignores and `from_torch` reads. Unchanged tensors keep
every bit and their dtype. The action head of a graft has the names of the module in
`torch/head.py`; everything else loads into the original with strict=True. A .safetensors file holds
one state dict under the same names. A graft is exported together with `grafted_head.py`, which runs
the head without this package (`standalone.py`).
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from convert import rules, standalone
from convert.formats import safetensors_file, torch_file
from convert.from_torch import export_records
from convert.state_dicts import WEIGHTS, state_tensors
from uva_jax.models import description, policy_folder, surgery
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import PolicyConfig, to_dict
from uva_jax.runtime.errors import UserError
from uva_jax.storage.finite import finite_when_loaded
from uva_jax.storage.lazy_array import LazyArray

_DTYPES = {
    dtype.name: dtype
    for dtype in map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
}
_HEAD = "model.diffactloss."
_MARKER = "_dummy_variable"  # an empty tensor that the original policy class registers


def torch_arrays(arrays: Mapping[str, jax.Array | LazyArray]) -> dict[str, LazyArray]:
    """Returns a policy's arrays by torch name, in torch layout and float32.

    Args:
      arrays: by flax path.

    Raises:
      UserError: a variable has no torch name.
    """
    turned, problems = {}, []
    for path, value in arrays.items():
        found = rules.to_torch(path)
        if found is None:
            problems.append(path)
        else:
            tensor = _turned(value, found[1])
            turned[found[0]] = finite_when_loaded(found[0], tensor, "the checkpoint to write")
    if problems:
        raise UserError(
            f"these parameters have no place in a PyTorch checkpoint: {', '.join(problems)}; "
            "merge or remove them before exporting the policy"
        )
    return turned


def _turned(value: jax.Array | LazyArray, layout: rules.Layout) -> LazyArray:
    def load() -> np.ndarray:
        return layout.inverse(value.load() if isinstance(value, LazyArray) else np.asarray(value))

    shape = layout.inverse(np.broadcast_to(np.float32(0), value.shape)).shape
    return LazyArray(shape, np.dtype(value.dtype), load)


def narrowed(array: LazyArray, dtype: np.dtype) -> LazyArray:
    """Returns the array in the source's dtype if that is exact, otherwise unchanged.

    So an unchanged tensor gets its original bits, and a trained one is not rounded.
    """
    if dtype == array.dtype:
        return array
    values = array.load()
    back = values.astype(dtype).astype(values.dtype)
    if not np.array_equal(back.view(np.uint32), values.view(np.uint32)):
        return array
    return LazyArray(array.shape, dtype, array.load)  # cast when it is written


def _state_dict(
    arrays: Mapping[str, LazyArray],
    described: Mapping[str, tuple[str, tuple[int, ...]]],
    kept: Mapping[str, object],
) -> OrderedDict:
    """Returns tensors in the source's order and dtypes; new ones follow in the model's order.

    Args:
      arrays: float32 values of the policy by torch name.
      described: (dtype, shape) of the source's tensors, in order.
      kept: tensors of the source that no policy holds, such as CLIP's vision tower.
    """
    result = OrderedDict()
    for name, (dtype, shape) in described.items():
        if name in arrays:
            # A grafted head can share a name, but not the shape, with the head it replaces.
            known = dtype in _DTYPES and tuple(shape) == arrays[name].shape
            result[name] = narrowed(arrays[name], _DTYPES[dtype]) if known else arrays[name]
        elif name in kept:
            result[name] = kept[name]
        elif not np.prod(shape) and rules.ignored(name):
            result[name] = np.zeros(shape, _DTYPES.get(dtype, np.float32))
    for name in arrays:
        result.setdefault(name, arrays[name])
    result.setdefault(_MARKER, np.zeros(0, np.float32))
    return result


def plain_cfg(config: PolicyConfig) -> dict:
    """Returns a configuration with the original's keys, for a policy whose source has none."""
    mar, head, video = config.mar, config.action_head, config.video_head
    ar = {
        "img_size": config.image_size,
        "vae_stride": config.vae.stride,
        "patch_size": config.patch_size,
        "vae_embed_dim": config.vae.z_channels,
        "mask_ratio_min": mar.mask_ratio_min,
        "label_drop_prob": mar.label_drop_prob,
        "attn_dropout": mar.attn_dropout,
        "proj_dropout": mar.proj_dropout,
        "num_iter": config.num_iter,
        "cfg": config.cfg,
        "cfg_schedule": config.cfg_schedule,
        "temperature": config.temperature,
        "predict_video": video is not None,
    }
    if head is not None:
        ar |= {
            "act_diff_training_steps": head.train_steps,
            "act_diff_testing_steps": head.sampling_steps,
            "diffloss_act_d": head.depth,
            "diffloss_act_w": head.width,
        }
    if video is not None:
        ar |= {
            "num_sampling_steps": video.sampling_steps,
            "diffloss_d": video.depth,
            "diffloss_w": video.width,
        }
    policy = {
        "autoregressive_model_params": ar,
        "action_model_params": {
            "predict_action": head is not None,
            "act_model_type": "conv_fc" if head is None else head.aggregator,
        },
        "n_action_steps": config.n_action_steps,
        "shift_action": config.shift_action,
        "different_history_freq": config.different_history_freq,
        "action_mask_ratio": mar.action_mask_ratio,
        "use_history_action": mar.history_action,
        "use_proprioception": bool(mar.proprio_dim),
        "predict_wrist_img": mar.wrist,
        "predict_proprioception": config.proprio_head is not None,
    }
    return {
        "name": "uva",
        "model": {"policy": policy},
        "task": {
            "name": config.task,
            "task_modes": list(config.task_modes),
            "dataset": {
                "normalizer_type": config.normalizer_type,
                "language_emb_model": config.language_model,
            },
            "env_runner": {"n_obs_steps": config.n_obs_steps},
        },
        "training": {"use_ema": True},
        "fixture": {
            f"{side}_{what}": getattr(mar, f"{side}_{what}")
            for side in ("encoder", "decoder")
            for what in ("embed_dim", "depth", "num_heads")
        },
    }


def export_policy(
    policy: Policy | str | os.PathLike,
    out: str | os.PathLike,
    *,
    format: str | None = None,
    base: str | os.PathLike | None = None,
    records: bytes | None = None,
    weights: str = "ema",
) -> dict:
    """Writes a policy as a checkpoint in the original's layout, or as safetensors.

    Args:
      policy: a policy folder, or a policy.
      out: the file to write.
      format: "ckpt" or "safetensors"; None: by the suffix of `out`.
      base: a checkpoint that gives cfg, pickles, dtypes and language tower; None: the records of
        the policy folder, or `records`.
      records: for a policy in memory, `policy_folder.read_records` of its source.
      weights: for a policy in memory, the state dict it came from, "ema" or "model". Weights are
        always written as `ema_model`, which the original runs, and also as `model` if they came
        from there.

    Returns:
      {"tensors", "bytes", "state_dicts"} of the file; for a graft also "head", the path of the
      `grafted_head.py` in its folder.

    Raises:
      UserError: the folder, the base, the format or a parameter does not fit.
    """
    safe = os.fspath(out).endswith(safetensors_file.ENDING)
    if format is not None and safe != (format == "safetensors"):
        raise UserError(
            f"--format is {format}, but the file to write is {out}: let its name end in .{format}, "
            "by which it is recognised"
        )
    origin: dict = {}
    if isinstance(policy, Policy):
        config, arrays = policy.config, surgery.flatten(policy)
    else:
        folder = policy
        config, origin = policy_folder.read_description(folder)
        arrays, records = policy_folder.read_arrays(folder), policy_folder.read_records(folder)
        weights = origin.get("weights", "ema")
    kept: dict[str, object] = {}
    if base is not None:
        checkpoint = torch_file.read(base)
        if WEIGHTS[weights] not in checkpoint.state_dict_names:
            weights = "ema" if weights == "model" else "model"
        tensors = state_tensors(checkpoint, weights)
        records = export_records(checkpoint, weights)
        kept = {name: tensor for name, tensor in tensors.items() if rules.ignored(name)}
    if records is not None:
        source = torch_file.load_records(records, "the policy's record of its source")
    else:
        source = {"cfg": None, "pickles": {}, "tensors": {}}
    state = _state_dict(torch_arrays(arrays), source["tensors"], kept)
    lost = [n for n in source["tensors"] if n not in state and rules.ignored(n)]
    if lost:
        raise UserError(
            f"the source held {len(lost)} tensors that no policy keeps ({lost[0]}, ...): "
            f"{rules.ignored(lost[0])}; give the source as --base to write them back"
        )
    head_file = None
    if config.action_head is not None and config.action_head.kind == "grafted":
        head_file = Path(out).with_name(standalone.NAME)
        standalone.check(head_file)
    if safe:
        safetensors_file.write(out, state, description.describe(config, origin))
        return _finish(out, state, ["ema_model"], head_file)
    cfg = source["cfg"]
    if cfg is None:  # the policy was made here, or its file has none
        cfg = torch_file.records_from_dict(plain_cfg(config))
    described = json.dumps({"policy": to_dict(config)})
    names = ["ema_model"] if weights == "ema" else ["model", "ema_model"]
    payload = {
        "cfg": cfg,
        "state_dicts": {name: state for name in names},
        "pickles": source["pickles"],
        "uva_jax": described,
    }
    head = None
    if head_file is not None:
        own = {name: value for name, value in state.items() if name.startswith(_HEAD)}
        head = {"state_dicts": {"ema_model": own}, "uva_jax": described}
    torch_file.write(out, payload, head)
    return _finish(out, state, names, head_file)


def _finish(
    out: str | os.PathLike, state: Mapping, names: list[str], head_file: Path | None
) -> dict:
    facts = {"tensors": len(state), "bytes": Path(out).stat().st_size, "state_dicts": names}
    if head_file is None:
        return facts
    standalone.write(head_file)
    return facts | {"head": str(head_file)}
