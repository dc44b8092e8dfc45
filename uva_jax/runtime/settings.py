"""Settings: a ConfigDict comes in, checked against the defaults; frozen dataclasses go out.

`configs/common.py` holds every key with its default. A key it does not have, a value of another
type or an impossible combination is an error that names the key.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict, FrozenConfigDict

from uva_jax.runtime.errors import UserError

T = TypeVar("T")

_CHOICES = {
    "precision": ("auto", "float32", "bfloat16"),
    "teacher.weights": ("ema", "model"),
    "data.layout": ("", "umi"),
    "data.mirror": ("", "pusht"),
    "evaluate.simulator": ("", "pusht", "pusht_multitask"),
    "head.cross_attention": ("condition", "residual"),
    "head.memory": ("video", "video+aggregate"),
    "head.adapter": ("conv", "linear"),
    "head.start": ("preserve", "random"),
    "finetune.optimizer": ("adamw", "muon"),
    "pretrain.optimizer": ("adamw", "muon"),
    "pretrain.vae_training.optimizer": ("adamw", "muon"),
    "pretrain.save_dtype": ("float32", "bfloat16"),
    "capture.dtype": ("bfloat16", "float16", "float32"),
    "distill.loss.cross_attn": ("l1", "l2", "huber"),
    "distill.loss.self_attn": ("l1", "l2", "huber"),
    "distill.loss.mlp": ("l1", "l2", "huber"),
}
_POSITIVE = (
    "capture.num_samples capture.held_out capture.strip capture.batch distill.epochs "
    "distill.batch distill.lr finetune.steps finetune.batch finetune.lr finetune.accumulate "
    "finetune.noise_draws pretrain.batch pretrain.accumulate pretrain.noise_draws "
    "pretrain.steps_per_call pretrain.checkpoint_every pretrain.vae_training.batch "
    "pretrain.vae_training.accumulate pretrain.vae_training.steps_per_call "
    "pretrain.vae_training.checkpoint_every finetune.steps_per_call finetune.checkpoint_every "
    "finetune.log_every evaluate.num_seeds "
    "evaluate.max_steps evaluate.draws data.horizon"
).split()
_NOT_NEGATIVE = (
    "pretrain.steps pretrain.video_steps pretrain.vae_training.steps pretrain.vae_training.rarity "
    "pretrain.vae_training.decoder_steps pretrain.vae_training.decoder_rarity "
    "finetune.teacher_weight"
).split()
_FREE = ("finetune.unfreeze_at", "pretrain.modes")  # keys of these sections are the user's own


def leaves(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """Every setting by dotted name."""
    found = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping | ConfigDict | FrozenConfigDict) and name not in _FREE:
            found.update(leaves(value, f"{name}."))
        else:
            found[name] = value
    return found


def check_name(name: str) -> None:
    """Raises UserError unless that is a setting, or below one whose keys are the user's own."""
    from configs import common

    known = leaves(common.get_config())
    if name not in known and not name.startswith(tuple(f"{free}." for free in _FREE)):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean config.{close[0]}?" if close else ""
        raise UserError(f"config.{name} is not a setting (see configs/common.py){hint}")


def check(config: ConfigDict) -> FrozenConfigDict:
    """Checks a configuration against the defaults and each key against the others.

    Raises:
      UserError: naming the key, what was found and what would do.
    """
    from configs import common

    known, given = leaves(common.get_config()), leaves(config)
    for name in given:
        check_name(name)
    missing = [name for name in known if name not in given]
    if missing:
        raise UserError(
            f"config.{missing[0]} is missing: start a configuration from configs/common.py"
        )
    for name, default in known.items():
        value = given[name]
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            continue
        if isinstance(default, tuple) and isinstance(value, list | tuple):
            continue
        if name in _FREE and isinstance(value, Mapping | ConfigDict | FrozenConfigDict):
            continue
        if type(value) is not type(default):
            raise UserError(f"config.{name} should be {type(default).__name__}, but is {value!r}")
    for name, choices in _CHOICES.items():
        if given[name] not in choices:
            raise UserError(
                f"config.{name} is {given[name]!r}; it can be {', '.join(map(repr, choices))}"
            )
    for name in _POSITIVE:
        if given[name] <= 0:
            raise UserError(f"config.{name} is {given[name]}, but must be above 0")
    for name in _NOT_NEGATIVE:
        if given[name] < 0:
            raise UserError(f"config.{name} is {given[name]}, but must be 0 or more")
    if not 0 < given["finetune.data_fraction"] <= 1:
        raise UserError(
            f"config.finetune.data_fraction is {given['finetune.data_fraction']}; "
            "it is a share of the episodes, above 0 and at most 1"
        )
    if given["finetune.warmup"] >= given["finetune.steps"]:
        raise UserError(
            f"config.finetune.warmup is {given['finetune.warmup']}, which leaves nothing of "
            f"config.finetune.steps={given['finetune.steps']}: set it below the number of steps"
        )
    return FrozenConfigDict(config)


def section(config: Mapping, cls: type[T]) -> T:
    """A section of the configuration as a frozen dataclass whose fields it fills one to one."""
    fields = {f.name for f in dataclasses.fields(cls)}
    values = {
        key: value.to_dict() if isinstance(value, ConfigDict | FrozenConfigDict) else value
        for key, value in config.items()
        if key in fields
    }
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
