"""The folder of a sample store and the processes that write it together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

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

    def fill(
        self,
        cache: SampleStore,
        compute: Callable[[np.ndarray], Mapping[str, jax.Array]],
        *,
        chunks: int,
        unit: str,
    ) -> SampleStore:
        """Computes and writes the chunks that are missing, which the processes divide.

        Args:
          cache: of `open`.
          compute: from the numbers of `chunks` whole chunks of samples to their arrays, samples
            first. Numbers may exceed the cache, and chunks may repeat: those are not stored.
          chunks: computed in one call.
          unit: of the progress bar, such as "windows".

        Returns:
          the finished cache.
        """
        mine = cache.missing_chunks()[jax.process_index() :: jax.process_count()]
        total, done, size = cache.num_samples, cache.samples_done(), cache.chunk
        with self.metrics.progress(total, unit=unit, desc=self.folder.name, initial=done) as bar:
            for start in range(0, len(mine), chunks):
                group = mine[start : start + chunks]
                padded = (list(group) + [group[-1]] * chunks)[:chunks]
                found = compute(np.concatenate([np.arange(size) + c * size for c in padded]))
                found = {k: np.asarray(v).astype(cache.dtype(k)) for k, v in found.items()}
                for slot, index in enumerate(group):
                    first, last = cache.chunk_range(index)
                    part = slice(slot * size, slot * size + last - first)
                    cache.write_chunk(index, {k: v[part] for k, v in found.items()})
                    bar.update(last - first)
        return self.finish(cache)

    def finish(self, cache: SampleStore) -> SampleStore:
        """Waits until every process has written its chunks; returns the finished cache."""
        cache.flush()
        self.barrier(f"{self.folder.name}:written")
        if self.is_primary:
            cache.finish()
        self.barrier(f"{self.folder.name}:finished")
        return SampleStore.open(self.folder)
