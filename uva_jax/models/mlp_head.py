"""UVA's diffusion heads: the residual MLP with adaptive layer norm, and the action aggregators.

One class has both uses: without an aggregator it denoises single video tokens, conditioned on the
decoder's output; with one it denoises action steps, conditioned on the aggregated tokens. Upstream:
`diffusion_loss.py` and `diffusion_action_loss.py`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx

from uva_jax.models.diffusion_head import DiffusionHead
from uva_jax.models.layers import (
    Modulated,
    conv,
    conv3x3,
    layer_norm,
    linear,
    modulate,
)
from uva_jax.models.policy_config import MLPHeadConfig
from uva_jax.runtime.errors import UserError

_SMALL = nnx.initializers.normal(0.02)
_ZERO = nnx.initializers.zeros


def timestep_features(t: jax.Array, dim: int = 256) -> jax.Array:
    """Returns sinusoidal features (..., dim), cosines first, of original timesteps (...)."""
    half = dim // 2
    freqs = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t[..., None].astype(jnp.float32) * freqs
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedder(nnx.Module):
    """Embeds timesteps: sinusoids, Linear, SiLU, Linear."""

    def __init__(self, width: int, *, dtype=None, rngs: nnx.Rngs):
        self.fc1 = linear(256, width, rngs=rngs, dtype=dtype, kernel_init=_SMALL)
        self.fc2 = linear(width, width, rngs=rngs, dtype=dtype, kernel_init=_SMALL)

    def __call__(self, t: jax.Array) -> jax.Array:
        """Embeds integer timesteps (...): (..., width)."""
        return self.fc2(jax.nn.silu(self.fc1(timestep_features(t))))


def along(e_t: jax.Array, rows: jax.Array) -> jax.Array:
    """Reshapes time embeddings (..., width) to broadcast with rows (..., n, width)."""
    return e_t.reshape(e_t.shape[:-1] + (1,) * (rows.ndim - e_t.ndim) + e_t.shape[-1:])


class ResBlock(Modulated):
    """A gated residual MLP, modulated by y; it returns the residual (..., width)."""

    def __init__(self, width: int, *, dtype=None, rngs: nnx.Rngs):
        self.in_ln = layer_norm(width, rngs=rngs)
        self.fc1 = linear(width, width, rngs=rngs, dtype=dtype)
        self.fc2 = linear(width, width, rngs=rngs, dtype=dtype)
        self.adaLN_modulation = linear(width, 3 * width, rngs=rngs, dtype=dtype, kernel_init=_ZERO)

    def modulated(self, x: jax.Array, modulation: jax.Array) -> jax.Array:
        """Computes the residual (..., width) of x (..., width)."""
        shift, scale, gate = jnp.split(modulation, 3, axis=-1)
        h = modulate(self.in_ln(x), shift, scale)
        return gate * self.fc2(jax.nn.silu(self.fc1(h)))


class FinalLayer(Modulated):
    """DiT's output layer: norm without affine, modulation, Linear to eps and variance.

    Gives (..., out_features).
    """

    def __init__(self, width: int, out_features: int, *, dtype=None, rngs: nnx.Rngs):
        self.norm_final = layer_norm(width, affine=False, rngs=rngs)
        self.linear = linear(width, out_features, rngs=rngs, dtype=dtype, kernel_init=_ZERO)
        self.adaLN_modulation = linear(width, 2 * width, rngs=rngs, dtype=dtype, kernel_init=_ZERO)

    def modulated(self, x: jax.Array, modulation: jax.Array) -> jax.Array:
        """Maps x (..., width) to (..., out_features)."""
        shift, scale = jnp.split(modulation, 2, axis=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SimpleMLPAdaLN(nnx.Module):
    """The denoising network of MAR's diffusion loss."""

    def __init__(self, config: MLPHeadConfig, *, dtype=None, rngs: nnx.Rngs):
        width = config.width
        self.time_embed = TimestepEmbedder(width, dtype=dtype, rngs=rngs)
        self.cond_embed = linear(config.z_channels, width, rngs=rngs, dtype=dtype)
        self.input_proj = linear(config.channels, width, rngs=rngs, dtype=dtype)
        self.res_blocks = nnx.List(
            [ResBlock(width, dtype=dtype, rngs=rngs) for _ in range(config.depth)]
        )
        self.final_layer = FinalLayer(width, 2 * config.channels, dtype=dtype, rngs=rngs)

    def activations(self, x: jax.Array, t: jax.Array, e_c: jax.Array) -> dict[str, jax.Array]:
        """Computes all intermediate activations, given the embedded condition.

        Args:
          x: (..., channels) noisy rows.
          t: original timesteps on leading axes of x.
          e_c: (..., width), `cond_embed` of the condition.

        Returns:
          "time_embed" e_t, "h" [depth + 1, ..., width] (block inputs, then the last output),
          "residuals" [depth, ..., width] and "out" (..., 2 channels).
        """
        e_t = self.time_embed(t)
        return {"time_embed": e_t} | self.modulated(x, self.modulations(e_t, e_c))

    def modulations(self, e_t: jax.Array, e_c: jax.Array) -> list[jax.Array]:
        """Returns the modulations of every block and of the final layer.

        Args:
          e_t: (..., width) time embeddings on leading axes of e_c.
          e_c: (..., n, width) embedded condition.
        """
        y = along(e_t, e_c) + e_c
        return [part.modulation(y) for part in (*self.res_blocks, self.final_layer)]

    def modulated(self, x: jax.Array, modulations: list[jax.Array]) -> dict:
        """Computes `activations` without the time embedding, given the modulations."""
        hidden, residuals = [self.input_proj(x)], []
        for block, modulation in zip(self.res_blocks, modulations[:-1], strict=True):
            residuals.append(block.modulated(hidden[-1], modulation))
            hidden.append(hidden[-1] + residuals[-1])
        out = self.final_layer.modulated(hidden[-1], modulations[-1])
        return {"h": hidden, "residuals": residuals, "out": out}

    def __call__(self, x: jax.Array, t: jax.Array, c: jax.Array) -> jax.Array:
        """Predicts eps and variance (..., 2 channels).

        Args:
          x: (..., channels) noisy rows.
          t: original timesteps on leading axes of x.
          c: (..., z_channels) condition.
        """
        return self.activations(x, t, self.cond_embed(c))["out"]


class ConvFC(nnx.Module):
    """conv_fc: 3x3 convolution per frame, pooling to 4x4, two Linears, then frames -> actions."""

    def __init__(self, config: MLPHeadConfig, *, dtype=None, rngs: nnx.Rngs):
        c = config.z_channels
        self.grid, self.n_frames = config.grid, config.n_frames
        if config.grid[0] % 4 or config.grid[1] % 4:
            raise UserError(
                f"conv_fc pools to 4x4, but the token grid is {config.grid}: use a grid whose "
                "sides are multiples of 4"
            )
        self.conv = conv(c, c, (3, 3), padding=((1, 1), (1, 1)), dtype=dtype, rngs=rngs)
        self.fc1 = linear(16 * c, c, rngs=rngs, dtype=dtype)
        self.fc2 = linear(c, c, rngs=rngs, dtype=dtype)
        self.interpolate = linear(config.n_frames, config.n_actions, rngs=rngs, dtype=dtype)
        self.refine1 = linear(c, c, rngs=rngs, dtype=dtype)
        self.refine2 = linear(c, c, rngs=rngs, dtype=dtype)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = rearrange(z, "b (t h w) c -> (b t) h w c", t=self.n_frames, h=self.grid[0])
        x = jax.nn.relu(conv3x3(self.conv, x))
        x = reduce(x, "n (h i) (w j) c -> n c h w", "mean", h=4, w=4)  # flattened channel-major
        x = self.fc2(jax.nn.relu(self.fc1(rearrange(x, "n c h w -> n (c h w)"))))
        x = rearrange(x, "(b t) c -> b c t", t=self.n_frames)
        x = rearrange(self.interpolate(x), "b c a -> b a c")
        return self.refine2(jax.nn.relu(self.refine1(x)))


class ConvOri(nnx.Module):
    """conv_ori: transposed convolution over time (from a frame to its actions), then a mean."""

    def __init__(self, config: MLPHeadConfig, *, dtype=None, rngs: nnx.Rngs):
        c = config.z_channels
        self.n_frames = config.n_frames
        self.steps = config.n_actions // config.n_frames
        # Kernel and stride are equal, so the transposed convolution is a matrix per output offset.
        self.kernel = nnx.Param(
            nnx.initializers.xavier_uniform()(rngs.params(), (self.steps, c, c))
        )
        self.bias = nnx.Param(jnp.zeros(c))

    def __call__(self, z: jax.Array) -> jax.Array:
        frames = reduce(z, "b (t s) c -> b t c", "mean", t=self.n_frames)
        kernel = self.kernel[...].astype(frames.dtype)
        steps = jnp.einsum("btc,kcd->btkd", frames, kernel) + self.bias[...]
        return rearrange(steps, "b t k d -> b (t k) d")


class Conv2(nnx.Module):
    """conv2: two 1-d convolutions with tokens as channels and features as length."""

    def __init__(self, config: MLPHeadConfig, *, dtype=None, rngs: nnx.Rngs):
        tokens = config.n_frames * config.grid[0] * config.grid[1]
        self.conv = conv(tokens, 256, (7,), padding=((3, 3),), dtype=dtype, rngs=rngs)
        self.conv_out = conv(256, config.n_actions, (7,), padding=((3, 3),), dtype=dtype, rngs=rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.conv_out(jax.nn.relu(self.conv(rearrange(z, "b n c -> b c n"))))
        return rearrange(x, "b c a -> b a c")


class FC2(nnx.Module):
    """fc2: two Linears over the token axis."""

    def __init__(self, config: MLPHeadConfig, *, dtype=None, rngs: nnx.Rngs):
        tokens = config.n_frames * config.grid[0] * config.grid[1]
        self.fc1 = linear(tokens, 256, rngs=rngs, dtype=dtype)
        self.fc2 = linear(256, config.n_actions, rngs=rngs, dtype=dtype)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.fc2(jax.nn.relu(self.fc1(rearrange(z, "b n c -> b c n"))))
        return rearrange(x, "b c a -> b a c")


_AGGREGATORS = {"conv_fc": ConvFC, "conv_ori": ConvOri, "conv2": Conv2, "fc2": FC2}


def make_aggregator(kind: str, config, *, dtype=None, rngs: nnx.Rngs) -> nnx.Module:
    """Makes the aggregator of UVA's name, which maps (b, tokens, c) to (b, n_actions, c).

    Raises:
      UserError: the name is unknown.
    """
    if kind not in _AGGREGATORS:
        raise UserError(f"aggregator {kind!r} is unknown: use one of {', '.join(_AGGREGATORS)}")
    return _AGGREGATORS[kind](config, dtype=dtype, rngs=rngs)


class MLPHead(DiffusionHead):
    """The head that UVA trains: it denoises every row separately, given t and its condition."""

    def __init__(self, config: MLPHeadConfig, *, dtype=None, rngs: nnx.Rngs):
        self.config = config
        self.aggregator = (
            make_aggregator(config.aggregator, config, dtype=dtype, rngs=rngs)
            if config.aggregator
            else None
        )
        self.net = SimpleMLPAdaLN(config, dtype=dtype, rngs=rngs)

    def rows(self, condition: jax.Array) -> int:
        """Returns the number of rows of a condition: action steps, or tokens."""
        return condition.shape[1] if self.aggregator is None else self.config.n_actions

    def aggregate(self, z: jax.Array) -> jax.Array:
        """Maps tokens (b, tokens, c) to the conditioning of each row (b, rows, c)."""
        return z if self.aggregator is None else self.aggregator(z)

    def condition(self, z: jax.Array) -> jax.Array:
        """Computes the condition activation e_c (b, rows, width) of tokens (b, tokens, c)."""
        return self.net.cond_embed(self.aggregate(z))

    def modulations(self, t: jax.Array, condition: jax.Array) -> list[jax.Array]:
        """Computes the modulations of every block and of the final layer.

        Args:
          t: original timesteps on leading axes of the condition.
          condition: (..., rows, width) e_c.
        """
        return self.net.modulations(self.net.time_embed(t), condition)

    def step(self, x: jax.Array, modulations: list[jax.Array], context=None) -> jax.Array:
        """Predicts eps and variance (b, rows, 2 channels) of x (b, rows, channels)."""
        return self.net.modulated(x, modulations)["out"]
