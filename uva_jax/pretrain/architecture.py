"""The initial policy of training from random weights: sizes, inputs and normaliser."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from uva_jax.data import normalizer, source
from uva_jax.data.augment import mirror_pusht
from uva_jax.data.replay_buffer import ReplayBuffer
from uva_jax.models import surgery
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import MARConfig, MLPHeadConfig, PolicyConfig, VAEConfig
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections_training import ModelOptions


def model_config(
    options: ModelOptions,
    action_dim: int,
    state_dims: Mapping[str, int] | None = None,
    *,
    spaced: bool = False,
) -> PolicyConfig:
    """Returns the architecture of a policy that is trained from random weights.

    Args:
      options: sizes and inputs.
      action_dim: width of an action.
      state_dims: widths of `options.states` (by default 1 each).
      spaced: past frames are spaced at random in training (`different_history_freq`).

    Raises:
      UserError: the image size does not give whole latent cells that conv_fc can pool.
    """
    widths = {name: (state_dims or {}).get(name, 1) for name in options.states}
    state_dim = sum(widths.values())
    levels = len(options.vae_multipliers)
    vae_config = VAEConfig(options.vae_width, options.vae_multipliers, attn_levels=(levels - 1,))
    side, rest = divmod(options.image_size, vae_config.stride)
    if rest or side % 4:
        raise UserError(
            f"config.pretrain.model.image_size is {options.image_size}, but with {levels} levels "
            f"of the VAE it must be a multiple of {4 * vae_config.stride}"
        )
    grid, width = (side, side), options.width

    def head(channels, size, **more):
        return MLPHeadConfig(channels, width, size[0], size[1], grid=grid, **more)

    return PolicyConfig(
        task=options.task,
        image_size=options.image_size,
        vae=vae_config,
        mar=MARConfig(
            encoder_embed_dim=width,
            encoder_depth=options.depth,
            encoder_num_heads=options.heads,
            decoder_embed_dim=width,
            decoder_depth=options.depth,
            decoder_num_heads=options.heads,
            grid=grid,
            token_dim=vae_config.z_channels,
            action_dim=action_dim,
            attn_dropout=options.dropout,
            proj_dropout=options.dropout,
            text_dim=options.text_dim,
            history_action=options.past_actions,
            proprio_dim=state_dim,
            **({"proprio_steps": MARConfig.n_frames} if spaced else {}),
            proprio_image=options.wrist,
            wrist=options.wrist,
        ),
        video_head=head(vae_config.z_channels, options.video_head, clip=False),
        wrist_head=head(vae_config.z_channels, options.video_head, clip=False)
        if options.wrist
        else None,
        action_head=head(action_dim, options.action_head, aggregator="conv_fc"),
        proprio_head=head(state_dim, options.action_head, aggregator="conv_fc")
        if state_dim and options.predict_states
        else None,
        normalizer_fields=(("action", action_dim), *widths.items()),
        proprio_keys=tuple(widths),
        different_history_freq=spaced,
        n_action_steps=options.n_action_steps,
        language_model="clip" if options.text_dim else None,
    )


def fit_normalizer(policy: Policy, buffer: ReplayBuffer, data: source.DataOptions) -> Policy:
    """Returns the policy with its normaliser fitted to the data, and to the mirrored actions."""
    arrays = surgery.flatten(policy)
    for name, _ in policy.config.normalizer_fields:
        values = buffer.read(data.action_key if name == "action" else name)
        values = np.asarray(values, np.float32)
        if data.mirror:  # it changes images and actions only
            values = np.concatenate([values, mirror_pusht({"action": values})["action"]])
        for stat, value in traverse_util.flatten_dict(
            normalizer.fit_field(values), sep="/"
        ).items():
            arrays[f"normalizer/{name}/{stat}"] = jnp.asarray(value)
    return surgery.replace(policy, arrays)
