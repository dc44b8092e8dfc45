"""UVA's training losses of a policy in every task mode; every random draw can be given.

They are separate from `Policy` because acting does not need them. Upstream: `forward`,
`forward_loss` of `mar_con_unified.py`, `compute_loss` of the policy.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from einops import rearrange

from uva_jax.models import mar
from uva_jax.models.frames import frame_indices
from uva_jax.models.layers import sub_key
from uva_jax.models.policy import Policy
from uva_jax.runtime.errors import UserError

VIDEO_MODES = ("video_model", "dynamic_model", "full_dynamic_model")
ACTION_MODES = ("policy_model", "inverse_model", "full_dynamic_model")


def latent_loss(
    policy: Policy,
    target: jax.Array,
    cond: jax.Array,
    nactions: jax.Array,
    *,
    task_mode: str,
    key: jax.Array | None = None,
    draws: Mapping[str, jax.Array] | None = None,
    streams: Mapping[str, jax.Array] | None = None,
    wrist_target: jax.Array | None = None,
    proprio_target: jax.Array | None = None,
    train: bool = True,
    noise_draws: int = 1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the loss from latents.

    Args:
      policy: the model.
      target: (b, t, h', w', z) future latents.
      cond: (b, t, h', w', z) history latents.
      nactions: (b, n_actions, action_dim) normalised.
      task_mode: one of TASK_MODES.
      key: for draws that are not given.
      draws: given draws: "mask" (b, t, s); "t/<head>", "noise/<head>" for head in video, wrist,
        act, prop, shaped as `DiffusionHead.loss` takes them; "text", "history" uniforms.
      streams: further inputs of `MAR.embed`.
      wrist_target: (b, t, h', w', z) future wrist latents, if the policy predicts them.
      proprio_target: (b, n_actions, k), if the policy predicts proprioception.
      train: apply dropout and random replacement of inputs.
      noise_draws: diffusion noise draws of the video and action heads for each sample (upstream:
        1).

    Returns:
      the scalar loss, and its parts: "video_loss", "act_loss", "z" (b, t * s, c), "mask", and
      "rows/<head>" with per-row mse, vb and loss.

    Raises:
      UserError: an input that the policy or the mode needs is missing.
    """
    draws = dict(draws or {})
    patch = policy.config.patch_size
    tokens = mar.patchify(target, patch)
    mask = draws.get("mask")
    if mask is None:
        mask = mar.random_mask(policy.config.mar, len(target), sub_key(key, 0))
    streams = dict(streams or {})
    if policy.config.mar.wrist:
        streams["wrist_tokens"] = mar.patchify(wrist_target, patch)
    z = policy.mar(
        tokens,
        mask,
        mar.patchify(cond, patch),
        task_mode=task_mode,
        nactions=nactions,
        uniforms=draws,
        key=sub_key(key, 1) if train else None,
        **streams,
    )
    parts = {"z": z, "mask": mask, "video_loss": jnp.zeros(()), "act_loss": jnp.zeros(())}

    def rows(name, head, values, index, **more):
        out = head.loss(
            values,
            z,
            key=sub_key(key, index),
            t=draws.get(f"t/{name}"),
            noise=draws.get(f"noise/{name}"),
            **more,
        )
        parts[f"rows/{name}"] = out
        return out["loss"]

    def tokens_loss(name, head, values, index):
        """Returns a head's mean loss over the masked tokens of all draws."""
        found = rows(name, head, values, index, draws=noise_draws)
        weights = rearrange(mask, "b t s -> b (t s)")
        return jnp.sum(found * jnp.concatenate([weights] * noise_draws)) / (
            noise_draws * jnp.sum(weights)
        )

    if task_mode in VIDEO_MODES:
        flat = rearrange(tokens, "b t s c -> b (t s) c")
        parts["video_loss"] = tokens_loss("video", policy.video_head, flat, 2)
        if policy.config.mar.wrist:
            flat = rearrange(streams["wrist_tokens"], "b t s c -> b (t s) c")
            parts["video_loss"] += tokens_loss("wrist", policy.wrist_head, flat, 3)
    if task_mode in ACTION_MODES:
        action = rows("act", policy.action_head, nactions, 4, draws=noise_draws)
        parts["act_loss"] = jnp.mean(action)
    loss = parts["video_loss"] + parts["act_loss"]
    if policy.proprio_head is not None:
        if proprio_target is None:
            raise UserError(
                "this policy predicts proprioception, but the batch has no target: add it"
            )
        parts["prop_loss"] = jnp.mean(rows("prop", policy.proprio_head, proprio_target, 5))
        loss = loss + parts["prop_loss"]
    return loss, parts


def encode_batch(
    policy: Policy,
    batch: Mapping[str, jax.Array],
    *,
    key: jax.Array | None = None,
    draws: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Encodes windows of raw data for `latent_loss`; no gradient flows into the VAE.

    Args: as for `batch_loss`.

    Returns:
      target and cond, latents (b, t, h', w', z), and normalised actions.
    """
    draws = dict(draws or {})
    n_frames, horizon = policy.config.mar.n_frames, batch["action"].shape[1]
    images = batch["image"]
    if images.shape[1] != 2 * n_frames:
        images = images[:, jnp.array(frame_indices(images.shape[1], n_frames, train=True))]
    frames = policy.preprocess(images)
    shape = policy.latent_shape(len(frames))

    def encode(part, name, index):
        eps = draws.get(name)
        if eps is None:
            eps = jax.random.normal(sub_key(key, index), shape)
        return jax.lax.stop_gradient(policy.encode_frames(part, eps))

    target = encode(frames[:, n_frames:], "eps_target", 10)
    cond = encode(frames[:, :n_frames], "eps_cond", 11)
    nactions = policy.normalize("action", batch["action"])
    nactions = (
        nactions[:, horizon // 2 - 1 : -1]
        if policy.config.shift_action
        else nactions[:, horizon // 2 :]
    )
    return target, cond, nactions


def batch_loss(
    policy: Policy,
    batch: Mapping[str, jax.Array],
    *,
    task_mode: str,
    key: jax.Array | None = None,
    draws: Mapping[str, jax.Array] | None = None,
    train: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the loss from windows of raw data.

    Args:
      policy: the model.
      batch: "image" (b, T, h, w, 3) with T the horizon, or the 2 * n_frames selected frames;
        "action" (b, T, action_dim) in raw units.
      task_mode: one of TASK_MODES.
      key: for draws that are not given.
      draws: as in `latent_loss`, and "eps_target", "eps_cond" (b, t, h', w', z).
      train: apply dropout and random replacement of inputs.

    Returns:
      as `latent_loss`.
    """
    target, cond, nactions = encode_batch(policy, batch, key=key, draws=draws)
    return latent_loss(
        policy, target, cond, nactions, task_mode=task_mode, key=key, draws=draws, train=train
    )
