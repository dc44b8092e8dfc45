"""Torch layers that the grafted head and the reference of the original share.

It is part of the exported `grafted_head.py` (`convert/standalone.py`), so it must run with Python
3.8 and torch 2.0.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Computes the adaptive layer-norm modulation of DiT."""
    return x * (1 + scale) + shift


def timestep_features(t: torch.Tensor, dim: int = 256) -> torch.Tensor:
    """Returns sinusoidal features (..., dim), cosines first, of original timesteps (...)."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[..., None].float() * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes attention (b, n, h * d).

    Args:
      q: (b, n, h, d) queries.
      k, v: (b, m, h, d) keys and values.
      mask: (n, m), True for attended keys; None: all.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(out, "b h n d -> b n (h d)")


def layer_norm(width: int, affine: bool = True) -> nn.LayerNorm:
    """Makes a LayerNorm with the original's eps."""
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)


def zero_linear(width: int, out: int) -> nn.Linear:
    """Makes a Linear with zero weights: a gate at zero, or a modulation without effect."""
    layer = nn.Linear(width, out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def table(*shape: int) -> nn.Parameter:
    """Makes positions or queries with small initial values."""
    return nn.Parameter(0.02 * torch.randn(shape))


class Aggregator(nn.Module):
    """The original's four aggregators of video tokens to action steps, with its tensor names.

    `config` has `aggregator, z_channels, n_actions, n_frames, grid`.
    """

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.config = config
        c, actions, frames = config.z_channels, config.n_actions, config.n_frames
        tokens = frames * config.grid[0] * config.grid[1]
        if config.aggregator == "conv_fc":
            pool = nn.AdaptiveAvgPool2d((4, 4))
            self.conv = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), pool)
            self.fc = nn.Sequential(nn.Linear(16 * c, c), nn.ReLU(), nn.Linear(c, c))
            self.interpolate = nn.Linear(frames, actions)
            self.refine = nn.Sequential(nn.Linear(c, c), nn.ReLU(), nn.Linear(c, c))
        elif config.aggregator == "conv_ori":
            window = (actions // frames, 1, 1)
            self.conv_transpose3d = nn.ConvTranspose3d(c, c, window, stride=window)
        elif config.aggregator == "conv2":
            self.conv = nn.Sequential(
                nn.Conv1d(tokens, 256, 7, padding=3),
                nn.ReLU(),
                nn.Conv1d(256, actions, 7, padding=3),
            )
        elif config.aggregator == "fc2":
            self.fc = nn.Sequential(nn.Linear(tokens, 256), nn.ReLU(), nn.Linear(256, actions))
        else:
            raise ValueError(f"aggregator {config.aggregator!r} is unknown")

    def aggregate(self, z: torch.Tensor) -> torch.Tensor:
        """Aggregates (b, tokens, c) to (b, n_actions, c)."""
        kind, frames, rows = self.config.aggregator, self.config.n_frames, self.config.grid[0]
        if kind == "conv2":
            return self.conv(z)
        if kind == "fc2":
            return self.fc(z.transpose(1, 2)).transpose(1, 2)
        if kind == "conv_ori":
            maps = rearrange(z, "b (t h w) c -> b c t h w", t=frames, h=rows)
            return rearrange(self.conv_transpose3d(maps).mean(dim=(-2, -1)), "b c t -> b t c")
        maps = rearrange(z, "b (t h w) c -> (b t) c h w", t=frames, h=rows)
        x = self.fc(rearrange(self.conv(maps), "n c h w -> n (c h w)"))
        x = self.interpolate(rearrange(x, "(b t) c -> b c t", t=frames))
        return self.refine(rearrange(x, "b c a -> b a c"))
