"""The samplers' order of accuracy on a process whose solution is known, and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uva_jax.models import diffusion
from uva_jax.runtime.errors import UserError

MEAN, DEVIATION = 0.3, 0.5  # of normally distributed data, whose best prediction is known


def solve(steps: int, sampler: str) -> tuple[np.ndarray, np.ndarray]:
    """Samples normal data, in steps of equal growth of log(alpha / sigma).

    Returns:
      x at the last noise level, sampled and by the exact solution of the probability flow.
    """
    bar = 1 / (1 + np.exp(-2 * np.linspace(2.0, -3.0, steps)))
    schedule = diffusion.Schedule(1.0 - bar / np.append(1.0, bar[:-1]), np.arange(steps))
    alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)
    spread = np.sqrt((alpha * DEVIATION) ** 2 + sigma**2)
    factor, shift = jnp.asarray(sigma / spread**2), jnp.asarray(alpha * MEAN)

    def denoise(x, t):
        eps = factor[t] * (x - shift[t])
        return jnp.concatenate([eps, jnp.zeros_like(eps)], axis=-1)

    noise = jax.random.normal(jax.random.key(0), (steps + 1, 50, 1))
    _, trace = diffusion.sample_loop(
        schedule, denoise, noise, clip=False, sampler=sampler, return_steps=True
    )
    start = np.asarray(noise[0], np.float64)
    wanted = alpha[0] * MEAN + spread[0] * (start - alpha[-1] * MEAN) / spread[-1]
    return np.asarray(trace["x"][-2]), wanted


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm++", 2)])
def test_halving_the_steps_divides_the_error_by_two_to_the_order(sampler, order):
    errors = []
    for steps in (41, 81, 161):
        found, wanted = solve(steps, sampler)
        errors.append(np.sqrt(np.mean((found - wanted) ** 2)))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, order, atol=0.15)


def test_dpm_is_ddim_where_there_is_no_step_before_to_extrapolate_from(teacher):
    z = jax.random.normal(jax.random.key(0), (2, 64, 32))

    def sample(steps, **how):
        noise = jax.random.normal(jax.random.key(1), (steps + 1, 2, 16, 2))
        options = {"noise": noise, "sampling_steps": str(steps), "return_steps": True}
        return teacher.action_head.sample(z, **options, **how)[1]["x"]

    for steps in (1, 2):
        np.testing.assert_allclose(
            sample(steps, sampler="dpm++"), sample(steps, sampler="ddim"), atol=1e-4
        )
    np.testing.assert_array_equal(sample(5, sampler="ddim"), sample(5, eta=0.0))
    assert np.abs(sample(5, sampler="ddim") - sample(5)).max() > 0.1


def test_both_are_exact_where_the_predicted_x0_does_not_change():
    schedule, x0 = diffusion.make_schedule("7", 1000), 0.25
    alpha, sigma = np.sqrt(schedule.alphas_cumprod), np.sqrt(1 - schedule.alphas_cumprod)
    where = {int(t): i for i, t in enumerate(schedule.timestep_map)}
    index = (
        jnp.zeros(1000, jnp.int32).at[jnp.array(list(where))].set(jnp.array(list(where.values())))
    )

    def denoise(x, t):
        i = index[t]
        eps = (x - jnp.asarray(alpha)[i] * x0) / jnp.asarray(sigma)[i]
        return jnp.concatenate([eps, eps], axis=-1)

    noise = jax.random.normal(jax.random.key(0), (8, 3, 1))
    for sampler in ("ddim", "dpm++"):
        found = diffusion.sample_loop(schedule, denoise, noise, sampler=sampler)
        np.testing.assert_allclose(found, x0, atol=1e-4)


def test_steps_are_spaced_evenly_in_log_snr():
    schedule = diffusion.make_schedule("logsnr20", 1000)
    assert len(schedule) == 20 and schedule.timestep_map[-1] == 999
    log_snr = np.log(schedule.alphas_cumprod / (1 - schedule.alphas_cumprod))[:-1]
    # Near the data, where a timestep is a large part of the way, they are rounded the most.
    np.testing.assert_allclose(np.diff(log_snr[3:]), np.diff(log_snr)[8:].mean(), rtol=0.15)
    assert diffusion.make_schedule("logsnr1", 1000).timestep_map.tolist() == [999]


def test_an_unknown_sampler_is_refused(teacher):
    with pytest.raises(UserError, match="the sampler is 'euler', but it can be ancestral, ddim"):
        teacher.action_head.sample(jnp.zeros((1, 64, 32)), key=jax.random.key(0), sampler="euler")
