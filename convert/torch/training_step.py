"""A training step of a policy in torch like upstream's, for timing it against the one in JAX.

It is forward, backward and AdamW in mode `policy_model`, with one noise draw per window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange

from convert.torch import acting, diffusion, timing
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
    policy, place = timing.ready(Policy(config)), timing.device()
    head = policy.model.diffactloss
    trained = [p for n, p in policy.model.named_parameters() if not n.startswith("diffloss")]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.02)
    batch = {k: torch.from_numpy(v).to(place) for k, v in batch.items()}
    schedule, n = timing.schedule(1000), config.mar.n_frames

    def moments():
        if "image" in batch:
            return acting.moments(policy.vae_model.encode, batch["image"], config.image_size)
        return (rearrange(batch[k], "b t h w c -> b t c h w") for k in ("mean", "logvar"))

    def step():
        with timing.precision(dtype):
            with torch.no_grad():
                tokens = acting.sampled_latents(*moments(), config)
            mask = torch.ones(tokens[:, n:, :, 0].shape, device=place)
            found = policy.model.stages("policy_model", tokens[:, n:], mask, tokens[:, :n], {})
            condition, target = head.rows(found["decoder_out"]), batch["action"]
            t = torch.randint(0, 1000, target.shape[:2], device=place)
            noise = torch.randn_like(target)
            x_t = schedule.diffuse(target, t, noise)
            output = head.net.stages(x_t, t, condition)["out"].float()
            loss = diffusion.training_losses(schedule, output, target, x_t, t, noise)
        optimizer.zero_grad()
        loss["loss"].mean().backward()
        optimizer.step()

    return Step(timing.to_end(step), policy)
