"""Capture: a jitted pass over windows that computes the activations of the teacher's head.

A shorter pass computes the latents of frames alone, for training that starts from these. The pass
(VAE, MAR, head) is mapped over the devices with `jax.shard_map`. Each device always
processes the same number of strips and every draw comes from `fold_in(key, sample)`, so the cache
is equal to the bit on any number of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from uva_jax.models import diffusion
from uva_jax.models.encoding import encode_in_parts
from uva_jax.models.policy import Policy, moments_of
from uva_jax.models.policy_call import cameras
from uva_jax.runtime import parallel
from uva_jax.runtime.sections_graft import CaptureOptions


def cache_arrays(policy: Policy, options: CaptureOptions) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns the arrays that the cache holds for each sample: name -> (shape, dtype).

    `z` (s, c) are the video tokens, `actions` (n, a) normalised, and `condition` (n, w) is
    e_c = cond_embed(c). With `blocks`, for one noise draw: timestep `t` (), `noise` (n, a), and the
    inputs `h` and residuals `residual` (depth, n, w) of all blocks.
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
    """Computes the activations of the MLP head's blocks on noisy actions.

    Args:
      head: the teacher's `MLPHead`.
      e_c: (b, n, w) condition activation.
      actions, noise: (b, n, a).
      t: (b,) one timestep per sample, as the grafted head takes it.

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


def capture_strips(
    policy: Policy,
    batch: Mapping[str, jax.Array],
    samples: jax.Array,
    key: jax.Array,
    *,
    blocks: bool,
    encode_frames: int = 0,
) -> dict[str, jax.Array]:
    """Computes the activations of strips of windows.

    Args:
      policy: the teacher.
      batch: as `WindowReader.read` returns it: "image" (b, strip + n_frames - 1, h, w, 3), of which
        window k has frames k..k + n_frames - 1, "action" (b, strip, n, a) in raw units, and the
        further inputs of this policy.
      samples: (b, strip) sample numbers, which seed the draws.
      key: base key.
      blocks: also return the blocks' activations.
      encode_frames: frames that the VAE encodes at a time (0: all).

    Returns:
      the arrays of `cache_arrays`, each with a leading axis b * strip.
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(samples.reshape(-1))

    def draw(stream, make):
        return jax.vmap(lambda k: make(jax.random.fold_in(k, stream)))(keys)

    def latents(images, stream):
        mean, logvar = _moments(policy, images, encode_frames)
        eps = draw(stream, lambda k: jax.random.normal(k, policy.latent_shape(1)[1:]))
        return policy.vae.sample(mean, logvar, eps)

    obs = _without_images(policy, batch)
    wrist = latents(batch["wrist_image"], 3) if policy.config.mar.proprio_image else None
    z = policy.video_tokens(latents(batch["image"], 0), policy.streams(obs, wrist))
    head = policy.action_head
    e_c = head.condition(z)
    nactions = policy.normalize("action", obs["action"])
    found = {"z": z, "actions": nactions, "condition": e_c}
    if blocks:
        t = draw(1, lambda k: jax.random.randint(k, (), 0, head.config.train_steps))
        noise = draw(2, lambda k: jax.random.normal(k, nactions.shape[1:]))
        inner = head_activations(head, e_c, nactions, t, noise)
        found |= {"t": t, "noise": noise, "h": inner["h"], "residual": inner["residual"]}
    return found


def latent_strips(
    policy: Policy, batch: Mapping[str, jax.Array], *, encode_frames: int = 0
) -> dict[str, jax.Array]:
    """Encodes strips of windows.

    Args:
      policy: only its VAE is used.
      batch: see `capture_strips`.
      encode_frames: frames that the VAE encodes at a time (0: all).

    Returns:
      the windows as `Policy.condition` takes them, with moments in the place of images, and
      "action"; each with a leading axis b * strip.
    """
    found = _without_images(policy, batch)
    for camera in cameras(policy.config):
        moments = _moments(policy, batch[camera], encode_frames)
        found[moments_of(camera)] = jnp.concatenate(moments, axis=-1)
    return found


def latent_arrays(
    policy: Policy, batch: Mapping[str, jax.Array]
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns the arrays of `latent_strips` for each window, with the dtype in which they are
    stored: name -> (shape, dtype). `batch` may have shapes in place of arrays."""
    found = nnx.eval_shape(latent_strips, policy, batch)
    moments = {moments_of(camera) for camera in cameras(policy.config)}
    return {
        name: (x.shape[1:], "float16" if name in moments else "float32")
        for name, x in found.items()
    }


def _moments(policy: Policy, images: jax.Array, encode_frames: int) -> tuple[jax.Array, jax.Array]:
    """Returns mean and log-variance (b * strip, t, h', w', z) of strips' images."""
    b, frames = images.shape[:2]
    n = policy.config.mar.n_frames
    window = np.arange(frames - n + 1)[:, None] + np.arange(n)
    found = encode_in_parts(policy, rearrange(images, "b f h w c -> (b f) h w c"), encode_frames)
    mean, logvar = (
        rearrange(
            rearrange(x, "(b f) h w c -> b f h w c", b=b)[:, window],
            "b k t h w c -> (b k) t h w c",
        )
        for x in found
    )
    return mean, logvar


def _without_images(policy: Policy, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {
        name: rearrange(values, "b k ... -> (b k) ...")
        for name, values in batch.items()
        if name not in cameras(policy.config)
    }


def make_capture(
    policy: Policy, mesh: Mesh, *, blocks: bool, latents: bool = False, encode_frames: int = 0
) -> Callable[..., Mapping[str, jax.Array]]:
    """Returns the mapped, jitted capture: f(variables, batch, samples, key) -> activations.

    With `latents` it is that of `latent_strips`, otherwise that of `capture_strips`.

    `variables` is `nnx.state(policy)`, replicated. The arrays of `batch` and `samples`, and every
    result, are divided over the mesh's data axes along their leading (strip) axis.
    """
    graphdef, _ = nnx.split(policy)
    rows = P(mesh.axis_names)

    def per_device(variables, batch, samples, key):
        policy = nnx.merge(graphdef, variables)
        if latents:
            return latent_strips(policy, batch, encode_frames=encode_frames)
        return capture_strips(
            policy, batch, samples, key, blocks=blocks, encode_frames=encode_frames
        )

    return parallel.sharded_map(per_device, mesh, in_specs=(P(), rows, rows, P()), out_specs=rows)


class Capture:
    """The capture of a policy on devices that each take `options.batch` strips per call.

    Attributes:
      mesh: the devices.
      run: the function of `make_capture`.
    """

    def __init__(
        self,
        policy: Policy,
        options: CaptureOptions,
        devices: Sequence[jax.Device],
        *,
        latents: bool = False,
    ):
        """Builds the function; the policy may have no arrays (`surgery.abstract_policy`).

        With `latents` it computes latents alone.
        """
        self.mesh = parallel.make_mesh(devices=devices)
        self.strips, self.strip = options.batch * self.mesh.size, options.strip
        self.run = make_capture(
            policy,
            self.mesh,
            blocks=options.blocks,
            latents=latents,
            encode_frames=options.encode_frames,
        )
        self._state = nnx.state(policy)

    def lower(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> jax.stages.Lowered:
        """Lowers one call, from the shapes of `self.strips` strips."""
        whole = parallel.replicated(self.mesh)
        rows = NamedSharding(self.mesh, P(self.mesh.axis_names))
        numbers = jax.ShapeDtypeStruct((self.strips, self.strip), jnp.int32)
        return self.run.lower(
            parallel.shapes_on_mesh(self._state, whole),
            *parallel.shapes_on_mesh((dict(batch), numbers), rows),
            parallel.shapes_on_mesh(jax.eval_shape(lambda: jax.random.key(0)), whole),
        )
