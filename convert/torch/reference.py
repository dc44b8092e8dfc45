"""A torch reference of UVA's policy with the original's tensor names, for `verify`.

It is written from the published formulas and names, and a checkpoint of the original loads with
strict=True. It has no dropout and no training modes. Layouts are the original's, with latents as
(b, t, c, h, w). Every part also returns its intermediate results by the names of the Flax port.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch
from einops import rearrange, repeat
from torch import nn
from torch.nn import functional

from convert.torch import diffusion
from convert.torch.head import GraftedActionHead
from convert.torch.layers import Aggregator, attend, modulate, timestep_features
from convert.torch.reference_text import TextTower
from convert.torch.reference_vae import VAE
from uva_jax.models.policy_config import HeadConfig, MARConfig, MLPHeadConfig, PolicyConfig


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        qkv = rearrange(self.qkv(x), "b n (k h d) -> k b n h d", k=3, h=self.heads)
        return self.proj(attend(*qkv))


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(functional.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, ratio: float, eps: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn, self.mlp = _Attention(dim, heads), _Mlp(dim, int(dim * ratio))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _TimeEmbed(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(timestep_features(t))


class _ResBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class _FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, y):
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class _Net(nn.Module):
    def __init__(self, config: MLPHeadConfig):
        super().__init__()
        self.width = width = config.width
        self.time_embed = _TimeEmbed(width)
        self.cond_embed = nn.Linear(config.z_channels, width)
        self.input_proj = nn.Linear(config.channels, width)
        self.res_blocks = nn.ModuleList(_ResBlock(width) for _ in range(config.depth))
        self.final_layer = _FinalLayer(width, 2 * config.channels)

    def stages(self, x, t, c) -> dict[str, torch.Tensor]:
        """Returns every block's output, and "out", for x (b, n, channels), t, c (b, n, z)."""
        stages = {"time_embed": self.time_embed(t)}
        y = stages["time_embed"].reshape(len(t), -1, self.width) + self.cond_embed(c)
        x = self.input_proj(x)
        for i, block in enumerate(self.res_blocks):
            x = stages[f"res_block{i}"] = block(x, y)
        return stages | {"out": self.final_layer(x, y)}


class MLPHead(Aggregator):
    """The original's diffusion heads; without an aggregator it is the video head."""

    def __init__(self, config: MLPHeadConfig):
        if config.aggregator is None:
            nn.Module.__init__(self)
        else:
            super().__init__(SimpleNamespace(**dataclasses.asdict(config)))
        self.config = config
        self.net = _Net(config)

    def rows(self, z: torch.Tensor) -> torch.Tensor:
        """Maps tokens (b, tokens, c) to the conditioning of each row (b, rows, c)."""
        return z if self.config.aggregator is None else self.aggregate(z)

    def sample(self, z, temperature=1.0, *, noise):
        """Samples rows (b, n, channels) from noise (K + 1, b, n, channels)."""
        c = self.rows(z)

        def denoise(x, timestep):
            return self.net.stages(x, torch.full((len(x),), timestep), c)["out"]

        schedule = diffusion.Schedule(1000, self.config.sampling_steps)
        return diffusion.sample_loop(
            schedule, denoise, noise, temperature=temperature, clip=self.config.clip
        )


def _head(config: HeadConfig) -> nn.Module:
    if config.kind == "grafted":
        return GraftedActionHead(dataclasses.asdict(config))
    return MLPHead(config)


class MAR(nn.Module):
    """The transformer and the heads."""

    def __init__(self, policy: PolicyConfig):
        super().__init__()
        self.config = c = policy.mar
        dim, dec = c.encoder_embed_dim, c.decoder_embed_dim
        for name, shape in _tables(c).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        for name, width in _projections(c).items():
            setattr(self, name, nn.Linear(width, dim))
        self.z_proj_ln = nn.LayerNorm(dim, eps=1e-6)
        self.encoder_norm = nn.LayerNorm(dim, eps=c.norm_eps)
        self.decoder_norm = nn.LayerNorm(dec, eps=c.norm_eps)
        self.decoder_embed = nn.Linear(dim, dec)
        sides = (
            ("encoder_blocks", c.encoder_depth, dim, c.encoder_num_heads),
            ("decoder_blocks", c.decoder_depth, dec, c.decoder_num_heads),
        )
        for name, depth, width, heads in sides:
            blocks = (_Block(width, heads, c.mlp_ratio, c.norm_eps) for _ in range(depth))
            setattr(self, name, nn.ModuleList(blocks))
        heads = {
            "diffloss": policy.video_head,
            "diffloss_wrist": policy.wrist_head,
            "diffactloss": policy.action_head,
            "diffproploss": policy.proprio_head,
        }
        for name, config in heads.items():
            if config is not None:
                setattr(self, name, _head(config))

    def embed(self, task_mode: str, tokens, mask, cond, streams: dict) -> torch.Tensor:
        """Computes the encoder's input before its first norm.

        tokens and cond are (b, t, s, c), mask is (b, t, s), streams as for Flax's `MAR.embed`.
        """
        c, batch, total = self.config, len(cond), self.config.n_tokens

        def fake(name, n=total):
            return getattr(self, name)[:, None].expand(batch, n, -1)

        def flat(x):
            return rearrange(x, "b t s c -> b (t s) c")

        def future(values, project, name):
            if task_mode == "policy_model":
                return fake(name)
            x = flat(project(values))
            if task_mode == "inverse_model":
                return x
            return torch.where(rearrange(mask, "b t s -> b (t s) 1") == 1, fake(name), x)

        parts = [future(tokens, self.z_proj, "fake_latent_x")]
        if c.wrist:
            wrist = streams.get("wrist_tokens")
            parts.append(future(wrist, self.z_proj_wrist, "fake_latent_wrist_x"))
        hidden = task_mode == "inverse_model"
        parts.append(fake("fake_latent_x") if hidden else flat(self.z_proj_cond(cond)))
        per_action = total // c.n_actions
        if c.history_action:
            past = self.history_action_proj_cond(streams["history_nactions"])
            parts.append(past.repeat_interleave(per_action, dim=1))
        if task_mode == "dynamic_model":
            actions = self.action_proj_cond(streams["nactions"])
        else:
            actions = fake("fake_action_latent", c.n_actions)
        parts.append(actions.repeat_interleave(per_action, dim=1))
        if c.proprio_dim:
            if c.proprio_image:
                parts.append(flat(self.proprioception_image_proj_cond(streams["proprio_tokens"])))
            state = self.proprioception_proj_cond(streams["proprio"])
            parts.append(state.repeat_interleave(total // c.proprio_steps, dim=1))
        x = self.proj_cond_x_layer(torch.cat(parts, dim=-1)) + self._grid("", "pos_embed")
        if c.text_dim:
            text = self.text_proj_cond(streams["text_latents"])
            text = repeat(text, "b c -> b n c", n=c.text_tokens) + self.text_pos_embed
            x = torch.cat([text, x], dim=1)
        return x

    def stages(self, task_mode: str, tokens, mask, cond, streams: dict) -> dict[str, torch.Tensor]:
        """Returns all results: "embed", "encoder_block<i>", "encoder_out", ..., "decoder_out"."""
        stages = {"embed": self.embed(task_mode, tokens, mask, cond, streams)}
        x = self.z_proj_ln(stages["embed"])
        for i, block in enumerate(self.encoder_blocks):
            x = stages[f"encoder_block{i}"] = block(x)
        x = stages["encoder_out"] = self.encoder_norm(x)
        position = self._grid("decoder_", "pos_embed")
        if self.config.text_dim:
            position = torch.cat([self.decoder_text_pos_embed, position], dim=1)
        x = self.decoder_embed(x) + position
        for i, block in enumerate(self.decoder_blocks):
            x = stages[f"decoder_block{i}"] = block(x)
        x = self.decoder_norm(x)
        if self.config.text_dim:
            x = x[:, self.config.text_tokens :]
        return stages | {"decoder_out": x + self._grid("diffusion_", "embed")}

    def _grid(self, prefix: str, suffix: str) -> torch.Tensor:
        temporal, spatial = (
            getattr(self, f"{prefix}{a}_{suffix}") for a in ("temporal", "spatial")
        )
        return rearrange(temporal[:, :, None] + spatial[:, None], "b t s c -> b (t s) c")


def _tables(c: MARConfig) -> dict[str, tuple[int, ...]]:
    dim, dec, frames, cells = (
        c.encoder_embed_dim,
        c.decoder_embed_dim,
        c.n_frames,
        c.tokens_per_frame,
    )
    names = {"fake_latent_x": (1, dim), "fake_action_latent": (1, dim)}
    for prefix, suffix, width in (
        ("", "pos_embed", dim),
        ("decoder_", "pos_embed", dec),
        ("diffusion_", "embed", dec),
    ):
        names[f"{prefix}temporal_{suffix}"] = (1, frames, width)
        names[f"{prefix}spatial_{suffix}"] = (1, cells, width)
    if c.wrist:
        names["fake_latent_wrist_x"] = (1, dim)
    if c.history_action:
        names["fake_latent_history_action"] = (1, dim)
    if c.text_dim:
        names["fake_latent"] = (1, dim)
        names["text_pos_embed"] = (1, c.text_tokens, dim)
        names["decoder_text_pos_embed"] = (1, c.text_tokens, dec)
    return names


def _projections(c: MARConfig) -> dict[str, int]:
    widths = {"z_proj": c.token_dim, "z_proj_cond": c.token_dim, "action_proj_cond": c.action_dim}
    streams = 3
    if c.wrist:
        widths["z_proj_wrist"] = c.token_dim
        streams += 1
    if c.history_action:
        widths["history_action_proj_cond"] = c.action_dim
        streams += 1
    if c.proprio_dim:
        widths["proprioception_proj_cond"] = c.proprio_dim
        widths["proprioception_image_proj_cond"] = c.token_dim
        streams += 1 + c.proprio_image
    if c.text_dim:
        widths["text_proj_cond"] = c.text_dim
    return widths | {"proj_cond_x_layer": streams * c.encoder_embed_dim}


class _Field(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale, self.offset = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        stats = {k: nn.Parameter(torch.zeros(width)) for k in ("min", "max", "mean", "std")}
        self.input_stats = nn.ParameterDict(stats)


class Policy(nn.Module):
    """A whole policy with the names of the original's state dict."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self._dummy_variable = nn.Parameter(torch.zeros(0))
        self.vae_model = VAE(config.vae)
        self.model = MAR(config)
        if config.text_tower is not None:
            self.text_model = TextTower(config.text_tower)
        fields = {name: _Field(width) for name, width in config.normalizer_fields}
        self.normalizer = nn.Module()
        self.normalizer.params_dict = nn.ModuleDict(fields)
