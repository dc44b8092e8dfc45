"""Reads and writes the arrays of a policy folder in orbax's format, whole or one by one.

Orbax holds whole trees in memory. For conversions, which only pass arrays on, a handler for
`LazyArray` loads each leaf when it is written; the files are the same either way.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from uva_jax.runtime.errors import UserError
from uva_jax.storage.lazy_array import LazyArray, ahead

_IN_FLIGHT = 64 << 20  # bytes of arrays that are read or written at a time
# What orbax and tensorstore raise when files are missing or damaged.
_DAMAGE = (FileNotFoundError, KeyError, AttributeError, ValueError)


@contextlib.contextmanager
def damage_as_user_error(folder: Path) -> Iterator[None]:
    """Turns errors of orbax and tensorstore on the arrays in `folder` into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Orbax reports unreadable data by a bare Exception, and nothing else by one.
        if type(error) is not Exception and not isinstance(error, _DAMAGE):
            raise
        raise UserError(
            f"{folder} is missing or damaged ({_short(error)}): make the policy folder again"
        ) from error


def checkpointer(arrays: Mapping) -> ocp.AsyncCheckpointer:
    """Returns an orbax checkpointer that needs little memory beyond `arrays` (or their shapes).

    It does not compress: weights hardly shrink, and compression takes more time and memory than
    writing.
    """
    largest = max(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in arrays.values())
    limit = max(_IN_FLIGHT, 2 * largest)  # the largest array must fit
    handler = ocp.BasePyTreeCheckpointHandler(
        use_compression=False, save_concurrent_bytes=limit, restore_concurrent_bytes=limit
    )
    return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(handler_impl=handler))


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of numpy arrays, for leaves of type `LazyArray`."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(
        self,
        values: Sequence[LazyArray],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list:
        args = args or [ocp.SaveArgs()] * len(values)
        being_written: list = []
        try:
            for part in _parts(values):
                arrays = list(ahead(lambda value: value.load(), values[part]))
                begun = await super().serialize(arrays, infos[part], args[part])
                for written in being_written:
                    written.result()
                being_written = list(begun)
        finally:
            for written in being_written:
                written.result()
        return []

    async def deserialize(
        self,
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.RestoreArgs] | None = None,
    ) -> list[LazyArray]:
        read = super().deserialize

        def later(info, found) -> LazyArray:
            def load() -> np.ndarray:
                # Not asyncio.run: its handling of Ctrl-C formats every array as text.
                loop = asyncio.new_event_loop()
                try:
                    with damage_as_user_error(info.parent_dir):
                        return loop.run_until_complete(read([info]))[0]
                finally:
                    loop.close()

            return LazyArray(tuple(found.shape), np.dtype(found.dtype), load)

        return [
            later(info, found)
            for info, found in zip(infos, await self.metadata(infos), strict=True)
        ]


def _short(error: BaseException) -> str:
    """Returns the message without tensorstore's description of all its settings."""
    return " ".join(str(error).split())[:200]


def _parts(values: Sequence[LazyArray]) -> Iterator[slice]:
    """Yields slices of arrays that are written together."""
    start, held = 0, 0
    for number, value in enumerate(values):
        if held and held + value.nbytes > _IN_FLIGHT:
            yield slice(start, number)
            start, held = number, 0
        held += value.nbytes
    yield slice(start, len(values))


def _lazy_checkpointer() -> ocp.Checkpointer:
    """Returns a checkpointer for this process alone, which waits for no other."""
    handler = _OneByOne()
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, handler),
        (np.ndarray, handler),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # orbax warns if there is none
    )
    base = ocp.BasePyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(handler_impl=base, type_handler_registry=registry),
        multiprocessing_options=alone,
    )


def write(folder: Path, arrays: Mapping[str, LazyArray]) -> None:
    """Writes arrays by path ("a/b"), a few at a time; errors of a `load` are raised unchanged."""
    with _lazy_checkpointer() as opened:
        opened.save(folder, args=ocp.args.PyTreeSave(traverse_util.unflatten_dict(arrays, sep="/")))


def read(folder: Path) -> dict[str, LazyArray]:
    """Returns the arrays of a folder by path; each is read when it is loaded.

    Raises:
      UserError: the folder is missing or damaged.
    """
    with _lazy_checkpointer() as opened, damage_as_user_error(folder):
        tree = opened.metadata(folder).item_metadata.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return traverse_util.flatten_dict(
            opened.restore(folder, args=ocp.args.PyTreeRestore(restore_args=how)), sep="/"
        )
