"""The whole UVA policy, from images to actions and video.

`Policy` has its parts as attributes (`vae`, `mar`, `video_head`, `action_head`), so that a graft is
an assignment: `policy.action_head = GraftedHead(...)`. Every random draw comes from a key or is
given, so that two implementations can be compared number by number.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from uva_jax.models import mar
from uva_jax.models.actor import Actor
from uva_jax.models.diffusion_head import DiffusionHead
from uva_jax.models.frames import frame_indices
from uva_jax.models.grafted_head import GraftedHead
from uva_jax.models.mlp_head import MLPHead
from uva_jax.models.policy_call import cameras
from uva_jax.models.policy_config import HeadConfig, PolicyConfig
from uva_jax.models.text_tower import TextTower
from uva_jax.models.vae import VAE
from uva_jax.runtime.errors import UserError


class Stat(nnx.Variable):
    """A constant of the normaliser: stored and sharded, but never trained."""


def make_head(config: HeadConfig | None, *, dtype=None, rngs: nnx.Rngs) -> DiffusionHead | None:
    """Returns the head of a config with random weights, or None."""
    if config is None:
        return None
    kind = MLPHead if config.kind == "mlp" else GraftedHead
    return kind(config, dtype=dtype, rngs=rngs)


def moments_of(camera: str) -> str:
    """Returns the name under which an observation holds a camera's encoded frames."""
    return f"{camera}_moments"


def _divide(x: jax.Array, divisor: float) -> jax.Array:
    """Returns x / divisor, rounded as a division; XLA would multiply by the reciprocal."""
    return x / jax.lax.optimization_barrier(jnp.float32(divisor))


def _axis_taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the indices and the float32 weight of the two samples of each resized position."""
    source = np.maximum((np.arange(size) + 0.5) * (length / size) - 0.5, 0.0)
    low = np.minimum(source.astype(np.int32), length - 1)
    return low, np.minimum(low + 1, length - 1), (source - low).astype(np.float32)


def resize_bilinear(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resizes (..., h, w, c) to (..., *size, c), half-pixel centres, no antialiasing.

    It follows PyTorch's order of operations, because the VAE's group norms magnify differences in
    the last bit of flat image regions.
    """
    top, bottom, down = _axis_taps(x.shape[-3], size[0])
    left, right, across = _axis_taps(x.shape[-2], size[1])
    result = None
    for rows, row_weight in ((top, 1 - down), (bottom, down)):
        picked = jnp.take(x, rows, axis=-3)
        for cols, col_weight in ((left, 1 - across), (right, across)):
            weight = (row_weight[:, None] * col_weight[None])[..., None]
            part = jnp.take(picked, cols, axis=-2) * weight
            result = part if result is None else result + part
    return result


class Policy(nnx.Module):
    """A UVA policy; see `PolicyConfig` for its sizes and options.

    Attributes:
      config: the architecture.
      dtype: of matrix products; None: float32, like the parameters.
    """

    def __init__(self, config: PolicyConfig, *, dtype=None, remat: bool = False, rngs: nnx.Rngs):
        """Makes random weights; `remat` recomputes transformer blocks in the backward pass."""
        self.config, self.dtype = config, dtype
        self.vae = VAE(config.vae, dtype=dtype, rngs=rngs)
        self.mar = mar.MAR(config.mar, dtype=dtype, remat=remat, rngs=rngs)
        self.video_head = make_head(config.video_head, dtype=dtype, rngs=rngs)
        self.wrist_head = make_head(config.wrist_head, dtype=dtype, rngs=rngs)
        self.action_head = make_head(config.action_head, dtype=dtype, rngs=rngs)
        self.proprio_head = make_head(config.proprio_head, dtype=dtype, rngs=rngs)
        tower = config.text_tower
        self.text_model = None if tower is None else TextTower(tower, rngs=rngs)
        self.normalizer = nnx.Dict(
            {
                name: nnx.Dict(
                    scale=Stat(jnp.ones(width)),
                    offset=Stat(jnp.zeros(width)),
                    input_stats=nnx.Dict(
                        {k: Stat(jnp.zeros(width)) for k in ("min", "max", "mean", "std")}
                    ),
                )
                for name, width in config.normalizer_fields
            }
        )

    # ---- pixels, latents, normalisation ----

    def preprocess(self, images: jax.Array) -> jax.Array:
        """Converts images to the VAE's input; resizing is bilinear, as upstream.

        Args:
          images: (..., h, w, 3) uint8, or float in [0, 1].

        Returns:
          (..., size, size, 3) float32 in [-1, 1].
        """
        if images.dtype == jnp.uint8:
            x = jnp.asarray(np.arange(256, dtype=np.float32) / np.float32(255))[images]
        else:
            x = images.astype(jnp.float32)
        size = self.config.image_size
        if x.shape[-3:-1] != (size, size):
            x = resize_bilinear(x, (size, size))
        return _divide(x * 255.0, 127.5) - 1.0

    def encode_frames(self, frames: jax.Array, eps: jax.Array) -> jax.Array:
        """Samples latents (b, t, h', w', z) of frames (b, t, h, w, 3) in [-1, 1].

        `eps` is standard normal noise of the latents' shape.
        """
        mean, logvar = self.vae.encode(rearrange(frames, "b t h w c -> (b t) h w c"))
        mean, logvar = (
            rearrange(x, "(b t) h w c -> b t h w c", b=len(eps)) for x in (mean, logvar)
        )
        return self.vae.sample(mean, logvar, eps)

    def latent_shape(self, batch: int) -> tuple[int, ...]:
        """Returns the shape of a batch of windows' latents: (b, t, h', w', z)."""
        side = self.config.image_size // self.config.vae.stride
        return (batch, self.config.mar.n_frames, side, side, self.config.vae.z_channels)

    def decode_frames(self, latents: jax.Array) -> jax.Array:
        """Decodes latents (b, t, h', w', z) to frames (b, t, h, w, 3) in [-1, 1]."""
        frames = self.vae.decode(rearrange(latents, "b t h w c -> (b t) h w c"))
        return jnp.clip(rearrange(frames, "(b t) h w c -> b t h w c", b=len(latents)), -1.0, 1.0)

    def normalize(self, field: str, values: jax.Array) -> jax.Array:
        """Converts raw units to about [-1, 1]; the identity for a policy without normaliser."""
        if self.config.normalizer_type == "none":
            return values
        return values * self.normalizer[field]["scale"][...] + self.normalizer[field]["offset"][...]

    def unnormalize(self, field: str, values: jax.Array) -> jax.Array:
        """Converts normalised values to raw units; the inverse of `normalize`."""
        if self.config.normalizer_type == "none":
            return values
        params = self.normalizer[field]
        return (values - params["offset"][...]) / params["scale"][...]

    # ---- acting ----

    def video_tokens(
        self,
        cond: jax.Array,
        streams: Mapping[str, jax.Array] | None = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the decoder's tokens z in mode policy_model.

        Args:
          cond: (b, t, h', w', z) history latents.
          streams: further inputs of `MAR.embed` (language, proprioception, past actions).
          key: for dropout and random replacement of inputs in training. None: inference.

        Returns:
          (b, t * s, decoder_embed_dim).
        """
        tokens = mar.patchify(cond, self.config.patch_size)
        return self.mar(None, None, tokens, task_mode="policy_model", key=key, **(streams or {}))

    def streams(
        self, obs: Mapping[str, jax.Array], wrist_cond: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Returns the further inputs of `MAR.embed` that this policy takes.

        Args:
          obs: the inputs that the policy takes among "text_latents" (b, text_dim); "past_action"
            (b, n_actions, a) in raw units, which is optional; and the states of
            `config.proprio_keys` (b, steps, k) in raw units.
          wrist_cond: (b, t, h', w', z) latents of the wrist camera's history.

        Raises:
          UserError: an input is missing.
        """
        c, streams = self.config.mar, {}
        wanted = (("text_latents",) if c.text_dim else ()) + (
            self.config.proprio_keys if c.proprio_dim else ()
        )
        if missing := [name for name in wanted if name not in obs]:
            raise UserError(
                f"this policy also takes {', '.join(missing)}, but the observation holds only "
                f"{', '.join(obs)}"
            )
        if c.text_dim:
            streams["text_latents"] = obs["text_latents"]
        if c.history_action and "past_action" in obs:
            streams["history_nactions"] = self.normalize("action", obs["past_action"])
        if c.proprio_dim:
            parts = [self.normalize(k, obs[k]) for k in self.config.proprio_keys]
            state = jnp.concatenate(parts, axis=-1)
            if state.shape[1] != c.proprio_steps:
                state = state[:, np.array(frame_indices(state.shape[1], c.proprio_steps))]
            streams["proprio"] = state
            if c.proprio_image:
                streams["proprio_tokens"] = mar.patchify(wrist_cond, self.config.patch_size)
        return streams

    def encode_observation(
        self, images: jax.Array, *, key: jax.Array | None = None, eps: jax.Array | None = None
    ) -> jax.Array:
        """Encodes images (b, n_obs, h, w, 3) to latents (b, t, h', w', z).

        `n_frames` images in place of n_obs are taken as the selected frames. `key` or `eps`
        (b, t, h', w', z) gives the VAE's noise.
        """
        n_frames = self.config.mar.n_frames
        if images.shape[1] != n_frames:
            images = images[:, np.array(frame_indices(images.shape[1], n_frames))]
        if eps is None:
            eps = jax.random.normal(key, self.latent_shape(images.shape[0]))
        return self.encode_frames(self.preprocess(images), eps)

    def condition(
        self,
        obs: Mapping[str, jax.Array],
        *,
        key: jax.Array | None = None,
        vae_eps: jax.Array | None = None,
        wrist_eps: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes an observation for `video_tokens`: history latents and further inputs.

        Args: as for `predict_action`; `key` draws the VAE's noise if it is not given. In the place
          of a camera's images, `obs` can hold "image_moments" and "wrist_image_moments"
          (b, n_frames, h', w', 2 z): what the VAE gives for them, mean and log-variance.

        Raises:
          UserError: the observation lacks an input of this policy.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        if missing := [
            x for x in cameras(self.config) if x not in obs and moments_of(x) not in obs
        ]:
            raise UserError(f"the observation has no {' and no '.join(missing)}: add it")

        def latents(name, key, eps):
            if name in obs:
                return self.encode_observation(obs[name], key=key, eps=eps)
            mean, logvar = jnp.split(obs[moments_of(name)].astype(jnp.float32), 2, axis=-1)
            eps = jax.random.normal(key, mean.shape) if eps is None else eps
            return self.vae.sample(mean, logvar, eps)

        wrist = None
        if self.config.mar.proprio_image:
            wrist = latents("wrist_image", keys[1], wrist_eps)
        return latents("image", keys[0], vae_eps), self.streams(obs, wrist)

    def actor(
        self, *, sampling_steps: str | int = "", sampler: str = "ancestral", seed: int = 0
    ) -> Actor:
        """Returns a new `Actor`, which turns every step's observation into an action."""
        return Actor(self, sampling_steps=sampling_steps, sampler=sampler, seed=seed)

    def predict_action(
        self,
        obs: Mapping[str, jax.Array],
        *,
        key: jax.Array | None = None,
        vae_eps: jax.Array | None = None,
        wrist_eps: jax.Array | None = None,
        noise: jax.Array | None = None,
        sampling_steps: str | None = None,
        sampler: str = "ancestral",
        eta: float | None = None,
    ) -> dict[str, jax.Array]:
        """Predicts actions for observations.

        Args:
          obs: "image" (b, n_obs_steps, h, w, 3), uint8 or float in [0, 1], or only its n_frames
            selected frames; "wrist_image" likewise; and the further inputs of `streams`.
          key: for draws that are not given.
          vae_eps, wrist_eps: (b, n_frames, h', w', z) the VAE's sampling noise.
          noise: (K + 1, b, n_actions, action_dim) the noise of action sampling with K steps.
          sampling_steps: respacing in place of the head's own, such as "10".
          sampler: "ancestral", "ddim" or "dpm++"; see `diffusion.sample_loop`.
          eta: a number chooses DDIM with so much noise.

        Returns:
          "action" (b, n_action_steps, action_dim) to execute and "action_pred"
          (b, n_actions, action_dim), both in raw units.

        Raises:
          UserError: the observation lacks an input of this policy.
        """
        encode_key, sample_key = (None, None) if key is None else jax.random.split(key)
        cond, streams = self.condition(obs, key=encode_key, vae_eps=vae_eps, wrist_eps=wrist_eps)
        nactions = self.action_head.sample(
            self.video_tokens(cond, streams),
            key=sample_key,
            noise=noise,
            temperature=self.config.temperature,
            sampling_steps=sampling_steps,
            sampler=sampler,
            eta=eta,
        )
        actions = self.unnormalize("action", nactions)
        return {"action": actions[:, : self.config.n_action_steps], "action_pred": actions}
