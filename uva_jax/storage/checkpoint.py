"""Resumable states of a training loop, stored by orbax.

A state is any tree of arrays. Its leaves are stored in order and restored into a tree of the same
structure, so that optimiser states need no registration.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from uva_jax.runtime import parallel
from uva_jax.runtime.errors import UserError


class Checkpoints:
    """The newest `keep` states of one loop in a folder; a context manager."""

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2):
        self.folder = Path(folder).absolute()
        # With several processes, a write that fails in the background of one (on a full disk, say)
        # leaves all of them waiting in orbax's barriers.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=jax.process_count() == 1
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Waits until all states are written."""
        self._manager.wait_until_finished()
        self._manager.close()

    def latest_step(self) -> int | None:
        """Returns the steps done in the newest complete state, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state) -> None:
        """Writes the state after `step` steps; in the background of a single process."""
        if self._manager.latest_step() != step:
            self._manager.save(step, args=ocp.args.StandardSave(parallel.savable(_leaves(state))))

    def restore(self, like):
        """Reads the newest state in the structure, shapes, dtypes and shardings of `like`.

        Returns:
          (steps done, state), or None if there is no state.

        Raises:
          UserError: the state is damaged or belongs to another model.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(_abstract, _leaves(like))
        try:
            found = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"the saved state {self.folder / str(step)} cannot be restored ({error}); remove "
                f"{self.folder} to start this stage over"
            ) from error
        structure = jax.tree.structure(like)
        return step, jax.tree.unflatten(structure, [found[key] for key in sorted(found)])


def _leaves(state) -> dict:
    leaves = jax.tree.leaves(state)
    return {f"{i:05d}": leaf for i, leaf in enumerate(leaves)}


def _abstract(x):
    if isinstance(x, jax.Array):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return x
