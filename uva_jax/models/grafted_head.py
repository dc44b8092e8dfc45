"""The head that replaces the MLP action head in a graft.

`input_proj`, `time_embed` and `final_layer` are the teacher's; blocks of three operators
(cross-attention, self-attention, MLP) replace the aggregator and the residual MLP blocks. In the
"condition" form the cross-attentions compute the condition of every action step from the memory.
It does not depend on the diffusion timestep, so it runs once per observation. In the "residual"
form they add to the noisy action tokens, at every diffusion step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx

from uva_jax.models.diffusion import few_step_loop, make_schedule, predict_x0
from uva_jax.models.diffusion_head import DiffusionHead
from uva_jax.models.layers import conv, conv3x3, layer_norm, linear
from uva_jax.models.mlp_head import (
    FinalLayer,
    TimestepEmbedder,
    along,
    make_aggregator,
)
from uva_jax.models.operators import make_operator, works_modulated
from uva_jax.models.policy_config import GraftedHeadConfig
from uva_jax.runtime.sections_graft import FAMILIES

_NORMAL = nnx.initializers.normal(0.02)


class Memory(nnx.Module):
    """The memory of the cross-attentions, computed from the video tokens once per observation.

    `adapter="conv"` applies the aggregator's first convolution (a copy of the teacher's) and its
    pooling, so that 4 x 256 tokens at full size become 4 x 16. `"linear"` keeps every token.
    `memory="video+aggregate"` appends the teacher's aggregated tokens, one per action step.
    """

    def __init__(self, config: GraftedHeadConfig, *, dtype=None, rngs: nnx.Rngs):
        c, width = config.z_channels, config.memory_width
        self.config = config
        self.norm = layer_norm(c, rngs=rngs)
        if config.adapter == "conv":
            self.conv = conv(c, c, (3, 3), padding=((1, 1), (1, 1)), dtype=dtype, rngs=rngs)
        self.proj = linear(c, width, rngs=rngs, dtype=dtype)
        if config.memory == "video+aggregate":
            self.aggregator = make_aggregator(config.aggregator, config, dtype=dtype, rngs=rngs)
            self.aggregate_norm = layer_norm(c, rngs=rngs)
            self.aggregate_proj = linear(c, width, rngs=rngs, dtype=dtype)

    def features(self, z: jax.Array) -> tuple[jax.Array, ...]:
        """Applies the layers that are copies of the teacher's to video tokens z (b, t * s, c).

        Returns:
          video features (b, m, c) and, with the aggregate, its tokens (b, n_actions, c).
        """
        config, video = self.config, z
        if config.adapter == "conv":
            x = rearrange(z, "b (t h w) c -> (b t) h w c", t=config.n_frames, h=config.grid[0])
            rows, cols = config.pool
            video = reduce(
                jax.nn.relu(conv3x3(self.conv, x)),
                "(b t) (h i) (w j) c -> b (t h w) c",
                "mean",
                t=config.n_frames,
                h=rows,
                w=cols,
            )
        if config.memory == "video+aggregate":
            return video, self.aggregator(z)
        return (video,)

    def project(self, video: jax.Array, aggregate: jax.Array | None = None) -> jax.Array:
        """Applies the trained layers to `features`; returns the memory (b, m, memory_width)."""
        memory = self.proj(self.norm(video))
        if aggregate is None:
            return memory
        extra = self.aggregate_proj(self.aggregate_norm(aggregate))
        return jnp.concatenate([memory, extra], axis=1)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Maps video tokens (b, t * s, z_channels) to the memory (b, m, memory_width)."""
        return self.project(*self.features(z))


class GraftedBlock(nnx.Module):
    """One operator of each family, by the names of `head.operators`."""

    def __init__(
        self, config: GraftedHeadConfig, names: tuple[str, str, str], *, dtype=None, rngs: nnx.Rngs
    ):
        self.cross_attn, self.self_attn, self.mlp = (
            make_operator(family, name, config, config.width, dtype=dtype, rngs=rngs)
            for family, name in zip(FAMILIES, names, strict=True)
        )

    def modulations(self, y: jax.Array, families: Sequence[str]) -> dict[str, jax.Array]:
        """Returns by family the modulation of its operator by y (..., width).

        For an operator whose modulation cannot be computed in advance it is y itself.
        """
        operators = {family: getattr(self, family) for family in families}
        return {f: o.modulation(y) if works_modulated(o) else y for f, o in operators.items()}

    def context(self, memory: jax.Array):
        """Returns the cross-attention's keys and values of the memory, or the memory itself."""
        attention = self.cross_attn
        return attention.keys_and_values(memory) if works_modulated(attention) else memory

    def step(self, h: jax.Array, modulations: Mapping[str, jax.Array], context=None) -> jax.Array:
        """Adds to h (b, n, width) the residuals of the families that have a modulation."""
        for family in (f for f in FAMILIES if f in modulations):
            operator, modulation = getattr(self, family), modulations[family]
            memory = () if family != "cross_attn" else (context,)
            if works_modulated(operator):
                h = h + operator.modulated(h, modulation, *memory)
            else:
                h = h + operator(h, *memory, jnp.broadcast_to(modulation, h.shape))
        return h


class GraftedHead(DiffusionHead):
    """Blocks of cross-attention, self-attention and MLP; a sample has one diffusion timestep."""

    shared_timestep = True

    def __init__(self, config: GraftedHeadConfig, *, dtype=None, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.input_proj = linear(config.channels, width, rngs=rngs, dtype=dtype)
        self.time_embed = TimestepEmbedder(width, dtype=dtype, rngs=rngs)
        self.final_layer = FinalLayer(width, 2 * config.channels, dtype=dtype, rngs=rngs)
        self.memory = Memory(config, dtype=dtype, rngs=rngs)
        self.queries = nnx.Param(_NORMAL(rngs.params(), (1, config.n_actions, width)))
        # The stream has unit scale; these rescale it to the teacher's condition activation.
        self.condition_scale = nnx.Param(jnp.ones(width))
        self.condition_shift = nnx.Param(jnp.zeros(width))
        names = config.operators or (FAMILIES,) * config.depth
        self.blocks = nnx.List(
            [GraftedBlock(config, triple, dtype=dtype, rngs=rngs) for triple in names]
        )

    def rows(self, condition: jax.Array) -> int:
        """Returns the number of rows that are denoised: the action steps."""
        return self.config.n_actions

    def stream(self, memory: jax.Array) -> list[jax.Array]:
        """Computes the condition after each block's cross-attention: depth arrays (b, n, width)."""
        s = jnp.broadcast_to(self.queries[...], (len(memory), *self.queries.shape[1:]))
        conditions = []
        for block in self.blocks:
            s = s + block.cross_attn(s, memory)
            conditions.append(self.condition_shift[...] + self.condition_scale[...] * s)
        return conditions

    def condition(self, z: jax.Array) -> jax.Array:
        """Computes the condition (b, n, width) from video tokens z (b, t * s, c).

        In the "residual" form it is the memory (b, m, memory_width).
        """
        memory = self.memory(z)
        if self.config.cross_attention == "residual":
            return memory
        return self.stream(memory)[-1]

    def context(self, condition: jax.Array) -> list | None:
        """Returns, in the "residual" form, every block's `context` of the memory."""
        if self.config.cross_attention == "residual":
            return [block.context(condition) for block in self.blocks]
        return None

    def modulations(self, t: jax.Array, condition: jax.Array) -> dict:
        """Computes the modulations of every block's operators and of the final layer.

        In the "residual" form they are equal for all rows, and their row axis has length 1.

        Args:
          t: original timesteps on leading axes of the condition.
          condition: (..., n, width), or the memory (..., m, memory_width).
        """
        y, families = along(self.time_embed(t), condition), FAMILIES
        if self.config.cross_attention == "condition":
            y, families = y + condition, FAMILIES[1:]
        blocks = [block.modulations(y, families) for block in self.blocks]
        return {"blocks": blocks, "final_layer": self.final_layer.modulation(y)}

    def step(self, x: jax.Array, modulations: dict, context: list | None) -> jax.Array:
        """Predicts eps and variance (b, n, 2 channels) of x (b, n, channels)."""
        h = self.input_proj(x)
        contexts = context or [None] * len(self.blocks)
        for block, given, memory in zip(self.blocks, modulations["blocks"], contexts, strict=True):
            h = block.step(h, given, memory)
        return self.final_layer.modulated(h, modulations["final_layer"])

    def errors(self, schedule, output, target, x_t, t, noise) -> dict[str, jax.Array]:
        """See `DiffusionHead.errors`; of a few-step head it is the squared error of x0."""
        if not self.config.few_steps:
            return super().errors(schedule, output, target, x_t, t, noise)
        eps = output[..., : self.config.channels].astype(jnp.float32)
        x0 = predict_x0(schedule, x_t, t, eps)
        mse = jnp.mean((x0 - target) ** 2, axis=-1)
        return {"mse": mse, "vb": jnp.zeros_like(mse), "loss": mse}

    def sample_given(self, condition: jax.Array, **options):
        """See `DiffusionHead`; a few-step head has its own sampler, whatever `sampler` is.

        Raises:
          ValueError: eta or return_steps is given for a few-step head.
        """
        if not self.config.few_steps:
            return super().sample_given(condition, **options)
        if options.pop("eta", None) is not None or options.pop("return_steps", False):
            raise ValueError("a few-step head has neither eta nor steps to return")
        options.pop("sampler", None)
        return self._sample_few(condition, **options)

    def _sample_few(
        self,
        condition,
        *,
        key=None,
        noise=None,
        temperature=1.0,
        cfg=1.0,
        guided=False,
        sampling_steps=None,
    ):
        rows = len(condition) // (2 if guided else 1)
        if noise is None:
            steps = len(make_schedule(sampling_steps or self.config.sampling_steps))
            noise = jax.random.normal(
                key, (steps + 1, rows, self.rows(condition), self.config.channels)
            )

        def denoise(x, t):
            if guided:
                x = jnp.concatenate([x, x])
            output = self.denoise(x, jnp.full(len(x), t), condition)
            eps = output[..., : self.config.channels]
            return eps[rows:] + cfg * (eps[:rows] - eps[rows:]) if guided else eps

        actions = few_step_loop(denoise, noise, temperature=temperature, clip=self.config.clip)
        return jnp.concatenate([actions, actions]) if guided else actions
