"""The capture stage, which writes activation caches.

The device computes while earlier chunks are written. Every process computes and writes its own
chunks, so no data crosses the network. A resumed run keeps the chunks that are complete.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from uva_jax.data import source
from uva_jax.data.check import check_split
from uva_jax.data.windows import Strips
from uva_jax.graft.capture import Capture, CaptureOptions, cache_arrays, latent_arrays
from uva_jax.models.policy import Policy
from uva_jax.runtime import parallel
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.storage.sample_store import SampleStore
from uva_jax.storage.site import Site


def capture_activations(
    teacher: Policy,
    reader: source.WindowReader,
    options: CaptureOptions,
    folder: Path,
    metrics: MetricsWriter,
    *,
    seed: int,
    origin: str,
    episodes: np.ndarray | None = None,
    is_primary: bool = True,
    barrier: Callable[[str], None] = lambda name: None,
) -> dict:
    """Fills folder/train and folder/held_out with activations of the teacher's head.

    Args:
      teacher, options, origin: see `capture_cache`.
      reader: reads the windows; its options select the held-out episodes.
      folder: of the stage.
      metrics: writer of progress and messages.
      seed: of the choice of windows and of all draws.
      episodes: (e,) mask of the training episodes; by default all that are not held out.
      is_primary, barrier: see `Site`.

    Returns:
      {"train", "held_out"}: {"samples", "bytes"} of each cache.

    Raises:
      UserError: there is no window to train on, or none to judge by; or see `capture_cache`.
    """
    check_split(reader.buffer, reader.options)
    train, held_out = source.split(reader.buffer, reader.options)
    train = train if episodes is None else episodes
    result = {}
    for name, mask, samples in (
        ("train", train, options.num_samples),
        ("held_out", held_out, options.held_out),
    ):
        count = -(-samples // options.strip)
        strips = reader.strips(mask, strip=options.strip, seed=seed, count=count)
        cache = capture_cache(
            Site(folder / name, metrics, is_primary, barrier),
            teacher,
            strips,
            reader,
            dataclasses.replace(options, num_samples=samples),
            seed=seed + (name == "held_out"),
            origin=origin,
        )
        result[name] = {"samples": samples, "bytes": cache.nbytes()}
    return result


def capture_cache(
    site: Site,
    teacher: Policy,
    strips: Strips,
    reader: source.WindowReader,
    options: CaptureOptions,
    *,
    seed: int,
    origin: str,
    latents: bool = False,
) -> SampleStore:
    """Fills one cache with `options.num_samples` windows, resumes it, or opens the finished one.

    Args:
      site: the cache's folder, metrics and processes.
      teacher: the policy.
      strips: from `plan_strips`, at least num_samples / strip.
      reader: reads the windows.
      options: `config.capture`.
      seed: of the VAE's and the diffusion's draws, which depend only on (seed, sample).
      origin: the teacher's hash, which the cache records.
      latents: store what `capture.latent_strips` computes in place of the activations.

    Returns:
      the finished cache.

    Raises:
      UserError: the folder holds a cache of another teacher, other data or other options.
    """
    capture = Capture(teacher, options, jax.local_devices(), latents=latents)
    chunk = options.batch * options.strip
    samples = options.num_samples
    meta = {"teacher": origin, "seed": seed, "capture": str(options), "data": str(reader.options)}
    if latents:
        arrays = latent_arrays(teacher, reader.read(strips, np.arange(1)))
    else:
        arrays = cache_arrays(teacher, options)
    cache = site.open(arrays, samples, chunk=chunk, meta=meta)
    variables = jax.device_put(nnx.state(teacher), parallel.replicated(capture.mesh))
    key = jax.random.key(seed)

    def compute(numbers: np.ndarray) -> Mapping[str, jax.Array]:
        rows = numbers[:: options.strip] // options.strip
        # Repeated strips fill an incomplete last chunk.
        batch = reader.read(strips, np.minimum(rows, len(strips) - 1))
        return capture.run(variables, batch, numbers.reshape(-1, options.strip), key)

    return site.fill(cache, compute, chunks=capture.mesh.size, unit="windows")
