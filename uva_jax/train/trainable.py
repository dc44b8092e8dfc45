"""Which parameters train in which steps: training phases, path patterns, and masks of trees.

A leaf's path is its keys joined by "/", such as "mar/encoder_blocks/0/attn/qkv/kernel". A tree is
an `nnx.State`, nested dicts, or a flat dict with such paths as keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import jax
from flax import nnx

from uva_jax.models.losses import ACTION_MODES, VIDEO_MODES
from uva_jax.models.policy_config import TASK_MODES
from uva_jax.runtime.errors import UserError

# The task modes whose loss reaches a part of the policy; other parts are reached in every mode.
_TRAINED_IN = {
    "vae": (),
    "text_model": (),
    "normalizer": (),
    "video_head": VIDEO_MODES,
    "wrist_head": VIDEO_MODES,
    "action_head": ACTION_MODES,
}
# The task modes that do not use an input of MAR; see `MAR.embed`.
_UNUSED_IN = {
    "z_proj": frozenset({"policy_model"}),
    "z_proj_wrist": frozenset({"policy_model"}),
    "fake_latent_wrist_x": frozenset({"inverse_model"}),
    "z_proj_cond": frozenset({"inverse_model"}),
    "fake_action_latent": frozenset({"dynamic_model"}),
    "action_proj_cond": frozenset(TASK_MODES) - {"dynamic_model"},
}


class Phase(NamedTuple):
    """A phase of training: from step `start` on, the leaves at `trainable` (sorted) train."""

    start: int
    trainable: tuple[str, ...]


def training_phases(
    paths: Iterable[str],
    *,
    task_modes: Collection[str],
    freeze_encoder: bool = False,
    freeze: Sequence[str] = (),
    unfreeze_at: Mapping[int, Sequence[str]] | None = None,
) -> tuple[Phase, ...]:
    """Returns the phases of a policy's training.

    The VAE, the language tower and the normaliser never train, nor do heads and inputs that the
    loss of the task modes does not reach, because weight decay alone would shrink them.

    Args:
      paths: of all the policy's variables, as from `tree_paths`.
      task_modes: the modes that training draws from.
      freeze_encoder: freeze all of MAR before its decoder.
      freeze: patterns of further frozen leaves.
      unfreeze_at: step -> patterns of leaves that train from then on.

    Returns:
      phases in order, the first with start 0; a step that changes nothing has no phase.

    Raises:
      UserError: a pattern matches nothing or only leaves that never train, or nothing trains.
    """
    paths = tuple(paths)
    reached = {path for path in paths if _is_reached(path, frozenset(task_modes))}
    frozen = set(matching(paths, freeze))
    if freeze_encoder:
        frozen |= {path for path in paths if _is_encoder(path)}
    phases = [Phase(0, tuple(sorted(reached - frozen)))]
    for step, patterns in sorted((int(k), v) for k, v in (unfreeze_at or {}).items()):
        if step < 0:
            raise UserError(f"unfreeze_at names step {step}, but steps count from 0")
        for pattern in patterns:
            freed = matching(paths, [pattern])
            if not freed & reached:
                raise UserError(
                    f"unfreeze_at[{step}] names {pattern!r}, which the training loss does not "
                    f"reach in {', '.join(sorted(task_modes))}: leave it out"
                )
            frozen -= freed
        phase = Phase(step, tuple(sorted(reached - frozen)))
        if step == 0:
            phases = [phase]
        elif phase.trainable != phases[-1].trainable:
            phases.append(phase)
    if not phases[0].trainable:
        raise UserError(
            "freeze and freeze_encoder leave no parameter that trains at step 0: freeze less, or "
            "name something under unfreeze_at[0]"
        )
    return tuple(phases)


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """Returns the phase of `step` (from 0)."""
    return [phase for phase in phases if phase.start <= step][-1]


def _is_reached(path: str, modes: frozenset[str]) -> bool:
    part, _, rest = path.partition("/")
    if part in _TRAINED_IN:
        return not modes.isdisjoint(_TRAINED_IN[part])
    layer = rest.split("/")[0] if part == "mar" else ""
    return not modes <= _UNUSED_IN.get(layer, frozenset())


def _is_encoder(path: str) -> bool:
    return path.startswith("mar/") and not path.startswith(("mar/decoder_", "mar/diffusion_"))


# ---- paths and patterns ----


def tree_paths(tree) -> tuple[str, ...]:
    """Returns the path of every leaf."""
    return tuple(path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0])


def matching(paths: Iterable[str], patterns: Iterable[str]) -> frozenset[str]:
    """Returns the paths that match a pattern, or that have a parent that does.

    "mar/decoder_norm" matches all below it; "*", "?" and "[...]" work as in file names, and "*"
    also matches "/".

    Raises:
      UserError: a pattern matches nothing; the message names similar paths.
    """
    paths = tuple(paths)
    parents = {path: _with_parents(path) for path in paths}
    known = frozenset().union(*parents.values())
    found: set[str] = set()
    plain: set[str] = set()
    for pattern in patterns:
        if pattern in known:
            plain.add(pattern)
            continue
        hits = [p for p in paths if fnmatchcase(p, pattern) or fnmatchcase(p, f"{pattern}/*")]
        if not hits:
            close = difflib.get_close_matches(pattern, sorted(known), n=3, cutoff=0.5)
            options = close or sorted({path.split("/")[0] for path in paths})
            raise UserError(
                f"the pattern {pattern!r} matches no parameter; there are {', '.join(options)}"
            )
        found.update(hits)
    found.update(path for path in paths if not plain.isdisjoint(parents[path]))
    return frozenset(found)


def partition(tree, patterns: Iterable[str]):
    """Splits a tree into the leaves that match a pattern and the others.

    Both parts have the type of the tree, without empty branches. `Phase.trainable` can serve as
    patterns.

    Raises:
      UserError: a pattern matches nothing.
    """
    chosen = matching(tree_paths(tree), patterns)
    if isinstance(tree, nnx.State):
        parts: tuple[list, list] = ([], [])
        for keys, variable in nnx.to_flat_state(tree):
            parts["/".join(map(str, keys)) not in chosen].append((keys, variable))
        return tuple(nnx.from_flat_state(part) for part in parts)
    return _pick(tree, chosen, True), _pick(tree, chosen, False)


def combine(one, other):
    """Returns one tree with the leaves of both; the inverse of `partition`."""
    if isinstance(one, nnx.State):
        return nnx.merge_state(one, other)
    result = dict(one)
    for key, value in other.items():
        result[key] = combine(result[key], value) if key in result else value
    return result


def _pick(tree: Mapping, chosen: frozenset[str], wanted: bool, prefix: str = "") -> dict:
    result = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            if inner := _pick(value, chosen, wanted, f"{prefix}{key}/"):
                result[key] = inner
        elif (f"{prefix}{key}" in chosen) == wanted:
            result[key] = value
    return result


def _with_parents(path: str) -> frozenset[str]:
    keys = path.split("/")
    return frozenset("/".join(keys[: i + 1]) for i in range(len(keys)))


def path_name(path: tuple) -> str:
    """Returns the name of a leaf's path, without the "value" inside an `nnx.Variable`."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
