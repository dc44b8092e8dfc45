"""Reads folders of reference outputs in the golden format, and makes modules from them.

A folder holds pairs <name>.npz and <name>.json, recorded from the original's code: inputs, draws,
outputs, and parameters or the formula that fills them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import infer, rules
from uva_jax.models import surgery
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import PolicyConfig, VAEConfig
from uva_jax.models.vae import VAE
from uva_jax.runtime.errors import UserError

SAMPLED = 5e-4  # relative, for outputs of a sampling loop
SINGLE = 2e-5  # relative, for a single pass


class Golden:
    """One `<name>.npz` with its json; arrays are read on demand as float32.

    The json is `<name>.json`, or `<name>_..._fill.json` if there are only weights to fill.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        path = folder / f"{name}.npz"
        if not path.exists():
            raise UserError(f"{path} does not exist: give a folder in the golden format")
        self.arrays = np.load(path, allow_pickle=False)
        sides = [folder / f"{name}.json", *sorted(folder.glob(f"{name}_*_fill.json"))]
        side = next((side for side in sides if side.exists()), None)
        self.facts: dict = json.loads(side.read_text()) if side else {}
        self.used: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.arrays.files

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self:
            raise UserError(
                f"{self.folder / self.name}.npz has no array {key!r}: record the folder again"
            )
        self.used.add(key)
        values = self.arrays[key]
        return values.astype(np.float32) if values.dtype == np.float16 else values

    def keys(self, prefix: str = "") -> list[str]:
        """Returns the names that start with `prefix`, in the order of the file."""
        return [key for key in self.arrays.files if key.startswith(prefix)]

    def children(self, prefix: str) -> list[str]:
        """Returns the next path element of every name below `prefix`, each once."""
        rest = [key[len(prefix) :] for key in self.keys(prefix)]
        return list(dict.fromkeys(r.split("/")[0] for r in rest if "/" in r))

    def bound(self, key: str, *, sampled: bool = False) -> float:
        """Returns the error bound of an output.

        It is 20 times the recorded error of float32, and at least 2e-5 of the maximum (5e-4 if
        `sampled`).
        """
        entry = self.facts.get("f32_vs_f64", {}).get(key, {})
        largest = float(np.abs(self[key].astype(np.float64)).max(initial=0.0))
        scale = max(entry.get("max_abs", 0.0), largest)
        least = (SAMPLED if sampled else SINGLE) * scale
        return max(20 * entry.get("max_abs_diff", 0.0), least)


def uniform(index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the golden format's deterministic numbers in [0, 1), float64."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint32) + np.uint32(index * 0x9E3779B9 % 2**32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return (x.astype(np.float64) / 2**32).reshape(shape)


def hash_fill(index: int, shape: tuple[int, ...], center: float, amp: float) -> np.ndarray:
    """Returns the deterministic weights of the golden format."""
    return (center + amp * (2 * uniform(index, shape) - 1)).astype(np.float32)


def filled(entries: list[Mapping]) -> dict[str, np.ndarray]:
    """Returns the arrays of a json's `fill` list by name."""
    return {
        e["name"]: np.zeros(e["shape"], np.float32)
        if "const" in e
        else hash_fill(e["index"], tuple(e["shape"]), e["center"], e["amp"])
        for e in entries
    }


def load_module(
    make: Callable[[nnx.Rngs], nnx.Module],
    tensors: Mapping[str, np.ndarray],
    torch_prefix: str,
    flax_prefix: str,
) -> nnx.Module:
    """Makes a module from torch tensors by the rule table.

    Args:
      make: makes the module.
      tensors: by torch name below `torch_prefix`.
      torch_prefix, flax_prefix: of the module's names in a policy.

    Raises:
      UserError: the tensors do not fit the table or the module.
    """
    targets, _, problems = rules.plan(torch_prefix + name for name in tensors)
    if problems:
        raise UserError(f"the reference tensors do not fit the rule table: {'; '.join(problems)}")
    arrays = {
        path.removeprefix(flax_prefix): jnp.asarray(
            np.ascontiguousarray(
                layout.forward(tensors[name.removeprefix(torch_prefix)].astype(np.float32))
            )
        )
        for path, (name, layout) in targets.items()
    }
    return surgery.replace(nnx.eval_shape(lambda: make(nnx.Rngs(0))), arrays)


def mar_policy(golden: Golden, **overrides) -> Policy:
    """Returns the policy of a mar_<task> file; its unused VAE has zeros.

    `overrides` replace fields of the MARConfig.
    """
    policy = surgery.abstract_policy(_mar_config(golden, overrides))
    expected = surgery.shapes(policy)
    arrays = {
        path: jnp.zeros(leaf.shape, leaf.dtype)
        for path, leaf in expected.items()
        if path.startswith("vae/")
    }
    for key in golden.keys("param/"):
        found = rules.to_flax("model." + key.removeprefix("param/"))
        if found is None:
            raise UserError(f"{golden.name}: the rule table has no line for {key}")
        path, layout = found
        arrays[path] = jnp.asarray(np.ascontiguousarray(layout.forward(golden[key])))
    return surgery.replace(policy, arrays)


def _mar_config(golden: Golden, overrides: Mapping) -> PolicyConfig:
    """Returns the architecture, inferred from the json's values as from a checkpoint's cfg."""
    facts = golden.facts
    levels = int(facts["vae_stride"]).bit_length()
    vae = VAEConfig(
        ch=32,
        ch_mult=(1,) * levels,
        num_res_blocks=1,
        attn_levels=(),
        z_channels=facts["vae_embed_dim"],
    )
    stand_in = surgery.shapes(nnx.eval_shape(lambda: VAE(vae, rngs=nnx.Rngs(0))))
    shapes = {}
    for path, leaf in stand_in.items():
        name, layout = rules.to_torch("vae/" + path)
        shapes[name] = layout.inverse(np.broadcast_to(np.float32(0), leaf.shape)).shape
    shapes |= {f"model.{name}": tuple(shape) for name, shape in facts["params"].items()}
    policy = {
        "autoregressive_model_params": {
            **{key: facts[key] for key in ("img_size", "patch_size", "temperature")},
            "num_sampling_steps": str(facts["num_sampling_steps"]),
            "act_diff_testing_steps": str(facts["act_diff_testing_steps"]),
            "act_diff_training_steps": facts["act_diff_training_steps"],
        },
        "action_model_params": {"act_model_type": facts["act_model_type"]},
        "different_history_freq": bool(facts.get("different_history_freq")),
    }
    heads = {f"{side}_num_heads": facts["num_heads"] for side in ("encoder", "decoder")}
    cfg = {
        "task": {"name": facts["task_name"]},
        "model": {"policy": policy},
        "fixture": heads,
    }
    config = infer.infer_config(shapes, cfg, golden.name)
    return dataclasses.replace(config, mar=dataclasses.replace(config.mar, **overrides))
