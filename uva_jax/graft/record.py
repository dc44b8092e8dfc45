"""Fills an activation cache: windows in, the capture's arrays on disk.

The device computes while earlier chunks are written. Every process fills its own chunks with its
own devices, so nothing crosses the network; what a cut-off run has written is kept.
"""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from uva_jax.data import source
from uva_jax.graft.capture import CaptureOptions, cache_arrays, make_capture
from uva_jax.models.policy import Policy
from uva_jax.runtime import parallel
from uva_jax.storage.sample_store import SampleStore
from uva_jax.storage.site import Site


def capture_cache(
    site: Site,
    teacher: Policy,
    strips: source.Strips,
    reader: source.WindowReader,
    options: CaptureOptions,
    *,
    seed: int,
    origin: str,
) -> SampleStore:
    """Fills (or goes on filling, or just opens) one cache with `options.num_samples` windows.

    Args:
      site: the cache's folder; progress and processes.
      teacher: the policy whose activations are taken.
      strips: from `source.plan_strips`, at least num_samples / strip of them.
      reader: reads the windows.
      options: `config.capture`.
      seed: of the VAE's and the diffusion's draws, which depend on (seed, sample) alone.
      origin: the teacher's hash; a cache of another teacher is refused.

    Raises:
      UserError: the folder holds a cache made otherwise.
    """
    mesh = parallel.make_mesh(devices=jax.local_devices())
    devices = mesh.size
    chunk = options.batch * options.strip
    arrays = cache_arrays(teacher, options)
    samples = options.num_samples
    meta = {"teacher": origin, "seed": seed, "capture": str(options), "data": str(reader.options)}
    cache = site.open(arrays, samples, chunk=chunk, meta=meta)
    run = make_capture(teacher, mesh, blocks=options.blocks, encode_frames=options.encode_frames)
    variables = jax.device_put(nnx.state(teacher), parallel.replicated(mesh))
    key = jax.random.key(seed)
    mine = cache.missing_chunks()[jax.process_index() :: jax.process_count()]
    done = cache.samples_done()
    with site.metrics.progress(samples, unit="windows", desc=site.folder.name, initial=done) as bar:
        for start in range(0, len(mine), devices):
            chunks = mine[start : start + devices]
            padded = (list(chunks) + [chunks[-1]] * devices)[:devices]
            rows = np.concatenate([np.arange(options.batch) + c * options.batch for c in padded])
            # The last chunk may be short of strips; repeats fill it and are not stored.
            batch = reader.read(strips, np.minimum(rows, len(strips) - 1))
            numbers = rows[:, None] * options.strip + np.arange(options.strip)
            found = run(variables, batch, numbers, key)
            found = {k: np.asarray(v).astype(cache.dtype(k)) for k, v in found.items()}
            for slot, index in enumerate(chunks):
                first, last = cache.chunk_range(index)
                part = slice(slot * chunk, slot * chunk + last - first)
                cache.write_chunk(index, {k: v[part] for k, v in found.items()})
                bar.update(last - first)
    return site.finish(cache)
