"""Language latents of tasks, from a file or from the policy's own language tower."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uva_jax.data.clip_tokenizer import LENGTH, ClipTokenizer
from uva_jax.models.policy import Policy
from uva_jax.runtime.errors import UserError
from uva_jax.storage import safetensors

_FLOATS = ("float64", "float32", "float16", "bfloat16")
_SHOWN = 12  # tasks of a file that an error lists


def task_latents(
    tasks: Sequence[str], *, policy: Policy, path: str = "", vocabulary: str = ""
) -> np.ndarray:
    """Returns the language latents of tasks.

    Args:
      tasks: sentences or, for a file, its names.
      policy: the policy that takes the latents.
      path: a file of latents by task, .npz or .safetensors; "": the policy's own tower.
      vocabulary: for the tower, a folder with CLIP's vocabulary; "": the transformers cache.

    Returns:
      (n_tasks, text_dim) float32.

    Raises:
      UserError: the file lacks a task or has another width; there is neither a file nor a tower;
        or the vocabulary is missing or that of another model.
    """
    width = policy.config.mar.text_dim
    if path:
        named = read_latents(path)
        if missing := [task for task in tasks if task not in named]:
            there = ", ".join(map(repr, sorted(named)[:_SHOWN])) or "none"
            more = len(named) - _SHOWN
            raise UserError(
                f"{path} has no language latent for the task {missing[0]!r}; its tasks are {there}"
                f"{f' and {more} more' if more > 0 else ''}: add the latent, or rename the data's "
                "task"
            )
        rows, source = [named[task] for task in tasks], path
    else:
        if policy.text_model is None:
            raise UserError(
                "this policy is conditioned on language, but its checkpoint holds no language "
                "tower (text_model.*): give a file of language latents by task with "
                "config.data.language"
            )
        rows = _run_tower(policy.text_model, tasks, vocabulary)
        source = "the policy's language tower"
    for task, row in zip(tasks, rows, strict=True):
        if row.shape != (width,):
            raise UserError(
                f"{source} gives a language latent of shape {row.shape} for the task {task!r}, but "
                f"this policy takes ({width},): give latents for this policy"
            )
        if not np.isfinite(row).all():
            raise UserError(
                f"{source} gives values that are not finite for the task {task!r}: make it again"
            )
    return np.array(rows, np.float32).reshape(len(tasks), width)


def _run_tower(tower, tasks: Sequence[str], vocabulary: str) -> np.ndarray:
    """Computes language latents (n_tasks, projection), float32."""
    tokenizer = ClipTokenizer.load(vocabulary)
    known, longest = tower.config.vocab_size, tower.config.max_length
    # The tower takes the highest number as the sentence's end.
    if tokenizer.size != known or tokenizer.end != known - 1:
        raise UserError(
            f"the vocabulary in {tokenizer.source} has {tokenizer.size} words and ends sentences "
            f"with number {tokenizer.end}, but the policy's language tower has {known} words, of "
            "which the last ends sentences: give the vocabulary that it was trained with"
        )
    tokens, mask = tokenizer(tasks, min(longest, LENGTH))
    if tokens.shape[1] > longest:
        long = int(mask.sum(axis=1).argmax())
        raise UserError(
            f"the task {tasks[long]!r} has {mask[long].sum()} tokens, but the policy's language "
            f"tower takes at most {longest}: use fewer words"
        )
    graph, state = nnx.split(tower)
    run = jax.jit(lambda state, tokens, mask: nnx.merge(graph, state)(tokens, mask))
    with jax.default_matmul_precision("highest"):
        return np.asarray(run(state, jnp.asarray(tokens), jnp.asarray(mask)))


def read_latents(path: str) -> dict[str, np.ndarray]:
    """Reads a file of language latents by task (.npz or .safetensors) as float32 arrays.

    Raises:
      UserError: the file is missing, is damaged or holds no numbers.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(
            f"there is no file of language latents {file}: check config.data.language, or make "
            "one with python -m convert latents language_latents.pkl OUT.npz"
        )
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    if file.suffix not in readers:
        raise UserError(f"{file} should end in .npz or .safetensors, with language latents by task")
    try:
        return {name: value.astype(np.float32) for name, value in readers[file.suffix](file)}
    except (
        *(zipfile.BadZipFile, zlib.error, EOFError, OSError, MemoryError),
        *(ValueError, KeyError, TypeError, AttributeError, NotImplementedError, RecursionError),
    ) as error:
        raise UserError(
            f"{file} cannot be read as language latents ({error}): take a fresh copy"
        ) from error


def _read_npz(file: Path):
    with np.load(file, allow_pickle=False) as arrays:
        for name in arrays.files:
            value = arrays[name]
            if value.dtype.kind != "f":
                raise ValueError(f"{name} holds {value.dtype}, not real numbers")
            yield name, value


def _read_safetensors(file: Path):
    for name, value in safetensors.load(file).items():
        if value.dtype.name not in _FLOATS:
            raise ValueError(f"{name} holds {value.dtype}, not real numbers")
        yield name, value
