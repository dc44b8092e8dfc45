"""Where a sample store is written, and which processes write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.storage.sample_store import SampleStore


class Site(NamedTuple):
    """Where a cache is written and who watches."""

    folder: Path
    metrics: MetricsWriter
    is_primary: bool = True
    barrier: Callable[[str], None] = lambda name: None

    def open(self, arrays: Mapping, samples: int, *, chunk: int, meta: Mapping) -> SampleStore:
        """`SampleStore.create` in every process: the primary creates, then the others join."""
        for turn in (True, False):
            if self.is_primary == turn:
                cache = SampleStore.create(self.folder, arrays, samples, chunk=chunk, meta=meta)
            self.barrier(f"{self.folder.name}:created:{turn}")
        return cache

    def finish(self, cache: SampleStore) -> SampleStore:
        """The cache once every process has written its chunks, finished."""
        cache.flush()
        self.barrier(f"{self.folder.name}:written")
        if self.is_primary:
            cache.finish()
        self.barrier(f"{self.folder.name}:finished")
        return SampleStore.open(self.folder)
