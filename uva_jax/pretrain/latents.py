"""The latent cache: every frame of a recording encoded once, with its augmented copies.

Mean and log-variance are kept, so that a training step still samples its latents. It is an
activation cache whose samples are frames: it resumes by chunks, and says what it was made from.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from uva_jax.data.augment import CropAndBlur, mirror_pusht
from uva_jax.data.replay_buffer import ReplayBuffer, to_uint8
from uva_jax.models import surgery
from uva_jax.models.policy import Policy
from uva_jax.models.vae import VAE
from uva_jax.runtime import parallel
from uva_jax.storage.sample_store import SampleStore
from uva_jax.storage.site import Site

_CHUNK = 512  # frames


@dataclass(frozen=True)
class Copies:
    """What a recording is encoded as: itself, its mirror image, and cropped and blurred views.

    Copy number c holds all frames once, in their order: the frame's number in the cache is
    c * n_steps + step. Each episode of a view has a crop and a blur of its own, so that they are
    the same throughout a window.

    Attributes:
      mirror: every copy is followed by its mirror image.
      views: augmented copies beside the plain one (0: none).
      change: what makes them.
      seed: of their draws.
    """

    mirror: bool = False
    views: int = 0
    change: CropAndBlur = CropAndBlur()
    seed: int = 0

    @property
    def count(self) -> int:
        return (1 + self.views) * (1 + self.mirror)

    def number(self, view, mirrored):
        """The copy that a view (0: the plain frames) is, mirrored or not."""
        return view * (1 + self.mirror) + mirrored

    def read(self, buffer: ReplayBuffer, key: str, numbers: np.ndarray) -> np.ndarray:
        """Frames (n, h, w, 3) uint8 by their numbers in the cache."""
        steps, copies = numbers % buffer.n_steps, numbers // buffer.n_steps
        found = to_uint8(buffer.read_rows({key: steps})[key], key)
        views, mirrored = divmod(copies, 1 + self.mirror)
        if mirrored.any():
            found = mirror_pusht({"image": found}, mirrored.astype(bool))["image"]
        episodes = np.searchsorted(buffer.episode_ends, steps, side="right")
        for copy, episode in {(c, e) for c, e in zip(copies, episodes, strict=True)}:
            if copy > self.mirror:
                rows = (copies == copy) & (episodes == episode)
                rng = np.random.default_rng((self.seed, int(copy), int(episode)))
                found[rows] = self.change(found[rows], rng)
        return found


def encoder_hash(vae: VAE) -> str:
    """A sha256 of the arrays that encode, and their paths."""
    digest = hashlib.sha256()
    for path, x in sorted(surgery.flatten(vae).items()):
        if path.startswith(("encoder/", "quant_conv/")):
            digest.update(path.encode() + np.asarray(x).tobytes())
    return digest.hexdigest()


def encode_frames(
    site: Site,
    policy: Policy,
    buffer: ReplayBuffer,
    image_key: str,
    copies: Copies,
) -> SampleStore:
    """Encodes all frames of a buffer (or goes on doing so, or opens what is done).

    Args:
      site: the cache's folder; progress and processes.
      policy: its VAE encodes, its image size is what frames are resized to; other parts need no
        arrays.
      buffer: the recording; image_key: its array of frames.
      copies: which augmented copies follow the plain frames.

    Returns:
      The finished cache, with "mean" and "logvar" (copies * frames, h', w', z).

    Raises:
      UserError: the folder holds latents of another VAE, other data, or another size.
    """
    total = buffer.n_steps * copies.count
    item = policy.latent_shape(1)[2:]
    meta = {
        "vae": encoder_hash(policy.vae),
        "data": buffer.fingerprint((image_key,)),
        "image_key": image_key,
        "image_size": policy.config.image_size,
        "copies": dataclasses.asdict(copies),
    }
    arrays = {name: (item, "float16") for name in ("mean", "logvar")}
    cache = site.open(arrays, total, chunk=_CHUNK, meta=meta)
    mesh = parallel.make_mesh(devices=jax.local_devices())
    encode = encoder(policy, mesh)
    mine = cache.missing_chunks()[jax.process_index() :: jax.process_count()]
    done = cache.samples_done()
    with site.metrics.progress(total, unit="frames", desc=site.folder.name, initial=done) as bar:
        for index in mine:
            start, stop = cache.chunk_range(index)
            numbers = np.minimum(np.arange(start, start + _CHUNK), total - 1)
            frames = copies.read(buffer, image_key, numbers)
            moments = {k: np.asarray(v)[: stop - start] for k, v in encode(frames).items()}
            cache.write_chunk(index, {k: v.astype(cache.dtype(k)) for k, v in moments.items()})
            bar.update(stop - start)
    return site.finish(cache)


def encoder(policy: Policy, mesh):
    """frames (n, h, w, 3) uint8 -> "mean", "logvar", 32 frames of each device at a time."""
    graph, state = nnx.split(policy.vae)
    state = jax.device_put(state, parallel.replicated(mesh))
    rows = NamedSharding(mesh, P(mesh.axis_names))

    @jax.jit
    def encode(state, frames):
        mean, logvar = nnx.merge(graph, state).encode(policy.preprocess(frames))
        return {"mean": mean, "logvar": logvar}

    def run(frames: np.ndarray) -> Mapping[str, np.ndarray]:
        step = 32 * mesh.size
        padded = np.resize(frames, (-(-len(frames) // step) * step, *frames.shape[1:]))
        parts = [
            jax.tree.map(np.asarray, encode(state, jax.device_put(padded[i : i + step], rows)))
            for i in range(0, len(padded), step)
        ]
        return {k: np.concatenate([p[k] for p in parts])[: len(frames)] for k in parts[0]}

    return run


class Latents(NamedTuple):
    """A cache as a training loop reads it: moments of frames, from memory or from the disk."""

    cache: SampleStore
    held: Mapping[str, np.ndarray] | None

    @classmethod
    def open(cls, cache: SampleStore, memory_bytes: int) -> Latents:
        """Loads the cache where it fits in `memory_bytes`."""
        return cls(cache, cache.load(max_bytes=memory_bytes))

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Frames' numbers (...) -> "mean", "logvar" (..., h', w', z)."""
        if self.held is not None:
            return {name: array[rows] for name, array in self.held.items()}
        return self.cache.read_rows(("mean", "logvar"), rows)


def sample(policy: Policy, moments: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
    """Draws the scaled latents of cached moments (..., h', w', z), float32."""
    mean, logvar = (moments[k].astype(jnp.float32) for k in ("mean", "logvar"))
    return policy.vae.sample(mean, logvar, jax.random.normal(key, mean.shape))
