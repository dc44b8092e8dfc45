"""Steps of a graft's stages in plain torch, for timing them beside those in JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import nn

from convert.torch import acting, timing
from convert.torch.head import GraftedActionHead
from convert.torch.reference import Policy
from uva_jax.models.policy_config import PolicyConfig
from uva_jax.runtime.sections_graft import FinetuneOptions

_EMA = 0.01  # share of new parameters in the moving average


class Training:
    """AdamW with clipping, and optionally a moving average, of some parameters."""

    def __init__(self, params: Iterable[nn.Parameter], options, average: bool = False):
        """`options` has `lr, weight_decay, clip_norm`, and may have `betas`."""
        self.params = list(params)
        self._clip = options.clip_norm
        self._optimizer = torch.optim.AdamW(
            self.params,
            lr=options.lr,
            betas=getattr(options, "betas", (0.9, 0.95)),
            weight_decay=options.weight_decay,
            fused=True,
        )
        self._average = [p.detach().clone() for p in self.params] if average else []

    def step(self, loss: torch.Tensor) -> None:
        """Takes one step down the gradient of a loss."""
        self._optimizer.zero_grad()
        loss.backward()
        if self._clip:
            nn.utils.clip_grad_norm_(self.params, self._clip)
        self._optimizer.step()
        if self._average:
            with torch.no_grad():
                torch._foreach_lerp_(self._average, self.params, _EMA)


def _frozen_parts(options: FinetuneOptions) -> tuple[str, ...]:
    """Returns the starts of names of the grafted head's parameters that the options freeze."""
    inside = (p for p in options.freeze if p.startswith("action_head/"))
    return tuple(p.removeprefix("action_head/").replace("/", ".") for p in inside)


def finetune_step(
    config: PolicyConfig,
    options: FinetuneOptions,
    data: Mapping[str, np.ndarray],
    dtype: str,
    compiled: bool,
) -> tuple[Callable[[], None], float]:
    """Returns a function that does a step of Stage 2 to its end, and its operations.

    Args:
      config: of the graft; weights are random.
      options: what is frozen, and the optimiser.
      data: "z" (b, tokens, c) and "actions" (b, n, a); or, to start from frames, "image"
        (b, n_frames, h, w, 3) uint8 and "action". The transformer then trains unless
        `options.freeze` has "mar".
      dtype: of products, "float32" or "bfloat16".
      compiled: apply `torch.compile` to the networks.
    """
    wrap, place = timing.wrapper(compiled), timing.device()
    tensors = {k: torch.from_numpy(v) for k, v in data.items()}
    frozen = "mar" in options.freeze
    if "z" in data:
        head = timing.ready(GraftedActionHead(dataclasses.asdict(config.action_head)))
        model = head
    else:
        policy = timing.ready(Policy(config))
        policy.vae_model.requires_grad_(False)
        model, head = policy.model, policy.model.diffactloss
        encode = wrap(policy.vae_model.encode)
        tokens = wrap(lambda x: acting.tokens_of(model, x))
    fixed = _frozen_parts(options)
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(not name.startswith(fixed))
    trained = [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and not name.startswith("diffloss.")
        if model is head or not frozen or name.startswith("diffactloss.")
    ]
    training, loss_of = Training(trained, options, average=True), wrap(head.forward)

    def latents():
        with torch.no_grad():
            pair = acting.moments(encode, tensors["image"].to(place), config.image_size)
            return acting.sampled_latents(*pair, config)

    def step():
        with timing.precision(dtype):
            if "z" in data:
                z, target = tensors["z"].to(place), tensors["actions"].to(place)
            else:
                target = tensors["action"].to(place)
                with torch.set_grad_enabled(not frozen):
                    z = tokens(latents())
            loss = loss_of(target, z)
        training.step(loss)

    return timing.measured(step)
