"""A torch reference of UVA's KL-VAE with the original's tensor names; see `reference.py`."""

from __future__ import annotations

import itertools

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from uva_jax.models.policy_config import VAEConfig


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class _ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1, self.norm2 = _norm(in_channels), _norm(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        y = self.conv1(functional.silu(self.norm1(x)))
        y = self.conv2(functional.silu(self.norm2(y)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + y


class _Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (rearrange(f(y), "n c h w -> n (h w) c") for f in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v)
        # Contiguous, because torch's GroupNorm loses a digit on channels-last maps.
        y = rearrange(y, "n (h w) c -> n c h w", h=x.shape[2]).contiguous()
        return x + self.proj_out(y)


class _Resample(nn.Module):
    def __init__(self, channels: int, down: bool):
        super().__init__()
        self.down = down
        stride, padding = (2, 0) if down else (1, 1)
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=padding)

    def forward(self, x):
        if self.down:
            return self.conv(functional.pad(x, (0, 1, 0, 1)))
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    def __init__(self, widths: list[int], attention: bool):
        super().__init__()
        self.block = nn.ModuleList(_ResBlock(a, b) for a, b in itertools.pairwise(widths))
        count = len(self.block) if attention else 0
        self.attn = nn.ModuleList(_Attention(widths[-1]) for _ in range(count))

    def blocks(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.block_2 = _ResBlock(channels, channels), _ResBlock(channels, channels)
        self.attn_1 = _Attention(channels)


class _Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.ch] + [config.ch * m for m in config.ch_mult]
        last = len(config.ch_mult) - 1
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i in range(last + 1):
            level = _Level(
                [widths[i]] + [widths[i + 1]] * config.num_res_blocks, i in config.attn_levels
            )
            if i != last:
                level.downsample = _Resample(widths[i + 1], down=True)
            self.down.append(level)
        self.mid = _Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def stages(self, x) -> dict[str, torch.Tensor]:
        stages, x = {}, self.conv_in(x)
        for i, level in enumerate(self.down):
            x = stages[f"level{i}"] = level.blocks(x)
            if hasattr(level, "downsample"):
                x = stages[f"level{i}_downsample"] = level.downsample(x)
        x = stages["mid_attn"] = self.mid.attn_1(self.mid.block_1(x))
        x = functional.silu(self.norm_out(self.mid.block_2(x)))
        return stages | {"out": self.conv_out(x)}


class _Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        widths.append(widths[-1])
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1])
        self.up = nn.ModuleList()
        for i in range(len(config.ch_mult)):
            level = _Level([widths[i + 1]] + [widths[i]] * (config.num_res_blocks + 1), False)
            if i:
                level.upsample = _Resample(widths[i], down=False)
            self.up.append(level)
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def stages(self, z) -> dict[str, torch.Tensor]:
        stages = {}
        x = stages["mid_attn"] = self.mid.attn_1(self.mid.block_1(self.conv_in(z)))
        x = self.mid.block_2(x)
        for i in reversed(range(len(self.up))):
            x = stages[f"level{i}"] = self.up[i].blocks(x)
            if i:
                x = self.up[i].upsample(x)
        return stages | {"out": self.conv_out(functional.silu(self.norm_out(x)))}


class VAE(nn.Module):
    """Encoder and decoder; maps are (n, c, h, w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        z = config.z_channels
        self.config = config
        self.encoder, self.decoder = _Encoder(config), _Decoder(config)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes images (n, 3, h, w) in [-1, 1] to mean and logvar in [-30, 20]."""
        mean, logvar = self.quant_conv(self.encoder.stages(images)["out"]).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)
