"""The matrix products and gradients that are optimised for the CPU, against jax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uva_jax.models import layers


def _relative(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("rows", [128, 130])  # in stripes, and not
def test_bfloat16_factors_are_rounded_and_summed_in_float32(rows):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel, grad = (
        jax.random.normal(k, shape)
        for k, shape in zip(keys, ((rows, 24), (24, 40), (rows, 40)), strict=True)
    )
    out, back = jax.vjp(layers.bfloat16_product, x, kernel)
    x, kernel, grad = (v.astype(jnp.bfloat16).astype(jnp.float32) for v in (x, kernel, grad))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, x @ kernel, rtol=1e-5, atol=1e-4)
    to_x, to_kernel = back(grad)
    np.testing.assert_allclose(to_x, grad @ kernel.T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(to_kernel, x.T @ grad, rtol=1e-5, atol=1e-4)


def test_linear_heeds_the_matmul_precision():
    layer = layers.linear(24, 40, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(40.0)
    x = jax.random.normal(jax.random.key(1), (2, 3, 24))
    exact = layer(x)
    with jax.default_matmul_precision("bfloat16"):
        rounded = layer(x)
    assert rounded.shape == exact.shape and rounded.dtype == jnp.float32
    assert 1e-5 < _relative(rounded, exact) < 1e-2
    with jax.default_matmul_precision("default"):
        np.testing.assert_array_equal(layer(x), exact)
