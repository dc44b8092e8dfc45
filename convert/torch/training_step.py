"""A training step of a policy in torch like upstream's, for timing it against the one in JAX.

It is forward, backward and AdamW in mode `policy_model`, with one noise draw per window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch.nn import functional

from convert.torch import diffusion
from convert.torch.reference import Policy
from uva_jax.models.policy_config import PolicyConfig


class Step(NamedTuple):
    """`run()` does one step to its end; `policy` is the trained policy."""

    run: Callable[[], None]
    policy: Policy


def make_step(config: PolicyConfig, batch: Mapping[str, np.ndarray], dtype: str) -> Step:
    """Returns a step on one batch, on the GPU if there is one.

    Args:
      config: the architecture; weights are random.
      batch: "action" (b, n, a) normalised, and either "image" (b, 2 * n_frames, h, w, 3) uint8,
        which the VAE encodes in every step, or its "mean" and "logvar"
        (b, 2 * n_frames, h', w', z).
      dtype: "float32" or "bfloat16" (by autocast).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    policy = Policy(config).to(device)
    for parameter in policy.parameters():  # tables start at zero; any values are good for timing
        torch.nn.init.normal_(parameter, std=0.02)
    head = policy.model.diffactloss
    trained = [p for n, p in policy.model.named_parameters() if not n.startswith("diffloss")]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.02)
    batch = {k: torch.from_numpy(v).to(device) for k, v in batch.items()}
    schedule, n, size = diffusion.Schedule(1000), config.mar.n_frames, len(batch["action"])
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32

    def moments():
        if "image" not in batch:
            return (rearrange(batch[k], "b t h w c -> (b t) c h w") for k in ("mean", "logvar"))
        frames = rearrange(batch["image"], "b t h w c -> (b t) c h w").float() / 127.5 - 1
        frames = functional.interpolate(frames, (config.image_size,) * 2, mode="bilinear")
        return policy.vae_model.encode(frames)

    def run():
        with torch.autocast(device, kind, enabled=kind is not torch.float32):
            with torch.no_grad():
                mean, logvar = moments()
                sampled = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
                sampled = sampled * config.vae.scale_factor
            tokens = rearrange(sampled, "(b t) c h w -> b t (h w) c", b=size)
            mask = torch.ones(tokens[:, n:, :, 0].shape, device=device)
            found = policy.model.stages("policy_model", tokens[:, n:], mask, tokens[:, :n], {})
            condition, target = head.rows(found["decoder_out"]), batch["action"]
            t = torch.randint(0, 1000, target.shape[:2], device=device)
            noise = torch.randn_like(target)
            x_t = schedule.diffuse(target, t, noise)
            output = head.net.stages(x_t, t, condition)["out"].float()
            loss = diffusion.training_losses(schedule, output, target, x_t, t, noise)
        optimizer.zero_grad()
        loss["loss"].mean().backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return Step(run, policy)
