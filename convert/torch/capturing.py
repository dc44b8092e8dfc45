"""The capture of a teacher's activations in torch, for timing it beside the one in JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from einops import rearrange

from convert.torch import acting, timing
from convert.torch.reference import Policy
from uva_jax.models.policy_config import PolicyConfig

_FRAMES = 16  # that the VAE encodes at a time, so that full-size maps fit a CPU's memory


def capture(
    config: PolicyConfig,
    data: Mapping[str, np.ndarray],
    dtype: str,
    shared: bool,
    compiled: bool,
) -> tuple[Callable[[], None], float]:
    """Returns a function that captures strips of windows to its end, and its operations.

    Args:
      config: of the teacher; weights are random.
      data: "image" (strips, strip + n_frames - 1, h, w, 3) uint8, of which window k has frames
        k..k + n_frames - 1, and "action" (strips, strip, n, a), normalised.
      dtype: of products, "float32" or "bfloat16".
      shared: encode every frame of a strip once, instead of once for each window.
      compiled: apply `torch.compile` to VAE, transformer and head.

    It computes the arrays of `uva_jax.graft.capture.cache_arrays`.
    """
    wrap, place = timing.wrapper(compiled), timing.device()
    policy = timing.ready(Policy(config).requires_grad_(False), dtype)
    head, schedule = policy.model.diffactloss, timing.schedule(config.action_head.train_steps)
    encode = wrap(policy.vae_model.encode)
    tokens = wrap(lambda x: acting.tokens_of(policy.model, x))
    images, actions = (torch.from_numpy(data[k]) for k in ("image", "action"))
    strips, strip = actions.shape[:2]
    window = torch.arange(strip)[:, None] + torch.arange(config.mar.n_frames)

    def moments(frames):
        return acting.moments(encode, frames.to(place), config.image_size, _FRAMES)

    @wrap
    def inner(z, actions, t, noise):
        e_c = head.net.cond_embed(head.rows(z))
        y = head.net.time_embed(t)[:, None] + e_c
        h = head.net.input_proj(schedule.diffuse(actions, t, noise))
        inputs, residuals = [], []
        for block in head.net.res_blocks:
            following = block(h, y)
            inputs.append(h)
            residuals.append(following - h)
            h = following
        return {
            "condition": e_c,
            "h": torch.stack(inputs, 1),
            "residual": torch.stack(residuals, 1),
        }

    def run():
        with torch.inference_mode(), timing.precision(dtype):
            if shared:
                pair = [x[:, window].flatten(0, 1) for x in moments(images)]
            else:
                pair = moments(rearrange(images[:, window], "b k t h w c -> (b k) t h w c"))
            z = tokens(acting.sampled_latents(*pair, config)).float()
            targets = actions.to(place).flatten(0, 1)
            t = torch.randint(len(schedule), (len(z),), device=place)
            noise = torch.randn_like(targets)
            found = {"z": z, "actions": targets, "t": t, "noise": noise}
            return found | inner(z, targets, t, noise)

    return timing.measured(run)
