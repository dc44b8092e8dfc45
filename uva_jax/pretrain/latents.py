"""The latent cache: every frame of a recording and its augmented copies, encoded once.

It stores mean and log-variance, from which each training step samples latents. It is a sample store
whose samples are frames, so it resumes by chunks and records what it was made from.
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
from uva_jax.data.replay_buffer import ReplayBuffer
from uva_jax.models import surgery
from uva_jax.models.policy import Policy
from uva_jax.models.vae import VAE
from uva_jax.runtime import parallel
from uva_jax.runtime.batches import in_batches
from uva_jax.storage.sample_store import SampleStore
from uva_jax.storage.site import Site

_CHUNK = 512  # frames


@dataclass(frozen=True)
class Copies:
    """The copies of a recording in the cache: plain, mirrored, and cropped and blurred views.

    Copy number c holds all frames once, in order: a frame's number in the cache is
    c * n_steps + step. Crop and blur of a view are drawn per episode, so that they do not change
    within a window.

    Attributes:
      mirror: every copy is followed by its mirror image.
      views: augmented copies in addition to the plain one.
      change: the augmentation.
      seed: of the augmentation.
    """

    mirror: bool = False
    views: int = 0
    change: CropAndBlur = CropAndBlur()
    seed: int = 0

    @property
    def count(self) -> int:
        """Number of copies, with the plain one."""
        return (1 + self.views) * (1 + self.mirror)

    def number(self, view, mirrored):
        """Returns the copy's number of a view (0: the plain frames), mirrored or not."""
        return view * (1 + self.mirror) + mirrored

    def read(self, buffer: ReplayBuffer, key: str, numbers: np.ndarray) -> np.ndarray:
        """Reads frames (n, h, w, 3) uint8 by their numbers (n,) in the cache."""
        steps, copies = numbers % buffer.n_steps, numbers // buffer.n_steps
        found = buffer.read_rows({key: steps})[key]
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
    """Returns the SHA-256 of the encoder's arrays and their paths."""
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
    """Encodes all frames of a buffer; resumes an unfinished cache and opens a finished one.

    Args:
      site: the cache's folder, metrics and processes.
      policy: its VAE encodes frames of its image size; other parts need no arrays.
      buffer: the recording.
      image_key: its array of frames (n, h, w, 3) uint8.
      copies: the copies that are encoded.

    Returns:
      the finished cache, with "mean" and "logvar" (copies * frames, h', w', z).

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

    def compute(numbers: np.ndarray) -> Mapping[str, np.ndarray]:
        return encode(copies.read(buffer, image_key, np.minimum(numbers, total - 1)))

    return site.fill(cache, compute, chunks=1, unit="frames")


def encoder(policy: Policy, mesh):
    """Returns a function from frames (n, h, w, 3) uint8 to "mean" and "logvar" (n, h', w', z).

    Each device encodes 32 frames at a time.
    """
    graph, state = nnx.split(policy.vae)
    state = jax.device_put(state, parallel.replicated(mesh))
    rows = NamedSharding(mesh, P(mesh.axis_names))

    @jax.jit
    def encode(state, frames):
        mean, logvar = nnx.merge(graph, state).encode(policy.preprocess(frames))
        return {"mean": mean, "logvar": logvar}

    def run(frames: np.ndarray) -> Mapping[str, np.ndarray]:
        return in_batches(
            lambda some: encode(state, jax.device_put(frames[some], rows)),
            len(frames),
            32 * mesh.size,
        )

    return run


class Latents(NamedTuple):
    """A latent cache as a training loop reads it, from memory or from disk."""

    cache: SampleStore
    held: Mapping[str, np.ndarray] | None

    @classmethod
    def open(cls, cache: SampleStore, memory_bytes: int) -> Latents:
        """Loads the cache into memory if it fits in `memory_bytes`."""
        return cls(cache, cache.load(max_bytes=memory_bytes))

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Reads "mean" and "logvar" (..., h', w', z) by frame numbers (...)."""
        if self.held is not None:
            return {name: array[rows] for name, array in self.held.items()}
        return self.cache.read_rows(("mean", "logvar"), rows)


def sample(policy: Policy, moments: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
    """Samples scaled latents (..., h', w', z), float32, from cached moments of the same shape."""
    mean, logvar = (moments[k].astype(jnp.float32) for k in ("mean", "logvar"))
    return policy.vae.sample(mean, logvar, jax.random.normal(key, mean.shape))
