"""A policy's call in torch, whole and by parts, for timing it beside the one in JAX."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from convert.torch import timing
from convert.torch.diffusion import Schedule, few_step_loop, sample_loop
from convert.torch.reference import MAR, MLPHead, Policy
from uva_jax.models.policy_config import PolicyConfig


def sampler(head: nn.Module, steps: str, wrap: Callable = lambda f: f) -> tuple:
    """Returns the parts of a head's `sample`: z -> condition, and (condition, noise) -> actions.

    Args:
      head: an `MLPHead` with an aggregator, or a `GraftedActionHead`.
      steps: respacing of the diffusion; not used by a head that predicts x0.
      wrap: is applied to the condition's function and the network (`torch.compile`).
    """
    config = head.config
    if isinstance(head, MLPHead):
        find = head.rows

        def network(x, t, condition):
            return head.net.stages(x, t, condition)["out"]
    else:
        find, network = head.condition, head.denoise
    find, network = wrap(find), wrap(network)
    schedule = timing.schedule(1000, steps)

    def loop(condition, noise, temperature=1.0):
        def denoise(x, timestep):
            t = torch.full((len(x),), timestep, device=x.device)
            return network(x, t, condition).float()

        if getattr(head, "few_steps", False):
            return few_step_loop(
                lambda x, t: denoise(x, t)[..., : config.channels], noise, clip=config.clip
            )
        return sample_loop(schedule, denoise, noise, temperature=temperature, clip=config.clip)

    return find, loop


def tokens_of(mar: MAR, latents: torch.Tensor) -> torch.Tensor:
    """Computes the video tokens (b, t * s, c) of history latents (b, t, s, z), to act."""
    mask = torch.ones(latents.shape[:3], device=latents.device)
    return mar.stages("policy_model", latents, mask, latents, {})["decoder_out"]


def preprocess(frames: torch.Tensor, size: int) -> torch.Tensor:
    """Converts frames (n, h, w, 3) uint8 to the VAE's input (n, 3, size, size) in [-1, 1]."""
    images = frames.permute(0, 3, 1, 2).float() / 255
    if images.shape[-1] != size:
        images = functional.interpolate(images, (size, size), mode="bilinear")
    return images * 2 - 1


def moments(
    encode: Callable, frames: torch.Tensor, size: int, at_once: int = 0
) -> list[torch.Tensor]:
    """Computes mean and logarithm of the variance of frames' latents, each (b, t, c, h', w').

    Args:
      encode: of a VAE.
      frames: (b, t, h, w, 3) uint8.
      size: of the VAE's input.
      at_once: frames that the VAE encodes at a time; 0: all.
    """
    flat = rearrange(frames, "b t h w c -> (b t) h w c")
    found = [encode(preprocess(part, size)) for part in flat.split(at_once or len(flat))]
    joined = (torch.cat(parts).float() for parts in zip(*found, strict=True))
    return [rearrange(x, "(b t) c h w -> b t c h w", b=len(frames)) for x in joined]


def sampled_latents(mean: torch.Tensor, logvar: torch.Tensor, config: PolicyConfig) -> torch.Tensor:
    """Samples latents of moments (b, t, c, h, w), as the transformer's tokens (b, t, s, c')."""
    latents = (mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)) * config.vae.scale_factor
    p = config.patch_size
    return rearrange(latents, "b t c (h p) (w q) -> b t (h w) (c p q)", p=p, q=p)


def parts(
    config: PolicyConfig,
    dtype: str,
    batch: int,
    steps: str,
    fresh: int,
    ahead: int,
    following: Callable[[], np.ndarray],
    compiled: bool,
) -> dict[str, tuple]:
    """Returns the arguments of `bench_turns.Work` for the call and its parts.

    Args:
      config: the architecture; weights are random.
      dtype: of products, "float32" or "bfloat16".
      batch: observations of a call.
      steps: respacing of the diffusion.
      fresh: frames of a window that the window before does not have.
      ahead: how many of these are encoded before the call.
      following: gives the next window (batch, n_frames, h, w, 3) uint8.
      compiled: apply `torch.compile` to VAE, transformer and head.
    """
    wrap = timing.wrapper(compiled)
    policy = timing.ready(Policy(config).requires_grad_(False), dtype)
    mar, place, head = policy.model, timing.device(), config.action_head
    encode, tokens = wrap(policy.vae_model.encode), wrap(lambda x: tokens_of(mar, x))
    find, loop = sampler(mar.diffactloss, steps, wrap)
    field, size = policy.normalizer.params_dict["action"], config.image_size
    draws = 2 if getattr(head, "few_steps", False) else len(Schedule(1000, steps)) + 1

    def noise():
        return torch.randn(draws, batch, head.n_actions, head.channels, device=place)

    def encoded(frames):
        return moments(encode, torch.from_numpy(frames).to(place), size)

    def act(mean, logvar):
        z = tokens(sampled_latents(mean, logvar, config)).float()
        actions = loop(find(z), noise(), config.temperature)
        actions = (actions - field.offset) / field.scale
        return actions[:, : config.n_action_steps].cpu().numpy()

    kept: list[torch.Tensor] = []
    window: np.ndarray = following()

    def keep(frames):
        nonlocal kept
        parts = zip(kept, encoded(frames), strict=True)
        kept = [torch.cat([a, b], 1)[:, b.shape[1] :] for a, b in parts]

    def before_call():
        nonlocal window
        window = following()
        if ahead:
            keep(window[:, -fresh:][:, :ahead])

    def call():
        keep(window[:, ahead - fresh :])
        return act(*kept)

    def upstream():  # every call encodes all frames
        return act(*encoded(following()))

    with torch.inference_mode(), timing.precision(dtype):
        kept = encoded(following())
        frames = torch.from_numpy(following()[:, ahead - fresh :]).to(place).flatten(0, 1)
        latents = sampled_latents(*kept, config)
        images, z = preprocess(frames, size), tokens(latents).float()
        condition = find(z)
    functions = {
        "call": call,
        "call, all frames": upstream,
        "resize": lambda: preprocess(frames, size),
        "VAE": lambda: encode(images),
        "transformer": lambda: tokens(latents),
        "condition": lambda: find(z),
        "loop": lambda: loop(condition, noise(), config.temperature),
    }

    def acting(function):
        def run():
            with torch.inference_mode(), timing.precision(dtype):
                function()

        return run

    found = {name: timing.measured(acting(run)) for name, run in functions.items()}
    found["call"] += (1, timing.to_end(acting(before_call)))
    return found
