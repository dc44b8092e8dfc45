"""Gaussian diffusion with a learned-range variance: schedules, training loss, samplers.

The process is that of improved DDPM (Nichol & Dhariwal, arXiv 2102.09672) as MAR and UVA use it:
cosine betas, eps-prediction, variance between beta and the posterior's. Schedules are computed in
float64 NumPy and used in float32. The module is independent of networks: samplers take
`denoise(x, timesteps) -> (..., 2 c)`, whose first half is eps and second the variance fraction.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uva_jax.runtime.errors import UserError
from uva_jax.runtime.respacing import SAMPLERS, TRAIN_STEPS, space_timesteps


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """float64 tables of a (possibly respaced) process; `timestep_map[i]` is the original t."""

    betas: np.ndarray
    timestep_map: np.ndarray

    def __len__(self) -> int:
        return len(self.betas)

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        return np.cumprod(1.0 - self.betas)

    @functools.cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        return np.append(1.0, self.alphas_cumprod[:-1])

    @functools.cached_property
    def sqrt_recip_alphas_cumprod(self) -> np.ndarray:
        return np.sqrt(1.0 / self.alphas_cumprod)

    @functools.cached_property
    def sqrt_recipm1_alphas_cumprod(self) -> np.ndarray:
        return np.sqrt(1.0 / self.alphas_cumprod - 1.0)

    @functools.cached_property
    def posterior_variance(self) -> np.ndarray:
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @functools.cached_property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """The second entry replaces the first, which would be log 0."""
        if len(self) == 1:
            return np.log(np.maximum(self.posterior_variance, 1e-20))
        return np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    @functools.cached_property
    def posterior_mean_coef1(self) -> np.ndarray:
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @functools.cached_property
    def posterior_mean_coef2(self) -> np.ndarray:
        return ((1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas)) / (
            1.0 - self.alphas_cumprod
        )


def cosine_betas(num_steps: int) -> np.ndarray:
    """Returns the cosine schedule with betas capped at 0.999 (arXiv 2102.09672, equation 17)."""

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array(
        [
            min(1 - alpha_bar((i + 1) / num_steps) / alpha_bar(i / num_steps), 0.999)
            for i in range(num_steps)
        ]
    )


@functools.lru_cache(maxsize=32)
def make_schedule(respacing: str = "", num_steps: int = TRAIN_STEPS) -> Schedule:
    """Returns the respaced cosine process; betas follow from the kept cumulative alphas.

    Args:
      respacing: see `space_timesteps`.
      num_steps: of the original process; by default, that of sampling.

    Raises:
      UserError: the process cannot be respaced so.
    """
    full = Schedule(cosine_betas(num_steps), np.arange(num_steps))
    kept = np.array(space_timesteps(num_steps, respacing))
    alphas_cumprod = full.alphas_cumprod[kept]
    previous = np.append(1.0, alphas_cumprod[:-1])
    return Schedule(1.0 - alphas_cumprod / previous, kept)


def _at(table: np.ndarray, index: jax.Array, like: jax.Array) -> jax.Array:
    """Returns table[index] in float32, with trailing axes added to broadcast against `like`."""
    values = jnp.asarray(table, jnp.float32)[index]
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def q_sample(schedule: Schedule, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """Diffuses x0 (..., c) to step t (leading axes of x0, integers): same shape as x0."""
    return (
        _at(np.sqrt(schedule.alphas_cumprod), t, x0) * x0
        + _at(np.sqrt(1.0 - schedule.alphas_cumprod), t, x0) * noise
    )


def predict_x0(schedule: Schedule, x_t: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """Returns the x0 (..., c) that x_t and eps (..., c) imply at timesteps t."""
    return (
        _at(schedule.sqrt_recip_alphas_cumprod, t, x_t) * x_t
        - _at(schedule.sqrt_recipm1_alphas_cumprod, t, x_t) * eps
    )


def _posterior_mean(schedule: Schedule, x0, x_t, t):
    return (
        _at(schedule.posterior_mean_coef1, t, x_t) * x0
        + _at(schedule.posterior_mean_coef2, t, x_t) * x_t
    )


def _log_variance(schedule: Schedule, fraction_raw: jax.Array, t: jax.Array) -> jax.Array:
    low = _at(schedule.posterior_log_variance_clipped, t, fraction_raw)
    high = _at(np.log(schedule.betas), t, fraction_raw)
    fraction = (fraction_raw + 1) / 2
    return fraction * high + (1 - fraction) * low


def _discretized_nll(x0: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """Computes the negative log-likelihood of a Gaussian binned to width 2/255, open at the edges.

    The normal distribution function is approximated by tanh, that is, a sigmoid. A bin's
    probability is a product and not a difference of two values, because in float32 the difference
    cancels in the tails.
    """
    centered, inverse_std = x0 - mean, jnp.exp(-log_std)

    def logit(x):
        return 2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)

    above = logit(inverse_std * (centered + 1.0 / 255.0))
    below = logit(inverse_std * (centered - 1.0 / 255.0))
    up_to, beyond = jax.nn.sigmoid(above), jax.nn.sigmoid(-below)
    inside = up_to * beyond * -jnp.expm1(below - above)
    probability = jnp.where(x0 < -0.999, up_to, jnp.where(x0 > 0.999, beyond, inside))
    return -jnp.log(jnp.maximum(probability, 1e-12))


def x0_factor(schedule: Schedule, t: jax.Array) -> jax.Array:
    """Returns the squared error of the predicted x0 over that of eps, at indices t (...)."""
    return jnp.asarray(schedule.sqrt_recipm1_alphas_cumprod**2, jnp.float32)[t]


def training_losses(
    schedule: Schedule,
    model_output: jax.Array,
    x0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    noise: jax.Array,
) -> dict[str, jax.Array]:
    """Computes the MSE of eps plus the variational bound for the variance (in bits, full weight).

    Args:
      schedule: the training process.
      model_output: (..., 2 c) eps and variance fraction.
      x0, x_t, noise: (..., c).
      t: timesteps on the leading axes of x0.

    Returns:
      {"mse", "vb", "loss"}, each of shape x0.shape[:-1], means over channels. The gradient of the
      bound with respect to eps is stopped, so it trains only the variance.
    """
    model_output = model_output.astype(jnp.float32)
    eps, fraction = jnp.split(model_output, 2, axis=-1)
    mse = jnp.mean((noise - eps) ** 2, axis=-1)
    mean = _posterior_mean(
        schedule, predict_x0(schedule, x_t, t, jax.lax.stop_gradient(eps)), x_t, t
    )
    log_variance = _log_variance(schedule, fraction, t)
    true_mean = _posterior_mean(schedule, x0, x_t, t)
    true_log_variance = _at(schedule.posterior_log_variance_clipped, t, x0)
    kl = 0.5 * (
        -1.0
        + log_variance
        - true_log_variance
        + jnp.exp(true_log_variance - log_variance)
        + (true_mean - mean) ** 2 * jnp.exp(-log_variance)
    )
    nll = _discretized_nll(x0, mean, 0.5 * log_variance)
    t_full = t.reshape(t.shape + (1,) * (mse.ndim - t.ndim))
    vb = jnp.where(t_full == 0, jnp.mean(nll, -1), jnp.mean(kl, -1)) / math.log(2.0)
    return {"mse": mse, "vb": vb, "loss": mse + vb}


def _dpm_tables(schedule: Schedule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns what DPM-Solver++(2M) multiplies x, x0 and the last step's x0 by, each (K,) float64.

    Algorithm 2 of arXiv 2211.01095, the second-order multistep method that extrapolates x0 from two
    evaluations. With lambda = log(alpha / sigma) and h its growth in a step from t to s, that step
    is x_s = sigma_s / sigma_t x_t - alpha_s (exp(-h) - 1) D,
    D = (1 + 1 / 2r) x0(t) - 1 / 2r x0(step before) and r = h(step before) / h. The first step has
    no step before, and in the last one, to sigma_s = 0, h is infinite: these two are those of DDIM,
    of first order.
    """
    bar, bar_next = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    ratio = np.sqrt((1.0 - bar_next) / (1.0 - bar))
    gain = np.sqrt(bar_next) - np.sqrt(bar) * ratio  # - alpha_s (exp(-h) - 1), without infinities
    growth = -np.diff(0.5 * np.log(bar / (1.0 - bar)))  # of the step from index i + 1 to i
    weight = np.zeros(len(schedule))
    weight[1:-1] = growth[:-1] / (2.0 * growth[1:])
    return ratio, gain * (1.0 + weight), -gain * weight


def group_size(steps: int, at_once: int) -> int:
    """Returns the largest divisor of `steps` that is at most `at_once`."""
    return max(k for k in range(1, min(steps, at_once) + 1) if steps % k == 0)


def few_step_times(evaluations: int) -> np.ndarray:
    """Returns the timesteps of `few_step_loop`: 450, and each further one a third of the last.

    Of 1,000 timesteps, 450 is where a diffusion head that is given only noise finds the mean of its
    own samples best: at earlier timesteps it trusts its input more, at later ones the errors of its
    eps count more.
    """
    return (450 // 3 ** np.arange(evaluations)).astype(np.int32)


def few_step_loop(
    denoise: Callable[[jax.Array, int], jax.Array],
    noise: jax.Array,
    *,
    temperature: float = 1.0,
    clip: bool = True,
) -> jax.Array:
    """Samples in few evaluations (as consistency models, arXiv 2303.01469, algorithm 1).

    Each evaluation takes the x0 that the last one implies, diffused again to an earlier timestep.
    The first takes zeros, diffused.

    Args:
      denoise: (x (..., c), timestep) -> eps (..., c).
      noise: (K + 1, ..., c) for K evaluations; index j is the noise that is added before evaluation
        j. The last one is not used.
      temperature: factor on all noise but the first.
      clip: clip x0 to [-1, 1].

    Returns:
      x0 (..., c).
    """
    schedule = make_schedule()
    x0 = jnp.zeros(noise.shape[1:])
    for j, t in enumerate(few_step_times(len(noise) - 1)):
        times = jnp.full(x0.shape[:1], t)
        x = q_sample(schedule, x0, times, noise[j] * (temperature if j else 1.0))
        x0 = predict_x0(schedule, x, times, denoise(x, int(t)).astype(jnp.float32))
        if clip:
            x0 = jnp.clip(x0, -1.0, 1.0)
    return x0


def sample_loop(
    schedule: Schedule,
    denoise: Callable[[jax.Array, Any], jax.Array],
    noise: jax.Array,
    *,
    prepare: Callable[[jax.Array], Any] = lambda t: t,
    at_once: int = 1,
    temperature: float = 1.0,
    clip: bool = True,
    sampler: str = "ancestral",
    eta: float | None = None,
    return_steps: bool = False,
):
    """Samples x0 from noise by a respaced process, under `lax.scan`.

    Args:
      schedule: the sampling process of K steps.
      denoise: called with x (..., c) and the part of `prepare`'s result for the step.
      noise: (K + 1, ..., c); index 0 is the initial x_T, index j the noise of step j. The last one
        is not used.
      prepare: called with the original timesteps (k,) int32 of several steps; returns a tree of
        arrays with a leading axis k. Default: the timesteps themselves.
      at_once: for how many steps `prepare` is called at most; K has to be a multiple, so the
        largest divisor of K is used.
      temperature: factor on the noise of each step, but not on x_T.
      clip: clip the predicted x0 to [-1, 1] (actions; video latents are not clipped).
      sampler: "ancestral", with the learned variance; "ddim", deterministic; or "dpm++", likewise
        and of second order (see `_dpm_tables`).
      eta: a number chooses DDIM with so much noise (arXiv 2010.02502, equation 16; 0 is
        deterministic).
      return_steps: also return every x and predicted x0, in order of execution.

    Returns:
      x0 (..., c), or (x0, {"x": (K, ..., c), "pred_x0": (K, ..., c)}).

    Raises:
      UserError: there is no such sampler.
      ValueError: `noise` has not K + 1 entries.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"the sampler is {sampler!r}, but it can be {', '.join(SAMPLERS)}")
    steps = len(schedule)
    if noise.shape[0] != steps + 1:
        raise ValueError(
            f"sampling {steps} steps needs {steps + 1} noise arrays (x_T and one per step), but "
            f"{noise.shape[0]} were given"
        )
    timestep_map = jnp.asarray(schedule.timestep_map, jnp.int32)
    if sampler == "ddim" and eta is None:
        eta = 0.0
    of_x, of_x0, of_last = _dpm_tables(schedule)

    def step(carry, inputs):
        (x, last_x0), (i, step_noise, prepared) = carry, inputs
        output = denoise(x, prepared).astype(jnp.float32)
        eps, fraction = jnp.split(output, 2, axis=-1)
        x0 = predict_x0(schedule, x, i, eps)
        if clip:
            x0 = jnp.clip(x0, -1.0, 1.0)
        if sampler == "dpm++":
            mean = _at(of_x, i, x) * x + _at(of_x0, i, x) * x0 + _at(of_last, i, x) * last_x0
            std = 0.0
        elif eta is None:
            mean = _posterior_mean(schedule, x0, x, i)
            std = jnp.exp(0.5 * _log_variance(schedule, fraction, i)) * temperature
        else:
            eps = (_at(schedule.sqrt_recip_alphas_cumprod, i, x) * x - x0) / _at(
                schedule.sqrt_recipm1_alphas_cumprod, i, x
            )
            alpha, alpha_prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
            sigma = np.sqrt((1 - alpha_prev) / (1 - alpha)) * np.sqrt(1 - alpha / alpha_prev)
            std = _at(eta * sigma, i, x)
            mean = x0 * _at(np.sqrt(alpha_prev), i, x) + eps * _at(
                np.sqrt(np.maximum(1 - alpha_prev - (eta * sigma) ** 2, 0.0)), i, x
            )
            std = std * temperature
        x = mean + jnp.where(i > 0, std, 0.0) * step_noise
        return (x, x0), (x, x0) if return_steps else None

    def group(carry, inputs):
        i, noises = inputs
        return jax.lax.scan(step, carry, (i, noises, prepare(timestep_map[i])))

    size = group_size(steps, at_once)
    order = jnp.arange(steps - 1, -1, -1)
    inputs = [v.reshape(steps // size, size, *v.shape[1:]) for v in (order, noise[1:])]
    start = noise[0].astype(jnp.float32)
    (x, _), trace = jax.lax.scan(group, (start, jnp.zeros_like(start)), inputs)
    if not return_steps:
        return x
    trace = [v.reshape(steps, *v.shape[2:]) for v in trace]
    return x, {"x": trace[0], "pred_x0": trace[1]}
