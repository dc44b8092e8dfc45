"""The head that a graft puts in the place of the MLP action head.

`input_proj`, `time_embed` and `final_layer` are the teacher's; aggregator and residual MLP blocks
become blocks of three operators (cross-attention, self-attention, MLP). In the "condition" form
the cross-attentions build the condition of every action step from the video tokens. That does not
depend on the diffusion time, so it runs once per observation and not once per sampling step.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx

from uva_jax.models.layers import conv, layer_norm, linear
from uva_jax.models.mlp_head import DiffusionHead, FinalLayer, TimestepEmbedder, make_aggregator
from uva_jax.models.operators import FAMILIES, make_operator
from uva_jax.models.policy_config import GraftedHeadConfig

_NORMAL = nnx.initializers.normal(0.02)


class Memory(nnx.Module):
    """What the cross-attentions look at, made from the video tokens once per observation.

    `adapter="conv"`: the aggregator's first convolution (a copy of the teacher's) and its pooling,
    so that a full-size grid of 4 x 256 tokens becomes 4 x 16. `"linear"`: every token, with a
    hidden layer beside it. `memory="video+aggregate"` appends the teacher's aggregated tokens.
    """

    def __init__(self, config: GraftedHeadConfig, *, dtype=None, rngs: nnx.Rngs):
        c, width = config.z_channels, config.stream_width
        self.config = config
        rows, cols = config.pool if config.adapter == "conv" else config.grid
        self.norm = layer_norm(c, rngs=rngs)
        if config.adapter == "conv":
            self.conv = conv(c, c, (3, 3), padding=((1, 1), (1, 1)), dtype=dtype, rngs=rngs)
        else:
            self.hidden = linear(c, c, rngs=rngs, dtype=dtype)
        self.proj = linear(2 * c, width, rngs=rngs, dtype=dtype)
        self.position = nnx.Param(_NORMAL(rngs.params(), (1, config.n_frames * rows * cols, width)))
        if config.memory == "video+aggregate":
            self.aggregator = make_aggregator(config.aggregator, config, dtype=dtype, rngs=rngs)
            self.aggregate_proj = linear(c, width, rngs=rngs, dtype=dtype)
            self.aggregate_position = nnx.Param(
                _NORMAL(rngs.params(), (1, config.n_actions, width))
            )

    def __call__(self, z: jax.Array) -> jax.Array:
        """(b, t * s, z_channels) -> (b, m, stream_width)."""
        config = self.config
        if config.adapter == "conv":
            maps = rearrange(z, "b (t h w) c -> (b t) h w c", t=config.n_frames, h=config.grid[0])
            pooled = [
                reduce(
                    x,
                    "(b t) (h i) (w j) c -> b (t h w) c",
                    "mean",
                    t=config.n_frames,
                    h=config.pool[0],
                    w=config.pool[1],
                )
                for x in (maps, jax.nn.relu(self.conv(maps)))
            ]
            tokens = jnp.concatenate([self.norm(pooled[0]), pooled[1]], axis=-1)
        else:
            tokens = jnp.concatenate([self.norm(z), jax.nn.silu(self.hidden(z))], axis=-1)
        memory = self.proj(tokens) + self.position[...]
        if config.memory == "video+aggregate":
            extra = self.aggregate_proj(self.aggregator(z)) + self.aggregate_position[...]
            memory = jnp.concatenate([memory, extra], axis=1)
        return memory


class GraftedBlock(nnx.Module):
    """One operator of each family."""

    def __init__(
        self, config: GraftedHeadConfig, names: tuple[str, str, str], *, dtype=None, rngs: nnx.Rngs
    ):
        self.cross_attn, self.self_attn, self.mlp = (
            make_operator(family, name, config, config.width, dtype=dtype, rngs=rngs)
            for family, name in zip(FAMILIES, names, strict=True)
        )


class GraftedHead(DiffusionHead):
    """Cross-attention, self-attention and MLP blocks; one timestep for all steps of a sample."""

    shared_timestep = True

    def __init__(self, config: GraftedHeadConfig, *, dtype=None, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.input_proj = linear(config.channels, width, rngs=rngs, dtype=dtype)
        self.time_embed = TimestepEmbedder(width, dtype=dtype, rngs=rngs)
        self.final_layer = FinalLayer(width, 2 * config.channels, dtype=dtype, rngs=rngs)
        self.memory = Memory(config, dtype=dtype, rngs=rngs)
        self.queries = nnx.Param(_NORMAL(rngs.params(), (1, config.n_actions, width)))
        names = config.operators or (FAMILIES,) * config.depth
        self.blocks = nnx.List(
            [GraftedBlock(config, triple, dtype=dtype, rngs=rngs) for triple in names]
        )

    def rows(self, z: jax.Array) -> int:
        """Rows that are denoised: the action steps."""
        return self.config.n_actions

    def condition(self, z: jax.Array) -> jax.Array:
        """(b, t * s, c) -> the condition stream s_L (b, n_actions, width)."""
        memory = self.memory(z)
        s = jnp.broadcast_to(
            self.queries[...], (z.shape[0], self.config.n_actions, self.config.width)
        )
        for block in self.blocks:
            s = s + block.cross_attn(s, memory, self.queries[...])
        return s

    def denoise(self, x: jax.Array, t: jax.Array, condition: jax.Array) -> jax.Array:
        """x (b, n, channels), t (b,), s_L (b, n, width) -> (b, n, 2 channels)."""
        h, y = self.input_proj(x), self.time_embed(t)[:, None] + condition
        for block in self.blocks:
            h = h + block.self_attn(h, y)
            h = h + block.mlp(h, y)
        return self.final_layer(h, y)
