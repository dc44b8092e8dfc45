"""The grafted action head as a torch module with the interface of UVA's own (`DiffActLoss`).

A user of the PyTorch policy runs a graft by replacing one attribute, after loading the rest of the
checkpoint:

    policy.model.diffactloss = GraftedActionHead.from_checkpoint("grafted.ckpt")

Its parts correspond to those of `uva_jax/models/grafted_head.py` and have the same names.

It is part of the exported `grafted_head.py` (`convert/standalone.py`), so it must run with Python
3.8 and torch 2.0.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from einops import rearrange, reduce
from torch import nn
from torch.nn import functional

from convert.torch.diffusion import Schedule, few_step_loop, sample_loop, training_losses
from convert.torch.head_file import read_head
from convert.torch.layers import (
    Aggregator,
    layer_norm,
    modulate,
    table,
    timestep_features,
    zero_linear,
)
from convert.torch.operators import OPERATORS, make_operator


class TimestepEmbedder(nn.Module):
    """Embeds timesteps: sinusoids, Linear, SiLU, Linear."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(256, width), nn.Linear(width, width)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Embeds timesteps (...): (..., width)."""
        return self.fc2(functional.silu(self.fc1(timestep_features(t))))


class FinalLayer(nn.Module):
    """DiT's output layer: norm, modulation, Linear to eps and variance."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm_final = layer_norm(width, affine=False)
        self.linear = zero_linear(width, out)
        self.adaLN_modulation = zero_linear(width, 2 * width)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Maps x, modulated by y, both (b, n, width), to (b, n, out)."""
        shift, scale = self.adaLN_modulation(functional.silu(y)).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Memory(nn.Module):
    """The memory of the cross-attentions, computed from the video tokens."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.config = config
        c, width = config.z_channels, config.memory_width
        self.norm = layer_norm(c)
        if config.adapter == "conv":
            self.conv = nn.Conv2d(c, c, 3, padding=1)
        self.proj = nn.Linear(c, width)
        if config.memory == "video+aggregate":
            self.aggregator = Aggregator(config)
            self.aggregate_norm = layer_norm(c)
            self.aggregate_proj = nn.Linear(c, width)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Maps video tokens (b, t * s, z_channels) to the memory (b, m, memory_width)."""
        return self.project(*self.features(z))

    def features(self, z: torch.Tensor) -> list[torch.Tensor]:
        """Applies the layers that are copies of the teacher's to video tokens (b, t * s, c).

        Returns the video's features (b, m, c) and, with the aggregate, its tokens (b, n, c).
        """
        config, video = self.config, z
        if config.adapter == "conv":
            frames, (rows, cols) = config.n_frames, config.pool
            maps = rearrange(z, "b (t h w) c -> (b t) c h w", t=frames, h=config.grid[0])
            maps = functional.relu(self.conv(maps))
            pattern = "(b t) c (h i) (w j) -> b (t h w) c"
            video = reduce(maps, pattern, "mean", t=frames, h=rows, w=cols)
        if config.memory == "video+aggregate":
            return [video, self.aggregator.aggregate(z)]
        return [video]

    def project(self, video: torch.Tensor, aggregate: torch.Tensor | None = None) -> torch.Tensor:
        """Maps `features` to the memory (b, m, memory_width)."""
        memory = self.proj(self.norm(video))
        if aggregate is None:
            return memory
        extra = self.aggregate_proj(self.aggregate_norm(aggregate))
        return torch.cat([memory, extra], dim=1)


class GraftedBlock(nn.Module):
    """One operator of each family; `names` in the order of `OPERATORS`."""

    def __init__(self, config: SimpleNamespace, names: tuple[str, str, str]):
        super().__init__()
        for family, name in zip(OPERATORS, names):
            setattr(self, family, make_operator(family, name, config))


class GraftedActionHead(nn.Module):
    """The grafted head; `config` is the `action_head` of an exported architecture."""

    def __init__(self, config: Mapping):
        super().__init__()
        self.config = config = SimpleNamespace(**config)
        width = config.width
        self.in_channels = config.channels  # the original head's name
        self.input_proj = nn.Linear(config.channels, width)
        self.time_embed = TimestepEmbedder(width)
        self.final_layer = FinalLayer(width, 2 * config.channels)
        self.memory = Memory(config)
        self.queries = table(1, config.n_actions, width)
        self.condition_scale = nn.Parameter(torch.ones(width))
        self.condition_shift = nn.Parameter(torch.zeros(width))
        names = config.operators or [tuple(OPERATORS)] * config.depth
        self.blocks = nn.ModuleList(GraftedBlock(config, triple) for triple in names)
        self.train_schedule = Schedule(config.train_steps)
        # As in the original, 1000 steps are respaced for any number of training steps.
        self.sample_schedule = Schedule(1000, config.sampling_steps)
        # Exports of earlier versions do not say what the network predicts: it is eps.
        prediction = getattr(config, "prediction", "eps")
        if prediction not in ("eps", "x0_from_eps"):
            raise ValueError(f"this file has no sampler for a head that predicts {prediction!r}")
        self.few_steps = prediction == "x0_from_eps"

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike) -> GraftedActionHead:
        """Loads the head of an exported .ckpt or .safetensors file without running code in it.

        Raises:
          ValueError: the file holds no grafted head.
        """
        config, state = read_head(path)
        head = cls(config)
        head.load_state_dict(state, strict=True)
        return head

    def condition(self, z: torch.Tensor) -> torch.Tensor:
        """Computes the condition (b, n, width), or the memory, from video tokens (b, t * s, c)."""
        memory = self.memory(z)
        if self.config.cross_attention == "residual":
            return memory
        s = self.queries.expand(len(z), -1, -1)
        for block in self.blocks:
            s = s + block.cross_attn(s, memory)
        return self.condition_shift + self.condition_scale * s

    def denoise(self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Predicts eps and variance (b, n, 2 channels) of x (b, n, channels) at steps t (b,)."""
        h, y = self.input_proj(x), self.time_embed(t)[:, None]
        residual = self.config.cross_attention == "residual"
        y = y.expand_as(h) if residual else y + condition
        for block in self.blocks:
            if residual:
                h = h + block.cross_attn(h, condition, y)
            h = h + block.self_attn(h, y)
            h = h + block.mlp(h, y)
        return self.final_layer(h, y)

    def forward(
        self,
        target: torch.Tensor,
        z: torch.Tensor,
        task_mode: str | None = None,
        text_latents: torch.Tensor | None = None,
        *,
        t: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes the training loss, a scalar.

        Args:
          target: (b, n_actions, channels) in [-1, 1].
          z: (b, tokens, z_channels) decoder output.
          task_mode, text_latents: not used, as in the original.
          t: (b,) timesteps, one for all action steps of a sample; drawn if not given.
          noise: like target; drawn if not given.
        """
        if t is None:
            t = torch.randint(len(self.train_schedule), (len(z),), device=z.device)
        if noise is None:
            noise = torch.randn_like(target)
        x_t = self.train_schedule.diffuse(target, t, noise)
        output = self.denoise(x_t, t, self.condition(z))
        if self.few_steps:
            x0 = self.train_schedule.predicted_x0(x_t, t, output[..., : self.config.channels])
            return ((x0 - target) ** 2).mean()
        rows = training_losses(self.train_schedule, output, target, x_t, t, noise)
        return rows["loss"].mean()

    @torch.no_grad()
    def sample(
        self,
        z: torch.Tensor,
        temperature: float = 1.0,
        cfg: float = 1.0,
        text_latents: torch.Tensor | None = None,
        *,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Samples actions (b, n_actions, channels) in [-1, 1].

        Args:
          z: (b, tokens, z_channels); with cfg != 1 the first half of the batch is conditional and
            the second unconditional, as in the original.
          temperature: factor on each step's noise.
          cfg: guidance scale.
          text_latents: not used, as in the original.
          noise: (K + 1, b * n, channels) or (K + 1, b, n, channels), b halved with guidance;
            drawn if not given.
        """
        config, guided = self.config, cfg != 1.0
        rows = len(z) // (2 if guided else 1)
        shape = (len(self.sample_schedule) + 1, rows, config.n_actions, config.channels)
        if noise is None:
            noise = torch.randn(shape, device=z.device, dtype=z.dtype)
        noise = noise.reshape(noise.shape[0], *shape[1:])
        if guided:
            noise = torch.cat([noise, noise], dim=1)
        condition = self.condition(z)

        def denoise(x: torch.Tensor, timestep: int) -> torch.Tensor:
            t = torch.full((len(x),), timestep, device=x.device)
            if not guided:
                return self.denoise(x, t, condition)
            x = torch.cat([x[:rows], x[:rows]])
            eps, rest = self.denoise(x, t, condition).chunk(2, dim=-1)
            with_z, free = eps.chunk(2)
            half = free + cfg * (with_z - free)
            return torch.cat([torch.cat([half, half]), rest], dim=-1)

        if self.few_steps:
            return few_step_loop(
                lambda x, timestep: denoise(x, timestep)[..., : config.channels],
                noise,
                temperature=temperature,
                clip=config.clip,
            )
        return sample_loop(
            self.sample_schedule, denoise, noise, temperature=temperature, clip=config.clip
        )
