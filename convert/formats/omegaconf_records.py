"""Converts OmegaConf configurations, read as inert records, to plain values and back.

UVA pickles its configuration as an OmegaConf DictConfig with unresolved interpolations
(`${task.name}`). They are resolved by OmegaConf's rules (2.1 to 2.4): an absolute path starts at
the root; each leading dot goes one container up, starting with the one that holds the value. Of
resolvers only `${eval:...}` is evaluated, if it is arithmetic (`arithmetic.py`).
"""

import re
from collections.abc import Mapping

from convert.formats import arithmetic
from convert.formats.pickle_records import Global, Record
from uva_jax.runtime.errors import UserError

# A configuration of UVA has about 300 values and 20 thousand characters.
MAX_VALUES = 200_000
MAX_CHARACTERS = 20_000_000
_KEY = r"[^.\[\]:${}\s'\"]+"
_PATH = re.compile(rf"(\.*)((?:{_KEY}|\[{_KEY}\])(?:\.{_KEY}|\[{_KEY}\])*)")
_EVAL = re.compile(r"\$\{\s*eval\s*:\s*(['\"]?)(.*)\1\s*\}", re.DOTALL)
_DICT = Global("omegaconf.dictconfig", "DictConfig")
_LIST = Global("omegaconf.listconfig", "ListConfig")
_LEAF = Global("omegaconf.nodes", "AnyNode")
_ANY = Global("typing", "Any")


def to_plain(config: object, name: str) -> dict:
    """Converts a configuration (a DictConfig record, or plain values) to plain values.

    Interpolations are replaced by their target's value, and arithmetic in `${eval:...}` by its
    result. Missing values (`???`), and interpolations without a target, with a cyclic one or with
    another resolver (`${oc.env:...}`), stay as text.

    Args:
      config: the configuration.
      name: its name in error messages.

    Raises:
      UserError: it is not a configuration.
    """
    budget = _Budget()
    try:
        raw = _raw(config, budget)
        if not isinstance(raw, dict):
            raise ValueError("it is not a dictionary")
        return _expand(raw, (), frozenset(), budget)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        detail = "it is nested without end" if isinstance(error, RecursionError) else error
        raise UserError(
            f"{name} has a configuration (cfg) that cannot be read ({detail}): give a checkpoint "
            "whose cfg was written by OmegaConf 2.1 or later"
        ) from None


class _Budget:
    """Limits the values to which nested references can expand."""

    def __init__(self) -> None:
        self.values, self.characters = MAX_VALUES, MAX_CHARACTERS

    def spend(self, value: object) -> None:
        self.values -= 1
        self.characters -= len(value) if isinstance(value, str) else 0
        if min(self.values, self.characters) < 0:
            raise ValueError("it expands to too many values")


def _raw(value: object, budget: _Budget) -> object:
    """Converts nodes to dictionaries, lists and leaves; interpolations stay as text."""
    budget.spend(value)
    if isinstance(value, Record) and isinstance(value.function, Global):
        if value.module.split(".")[0] == "omegaconf" and isinstance(value.state, dict):
            return _raw(value.state["_content" if "_content" in value.state else "_val"], budget)
    if isinstance(value, dict):
        return {key: _raw(part, budget) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_raw(part, budget) for part in value]
    return value


# Below, `chain` holds the containers from the root to the one that holds the value, and `active`
# the references being resolved, each as (text, id of its container).


def _expand(value: object, chain: tuple, active: frozenset, budget: _Budget) -> object:
    budget.spend(value)
    if isinstance(value, dict):
        return {k: _expand(v, (*chain, value), active, budget) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(part, (*chain, value), active, budget) for part in value]
    if isinstance(value, str) and "${" in value:
        return _interpolate(value, chain, active, budget)
    return value


def _interpolate(text: str, chain: tuple, active: frozenset, budget: _Budget) -> object:
    if not chain or (text, id(chain[-1])) in active:
        return text
    budget.spend(text)
    active = active | {(text, id(chain[-1]))}
    pieces = _split(text)
    out = []
    for piece, is_reference in pieces:
        value = _resolved(piece, chain, active, budget) if is_reference else piece
        if len(pieces) == 1:
            return value
        # Inside a longer text only a scalar is allowed.
        out.append(piece if isinstance(value, dict | list) else str(value))
    result = "".join(out)
    budget.spend(result)
    return result


def _split(text: str) -> list[tuple[str, bool]]:
    """Splits text into whole `${...}` parts (True), with balanced brackets, and the rest."""
    pieces, literal, position = [], 0, 0
    while (start := text.find("${", position)) >= 0:
        depth, end = 1, start + 2
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth:
            break
        position = end
        if start and text[start - 1] == "\\":  # escaped: not an interpolation
            continue
        pieces += [(text[literal:start], False), (text[start:end], True)]
        literal = end
    return [piece for piece in (*pieces, (text[literal:], False)) if piece[0]]


def _resolved(piece: str, chain: tuple, active: frozenset, budget: _Budget) -> object:
    """Returns the value of `${...}`, or the text itself if there is none."""
    if called := _EVAL.fullmatch(piece):
        expression = (
            _interpolate(called[2], chain, active, budget) if "${" in piece[2:] else called[2]
        )
        try:
            value = arithmetic.evaluate(expression)
        except ValueError:
            return piece
        for part in value if isinstance(value, list) else ():
            budget.spend(part)
        return value
    target = _target(piece, chain, active, budget)
    return piece if target is None else _expand(*target, active, budget)


def _target(piece: str, chain: tuple, active: frozenset, budget: _Budget) -> tuple | None:
    """Returns the target of `${...}` as (raw value, its chain), or None."""
    inner = piece[2:-1].strip()
    if "${" in inner:
        inner = _interpolate(inner, chain, active, budget)
    match = _PATH.fullmatch(inner) if isinstance(inner, str) else None
    if match is None or len(match[1]) > len(chain):
        return None
    chain = chain[: len(chain) - len(match[1]) + 1] if match[1] else chain[:1]
    node, chain = chain[-1], chain[:-1]
    for key in re.findall(_KEY, match[2]):
        if isinstance(node, str) and "${" in node:
            # This part of the path is itself a reference to a container.
            reference = (node, id(chain[-1])) not in active and _split(node) == [(node, True)]
            active = active | {(node, id(chain[-1]))}
            found = _target(node, chain, active, budget) if reference else None
            if found is None:
                return None
            node, chain = found
        number = int(key) if key.isdecimal() and len(key) < 10 else None
        if isinstance(node, dict) and (key in node or number in node):
            chain, node = (*chain, node), node[key if key in node else number]
        elif isinstance(node, list) and number is not None and number < len(node):
            chain, node = (*chain, node), node[number]
        else:
            return None
    return None if node == "???" else (node, chain)


def records_from_dict(plain: Mapping) -> Record:
    """Returns a record that OmegaConf loads as the DictConfig `OmegaConf.create(plain)`.

    Args:
      plain: keys are str, int, float or bool; values are None, bool, int, float, str, bytes,
        mappings, lists and tuples.

    Raises:
      UserError: there is another key or value.
    """
    if not isinstance(plain, Mapping):
        raise UserError("a configuration must be a dictionary: give nested plain values")
    return _node(plain, None, None, "cfg")


def _node(value: object, key: object, parent: Record | None, where: str) -> Record:
    node = Record(_LEAF, new=True)
    metadata = {
        "ref_type": _ANY,
        "object_type": None,
        "optional": True,
        "key": key,
        "flags": {},
        "flags_root": False,
        "resolver_cache": Record(
            Global("collections", "defaultdict"), (Global("builtins", "dict"),)
        ),
    }
    kind, held = Global("omegaconf.base", "Metadata"), "_val"
    if isinstance(value, Mapping):
        node.function, held = _DICT, "_content"
        metadata |= {"object_type": Global("builtins", "dict"), "key_type": _ANY}
        for name in value:
            if type(name) not in (str, int, float, bool):
                raise UserError(f"{where} has the key {name!r}, but keys must be texts or numbers")
        content = {k: _node(v, k, node, f"{where}.{k}") for k, v in value.items()}
    elif isinstance(value, list | tuple):
        node.function, held = _LIST, "_content"
        metadata |= {
            "object_type": Global("builtins", "list"),
            "key_type": Global("builtins", "int"),
        }
        content = [_node(v, i, node, f"{where}[{i}]") for i, v in enumerate(value)]
    elif value is None or type(value) in (bool, int, float, str, bytes):
        content = value
    else:
        kind = f"{type(value).__module__}.{type(value).__name__}"
        raise UserError(f"{where} is a {kind}, but must be a plain value: convert it")
    if held == "_content":
        kind, metadata["element_type"] = Global("omegaconf.base", "ContainerMetadata"), _ANY
    node.state = {
        "_metadata": Record(kind, new=True, state=metadata),
        "_parent": parent,
        held: content,
    }
    return node
