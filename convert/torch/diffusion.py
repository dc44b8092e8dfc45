"""Gaussian diffusion with a learned-range variance in torch, for the grafted head.

Formulas are those of improved DDPM (arXiv 2102.09672), as in `uva_jax/models/diffusion.py`.

It is part of the exported `grafted_head.py` (`convert/standalone.py`), so it must run with Python
3.8 and torch 2.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def kept_steps(num_steps: int, respacing: str) -> list[int]:
    """Returns the original timesteps of a respaced process; see `runtime/respacing.py`."""
    if respacing == "":
        return list(range(num_steps))
    if respacing.startswith("ddim"):
        count = int(respacing[4:])
        strides = [s for s in range(1, num_steps) if len(range(0, num_steps, s)) == count]
        return list(range(0, num_steps, strides[0]))
    sections = [int(part) for part in respacing.split(",")]
    kept, start = set(), 0
    for i, count in enumerate(sections):
        size = num_steps // len(sections) + (i < num_steps % len(sections))
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):  # accumulated as in the original, so that rounding is equal
            kept.add(start + round(position))
            position += stride
        start += size
    return sorted(kept)


class Schedule:
    """The float32 tables of a cosine process, computed in float64."""

    def __init__(self, num_steps: int = 1000, respacing: str = ""):
        def alpha_bar(u):
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        full = [
            min(1 - alpha_bar((i + 1) / num_steps) / alpha_bar(i / num_steps), 0.999)
            for i in range(num_steps)
        ]
        self.timesteps = kept_steps(num_steps, respacing)
        full = torch.tensor(full, dtype=torch.float64, device="cpu")
        bar = (1.0 - full).cumprod(0)[self.timesteps]
        previous = torch.cat([torch.ones_like(bar[:1]), bar[:-1]])
        beta = 1.0 - bar / previous
        variance = beta * (1.0 - previous) / (1.0 - bar)
        # The first variance is 0; the second replaces it under the logarithm.
        clipped = torch.cat([variance[1:2], variance[1:]]) if len(bar) > 1 else variance + 1e-20
        tables = {
            "signal": bar.sqrt(),
            "noise": (1.0 - bar).sqrt(),
            "inverse_signal": (1.0 / bar).sqrt(),
            "inverse_noise": (1.0 / bar - 1.0).sqrt(),
            "mean_x0": beta * previous.sqrt() / (1.0 - bar),
            "mean_xt": (1.0 - previous) * (1.0 - beta).sqrt() / (1.0 - bar),
            "log_low": clipped.log(),
            "log_high": beta.log(),
        }
        self.tables = {name: values.float() for name, values in tables.items()}

    def __len__(self) -> int:
        return len(self.timesteps)

    def at(self, name: str, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Returns table values at t, with axes added to broadcast against `like`."""
        values = self.tables[name].to(like.device)[t]
        return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))

    def diffuse(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Diffuses x0 (..., c) to steps t (leading axes of x0)."""
        return self.at("signal", t, x0) * x0 + self.at("noise", t, x0) * noise

    def posterior_mean(self, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the mean of x_{t-1} given x0 and x_t, all (..., c)."""
        return self.at("mean_x0", t, x_t) * x0 + self.at("mean_xt", t, x_t) * x_t

    def predicted_x0(self, x_t: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """Returns the x0 that x_t and eps imply, all (..., c)."""
        return self.at("inverse_signal", t, x_t) * x_t - self.at("inverse_noise", t, x_t) * eps

    def log_variance(self, raw: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the log-variance (..., c) of a step from the network's raw output."""
        fraction = (raw + 1) / 2
        low, high = self.at("log_low", t, raw), self.at("log_high", t, raw)
        return fraction * high + (1 - fraction) * low


def _binned_nll(x0, mean, log_std):
    """Computes the loss of `_discretized_nll` of `uva_jax/models/diffusion.py`."""

    def logit(x):
        return 2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)

    inverse_std = torch.exp(-log_std)
    above = logit(inverse_std * (x0 - mean + 1.0 / 255.0))
    below = logit(inverse_std * (x0 - mean - 1.0 / 255.0))
    up_to, beyond = torch.sigmoid(above), torch.sigmoid(-below)
    inside = up_to * beyond * -torch.expm1(below - above)
    probability = torch.where(x0 > 0.999, beyond, inside)
    return -torch.where(x0 < -0.999, up_to, probability).clamp(min=1e-12).log()


def training_losses(
    schedule: Schedule,
    output: torch.Tensor,
    x0: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Returns {"mse", "vb", "loss"} per row of output (..., 2 c), x0, x_t and noise (..., c)."""
    eps, raw = output.chunk(2, dim=-1)
    mse = ((noise - eps) ** 2).mean(-1)
    x0_predicted = schedule.predicted_x0(x_t, t, eps.detach())
    mean = schedule.posterior_mean(x0_predicted, x_t, t)
    log_variance = schedule.log_variance(raw, t)
    true_mean = schedule.posterior_mean(x0, x_t, t)
    true_log_variance = schedule.at("log_low", t, x0)
    kl = 0.5 * (
        -1.0
        + log_variance
        - true_log_variance
        + torch.exp(true_log_variance - log_variance)
        + (true_mean - mean) ** 2 * torch.exp(-log_variance)
    )
    nll = _binned_nll(x0, mean, 0.5 * log_variance)
    first = (t == 0).reshape(t.shape + (1,) * (mse.ndim - t.ndim))
    vb = torch.where(first, nll.mean(-1), kl.mean(-1)) / math.log(2.0)
    return {"mse": mse, "vb": vb, "loss": mse + vb}


@torch.no_grad()
def few_step_loop(
    denoise: Callable[[torch.Tensor, int], torch.Tensor],
    noise: torch.Tensor,
    *,
    temperature: float = 1.0,
    clip: bool = True,
) -> torch.Tensor:
    """Samples x0 (..., c) in K evaluations from noise (K + 1, ..., c); the last is not used.

    Before each evaluation x0, at first zeros, is diffused again. `denoise(x, timestep)` gives eps
    at an original timestep; the first is 450 of 1,000, each further one a third of the last.
    """
    schedule, x0 = Schedule(1000), torch.zeros_like(noise[0])
    for j in range(len(noise) - 1):
        step = torch.full(x0.shape[:1], 450 // 3**j, device=x0.device)
        x = schedule.diffuse(x0, step, noise[j] * (temperature if j else 1.0))
        x0 = schedule.predicted_x0(x, step, denoise(x, 450 // 3**j))
        if clip:
            x0 = x0.clamp(-1.0, 1.0)
    return x0


@torch.no_grad()
def sample_loop(
    schedule: Schedule,
    denoise: Callable[[torch.Tensor, int], torch.Tensor],
    noise: torch.Tensor,
    *,
    temperature: float = 1.0,
    clip: bool = True,
) -> torch.Tensor:
    """Samples x0 (..., c) by ancestral sampling.

    Args:
      schedule: a process of K steps.
      denoise: (x, original timestep) -> eps and variance (..., 2 c).
      noise: (K + 1, ..., c); index 0 is x_T, index j the noise of step j.
      temperature: factor on the noise of each step.
      clip: clip the predicted x0 to [-1, 1].

    Raises:
      ValueError: `noise` does not have K + 1 entries.
    """
    if len(noise) != len(schedule) + 1:
        raise ValueError(
            f"sampling {len(schedule)} steps needs {len(schedule) + 1} noise arrays (x_T and one "
            f"per step), but {len(noise)} were given"
        )
    x = noise[0]
    for i in reversed(range(len(schedule))):
        t = torch.tensor(i, device=x.device)
        eps, raw = denoise(x, schedule.timesteps[i]).chunk(2, dim=-1)
        x0 = schedule.predicted_x0(x, t, eps)
        if clip:
            x0 = x0.clamp(-1.0, 1.0)
        x = schedule.posterior_mean(x0, x, t)
        if i:
            x = x + torch.exp(0.5 * schedule.log_variance(raw, t)) * temperature * noise[-1 - i]
    return x
