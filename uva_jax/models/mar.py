"""The masked autoregressive transformer (MAR) with UVA's inputs: encoder and decoder.

Tokens are frame-major: token = frame * tokens_per_frame + row * columns + column. `MARConfig` says
which inputs there are, and the task mode which of them are replaced by placeholders. Upstream:
`mar_con_unified.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from uva_jax.models.layers import Block, layer_norm, linear, sub_key
from uva_jax.models.policy_config import TASK_MODES, MARConfig
from uva_jax.runtime.errors import UserError

_NORMAL = nnx.initializers.normal(0.02)


def patchify(latents: jax.Array, patch_size: int) -> jax.Array:
    """Turns latents (b, t, h, w, c) into tokens (b, t, s, c * p * p), ordered (c, p, q)."""
    return rearrange(latents, "b t (h p) (w q) c -> b t (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(tokens: jax.Array, grid: tuple[int, int], patch_size: int) -> jax.Array:
    """Turns tokens (b, t, s, c * p * p) into latents (b, t, h, w, c)."""
    return rearrange(
        tokens,
        "b t (h w) (c p q) -> b t (h p) (w q) c",
        h=grid[0],
        p=patch_size,
        q=patch_size,
    )


def ordered_mask(orders: jax.Array, rate: jax.Array, n_frames: int) -> jax.Array:
    """Returns a mask (b, n_frames, s): 1 for the first ceil(s * rate) tokens of orders (b, s)."""
    count = jnp.ceil(orders.shape[-1] * rate)
    mask = (jnp.argsort(orders, axis=-1) < count).astype(jnp.float32)
    return repeat(mask, "b s -> b t s", t=n_frames)


def random_mask(config: MARConfig, batch: int, key: jax.Array) -> jax.Array:
    """Draws a training mask (b, t, s), 1 for masked, with one rate per batch.

    The rate is a truncated normal on [mask_ratio_min, 1] with mean 1 and standard deviation 0.25.
    Each sample masks ceil(s * rate) random tokens, the same in all its frames.
    """
    rate_key, order_key = jax.random.split(key)
    low = (config.mask_ratio_min - 1.0) / 0.25
    rate = 1.0 + 0.25 * jax.random.truncated_normal(rate_key, low, 0.0)
    orders = jnp.argsort(jax.random.uniform(order_key, (batch, config.tokens_per_frame)), axis=-1)
    return ordered_mask(orders, rate, config.n_frames)


class MAR(nnx.Module):
    """Encoder and decoder over the video tokens of a window."""

    def __init__(self, config: MARConfig, *, dtype=None, remat: bool = False, rngs: nnx.Rngs):
        """Makes random weights; `remat` recomputes blocks in the backward pass."""
        self.config = c = config
        self.remat = remat
        dim, dec = c.encoder_embed_dim, c.decoder_embed_dim

        def table(*shape):
            return nnx.Param(_NORMAL(rngs.params(), shape))

        def project(width):
            return linear(width, dim, rngs=rngs, dtype=dtype)

        def blocks(depth, width, heads):
            return nnx.List(
                [
                    Block(
                        width,
                        heads,
                        mlp_ratio=c.mlp_ratio,
                        eps=c.norm_eps,
                        attn_dropout=c.attn_dropout,
                        proj_dropout=c.proj_dropout,
                        dtype=dtype,
                        rngs=rngs,
                    )
                    for _ in range(depth)
                ]
            )

        self.z_proj_cond, self.z_proj = project(c.token_dim), project(c.token_dim)
        self.action_proj_cond = project(c.action_dim)
        self.fake_latent_x, self.fake_action_latent = table(1, dim), table(1, dim)
        streams = 3
        if c.wrist:
            self.z_proj_wrist, self.fake_latent_wrist_x = project(c.token_dim), table(1, dim)
            streams += 1
        if c.history_action:
            self.history_action_proj_cond = project(c.action_dim)
            self.fake_latent_history_action = table(1, dim)
            streams += 1
        if c.proprio_dim:
            self.proprioception_proj_cond = project(c.proprio_dim)
            # UVA creates this layer even if the wrist image is not an input (umi).
            self.proprioception_image_proj_cond = project(c.token_dim)
            streams += 1 + c.proprio_image
        if c.text_dim:
            self.fake_latent, self.text_proj_cond = table(1, dim), project(c.text_dim)
            self.text_pos_embed = table(1, c.text_tokens, dim)
            self.decoder_text_pos_embed = table(1, c.text_tokens, dec)
        self.proj_cond_x_layer = project(streams * dim)
        self.temporal_pos_embed = table(1, c.n_frames, dim)
        self.spatial_pos_embed = table(1, c.tokens_per_frame, dim)
        self.z_proj_ln = layer_norm(dim, rngs=rngs)
        self.encoder_blocks = blocks(c.encoder_depth, dim, c.encoder_num_heads)
        self.encoder_norm = layer_norm(dim, eps=c.norm_eps, rngs=rngs)
        self.decoder_embed = linear(dim, dec, rngs=rngs, dtype=dtype)
        self.decoder_temporal_pos_embed = table(1, c.n_frames, dec)
        self.decoder_spatial_pos_embed = table(1, c.tokens_per_frame, dec)
        self.decoder_blocks = blocks(c.decoder_depth, dec, c.decoder_num_heads)
        self.decoder_norm = layer_norm(dec, eps=c.norm_eps, rngs=rngs)
        self.diffusion_temporal_embed = table(1, c.n_frames, dec)
        self.diffusion_spatial_embed = table(1, c.tokens_per_frame, dec)

    def embed(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        cond: jax.Array,
        *,
        task_mode: str,
        nactions: jax.Array | None = None,
        history_nactions: jax.Array | None = None,
        proprio: jax.Array | None = None,
        proprio_tokens: jax.Array | None = None,
        wrist_tokens: jax.Array | None = None,
        text_latents: jax.Array | None = None,
        drop_condition: bool = False,
        key: jax.Array | None = None,
        uniforms: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Fuses all inputs into the encoder's input, before its first norm.

        Args:
          tokens: (b, t, s, token_dim) future video; not used in policy_model.
          mask: (b, t, s), 1 for hidden future tokens.
          cond: (b, t, s, token_dim) history; not used in inverse_model.
          task_mode: one of TASK_MODES.
          nactions: (b, n_actions, action_dim) in [-1, 1]; used in dynamic_model.
          history_nactions: (b, n_actions, action_dim); None, and steps of NaN without a key:
            placeholder.
          proprio: (b, proprio_steps, proprio_dim).
          proprio_tokens, wrist_tokens: (b, t, s, token_dim), the wrist camera's past and future.
          text_latents: (b, text_dim).
          drop_condition: unconditional pass of guidance: the placeholder replaces the text or, in a
            model without language, the history.
          key: for random replacement of text and history actions in training. None: inference.
          uniforms: the draws of those replacements ("text" (b,), "history" (b, n_actions)).

        Returns:
          (b, [text_tokens +] t * s, encoder_embed_dim).

        Raises:
          UserError: the task mode is unknown or an input that it needs is missing.
        """
        c = self.config
        if task_mode not in TASK_MODES:
            raise UserError(
                f"task mode {task_mode!r} is unknown: use one of {', '.join(TASK_MODES)}"
            )
        batch, total = cond.shape[0], c.n_tokens

        def placeholder(param, n=total):
            return jnp.broadcast_to(param[...][:, None], (batch, n, param.shape[-1]))

        def flat(x):
            return rearrange(x, "b t s c -> b (t s) c")

        def future(values, project, fake):
            if task_mode == "policy_model":
                return placeholder(fake)
            if values is None:
                raise UserError(f"{task_mode} needs the future video tokens, but got none")
            x = flat(project(values))
            if task_mode == "inverse_model":
                return x
            return jnp.where(rearrange(mask, "b t s -> b (t s) 1") == 1, placeholder(fake), x)

        parts = [future(tokens, self.z_proj, self.fake_latent_x)]
        if c.wrist:
            parts.append(future(wrist_tokens, self.z_proj_wrist, self.fake_latent_wrist_x))
        hide_cond = task_mode == "inverse_model" or (drop_condition and not c.text_dim)
        parts.append(placeholder(self.fake_latent_x) if hide_cond else flat(self.z_proj_cond(cond)))
        if c.history_action:
            fake = placeholder(self.fake_latent_history_action, c.n_actions)
            if history_nactions is None:
                past = fake
            else:
                past = self.history_action_proj_cond(history_nactions)
                if key is None:  # rollouts, in whose batches some episodes have just begun
                    past = jnp.where(jnp.isnan(history_nactions[..., :1]), fake, past)
                else:
                    draw = (uniforms or {}).get("history")
                    if draw is None:
                        draw = jax.random.uniform(sub_key(key, 1), (batch, c.n_actions))
                    past = jnp.where((draw > c.action_mask_ratio)[..., None], fake, past)
            parts.append(jnp.repeat(past, total // c.n_actions, axis=1))
        if task_mode == "dynamic_model":
            if nactions is None:
                raise UserError("dynamic_model predicts video from actions, but got no actions")
            actions = self.action_proj_cond(nactions)
        else:
            actions = placeholder(self.fake_action_latent, c.n_actions)
        parts.append(jnp.repeat(actions, total // c.n_actions, axis=1))
        if c.proprio_dim:
            if proprio is None or (c.proprio_image and proprio_tokens is None):
                raise UserError("this policy takes proprioception, but the observation has none")
            if c.proprio_image:
                parts.append(flat(self.proprioception_image_proj_cond(proprio_tokens)))
            state = self.proprioception_proj_cond(proprio)
            parts.append(jnp.repeat(state, total // c.proprio_steps, axis=1))

        x = self.proj_cond_x_layer(jnp.concatenate(parts, axis=-1))
        x = x + _grid_embedding(self.temporal_pos_embed, self.spatial_pos_embed)
        if c.text_dim:
            x = jnp.concatenate([self._text(text_latents, drop_condition, key, uniforms), x], 1)
        return x

    def _text(self, text_latents, drop_condition, key, uniforms) -> jax.Array:
        if text_latents is None:
            raise UserError("this policy is conditioned on language, but got no text latents")
        c = self.config
        text, fake = self.text_proj_cond(text_latents), self.fake_latent[...]
        if drop_condition:
            text = jnp.broadcast_to(fake, text.shape)
        elif key is not None:
            draw = (uniforms or {}).get("text")
            if draw is None:
                draw = jax.random.uniform(sub_key(key, 0), text.shape[:1])
            text = jnp.where((draw < c.label_drop_prob)[:, None], fake, text)
        return repeat(text, "b c -> b n c", n=c.text_tokens) + self.text_pos_embed[...]

    def encode(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Applies the encoder to the result of `embed`: (b, n, c) -> (b, n, c)."""
        x = self.z_proj_ln(x)
        for i, block in enumerate(self.encoder_blocks):
            x = self._apply(block, x, sub_key(key, 100 + i))
        return self.encoder_norm(x)

    def _apply(self, block: Block, x: jax.Array, key: jax.Array | None) -> jax.Array:
        if not self.remat:
            return block(x, key=key)
        # The block is split and merged again, because nnx modules must not cross a trace.
        graph, state = nnx.split(block)
        return jax.checkpoint(lambda s, v: nnx.merge(graph, s)(v, key=key))(state, x)

    def decoder_input(self, x: jax.Array) -> jax.Array:
        """Projects the encoder's output and adds the decoder's positions."""
        position = _grid_embedding(self.decoder_temporal_pos_embed, self.decoder_spatial_pos_embed)
        if self.config.text_dim:
            position = jnp.concatenate([self.decoder_text_pos_embed[...], position], axis=1)
        return self.decoder_embed(x) + position

    def decode(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Decodes (b, [text +] t * s, c) to video tokens z (b, t * s, decoder_embed_dim)."""
        x = self.decoder_input(x)
        for i, block in enumerate(self.decoder_blocks):
            x = self._apply(block, x, sub_key(key, 200 + i))
        x = self.decoder_norm(x)
        if self.config.text_dim:
            x = x[:, self.config.text_tokens :]
        return x + _grid_embedding(self.diffusion_temporal_embed, self.diffusion_spatial_embed)

    def __call__(self, tokens, mask, cond, *, key: jax.Array | None = None, **streams) -> jax.Array:
        """Applies `embed`, `encode` and `decode`: returns (b, t * s, decoder_embed_dim)."""
        x = self.embed(tokens, mask, cond, key=sub_key(key, 0), **streams)
        return self.decode(self.encode(x, key=sub_key(key, 1)), key=sub_key(key, 2))


def _grid_embedding(temporal: nnx.Param, spatial: nnx.Param) -> jax.Array:
    """Adds embeddings (1, t, c) and (1, s, c) over the grid: (1, t * s, c)."""
    return rearrange(temporal[...][:, :, None] + spatial[...][:, None], "one t s c -> one (t s) c")
