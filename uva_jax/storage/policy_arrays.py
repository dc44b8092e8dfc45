"""The arrays of a policy folder on disk, in orbax's format: all at once, or one after another.

Orbax reads and writes whole trees, so whoever only passes arrays on (a conversion) would hold all
of them. Here orbax is given leaves that are loaded when their turn comes, by a handler of its own
arrays; the files are the same either way.
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
def damage_is_told(folder: Path) -> Iterator[None]:
    """One sentence on a policy's arrays in `folder` that cannot be read."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Orbax tells of unreadable data by a bare Exception, and by nothing else.
        if type(error) is not Exception and not isinstance(error, _DAMAGE):
            raise
        raise UserError(
            f"{folder} is missing or damaged ({_short(error)}); make the policy folder anew."
        ) from error


def checkpointer(arrays: Mapping) -> ocp.AsyncCheckpointer:
    """Orbax's, with little in memory beside `arrays` (or their shapes).

    Weights hardly shrink, and compressing them takes longer and more memory than writing them.
    """
    largest = max(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in arrays.values())
    limit = max(_IN_FLIGHT, 2 * largest)  # one array must fit
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
                # Not asyncio.run: its handling of Ctrl-C prints every array to a text unread.
                loop = asyncio.new_event_loop()
                try:
                    with damage_is_told(info.parent_dir):
                        return loop.run_until_complete(read([info]))[0]
                finally:
                    loop.close()

            return LazyArray(tuple(found.shape), np.dtype(found.dtype), load)

        return [
            later(info, found)
            for info, found in zip(infos, await self.metadata(infos), strict=True)
        ]


def _short(error: BaseException) -> str:
    """What is wrong, without tensorstore's description of all its settings."""
    return " ".join(str(error).split())[:200]


def _parts(values: Sequence[LazyArray]) -> Iterator[slice]:
    """Runs of arrays that are written together."""
    start, held = 0, 0
    for number, value in enumerate(values):
        if held and held + value.nbytes > _IN_FLIGHT:
            yield slice(start, number)
            start, held = number, 0
        held += value.nbytes
    yield slice(start, len(values))


def _lazy_checkpointer() -> ocp.Checkpointer:
    """Works for this process alone, and waits for no other."""
    handler = _OneByOne()
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, handler),
        (np.ndarray, handler),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # orbax warns where there is none
    )
    base = ocp.BasePyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(handler_impl=base, type_handler_registry=registry),
        multiprocessing_options=alone,
    )


def write(folder: Path, arrays: Mapping[str, LazyArray]) -> None:
    """Writes arrays by path ("a/b"), a few at a time; what a `load` raises goes through."""
    with _lazy_checkpointer() as opened:
        opened.save(folder, args=ocp.args.PyTreeSave(traverse_util.unflatten_dict(arrays, sep="/")))


def read(folder: Path) -> dict[str, LazyArray]:
    """The arrays that any of the writers wrote, by path; each is read when it is asked for.

    Raises:
      UserError: the folder is missing or damaged.
    """
    with _lazy_checkpointer() as opened, damage_is_told(folder):
        tree = opened.metadata(folder).item_metadata.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return traverse_util.flatten_dict(
            opened.restore(folder, args=ocp.args.PyTreeRestore(restore_args=how)), sep="/"
        )
