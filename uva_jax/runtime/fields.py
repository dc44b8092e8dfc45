"""Dataclass fields that declare one setting each: its type, default, comment and range.

A section of the configuration is a frozen dataclass. Each field is made by `setting` or holds
another section. `specs` lists the settings of a section by dotted name.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


@dataclass(frozen=True)
class Rule:
    """The allowed values of a setting; in a tuple or mapping they hold for each value.

    Attributes:
      comment: description of the setting.
      above, least, below, most: lower bound (exclusive, inclusive) and upper bound (exclusive,
        inclusive) of a number.
      also: allowed numbers outside the bounds, with a special meaning.
      choices: the allowed values; empty: no restriction.
      length: of a tuple; None: any.
      free: the setting is a mapping with keys chosen by the user.
      added: the setting is newer than results that people have; they stay up to date while it
        has its default, which is what they were made with.
      refuses: returns what is wrong with a value, or None.
    """

    comment: str
    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None
    also: tuple = ()
    choices: tuple = ()
    length: int | None = None
    free: bool = False
    added: bool = False
    refuses: Callable[[Any], str | None] | None = None

    @property
    def range(self) -> str:
        """The bounds or the choices in words; "" if there are none."""
        if self.choices:
            return " or ".join(map(repr, self.choices))
        parts = [
            f"{word} {value:.10g}"
            for word, value in (("above", self.above), ("below", self.below))
            if value is not None
        ]
        if self.least is not None:
            parts.insert(0, f"{self.least:.10g} or more")
        if self.most is not None:
            parts.append(f"at most {self.most:.10g}")
        return ", or ".join([*(f"{x:.10g}" for x in self.also), " and ".join(parts)])

    def allows(self, number: float) -> bool:
        """Whether a number is finite and within the bounds."""
        if number in self.also:
            return True
        return (
            math.isfinite(number)
            and (self.above is None or number > self.above)
            and (self.least is None or number >= self.least)
            and (self.below is None or number < self.below)
            and (self.most is None or number <= self.most)
        )


def setting(default: Any, comment: str, **rule) -> Any:
    """Returns a dataclass field for one setting; `rule` holds the other attributes of `Rule`."""
    metadata = {"rule": Rule(comment, **rule)}
    if isinstance(default, Mapping):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Spec:
    """One setting as declared: its dotted name, type, default and rule."""

    name: str
    kind: Any
    default: Any
    rule: Rule

    def refusal(self, value: Any) -> str | None:
        """Returns a sentence that says what is wrong with a value, or None."""
        if self.rule.free:
            values = list(value.values()) if isinstance(value, Mapping) else None
            kind = typing.get_args(self.kind)[1]
        elif typing.get_origin(self.kind) is tuple:
            values = value if isinstance(value, list | tuple) else None
            kind = typing.get_args(self.kind)[0]
            if self.rule.length not in (None, len(values or ())):
                values = None
        else:
            values, kind = [value], self.kind
        if values is None or not all(_is(kind, x) for x in values):
            return f"config.{self.name} should be {self.words}, but is {value!r}"
        if self.rule.choices:
            if any(x not in self.rule.choices for x in values):
                shown = ", ".join(map(repr, self.rule.choices))
                return f"config.{self.name} is {value!r}; it can be {shown}"
        elif kind in (int, float) and not all(map(self.rule.allows, values)):
            each = "" if values == [value] else "each "
            return (
                f"config.{self.name} is {value!r}, but must be {each}{self.rule.range or 'finite'}"
            )
        if self.rule.refuses and (wrong := self.rule.refuses(value)):
            return f"config.{self.name} is {value!r}, but {wrong}"
        return None

    @property
    def words(self) -> str:
        """The type in words."""
        if not self.rule.free:
            return _words(self.kind, self.rule.length)
        return f"a mapping whose values are each {_words(typing.get_args(self.kind)[1])}"


def _words(kind: Any, length: int | None = None) -> str:
    if typing.get_origin(kind) is not tuple:
        return _NAMES[kind]
    each = {int: "whole numbers", float: "numbers", str: "texts"}[typing.get_args(kind)[0]]
    return f"a tuple of {each}" if length is None else f"a tuple of {length} {each}"


def _is(kind: Any, value: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(
            _is(typing.get_args(kind)[0], x) for x in value
        )
    return type(value) is kind


def specs(section: Any, prefix: str = "") -> dict[str, Spec]:
    """Returns every setting of a section instance by dotted name; its values are the defaults."""
    found = {}
    kinds = typing.get_type_hints(type(section))
    for field in dataclasses.fields(section):
        name, value = f"{prefix}{field.name}", getattr(section, field.name)
        rule = field.metadata.get("rule")
        if rule is None:
            found |= specs(value, f"{name}.")
        elif isinstance(value, Mapping) and not rule.free:
            kind = typing.get_args(kinds[field.name])[1]
            found |= {f"{name}.{k}": Spec(f"{name}.{k}", kind, v, rule) for k, v in value.items()}
        else:
            found[name] = Spec(name, kinds[field.name], value, rule)
    return found
