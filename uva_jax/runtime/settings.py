"""Checks a ConfigDict against the declared settings and turns its sections into dataclasses.

`Settings` nests the sections, whose fields hold every setting's type, default, comment and range.
`defaults` makes the ConfigDict that configuration files change. The module does not import jax, so
that a wrong configuration is refused at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ml_collections import ConfigDict, FrozenConfigDict

from uva_jax.runtime import fields, sections, sections_graft
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.fields import Spec, setting
from uva_jax.runtime.sections_training import PretrainOptions

T = TypeVar("T")
_WHERE = "python -m uva_jax settings lists them"
_MAPPINGS = (Mapping, ConfigDict, FrozenConfigDict)


@dataclass(frozen=True)
class Settings(sections.Section):
    """All settings. Defaults are the published schedule.

    Stage 1: 8k samples, 200 epochs. Stage 2: 10% of the data, 50k steps.
    """

    seed: int = setting(
        0, "seed of random weights, sample order and noise", least=0, most=sections.LARGEST_SEED
    )
    precision: str = setting(
        "auto",
        "dtype of matrix products: float32, bfloat16, or auto (bfloat16 on GPU and TPU)",
        choices=("auto", "float32", "bfloat16"),
    )
    teacher: sections.TeacherOptions = field(default_factory=sections.TeacherOptions)
    data: sections.DataOptions = field(default_factory=sections.DataOptions)
    mesh: sections.MeshOptions = field(default_factory=sections.MeshOptions)
    distributed: sections.DistributedOptions = field(default_factory=sections.DistributedOptions)
    head: sections_graft.HeadOptions = field(default_factory=sections_graft.HeadOptions)
    capture: sections_graft.CaptureOptions = field(default_factory=sections_graft.CaptureOptions)
    distill: sections_graft.DistillOptions = field(default_factory=sections_graft.DistillOptions)
    finetune: sections_graft.FinetuneOptions = field(default_factory=sections_graft.FinetuneOptions)
    shorten: sections_graft.ShortenOptions = field(default_factory=sections_graft.ShortenOptions)
    pretrain: PretrainOptions = field(default_factory=PretrainOptions)
    evaluate: sections.EvaluateOptions = field(default_factory=sections.EvaluateOptions)
    export: sections.ExportOptions = field(default_factory=sections.ExportOptions)
    wandb: sections.WandbOptions = field(default_factory=sections.WandbOptions)

    def __post_init__(self):
        if self.shorten.evaluations and not self.head.replace:
            raise UserError(
                "config.shorten.evaluations shortens a grafted head, but config.head.replace=False "
                "keeps the teacher's: change one of the two"
            )


@functools.cache
def specs() -> Mapping[str, Spec]:
    """Returns the declaration of every setting by dotted name."""
    return fields.specs(Settings())


def defaults() -> ConfigDict:
    """Returns the defaults as a ConfigDict, for configuration files and command lines to change."""
    return ConfigDict(dataclasses.asdict(Settings()))


def shapes_results(name: str, value: Any) -> bool:
    """Whether a setting is part of what results were made with; see `Rule.added`.

    Args:
      name: with dots.
      value: as JSON holds it.
    """
    spec = specs().get(name)
    return spec is None or not spec.rule.added or value != json.loads(json.dumps(spec.default))


def _is_free(name: str) -> bool:
    return name in specs() and specs()[name].rule.free


def leaves(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """Returns every value by dotted name; a mapping with free keys counts as one value."""
    found = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, _MAPPINGS) and len(value) and not _is_free(name):
            found.update(leaves(value, f"{name}."))
        else:
            found[name] = value
    return found


def check_name(name: str, *, inside: bool = True) -> None:
    """Checks that a setting exists.

    Args:
      name: dotted name.
      inside: the name may also be a key of a mapping with free keys.

    Raises:
      UserError: there is no such setting.
    """
    known = specs()
    if name in known:
        return
    above = (name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1))
    if free := next(filter(_is_free, above), None):
        if inside:
            return
        raise UserError(
            f"config.{name} cannot be set alone: give all of config.{free} as one mapping, "
            f'--config.{free}="{{...}}"'
        )
    if any(other.startswith(f"{name}.") for other in known):
        raise UserError(f"config.{name} is a section, not a setting ({_WHERE})")
    close = difflib.get_close_matches(name, known, n=1)
    close = close or [k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]]
    hint = f"; did you mean config.{close[0]}?" if close else ""
    raise UserError(f"config.{name} is not a setting ({_WHERE}){hint}")


def assign(config: ConfigDict, name: str, value: Any) -> None:
    """Sets one setting by its dotted name, without checking the value; `check` does.

    Raises:
      UserError: there is no such setting.
    """
    check_name(name)
    *parents, last = name.split(".")
    for key in parents:
        config = config[key]
    with config.unlocked(), config.ignore_type():
        config[last] = value


def check(config: ConfigDict) -> FrozenConfigDict:
    """Checks names, types, ranges and choices of all settings, and the rules between them.

    Raises:
      UserError: a setting is unknown, missing or wrong; the message names it and what is allowed.
    """
    given = leaves(config)
    for name in given:
        check_name(name)
    for name, spec in specs().items():
        if name not in given:
            raise UserError(
                f"config.{name} is missing: start a configuration from configs/common.py"
            )
        value = given[name]
        plain = value.to_dict() if isinstance(value, ConfigDict | FrozenConfigDict) else value
        if wrong := spec.refusal(plain):
            raise UserError(wrong)
    section(config, Settings)  # rules between settings
    return FrozenConfigDict(config)


def section(config: Mapping, cls: type[T]) -> T:
    """Returns a section of the configuration as its dataclass; missing keys take their defaults.

    Raises:
      UserError: settings of the section contradict each other.
    """
    kinds, values = typing.get_type_hints(cls), {}
    for name in (f.name for f in dataclasses.fields(cls) if f.name in config):
        value = config[name]
        if dataclasses.is_dataclass(kinds[name]):
            value = section(value, kinds[name])
        elif isinstance(value, ConfigDict | FrozenConfigDict):
            value = value.to_dict()
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
