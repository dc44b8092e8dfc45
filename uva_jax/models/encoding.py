"""Encodes many raw frames with a policy's VAE, a few at a time, to limit memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx


def encode_in_parts(
    policy: nnx.Module, images: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """Encodes raw frames (n, h, w, 3), `size` at a time (0: all at once).

    Args:
      policy: a Policy, whose module uses this one.
      images: (n, h, w, 3) uint8, or float in [0, 1].
      size: frames encoded at a time.

    Returns:
      mean and log-variance (n, h', w', z), as `VAE.encode`.
    """

    def encode(frames):
        return policy.vae.encode(policy.preprocess(frames))

    if not size or len(images) <= size:
        return encode(images)
    padded = jnp.pad(images, ((0, -len(images) % size), (0, 0), (0, 0), (0, 0)))
    parts = jax.lax.map(encode, rearrange(padded, "(p n) h w c -> p n h w c", n=size))
    mean, logvar = (rearrange(x, "p n h w c -> (p n) h w c")[: len(images)] for x in parts)
    return mean, logvar
