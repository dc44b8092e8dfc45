"""Capture: one jitted pass over windows that gives every activation of the teacher's head.

Observation -> VAE -> MAR -> head, mapped over the devices with `jax.shard_map`. Each device always
works on the same number of strips and every draw comes from `fold_in(key, sample)`, so the cache
is the same to the bit on any number of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from uva_jax import diffusion
from uva_jax.models.policy import Policy
from uva_jax.parallel import sharded_map


@dataclass(frozen=True)
class CaptureOptions:
    """`config.capture`; see `configs/common.py` for each field."""

    num_samples: int
    held_out: int
    strip: int
    batch: int
    blocks: bool
    dtype: str
    encode_frames: int


def cache_arrays(policy: Policy, options: CaptureOptions) -> dict[str, tuple[tuple[int, ...], str]]:
    """What the cache holds of each sample: name -> (shape, dtype).

    `z` video tokens (s, c); `actions` normalised (n, a); `condition` e_c = cond_embed(c) (n, w);
    and, with `blocks`, for one draw of noise: `t` (), `noise` (n, a), and for every residual block
    its input `h` (depth, n, w) and what it adds, `residual` (depth, n, w).
    """
    head, mar = policy.config.action_head, policy.config.mar
    rows = (head.n_actions, head.width)
    arrays = {
        "z": ((mar.n_tokens, mar.decoder_embed_dim), options.dtype),
        "actions": ((head.n_actions, head.channels), "float32"),
        "condition": (rows, options.dtype),
    }
    if options.blocks:
        arrays |= {
            "t": ((), "int32"),
            "noise": ((head.n_actions, head.channels), "float32"),
            "h": ((head.depth, *rows), options.dtype),
            "residual": ((head.depth, *rows), options.dtype),
        }
    return arrays


def head_activations(head, e_c: jax.Array, actions: jax.Array, t: jax.Array, noise: jax.Array):
    """The MLP head's blocks on diffused actions.

    Args:
      head: the teacher's `MLPHead`.
      e_c: (b, n, w) condition activation.
      actions, noise: (b, n, a).
      t: (b,) one timestep a sample, as the grafted head takes it; the MLP head takes it too.

    Returns:
      {"h", "residual"}: (b, depth, n, w), and "out" (b, n, 2a).
    """
    schedule = diffusion.make_schedule("", head.config.train_steps)
    x_t = diffusion.q_sample(schedule, actions, t, noise)
    found = head.net.activations(x_t, t, e_c)
    return {
        "h": jnp.stack(found["h"][:-1], axis=1),
        "residual": jnp.stack(found["residuals"], axis=1),
        "out": found["out"],
    }


def encode_in_parts(policy: Policy, images: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """`VAE.encode` of raw frames (n, h, w, 3), `size` at a time (0: all at once)."""

    def encode(frames):
        return policy.vae.encode(policy.preprocess(frames))

    if not size or len(images) <= size:
        return encode(images)
    padded = jnp.pad(images, ((0, -len(images) % size), (0, 0), (0, 0), (0, 0)))
    parts = jax.lax.map(encode, rearrange(padded, "(p n) h w c -> p n h w c", n=size))
    mean, logvar = (rearrange(x, "p n h w c -> (p n) h w c")[: len(images)] for x in parts)
    return mean, logvar


def capture_strips(
    policy: Policy,
    images: jax.Array,
    actions: jax.Array,
    samples: jax.Array,
    key: jax.Array,
    *,
    blocks: bool,
    encode_frames: int = 0,
) -> dict[str, jax.Array]:
    """Activations of a few strips of windows.

    Args:
      policy: the teacher.
      images: (b, strip + n_frames - 1, h, w, 3) uint8; window k sees frames k ... k + n_frames - 1.
      actions: (b, strip, n, a) raw.
      samples: (b, strip) sample numbers, which seed the draws.
      key: base key.
      blocks: also give the blocks' activations.
      encode_frames: frames the VAE takes at a time (0: all).

    Returns:
      The arrays of `cache_arrays`, each with a leading axis b * strip.
    """
    b, strip = samples.shape
    n_frames = policy.config.mar.n_frames
    frames = rearrange(images, "b f h w c -> (b f) h w c")
    mean, logvar = encode_in_parts(policy, frames, encode_frames)
    window = np.arange(strip)[:, None] + np.arange(n_frames)

    def windows(x):
        x = rearrange(x, "(b f) h w c -> b f h w c", b=b)[:, window]
        return rearrange(x, "b k t h w c -> (b k) t h w c")

    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(samples.reshape(-1))

    def draw(stream, make):
        return jax.vmap(lambda k: make(jax.random.fold_in(k, stream)))(keys)

    eps = draw(0, lambda k: jax.random.normal(k, policy.latent_shape(1)[1:]))
    latents = policy.vae.sample(windows(mean), windows(logvar), eps)
    z = policy.video_tokens(latents)
    head = policy.action_head
    e_c = head.condition(z)
    nactions = policy.normalize("action", rearrange(actions, "b k n a -> (b k) n a"))
    found = {"z": z, "actions": nactions, "condition": e_c}
    if blocks:
        t = draw(1, lambda k: jax.random.randint(k, (), 0, head.config.train_steps))
        noise = draw(2, lambda k: jax.random.normal(k, nactions.shape[1:]))
        inner = head_activations(head, e_c, nactions, t, noise)
        found |= {"t": t, "noise": noise, "h": inner["h"], "residual": inner["residual"]}
    return found


def make_capture(
    policy: Policy, mesh: Mesh, *, blocks: bool, encode_frames: int = 0
) -> Callable[..., Mapping[str, jax.Array]]:
    """The mapped, jitted capture: f(variables, images, actions, samples, key) -> activations.

    `variables` is `nnx.state(policy)`, replicated; the other arrays are split over the mesh's data
    axes by their leading (strip) axis, and so is every result.
    """
    graphdef, _ = nnx.split(policy)
    rows = P(("data", "fsdp", "tensor"))

    def per_device(variables, images, actions, samples, key):
        policy = nnx.merge(graphdef, variables)
        return capture_strips(
            policy, images, actions, samples, key, blocks=blocks, encode_frames=encode_frames
        )

    return sharded_map(per_device, mesh, in_specs=(P(), rows, rows, rows, P()), out_specs=rows)
