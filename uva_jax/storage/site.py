"""The folder of a sample store and the processes that write it together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.storage.sample_store import SampleStore


class Site(NamedTuple):
    """The folder of a cache, the writer of its metrics, and the roles of several processes."""

    folder: Path
    metrics: MetricsWriter
    is_primary: bool = True
    barrier: Callable[[str], None] = lambda name: None

    def open(self, arrays: Mapping, samples: int, *, chunk: int, meta: Mapping) -> SampleStore:
        """Calls `SampleStore.create` in every process, in the primary first."""
        for turn in (True, False):
            if self.is_primary == turn:
                cache = SampleStore.create(self.folder, arrays, samples, chunk=chunk, meta=meta)
            self.barrier(f"{self.folder.name}:created:{turn}")
        return cache

    def finish(self, cache: SampleStore) -> SampleStore:
        """Waits until every process has written its chunks; returns the finished cache."""
        cache.flush()
        self.barrier(f"{self.folder.name}:written")
        if self.is_primary:
            cache.finish()
        self.barrier(f"{self.folder.name}:finished")
        return SampleStore.open(self.folder)
