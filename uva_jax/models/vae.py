"""The KL-VAE between frames and latents (LDM's autoencoder as MAR publishes it).

Maps are channels-last. Module names follow the PyTorch original, which keeps the conversion table
short. Upstream: `unified_video_action/vae/vaekl.py`.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from uva_jax.models.layers import attend, conv
from uva_jax.models.policy_config import VAEConfig

_SAME = ((1, 1), (1, 1))
_NONE = ((0, 0), (0, 0))


class GroupNorm(nnx.Module):
    """GroupNorm with 32 groups and eps 1e-6, in float32 with the two-pass variance.

    Flax's own takes three times as long on a CPU, where this is a sixth of the encoder's time.
    """

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises (n, h, w, c); float32."""
        groups = rearrange(x.astype(jnp.float32), "n h w (g c) -> n h w g c", g=32)
        centered = groups - jnp.mean(groups, axis=(1, 2, 4), keepdims=True)
        variance = jnp.mean(centered**2, axis=(1, 2, 4), keepdims=True)
        normed = (centered * jax.lax.rsqrt(variance + 1e-6)).reshape(x.shape)
        return normed * self.scale[...] + self.bias[...]


class ResnetBlock(nnx.Module):
    """Two stages of norm, swish and convolution, with a residual (1x1 if the widths differ)."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype=None, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = conv(in_channels, out_channels, (3, 3), padding=_SAME, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(out_channels)
        self.conv2 = conv(out_channels, out_channels, (3, 3), padding=_SAME, dtype=dtype, rngs=rngs)
        self.nin_shortcut = (
            conv(in_channels, out_channels, (1, 1), padding=_NONE, dtype=dtype, rngs=rngs)
            if in_channels != out_channels
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (n, h, w, c_in) to (n, h, w, c_out)."""
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + y


class AttnBlock(nnx.Module):
    """Single-head attention over all positions of a map, scale C^-0.5."""

    def __init__(self, channels: int, *, dtype=None, rngs: nnx.Rngs):
        def one_by_one():
            return conv(channels, channels, (1, 1), padding=_NONE, dtype=dtype, rngs=rngs)

        self.norm = GroupNorm(channels)
        self.q, self.k, self.v = one_by_one(), one_by_one(), one_by_one()
        self.proj_out = one_by_one()

    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, h, w, c) -> (n, h, w, c)."""
        y = self.norm(x)
        q, k, v = (rearrange(f(y), "n h w c -> n (h w) 1 c") for f in (self.q, self.k, self.v))
        y = rearrange(attend(q, k, v), "n (h w) 1 c -> n h w c", h=x.shape[1])
        return x + self.proj_out(y)


class Resample(nnx.Module):
    """Halves a map by a convolution, or doubles it and applies one."""

    def __init__(self, channels: int, *, down: bool, dtype=None, rngs: nnx.Rngs):
        self.is_down = down
        # As in the original, downsampling pads one row below and one column on the right.
        padding, strides = (((0, 1), (0, 1)), 2) if down else (_SAME, 1)
        self.conv = conv(
            channels, channels, (3, 3), padding=padding, strides=strides, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.is_down:
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)  # nearest neighbour
        return self.conv(x)


class Level(nnx.Module):
    """One resolution: residual blocks, each optionally followed by attention, then resampling."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        *,
        attention: bool,
        resample: str | None,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nnx.List(
            [ResnetBlock(a, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(widths)]
        )
        self.attn = nnx.List(
            [AttnBlock(out_channels, dtype=dtype, rngs=rngs) for _ in range(num_blocks * attention)]
        )
        self.downsample = (
            Resample(out_channels, down=True, dtype=dtype, rngs=rngs)
            if resample == "down"
            else None
        )
        self.upsample = (
            Resample(out_channels, down=False, dtype=dtype, rngs=rngs) if resample == "up" else None
        )

    def blocks(self, x: jax.Array) -> jax.Array:
        """Applies the blocks without resampling: (n, h, w, c_in) -> (n, h, w, c_out)."""
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class Middle(nnx.Module):
    """Residual block, attention, residual block at the coarsest resolution."""

    def __init__(self, channels: int, *, dtype=None, rngs: nnx.Rngs):
        self.block_1 = ResnetBlock(channels, channels, dtype=dtype, rngs=rngs)
        self.attn_1 = AttnBlock(channels, dtype=dtype, rngs=rngs)
        self.block_2 = ResnetBlock(channels, channels, dtype=dtype, rngs=rngs)


class Encoder(nnx.Module):
    """Maps frames to the moments of the latents, before `quant_conv`."""

    def __init__(self, config: VAEConfig, *, dtype=None, rngs: nnx.Rngs):
        widths = [config.ch] + [config.ch * m for m in config.ch_mult]
        last = len(config.ch_mult) - 1
        self.conv_in = conv(3, config.ch, (3, 3), padding=_SAME, dtype=dtype, rngs=rngs)
        self.down = nnx.List(
            [
                Level(
                    widths[i],
                    widths[i + 1],
                    config.num_res_blocks,
                    attention=i in config.attn_levels,
                    resample="down" if i != last else None,
                    dtype=dtype,
                    rngs=rngs,
                )
                for i in range(last + 1)
            ]
        )
        self.mid = Middle(widths[-1], dtype=dtype, rngs=rngs)
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = conv(
            widths[-1], 2 * config.z_channels, (3, 3), padding=_SAME, dtype=dtype, rngs=rngs
        )

    def stages(self, x: jax.Array) -> dict[str, jax.Array]:
        """Returns every intermediate map by name; the last is "out" (n, h/stride, w/stride, 2z)."""
        maps = {}
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = maps[f"level{i}"] = level.blocks(x)
            if level.downsample is not None:
                x = maps[f"level{i}_downsample"] = level.downsample(x)
        x = maps["mid_attn"] = self.mid.attn_1(self.mid.block_1(x))
        x = self.mid.block_2(x)
        maps["out"] = self.conv_out(jax.nn.silu(self.norm_out(x)))
        return maps


class Decoder(nnx.Module):
    """Maps latents, after `post_quant_conv`, to frames. `up` is indexed from fine (0) to coarse."""

    def __init__(self, config: VAEConfig, *, dtype=None, rngs: nnx.Rngs):
        widths = [config.ch * m for m in config.ch_mult]
        widths.append(widths[-1])
        levels = len(config.ch_mult)
        self.conv_in = conv(
            config.z_channels, widths[-1], (3, 3), padding=_SAME, dtype=dtype, rngs=rngs
        )
        self.mid = Middle(widths[-1], dtype=dtype, rngs=rngs)
        self.up = nnx.List(
            [
                Level(
                    widths[i + 1],
                    widths[i],
                    config.num_res_blocks + 1,
                    attention=False,
                    resample="up" if i != 0 else None,
                    dtype=dtype,
                    rngs=rngs,
                )
                for i in range(levels)
            ]
        )
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = conv(widths[0], 3, (3, 3), padding=_SAME, dtype=dtype, rngs=rngs)

    def stages(self, z: jax.Array) -> dict[str, jax.Array]:
        """Returns every intermediate map by name; the last is "out" (n, h*stride, w*stride, 3)."""
        maps = {}
        x = maps["mid_attn"] = self.mid.attn_1(self.mid.block_1(self.conv_in(z)))
        x = self.mid.block_2(x)
        for i in reversed(range(len(self.up))):
            x = maps[f"level{i}"] = self.up[i].blocks(x)
            if self.up[i].upsample is not None:
                x = self.up[i].upsample(x)
        maps["out"] = self.conv_out(jax.nn.silu(self.norm_out(x)))
        return maps


class VAE(nnx.Module):
    """KL autoencoder with 1x1 quantisation convolutions."""

    def __init__(self, config: VAEConfig, *, dtype=None, rngs: nnx.Rngs):
        z = config.z_channels
        self.config = config
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
        self.quant_conv = conv(2 * z, 2 * z, (1, 1), padding=_NONE, dtype=dtype, rngs=rngs)
        self.post_quant_conv = conv(z, z, (1, 1), padding=_NONE, dtype=dtype, rngs=rngs)

    def moments(self, images: jax.Array) -> jax.Array:
        """Encodes frames (n, h, w, 3) in [-1, 1] to mean and raw log-variance, (n, h', w', 2z)."""
        return self.quant_conv(self.encoder.stages(images)["out"])

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encodes frames (n, h, w, 3) in [-1, 1] to mean, logvar in [-30, 20], (n, h', w', z)."""
        mean, logvar = jnp.split(self.moments(images).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def sample(self, mean: jax.Array, logvar: jax.Array, eps: jax.Array) -> jax.Array:
        """Returns (mean + std * eps) * scale_factor; UVA also samples in evaluation."""
        return (mean + jnp.exp(0.5 * logvar) * eps) * self.config.scale_factor

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decodes scaled latents (n, h', w', z) to frames (n, h, w, 3), in about [-1, 1]."""
        return self.decoder.stages(self.post_quant_conv(latents / self.config.scale_factor))["out"]
