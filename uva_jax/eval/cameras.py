"""The frames of a window's cameras as a policy takes and predicts them.

Those that no sampling is needed for, the real ones and the VAE's reconstruction of them, are equal
for all policies with one VAE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uva_jax.models.frames import frame_indices
from uva_jax.models.policy import Policy

CAMERAS = {"main": "", "wrist": "wrist_"}  # camera -> prefix of the names of its arrays
IMAGES = tuple(f"{when}{prefix}image" for when in ("", "future_") for prefix in CAMERAS.values())


@dataclass(frozen=True)
class Camera:
    """Frames of one camera, each (n_frames, size, size, 3) uint8 at the policy's size, or None.

    `history` and `future` are real, `predicted` is sampled, and `reconstruction` is the real future
    encoded (to the mean, without noise) and decoded by the VAE.
    """

    history: np.ndarray | None
    future: np.ndarray | None
    predicted: np.ndarray | None
    reconstruction: np.ndarray | None


def cameras_of(policy: Policy) -> dict[str, str]:
    """Returns the cameras whose future a policy predicts, and the prefix of each."""
    return CAMERAS if policy.config.mar.wrist else {"main": ""}


def make_reconstructor(policy: Policy) -> Callable[[Mapping], dict[str, Camera]]:
    """Returns f(window) -> cameras without a prediction, compiled at its first call.

    Windows come from `predict.checked_window`.
    """
    graph, variables = nnx.split(policy)

    @jax.jit
    def run(variables, images):
        policy = nnx.merge(graph, variables)
        return {
            name: real_frames(policy, images, prefix, reconstruct=True)
            for name, prefix in cameras_of(policy).items()
        }

    def reconstruct(window: Mapping[str, np.ndarray]) -> dict[str, Camera]:
        images = {name: window[name][None] for name in IMAGES if name in window}
        with jax.default_matmul_precision("highest"):
            found = jax.tree.map(np.asarray, run(variables, images))
        return {name: Camera(**frames, predicted=None) for name, frames in found.items()}

    return reconstruct


def real_frames(policy: Policy, obs: Mapping, prefix: str, reconstruct: bool) -> dict:
    """Returns the history, the future and, if it is wanted, its reconstruction; for use in jit.

    Args:
      policy: the policy.
      obs: images of a batch of one window.
      prefix: of the camera's names.
      reconstruct: whether the reconstruction is wanted; otherwise it is None.

    Returns:
      fields of a `Camera`; what `obs` does not hold is None.
    """
    n_frames = policy.config.mar.n_frames

    def real(name):
        if name not in obs:
            return None
        images = obs[name]
        if images.shape[1] != n_frames:
            images = images[:, np.array(frame_indices(images.shape[1], n_frames))]
        return policy.preprocess(images)

    history, future = real(f"{prefix}image"), real(f"future_{prefix}image")
    again = None
    if future is not None and reconstruct:
        no_noise = jnp.zeros(policy.latent_shape(1))
        again = policy.decode_frames(policy.encode_frames(future, no_noise))
    frames = {"history": history, "future": future, "reconstruction": again}
    return {name: None if x is None else to_uint8(x[0]) for name, x in frames.items()}


def to_uint8(frames: jax.Array) -> jax.Array:
    """Converts [-1, 1] to 0..255, rounded; values that are not finite become grey."""
    return jnp.round((jnp.nan_to_num(frames) + 1.0) * 127.5).astype(jnp.uint8)
